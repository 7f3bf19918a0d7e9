package devices

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// commandHash tells whether two requests ask for the same.
type commandHash [16]byte

// requestHash is over all that r asks for, as it was written: who asks is not part of it.
func requestHash(r *Request) (sum commandHash) {
	h := sha256.New()
	var b []byte
	text := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	text(r.Device)
	text(r.Name)
	text(r.ContentType)
	text(r.SupersedeKey)
	text(string(r.Feedback))
	b = binary.AppendVarint(b, int64(r.TTL))
	at := int64(math.MinInt64)
	if !r.NotBefore.IsZero() {
		at = r.NotBefore.UnixMilli()
	}
	b = binary.AppendVarint(b, at)
	b = binary.AppendVarint(b, int64(r.ExecutionTimeout))
	b = binary.AppendVarint(b, int64(r.MaxAttempts))
	flags := byte(0)
	if r.OneWay {
		flags |= 1
	}
	if r.Urgent {
		flags |= 2
	}
	b = append(b, flags)
	h.Write(b)
	h.Write(r.Payload)
	copy(sum[:], h.Sum(b[:0]))
	return sum
}

// checkRequest says what is wrong with r in itself: a code and a reason, "" if nothing is. It does not look at the clock.
func checkRequest(r *Request) (code, reason string) {
	switch {
	case r.ID != "" && !validCommandID(r.ID):
		return CodeInvalid, fmt.Sprintf("the id %.60q is not 1 to %d letters, digits, '-', '_', '.' or ':', of which the first is a letter or a digit", r.ID, MaxCommandID)
	case !validCommandDevice(r.Device):
		return CodeInvalid, fmt.Sprintf("%.60q is not a device id: that has 1 to %d bytes, of which none is '/', '+' or '#'", r.Device, MaxDeviceID)
	}
	if bad := checkCommandName(r.Name); bad != "" {
		return CodeInvalid, bad
	}
	switch {
	case len(r.Payload) > MaxCommandPayload:
		return CodeTooLarge, fmt.Sprintf("the payload has %d bytes, at most %d are allowed: send a reference to larger data", len(r.Payload), MaxCommandPayload)
	case len(r.ContentType) > MaxContentType || !commandPrintable(r.ContentType):
		return CodeInvalid, fmt.Sprintf("the content type is not up to %d printable ASCII characters", MaxContentType)
	case r.TTL < 0:
		return CodeExpired, fmt.Sprintf("its time to live is over before it begins: give a ttl of more than 0, or leave it out for %v", DefaultTTL)
	case r.TTL > MaxTTL:
		return CodeInvalid, fmt.Sprintf("ttl is %v, at most %v are allowed", r.TTL, MaxTTL)
	case r.ExecutionTimeout < 0 || r.ExecutionTimeout > MaxExecution:
		return CodeInvalid, fmt.Sprintf("execution_timeout is %v, allowed is more than 0 and up to %v", r.ExecutionTimeout, MaxExecution)
	case r.MaxAttempts < 0 || r.MaxAttempts > MaxAttempts:
		return CodeInvalid, fmt.Sprintf("max_attempts is %d, allowed is 1 to %d", r.MaxAttempts, MaxAttempts)
	case len(r.SupersedeKey) > MaxSupersedeKey || !utf8.ValidString(r.SupersedeKey):
		return CodeInvalid, fmt.Sprintf("supersede_key is not UTF-8 of up to %d bytes", MaxSupersedeKey)
	case r.Feedback != "" && !slices.Contains(feedbackLevels[:], r.Feedback):
		return CodeInvalid, fmt.Sprintf("feedback is %.60q, allowed are none, negative, positive and full", r.Feedback)
	}
	return "", ""
}

func validCommandID(id string) bool {
	if id == "" || len(id) > MaxCommandID {
		return false
	}
	for i := range len(id) {
		c := id[i]
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case i > 0 && (c == '-' || c == '_' || c == '.' || c == ':'):
		default:
			return false
		}
	}
	return true
}

// validCommandDevice says whether a device of this name could have a command topic and a key. Whether it is known is
// not asked here.
func validCommandDevice(device string) bool {
	return device != "" && len(device) <= 255 && utf8.ValidString(device) && !strings.ContainsAny(device, "/+#\x00")
}

// checkCommandName says what is wrong with a command's name, "" if nothing is.
func checkCommandName(name string) string {
	switch {
	case name == "":
		return "the command has no name: give one, such as reboot"
	case len(name) > MaxCommandName:
		return fmt.Sprintf("the command's name has %d bytes, at most %d are allowed", len(name), MaxCommandName)
	case name[0] == '$' || strings.ContainsAny(name, "/+#") || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Sprintf("the command's name %.60q is not one level of a topic: no '/', '+', '#' or control characters, and no '$' in front", name)
	}
	return ""
}

