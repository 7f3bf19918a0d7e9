package devices_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"holdfast/devices"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

func TestDeviceSurvivesARestart(t *testing.T) {
	defer goleak.VerifyNone(t)
	s := newSite(t)
	labels := map[string]string{"ward": "3 east", "kind": "pump"}
	made, secret, err := s.Add(t.Context(), devices.NewDevice{ID: "pump-1", Name: "Pump “one”", Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	if !made.Enabled || made.Role != devices.DefaultRole || made.Anonymous || made.Created.IsZero() || len(made.Credentials) != 1 {
		t.Errorf("made %+v", made)
	}
	s.add(devices.NewDevice{ID: "pump-2", Disabled: true, NoCredential: true, Role: devices.MonitorRole})
	changed, err := s.Patch(t.Context(), "pump-1", devices.DevicePatch{Name: ptr("Pump 1"), Labels: map[string]string{"ward": "4"}})
	if err != nil {
		t.Fatal(err)
	}
	if changed.Name != "Pump 1" || changed.Labels["ward"] != "4" || len(changed.Labels) != 1 || !changed.Created.Equal(made.Created) {
		t.Errorf("changed to %+v", changed)
	}

	s = s.restart()
	got, err := s.Get("pump-1")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(changed, got); diff != "" {
		t.Error(diff)
	}
	if c := s.Counts(); c != (devices.Counts{Registered: 2, Disabled: 1}) {
		t.Errorf("counts %+v", c)
	}
	s.mustLogin("pump-1", secret)

	if err := s.Remove(t.Context(), "pump-1"); err != nil {
		t.Fatal(err)
	}
	_, err = s.Get("pump-1")
	wantErr(t, "get of a removed device", err, devices.ErrUnknownDevice)
	_, err = s.login("pump-1", secret)
	wantErr(t, "login of a removed device", err, devices.ErrCredentials)
	s = s.restart()
	_, err = s.Get("pump-1")
	wantErr(t, "get of a removed device after a restart", err, devices.ErrUnknownDevice)
	if c := s.Counts(); c != (devices.Counts{Registered: 1, Disabled: 1}) {
		t.Errorf("counts %+v", c)
	}
	s.store.Close()
}

// TestAClosedRegistryIsCollected: what is to happen when an entry is collected must not keep the registry, which keeps entries.
func TestAClosedRegistryIsCollected(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "pump-1"})
	if _, err := s.Get("pump-1"); err != nil {
		t.Fatal(err)
	}
	r := weak.Make(s.Registry)
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	s.Registry, s.metrics, s.rows, s.journal = nil, nil, nil, nil
	testkit.Eventually(t, 10*time.Second, "the registry to be collected", func() bool {
		runtime.GC()
		return r.Value() == nil
	})
}

func TestBadIDs(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct{ id, rule string }{
		{"", "empty"},
		{strings.Repeat("a", 129), "128"},
		{"a/b", `'/'`},
		{"a+", `'+'`},
		{"#", `'#'`},
		{"$SYS", `'$'`},
		{"a b", `' '`},
		{"a\x00", `'\x00'`},
		{"a\n", `'\n'`},
		{"pümp", `'ü'`},
		{"a\xff", "'\ufffd'"},
		{"-a", "begin"},
		{".", "begin"},
		{"@a", "begin"},
	} {
		for what, err := range map[string]error{
			"check": devices.CheckID(c.id),
			"get":   second(s.Get(c.id)),
			"known": s.Known(c.id),
			"add":   third(s.Add(t.Context(), devices.NewDevice{ID: c.id})),
			"patch": second(s.Patch(t.Context(), c.id, devices.DevicePatch{Name: ptr("x")})),
			"login": second(s.login(c.id, "hft_x")),
		} {
			if !errors.Is(err, devices.ErrBadID) || !strings.Contains(err.Error(), c.rule) {
				t.Errorf("%s %q: %v, want ErrBadID that names %s", what, c.id, err, c.rule)
			}
		}
	}
	for _, id := range []string{"a", "7", strings.Repeat("Z", 128), "urn:dev:mac-0024.be_1@x"} {
		if err := devices.CheckID(id); err != nil {
			t.Error(err)
		}
		s.add(devices.NewDevice{ID: id})
	}
}

