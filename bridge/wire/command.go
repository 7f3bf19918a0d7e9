package wire

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Submit is a command as the cloud asks for it: the payload of gw/{gateway}/cmd/{device}/submit, JSON or CBOR, and the
// body of POST /api/v1/devices/{id}/commands. Only name is required.
type Submit struct {
	ID               string   `json:"id,omitempty"` // "": one is made, but then a repeat is a new command
	Name             string   `json:"name"`
	Payload          []byte   `json:"-"` // from payload or payload_base64; see DecodeSubmit
	ContentType      string   `json:"content_type,omitempty"`
	TTL              Duration `json:"ttl,omitzero"` // as it was given, also 0 and below; see HasTTL
	HasTTL           bool     `json:"-"`            // ttl was given: with a TTL of 0 or less the command is over before it began
	NotBefore        Time     `json:"not_before,omitzero"`
	ExecutionTimeout Duration `json:"execution_timeout,omitzero"`
	MaxAttempts      int      `json:"max_attempts,omitempty"`
	OneWay           bool     `json:"one_way,omitempty"`
	Urgent           bool     `json:"urgent,omitempty"`
	SupersedeKey     string   `json:"supersede_key,omitempty"`
	Feedback         string   `json:"feedback,omitempty"` // none, negative, positive, full
}

// Cancel calls a command off: the payload of gw/{gateway}/cmd/{device}/cancel.
type Cancel struct {
	ID     string `json:"id"`
	Reason string `json:"reason,omitempty"`
}

// CommandAction is what the cloud asks on gw/{gateway}/cmd/{device}/{action}.
type CommandAction string

// The actions.
const (
	ActionSubmit CommandAction = "submit"
	ActionCancel CommandAction = "cancel"
)

// MaxSubmit is the most bytes that DecodeSubmit and DecodeCancel read. A payload of 64 KiB fits in as
// text, base64 or CBOR.
const MaxSubmit = 256 << 10

// ErrTooLarge says that what came is larger than MaxSubmit. Such an error is ErrFormat, too.
var ErrTooLarge = errors.New("too large")

// The values of feedback.
var feedbacks = []string{"none", "negative", "positive", "full"}

// The keys, in the order in which errors list them.
var (
	submitKeys = []string{
		"id", "name", "payload", "payload_base64", "content_type", "ttl", "not_before", "execution_timeout", "max_attempts",
		"one_way", "urgent", "supersede_key", "feedback",
	}
	cancelKeys = []string{"id", "reason"}
)

// DecodeSubmit reads a map in JSON or CBOR, told apart by the first byte, strictly: unknown and doubled keys, wrong types,
// both payloads and trailing bytes are ErrFormat with a text that names the key and the way out. It does not know
// the limits of a queue, except that it reads at most MaxSubmit bytes (ErrTooLarge). Many goroutines may call it at once.
//
// payload may be text (CBOR: or bytes), which is taken as it is, or any other value, whose encoding is taken, with
// content_type application/json or application/cbor if none is given. Durations are text as Go writes them, or a number
// of seconds.
//
// With an error the result has the ID, if one could be read, so that a refusal can name it. It shares no memory with b.
func DecodeSubmit(b []byte) (Submit, error) {
	list, err := readFields(b, submitKeys)
	s := Submit{ID: idOf(list)}
	if err == nil {
		err = s.fill(list)
	}
	if err != nil {
		return Submit{ID: s.ID}, fmt.Errorf("submit: %w: %w", ErrFormat, err)
	}
	return s, nil
}

// DecodeCancel reads JSON or CBOR, as strictly as DecodeSubmit.
func DecodeCancel(b []byte) (Cancel, error) {
	list, err := readFields(b, cancelKeys)
	c := Cancel{ID: idOf(list)}
	for i := 0; i < len(list) && err == nil; i++ {
		switch f := &list[i]; f.name {
		case "id":
			c.ID, err = f.text()
		case "reason":
			c.Reason, err = f.text()
		}
	}
	if err == nil && c.ID == "" {
		err = errors.New(`"id" is missing: which command is to be canceled?`)
	}
	if err != nil {
		return Cancel{ID: c.ID}, fmt.Errorf("cancel: %w: %w", ErrFormat, err)
	}
	return c, nil
}

