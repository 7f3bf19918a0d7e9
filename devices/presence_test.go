package devices_test

import (
	"crypto/x509"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"holdfast/devices"
	"holdfast/internal/testkit"
)

func TestPresenceIsKeptAndTold(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d"})
		if d, _ := s.Get("d"); d.Presence != (devices.Presence{}) {
			t.Errorf("never seen: %+v", d.Presence)
		}
		i := s.mustLogin("d", secret)
		came := time.Now().UTC()
		token := s.Connected("d", devices.Connection{
			Address: "192.0.2.7:4711", Protocol: "MQTT 3.1.1", Listener: "tls", TLS: true, Will: "dt/d/gone", Identity: i,
		})
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		want := devices.Presence{
			Connected: true, Since: came, LastSeen: time.Now().UTC(), Address: "192.0.2.7:4711", Protocol: "MQTT 3.1.1",
			Listener: "tls", TLS: true, Will: "dt/d/gone",
		}
		if d, _ := s.Get("d"); d.Presence != want {
			t.Error(cmp.Diff(want, d.Presence))
		}
		if c := s.Counts().Connected; c != 1 {
			t.Errorf("%d connected", c)
		}
		s.Disconnected("d", token, "keep alive")
		s.Disconnected("d", token, "again")
		want.Connected, want.Since, want.LastSeen, want.Reason = false, time.Now().UTC(), time.Now().UTC(), "keep alive"
		if d, _ := s.Get("d"); d.Presence != want {
			t.Error(cmp.Diff(want, d.Presence))
		}
		if c := s.Counts().Connected; c != 0 {
			t.Errorf("%d connected", c)
		}
		if diff := cmp.Diff([]string{"d online", "d offline (keep alive)"}, s.told(true)); diff != "" {
			t.Error(diff)
		}
		s = s.restart()
		if d, _ := s.Get("d"); d.Presence != want {
			t.Error("after a restart", cmp.Diff(want, d.Presence))
		}
		stop := s.run()
		synctest.Wait()
		stop()
		if told := s.told(false); len(told) != 0 {
			t.Errorf("told after a restart: %v", told)
		}
		s.store.Close()
	})
}

// TestLastMessage: it outlives the connection, a later one that says nothing, and a restart.
func TestLastMessage(t *testing.T) {
	s := newSite(t)
	secret := s.add(devices.NewDevice{ID: "d"})
	s.mustLogin("d", secret)
	var at atomic.Int64
	told := func() time.Time {
		if ms := at.Load(); ms != 0 {
			return time.UnixMilli(ms).UTC()
		}
		return time.Time{}
	}
	want := func(when string, ms int64) {
		t.Helper()
		d, err := s.Get("d")
		if got := d.Presence.LastMessage; err != nil || got.IsZero() != (ms == 0) || ms != 0 && got.UnixMilli() != ms {
			t.Errorf("%s: last message %v, want %d ms, %v", when, got, ms, err)
		}
	}
	want("before the first connection", 0)
	first := s.Connected("d", devices.Connection{LastMessage: told})
	want("connected", 0)
	at.Store(1_000_000_000_000)
	want("a message came", 1_000_000_000_000)
	// The next connection takes over before the first has ended.
	second := s.Connected("d", devices.Connection{LastMessage: func() time.Time { return time.Time{} }})
	s.Disconnected("d", first, "taken over")
	want("silent after a takeover", 1_000_000_000_000)
	s.Disconnected("d", second, "bye")
	want("gone", 1_000_000_000_000)
	s = s.restart()
	want("after a restart", 1_000_000_000_000)
	third := s.Connected("d", devices.Connection{})
	want("back and silent", 1_000_000_000_000)
	s.Disconnected("d", third, "bye")
	want("gone again", 1_000_000_000_000)
}

func TestATakeoverIsNoEnd(t *testing.T) {
	s := newSite(t)
	secret := s.add(devices.NewDevice{ID: "d"})
	first := s.connect("d", secret)
	second := s.connect("d", secret)
	s.Disconnected("d", first, "taken over")
	if d, _ := s.Get("d"); !d.Presence.Connected || s.Counts().Connected != 1 {
		t.Errorf("%+v", d.Presence)
	}
	s.Disconnected("d", second, "bye")
	if d, _ := s.Get("d"); d.Presence.Connected || d.Presence.Reason != "bye" || s.Counts().Connected != 0 {
		t.Errorf("%+v", d.Presence)
	}
	if diff := cmp.Diff([]string{"d online", "d online", "d offline (bye)"}, s.told(true)); diff != "" {
		t.Error(diff)
	}
}

