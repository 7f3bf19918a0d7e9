package wire_test

import (
	"strings"
	"testing"

	"holdfast/bridge/wire"
)

func TestIDIsReadBackWhateverTheGatewayIsCalled(t *testing.T) {
	const epoch = "0190163d-8694-739b-aea5-966c26f8ad91"
	for _, gateway := range []string{"ward-3-east", "a/b", "/", "ä ö", "x//y/1", "100%", "g\x00"} {
		for _, seq := range []uint64{1, 42, 1<<64 - 1} {
			want := wire.MessageID{Gateway: gateway, Epoch: epoch, Lane: "telemetry", Seq: seq}
			got, err := wire.ParseID(want.String())
			if err != nil || got != want {
				t.Errorf("ParseID(%q) = %+v, %v", want.String(), got, err)
			}
		}
	}
	if got := wire.ID("g", "e", "alarm", 7); got != "g/e/alarm/7" {
		t.Errorf("ID = %q", got)
	}
}

func TestParseIDRefuses(t *testing.T) {
	for _, id := range []string{
		"", "1", "/", "////", "g/e/l", "g/e/l/", "g/e/l/x", "g/e/l/-1", "g/e/l/+1", "g/e/l/01", "g/e/l/0",
		"g/e/l/18446744073709551616", "e/l/1", "/e/l/1", "g//l/1", "g/e//1", "g/e/l/1/",
	} {
		if got, err := wire.ParseID(id); err == nil {
			t.Errorf("ParseID(%q) = %+v", id, got)
		}
	}
}

func TestTopicsAreReadBack(t *testing.T) {
	for _, name := range []string{"ward-3", "a/b", "+", "#", "%2F", "%", "ä", "$SYS", "a b", "tab\t", "\x7f", "a.b:c"} {
		for _, c := range []struct {
			topic string
			want  wire.Topic
		}{
			{wire.DataTopic(name, name), wire.Topic{Kind: wire.KindBatch, Gateway: name, Name: name}},
			{wire.MessageTopic(name, name), wire.Topic{Kind: wire.KindMessage, Gateway: name, Name: name}},
			{wire.GapTopic(name), wire.Topic{Kind: wire.KindGap, Gateway: name}},
			{wire.StateTopic(name), wire.Topic{Kind: wire.KindState, Gateway: name}},
		} {
			if got := wire.ParseTopic(c.topic); got != c.want {
				t.Errorf("ParseTopic(%q) = %+v, want %+v", c.topic, got, c.want)
			}
			if strings.ContainsAny(c.topic, "+#") {
				t.Errorf("topic %q holds a wildcard", c.topic)
			}
		}
	}
}

func TestTopicsStandAsDocumented(t *testing.T) {
	for got, want := range map[string]string{
		wire.DataTopic("ward-3-east", "telemetry"):  "gw/ward-3-east/data/telemetry",
		wire.MessageTopic("ward-3-east", "bed-7"):   "gw/ward-3-east/msg/bed-7",
		wire.MessageTopic("ward-3-east", "a/b+c#%"): "gw/ward-3-east/msg/a%2Fb%2Bc%23%25",
		wire.GapTopic("ward-3-east"):                "gw/ward-3-east/evt/gap",
		wire.StateTopic("ward-3-east"):              "gw/ward-3-east/state",
		wire.Filter("ward-3-east"):                  "gw/ward-3-east/#",
		wire.Filter(""):                             "gw/+/#",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestParseTopicLeavesOtherTopicsAlone(t *testing.T) {
	for topic, want := range map[string]wire.Kind{
		"":                        wire.KindOther,
		"gw":                      wire.KindOther,
		"gw/":                     wire.KindOther,
		"gw/g":                    wire.KindOther,
		"gw//data/x":              wire.KindOther,
		"gw/g/data":               wire.KindOther,
		"gw/g/data/a/b":           wire.KindOther,
		"gw/g/msg/a/b":            wire.KindOther,
		"gw/g/states":             wire.KindOther,
		"gw/g/state/x":            wire.KindOther,
		"gw/%/data/x":             wire.KindOther,
		"gw/%41/data/x":           wire.KindOther, // A needs no escape
		"gw/g/msg/%2f":            wire.KindOther, // lower case
		"dt/icu/bed-7/vitals":     wire.KindOther,
		"gw/g/evt/gap":            wire.KindGap,
		"gw/g/evt/cmd/d/1/QUEUED": wire.KindCommandEvent,
		"gw/g/cmd/d/submit":       wire.KindCommand,
	} {
		if got := wire.ParseTopic(topic).Kind; got != want {
			t.Errorf("ParseTopic(%q).Kind = %v, want %v", topic, got, want)
		}
	}
}

func FuzzTopicLevel(f *testing.F) {
	for _, s := range []string{"", "a", "a/b", "%2F", "%", "\xff+"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		back, ok := wire.UnescapeLevel(wire.EscapeLevel(s))
		if !ok || back != s {
			t.Fatalf("%q came back as %q, %v", s, back, ok)
		}
		if name, ok := wire.UnescapeLevel(s); ok && !strings.ContainsAny(s, "/+#") {
			for i := range len(s) {
				if s[i] < 0x20 || s[i] == 0x7f {
					return // not what EscapeLevel writes, but harmless
				}
			}
			if again := wire.EscapeLevel(name); again != s {
				t.Fatalf("%q and %q are both spellings of %q", s, again, name)
			}
		}
	})
}

func FuzzID(f *testing.F) {
	f.Add("g/e/l/1")
	f.Add("a/b/e/l/18446744073709551615")
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := wire.ParseID(s); err == nil && id.String() != s {
			t.Fatalf("%q was read as %+v", s, id)
		}
	})
}
