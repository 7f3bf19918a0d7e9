package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// exactly is a device that sends a numbered series with QoS 2 and keeps its session over lost connections, as the
// standard asks: what has no PUBREC is published again with DUP, what has one is released again, in the old order.
type exactly struct {
	addr    string
	connect mqtt.Connect
	window  int

	mu     sync.Mutex
	next   int      // number of the next message
	enough bool     // publish no more
	order  []uint16 // packet ids in flight, in the order of their PUBLISH
	flight map[uint16]*flight
	failed error
	client *mqtt.Client
	ended  chan struct{} // closed when there is enough and the last PUBCOMP is there
}

type flight struct {
	number   int
	released bool // PUBREC is there
}

func (d *exactly) payload(n int) []byte { return fmt.Appendf(nil, `{"n":%d}`, n) }

func (d *exactly) topic() []byte { return []byte("dt/exactly/" + d.connect.ClientID) }

// fill publishes until the window is full. Under mu.
func (d *exactly) fill(c *mqtt.Client) {
	for len(d.order) < d.window && !d.enough {
		id := uint16(1)
		for d.flight[id] != nil {
			id++
		}
		d.flight[id] = &flight{number: d.next}
		d.order = append(d.order, id)
		if c.Queue(&mqtt.Publish{QoS: 2, ID: id, Topic: d.topic(), Payload: d.payload(d.next)}) != nil {
			d.next++ // the connection is gone: sent again on the next one
			return
		}
		d.next++
	}
	c.Flush()
}

func (d *exactly) onAck(c *mqtt.Client, a *mqtt.Ack) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c != d.client && d.client != nil {
		return // of a connection that is over
	}
	f := d.flight[a.ID]
	// PUBCOMP with "packet identifier not found" answers a second PUBREL after the first one did its work (MQTT 5.0 §4.3.3).
	notFound := a.Type == mqtt.TypePubcomp && a.Reason == mqtt.PacketIDNotFound
	switch {
	case f == nil:
		d.fail(fmt.Errorf("%v for packet %d, which is not in flight", a.Type, a.ID))
	case a.Reason.Failed() && !notFound:
		d.fail(fmt.Errorf("%v of packet %d: %v", a.Type, a.ID, a.Reason))
	case a.Type == mqtt.TypePubrec:
		f.released = true
	case a.Type == mqtt.TypePubcomp && !f.released:
		d.fail(fmt.Errorf("PUBCOMP of packet %d before its PUBREC", a.ID))
	case a.Type == mqtt.TypePubcomp:
		delete(d.flight, a.ID)
		d.order = slices.DeleteFunc(d.order, func(id uint16) bool { return id == a.ID })
		d.fill(c)
		d.checkEnd()
	default:
		d.fail(fmt.Errorf("unexpected %v", a.Type))
	}
}

// checkEnd is called when something was completed. Under mu.
func (d *exactly) checkEnd() {
	if d.enough && len(d.order) == 0 {
		select {
		case <-d.ended:
		default:
			close(d.ended)
		}
	}
}

// finish makes the device publish no more and returns how many messages it has published.
func (d *exactly) finish() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enough = true
	d.checkEnd()
	return d.next
}

func (d *exactly) fail(err error) {
	if d.failed == nil {
		d.failed = err
	}
}

func (d *exactly) err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

// live connects once, takes up what was in flight, and returns when the connection or the series is over.
func (d *exactly) live(ctx context.Context, first bool) error {
	dialCtx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	d.mu.Lock()
	d.client = nil
	d.mu.Unlock()
	up := make(chan struct{})
	c, err := mqtt.Dial(dialCtx, mqtt.ClientOptions{
		Address: d.addr, Connect: d.connect,
		OnAck: func(c *mqtt.Client, a *mqtt.Ack) { <-up; d.onAck(c, a) },
	})
	if err != nil {
		close(up)
		return err
	}
	d.mu.Lock()
	d.client = c
	if !first && !c.Connack().SessionPresent {
		d.fail(errors.New("the gateway has forgotten the session"))
	}
	for _, id := range d.order {
		if f := d.flight[id]; f.released {
			_ = c.QueueAck(mqtt.TypePubrel, id, mqtt.Success) // an error ends the connection
		} else {
			_ = c.Queue(&mqtt.Publish{Dup: true, QoS: 2, ID: id, Topic: d.topic(), Payload: d.payload(f.number)})
		}
	}
	d.fill(c)
	d.mu.Unlock()
	close(up)
	select {
	case <-c.Done():
	case <-d.ended:
	case <-ctx.Done():
	}
	c.Abort()
	<-c.Done()
	return nil
}

