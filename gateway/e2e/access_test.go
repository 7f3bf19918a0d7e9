package e2e_test

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

var versions = []mqtt.Version{mqtt.V311, mqtt.V5}

// TestTokens gives devices their tokens over the API and by the command line, and takes them away again.
func TestTokens(t *testing.T) {
	s := startGated(t, testkit.GatewayConfig{})
	var byHand made
	s.must(&byHand, "device", "add", "by-hand", "--name", "Pump", "--label", "ward=3")
	for id, m := range map[string]made{"by-api": s.register("by-api", nil), "by-hand": byHand} {
		for _, v := range versions {
			d := s.in(login(v, id, m.Secret))
			if err := d.publish(t.Context(), "dt/hello", nil, 1); err != nil {
				t.Errorf("%s, MQTT %v: %v", id, v, err)
			}
			d.close()
			s.out(mqtt.BadUsernameOrPassword, "with a wrong token", login(v, id, "hft_"+strings.Repeat("x", 43)))
			s.out(mqtt.BadUsernameOrPassword, "with a wrong password", login(v, id, "correct horse battery"))
			s.out(mqtt.BadUsernameOrPassword, "without anything", login(v, id, ""))
			s.out(mqtt.BadUsernameOrPassword, "under another's name", login(v, "somebody", m.Secret))
			another := login(v, id, m.Secret)
			another.Username = "somebody"
			s.out(mqtt.BadUsernameOrPassword, "with another's user name", another)
			s.out(mqtt.BadUsernameOrPassword, "who is not registered", login(v, "stranger", "hft_"+strings.Repeat("x", 43)))
			for _, bad := range []string{"a/b", "+", "#", "$SYS", "a b", strings.Repeat("x", 129)} {
				s.out(mqtt.ClientIDNotValid, "whose id is none", login(v, bad, m.Secret))
			}
		}
	}
	if n, err := s.Metric("holdfast_devices_logins_total", `result="credentials"`); err != nil || n != 24 {
		t.Errorf("%v failed logins are counted, %v; want 24", n, err)
	}
	if strings.Contains(s.Logs(), byHand.Secret) {
		t.Error("a token stands in the log")
	}

	for _, v := range versions {
		id := fmt.Sprintf("pump-%d", v)
		old := s.register(id, nil)
		d := s.in(login(v, id, old.Secret))

		// A second token, and the first is good for two seconds more.
		var next struct {
			Secret     string `json:"secret"`
			Credential struct {
				ID string `json:"id"`
			} `json:"credential"`
		}
		begin := time.Now()
		s.must(&next, "device", "rotate", id, "--overlap", "2s")
		stays(t, d, "its token was rotated")
		s.in(login(v, id, next.Secret)).close()
		d = s.in(login(v, id, old.Secret))
		if left := 2*time.Second - time.Since(begin); left < 0 {
			t.Fatal("too slow to see the overlap")
		}
		select {
		case <-d.client.Done():
			if early := 2*time.Second - time.Since(begin); early > 50*time.Millisecond { // the overlap began a little earlier than it was asked for
				t.Errorf("the old token ended %v early", early)
			}
		case <-time.After(4 * time.Second):
			t.Errorf("the overlap is over since %v, and the old token's connection is there", time.Since(begin)-2*time.Second)
		}
		s.out(mqtt.BadUsernameOrPassword, "with a token that was rotated", login(v, id, old.Secret))

		told := func(d *device, why string, want mqtt.Reason) {
			t.Helper()
			if reason := gone(t, d, why); v == mqtt.V5 && reason != want {
				t.Errorf("%s: it was told %v", why, reason)
			}
		}
		d = s.in(login(v, id, next.Secret))
		s.must(nil, "device", "disable", id)
		told(d, "it was disabled", mqtt.AdministrativeAction)
		s.out(mqtt.NotAuthorized, "who is disabled", login(v, id, next.Secret))
		s.must(nil, "device", "enable", id)
		d = s.in(login(v, id, next.Secret))
		if _, err := s.Call(http.MethodDelete, "/api/v1/devices/"+id+"/credentials/"+next.Credential.ID, nil, http.StatusNoContent); err != nil {
			t.Fatal(err)
		}
		told(d, "its token was removed", mqtt.AdministrativeAction)
		s.out(mqtt.BadUsernameOrPassword, "whose token was removed", login(v, id, next.Secret))

		var last struct {
			Secret string `json:"secret"`
		}
		s.must(&last, "device", "rotate", id, "--overlap", "0")
		d = s.in(login(v, id, last.Secret))
		s.must(nil, "device", "remove", id)
		told(d, "it was removed", mqtt.AdministrativeAction)
		s.out(mqtt.BadUsernameOrPassword, "who was removed", login(v, id, last.Secret))
	}
}

