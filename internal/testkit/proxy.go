package testkit

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
)

// Faults is what a Proxy does to its connections, open ones and new ones. Up is from the client (who dialled
// the proxy) to the server, down is the way back. The zero value passes everything on.
type Faults struct {
	Refuse         bool          // new connections are reset as soon as they are accepted
	StallUp        bool          // nothing moves and nothing is lost: what was sent arrives once this ends
	StallDown      bool          //
	BlackholeUp    bool          // half open: bytes and closes vanish; once any did, the connection is reset when this ends
	BlackholeDown  bool          //
	SwallowAcks    bool          // PUBACK, PUBREC and PUBCOMP from the server vanish, everything else passes (MQTT only)
	Latency        time.Duration // each way
	BytesPerSecond int           // each way and connection; 0: no limit
}

// stalled and dark tell whether the way down (or up) stands still, or swallows.
func (f *Faults) stalled(down bool) bool {
	return down && f.StallDown || !down && f.StallUp
}

func (f *Faults) dark(down bool) bool {
	return down && f.BlackholeDown || !down && f.BlackholeUp
}

// Traffic is what went through a Proxy since it started.
type Traffic struct {
	Up, Down    int64 // bytes handed on
	Connections int64 // accepted
	Swallowed   int64 // acknowledgements dropped
}

// Proxy is a TCP proxy on a loopback port that breaks links on demand. All methods may be called at any time
// from many goroutines.
type Proxy struct {
	ln     net.Listener
	ctx    context.Context // ends with Close; a field because connections outlive the calls that start them
	cancel context.CancelFunc
	wg     sync.WaitGroup // accept loop and every connection's goroutines

	up, down, conns, swallowed atomic.Int64
	cut                        atomic.Int64 // bytes until the connection that carries them is reset; 0: never

	mu      sync.Mutex
	target  string
	faults  Faults
	changed chan struct{} // closed and replaced whenever faults change
	links   map[*link]struct{}
}

// StartProxy listens on a free loopback port and hands every connection on to target. It is closed with t.
func StartProxy(t T, target string) *Proxy {
	t.Helper()
	p, err := newProxy(target)
	if err != nil {
		t.Fatalf("start proxy: %v", err)
	}
	t.Cleanup(p.Close)
	return p
}

func newProxy(target string) (*Proxy, error) {
	ctx, cancel := context.WithCancel(context.Background())
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		cancel()
		return nil, err
	}
	p := &Proxy{ln: ln, ctx: ctx, cancel: cancel, target: target, changed: make(chan struct{}), links: map[*link]struct{}{}}
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is where the proxy listens.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Set replaces the faults, for open and new connections.
func (p *Proxy) Set(f Faults) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = f
	close(p.changed)
	p.changed = make(chan struct{})
}

// SetTarget hands new connections on to another address.
func (p *Proxy) SetTarget(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = addr
}

// Reset ends every open connection with a TCP reset on both sides.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.reset()
	}
}

// CutAfter resets the connection that carries the n-th byte from now, both ways counted, in the middle of
// whatever it was part of.
func (p *Proxy) CutAfter(n int64) { p.cut.Store(n) }

// Traffic tells what went through so far.
func (p *Proxy) Traffic() Traffic {
	return Traffic{Up: p.up.Load(), Down: p.down.Load(), Connections: p.conns.Load(), Swallowed: p.swallowed.Load()}
}

// Open is how many connections are open now.
func (p *Proxy) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Close ends all connections and waits until every goroutine of the proxy is gone.
func (p *Proxy) Close() {
	p.cancel()
	p.ln.Close()
	p.Reset()
	p.wg.Wait()
}

