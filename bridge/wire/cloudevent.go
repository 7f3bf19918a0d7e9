package wire

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// CloudEventType is the type of every event made from a device message.
const CloudEventType = "holdfast.message.v1"

// The values of the clockstate extension.
const (
	ClockSynced   = "synced"
	ClockUnsynced = "unsynced" // the gateway did not know the time when it received the message, and does not know it yet
)

// maxTime is the last time that RFC 3339 can write: the end of the year 9999, Unix ms.
const maxTime = 253402300799999

// AppendCloudEvent appends m as a CloudEvents 1.0 structured JSON event to dst, in one line.
// replayed and behind are as in BatchHeader. It keeps nothing of m.
//
// The payload becomes data if it is declared as JSON, or not declared at all, and is JSON;
// else data_base64. An error means that m cannot be written as an event, now or later.
func AppendCloudEvent(dst []byte, gateway, epoch, lane string, seq uint64, m Message, replayed bool, behind uint64) ([]byte, error) {
	if m.Received < 0 || m.Received > maxTime {
		return dst, fmt.Errorf("cloudevent %s: received %d ms is not within the years 1970 to 9999", ID(gateway, epoch, lane, seq), m.Received)
	}
	dst = append(dst, `{"specversion":"1.0","id":"`...)
	dst = appendEscaped(dst, gateway)
	dst = append(dst, '/')
	dst = appendEscaped(dst, epoch)
	dst = append(dst, '/')
	dst = appendEscaped(dst, lane)
	dst = append(dst, '/')
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, `","source":"/gateways/`...)
	dst = appendSegment(dst, gateway)
	dst = append(dst, `/devices/`...)
	dst = appendSegment(dst, m.Device)
	dst = append(dst, `","type":"`+CloudEventType+`","subject":"`...)
	dst = appendEscaped(dst, m.Topic)
	dst = append(dst, `","time":"`...)
	dst = time.UnixMilli(m.Received).UTC().AppendFormat(dst, "2006-01-02T15:04:05.000Z07:00")
	dst = append(dst, `","sequence":"`...)
	dst = appendSequence(dst, seq)
	dst = append(dst, `","lane":"`...)
	dst = appendEscaped(dst, lane)
	dst = append(dst, `","clockstate":"`...)
	if m.Flags&FlagClockUnsynced != 0 {
		dst = append(dst, ClockUnsynced...)
	} else {
		dst = append(dst, ClockSynced...)
	}
	if at := m.Received - m.Corrected; m.Corrected != 0 && at >= 0 && at <= maxTime {
		dst = append(dst, `","uncorrectedtime":"`...)
		dst = time.UnixMilli(at).UTC().AppendFormat(dst, "2006-01-02T15:04:05.000Z07:00")
	}
	dst = append(dst, `","replayed":`...)
	dst = strconv.AppendBool(dst, replayed)
	if behind != 0 {
		dst = append(dst, `,"behind":"`...)
		dst = appendSequence(dst, behind)
		dst = append(dst, '"')
	}
	dst = append(dst, `,"qos":`...)
	dst = strconv.AppendInt(dst, int64(m.Flags.QoS()), 10)
	if m.Flags&FlagRetain != 0 {
		dst = append(dst, `,"retain":true`...)
	}
	if m.Flags&FlagDup != 0 {
		dst = append(dst, `,"dup":true`...)
	}
	if m.Flags&FlagWill != 0 {
		dst = append(dst, `,"will":true`...)
	}
	contentType := ""
	if p := m.Props; p != nil {
		contentType = p.ContentType
		dst = appendProps(dst, p, m.Received)
	}

	asJSON := (contentType == "" || isJSON(contentType)) && embeds(m.Payload)
	if contentType == "" && len(m.Payload) > 0 {
		contentType = "application/octet-stream"
		if asJSON {
			contentType = "application/json"
		}
	}
	if contentType != "" {
		dst = append(dst, `,"datacontenttype":"`...)
		dst = appendEscaped(dst, contentType)
		dst = append(dst, '"')
	}
	switch {
	case len(m.Payload) == 0: // no data at all
	case asJSON:
		dst = append(dst, `,"data":`...)
		dst = append(dst, m.Payload...)
	default:
		dst = append(dst, `,"data_base64":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, m.Payload)
		dst = append(dst, '"')
	}
	return append(dst, '}'), nil
}

// appendProps writes the MQTT 5 properties as extension attributes. Only simple types are
// allowed there (CloudEvents 1.0 §3.1), so the user properties are a string of JSON.
func appendProps(dst []byte, p *Props, received int64) []byte {
	if p.ResponseTopic != "" {
		dst = append(dst, `,"responsetopic":"`...)
		dst = appendEscaped(dst, p.ResponseTopic)
		dst = append(dst, '"')
	}
	if p.Correlation != nil {
		dst = append(dst, `,"correlationdata":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, p.Correlation)
		dst = append(dst, '"')
	}
	if len(p.User) > 0 {
		list := []byte{'['}
		for i, kv := range p.User {
			if i > 0 {
				list = append(list, ',')
			}
			list = append(list, `["`...)
			list = appendEscaped(list, kv[0])
			list = append(list, `","`...)
			list = appendEscaped(list, kv[1])
			list = append(list, `"]`...)
		}
		dst = append(dst, `,"userproperties":"`...)
		dst = appendEscaped(dst, string(append(list, ']')))
		dst = append(dst, '"')
	}
	if p.Format != 0 {
		dst = append(dst, `,"payloadformat":`...)
		dst = strconv.AppendUint(dst, uint64(p.Format), 10)
	}
	if at := received + int64(p.Expiry)*1000; p.Expiry > 0 && at <= maxTime {
		dst = append(dst, `,"expirytime":"`...)
		dst = time.UnixMilli(at).UTC().AppendFormat(dst, "2006-01-02T15:04:05.000Z07:00")
		dst = append(dst, '"')
	}
	return dst
}

// appendSequence writes seq as the sequence extension wants it: a string whose order is the
// order of the numbers, so with leading zeros to the length of the largest.
func appendSequence(dst []byte, seq uint64) []byte {
	const zeros = "00000000000000000000"
	var b [len(zeros)]byte
	num := strconv.AppendUint(b[:0], seq, 10)
	dst = append(dst, zeros[len(num):]...)
	return append(dst, num...)
}

// isJSON says whether a content type declares JSON (CloudEvents JSON format 1.0 §3.1: the
// subtype is json or ends in +json).
func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	_, sub, ok := strings.Cut(strings.TrimSpace(media), "/")
	return ok && (strings.EqualFold(sub, "json") || len(sub) >= 5 && strings.EqualFold(sub[len(sub)-5:], "+json"))
}

