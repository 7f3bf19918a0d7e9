package cloud_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
)

const epoch = "0190163d-8694-739b-aea5-966c26f8ad91"

// fataler is *testing.T, *testing.B or *rapid.T.
type fataler interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func message(lane string, seq uint64) wire.Message {
	return wire.Message{
		Received: 1764000000000 + int64(seq%1e6), Device: "bed-7", Topic: "dt/icu/bed-7/" + lane, Flags: wire.FlagQoS1,
		Payload: fmt.Appendf(nil, `{"lane":%q,"seq":%d}`, lane, seq),
	}
}

// batch is a publish of the batch format with the messages of lane from first to last.
func batch(t fataler, gateway, lane string, first, last uint64) (topic string, payload []byte) {
	t.Helper()
	return batchBehind(t, gateway, lane, first, last, 0)
}

// batchBehind is batch of messages that went ahead of a backlog from behind on.
func batchBehind(t fataler, gateway, lane string, first, last, behind uint64) (topic string, payload []byte) {
	t.Helper()
	var raw []byte
	for seq := first; seq <= last; seq++ {
		m := message(lane, seq)
		b, err := cbor.Marshal([]any{m.Received, m.Device, m.Topic, m.Flags, m.Payload})
		if err != nil {
			t.Fatal(err)
		}
		raw = append(raw, b...)
	}
	h := wire.BatchHeader{Gateway: gateway, Epoch: epoch, Lane: lane, First: first, Count: int(last - first + 1), Behind: behind}
	return wire.DataTopic(gateway, lane), wire.NewBatchEncoder().Append(nil, h, raw)
}

// event is the same message in the cloudevents format.
func event(t fataler, gateway, lane string, seq uint64) (topic string, payload []byte) {
	t.Helper()
	return eventBehind(t, gateway, lane, seq, 0)
}

// eventBehind is event of a message that went ahead of a backlog from behind on.
func eventBehind(t fataler, gateway, lane string, seq, behind uint64) (topic string, payload []byte) {
	t.Helper()
	b, err := wire.AppendCloudEvent(nil, gateway, epoch, lane, seq, message(lane, seq), false, behind)
	if err != nil {
		t.Fatal(err)
	}
	return wire.MessageTopic(gateway, "bed-7"), b
}

func gap(t fataler, gateway, lane string, first, last uint64) (topic string, payload []byte) {
	t.Helper()
	b, err := json.Marshal(wire.Gap{Gateway: gateway, Epoch: epoch, Lane: lane, First: first, Last: last, Count: last - first + 1, Reason: "max_age"})
	if err != nil {
		t.Fatal(err)
	}
	return wire.GapTopic(gateway), b
}

// told writes deliveries short: "42" a message, "late 42", "again 42", "hole 3-5", "gap 3-5 explains 2".
func told(t fataler, r *cloud.Receiver, topic string, payload []byte) string {
	t.Helper()
	deliveries, err := r.Receive(topic, payload)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, d := range deliveries {
		switch d.Kind {
		case cloud.Message:
			s := fmt.Sprint(d.ID.Seq)
			if d.Late {
				s = "late " + s
			}
			out = append(out, s)
			if want := message(d.ID.Lane, d.ID.Seq); d.ID.Seq > 0 && string(d.Message.Payload) != string(want.Payload) {
				t.Fatalf("%s has payload %s", d.ID, d.Message.Payload)
			}
		case cloud.Duplicate:
			out = append(out, fmt.Sprint("again ", d.ID.Seq))
		case cloud.Hole:
			out = append(out, fmt.Sprintf("hole %d-%d", d.Missing.First, d.Missing.Last))
		case cloud.Gap:
			out = append(out, fmt.Sprintf("gap %d-%d explains %d", d.Missing.First, d.Missing.Last, d.Explained))
		case cloud.State:
			out = append(out, d.State.State)
		case cloud.Event:
			out = append(out, fmt.Sprintf("event %s", d.Payload))
		case cloud.CommandEvent:
			out = append(out, fmt.Sprintf("command %s %s", d.Command.ID, d.Command.State))
		case cloud.DeviceEvent:
			out = append(out, fmt.Sprintf("device %s %s", d.Device.Device, d.Device.State))
		}
	}
	return strings.Join(out, ", ")
}

