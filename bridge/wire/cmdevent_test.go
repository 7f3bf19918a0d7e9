package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/bridge/wire"
)

func drawEvent(t *rapid.T) wire.CommandEvent {
	text := rapid.StringN(0, 20, -1)
	e := wire.CommandEvent{
		Gateway: rapid.StringN(1, 20, -1).Draw(t, "gateway"), Device: text.Draw(t, "device"), ID: rapid.StringN(1, 20, -1).Draw(t, "id"),
		Name: text.Draw(t, "name"), State: rapid.SampledFrom([]string{"QUEUED", "SUCCEEDED", "REFUSED"}).Draw(t, "state"),
		Previous: text.Draw(t, "previous"), Final: rapid.Bool().Draw(t, "final"), ClockState: wire.ClockSynced,
		At:       wire.Time{Time: time.UnixMilli(rapid.Int64Range(0, 253402300799999).Draw(t, "at")).UTC()},
		Attempts: rapid.IntRange(0, 1000).Draw(t, "attempts"), Reason: text.Draw(t, "reason"), Code: text.Draw(t, "code"),
		Late: rapid.Bool().Draw(t, "late"), Repeat: rapid.Bool().Draw(t, "repeat"), Source: text.Draw(t, "source"),
	}
	if rapid.Bool().Draw(t, "put right") {
		e.Uncorrected = &wire.Time{Time: time.UnixMilli(rapid.Int64Range(0, 1e12).Draw(t, "shown")).UTC()}
	}
	if rapid.Bool().Draw(t, "progress") {
		e.Progress = &wire.EventProgress{Text: text.Draw(t, "text")}
		if rapid.Bool().Draw(t, "percent") {
			n := rapid.IntRange(0, 100).Draw(t, "n")
			e.Progress.Percent = &n
		}
	}
	e.SetResult(rapid.SliceOfN(rapid.Byte(), 0, 50).Draw(t, "result"), text.Draw(t, "content type"))
	return e
}

// TestEventIsWhatJSONMakesOfIt holds the hand-written encoder to the struct's tags.
func TestEventIsWhatJSONMakesOfIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := rapid.Custom(drawEvent).Draw(t, "event")
		b := e.Encode()
		var got, want any
		reference, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(reference, &want); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		back, err := wire.DecodeCommandEvent(b)
		if diff := cmp.Diff(e, back); err != nil || diff != "" {
			t.Fatalf("%v %s", err, diff)
		}
	})
}

func TestEventsArePutRight(t *testing.T) {
	const shown, wrongBy = 20_123, 1764000000000
	trap := `","at":"1970-01-01T00:00:20.123Z","clockstate":"unsynced"`
	step := wire.CommandEvent{
		Gateway: trap, Device: "d", ID: "i", State: "FAILED", ClockState: wire.ClockUnsynced, At: wire.Time{Time: time.UnixMilli(shown)}, Reason: trap,
		Result: json.RawMessage(`{"at":"1970-01-01T00:00:20.123Z","clockstate":"unsynced"}`),
	}
	presence := wire.DeviceEvent{Gateway: "g", Device: trap, State: wire.StateOnline, ClockState: wire.ClockUnsynced, At: step.At, Reason: trap}
	wrongStep, wrongPresence := step.Encode(), presence.Encode()
	kept := bytes.Clone(wrongStep)
	step.ClockState, presence.ClockState = wire.ClockSynced, wire.ClockSynced
	step.Uncorrected = &wire.Time{Time: time.UnixMilli(shown)}
	step.At = wire.Time{Time: time.UnixMilli(shown + wrongBy)}
	presence.At, presence.Uncorrected = step.At, step.Uncorrected
	if got := wire.CorrectEvent(wrongStep, wrongBy); string(got) != string(step.Encode()) {
		t.Errorf("%s", got)
	}
	if !bytes.Equal(kept, wrongStep) {
		t.Error("what was given has changed")
	}
	if got := wire.CorrectEvent(wrongPresence, wrongBy); string(got) != string(presence.Encode()) {
		t.Errorf("%s", got)
	}
	for _, wrong := range [][]byte{wrongStep, wrongPresence} {
		for _, by := range []int64{wrongBy, 1, -1e15} {
			if again := wire.UncorrectEvent(wire.CorrectEvent(wrong, by)); !bytes.Equal(again, wrong) {
				t.Errorf("%s, put right by %d and back, became %s", wrong, by, again)
			}
		}
		if same := wire.UncorrectEvent(wrong); !bytes.Equal(same, wrong) {
			t.Errorf("%s became %s", wrong, same)
		}
	}
	for _, other := range []string{"", "{}", `{"clockstate":"unsynced"}`, `","clockstate":"unsynced"`, string(step.Encode()), `{"at":"yesterday, at some time ","clockstate":"unsynced"`} {
		if got := wire.CorrectEvent([]byte(other), wrongBy); string(got) != other {
			t.Errorf("%s became %s", other, got)
		}
		if got := wire.UncorrectEvent([]byte(other)); string(got) != other && other != string(step.Encode()) {
			t.Errorf("%s became %s", other, got)
		}
	}
}

