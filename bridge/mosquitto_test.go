package bridge_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// receiver is subscribed at the far broker and notes what arrives.
type receiver struct {
	t  *testing.T
	mu sync.Mutex
	// next is the number of the next message by lane; what comes first must come in order.
	next  map[string]int
	again int
	at    map[string]time.Time // of the last by lane
}

func receive(t *testing.T, addr string) *receiver {
	t.Helper()
	r := &receiver{t: t, next: map[string]int{}, at: map[string]time.Time{}}
	up := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	o := mqttup.Options{URL: "mqtt://" + addr, ClientID: "receiver", Persistent: true, OnUp: func() { up <- struct{}{} }}
	go func() { done <- mqttup.Subscribe(ctx, o, []string{"#"}, r.take) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Subscribe: %v", err)
		}
	})
	<-up
	return r
}

func (r *receiver) take(topic string, payload []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch tp := wire.ParseTopic(topic); tp.Kind {
	case wire.KindBatch:
		b, err := wire.DecodeBatch(payload)
		if err != nil {
			r.t.Errorf("batch: %v", err)
			return
		}
		for _, m := range b.Messages {
			r.one(string(m.Payload))
		}
	case wire.KindOther:
		r.one(string(payload))
	case wire.KindMessage, wire.KindGap, wire.KindEvent, wire.KindState, wire.KindCommand, wire.KindCommandEvent, wire.KindDeviceEvent:
	}
}

func (r *receiver) one(payload string) {
	lane, number, _ := strings.Cut(payload[:strings.IndexAny(payload+" ", " ")], "-")
	n, err := strconv.Atoi(number)
	switch {
	case err != nil:
		r.t.Errorf("%q arrived", payload)
	case n > r.next[lane]+1:
		r.t.Errorf("%s: message %d arrived after %d", lane, n, r.next[lane])
		r.next[lane] = n
	case n <= r.next[lane]:
		r.again++
	default:
		r.next[lane] = n
		r.at[lane] = time.Now()
	}
}

func (r *receiver) has(lane string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next[lane]
}