// embeds says whether payload may stand as the value of data, so that a reader gets back the very
// same bytes: JSON in UTF-8, no space around it. A plain null would read as no data at all.
func embeds(payload []byte) bool {
	if len(payload) == 0 || payload[0] <= ' ' || payload[len(payload)-1] <= ' ' || string(payload) == "null" {
		return false
	}
	return json.Valid(payload) && utf8.Valid(payload)
}

// appendEscaped writes s as the inside of a JSON string. Bytes that are not UTF-8 become U+FFFD,
// as encoding/json has it; topics and ids from MQTT are UTF-8 already.
func appendEscaped[T ~string | ~[]byte](dst []byte, s T) []byte {
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' {
				i++
				continue
			}
			dst = append(dst, s[start:i]...)
			switch c {
			case '"', '\\':
				dst = append(dst, '\\', c)
			case '\n':
				dst = append(dst, '\\', 'n')
			case '\r':
				dst = append(dst, '\\', 'r')
			case '\t':
				dst = append(dst, '\\', 't')
			default:
				dst = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(string(s[i:min(len(s), i+utf8.UTFMax)]))
		if r == utf8.RuneError && size == 1 {
			dst = append(dst, s[start:i]...)
			dst = append(dst, "\ufffd"...)
			start = i + 1
		}
		i += size
	}
	return append(dst, s[start:]...)
}

