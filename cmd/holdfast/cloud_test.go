package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
)

const testEpoch = "0190163d-8694-739b-aea5-966c26f8ad91"

// startCloud runs the demo's upstream broker and gives its URL.
func startCloud(t *testing.T) string {
	t.Helper()
	c, err := newDemoCloud(t.TempDir(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- c.run(ctx, sync.OnceFunc(func() { close(up) }), func(string, []byte) error { return nil })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !strings.Contains(err.Error(), wire.ErrFormat.Error()) {
			t.Errorf("the upstream broker ended with %v", err)
		}
	})
	select {
	case <-up:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody could subscribe at the upstream broker within 10 s")
	}
	return "mqtt://" + c.address
}

// publisher publishes with QoS 1, one after the other.
type publisher struct {
	t      *testing.T
	client *mqtt.Client
	acked  chan struct{}
	id     uint16
}

func newPublisher(t *testing.T, url string) *publisher {
	t.Helper()
	p := &publisher{t: t, acked: make(chan struct{}, 1)}
	var err error
	p.client, err = mqtt.Dial(t.Context(), mqtt.ClientOptions{
		Address: strings.TrimPrefix(url, "mqtt://"),
		Connect: mqtt.Connect{ClientID: "gateway", CleanStart: true},
		OnAck:   func(*mqtt.Client, *mqtt.Ack) { p.acked <- struct{}{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.client.Abort()
		<-p.client.Done()
	})
	return p
}

func (p *publisher) publish(topic string, payload []byte) { p.send(topic, payload, false) }

func (p *publisher) send(topic string, payload []byte, retain bool) {
	p.t.Helper()
	p.id++
	if err := p.client.Publish(&mqtt.Publish{QoS: 1, ID: p.id, Topic: []byte(topic), Payload: payload, Retain: retain}); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.acked:
	case <-time.After(10 * time.Second):
		p.t.Fatal("not acknowledged within 10 s")
	}
}

// event publishes a message as the cloudevents format has it.
func (p *publisher) event(seq uint64, topic, payload string) {
	p.t.Helper()
	m := wire.Message{Received: 1764000000000, Device: "bed-07", Topic: topic, Flags: wire.FlagQoS1, Payload: []byte(payload)}
	b, err := wire.AppendCloudEvent(nil, "ward-3", testEpoch, "telemetry", seq, m, false, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	p.publish(wire.MessageTopic("ward-3", "bed-07"), b)
}

func (p *publisher) gap(first, last uint64) {
	p.t.Helper()
	b, err := json.Marshal(wire.Gap{
		Gateway: "ward-3", Epoch: testEpoch, Lane: "telemetry", Upstream: "cloud", First: first, Last: last, Count: last - first + 1, Reason: "max_age",
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.publish(wire.GapTopic("ward-3"), b)
}

// tailing is a holdfast cloud tail that runs.
type tailing struct {
	t      *testing.T
	cancel context.CancelFunc
	lines  *bytes.Buffer // under out's lock until wait has returned
	out    *firstWrite
	stderr bytes.Buffer
	code   chan int
	first  chan struct{} // closed at the first line
}

func startTail(t *testing.T, args ...string) *tailing {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &tailing{t: t, cancel: cancel, lines: new(bytes.Buffer), code: make(chan int, 1), first: make(chan struct{})}
	r.out = &firstWrite{w: r.lines, first: sync.OnceFunc(func() { close(r.first) })}
	go func() { r.code <- run(ctx, append([]string{"cloud", "tail"}, args...), r.out, &r.stderr) }()
	t.Cleanup(cancel)
	return r
}

type firstWrite struct {
	mu    sync.Mutex
	w     io.Writer
	first func()
}

func (w *firstWrite) Write(b []byte) (int, error) {
	defer w.first()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Write(b)
}

// printed says whether text has been printed so far.
func (r *tailing) printed(text string) bool {
	r.out.mu.Lock()
	defer r.out.mu.Unlock()
	return bytes.Contains(r.lines.Bytes(), []byte(text))
}

// subscribed publishes retained states until the tail shows one: then it is there.
func (r *tailing) subscribed(p *publisher) {
	r.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		p.publish(wire.StateTopic("ward-3"), []byte(`{"state":"online","epoch":"`+testEpoch+`","version":"1","ts":1}`))
		select {
		case <-r.first:
			return
		case code := <-r.code:
			r.t.Fatalf("ended with %d: %s", code, &r.stderr)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			r.t.Fatal("no subscription within 10 s")
		}
	}
}

// wait waits for the end and gives what was printed.
func (r *tailing) wait(want int) []string {
	r.t.Helper()
	select {
	case code := <-r.code:
		if code != want {
			r.t.Fatalf("ended with %d: %s", code, &r.stderr)
		}
	case <-time.After(10 * time.Second):
		r.t.Fatal("did not end within 10 s")
	}
	var lines []string
	for line := range strings.Lines(r.lines.String()) {
		if !strings.Contains(line, "ONLINE") && !strings.Contains(line, `"kind":"state"`) {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	return lines
}

func TestCloudTailShowsWhatArrives(t *testing.T) {
	url := startCloud(t)
	p := newPublisher(t, url)
	people, programs := startTail(t, "--url", url, "--count", "4"), startTail(t, "--url", url, "--count", "4", "--json")
	people.subscribed(p)
	programs.subscribed(p)
	p.event(1, "dt/vitals", `{"hr":72}`)
	p.event(1, "dt/vitals", `{"hr":72}`)
	p.publish("gw/ward-3/data/telemetry", []byte("junk"))
	p.event(5, "dt/\x1b[31m", "\x00\xff")
	p.gap(2, 3)
	p.event(4, "dt/text", "it is "+strings.Repeat("warm ", 40))
	p.event(6, "dt/end", "")
	p.event(7, "dt/beyond", "1")

	received := time.UnixMilli(1764000000000).Format("2006-01-02 15:04:05.000")
	want := []string{
		received + "  ward-3      bed-07    telemetry  #1        dt/vitals  {\"hr\":72}",
		received + "  ward-3      bed-07    telemetry  #1        dt/vitals  DUPLICATE, dropped",
		"  -           -         -          CANNOT READ 4 bytes: gw/ward-3/data/telemetry: batch: not in the expected format: ",
		"  ward-3      -         telemetry  HOLE: #2 to #4, 3 messages did not come and no gap was announced so far",
		received + "  ward-3      bed-07    telemetry  #5        dt/·[31m  (2 bytes) 00ff",
		"  ward-3      -         telemetry  GAP: #2 to #3, 2 messages will not come, reason max_age",
		received + "  ward-3      bed-07    telemetry  #4        dt/text  it is " + strings.Repeat("warm ", 13) + "w…  (late)",
		received + "  ward-3      bed-07    telemetry  #6        dt/end  (empty)",
	}
	got := people.wait(0)
	for i := range max(len(want), len(got)) {
		if i >= len(got) || i >= len(want) || !strings.Contains(got[i], want[i]) {
			t.Fatalf("line %d: want %q\ngot %s", i+1, want[min(i, len(want)-1)], strings.Join(got, "\n"))
		}
	}
	if sum := "4 messages in "; !strings.Contains(people.stderr.String(), sum) || !strings.Contains(people.stderr.String(), "1 duplicates removed, 1 gaps announced, 0 missing") {
		t.Errorf("stderr is %s", &people.stderr)
	}

	var lines []map[string]any
	for _, line := range programs.wait(0) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		lines = append(lines, m)
	}
	for i, want := range []map[string]any{
		{
			"kind": "message", "id": "ward-3/" + testEpoch + "/telemetry/1", "gateway": "ward-3", "device": "bed-07", "lane": "telemetry", "seq": 1.0,
			"topic": "dt/vitals", "received": "2025-11-24T16:00:00.000Z", "qos": 1.0,
		},
		{"kind": "duplicate", "seq": 1.0},
		{"kind": "invalid", "topic": "gw/ward-3/data/telemetry", "bytes": 4.0},
		{"kind": "hole", "gateway": "ward-3", "lane": "telemetry", "first": 2.0, "last": 4.0, "count": 3.0},
		{"kind": "message", "seq": 5.0, "topic": "dt/\x1b[31m", "payload_base64": "AP8="},
		{"kind": "gap", "first": 2.0, "last": 3.0, "count": 2.0, "reason": "max_age", "upstream": "cloud", "explained": 2.0},
		{"kind": "message", "seq": 4.0, "late": true, "payload": "it is " + strings.Repeat("warm ", 40)},
		{"kind": "message", "seq": 6.0, "payload": ""},
	} {
		if len(lines) <= i {
			t.Fatalf("only %d lines", len(lines))
		}
		for k, v := range want {
			if lines[i][k] != v {
				t.Errorf("line %d: %s is %v, want %v", i+1, k, lines[i][k], v)
			}
		}
	}
	if len(lines) != 8 {
		t.Errorf("%d lines", len(lines))
	}
}

func TestCloudTailFilters(t *testing.T) {
	url := startCloud(t)
	p := newPublisher(t, url)
	lane := startTail(t, "--url", url, "--lane", "bulk", "--subscribe", "gw/#", "--subscribe", "go")
	topic := startTail(t, "--url", url, "--subscribe", "#", "--topic", "plain/+/x", "--count", "2")
	other := startTail(t, "--url", url, "--gateway", "ward-4", "--count", "1")
	// None of them shows the states of ward-3: wait for a connection each in another way.
	for deadline := time.Now().Add(10 * time.Second); ; {
		p.publish("plain/a/x", []byte("ready"))
		p.publish(wire.StateTopic("ward-4"), []byte(`{"state":"offline"}`))
		b, err := json.Marshal(wire.Gap{Gateway: "ward-3", Epoch: testEpoch, Lane: "bulk", First: 1, Last: 1, Count: 1, Reason: "max_age"})
		if err != nil {
			t.Fatal(err)
		}
		p.publish(wire.GapTopic("ward-3"), b)
		all := true
		for _, r := range []*tailing{lane, topic, other} {
			select {
			case <-r.first:
			case <-time.After(10 * time.Millisecond):
				all = false
			}
		}
		if all {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no subscriptions within 10 s")
		}
	}
	p.event(1, "dt/telemetry", "1") // no lane of theirs, no gateway of theirs, no topic of theirs
	p.publish("plain/b/x", []byte("\x1b]0;owned\a"))
	p.publish("plain/b/y", []byte("y"))
	lane.cancel()
	for _, line := range lane.wait(0) {
		if !strings.Contains(line, "bulk") {
			t.Errorf("--lane bulk shows %s", line)
		}
	}
	got := topic.wait(0)
	if len(got) != 2 || strings.ContainsAny(strings.Join(got, ""), "\x1b\a") {
		t.Errorf("--topic shows %q", got)
	}
	other.cancel()
	for _, line := range other.wait(0) {
		if !strings.Contains(line, "OFFLINE") {
			t.Errorf("--gateway ward-4 shows %s", line)
		}
	}
}

func TestCloudTailGoesOnWhereItEnded(t *testing.T) {
	url := startCloud(t)
	p := newPublisher(t, url)
	state := filepath.Join(t.TempDir(), "state.json")
	first := startTail(t, "--url", url, "--state", state, "--count", "2")
	first.subscribed(p)
	p.event(1, "dt/a", "1")
	p.event(2, "dt/a", "2")
	if got := first.wait(0); len(got) != 2 {
		t.Fatalf("the first shows %q", got)
	}
	p.event(2, "dt/a", "2") // nobody is there; the broker keeps them
	p.event(3, "dt/a", "3")
	second := startTail(t, "--url", url, "--state", state, "--count", "1")
	got := second.wait(0)
	// The broker may not have heard the first's last acknowledgement: then it brings that publish once more.
	for i, line := range got {
		if last := i == len(got)-1; last != strings.Contains(line, "#3") || last == strings.Contains(line, "DUPLICATE") {
			t.Fatalf("the second shows %q", got)
		}
	}
	if len(got) < 2 {
		t.Fatalf("the second shows %q", got)
	}
}

func TestCloudTailSaysWhatIsWrong(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "none", "state.json")
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "--url"},
		{[]string{"--nope"}, 2, "no flag --nope"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "gw/#"}, 2, "gw/#"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "--topic", "a#"}, 2, "a#"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "--subscribe", "a/#/b"}, 2, "a/#/b"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "--count", "-1"}, 2, "count"},
		{[]string{"--url", "http://127.0.0.1:1"}, 2, "mqtts://"},
		{[]string{"--url", "mqtt://127.0.0.1:1", "--state", broken}, 1, broken},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"cloud", "tail"}, c.args...), &stdout, &stderr); code != c.code || !strings.Contains(stderr.String(), c.says) {
			t.Errorf("%q: ended with %d: %s", c.args, code, &stderr)
		}
	}
}
