package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// CommandEvent is one step of a command: the payload of gw/{gateway}/evt/cmd/{device}/{id}/{state}, JSON. state is a command's
// state as it is written everywhere (QUEUED, SENT, …), or REFUSED for one that was not taken.
type CommandEvent struct {
	Gateway      string          `json:"gateway"`
	Device       string          `json:"device"`
	ID           string          `json:"id"` // "-" in the topic if it is not known
	Name         string          `json:"name,omitempty"`
	State        string          `json:"state"`
	Previous     string          `json:"previous,omitempty"`
	Final        bool            `json:"final,omitempty"`          // nothing more comes but, perhaps, a late outcome
	At           Time            `json:"at"`                       // RFC 3339, ms, the gateway's wall clock
	ClockState   string          `json:"clockstate"`               // synced, unsynced
	Uncorrected  *Time           `json:"uncorrected_at,omitempty"` // what At said when the clock was unsynced, if it was put right since
	Attempts     int             `json:"attempts"`
	Reason       string          `json:"reason,omitempty"`
	Code         string          `json:"code,omitempty"` // REFUSED: which kind of refusal
	Late         bool            `json:"late,omitempty"`
	Repeat       bool            `json:"repeat,omitempty"` // the answer to a submit that came again: nothing has changed
	Progress     *EventProgress  `json:"progress,omitempty"`
	Result       json.RawMessage `json:"result,omitempty"` // JSON as it came; other text as a string; see SetResult
	ResultBase64 string          `json:"result_base64,omitempty"`
	ContentType  string          `json:"content_type,omitempty"` // of the result
	Source       string          `json:"source,omitempty"`       // who submitted it
}

// EventProgress is what the device told last.
type EventProgress struct {
	Percent *int   `json:"percent,omitempty"`
	Text    string `json:"text,omitempty"`
}

// DeviceEvent tells that a device came or went: the payload of gw/{gateway}/evt/device/{device}/{online|offline}, JSON.
type DeviceEvent struct {
	Gateway    string `json:"gateway"`
	Device     string `json:"device"`
	State      string `json:"state"` // online, offline: StateOnline, StateOffline
	At         Time   `json:"at"`
	ClockState string `json:"clockstate"`
	// Uncorrected is what At said when the clock was unsynced, if it was put right since.
	Uncorrected *Time  `json:"uncorrected_at,omitempty"`
	Address     string `json:"address,omitempty"`
	Protocol    string `json:"protocol,omitempty"`
	Reason      string `json:"reason,omitempty"` // offline: why
}

// StateRefused stands in a CommandEvent for a command that was not taken.
const StateRefused = "REFUSED"

// SetResult puts what a device sent with its outcome into the event: JSON as it is, other text as a JSON string, and
// everything else in base64. Without a content type, text that is a JSON string, too, counts as text. It keeps payload.
func (e *CommandEvent) SetResult(payload []byte, contentType string) {
	e.Result, e.ResultBase64, e.ContentType = nil, "", contentType
	switch {
	case len(payload) == 0:
	case (isJSON(contentType) || contentType == "" && payload[0] != '"') && embeds(payload) && jsonDepth(payload) <= maxDepth:
		e.Result = payload
	case utf8.Valid(payload) && !isJSON(contentType): // declared as JSON a string would read as that very document
		e.Result = append(appendEscaped(append(make([]byte, 0, len(payload)+16), '"'), payload), '"')
	default:
		e.ResultBase64 = base64.StdEncoding.EncodeToString(payload)
	}
}

// ResultPayload gives back what SetResult was given, or an error if the event holds neither.
func (e *CommandEvent) ResultPayload() ([]byte, error) {
	switch {
	case e.ResultBase64 != "":
		b, err := base64.StdEncoding.Strict().DecodeString(e.ResultBase64)
		if err != nil {
			return nil, fmt.Errorf("result_base64: %w: %v", ErrFormat, err)
		}
		return b, nil
	case len(e.Result) > 0 && e.Result[0] == '"' && !isJSON(e.ContentType):
		s, err := unquote(e.Result)
		if err != nil {
			return nil, fmt.Errorf("result: %w: %v", ErrFormat, err)
		}
		return []byte(s), nil
	}
	return e.Result, nil
}

// Encode writes JSON in one line. Result must be valid JSON, as SetResult makes it.
func (e *CommandEvent) Encode() []byte {
	b := make([]byte, 0, 320+len(e.Reason)+len(e.Result)+len(e.ResultBase64))
	b = append(b, `{"gateway":"`...)
	b = appendEscaped(b, e.Gateway)
	b = append(b, `","device":"`...)
	b = appendEscaped(b, e.Device)
	b = append(b, `","id":"`...)
	b = appendEscaped(b, e.ID)
	b = append(b, '"')
	b = appendMember(b, "name", e.Name)
	b = append(b, `,"state":"`...)
	b = appendEscaped(b, e.State)
	b = append(b, '"')
	b = appendMember(b, "previous", e.Previous)
	b = appendFlag(b, "final", e.Final)
	b = append(b, `,"at":"`...)
	b = e.At.append(b)
	b = append(b, `","clockstate":"`...)
	b = appendEscaped(b, e.ClockState)
	b = appendUncorrected(append(b, '"'), e.Uncorrected)
	b = append(b, `,"attempts":`...)
	b = strconv.AppendInt(b, int64(e.Attempts), 10)
	b = appendMember(b, "reason", e.Reason)
	b = appendMember(b, "code", e.Code)
	b = appendFlag(b, "late", e.Late)
	b = appendFlag(b, "repeat", e.Repeat)
	if p := e.Progress; p != nil {
		b = append(b, `,"progress":{`...)
		if p.Percent != nil {
			b = strconv.AppendInt(append(b, `"percent":`...), int64(*p.Percent), 10)
		}
		b = append(appendMember(b, "text", p.Text), '}')
	}
	if len(e.Result) > 0 {
		b = append(append(b, `,"result":`...), e.Result...)
	}
	b = appendMember(b, "result_base64", e.ResultBase64)
	b = appendMember(b, "content_type", e.ContentType)
	b = appendMember(b, "source", e.Source)
	return append(b, '}')
}