// Flap lets the link come and go until stop is called: a good time, a bad one, again. The seed decides what
// happens and for how long; the same seed does the same. good is what the link is like in between; its latency and
// rate stay in bad times too. stop leaves the link open and good.
func (p *Proxy) Flap(seed uint64, good Faults, goodMax, badMax time.Duration, logf func(format string, args ...any)) (stop func()) {
	rng := rand.New(rand.NewPCG(seed, 0x666c6170))
	ctx, cancel := context.WithCancel(p.ctx)
	done := make(chan struct{})
	p.Set(good)
	between := func(most time.Duration) time.Duration {
		return most/10 + time.Duration(rng.Int64N(int64(most-most/10)+1))
	}
	p.wg.Go(func() {
		defer close(done)
		for {
			if !pause(ctx, between(goodMax)) {
				return
			}
			bad, f := between(badMax), good
			kind := rng.IntN(6)
			cut := rng.Int64N(64 << 10)
			what := [...]string{"reset", "refuse", "stall", "blackhole", "swallow acks", "cut"}[kind]
			switch kind {
			case 0:
			case 1:
				f.Refuse = true
			case 2:
				f.StallUp, f.StallDown = true, rng.IntN(2) == 0
			case 3:
				f.BlackholeUp, f.BlackholeDown = rng.IntN(2) == 0, true
			case 4:
				f.SwallowAcks = true
			case 5:
				p.CutAfter(1 + cut)
			}
			logf("link: %s for %v", what, bad.Round(time.Millisecond))
			p.Set(f)
			if kind < 2 {
				p.Reset()
			}
			ok := pause(ctx, bad)
			p.cut.Store(0)
			p.Set(good)
			if !ok {
				return
			}
		}
	})
	return func() {
		cancel()
		<-done
	}
}

// pause waits for d, or returns false as soon as ctx ends.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (p *Proxy) state() (Faults, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults, p.changed
}

func (p *Proxy) accept() {
	for {
		conn, err := p.ln.Accept()
		if err != nil {
			if p.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			pause(p.ctx, 10*time.Millisecond) // out of descriptors, say: the test goes on
			continue
		}
		p.conns.Add(1)
		p.wg.Go(func() { p.serve(conn) })
	}
}

// serve lives as long as the connection.
func (p *Proxy) serve(client net.Conn) {
	f, _ := p.state()
	if f.Refuse {
		abort(client)
		return
	}
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	server, err := dial(p.ctx, target)
	if err != nil { // what the client would see without us: its connection is refused
		abort(client)
		return
	}
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	l := &link{client: client, server: server, cancel: cancel}
	p.mu.Lock()
	p.links[l] = struct{}{}
	closing := p.ctx.Err() != nil // Close may have reset the others already
	p.mu.Unlock()
	if closing {
		l.reset()
	}
	defer func() {
		p.mu.Lock()
		delete(p.links, l)
		p.mu.Unlock()
		l.close()
	}()

	var ways sync.WaitGroup
	for _, w := range []*way{
		{p: p, l: l, src: client, dst: server, total: &p.up},
		{p: p, l: l, src: server, dst: client, total: &p.down, down: true},
	} {
		w.queue = make(chan chunk, 64)
		ways.Go(func() { w.read(ctx) })
		ways.Go(func() { w.write(ctx) })
	}
	ways.Wait()
}

// link is one connection through the proxy.
type link struct {
	client, server net.Conn
	cancel         context.CancelFunc
	dead           atomic.Bool // bytes were swallowed: it may never carry anything again
}

func (l *link) reset() {
	l.cancel()
	abort(l.client)
	abort(l.server)
}

func (l *link) close() {
	l.cancel()
	l.client.Close()
	l.server.Close()
}

// abort closes conn with a TCP reset, so that the peer sees it even if it has bytes left to read.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // an error means that it is closed already
	}
	conn.Close()
}

// chunk is what one Read gave; data nil means that the sender closed its side.
type chunk struct {
	data []byte
	due  time.Time
}

// way is one direction of a link: read fills the queue, write empties it as the faults allow. Latency lies
// between the two, so it delays without limiting the rate.
type way struct {
	p        *Proxy
	l        *link
	src, dst net.Conn
	total    *atomic.Int64
	down     bool
	queue    chan chunk

	// Where write stands in the server's stream of MQTT frames; see filter.
	head   []byte // bytes of a fixed header that is not whole yet
	left   int    // bytes left of the current frame
	drop   bool   // the current frame is swallowed
	opaque bool   // the stream is not MQTT
}