// TestRemovalForgets removes a device that is connected, and one that is not: its commands are called off and its session is
// forgotten, so that whoever gets the id next begins with nothing.
func TestRemovalForgets(t *testing.T) {
	t.Parallel()
	s := startGated(t, testkit.GatewayConfig{})
	for _, v := range versions {
		for _, online := range []bool{true, false} {
			id := fmt.Sprintf("dev-%d-%v", v, online)
			c := login(v, id, s.register(id, nil).Secret)
			c.CleanStart, c.SessionExpiry = false, 3600
			got := newMailbox()
			// It takes the first command and says nothing more, so the others wait behind it.
			d := s.in(c, hears(got))
			d.subscribe(t, wire.RequestFilter(id))
			var ids []string
			for n := range 3 {
				ids = append(ids, fmt.Sprintf("%s-c%d", id, n))
				order(t, s.Gateway, id, ids[n], nil)
			}
			got.until(t, wire.RequestTopic(id, ids[0], "work"))
			becomes(t, s.Gateway, ids[0], "DELIVERED")
			if !online {
				d.close()
			}
			s.must(nil, "device", "remove", id)
			if online {
				gone(t, d, "it was removed")
			}
			for _, c := range ids {
				if v := becomes(t, s.Gateway, c, "CANCELED"); !strings.Contains(v.Reason, "removed") {
					t.Errorf("%s is canceled with the reason %q", c, v.Reason)
				}
			}
			if _, err := s.Call(http.MethodPost, "/api/v1/devices/"+id+"/commands", map[string]any{"name": "work"}, http.StatusNotFound); err != nil {
				t.Error(err)
			}
			c.Password = []byte(s.register(id, nil).Secret)
			d = s.in(c, hears(got))
			if d.client.Connack().SessionPresent {
				t.Errorf("%s finds the session of the device that was removed", id)
			}
			order(t, s.Gateway, id, id+"-new", nil)
			d.subscribe(t, wire.RequestFilter(id))
			if before := got.until(t, wire.RequestTopic(id, id+"-new", "work")); len(before) > 0 {
				t.Errorf("%s, new under its id, is sent %v", id, before)
			}
		}
	}
}

