package broker_test

import (
	"net"
	"slices"
	"testing"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"holdfast/internal/mqtt"
)

// What the broker leans on in mochi. If one of these fails after an update, look at the place
// that is named.

type probe struct {
	net.Conn
	writes [][]byte
}

func (p *probe) Write(b []byte) (int, error) {
	p.writes = append(p.writes, append([]byte{}, b...))
	return len(b), nil
}

type probeHook struct {
	mochi.HookBase
	deny  string
	calls []string
	set   byte
}

func (h *probeHook) Provides(b byte) bool { return b == mochi.OnACLCheck || b == mochi.OnSubscribed }

func (h *probeHook) OnACLCheck(_ *mochi.Client, filter string, write bool) bool {
	h.calls = append(h.calls, "acl "+filter)
	return filter != h.deny && !write
}

func (h *probeHook) OnSubscribed(_ *mochi.Client, _ packets.Packet, codes []byte) {
	h.calls = append(h.calls, "subscribed")
	if h.set != 0 {
		codes[0] = h.set
	}
}

func probing(t *testing.T, v mqtt.Version) (*mochi.Server, *probeHook, *mochi.Client, *probe) {
	t.Helper()
	c := mochi.NewDefaultServerCapabilities()
	c.MaximumClientWritesPending = 0
	s := mochi.New(&mochi.Options{Capabilities: c, Logger: quiet})
	h := &probeHook{deny: "secret"}
	if err := s.AddHook(h, nil); err != nil {
		t.Fatal(err)
	}
	cl := s.NewClient(nil, "test", "dev", false)
	w := &probe{}
	cl.Net.Conn = w
	cl.Properties.ProtocolVersion = byte(v)
	return s, h, cl, w
}

func request(kind byte, filters ...string) packets.Packet {
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: kind, Qos: 1}, PacketID: 5}
	for _, f := range filters {
		pk.Filters = append(pk.Filters, packets.Subscription{Filter: f, Qos: 1})
	}
	return pk
}

// subscribe.go: one SUBACK is written before InjectPacket returns, nothing else ever; the hook's
// codes are what it carries; a retained message of mochi's own there is none.
func TestMochiSubscribe(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		s, h, cl, w := probing(t, v)
		h.set = 2
		if err := s.InjectPacket(cl, request(packets.Subscribe, "a/b", "secret", "$share/g/c")); err != nil {
			t.Fatal(err)
		}
		if want := []string{"acl a/b", "acl secret", "acl $share/g/c", "subscribed"}; !slices.Equal(h.calls, want) {
			t.Errorf("hooks %v, want %v", h.calls, want)
		}
		if len(w.writes) != 1 {
			t.Fatalf("%d writes", len(w.writes))
		}
		a, err := mqtt.ParseSuback(w.writes[0], v)
		if err != nil {
			t.Fatal(err)
		}
		want := []mqtt.Reason{2, mqtt.NotAuthorized, 1}
		if v == mqtt.V311 {
			want[1] = mqtt.UnspecifiedError
		}
		if a.ID != 5 || !slices.Equal(a.Reasons, want) {
			t.Errorf("SUBACK %+v, want %v", a, want)
		}
		if got := s.Topics.Subscribers("a/b").Subscriptions; len(got) != 1 {
			t.Errorf("subscribers %v", got)
		}
		if got := s.Topics.Subscribers("secret").Subscriptions; len(got) != 0 {
			t.Errorf("subscribers of what was denied: %v", got)
		}
		if got := s.Topics.Subscribers("c").Shared; len(got["$share/g/c"]) != 1 {
			t.Errorf("shared %v", got)
		}
		if n := cl.State.Inflight.Len(); n != 0 {
			t.Errorf("%d in flight", n)
		}
		if err := s.InjectPacket(cl, request(packets.Unsubscribe, "a/b", "none")); err != nil {
			t.Fatal(err)
		}
		if len(w.writes) != 2 {
			t.Fatalf("%d writes", len(w.writes))
		}
		if u, err := mqtt.ParseUnsuback(w.writes[1], v); err != nil || u.ID != 5 || v == mqtt.V5 && len(u.Reasons) != 2 {
			t.Errorf("UNSUBACK %+v, %v", u, err)
		}
		if got := s.Topics.Subscribers("a/b").Subscriptions; len(got) != 0 {
			t.Errorf("subscribers %v", got)
		}
	})
}

// restore.go, session.go: the index may be changed without a client.
func TestMochiIndexWithoutAClient(t *testing.T) {
	s, _, _, _ := probing(t, mqtt.V5)
	for _, f := range []string{"a/+", "$share/g/a/#"} {
		if !s.Topics.Subscribe("dev", packets.Subscription{Filter: f}) {
			t.Errorf("%s is not new", f)
		}
	}
	found := s.Topics.Subscribers("a/b")
	if len(found.Subscriptions) != 1 || len(found.Shared) != 1 {
		t.Errorf("%+v", found)
	}
	s.Topics.Unsubscribe("a/+", "dev")
	s.Topics.Unsubscribe("$share/g/a/#", "dev")
	if found := s.Topics.Subscribers("a/b"); len(found.Subscriptions)+len(found.Shared) != 0 {
		t.Errorf("%+v", found)
	}
}

