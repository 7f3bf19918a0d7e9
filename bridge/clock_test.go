package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// machine has clocks that stand still but for the test.
type machine struct {
	mu      sync.Mutex
	elapsed time.Duration
	wall    time.Time
	synced  bool
}

func (m *machine) source() clock.Source {
	return clock.Source{
		Now:     func() time.Time { m.mu.Lock(); defer m.mu.Unlock(); return m.wall },
		Elapsed: func() time.Duration { m.mu.Lock(); defer m.mu.Unlock(); return m.elapsed },
		Boot:    func() (string, time.Duration) { m.mu.Lock(); defer m.mu.Unlock(); return "boot", time.Hour + m.elapsed },
		Synced:  func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.synced },
	}
}

func (m *machine) advance(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.elapsed += d
	m.wall = m.wall.Add(d)
}

func (m *machine) set(wall time.Time, synced bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wall, m.synced = wall, synced
}

// clockRig is a spool on a held clock, and a bridge to an upstream.
type clockRig struct {
	t   *testing.T
	m   *machine
	clk *clock.Clock
	sp  *spool.Spool
	st  *kv.Store
	up  *bridgetest.Upstream
	in  *cloud.Receiver
	got map[string]cloud.Delivery // by payload
	at  int                       // publishes that are in got

	reachable atomic.Bool
}

