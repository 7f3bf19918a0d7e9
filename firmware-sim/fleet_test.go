package firmwaresim_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

func run(t *testing.T, cfg firmwaresim.Config) (*firmwaresim.Fleet, firmwaresim.Report) {
	t.Helper()
	f, err := firmwaresim.New(cfg, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	r, err := f.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return f, r
}

// sink is a server that notes what it acknowledges.
func sink(t *testing.T) (*mqtttest.Server, *firmwaresim.Arrivals) {
	a := firmwaresim.NewArrivals()
	return mqtttest.New(t, mqtttest.Script{Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
		if err := a.AddPayload(p.Payload); err != nil {
			t.Error(err)
		}
		return mqtttest.Answer{}
	}}), a
}

func versions(t *testing.T, fn func(t *testing.T, v mqtt.Version)) {
	for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
		t.Run("version="+v.String(), func(t *testing.T) {
			t.Parallel()
			fn(t, v)
		})
	}
}

func TestFleetPublishes(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		s, arrived := sink(t)
		f, r := run(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, Version: v, Devices: 20, Rate: 200, Messages: 100})
		verdict := f.Ledger().Verify(arrived)
		t.Logf("\n%v%v", r, verdict)
		// A QoS 0 sample may come before its device is connected.
		if r.Sampled != 2000 || r.Published+r.Dropped != 2000 || r.Acknowledged+r.QoS0 != r.Published || r.Unacknowledged != 0 {
			t.Errorf("report %+v", r.Snapshot)
		}
		if verdict.Published != r.Published || verdict.Arrived != r.Published || verdict.Duplicates != 0 || !verdict.OK() {
			t.Errorf("verdict %v", verdict)
		}
		if r.Latency.P50 <= 0 || r.Latency.P99 < r.Latency.P50 || r.Latency.Max < r.Latency.P999 {
			t.Errorf("latency %+v", r.Latency)
		}
	})
}

// TestAbort: a fleet that nobody acknowledges anything ends when it is told to, not when its drain time is over.
func TestAbort(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{Publish: func(string, *mqtt.Publish) mqtttest.Answer { return mqtttest.Answer{Silent: true} }})
	f, err := firmwaresim.New(firmwaresim.Config{Broker: "mqtt://" + s.Addr, Devices: 2, Rate: 100, QoS: firmwaresim.QoS1, Drain: time.Hour}, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := f.Run(ctx)
		ended <- err
	}()
	testkit.Eventually(t, 10*time.Second, "something is in flight", func() bool { return f.Snapshot().InFlight > 0 })
	cancel() // it drains now
	f.Abort()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it drains on")
	}
}

func TestFleetFillsTheWindow(t *testing.T) {
	for _, qos := range []firmwaresim.QoS{firmwaresim.ByProfile, firmwaresim.QoS0, firmwaresim.QoS1, firmwaresim.QoS2} {
		t.Run(fmt.Sprintf("qos=%d", int(qos)-1), func(t *testing.T) {
			var mu sync.Mutex
			most, open := 0, map[uint16]bool{}
			arrived := firmwaresim.NewArrivals()
			s := mqtttest.New(t, mqtttest.Script{
				Connect: func(*mqtt.Connect) mqtt.Connack { return mqtt.Connack{ReceiveMaximum: 7} },
				Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
					mu.Lock()
					defer mu.Unlock()
					if p.QoS == 2 {
						open[p.ID] = true
						most = max(most, len(open))
					}
					if len(p.Payload) != 256 {
						t.Errorf("%d bytes: %s", len(p.Payload), p.Payload)
					}
					if err := arrived.AddPayload(p.Payload); err != nil {
						t.Error(err)
					}
					return mqtttest.Answer{}
				},
				Frame: func(_ string, f []byte) bool {
					var a mqtt.Ack
					if mqtt.ParseAck(f, mqtt.V5, &a) == nil && a.Type == mqtt.TypePubrel {
						mu.Lock()
						delete(open, a.ID)
						mu.Unlock()
					}
					return true
				},
			})
			f, r := run(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, Devices: 1, Messages: 5000, Window: 100, Size: 256, QoS: qos})
			verdict := f.Ledger().Verify(arrived)
			if r.Published != 5000 || r.Unacknowledged != 0 || verdict.Arrived != 5000 || !verdict.OK() {
				t.Errorf("%v\n%v", r, verdict)
			}
			if most > 7 {
				t.Errorf("%d in flight, the server takes 7", most)
			}
		})
	}
}