// The old connection of a device that came back may say that it is here after the new one has.
func TestAConnectionThatHasEndedIsNotTheNewerOne(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "d", NoCredential: true})
	newer := s.Connected("d", devices.Connection{Address: "192.0.2.2:1", Alive: func() bool { return true }})
	older := s.Connected("d", devices.Connection{Address: "192.0.2.1:1", Alive: func() bool { return false }})
	s.Disconnected("d", older, "taken over")
	if d, _ := s.Get("d"); !d.Presence.Connected || d.Presence.Address != "192.0.2.2:1" || s.Counts().Connected != 1 {
		t.Errorf("%+v, %d connected", d.Presence, s.Counts().Connected)
	}
	s.Disconnected("d", newer, "bye")
	if diff := cmp.Diff([]string{"d online", "d offline (bye)"}, s.told(true)); diff != "" {
		t.Error(diff)
	}
	// Where there is no newer one it comes and goes.
	s.Disconnected("d", s.Connected("d", devices.Connection{Alive: func() bool { return false }}), "lost")
	if d, _ := s.Get("d"); d.Presence.Connected || d.Presence.Reason != "lost" {
		t.Errorf("%+v", d.Presence)
	}
}

// TestPresenceDoesNotWaitForTheDisk would hang if it did.
func TestPresenceDoesNotWaitForTheDisk(t *testing.T) {
	s := newSite(t, anonymously)
	secret := s.add(devices.NewDevice{ID: "d"})
	release := s.rows.stall()
	for range 10 {
		s.Disconnected("d", s.connect("d", secret), "bye")
		s.Disconnected("anonymous", s.Connected("anonymous", devices.Connection{}), "bye")
	}
	if d, _ := s.Get("d"); d.Presence.Connected || d.Presence.Reason != "bye" {
		t.Errorf("%+v", d.Presence)
	}
	if err := s.Known("anonymous"); err != nil {
		t.Errorf("a device whose row is on its way: %v", err)
	}
	release()
	s.flush()
}

func TestACrashIsToldOfThoseItDisconnected(t *testing.T) {
	defer goleak.VerifyNone(t)
	s := newSite(t)
	for _, id := range []string{"gone", "back", "left", "removed", "off-line"} {
		s.add(devices.NewDevice{ID: id, NoCredential: true})
	}
	for _, id := range []string{"gone", "back", "left", "removed"} {
		s.Connected(id, devices.Connection{Address: "192.0.2.7:4711"})
	}
	before, _ := s.Get("gone")
	s = s.restart() // nobody was told to go

	d, _ := s.Get("gone")
	if p := d.Presence; p.Connected || p.Reason != "gateway restarted" || p.Since.IsZero() {
		t.Errorf("before it is told: %+v", p)
	}
	// Some are faster than Run.
	s.Connected("back", devices.Connection{})
	s.Disconnected("left", s.Connected("left", devices.Connection{}), "bye")
	if err := s.Remove(t.Context(), "removed"); err != nil {
		t.Fatal(err)
	}
	stop := s.run()
	defer stop()
	testkit.Eventually(t, 10*time.Second, "telling of the crash", func() bool { return len(s.told(true)) >= 4 })
	stop()
	if diff := cmp.Diff([]string{"back online", "left online", "left offline (bye)", "gone offline (gateway restarted)"}, s.told(true)); diff != "" {
		t.Error(diff)
	}
	d, _ = s.Get("gone")
	if p := d.Presence; p.Connected || p.Reason != "gateway restarted" || p.Address != "192.0.2.7:4711" || !p.LastSeen.Equal(before.Presence.Since) {
		t.Errorf("%+v, was %+v", p, before.Presence)
	}
	s = s.restart()
	stop = s.run()
	defer stop()
	testkit.Eventually(t, 10*time.Second, "telling of the second crash", func() bool { return len(s.told(true)) >= 1 })
	stop()
	if diff := cmp.Diff([]string{"back offline (gateway restarted)"}, s.told(true)); diff != "" {
		t.Error("after a second crash", diff)
	}
	s.store.Close()
}

