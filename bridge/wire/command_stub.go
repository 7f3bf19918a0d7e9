package wire

import "time"

// The signatures to be built (the file goes away when they are).

// Duration is a time.Duration that JSON writes as "1h30m" and reads as that or as a number of seconds.
type Duration time.Duration

// Time is a time that JSON writes in RFC 3339 with milliseconds, UTC.
type Time struct{ time.Time }

// DecodeSubmit reads JSON or CBOR (told apart by the first byte), strictly: unknown and doubled keys, wrong types, both payloads, trailing bytes are ErrFormat
// with a text that names the key. payload may be text, which is taken as it is, or any other value, whose encoding is taken, with content_type application/json
// or application/cbor if none is given.
func DecodeSubmit(b []byte) (Submit, error) { panic("not built") }

// EncodeSubmit writes JSON.
func EncodeSubmit(s *Submit) ([]byte, error) { panic("not built") }

// DecodeCancel reads JSON or CBOR.
func DecodeCancel(b []byte) (Cancel, error) { panic("not built") }

// EncodeCancel writes JSON.
func EncodeCancel(c *Cancel) ([]byte, error) { panic("not built") }

// Encode writes JSON.
func (e *CommandEvent) Encode() []byte { panic("not built") }

// DecodeCommandEvent reads JSON. Fields it does not know are skipped.
func DecodeCommandEvent(b []byte) (CommandEvent, error) { panic("not built") }

// Encode writes JSON.
func (e *DeviceEvent) Encode() []byte { panic("not built") }

// DecodeDeviceEvent reads JSON.
func DecodeDeviceEvent(b []byte) (DeviceEvent, error) { panic("not built") }

// CommandTopic is gw/{gateway}/cmd/{device}/{action}.
func CommandTopic(gateway, device string, action CommandAction) string { panic("not built") }

// CommandFilter subscribes to all that the cloud asks of a gateway: gw/{gateway}/cmd/+/+.
func CommandFilter(gateway string) string { panic("not built") }

// ParseCommandTopic undoes CommandTopic.
func ParseCommandTopic(topic string) (gateway, device string, action CommandAction, ok bool) {
	panic("not built")
}

// CommandEventTopic is gw/{gateway}/evt/cmd/{device}/{id}/{state}.
func CommandEventTopic(gateway, device, id, state string) string { panic("not built") }

// CommandEventFilter subscribes to the events of a gateway's commands; "" stands for any.
func CommandEventFilter(gateway, device, id string) string { panic("not built") }

// ParseCommandEventTopic undoes CommandEventTopic.
func ParseCommandEventTopic(topic string) (gateway, device, id, state string, ok bool) {
	panic("not built")
}

// DeviceEventTopic is gw/{gateway}/evt/device/{device}/{online|offline}.
func DeviceEventTopic(gateway, device string, online bool) string { panic("not built") }

// RequestTopic is where a command goes to its device: cmd/{device}/req/{id}/{name}.
func RequestTopic(device, id, name string) string { panic("not built") }

// RequestFilter is what a device subscribes to: cmd/{device}/req/#.
func RequestFilter(device string) string { panic("not built") }

// ParseRequestTopic undoes RequestTopic.
func ParseRequestTopic(topic string) (device, id, name string, ok bool) { panic("not built") }

// AnswerTopic is where a device answers: cmd/{device}/res/{id}/{kind}; kind is accepted, progress, succeeded, failed or rejected.
func AnswerTopic(device, id, kind string) string { panic("not built") }

// ParseAnswerTopic undoes AnswerTopic for any kind; many goroutines, no allocation but the strings.
func ParseAnswerTopic(topic []byte) (device, id, kind string, ok bool) { panic("not built") }
