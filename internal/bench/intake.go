package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/testkit"
)

// contender is a broker under load and how to start it for one round.
type contender struct {
	name  string
	start func(e *env) *started
}

// started is a running contender.
type started struct {
	*testkit.Process
	addr    string
	gateway *testkit.Gateway // nil: it is not one
}

// nobody is an address that refuses: an upstream that is away.
func nobody(e *env) string { return testkit.FreeAddr(e) }

func gatewayYAML(upstream, format string) string {
	y := "log: { level: info, format: text }\n"
	if upstream != "" {
		y += fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q, format: %s, commands: false }\n", "mqtt://"+upstream, format)
	}
	return y
}

// measureAgainst compares two builds of the gateway in turns.
func measureAgainst(ctx context.Context, c config, s *section) error {
	if c.against == "" {
		s.notes = append(s.notes, "Not measured: `-against` names no other build.")
		return nil
	}
	that := c
	that.bin = c.against
	var err error
	return errors.Join(round(c.dir, func(e *env) {
		upstream := testkit.StartMosquitto(e)
		for _, l := range []struct {
			name, upstream string
			load
		}{
			{"100 × 100, upstream away", nobody(e), load{conns: 100, window: 100, qos: 1}},
			{"100 × 100, upstream there", upstream.Addr, load{conns: 100, window: 100, qos: 1}},
			{"1 × 100, upstream away", nobody(e), load{conns: 1, window: 100, qos: 1}},
		} {
			var of map[string]*intakeResult
			of, err = contest(ctx, c, l.load, []contender{
				{"this build", func(e *env) *started { return startGateway(e, c, l.upstream, "batch") }},
				{"the other", func(e *env) *started { return startGateway(e, that, l.upstream, "batch") }},
			})
			if err != nil {
				return
			}
			this, other := of["this build"], of["the other"]
			s.rows = append(s.rows,
				row{what: l.name, value: this.acks, unit: "acks/s", than: "the other build", against: other.acks, target: atLeast(0.95, "×")},
				row{what: l.name + ": µs of CPU per message", value: this.cpu, than: "the other build", against: other.cpu},
				row{what: l.name + ": p99 from PUBLISH to PUBACK", value: this.p99, unit: "ms", than: "the other build", against: other.p99})
		}
	}), err)
}

func startGateway(e *env, c config, upstream, format string) *started {
	g := testkit.StartGateway(e, c.bin, "bench", gatewayYAML(upstream, format))
	return &started{Process: g.Process, addr: g.Addr, gateway: g}
}

// bridgeLines make mosquitto forward everything to another broker, and keep it while that is away.
func bridgeLines(upstream string) []string {
	return []string{
		"connection cloud", "address " + upstream, "topic # out 1", "cleansession false", "restart_timeout 1",
		"remote_clientid bench-bridge", "notifications false", "bridge_attempt_unsubscribe false",
	}
}

func startMosquitto(e *env, lines ...string) *started {
	m := testkit.StartMosquitto(e, lines...)
	return &started{Process: m.Process, addr: m.Addr}
}

func startBaseline(e *env, c config, wait bool) *started {
	addr := testkit.FreeAddr(e)
	args := []string{"serve", "-addr", addr}
	if wait {
		args = append(args, "-wait", e.TempDir())
	}
	p := testkit.Start(e, testkit.Command{Name: "plain mochi", Path: c.self, Args: args})
	return &started{Process: p, addr: addr}
}

// intakeResult is one contender over the rounds.
type intakeResult struct {
	acks, p50, p99, cpu sample
	mallocs, bytes      sample // per message, gateways only
}

// contest lets every contender take the same load in turn, round after round.
func contest(ctx context.Context, c config, l load, all []contender) (map[string]*intakeResult, error) {
	results := map[string]*intakeResult{}
	for _, x := range all {
		results[x.name] = &intakeResult{}
	}
	l.payloads = telemetry(4096)
	for range c.rounds {
		for _, x := range all {
			if ctx.Err() != nil {
				return results, ctx.Err()
			}
			err := round(c.dir, func(e *env) {
				s := x.start(e)
				l := l
				l.addr = s.addr
				m0, b0 := heap(s)
				cpu := s.CPU()
				begin := time.Now()
				r, err := runLoad(ctx, l, c.seconds)
				if err != nil {
					e.Fatalf("%s: %v", x.name, err)
				}
				m1, b1 := heap(s)
				res := results[x.name]
				res.acks = append(res.acks, r.perSecond)
				res.p50 = append(res.p50, float64(r.p50)/1e6)
				res.p99 = append(res.p99, float64(r.p99)/1e6)
				// The load also runs while it warms up: what was used is set against all of it.
				messages := r.perSecond * time.Since(begin).Seconds()
				res.cpu = append(res.cpu, float64((s.CPU()-cpu).Microseconds())/messages)
				if m1 > 0 {
					res.mallocs = append(res.mallocs, (m1-m0)/messages)
					res.bytes = append(res.bytes, (b1-b0)/messages)
				}
			})
			if err != nil {
				return results, fmt.Errorf("%s: %w", x.name, err)
			}
		}
	}
	return results, nil
}