func TestADeviceThatFlapsDoesNotFlood(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d"})
		calm := s.add(devices.NewDevice{ID: "calm"})
		stop := s.run()
		defer stop()
		start := time.Now()
		var token uint64
		const flaps = 100
		for range flaps { // ten times a second
			token = s.connect("d", secret)
			time.Sleep(50 * time.Millisecond) //nolint:forbidigo // the bubble's clock
			s.Disconnected("d", token, "flaps")
			time.Sleep(50 * time.Millisecond) //nolint:forbidigo // the bubble's clock
		}
		s.connect("d", secret)
		if n := len(s.told(true)); n != 12 {
			t.Errorf("%d told upstream", n)
		}
		if n := len(s.told(false)); n != 2*flaps+1 {
			t.Errorf("watchers were shown %d", n)
		}
		if n := s.counter("holdfast_devices_presence_events_suppressed_total"); n != 2*flaps+1-12 {
			t.Errorf("%v suppressed", n)
		}
		s.connect("calm", calm)
		if told := s.told(true); told[len(told)-1] != "calm online" {
			t.Error("another device is held up")
		}
		// The last told was offline; when the minute of the first is over, it is told that it is there.
		time.Sleep(time.Until(start.Add(59 * time.Second))) //nolint:forbidigo // the bubble's clock
		if n := len(s.told(true)); n != 13 {
			t.Errorf("%d told before the minute is over", n)
		}
		time.Sleep(3 * time.Second) //nolint:forbidigo // the bubble's clock
		told := s.told(true)
		if len(told) != 14 || told[13] != "d online" {
			t.Errorf("told after the minute: %v", told)
		}
		time.Sleep(10 * time.Minute) //nolint:forbidigo // the bubble's clock
		if n := len(s.told(true)); n != 14 {
			t.Errorf("%d told in the end", n)
		}
		if n := devices.Flapping(s.Registry); n != 0 {
			t.Errorf("%d devices are still remembered for what was told", n)
		}
	})
}

// TestWhatIsTrueAgainIsNotTold: a device that flapped and is as it was told last is no news.
func TestWhatIsTrueAgainIsNotTold(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d"})
		stop := s.run()
		defer stop()
		for range 20 {
			s.Disconnected("d", s.connect("d", secret), "flaps")
		}
		time.Sleep(10 * time.Minute) //nolint:forbidigo // the bubble's clock
		if told := s.told(true); len(told) != 12 || told[11] != "d offline (flaps)" {
			t.Errorf("told %v", told)
		}
	})
}

func TestAnonymousDevicesRegisterThemselves(t *testing.T) {
	s := newSite(t, anonymously)
	s.connect("mine", s.add(devices.NewDevice{ID: "mine"}))
	odd := map[string]uint64{}
	for _, id := range []string{"self", "hf-1234", "a/b", "mosqä"} {
		odd[id] = s.connect(id, "")
	}
	s.flush()
	d, err := s.Get("self")
	if err != nil || !d.Anonymous || !d.Enabled || d.Role != devices.AnonymousRole || len(d.Credentials) != 0 || !d.Presence.Connected {
		t.Errorf("%+v, %v", d, err)
	}
	if d, _ := s.Get("mine"); d.Anonymous {
		t.Error("a registered device turned anonymous")
	}
	wantErr(t, "id that the broker made", s.Known("hf-1234"), devices.ErrUnknownDevice)
	wantErr(t, "odd id", s.Known("a/b"), devices.ErrBadID)
	if c := s.Counts(); c != (devices.Counts{Registered: 2, Connected: 5}) {
		t.Errorf("%+v", c)
	}
	for id, token := range odd {
		s.Disconnected(id, token, "bye")
	}
	if diff := cmp.Diff([]string{"mine online", "self online", "self offline (bye)"}, s.told(true)); diff != "" {
		t.Error(diff)
	}
	s = s.restart()
	_, err = s.login("self", "")
	wantErr(t, "login when anonymous is off", err, devices.ErrCredentials)
	s.Connected("late", devices.Connection{})
	s.flush()
	wantErr(t, "who connects when anonymous is off", s.Known("late"), devices.ErrUnknownDevice)
	checkCounts(t, s)
}