func (w *way) read(ctx context.Context) {
	defer close(w.queue)
	for {
		buf := make([]byte, 32<<10)
		n, err := w.src.Read(buf)
		f, _ := w.p.state()
		due := time.Now().Add(f.Latency)
		if n > 0 {
			select {
			case w.queue <- chunk{data: buf[:n], due: due}:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) { // reset by this side: so is the other
				f, _ := w.p.state()
				if !f.dark(w.down) && !f.stalled(w.down) && ctx.Err() == nil {
					w.l.reset()
				}
			}
			select {
			case w.queue <- chunk{due: due}:
			case <-ctx.Done():
			}
			return
		}
	}
}

func (w *way) write(ctx context.Context) {
	for {
		var c chunk
		var ok bool
		select {
		case c, ok = <-w.queue:
			if !ok {
				return
			}
		case <-ctx.Done():
			return
		}
		if d := time.Until(c.due); d > 0 && !pause(ctx, d) {
			return
		}
		if !w.pass(ctx, c.data) {
			return
		}
	}
}

// pass hands data on, or swallows it; nil is the sender's close. It returns false when the link is over.
func (w *way) pass(ctx context.Context, data []byte) bool {
	for {
		f, changed := w.p.state()
		switch {
		case f.dark(w.down):
			w.l.dead.Store(true)
			if data != nil {
				return true
			}
			fallthrough // a close that nobody hears of: keep the other side open
		case f.stalled(w.down):
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return false
			}
		case w.l.dead.Load():
			w.l.reset()
			return false
		}
		if data == nil {
			if tcp, ok := w.dst.(*net.TCPConn); ok {
				_ = tcp.CloseWrite() // an error means that it is closed already
			}
			return false
		}
		if w.down {
			data = w.filter(data, f.SwallowAcks)
		}
		return w.send(ctx, data, f.BytesPerSecond)
	}
}

// send writes data at most rate bytes a second, counts it, and cuts the link where CutAfter said.
func (w *way) send(ctx context.Context, data []byte, rate int) bool {
	for len(data) > 0 {
		most := len(data)
		if rate > 0 {
			most = min(most, max(1, rate/20)) // a twentieth of a second's worth at a time
			if !pause(ctx, time.Duration(most)*time.Second/time.Duration(rate)) {
				return false
			}
		}
		n, cut := w.p.toCut(most)
		m, err := w.dst.Write(data[:n])
		w.total.Add(int64(m))
		if err != nil || cut {
			w.l.reset()
			return false
		}
		data = data[n:]
	}
	return true
}

// toCut takes n bytes off what CutAfter allows: how many of them may still pass, and whether the link ends there.
func (p *Proxy) toCut(n int) (int, bool) {
	for {
		left := p.cut.Load()
		if left == 0 {
			return n, false
		}
		if p.cut.CompareAndSwap(left, max(0, left-int64(n))) {
			return int(min(left, int64(n))), left <= int64(n)
		}
	}
}

// filter removes acknowledgements from what the server sends while on. It follows the frames from the first
// byte of the connection, so that it may be switched on at any time, and holds back no more than the bytes of
// a fixed header.
func (w *way) filter(data []byte, on bool) []byte {
	if w.opaque {
		return data
	}
	out := make([]byte, 0, len(w.head)+len(data))
	for len(data) > 0 {
		if w.left > 0 {
			n := min(w.left, len(data))
			if !w.drop {
				out = append(out, data[:n]...)
			}
			w.left -= n
			data = data[n:]
			continue
		}
		w.head = append(w.head, data[0])
		data = data[1:]
		t, _, headerLen, size, ok, err := mqtt.PeekHeader(w.head)
		if err != nil { // not MQTT: never touch it again
			w.opaque = true
			return append(append(out, w.head...), data...)
		}
		if !ok {
			continue
		}
		w.left = size - headerLen
		w.drop = on && (t == mqtt.TypePuback || t == mqtt.TypePubrec || t == mqtt.TypePubcomp)
		if w.drop {
			w.p.swallowed.Add(1)
		} else {
			out = append(out, w.head...)
		}
		w.head = w.head[:0]
	}
	return out
}