func second[A any](_ A, err error) error        { return err }
func third[A, B any](_ A, _ B, err error) error { return err }

func TestInvalidDevicesAreRefused(t *testing.T) {
	s := newSite(t, withRoles(devices.Role{Name: "gateway"}))
	many := map[string]string{}
	for i := range 33 {
		many[fmt.Sprint(i)] = ""
	}
	cred := func(c devices.NewCredential) devices.NewDevice {
		return devices.NewDevice{ID: "d", Credential: &c}
	}
	for _, c := range []struct {
		d   devices.NewDevice
		say string
	}{
		{devices.NewDevice{ID: "d", Name: strings.Repeat("ä", 129)}, "129"},
		{devices.NewDevice{ID: "d", Name: "a\x1bb"}, "printed"},
		{devices.NewDevice{ID: "d", Labels: many}, "33 labels"},
		{devices.NewDevice{ID: "d", Labels: map[string]string{"": "x"}}, "without a key"},
		{devices.NewDevice{ID: "d", Labels: map[string]string{strings.Repeat("k", 65): "x"}}, "65 bytes"},
		{devices.NewDevice{ID: "d", Labels: map[string]string{"a=b": "x"}}, "'='"},
		{devices.NewDevice{ID: "d", Labels: map[string]string{"k": strings.Repeat("v", 257)}}, "257 bytes"},
		{devices.NewDevice{ID: "d", Labels: map[string]string{"k": "\xff"}}, "printed"},
		{devices.NewDevice{ID: "d", Role: "admin"}, "anonymous, device, gateway, monitor"},
		{devices.NewDevice{ID: "d", NoCredential: true, Credential: &devices.NewCredential{}}, "and none"},
		{cred(devices.NewCredential{Kind: "magic"}), "token, password and certificate"},
		{cred(devices.NewCredential{Kind: devices.CredentialPassword, Password: "elevencharà"}), "11 characters"},
		{cred(devices.NewCredential{Kind: devices.CredentialPassword, Password: strings.Repeat("p", 257)}), "257 bytes"},
		{cred(devices.NewCredential{Kind: devices.CredentialPassword, Password: "hft_aaaaaaaaaaaa"}), "taken for a token"},
		{cred(devices.NewCredential{Kind: devices.CredentialToken, Password: "a good password"}), "only"},
		{cred(devices.NewCredential{Kind: devices.CredentialCertificate, Fingerprint: "abcd"}), "64 hex digits"},
		{cred(devices.NewCredential{Lifetime: -1}), "lifetime"},
	} {
		_, _, err := s.Add(t.Context(), c.d)
		if !errors.Is(err, devices.ErrInvalid) || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%+v: %v, want ErrInvalid that says %q", c.d, err, c.say)
		}
	}
	s.add(devices.NewDevice{
		ID: "d", Name: strings.Repeat("ä", 128), Role: "gateway",
		Labels: map[string]string{strings.Repeat("k", 64): strings.Repeat("v", 256)},
	})
	_, err := s.Patch(t.Context(), "d", devices.DevicePatch{Role: ptr("admin")})
	wantErr(t, "patch to a role that is not there", err, devices.ErrInvalid)
	_, err = s.Patch(t.Context(), "d", devices.DevicePatch{Labels: many})
	wantErr(t, "patch to too many labels", err, devices.ErrInvalid)
	_, err = s.Patch(t.Context(), "e", devices.DevicePatch{})
	wantErr(t, "patch of nobody", err, devices.ErrUnknownDevice)
	wantErr(t, "removal of nobody", s.Remove(t.Context(), "e"), devices.ErrUnknownDevice)
	wantErr(t, "second add", third(s.Add(t.Context(), devices.NewDevice{ID: "d"})), devices.ErrDeviceExists)
	if c := s.Counts().Registered; c != 1 {
		t.Errorf("%d registered", c)
	}
}

func TestTooManyDevices(t *testing.T) {
	s := newSite(t)
	devices.SetMaxDevices(s.Registry, 2)
	s.add(devices.NewDevice{ID: "a"})
	s.add(devices.NewDevice{ID: "b"})
	wantErr(t, "the third of two", third(s.Add(t.Context(), devices.NewDevice{ID: "c"})), devices.ErrTooManyDevices)
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	s.add(devices.NewDevice{ID: "c"})
}