func TestAnonymousDevicesCanBeTakenOver(t *testing.T) {
	s := newSite(t, anonymously)
	s.connect("added", "")
	s.connect("given", "")
	s.flush()
	secret := s.add(devices.NewDevice{ID: "added", Name: "Pump"})
	_, token, err := s.AddCredential(t.Context(), "given", devices.NewCredential{})
	if err != nil {
		t.Fatal(err)
	}
	for id, secret := range map[string]string{"added": secret, "given": token} {
		d, err := s.Get(id)
		if err != nil || d.Anonymous || d.Role != devices.DefaultRole || len(d.Credentials) != 1 {
			t.Errorf("%+v, %v", d, err)
		}
		_, err = s.login(id, "")
		wantErr(t, "login without credentials", err, devices.ErrCredentials)
		s.mustLogin(id, secret)
		if k := s.kicksOf(id); len(k) != 1 || k[0].Forget {
			t.Errorf("%s: %+v", id, k)
		}
	}
	checkCounts(t, s)
}

func TestAtMostTenThousandRegisterThemselves(t *testing.T) {
	s := newSite(t, anonymously)
	for n := range 10_010 {
		s.Connected(fmt.Sprint("d", n), devices.Connection{})
	}
	s.flush()
	if c := s.Counts(); c.Registered != 10_000 || c.Connected != 10_010 {
		t.Errorf("%+v", c)
	}
	if _, err := s.login("d10009", ""); err != nil {
		t.Errorf("who was too many is not let in: %v", err)
	}
	s.add(devices.NewDevice{ID: "real"}) // others still may be
	if err := s.Remove(t.Context(), "d0"); err != nil {
		t.Fatal(err)
	}
	s.Connected("d10009", devices.Connection{})
	s.flush()
	if err := s.Known("d10009"); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	checkCounts(t, s)
}

func TestWhoMayNoLongerBeConnectedIsKicked(t *testing.T) {
	s := newSite(t, anonymously, withRoles(devices.Role{Name: "r"}))
	patch := func(id string, p devices.DevicePatch) {
		t.Helper()
		if _, err := s.Patch(t.Context(), id, p); err != nil {
			t.Fatal(err)
		}
	}
	first := func(id string) string {
		t.Helper()
		d, err := s.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		return d.Credentials[0].ID
	}
	secrets := map[string]string{}
	for _, id := range []string{"removed", "disabled", "revoked", "other", "renamed", "retired", "role"} {
		d := devices.NewDevice{ID: id}
		if id == "role" {
			d.Role = "r"
		}
		secrets[id] = s.add(d)
		s.connect(id, secrets[id])
	}
	s.connect("self", "")
	s.connect("a/b", "")
	s.add(devices.NewDevice{ID: "cert", NoCredential: true})
	cert := certificate("cert", nil)
	i, err := s.Authenticate(t.Context(), &devices.Attempt{Device: "cert", Certificate: cert})
	if err != nil {
		t.Fatal(err)
	}
	s.Connected("cert", devices.Connection{Identity: i})

	kicks := func(id, reason string, forget bool) {
		t.Helper()
		k := s.kicksOf(id)
		if reason == "" && len(k) > 0 || reason != "" && (len(k) != 1 || k[0].Forget != forget || !strings.Contains(k[0].Reason, reason)) {
			t.Errorf("%s: kicked %+v, want %q, forget %v", id, k, reason, forget)
		}
	}
	if err := s.Remove(t.Context(), "removed"); err != nil {
		t.Fatal(err)
	}
	kicks("removed", "removed", true)
	patch("disabled", devices.DevicePatch{Enabled: ptr(false)})
	kicks("disabled", "disabled", false)
	patch("renamed", devices.DevicePatch{Name: ptr("x"), Role: ptr(devices.MonitorRole)})
	kicks("renamed", "", false)
	if err := s.RemoveCredential(t.Context(), "revoked", first("revoked")); err != nil {
		t.Fatal(err)
	}
	kicks("revoked", "revoked", false)
	if _, _, err := s.AddCredential(t.Context(), "other", devices.NewCredential{RetireOthers: time.Hour}); err != nil {
		t.Fatal(err)
	}
	kicks("other", "", false)
	if _, _, err := s.AddCredential(t.Context(), "retired", devices.NewCredential{}); err != nil {
		t.Fatal(err)
	}
	kicks("retired", "expired", false)
	if _, _, err := s.AddCredential(t.Context(), "cert", *pinOf(cert)); err != nil {
		t.Fatal(err)
	}
	kicks("cert", "pinned", false)
	kicks("role", "", false)
	kicks("self", "", false)
	kicks("a/b", "", false)
	if err := s.SetPolicy(nil, false); err != nil {
		t.Fatal(err)
	}
	kicks("role", "role", false)
	kicks("self", "anonymous", false)
	kicks("a/b", "removed", true)
	kicks("other", "", false)

	// The offline event of a removed device is told with its removal, and no rows come back when its connection ends.
	told := strings.Join(s.told(true), "\n")
	if strings.Count(told, "removed offline (the device was removed)") != 1 {
		t.Errorf("told:\n%s", told)
	}
}