func newClockRig(t *testing.T, format string) *clockRig {
	r := &clockRig{t: t, m: &machine{wall: time.Unix(1000, 0)}, up: bridgetest.NewUpstream(), in: cloud.New(cloud.Config{}), got: map[string]cloud.Delivery{}}
	var err error
	if r.st, err = kv.Open("store", kv.Options{FS: vfs.NewMem(), Log: testkit.Logger(t), Fatal: func(err error) { t.Error(err) }}); err != nil {
		t.Fatal(err)
	}
	if r.clk, err = clock.Open(r.st, clock.Config{Source: r.m.source(), Log: testkit.Logger(t)}); err != nil {
		t.Fatal(err)
	}
	r.clk.Look()
	if r.sp, err = spool.Open(r.st, spool.Config{
		Gateway: gateway, GapTopic: wire.GapTopic(gateway), Log: testkit.Logger(t), Clock: r.clk,
		Lanes: []spool.LaneConfig{{Name: "telemetry", Share: 40}}, Upstreams: map[string][]string{"cloud": nil},
	}); err != nil {
		t.Fatal(err)
	}
	b, err := bridge.New(bridge.Config{
		Name: "cloud", URL: "mqtt://broker.example.com", Format: format, Window: 20, Tuning: bridge.Tuning{BackoffMin: time.Millisecond, BackoffMax: 5 * time.Millisecond},
	}, gateway, r.sp, r.up, testkit.Logger(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.up.OnDial = func(int) error {
		if r.reachable.Load() {
			return nil
		}
		return errors.New("out of sight")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
		r.sp.Close()
		r.st.Close()
	})
	return r
}

// put appends a message as an intake does.
func (r *clockRig) put(lane, topic, payload string, expiry uint32) {
	r.t.Helper()
	now := r.clk.Read()
	m := message("pump", topic, payload)
	m.Received, m.Uptime = now.Wall, now.Uptime()
	if now.Unsynced {
		m.Flags |= spool.FlagClockUnsynced
	}
	if expiry > 0 {
		m.Props = &spool.Props{Expiry: expiry}
	}
	l, _ := r.sp.Lane(lane)
	if err := r.sp.Append(l, &m, nil, nil, 0, false); err != nil {
		r.t.Fatal(err)
	}
	if err := r.st.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

// link is up or down.
func (r *clockRig) link(up bool) {
	if r.reachable.Store(up); !up {
		r.up.End(bridge.ErrPeerClosed)
		testkit.Eventually(r.t, 20*time.Second, "the session is over", func() bool { return r.up.Open() == 0 })
	}
}

// arrived waits until nothing is pending.
func (r *clockRig) arrived() {
	r.t.Helper()
	testkit.EventuallyNil(r.t, 20*time.Second, "nothing is pending", func() error {
		for _, a := range r.sp.Accounts() {
			if a.Pending.Messages > 0 {
				return fmt.Errorf("%+v", a)
			}
		}
		return nil
	})
	all := r.up.Arrived()
	for _, m := range all[r.at:] {
		ds, err := r.in.Receive(m.Topic, m.Payload)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, d := range ds {
			if d.Kind == cloud.Message {
				r.got[string(d.Message.Payload)] = d
			}
			if d.Kind == cloud.DeviceEvent {
				r.got["event "+d.Device.Device] = d
			}
		}
	}
	r.at = len(all)
}

func (r *clockRig) want(payload string, at time.Time, synced bool) {
	r.t.Helper()
	d, ok := r.got[payload]
	if !ok {
		r.t.Errorf("%s did not arrive", payload)
		return
	}
	got, gotSynced := time.UnixMilli(d.Message.Received), d.Message.Flags&wire.FlagClockUnsynced == 0
	if d.Device != nil {
		got, gotSynced = d.Device.At.Time, d.Device.ClockState == wire.ClockSynced
	}
	if !got.Equal(at) || gotSynced != synced {
		r.t.Errorf("%s came at %v (synced: %v), want %v (%v)", payload, got.UTC(), gotSynced, at.UTC(), synced)
	}
}

// event is a device's event as a gateway makes it now.
func (r *clockRig) event(device string) {
	now := r.clk.Read()
	e := wire.DeviceEvent{Gateway: gateway, Device: device, State: wire.StateOnline, At: wire.Time{Time: time.UnixMilli(now.Wall)}, ClockState: wire.ClockSynced}
	if now.Unsynced {
		e.ClockState = wire.ClockUnsynced
	}
	r.put(spool.SystemLane, wire.DeviceEventTopic(gateway, device, true), string(e.Encode()), 0)
}

func TestTimesArePutRightWhenTheyAreSent(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatCloudEvents} {
		t.Run(format, func(t *testing.T) {
			r := newClockRig(t, format)
			right := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

			// It goes at once, and nobody knows the time.
			r.link(true)
			r.put("telemetry", "dt/a", "early", 0)
			r.event("early")
			r.arrived()
			r.want("early", time.Unix(1000, 0), false)
			r.want("event early", time.Unix(1000, 0), false)
			if d := r.got["early"]; d.Message.Corrected != 0 {
				t.Errorf("corrected by %d", d.Message.Corrected)
			}

			// It waits, and the time is known when it goes.
			r.link(false)
			for i := range 3 {
				r.put("telemetry", "dt/a", fmt.Sprintf("waits %d", i), 0)
				r.m.advance(time.Minute)
				if i == 1 { // somebody sets it, wrongly
					r.m.set(r.m.wall.Add(-500*time.Second), false)
				}
			}
			r.event("waits")
			r.m.set(right, true)
			r.clk.Look()
			r.put("telemetry", "dt/a", "after", 0)
			r.link(true)
			r.arrived()
			for i := range 3 {
				r.want(fmt.Sprintf("waits %d", i), right.Add(time.Duration(i-3)*time.Minute), true)
				shown := int64(1000 + 60*i - 500*(i/2))
				if d := r.got[fmt.Sprintf("waits %d", i)]; d.Message.Received-d.Message.Corrected != shown*1000 {
					t.Errorf("shown %d", d.Message.Received-d.Message.Corrected)
				}
			}
			r.want("event waits", right, true)
			r.want("after", right, true)
			if d := r.got["after"]; d.Message.Corrected != 0 {
				t.Errorf("a right time was corrected by %d", d.Message.Corrected)
			}
			if s := r.in.Stats(); s.Missing != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestNoJumpExpiresAMessage: the expiry interval that its publisher gave it is over when so much time has passed, by whatever clock.
func TestNoJumpExpiresAMessage(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, jump := range map[string]time.Duration{"ahead": 10 * year, "back": -10 * year} {
		for _, synced := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, synced=%v", name, synced), func(t *testing.T) {
				r := newClockRig(t, bridge.FormatBatch)
				r.m.set(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), synced)
				r.clk.Look()
				r.link(false)
				r.put("telemetry", "dt/a", "a minute", 60)
				r.put("telemetry", "dt/a", "an hour", 3600)
				r.m.advance(50 * time.Second)
				r.m.set(r.m.wall.Add(jump), synced)
				r.clk.Look()
				r.put("telemetry", "dt/a", "another minute", 60)
				r.m.advance(30 * time.Second)
				r.link(true)
				r.arrived()
				for payload, want := range map[string]bool{"a minute": false, "an hour": true, "another minute": true} {
					if _, ok := r.got[payload]; ok != want {
						t.Errorf("%s: arrived %v, want %v", payload, ok, want)
					}
				}
			})
		}
	}
}
