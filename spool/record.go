package spool

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// Record is one message as it is stored and as it travels upstream in a batch: a CBOR array
// (RFC 8949, definite lengths, shortest form)
//
//	[received, device, topic, flags, payload]           or
//	[received, device, topic, flags, payload, {props}]
//
// received is Unix ms (int), device and topic are text, flags an unsigned int, payload a byte string.
// More elements may follow in later versions: decoders skip what they do not know.
// Written to disk: never reorder, never reuse.
type Record struct {
	Received int64 // Unix ms on the gateway's wall clock
	Device   []byte
	Topic    []byte
	Flags    Flags
	Payload  []byte
	Props    *Props // nil: none

	// Uptime is the machine's time since boot at Received, ms; 0: not known. It stands in the header of the
	// record's chunk, not in the record: Append takes it, ParseRecord leaves it 0.
	Uptime int64
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
// 7 upstream (text). Written to disk: never renumber, never reuse.
type Props struct {
	ContentType   string
	ResponseTopic string
	Correlation   []byte
	User          [][2]string
	UTF8          bool   // payload format indicator 1
	Expiry        uint32 // seconds after Received; 0: none
	Upstream      string // system lane: the one upstream this is meant for; "": all
}

// ErrRecord is returned for bytes that are not a record.
var ErrRecord = errors.New("not a record")

// CBOR major types (RFC 8949 §3.1), shifted into place.
const (
	cborUint  = 0 << 5
	cborNint  = 1 << 5
	cborBytes = 2 << 5
	cborText  = 3 << 5
	cborArray = 4 << 5
	cborMap   = 5 << 5
	cborTag   = 6 << 5
)

const maxDepth = 16 // of CBOR nesting that a decoder follows in elements it skips

// AppendRecord appends r's encoding to dst. It keeps nothing of r.
func AppendRecord(dst []byte, r *Record) []byte {
	elements := uint64(5)
	if r.Props != nil {
		elements = 6
	}
	dst = appendHead(dst, cborArray, elements)
	if r.Received < 0 {
		dst = appendHead(dst, cborNint, uint64(-(r.Received + 1)))
	} else {
		dst = appendHead(dst, cborUint, uint64(r.Received))
	}
	dst = append(appendHead(dst, cborText, uint64(len(r.Device))), r.Device...)
	dst = append(appendHead(dst, cborText, uint64(len(r.Topic))), r.Topic...)
	dst = appendHead(dst, cborUint, uint64(r.Flags))
	dst = append(appendHead(dst, cborBytes, uint64(len(r.Payload))), r.Payload...)
	if r.Props != nil {
		dst = appendProps(dst, r.Props)
	}
	return dst
}

func appendProps(dst []byte, p *Props) []byte {
	n := uint64(0)
	for _, set := range [...]bool{
		p.ContentType != "", p.ResponseTopic != "", p.Correlation != nil,
		len(p.User) > 0, p.UTF8, p.Expiry != 0, p.Upstream != "",
	} {
		if set {
			n++
		}
	}
	dst = appendHead(dst, cborMap, n)
	text := func(key uint64, s string) {
		if s != "" {
			dst = appendHead(dst, cborUint, key)
			dst = append(appendHead(dst, cborText, uint64(len(s))), s...)
		}
	}
	text(1, p.ContentType)
	text(2, p.ResponseTopic)
	if p.Correlation != nil {
		dst = appendHead(dst, cborUint, 3)
		dst = append(appendHead(dst, cborBytes, uint64(len(p.Correlation))), p.Correlation...)
	}
	if len(p.User) > 0 {
		dst = appendHead(dst, cborUint, 4)
		dst = appendHead(dst, cborArray, uint64(len(p.User)))
		for _, u := range p.User {
			dst = appendHead(dst, cborArray, 2)
			dst = append(appendHead(dst, cborText, uint64(len(u[0]))), u[0]...)
			dst = append(appendHead(dst, cborText, uint64(len(u[1]))), u[1]...)
		}
	}
	if p.UTF8 {
		dst = appendHead(appendHead(dst, cborUint, 5), cborUint, 1)
	}
	if p.Expiry != 0 {
		dst = appendHead(appendHead(dst, cborUint, 6), cborUint, uint64(p.Expiry))
	}
	text(7, p.Upstream)
	return dst
}

// appendHead appends a CBOR initial byte and argument in the shortest form.
func appendHead(dst []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(dst, major|byte(n))
	case n <= 0xff:
		return append(dst, major|24, byte(n))
	case n <= 0xffff:
		return append(dst, major|25, byte(n>>8), byte(n))
	case n <= 0xffffffff:
		return binary.BigEndian.AppendUint32(append(dst, major|26), uint32(n))
	default:
		return binary.BigEndian.AppendUint64(append(dst, major|27), n)
	}
}