// TestFleetLosesNothingThatWasAcknowledged lets everything go wrong at once: links break in
// each way, devices crash, the server swallows acknowledgements and hangs up.
func TestFleetLosesNothingThatWasAcknowledged(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, v mqtt.Version) {
		for _, clean := range []bool{false, true} {
			t.Run(fmt.Sprintf("clean=%v", clean), func(t *testing.T) {
				t.Parallel()
				arrived := firmwaresim.NewArrivals()
				var count, dups, inSession atomic.Int64
				s := mqtttest.New(t, mqtttest.Script{Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
					if p.Dup {
						dups.Add(1)
					}
					if err := arrived.AddPayload(p.Payload); err != nil {
						t.Error(err)
					}
					switch n := count.Add(1); {
					case n%97 == 0:
						return mqtttest.Answer{Silent: true, Close: true}
					case n%101 == 0:
						return mqtttest.Answer{Close: true}
					}
					return mqtttest.Answer{}
				}, Connect: func(c *mqtt.Connect) mqtt.Connack {
					if !c.CleanStart {
						inSession.Add(1)
					}
					return mqtt.Connack{}
				}})
				f, r := run(t, firmwaresim.Config{
					Broker: "mqtt://" + s.Addr, Version: v, Devices: 20, Rate: 100, Duration: 2 * time.Second, Drain: 20 * time.Second,
					Flaky: 0.9, Crash: 0.2, Seed: 7, CleanSession: clean, MinBackoff: 5 * time.Millisecond, MaxBackoff: 50 * time.Millisecond,
				})
				verdict := f.Ledger().Verify(arrived)
				t.Logf("\n%v%v, %d with DUP", r, verdict, dups.Load())
				if !verdict.OK() || r.Unacknowledged != 0 {
					t.Errorf("%v; %d not acknowledged", verdict, r.Unacknowledged)
				}
				if r.Errors["connection lost: closed by the server"] == 0 || len(r.Errors) > 2 { // and resets by the server
					t.Errorf("errors %v: simulated faults are none", r.Errors)
				}
				if r.Breaks == 0 || r.Crashes == 0 || r.Reconnects == 0 || r.Resent == 0 || verdict.Duplicates == 0 {
					t.Errorf("no fault happened: %+v", r.Snapshot)
				}
				if clean != (dups.Load() == 0) || clean != (inSession.Load() == 0) {
					t.Errorf("clean sessions %v: %d with DUP, %d connections without clean start", clean, dups.Load(), inSession.Load())
				}
			})
		}
	})
}

// TestFleetNoticesALoss: the check itself must be able to fail.
func TestFleetNoticesALoss(t *testing.T) {
	arrived := firmwaresim.NewArrivals()
	var n atomic.Int64
	s := mqtttest.New(t, mqtttest.Script{Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
		if n.Add(1) == 50 {
			return mqtttest.Answer{} // acknowledged and thrown away
		}
		if err := arrived.AddPayload(p.Payload); err != nil {
			t.Error(err)
		}
		return mqtttest.Answer{}
	}})
	f, _ := run(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, Devices: 2, QoS: firmwaresim.QoS1, Messages: 100})
	if v := f.Ledger().Verify(arrived); v.Lost != 1 || v.OK() || len(v.Examples) != 1 {
		t.Errorf("verdict %v", v)
	}
}

// TestFlashIsBounded: offline, the oldest samples make room; they are counted and were never sent.
func TestFlashIsBounded(t *testing.T) {
	arrived := firmwaresim.NewArrivals()
	var open atomic.Bool
	s := mqtttest.New(t, mqtttest.Script{
		Connect: func(*mqtt.Connect) mqtt.Connack {
			if open.Load() {
				return mqtt.Connack{}
			}
			return mqtt.Connack{Reason: mqtt.ServerUnavailable}
		},
		Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
			if err := arrived.AddPayload(p.Payload); err != nil {
				t.Error(err)
			}
			return mqtttest.Answer{}
		},
	})
	f, err := firmwaresim.New(firmwaresim.Config{
		Broker: "mqtt://" + s.Addr, Devices: 5, Rate: 1000, Messages: 300, QoS: firmwaresim.QoS1, Window: 10, Buffer: 50,
		Duration: 30 * time.Second, MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond,
	}, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for f.Snapshot().Sampled < 5*300 && t.Context().Err() == nil {
			<-time.After(time.Millisecond)
		}
		open.Store(true)
	}()
	r, err := f.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v := f.Ledger().Verify(arrived)
	if r.Dropped != 5*250 || r.Published != 5*50 || v.Arrived != 5*50 || !v.OK() || r.FailedConnects == 0 {
		t.Errorf("%v%v", r, v)
	}
	if len(r.Errors) != 1 || r.Errors["connect: server answered CONNACK server unavailable (0x88)"] == 0 {
		t.Errorf("errors %v", r.Errors)
	}
}

