package main

import (
	"context"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// freshAge is how old the newest message at the upstream may be, and freshWithin how soon after the link's return.
const (
	freshAge    = 2 * time.Second
	freshWithin = 5 * time.Second
)

// outageResult is one outage and what came after it.
type outageResult struct {
	fresh   float64 // seconds from the link's return until the newest message at the upstream was under freshAge old
	worst   float64 // seconds: the greatest age of the newest from freshWithin after the return until the backlog was through
	through float64 // seconds until the backlog was through
}

// outage fills a gateway while its upstream is away, then has devices go on at a steady rate and lets the link come back,
// with as many bytes a second as bring the backlog up in some drainTime if it is alone.
//
// The age is asked every 20 ms at a subscriber of the upstream: the time since the newest message that has arrived was
// received by the gateway, whose clock is this one. The link's return is when the first byte comes down from the upstream.
func outage(ctx context.Context, e *env, c config, drain string, drainTime time.Duration) outageResult {
	const wireBytes = 45 // of a message in a batch
	up := testkit.StartMosquitto(e)
	proxy := testkit.StartProxy(e, up.Addr)
	proxy.Set(testkit.Faults{Refuse: true})
	var newest atomic.Int64 // received, Unix ms
	subscribeBatches(ctx, e, up.Addr, func(b *wire.Batch) {
		for i := range b.Messages {
			newest.Store(max(newest.Load(), b.Messages[i].Received))
		}
	})
	lanes := fmt.Sprintf("spool: { lanes: [ { name: telemetry, share: 100, max_bytes: 100GiB, max_age: 168h, when_full: drop_oldest, drain: %s } ] }\nroutes: []\n", drain)
	g := testkit.StartGateway(e, c.bin, "bench", gatewayYAML(proxy.Addr(), "batch")+lanes)
	if _, err := runLoad(ctx, load{addr: g.Addr, conns: 50, window: 100, qos: 1, limit: int64(c.backlog), payloads: telemetry(4096)}, 0); err != nil {
		e.Fatalf("fill: %v", err)
	}
	rate := max(min(1000, c.backlog/200), 10)
	loadCtx, stop := context.WithCancel(ctx)
	loaded := make(chan error, 1)
	go func() {
		_, err := runLoad(loadCtx, load{addr: g.Addr, conns: 10, window: 1000, qos: 1, rate: rate, payloads: telemetry(4096)}, time.Hour)
		loaded <- err
	}()
	e.Cleanup(func() {
		stop()
		<-loaded //nolint:errcheck // it says that it was stopped
	})
	time.Sleep(freshWithin + time.Second) // so that what the devices sent last is no part of a flood
	down := proxy.Traffic().Down
	proxy.Set(testkit.Faults{BytesPerSecond: max(int(float64(c.backlog)*wireBytes/drainTime.Seconds()), 8<<10) + rate*2*wireBytes})
	for proxy.Traffic().Down == down {
		if err := ctx.Err(); err != nil {
			e.Fatalf("%v", err)
		}
		time.Sleep(time.Millisecond)
	}
	begin := time.Now()
	r := outageResult{fresh: math.NaN()}
	for next := begin; ; time.Sleep(20 * time.Millisecond) {
		now := time.Now()
		since := now.Sub(begin)
		age := now.Sub(time.UnixMilli(newest.Load()))
		if newest.Load() == 0 {
			age = time.Hour
		}
		if age < freshAge && math.IsNaN(r.fresh) {
			r.fresh = since.Seconds()
		}
		if since > freshWithin {
			r.worst = max(r.worst, age.Seconds())
		}
		if now.Before(next) {
			continue
		}
		next = now.Add(200 * time.Millisecond)
		pending, err := pendingMessages(g)
		switch {
		case err != nil:
			e.Fatalf("%v", err)
		case pending < uint64(3*rate) && since > freshWithin && !math.IsNaN(r.fresh):
			r.through = since.Seconds()
			return r
		case since > 20*drainTime || ctx.Err() != nil:
			e.Fatalf("%d messages are pending %v after the link came back", pending, since)
		}
		select {
		case err := <-loaded:
			loaded <- err
			e.Fatalf("the devices have stopped: %v", err)
		default:
		}
	}
}

// subscribeBatches tells f each batch that arrives at a broker.
func subscribeBatches(ctx context.Context, e *env, addr string, f func(*wire.Batch)) {
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: addr,
		Connect: mqtt.Connect{Version: mqtt.V311, ClientID: "cloud", CleanStart: true, KeepAlive: 60},
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
			if b, err := wire.DecodeBatch(p.Payload); err == nil {
				f(b)
			}
		},
	})
	if err != nil {
		e.Fatalf("subscribe: %v", err)
	}
	e.Cleanup(func() {
		c.Abort()
		<-c.Done()
	})
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "gw/+/data/+", QoS: 0}}}); err != nil {
		e.Fatalf("subscribe: %v", err)
	}
}

func measureLive(ctx context.Context, c config, s *section) error {
	drainTime := 10 * c.seconds
	of := map[string]*struct{ fresh, worst, through sample }{"live_first": {}, "in_order": {}}
	for range c.rounds {
		for _, drain := range []string{"live_first", "in_order"} {
			err := round(c.dir, func(e *env) {
				r := outage(ctx, e, c, drain, drainTime)
				o := of[drain]
				o.fresh, o.worst, o.through = append(o.fresh, r.fresh), append(o.worst, r.worst), append(o.through, r.through)
			})
			if err != nil {
				return err
			}
		}
	}
	live, order := of["live_first"], of["in_order"]
	what := fmt.Sprintf("%s messages of backlog, ", thousands(int64(c.backlog)))
	s.rows = []row{
		{what: what + "the newest at the upstream is under 2 s old, `live_first`", value: live.fresh, unit: "s after the return", target: atMost(freshWithin.Seconds(), "s")},
		{what: what + "the greatest age of the newest from 5 s after the return on, `live_first`", value: live.worst, unit: "s", target: atMost(freshAge.Seconds(), "s")},
		{what: what + "the newest is under 2 s old", value: live.fresh, unit: "s after the return", than: "`in_order`", against: order.fresh},
		{what: what + "the greatest age of the newest from 5 s after the return on", value: live.worst, unit: "s", than: "`in_order`", against: order.worst},
		{what: what + "the backlog is through", value: live.through, unit: "s after the return", than: "`in_order`", against: order.through},
	}
	s.notes = append(s.notes, fmt.Sprintf("The link carries the backlog in some %v if it is alone, and %d messages a second come in beside it. "+
		"Its return is when the first byte comes down from the upstream.", drainTime, max(min(1000, c.backlog/200), 10)))
	return nil
}
