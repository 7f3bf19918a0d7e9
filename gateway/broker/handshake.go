package broker

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"time"
)

// places are where TLS handshakes compute: on half of the processors at most, so that thousands of devices that come back
// at the same time do not take them from those who are connected. A place is held while a handshake computes or
// writes, not while it waits for the peer. Who has computed already goes before who has not: a handshake that is half done
// and given up was work for nothing. Else it is first come, first served.
type places struct {
	mu    sync.Mutex // guards what follows
	free  int
	begun list.List // *ticket, of handshakes that have computed
	fresh list.List // and of those that have not
}

// ticket is a handshake that waits for a place.
type ticket struct {
	turn chan struct{} // closed when the place is its own
	in   *list.List
	at   *list.Element
}

// waitMost is how long a handshake waits for its place before its peer is taken for gone.
const waitMost = time.Minute

// lookFirst: who has waited this long is looked at before its handshake goes on. Most devices give up after some
// seconds, and to answer those that did would keep the others waiting until they give up as well.
const lookFirst = 200 * time.Millisecond

func newPlaces() *places { return &places{free: max(runtime.GOMAXPROCS(0)/2, 1)} }

// take gives a place at once, or a ticket to wait with.
func (p *places) take(begun bool) *ticket {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free > 0 {
		p.free--
		return nil
	}
	t := &ticket{turn: make(chan struct{}), in: &p.fresh}
	if begun {
		t.in = &p.begun
	}
	t.at = t.in.PushBack(t)
	return t
}

// leave hands a place on.
func (p *places) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, queue := range []*list.List{&p.begun, &p.fresh} {
		if e := queue.Front(); e != nil {
			t := queue.Remove(e).(*ticket)
			t.at = nil
			close(t.turn)
			return
		}
	}
	p.free++
}

// giveUp takes a ticket back, or the place that it has won meanwhile.
func (p *places) giveUp(t *ticket) {
	p.mu.Lock()
	won := t.at == nil
	if !won {
		t.in.Remove(t.at)
	}
	p.mu.Unlock()
	if won {
		p.leave()
	}
}

func (p *places) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.begun.Len() + p.fresh.Len()
}

// gate is what a TLS handshake reads from and writes to: it holds a place between the reads. Only serve touches it.
type gate struct {
	net.Conn
	c     *conn
	open  bool // the handshake is over
	held  bool
	begun bool
}

func (g *gate) Read(p []byte) (int, error) {
	if g.open {
		return g.Conn.Read(p)
	}
	g.leave()
	n, err := g.c.read(g.Conn, p)
	if n > 0 {
		if e := g.enter(); e != nil {
			return 0, e
		}
	}
	return n, err
}

func (g *gate) Write(p []byte) (int, error) { return g.c.writeSock(p) }

// enter waits for a place. The time that it waits is not counted against the peer.
func (g *gate) enter() error {
	b := g.c.b
	t := b.places.take(g.begun)
	if t == nil {
		g.held, g.begun = true, true
		return nil
	}
	from := time.Now()
	late := time.NewTimer(waitMost)
	defer late.Stop()
	select {
	case <-t.turn:
		g.held, g.begun = true, true
	case <-late.C:
		b.places.giveUp(t)
		return errTimeout
	case <-b.stop:
		b.places.giveUp(t)
		return errStopping
	}
	waited := time.Since(from)
	g.c.waited += waited
	b.m.handshakeWait.Add(waited.Seconds())
	_ = g.Conn.SetWriteDeadline(g.c.due())
	if waited > lookFirst && hungUp(g.Conn) {
		b.m.handshakesLeft.Inc()
		return errHungUp
	}
	return nil
}

func (g *gate) leave() {
	if g.held {
		g.held = false
		g.c.b.places.leave()
	}
}

// handshake does the TLS handshake.
func (c *conn) handshake(t *tls.Conn, v *vault) error {
	g := t.NetConn().(*gate)
	defer func() {
		g.leave()
		g.open = true
	}()
	_ = c.sock.SetWriteDeadline(c.due())
	if err := t.HandshakeContext(context.Background()); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = errTimeout
		}
		return fmt.Errorf("TLS handshake: %w", err)
	}
	if v.now.Load().roots == nil {
		return nil
	}
	s := t.ConnectionState()
	return c.checkPeer(v, &s)
}
