package broker_test

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// machine has clocks that stand still but for the test.
type machine struct {
	mu      sync.Mutex
	elapsed time.Duration
	wall    time.Time
	boot    string
	synced  bool
}

func (m *machine) source() clock.Source {
	return clock.Source{
		Now:     func() time.Time { m.mu.Lock(); defer m.mu.Unlock(); return m.wall },
		Elapsed: func() time.Duration { m.mu.Lock(); defer m.mu.Unlock(); return m.elapsed },
		Boot:    func() (string, time.Duration) { m.mu.Lock(); defer m.mu.Unlock(); return m.boot, m.elapsed },
		Synced:  func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.synced },
	}
}

// off is the machine switched off for d; its clock shows wall when it is on again.
func (m *machine) off(wall time.Time, synced bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wall, m.synced, m.elapsed, m.boot = wall, synced, 0, m.boot+"+"
}

// hold has the test hold the clock of each broker of r.
func (m *machine) hold(r *rig) {
	r.opened = func(store *kv.Store) {
		c, err := clock.Open(store, clock.Config{Source: m.source()})
		if err != nil {
			r.t.Fatal(err)
		}
		c.Look()
		r.cfg.Clock = c
	}
}

// TestSessionsOutliveAWrongClock: what a restart finds has waited for as long as it really has, whatever the wall clock shows.
func TestSessionsOutliveAWrongClock(t *testing.T) {
	t.Parallel()
	right := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const year = 365 * 24 * time.Hour
	for name, c := range map[string]struct {
		wall    time.Time
		synced  bool
		present bool
	}{
		"in 1970":                    {time.Unix(0, 0), false, true},
		"ten years ahead, unsynced":  {right.Add(10 * year), false, true},
		"an hour later, and it is":   {right.Add(time.Hour), true, true},
		"two days later, and it was": {right.Add(48 * time.Hour), true, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &machine{wall: right, boot: "boot", synced: true}
			r := newRig(t, m.hold)
			p := r.client(mqtt.V5, "dev", keep, func(k *mqtt.Connect) { k.SessionExpiry = 24 * 3600 })
			p.nc.Close()
			eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
			q := r.client(mqtt.V5, "other")
			q.publishDone(1, 1, "kept", "x", func(p *mqtt.Publish) { p.Retain, p.HasExpiry, p.Expiry = true, true, 24*3600 })
			r.stop()
			m.off(c.wall, c.synced)
			r.start()
			if !c.present {
				eventually(t, "the session ends", func() bool { return r.b.Stats().Sessions == 0 })
			} else {
				r.fence()
			}
			if n := r.b.Stats().Sessions; (n == 1) != c.present && n != 2 { // fence's own may be there
				t.Errorf("%d sessions", n)
			}
			if n := r.b.Stats().Retained; (n == 1) != c.present {
				t.Errorf("%d retained messages", n)
			}
		})
	}
}

// TestRowsOfVersion1: what they tell by a wall clock is not believed, so their time begins anew.
func TestRowsOfVersion1(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	q := r.client(mqtt.V5, "other")
	q.publishDone(1, 1, "kept", "x", func(p *mqtt.Publish) { p.Retain, p.HasExpiry, p.Expiry = true, true, 60 })
	value, found, err := r.store.Get([]byte("rkept"))
	if err != nil || !found {
		t.Fatal(found, err)
	}
	old := binary.BigEndian.AppendUint64([]byte{1}, 5000) // five seconds into 1970
	session := []byte{1, byte(mqtt.V5), 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 9}
	session = append(binary.BigEndian.AppendUint64(session, 5000), "dev"...)
	if err := r.store.ApplyWait([]kv.Op{
		{Key: []byte("rkept"), Value: append(old, value[9:]...)},
		{Key: []byte("s\x01dev"), Value: session},
		{Key: []byte("wdev"), Value: append(old, value[9:]...)},
	}); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if s := r.b.Stats(); s.Retained != 1 || s.Sessions < 1 {
		t.Errorf("%+v", s)
	}
	eventually(t, "the will, long due", func() bool { return len(r.wills()) == 1 })
	for _, key := range []string{"rkept", "s\x01dev"} {
		if v, _, err := r.store.Get([]byte(key)); err != nil || len(v) == 0 || v[0] != 2 {
			t.Errorf("row %q is %x, %v", key, v, err)
		}
	}
}

// TestCertificatesInATimeWithoutAClock: the gateway comes up in 1970, but has known the time before, so TLS works; and an end is an end
// once the time is known.
func TestCertificatesInATimeWithoutAClock(t *testing.T) {
	t.Parallel()
	m := &machine{wall: time.Now(), boot: "boot", synced: true}
	s := newSite(t, func(s *site) { m.hold(s.rig) })
	s.enter(mqtt.V5, "dev", s.ca.client("dev"))
	s.stop()
	m.off(time.Unix(5, 0), false)
	s.start()
	s.enter(mqtt.V5, "dev", s.ca.client("dev"))
	s.stop()
	m.off(time.Now().Add(48*time.Hour), true)
	s.start()
	s.refused(s.ca.client("dev"))
}
