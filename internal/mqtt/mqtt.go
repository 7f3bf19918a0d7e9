package mqtt

import "strconv"

// Version is a protocol level as CONNECT carries it.
type Version byte

// The versions.
const (
	V311 Version = 4
	V5   Version = 5
)

// String gives "3.1.1" or "5".
func (v Version) String() string {
	switch v {
	case V311:
		return "3.1.1"
	case V5:
		return "5"
	}
	return "level " + strconv.Itoa(int(v))
}

// Type is the type of a control packet, the upper four bits of its first byte (MQTT 5.0 §2.1.2).
type Type byte

// The packet types.
const (
	TypeConnect     Type = 1
	TypeConnack     Type = 2
	TypePublish     Type = 3
	TypePuback      Type = 4
	TypePubrec      Type = 5
	TypePubrel      Type = 6
	TypePubcomp     Type = 7
	TypeSubscribe   Type = 8
	TypeSuback      Type = 9
	TypeUnsubscribe Type = 10
	TypeUnsuback    Type = 11
	TypePingreq     Type = 12
	TypePingresp    Type = 13
	TypeDisconnect  Type = 14
	TypeAuth        Type = 15
)

var typeNames = [16]string{
	"reserved", "CONNECT", "CONNACK", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP",
	"SUBSCRIBE", "SUBACK", "UNSUBSCRIBE", "UNSUBACK", "PINGREQ", "PINGRESP", "DISCONNECT", "AUTH",
}

// String gives the name that the specification uses, such as "PUBLISH".
func (t Type) String() string {
	if int(t) < len(typeNames) {
		return typeNames[t]
	}
	return "type " + strconv.Itoa(int(t))
}

// Side says who sent a packet, for the few packets that mean or may carry other things
// from either side.
type Side byte

// The sides.
const (
	FromClient Side = iota
	FromServer
)

// Flags of PUBLISH in the first byte of its fixed header (MQTT 5.0 §3.3.1).
const (
	flagRetain = 1 << 0
	flagQoS    = 3 << 1
	flagDup    = 1 << 3
)

// Bits of the connect flags (MQTT 5.0 §3.1.2.3).
const (
	connectReserved   = 1 << 0
	connectCleanStart = 1 << 1
	connectWill       = 1 << 2
	connectWillQoS    = 3 << 3
	connectWillRetain = 1 << 5
	connectPassword   = 1 << 6
	connectUsername   = 1 << 7
)

// MaxRemaining is the largest remaining length that four bytes hold (MQTT 5.0 §1.5.5).
const MaxRemaining = 268_435_455

// MaxString is the length limit of strings, topics and binary data (MQTT 5.0 §1.5.4).
const MaxString = 65535
