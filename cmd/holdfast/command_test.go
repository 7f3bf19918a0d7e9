package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/testkit"
)

// clockless takes the times out of what is printed.
func clockless(s string) string {
	return regexp.MustCompile(`\d\d:\d\d:\d\d\.\d{3}`).ReplaceAllString(s, "TIME")
}

func sendArgs(f *fakeGateway, t *testing.T, args ...string) []string {
	return append([]string{"command", "send", "--address", f.address(), "--token-file", f.tokenFile(t)}, args...)
}

func TestACommandIsSent(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("valve", nil)
	got := f.ask(t, "command", "send", "valve", "open", "--id", "c1", "--payload", `{"by":5}`, "--ttl", "2h", "--not-before", "2026-03-01T08:00:00Z",
		"--execution-timeout", "90s", "--max-attempts", "3", "--urgent", "--supersede-key", "k", "--content-type", "application/json", "--feedback", "none")
	if got.code != 0 {
		t.Fatalf("%+v", got)
	}
	sameText(t, "stdout", got.stdout, `
command c1 for valve is QUEUED
device valve is offline (last seen: never): the command waits until it is back
see what becomes of it: holdfast command show c1
`)
	c := f.commands[0]
	if *c.Payload != `{"by":5}` || c.TTL != "2h0m0s" || !c.NotBefore.Equal(fakeBegin.Add(2*time.Hour)) || c.ExecutionTimeout != "1m30s" || !c.Urgent ||
		c.SupersedeKey != "k" || c.ContentType != "application/json" {
		t.Errorf("taken as %+v", c)
	}
	if got := f.ask(t, "command", "send", "valve", "open", "--id", "c1", "--json"); got.code != 0 || len(f.commands) != 1 || !strings.Contains(got.stdout, `"state": "QUEUED"`) {
		t.Errorf("the same again: %+v", got)
	}
	if got := f.ask(t, "command", "send", "valve", "close", "--id", "c1"); got.code != 1 || !strings.Contains(got.stderr, "holdfast command show c1 shows the other one") {
		t.Errorf("another of that id: %+v", got)
	}
	// An id is made if none is given, so that a lost answer can be asked for again.
	if got := f.ask(t, "command", "send", "valve", "open"); got.code != 0 || len(f.commands) != 2 || len(f.commands[1].ID) < 16 {
		t.Errorf("without id: %+v", got)
	}
	file := filepath.Join(t.TempDir(), "p")
	if err := os.WriteFile(file, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := f.ask(t, "command", "send", "valve", "open", "--payload-file", file); got.code != 0 || *f.commands[2].Payload != "from a file" {
		t.Errorf("from a file: %+v", got)
	}
	f.addDevice("off", func(d *devices.Device) { d.Enabled = false })
	for _, tc := range []struct {
		code int
		want string
		args []string
	}{
		{1, "no such device: holdfast device list shows them all", []string{"nobody", "open"}},
		{1, "holdfast device enable off lets it in again", []string{"off", "open"}},
		{2, "something is missing", []string{"valve"}},
		{2, "exclude each other", []string{"valve", "open", "--payload", "a", "--payload-file", file}},
		{2, "--timeout is for --wait", []string{"valve", "open", "--timeout", "1s"}},
		{2, "--ttl 0s is over", []string{"valve", "open", "--ttl", "0s"}},
		{2, "--feedback is none", []string{"valve", "open", "--feedback", "some"}},
		{2, "neither a time", []string{"valve", "open", "--not-before", "tomorrow"}},
		{1, "is longer than 64.0 KiB", []string{"valve", "open", "--payload-file", importFile(t, "big", strings.Repeat("x", 64<<10+1))}},
	} {
		if got := f.ask(t, append([]string{"command", "send"}, tc.args...)...); got.code != tc.code || !strings.Contains(got.stderr, tc.want) {
			t.Errorf("%v: %+v", tc.args, got)
		}
	}
	if len(f.commands) != 3 {
		t.Errorf("%d commands", len(f.commands))
	}
}

func TestWaitTellsEveryStateAndTheResult(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("valve", connected)
	f.submitted = func(id string) {
		f.advance(id, devices.Sent, nil)
		f.advance(id, devices.Queued, func(c *httpapi.Command) { c.Reason = "the device disconnected" })
		f.advance(id, devices.Sent, nil)
		f.advance(id, devices.Delivered, nil)
		f.advance(id, devices.InProgress, nil)
		f.advance(id, devices.InProgress, func(c *httpapi.Command) { c.Progress = &devices.Progress{Percent: 40, Text: "turning"} })
		f.advance(id, devices.InProgress, func(c *httpapi.Command) { c.Progress = &devices.Progress{Percent: 80} })
		f.advance(id, devices.Succeeded, func(c *httpapi.Command) {
			r := `{"angle":90}`
			c.Result = &r
		})
	}
	got := f.ask(t, "command", "send", "valve", "open", "--id", "c1", "--wait")
	if got.code != 0 || got.stderr != "" {
		t.Errorf("exit %d, %s", got.code, got.stderr)
	}
	sameText(t, "stdout", clockless(got.stdout), `
command c1 for valve
TIME  QUEUED
TIME  SENT
TIME  QUEUED: the device disconnected
TIME  SENT, attempt 2
TIME  DELIVERED
TIME  IN_PROGRESS
              40 %, turning
              80 %
TIME  SUCCEEDED
result: {"angle":90}
`)
}

func TestTheExitCodeIsTheOutcome(t *testing.T) {
	for _, tc := range []struct {
		end    devices.State
		oneWay bool
		code   int
	}{
		{devices.Succeeded, false, 0},
		{devices.Failed, false, 1},
		{devices.Rejected, false, 1},
		{devices.Expired, false, 1},
		{devices.TimedOut, false, 1},
		{devices.Canceled, false, 1},
		{devices.Superseded, false, 1},
		{devices.DeadLettered, false, 1},
		{devices.Delivered, true, 0},
		{devices.Expired, true, 1},
	} {
		f := newFakeGateway(t)
		f.addDevice("d", connected)
		f.submitted = func(id string) {
			f.advance(id, tc.end, func(c *httpapi.Command) { c.Reason = "because" })
		}
		args := []string{"command", "send", "d", "x", "--wait"}
		if tc.oneWay {
			args = append(args, "--one-way")
		}
		if got := f.ask(t, args...); got.code != tc.code || !strings.Contains(got.stdout, tc.end.String()+": because\n") {
			t.Errorf("%s: %+v", tc.end, got)
		}
	}
}

func TestWaitInJSON(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", nil)
	f.submitted = func(id string) {
		f.advance(id, devices.Sent, nil)
		f.advance(id, devices.Failed, func(c *httpapi.Command) {
			r := "valve is stuck"
			c.Result = &r
		})
	}
	got := f.ask(t, "command", "send", "d", "x", "--wait", "--json")
	var kinds []string
	for line := range strings.Lines(got.stdout) {
		var ev httpapi.Event
		if err := json.Unmarshal([]byte(line), &ev); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		kinds = append(kinds, ev.Kind+" "+ev.Command.State.String())
		if ev.Kind == "end" && (ev.Command.Result == nil || *ev.Command.Result != "valve is stuck") {
			t.Errorf("result %v", ev.Command.Result)
		}
	}
	if got.code != 1 || got.stderr != "" || strings.Join(kinds, ", ") != "command QUEUED, command SENT, command FAILED, end FAILED" {
		t.Errorf("exit %d, %v, %s", got.code, kinds, got.stderr)
	}
}

// What happens between the end of a stream and the next is not missed, and nothing is told twice.
func TestWaitOutlivesALostStream(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", connected)
	f.submitted = func(id string) {
		f.advance(id, devices.Sent, nil)
		f.cutStreams()
		f.advance(id, devices.Delivered, nil)
		f.advance(id, devices.Succeeded, nil)
	}
	got := f.ask(t, "command", "send", "d", "x", "--id", "c", "--wait")
	text := regexp.MustCompile(`the gateway is out of sight: .*\n`).ReplaceAllString(clockless(got.stdout), "")
	sameText(t, "stdout", text, "command c for d\nTIME  QUEUED\nTIME  SENT\nTIME  DELIVERED\nTIME  SUCCEEDED\n")
	if got.code != 0 {
		t.Errorf("exit %d, %s", got.code, got.stderr)
	}
}

// A gateway, or a proxy before it, that gives no events is asked again and again.
func TestWaitWithoutEvents(t *testing.T) {
	for name, status := range map[string]int{"never": http.StatusNotFound, "not now": http.StatusServiceUnavailable} {
		f := newFakeGateway(t)
		f.addDevice("d", connected)
		f.spoil = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/events") {
				fakeFail(w, status, "no", "no events here")
				return true
			}
			return false
		}
		f.submitted = func(id string) {
			f.advance(id, devices.Sent, nil)
			f.advance(id, devices.Delivered, nil)
			f.advance(id, devices.Succeeded, nil)
		}
		got := f.ask(t, "command", "send", "d", "x", "--id", "c", "--wait")
		sameText(t, name, clockless(got.stdout), "command c for d\nTIME  QUEUED\nTIME  SENT\nTIME  DELIVERED\nTIME  SUCCEEDED\n")
		if got.code != 0 || len(f.commands) != 1 {
			t.Errorf("%s: exit %d, %s", name, got.code, got.stderr)
		}
	}
}

