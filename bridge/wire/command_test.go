package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/bridge/wire"
)

func asCBOR(t testing.TB, v any) []byte {
	t.Helper()
	b, err := cbor.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var whole = wire.Submit{
	ID: "c-1", Name: "reboot", Payload: []byte("now"), ContentType: "text/plain", TTL: wire.Duration(90 * time.Minute), HasTTL: true,
	NotBefore: wire.Time{Time: time.Date(2026, 1, 31, 16, 0, 0, 0, time.UTC)}, ExecutionTimeout: wire.Duration(2500 * time.Millisecond),
	MaxAttempts: 3, OneWay: true, Urgent: true, SupersedeKey: "setpoint", Feedback: "negative",
}

func TestSubmitIsRead(t *testing.T) {
	value := map[string]any{
		"id": "c-1", "name": "reboot", "payload": "now", "content_type": "text/plain", "ttl": "1h30m", "not_before": "2026-01-31T17:00:00+01:00",
		"execution_timeout": 2.5, "max_attempts": 3, "one_way": true, "urgent": true, "supersede_key": "setpoint", "feedback": "negative",
	}
	asJSON, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	with := func(key string, v any) []byte {
		m := map[string]any{}
		for k, v := range value {
			m[k] = v
		}
		m[key] = v
		return asCBOR(t, m)
	}
	base64 := map[string]any{}
	for k, v := range value {
		base64[k] = v
	}
	delete(base64, "payload")
	base64["payload_base64"] = "bm93"
	for name, b := range map[string][]byte{
		"json":               asJSON,
		"json with space":    append([]byte(" \r\n\t"), bytes.ReplaceAll(asJSON, []byte(`,"`), []byte(" ,\n \""))...),
		"cbor":               asCBOR(t, value),
		"cbor, base64":       asCBOR(t, base64),
		"cbor, bytes":        with("payload", []byte("now")),
		"cbor, number":       with("ttl", 5400),
		"cbor, float":        with("ttl", 5400.0),
		"cbor, half":         with("execution_timeout", float32(2.5)),
		"cbor, tag 0":        with("not_before", cbor.Tag{Number: 0, Content: "2026-01-31T16:00:00Z"}),
		"cbor, tag 1":        with("not_before", cbor.Tag{Number: 1, Content: 1769875200}),
		"cbor, tag 1, float": with("not_before", cbor.Tag{Number: 1, Content: 1769875200.0}),
		"cbor that says so":  append([]byte{0xd9, 0xd9, 0xf7}, asCBOR(t, value)...),
	} {
		got, err := wire.DecodeSubmit(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(whole, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	// A map and a text whose lengths are not told in advance (RFC 8949 §3.2).
	got, err := wire.DecodeSubmit([]byte("\xbf\x64name\x7f\x62re\x64boot\xff\xff"))
	if err != nil || got.Name != "reboot" || got.HasTTL || got.TTL != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestPayloadOfASubmit(t *testing.T) {
	for _, c := range []struct {
		in                   []byte
		payload, contentType string
	}{
		{[]byte(`{"name":"n"}`), "", ""},
		{[]byte(`{"name":"n","payload":""}`), "", ""},
		{[]byte(`{"name":"n","payload":"{\"a\":1}"}`), `{"a":1}`, ""},
		{[]byte(`{"name":"n","payload":"{\"a\":1}","content_type":"application/json"}`), `{"a":1}`, "application/json"},
		{[]byte(`{"name":"n","payload": { "a" : 1.50 } ,"urgent":true}`), `{ "a" : 1.50 }`, "application/json"},
		{[]byte(`{"name":"n","payload":[1,"}",2] }`), `[1,"}",2]`, "application/json"},
		{[]byte(`{"name":"n","payload":12e3}`), `12e3`, "application/json"},
		{[]byte(`{"name":"n","payload":null}`), `null`, "application/json"},
		{[]byte(`{"content_type":"application/senml+json","name":"n","payload":[]}`), `[]`, "application/senml+json"},
		{[]byte(`{"name":"n","payload_base64":"AP8="}`), "\x00\xff", ""},
		{[]byte(`{"name":"n","payload":"\ud83d\ude00 \ufffd \\ud800"}`), "😀 \ufffd \\ud800", ""},
		{asCBOR(t, map[string]any{"name": "n", "payload": []byte{0, 255}}), "\x00\xff", ""},
		{asCBOR(t, map[string]any{"name": "n", "payload": map[string]int{"a": 1}}), "\xa1\x61a\x01", "application/cbor"},
		{asCBOR(t, map[string]any{"name": "n", "payload": 1.5, "content_type": "x/y"}), "\xfb\x3f\xf8\x00\x00\x00\x00\x00\x00", "x/y"},
		{asCBOR(t, map[string]any{"name": "n", "payload": math.NaN()}), "\xf9\x7e\x00", "application/cbor"},
	} {
		got, err := wire.DecodeSubmit(c.in)
		if err != nil || string(got.Payload) != c.payload || got.ContentType != c.contentType {
			t.Errorf("%q: payload %q, content type %q, %v", c.in, got.Payload, got.ContentType, err)
		}
		clear(c.in)
		if string(got.Payload) != c.payload {
			t.Errorf("the payload %q lies in what was read", c.payload)
		}
	}
}

func TestTTLOfZeroIsNotNone(t *testing.T) {
	for in, want := range map[string]wire.Submit{
		`{"name":"n"}`:                 {Name: "n"},
		`{"name":"n","ttl":0}`:         {Name: "n", HasTTL: true},
		`{"name":"n","ttl":"0s"}`:      {Name: "n", HasTTL: true},
		`{"name":"n","ttl":-1.5}`:      {Name: "n", HasTTL: true, TTL: wire.Duration(-1500 * time.Millisecond)},
		`{"name":"n","ttl":"-1h"}`:     {Name: "n", HasTTL: true, TTL: wire.Duration(-time.Hour)},
		`{"name":"n","ttl":1e-3}`:      {Name: "n", HasTTL: true, TTL: wire.Duration(time.Millisecond)},
		`{"name":"n","ttl":1000000.5}`: {Name: "n", HasTTL: true, TTL: wire.Duration(1000000500 * time.Millisecond)},
	} {
		got, err := wire.DecodeSubmit([]byte(in))
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v %s", in, err, diff)
		}
	}
}

// TestSubmitIsStrict: each error names the key, or what to send instead, and the id survives for the refusal.
func TestSubmitIsStrict(t *testing.T) {
	j := func(rest string) []byte { return []byte(`{"id":"c-1","name":"n",` + rest + `}`) }
	c := func(key any, v any) []byte {
		return asCBOR(t, map[any]any{"id": "c-1", "name": "n", key: v})
	}
	twice := append([]byte{0xa3}, asCBOR(t, "name")...)
	for _, v := range []any{"a", "name", "b", "urgent", true} {
		twice = append(twice, asCBOR(t, v)...)
	}
	for _, test := range []struct {
		in   []byte
		want string
		id   bool // it can be told
	}{
		{j(`"ttl_s":5`), `there is no key "ttl_s"; there are id, name, payload, `, true},
		{j(`"Urgent":true`), `"Urgent"`, true},
		{c("extra", 1), `"extra"`, true},
		{c(7, 1), `keys must be text`, false},
		{j(`"urgent":true,"urgent":true`), `"urgent" stands there twice`, true},
		{j(`"urgent":true,"\u0075rgent":true`), `"urgent" stands there twice`, true},
		{twice, `"name" stands there twice`, false},
		{j(`"urgent":"true"`), `"urgent" must be true or false, but is text`, true},
		{j(`"one_way":1`), `"one_way" must be true or false, but is a number`, true},
		{j(`"urgent":null`), `"urgent" must be true or false, but is null`, true},
		{c("urgent", nil), `"urgent" must be true or false, but is null`, true},
		{[]byte(`{"id":"c-1","name":7}`), `"name" must be text, but is a number`, true},
		{[]byte(`{"name":["n"],"id":"c-1"}`), `"name" must be text, but is an array or a map`, true},
		{asCBOR(t, map[string]any{"name": []byte("n")}), `"name" must be text, but is bytes`, false},
		{[]byte(`{"name":"n","id":7}`), `"id" must be text`, false},
		{[]byte(`{"id":"c-1"}`), `"name" is missing`, true},
		{[]byte(`{"id":"c-1","name":""}`), `"name" is missing`, true},
		{j(`"payload":"a","payload_base64":"YQ=="`), `"payload" and "payload_base64" are both there`, true},
		{j(`"payload_base64":"YQ"`), `"payload_base64"`, true},
		{j(`"payload_base64":"YR=="`), `"payload_base64"`, true},
		{j(`"payload_base64":"_w=="`), `padding (RFC 4648 §4)`, true},
		{j(`"payload_base64":7`), `"payload_base64" must be text`, true},
		{j(`"payload":"\ud800"`), `half a surrogate`, true},
		{j(`"payload":"\udc00\ud800 "`), `half a surrogate`, true},
		{j(`"ttl":"5"`), `"ttl": "5" is not a duration: write "1h30m"`, true},
		{j(`"ttl":"5 days"`), `not a duration`, true},
		{j(`"ttl":""`), `not a duration`, true},
		{j(`"ttl":true`), `"ttl" must be a duration`, true},
		{j(`"ttl":1e300`), `"ttl"`, true},
		{j(`"ttl":9223372036854775807`), `292 years`, true},
		{c("ttl", math.NaN()), `"ttl": not a number`, true},
		{c("ttl", math.Inf(1)), `"ttl": not a number`, true},
		{c("ttl", cbor.Tag{Number: 1, Content: 5}), `"ttl" must be a duration`, true},
		{j(`"execution_timeout":0`), `"execution_timeout" must be longer than 0`, true},
		{j(`"execution_timeout":"-5s"`), `"execution_timeout" must be longer than 0`, true},
		{j(`"max_attempts":0`), `"max_attempts" is 0`, true},
		{j(`"max_attempts":-1`), `"max_attempts" is -1`, true},
		{j(`"max_attempts":1.5`), `"max_attempts" must be a whole number`, true},
		{j(`"max_attempts":1e30`), `"max_attempts"`, true},
		{c("max_attempts", uint64(math.MaxUint64)), `"max_attempts"`, true},
		{j(`"not_before":"tomorrow"`), `"not_before": "tomorrow" is not a time`, true},
		{j(`"not_before":"2026-01-31 16:00:00Z"`), `RFC 3339`, true},
		{j(`"not_before":"2026-01-31T16:00:00"`), `RFC 3339`, true},
		{j(`"not_before":1769875200`), `"not_before" must be a time in RFC 3339`, true},
		{c("not_before", cbor.Tag{Number: 1, Content: math.NaN()}), `"not_before"`, true},
		{c("not_before", cbor.Tag{Number: 1, Content: -1}), `"not_before" is not within`, true},
		{c("not_before", cbor.Tag{Number: 1, Content: "x"}), `tag number 1`, false},
		{c("not_before", cbor.Tag{Number: 100, Content: 5}), `"not_before" must be a time`, true},
		{j(`"feedback":"all"`), `"feedback" is "all": it must be one of none, negative, positive, full`, true},
		{j(`"payload":` + strings.Repeat("[", 16) + strings.Repeat("]", 16)), `more than 16 deep`, false},
		{c("payload", nested(20)), `16`, false},
		{append(j(`"urgent":true`), '}'), `not JSON at byte`, false},
		{append(j(`"urgent":true`), " {}"...), `not JSON at byte`, false},
		{j(`"urgent":tru`), `not JSON at byte`, false},
		{append(c("urgent", true), 0), `extraneous`, false},
		{c("urgent", true)[:8], `EOF`, false},
		{[]byte("{\"id\":\"c-1\",\"name\":\"\xff\"}"), `not UTF-8`, false},
		{[]byte("\xa1\x64name\x61\xff"), `"name"`, false},
		{[]byte("\xef\xbb\xbf{}"), `byte order mark`, false},
		{nil, `empty`, false},
		{[]byte("  "), `it begins with`, false},
		{[]byte(`"reboot"`), `send a JSON object or a CBOR map`, false},
		{[]byte(`[]`), `send a JSON object or a CBOR map`, false},
		{[]byte(`{}`), `"name" is missing`, false},
		{[]byte("\xa0"), `"name" is missing`, false},
		{[]byte("\xbb\xff\xff\xff\xff\xff\xff\xff\xff"), ``, false}, // a map that claims to be endless
		{manyKeys(70), `more than 64 keys`, false},
	} {
		got, err := wire.DecodeSubmit(test.in)
		if !errors.Is(err, wire.ErrFormat) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.80q: got %v, want … %s", test.in, err, test.want)
		}
		if want := (wire.Submit{}); test.id {
			want.ID = "c-1"
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%.80q: %s", test.in, diff)
			}
		}
		if err != nil && len(err.Error()) > 500 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func nested(n int) any {
	v := any(1)
	for range n {
		v = []any{v}
	}
	return v
}

func manyKeys(n int) []byte {
	m := map[string]int{}
	for i := range n {
		m[strings.Repeat("k", i+1)] = i
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

func TestSubmitIsBounded(t *testing.T) {
	fits := []byte(`{"name":"n","payload":"` + strings.Repeat("x", wire.MaxSubmit-25) + `"}`)
	if s, err := wire.DecodeSubmit(fits); err != nil || len(s.Payload) != wire.MaxSubmit-25 || len(fits) != wire.MaxSubmit {
		t.Errorf("%d bytes: %v", len(fits), err)
	}
	_, err := wire.DecodeSubmit(append(fits, ' '))
	if !errors.Is(err, wire.ErrFormat) || !errors.Is(err, wire.ErrTooLarge) || !strings.Contains(err.Error(), "262144") {
		t.Errorf("one byte more: %v", err)
	}
	if _, err := wire.EncodeSubmit(&wire.Submit{Name: "n", Payload: make([]byte, wire.MaxSubmit)}); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("encoded: %v", err)
	}

	// Nothing is allocated that the input does not explain.
	for name, b := range map[string][]byte{
		"text that claims 4 GiB": []byte("\xa1\x64name\x7a\xff\xff\xff\xff"),
		"map that claims 4 Gi":   []byte("\xba\xff\xff\xff\xff\x61a\x01"),
		"many keys":              manyKeys(500),
		"deep":                   []byte(`{"payload":` + strings.Repeat("[", 200_000)),
		"an array of small ones": asCBOR(t, map[string]any{"name": make([]int, 100_000)}),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := wire.DecodeSubmit(b); err == nil {
			t.Errorf("%s: no error", name)
		}
		runtime.ReadMemStats(&after)
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<10+4*uint64(len(b)) {
			t.Errorf("%s: %d bytes allocated for %d", name, grown, len(b))
		}
	}
}

func drawSubmit(t *rapid.T) wire.Submit {
	text := rapid.StringN(0, 30, -1)
	s := wire.Submit{
		ID: text.Draw(t, "id"), Name: rapid.StringN(1, 20, -1).Draw(t, "name"),
		ContentType:      rapid.SampledFrom([]string{"", "application/json", "a/b+json", "text/plain", "x"}).Draw(t, "content type"),
		ExecutionTimeout: wire.Duration(rapid.Int64Range(0, math.MaxInt64).Draw(t, "execution timeout")),
		MaxAttempts:      rapid.IntRange(0, math.MaxInt32).Draw(t, "max attempts"),
		OneWay:           rapid.Bool().Draw(t, "one way"), Urgent: rapid.Bool().Draw(t, "urgent"),
		SupersedeKey: text.Draw(t, "key"), Feedback: rapid.SampledFrom([]string{"", "none", "negative", "positive", "full"}).Draw(t, "feedback"),
	}
	if p := rapid.OneOf(rapid.SliceOfN(rapid.Byte(), 0, 300), rapid.SampledFrom([][]byte{
		[]byte(`{"a":[1,2]}`), []byte(`"text"`), []byte("null"), []byte(" 1 "), []byte("1"), []byte("true"), []byte("😀\u2028<&>"), []byte(strings.Repeat("[", 15) + strings.Repeat("]", 15)),
		[]byte(strings.Repeat("[", 16) + strings.Repeat("]", 16)),
	})).Draw(t, "payload"); len(p) > 0 {
		s.Payload = p
	}
	if s.HasTTL = rapid.Bool().Draw(t, "has ttl"); s.HasTTL {
		s.TTL = wire.Duration(rapid.Int64().Draw(t, "ttl"))
	}
	if rapid.Bool().Draw(t, "has not before") {
		s.NotBefore.Time = time.Unix(rapid.Int64Range(0, 253402300799).Draw(t, "not before"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC()
	}
	return s
}

func TestSubmitIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.Custom(drawSubmit).Draw(t, "submit")
		b, err := wire.EncodeSubmit(&want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := wire.DecodeSubmit(b)
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("%s: %s", b, diff)
		}
	})
	for _, s := range []wire.Submit{{}, {Name: "\xff"}, {Name: "n", ID: "\xff"}, {Name: "n", NotBefore: wire.Time{Time: time.Unix(1<<40, 0)}}} {
		if b, err := wire.EncodeSubmit(&s); err == nil {
			t.Errorf("%+v became %s", s, b)
		}
	}
}

func TestCancel(t *testing.T) {
	want := wire.Cancel{ID: "c-1", Reason: "not \"needed\" any more"}
	b, err := wire.EncodeCancel(&want)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range [][]byte{b, asCBOR(t, map[string]string{"id": want.ID, "reason": want.Reason})} {
		if got, err := wire.DecodeCancel(in); err != nil || got != want {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	for in, text := range map[string]string{
		`{}`: `"id" is missing`, `{"id":""}`: `"id" is missing`, `{"id":5}`: `"id" must be text`, `{"id":"a","reason":5}`: `"reason" must be text`,
		`{"id":"a","why":""}`: `there is no key "why"; there are id, reason`, `c-1`: `JSON object`, ``: `empty`,
	} {
		c, err := wire.DecodeCancel([]byte(in))
		if !errors.Is(err, wire.ErrFormat) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want … %s", in, err, text)
		}
		if strings.Contains(in, `"id":"a"`) && c != (wire.Cancel{ID: "a"}) {
			t.Errorf("%s: %+v", in, c)
		}
	}
	for _, c := range []wire.Cancel{{}, {ID: "\xff"}, {ID: "a", Reason: "\xff"}} {
		if b, err := wire.EncodeCancel(&c); err == nil {
			t.Errorf("%+v became %s", c, b)
		}
	}
}

func TestDurationAndTimeInJSON(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 90 * time.Minute: "1h30m", time.Hour: "1h", 10 * time.Minute: "10m", 10*time.Hour + 10*time.Second: "10h0m10s",
		-time.Hour: "-1h", 1500 * time.Millisecond: "1.5s", 30 * time.Second: "30s", 20 * time.Minute: "20m", math.MaxInt64: "2562047h47m16.854775807s",
	} {
		b, err := json.Marshal(wire.Duration(d))
		var back wire.Duration
		if err != nil || string(b) != `"`+want+`"` || json.Unmarshal(b, &back) != nil || back != wire.Duration(d) {
			t.Errorf("%v became %s and %v", d, b, back)
		}
	}
	var v struct {
		D wire.Duration `json:"d"`
		T wire.Time     `json:"t"`
	}
	if err := json.Unmarshal([]byte(`{"d": 1.5 , "t": "2026-01-31T17:00:00.1239+01:00" }`), &v); err != nil || v.D != wire.Duration(1500*time.Millisecond) {
		t.Errorf("%+v, %v", v, err)
	}
	if b, err := json.Marshal(v); err != nil || string(b) != `{"d":"1.5s","t":"2026-01-31T16:00:00.123Z"}` {
		t.Errorf("%s, %v", b, err)
	}
	for _, in := range []string{`{"d":"x"}`, `{"d":[]}`, `{"t":5}`, `{"t":"x"}`} {
		if err := json.Unmarshal([]byte(in), &v); err == nil {
			t.Errorf("%s: no error", in)
		}
	}
}

func seedSubmits(f *testing.F) {
	f.Add([]byte(`{"id":"c-1","name":"n","payload":{"a":[1,"}"]},"ttl":"1h","not_before":"2026-01-31T16:00:00Z","max_attempts":3,"urgent":true}`))
	f.Add([]byte(`{"name":"\ud83d\ude00","payload_base64":"AP8=","feedback":"full","ttl":-0.5}`))
	f.Add(asCBOR(f, map[string]any{"name": "n", "payload": []byte{1}, "ttl": 1.5, "not_before": cbor.Tag{Number: 1, Content: 5}}))
	f.Add(asCBOR(f, map[string]any{"id": "c-1", "reason": "r"}))
	f.Add([]byte("\xbf\x64name\x7f\x62re\x64boot\xff\xff"))
	f.Add([]byte(`{"id":"c-1","reason":"r"}`))
}

func FuzzDecodeSubmit(f *testing.F) {
	seedSubmits(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		s, err := wire.DecodeSubmit(b)
		if !bytes.Equal(b, before) {
			t.Fatal("it wrote into what it read")
		}
		if err != nil {
			if !errors.Is(err, wire.ErrFormat) {
				t.Fatalf("%v is no ErrFormat", err)
			}
			return
		}
		again, err := wire.EncodeSubmit(&s)
		if errors.Is(err, wire.ErrTooLarge) || s.NotBefore.Year() > 9998 || s.NotBefore.Year() < 1 {
			return // JSON is longer than CBOR; a zone may carry a time out of what RFC 3339 can write
		}
		if err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		back, err := wire.DecodeSubmit(again)
		if diff := cmp.Diff(s, back); err != nil || diff != "" {
			t.Fatalf("%q became %q: %v %s", b, again, err, diff)
		}
	})
}

func FuzzDecodeCancel(f *testing.F) {
	seedSubmits(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := wire.DecodeCancel(b)
		if err != nil {
			return
		}
		again, err := wire.EncodeCancel(&c)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := wire.DecodeCancel(again); err != nil || back != c {
			t.Fatalf("%q became %q: %v", b, again, err)
		}
	})
}