// TestAConnectionThatComesTooLateIsKicked: between login and Connected the device was removed, disabled, revoked.
func TestAConnectionThatComesTooLateIsKicked(t *testing.T) {
	s := newSite(t)
	for id, end := range map[string]func(id string) error{
		"removed": func(id string) error { return s.Remove(t.Context(), id) },
		"disabled": func(id string) error {
			return second(s.Patch(t.Context(), id, devices.DevicePatch{Enabled: ptr(false)}))
		},
		"revoked": func(id string) error {
			d, _ := s.Get(id)
			return s.RemoveCredential(t.Context(), id, d.Credentials[0].ID)
		},
	} {
		i := s.mustLogin(id, s.add(devices.NewDevice{ID: id}))
		if err := end(id); err != nil {
			t.Fatal(err)
		}
		before := len(s.kicksOf(id))
		if want := map[string]int{"removed": 1, "disabled": 1}[id]; before != want { // the broker may know more than the registry
			t.Errorf("%s: %d kicks before it is connected, want %d", id, before, want)
		}
		token := s.Connected(id, devices.Connection{Identity: i})
		if k := s.kicksOf(id); len(k) != before+1 || k[before].Forget != (id == "removed") {
			t.Errorf("%s: kicked %+v", id, k)
		}
		s.Disconnected(id, token, "kicked")
	}
	s.flush()
	for _, key := range []string{"v\x02removed", "v\x03removed", "v\x03disabled"} {
		if _, found, _ := s.store.Get([]byte(key)); found {
			t.Errorf("row %q is left", key)
		}
	}
}

func TestRemovalLeavesNoRows(t *testing.T) {
	s := newSite(t)
	token := s.connect("d", s.add(devices.NewDevice{ID: "d"}))
	if err := s.Remove(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	again := s.add(devices.NewDevice{ID: "d"}) // before its old connection ended
	s.Disconnected("d", token, "kicked")
	if d, err := s.Get("d"); err != nil || d.Presence != (devices.Presence{}) {
		t.Errorf("%+v, %v", d, err)
	}
	s.Disconnected("d", s.connect("d", again), "bye")
	if diff := cmp.Diff([]string{"d online", "d offline (the device was removed)", "d online", "d offline (bye)"}, s.told(true)); diff != "" {
		t.Error(diff)
	}
}

func TestExpiryEndsConnections(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d", Credential: &devices.NewCredential{Lifetime: time.Hour}})
		forever := s.add(devices.NewDevice{ID: "forever"})
		overlap := s.add(devices.NewDevice{ID: "overlap"})
		s.connect("d", secret)
		s.connect("forever", forever)
		s.connect("overlap", overlap)
		if _, _, err := s.AddCredential(t.Context(), "overlap", devices.NewCredential{RetireOthers: 2 * time.Hour}); err != nil {
			t.Fatal(err)
		}
		stop := s.run()
		defer stop()
		time.Sleep(time.Hour - time.Second) //nolint:forbidigo // the bubble's clock
		if k := s.kicksOf("d"); len(k) != 0 {
			t.Errorf("kicked early: %+v", k)
		}
		time.Sleep(3 * time.Second) //nolint:forbidigo // the bubble's clock
		if k := s.kicksOf("d"); len(k) == 0 || !strings.Contains(k[0].Reason, "expired") || k[0].Forget {
			t.Errorf("kicked %+v", k)
		}
		if k := s.kicksOf("overlap"); len(k) != 0 {
			t.Errorf("kicked during the overlap: %+v", k)
		}
		time.Sleep(time.Hour) //nolint:forbidigo // the bubble's clock
		if k := s.kicksOf("overlap"); len(k) == 0 {
			t.Error("not kicked after the overlap")
		}
		if k := s.kicksOf("forever"); len(k) != 0 {
			t.Errorf("kicked without a reason: %+v", k)
		}
	})
}