// The answer to a submit may be lost although it took effect. Asked again it is the same command.
func TestALostAnswerIsNoSecondCommand(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", connected)
	tries := 0
	f.spoil = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		if tries++; tries > 1 {
			return false
		}
		rec := &discard{h: http.Header{}}
		spoil := f.spoil
		f.spoil = nil
		f.serve(rec, r)
		f.spoil = spoil
		panic(http.ErrAbortHandler)
	}
	got := f.ask(t, "command", "send", "d", "x")
	if got.code != 0 || tries != 2 || len(f.commands) != 1 {
		t.Errorf("%d tries, %d commands, %+v", tries, len(f.commands), got)
	}
}

type discard struct{ h http.Header }

func (d *discard) Header() http.Header         { return d.h }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(int)             {}

func TestWaitingEndsAndTheCommandGoesOn(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", nil)
	got := f.ask(t, "command", "send", "d", "x", "--id", "c", "--wait", "--timeout", "50ms")
	if got.code != 1 || !strings.Contains(got.stderr, "no end within 50ms; the command goes on: holdfast command show c") ||
		!strings.Contains(got.stdout, "device d is offline") {
		t.Errorf("time-out: %+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	f.submitted = func(string) { cancel() }
	if got := runIt(ctx, sendArgs(f, t, "d", "x", "--id", "c2", "--wait")...); got.code != 1 || !strings.Contains(got.stderr, "interrupted; the command goes on: holdfast command show c2") {
		t.Errorf("interrupted: %+v", got)
	}
	if got := f.ask(t, "command", "send", "nobody", "x", "--wait"); got.code != 1 || !strings.Contains(got.stderr, "no such device") {
		t.Errorf("refused: %+v", got)
	}
	f.Server.CloseClientConnections()
	f.Server.Close()
	if got := f.ask(t, "command", "send", "d", "x", "--wait"); got.code != 1 || !strings.Contains(got.stderr, "no gateway answers") {
		t.Errorf("nobody there: %+v", got)
	}
}

func TestCommandsAreListedShownCanceled(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", nil)
	f.addDevice("e", nil)
	for i := range 5 {
		f.ask(t, "command", "send", []string{"d", "e"}[i%2], "x", "--id", fmt.Sprintf("c%d", i), "--payload", "p")
	}
	f.advance("c1", devices.Sent, nil)
	ids := func(args ...string) (ids []string) {
		t.Helper()
		got := f.ask(t, append([]string{"command", "list", "--json"}, args...)...)
		if got.code != 0 {
			t.Fatalf("%v: %s", args, got.stderr)
		}
		for line := range strings.Lines(got.stdout) {
			var c httpapi.Command
			if err := json.Unmarshal([]byte(line), &c); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, c.ID)
		}
		return ids
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{nil, "c4 c3 c2 c1 c0"},
		{[]string{"--device", "e"}, "c3 c1"},
		{[]string{"--state", "sent,FAILED"}, "c1"},
		{[]string{"--limit", "2"}, "c4 c3"},
	} {
		if got := strings.Join(ids(tc.args...), " "); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.args, got, tc.want)
		}
	}
	if got := f.ask(t, "command", "list", "--state", "gone"); got.code != 2 || !strings.Contains(got.stderr, `there is no state "GONE"`) {
		t.Errorf("%+v", got)
	}
	list := f.ask(t, "command", "list", "--limit", "1").stdout
	if want := regexp.MustCompile(`^ID  DEVICE  NAME  STATE   ATTEMPTS  CHANGED  +REASON\nc4  d       x     QUEUED +0  \d+d ago\n$`); !want.MatchString(list) {
		t.Errorf("list:\n%s", list)
	}
	at := func(s int) string {
		return fakeBegin.Add(time.Duration(s) * time.Second).Local().Format("2006-01-02 15:04:05.000")
	}
	sameText(t, "show", f.ask(t, "command", "show", "c1").stdout, `
command   c1
device    e
name      x
state     SENT
attempts  1 of 10
from      api admin
expires   `+clockText(fakeBegin.Add(24*time.Hour))+`
payload   p

STATE   AT                       REASON
QUEUED  `+at(0)+`
SENT    `+at(1)+`
`)
	got := f.ask(t, "command", "cancel", "c1", "--reason", "not now")
	if got.code != 0 || !strings.Contains(got.stdout, "command c1 is CANCELED\nit had been sent") || f.commands[1].Reason != "not now" {
		t.Errorf("cancel: %+v", got)
	}
	if got := f.ask(t, "command", "cancel", "c0"); got.code != 0 || strings.Contains(got.stdout, "had been sent") {
		t.Errorf("cancel: %+v", got)
	}
	if got := f.ask(t, "command", "show", "none"); got.code != 1 || !strings.Contains(got.stderr, "holdfast command list shows the newest") {
		t.Errorf("none: %+v", got)
	}
}

