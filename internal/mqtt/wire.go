package mqtt

import "encoding/binary"

// Errors are made once: a peer that sends rubbish costs no allocation. None is changed
// after that (ParseConnect copies before it fills in Answer).
var (
	errTruncated     = malformed("", "packet ends inside a field")
	errTrailing      = malformed("", "bytes left over at the end of the packet")
	errFrame         = malformed("", "frame is not exactly one packet")
	errRemaining     = malformed("MQTT-1.5.5-1", "remaining length is longer than four bytes")
	errVarintLong    = malformed("MQTT-1.5.5-1", "variable byte integer is longer than four bytes")
	errVarintPadded  = malformed("MQTT-1.5.5-1", "variable byte integer is not in its shortest form")
	errTypeZero      = malformed("", "packet type 0 is reserved")
	errTypeWrong     = violation("", "another packet type was due")
	errFlags         = malformed("MQTT-2.1.3-1 / MQTT-2.2.2-1", "reserved flag bits of the fixed header are not as demanded")
	errQoS3          = malformed("MQTT-3.3.1-4", "QoS 3")
	errDupQoS0       = malformed("MQTT-3.3.1-2", "DUP with QoS 0")
	errIDZero        = violation("MQTT-2.2.1-3 / MQTT-2.3.1-1", "packet identifier 0")
	errUTF8          = malformed("MQTT-1.5.4-1 / MQTT-1.5.3-1", "string is not UTF-8")
	errNull          = malformed("MQTT-1.5.4-2 / MQTT-1.5.3-2", "string holds U+0000")
	errTextLong      = malformed("MQTT-4.7.3-3", "string is longer than 65535 bytes")
	errTopicEmpty    = violation("MQTT-4.7.3-1", "topic name is empty")
	errTopicWildcard = &Error{Reason: TopicNameInvalid, Rule: "MQTT-3.3.2-2", Text: "topic name holds a wildcard"}
	errFilterEmpty   = &Error{Reason: TopicFilterInvalid, Rule: "MQTT-4.7.3-1", Text: "topic filter is empty"}
	errFilterHash    = &Error{Reason: TopicFilterInvalid, Rule: "MQTT-4.7.1-1 / MQTT-4.7.1-2", Text: "# is not alone in the last level of the topic filter"}
	errFilterPlus    = &Error{Reason: TopicFilterInvalid, Rule: "MQTT-4.7.1-2 / MQTT-4.7.1-3", Text: "+ is not alone in its level of the topic filter"}
	errShareName     = &Error{Reason: TopicFilterInvalid, Rule: "MQTT-4.8.2-1, MQTT-4.8.2-2", Text: "name of the shared subscription is empty or holds a wildcard"}
	errShareFilter   = &Error{Reason: TopicFilterInvalid, Rule: "MQTT-4.8.2-2", Text: "shared subscription has no topic filter"}
)

// firstByte holds what is wrong with each possible first byte of a packet; nil: nothing.
var firstByte = func() (t [256]*Error) {
	for i := range t {
		flags := byte(i) & 15
		switch Type(i >> 4) {
		case 0:
			t[i] = errTypeZero
		case TypePublish:
			switch {
			case flags&flagQoS == flagQoS:
				t[i] = errQoS3
			case flags&flagQoS == 0 && flags&flagDup != 0:
				t[i] = errDupQoS0
			}
		case TypePubrel, TypeSubscribe, TypeUnsubscribe:
			if flags != 2 {
				t[i] = errFlags
			}
		default:
			if flags != 0 {
				t[i] = errFlags
			}
		}
	}
	return t
}()

// PeekHeader looks at the fixed header at the start of b. ok is false while more bytes are
// needed to know it. With ok, size is the length of the whole frame, of which headerLen
// bytes are the fixed header; b may still be shorter than size. The first byte is judged as
// soon as it is there: reserved flag bits, type 0, QoS 3, DUP with QoS 0; then a remaining
// length of more than four bytes. Whether the length is in its shortest form is judged by
// the parsers, since only MQTT 5 demands it.
func PeekHeader(b []byte) (t Type, flags byte, headerLen, size int, ok bool, err error) {
	if len(b) == 0 {
		return 0, 0, 0, 0, false, nil
	}
	t, flags = Type(b[0]>>4), b[0]&15
	headerLen, size, e := peek(b)
	if e != nil {
		return t, flags, 0, 0, false, e
	}
	return t, flags, headerLen, size, headerLen > 0, nil
}

