package tracing_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/testkit"
	"holdfast/internal/tracing"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, endpoint string, every uint64) (*tracing.Tracer, *testkit.Buffer) {
	t.Helper()
	log := &testkit.Buffer{}
	x, err := tracing.New(tracing.Config{Endpoint: endpoint, Every: every, Gateway: "gw1", Version: "v1", Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	return x, log
}

func closeIt(t *testing.T, x *tracing.Tracer) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := x.Close(ctx); err != nil {
		t.Error(err)
	}
}

var (
	begin   = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	message = tracing.Message{ID: "gw1/e1/telemetry/200", Lane: "telemetry", Seq: 200, Topic: "dt/x"}
)

func arrival() *tracing.Arrival {
	return &tracing.Arrival{
		Message: message, Device: "pump", Size: 3, Received: begin, Stored: begin.Add(2 * time.Millisecond), Answered: begin.Add(3 * time.Millisecond),
		Parent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
}

// TestAMessageIsOneTrace: what one process tells of its arrival and another, later, of its delivery, finds together by the message's id.
func TestAMessageIsOneTrace(t *testing.T) {
	c := testkit.StartCollector(t)
	x, _ := open(t, c.URL, 100)
	x.Arrived(arrival())
	closeIt(t, x)
	closeIt(t, x) // twice is no harm
	x, _ = open(t, c.URL, 100)
	x.Delivered(&tracing.Delivery{Message: message, Upstream: "cloud", Records: 7, Sent: begin.Add(time.Hour), Ended: begin.Add(time.Hour + time.Second)})
	x.Delivered(&tracing.Delivery{Message: message, Upstream: "other", Records: 1, Sent: begin, Ended: begin, Err: errors.New("never")})
	closeIt(t, x)

	sum := sha256.Sum256([]byte(message.ID))
	id, first := hex.EncodeToString(sum[:16]), hex.EncodeToString(sum[16:24])
	want := map[string]struct {
		parent string
		took   time.Duration
	}{
		"receive telemetry": {"", 3 * time.Millisecond}, "commit": {first, 2 * time.Millisecond}, "ack": {first, time.Millisecond},
		"send cloud": {first, time.Second}, "send other": {first, 0},
	}
	for _, s := range c.Spans() {
		w, known := want[s.Name]
		delete(want, s.Name)
		if !known || s.Trace != id || s.Parent != w.parent || s.End.Sub(s.Start) != w.took {
			t.Errorf("span %+v, want %+v of trace %s", s, w, id)
		}
		if a := s.Attributes; a["service.name"] != "holdfast" || a["service.instance.id"] != "gw1" || a["service.version"] != "v1" {
			t.Errorf("%s: attributes %v", s.Name, a)
		}
		switch s.Name {
		case "receive telemetry":
			if a := s.Attributes; s.ID != first || a["messaging.message.id"] != message.ID || a["messaging.client.id"] != "pump" || a["messaging.destination.name"] != "dt/x" {
				t.Errorf("the first span is %+v", s)
			}
			if len(s.Links) != 1 || s.Links[0] != "0af7651916cd43dd8448eb211c80319c" {
				t.Errorf("links %v", s.Links)
			}
		case "send other":
			if s.Error != "never" {
				t.Errorf("error %q", s.Error)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestWhichMessagesAreTold(t *testing.T) {
	x, _ := open(t, "http://127.0.0.1:1/v1/traces", 100)
	defer x.Close(t.Context())
	for seq, want := range map[uint64]uint64{0: 0, 1: 100, 99: 100, 100: 100, 101: 200} {
		if got := x.First(seq); got != want {
			t.Errorf("first from %d on: %d, want %d", seq, got, want)
		}
	}
	if _, err := tracing.New(tracing.Config{Endpoint: "http://127.0.0.1:1"}); err == nil {
		t.Error("every 0 is taken")
	}
}

// TestACollectorThatIsAwayIsNamedOnce, and nothing waits for it.
func TestACollectorThatIsAwayIsNamedOnce(t *testing.T) {
	c := testkit.StartCollector(t)
	c.Away.Store(true)
	x, log := open(t, c.URL, 1)
	began := time.Now()
	for range 5000 {
		x.Arrived(arrival())
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("5000 messages took %v", took)
	}
	testkit.Eventually(t, 10*time.Second, "the log tells", func() bool { return log.Count("traces are not taken") == 1 })
	c.Away.Store(false)
	testkit.Eventually(t, 10*time.Second, "spans are taken again", func() bool {
		x.Arrived(arrival())
		return log.Count("traces are taken again") == 1
	})
	closeIt(t, x)
	if n := log.Count("traces are not taken"); n != 1 {
		t.Errorf("told %d times", n)
	}
}

func BenchmarkArrived(b *testing.B) {
	c := testkit.StartCollector(b)
	x, err := tracing.New(tracing.Config{Endpoint: c.URL, Every: 1, Gateway: "gw1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer x.Close(context.Background())
	a := arrival()
	b.ReportAllocs()
	for b.Loop() {
		x.Arrived(a)
	}
}
