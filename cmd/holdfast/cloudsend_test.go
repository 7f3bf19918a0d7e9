package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
)

// startFakeGateway answers commands at a broker as a gateway with a device that knows a few of them.
func startFakeGateway(t *testing.T, url string) (submits <-chan wire.Submit) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := mqttup.Connect(ctx, mqttup.Options{URL: url, ClientID: "fake gateway"}, nil, nil)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	taken := make(chan wire.Submit, 100)
	at := time.UnixMilli(1764000000000)
	tell := func(device, id, name string, states ...string) {
		for _, state := range states {
			e := wire.CommandEvent{Gateway: "ward-3", Device: device, ID: id, Name: name, State: state, At: wire.Time{Time: at}, ClockState: wire.ClockSynced}
			at = at.Add(time.Second)
			switch state {
			case "REFUSED":
				e.Code, e.Reason = "unknown_device", "there is no such device: holdfast device add bed-08"
			case "SUCCEEDED":
				e.SetResult([]byte(`{"up":1}`), "application/json")
			case "FAILED":
				e.Reason = "no \x1b[31mpower"
			case "IN_PROGRESS":
				n := 40
				e.Progress = &wire.EventProgress{Percent: &n, Text: "flashing"}
			}
			if err := conn.Publish(ctx, wire.CommandEventTopic("ward-3", device, id, state), e.Encode()); err != nil {
				t.Error(err)
			}
		}
	}
	up, done := make(chan struct{}, 10), make(chan error, 1)
	o := mqttup.CommandsFromConfig(bridge.Config{Name: "cloud", URL: url}, "ward-3")
	o.OnUp = func() { up <- struct{}{} }
	go func() {
		done <- mqttup.TakeCommands(ctx, o, wire.CommandFilter("ward-3"), func(m mqttup.Incoming) {
			defer m.Ack()
			_, device, action, _ := wire.ParseCommandTopic(m.Topic)
			if action == wire.ActionCancel {
				c, err := wire.DecodeCancel(m.Payload)
				if err != nil {
					t.Error(err)
				}
				tell(device, c.ID, "", map[bool]string{true: "CANCELED", false: "SUCCEEDED"}[c.ID == "c-1"])
				return
			}
			s, err := wire.DecodeSubmit(m.Payload)
			if err != nil {
				t.Error(err)
				return
			}
			taken <- s
			switch s.Name {
			case "reboot":
				tell(device, s.ID, s.Name, "QUEUED", "SENT", "DELIVERED", "IN_PROGRESS", "SUCCEEDED")
			case "beep":
				tell(device, s.ID, s.Name, "QUEUED", "SENT", "DELIVERED")
			case "burn":
				tell(device, s.ID, s.Name, "QUEUED", "FAILED")
			case "fly":
				tell(device, s.ID, s.Name, "REFUSED")
			case "wait":
				tell(device, s.ID, s.Name, "QUEUED")
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = conn.Wait()
	})
	select {
	case <-up:
	case <-time.After(20 * time.Second):
		t.Fatal("the gateway does not come up")
	}
	return taken
}

func TestCloudSend(t *testing.T) {
	url := startCloud(t)
	submits := startFakeGateway(t, url)
	file := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(file, []byte{0, 0xff}, 0o600); err != nil {
		t.Fatal(err)
	}
	send := func(args ...string) (code int, stdout, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		code = run(ctx, append([]string{"cloud", "send", "--url", url, "--gateway", "ward-3", "bed-07"}, args...), &out, &errs)
		return code, out.String(), errs.String()
	}
	first := time.UnixMilli(1764000000000).Format("2006-01-02 15:04:05.000")
	code, out, errs := send("reboot", "--wait", "--id", "c-9", "--payload", `{"a":1}`, "--content-type", "application/json", "--ttl", "90s", "--execution-timeout", "5s",
		"--not-before", "2020-01-31T16:00:00Z", "--urgent", "--supersede-key", "k", "--feedback", "full", "--max-attempts", "3")
	if want := first + `  QUEUED         command c-9
TIME  SENT
TIME  DELIVERED
TIME  IN_PROGRESS    40 %  flashing
TIME  SUCCEEDED      result {"up":1}
`; code != 0 || errs != "" || !matches(out, want) {
		t.Errorf("ended with %d: %s\n%s", code, errs, out)
	}
	got := <-submits
	if want := (wire.Submit{
		ID: "c-9", Name: "reboot", Payload: []byte(`{"a":1}`), ContentType: "application/json", TTL: wire.Duration(90 * time.Second), HasTTL: true,
		ExecutionTimeout: wire.Duration(5 * time.Second), NotBefore: wire.Time{Time: time.Date(2020, 1, 31, 16, 0, 0, 0, time.UTC)}, Urgent: true,
		SupersedeKey: "k", Feedback: "full", MaxAttempts: 3,
	}); !equalSubmit(got, want) {
		t.Errorf("submitted %+v", got)
	}

	// Without --wait: it is stored.
	if code, out, errs := send("wait", "--payload-file", file); code != 0 || errs != "" || !matches(out, "TIME  QUEUED         command ID\n") {
		t.Errorf("ended with %d: %s\n%s", code, errs, out)
	}
	if got := <-submits; string(got.Payload) != "\x00\xff" || len(got.ID) != 36 {
		t.Errorf("submitted %+v", got)
	}
	if code, out, errs := send("beep", "--one-way", "--wait"); code != 0 || !strings.Contains(out, "DELIVERED") {
		t.Errorf("one-way ended with %d: %s\n%s", code, errs, out)
	}
	if code, out, errs := send("burn", "--wait"); code != 1 || errs != "" || !strings.Contains(out, "FAILED         no ·[31mpower") {
		t.Errorf("a failure ended with %d: %s\n%s", code, errs, out)
	}
	if code, out, errs := send("fly"); code != 1 || !strings.Contains(errs, "holdfast device add bed-08") || !strings.Contains(out, "REFUSED        command") {
		t.Errorf("a refusal ended with %d: %s\n%s", code, errs, out)
	}
	if code, out, errs := send("reboot", "--feedback", "none"); code != 0 || out != "" || !strings.Contains(errs, "is at the broker") {
		t.Errorf("without feedback it ended with %d: %s\n%s", code, errs, out)
	}
	if code, out, errs := send("wait", "--wait", "--timeout", "500ms"); code != 1 || !strings.Contains(errs, "not waited longer than 500ms") || !strings.Contains(errs, "--cancel") || !strings.Contains(out, "QUEUED") {
		t.Errorf("a time-out ended with %d: %s\n%s", code, errs, out)
	}
	if code, out, errs := send("--cancel", "c-1", "--reason", "not needed"); code != 0 || errs != "" || !matches(out, "TIME  CANCELED       command c-1\n") {
		t.Errorf("cancel ended with %d: %s\n%s", code, errs, out)
	}
	if code, _, errs := send("--cancel", "c-2"); code != 1 || !strings.Contains(errs, "had already ended: SUCCEEDED") {
		t.Errorf("cancel of an ended one ended with %d: %s", code, errs)
	}

	code, out, errs = send("reboot", "--wait", "--json")
	if code != 0 || errs != "" {
		t.Fatalf("ended with %d: %s", code, errs)
	}
	var states []string
	for text := range strings.Lines(out) {
		var l map[string]any
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if l["kind"] != "command" || l["device"] != "bed-07" || l["gateway"] != "ward-3" || l["name"] != "reboot" || l["attempts"] != 0.0 {
			t.Errorf("line %s", text)
		}
		states = append(states, l["state"].(string))
	}
	if want := "QUEUED SENT DELIVERED IN_PROGRESS SUCCEEDED"; strings.Join(states, " ") != want {
		t.Errorf("states %q", states)
	}
}

// matches compares, TIME being any time and ID any id.
func matches(got, want string) bool {
	pattern := strings.NewReplacer("TIME", `[0-9-]{10} [0-9:.]{12}`, "ID", `[0-9a-f-]{36}`).Replace(regexp.QuoteMeta(want))
	return regexp.MustCompile(`\A` + pattern + `\z`).MatchString(got)
}

func equalSubmit(a, b wire.Submit) bool {
	x, err := wire.EncodeSubmit(&a)
	y, err2 := wire.EncodeSubmit(&b)
	return err == nil && err2 == nil && bytes.Equal(x, y)
}

func TestCloudSendToAGatewayThatIsOffline(t *testing.T) {
	url := startCloud(t)
	p := newPublisher(t, url)
	p.send(wire.StateTopic("ward-3"), []byte(`{"state":"offline","epoch":"`+testEpoch+`","version":"1","ts":1}`), true)
	var out bytes.Buffer
	errs := &lockedWriter{w: new(bytes.Buffer)}
	said := func() string {
		errs.mu.Lock()
		defer errs.mu.Unlock()
		return errs.w.(*bytes.Buffer).String()
	}
	code := make(chan int, 1)
	go func() {
		code <- run(t.Context(), []string{"cloud", "send", "--url", url, "--gateway", "ward-3", "bed-07", "reboot", "--wait"}, &out, errs)
	}()
	testkit.Eventually(t, 10*time.Second, "it says that the gateway is offline", func() bool {
		return strings.Contains(said(), "gateway ward-3 is offline: the command waits at the broker")
	})
	startFakeGateway(t, url)
	// The gateway's session is new at this broker, so it gets what is repeated.
	select {
	case c := <-code:
		if c != 0 || !strings.Contains(out.String(), "SUCCEEDED") {
			t.Errorf("ended with %d: %s\n%s", c, said(), &out)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("did not end: %s", said())
	}
}

func TestCloudSendSaysWhatIsWrong(t *testing.T) {
	to := []string{"--url", "mqtt://127.0.0.1:1", "--gateway", "g", "d"}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "something is missing"},
		{[]string{"d", "n"}, 2, "--url"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "d", "n"}, 2, "--gateway is missing"},
		{[]string{"--url", "http://127.0.0.1:1", "--gateway", "g", "d", "n"}, 2, "mqtts://"},
		{to, 2, "what is the device to do?"},
		{append(to, "n", "--cancel", "c"), 2, `"n" is too much`},
		{append(to, "n", "m"), 2, `"m" is too much`},
		{append(to, "n", "--wait", "--no-wait"), 2, "exclude"},
		{append(to, "n", "--payload", "a", "--payload-file", "b"), 2, "exclude"},
		{append(to, "n", "--payload-file", "/none/b"), 1, "/none/b"},
		{append(to, "n", "--ttl", "0s"), 2, "--ttl"},
		{append(to, "n", "--ttl", "soon"), 2, "ttl"},
		{append(to, "n", "--execution-timeout", "-5s"), 2, "execution-timeout"},
		{append(to, "n", "--not-before", "tomorrow"), 2, "neither a time"},
		{append(to, "n", "--max-attempts", "-1"), 2, "max_attempts"},
		{append(to, "n", "--feedback", "all"), 2, "none, negative, positive or full"},
		{append(to, "n", "--feedback", "none", "--wait"), 2, "--feedback full"},
		{append(to, "n", "--timeout", "300ms"), 1, "nothing was sent: not waited longer than 300ms"},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"cloud", "send"}, c.args...), &stdout, &stderr); code != c.code || !strings.Contains(stderr.String(), c.says) {
			t.Errorf("%q: ended with %d: %s", c.args, code, &stderr)
		}
	}
}

