package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"holdfast/internal/testkit"
)

// startUpstream runs mosquitto on an address that was refused so far.
func startUpstream(e *env, addr string) *testkit.Mosquitto {
	_, port, _ := strings.Cut(addr, ":")
	return testkit.StartMosquitto(e, "listener "+port+" 127.0.0.1")
}

// received is how many bytes a process has read, sockets included: what came up the wire, without a proxy in between
// that would take processor time from both sides.
func received(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0
	}
	var n int64
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "rchar: %d", &n); err == nil {
			return n
		}
	}
	return 0
}

// drainResult is one drained backlog.
type drainResult struct {
	perSecond float64
	bytes     float64 // received by the upstream, per message
}

// drain fills x while its upstream is away, lets the upstream come, and times from its first byte until done.
// done is asked every few milliseconds and told how many bytes came up.
func drain(ctx context.Context, e *env, c config, x *started, upstream string, done func(got int64) (bool, error)) drainResult {
	// Devices that are not there when their messages go up: only the drain is measured.
	_, err := runLoad(ctx, load{addr: x.addr, conns: 50, window: 100, qos: 1, limit: int64(c.backlog), payloads: telemetry(4096)}, 0)
	if err != nil {
		e.Fatalf("fill: %v", err)
	}
	up := startUpstream(e, upstream)
	base := received(up.PID())
	var begin time.Time
	deadline := time.Now().Add(2 * time.Minute)
	for {
		got := received(up.PID()) - base
		if begin.IsZero() && got > 0 {
			begin = time.Now()
		}
		if !begin.IsZero() {
			ok, err := done(got)
			if err != nil {
				e.Fatalf("drain: %v", err)
			}
			if ok {
				return drainResult{float64(c.backlog) / time.Since(begin).Seconds(), float64(received(up.PID())-base) / float64(c.backlog)}
			}
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			e.Fatalf("drain: %d bytes came up in two minutes, and no end", got)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// drainGateway drains a gateway: done when its account of the upstream has nothing pending.
func drainGateway(ctx context.Context, e *env, c config, format string) drainResult {
	away := nobody(e)
	x := startGateway(e, c, away, format)
	return drain(ctx, e, c, x, away, func(int64) (bool, error) {
		pending, err := pendingMessages(x.gateway)
		return pending == 0, err
	})
}

// drainBridge drains mosquitto's bridge: done when every PUBLISH has come up, whose length is known.
func drainBridge(ctx context.Context, e *env, c config, lines ...string) drainResult {
	away := nobody(e)
	x := startMosquitto(e, append(lines, bridgeLines(away)...)...)
	frame := int64(1 + 2 + 2 + len("dt/pumps/bench-0000") + 2 + payloadBytes)
	return drain(ctx, e, c, x, away, func(got int64) (bool, error) { return got >= frame*int64(c.backlog), nil })
}

func measureDrain(ctx context.Context, c config, s *section) error {
	var batch, passthrough, bridge, tuned sample
	var batchBytes, bridgeBytes sample
	for range c.rounds {
		for _, f := range []func(e *env){
			func(e *env) {
				r := drainGateway(ctx, e, c, "batch")
				batch, batchBytes = append(batch, r.perSecond), append(batchBytes, r.bytes)
			},
			func(e *env) {
				passthrough = append(passthrough, drainGateway(ctx, e, c, "passthrough").perSecond)
			},
			func(e *env) {
				r := drainBridge(ctx, e, c)
				bridge, bridgeBytes = append(bridge, r.perSecond), append(bridgeBytes, r.bytes)
			},
			func(e *env) {
				tuned = append(tuned, drainBridge(ctx, e, c, "max_inflight_messages 1000").perSecond)
			},
		} {
			if err := round(c.dir, f); err != nil {
				return err
			}
		}
	}
	what := thousands(int64(c.backlog)) + " messages to a local mosquitto"
	s.rows = []row{
		{what: what + ", `batch`", value: batch, unit: "msg/s", target: atLeast(200_000, "")},
		{what: what + ", `batch`", value: batch, unit: "msg/s", than: "mosquitto's bridge", against: bridge},
		{what: what + ", `passthrough`", value: passthrough, unit: "msg/s", than: "mosquitto's bridge", against: bridge, target: atLeast(1, "×")},
		{what: what + ", `passthrough`", value: passthrough, unit: "msg/s", than: "mosquitto's bridge with max_inflight_messages 1000 (default: 20)", against: tuned, target: atLeast(1, "×")},
		{what: "bytes up the wire while draining, `batch`", value: batchBytes, unit: "B per message", than: "mosquitto's bridge", against: bridgeBytes, target: atMost(0.25, "×")},
	}
	return nil
}

// measureWire counts what crosses the upstream's wire, both ways, while devices publish at a steady rate.
func measureWire(ctx context.Context, c config, s *section) error {
	const rate = 1000
	d := max(c.seconds, time.Second)
	perMessage := func(start func(e *env, upstream string) *started) (sample, error) {
		var all sample
		for range c.rounds {
			err := round(c.dir, func(e *env) {
				up := testkit.StartMosquitto(e)
				proxy := testkit.StartProxy(e, up.Addr)
				x := start(e, proxy.Addr())
				testkit.Eventually(e, 30*time.Second, "the link is up", func() bool { return proxy.Traffic().Down > 0 })
				// Counted between the last CONNECT and the first DISCONNECT: what tells of the devices' presence is not the messages' price.
				var before, after testkit.Traffic
				r, err := runLoad(ctx, load{
					addr: x.addr, conns: 100, window: 1000, qos: 1, rate: rate, payloads: telemetry(4096),
					begin: func() { before = settled(proxy) }, end: func() { after = settled(proxy) },
				}, d)
				if err != nil {
					e.Fatalf("%v", err)
				}
				all = append(all, float64(after.Up-before.Up+after.Down-before.Down)/float64(r.acks))
			})
			if err != nil {
				return nil, err
			}
		}
		return all, nil
	}
	var of []sample
	for _, start := range []func(e *env, upstream string) *started{
		func(e *env, upstream string) *started { return startGateway(e, c, upstream, "batch") },
		func(e *env, upstream string) *started { return startGateway(e, c, upstream, "passthrough") },
		func(e *env, upstream string) *started { return startMosquitto(e, bridgeLines(upstream)...) },
	} {
		b, err := perMessage(start)
		if err != nil {
			return err
		}
		of = append(of, b)
	}
	what := fmt.Sprintf("%d B JSON, %s msg/s, acknowledgements included", payloadBytes, thousands(rate))
	s.rows = []row{
		{what: what + ", `batch`", value: of[0], unit: "B per message", than: "mosquitto's bridge", against: of[2], target: atMost(0.25, "×")},
		{what: what + ", `passthrough`", value: of[1], unit: "B per message", than: "mosquitto's bridge", against: of[2]},
	}
	return nil
}

// settled waits until nothing has moved for half a second.
func settled(p *testkit.Proxy) testkit.Traffic {
	last, since := p.Traffic(), time.Now()
	for time.Since(since) < 500*time.Millisecond {
		time.Sleep(20 * time.Millisecond)
		if now := p.Traffic(); now != last {
			last, since = now, time.Now()
		}
	}
	return last
}
