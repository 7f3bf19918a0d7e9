package wire

import (
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Message is one device message, as a cloud program sees it.
type Message struct {
	Received int64 // Unix ms on the gateway's clock
	// Corrected is what was added to what that clock showed, ms, because the gateway has learned the time since; 0: nothing.
	Corrected int64
	Device    string // the authenticated client id
	Topic     string
	Flags     Flags
	Payload   []byte
	Props     *Props // nil: none
}

// Correct adds what the gateway's clock was wrong by when it received m, if it was not synchronised then: from now on it
// was.
func (m *Message) Correct(ms int64) {
	if m.Flags&FlagClockUnsynced != 0 {
		m.Received, m.Corrected = m.Received+ms, ms
		m.Flags &^= FlagClockUnsynced
	}
}

// Flags of a message. The same numbers as on disk and in batches: never renumber, never reuse.
type Flags uint64

// The flags.
const (
	FlagQoS1          Flags = 1 << 0 // published with QoS 1
	FlagQoS2          Flags = 1 << 1 // published with QoS 2
	FlagRetain        Flags = 1 << 2 // published with RETAIN
	FlagDup           Flags = 1 << 3 // the device marked it as a repeat
	FlagClockUnsynced Flags = 1 << 4 // the gateway's clock was not synchronised when it was received
	FlagWill          Flags = 1 << 5 // a will, published by the gateway for the device
)

// QoS is the quality of service with which the device published.
func (f Flags) QoS() int { return int(f&FlagQoS1) + int(f&FlagQoS2) }

// Props are the MQTT 5 publish properties that travel with a message (MQTT 5.0 §3.3.2.3).
// In a record they are a CBOR map with these keys.
type Props struct {
	ContentType   string      `cbor:"1,keyasint,omitempty"`
	ResponseTopic string      `cbor:"2,keyasint,omitempty"`
	Correlation   []byte      `cbor:"3,keyasint,omitempty"`
	User          [][2]string `cbor:"4,keyasint,omitempty"`
	Format        uint8       `cbor:"5,keyasint,omitempty"` // 1: the payload is UTF-8 text
	Expiry        uint32      `cbor:"6,keyasint,omitempty"` // seconds after Received; 0: never
	Upstream      string      `cbor:"7,keyasint,omitempty"` // announcements: the one upstream this is meant for
}

// decMode is how CBOR from the network is read: what the encoder cannot have written is an error,
// and depth is bounded. Lengths need no limit: they are checked against the bytes before anything
// is allocated.
var decMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey:       cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels: 16,
		MaxMapPairs:     1 << 10,
		IndefLength:     cbor.IndefLengthForbidden,
	}.DecMode()
	if err != nil {
		panic(err) // the options above contradict each other
	}
	return m
}()

// The record as it stands in docs/formats.md: five elements, six with properties, and more in
// later versions.
type record5 struct {
	_        struct{} `cbor:",toarray"`
	Received int64
	Device   string
	Topic    string
	Flags    Flags
	Payload  []byte
}

type record6 struct {
	_        struct{} `cbor:",toarray"`
	Received int64
	Device   string
	Topic    string
	Flags    Flags
	Payload  []byte
	Props    *Props
}

// DecodeMessage reads the first record of b and returns what follows it.
func DecodeMessage(b []byte) (m Message, rest []byte, err error) {
	if len(b) == 0 {
		return m, nil, fmt.Errorf("record: %w: empty", ErrFormat)
	}
	switch b[0] {
	case 0x85: // an array of 5
		var r record5
		rest, err = decMode.UnmarshalFirst(b, &r)
		m = Message{r.Received, 0, r.Device, r.Topic, r.Flags, r.Payload, nil}
	case 0x86: // an array of 6
		var r record6
		rest, err = decMode.UnmarshalFirst(b, &r)
		m = Message{r.Received, 0, r.Device, r.Topic, r.Flags, r.Payload, r.Props}
	default:
		var elems []cbor.RawMessage
		if rest, err = decMode.UnmarshalFirst(b, &elems); err != nil {
			break
		}
		if len(elems) < 5 {
			return m, nil, fmt.Errorf("record: %w: %d elements instead of at least 5", ErrFormat, len(elems))
		}
		into := []any{&m.Received, &m.Device, &m.Topic, &m.Flags, &m.Payload, &m.Props}
		for i, to := range into[:min(len(elems), len(into))] {
			if err = decMode.Unmarshal(elems[i], to); err != nil {
				break
			}
		}
	}
	if err != nil {
		return Message{}, nil, fmt.Errorf("record: %w: %v", ErrFormat, err)
	}
	return m, rest, nil
}