// TestRefusalIsNoAcknowledgement: an MQTT 5 server that refuses with a reason has not taken
// the message over.
func TestRefusalIsNoAcknowledgement(t *testing.T) {
	for _, qos := range []firmwaresim.QoS{firmwaresim.QoS1, firmwaresim.QoS2} {
		s := mqtttest.New(t, mqtttest.Script{Publish: func(string, *mqtt.Publish) mqtttest.Answer { return mqtttest.Answer{Reason: mqtt.QuotaExceeded} }})
		f, r := run(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, QoS: qos, Messages: 30})
		v := f.Ledger().Verify(firmwaresim.NewArrivals())
		if r.Refused != 30 || r.Acknowledged != 0 || r.Unacknowledged != 0 || v.Lost != 0 || v.Published != 30 {
			t.Errorf("%v%v", r, v)
		}
	}
}

func TestNobodyThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	f, err := firmwaresim.New(firmwaresim.Config{Broker: "mqtt://" + addr, Duration: 50 * time.Millisecond, Drain: -1}, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "connection refused") || r.Connects != 0 {
		t.Errorf("%v, error %v", r, err)
	}
	if _, err := f.Run(t.Context()); err == nil {
		t.Error("a second Run")
	}
}

func TestFleetAgainstMosquitto(t *testing.T) {
	t.Parallel()
	addr := testkit.StartMosquitto(t, "max_inflight_messages 0").Addr
	versions(t, func(t *testing.T, v mqtt.Version) {
		// The subscriber stands on its own session: what mosquitto acknowledges, it passes on.
		arrived := firmwaresim.NewArrivals()
		prefix := fmt.Sprintf("v%d", byte(v))
		sub, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
			Address: addr,
			Connect: mqtt.Connect{Version: v, ClientID: "upstream-" + prefix, CleanStart: true},
			OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
				if err := arrived.AddPayload(p.Payload); err != nil {
					t.Error(err)
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sub.Disconnect(mqtt.Success) }()
		if _, err := sub.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "dt/" + prefix + "/#", QoS: 2}}}); err != nil {
			t.Fatal(err)
		}
		f, r := run(t, firmwaresim.Config{
			Broker: "mqtt://" + addr, Version: v, Prefix: prefix, App: prefix, Devices: 30, Rate: 100, Duration: 2 * time.Second, Drain: 20 * time.Second,
			Flaky: 0.5, Crash: 0.1, Seed: 3, MinBackoff: 5 * time.Millisecond, MaxBackoff: 50 * time.Millisecond,
		})
		verdict := f.Ledger().Verify(arrived)
		for deadline := time.Now().Add(5 * time.Second); verdict.Lost > 0 && time.Now().Before(deadline); verdict = f.Ledger().Verify(arrived) {
			<-time.After(10 * time.Millisecond)
		}
		t.Logf("\n%v%v", r, verdict)
		if !verdict.OK() || r.Unacknowledged != 0 || r.Breaks == 0 || r.Crashes == 0 {
			t.Errorf("%v, %d not acknowledged", verdict, r.Unacknowledged)
		}
	})
}

func TestConfigErrors(t *testing.T) {
	_, err := firmwaresim.New(firmwaresim.Config{
		Broker: "http://user:secret@x", Version: 3, Profile: "toaster", Rate: -1, QoS: 9, Size: 10, Window: 70000, Buffer: 5, Flaky: 1, Prefix: "a/b", App: "#",
	}, nil)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"broker", "version 3", "toaster", "meter, mixed, vibration, vitals", "rate -1", "QoS 8", "size 10", "window 70000", "buffer 5", "flaky 1", "prefix", "app"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("error repeats the password: %v", err)
	}
}
