package gateway_test

import (
	"fmt"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/gateway"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
	"holdfast/internal/tracing"
	"holdfast/spool"
)

// TestTracesFollowAMessage: each second message of the lane is told of, from its arrival to the upstream's acknowledgement.
func TestTracesFollowAMessage(t *testing.T) {
	up := startUpstream(t)
	tell := testkit.StartCollector(t)
	c := configuration(t, t.TempDir())
	c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + up, Format: bridge.FormatBatch}}
	c.Traces = config.Traces{Endpoint: tell.URL, Every: 2}
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if r := d.publish(t, "dt/x", fmt.Sprint(i)); r != mqtt.Success {
			t.Fatalf("reason %v", r)
		}
	}
	testkit.EventuallyNil(t, 15*time.Second, "all to be told", func() error {
		arrived, sent := tell.Named("receive telemetry"), tell.Named("send cloud")
		if len(arrived) != 5 || len(sent) != 5 {
			return fmt.Errorf("%d arrivals and %d sends are told", len(arrived), len(sent))
		}
		traces := map[string]bool{}
		for i, s := range arrived {
			if want := fmt.Sprintf("gw1/%s/telemetry/%d", g.Status().Epoch, 2*i+2); s.Attributes["messaging.message.id"] != want {
				t.Errorf("message %q, want %q", s.Attributes["messaging.message.id"], want)
			}
			traces[s.Trace] = true
		}
		for _, s := range sent {
			if !traces[s.Trace] || s.End.Before(s.Start) {
				t.Errorf("span %+v is of none of the traces", s)
			}
		}
		return nil
	})
	for _, s := range tell.Spans() {
		if s.Attributes["holdfast.lane"] == "system" {
			t.Errorf("the gateway's own messages are told: %+v", s)
		}
	}
}

// TestMessagesThatAreNotToldAllocateNothing: all but each hundredth pay for their notes alone.
func TestMessagesThatAreNotToldAllocateNothing(t *testing.T) {
	x, err := tracing.New(tracing.Config{Endpoint: testkit.StartCollector(t).URL, Every: 100, Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close(t.Context())
	arrive := gateway.ArriveUntold(x)
	m, called := message("dt/x/pressure", 1), 0
	m.Record.Props = &spool.Props{User: [][2]string{{"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}}
	d := done(func(uint64, uint64, error) { called++ })
	var stored kv.Done = d
	if n := testing.AllocsPerRun(1000, func() { arrive(m, stored) }); n >= 2 { // a collection, and the race detector, may empty the pool
		t.Errorf("%v allocations a message", n)
	}
	if called != 1001 {
		t.Errorf("%d of 1001 were answered", called)
	}
}
