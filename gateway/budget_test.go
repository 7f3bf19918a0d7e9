package gateway_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/gateway/httpapi"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// fillLane publishes n messages of a kilobyte that do not compress.
func fillLane(t *testing.T, g *running, topic string, n int) {
	t.Helper()
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range n {
		b := make([]byte, 1024)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if r := d.publish(t, topic, string(b)); r != mqtt.Success {
			t.Fatalf("reason %v", r)
		}
	}
}

// TestBudgetAgainstTheWire holds a second's budget against what a proxy between gateway and upstream has counted, both connections
// together.
func TestBudgetAgainstTheWire(t *testing.T) {
	const rate, seconds = 16 << 10, 3
	proxy := testkit.StartProxy(t, startUpstream(t))
	c := configuration(t, t.TempDir())
	c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + proxy.Addr(), Format: bridge.FormatPassthrough, Commands: true, Budget: bridge.Budget{BytesPerSecond: rate}}}
	g := start(t, c)
	fillLane(t, g, "dt/x", rate/1024*(seconds+4))
	before, began := proxy.Traffic().Up, time.Now()
	<-time.After(seconds * time.Second)
	n, took := proxy.Traffic().Up-before, time.Since(began)
	// What may have been saved up comes on top, and a message that was begun.
	if most := int64(rate*took.Seconds()*1.03) + rate/2 + 2048; n > most {
		t.Errorf("%d bytes in %v, at most %d should", n, took, most)
	}
	if least := int64(rate * seconds * 8 / 10); n < least { // the machine may be busy
		t.Errorf("%d bytes in %v, at least %d should", n, took, least)
	}
	t.Logf("%d bytes in %v: %.3f of the budget", n, took, float64(n)/(rate*took.Seconds()))
	testkit.EventuallyNil(t, 10*time.Second, "the meter to show what the proxy has counted", func() error {
		if u, up := g.Status().Upstreams[0], proxy.Traffic().Up; u.WireBytes != uint64(up) {
			return fmt.Errorf("%d bytes on the meter, %d on the wire", u.WireBytes, up)
		}
		return nil
	})
}

// TestDayBudgetSurvivesARestart: used up before, it is used up after; the alarm lane is urgent and flows.
func TestDayBudgetSurvivesARestart(t *testing.T) {
	const day = 64 << 10
	proxy := testkit.StartProxy(t, startUpstream(t))
	dir := t.TempDir()
	c := configuration(t, dir)
	c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + proxy.Addr(), Format: bridge.FormatPassthrough, Budget: bridge.Budget{BytesPerDay: day}}}
	for i := range c.Spool.Lanes {
		c.Spool.Lanes[i].Urgent = c.Spool.Lanes[i].Name == "alarm"
	}
	held := func(g *running) (u httpapi.Upstream) {
		testkit.Eventually(t, 15*time.Second, "the day's budget is used up", func() bool {
			u = g.Status().Upstreams[0]
			return u.Connected && u.Budget != nil && u.Budget.Held == bridge.HeldByDay
		})
		return u
	}
	g := start(t, c)
	fillLane(t, g, "dt/x", 100)
	held(g)
	g.end()
	if up := proxy.Traffic().Up; up < day || up > day*11/10 {
		t.Errorf("%d bytes on a day of %d", up, day)
	}
	before := proxy.Traffic().Up
	g = start(t, c)
	if u := held(g); u.Budget.DayBytes < day {
		t.Errorf("after a restart %+v", u.Budget)
	}
	fillLane(t, g, "alarm/x", 3)
	testkit.EventuallyNil(t, 15*time.Second, "alarms to flow", func() error {
		for _, a := range g.Status().Ledger.Accounts {
			if a.Lane == "alarm" && a.Delivered.Messages != 3 {
				return fmt.Errorf("%+v", a)
			}
		}
		return nil
	})
	if n := proxy.Traffic().Up - before; n > 8<<10 {
		t.Errorf("%d bytes after the day was used up, for three alarms", n)
	}
}