// peek gives 0, 0 while more bytes are needed.
func peek(b []byte) (header, size int, err *Error) {
	if len(b) == 0 {
		return 0, 0, nil
	}
	if e := firstByte[b[0]]; e != nil {
		return 0, 0, e
	}
	n := 0
	for i := 1; i < len(b) && i <= 4; i++ {
		n |= int(b[i]&0x7f) << (7 * (i - 1))
		if b[i] < 0x80 {
			return i + 1, i + 1 + n, nil
		}
	}
	if len(b) > 4 {
		return 0, 0, errRemaining
	}
	return 0, 0, nil
}

// open checks the fixed header of frame, which must be exactly one packet of type t, and
// gives a reader of what follows it.
func open(frame []byte, t Type, v Version) (reader, *Error) {
	header, size, err := peek(frame)
	switch {
	case err != nil:
		return reader{}, err
	case header == 0 || size != len(frame):
		return reader{}, errFrame
	case Type(frame[0]>>4) != t:
		return reader{}, errTypeWrong
	case v == V5 && header > 2 && frame[header-1] == 0:
		return reader{}, errVarintPadded
	}
	return reader{b: frame[header:]}, nil
}

// reader takes fields off the front of b. After the first error it gives zeroes and keeps
// that error, so that callers check once.
type reader struct {
	b   []byte
	err *Error
}

func (r *reader) fail(e *Error) {
	if r.err == nil {
		r.err, r.b = e, nil
	}
}

func (r *reader) u8() byte {
	if len(r.b) < 1 {
		r.fail(errTruncated)
		return 0
	}
	x := r.b[0]
	r.b = r.b[1:]
	return x
}

func (r *reader) u16() uint16 {
	if len(r.b) < 2 {
		r.fail(errTruncated)
		return 0
	}
	x := binary.BigEndian.Uint16(r.b)
	r.b = r.b[2:]
	return x
}

func (r *reader) u32() uint32 {
	if len(r.b) < 4 {
		r.fail(errTruncated)
		return 0
	}
	x := binary.BigEndian.Uint32(r.b)
	r.b = r.b[4:]
	return x
}

func (r *reader) varint() uint32 {
	var x uint32
	for i := range 4 {
		c := r.u8()
		if r.err != nil {
			return 0
		}
		x |= uint32(c&0x7f) << (7 * i)
		if c < 0x80 {
			if c == 0 && i > 0 {
				r.fail(errVarintPadded)
			}
			return x
		}
	}
	r.fail(errVarintLong)
	return 0
}

// take gives the next n bytes; empty ones are not nil unless there was an error.
func (r *reader) take(n int) []byte {
	if n > len(r.b) || r.err != nil {
		r.fail(errTruncated)
		return nil
	}
	x := r.b[:n:n]
	r.b = r.b[n:]
	return x
}

// binary gives two bytes of length and as many of data.
func (r *reader) binary() []byte { return r.take(int(r.u16())) }

// text gives a UTF-8 encoded string.
func (r *reader) text() []byte {
	s := r.binary()
	if r.err == nil {
		if e := checkText(s); e != nil {
			r.fail(e)
			return nil
		}
	}
	return s
}

// id gives a packet identifier, which is never 0.
func (r *reader) id() uint16 {
	x := r.u16()
	if x == 0 && r.err == nil {
		r.fail(errIDZero)
	}
	return x
}

// end reports the first error, or that something is left over.
func (r *reader) end() error {
	if r.err == nil && len(r.b) > 0 {
		return errTrailing
	}
	if r.err != nil {
		return r.err
	}
	return nil
}

// varintLen is the length of x as a variable byte integer.
func varintLen(x int) int {
	switch {
	case x < 1<<7:
		return 1
	case x < 1<<14:
		return 2
	case x < 1<<21:
		return 3
	}
	return 4
}

func appendVarint(dst []byte, x int) []byte {
	for x >= 0x80 {
		dst = append(dst, byte(x)|0x80)
		x >>= 7
	}
	return append(dst, byte(x))
}

func appendText[T text](dst []byte, s T) []byte {
	dst = append(dst, byte(len(s)>>8), byte(len(s)))
	return append(dst, s...)
}

func appendID(dst []byte, id uint16) []byte { return append(dst, byte(id>>8), byte(id)) }

// begin starts a packet: its first byte and room for a length of one byte.
func begin(dst []byte, t Type, flags byte) ([]byte, int) {
	return room(append(dst, byte(t)<<4|flags))
}

// room leaves one byte for the length of what is appended next, to be filled in by seal.
func room(dst []byte) ([]byte, int) { return append(dst, 0), len(dst) }

// seal writes the length of all after mark, and moves that up if one byte does not hold it.
func seal(dst []byte, mark int) []byte {
	n := len(dst) - mark - 1
	if extra := varintLen(n) - 1; extra > 0 {
		dst = append(dst, "\x00\x00\x00"[:extra]...)
		copy(dst[mark+1+extra:], dst[mark+1:])
	}
	appendVarint(dst[mark:mark], n)
	return dst
}