func appendUncorrected(b []byte, at *Time) []byte {
	if at == nil {
		return b
	}
	return append(at.append(append(b, `,"uncorrected_at":"`...)), '"')
}

func appendFlag(b []byte, name string, set bool) []byte {
	if !set {
		return b
	}
	return append(append(append(b, `,"`...), name...), `":true`...)
}

// DecodeCommandEvent reads JSON. Fields it does not know are skipped.
func DecodeCommandEvent(b []byte) (CommandEvent, error) {
	var e CommandEvent
	if err := json.Unmarshal(b, &e); err != nil {
		return CommandEvent{}, fmt.Errorf("command event: %w: %v", ErrFormat, err)
	}
	if e.Gateway == "" || e.State == "" || e.ID == "" && e.State != StateRefused {
		return CommandEvent{}, fmt.Errorf("command event: %w: gateway, id or state is missing", ErrFormat)
	}
	return e, nil
}

// Encode writes JSON in one line.
func (e *DeviceEvent) Encode() []byte {
	b := make([]byte, 0, 256)
	b = append(b, `{"gateway":"`...)
	b = appendEscaped(b, e.Gateway)
	b = append(b, `","device":"`...)
	b = appendEscaped(b, e.Device)
	b = append(b, `","state":"`...)
	b = appendEscaped(b, e.State)
	b = append(b, `","at":"`...)
	b = e.At.append(b)
	b = append(b, `","clockstate":"`...)
	b = appendEscaped(b, e.ClockState)
	b = appendUncorrected(append(b, '"'), e.Uncorrected)
	b = appendMember(b, "address", e.Address)
	b = appendMember(b, "protocol", e.Protocol)
	b = appendMember(b, "reason", e.Reason)
	return append(b, '}')
}

// What stands about the time of an event. Quotes within strings are escaped, so it stands nowhere else, and before all that a
// device may have sent.
const (
	eventTime        = "2006-01-02T15:04:05.000Z"
	eventAt          = `"at":"`
	eventClock       = `","clockstate":"`
	eventUncorrected = `","uncorrected_at":"`
)

// CorrectEvent returns an event of a command or a device, as Encode made it, with its time put right by ms, if the clock was not
// synchronised then. It does not change b; what is no such event comes back as it is.
func CorrectEvent(b []byte, ms int64) []byte {
	at, start, rest, ok := timeOfEvent(b, ClockUnsynced+`"`)
	if !ok {
		return b
	}
	out := Time{at.Add(time.Duration(ms) * time.Millisecond)}.append(bytes.Clone(b[:start]))
	out = append(out, eventClock+ClockSynced+eventUncorrected...)
	out = append(out, b[start:start+len(eventTime)]...)
	return append(append(out, '"'), rest...)
}

// UncorrectEvent returns an event as it was before CorrectEvent. An event that is sent again after the gateway has learned the
// time differs from the first sending; without the correction it is the same to the byte.
func UncorrectEvent(b []byte) []byte {
	_, start, rest, ok := timeOfEvent(b, ClockSynced+eventUncorrected)
	if !ok || len(rest) <= len(eventTime) || rest[len(eventTime)] != '"' {
		return b
	}
	out := append(bytes.Clone(b[:start]), rest[:len(eventTime)]...)
	return append(append(out, eventClock+ClockUnsynced+`"`...), rest[len(eventTime)+1:]...)
}

// timeOfEvent finds an event's time, at b[start:], if its clockstate begins with state; rest is what follows that.
func timeOfEvent(b []byte, state string) (at time.Time, start int, rest []byte, ok bool) {
	end := bytes.Index(b, []byte(eventClock))
	start = end - len(eventTime)
	if start < len(eventAt) || string(b[start-len(eventAt):start]) != eventAt {
		return time.Time{}, 0, nil, false
	}
	rest, ok = bytes.CutPrefix(b[end+len(eventClock):], []byte(state))
	at, err := time.Parse(eventTime, string(b[start:end]))
	return at, start, rest, ok && err == nil
}

// DecodeDeviceEvent reads JSON. Fields it does not know are skipped.
func DecodeDeviceEvent(b []byte) (DeviceEvent, error) {
	var e DeviceEvent
	if err := json.Unmarshal(b, &e); err != nil {
		return DeviceEvent{}, fmt.Errorf("device event: %w: %v", ErrFormat, err)
	}
	if e.Gateway == "" || e.Device == "" || e.State != StateOnline && e.State != StateOffline {
		return DeviceEvent{}, fmt.Errorf("device event: %w: gateway or device is missing, or state is neither online nor offline", ErrFormat)
	}
	return e, nil
}
