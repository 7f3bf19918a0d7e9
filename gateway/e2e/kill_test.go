package e2e_test

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

// TestKillNine kills the gateway over and over while a fleet publishes, with the upstream there, away, and coming and
// going. Every message that a device saw acknowledged arrives, in order, and the accounts add up after every start.
func TestKillNine(t *testing.T) {
	for _, upstreamIs := range []string{"up", "away", "flapping"} {
		t.Run("upstream="+upstreamIs, func(t *testing.T) {
			path := bin(t)
			rng, seed := seeded(t)
			up := startUpstream(t)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), "batch", ""))
			calm := func() {}
			far := testkit.Faults{Latency: 20 * time.Millisecond} // so that something is always in flight
			up.link.Set(far)
			switch upstreamIs {
			case "away":
				up.link.Set(testkit.Faults{Refuse: true})
				up.link.Reset()
			case "flapping":
				calm = up.link.Flap(seed, far, 300*time.Millisecond, 300*time.Millisecond, func(string, ...any) {})
			}
			f := startFleet(t, g.Addr, seed, 20, 1000)
			var slowest time.Duration
			for n := range cycles() {
				<-time.After(time.Duration(150+rng.IntN(700)) * time.Millisecond)
				g.Kill()
				if n%5 == 0 {
					verifyStore(t, path, g.Dir)
				}
				slowest = max(slowest, g.Restart())
				balanced(t, g)
			}
			if upstreamIs == "flapping" {
				<-time.After(3 * time.Second) // links that end without a kill
			}
			finish(t, f)
			calm()
			up.link.Set(testkit.Faults{})
			drained(t, g, "cloud", 60*time.Second)
			verdict := verify(t, g, up.inbox, f, proof.Options{})
			t.Logf("%d kills, slowest start %v; %v; %v", cycles(), slowest.Round(time.Millisecond), f, verdict)
			if code := g.Stop(); code != 0 {
				t.Errorf("exit code %d after SIGTERM", code)
			}
			verifyStore(t, path, g.Dir)
		})
	}
}

// verifyStore reads a stopped gateway's whole spool with `holdfast spool verify`.
func verifyStore(t *testing.T, path, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, path, "spool", "verify", "--data-dir", dir).CombinedOutput(); err != nil {
		t.Errorf("holdfast spool verify: %v\n%s", err, out)
	}
}

// TestStopLosesNothing stops the gateway in order under load, again and again: it ends in time with exit code 0, and
// what it acknowledged arrives.
func TestStopLosesNothing(t *testing.T) {
	path := bin(t)
	rng, seed := seeded(t)
	up := startUpstream(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), "batch", ""))
	f := startFleet(t, g.Addr, seed, 20, 100)
	for range cycles() {
		<-time.After(time.Duration(150+rng.IntN(400)) * time.Millisecond)
		begin := time.Now()
		if code := g.Stop(); code != 0 {
			t.Errorf("exit code %d after SIGTERM", code)
		}
		if d := time.Since(begin); d > 10*time.Second {
			t.Errorf("an orderly stop took %v", d)
		}
		g.Restart()
		balanced(t, g)
	}
	finish(t, f)
	drained(t, g, "cloud", 60*time.Second)
	t.Log(verify(t, g, up.inbox, f, proof.Options{}))
}

// TestFormats sends the same fleet upstream in each format, over a link that breaks and through a kill.
func TestFormats(t *testing.T) {
	for _, format := range []string{"batch", "cloudevents", "passthrough"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			_, seed := seeded(t)
			up := startUpstream(t)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), format, ""))
			f := startFleet(t, g.Addr, seed, 10, 20)
			<-time.After(time.Second)
			up.link.Reset()
			<-time.After(time.Second)
			up.link.CutAfter(5000)
			<-time.After(time.Second)
			g.Kill()
			g.Restart()
			<-time.After(time.Second)
			finish(t, f)
			drained(t, g, "cloud", 60*time.Second)
			t.Log(verify(t, g, up.inbox, f, proof.Options{NoIDs: format == "passthrough"}))
		})
	}
}