// drain runs a bridge from src to addr until the test ends.
func drain(t *testing.T, src bridge.Source, cfg bridge.Config, addr string) *bridge.Bridge {
	t.Helper()
	cfg.Name, cfg.URL = "cloud", "mqtt://"+addr
	up, err := mqttup.FromConfig(cfg, gateway, epoch, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bridge.NewFrom(cfg, gateway, epoch, src, up, testkit.Logger(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return b
}

var lanes = []string{"alarm", "telemetry", "bulk"}

// TestFlappingLink: resets, refusals, stalls, black holes, swallowed acks and cuts, again and again; in the end
// everything has arrived, first arrivals in order, and everything is resolved.
func TestFlappingLink(t *testing.T) {
	for i, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			addr := testkit.StartMosquitto(t, "max_inflight_messages 0").Addr
			proxy := testkit.StartProxy(t, addr)
			r := receive(t, addr)
			src := newSource(t.Errorf, lanes...)
			const n = 20_000
			for _, lane := range lanes {
				src.lane(lane).maxRun = 50
				src.add(lane, numbered(lane, 1, n/2)...)
			}
			b := drain(t, src, bridge.Config{Format: format, Window: 50, Tuning: bridge.Tuning{
				AckTimeout: 400 * time.Millisecond, ConnectTimeout: 400 * time.Millisecond,
				BackoffMin: 10 * time.Millisecond, BackoffMax: 100 * time.Millisecond, BatchBytes: 4 << 10, Kicks: 1 << 20,
			}}, proxy.Addr())
			stop := proxy.Flap(uint64(i+1), testkit.Faults{}, 150*time.Millisecond, 600*time.Millisecond, t.Logf)
			for k := n / 2; k < n; k += 100 {
				for _, lane := range lanes {
					src.add(lane, numbered(lane, k+1, k+100)...)
				}
				<-time.After(50 * time.Millisecond)
			}
			stop()
			testkit.EventuallyNil(t, 30*time.Second, "everything arrives and is resolved", func() error {
				for _, lane := range lanes {
					if r.has(lane) != n || src.cursor(lane) != n {
						return fmt.Errorf("%s: %d arrived, %d resolved of %d; %+v", lane, r.has(lane), src.cursor(lane), n, b.Status())
					}
				}
				return nil
			})
			for _, lane := range lanes {
				if got := src.outcomes(lane); got[spool.Delivered] != n {
					t.Errorf("%s: outcomes %v", lane, got)
				}
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			t.Logf("%d arrived again; %+v; %+v", r.again, b.Status(), proxy.Traffic())
		})
	}
}

// TestLinkOf4KiBPerSecond: the link lives on, and an alarm passes the backlog within seconds.
func TestLinkOf4KiBPerSecond(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	t.Parallel()
	addr := testkit.StartMosquitto(t, "max_inflight_messages 0").Addr
	proxy := testkit.StartProxy(t, addr)
	proxy.Set(testkit.Faults{BytesPerSecond: 4 << 10, Latency: 100 * time.Millisecond})
	r := receive(t, addr)
	src := newSource(t.Errorf, lanes...)
	pad := strings.Repeat("x", 200)
	for i := range 2000 {
		src.add("bulk", message("cam", "dt/cam", fmt.Sprintf("bulk-%d %s", i+1, pad)))
	}
	b := drain(t, src, bridge.Config{Format: bridge.FormatPassthrough, Window: 1000, Tuning: bridge.Tuning{AckTimeout: 6 * time.Second}}, proxy.Addr())
	testkit.Eventually(t, 20*time.Second, "the first acks come", func() bool { return src.cursor("bulk") > 60 })
	for i := range 3 {
		began := time.Now()
		src.add("alarm", numbered("alarm", i+1, i+1)...)
		testkit.Eventually(t, 20*time.Second, "the alarm arrives", func() bool { return r.has("alarm") == i+1 })
		if d := time.Since(began); i > 0 && d > 4*time.Second {
			t.Errorf("alarm %d arrived after %v", i+1, d)
		}
	}
	if s := b.Status(); !s.Connected || s.LastError != "" || proxy.Traffic().Connections != 1 {
		t.Errorf("status %+v, %d connections", s, proxy.Traffic().Connections)
	}
}

// TestPacketThatMosquittoKicksIsParked: a broker with a limit of its own ends the connection when it gets more.
func TestPacketThatMosquittoKicksIsParked(t *testing.T) {
	t.Parallel()
	addr := testkit.StartMosquitto(t, "max_inflight_messages 0", "max_packet_size 20000").Addr
	r := receive(t, addr)
	src := newSource(t.Errorf, lanes...)
	src.add("telemetry", numbered("telemetry", 1, 100)...)
	src.add("bulk", message("cam", "dt/cam", strings.Repeat("x", 30_000)))
	src.add("bulk", numbered("bulk", 1, 100)...)
	drain(t, src, bridge.Config{Format: bridge.FormatPassthrough, Tuning: bridge.Tuning{
		BackoffMin: time.Millisecond, BackoffMax: 5 * time.Millisecond,
	}}, addr)
	testkit.Eventually(t, 20*time.Second, "the rest is delivered", func() bool { return src.cursor("bulk") == 101 && src.cursor("telemetry") == 100 })
	testkit.Eventually(t, 20*time.Second, "it arrives", func() bool { return r.has("bulk") == 100 && r.has("telemetry") == 100 })
	if got := src.outcomes("bulk"); got[spool.Parked] != 1 {
		t.Errorf("outcomes %v", got)
	}
	if got := src.outcomes("telemetry"); got[spool.Parked] != 0 {
		t.Errorf("outcomes of the innocent lane %v", got)
	}
}

// TestUpstreamThatIsRestarted: nobody there at first, then one broker after the other.
func TestUpstreamThatIsRestarted(t *testing.T) {
	t.Parallel()
	src := newSource(t.Errorf, lanes...)
	src.add("telemetry", numbered("telemetry", 1, 1000)...)
	proxy := testkit.StartProxy(t, testkit.FreeAddr(t)) // nobody there
	b := drain(t, src, bridge.Config{Tuning: bridge.Tuning{BackoffMin: 10 * time.Millisecond, BackoffMax: 50 * time.Millisecond}}, proxy.Addr())
	testkit.Eventually(t, 10*time.Second, "attempts fail", func() bool { return b.Status().Attempts > 3 })
	for round := range 3 {
		proxy.SetTarget(testkit.StartMosquitto(t, "max_inflight_messages 0").Addr)
		proxy.Reset()
		want := 1000 * (round + 1)
		testkit.Eventually(t, 20*time.Second, "all is delivered", func() bool { return src.cursor("telemetry") == want })
		src.add("telemetry", numbered("telemetry", want+1, want+1000)...)
	}
	if s := b.Status(); s.ParkedMessages != 0 {
		t.Errorf("status %+v", s)
	}
}
