package mqtt_test

import (
	"errors"
	"strings"
	"testing"

	"holdfast/internal/mqtt"
)

// str is a string as it goes over the wire.
func str(s string) string { return string([]byte{byte(len(s) >> 8), byte(len(s))}) + s }

// props is a property section.
func props(list ...string) string { return bin(strings.Join(list, "")) }

// bin puts a length of one byte before s.
func bin(s string) string {
	if len(s) > 127 {
		panic("too long for one byte of length")
	}
	return string([]byte{byte(len(s))}) + s
}

// pkt is a packet: first byte, remaining length, body.
func pkt(first byte, body ...string) string {
	return string([]byte{first}) + bin(strings.Join(body, ""))
}

// pv gives the property section of version 5 and nothing for 3.1.1.
func pv(v mqtt.Version, list ...string) string {
	if v != mqtt.V5 {
		return ""
	}
	return props(list...)
}

const user = "\x26\x00\x01a\x00\x01b"

// connect is a CONNECT with these flags.
func connect(v mqtt.Version, flags byte, payload ...string) string {
	return pkt(0x10, "\x00\x04MQTT", string([]byte{byte(v), flags, 0, 60}), pv(v), strings.Join(payload, ""))
}

func connectProps(list ...string) string {
	return pkt(0x10, "\x00\x04MQTT\x05\x02\x00\x3c", props(list...), str("d"))
}

func willProps(list ...string) string {
	return pkt(0x10, "\x00\x04MQTT\x05\x06\x00\x3c\x00", str("d"), props(list...), str("w"), str("x"))
}

func parseConnect(frame []byte, _ mqtt.Version) error {
	_, err := mqtt.ParseConnect(frame)
	return err
}

func parseDelivery(frame []byte, v mqtt.Version) error {
	var p mqtt.Publish
	return mqtt.ParseDelivery(frame, v, &p)
}

func parseConnack(frame []byte, v mqtt.Version) error {
	_, err := mqtt.ParseConnack(frame, v)
	return err
}

func parseSuback(frame []byte, v mqtt.Version) error {
	_, err := mqtt.ParseSuback(frame, v)
	return err
}

func parseUnsuback(frame []byte, v mqtt.Version) error {
	_, err := mqtt.ParseUnsuback(frame, v)
	return err
}

func parseServerDisconnect(frame []byte, v mqtt.Version) error {
	_, err := mqtt.ParseDisconnect(frame, v, mqtt.FromServer)
	return err
}

func parseAuth(frame []byte, _ mqtt.Version) error {
	_, err := mqtt.ParseAuth(frame)
	return err
}

const (
	both = iota
	only3
	only5
)

