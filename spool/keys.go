package spool

import (
	"encoding/binary"
	"fmt"

	"holdfast/internal/kv"
)

// Keys. lane is the lane's number, one byte; seq is big-endian, so that key order is message order.
//
//	'm' "epoch"            the spool's epoch, text
//	'm' "epochs"           earlier epochs, see epoch.go
//	'm' "gateway"          the gateway's id, text
//	'm' "lane/" name       the lane's number, 1 byte
//	'l' lane               laneRow
//	'u' lane upstream      cursorRow
//	'd' lane seq           chunk; seq is its first record's
//	'p' lane seq upstream  parkedRow
//
// Written to disk: never renumber, never reuse.
var (
	keyEpoch      = []byte{kv.PrefixMeta, 'e', 'p', 'o', 'c', 'h'}
	prefixLaneNum = []byte{kv.PrefixMeta, 'l', 'a', 'n', 'e', '/'}
)

func keyLane(lane byte) []byte { return []byte{kv.PrefixLane, lane} }

func keyCursor(lane byte, upstream string) []byte {
	return append([]byte{kv.PrefixCursor, lane}, upstream...)
}

const dataKeyLen = 10

func appendDataKey(dst []byte, lane byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, kv.PrefixData, lane), seq)
}

func keyData(lane byte, seq uint64) []byte {
	return appendDataKey(make([]byte, 0, dataKeyLen), lane, seq)
}

// dataBounds returns the first key of a lane's chunks and the first after them.
func dataBounds(lane byte) (start, end []byte) {
	return []byte{kv.PrefixData, lane}, kv.PrefixEnd([]byte{kv.PrefixData, lane})
}

// dataSeq returns the sequence in a chunk's key.
func dataSeq(key []byte) (uint64, bool) {
	if len(key) != dataKeyLen || key[0] != kv.PrefixData {
		return 0, false
	}
	return binary.BigEndian.Uint64(key[2:]), true
}

func keyParked(lane byte, seq uint64, upstream string) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{kv.PrefixParked, lane}, seq), upstream...)
}

// rowV1 is the first byte of laneRow, cursorRow and parkedRow; the numbers that follow are varints.
// Written to disk: never renumber, never reuse.
const rowV1 = 1

// laneRow is where a lane ends and begins.
type laneRow struct {
	Next Position // the next record's
	Head Position // everything before it is gone, for every upstream
	// Expired and Evicted are what retention took while no upstream was there to wait for it.
	Expired, Evicted Count
}

func (r *laneRow) append(dst []byte) []byte {
	dst = append(dst, rowV1)
	for _, n := range [...]uint64{
		r.Next.Seq, r.Next.Bytes, r.Head.Seq, r.Head.Bytes,
		r.Expired.Messages, r.Expired.Bytes, r.Evicted.Messages, r.Evicted.Bytes,
	} {
		dst = binary.AppendUvarint(dst, n)
	}
	return dst
}

func (r *laneRow) parse(b []byte) error {
	return parseRow(b, "lane", &r.Next.Seq, &r.Next.Bytes, &r.Head.Seq, &r.Head.Bytes,
		&r.Expired.Messages, &r.Expired.Bytes, &r.Evicted.Messages, &r.Evicted.Bytes)
}

// cursorRow is how far an upstream is in a lane, and how what lies before ended.
// Pos - Start = Delivered + Expired + Evicted + Parked, in messages and in bytes.
type cursorRow struct {
	Start, Pos                          Position
	Delivered, Expired, Evicted, Parked Count
}

func (r *cursorRow) append(dst []byte) []byte {
	dst = append(dst, rowV1)
	for _, n := range [...]uint64{
		r.Start.Seq, r.Start.Bytes, r.Pos.Seq, r.Pos.Bytes,
		r.Delivered.Messages, r.Delivered.Bytes, r.Expired.Messages, r.Expired.Bytes,
		r.Evicted.Messages, r.Evicted.Bytes, r.Parked.Messages, r.Parked.Bytes,
	} {
		dst = binary.AppendUvarint(dst, n)
	}
	return dst
}

func (r *cursorRow) parse(b []byte) error {
	return parseRow(b, "cursor", &r.Start.Seq, &r.Start.Bytes, &r.Pos.Seq, &r.Pos.Bytes,
		&r.Delivered.Messages, &r.Delivered.Bytes, &r.Expired.Messages, &r.Expired.Bytes,
		&r.Evicted.Messages, &r.Evicted.Bytes, &r.Parked.Messages, &r.Parked.Bytes)
}

// balanced says whether everything before the cursor has exactly one end.
func (r *cursorRow) balanced() bool {
	return r.Pos.Seq-r.Start.Seq == r.Delivered.Messages+r.Expired.Messages+r.Evicted.Messages+r.Parked.Messages &&
		r.Pos.Bytes-r.Start.Bytes == r.Delivered.Bytes+r.Expired.Bytes+r.Evicted.Bytes+r.Parked.Bytes
}

func (r *cursorRow) outcome(o Outcome) *Count {
	switch o {
	case Delivered:
		return &r.Delivered
	case Expired:
		return &r.Expired
	case Evicted:
		return &r.Evicted
	case Parked:
		return &r.Parked
	case Elsewhere: // is one of the above by now
	}
	panic(fmt.Sprintf("spool: outcome %d", o))
}

func parseRow(b []byte, what string, fields ...*uint64) error {
	if len(b) == 0 {
		return fmt.Errorf("%s row: %w: empty", what, ErrCorrupt)
	}
	if b[0] != rowV1 {
		return fmt.Errorf("%s row: %w %d", what, ErrVersion, b[0])
	}
	b = b[1:]
	for _, f := range fields {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return fmt.Errorf("%s row: %w: too short", what, ErrCorrupt)
		}
		*f, b = v, b[n:]
	}
	return nil // more fields may follow in later versions
}

// parkedRow is a message that an upstream refused for good.
//
//	| version 1 | parked at, Unix ms (uvarint) | reason length (uvarint) | reason | record |
type parkedRow struct {
	AtMS   uint64
	Reason string
	Record []byte
}

func (r *parkedRow) append(dst []byte) []byte {
	dst = binary.AppendUvarint(append(dst, rowV1), r.AtMS)
	dst = append(binary.AppendUvarint(dst, uint64(len(r.Reason))), r.Reason...)
	return append(dst, r.Record...)
}

func (r *parkedRow) parse(b []byte) error {
	var n uint64
	if err := parseRow(b, "parked", &r.AtMS, &n); err != nil {
		return err
	}
	b = b[1+uvarintLen(r.AtMS)+uvarintLen(n):]
	if n > uint64(len(b)) {
		return fmt.Errorf("parked row: %w: reason of %d bytes in %d", ErrCorrupt, n, len(b))
	}
	r.Reason, r.Record = string(b[:n]), append([]byte{}, b[n:]...)
	return nil
}

func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}
