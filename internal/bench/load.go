package main

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
)

// load is a closed loop of publishers: each connection keeps window messages unacknowledged and sends the next one
// when an acknowledgement comes.
type load struct {
	addr     string
	conns    int
	window   int
	qos      byte
	rate     int   // messages a second over all connections; 0: as fast as they are acknowledged
	limit    int64 // messages in all; 0: until the time is over
	payloads [][]byte
	begin    func() // with a rate: all are connected; may be nil
	end      func() // with a rate: all is acknowledged, and nobody has gone yet; may be nil
}

// loadResult is what the publishers saw.
type loadResult struct {
	acks      int64
	perSecond float64
	p50, p99  time.Duration
}

// publisher is one connection of a load.
type publisher struct {
	client *mqtt.Client
	topic  []byte
	next   int     // payload
	sent   []int64 // by packet id: when, Unix ns
	expect uint16  // id of the next acknowledgement
	now    int64   // when the present batch of acknowledgements was read; 0: not asked yet
	acks   atomic.Int64
	lat    *histogram
}

type loadRun struct {
	load
	stop   atomic.Bool
	record atomic.Bool
	left   atomic.Int64 // messages that may still be sent, if there is a limit
	failed atomic.Pointer[error]
	pubs   []*publisher
}

func (l *loadRun) fail(err error) { l.failed.CompareAndSwap(nil, &err) }

// connect opens all connections, a few at a time.
func (l *loadRun) connect(ctx context.Context) error {
	l.pubs = make([]*publisher, l.conns)
	slots := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for i := range l.pubs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := l.open(ctx, i); err != nil {
				l.fail(err)
			}
		})
	}
	wg.Wait()
	return l.err()
}

func (l *loadRun) open(ctx context.Context, i int) error {
	id := fmt.Sprintf("bench-%04d", i)
	p := &publisher{
		topic: fmt.Appendf(nil, "dt/pumps/%s", id), next: i * 37, sent: make([]int64, l.window+1), expect: 1, lat: &histogram{},
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: l.addr,
		Connect: mqtt.Connect{Version: mqtt.V311, ClientID: id, CleanStart: true, KeepAlive: 60},
		OnAck:   func(_ *mqtt.Client, a *mqtt.Ack) { l.onAck(p, a) },
		OnBatch: func(*mqtt.Client) { p.now = 0 },
		OnClose: func(_ *mqtt.Client, err error) {
			if !l.stop.Load() {
				l.fail(fmt.Errorf("%s lost its connection: %w", id, err))
			}
		},
	})
	if err != nil {
		return err
	}
	p.client = c
	l.pubs[i] = p
	return nil
}

// onAck runs on the connection's reading goroutine.
func (l *loadRun) onAck(p *publisher, a *mqtt.Ack) {
	if a.ID != p.expect {
		l.fail(fmt.Errorf("acknowledgement of packet %d where %d was due", a.ID, p.expect))
	}
	if p.expect++; int(p.expect) > l.window {
		p.expect = 1
	}
	p.acks.Store(p.acks.Load() + 1) // the only writer
	if p.now == 0 {
		p.now = time.Now().UnixNano()
	}
	if l.record.Load() {
		p.lat.add(p.now - p.sent[a.ID])
	}
	if l.rate == 0 {
		l.send(p, a.ID, p.now)
	}
}

func (l *loadRun) send(p *publisher, id uint16, now int64) {
	if l.stop.Load() || l.limit > 0 && l.left.Add(-1) < 0 {
		return
	}
	p.sent[id] = now
	m := mqtt.Publish{QoS: l.qos, ID: id, Topic: p.topic, Payload: l.payloads[p.next%len(l.payloads)]}
	p.next++
	if err := p.client.Queue(&m); err != nil {
		l.fail(err)
	}
}

func (l *loadRun) err() error {
	if e := l.failed.Load(); e != nil {
		return *e
	}
	return nil
}

func (l *loadRun) acks() (n int64) {
	for _, p := range l.pubs {
		n += p.acks.Load()
	}
	return n
}

