package httpapi_test

import (
	"bufio"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"holdfast/gateway/httpapi"
)

// tail reads a stream of messages.
func (l *live) tail(query string) *stream {
	l.t.Helper()
	resp := l.do("GET", "/api/v1/messages/live"+query, "", as("viewer"))
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		l.t.Fatalf("live = %d %v", resp.StatusCode, resp.Header)
	}
	return &stream{l: l, resp: resp, b: bufio.NewReader(resp.Body)}
}

// message reads the next one, past signs of life.
func (s *stream) message() (m httpapi.LiveMessage) {
	s.l.t.Helper()
	for {
		lines, err := s.block()
		if err != nil {
			s.l.t.Fatal(err)
		}
		if len(lines) == 2 && lines[0] == "event: message" {
			data, _ := strings.CutPrefix(lines[1], "data: ")
			if err := json.Unmarshal([]byte(data), &m); err != nil {
				s.l.t.Fatalf("%q: %v", data, err)
			}
			return m
		}
	}
}

func TestMessagesComeAsTheyAreStored(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.tail("?filter=dt/%2B/x")
		synctest.Wait()
		if n := len(l.messages.see); n != 1 || l.messages.see["dt/+/x"] == nil {
			t.Fatalf("watched: %v", l.messages.see)
		}
		l.messages.publish(httpapi.Arrival{Device: "pump", Topic: "dt/pump/x", Payload: []byte(`{"t":1}`), ContentType: "application/json", QoS: 1, Received: then})
		l.messages.publish(httpapi.Arrival{Device: "pump", Topic: "dt/pump/x", Payload: []byte{0xff, 0}, QoS: 2, Retain: true, Received: then})
		text := `{"t":1}`
		want := []httpapi.LiveMessage{
			{Device: "pump", Topic: "dt/pump/x", Received: then, QoS: 1, Content: httpapi.Content{ContentType: "application/json", Size: 7, Payload: &text}},
			{Device: "pump", Topic: "dt/pump/x", Received: then, QoS: 2, Retain: true, Content: httpapi.Content{Size: 2, PayloadBase64: "/wA="}},
		}
		got := []httpapi.LiveMessage{s.message(), s.message()}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		s.close()
		synctest.Wait()
		if n := l.messages.publish(httpapi.Arrival{}); n != 0 {
			t.Errorf("%d still watch after the end", n)
		}
		if a := l.ask("GET", "/api/v1/messages/live?filter=%23/a"); a.code() != "bad_query" || !strings.Contains(a.message(), "# stands last") {
			t.Errorf("a wrong filter: %d %s", a.status, a.body)
		}
		l.tail("").close()
	})
}

// TestAReaderOfMessagesHoldsUpNobody: what it does not take is counted, and it hears of it.
func TestAReaderOfMessagesHoldsUpNobody(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.tail("")
		defer s.close()
		synctest.Wait()
		begin := time.Now()
		for range 1000 {
			l.messages.publish(httpapi.Arrival{Device: "pump", Topic: "a", Payload: make([]byte, 100), Received: then})
		}
		if time.Since(begin) != 0 {
			t.Errorf("publishing waited %v", time.Since(begin))
		}
		n, missed := 0, uint64(0)
		for n < 50 {
			m := s.message()
			missed += m.Missed
			n++
		}
		l.messages.publish(httpapi.Arrival{Device: "pump", Topic: "last", Received: then})
		m := s.message()
		for m.Topic != "last" {
			missed += m.Missed
			n++
			m = s.message()
		}
		if missed += m.Missed; uint64(n)+missed != 1000 {
			t.Errorf("%d seen and %d missed of 1000", n, missed)
		}
		// Bytes are bounded as well: but one message always fits.
		l.messages.publish(httpapi.Arrival{Topic: "large", Payload: make([]byte, 2<<20), Received: then})
		l.messages.publish(httpapi.Arrival{Topic: "too much", Payload: []byte("x"), Received: then})
		if m := s.message(); m.Topic != "large" || m.Size != 2<<20 || !m.Truncated {
			t.Errorf("%s, %d bytes", m.Topic, m.Size)
		}
	})
}

func TestMessageStreamsAreCountedWithTheOthers(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		var open []*stream
		for i := range httpapi.MaxStreams {
			if i%2 == 0 {
				open = append(open, l.tail(""))
			} else {
				open = append(open, l.watch("", ""))
			}
		}
		if a := l.ask("GET", "/api/v1/messages/live"); a.status != 503 || a.code() != "too_many_streams" {
			t.Errorf("one more: %d %s", a.status, a.body)
		}
		for _, s := range open {
			s.close()
		}
		synctest.Wait()
		if n := len(l.messages.see); n != 0 {
			t.Errorf("%d still watch", n)
		}
	})
}

func TestAStreamOfMessagesEndsWithItsToken(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.tail("")
		defer s.close()
		_ = l.tokens.Remove("the-viewer")
		begin := time.Now()
		for {
			if _, err := s.block(); err != nil {
				break
			}
		}
		if time.Since(begin) > 16*time.Second {
			t.Errorf("it went on for %v", time.Since(begin))
		}
	})
}

func TestContentAsPeopleReadIt(t *testing.T) {
	encode := func(v any) []byte {
		b, err := cbor.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	long := make([]int, 4000)
	for name, c := range map[string]struct {
		payload []byte
		kind    string
		want    string // of PayloadCBOR
		cut     bool
	}{
		"map that nobody told":      {encode(map[string]any{"t": 21.5}), "", `{"t": 21.5}`, false},
		"list":                      {encode([]any{1, "a", nil}), "", `[1, "a", null]`, false},
		"number that was told":      {encode(7), "application/cbor", `7`, false},
		"number that nobody told":   {encode(1000), "", ``, false},
		"suffix":                    {encode("x"), "application/senml+cbor; v=1", `"x"`, false},
		"text":                      {[]byte("hello"), "", ``, false},
		"empty":                     {nil, "application/cbor", ``, false},
		"damaged":                   {encode(map[string]any{"t": 21.5})[:4], "application/cbor", ``, false},
		"more after it":             {append(encode([]int{1}), 0xff), "", ``, false},
		"binary that looks so":      {[]byte{0x9f, 1, 2}, "", ``, false},
		"more than people read":     {encode(make([]string, 2000)), "", ``, false},
		"longer than what is shown": {encode(map[string]any{"a": long[:1000], "b": strings.Repeat("é", 3000)}), "", `*`, true},
	} {
		got := httpapi.ContentOf(c.payload, c.kind)
		if c.want == "*" {
			if len(got.PayloadCBOR) < 4000 || len(got.PayloadCBOR) > 4<<10 || !got.Truncated {
				t.Errorf("%s: %d bytes shown, truncated %v", name, len(got.PayloadCBOR), got.Truncated)
			}
			continue
		}
		if got.PayloadCBOR != c.want || got.Truncated != c.cut && len(c.payload) < 4<<10 {
			t.Errorf("%s: %q, truncated %v", name, got.PayloadCBOR, got.Truncated)
		}
	}
}