func TestKnown(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "on"})
	s.add(devices.NewDevice{ID: "off", Disabled: true})
	if err := s.Known("on"); err != nil {
		t.Error(err)
	}
	wantErr(t, "disabled", s.Known("off"), devices.ErrDisabled)
	wantErr(t, "unknown", s.Known("none"), devices.ErrUnknownDevice)
}

func TestListOfDevices(t *testing.T) {
	s := newSite(t)
	for i := range 25 {
		d := devices.NewDevice{ID: fmt.Sprintf("d%02d", i), NoCredential: true, Labels: map[string]string{"site": fmt.Sprint("S", i%3)}}
		if i%5 == 0 {
			d.Disabled, d.Name = true, "Broken PUMP"
		}
		if i == 7 {
			d.Role = devices.MonitorRole
		}
		s.add(d)
	}
	s.Connected("d03", devices.Connection{})
	s.Connected("d11", devices.Connection{})
	s.Connected("nobody", devices.Connection{})
	all := func(f devices.DeviceFilter) (ids []string, pages int) {
		for {
			page, next, err := s.List(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range page {
				ids = append(ids, d.ID)
			}
			pages++
			if next == "" {
				return ids, pages
			}
			f.After = next
		}
	}
	ids, pages := all(devices.DeviceFilter{Limit: 10})
	if len(ids) != 25 || pages != 3 || ids[0] != "d00" || ids[24] != "d24" {
		t.Errorf("%d pages, %v", pages, ids)
	}
	if ids, pages := all(devices.DeviceFilter{Limit: 25}); len(ids) != 25 || pages != 1 {
		t.Errorf("%d pages of a full list, %v", pages, ids)
	}
	for what, c := range map[string]struct {
		f    devices.DeviceFilter
		want string
	}{
		"after one that is gone": {devices.DeviceFilter{After: "d225"}, "d23 d24"},
		"search in name":         {devices.DeviceFilter{Search: "pump"}, "d00 d05 d10 d15 d20"},
		"search in id":           {devices.DeviceFilter{Search: "D2"}, "d20 d21 d22 d23 d24"},
		"search in label":        {devices.DeviceFilter{Search: "s2", Limit: 2}, "d02 d05 d08 d11 d14 d17 d20 d23"},
		"role":                   {devices.DeviceFilter{Role: devices.MonitorRole}, "d07"},
		"connected":              {devices.DeviceFilter{Connected: ptr(true)}, "d03 d11"},
		"connected, paged":       {devices.DeviceFilter{Connected: ptr(true), Limit: 1}, "d03 d11"},
		"not connected, broken":  {devices.DeviceFilter{Connected: ptr(false), Enabled: ptr(false)}, "d00 d05 d10 d15 d20"},
		"label":                  {devices.DeviceFilter{Label: "site=S1", Enabled: ptr(false)}, "d10"},
		"label key":              {devices.DeviceFilter{Label: "site", Search: "d01"}, "d01"},
		"no such label":          {devices.DeviceFilter{Label: "sit"}, ""},
	} {
		if ids, _ := all(c.f); strings.Join(ids, " ") != c.want {
			t.Errorf("%s: %v, want %s", what, ids, c.want)
		}
	}
}

// TestAddsShareACommit would hang if one Add waited for another's fsync: the first is told of its end only when all
// are handed in.
func TestAddsShareACommit(t *testing.T) {
	defer goleak.VerifyNone(t)
	const n = 32
	g := &gate{n: n, open: make(chan struct{})}
	s := newSite(t, func(s *site, _ *devices.RegistryConfig) { s.journal = g })
	g.rows = s.rows
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { s.add(devices.NewDevice{ID: fmt.Sprint("d", i)}) })
	}
	wg.Wait()
	if c := s.Counts().Registered; c != n {
		t.Errorf("%d registered", c)
	}
	s.store.Close()
}

// gate completes nothing before n commits were handed in.
type gate struct {
	rows *rows
	mu   sync.Mutex
	n    int
	open chan struct{}
}

