package top_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/top"
	"holdfast/spool"
)

var then = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)

// status is that of a gateway which has taken n messages in and delivered a half of them.
func status(n uint64) *httpapi.Status {
	count := func(n uint64) spool.Count { return spool.Count{Messages: n, Bytes: 100 * n} }
	return &httpapi.Status{
		Version: "v1", Gateway: "gw1", StartedAt: then, UptimeS: 7200, Ready: true, ClockSync: true, Clock: httpapi.Clock{Wall: then.Add(time.Hour)},
		Store:   httpapi.Store{Bytes: 5 << 20, FreeBytes: 7 << 30},
		Devices: devices.Counts{Registered: 9, Connected: 4}, Commands: devices.QueueCounts{Queued: 2, Sent: 1},
		Lanes: []spool.LaneStat{{Name: "telemetry", Accepted: count(n)}},
		Upstreams: []httpapi.Upstream{{
			Name: "cloud", State: "waiting", Since: then.Add(50 * time.Minute), InFlight: 3, AckedMessages: n / 2, LastError: "refused\nagain",
		}},
		Ledger: httpapi.NewLedger([]spool.Account{{
			Upstream: "cloud", Lane: "telemetry", Accepted: count(n), Delivered: count(n / 2), Pending: count(n - n/2), Oldest: then.Add(57 * time.Minute),
		}}),
		Alarms: []httpapi.Alarm{{Name: "disk_full", Severity: httpapi.Critical, Text: "The disk is full."}},
	}
}

func has(t *testing.T, view string, want ...string) {
	t.Helper()
	plain := ansi.Strip(view)
	for _, w := range want {
		if !strings.Contains(plain, w) {
			t.Errorf("no %q in:\n%s", w, plain)
		}
	}
}

func TestTheScreenShowsTheGateway(t *testing.T) {
	n := uint64(100)
	s := top.NewScreen(func() (*httpapi.Status, error) { return status(n), nil })
	has(t, s.View(), "asking the gateway")
	s.Now = then
	if !s.Look() {
		t.Error("it does not look again")
	}
	has(t, s.View(), "gw1  ready  up 2 h  v1", "devices 4 of 9 connected  commands 2 waiting, 1 under way", "in –", "! The disk is full.",
		"ledger balances: each of 100", "LANE", "telemetry", "cloud", "3 min", "q quit")
	n, s.Now = 120, then.Add(2*time.Second)
	s.Look()
	s.Resize(120, 24)
	has(t, s.View(), "in 10.0/s  out 5.0/s", "not yet", "10.0  5.0", "waiting  10 min  3", "refused; again")
	lines := strings.Split(s.View(), "\n")
	if len(lines) != 24 {
		t.Errorf("%d lines in a window of 24", len(lines))
	}
}

// TestTheScreenFitsAnyWindow: never more lines or columns than there are, and what matters most stays.
func TestTheScreenFitsAnyWindow(t *testing.T) {
	s := top.NewScreen(func() (*httpapi.Status, error) { return status(1000), nil })
	s.Now = then
	s.Look()
	for w := 1; w < 140; w += 3 {
		for h := 1; h < 40; h += 3 {
			s.Resize(w, h)
			lines := strings.Split(s.View(), "\n")
			if len(lines) > h {
				t.Fatalf("%d lines in a window of %d", len(lines), h)
			}
			for _, l := range lines {
				if ansi.StringWidth(l) > w {
					t.Fatalf("%d columns in a window of %d: %q", ansi.StringWidth(l), w, l)
				}
			}
		}
	}
	s.Resize(40, 12)
	has(t, s.View(), "gw1  ready", "WAITING", "telemetry")
}

func TestAGatewayThatIsAwayIsSaidSo(t *testing.T) {
	var gone error
	s := top.NewScreen(func() (*httpapi.Status, error) {
		if gone != nil {
			return nil, gone
		}
		return status(100), nil
	})
	gone, s.Now = errors.New("no gateway answers\nat x"), then
	s.Look()
	has(t, s.View(), "no answer: no gateway answers; at x", "asked again")
	gone = nil
	s.Look()
	gone, s.Now = errors.New("gone"), then.Add(12*time.Second)
	if !s.Look() {
		t.Error("it does not look again")
	}
	has(t, s.View(), "AWAY for 12 s: gone", "telemetry")
	gone = nil
	s.Look()
	has(t, s.View(), "gw1  ready")
	bad := status(1)
	bad.Ledger.Balanced, bad.Ready, bad.NotReady = false, false, "starting"
	s = top.NewScreen(func() (*httpapi.Status, error) { return bad, nil })
	s.Look()
	has(t, s.View(), "DOES NOT BALANCE", "NOT READY: starting")
}

func TestKeys(t *testing.T) {
	s := top.NewScreen(func() (*httpapi.Status, error) { return status(100), nil })
	key := func(r rune) tea.KeyPressMsg { return tea.KeyPressMsg{Code: r, Text: string(r)} }
	for _, k := range []tea.KeyPressMsg{key('q'), {Code: tea.KeyEsc}, {Code: 'c', Mod: tea.ModCtrl}} {
		if !s.Press(k) {
			t.Errorf("%s does not quit", k)
		}
	}
	s.Press(key('p'))
	has(t, s.View(), "PAUSED")
	if s.Look() {
		t.Error("it looks again although it is paused")
	}
	s.Press(key('p'))
	if strings.Contains(s.View(), "PAUSED") || !s.Look() {
		t.Error("it does not go on")
	}
}