func TestExpiredCredentialsAreRemovedAfterADay(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		add := func(id string, first *devices.NewCredential, then devices.NewCredential) {
			t.Helper()
			s.add(devices.NewDevice{ID: id, Credential: first})
			if _, _, err := s.AddCredential(t.Context(), id, then); err != nil {
				t.Fatal(err)
			}
		}
		add("d", nil, devices.NewCredential{RetireOthers: time.Hour})
		old, fresh := certificate("p", nil), certificate("p", []string{"p"})
		retiring := *pinOf(fresh)
		retiring.RetireOthers = time.Hour
		add("pins", pinOf(old), retiring)
		add("last-pin", pinOf(certificate("last-pin", nil)), devices.NewCredential{RetireOthers: time.Hour})
		stop := s.run()
		defer stop()
		count := func(id string) int {
			d, err := s.Get(id)
			if err != nil {
				t.Fatal(err)
			}
			return len(d.Credentials)
		}
		time.Sleep(24 * time.Hour) //nolint:forbidigo // the bubble's clock
		if n := count("d"); n != 2 {
			t.Errorf("%d credentials before a day has passed", n)
		}
		time.Sleep(8 * time.Hour) //nolint:forbidigo // the bubble's clock
		if n := count("d"); n != 1 {
			t.Errorf("%d credentials after a day", n)
		}
		if n := count("pins"); n != 1 {
			t.Errorf("%d pins after a day", n)
		}
		// Without its last pin, every certificate that names the device would do.
		if n := count("last-pin"); n != 2 {
			t.Errorf("%d credentials, one of them the last pin", n)
		}
		for _, c := range []*x509.Certificate{certificate("last-pin", nil), certificate("last-pin", []string{"x"})} {
			_, err := s.Authenticate(t.Context(), &devices.Attempt{Device: "last-pin", Certificate: c})
			wantErr(t, "an expired pin, or another certificate", err, devices.ErrCredentials)
		}
	})
}

// TestAClockThatJumpsTakesNoCredentialsAway: expired by the wrong clock is expired, but not gone.
func TestAClockThatJumpsTakesNoCredentialsAway(t *testing.T) {
	var mu sync.Mutex
	jump := time.Duration(0)
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d", Credential: &devices.NewCredential{Lifetime: 365 * 24 * time.Hour}})
		stop := s.run()
		defer stop()
		set := func(d time.Duration) { mu.Lock(); jump = d; mu.Unlock() }
		for _, years := range []int{10, -10} {
			set(time.Duration(years) * 365 * 24 * time.Hour)
			time.Sleep(7 * time.Hour) //nolint:forbidigo // the bubble's clock; Run looks every 6 hours
			if _, err := s.login("d", secret); (err != nil) != (years > 0) {
				t.Errorf("%d years on: %v", years, err)
			}
		}
		set(0)
		s.mustLogin("d", secret)
	}, withClock(func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(jump) }))
}

// TestManyDevicesThatComeAndGoDoNotFlood: what is told of all devices together is bounded, too, and in the end it is told how each is.
func TestManyDevicesThatComeAndGoDoNotFlood(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		const many, most = 50, 60
		s.BoundTold(most, 1)
		secrets := map[string]string{}
		for i := range many {
			id := fmt.Sprintf("d%02d", i)
			secrets[id] = s.add(devices.NewDevice{ID: id})
		}
		stop := s.run()
		defer stop()
		for range 3 {
			for id, secret := range secrets {
				s.Disconnected(id, s.connect(id, secret), "flaps")
			}
		}
		for id, secret := range secrets {
			s.connect(id, secret)
		}
		if n := len(s.told(true)); n != most {
			t.Errorf("%d told upstream at once, want %d", n, most)
		}
		if n := len(s.told(false)); n != 7*many {
			t.Errorf("watchers were shown %d of %d", n, 7*many)
		}
		time.Sleep(10 * time.Minute) //nolint:forbidigo // the bubble's clock
		last := map[string]string{}
		for _, line := range s.told(true) {
			id, state, _ := strings.Cut(line, " ")
			last[id] = state
		}
		for id := range secrets {
			if last[id] != "online" {
				t.Errorf("%s is told to be %q", id, last[id])
			}
		}
	})
}