// Where mochi is wrong and the broker has a cure. When one of these fails mochi has been mended:
// take the cure out.
func TestMochiMistakesThatAreCured(t *testing.T) {
	s, _, _, _ := probing(t, mqtt.V5)
	s.Topics.Subscribe("dev", packets.Subscription{Filter: "a/+/#"})
	if len(s.Topics.Subscribers("a/b").Subscriptions) != 0 {
		t.Error("a/+/# matches a/b: Broker.candidates need not look twice")
	}
	if len(s.Topics.Subscribers("a/b/").Subscriptions) != 1 {
		t.Error("a/+/# does not match a/b/: Broker.candidates does not find it any more")
	}
	s.Topics.Subscribe("dev", packets.Subscription{Filter: "$share/g/#"})
	if len(s.Topics.Subscribers("$x").Shared) != 1 {
		t.Error("$share/g/# does not match $x: deliverer.look need not match again")
	}
	if !s.Topics.Unsubscribe("a/+/#", "somebody else") {
		t.Error("Unsubscribe knows whose subscription it was: conn.unsubscribe need not make the codes")
	}
	if !mochi.IsSharedFilter("$SHARE/g/a") {
		t.Error("$SHARE is no shared subscription: session.judge need not refuse it")
	}
	both := packets.Subscription{Filter: "a", NoLocal: true}.Merge(packets.Subscription{Filter: "b"})
	if !both.NoLocal {
		t.Error("Merge keeps subscriptions with and without No Local apart")
	}
}

// Where mochi's decoder and checks let through what MQTT forbids, or refuse what it allows. These
// are why it never sees what a client sends; docs/mqtt.md lists them.
func TestMochiIsLenient(t *testing.T) {
	decode := func(v mqtt.Version, frame string, f func(*packets.Packet, []byte) error) (*packets.Packet, error) {
		pk := &packets.Packet{ProtocolVersion: byte(v)}
		if err := pk.FixedHeader.Decode(frame[0]); err != nil {
			return pk, err
		}
		pk.FixedHeader.Remaining = len(frame) - 2
		return pk, f(pk, []byte(frame[2:]))
	}
	for _, x := range []struct {
		name  string
		frame string
		f     func(*packets.Packet, []byte) error
		check func(*packets.Packet) packets.Code
	}{
		{"reserved subscription options", "\x82\x07\x00\x01\x00\x00\x01a\xC0", (*packets.Packet).SubscribeDecode, (*packets.Packet).SubscribeValidate},
		{"retain handling 3", "\x82\x07\x00\x01\x00\x00\x01a\x30", (*packets.Packet).SubscribeDecode, (*packets.Packet).SubscribeValidate},
		{"subscription identifier 0", "\x82\x09\x00\x01\x02\x0b\x00\x00\x01a\x00", (*packets.Packet).SubscribeDecode, (*packets.Packet).SubscribeValidate},
		{"property twice", "\x30\x08\x00\x01a\x04\x01\x00\x01\x00", (*packets.Packet).PublishDecode, nil},
		{"payload format 2", "\x30\x06\x00\x01a\x02\x01\x02", (*packets.Packet).PublishDecode, nil},
		{"response topic with wildcard", "\x30\x08\x00\x01a\x04\x08\x00\x01+", (*packets.Packet).PublishDecode, nil},
		{"PUBACK with id 0", "\x40\x02\x00\x00", (*packets.Packet).PubackDecode, nil},
		{"DISCONNECT reason of servers", "\xE0\x01\x8E", (*packets.Packet).DisconnectDecode, nil},
		{"will QoS without a will", "\x10\x0e\x00\x04MQTT\x05\x0a\x00\x3c\x00\x00\x01a", (*packets.Packet).ConnectDecode, (*packets.Packet).ConnectValidate},
		{"bytes after the packet", "\x10\x0f\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01ax", (*packets.Packet).ConnectDecode, (*packets.Packet).ConnectValidate},
	} {
		pk, err := decode(mqtt.V5, x.frame, x.f)
		if err != nil {
			t.Errorf("%s: refused now: %v", x.name, err)
			continue
		}
		if x.check != nil {
			if code := x.check(pk); code != packets.CodeSuccess {
				t.Errorf("%s: refused now: %v", x.name, code)
			}
		}
		if err := mqtt.ValidateFromClient([]byte(x.frame), mqtt.V5); err == nil {
			t.Errorf("%s: internal/mqtt lets it through as well", x.name)
		}
	}
	for _, f := range []string{"a#", "b+", "a/b#", "+a/b"} {
		if !mochi.IsValidFilter(f, false) || mqtt.ValidFilter(f) {
			t.Errorf("filter %s", f)
		}
	}
	for name, frame := range map[string]string{
		"empty will":     "\x10\x14\x00\x04MQTT\x05\x06\x00\x3c\x00\x00\x01a\x00\x00\x01w\x00\x00",
		"empty password": "\x10\x13\x00\x04MQTT\x05\xC2\x00\x3c\x00\x00\x01a\x00\x01u\x00\x00",
	} {
		if _, err := mqtt.ParseConnect([]byte(frame)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		pk, err := decode(mqtt.V5, frame, (*packets.Packet).ConnectDecode)
		if err == nil && pk.ConnectValidate() == packets.CodeSuccess {
			t.Errorf("%s: mochi takes it now", name)
		}
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("SUBSCRIBE cut before its options is no panic any more")
			}
		}()
		_, _ = decode(mqtt.V5, "\x82\x06\x00\x01\x00\x00\x01a", (*packets.Packet).SubscribeDecode)
	}()
}
