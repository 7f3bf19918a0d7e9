package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
)

func TestStatusTellsOfDevicesCommandsAndCertificates(t *testing.T) {
	now := time.Now()
	st := httpapi.Status{
		Gateway: "gw1", Ready: true, ClockSync: true, Version: "v", Epoch: "e", DataDir: "/d", PID: 7, UptimeS: 60,
		Devices:  devices.Counts{Registered: 12, Connected: 7, Disabled: 1},
		Commands: devices.QueueCounts{Queued: 3, Sent: 1, Delivered: 2, InProgress: 4, Succeeded: 50, Failed: 6, Refused: 9},
		Certificates: []httpapi.Certificate{
			{Listener: "old", File: "a.crt", Subject: "CN=a", NotAfter: now.Add(-time.Hour)},
			{Listener: "soon", File: "b.crt", Subject: "CN=b", NotAfter: now.Add(12*24*time.Hour + time.Minute)},
			{Listener: "fine", File: "c.crt", Subject: "CN=c", NotAfter: now.Add(31 * 24 * time.Hour)},
		},
		Ledger: httpapi.Ledger{Balanced: true},
		Upstreams: []httpapi.Upstream{
			{Name: "deaf", Connected: true, Commands: new(bool), CommandsError: "the broker refuses filter"},
			{Name: "away", Commands: new(bool), CommandsError: "connection refused"},
			{Name: "without", Connected: true, Budget: &bridge.BudgetStatus{BytesPerSecond: 6 << 10, BytesPerDay: 100 << 20, DayBytes: 100<<20 + 1, Held: bridge.HeldByDay, HeldUntil: now}},
			{Name: "night", Connected: true, Budget: &bridge.BudgetStatus{Held: bridge.HeldByWindow, HeldUntil: now}},
		},
	}
	f := newFakeGateway(t)
	f.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/api/v1/status" || r.Header.Get("Authorization") != "Bearer "+fakeToken {
			return false
		}
		fakeReply(w, http.StatusOK, st)
		return true
	}
	st.ClockSync, st.Clock = false, httpapi.Clock{State: "unsynced", Wall: now, Since: now.Add(-90 * time.Second), Doubt: true}
	got := f.ask(t, "status")
	for _, want := range []string{
		"gateway gw1  ready  up 1m0s",
		"clock   NOT SYNCHRONISED for 1m30s: ",
		"clock   JUMPED ALTHOUGH SYNCHRONISED",
		"devices   12 registered, 7 connected, 1 disabled\n",
		"commands  3 queued, 1 sent, 2 delivered, 4 in progress; since the start 50 succeeded, 6 ended otherwise, 9 refused\n",
		"CERTIFICATE OF LISTENER old ENDED on " + st.Certificates[0].NotAfter.Format(time.DateOnly) + ": CN=a (a.crt)\n",
		"certificate of listener soon ends in 12d, on " + st.Certificates[1].NotAfter.Format(time.DateOnly) + ": CN=b (b.crt)\n",
		"COMMANDS DO NOT COME DOWN from deaf: the broker refuses filter\n",
		"balanced: every accepted message",
		"budget of without: 6.0 KiB a second, 100.0 MiB of 100.0 MiB today, USED UP: only urgent lanes flow until " + now.Format("2006-01-02 15:04 MST"),
		"budget of night: no window is open: only urgent lanes flow until ",
	} {
		if got.code != 0 || !strings.Contains(got.stdout, want) {
			t.Errorf("exit %d %s: no %q in\n%s", got.code, got.stderr, want, got.stdout)
		}
	}
	if strings.Contains(got.stdout, "listener fine") {
		t.Error("a certificate that is fine is told of")
	}
	if n := strings.Count(got.stdout, "DO NOT COME DOWN"); n != 1 {
		t.Errorf("told %d times that commands do not come down: of an upstream that is away, or gives none, that is no news", n)
	}
	got = f.ask(t, "status", "--json")
	var again httpapi.Status
	if err := json.Unmarshal([]byte(got.stdout), &again); err != nil || again.Devices != st.Devices || again.Commands != st.Commands {
		t.Errorf("%v: %s", err, got.stdout)
	}
}