// appendSegment writes s as one segment of a path (RFC 3986 §3.3): all but unreserved characters
// as %XX.
func appendSegment(dst []byte, s string) []byte {
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_', c == '~':
			dst = append(dst, c)
		default:
			dst = append(dst, '%', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	return dst
}

// CloudEvent is a decoded event.
type CloudEvent struct {
	ID       MessageID
	Message  Message
	Replayed bool
	Behind   uint64 // as in BatchHeader
}

// eventJSON is an event as its bytes say it; nil and "" stand for what is missing.
type eventJSON struct {
	SpecVersion   string          `json:"specversion"`
	ID            string          `json:"id"`
	Source        string          `json:"source"`
	Type          string          `json:"type"`
	Subject       string          `json:"subject"`
	Time          *time.Time      `json:"time"` // its UnmarshalJSON is strict RFC 3339
	Sequence      string          `json:"sequence"`
	Lane          string          `json:"lane"`
	ClockState    string          `json:"clockstate"`
	Uncorrected   *time.Time      `json:"uncorrectedtime"`
	Replayed      *bool           `json:"replayed"`
	Behind        string          `json:"behind"`
	QoS           *int            `json:"qos"`
	Retain        bool            `json:"retain"`
	Dup           bool            `json:"dup"`
	Will          bool            `json:"will"`
	ContentType   string          `json:"datacontenttype"`
	ResponseTopic string          `json:"responsetopic"`
	Correlation   *string         `json:"correlationdata"`
	User          string          `json:"userproperties"`
	PayloadFormat uint8           `json:"payloadformat"`
	Expiry        *time.Time      `json:"expirytime"`
	Data          json.RawMessage `json:"data"`
	DataBase64    *string         `json:"data_base64"`
}

// DecodeCloudEvent reads an event that AppendCloudEvent has written, strictly: every attribute
// once, all that the message needs, and in agreement with each other. Unknown extension
// attributes are skipped. Later specversions and types are ErrVersion, all else is ErrFormat.
func DecodeCloudEvent(b []byte) (*CloudEvent, error) {
	var j eventJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, fmt.Errorf("cloudevent: %w: %v", ErrFormat, err)
	}
	if err := checkNames(b); err != nil {
		return nil, fmt.Errorf("cloudevent %.200q: %w: %v", j.ID, ErrFormat, err)
	}
	if j.SpecVersion != "1.0" && j.SpecVersion != "" {
		return nil, fmt.Errorf("cloudevent %.200q: specversion %.40q: %w", j.ID, j.SpecVersion, ErrVersion)
	}
	if j.Type != CloudEventType && strings.HasPrefix(j.Type, "holdfast.message.v") {
		return nil, fmt.Errorf("cloudevent %.200q: type %.80q: %w", j.ID, j.Type, ErrVersion)
	}
	ev, err := j.event()
	if err != nil {
		return nil, fmt.Errorf("cloudevent %.200q: %w: %v", j.ID, ErrFormat, err)
	}
	return ev, nil
}

func (j *eventJSON) event() (*CloudEvent, error) {
	id, err := ParseID(j.ID)
	if err != nil {
		return nil, err
	}
	device, err := parseSource(j.Source, id.Gateway)
	if err != nil {
		return nil, err
	}
	switch {
	case j.SpecVersion == "":
		return nil, errors.New("specversion is missing")
	case j.Type != CloudEventType:
		return nil, fmt.Errorf("type %.80q is not %s", j.Type, CloudEventType)
	case j.Subject == "":
		return nil, errors.New("subject is missing")
	case j.Time == nil:
		return nil, errors.New("time is missing")
	case j.Sequence != string(appendSequence(nil, id.Seq)):
		return nil, fmt.Errorf("sequence %.40q does not agree with the id", j.Sequence)
	case j.Lane != id.Lane:
		return nil, fmt.Errorf("lane %.80q does not agree with the id", j.Lane)
	case j.Uncorrected != nil && j.ClockState == ClockUnsynced:
		return nil, errors.New("uncorrectedtime stands beside a time that was not put right")
	case j.ClockState != ClockSynced && j.ClockState != ClockUnsynced:
		return nil, fmt.Errorf("clockstate %.40q is neither %s nor %s", j.ClockState, ClockSynced, ClockUnsynced)
	case j.Replayed == nil:
		return nil, errors.New("replayed is missing")
	case j.QoS == nil || *j.QoS < 0 || *j.QoS > 2:
		return nil, errors.New("qos is not 0, 1 or 2")
	}
	behind := uint64(0)
	if j.Behind != "" {
		behind, err = strconv.ParseUint(j.Behind, 10, 64)
		if err != nil || behind == 0 || behind > id.Seq || j.Behind != string(appendSequence(nil, behind)) {
			return nil, fmt.Errorf("behind %.40q is not a sequence up to that of the id", j.Behind)
		}
	}
	ev := &CloudEvent{ID: id, Replayed: *j.Replayed, Behind: behind, Message: Message{
		Received: j.Time.UnixMilli(), Device: device, Topic: j.Subject, Flags: Flags(*j.QoS),
	}}
	for flag, set := range map[Flags]bool{FlagRetain: j.Retain, FlagDup: j.Dup, FlagWill: j.Will, FlagClockUnsynced: j.ClockState == ClockUnsynced} {
		if set {
			ev.Message.Flags |= flag
		}
	}
	if j.Uncorrected != nil {
		ev.Message.Corrected = ev.Message.Received - j.Uncorrected.UnixMilli()
	}
	if ev.Message.Props, err = j.props(ev.Message.Received); err != nil {
		return nil, err
	}
	ev.Message.Payload, err = j.payload()
	return ev, err
}