// ParseRecord reads the first record in b. r's slices alias b; strings in r.Props are copies.
// n is the record's length. It allocates only for Props.
func ParseRecord(b []byte, r *Record) (n int, err error) {
	p := parser{b: b}
	elements := p.head(cborArray)
	if p.bad || elements < 5 {
		return 0, ErrRecord
	}
	*r = Record{}
	r.Received = p.int()
	r.Device = p.bytes(cborText)
	r.Topic = p.bytes(cborText)
	r.Flags = Flags(p.head(cborUint))
	r.Payload = p.bytes(cborBytes)
	rest := elements - 5
	if rest > 0 && !p.bad && p.off < len(b) && b[p.off]&0xe0 == cborMap {
		r.Props = p.props()
		rest--
	}
	for ; rest > 0 && !p.bad; rest-- {
		p.skip(0)
	}
	if p.bad {
		return 0, ErrRecord
	}
	return p.off, nil
}

// recordLen returns the length of the first record in b, 0 if there is none. It is what readers
// use to find the boundaries in a chunk.
func recordLen(b []byte) int {
	p := parser{b: b}
	elements := p.head(cborArray)
	if p.bad || elements < 5 {
		return 0
	}
	for ; elements > 0 && !p.bad; elements-- {
		p.skip(0)
	}
	if p.bad {
		return 0
	}
	return p.off
}

// parser walks CBOR. After the first mistake bad is set and everything it returns is zero.
type parser struct {
	b   []byte
	off int
	bad bool
}

func (p *parser) any() (major byte, n uint64) {
	if p.bad || p.off >= len(p.b) {
		p.bad = true
		return 0, 0
	}
	c := p.b[p.off]
	p.off++
	info := c & 0x1f
	if info < 24 {
		return c & 0xe0, uint64(info)
	}
	if info > 27 { // reserved, or indefinite length, which records never have
		p.bad = true
		return 0, 0
	}
	size := 1 << (info - 24)
	if len(p.b)-p.off < size {
		p.bad = true
		return 0, 0
	}
	for _, d := range p.b[p.off : p.off+size] {
		n = n<<8 | uint64(d)
	}
	p.off += size
	return c & 0xe0, n
}

func (p *parser) head(major byte) uint64 {
	m, n := p.any()
	if m != major {
		p.bad = true
		return 0
	}
	return n
}

func (p *parser) int() int64 {
	m, n := p.any()
	switch {
	case bits.LeadingZeros64(n) == 0 || (m != cborUint && m != cborNint):
		p.bad = true
		return 0
	case m == cborNint:
		return -1 - int64(n)
	default:
		return int64(n)
	}
}

func (p *parser) bytes(major byte) []byte {
	n := p.head(major)
	if p.bad || n > uint64(len(p.b)-p.off) {
		p.bad = true
		return nil
	}
	v := p.b[p.off : p.off+int(n) : p.off+int(n)]
	p.off += int(n)
	return v
}

func (p *parser) props() *Props {
	v := &Props{}
	for n := p.head(cborMap); n > 0 && !p.bad; n-- {
		switch key := p.head(cborUint); key {
		case 1:
			v.ContentType = string(p.bytes(cborText))
		case 2:
			v.ResponseTopic = string(p.bytes(cborText))
		case 3:
			v.Correlation = append([]byte{}, p.bytes(cborBytes)...)
		case 4:
			for users := p.head(cborArray); users > 0 && !p.bad; users-- {
				if p.head(cborArray) != 2 {
					p.bad = true
				}
				v.User = append(v.User, [2]string{string(p.bytes(cborText)), string(p.bytes(cborText))})
			}
		case 5:
			v.UTF8 = p.head(cborUint) == 1
		case 6:
			v.Expiry = uint32(min(p.head(cborUint), 0xffffffff))
		case 7:
			v.Upstream = string(p.bytes(cborText))
		default:
			p.skip(0)
		}
	}
	return v
}

// skip passes over one item of any kind. Work is bounded by the bytes there are, not by what they claim.
func (p *parser) skip(depth int) {
	if depth > maxDepth {
		p.bad = true
		return
	}
	major, n := p.any()
	if p.bad {
		return
	}
	left := uint64(len(p.b) - p.off)
	switch major {
	case cborBytes, cborText:
		if n > left {
			p.bad = true
			return
		}
		p.off += int(n)
	case cborMap:
		if n > left {
			p.bad = true
			return
		}
		n *= 2
		fallthrough
	case cborArray:
		for ; n > 0 && !p.bad; n-- {
			p.skip(depth + 1)
		}
	case cborTag:
		p.skip(depth + 1)
	}
}
