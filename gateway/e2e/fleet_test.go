package e2e_test

import (
	"testing"
	"time"

	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

// startFleet starts simulated devices of both protocol versions, with flaky links and crashes of their own, that publish rate
// messages a second each and send again what was not acknowledged.
func startFleet(t *testing.T, addr string, seed uint64, devices int, rate float64) *proof.Fleet {
	t.Helper()
	f, err := proof.StartFleet(t.Context(), proof.FleetConfig{Broker: "mqtt://" + addr, Seed: seed, Devices: devices, Rate: rate})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Abort)
	return f
}

// finish ends sampling and waits until everything in the devices' flash is acknowledged.
func finish(t *testing.T, f *proof.Fleet) {
	t.Helper()
	if err := f.Finish(); err != nil {
		t.Error(err)
	}
	if n := f.Refused(); n > 0 {
		t.Errorf("%d messages were refused", n)
	}
}

// verify holds what arrived upstream, and what the gateway's books say of it, against what the devices were promised. The gateway
// got rid of everything. mosquitto may still be handing on.
func verify(t *testing.T, g *testkit.Gateway, c *proof.Cloud, f *proof.Fleet, o proof.Options) *proof.Verdict {
	t.Helper()
	if others := messages(t, c); len(others) > 0 {
		t.Fatalf("arrived on %s, and no device sent it: %.100q", others[0].Topic, others[0].Message.Payload)
	}
	if o.Reasons == nil {
		o.Reasons = []string{} // no gap has a cause
	}
	v, err := proof.Settle(t.Context(), 15*time.Second, f, c, g.Books, o)
	switch {
	case err != nil:
		t.Error(err)
	case !v.OK():
		t.Errorf("promise broken: %v", &v)
	case v.Acknowledged == 0:
		t.Error("nothing was acknowledged: the test has shown nothing")
	}
	return &v
}