func (j *eventJSON) props(received int64) (*Props, error) {
	p := Props{ContentType: j.ContentType, ResponseTopic: j.ResponseTopic, Format: j.PayloadFormat}
	if j.Correlation != nil {
		var err error
		if p.Correlation, err = base64.StdEncoding.Strict().DecodeString(*j.Correlation); err != nil {
			return nil, fmt.Errorf("correlationdata: %w", err)
		}
	}
	if j.User != "" {
		var list [][]string
		if err := json.Unmarshal([]byte(j.User), &list); err != nil {
			return nil, fmt.Errorf("userproperties: %w", err)
		}
		for _, kv := range list {
			if len(kv) != 2 {
				return nil, errors.New("userproperties is not a list of pairs")
			}
			p.User = append(p.User, [2]string(kv))
		}
	}
	if j.Expiry != nil {
		left := (j.Expiry.UnixMilli() - received) / 1000
		if left < 1 || left > 1<<32-1 {
			return nil, fmt.Errorf("expirytime %s is not after time, or too far", j.Expiry.Format(time.RFC3339))
		}
		p.Expiry = uint32(left)
	}
	if p.ContentType == "" && p.ResponseTopic == "" && p.Correlation == nil && p.User == nil && p.Format == 0 && p.Expiry == 0 {
		return nil, nil
	}
	return &p, nil
}

// payload is data as it stands if the content type is JSON, else what data_base64 holds.
func (j *eventJSON) payload() ([]byte, error) {
	data := len(j.Data) > 0 && string(j.Data) != "null"
	switch {
	case data && j.DataBase64 != nil:
		return nil, errors.New("data and data_base64 exclude each other")
	case data && !isJSON(j.ContentType):
		return nil, fmt.Errorf("data is JSON, but datacontenttype is %.80q", j.ContentType)
	case data:
		return j.Data, nil
	case j.DataBase64 != nil:
		b, err := base64.StdEncoding.Strict().DecodeString(*j.DataBase64)
		if err != nil {
			return nil, fmt.Errorf("data_base64: %w", err)
		}
		return b, nil
	}
	return nil, nil
}

// maxAttributes is far more than any event has.
const maxAttributes = 100

// checkNames refuses what encoding/json lets pass: a name that stands there twice, and a name in
// other letters than CloudEvents allows, which it would take for the name in small ones.
// b is valid JSON; anything but an object has no names, and lacks all that is required.
func checkNames(b []byte) error {
	names := make([][]byte, 0, 32)
	depth, isName := 0, false
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '{', '[':
			depth++
			isName = depth == 1
		case '}', ']':
			depth--
		case ',':
			isName = depth == 1
		case '"':
			start := i + 1
			for i = start; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
			if !isName {
				continue
			}
			isName = false
			name := b[start:i]
			for _, c := range name {
				if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
					return fmt.Errorf("attribute name %.40q has other characters than a-z and 0-9", name)
				}
			}
			for _, other := range names {
				if string(other) == string(name) {
					return fmt.Errorf("attribute %.40q stands there twice", name)
				}
			}
			if names = append(names, name); len(names) > maxAttributes {
				return fmt.Errorf("more than %d attributes", maxAttributes)
			}
		}
	}
	return nil
}

// parseSource takes the device out of /gateways/{gateway}/devices/{device}.
func parseSource(source, gateway string) (device string, err error) {
	rest, ok := strings.CutPrefix(source, "/gateways/")
	level, rest, ok2 := strings.Cut(rest, "/devices/")
	if !ok || !ok2 || strings.Contains(rest, "/") {
		return "", fmt.Errorf("%.200q is not /gateways/{gateway}/devices/{device}", source)
	}
	if g, err := url.PathUnescape(level); err != nil || g != gateway {
		return "", fmt.Errorf("%.200q does not agree with the id", source)
	}
	return url.PathUnescape(rest)
}
