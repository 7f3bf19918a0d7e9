package wire

import "github.com/fxamacker/cbor/v2"

// diagnosis bounds what a hostile payload costs: lists and maps of more than 1024, or 16 deep, are not written.
var diagnosis = func() cbor.DiagMode {
	m, err := cbor.DiagOptions{ByteStringText: true, MaxNestedLevels: 16, MaxArrayElements: 1024, MaxMapPairs: 1024}.DiagMode()
	if err != nil {
		panic(err) // the options are wrong
	}
	return m
}()

// Diagnose writes one CBOR value as people read it, in diagnostic notation (RFC 8949 §8).
func Diagnose(b []byte) (string, error) { return diagnosis.Diagnose(b) }
