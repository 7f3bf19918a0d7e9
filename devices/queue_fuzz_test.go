package devices_test

import (
	"bytes"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"holdfast/devices"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// commandRows returns the values of a kind of rows of a queue that has seen much.
func commandRows(t testing.TB, kind byte) (values [][]byte) {
	r := openQueueRig(t, newCrashableFS(), newFakeClock(), devices.QueueConfig{})
	defer r.close()
	l := r.link("dev")
	r.submit(devices.Request{ID: "a", Payload: []byte("payload"), SupersedeKey: "k", ContentType: "text/plain", Source: "api", Upstream: "cloud", Feedback: devices.FeedbackNone})
	r.ack(l)
	r.mustAnswer("dev", "a", devices.AnswerProgress, `{"percent":3,"text":"three"}`)
	r.submit(devices.Request{ID: "b", Urgent: true, OneWay: true, NotBefore: r.clock.wall.Add(time.Hour)})
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, `{"x":1}`)
	r.submit(devices.Request{ID: "c"})
	r.clock.reboot(time.Hour)
	r.crash()
	r.tick()
	if err := r.store.Scan([]byte{kv.PrefixCommand, kind}, func(_, v []byte) error {
		values = append(values, bytes.Clone(v))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return values
}

func FuzzCommandRow(f *testing.F) {
	for _, kind := range []byte{2, 3} {
		for _, v := range commandRows(f, kind) {
			f.Add(v)
		}
	}
	store := openTestStore(f, newCrashableFS())
	f.Cleanup(func() { store.Close() })
	clk, err := clock.Open(store, clock.Config{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if alone, whole, err := devices.CommandRowState(b); err == nil && alone != 0 && alone != whole {
			t.Fatalf("%x: state %v alone, %v whole", b, alone, whole)
		}
		again, err := devices.CommandRowAgain(clk, b)
		if err != nil {
			return
		}
		if alone, whole, err := devices.CommandRowState(again); err != nil || alone != whole {
			t.Fatalf("%x: state %v alone, %v whole, %v", again, alone, whole, err)
		}
		twice, err := devices.CommandRowAgain(clk, again)
		if err != nil || !bytes.Equal(again, twice) {
			t.Fatalf("%x became %x, then %x, %v", b, again, twice, err)
		}
	})
}

func FuzzCommandBody(f *testing.F) {
	for _, v := range commandRows(f, 1) {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := devices.BodyRow(b); err == nil && len(p) > len(b) {
			t.Fatalf("%d bytes out of %d", len(p), len(b))
		}
	})
}

func FuzzProgress(f *testing.F) {
	for _, s := range []string{"", "40", "-1", "1e2", "0.5", `{"percent":40,"text":"half way"}`, `{"percent":null}`, `"text"`, "text", "NaN", "[1]", `{"percent":`} {
		f.Add([]byte(s), "")
	}
	m, err := cbor.Marshal(map[string]any{"percent": 7, "text": "seven", "more": []int{1}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m, "")
	f.Add([]byte{0x18, 0x28}, "application/cbor")
	f.Fuzz(func(t *testing.T, b []byte, contentType string) {
		p, err := devices.ParseProgress(b, contentType)
		if err != nil {
			return
		}
		if p.Percent < -1 || p.Percent > 100 || len(p.Text) > devices.MaxProgressText || !utf8.ValidString(p.Text) {
			t.Fatalf("%q is %+v", b, p)
		}
	})
}

func TestParseProgress(t *testing.T) {
	m, err := cbor.Marshal(map[string]any{"percent": 7, "text": "seven", "more": []int{1}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		payload, contentType string
		want                 devices.Progress
		bad                  bool
	}{
		{"", "", devices.Progress{Percent: -1}, false},
		{" 40 \n", "", devices.Progress{Percent: 40}, false},
		{"99.6", "", devices.Progress{Percent: 100}, false},
		{"100", "", devices.Progress{Percent: 100}, false},
		{"0", "", devices.Progress{Percent: 0}, false},
		{"101", "", devices.Progress{}, true},
		{"-1", "", devices.Progress{}, true},
		{`{"percent":40}`, "", devices.Progress{Percent: 40}, false},
		{`{"text":"x","stage":{"n":1}}`, "application/json", devices.Progress{Percent: -1, Text: "x"}, false},
		{`{"percent":"40"}`, "", devices.Progress{}, true},
		{`{"percent":1e999}`, "", devices.Progress{}, true},
		{`{"percent":40`, "", devices.Progress{}, true},
		{`"in quotes"`, "", devices.Progress{Percent: -1, Text: "in quotes"}, false},
		{"half way", "text/plain", devices.Progress{Percent: -1, Text: "half way"}, false},
		{string(bytes.Repeat([]byte("x"), 257)), "", devices.Progress{}, true},
		{"\xff\xfe", "", devices.Progress{}, true},
		{"a\x00", "", devices.Progress{}, true},
		{string(m), "", devices.Progress{Percent: 7, Text: "seven"}, false},
		{string(m), "application/cbor", devices.Progress{Percent: 7, Text: "seven"}, false},
		{string(m[:len(m)-1]), "", devices.Progress{}, true},
		{"\x18\x28", "application/cbor", devices.Progress{Percent: 40}, false},
		{"\xf9\x7e\x00", "application/cbor", devices.Progress{}, true}, // NaN
	} {
		got, err := devices.ParseProgress([]byte(c.payload), c.contentType)
		if c.bad != (err != nil) || !c.bad && *got != c.want {
			t.Errorf("%q is %+v, %v; want %+v, refused %v", c.payload, got, err, c.want, c.bad)
		}
	}
}
