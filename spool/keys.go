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

// rowV1 is the first byte of laneRow, of cursorRow without islands and of parkedRow; the numbers that follow are varints.
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

// cursorRow is how far an upstream is in a lane, and how what it is through with ended.
// Pos - Start, and Islands, = Delivered + Expired + Evicted + Parked, in messages and in bytes.
type cursorRow struct {
	Start, Pos                          Position
	Delivered, Expired, Evicted, Parked Count
	// Islands are stretches beyond Pos that have an end already: in order, no two touch, none touches Pos.
	Islands []island
}

// island is a stretch of messages, to exclusive.
type island struct{ from, to Position }

// rowV2 is a cursorRow with islands: how many, then the four numbers of each. A reader that knew only version 1
// would send them once more and count them twice.
const rowV2 = 2

func (r *cursorRow) append(dst []byte) []byte {
	version := byte(rowV1)
	if len(r.Islands) > 0 {
		version = rowV2
	}
	dst = append(dst, version)
	for _, n := range [...]uint64{
		r.Start.Seq, r.Start.Bytes, r.Pos.Seq, r.Pos.Bytes,
		r.Delivered.Messages, r.Delivered.Bytes, r.Expired.Messages, r.Expired.Bytes,
		r.Evicted.Messages, r.Evicted.Bytes, r.Parked.Messages, r.Parked.Bytes,
	} {
		dst = binary.AppendUvarint(dst, n)
	}
	if version == rowV2 {
		dst = binary.AppendUvarint(dst, uint64(len(r.Islands)))
		for _, i := range r.Islands {
			for _, n := range [...]uint64{i.from.Seq, i.from.Bytes, i.to.Seq, i.to.Bytes} {
				dst = binary.AppendUvarint(dst, n)
			}
		}
	}
	return dst
}

func (r *cursorRow) parse(b []byte) error {
	version, b, err := rowVersion(b, "cursor", rowV2)
	if err != nil {
		return err
	}
	b, err = parseNumbers(b, "cursor", &r.Start.Seq, &r.Start.Bytes, &r.Pos.Seq, &r.Pos.Bytes,
		&r.Delivered.Messages, &r.Delivered.Bytes, &r.Expired.Messages, &r.Expired.Bytes,
		&r.Evicted.Messages, &r.Evicted.Bytes, &r.Parked.Messages, &r.Parked.Bytes)
	r.Islands = nil
	if err != nil || version == rowV1 {
		return err
	}
	var count uint64
	if b, err = parseNumbers(b, "cursor", &count); err != nil {
		return err
	}
	if count > uint64(len(b)/4) {
		return fmt.Errorf("cursor row: %w: %d islands in %d bytes", ErrCorrupt, count, len(b))
	}
	r.Islands = make([]island, count)
	last := r.Pos
	for k := range r.Islands {
		i := &r.Islands[k]
		if b, err = parseNumbers(b, "cursor", &i.from.Seq, &i.from.Bytes, &i.to.Seq, &i.to.Bytes); err != nil {
			return err
		}
		if i.from.Seq <= last.Seq || i.from.Bytes < last.Bytes || i.to.Seq <= i.from.Seq || i.to.Bytes < i.from.Bytes {
			return fmt.Errorf("cursor row: %w: island %d to %d behind %d", ErrCorrupt, i.from.Seq, i.to.Seq, last.Seq)
		}
		last = i.to
	}
	return nil
}

// balanced says whether everything that the upstream is through with has exactly one end.
func (r *cursorRow) balanced() bool {
	through := r.apart()
	through.add(r.Start, r.Pos)
	return through.Messages == r.Delivered.Messages+r.Expired.Messages+r.Evicted.Messages+r.Parked.Messages &&
		through.Bytes == r.Delivered.Bytes+r.Expired.Bytes+r.Evicted.Bytes+r.Parked.Bytes
}

// apart is what the islands hold.
func (r *cursorRow) apart() (n Count) {
	for _, i := range r.Islands {
		n.add(i.from, i.to)
	}
	return n
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

// parseRow reads a row of version 1. More fields may follow in later versions of this program.
func parseRow(b []byte, what string, fields ...*uint64) error {
	_, b, err := rowVersion(b, what, rowV1)
	if err != nil {
		return err
	}
	_, err = parseNumbers(b, what, fields...)
	return err
}

// rowVersion takes the version off a row.
func rowVersion(b []byte, what string, newest byte) (version byte, rest []byte, err error) {
	if len(b) == 0 {
		return 0, nil, fmt.Errorf("%s row: %w: empty", what, ErrCorrupt)
	}
	if b[0] < rowV1 || b[0] > newest {
		return 0, nil, fmt.Errorf("%s row: %w %d", what, ErrVersion, b[0])
	}
	return b[0], b[1:], nil
}

// parseNumbers takes varints off a row.
func parseNumbers(b []byte, what string, fields ...*uint64) (rest []byte, err error) {
	for _, f := range fields {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, fmt.Errorf("%s row: %w: too short", what, ErrCorrupt)
		}
		*f, b = v, b[n:]
	}
	return b, nil
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