// run lives until the series is over, however often the connection is lost.
func (d *exactly) run(ctx context.Context) {
	for first := true; ; {
		if err := d.live(ctx, first); err == nil {
			first = false
		}
		select {
		case <-d.ended:
			return
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestQoS2IsTakenExactlyOnce cuts the devices' connections and kills the gateway while devices publish with QoS 2. The
// receiver upstream may drop repeats by id only: a message that was spooled twice would show.
func TestQoS2IsTakenExactlyOnce(t *testing.T) {
	path := bin(t)
	rng, _ := seeded(t)
	up := startUpstream(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), "batch", ""))
	link := testkit.StartProxy(t, g.Addr)

	var fleet []*exactly
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
		for i := range 2 {
			d := &exactly{
				addr: link.Addr(), window: 20, flight: map[uint16]*flight{}, ended: make(chan struct{}),
				connect: mqtt.Connect{Version: v, ClientID: fmt.Sprintf("exactly-%d-%d", v, i), KeepAlive: 60, SessionExpiry: 3600},
			}
			fleet = append(fleet, d)
			wg.Go(func() { d.run(ctx) })
		}
	}
	cuts := 0
	for range cycles() {
		for range 4 + rng.IntN(4) {
			<-time.After(time.Duration(20+rng.IntN(80)) * time.Millisecond)
			cuts++
			switch rng.IntN(3) {
			case 0:
				link.Reset()
			case 1:
				link.CutAfter(1 + rng.Int64N(8<<10))
			case 2: // acknowledgements are lost
				link.Set(testkit.Faults{BlackholeDown: true})
				<-time.After(30 * time.Millisecond)
				link.Set(testkit.Faults{})
			}
		}
		<-time.After(time.Duration(20+rng.IntN(80)) * time.Millisecond)
		g.Kill()
		g.Restart()
	}
	link.CutAfter(0)
	total := 0
	for _, d := range fleet {
		total += d.finish()
		select {
		case <-d.ended:
		case <-time.After(30 * time.Second):
			t.Errorf("%s: %d of %d messages still in flight 30 s after the last cut", d.connect.ClientID, len(d.order), d.next)
		}
	}
	t.Logf("%d kills, %d cuts of the devices' links, %d messages", cycles(), cuts, total)
	for _, d := range fleet {
		if err := d.err(); err != nil {
			t.Errorf("%s: %v", d.connect.ClientID, err)
		}
	}
	drained(t, g, "cloud", 30*time.Second)
	balanced(t, g)

	got := map[string][]int{}
	testkit.EventuallyNil(t, 10*time.Second, "every message arrives upstream", func() error {
		all := messages(t, up.inbox)
		if len(all) < total {
			return fmt.Errorf("%d of %d", len(all), total)
		}
		return nil
	})
	for _, m := range messages(t, up.inbox) {
		var body struct{ N int }
		if err := json.Unmarshal(m.Message.Payload, &body); err != nil {
			t.Fatal(err)
		}
		got[m.Message.Device] = append(got[m.Message.Device], body.N)
	}
	for _, d := range fleet {
		if err := once(got[d.connect.ClientID], d.next); err != nil {
			t.Errorf("%s: %v", d.connect.ClientID, err)
		}
	}
}

// once returns an error unless got is 0, 1, 2 … total-1.
func once(got []int, total int) error {
	seen := make([]int, total)
	last, disorder := -1, 0
	for _, n := range got {
		if n < 0 || n >= total {
			return fmt.Errorf("number %d was never sent", n)
		}
		if seen[n]++; n < last {
			disorder++
		}
		last = n
	}
	lost, twice := 0, 0
	for _, c := range seen {
		switch {
		case c == 0:
			lost++
		case c > 1:
			twice++
		}
	}
	if lost+twice+disorder > 0 {
		return fmt.Errorf("of %d messages %d are lost, %d came twice, %d out of order", total, lost, twice, disorder)
	}
	return nil
}

func TestOnceSeesEveryFault(t *testing.T) {
	if err := once([]int{0, 1, 2}, 3); err != nil {
		t.Error(err)
	}
	for what, got := range map[string][]int{"lost": {0, 2}, "twice": {0, 1, 1, 2}, "out of order": {0, 2, 1}, "invented": {0, 1, 2, 3}} {
		if once(got, 3) == nil {
			t.Errorf("a series with a message %s passes", what)
		}
	}
}