func TestCloudTailShowsCommandsAndDevices(t *testing.T) {
	url := startCloud(t)
	p := newPublisher(t, url)
	people, programs := startTail(t, "--url", url), startTail(t, "--url", url, "--json")
	people.subscribed(p)
	programs.subscribed(p)
	at := wire.Time{Time: time.UnixMilli(1764000000000)}
	e := wire.CommandEvent{Gateway: "ward-3", Device: "bed-07", ID: "c-1", Name: "reboot", State: "SENT", Previous: "QUEUED", Attempts: 2, At: at, ClockState: "synced"}
	p.publish(wire.CommandEventTopic("ward-3", "bed-07", "c-1", "SENT"), e.Encode())
	d := wire.DeviceEvent{Gateway: "ward-3", Device: "bed-07", State: "offline", At: at, ClockState: "synced", Address: "[::1]:5", Protocol: "MQTT 5", Reason: "keep-alive ran out"}
	p.publish(wire.DeviceEventTopic("ward-3", "bed-07", false), d.Encode())
	testkit.Eventually(t, 10*time.Second, "both are shown", func() bool { return people.printed("OFFLINE") && programs.printed(`"offline"`) })
	people.cancel()
	programs.cancel()
	then := time.UnixMilli(1764000000000).Format("2006-01-02 15:04:05.000")
	want := []string{
		then + "  ward-3      bed-07    -          COMMAND c-1 reboot: SENT  attempt 2",
		then + "  ward-3      bed-07    -          DEVICE OFFLINE  MQTT 5, [::1]:5, keep-alive ran out",
	}
	got := people.wait(0)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
	want = []string{
		`{"kind":"command","topic":"gw/ward-3/evt/cmd/bed-07/c-1/SENT","gateway":"ward-3","id":"c-1","device":"bed-07","state":"SENT","name":"reboot","previous":"QUEUED","at":"2025-11-24T16:00:00.000Z","clockstate":"synced","attempts":2}`,
		`{"kind":"device","topic":"gw/ward-3/evt/device/bed-07/offline","gateway":"ward-3","device":"bed-07","reason":"keep-alive ran out","state":"offline","at":"2025-11-24T16:00:00.000Z","clockstate":"synced","address":"[::1]:5","protocol":"MQTT 5"}`,
	}
	if got := programs.wait(0); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
}
