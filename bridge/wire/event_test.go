package wire_test

import (
	"errors"
	"testing"

	"holdfast/bridge/wire"
)

func TestDecodeGap(t *testing.T) {
	const good = `"gateway":"g","epoch":"e","lane":"l","upstream":"u"`
	for payload, ok := range map[string]bool{
		`{` + good + `,"first":1,"last":1,"count":1}`:                                       true,
		`{` + good + `,"first":1,"last":9,"count":3,"later":[1]}`:                           true,
		`{` + good + `,"first":1,"last":18446744073709551615,"count":18446744073709551615}`: true,
		`{` + good + `,"first":0,"last":1,"count":2}`:                                       false,
		`{` + good + `,"first":2,"last":1,"count":1}`:                                       false,
		`{` + good + `,"first":1,"last":2,"count":3}`:                                       false,
		`{` + good + `,"first":1,"last":2,"count":0}`:                                       false,
		`{` + good + `,"first":-1,"last":2,"count":1}`:                                      false,
		`{"epoch":"e","lane":"l","first":1,"last":1,"count":1}`:                             false,
		`{"gateway":"g","lane":"l","first":1,"last":1,"count":1}`:                           false,
		`{"gateway":"g","epoch":"e","first":1,"last":1,"count":1}`:                          false,
		``: false, `null`: false, `[]`: false, `{`: false,
	} {
		if got, err := wire.DecodeGap([]byte(payload)); (err == nil) != ok || err != nil && !errors.Is(err, wire.ErrFormat) {
			t.Errorf("%s: %+v, %v", payload, got, err)
		}
	}
}

func TestDecodeState(t *testing.T) {
	for payload, ok := range map[string]bool{
		`{"state":"online","epoch":"e","version":"1","ts":5,"later":1}`: true,
		`{"state":"offline"}`:        true,
		`{"state":"asleep"}`:         false,
		`{"state":"online","ts":""}`: false,
		`{}`:                         false, ``: false, `null`: false,
	} {
		if got, err := wire.DecodeState([]byte(payload)); (err == nil) != ok || err != nil && !errors.Is(err, wire.ErrFormat) {
			t.Errorf("%s: %+v, %v", payload, got, err)
		}
	}
}
