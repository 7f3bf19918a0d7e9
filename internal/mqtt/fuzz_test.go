package mqtt_test

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"holdfast/internal/mqtt"
)

// fuzzPacket feeds arbitrary bytes to a parser: it must not panic, and what it takes must
// come out of the encoder as something that says the same and parses again.
func fuzzPacket[P any](f *testing.F, parse func([]byte, mqtt.Version) (P, error), encode func([]byte, mqtt.Version, P) []byte, seeds ...string) {
	for _, s := range seeds {
		f.Add([]byte(s), true)
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, frame []byte, five bool) {
		v := mqtt.V311
		if five {
			v = mqtt.V5
		}
		given := bytes.Clone(frame)
		first, err := parse(frame, v)
		if !bytes.Equal(given, frame) {
			t.Fatal("the parser changed the frame")
		}
		if err != nil {
			return
		}
		once := encode(nil, v, first)
		second, err := parse(once, v)
		if err != nil {
			t.Fatalf("% x became % x: %v", frame, once, err)
		}
		if twice := encode([]byte("before"), v, second); string(twice) != "before"+string(once) {
			t.Fatalf("% x became % x and then % x", frame, once, twice)
		}
		a, b := userOnly(first), userOnly(second)
		if !reflect.DeepEqual(a, b) {
			t.Fatalf("% x is %+v, re-encoded %+v", frame, a, b)
		}
	})
}

// userOnly replaces raw properties, whose order encoding may change, by the user properties.
func userOnly(packet any) any {
	v := reflect.ValueOf(packet).Elem()
	clean := reflect.New(v.Type())
	clean.Elem().Set(v)
	var user []string
	strip := func(v reflect.Value) {
		raw := v.FieldByName("Props")
		for name, value := range raw.Interface().(mqtt.Properties).User() {
			user = append(user, string(name), string(value))
		}
		raw.SetZero()
	}
	strip(clean.Elem())
	if c, ok := clean.Interface().(*mqtt.Connect); ok && c.Will != nil {
		w := *c.Will
		c.Will = &w
		strip(reflect.ValueOf(c.Will).Elem())
	}
	return []any{clean.Interface(), user}
}

func FuzzPublish(f *testing.F) {
	fuzzPacket(f, func(b []byte, v mqtt.Version) (*mqtt.Publish, error) {
		var p mqtt.Publish
		return &p, mqtt.ParseDelivery(b, v, &p)
	}, mqtt.AppendPublish,
		pkt(0x30, str("a/b"), "\x00", "x"), pkt(0x3d, str("a/b"), "\x00\x01\x00", "x"), pkt(0x32, str("a/b"), "\x00\x01", "x"),
		pkt(0x32, str(""), "\x00\x07", props("\x01\x01", "\x02\x00\x00\x00\x01", "\x03"+str("j"), "\x08"+str("r"), "\x09"+str("c"), "\x0b\x01", user, "\x0b\x80\x01", "\x23\x00\x01", user), "x"))
}

func FuzzAck(f *testing.F) {
	fuzzPacket(f, func(b []byte, v mqtt.Version) (*mqtt.Ack, error) {
		var a mqtt.Ack
		err := mqtt.ParseAck(b, v, &a)
		a.Props, a.ReasonString = nil, nil // AppendAck has no room for them
		return &a, err
	}, func(dst []byte, v mqtt.Version, a *mqtt.Ack) []byte {
		return mqtt.AppendAck(dst, a.Type, a.ID, v, a.Reason)
	}, "\x40\x02\x00\x01", "\x50\x03\x00\x01\x97", "\x62\x02\x00\x01", pkt(0x70, "\x00\x01\x92", props("\x1f"+str("why"), user)))
}

func FuzzConnect(f *testing.F) {
	fuzzPacket(f, func(b []byte, _ mqtt.Version) (*mqtt.Connect, error) { return mqtt.ParseConnect(b) },
		func(dst []byte, _ mqtt.Version, c *mqtt.Connect) []byte { return mqtt.AppendConnect(dst, c) },
		connect(mqtt.V311, 0xf6, str("d"), str("w"), str("bye"), str("u"), str("p")),
		connect(mqtt.V5, 0x42, str(""), str("p")), willProps("\x18\x00\x00\x00\x01", "\x01\x01", "\x02\x00\x00\x00\x01", "\x03"+str("j"), "\x08"+str("r"), "\x09"+str("c"), user),
		connectProps("\x11\xff\xff\xff\xff", "\x21\x00\x01", "\x27\x00\x00\x10\x00", "\x22\x00\x01", "\x19\x01", "\x17\x00", user, "\x15"+str("m"), "\x16"+str("x")))
}

func FuzzConnack(f *testing.F) {
	fuzzPacket(f, mqtt.ParseConnack, mqtt.AppendConnack, "\x20\x02\x01\x00", "\x20\x03\x00\x87\x00",
		pkt(0x20, "\x00\x00", props("\x11\x00\x00\x00\x00", "\x21\x00\x01", "\x24\x01", "\x25\x00", "\x27\x00\x00\x10\x00", "\x12"+str("id"), "\x22\x00\x01", "\x1f"+str("why"))),
		pkt(0x20, "\x00\x00", props(user, "\x28\x00", "\x29\x00", "\x2a\x00", "\x13\x00\x3c", "\x1a"+str("i"), "\x1c"+str("s"), "\x15"+str("m"), "\x16"+str(""))))
}