func TestReceiverTellsAStory(t *testing.T) {
	r := cloud.New(cloud.Config{})
	step := func(want string) func(topic string, payload []byte) {
		t.Helper()
		return func(topic string, payload []byte) {
			t.Helper()
			if got := told(t, r, topic, payload); got != want {
				t.Fatalf("got  %s\nwant %s", got, want)
			}
		}
	}
	// A receiver that begins in the middle misses nothing before that.
	step("10, 11, 12")(batch(t, "g", "telemetry", 10, 12))
	step("13")(event(t, "g", "telemetry", 13))
	step("again 11, again 12, again 13, 14")(batch(t, "g", "telemetry", 11, 14))
	step("hole 15-19, 20, 21")(batch(t, "g", "telemetry", 20, 21))
	step("late 17")(event(t, "g", "telemetry", 17))
	step("gap 15-16 explains 2")(gap(t, "g", "telemetry", 15, 16))
	step("gap 14-18 explains 1")(gap(t, "g", "telemetry", 14, 18))
	step("late 16, again 17, late 18, late 19, again 20, again 21, 22")(batch(t, "g", "telemetry", 16, 22))
	step("gap 25-29 explains 0")(gap(t, "g", "telemetry", 25, 29)) // told before it shows
	step("hole 23-24, hole 30-30, 31")(event(t, "g", "telemetry", 31))
	step("late 5")(event(t, "g", "telemetry", 5)) // from before the beginning: new, but nobody missed it
	step("again 5")(event(t, "g", "telemetry", 5))
	// Lanes, gateways and epochs are apart.
	step("10")(batch(t, "g", "alarm", 10, 10))
	step("10")(batch(t, "h", "telemetry", 10, 10))
	other, err := wire.AppendCloudEvent(nil, "g", "0190163d-8694-739b-aea5-966c26f8ad92", "telemetry", 1, message("telemetry", 1), false, 0)
	if err != nil {
		t.Fatal(err)
	}
	step("1")(wire.MessageTopic("g", "bed-7"), other)
	// What has no id is a message each time.
	step("0")("dt/x", []byte("1"))
	step("0")("dt/x", []byte("1"))
	step("online")(wire.StateTopic("g"), []byte(`{"state":"online","epoch":"e","version":"1","ts":1}`))
	step("event {}")("gw/g/evt/later", []byte("{}"))
	step("command 1 QUEUED")("gw/g/evt/cmd/d/1/QUEUED", (&wire.CommandEvent{Gateway: "g", Device: "d", ID: "1", State: "QUEUED"}).Encode())
	step("device d offline")("gw/g/evt/device/d/offline", (&wire.DeviceEvent{Gateway: "g", Device: "d", State: "offline"}).Encode())
	step("event x")("gw/g/cmd/d/submit", []byte("x"))

	want := cloud.Stats{
		Publishes: 22, Messages: 19, Duplicates: 7, Passthrough: 2, Late: 5, Holes: 3, Gaps: 3, Missing: 3,
	}
	got := r.Stats()
	got.MessageBytes, got.PublishBytes = 0, 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	lanes := []cloud.LaneStat{
		{Gateway: "g", Epoch: epoch, Lane: "alarm", First: 10, Last: 10},
		{Gateway: "g", Epoch: epoch, Lane: "telemetry", First: 10, Last: 31, Missing: 3, Holes: []cloud.Range{{First: 23, Last: 24}, {First: 30, Last: 30}}},
		{Gateway: "g", Epoch: "0190163d-8694-739b-aea5-966c26f8ad92", Lane: "telemetry", First: 1, Last: 1},
		{Gateway: "h", Epoch: epoch, Lane: "telemetry", First: 10, Last: 10},
	}
	if diff := cmp.Diff(lanes, r.Lanes()); diff != "" {
		t.Error(diff)
	}
}

