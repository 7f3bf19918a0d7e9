package e2e_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

const year = 365 * 24 * time.Hour

// clockSite is a gateway whose wall clock the test sets, with one upstream for each format that carries a time.
type clockSite struct {
	*testkit.Gateway
	t     *testing.T
	clock *testkit.FakeClock
	ups   map[string]*upstream // by format
	sent  map[string]time.Time // what was acknowledged, and when that really was
}

func startClockSite(t *testing.T) *clockSite {
	t.Helper()
	path := bin(t)
	s := &clockSite{t: t, clock: testkit.NewFakeClock(t), ups: map[string]*upstream{}, sent: map[string]time.Time{}}
	yaml := logYAML + "spool: { lanes: [ { name: telemetry, share: 100, max_bytes: 64MiB, max_age: 24h, when_full: drop_oldest } ] }\nupstreams:\n"
	for _, format := range []string{"batch", "cloudevents"} {
		u := startUpstream(t)
		s.ups[format] = u
		yaml += upstreamYAML(format, u.link.Addr(), format, "")
	}
	s.link(false)
	s.Gateway = testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
		Devices: "{ anonymous: true }", YAML: yaml, Clock: s.clock,
	})
	return s
}

// link has the upstreams reachable or not.
func (s *clockSite) link(up bool) {
	for _, u := range s.ups {
		u.link.Set(testkit.Faults{Refuse: !up})
		if !up {
			u.link.Reset()
		}
	}
}

// publish sends messages with an expiry interval, 0: none, and waits until they are acknowledged.
func (s *clockSite) publish(expiry uint32, payloads ...string) {
	s.t.Helper()
	d := &device{waiting: map[uint16]chan *mqtt.Ack{}}
	if err := d.connect(s.t.Context(), s.Addr, mqtt.Connect{Version: mqtt.V5, ClientID: "pump", CleanStart: true, KeepAlive: 60}); err != nil {
		s.t.Fatal(err)
	}
	defer d.close()
	for _, p := range payloads {
		err := d.send(s.t.Context(), &mqtt.Publish{QoS: 1, Topic: []byte("dt/pump"), Payload: []byte(p), HasExpiry: expiry > 0, Expiry: expiry})
		if err != nil {
			s.t.Fatalf("%s: %v", p, err)
		}
		s.sent[p] = time.Now()
	}
}

// reboot kills the gateway and starts it in another boot of the machine, whose clock shows wall.
func (s *clockSite) reboot(wall time.Time, synced bool) {
	s.t.Helper()
	s.Kill()
	s.clock.Reboots()
	s.clock.At(wall, synced)
	s.Restart()
}

// set sets the wall clock of the running gateway, and waits until it has looked.
func (s *clockSite) set(offset time.Duration, synced bool) {
	s.t.Helper()
	s.clock.Set(offset, synced)
	testkit.EventuallyNil(s.t, 10*time.Second, "the gateway has seen its clock", func() error {
		var st struct {
			Clock struct {
				State   string    `json:"state"`
				Wall    time.Time `json:"wall"`
				Doubt   bool      `json:"doubt"`
				Settled bool      `json:"settled"`
			} `json:"clock"`
		}
		if err := s.Get("/api/v1/status", &st); err != nil {
			return err
		}
		want := map[bool]string{true: "synced", false: "unsynced"}[synced]
		if off := st.Clock.Wall.Sub(s.clock.Now()).Abs(); st.Clock.State != want || !st.Clock.Settled || off > 2*time.Second {
			return fmt.Errorf("%+v, want %s at %v", st.Clock, want, s.clock.Now())
		}
		return nil
	})
}

// arrived opens the links, waits until nothing is pending, and returns what came, by payload, for each format.
func (s *clockSite) arrived() map[string]map[string]cloud.Delivery {
	s.t.Helper()
	s.link(true)
	all := map[string]map[string]cloud.Delivery{}
	for format, u := range s.ups {
		drained(s.t, s.Gateway, format, 30*time.Second)
		all[format] = map[string]cloud.Delivery{}
		// The gateway has an acknowledgement of the broker; the inbox may be a moment behind it.
		testkit.EventuallyNil(s.t, 10*time.Second, "the inbox has what the ledger says", func() error {
			for _, d := range u.inbox.Others() {
				all[format][string(d.Message.Payload)] = d
			}
			for _, a := range balanced(s.t, s.Gateway).Ledger.Accounts {
				if a.Upstream == format && a.Lane == "telemetry" && int(a.Delivered.Messages) != len(all[format]) {
					return fmt.Errorf("%s: %d delivered, %d came", format, a.Delivered.Messages, len(all[format]))
				}
			}
			return nil
		})
	}
	return all
}