// idOf finds the id, wherever it stands and whatever else is wrong.
func idOf(list []field) string {
	for i := range list {
		if list[i].name == "id" {
			if id, err := list[i].text(); err == nil {
				return id
			}
		}
	}
	return ""
}

func (s *Submit) fill(list []field) error {
	var payload string // the key that gave it
	for i := range list {
		f := &list[i]
		var err error
		switch f.name {
		case "id":
			s.ID, err = f.text()
		case "name":
			s.Name, err = f.text()
		case "payload", "payload_base64":
			if payload != "" {
				return errors.New(`"payload" and "payload_base64" are both there: give one of them`)
			}
			payload = f.name
			err = s.setPayload(f)
		case "content_type":
			s.ContentType, err = f.text()
		case "ttl":
			s.HasTTL = true
			s.TTL, err = f.duration()
		case "not_before":
			s.NotBefore, err = f.time()
		case "execution_timeout":
			if s.ExecutionTimeout, err = f.duration(); err == nil && s.ExecutionTimeout <= 0 {
				err = errors.New(`"execution_timeout" must be longer than 0: leave it out for the default`)
			}
		case "max_attempts":
			s.MaxAttempts, err = f.count()
		case "one_way":
			s.OneWay, err = f.boolean()
		case "urgent":
			s.Urgent, err = f.boolean()
		case "supersede_key":
			s.SupersedeKey, err = f.text()
		case "feedback":
			if s.Feedback, err = f.text(); err == nil && !slices.Contains(feedbacks, s.Feedback) {
				err = fmt.Errorf(`"feedback" is %.40q: it must be one of %s`, s.Feedback, strings.Join(feedbacks, ", "))
			}
		}
		if err != nil {
			return err
		}
	}
	if s.Name == "" {
		return errors.New(`"name" is missing: what is the device to do?`)
	}
	// The content type of a value that is not text; all keys have been seen now.
	for i := range list {
		if f := &list[i]; f.name == "payload" && s.ContentType == "" && f.compound() {
			s.ContentType = f.mediaType()
		}
	}
	return nil
}

func (s *Submit) setPayload(f *field) error {
	if f.name == "payload" {
		b, err := f.payload()
		s.Payload = b
		return err
	}
	text, err := f.text()
	if err != nil {
		return err
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return fmt.Errorf(`"payload_base64": %w: write it in the standard alphabet with padding (RFC 4648 §4)`, err)
	}
	if len(b) > 0 {
		s.Payload = b
	}
	return nil
}

// EncodeSubmit writes JSON that DecodeSubmit reads back as s. An error means that no JSON can say what s says, or that
// it would be larger than a gateway reads.
func EncodeSubmit(s *Submit) ([]byte, error) {
	for key, text := range map[string]string{
		"id": s.ID, "name": s.Name, "content_type": s.ContentType, "supersede_key": s.SupersedeKey, "feedback": s.Feedback,
	} {
		if !utf8.ValidString(text) {
			return nil, fmt.Errorf("submit: %s %.80q is not UTF-8", key, text)
		}
	}
	switch y := s.NotBefore.UTC().Year(); {
	case s.Name == "":
		return nil, errors.New("submit: no name")
	case y < 0 || y > 9999:
		return nil, fmt.Errorf("submit: not_before is in the year %d, which RFC 3339 cannot write", y)
	}
	b := make([]byte, 0, 256+len(s.Payload)*4/3)
	b = append(b, '{')
	b = appendMember(b, "id", s.ID)
	b = appendMember(b, "name", s.Name)
	switch {
	case len(s.Payload) == 0:
	case s.payloadEmbeds():
		b = append(append(b, `,"payload":`...), s.Payload...)
	case utf8.Valid(s.Payload):
		b = append(append(append(b, `,"payload":"`...), appendEscaped(nil, s.Payload)...), '"')
	default:
		b = append(append(append(b, `,"payload_base64":"`...), base64.StdEncoding.AppendEncode(nil, s.Payload)...), '"')
	}
	b = appendMember(b, "content_type", s.ContentType)
	if s.HasTTL || s.TTL != 0 {
		b = appendMember(b, "ttl", s.TTL.String())
	}
	if !s.NotBefore.IsZero() {
		b = appendMember(b, "not_before", s.NotBefore.UTC().Format(time.RFC3339Nano))
	}
	if s.ExecutionTimeout != 0 {
		b = appendMember(b, "execution_timeout", s.ExecutionTimeout.String())
	}
	if s.MaxAttempts != 0 {
		b = strconv.AppendInt(append(b, `,"max_attempts":`...), int64(s.MaxAttempts), 10)
	}
	if s.OneWay {
		b = append(b, `,"one_way":true`...)
	}
	if s.Urgent {
		b = append(b, `,"urgent":true`...)
	}
	b = appendMember(b, "supersede_key", s.SupersedeKey)
	b = appendMember(b, "feedback", s.Feedback)
	if b = append(b, '}'); len(b) > MaxSubmit {
		return nil, fmt.Errorf("submit: %w: %d bytes, a gateway reads at most %d", ErrTooLarge, len(b), MaxSubmit)
	}
	return b, nil
}

