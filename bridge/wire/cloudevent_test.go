package wire_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/bridge/wire"
)

const epoch = "0190163d-8694-739b-aea5-966c26f8ad91"

func cloudEvent(tb interface {
	Fatal(...any)
}, m wire.Message, replayed bool,
) []byte {
	b, err := wire.AppendCloudEvent(nil, "ward-3/east", epoch, "telemetry", 42, m, replayed, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// What stands in an event, attribute by attribute, as encoding/json reads it.
func TestCloudEventHasTheDocumentedAttributes(t *testing.T) {
	m := wire.Message{
		Received: 1764000000123, Device: "bed 7/ü", Topic: "dt/icu/\"7\"\x01", Flags: wire.FlagQoS2 | wire.FlagRetain | wire.FlagDup | wire.FlagWill | wire.FlagClockUnsynced,
		Payload: []byte(`{"hr": 72}`),
		Props: &wire.Props{
			ContentType: "application/json; charset=utf-8", ResponseTopic: "re/ply", Correlation: []byte{0xff, 0},
			User: [][2]string{{"a", "1"}, {"a", `"2"`}}, Format: 1, Expiry: 60,
		},
	}
	var got map[string]any
	if err := json.Unmarshal(cloudEvent(t, m, true), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"specversion": "1.0", "id": "ward-3/east/" + epoch + "/telemetry/42", "type": "holdfast.message.v1",
		"source": "/gateways/ward-3%2Feast/devices/bed%207%2F%C3%BC", "subject": "dt/icu/\"7\"\x01", "time": "2025-11-24T16:00:00.123Z",
		"sequence": "00000000000000000042", "lane": "telemetry", "clockstate": "unsynced", "replayed": true,
		"qos": 2.0, "retain": true, "dup": true, "will": true, "responsetopic": "re/ply", "correlationdata": "/wA=",
		"userproperties": `[["a","1"],["a","\"2\""]]`, "payloadformat": 1.0, "expirytime": "2025-11-24T16:01:00.123Z",
		"datacontenttype": "application/json; charset=utf-8", "data": map[string]any{"hr": 72.0},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	m.Received = 20_123 // twenty seconds after the beginning of 1970
	m.Correct(1764000000123 - 20_123)
	got = nil
	if err := json.Unmarshal(cloudEvent(t, m, true), &got); err != nil {
		t.Fatal(err)
	}
	want["clockstate"], want["uncorrectedtime"] = "synced", "1970-01-01T00:00:20.123Z"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if back, err := wire.DecodeCloudEvent(cloudEvent(t, m, true)); err != nil || back.Message.Corrected != m.Corrected || back.Message.Received != m.Received || back.Message.Flags != m.Flags {
		t.Errorf("read back as %+v, %v", back, err)
	}

	m = wire.Message{Received: 0, Device: "d", Topic: "t"}
	got = nil
	if err := json.Unmarshal(cloudEvent(t, m, false), &got); err != nil {
		t.Fatal(err)
	}
	want = map[string]any{
		"specversion": "1.0", "id": "ward-3/east/" + epoch + "/telemetry/42", "type": "holdfast.message.v1",
		"source": "/gateways/ward-3%2Feast/devices/d", "subject": "t", "time": "1970-01-01T00:00:00.000Z",
		"sequence": "00000000000000000042", "lane": "telemetry", "clockstate": "synced", "replayed": false, "qos": 0.0,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestCloudEventDataFollowsTypeAndContent(t *testing.T) {
	for _, c := range []struct {
		contentType, payload string
		data                 bool
		shown                string // content type in the event
	}{
		{"", `{"a":1}`, true, "application/json"},
		{"", `21.5`, true, "application/json"},
		{"", `"text"`, true, "application/json"},
		{"", `true`, true, "application/json"},
		{"application/json", `[1, 2]`, true, "application/json"},
		{"Application/SenML+JSON ; v=1", `[]`, true, "Application/SenML+JSON ; v=1"},
		{"text/json", `1`, true, "text/json"},

		{"", "21.5 C", false, "application/octet-stream"},
		{"", "\x00\xff", false, "application/octet-stream"},
		{"", "\"\xff\"", false, "application/octet-stream"}, // JSON is UTF-8
		{"", "1\n", false, "application/octet-stream"},      // data would lose the line feed
		{"", "null", false, "application/octet-stream"},     // data would read as not there
		{"application/json", `{"a":`, false, "application/json"},
		{"application/json", `{} {}`, false, "application/json"},
		{"application/jsonx", `{}`, false, "application/jsonx"},
		{"json", `{}`, false, "json"},
		{"text/plain", `{"a":1}`, false, "text/plain"},
		{"text/plain", `hello`, false, "text/plain"},
	} {
		m := wire.Message{Device: "d", Topic: "t", Payload: []byte(c.payload)}
		if c.contentType != "" {
			m.Props = &wire.Props{ContentType: c.contentType}
		}
		b := cloudEvent(t, m, false)
		var got struct {
			Type string          `json:"datacontenttype"`
			Data json.RawMessage `json:"data"`
			B64  string          `json:"data_base64"`
		}
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%q: %v in %s", c.payload, err, b)
		}
		want := got
		want.Type, want.Data, want.B64 = c.shown, nil, base64.StdEncoding.EncodeToString([]byte(c.payload))
		if c.data {
			want.Data, want.B64 = json.RawMessage(c.payload), ""
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q %q: %s", c.contentType, c.payload, diff)
		}
		ev, err := wire.DecodeCloudEvent(b)
		if err != nil || string(ev.Message.Payload) != c.payload {
			t.Errorf("%q %q came back as %+v, %v", c.contentType, c.payload, ev, err)
		}
	}
}

func TestCloudEventIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMessage(t)
		if m.Received < 0 {
			m.Received = -m.Received
		}
		if rapid.Bool().Draw(t, "JSON") {
			m.Payload, _ = json.Marshal(map[string]any{"text": string(m.Payload), "n": m.Received})
		}
		id := wire.MessageID{
			Gateway: rapid.StringN(1, 20, -1).Draw(t, "gateway"), Epoch: epoch, Lane: "alarm",
			Seq: rapid.Uint64Min(1).Draw(t, "seq"),
		}
		replayed := rapid.Bool().Draw(t, "replayed")
		behind := rapid.Uint64Range(0, id.Seq).Draw(t, "behind")
		b, err := wire.AppendCloudEvent([]byte("before"), id.Gateway, id.Epoch, id.Lane, id.Seq, m, replayed, behind)
		if err != nil {
			t.Fatal(err)
		}
		rest, ok := strings.CutPrefix(string(b), "before")
		if !ok || strings.ContainsAny(rest, "\n\r") {
			t.Fatalf("not one line after what was there: %q", b)
		}
		got, err := wire.DecodeCloudEvent([]byte(rest))
		if err != nil {
			t.Fatalf("%v in %s", err, rest)
		}
		// An event always tells a content type where there is data.
		if len(m.Payload) > 0 && (m.Props == nil || m.Props.ContentType == "") {
			if m.Props == nil {
				m.Props = new(wire.Props)
			}
			m.Props.ContentType = got.Message.Props.ContentType
		}
		// Expiry beyond the year 9999 is never; nothing at all is none.
		if m.Props != nil && m.Received+int64(m.Props.Expiry)*1000 > 253402300799999 {
			m.Props.Expiry = 0
		}
		if m.Props != nil && cmp.Equal(*m.Props, wire.Props{}) {
			m.Props = nil
		}
		want := &wire.CloudEvent{ID: id, Message: m, Replayed: replayed, Behind: behind}
		if diff := cmp.Diff(want, got, equateEmpty); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestCloudEventEscapesLikeEncodingJSON(t *testing.T) {
	for _, topic := range []string{"", "a", "\"\\/\b\f\n\r\t\x00\x1f\x7f", "ü€𝄞", "\xff", "a\xc3", "\xed\xa0\x80", "\u2028<&>", strings.Repeat("x", 100) + "\"" + strings.Repeat("ö", 100)} {
		m := wire.Message{Device: "d", Topic: "x" + topic}
		var got, want struct {
			Subject string `json:"subject"`
		}
		if err := json.Unmarshal(cloudEvent(t, m, false), &got); err != nil {
			t.Errorf("%q: %v", topic, err)
		}
		s, err := json.Marshal(map[string]string{"subject": m.Topic})
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(s, &want); err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", topic, got, want)
		}
	}
}

func TestCloudEventRefusesATimeThatCannotBeWritten(t *testing.T) {
	for _, at := range []int64{-1, 253402300800000} {
		if b, err := wire.AppendCloudEvent(nil, "g", epoch, "l", 1, wire.Message{Received: at, Topic: "t"}, false, 0); err == nil {
			t.Errorf("%d: %s", at, b)
		}
	}
	b, err := wire.AppendCloudEvent(nil, "g", epoch, "l", 1, wire.Message{Received: 253402300799999, Topic: "t"}, false, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := wire.DecodeCloudEvent(b); err != nil || ev.Message.Received != 253402300799999 {
		t.Errorf("%+v, %v", ev, err)
	}
}

func TestDecodeCloudEventRefuses(t *testing.T) {
	good := string(cloudEvent(t, wire.Message{
		Received: 1764000000123, Device: "bed-7", Topic: "dt/x", Flags: wire.FlagQoS1, Payload: []byte(`{"hr":72}`),
		Props: &wire.Props{Correlation: []byte("c"), User: [][2]string{{"a", "b"}}, Expiry: 60},
	}, false))
	if _, err := wire.DecodeCloudEvent([]byte(good)); err != nil {
		t.Fatal(err)
	}
	swap := func(old, with string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q stands %d times in %s", old, strings.Count(good, old), good)
		}
		return strings.Replace(good, old, with, 1)
	}
	for name, c := range map[string]struct {
		event string
		want  error
	}{
		"empty":                 {"", wire.ErrFormat},
		"cut":                   {good[:len(good)-1], wire.ErrFormat},
		"something behind":      {good + "{}", wire.ErrFormat},
		"array":                 {"[" + good + "]", wire.ErrFormat},
		"null":                  {"null", wire.ErrFormat},
		"string":                {`"x"`, wire.ErrFormat},
		"empty object":          {"{}", wire.ErrFormat},
		"attribute twice":       {swap(`"lane":"telemetry"`, `"lane":"telemetry","lane":"telemetry"`), wire.ErrFormat},
		"capital letters":       {swap(`"lane":`, `"Lane":`), wire.ErrFormat},
		"escaped name":          {swap(`"lane":`, `"\u006cane":`), wire.ErrFormat},
		"too many attributes":   {swap(`"lane":`, manyAttributes()+`"lane":`), wire.ErrFormat},
		"specversion later":     {swap(`"1.0"`, `"2.0"`), wire.ErrVersion},
		"specversion missing":   {swap(`"specversion":"1.0",`, ``), wire.ErrFormat},
		"type later":            {swap(`holdfast.message.v1`, `holdfast.message.v2`), wire.ErrVersion},
		"type of others":        {swap(`holdfast.message.v1`, `com.example.x`), wire.ErrFormat},
		"id is not ours":        {swap(`/telemetry/42"`, `"`), wire.ErrFormat},
		"id is a number":        {swap(`"id":"ward-3/east/`+epoch+`/telemetry/42"`, `"id":42`), wire.ErrFormat},
		"id null":               {swap(`"ward-3/east/`+epoch+`/telemetry/42"`, `null`), wire.ErrFormat},
		"source is not ours":    {swap(`/gateways/`, `/gateway/`), wire.ErrFormat},
		"source of another":     {swap(`ward-3%2Feast`, `ward-4`), wire.ErrFormat},
		"source badly escaped":  {swap(`/devices/bed-7`, `/devices/%zz`), wire.ErrFormat},
		"source with more":      {swap(`/devices/bed-7`, `/devices/bed/7`), wire.ErrFormat},
		"subject missing":       {swap(`"subject":"dt/x",`, ``), wire.ErrFormat},
		"time missing":          {swap(`"time":"2025-11-24T16:00:00.123Z",`, ``), wire.ErrFormat},
		"time is not RFC 3339":  {swap(`2025-11-24T16:00:00.123Z`, `24.11.2025`), wire.ErrFormat},
		"sequence of another":   {swap(`00000000000000000042`, `00000000000000000043`), wire.ErrFormat},
		"sequence not padded":   {swap(`00000000000000000042`, `42`), wire.ErrFormat},
		"lane of another":       {swap(`"lane":"telemetry"`, `"lane":"bulk"`), wire.ErrFormat},
		"clockstate unknown":    {swap(`"synced"`, `"late"`), wire.ErrFormat},
		"replayed missing":      {swap(`"replayed":false,`, ``), wire.ErrFormat},
		"behind is a number":    {swap(`"replayed":false`, `"replayed":false,"behind":41`), wire.ErrFormat},
		"behind is short":       {swap(`"replayed":false`, `"replayed":false,"behind":"41"`), wire.ErrFormat},
		"behind is ahead":       {swap(`"replayed":false`, `"replayed":false,"behind":"00000000000000000043"`), wire.ErrFormat},
		"replayed is text":      {swap(`"replayed":false`, `"replayed":"no"`), wire.ErrFormat},
		"qos 3":                 {swap(`"qos":1`, `"qos":3`), wire.ErrFormat},
		"qos negative":          {swap(`"qos":1`, `"qos":-1`), wire.ErrFormat},
		"qos missing":           {swap(`"qos":1,`, ``), wire.ErrFormat},
		"retain is text":        {swap(`"qos":1`, `"qos":1,"retain":"true"`), wire.ErrFormat},
		"correlation no base64": {swap(`"Yw=="`, `"?"`), wire.ErrFormat},
		"user no JSON":          {swap(`"[[\"a\",\"b\"]]"`, `"a=b"`), wire.ErrFormat},
		"user no pairs":         {swap(`"[[\"a\",\"b\"]]"`, `"[[\"a\"]]"`), wire.ErrFormat},
		"expiry before time":    {swap(`"2025-11-24T16:01:00.123Z"`, `"2025-11-24T15:00:00Z"`), wire.ErrFormat},
		"data twice":            {swap(`"data":`, `"data_base64":"AA==","data":`), wire.ErrFormat},
		"data of another type":  {swap(`"application/json"`, `"text/plain"`), wire.ErrFormat},
		"data no base64":        {swap(`"data":{"hr":72}`, `"data_base64":"AA=A"`), wire.ErrFormat},
	} {
		if ev, err := wire.DecodeCloudEvent([]byte(c.event)); !errors.Is(err, c.want) {
			t.Errorf("%s: got %+v, %v, want %v", name, ev, err, c.want)
		}
	}
	for name, event := range map[string]string{
		"unknown extension": swap(`"lane":`, `"traceparent":"00-ab-cd-01","lane":`),
		"unknown nested":    swap(`"lane":`, `"later":{"lane":["}",{"Lane":"\""}]},"lane":`),
		"spaces":            "\n " + swap(`"lane":"telemetry",`, `"lane" : "telemetry" , `) + " ",
		"other order":       "{" + swap(`{"specversion":"1.0",`, ``)[:len(good)-len(`{"specversion":"1.0",`)-1] + `,"specversion":"1.0"}`,
	} {
		if ev, err := wire.DecodeCloudEvent([]byte(event)); err != nil || ev.ID.Seq != 42 || string(ev.Message.Payload) != `{"hr":72}` {
			t.Errorf("%s: got %+v, %v from %s", name, ev, err, event)
		}
	}
}

func manyAttributes() string {
	var b strings.Builder
	for i := range 200 {
		fmt.Fprintf(&b, `"x%d":1,`, i)
	}
	return b.String()
}

func FuzzDecodeCloudEvent(f *testing.F) {
	for _, m := range telemetry(1, 2) {
		f.Add(cloudEvent(f, m, false))
	}
	f.Add(cloudEvent(f, wire.Message{
		Received: time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC).UnixMilli(), Device: "ü", Topic: "\"", Payload: []byte{1, 2},
		Props: &wire.Props{Correlation: []byte("c"), User: [][2]string{{"a", "b"}}, Expiry: 60, ResponseTopic: "r", Format: 1},
	}, true))
	f.Add([]byte(`{"a":[{"b":"\\"}],"a":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		ev, err := wire.DecodeCloudEvent(b)
		if err != nil {
			return
		}
		again, err := wire.AppendCloudEvent(nil, ev.ID.Gateway, ev.ID.Epoch, ev.ID.Lane, ev.ID.Seq, ev.Message, ev.Replayed, ev.Behind)
		if err != nil {
			return // a time that we do not write
		}
		back, err := wire.DecodeCloudEvent(again)
		if err != nil {
			t.Fatalf("%v in %s made from %s", err, again, b)
		}
		if back.ID != ev.ID || string(back.Message.Payload) != string(ev.Message.Payload) || back.Message.Device != ev.Message.Device ||
			back.Message.Topic != ev.Message.Topic || back.Message.Flags != ev.Message.Flags {
			t.Fatalf("%s became %s", b, again)
		}
	})
}
