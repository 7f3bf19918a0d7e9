package wire

import (
	"bytes"
	"strings"
)

// Topics of commands. Levels are escaped as everywhere; a level that is empty is no topic of ours.

// CommandTopic is where the cloud asks: gw/{gateway}/cmd/{device}/{action}.
func CommandTopic(gateway, device string, action CommandAction) string {
	return "gw/" + escapeLevel(gateway) + "/cmd/" + escapeLevel(device) + "/" + escapeLevel(string(action))
}

// CommandFilter subscribes to all that the cloud asks of a gateway: gw/{gateway}/cmd/+/+.
func CommandFilter(gateway string) string { return "gw/" + escapeLevel(gateway) + "/cmd/+/+" }

// ParseCommandTopic undoes CommandTopic. The action may be one that there is not.
func ParseCommandTopic(topic string) (gateway, device string, action CommandAction, ok bool) {
	if gateway, topic, ok = afterGateway(topic, "cmd/"); !ok {
		return "", "", "", false
	}
	var levels [2]string
	if !parseLevels(topic, levels[:]) {
		return "", "", "", false
	}
	return gateway, levels[0], CommandAction(levels[1]), true
}

// CommandEventTopic is gw/{gateway}/evt/cmd/{device}/{id}/{state}; an id or device that is not known is written "-".
func CommandEventTopic(gateway, device, id, state string) string {
	return "gw/" + escapeLevel(gateway) + "/evt/cmd/" + orDash(device) + "/" + orDash(id) + "/" + escapeLevel(state)
}

func orDash(name string) string {
	if name == "" {
		return "-"
	}
	return escapeLevel(name)
}

// CommandEventFilter subscribes to the events of a gateway's commands; "" stands for any.
func CommandEventFilter(gateway, device, id string) string {
	return "gw/" + orAny(gateway) + "/evt/cmd/" + orAny(device) + "/" + orAny(id) + "/+"
}

func orAny(name string) string {
	if name == "" {
		return "+"
	}
	return escapeLevel(name)
}

// ParseCommandEventTopic undoes CommandEventTopic: "-" is "".
func ParseCommandEventTopic(topic string) (gateway, device, id, state string, ok bool) {
	var levels [3]string
	if gateway, topic, ok = afterGateway(topic, "evt/cmd/"); !ok || !parseLevels(topic, levels[:]) {
		return "", "", "", "", false
	}
	for i := range levels[:2] {
		if levels[i] == "-" {
			levels[i] = ""
		}
	}
	return gateway, levels[0], levels[1], levels[2], true
}

// DeviceEventTopic is gw/{gateway}/evt/device/{device}/{online|offline}.
func DeviceEventTopic(gateway, device string, online bool) string {
	state := StateOffline
	if online {
		state = StateOnline
	}
	return "gw/" + escapeLevel(gateway) + "/evt/device/" + escapeLevel(device) + "/" + state
}

// DeviceEventFilter subscribes to the coming and going of devices; "" stands for any.
func DeviceEventFilter(gateway, device string) string {
	return "gw/" + orAny(gateway) + "/evt/device/" + orAny(device) + "/+"
}

// ParseDeviceEventTopic undoes DeviceEventTopic.
func ParseDeviceEventTopic(topic string) (gateway, device string, online, ok bool) {
	var levels [2]string
	if gateway, topic, ok = afterGateway(topic, "evt/device/"); !ok || !parseLevels(topic, levels[:]) {
		return "", "", false, false
	}
	if levels[1] != StateOnline && levels[1] != StateOffline {
		return "", "", false, false
	}
	return gateway, levels[0], levels[1] == StateOnline, true
}

// RequestTopic is where a command goes to its device: cmd/{device}/req/{id}/{name}.
func RequestTopic(device, id, name string) string {
	return "cmd/" + escapeLevel(device) + "/req/" + escapeLevel(id) + "/" + escapeLevel(name)
}

// RequestFilter is what a device subscribes to: cmd/{device}/req/#.
func RequestFilter(device string) string { return "cmd/" + escapeLevel(device) + "/req/#" }

// ParseRequestTopic undoes RequestTopic.
func ParseRequestTopic(topic string) (device, id, name string, ok bool) {
	return parseDeviceTopic(topic, "req")
}

// AnswerTopic is where a device answers: cmd/{device}/res/{id}/{kind}; kind is accepted, progress, succeeded, failed or
// rejected.
func AnswerTopic(device, id, kind string) string {
	return "cmd/" + escapeLevel(device) + "/res/" + escapeLevel(id) + "/" + escapeLevel(kind)
}

// AnswerPrefix is what a device puts a slash and the kind behind: cmd/{device}/res/{id}, the response topic of MQTT 5.
func AnswerPrefix(device, id string) string {
	return "cmd/" + escapeLevel(device) + "/res/" + escapeLevel(id)
}

// ParseAnswerTopic undoes AnswerTopic for any kind; many goroutines, no allocation but the strings, and none for other topics.
func ParseAnswerTopic(topic []byte) (device, id, kind string, ok bool) {
	// Every topic of every device comes by here.
	if !bytes.HasPrefix(topic, []byte("cmd/")) || !bytes.Contains(topic, []byte("/res/")) {
		return "", "", "", false
	}
	return parseDeviceTopic(string(topic), "res")
}

// parseDeviceTopic reads cmd/{device}/{way}/{id}/{last}.
func parseDeviceTopic(topic, way string) (device, id, last string, ok bool) {
	rest, ok := strings.CutPrefix(topic, "cmd/")
	var levels [4]string
	if !ok || !parseLevels(rest, levels[:]) || levels[1] != way {
		return "", "", "", false
	}
	return levels[0], levels[2], levels[3], true
}

// afterGateway reads gw/{gateway}/{use}… and returns what follows.
func afterGateway(topic, use string) (gateway, rest string, ok bool) {
	if rest, ok = strings.CutPrefix(topic, "gw/"); !ok {
		return "", "", false
	}
	level, rest, ok := strings.Cut(rest, "/")
	gateway, valid := unescapeLevel(level)
	if !ok || !valid || gateway == "" {
		return "", "", false
	}
	rest, ok = strings.CutPrefix(rest, use)
	return gateway, rest, ok
}

// parseLevels reads exactly len(into) levels, none of them empty.
func parseLevels(topic string, into []string) bool {
	for i := range into {
		level, rest, more := strings.Cut(topic, "/")
		name, ok := unescapeLevel(level)
		if !ok || name == "" || more != (i < len(into)-1) {
			return false
		}
		into[i], topic = name, rest
	}
	return true
}
