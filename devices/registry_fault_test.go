package devices_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"holdfast/devices"
	"holdfast/internal/kv"
)

var errRefused = errors.New("disk reserve reached")

// picky refuses what is handed in, or loses it later, while it is told to.
type picky struct {
	rows         *rows
	refuse, lose atomic.Bool
}

func (p *picky) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	if p.refuse.Load() {
		return errRefused
	}
	if p.lose.Load() {
		return p.rows.Commit(nil, nil, func(error) { done(errRefused) })
	}
	return p.rows.Commit(ops, events, done)
}

// TestWhatTheJournalRefusesChangesNothing: neither what is shown, nor what the next change starts from, nor a count.
func TestWhatTheJournalRefusesChangesNothing(t *testing.T) {
	p := &picky{}
	s := newSite(t, anonymously, func(s *site, _ *devices.RegistryConfig) { s.journal = p })
	p.rows = s.rows
	secret := s.add(devices.NewDevice{ID: "d", Name: "first"})

	p.refuse.Store(true)
	wantErr(t, "add", third(s.Add(t.Context(), devices.NewDevice{ID: "e", Disabled: true})), errRefused)
	_, err := s.Patch(t.Context(), "d", devices.DevicePatch{Name: ptr("second"), Enabled: ptr(false)})
	wantErr(t, "patch", err, errRefused)
	wantErr(t, "remove", s.Remove(t.Context(), "d"), errRefused)
	_, _, err = s.AddCredential(t.Context(), "d", devices.NewCredential{})
	wantErr(t, "add credential", err, errRefused)
	token := s.connect("d", secret)
	s.connect("self", "")
	if k := s.kicksOf("d"); len(k) != 0 {
		t.Errorf("kicked %+v", k)
	}
	p.refuse.Store(false)

	if d, err := s.Get("d"); err != nil || d.Name != "first" || !d.Enabled || len(d.Credentials) != 1 || !d.Presence.Connected {
		t.Errorf("%+v, %v", d, err)
	}
	wantErr(t, "known", s.Known("e"), devices.ErrUnknownDevice)
	wantErr(t, "known", s.Known("self"), devices.ErrUnknownDevice)
	s.Disconnected("d", token, "bye")
	s.add(devices.NewDevice{ID: "e"})
	if d, err := s.Patch(t.Context(), "d", devices.DevicePatch{Labels: map[string]string{"k": "v"}}); err != nil || d.Name != "first" || !d.Enabled {
		t.Errorf("%+v, %v", d, err)
	}
	if c := s.Counts(); c.Registered != 2 || c.Disabled != 0 {
		t.Errorf("%+v", c)
	}
	checkCounts(t, s)
}

// TestWhatIsNotStoredIsNotShown: the store failed after it had taken the rows.
func TestWhatIsNotStoredIsNotShown(t *testing.T) {
	p := &picky{}
	s := newSite(t, func(s *site, _ *devices.RegistryConfig) { s.journal = p })
	p.rows = s.rows
	s.add(devices.NewDevice{ID: "d"})
	p.lose.Store(true)
	wantErr(t, "add", third(s.Add(t.Context(), devices.NewDevice{ID: "e"})), errRefused)
	wantErr(t, "remove", s.Remove(t.Context(), "d"), errRefused)
	wantErr(t, "get", second(s.Get("e")), devices.ErrUnknownDevice)
	wantErr(t, "known", s.Known("e"), devices.ErrUnknownDevice)
	if err := s.Known("d"); err != nil {
		t.Error(err)
	}
	if k := s.kicksOf("d"); len(k) != 0 {
		t.Errorf("kicked %+v", k)
	}
	if c := s.Counts().Registered; c != 1 {
		t.Errorf("%d registered", c)
	}
}