func TestWatchStreamsUntilItIsStopped(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("d", connected)
	f.ask(t, "command", "send", "d", "x", "--id", "c", "--payload", "p")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out, errs testkit.Buffer
	token := f.tokenFile(t)
	ended := make(chan int)
	go func() {
		ended <- run(ctx, []string{"command", "watch", "--address", f.address(), "--token-file", token}, &out, &errs)
	}()
	streamOpen(ctx, t, f, 1)
	f.advance("c", devices.Sent, nil)
	f.cutStreams()
	f.advance("c", devices.Delivered, func(c *httpapi.Command) { c.Reason = "acknowledged" })
	streamOpen(ctx, t, f, 2)
	f.mu.Lock()
	f.tell(httpapi.Event{Kind: httpapi.KindRefusal, At: fakeBegin, Refusal: &httpapi.RefusalEvent{Device: "z", Code: "unknown_device", Reason: "no such device"}})
	f.tell(httpapi.Event{Kind: httpapi.KindReset, At: fakeBegin})
	f.mu.Unlock()
	for !strings.Contains(out.String(), "missing here") && ctx.Err() == nil {
		<-time.After(5 * time.Millisecond)
	}
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("exit %d", code)
	}
	sameText(t, "stdout", clockless(out.String()), `
TIME  d  c  x  SENT
TIME  d  c  x  DELIVERED: acknowledged
TIME  z  -  REFUSED unknown_device: no such device
TIME  some events are missing here
`)
	if !strings.Contains(errs.String(), "waiting for it\nthe gateway is back\n") {
		t.Errorf("stderr %q", errs.String())
	}
	f.mu.Lock()
	resumed := slices.ContainsFunc(f.calls, func(c string) bool { return strings.Contains(c, "kinds=command%2Crefusal") })
	f.mu.Unlock()
	if !resumed {
		t.Error("asked for other kinds of events")
	}
	f.Server.CloseClientConnections()
	f.Server.Close()
	if got := f.ask(t, "command", "watch"); got.code != 1 || !strings.Contains(got.stderr, "no gateway answers") {
		t.Errorf("nobody there: %+v", got)
	}
}

