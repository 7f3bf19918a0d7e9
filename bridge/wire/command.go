package wire

import "encoding/json"

// Submit is a command as the cloud asks for it: the payload of gw/{gateway}/cmd/{device}/submit, JSON or CBOR, and the
// body of POST /api/v1/devices/{id}/commands. Only name is required.
type Submit struct {
	ID               string   `json:"id,omitempty"` // "": one is made, but then a repeat is a new command
	Name             string   `json:"name"`
	Payload          []byte   `json:"-"` // from payload or payload_base64; see DecodeSubmit
	ContentType      string   `json:"content_type,omitempty"`
	TTL              Duration `json:"ttl,omitzero"`
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

// CommandEvent is one step of a command: the payload of gw/{gateway}/evt/cmd/{device}/{id}/{state}, JSON. state is a command's
// state as it is written everywhere (QUEUED, SENT, …), or REFUSED for one that was not taken.
type CommandEvent struct {
	Gateway      string          `json:"gateway"`
	Device       string          `json:"device"`
	ID           string          `json:"id"` // "-" in the topic if it is not known
	Name         string          `json:"name,omitempty"`
	State        string          `json:"state"`
	Previous     string          `json:"previous,omitempty"`
	At           Time            `json:"at"`         // RFC 3339, ms, the gateway's wall clock
	ClockState   string          `json:"clockstate"` // synced, unsynced
	Attempts     int             `json:"attempts"`
	Reason       string          `json:"reason,omitempty"`
	Code         string          `json:"code,omitempty"` // REFUSED: which kind of refusal
	Late         bool            `json:"late,omitempty"`
	Repeat       bool            `json:"repeat,omitempty"` // the answer to a submit that came again: nothing has changed
	Progress     *EventProgress  `json:"progress,omitempty"`
	Result       json.RawMessage `json:"result,omitempty"` // JSON as it came; other text as a string
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
	State      string `json:"state"` // online, offline
	At         Time   `json:"at"`
	ClockState string `json:"clockstate"`
	Address    string `json:"address,omitempty"`
	Protocol   string `json:"protocol,omitempty"`
	Reason     string `json:"reason,omitempty"` // offline: why
}

// CommandAction is what the cloud asks on gw/{gateway}/cmd/{device}/{action}.
type CommandAction string

// The actions.
const (
	ActionSubmit CommandAction = "submit"
	ActionCancel CommandAction = "cancel"
)

// StateRefused stands in a CommandEvent for a command that was not taken.
const StateRefused = "REFUSED"