// TestWallClockJumps has the wall clock jump by ten years, forward and back, while messages with expiry intervals wait in a lane with
// max_age: nothing expires but what is really too old.
func TestWallClockJumps(t *testing.T) {
	t.Parallel()
	s := startClockSite(t)
	s.publish(0, "for ever")
	s.publish(3600, "an hour")
	s.publish(2, "two seconds")
	s.set(10*year, true)
	s.publish(3600, "an hour, ten years ahead")
	<-time.After(2500 * time.Millisecond) // the expiry interval and the housekeeping that is every second: time is the point
	s.set(-10*year, false)
	s.publish(3600, "an hour, ten years ago")
	s.Kill()
	s.clock.Set(10*year, true)
	s.Restart()
	s.publish(3600, "an hour, after a crash")
	s.set(0, true)
	<-time.After(1200 * time.Millisecond)
	for format, got := range s.arrived() {
		want := slices.Sorted(maps.Keys(s.sent))
		want = slices.DeleteFunc(want, func(p string) bool { return p == "two seconds" })
		if have := slices.Sorted(maps.Keys(got)); !slices.Equal(have, want) {
			t.Errorf("%s: %q arrived, want %q", format, have, want)
		}
	}
	for _, a := range balanced(t, s.Gateway).Ledger.Accounts {
		if a.Lane == "telemetry" && a.Expired.Messages != 1 {
			t.Errorf("%+v, want one expired", a)
		}
	}
	if !strings.Contains(s.Logs(), "time=2036") {
		t.Error("the gateway's own log was never ten years ahead: the clock was not faked")
	}
}

// TestBootIn1970 is the box without a battery for its clock: what waited before it was switched off and what came in 1970 both arrive,
// with the right times, once the clock is set.
func TestBootIn1970(t *testing.T) {
	t.Parallel()
	s := startClockSite(t)
	s.publish(3600, "before")
	s.reboot(time.Unix(5, 0), false)
	s.publish(3600, "in 1970", "in 1970, too")
	s.set(0, true)
	s.publish(3600, "when it is right")
	want := map[string]bool{"before": true, "in 1970": true, "in 1970, too": true, "when it is right": true}
	check := func(when string) {
		t.Helper()
		for format, got := range s.arrived() {
			for payload, synced := range want {
				d, ok := got[payload]
				if !ok {
					t.Errorf("%s, %s: %q did not arrive", when, format, payload)
					continue
				}
				at := time.UnixMilli(d.Message.Received)
				if d.Message.Flags&wire.FlagClockUnsynced == 0 != synced || synced && at.Sub(s.sent[payload]).Abs() > 3*time.Second {
					t.Errorf("%s, %s: %q came at %v (%x), really at %v", when, format, payload, at, d.Message.Flags, s.sent[payload])
				}
				shown := time.UnixMilli(d.Message.Received - d.Message.Corrected)
				if in1970 := strings.Contains(payload, "1970"); (shown.Year() == 1970) != in1970 && synced {
					t.Errorf("%s, %s: %q, the clock showed %v", when, format, payload, shown)
				}
			}
			if len(got) != len(want) {
				t.Errorf("%s, %s: %d came, want %d", when, format, len(got), len(want))
			}
		}
	}
	check("once the clock is right")

	// A boot that never learns the time says so; one that has learned it is remembered by the next.
	s.link(false)
	s.reboot(time.Unix(5, 0), false)
	s.publish(3600, "nobody knew")
	s.reboot(time.Unix(7, 0), false)
	s.publish(3600, "known in time, 1970")
	s.set(0, true)
	s.publish(3600, "and then") // acknowledged after what the gateway has learned is on disk
	s.reboot(time.Unix(9, 0), false)
	want["nobody knew"], want["known in time, 1970"], want["and then"] = false, true, true
	check("two boots later")
	for _, a := range balanced(t, s.Gateway).Ledger.Accounts {
		if a.Expired.Messages > 0 {
			t.Errorf("%+v", a)
		}
	}
}
