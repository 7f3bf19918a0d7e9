package wire_test

import (
	"bytes"
	"testing"

	"holdfast/bridge/wire"
)

func TestDiagnose(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"\xa2\x61t\xf9\x4d\x60\x61b\x42\x00\xff", `{"t": 21.5, "b": h'00ff'}`}, // the keys stay in their order
		{"\x82\x01\xc1\x1a\x51\x4b\x67\xb0", `[1, 1(1363896240)]`},
		{"\x63abc", `"abc"`},
		{"\xf6", `null`},
	} {
		if got, err := wire.Diagnose([]byte(c.in)); err != nil || got != c.want {
			t.Errorf("% x: %q, %v; want %q", c.in, got, err, c.want)
		}
	}
	for what, in := range map[string][]byte{
		"nothing": nil, "half a value": {0xa1, 0x61}, "more than one value": {1, 2}, "depth": bytes.Repeat([]byte{0x81}, 100), "a lie": {0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		if got, err := wire.Diagnose(in); err == nil {
			t.Errorf("%s: %q", what, got)
		}
	}
}

func FuzzDiagnose(f *testing.F) {
	f.Add([]byte("\xa2\x61t\xf9\x4d\x60\x61b\x42\x00\xff"))
	f.Add([]byte("\x9f\x01\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		text, err := wire.Diagnose(b)
		if err == nil && len(text) > 64+12*len(b) {
			t.Errorf("%d bytes became %d", len(b), len(text))
		}
	})
}