// TestDeadUpstreamDelaysNobody gives a gateway two upstreams of which one is dead in each way a link can be: the other
// gets everything at once, the dead one gets it when it is back.
func TestDeadUpstreamDelaysNobody(t *testing.T) {
	for name, dead := range map[string]testkit.Faults{
		"refuses":   {Refuse: true},
		"silent":    {BlackholeUp: true, BlackholeDown: true},
		"takes all": {SwallowAcks: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			_, seed := seeded(t)
			alive, ill := startUpstream(t), startUpstream(t)
			ill.link.Set(dead)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+
				upstreamYAML("alive", alive.link.Addr(), "batch", "")+upstreamYAML("ill", ill.link.Addr(), "batch", ""))
			f := startFleet(t, g.Addr, seed, 10, 50)
			// While messages keep coming, the healthy upstream is never far behind.
			var worst uint64
			for range 30 {
				<-time.After(100 * time.Millisecond)
				for _, a := range balanced(t, g).Ledger.Accounts {
					if a.Upstream == "alive" {
						worst = max(worst, a.Pending.Messages)
					}
				}
			}
			finish(t, f)
			drained(t, g, "alive", 5*time.Second)
			t.Logf("alive: %v; at most %d messages behind", verify(t, g, alive.inbox, f, proof.Options{Upstream: "alive"}), worst)
			ill.link.Set(testkit.Faults{})
			drained(t, g, "ill", 90*time.Second) // an unanswered send is given up after 30 s, a lost link tried again within 30 s
			t.Logf("ill: %v", verify(t, g, ill.inbox, f, proof.Options{Upstream: "ill"}))
		})
	}
}

// TestLinkFaults breaks the link to the upstream in every way the proxy knows while devices publish. All that was
// acknowledged arrives; nothing hangs.
func TestLinkFaults(t *testing.T) {
	for _, c := range []struct {
		name   string
		faults testkit.Faults
		lasts  time.Duration // then the link is whole again; 0: it stays so to the end
		cuts   bool          // the link is reset again and again besides
		rate   float64       // messages a second of each device; 0: 40
	}{
		{name: "stall", faults: testkit.Faults{StallUp: true, StallDown: true}, lasts: 4 * time.Second},
		{name: "stall of answers", faults: testkit.Faults{StallDown: true}, lasts: 4 * time.Second},
		{name: "resets", cuts: true, lasts: 6 * time.Second},
		{name: "half open", faults: testkit.Faults{BlackholeUp: true, BlackholeDown: true}, lasts: 4 * time.Second},
		{name: "half open for good answers only", faults: testkit.Faults{BlackholeUp: true}, lasts: 4 * time.Second},
		{name: "swallowed acks", faults: testkit.Faults{SwallowAcks: true}, lasts: 4 * time.Second},
		{name: "500 ms latency", faults: testkit.Faults{Latency: 500 * time.Millisecond}},
		{name: "1 KiB a second", faults: testkit.Faults{BytesPerSecond: 1 << 10}, rate: 4},
		{name: "1 KiB a second with resets", faults: testkit.Faults{BytesPerSecond: 1 << 10}, rate: 4, cuts: true, lasts: 6 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			rng, seed := seeded(t)
			up := startUpstream(t)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), "batch", ""))
			if c.rate == 0 {
				c.rate = 40
			}
			// A little latency, so that something is always in flight.
			whole := testkit.Faults{Latency: 30 * time.Millisecond}
			c.faults.Latency = max(c.faults.Latency, whole.Latency)
			up.link.Set(whole)
			f := startFleet(t, g.Addr, seed, 5, c.rate)
			<-time.After(500 * time.Millisecond)
			up.link.Set(c.faults)
			most := c.lasts
			if most == 0 {
				most = 4 * time.Second
			}
			for end := time.Now().Add(most); time.Now().Before(end); {
				<-time.After(time.Duration(100+rng.IntN(600)) * time.Millisecond)
				if c.cuts {
					up.link.Reset()
				}
			}
			if c.lasts > 0 {
				up.link.Set(whole)
			}
			finish(t, f)
			begin := time.Now()
			drained(t, g, "cloud", 120*time.Second)
			t.Logf("%v; drained %v after the last message", verify(t, g, up.inbox, f, proof.Options{}), time.Since(begin).Round(100*time.Millisecond))
		})
	}
}