func TestDeviceEvent(t *testing.T) {
	for _, e := range []wire.DeviceEvent{
		{Gateway: "g", Device: "d", State: "online", At: wire.Time{Time: time.UnixMilli(5).UTC()}, ClockState: "synced", Address: "[::1]:1", Protocol: "MQTT 5"},
		{Gateway: "g\"", Device: "d\\", State: "offline", ClockState: "unsynced", Reason: "kicked\n", At: wire.Time{Time: time.UnixMilli(7).UTC()}},
	} {
		b := e.Encode()
		reference, err := json.Marshal(e)
		if err != nil || string(reference) != string(b) {
			t.Errorf("%s, want %s", b, reference)
		}
		if back, err := wire.DecodeDeviceEvent(b); err != nil || back != e {
			t.Errorf("%s: %+v, %v", b, back, err)
		}
	}
	for _, in := range []string{``, `[]`, `{}`, `{"gateway":"g","device":"d","state":"gone","at":"2026-01-31T16:00:00Z"}`, `{"gateway":"g","device":"d","state":"online","at":5}`} {
		if _, err := wire.DecodeDeviceEvent([]byte(in)); !errors.Is(err, wire.ErrFormat) {
			t.Errorf("%s: %v", in, err)
		}
	}
	for _, in := range []string{``, `null`, `{}`, `{"gateway":"g","device":"d","state":"QUEUED"}`, `{"gateway":"g","id":"i","state":"QUEUED","at":"x"}`} {
		if _, err := wire.DecodeCommandEvent([]byte(in)); !errors.Is(err, wire.ErrFormat) {
			t.Errorf("%s: %v", in, err)
		}
	}
	if e, err := wire.DecodeCommandEvent([]byte(`{"gateway":"g","device":"d","state":"REFUSED","code":"invalid_command","at":"2026-01-31T16:00:00Z","later":1}`)); err != nil || e.Code != "invalid_command" {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestResultsComeBack(t *testing.T) {
	for _, c := range []struct{ payload, contentType, json string }{
		{"", "", ""},
		{`{"a": 1}`, "", `{"a": 1}`},
		{`{"a": 1}`, "application/json", `{"a": 1}`},
		{`{"a": 1}`, "text/plain", `"{\"a\": 1}"`},
		{`done`, "", `"done"`},
		{`42`, "", `42`},
		{`null`, "", `"null"`},
		{`"quoted"`, "", `"\"quoted\""`},
		{`"quoted"`, "application/json", `"quoted"`},
		{`not JSON`, "application/json", ``},
		{"\x00\xff", "", ``},
		{" 1", "", `" 1"`},
	} {
		var e wire.CommandEvent
		e.SetResult([]byte(c.payload), c.contentType)
		if string(e.Result) != c.json || e.ContentType != c.contentType {
			t.Errorf("%q of %q: result %s", c.payload, c.contentType, e.Result)
		}
		e.Gateway, e.ID, e.State = "g", "i", "SUCCEEDED"
		back, err := wire.DecodeCommandEvent(e.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := back.ResultPayload(); err != nil || string(got) != c.payload {
			t.Errorf("%q of %q came back as %q, %v", c.payload, c.contentType, got, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		payload := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "payload")
		e := wire.CommandEvent{Gateway: "g", ID: "i", State: "FAILED"}
		e.SetResult(payload, rapid.SampledFrom([]string{"", "application/json", "text/plain"}).Draw(t, "content type"))
		back, err := wire.DecodeCommandEvent(e.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := back.ResultPayload(); err != nil || string(got) != string(payload) {
			t.Fatalf("%q came back as %q, %v", payload, got, err)
		}
	})
	if _, err := (&wire.CommandEvent{ResultBase64: "?"}).ResultPayload(); !errors.Is(err, wire.ErrFormat) {
		t.Errorf("got %v", err)
	}
}

func TestEncodingAnEventAllocatesOnce(t *testing.T) {
	e := wire.CommandEvent{
		Gateway: "ward-3-east", Device: "bed-07", ID: "0190163d-8694-739b-aea5-966c26f8ad91", Name: "reboot", State: "DELIVERED", Previous: "SENT",
		At: wire.Time{Time: time.UnixMilli(1764000000123)}, ClockState: "synced", Attempts: 1, Source: "upstream cloud",
	}
	if n := testing.AllocsPerRun(100, func() { _ = e.Encode() }); n > 1 {
		t.Errorf("%v allocations", n)
	}
	topic := []byte("dt/icu/bed-07/vitals")
	if n := testing.AllocsPerRun(100, func() { wire.ParseAnswerTopic(topic) }); n > 0 {
		t.Errorf("%v allocations for a topic that is no answer", n)
	}
}

func TestCommandTopics(t *testing.T) {
	for got, want := range map[string]string{
		wire.CommandTopic("ward-3", "bed-7", wire.ActionSubmit): "gw/ward-3/cmd/bed-7/submit",
		wire.CommandTopic("a/b", "c+", wire.ActionCancel):       "gw/a%2Fb/cmd/c%2B/cancel",
		wire.CommandFilter("a/b"):                               "gw/a%2Fb/cmd/+/+",
		wire.CommandEventTopic("g", "d/e", "i#", "QUEUED"):      "gw/g/evt/cmd/d%2Fe/i%23/QUEUED",
		wire.CommandEventTopic("g", "", "", wire.StateRefused):  "gw/g/evt/cmd/-/-/REFUSED",
		wire.CommandEventFilter("", "", ""):                     "gw/+/evt/cmd/+/+/+",
		wire.CommandEventFilter("g", "d/e", "i"):                "gw/g/evt/cmd/d%2Fe/i/+",
		wire.DeviceEventTopic("g", "d", true):                   "gw/g/evt/device/d/online",
		wire.DeviceEventTopic("g", "d", false):                  "gw/g/evt/device/d/offline",
		wire.DeviceEventFilter("g", ""):                         "gw/g/evt/device/+/+",
		wire.RequestTopic("bed-7", "c-1", "reboot"):             "cmd/bed-7/req/c-1/reboot",
		wire.RequestFilter("bed/7"):                             "cmd/bed%2F7/req/#",
		wire.AnswerTopic("bed-7", "c-1", "succeeded"):           "cmd/bed-7/res/c-1/succeeded",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for _, topic := range []string{
		"", "gw/g/cmd", "gw/g/cmd/d", "gw/g/cmd/d/", "gw/g/cmd//submit", "gw//cmd/d/submit", "gw/g/cmd/d/submit/x", "gw/%/cmd/d/submit", "gw/g/cmd/%2f/submit", "x/g/cmd/d/submit",
	} {
		if g, d, a, ok := wire.ParseCommandTopic(topic); ok {
			t.Errorf("%q was read as %q, %q, %q", topic, g, d, a)
		}
	}
	if g, d, id, s, ok := wire.ParseCommandEventTopic("gw/g/evt/cmd/-/-/REFUSED"); !ok || g != "g" || d != "" || id != "" || s != "REFUSED" {
		t.Errorf("%q %q %q %q %v", g, d, id, s, ok)
	}
	for _, topic := range []string{"", "cmd/d/res/i", "cmd/d/res/i/k/x", "cmd//res/i/k", "cmd/d/req/i/k", "cmd/d/x/res/k", "xcmd/d/res/i/k", "cmd/d/res//k", "cmd/%64/res/i/k"} {
		if d, i, k, ok := wire.ParseAnswerTopic([]byte(topic)); ok {
			t.Errorf("%q was read as %q, %q, %q", topic, d, i, k)
		}
	}
	for topic, want := range map[string]wire.Topic{
		"gw/g/evt/cmd/d/i/SENT":     {Kind: wire.KindCommandEvent, Gateway: "g", Name: "d", ID: "i", State: "SENT"},
		"gw/g/evt/cmd/d/i":          {Kind: wire.KindEvent, Gateway: "g", Name: "cmd/d/i"},
		"gw/g/evt/device/d/online":  {Kind: wire.KindDeviceEvent, Gateway: "g", Name: "d", State: "online"},
		"gw/g/evt/device/d/offline": {Kind: wire.KindDeviceEvent, Gateway: "g", Name: "d", State: "offline"},
		"gw/g/evt/device/d/gone":    {Kind: wire.KindEvent, Gateway: "g", Name: "device/d/gone"},
	} {
		if got := wire.ParseTopic(topic); got != want {
			t.Errorf("%q: %+v", topic, got)
		}
	}
}

func FuzzCommandTopics(f *testing.F) {
	f.Add("a", "b/c", "d+")
	f.Add("-", "%", "#")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		if a == "" || b == "" || c == "" {
			return
		}
		if x, y, z, ok := wire.ParseCommandTopic(wire.CommandTopic(a, b, wire.CommandAction(c))); !ok || x != a || y != b || string(z) != c {
			t.Fatalf("command: %q %q %q", x, y, z)
		}
		if x, y, z, ok := wire.ParseRequestTopic(wire.RequestTopic(a, b, c)); !ok || x != a || y != b || z != c {
			t.Fatalf("request: %q %q %q", x, y, z)
		}
		if x, y, z, ok := wire.ParseAnswerTopic([]byte(wire.AnswerTopic(a, b, c))); !ok || x != a || y != b || z != c {
			t.Fatalf("answer: %q %q %q", x, y, z)
		}
		if x, y, z, s, ok := wire.ParseCommandEventTopic(wire.CommandEventTopic(a, b, c, "SENT")); b != "-" && c != "-" && (!ok || x != a || y != b || z != c || s != "SENT") {
			t.Fatalf("event: %q %q %q %q", x, y, z, s)
		}
		if x, y, online, ok := wire.ParseDeviceEventTopic(wire.DeviceEventTopic(a, b, true)); !ok || x != a || y != b || !online {
			t.Fatalf("device: %q %q", x, y)
		}
	})
}

func FuzzDecodeCommandEvent(f *testing.F) {
	e := wire.CommandEvent{Gateway: "g", Device: "d", ID: "i", State: "SUCCEEDED", Attempts: 1, Progress: &wire.EventProgress{Text: "t"}}
	e.SetResult([]byte(`{"a":1}`), "")
	f.Add(e.Encode())
	f.Add((&wire.DeviceEvent{Gateway: "g", Device: "d", State: "online"}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := wire.DecodeDeviceEvent(b); err == nil {
			if back, err := wire.DecodeDeviceEvent(e.Encode()); err != nil || back.Device != e.Device {
				t.Fatalf("%q: %v", b, err)
			}
		}
		e, err := wire.DecodeCommandEvent(b)
		if err != nil {
			return
		}
		back, err := wire.DecodeCommandEvent(e.Encode())
		e.At, back.At = wire.Time{}, wire.Time{} // milliseconds only
		if diff := cmp.Diff(e, back); err != nil || diff != "" {
			t.Fatalf("%q: %v %s", b, err, diff)
		}
	})
}

func BenchmarkCommandEvent(b *testing.B) {
	e := wire.CommandEvent{
		Gateway: "ward-3-east", Device: "bed-07", ID: "0190163d-8694-739b-aea5-966c26f8ad91", Name: "reboot", State: "DELIVERED", Previous: "SENT",
		At: wire.Time{Time: time.UnixMilli(1764000000123)}, ClockState: "synced", Attempts: 1, Source: "upstream cloud",
	}
	b.ReportAllocs()
	for b.Loop() {
		_ = e.Encode()
	}
}

func BenchmarkDecodeSubmit(b *testing.B) {
	in := []byte(`{"id":"0190163d-8694-739b-aea5-966c26f8ad91","name":"setpoint","payload":{"celsius":21.5,"ramp":[1,2,3]},"ttl":"1h30m"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.DecodeSubmit(in); err != nil {
			b.Fatal(err)
		}
	}
}