// payloadEmbeds says whether the payload may stand as a value: declared as JSON, and no text, which would lose its quotes.
func (s *Submit) payloadEmbeds() bool {
	return isJSON(s.ContentType) && s.Payload[0] != '"' && embeds(s.Payload) && jsonDepth(s.Payload) < maxDepth
}

// EncodeCancel writes JSON.
func EncodeCancel(c *Cancel) ([]byte, error) {
	if c.ID == "" || !utf8.ValidString(c.ID) || !utf8.ValidString(c.Reason) {
		return nil, errors.New("cancel: no id, or text that is not UTF-8")
	}
	b := appendMember([]byte{'{'}, "id", c.ID)
	return append(appendMember(b, "reason", c.Reason), '}'), nil
}

// appendMember appends a member with text to an object, if there is text.
func appendMember(b []byte, name, text string) []byte {
	if text == "" {
		return b
	}
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	b = append(append(append(b, '"'), name...), `":"`...)
	return append(appendEscaped(b, text), '"')
}

// Duration is a time.Duration that JSON writes as "1h30m" and reads as that or as a number of seconds.
type Duration time.Duration

// String writes d as time.Duration does, without the zeros at the end: "1h30m".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) {
	return append(append([]byte{'"'}, d.String()...), '"'), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	v, err := (&field{name: "duration", raw: bytes.TrimSpace(b)}).duration()
	if err == nil {
		*d = v
	}
	return err
}

// durationOf reads text.
func durationOf(text string) (Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf(`%.40q is not a duration: write "1h30m", "90s", "500ms", or a number of seconds`, text)
	}
	return Duration(d), nil
}

// secondsOf reads a number of seconds.
func secondsOf(n float64) (Duration, error) {
	ns := math.Round(n * float64(time.Second))
	if math.IsNaN(ns) || ns < math.MinInt64 || ns >= math.MaxInt64 {
		return 0, fmt.Errorf("%v seconds are more than 292 years, or not a number at all", n)
	}
	return Duration(ns), nil
}

// Time is a time that JSON writes in RFC 3339 with milliseconds, UTC.
type Time struct{ time.Time }

const timeLayout = "2006-01-02T15:04:05.000Z07:00"

// append writes t. RFC 3339 has four digits for a year: what a broken clock tells beyond that becomes the nearest that
// can be written.
func (t Time) append(b []byte) []byte {
	u := t.UTC()
	switch y := u.Year(); {
	case y < 0:
		u = time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC)
	case y > 9999:
		u = time.UnixMilli(maxTime).UTC()
	}
	return u.AppendFormat(b, timeLayout)
}

// MarshalJSON implements json.Marshaler.
func (t Time) MarshalJSON() ([]byte, error) {
	return append(t.append([]byte{'"'}), '"'), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Time) UnmarshalJSON(b []byte) error {
	v, err := (&field{name: "time", raw: bytes.TrimSpace(b)}).time()
	if err == nil {
		*t = v
	}
	return err
}

func timeOf(text string) (Time, error) {
	var t time.Time
	if err := t.UnmarshalText([]byte(text)); err != nil { // strict, where time.Parse is not
		return Time{}, fmt.Errorf(`%.40q is not a time: write it as RFC 3339 has it, "2026-01-31T16:00:00Z"`, text)
	}
	return Time{t.UTC()}, nil
}