// TestRules holds each rule that the codec enforces. Every row has a packet that keeps the
// rule beside one that breaks nothing but it, so that a refusal for another cause shows.
func TestRules(t *testing.T) {
	const v3, v5 = mqtt.V311, mqtt.V5
	type packet = func(v mqtt.Version) string
	same := func(s string) packet { return func(mqtt.Version) string { return s } }
	publish := func(first byte, topic, id string, list ...string) packet {
		return func(v mqtt.Version) string { return pkt(first, topic, id, pv(v, list...), "payload") }
	}
	subscribe := func(first byte, id, filter, options string, list ...string) packet {
		return func(v mqtt.Version) string { return pkt(first, id, pv(v, list...), filter, options) }
	}
	unsubscribe := func(first byte, id, filter string, list ...string) packet {
		return func(v mqtt.Version) string { return pkt(first, id, pv(v, list...), filter) }
	}
	conn := func(flags byte, payload ...string) packet {
		return func(v mqtt.Version) string { return connect(v, flags, payload...) }
	}
	will := func(flags byte, topic string) packet {
		return func(v mqtt.Version) string { return connect(v, flags, str("d"), pv(v), topic, str("bye")) }
	}
	topic, filter := str("a/b"), str("a/#")
	okPublish := publish(0x32, topic, "\x00\x01")
	okSubscribe := subscribe(0x82, "\x00\x01", filter, "\x01")
	okUnsubscribe := unsubscribe(0xA2, "\x00\x01", filter)
	okConnect := conn(0x02, str("d"))
	malformed, protocol := mqtt.MalformedPacket, mqtt.ProtocolError

	type row struct {
		rule   string // normative statement, or section where it has no number
		name   string
		in     int // versions
		parse  func([]byte, mqtt.Version) error
		good   packet
		bad    packet
		reason mqtt.Reason
	}
	client := mqtt.ValidateFromClient
	rows := []row{
		// 1.5, data representation
		{"MQTT-1.5.4-1", "topic is not UTF-8", both, client, publish(0x30, str("a\u00e9"), ""), publish(0x30, str("a\xe9"), ""), malformed},
		{"MQTT-1.5.4-1", "topic with a surrogate", both, client, publish(0x30, str("a\u20ac"), ""), publish(0x30, str("a\xed\xa0\x80"), ""), malformed},
		{"MQTT-1.5.4-1", "topic with an overlong form", both, client, okPublish, publish(0x30, str("a\xc0\xaf"), ""), malformed},
		{"MQTT-1.5.4-1", "topic cut inside a character", both, client, okPublish, publish(0x30, str("a\xe2\x82"), ""), malformed},
		{"MQTT-1.5.4-1", "filter is not UTF-8", both, client, okSubscribe, subscribe(0x82, "\x00\x01", str("a\xff"), "\x00"), malformed},
		{"MQTT-1.5.4-1", "client identifier is not UTF-8", both, parseConnect, okConnect, conn(2, str("\xff")), malformed},
		{"MQTT-1.5.4-1", "user name is not UTF-8", both, parseConnect, conn(0x82, str("d"), str("u")), conn(0x82, str("d"), str("\xff")), malformed},
		{"MQTT-1.5.4-1", "will topic is not UTF-8", both, parseConnect, will(0x06, str("w")), will(0x06, str("\xff")), malformed},
		{"MQTT-1.5.4-1", "content type is not UTF-8", only5, client, publish(0x30, topic, "", "\x03"+str("x")), publish(0x30, topic, "", "\x03"+str("\xff")), malformed},
		{"MQTT-1.5.7-1", "user property is not UTF-8", only5, client, publish(0x30, topic, "", user), publish(0x30, topic, "", "\x26"+str("a")+str("\xff")), malformed},
		{"MQTT-1.5.4-2", "topic with U+0000", both, client, okPublish, publish(0x30, str("a\x00"), ""), malformed},
		{"MQTT-1.5.4-2", "filter with U+0000", both, client, okSubscribe, subscribe(0x82, "\x00\x01", str("a\x00"), "\x00"), malformed},
		{"MQTT-1.5.4-2", "client identifier with U+0000", both, parseConnect, okConnect, conn(2, str("a\x00")), malformed},
		{"MQTT-1.5.5-1", "remaining length is padded", only5, client, okPublish, same("\x30\x87\x00" + topic + "\x00x"), malformed},
		{"MQTT-1.5.5-1", "property length is padded", only5, client, okPublish, same(pkt(0x30, topic, "\x80\x00")), malformed},
		{"MQTT-1.5.5-1", "property length of five bytes", only5, client, okPublish, same(pkt(0x30, topic, "\x80\x80\x80\x80\x01")), malformed},
		{"MQTT-1.5.5-1", "remaining length of five bytes", both, client, okPublish, same("\x30\x80\x80\x80\x80\x01"), malformed},

		// 2, packet format
		{"MQTT-2.1.3-1", "flags of SUBSCRIBE", both, client, okSubscribe, subscribe(0x80, "\x00\x01", filter, "\x00"), malformed},
		{"MQTT-2.1.3-1", "flags of UNSUBSCRIBE", both, client, okUnsubscribe, unsubscribe(0xA0, "\x00\x01", filter), malformed},
		{"MQTT-2.1.3-1", "flags of PUBREL", both, client, same("\x62\x02\x00\x01"), same("\x60\x02\x00\x01"), malformed},
		{"MQTT-2.1.3-1", "flags of PUBACK", both, client, same("\x40\x02\x00\x01"), same("\x42\x02\x00\x01"), malformed},
		{"MQTT-2.1.3-1", "flags of PUBREC", both, client, same("\x50\x02\x00\x01"), same("\x51\x02\x00\x01"), malformed},
		{"MQTT-2.1.3-1", "flags of PUBCOMP", both, client, same("\x70\x02\x00\x01"), same("\x78\x02\x00\x01"), malformed},
		{"MQTT-2.1.3-1", "flags of PINGREQ", both, client, same("\xc0\x00"), same("\xc1\x00"), malformed},
		{"MQTT-2.1.3-1", "flags of DISCONNECT", both, client, same("\xe0\x00"), same("\xe1\x00"), malformed},
		{"MQTT-2.1.3-1", "flags of CONNECT", both, parseConnect, okConnect, same("\x11" + connect(v5, 2, str("d"))[1:]), malformed},
		{"MQTT-2.2.1-3", "PUBLISH with packet identifier 0", both, client, okPublish, publish(0x32, topic, "\x00\x00"), protocol},
		{"MQTT-2.2.1-3", "QoS 2 with packet identifier 0", both, client, publish(0x34, topic, "\x00\x01"), publish(0x34, topic, "\x00\x00"), protocol},
		{"MQTT-2.2.1-3", "SUBSCRIBE with packet identifier 0", both, client, okSubscribe, subscribe(0x82, "\x00\x00", filter, "\x00"), protocol},
		{"MQTT-2.2.1-3", "UNSUBSCRIBE with packet identifier 0", both, client, okUnsubscribe, unsubscribe(0xA2, "\x00\x00", filter), protocol},
		{"MQTT-2.2.1-3", "PUBACK with packet identifier 0", both, client, same("\x40\x02\x00\x01"), same("\x40\x02\x00\x00"), protocol},
		{"§2.2.2.2", "unknown property", only5, client, publish(0x30, topic, "", user), publish(0x30, topic, "", "\x04\x00"), malformed},
		{"§2.2.2.2", "property of another packet", only5, client, publish(0x30, topic, "", "\x01\x01"), publish(0x30, topic, "", "\x21\x00\x01"), malformed},
		{"§2.2.2.2", "properties longer than the packet", only5, client, publish(0x30, topic, "", user), same(pkt(0x30, topic, "\x09", user)), malformed},
		{"§2.2.2.2", "property cut at the end of the properties", only5, client, publish(0x30, topic, "", user), same(pkt(0x30, topic, "\x06", user)), malformed},

		// 3.1, CONNECT
		{"MQTT-3.1.0-2", "second CONNECT", both, client, okPublish, okConnect, protocol},
		{"MQTT-3.1.2-1", "protocol name", both, parseConnect, okConnect, same(pkt(0x10, str("MQTX"), "\x04\x02\x00\x3c", str("d"))), mqtt.UnsupportedProtocolVersion},
		{"MQTT-3.1.2-2", "protocol level", both, parseConnect, okConnect, same(pkt(0x10, str("MQTT"), "\x06\x02\x00\x3c\x00", str("d"))), mqtt.UnsupportedProtocolVersion},
		{"MQTT-3.1.2-2", "MQTT 3.1", both, parseConnect, okConnect, same(pkt(0x10, str("MQIsdp"), "\x03\x02\x00\x3c", str("d"))), mqtt.UnsupportedProtocolVersion},
		{"MQTT-3.1.2-3", "reserved connect flag", both, parseConnect, okConnect, conn(0x03, str("d")), malformed},
		{"MQTT-3.1.2-11", "will QoS without a will", both, parseConnect, okConnect, conn(0x0a, str("d")), malformed},
		{"MQTT-3.1.2-12", "will QoS 3", both, parseConnect, will(0x16, str("w")), will(0x1e, str("w")), malformed},
		{"MQTT-3.1.2-13", "will retain without a will", both, parseConnect, okConnect, conn(0x22, str("d")), malformed},
		{"MQTT-3.1.2-22", "password without a user name", only3, parseConnect, conn(0xc2, str("d"), str("u"), str("p")), conn(0x42, str("d"), str("p")), malformed},
		{"§3.1.2.8", "user name missing", both, parseConnect, conn(0x82, str("d"), str("u")), conn(0x82, str("d")), malformed},
		{"§3.1.2.9", "password missing", both, parseConnect, conn(0xc2, str("d"), str("u"), str("p")), conn(0xc2, str("d"), str("u")), malformed},
		{"MQTT-3.1.2-9", "will missing", both, parseConnect, will(0x06, str("w")), conn(0x06, str("d")), malformed},
		{"MQTT-3.1.2-16", "user name without its flag", both, parseConnect, okConnect, conn(0x02, str("d"), str("u")), malformed},
		{"MQTT-3.1.3-3", "client identifier missing", both, parseConnect, okConnect, conn(0x02), malformed},
		{"MQTT-3.1.3-8", "empty client identifier without clean session", only3, parseConnect, conn(0x02, str("")), conn(0x00, str("")), mqtt.ClientIDNotValid},
		{"MQTT-3.3.2-2", "will topic with a wildcard", both, parseConnect, will(0x06, str("w")), will(0x06, str("w/#")), mqtt.TopicNameInvalid},
		{"MQTT-4.7.3-1", "will topic empty", both, parseConnect, will(0x06, str("w")), will(0x06, str("")), protocol},
		{"§3.1.2.11.2", "session expiry twice", only5, parseConnect, same(connectProps("\x11\x00\x00\x00\x01")), same(connectProps("\x11\x00\x00\x00\x01", "\x11\x00\x00\x00\x01")), protocol},
		{"§3.1.2.11.3", "receive maximum 0", only5, parseConnect, same(connectProps("\x21\x00\x01")), same(connectProps("\x21\x00\x00")), protocol},
		{"§3.1.2.11.4", "maximum packet size 0", only5, parseConnect, same(connectProps("\x27\x00\x00\x00\x01")), same(connectProps("\x27\x00\x00\x00\x00")), protocol},
		{"§3.1.2.11.6", "request response information 2", only5, parseConnect, same(connectProps("\x19\x01")), same(connectProps("\x19\x02")), protocol},
		{"§3.1.2.11.7", "request problem information 2", only5, parseConnect, same(connectProps("\x17\x00")), same(connectProps("\x17\x02")), protocol},
		{"§3.1.2.11.10", "authentication data alone", only5, parseConnect, same(connectProps("\x15"+str("m"), "\x16"+str("x"))), same(connectProps("\x16" + str("x"))), protocol},
		{"§3.1.2.11", "will delay among the properties of CONNECT", only5, parseConnect, same(willProps("\x18\x00\x00\x00\x01")), same(connectProps("\x18\x00\x00\x00\x01")), malformed},
		{"§3.1.3.2", "receive maximum among the properties of the will", only5, parseConnect, same(willProps(user, user)), same(willProps("\x21\x00\x01")), malformed},
		{"§3.1.3.2.3", "will's payload format 2", only5, parseConnect, same(willProps("\x01\x01")), same(willProps("\x01\x02")), protocol},
		{"MQTT-3.3.2-14", "will's response topic with a wildcard", only5, parseConnect, same(willProps("\x08" + str("r"))), same(willProps("\x08" + str("r/+"))), mqtt.TopicNameInvalid},

		// 3.2, CONNACK
		{"MQTT-3.2.2-1", "reserved acknowledge flags", both, parseConnack, func(v mqtt.Version) string { return pkt(0x20, "\x01\x00", pv(v)) }, func(v mqtt.Version) string { return pkt(0x20, "\x02\x00", pv(v)) }, malformed},
		{"MQTT-3.2.2-6", "session present in a refusal", only5, parseConnack, same(pkt(0x20, "\x00\x87\x00")), same(pkt(0x20, "\x01\x87\x00")), protocol},
		{"MQTT-3.2.2-4", "session present in a refusal", only3, parseConnack, same(pkt(0x20, "\x00\x05")), same(pkt(0x20, "\x01\x05")), protocol},
		{"MQTT-3.2.2-8", "reason code of another packet", only5, parseConnack, same(pkt(0x20, "\x00\x87\x00")), same(pkt(0x20, "\x00\x8b\x00")), malformed},
		{"MQTT-3.2.2-6", "return code 6", only3, parseConnack, same(pkt(0x20, "\x00\x05")), same(pkt(0x20, "\x00\x06")), malformed},
		{"§3.2.2.3.4", "maximum QoS 2", only5, parseConnack, same(pkt(0x20, "\x00\x00", props("\x24\x01"))), same(pkt(0x20, "\x00\x00", props("\x24\x02"))), protocol},
		{"§3.2.2.3.5", "retain available 2", only5, parseConnack, same(pkt(0x20, "\x00\x00", props("\x25\x00"))), same(pkt(0x20, "\x00\x00", props("\x25\x02"))), protocol},

		// 3.3, PUBLISH
		{"MQTT-3.3.1-2", "DUP with QoS 0", both, client, publish(0x3a, topic, "\x00\x01"), publish(0x38, topic, ""), malformed},
		{"MQTT-3.3.1-4", "QoS 3", both, client, publish(0x34, topic, "\x00\x01"), publish(0x36, topic, "\x00\x01"), malformed},
		{"MQTT-3.3.2-2", "topic with +", both, client, okPublish, publish(0x30, str("a/+"), ""), mqtt.TopicNameInvalid},
		{"MQTT-3.3.2-2", "topic with #", both, client, okPublish, publish(0x30, str("#"), ""), mqtt.TopicNameInvalid},
		{"MQTT-4.7.3-1", "topic empty", only3, client, okPublish, publish(0x30, str(""), ""), protocol},
		{"§3.3.2.1", "topic empty without an alias", only5, client, publish(0x30, str(""), "", "\x23\x00\x01"), publish(0x30, str(""), ""), protocol},
		{"MQTT-3.3.2-8", "topic alias 0", only5, client, publish(0x30, topic, "", "\x23\x00\x01"), publish(0x30, topic, "", "\x23\x00\x00"), mqtt.TopicAliasInvalid},
		{"§3.3.2.3.4", "topic alias twice", only5, client, publish(0x30, topic, "", "\x23\x00\x01"), publish(0x30, topic, "", "\x23\x00\x01", "\x23\x00\x01"), protocol},
		{"§3.3.2.3.2", "payload format 2", only5, client, publish(0x30, topic, "", "\x01\x01"), publish(0x30, topic, "", "\x01\x02"), protocol},
		{"§3.3.2.3.2", "payload format twice", only5, client, publish(0x30, topic, "", "\x01\x01"), publish(0x30, topic, "", "\x01\x01", "\x01\x01"), protocol},
		{"§3.3.2.3.3", "message expiry twice", only5, client, publish(0x30, topic, "", "\x02\x00\x00\x00\x01"), publish(0x30, topic, "", "\x02\x00\x00\x00\x01", "\x02\x00\x00\x00\x01"), protocol},
		{"MQTT-3.3.2-14", "response topic with a wildcard", only5, client, publish(0x30, topic, "", "\x08"+str("r")), publish(0x30, topic, "", "\x08"+str("r/#")), mqtt.TopicNameInvalid},
		{"MQTT-3.3.2-14", "response topic empty", only5, client, publish(0x30, topic, "", "\x08"+str("r")), publish(0x30, topic, "", "\x08"+str("")), mqtt.TopicNameInvalid},
		{"§3.3.2.3.6", "correlation data twice", only5, client, publish(0x30, topic, "", "\x09"+str("")), publish(0x30, topic, "", "\x09"+str(""), "\x09"+str("")), protocol},
		{"§3.3.2.3.9", "content type twice", only5, client, publish(0x30, topic, "", "\x03"+str("")), publish(0x30, topic, "", "\x03"+str(""), "\x03"+str("")), protocol},
		{"MQTT-3.3.4-6", "subscription identifier from a client", only5, client, okPublish, publish(0x30, topic, "", "\x0b\x01"), protocol},
		{"§3.3.2.3.8", "subscription identifier 0", only5, parseDelivery, publish(0x30, topic, "", "\x0b\x01", "\x0b\x02"), publish(0x30, topic, "", "\x0b\x00"), protocol},

		// 3.4 to 3.7, acknowledgements
		{"MQTT-3.4.2-1", "reason code of another packet in PUBACK", only5, client, same("\x40\x03\x00\x01\x97"), same("\x40\x03\x00\x01\x92"), protocol},
		{"MQTT-3.5.2-1", "reason code of another packet in PUBREC", only5, client, same("\x50\x03\x00\x01\x97"), same("\x50\x03\x00\x01\x01"), protocol},
		{"MQTT-3.6.2-1", "reason code of another packet in PUBREL", only5, client, same("\x62\x03\x00\x01\x92"), same("\x62\x03\x00\x01\x97"), protocol},
		{"MQTT-3.7.2-1", "reason code of another packet in PUBCOMP", only5, client, same("\x70\x03\x00\x01\x92"), same("\x70\x03\x00\x01\x80"), protocol},
		{"§3.4", "PUBACK with a reason code", only3, client, same("\x40\x02\x00\x01"), same("\x40\x03\x00\x01\x00"), malformed},
		{"§3.4", "PUBACK too short", both, client, same("\x40\x02\x00\x01"), same("\x40\x01\x00"), malformed},
		{"§3.4.2.2", "reason string twice", only5, client, same(pkt(0x40, "\x00\x01\x00", props("\x1f"+str("x")))), same(pkt(0x40, "\x00\x01\x00", props("\x1f"+str("x"), "\x1f"+str("x")))), protocol},
		{"§3.4.2.2", "bytes after the properties", only5, client, same(pkt(0x40, "\x00\x01\x00", props())), same(pkt(0x40, "\x00\x01\x00", props(), "x")), malformed},

		// 3.8 to 3.11, subscriptions
		{"MQTT-3.8.3-2", "SUBSCRIBE without a filter", both, client, okSubscribe, subscribe(0x82, "\x00\x01", "", ""), protocol},
		{"MQTT-3.8.3-5", "reserved option bits", both, client, okSubscribe, subscribe(0x82, "\x00\x01", filter, "\x40"), malformed},
		{"MQTT-3.8.3-4", "options of MQTT 5", only3, client, okSubscribe, subscribe(0x82, "\x00\x01", filter, "\x04"), malformed},
		{"§3.8.3.1", "QoS 3", both, client, okSubscribe, subscribe(0x82, "\x00\x01", filter, "\x03"), protocol},
		{"§3.8.3.1", "retain handling 3", only5, client, subscribe(0x82, "\x00\x01", filter, "\x2d"), subscribe(0x82, "\x00\x01", filter, "\x30"), protocol},
		{"MQTT-3.8.3-4", "no local on a shared subscription", only5, client, subscribe(0x82, "\x00\x01", str("$share/g/a"), "\x01"), subscribe(0x82, "\x00\x01", str("$share/g/a"), "\x05"), protocol},
		{"§3.8.2.1.2", "subscription identifier 0", only5, client, subscribe(0x82, "\x00\x01", filter, "\x00", "\x0b\xff\xff\xff\x7f"), subscribe(0x82, "\x00\x01", filter, "\x00", "\x0b\x00"), protocol},
		{"§3.8.2.1.2", "subscription identifier twice", only5, client, subscribe(0x82, "\x00\x01", filter, "\x00", "\x0b\x01"), subscribe(0x82, "\x00\x01", filter, "\x00", "\x0b\x01", "\x0b\x01"), protocol},
		{"§3.8.3", "options byte missing", both, client, okSubscribe, subscribe(0x82, "\x00\x01", filter, ""), malformed},
		{"MQTT-4.7.3-1", "filter empty", both, client, okSubscribe, subscribe(0x82, "\x00\x01", str(""), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.7.1-1", "a#", both, client, okSubscribe, subscribe(0x82, "\x00\x01", str("a#"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.7.1-1", "#/a", both, client, okSubscribe, subscribe(0x82, "\x00\x01", str("#/a"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.7.1-2", "b+", both, client, subscribe(0x82, "\x00\x01", str("b/+"), "\x00"), subscribe(0x82, "\x00\x01", str("b+"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.7.1-2", "+b", both, client, subscribe(0x82, "\x00\x01", str("+/b"), "\x00"), subscribe(0x82, "\x00\x01", str("+b"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.7.1-1", "a# in UNSUBSCRIBE", both, client, okUnsubscribe, unsubscribe(0xA2, "\x00\x01", str("a#")), mqtt.TopicFilterInvalid},
		{"MQTT-4.8.2-1", "share name empty", both, client, subscribe(0x82, "\x00\x01", str("$share/g/a"), "\x00"), subscribe(0x82, "\x00\x01", str("$share//a"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.8.2-2", "share name with a wildcard", both, client, subscribe(0x82, "\x00\x01", str("$share/g/+/#"), "\x00"), subscribe(0x82, "\x00\x01", str("$share/g+/a"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.8.2-2", "shared subscription without a filter", both, client, subscribe(0x82, "\x00\x01", str("$share/g/a"), "\x00"), subscribe(0x82, "\x00\x01", str("$share/g"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-4.8.2-2", "shared subscription with an empty filter", both, client, subscribe(0x82, "\x00\x01", str("$share/g/a"), "\x00"), subscribe(0x82, "\x00\x01", str("$share/g/"), "\x00"), mqtt.TopicFilterInvalid},
		{"MQTT-3.10.3-2", "UNSUBSCRIBE without a filter", both, client, okUnsubscribe, unsubscribe(0xA2, "\x00\x01", ""), protocol},
		{"MQTT-3.9.3-2", "return code 3", only3, parseSuback, same(pkt(0x90, "\x00\x01\x80")), same(pkt(0x90, "\x00\x01\x03")), protocol},
		{"MQTT-3.9.3-2", "reason code of another packet", only5, parseSuback, same(pkt(0x90, "\x00\x01\x00\x87")), same(pkt(0x90, "\x00\x01\x00\x10")), protocol},
		{"MQTT-3.9.3-2", "reason code that 3.1.1 lacks", only3, parseSuback, same(pkt(0x90, "\x00\x01\x80")), same(pkt(0x90, "\x00\x01\x87")), protocol},
		{"MQTT-3.9.3-1", "SUBACK without a reason code", both, parseSuback, func(v mqtt.Version) string { return pkt(0x90, "\x00\x01", pv(v), "\x00") }, func(v mqtt.Version) string { return pkt(0x90, "\x00\x01", pv(v)) }, protocol},
		{"MQTT-3.11.3-2", "reason code of another packet in UNSUBACK", only5, parseUnsuback, same(pkt(0xB0, "\x00\x01\x00\x11")), same(pkt(0xB0, "\x00\x01\x00\x01")), protocol},
		{"§3.11", "UNSUBACK with a payload", only3, parseUnsuback, same(pkt(0xB0, "\x00\x01")), same(pkt(0xB0, "\x00\x01\x00")), malformed},

		// 3.12 to 3.15
		{"§3.12", "PINGREQ with a payload", both, client, same("\xc0\x00"), same("\xc0\x01x"), malformed},
		{"§3.14", "DISCONNECT with a payload", only3, client, same("\xe0\x00"), same("\xe0\x01\x00"), malformed},
		{"MQTT-3.14.2-1", "reason code that only servers send", only5, client, same("\xe0\x01\x04"), same("\xe0\x01\x8b"), protocol},
		{"MQTT-3.14.2-1", "reason code that only clients send", only5, parseServerDisconnect, same("\xe0\x01\x8b"), same("\xe0\x01\x04"), protocol},
		{"MQTT-3.14.2-2", "session expiry from a server", only5, parseServerDisconnect, same(pkt(0xe0, "\x00", props(user))), same(pkt(0xe0, "\x00", props("\x11\x00\x00\x00\x00"))), protocol},
		{"§3.14.2.2.5", "server reference from a client", only5, client, same(pkt(0xe0, "\x00", props("\x11\x00\x00\x00\x00"))), same(pkt(0xe0, "\x00", props("\x1c"+str("s")))), protocol},
		{"§3.14", "DISCONNECT from a server", only3, parseServerDisconnect, nil, same("\xe0\x00"), protocol},
		{"MQTT-3.15.2-1", "reason code of another packet in AUTH", only5, parseAuth, same(pkt(0xf0, "\x18", props("\x15"+str("m")))), same(pkt(0xf0, "\x97", props("\x15"+str("m")))), protocol},
		{"§3.15.2.2.2", "AUTH without an authentication method", only5, parseAuth, same(pkt(0xf0, "\x18", props("\x15"+str("m")))), same(pkt(0xf0, "\x18", props())), protocol},
		{"MQTT-4.12.0-7", "unsolicited AUTH", only5, client, okPublish, same(pkt(0xf0, "\x18", props("\x15"+str("m")))), protocol},
		{"§2.1.2", "AUTH", only3, client, okPublish, same("\xf0\x00"), malformed},
		{"§2.1.2", "packet type 0", both, client, okPublish, same("\x00\x00"), malformed},
		{"§2.1.2", "CONNACK from a client", both, client, okPublish, same("\x20\x02\x00\x00"), protocol},
		{"§2.1.2", "SUBACK from a client", both, client, okPublish, same("\x90\x03\x00\x01\x00"), protocol},
		{"§2.1.2", "UNSUBACK from a client", both, client, okPublish, same("\xb0\x02\x00\x01"), protocol},
		{"§2.1.2", "PINGRESP from a client", both, client, okPublish, same("\xd0\x00"), protocol},
		{"§2.1.2", "SUBACK where CONNACK is due", both, parseConnack, func(v mqtt.Version) string { return pkt(0x20, "\x00\x00", pv(v)) }, func(v mqtt.Version) string { return pkt(0x90, "\x00\x01", pv(v), "\x00") }, protocol},
		{"§4.13", "frame cut short", both, client, okPublish, func(v mqtt.Version) string { s := okPublish(v); return s[:len(s)-1] }, malformed},
		{"§4.13", "two packets in one frame", both, client, same("\xc0\x00"), same("\xc0\x00\xc0\x00"), malformed},
		{"§4.13", "empty frame", both, client, okPublish, same(""), malformed},
	}
	for _, r := range rows {
		for _, v := range []mqtt.Version{v3, v5} {
			if r.in == only3 && v != v3 || r.in == only5 && v != v5 {
				continue
			}
			t.Run(r.rule+" "+r.name+"/version="+v.String(), func(t *testing.T) {
				if r.good != nil {
					if err := r.parse([]byte(r.good(v)), v); err != nil {
						t.Errorf("% x: %v, want none", r.good(v), err)
					}
				}
				err := r.parse([]byte(r.bad(v)), v)
				var e *mqtt.Error
				if !errors.As(err, &e) {
					t.Fatalf("% x: error %v, want *mqtt.Error", r.bad(v), err)
				}
				if e.Reason != r.reason {
					t.Errorf("% x: %v, want %v", r.bad(v), err, r.reason)
				}
				if !strings.HasPrefix(r.rule, "§") && e.Rule != "" && !strings.Contains(e.Rule, r.rule) && !sharedRule[e.Rule] {
					t.Errorf("% x: refused by rule %s, want %s", r.bad(v), e.Rule, r.rule)
				}
			})
		}
	}
}

// sharedRule: errors that stand for more statements than they name.
var sharedRule = map[string]bool{
	"MQTT-1.5.4-1 / MQTT-1.5.3-1": true,
}

// TestRefusedConnect pins what the peer is told, in the version that it can read.
func TestRefusedConnect(t *testing.T) {
	for _, c := range []struct {
		name, connect, want string
	}{
		{"wrong name: closed without a word", pkt(0x10, str("HTTP"), "\x04\x02\x00\x3c", str("d")), ""},
		{"MQTT 3.1", pkt(0x10, str("MQIsdp"), "\x03\x02\x00\x3c", str("d")), "\x20\x02\x00\x01"},
		{"level 3", pkt(0x10, str("MQTT"), "\x03\x02\x00\x3c", str("d")), "\x20\x02\x00\x01"},
		{"level 6", pkt(0x10, str("MQTT"), "\x06\x02\x00\x3c\x00", str("d")), "\x20\x03\x00\x84\x00"},
		{"mosquitto bridge, first try with 3.1.1", pkt(0x10, str("MQTT"), "\x84\x02\x00\x3c", str("d")), "\x20\x02\x00\x01"},
		{"mosquitto bridge, first try with 5", pkt(0x10, str("MQTT"), "\x85\x02\x00\x3c\x00", str("d")), "\x20\x03\x00\x84\x00"},
		{"3.1.1 malformed: closed without a word", connect(mqtt.V311, 0x03, str("d")), ""},
		{"5 malformed", connect(mqtt.V5, 0x03, str("d")), "\x20\x03\x00\x81\x00"},
		{"5 with trailing bytes", connect(mqtt.V5, 0x02, str("d"), "x"), "\x20\x03\x00\x81\x00"},
		{"3.1.1 client identifier", connect(mqtt.V311, 0, str("")), "\x20\x02\x00\x02"},
		{"5 will topic", connect(mqtt.V5, 0x06, str("d"), props(), str("#"), str("")), "\x20\x03\x00\x90\x00"},
		{"not even a protocol name", "\x10\x00", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := mqtt.ParseConnect([]byte(c.connect))
			var e *mqtt.Error
			if !errors.As(err, &e) {
				t.Fatalf("error %v, want *mqtt.Error", err)
			}
			if got := string(e.AppendConnack(nil)); got != c.want {
				t.Errorf("%v: answered % x, want % x", err, got, c.want)
			}
		})
	}
}

func TestPeekHeader(t *testing.T) {
	for _, c := range []struct {
		in         string
		typ        mqtt.Type
		flags      byte
		head, size int
		ok, fails  bool
	}{
		{in: ""},
		{in: "\x30", typ: mqtt.TypePublish},
		{in: "\x31\x00", typ: mqtt.TypePublish, flags: 1, head: 2, size: 2, ok: true},
		{in: "\x30\x7f", typ: mqtt.TypePublish, head: 2, size: 129, ok: true},
		{in: "\x30\x80", typ: mqtt.TypePublish},
		{in: "\x30\x80\x01", typ: mqtt.TypePublish, head: 3, size: 131, ok: true},
		{in: "\x30\xff\xff\xff\x7f", typ: mqtt.TypePublish, head: 5, size: 5 + mqtt.MaxRemaining, ok: true},
		{in: "\x30\x80\x80\x80", typ: mqtt.TypePublish},
		{in: "\x30\x80\x80\x80\x80", typ: mqtt.TypePublish, fails: true},
		{in: "\x0f", fails: true, flags: 15},
		{in: "\x36", typ: mqtt.TypePublish, flags: 6, fails: true},
		{in: "\x38", typ: mqtt.TypePublish, flags: 8, fails: true},
		{in: "\x80", typ: mqtt.TypeSubscribe, fails: true},
	} {
		typ, flags, head, size, ok, err := mqtt.PeekHeader([]byte(c.in))
		if typ != c.typ || flags != c.flags || head != c.head || size != c.size || ok != c.ok || (err != nil) != c.fails {
			t.Errorf("% x: %v %d %d %d %v %v, want %+v", c.in, typ, flags, head, size, ok, err, c)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		filter, topic string
		want          bool
	}{
		{"a", "a", true},
		{"a", "b", false},
		{"a", "a/", false},
		{"a/", "a", false},
		{"a", "ab", false},
		{"ab", "a", false},
		{"#", "a", true},
		{"#", "/", true},
		{"#", "$SYS", false},
		{"+/a", "$x/a", false},
		{"$x/#", "$x/a", true},
		{"$x/+", "$x/a", true},
		{"a/#", "a", true},
		{"a/#", "a/", true},
		{"a/#", "a/b/c", true},
		{"a/#", "ab", false},
		{"a/#", "b", false},
		{"+", "a", true},
		{"+", "a/b", false},
		{"+", "/", false},
		{"+/+", "/", true},
		{"+/+", "/a", true},
		{"/+", "/a", true},
		{"+", "", false},
		{"a/+/c", "a/b/c", true},
		{"a/+/c", "a//c", true},
		{"a/+/c", "a/b/b/c", false},
		{"a/+", "a", false},
		{"a/+", "a/", true},
		{"+/#", "a", true},
		{"a/+/#", "a/b", true},
		{"a/+/#", "a", false},
		{"/", "/", true},
		{"//", "/", false},
		{"é/+", "é/ü", true},
		{"a/b/#", "a", false},
		{"sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true},
	} {
		if got := mqtt.Match(c.filter, c.topic); got != c.want {
			t.Errorf("Match(%q, %q) = %v", c.filter, c.topic, got)
		}
	}
}

func TestSplitShared(t *testing.T) {
	for _, c := range []struct {
		in, name, inner string
		ok              bool
	}{
		{"$share/g/a/#", "g", "a/#", true},
		{"$share/g//a", "g", "/a", true},
		{"$share", "", "$share", false},
		{"$Share/g/a", "", "$Share/g/a", false},
		{"a/b", "", "a/b", false},
	} {
		if !mqtt.ValidFilter(c.in) {
			t.Errorf("%q is not valid", c.in)
		}
		if name, inner, ok := mqtt.SplitShared(c.in); name != c.name || inner != c.inner || ok != c.ok {
			t.Errorf("SplitShared(%q) = %q, %q, %v", c.in, name, inner, ok)
		}
	}
}

func TestLongestText(t *testing.T) {
	long := strings.Repeat("a", mqtt.MaxString)
	if !mqtt.ValidTopic(long) || !mqtt.ValidFilter(long) {
		t.Error("65535 bytes refused")
	}
	if mqtt.ValidTopic(long+"a") || mqtt.ValidFilter(long+"a") {
		t.Error("65536 bytes accepted [MQTT-4.7.3-3]")
	}
}
