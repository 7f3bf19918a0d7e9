package devices

import (
	"bytes"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Rows are a version byte, 1, and then CBOR: a map with small unsigned keys, of which unknown ones are skipped.
// devicerows.go and commandrows.go have the keys and what the maps hold.
//
// A row of a newer version is left as it is, and what it is about cannot be used until that version is back.
// Written to disk: never renumber, never reuse.
const rowV1 = 1

var (
	rowEncoder = func() cbor.UserBufferEncMode {
		m, err := cbor.EncOptions{Sort: cbor.SortCoreDeterministic}.UserBufferEncMode()
		if err != nil {
			panic(err) // the options contradict each other
		}
		return m
	}()
	// strictCBOR also reads what devices send.
	strictCBOR = func() cbor.DecMode {
		m, err := cbor.DecOptions{
			DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
			MaxNestedLevels: 8, MaxArrayElements: 4096, MaxMapPairs: 256,
		}.DecMode()
		if err != nil {
			panic(err) // the options contradict each other
		}
		return m
	}()
)

func encodeRow(v any) []byte {
	var b bytes.Buffer
	b.WriteByte(rowV1)
	if err := rowEncoder.MarshalToBuffer(v, &b); err != nil {
		panic(fmt.Sprintf("devices: encode %T: %v", v, err)) // the types of rows hold nothing that CBOR cannot
	}
	return b.Bytes()
}

// decodeRow reads b into v. The error wraps ErrVersion or errDamaged.
func decodeRow(b []byte, v any) error {
	switch {
	case len(b) == 0 || b[0] == 0:
		return fmt.Errorf("%w: it has no version", errDamaged)
	case b[0] > rowV1:
		return ErrVersion
	}
	if err := strictCBOR.Unmarshal(b[1:], v); err != nil {
		return fmt.Errorf("%w: %v", errDamaged, err)
	}
	return nil
}