func (l *loadRun) close() {
	l.stop.Store(true)
	for _, p := range l.pubs {
		if p != nil {
			p.client.Abort()
			<-p.client.Done()
		}
	}
}

// runLoad connects, warms up for a fifth of d, and measures for d; or sends limit messages and waits for all acks.
func runLoad(ctx context.Context, l load, d time.Duration) (loadResult, error) {
	r := &loadRun{load: l}
	r.left.Store(l.limit)
	defer r.close()
	if err := r.connect(ctx); err != nil {
		return loadResult{}, err
	}
	if l.rate > 0 {
		if l.begin != nil {
			l.begin()
		}
		res, err := r.paced(ctx, d)
		if l.end != nil {
			l.end()
		}
		return res, err
	}
	begin := time.Now()
	for _, p := range r.pubs {
		now := time.Now().UnixNano()
		for id := 1; id <= l.window; id++ {
			r.send(p, uint16(id), now)
		}
		p.client.Flush()
	}
	if l.limit > 0 {
		for r.acks() < l.limit && r.err() == nil && ctx.Err() == nil {
			time.Sleep(2 * time.Millisecond)
		}
		return loadResult{acks: r.acks(), perSecond: float64(r.acks()) / time.Since(begin).Seconds()}, r.err()
	}
	time.Sleep(d / 5)
	r.record.Store(true)
	before, begin := r.acks(), time.Now()
	time.Sleep(d)
	n, took := r.acks()-before, time.Since(begin)
	r.close() // joins the goroutines that write the histograms
	var all histogram
	for _, p := range r.pubs {
		all.merge(p.lat)
	}
	return loadResult{acks: n, perSecond: float64(n) / took.Seconds(), p50: all.quantile(0.5), p99: all.quantile(0.99)}, r.err()
}

// paced sends at the load's rate, each connection in turn, whatever comes back.
func (l *loadRun) paced(ctx context.Context, d time.Duration) (loadResult, error) {
	begin := time.Now()
	var sent int64
	ids := make([]uint16, len(l.pubs))
	for elapsed := time.Duration(0); elapsed < d && ctx.Err() == nil && l.err() == nil; elapsed = time.Since(begin) {
		due := int64(elapsed.Seconds() * float64(l.rate))
		for ; sent < due; sent++ {
			i := int(sent) % len(l.pubs)
			p := l.pubs[i]
			if ids[i]++; int(ids[i]) > l.window {
				ids[i] = 1
			}
			if sent-l.acks() >= int64(l.window*len(l.pubs)) {
				return loadResult{}, fmt.Errorf("rate of %d/s is more than is acknowledged", l.rate)
			}
			l.send(p, ids[i], time.Now().UnixNano())
			p.client.Flush()
		}
		time.Sleep(time.Millisecond)
	}
	for deadline := time.Now().Add(10 * time.Second); l.acks() < sent && time.Now().Before(deadline) && l.err() == nil; {
		time.Sleep(2 * time.Millisecond)
	}
	if got := l.acks(); got != sent && l.err() == nil {
		return loadResult{}, fmt.Errorf("%d messages sent, %d acknowledged", sent, got)
	}
	return loadResult{acks: sent, perSecond: float64(sent) / d.Seconds()}, l.err()
}

// histogram of durations with eight steps for each doubling: 12 % at most from the truth.
type histogram struct {
	n     int64
	count [64 * 8]int64
}

func bucket(ns int64) int {
	if ns < 8 {
		return int(max(0, ns))
	}
	top := bits.Len64(uint64(ns)) - 1
	return top*8 + int(ns>>(top-3))&7
}

func (h *histogram) add(ns int64) {
	h.n++
	h.count[bucket(ns)]++
}

func (h *histogram) merge(o *histogram) {
	h.n += o.n
	for i, c := range o.count {
		h.count[i] += c
	}
}

func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(q * float64(h.n))
	for i, c := range h.count {
		if rank -= c; rank < 0 {
			if i < 8 {
				return time.Duration(i)
			}
			return time.Duration((8 + int64(i%8)) << (i/8 - 3))
		}
	}
	return 0
}
