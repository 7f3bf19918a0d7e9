package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	ClockUnsynced = "unsynced" // the gateway did not know the time when it received the message
)

// maxTime is the last time that RFC 3339 can write: the end of the year 9999, Unix ms.
const maxTime = 253402300799999

// AppendCloudEvent appends m as a CloudEvents 1.0 structured JSON event to dst, in one line.
// replayed: it was sent before, or may have been. It keeps nothing of m.
//
// The payload becomes data if it is declared as JSON, or not declared at all, and is JSON;
// else data_base64. An error means that m cannot be written as an event, now or later.
func AppendCloudEvent(dst []byte, gateway, epoch, lane string, seq uint64, m Message, replayed bool) ([]byte, error) {
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
	dst = append(dst, `","replayed":`...)
	dst = strconv.AppendBool(dst, replayed)
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
}

// DecodeCloudEvent reads an event that AppendCloudEvent has written, strictly: attributes once each, all that the
// message needs, and in agreement with each other. Unknown extension attributes are skipped.
// Other types and later specversions are ErrVersion.
func DecodeCloudEvent(b []byte) (*CloudEvent, error) {
	attrs, err := decodeObject(b)
	if err != nil {
		return nil, fmt.Errorf("cloudevent: %w: %v", ErrFormat, err)
	}
	d := attrDecoder{attrs: attrs}
	ev := new(CloudEvent)
	id := d.text("id", true)
	if v := d.text("specversion", true); v != "1.0" && v != "" {
		return nil, fmt.Errorf("cloudevent %.200q: specversion %.40q: %w", id, v, ErrVersion)
	}
	if t := d.text("type", true); t != CloudEventType && t != "" {
		if strings.HasPrefix(t, "holdfast.message.") {
			return nil, fmt.Errorf("cloudevent %.200q: type %.80q: %w", id, t, ErrVersion)
		}
		return nil, fmt.Errorf("cloudevent %.200q: %w: type %.80q is not %s", id, ErrFormat, t, CloudEventType)
	}
	d.check("id", func() (err error) { ev.ID, err = ParseID(id); return err })
	d.check("source", func() (err error) { ev.Message.Device, err = parseSource(d.text("source", true), ev.ID.Gateway); return err })
	ev.Message.Topic = d.text("subject", true)
	ev.Message.Received = d.time("time", true)
	if seq := d.text("sequence", true); seq != string(appendSequence(nil, ev.ID.Seq)) {
		d.fail("sequence", fmt.Errorf("%.40q does not agree with the id", seq))
	}
	if lane := d.text("lane", true); lane != ev.ID.Lane {
		d.fail("lane", fmt.Errorf("%.80q does not agree with the id", lane))
	}
	switch s := d.text("clockstate", true); s {
	case ClockSynced:
	case ClockUnsynced:
		ev.Message.Flags |= FlagClockUnsynced
	default:
		d.fail("clockstate", fmt.Errorf("%.40q is neither %s nor %s", s, ClockSynced, ClockUnsynced))
	}
	d.value("replayed", true, &ev.Replayed)
	qos := 0
	d.value("qos", true, &qos)
	if qos < 0 || qos > 2 {
		d.fail("qos", fmt.Errorf("%d is none", qos))
	}
	ev.Message.Flags |= Flags(qos)
	for name, flag := range map[string]Flags{"retain": FlagRetain, "dup": FlagDup, "will": FlagWill} {
		set := false
		if d.value(name, false, &set); set {
			ev.Message.Flags |= flag
		}
	}
	d.props(&ev.Message)
	d.data(&ev.Message)
	if d.err != nil {
		return nil, fmt.Errorf("cloudevent %.200q: %w: %v", id, ErrFormat, d.err)
	}
	return ev, nil
}

// decodeObject reads one JSON object and refuses a name that stands there twice, and what follows
// the object. encoding/json alone would take the last one, and match "ID" with "id".
func decodeObject(b []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	if t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	attrs := make(map[string]json.RawMessage, 16)
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name, _ := t.(string)
		if _, twice := attrs[name]; twice {
			return nil, fmt.Errorf("%.40q stands there twice", name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, err
		}
		attrs[name] = v
	}
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	return attrs, nil
}

// attrDecoder takes attributes and keeps the first error.
type attrDecoder struct {
	attrs map[string]json.RawMessage
	err   error
}

func (d *attrDecoder) fail(name string, err error) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %w", name, err)
	}
}

func (d *attrDecoder) check(name string, fn func() error) {
	if d.err != nil {
		return
	}
	if err := fn(); err != nil {
		d.fail(name, err)
	}
}

// value reads an attribute. A null is an attribute that is not there (CloudEvents JSON format 1.0 §2.2).
func (d *attrDecoder) value(name string, required bool, to any) bool {
	raw, ok := d.attrs[name]
	if !ok || string(raw) == "null" {
		if required {
			d.fail(name, errors.New("is missing"))
		}
		return false
	}
	if err := json.Unmarshal(raw, to); err != nil {
		d.fail(name, err)
		return false
	}
	return true
}

func (d *attrDecoder) text(name string, required bool) (s string) {
	d.value(name, required, &s)
	return s
}

func (d *attrDecoder) time(name string, required bool) int64 {
	var t time.Time // UnmarshalJSON is strict RFC 3339
	if !d.value(name, required, &t) {
		return 0
	}
	return t.UnixMilli()
}

func (d *attrDecoder) props(m *Message) {
	p := Props{ContentType: d.text("datacontenttype", false), ResponseTopic: d.text("responsetopic", false)}
	if s := ""; d.value("correlationdata", false, &s) {
		d.check("correlationdata", func() (err error) { p.Correlation, err = base64.StdEncoding.Strict().DecodeString(s); return err })
	}
	if s := ""; d.value("userproperties", false, &s) {
		d.check("userproperties", func() error {
			var list [][]string
			if err := json.Unmarshal([]byte(s), &list); err != nil {
				return err
			}
			for _, kv := range list {
				if len(kv) != 2 {
					return errors.New("not a list of pairs")
				}
				p.User = append(p.User, [2]string{kv[0], kv[1]})
			}
			return nil
		})
	}
	d.value("payloadformat", false, &p.Format)
	if at := d.time("expirytime", false); at != 0 {
		left := (at - m.Received) / 1000
		if left < 1 || left > 1<<32-1 {
			d.fail("expirytime", errors.New("is not after time, or too far"))
		}
		p.Expiry = uint32(left)
	}
	if p.ContentType != "" || p.ResponseTopic != "" || p.Correlation != nil || p.User != nil || p.Format != 0 || p.Expiry != 0 {
		m.Props = &p
	}
}

// data reads the payload: the value of data as it stands when the content type is JSON, else what data_base64 holds.
func (d *attrDecoder) data(m *Message) {
	raw, ok := d.attrs["data"]
	if string(raw) == "null" {
		ok = false
	}
	s := ""
	binary := d.value("data_base64", false, &s)
	switch {
	case ok && binary:
		d.fail("data", errors.New("stands beside data_base64"))
	case binary:
		d.check("data_base64", func() (err error) { m.Payload, err = base64.StdEncoding.Strict().DecodeString(s); return err })
	case ok && (m.Props == nil || !isJSON(m.Props.ContentType)):
		d.fail("data", errors.New("is JSON, but datacontenttype is not"))
	case ok:
		m.Payload = raw
	}
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