func FuzzSubscribe(f *testing.F) {
	fuzzPacket(f, mqtt.ParseSubscribe, mqtt.AppendSubscribe, pkt(0x82, "\x00\x01", str("a/#"), "\x01", str("+"), "\x02"),
		pkt(0x82, "\x00\x01", props("\x0b\x80\x01", user), str("$share/g/a"), "\x29", str("b"), "\x0c"))
}

func FuzzUnsubscribe(f *testing.F) {
	fuzzPacket(f, mqtt.ParseUnsubscribe, mqtt.AppendUnsubscribe, pkt(0xa2, "\x00\x01", str("a/#"), str("+")), pkt(0xa2, "\x00\x01", props(user), str("$share/g/a")))
}

func FuzzSuback(f *testing.F) {
	fuzzPacket(f, mqtt.ParseSuback, mqtt.AppendSuback, pkt(0x90, "\x00\x01\x00\x80"), pkt(0x90, "\x00\x01", props("\x1f"+str("why"), user), "\x02\x97"))
}

func FuzzUnsuback(f *testing.F) {
	fuzzPacket(f, mqtt.ParseUnsuback, mqtt.AppendUnsuback, pkt(0xb0, "\x00\x01"), pkt(0xb0, "\x00\x01", props("\x1f"+str("why"), user), "\x11"))
}

func FuzzDisconnect(f *testing.F) {
	fuzzPacket(f, func(b []byte, v mqtt.Version) (*mqtt.Disconnect, error) {
		d, err := mqtt.ParseDisconnect(b, v, mqtt.FromClient)
		if err != nil {
			return mqtt.ParseDisconnect(b, v, mqtt.FromServer)
		}
		return d, nil
	}, mqtt.AppendDisconnectPacket, "\xe0\x00", "\xe0\x01\x04", pkt(0xe0, "\x00", props("\x11\x00\x00\x00\x05", user)), pkt(0xe0, "\x9d", props("\x1c"+str("s"), "\x1f"+str("why"))))
}

func FuzzAuth(f *testing.F) {
	fuzzPacket(f, func(b []byte, _ mqtt.Version) (*mqtt.Auth, error) { return mqtt.ParseAuth(b) },
		func(dst []byte, _ mqtt.Version, a *mqtt.Auth) []byte { return mqtt.AppendAuth(dst, a) },
		"\xf0\x00", pkt(0xf0, "\x18", props("\x15"+str("m"), "\x16"+str("x"), "\x1f"+str("why"), user)))
}

// FuzzFromClient gives every kind of bytes to what guards the broker.
func FuzzFromClient(f *testing.F) {
	for _, s := range []string{"\xc0\x00", "\xe0\x00", "\x40\x02\x00\x01", pkt(0x82, "\x00\x01", "\x00", str("a/#")), pkt(0x30, str("a"), "\x00")} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		typ, _, head, size, ok, err := mqtt.PeekHeader(b)
		if ok && (err != nil || head < 2 || size < head || size > head+mqtt.MaxRemaining) {
			t.Fatalf("%v %d %d %v", typ, head, size, err)
		}
		whole := ok && size == len(b)
		for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
			if mqtt.ValidateFromClient(b, v) == nil && !whole {
				t.Fatalf("% x is valid but not one frame", b)
			}
		}
	})
}

// FuzzMatch holds Match, ValidFilter and ValidTopic against the plainest form of the rules.
func FuzzMatch(f *testing.F) {
	for _, s := range [][2]string{{"a/#", "a"}, {"+/+", "/"}, {"#", "$SYS/a"}, {"a/+/c", "a//c"}, {"$share/g/a/#", "a"}, {"b+", "b"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, filter, topic string) {
		if got := mqtt.ValidTopic(topic); got != plainText(topic) && !strings.ContainsAny(topic, "+#") {
			t.Fatalf("ValidTopic(%q) = %v", topic, got)
		}
		if got := mqtt.ValidFilter([]byte(filter)); got != plainFilter(filter) {
			t.Fatalf("ValidFilter(%q) = %v", filter, got)
		}
		if mqtt.ValidTopic(topic) && mqtt.ValidFilter(filter) {
			_, inner, _ := mqtt.SplitShared(filter)
			if got, want := mqtt.Match(inner, topic), plainMatch(inner, topic); got != want {
				t.Fatalf("Match(%q, %q) = %v, want %v", inner, topic, got, want)
			}
		}
	})
}

func plainText(s string) bool {
	return s != "" && len(s) <= mqtt.MaxString && strings.ToValidUTF8(s, "\x00") == s && !strings.Contains(s, "\x00")
}

func plainFilter(s string) bool {
	if !plainText(s) {
		return false
	}
	if rest, shared := strings.CutPrefix(s, "$share/"); shared {
		name, inner, ok := strings.Cut(rest, "/")
		if !ok || name == "" || inner == "" || strings.ContainsAny(name, "+#") {
			return false
		}
		s = inner
	}
	levels := strings.Split(s, "/")
	for i, l := range levels {
		if strings.Contains(l, "#") && (l != "#" || i != len(levels)-1) || strings.Contains(l, "+") && l != "+" {
			return false
		}
	}
	return true
}

func plainMatch(filter, topic string) bool {
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	if topic[0] == '$' && (f[0] == "+" || f[0] == "#") {
		return false
	}
	for i, level := range f {
		switch {
		case level == "#":
			return true
		case i >= len(t), level != "+" && level != t[i]:
			return false
		}
	}
	return len(f) == len(t)
}
