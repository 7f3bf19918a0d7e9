package gateway_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/gateway"
	"holdfast/gateway/broker"
	"holdfast/gateway/httpapi"
	"holdfast/internal/pki"
	"holdfast/spool"
)

var alarmNow = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)

// quiet is the status of a gateway that nobody has to look at.
func quiet() httpapi.Status {
	full := spool.Count{Messages: 3, Bytes: 100}
	return httpapi.Status{
		ClockSync: true, Clock: httpapi.Clock{Wall: alarmNow, Since: alarmNow.Add(-time.Hour)}, Store: httpapi.Store{Level: "ok"}, DataDir: "/d",
		Upstreams:    []httpapi.Upstream{{Name: "cloud", Connected: true, Since: alarmNow.Add(-time.Hour)}},
		Certificates: []httpapi.Certificate{{Listener: "lan", File: "/c.pem", NotAfter: alarmNow.Add(31 * 24 * time.Hour)}},
		Lanes:        []spool.LaneStat{{Name: "telemetry", Kept: spool.Count{Bytes: 89}, MaxBytes: 100}, {Name: "kept", Kept: full, MaxBytes: 100}},
		Ledger:       httpapi.NewLedger([]spool.Account{{Upstream: "cloud", Lane: "telemetry"}, {Lane: "kept", Accepted: full, Pending: full}}),
	}
}

func TestEachAlarmHasItsReason(t *testing.T) {
	if a := gateway.AlarmsOf(new(quiet()), "", alarmNow); len(a) > 0 {
		t.Errorf("alarms of a gateway where all is well: %+v", a)
	}
	seen := map[string]bool{}
	for i, c := range []struct {
		want   string // severity name object
		text   string
		change func(*httpapi.Status)
	}{
		{"critical store_damaged ", "/d/quarantine", func(s *httpapi.Status) { s.Store.Damage = []httpapi.Damage{{File: "1.sst"}} }},
		{"critical messages_lost ", "7 acknowledged", func(s *httpapi.Status) { s.Store.LostMessages = 7 }},
		{"critical disk_full ", "spool purge", func(s *httpapi.Status) { s.Store.Level = "full" }},
		{"warning disk_nearly_full ", "QoS 0", func(s *httpapi.Status) { s.Store.Level = "high" }},
		{"warning clock_unsynced ", "NTP", func(s *httpapi.Status) { s.ClockSync = false }},
		{"", "", func(s *httpapi.Status) { s.ClockSync, s.Clock.Since = false, alarmNow.Add(-119*time.Second) }},
		{"warning clock_unsynced ", "NTP", func(s *httpapi.Status) { s.ClockSync, s.Clock.Since, s.Clock.Doubt = false, alarmNow, true }},
		{"warning upstream_down cloud", "refused; again", func(s *httpapi.Status) { s.Upstreams[0].Connected, s.Upstreams[0].LastError = false, "refused\nagain" }},
		{"", "", func(s *httpapi.Status) { s.Upstreams[0].Connected, s.Upstreams[0].Since = false, time.Time{} }}, // not begun yet
		{"", "", func(s *httpapi.Status) {
			s.Upstreams[0].Connected, s.Upstreams[0].Since = false, alarmNow.Add(-59*time.Second)
		}},
		{"warning commands_unavailable cloud", "not allowed", func(s *httpapi.Status) { s.Upstreams[0].CommandsError = "not allowed" }},
		{"warning certificate_expiring lan", "/c.pem", func(s *httpapi.Status) { s.Certificates[0].NotAfter = alarmNow.Add(29 * 24 * time.Hour) }},
		{"critical certificate_expiring lan", "ends on", func(s *httpapi.Status) { s.Certificates[0].NotAfter = alarmNow.Add(time.Hour) }},
		{"critical certificate_expiring lan", "ended on", func(s *httpapi.Status) { s.Certificates[0].NotAfter = alarmNow }},
		{"warning lane_nearly_full telemetry", "at 90 %", func(s *httpapi.Status) { s.Lanes[0].Kept.Bytes = 90 }},
		{"critical ledger_unbalanced ", "defect", func(s *httpapi.Status) { s.Ledger.Balanced = false }},
	} {
		s := quiet()
		c.change(&s)
		var got []string
		for _, a := range gateway.AlarmsOf(&s, "", alarmNow) {
			got = append(got, a.Severity+" "+a.Name+" "+a.Object)
			seen[a.Name] = true
			if !strings.Contains(a.Text, c.text) {
				t.Errorf("%d: %q says nothing of %q", i, a.Text, c.text)
			}
		}
		if strings.Join(got, ",") != c.want {
			t.Errorf("%d: %q, want %q", i, got, c.want)
		}
	}
	if a := gateway.AlarmsOf(new(quiet()), "message 7", alarmNow); len(a) != 1 || a[0].Name != "messages_parked" || !strings.Contains(a[0].Text, "message 7") {
		t.Errorf("a parked message: %+v", a)
	}
	seen["messages_parked"] = true
	for _, name := range httpapi.AlarmNames {
		if !seen[name] {
			t.Errorf("nothing raises %s", name)
		}
		delete(seen, name)
	}
	if len(seen) > 0 {
		t.Errorf("not among the names: %v", seen)
	}
	// docs/operations.md says what to do about each.
	doc, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range httpapi.AlarmNames {
		if !strings.Contains(string(doc), "| `"+name+"` |") {
			t.Errorf("docs/operations.md does not explain %s", name)
		}
	}
}