func TestReceiverRefusesWithoutNotingAnything(t *testing.T) {
	r := cloud.New(cloud.Config{MaxRaw: 10_000})
	_, good := batch(t, "g", "telemetry", 1, 3)
	_, large := batch(t, "g", "telemetry", 1, 300)
	_, ev := event(t, "g", "telemetry", 1)
	_, announced := gap(t, "g", "telemetry", 1, 2)
	newer, err := cbor.Marshal(map[int]int{0: 2})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		topic   string
		payload []byte
		want    error
	}{
		"batch cut":               {"gw/g/data/telemetry", good[:len(good)-1], wire.ErrFormat},
		"batch newer":             {"gw/g/data/telemetry", newer, wire.ErrVersion},
		"batch too large":         {"gw/g/data/telemetry", large, wire.ErrFormat},
		"batch of another":        {"gw/h/data/telemetry", good, wire.ErrFormat},
		"batch of another lane":   {"gw/g/data/alarm", good, wire.ErrFormat},
		"event of another":        {"gw/h/msg/bed-7", ev, wire.ErrFormat},
		"event of another device": {"gw/g/msg/bed-8", ev, wire.ErrFormat},
		"event cut":               {"gw/g/msg/bed-7", ev[:50], wire.ErrFormat},
		"gap of another":          {"gw/h/evt/gap", announced, wire.ErrFormat},
		"step of another":         {"gw/h/evt/cmd/d/1/QUEUED", (&wire.CommandEvent{Gateway: "g", Device: "d", ID: "1", State: "QUEUED"}).Encode(), wire.ErrFormat},
		"step of another state":   {"gw/g/evt/cmd/d/1/SENT", (&wire.CommandEvent{Gateway: "g", Device: "d", ID: "1", State: "QUEUED"}).Encode(), wire.ErrFormat},
		"presence of another":     {"gw/g/evt/device/e/online", (&wire.DeviceEvent{Gateway: "g", Device: "d", State: "online"}).Encode(), wire.ErrFormat},
		"step cut":                {"gw/g/evt/cmd/d/1/QUEUED", []byte("{"), wire.ErrFormat},
		"gap cut":                 {"gw/g/evt/gap", announced[:5], wire.ErrFormat},
		"state":                   {"gw/g/state", []byte("{}"), wire.ErrFormat},
	} {
		if got, err := r.Receive(c.topic, c.payload); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.topic) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if got := r.Stats(); got.Invalid != 15 || got.Messages != 0 || got.Gaps != 0 || len(r.Lanes()) != 0 {
		t.Errorf("%+v, %+v", got, r.Lanes())
	}
	if got := told(t, r, "gw/g/data/telemetry", good); got != "1, 2, 3" {
		t.Error(got)
	}
}

// model is a receiver's lane as a map, with all it was told.
type model struct {
	seen, announced map[uint64]bool
	base, sent, max uint64
}

// open are the sequences after one and up to another that neither came nor were announced.
func (m *model) open(after, last uint64) (holes []cloud.Range) {
	for seq := after + 1; seq <= last; seq++ {
		if m.seen[seq] || m.announced[seq] {
			continue
		}
		if n := len(holes); n > 0 && holes[n-1].Last == seq-1 {
			holes[n-1].Last = seq
		} else {
			holes = append(holes, cloud.Range{First: seq, Last: seq})
		}
	}
	return holes
}

func (m *model) missing() []cloud.Range { return m.open(m.base, m.sent) }

func TestReceiverMatchesAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := cloud.New(cloud.Config{})
		lanes := map[string]*model{}
		for _, name := range []string{"g/alarm", "g/bulk", "h/alarm"} {
			lanes[name] = &model{seen: map[uint64]bool{}, announced: map[uint64]bool{}}
		}
		draw := func(t *rapid.T) (m *model, gateway, lane string, first, last uint64) {
			name := rapid.SampledFrom([]string{"g/alarm", "g/bulk", "h/alarm"}).Draw(t, "lane")
			gateway, lane, _ = strings.Cut(name, "/")
			first = rapid.Uint64Range(1, 150).Draw(t, "first")
			return lanes[name], gateway, lane, first, first + rapid.Uint64Range(0, 12).Draw(t, "more")
		}
		// expect is what the receiver must say when first..last come, ahead of a backlog from behind on.
		expect := func(m *model, first, last, behind uint64) string {
			var out []string
			for seq := first; seq <= last; seq++ {
				if m.seen[seq] {
					out = append(out, fmt.Sprint("again ", seq))
					continue
				}
				sent := seq
				if behind > 0 && behind < seq {
					sent = behind - 1
				}
				if m.max == 0 {
					m.base, m.sent = sent, sent
				}
				m.seen[seq] = true
				for _, h := range m.open(max(m.base, m.sent), sent) {
					out = append(out, fmt.Sprintf("hole %d-%d", h.First, h.Last))
				}
				if seq < m.max {
					out = append(out, fmt.Sprint("late ", seq))
				} else {
					out = append(out, fmt.Sprint(seq))
				}
				m.sent, m.max = max(m.sent, sent), max(m.max, seq)
			}
			return strings.Join(out, ", ")
		}
		check := func(got, want string) {
			if got != want {
				t.Fatalf("got  %s\nwant %s", got, want)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"batch": func(t *rapid.T) {
				m, gateway, lane, first, last := draw(t)
				topic, payload := batch(t, gateway, lane, first, last)
				check(told(t, r, topic, payload), expect(m, first, last, 0))
			},
			"batch ahead of a backlog": func(t *rapid.T) {
				m, gateway, lane, first, last := draw(t)
				behind := rapid.Uint64Range(1, first).Draw(t, "behind")
				topic, payload := batchBehind(t, gateway, lane, first, last, behind)
				check(told(t, r, topic, payload), expect(m, first, last, behind))
			},
			"next batch": func(t *rapid.T) {
				m, gateway, lane, first, last := draw(t)
				first, last = m.max+1, m.max+1+last-first
				topic, payload := batch(t, gateway, lane, first, last)
				check(told(t, r, topic, payload), expect(m, first, last, 0))
			},
			"event": func(t *rapid.T) {
				m, gateway, lane, seq, _ := draw(t)
				topic, payload := event(t, gateway, lane, seq)
				check(told(t, r, topic, payload), expect(m, seq, seq, 0))
			},
			"gap": func(t *rapid.T) {
				m, gateway, lane, first, last := draw(t)
				before := m.missing()
				for seq := first; seq <= last; seq++ {
					m.announced[seq] = true
				}
				topic, payload := gap(t, gateway, lane, first, last)
				check(told(t, r, topic, payload), fmt.Sprintf("gap %d-%d explains %d", first, last, total(before)-total(m.missing())))
			},
			"restart": func(t *rapid.T) {
				b, err := json.Marshal(r)
				if err != nil {
					t.Fatal(err)
				}
				again := cloud.New(cloud.Config{})
				if err := json.Unmarshal(b, again); err != nil {
					t.Fatalf("%v in %s", err, b)
				}
				r = again
			},
			"": func(t *rapid.T) {
				missing := uint64(0)
				for _, l := range r.Lanes() {
					m := lanes[l.Gateway+"/"+l.Lane]
					want := cloud.LaneStat{Gateway: l.Gateway, Epoch: epoch, Lane: l.Lane, First: m.base, Last: m.max, Missing: total(m.missing()), Holes: m.missing(), Awaited: total(m.open(max(m.base, m.sent), m.max))}
					if diff := cmp.Diff(want, l); diff != "" {
						t.Fatal(diff)
					}
					missing += l.Missing
				}
				if got := r.Stats().Missing; got != missing {
					t.Fatalf("%d missing, the lanes say %d", got, missing)
				}
			},
		})
	})
}

func total(holes []cloud.Range) (n uint64) {
	for _, h := range holes {
		n += h.Count()
	}
	return n
}