// streamOpen waits for the nth stream.
func streamOpen(ctx context.Context, t *testing.T, f *fakeGateway, n int) {
	t.Helper()
	for {
		f.mu.Lock()
		open := f.streams
		f.mu.Unlock()
		if open >= n {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("no stream %d", n)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// On a terminal each progress is written over the one before.
func TestProgressStaysOnOneLineOfATerminal(t *testing.T) {
	var out testkit.Buffer
	s := &sentCommand{program: &program{stdout: &out}, tty: true}
	say := func(at int, st devices.State, p *devices.Progress) {
		c := httpapi.Command{Command: devices.Command{ID: "c", State: st, Updated: fakeBegin.Add(time.Duration(at) * time.Second), Progress: p}}
		s.told(&c, httpapi.Event{})
	}
	say(0, devices.InProgress, nil)
	say(0, devices.InProgress, &devices.Progress{Percent: 1})
	say(0, devices.InProgress, &devices.Progress{Percent: 1})
	say(0, devices.InProgress, &devices.Progress{Percent: 99, Text: "bell\a"})
	say(1, devices.Succeeded, &devices.Progress{Percent: 99, Text: "bell\a"})
	s.endLine()
	const pad = "\r\x1b[K              "
	if got, want := clockless(out.String()), "TIME  IN_PROGRESS\n"+pad+"1 %"+pad+"99 %, bell·\nTIME  SUCCEEDED\n"; got != want {
		t.Errorf("%q\nwant %q", got, want)
	}
}
