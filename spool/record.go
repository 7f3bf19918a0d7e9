package spool

// Record is one message as it is stored and as it travels upstream in a batch: a CBOR array
// (RFC 8949, definite lengths, shortest form)
//
//	[received, device, topic, flags, payload]           or
//	[received, device, topic, flags, payload, {props}]
//
// received is Unix ms (int), device and topic are text, flags an unsigned int, payload a byte string.
// More elements may follow in later versions: decoders skip what they do not know.
type Record struct {
	Received int64 // Unix ms on the gateway's wall clock
	Device   []byte
	Topic    []byte
	Flags    Flags
	Payload  []byte
	Props    *Props // nil: none
}

// Flags of a record. Written to disk: never renumber, never reuse.
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

// Props are the MQTT 5 publish properties that travel with a message (MQTT 5.0 §3.3.2.3).
// In the record they are a CBOR map with these integer keys:
// 1 content type (text), 2 response topic (text), 3 correlation data (bytes), 4 user properties
// (array of [name, value]), 5 payload format indicator (uint), 6 message expiry interval (uint, seconds),
// 7 upstream (text).
type Props struct {
	ContentType   string
	ResponseTopic string
	Correlation   []byte
	User          [][2]string
	UTF8          bool   // payload format indicator 1
	Expiry        uint32 // seconds after Received; 0: none
	Upstream      string // system lane: the one upstream this is meant for; "": all
}