// With more holes than it keeps, a receiver still delivers nothing twice, keeps within its bound, and its state
// can be read back.
func TestReceiverStaysWithinItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const maxRanges = 4
		cfg := cloud.Config{MaxRanges: maxRanges, MaxLanes: 2}
		r := cloud.New(cfg)
		seen := map[uint64]bool{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			seq := rapid.OneOf(rapid.Uint64Range(1, 80), rapid.Uint64Min(1<<64-5), rapid.Uint64Min(1)).Draw(t, "seq")
			if rapid.IntRange(0, 2).Draw(t, "gap") == 0 {
				last := max(seq, seq+rapid.Uint64Range(0, 20).Draw(t, "more"))
				if last-seq+1 == 0 {
					continue
				}
				topic, payload := gap(t, "g", "alarm", seq, last)
				told(t, r, topic, payload)
			} else {
				topic, payload := event(t, "g", "alarm", seq)
				if behind := rapid.Uint64Range(0, seq).Draw(t, "behind"); rapid.Bool().Draw(t, "ahead of a backlog") {
					topic, payload = eventBehind(t, "g", "alarm", seq, behind)
				}
				deliveries, err := r.Receive(topic, payload)
				if err != nil {
					t.Fatal(err)
				}
				d := deliveries[len(deliveries)-1]
				if d.Kind == cloud.Message && seen[seq] {
					t.Fatalf("%d came twice", seq)
				}
				seen[seq] = true
			}
			b, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			var s struct {
				Lanes []struct{ Seen, Announced []any }
			}
			if err := json.Unmarshal(b, &s); err != nil {
				t.Fatal(err)
			}
			if len(s.Lanes) != 1 || len(s.Lanes[0].Seen) > maxRanges || len(s.Lanes[0].Announced) > maxRanges {
				t.Fatalf("kept %s", b)
			}
			again := cloud.New(cfg)
			if err := json.Unmarshal(b, again); err != nil {
				t.Fatalf("%v in %s", err, b)
			}
			if diff := cmp.Diff(r.Lanes(), again.Lanes()); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

func TestReceiverForgetsTheLaneUnusedForLongest(t *testing.T) {
	r := cloud.New(cloud.Config{MaxLanes: 2})
	for _, c := range []struct{ lane, want string }{
		{"a", "1"}, {"b", "1"}, {"a", "again 1"}, {"c", "1"}, {"a", "again 1"}, {"b", "1"},
	} {
		topic, payload := event(t, "g", c.lane, 1)
		if got := told(t, r, topic, payload); got != c.want {
			t.Errorf("lane %s: %s, want %s", c.lane, got, c.want)
		}
	}
}

func TestSavedStateSeesNothingTwice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state.json")
	r := cloud.New(cloud.Config{})
	if err := r.Load(file); err != nil {
		t.Fatalf("no file is a receiver that has seen nothing: %v", err)
	}
	topic, payload := batch(t, "g", "telemetry", 1, 5)
	told(t, r, topic, payload)
	for range 2 { // over nothing, and over a file
		if err := r.Save(file); err != nil {
			t.Fatal(err)
		}
	}
	again := cloud.New(cloud.Config{})
	if err := again.Load(file); err != nil {
		t.Fatal(err)
	}
	if got := told(t, again, topic, payload); got != "again 1, again 2, again 3, again 4, again 5" {
		t.Error(got)
	}
	if left, _ := filepath.Glob(file + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := r.Save(filepath.Join(t.TempDir(), "none", "x")); err == nil {
		t.Error("saved into a folder that is not there")
	}
}

func TestLoadRefusesWhatSaveDidNotWrite(t *testing.T) {
	r := cloud.New(cloud.Config{})
	for _, publish := range [][2]uint64{{10, 12}, {20, 22}} {
		topic, payload := batch(t, "g", "telemetry", publish[0], publish[1])
		told(t, r, topic, payload)
	}
	topic, payload := gap(t, "g", "telemetry", 14, 15)
	told(t, r, topic, payload)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	good := string(b)
	const want = `{"version":2,"lanes":[{"gateway":"g","epoch":"` + epoch + `","lane":"telemetry","floor":0,"base":10,"max":22,"sent":22,"missing":5,` +
		`"seen":[{"first":10,"last":12},{"first":20,"last":22}],"announced":[{"first":14,"last":15}]}]}`
	if diff := cmp.Diff(want, good); diff != "" {
		t.Fatal(diff) // written to disk
	}
	swap := func(old, with string) string { return strings.Replace(good, old, with, 1) }
	for name, c := range map[string]struct {
		state string
		want  error
	}{
		"empty":              {"", wire.ErrFormat},
		"cut":                {good[:30], wire.ErrFormat},
		"newer":              {`{"version":3,"lanes":"other"}`, wire.ErrVersion},
		"no version":         {swap(`"version":2,`, ``), wire.ErrFormat},
		"unknown field":      {swap(`"floor"`, `"flour"`), wire.ErrFormat},
		"seen not rising":    {swap(`"first":20,"last":22`, `"first":5,"last":6`), wire.ErrFormat},
		"seen touching":      {swap(`"first":20,"last":22`, `"first":13,"last":22`), wire.ErrFormat},
		"seen backwards":     {swap(`"first":20,"last":22`, `"first":22,"last":20`), wire.ErrFormat},
		"seen from 0":        {swap(`"first":10,"last":12`, `"first":0,"last":12`), wire.ErrFormat},
		"seen below floor":   {swap(`"floor":0`, `"floor":11`), wire.ErrFormat},
		"max wrong":          {swap(`"max":22`, `"max":23`), wire.ErrFormat},
		"nothing seen":       {swap(`{"first":10,"last":12},{"first":20,"last":22}`, ``), wire.ErrFormat},
		"base above max":     {swap(`"base":10`, `"base":23`), wire.ErrFormat},
		"no base":            {swap(`"base":10`, `"base":0`), wire.ErrFormat},
		"sent above max":     {swap(`"sent":22`, `"sent":23`), wire.ErrFormat},
		"sent below base":    {swap(`"sent":22`, `"sent":9`), wire.ErrFormat},
		"missing wrong":      {swap(`"missing":5`, `"missing":4`), wire.ErrFormat},
		"missing from where": {swap(`"missing":5`, `"missing":6`), wire.ErrFormat},
	} {
		file := filepath.Join(t.TempDir(), "state.json")
		if err := os.WriteFile(file, []byte(c.state), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := r.Load(file); !errors.Is(err, c.want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := json.Marshal(r); err != nil || string(after) != good {
			t.Errorf("%s: the receiver is now %s", name, after)
		}
	}
}

// TestStateOfVersion1IsRead: that version knew no backlog, so that all up to the highest had been sent.
func TestStateOfVersion1IsRead(t *testing.T) {
	r := cloud.New(cloud.Config{})
	const state = `{"version":1,"lanes":[{"gateway":"g","epoch":"` + epoch + `","lane":"telemetry","floor":0,"base":10,"max":22,"missing":5,` +
		`"seen":[{"first":10,"last":12},{"first":20,"last":22}],"announced":[{"first":14,"last":15}]}]}`
	if err := json.Unmarshal([]byte(state), r); err != nil {
		t.Fatal(err)
	}
	topic, payload := batch(t, "g", "telemetry", 24, 24)
	if got := told(t, r, topic, payload); got != "hole 23-23, 24" {
		t.Error(got)
	}
}

// TestBacklogIsAwaited: what newer messages go ahead of is no hole while the gateway still has it to send, and becomes one
// when its turn is over and it has not come.
func TestBacklogIsAwaited(t *testing.T) {
	r := cloud.New(cloud.Config{})
	step := func(want string, first, last, behind uint64) {
		t.Helper()
		topic, payload := batchBehind(t, "g", "telemetry", first, last, behind)
		if got := told(t, r, topic, payload); got != want {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
	}
	awaits := func(missing, awaited uint64) {
		t.Helper()
		if l := r.Lanes()[0]; l.Missing != missing || l.Awaited != awaited {
			t.Fatalf("%+v, want %d missing and %d awaited", l, missing, awaited)
		}
	}
	step("1, 2", 1, 2, 0)
	step("100, 101", 100, 101, 3)
	awaits(0, 97)
	step("late 3, late 4", 3, 4, 0)
	step("102, 103", 102, 103, 5)
	step("hole 5-5, late 6, late 7", 6, 7, 0)
	awaits(1, 92)
	step("late 5", 5, 5, 0)
	topic, payload := gap(t, "g", "telemetry", 8, 90)
	if got := told(t, r, topic, payload); got != "gap 8-90 explains 0" {
		t.Fatal(got)
	}
	awaits(0, 9)
	step("200", 200, 200, 91) // another outage
	awaits(0, 9+96)
	step("late 91, late 92, late 93, late 94, late 95, late 96", 91, 96, 0)
	step("hole 97-99, hole 104-199, 201", 201, 201, 0) // in its turn: all before it was sent
	awaits(99, 0)
}

func TestReceiverIsSafeForManyGoroutines(t *testing.T) {
	r := cloud.New(cloud.Config{})
	const workers, batches, size = 8, 20, 5
	var mu sync.Mutex
	count := map[wire.MessageID]int{}
	var wg sync.WaitGroup
	for range workers { // all of them bring the same
		wg.Go(func() {
			for i := range uint64(batches) {
				deliveries, err := r.Receive(batch(t, "g", "telemetry", i*size+1, (i+1)*size))
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				for _, d := range deliveries {
					if d.Kind == cloud.Message {
						count[d.ID]++
					}
				}
				mu.Unlock()
				_ = r.Stats()
				_ = r.Lanes()
				if _, err := r.MarshalJSON(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(count) != batches*size {
		t.Errorf("%d messages instead of %d", len(count), batches*size)
	}
	for id, n := range count {
		if n != 1 {
			t.Errorf("%s came %d times", id, n)
		}
	}
	if s := r.Stats(); s.Messages != batches*size || s.Duplicates != (workers-1)*batches*size || s.Missing != 0 {
		t.Errorf("%+v", s)
	}
}

func FuzzReceive(f *testing.F) {
	topic, payload := batch(f, "g", "telemetry", 1, 3)
	f.Add(topic, payload)
	topic, payload = event(f, "g", "telemetry", 9)
	f.Add(topic, payload)
	topic, payload = gap(f, "g", "telemetry", 5, 6)
	f.Add(topic, payload)
	f.Add("gw/g/state", []byte(`{"state":"online"}`))
	f.Fuzz(func(t *testing.T, topic string, payload []byte) {
		r := cloud.New(cloud.Config{MaxRaw: 1 << 20, MaxRanges: 2})
		for range 2 {
			deliveries, err := r.Receive(topic, payload)
			if (err == nil) != (len(deliveries) > 0) {
				t.Fatalf("%+v, %v", deliveries, err)
			}
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, cloud.New(cloud.Config{})); err != nil {
			t.Fatalf("%v in %s", err, b)
		}
	})
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"version":1,"lanes":[{"gateway":"g","epoch":"e","lane":"l","floor":3,"base":1,"max":22,"missing":6,"seen":[{"first":20,"last":22}],"announced":[{"first":14,"last":15}]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := cloud.New(cloud.Config{MaxRanges: 3})
		if r.UnmarshalJSON(b) != nil {
			return
		}
		for _, l := range r.Lanes() {
			if l.Gateway == "" || l.Epoch == "" || l.Lane == "" {
				return
			}
			for _, seq := range []uint64{1, l.First, l.Last, l.Last + 2} {
				if seq == 0 {
					continue
				}
				a, _ := r.Receive(event(t, l.Gateway, l.Lane, seq))
				_ = a
			}
		}
		again, err := r.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if err := cloud.New(cloud.Config{}).UnmarshalJSON(again); err != nil {
			t.Fatalf("%v in %s from %s", err, again, b)
		}
	})
}

func BenchmarkReceive(b *testing.B) {
	topic, payload := batch(b, "g", "telemetry", 1, 400)
	r := cloud.New(cloud.Config{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Receive(topic, payload); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(400*float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
}