// TestALinkIsAwayWhateverTheClockDoes: it came down while the clock was a year ahead, which has been put right since.
func TestALinkIsAwayWhateverTheClockDoes(t *testing.T) {
	now := time.Now()
	s := quiet()
	s.Upstreams[0].Connected, s.Upstreams[0].Since = false, now.Add(-2*time.Minute)
	s.Clock.Wall = now.AddDate(-1, 0, 0)
	if all := gateway.AlarmsOf(&s, "", now); len(all) != 1 || all[0].Name != "upstream_down" {
		t.Errorf("alarms %+v", all)
	}
}

func TestAlarmsAreToldWhenTheyBeginAndEnd(t *testing.T) {
	var a gateway.Alarms
	var told []string
	tell := func(c httpapi.AlarmChange) {
		told = append(told, fmt.Sprintf("%s %s %v", c.Name, c.Severity, c.Active))
	}
	x, y := httpapi.Alarm{Name: "x", Severity: httpapi.Warning}, httpapi.Alarm{Name: "y", Severity: httpapi.Critical}
	worse := x
	worse.Severity = httpapi.Critical
	since := func(a httpapi.Alarm, s int) httpapi.Alarm {
		a.Since = alarmNow.Add(time.Duration(s) * time.Second)
		return a
	}
	for i, c := range []struct {
		found, want []httpapi.Alarm
		told        []string
	}{
		{[]httpapi.Alarm{x}, []httpapi.Alarm{since(x, 0)}, []string{"x warning true"}},
		{[]httpapi.Alarm{x, y}, []httpapi.Alarm{since(y, 1), since(x, 0)}, []string{"y critical true"}},
		{[]httpapi.Alarm{worse}, []httpapi.Alarm{since(worse, 0)}, []string{"x critical true", "y critical false"}},
		{nil, nil, []string{"x critical false"}},
		{[]httpapi.Alarm{x}, []httpapi.Alarm{since(x, 4)}, []string{"x warning true"}},
	} {
		told = nil
		got := a.Update(slices.Clone(c.found), alarmNow.Add(time.Duration(i)*time.Second), tell)
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%d: %s", i, d)
		}
		if d := cmp.Diff(c.told, told); d != "" {
			t.Errorf("%d told: %s", i, d)
		}
	}
}

// TestAlarmsShowEverywhere has a listener show a certificate that ends soon: the status, the list, the metric, the log and the events know.
func TestAlarmsShowEverywhere(t *testing.T) {
	dir := t.TempDir()
	ca := pki.At(filepath.Join(dir, "pki"), func() time.Time { return time.Now().Add(10*24*time.Hour - pki.ServerLifetime) })
	if err := ca.Init(pki.InitOptions{Site: "test", Hosts: []string{"localhost"}}); err != nil {
		t.Fatal(err)
	}
	c := configuration(t, filepath.Join(dir, "data"))
	l := &c.Listeners[0]
	l.Protocol, l.TLS = "mqtts", broker.TLS{Cert: ca.Path("server.crt"), Key: ca.Path("server.key")}
	r := start(t, c)
	if st := r.status(); !slices.ContainsFunc(st.Alarms, func(a httpapi.Alarm) bool {
		return a.Name == "certificate_expiring" && a.Object == l.Name && !a.Since.IsZero()
	}) {
		t.Errorf("status has alarms %+v", st.Alarms)
	}
	for path, want := range map[string]string{"/api/v1/alarms": "certificate_expiring", "/metrics": `holdfast_gateway_alarms{alarm="certificate_expiring"} 1`} {
		resp := r.get(t.Context(), path)
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !strings.Contains(string(b), want) {
			t.Errorf("%s does not have %s:\n%.3000s", path, want, b)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	resp := r.get(ctx, "/api/v1/events?kinds=alarm&last_event_id=x-1") // another start's: all there are
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if s := lines.Text(); strings.Contains(s, `"name":"certificate_expiring"`) && strings.Contains(s, `"active":true`) {
			return
		}
	}
	t.Errorf("no event: %v", lines.Err())
}