func (g *gate) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 {
		close(g.open)
	}
	return g.rows.Commit(ops, events, func(err error) {
		<-g.open
		done(err)
	})
}

// narrow takes one commit at a time, and each waits until the one before is told.
type narrow struct {
	rows *rows
	slot chan struct{}
}

func (n *narrow) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	n.slot <- struct{}{}
	return n.rows.Commit(ops, events, func(err error) {
		done(err)
		<-n.slot
	})
}

// TestCompletionsNeedNoLockThatIsHeldWhileHandingIn would hang else.
func TestCompletionsNeedNoLockThatIsHeldWhileHandingIn(t *testing.T) {
	defer goleak.VerifyNone(t)
	n := &narrow{slot: make(chan struct{}, 1)}
	s := newSite(t, anonymously, func(s *site, _ *devices.RegistryConfig) { s.journal = n })
	n.rows = s.rows
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprint("d", i%2)
			for j := range 50 {
				switch (i + j) % 6 {
				case 0:
					s.Add(t.Context(), devices.NewDevice{ID: id})
				case 1:
					s.Patch(t.Context(), id, devices.DevicePatch{Enabled: ptr(j%2 == 0)})
				case 2:
					s.Disconnected(id, s.Connected(id, devices.Connection{}), "test")
				case 3:
					s.AddCredential(t.Context(), id, devices.NewCredential{RetireOthers: time.Hour})
				case 4:
					s.login(id, "hft_wrong")
					s.List(devices.DeviceFilter{})
				case 5:
					s.Remove(t.Context(), id)
					s.SetPolicy(nil, true)
				}
			}
		})
	}
	wg.Wait()
	s.flush()
	checkCounts(t, s)
	s.store.Close()
}

// checkCounts holds the stored counts against the rows.
func checkCounts(t *testing.T, s *site) {
	t.Helper()
	if stored, counted, err := devices.Recount(s.Registry); err != nil || stored != counted {
		t.Errorf("counts say %+v, rows say %+v, %v", stored, counted, err)
	}
}

func TestAnEndedContextEndsTheWait(t *testing.T) {
	defer goleak.VerifyNone(t)
	s := newSite(t)
	s.add(devices.NewDevice{ID: "d"})
	release := s.rows.stall()
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := s.Patch(ctx, "d", devices.DevicePatch{Enabled: ptr(false)})
		ended <- err
	}()
	cancel()
	wantErr(t, "patch", <-ended, context.Canceled)
	wantErr(t, "add with an ended context", third(s.Add(ctx, devices.NewDevice{ID: "e"})), context.Canceled)
	release()
	s.flush()
	s.store.Close()
	_, err := s.Patch(t.Context(), "d", devices.DevicePatch{Name: ptr("x")})
	wantErr(t, "patch on a closed store", err, kv.ErrClosed)
	if c := s.Counts().Registered; c != 1 {
		t.Errorf("%d registered", c)
	}
}

func TestRowsOfANewerVersionAreKept(t *testing.T) {
	s := newSite(t, anonymously)
	s.add(devices.NewDevice{ID: "a"})
	s.add(devices.NewDevice{ID: "b"})
	newer := []byte{2, 0xff}
	put := func(key string, value []byte) {
		if err := s.store.ApplyWait([]kv.Op{{Key: []byte(key), Value: value}}); err != nil {
			t.Fatal(err)
		}
	}
	put("v\x01b", newer)
	put("v\x02b", newer)
	put("v\x03b", newer)
	put("v\x01bad", []byte{1, 0xff})
	s = s.restart(anonymously)
	stop := s.run()
	defer stop()

	wantErr(t, "get", second(s.Get("b")), devices.ErrVersion)
	wantErr(t, "known", s.Known("b"), devices.ErrVersion)
	wantErr(t, "add", third(s.Add(t.Context(), devices.NewDevice{ID: "b"})), devices.ErrVersion)
	wantErr(t, "remove", s.Remove(t.Context(), "b"), devices.ErrVersion)
	i, err := s.login("b", "")
	if wantErr(t, "login", err, devices.ErrVersion); i != nil {
		t.Error("a device that cannot be read is let in as anonymous")
	}
	if s.Identity("b").MayPublish([]byte("dt/x")) {
		t.Error("a device that cannot be read may publish")
	}
	page, _, err := s.List(devices.DeviceFilter{})
	if err != nil || len(page) != 1 || page[0].ID != "a" {
		t.Errorf("list %v, %v", page, err)
	}
	for _, key := range []string{"v\x01b", "v\x02b"} {
		if row, _, _ := s.store.Get([]byte(key)); !bytes.Equal(row, newer) {
			t.Errorf("row %q is %x now", key, row)
		}
	}
	if s.counter("holdfast_devices_rows_unreadable_total") == 0 {
		t.Error("not counted")
	}

	// A damaged row has a way out.
	_, err = s.Patch(t.Context(), "bad", devices.DevicePatch{Name: ptr("x")})
	if err == nil || !strings.Contains(err.Error(), "remove the device and add it again") {
		t.Errorf("patch of a damaged row: %v", err)
	}
	if err := s.Remove(t.Context(), "bad"); err != nil {
		t.Fatal(err)
	}
	s.add(devices.NewDevice{ID: "bad"})
}

