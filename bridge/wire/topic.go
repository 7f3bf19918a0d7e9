package wire

import "strings"

// Topics upstream. A name that is one level of a topic is escaped as escapeLevel says, so that a
// client id such as "a/b+c" makes neither a second level nor a wildcard.

// DataTopic is where a lane's batches go.
func DataTopic(gateway, lane string) string {
	return "gw/" + escapeLevel(gateway) + "/data/" + escapeLevel(lane)
}

// MessageTopic is where a device's messages go in the cloudevents format.
func MessageTopic(gateway, device string) string {
	return "gw/" + escapeLevel(gateway) + "/msg/" + escapeLevel(device)
}

// GapTopic is where a gateway announces what it lost by a rule.
func GapTopic(gateway string) string { return "gw/" + escapeLevel(gateway) + "/evt/gap" }

// RestoredTopic is where a gateway tells that it goes on from a backup.
func RestoredTopic(gateway string) string { return "gw/" + escapeLevel(gateway) + "/evt/restored" }

// StateTopic is where a gateway's birth and death are retained.
func StateTopic(gateway string) string { return "gw/" + escapeLevel(gateway) + "/state" }

// Filter subscribes to everything one gateway sends in the batch and cloudevents formats;
// an empty gateway means all gateways.
func Filter(gateway string) string {
	if gateway == "" {
		return "gw/+/#"
	}
	return "gw/" + escapeLevel(gateway) + "/#"
}

// Kind is what a topic upstream carries.
type Kind int

// The kinds.
const (
	KindOther   Kind = iota // not a topic of ours: passthrough, or another program's
	KindBatch               // gw/{gateway}/data/{lane}
	KindMessage             // gw/{gateway}/msg/{device}
	KindGap                 // gw/{gateway}/evt/gap
	KindEvent               // gw/{gateway}/evt/… that is none of the other events
	KindState               // gw/{gateway}/state
	KindCommand             // gw/{gateway}/cmd/…: from the cloud to a gateway

	KindCommandEvent // gw/{gateway}/evt/cmd/{device}/{id}/{state}
	KindDeviceEvent  // gw/{gateway}/evt/device/{device}/{online|offline}
)

// Topic is a topic upstream, taken apart.
type Topic struct {
	Kind    Kind
	Gateway string
	Name    string // the lane, the device, or for KindEvent and KindCommand all that follows
	ID      string // KindCommandEvent: the command's id; "": it is not known
	State   string // KindCommandEvent, KindDeviceEvent
}

// ParseTopic tells what is sent on topic. Whatever is not exactly one of our topics is KindOther.
func ParseTopic(topic string) Topic {
	rest, ok := strings.CutPrefix(topic, "gw/")
	if !ok {
		return Topic{}
	}
	level, rest, ok := strings.Cut(rest, "/")
	gateway, valid := unescapeLevel(level)
	if !ok || !valid || gateway == "" {
		return Topic{}
	}
	if rest == "state" {
		return Topic{Kind: KindState, Gateway: gateway}
	}
	use, rest, ok := strings.Cut(rest, "/")
	if !ok {
		return Topic{}
	}
	switch use {
	case "data", "msg":
		name, valid := unescapeLevel(rest)
		if !valid || strings.Contains(rest, "/") {
			return Topic{}
		}
		if use == "msg" {
			return Topic{Kind: KindMessage, Gateway: gateway, Name: name}
		}
		return Topic{Kind: KindBatch, Gateway: gateway, Name: name}
	case "evt":
		if rest == "gap" {
			return Topic{Kind: KindGap, Gateway: gateway}
		}
		if _, device, id, state, ok := ParseCommandEventTopic(topic); ok {
			return Topic{Kind: KindCommandEvent, Gateway: gateway, Name: device, ID: id, State: state}
		}
		if _, device, online, ok := ParseDeviceEventTopic(topic); ok {
			state := StateOffline
			if online {
				state = StateOnline
			}
			return Topic{Kind: KindDeviceEvent, Gateway: gateway, Name: device, State: state}
		}
		return Topic{Kind: KindEvent, Gateway: gateway, Name: rest}
	case "cmd":
		return Topic{Kind: KindCommand, Gateway: gateway, Name: rest}
	}
	return Topic{}
}

const hexDigits = "0123456789ABCDEF"

// escaped says whether c may not stand in a topic level as it is: what separates levels, the
// wildcards, the escape itself, and control characters (MQTT 5.0 §1.5.4, §4.7).
func escaped(c byte) bool {
	return c < 0x20 || c == 0x7f || c == '/' || c == '+' || c == '#' || c == '%'
}

// escapeLevel writes name as one topic level: %XX for each byte that escaped names, the rest as
// it is. Ordinary ids do not change.
func escapeLevel(name string) string {
	n := 0
	for i := range len(name) {
		if escaped(name[i]) {
			n++
		}
	}
	if n == 0 {
		return name
	}
	b := make([]byte, 0, len(name)+2*n)
	for i := range len(name) {
		if c := name[i]; escaped(c) {
			b = append(b, '%', hexDigits[c>>4], hexDigits[c&15])
		} else {
			b = append(b, c)
		}
	}
	return string(b)
}

// unescapeLevel undoes escapeLevel; false for what escapeLevel cannot have written.
func unescapeLevel(level string) (string, bool) {
	if !strings.Contains(level, "%") {
		return level, true
	}
	b := make([]byte, 0, len(level))
	for i := 0; i < len(level); i++ {
		c := level[i]
		if c == '%' {
			if i+2 >= len(level) {
				return "", false
			}
			hi, lo := strings.IndexByte(hexDigits, level[i+1]), strings.IndexByte(hexDigits, level[i+2])
			if hi < 0 || lo < 0 {
				return "", false
			}
			c, i = byte(hi<<4|lo), i+2
			if !escaped(c) {
				return "", false // one spelling for each name
			}
		}
		b = append(b, c)
	}
	return string(b), true
}