// commandPrintable says whether s is printable ASCII.
func commandPrintable(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}

// clip bounds a text that somebody else chose.
func clip(s string) string {
	const most = 256 // bytes
	if len(s) <= most && utf8.ValidString(s) {
		return s
	}
	if len(s) > most {
		s = s[:most]
		for i := 0; i < utf8.UTFMax && !utf8.ValidString(s); i++ { // a rune that was cut
			s = s[:len(s)-1]
		}
		s += "…"
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

// ended says whether a command in the state s needs nothing more.
func (s *commandState) ended(oneWay bool) bool {
	return s.state >= Succeeded || s.state == Delivered && oneWay
}

// tells says whether f tells a state upstream.
func (f Feedback) tells(s State, oneWay bool) bool {
	switch f {
	case FeedbackNone:
		return false
	case FeedbackNegative:
		return s > Succeeded
	case FeedbackPositive:
		return s == Succeeded || s == Delivered && oneWay
	case FeedbackFull:
		return true
	}
	return true
}

// parseProgress makes a Progress of what a device sends with one: a JSON object {"percent":40,"text":"half way"} of which
// either may be absent, the same as a CBOR map, a number, or a text of up to 256 bytes. Of an object other members are
// skipped. Nothing at all is progress that tells nothing.
func parseProgress(payload []byte, contentType string) (*Progress, error) {
	media, _, _ := strings.Cut(contentType, ";")
	isCBOR := strings.TrimSpace(media) == "application/cbor" || len(payload) > 0 && payload[0]>>5 == 5 // a map: never the begin of UTF-8
	trimmed := bytes.TrimSpace(payload)
	var said struct {
		Percent *float64 `cbor:"percent" json:"percent"`
		Text    string   `cbor:"text"    json:"text"`
	}
	switch {
	case len(payload) > 8*MaxProgressText:
		return nil, fmt.Errorf("progress of %d bytes", len(payload))
	case isCBOR && len(payload) > 0 && payload[0]>>5 == 5:
		if err := strictCBOR.Unmarshal(payload, &said); err != nil {
			return nil, fmt.Errorf("progress: %w", err)
		}
	case isCBOR && len(payload) > 0:
		var n float64
		if err := strictCBOR.Unmarshal(payload, &n); err != nil {
			return nil, fmt.Errorf("progress: %w", err)
		}
		said.Percent = &n
	case len(trimmed) == 0:
	case trimmed[0] == '{':
		if err := json.Unmarshal(trimmed, &said); err != nil {
			return nil, fmt.Errorf("progress: %w", err)
		}
	case trimmed[0] == '"' && json.Valid(trimmed):
		if err := json.Unmarshal(trimmed, &said.Text); err != nil {
			return nil, fmt.Errorf("progress: %w", err)
		}
	default:
		if n := 0.0; (trimmed[0] == '-' || trimmed[0] >= '0' && trimmed[0] <= '9') && json.Unmarshal(trimmed, &n) == nil {
			said.Percent = &n
			break
		}
		said.Text = string(trimmed)
	}
	p := &Progress{Percent: -1, Text: said.Text}
	if said.Percent != nil {
		n := math.Round(*said.Percent)
		if !(n >= 0 && n <= 100) { // NaN is not
			return nil, fmt.Errorf("progress: %v is not a percentage from 0 to 100", *said.Percent)
		}
		p.Percent = int(n)
	}
	switch {
	case len(p.Text) > MaxProgressText:
		return nil, fmt.Errorf("progress: text of %d bytes, at most %d are allowed", len(p.Text), MaxProgressText)
	case !utf8.ValidString(p.Text):
		return nil, fmt.Errorf("progress: text that is not UTF-8")
	case strings.ContainsFunc(p.Text, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' && r != '\r' }):
		return nil, fmt.Errorf("progress: text with control characters")
	}
	return p, nil
}

// resultType is the content type under which a result is kept: as the device says, or what can be seen.
func resultType(payload []byte, contentType string) string {
	switch {
	case len(payload) == 0:
		return ""
	case contentType != "" && len(contentType) <= MaxContentType && commandPrintable(contentType):
		return contentType
	case json.Valid(payload):
		return "application/json"
	}
	return ""
}

// milliseconds rounds up: a time that was given is never none.
func milliseconds(d time.Duration) int64 {
	return int64((d + time.Millisecond - 1) / time.Millisecond)
}