// TestImport registers a few thousand devices from a file that somebody made by hand.
func TestImport(t *testing.T) {
	t.Parallel()
	s := startGated(t, testkit.GatewayConfig{})
	const many = 3000
	bad := map[int]string{ // by line; the part of the report that has to stand there
		7:    `a/b,no id`,
		100:  `short`,
		1500: `dev-00001,the same again,,`,
		1501: `role,,nobody,`,
		1502: `labels,,,ward`,
		2000: strings.Repeat("x", 200) + `,,,`,
		2500: `,nobody,,`,
	}
	says := map[int]string{
		7: "a/b", 100: "fields", 1500: "is on line 2 already", 1501: `no role "nobody"`, 1502: "is not key=value", 2000: "at most 128", 2500: "has no id",
	}
	lines := []string{"id,name,role,labels"}
	good := 0
	for n := 2; good < many; n++ {
		if b, ok := bad[n]; ok {
			if n == 7 {
				b += ",,"
			}
			lines = append(lines, b)
			continue
		}
		good++
		lines = append(lines, fmt.Sprintf("dev-%05d,Device %d,,ward=3-east;n=%d", good, good, good))
	}
	dir := t.TempDir()
	file, secrets := filepath.Join(dir, "devices.csv"), filepath.Join(dir, "secrets.csv")
	write := func() {
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	begin := time.Now()
	out, errs, code := holdfast(t, s.bin, "device", "import", file, "--secrets", secrets, "--config", s.File)
	t.Logf("%d devices in %v", many, time.Since(begin).Round(time.Millisecond))
	if code != 1 || out != "" {
		t.Errorf("exit code %d, stdout %.100q", code, out)
	}
	for line, what := range says {
		reported := ""
		for l := range strings.Lines(errs) {
			if _, rest, ok := strings.Cut(l, fmt.Sprintf("devices.csv:%d: ", line)); ok {
				reported += rest
			}
		}
		if !strings.Contains(reported, what) {
			t.Errorf("line %d is reported as %q, which does not say %q", line, reported, what)
		}
	}
	if n := strings.Count(errs, "devices.csv:"); n != len(bad)+1 { // and the sum
		t.Errorf("%d lines are reported, %d are bad:\n%s", n-1, len(bad), errs)
	}
	if sum := fmt.Sprintf("%d registered, 0 updated, 0 skipped, %d failed", many, len(bad)); !strings.Contains(errs, sum) {
		t.Errorf("the sum is not %q:\n%s", sum, errs)
	}
	if st, err := s.Status(); err != nil || st.Devices.Registered != many {
		t.Errorf("%+v devices, %v", st.Devices, err)
	}
	info, err := os.Stat(secrets)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("secrets: %v, %v", info.Mode(), err)
	}
	f, err := os.Open(secrets)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil || len(rows) != many+1 {
		t.Fatalf("%d lines of secrets, %v", len(rows), err)
	}
	for _, row := range [][]string{rows[1], rows[many/2], rows[many]} {
		s.in(login(mqtt.V5, row[0], row[1])).close()
	}

	// The bad lines are mended, and the whole file is run again.
	lines[6], lines[99] = "mended-1,,,", "mended-2,,,"
	write()
	_, errs, code = holdfast(t, s.bin, "device", "import", file, "--existing", "skip", "--secrets", secrets+".2", "--config", s.File)
	if sum := fmt.Sprintf("2 registered, 0 updated, %d skipped, %d failed", many, len(bad)-2); code != 1 || !strings.Contains(errs, sum) {
		t.Errorf("exit code %d; the sum is not %q:\n%.2000s", code, sum, errs)
	}
	b, err := s.Call(http.MethodGet, "/api/v1/devices/dev-00042", nil, http.StatusOK)
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels"`
	}
	if err := json.Unmarshal(b, &d); err != nil || d.Name != "Device 42" || d.Labels["n"] != "42" || d.Labels["ward"] != "3-east" {
		t.Errorf("%v: %s", err, b)
	}
}

// TestOneClientIDOneDevice has somebody else come under the id of a device that is connected.
func TestOneClientIDOneDevice(t *testing.T) {
	t.Parallel()
	for _, anonymous := range []bool{false, true} { // who is registered needs credentials then, too
		s := startGated(t, testkit.GatewayConfig{Devices: fmt.Sprintf("{ anonymous: %v }", anonymous)})
		for _, v := range versions {
			id := fmt.Sprintf("pump-%d", v)
			m := s.register(id, nil)
			c := login(v, id, m.Secret)
			c.CleanStart, c.SessionExpiry = false, 3600
			got := newMailbox()
			first := s.in(c, hears(got))
			first.subscribe(t, "twin/"+id+"/#")
			for _, secret := range []string{"", "wrong wrong wrong", "hft_" + strings.Repeat("x", 43)} {
				for _, other := range versions {
					s.out(mqtt.BadUsernameOrPassword, "tried by somebody else", login(other, id, secret))
				}
			}
			stays(t, first, "somebody else has tried its id")
			if err := first.publish(t.Context(), "twin/"+id+"/me", []byte("1"), 1); err != nil {
				t.Error(err)
			}
			got.until(t, "twin/"+id+"/me")

			// It comes again itself, over a new link, while the old one seems alive.
			second := s.in(c, hears(got))
			if reason := gone(t, first, "it was taken over by itself"); v == mqtt.V5 && reason != mqtt.SessionTakenOver {
				t.Errorf("the old connection is told %v", reason)
			}
			if !second.client.Connack().SessionPresent {
				t.Error("it does not find its own session")
			}
			if err := second.publish(t.Context(), "twin/"+id+"/me", []byte("2"), 1); err != nil {
				t.Error(err)
			}
			got.until(t, "twin/"+id+"/me")
		}
		if n, err := s.Metric("holdfast_broker_takeovers_total"); err != nil || n != 2 {
			t.Errorf("%v takeovers, %v; want 2", n, err)
		}
		if st, err := s.Status(); err != nil || st.Devices.Connected != 2 {
			t.Errorf("%+v, %v", st.Devices, err)
		}
	}
}