// heap is how many objects and bytes a gateway has allocated so far; zeros for others.
func heap(s *started) (mallocs, bytes float64) {
	if s.gateway == nil {
		return 0, 0
	}
	mallocs, err := s.gateway.Metric("go_memstats_mallocs_total")
	if err != nil {
		return 0, 0
	}
	bytes, err = s.gateway.Metric("go_memstats_alloc_bytes_total")
	if err != nil {
		return 0, 0
	}
	return mallocs, bytes
}

func measureIntake(ctx context.Context, c config, s *section) error {
	var err error
	return errors.Join(round(c.dir, func(e *env) {
		upstream := testkit.StartMosquitto(e) // of those that have one; it only takes
		err = intakeAgainst(ctx, c, s, upstream.Addr)
	}), err)
}

func intakeAgainst(ctx context.Context, c config, s *section, upstream string) error {
	gatewayAway := contender{"gateway, upstream away", func(e *env) *started { return startGateway(e, c, nobody(e), "batch") }}
	gatewayUp := contender{"gateway, upstream there", func(e *env) *started { return startGateway(e, c, upstream, "batch") }}
	mosquitto := contender{"mosquitto, persistence true, no bridge", func(e *env) *started { return startMosquitto(e, "persistence true") }}
	mosquittoAway := contender{"mosquitto, persistence true, bridge's upstream away", func(e *env) *started {
		return startMosquitto(e, append([]string{"persistence true"}, bridgeLines(nobody(e))...)...)
	}}
	mosquittoUp := contender{"mosquitto, persistence true, bridge's upstream there", func(e *env) *started {
		return startMosquitto(e, append([]string{"persistence true"}, bridgeLines(upstream)...)...)
	}}
	plain := contender{"plain mochi, nothing stored", func(e *env) *started { return startBaseline(e, c, false) }}
	waiting := contender{"mochi waiting in the hook for the commit", func(e *env) *started { return startBaseline(e, c, true) }}

	many, err := contest(ctx, c, load{conns: 100, window: 100, qos: 1},
		[]contender{gatewayAway, mosquittoAway, plain, gatewayUp, mosquittoUp, mosquitto})
	if err != nil {
		return err
	}
	one, err := contest(ctx, c, load{conns: 1, window: 100, qos: 1}, []contender{gatewayAway, waiting, gatewayUp, mosquitto, plain})
	if err != nil {
		return err
	}
	compare := func(load string, of map[string]*intakeResult, us, than contender, goal *target) {
		s.rows = append(s.rows, row{what: load + ": " + us.name, value: of[us.name].acks, unit: "acks/s", than: than.name, against: of[than.name].acks, target: goal})
	}
	compare("100 × 100", many, gatewayAway, mosquittoAway, atLeast(1.5, "×"))
	compare("100 × 100", many, gatewayAway, mosquitto, nil)
	compare("100 × 100", many, gatewayAway, plain, atLeast(1.5, "×"))
	compare("100 × 100", many, gatewayUp, mosquittoUp, atLeast(1.5, "×"))
	compare("100 × 100", many, gatewayUp, mosquitto, nil)
	compare("100 × 100", many, gatewayUp, plain, atLeast(1.5, "×"))
	compare("1 × 100", one, gatewayAway, waiting, atLeast(20, "×"))
	compare("1 × 100", one, gatewayUp, waiting, atLeast(20, "×"))
	compare("1 × 100", one, gatewayAway, mosquitto, nil)
	compare("1 × 100", one, gatewayAway, plain, nil)
	for _, g := range []contender{gatewayAway, gatewayUp} {
		s.rows = append(s.rows,
			row{what: "100 × 100: " + g.name + ": heap allocations", value: many[g.name].mallocs, unit: "per message", target: atMost(4, "")},
			row{what: "100 × 100: " + g.name + ": heap bytes", value: many[g.name].bytes, unit: "B per message", target: atMost(1024, "")})
	}
	s.notes = append(s.notes, "Latency from PUBLISH to PUBACK and processor time of the server, medians:", latencyTable(
		"100 × 100", many, gatewayAway, gatewayUp, mosquittoAway, mosquittoUp, mosquitto, plain)+latencyTable("1 × 100", one, gatewayAway, gatewayUp, waiting, mosquitto, plain),
		"Holdfast acknowledges after fsync. mosquitto acknowledges from memory and saves now and then; plain mochi stores nothing.")
	return nil
}

func latencyTable(load string, of map[string]*intakeResult, all ...contender) string {
	t := ""
	if load == "100 × 100" {
		t = "| load | server | p50 | p99 | µs of CPU per message |\n| --- | --- | --- | --- | --- |\n"
	}
	for _, x := range all {
		r := of[x.name]
		t += fmt.Sprintf("| %s | %s | %s ms | %s ms | %s |\n", load, x.name, number(r.p50.median()), number(r.p99.median()), number(r.cpu.median()))
	}
	return t
}
