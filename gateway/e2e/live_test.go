package e2e_test

import (
	"errors"
	"testing"
	"time"

	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

// TestLiveFirst leaves a gateway without its upstream, and kills it while the backlog fills in beside the newest messages over a
// slow link that breaks. Every message arrives once by its id, the newest in order and the backlog in order and
// marked, the receiver sees no hole, and the accounts add up after every start.
func TestLiveFirst(t *testing.T) {
	for _, format := range []string{"batch", "cloudevents"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			rng, seed := seeded(t)
			up := startUpstream(t)
			up.link.Set(testkit.Faults{Refuse: true})
			g := testkit.StartGateway(t, path, gatewayID, logYAML+
				"spool: { lanes: [ { name: alarm, share: 50 }, { name: telemetry, share: 50, drain: live_first } ] }\n"+
				"upstreams:\n"+upstreamYAML("cloud", up.link.Addr(), format, ""))
			f := startFleet(t, g.Addr, seed, 10, 100)
			telemetry := func(want string, ok func(a proof.Account) bool) {
				testkit.EventuallyNil(t, 60*time.Second, want, func() error {
					for _, a := range balanced(t, g).Ledger.Accounts {
						if a.Lane == "telemetry" && ok(a) {
							return nil
						}
					}
					return errors.New("not yet")
				})
			}
			<-time.After(6 * time.Second) // what is older counts as behind
			telemetry("there is a backlog", func(a proof.Account) bool { return a.Pending.Bytes > 300<<10 })
			// Too slow for both.
			up.link.Set(testkit.Faults{BytesPerSecond: map[string]int{"batch": 40 << 10, "cloudevents": 300 << 10}[format]})
			telemetry("the newest go first", func(a proof.Account) bool { return a.Islands > 0 })
			for n := range cycles() {
				<-time.After(time.Duration(200+rng.IntN(600)) * time.Millisecond)
				if n%2 == 0 {
					g.Kill()
					if n == 0 {
						verifyStore(t, path, g.Dir)
					}
					g.Restart()
				} else {
					up.link.Reset()
				}
				balanced(t, g)
			}
			finish(t, f)
			up.link.Set(testkit.Faults{})
			drained(t, g, "cloud", 60*time.Second)
			verdict := verify(t, g, up.inbox, f, proof.Options{LiveFirst: []string{"telemetry"}})
			t.Log(f, verdict)
			switch stats := up.inbox.Receiver().Stats(); {
			case stats.Holes > 0:
				t.Errorf("the receiver saw %d holes where there was a backlog", stats.Holes)
			case stats.Late == 0:
				t.Error("nothing came from the backlog: the test has shown nothing")
			}
		})
	}
}