// TestOpenReadsNoDevices is what makes a start flat: rows that would be complained about are not met.
func TestOpenReadsNoDevices(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "a", Disabled: true})
	var ops []kv.Op
	for i := range 1000 {
		ops = append(ops, kv.Op{Key: fmt.Appendf(nil, "v\x01d%d", i), Value: []byte{1, 0xff}})
	}
	if err := s.store.ApplyWait(ops); err != nil {
		t.Fatal(err)
	}
	s = s.restart()
	if c := s.Counts(); c != (devices.Counts{Registered: 1, Disabled: 1}) {
		t.Errorf("counts %+v: the rows were counted", c)
	}
	if n := s.counter("holdfast_devices_rows_unreadable_total"); n != 0 {
		t.Errorf("%v rows read", n)
	}
	// Without the counts it has to look.
	if err := s.store.ApplyWait([]kv.Op{{Key: []byte("v\x00"), Value: []byte{1, 0xff}}}); err != nil {
		t.Fatal(err)
	}
	s = s.restart()
	if c := s.Counts(); c != (devices.Counts{Registered: 1001, Disabled: 1}) {
		t.Errorf("counted %+v", c)
	}
}

func TestMetricsTellTheCounts(t *testing.T) {
	s := newSite(t)
	secret := s.add(devices.NewDevice{ID: "a"})
	s.add(devices.NewDevice{ID: "b", Disabled: true})
	s.connect("a", secret)
	s.login("a", "hft_wrong")
	s.login("b", "hft_wrong")
	for name, want := range map[string]float64{
		"holdfast_devices_registered": 2, "holdfast_devices_connected": 1, "holdfast_devices_disabled": 1,
	} {
		if got := s.counter(name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	for result, want := range map[string]float64{"ok": 1, "credentials": 2, "disabled": 0} {
		if got := s.counter("holdfast_devices_logins_total", result); got != want {
			t.Errorf("%v logins ended with %s, want %v", got, result, want)
		}
	}
}

// A list shows what Get shows: nothing before it is stored.
func TestListShowsOnlyWhatIsStored(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "old", Name: "before"})
	release := s.rows.stall()
	defer release()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer release()
	wg.Go(func() { s.Add(t.Context(), devices.NewDevice{ID: "new"}) })
	wg.Go(func() { s.Patch(t.Context(), "old", devices.DevicePatch{Name: ptr("after")}) })
	testkit.Eventually(t, 5*time.Second, "both rows to be written", func() bool {
		if _, found, _ := s.store.Get(devices.DeviceKey("new")); !found {
			return false
		}
		row, _, _ := s.store.Get(devices.DeviceKey("old"))
		return bytes.Contains(row, []byte("after"))
	})
	page, _, err := s.List(devices.DeviceFilter{})
	if err != nil || len(page) != 1 || page[0].Name != "before" {
		t.Errorf("List = %+v, %v; want old alone, as it was", page, err)
	}
	release()
	wg.Wait()
	if page, _, err := s.List(devices.DeviceFilter{}); err != nil || len(page) != 2 || page[1].Name != "after" {
		t.Errorf("List = %+v, %v; want both", page, err)
	}
}
