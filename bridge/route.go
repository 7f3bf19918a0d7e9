package bridge

import (
	"context"
	"errors"
	"time"
)

// Addressed is an Upstream that can be reached at several addresses, Config.Addresses.
type Addressed interface {
	// Use makes the following Dials go to the i-th address. It is called between sessions.
	Use(i int)
	// Probe tells whether the i-th address answers: nil, or why not. It disturbs no session and may be called beside one.
	Probe(ctx context.Context, i int) error
}

// route chooses among an upstream's addresses. They are tried in turn, without a pause before all have failed. A link that was
// healthy and is lost begins with the first again. While the link is at another than the first, those before it are probed
// now and then, beside the link; when one answers, the link moves: nothing new is sent, the open acks are waited for, and the
// session ends in order. So nothing is lost, and nothing overtakes.
//
// Only Run's goroutine uses it.
type route struct {
	upstream Addressed // nil: there is one address
	urls     []string
	at       int           // in use
	failed   int           // attempts in a row, none of them healthy, since the last pause
	home     time.Duration // since when a link is up at another address than the first, or a probe failed last
	first    time.Duration // least time from then to the next probe
	wait     time.Duration // time from then to the next probe
	target   int           // where the link moves to, or has moved
	moved    bool          // it has, and nobody knows yet whether that was good
	probes   chan probe    // cap 1: the answer of the one under way; nil: none is
	stop     context.CancelFunc
}

type probe struct {
	i   int
	err error
}

// Times between probes of the addresses before the one in use: doubled each time that a move there ended in a link that was not healthy.
const (
	returnSoonest = time.Minute
	returnLatest  = time.Hour
)

// errMoved ends a session because an address before its own answers again.
var errMoved = errors.New("moving to an address before this one, which answers again")

func newRoute(c Config, up Upstream) route {
	r := route{urls: c.Addresses(), first: c.Tuning.ReturnAfter, wait: c.Tuning.ReturnAfter}
	if a, ok := up.(Addressed); ok && len(r.urls) > 1 {
		r.upstream = a
	}
	return r
}

func (r *route) url() string {
	if len(r.urls) == 0 {
		return ""
	}
	return r.urls[r.at]
}

// use takes the i-th address.
func (r *route) use(i int) {
	r.at = i
	r.upstream.Use(i)
}

// lost notes how an attempt or a session ended and chooses the next address. again: it is to be tried at once.
func (r *route) lost(healthy bool) (again bool) {
	if r.upstream == nil {
		return false
	}
	if r.moved {
		r.moved = false
		r.wait = min(2*r.wait, max(returnLatest, r.first))
		if healthy {
			r.wait = r.first
		}
	}
	if healthy {
		r.failed = 0
		r.use(0)
		return false
	}
	r.use((r.at + 1) % len(r.urls))
	if r.failed++; r.failed < len(r.urls) {
		return true
	}
	r.failed = 0
	return false
}

// move goes to the address that has answered.
func (r *route) move() {
	r.use(r.target)
	r.moved = true
}

// arrived notes that a link has come up: the time to the next probe begins.
func (r *route) arrived(now time.Duration) { r.home = now }

// look begins a probe if it is time for one.
func (r *route) look(ctx context.Context, now, timeout time.Duration) {
	if r.at == 0 || r.probes != nil || now-r.home < r.wait {
		return
	}
	ctx, r.stop = context.WithTimeout(ctx, timeout)
	answers, upstream, before := make(chan probe, 1), r.upstream, r.at
	r.probes = answers
	go func() {
		p := probe{i: -1}
		for i := range before {
			if p.err = upstream.Probe(ctx, i); p.err == nil {
				p.i = i
				break
			}
		}
		answers <- p
	}()
}

// answered takes a probe's answer and tells whether the link is to move.
func (r *route) answered(p probe, now time.Duration) (move bool) {
	r.stop()
	r.probes = nil
	r.home, r.target = now, max(p.i, 0)
	return p.err == nil
}

// end waits for the probe under way.
func (r *route) end() {
	if r.probes != nil {
		r.stop()
		<-r.probes
		r.probes = nil
	}
}
