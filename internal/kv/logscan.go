package kv

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/cockroachdb/pebble/v2/batchrepr"
)

// What Pebble writes in records (its log, its manifest) is a row of blocks of 32 KiB, each of chunks that end in it:
//
//	0       4      6      7         11             19
//	| crc32c | size | type | log number | synced up to | payload
//
// Types 1 to 4 have neither log number nor offset, 5 to 8 have no offset. Within each four: a whole record, its first
// part, one of the middle, its last. What is left of a block that is too small for a chunk is zero. Pebble itself stops at
// the first chunk that it cannot read; this reads on behind it.

const (
	recordBlock   = 32 << 10
	headerPlain   = 7
	headerLog     = 11
	headerLogSync = 19
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// maskedSum is the checksum as Pebble stores it.
func maskedSum(sum uint32) uint32 { return (sum>>15 | sum<<17) + 0xa282ead8 }

// span is a stretch of a file, to exclusive.
type span struct{ from, to int64 }

// readRecord is one that can be read.
type readRecord struct {
	at      int64 // of its first chunk
	payload []byte
}

// recordScan is what a file of records holds.
type recordScan struct {
	records []readRecord
	holes   []span // what cannot be read and lies before something that can, or where a whole file should go on
	end     int64  // behind the last chunk that can be read
	closed  bool   // it ends as a file does that was closed in order
}

// scanRecords reads b. number is the log's; a manifest has 0. The rest of a log behind what was written last is zeros, or what an earlier
// log left in the file, and no hole: but unfinished says that b may end like this, and that its last records may never have
// been synced. What an unfinished log does not claim to have synced is where Pebble stops, and so does this.
func scanRecords(b []byte, number uint32, unfinished bool) recordScan {
	var (
		s       recordScan
		part    []byte
		partAt  = int64(-1) // of the record that is being put together
		bad     = int64(-1) // where what cannot be read begins
		claimed int64       // synced up to here, by what some chunk says
	)
	fail := func(at int64) {
		if bad < 0 {
			bad = at
			if partAt >= 0 {
				bad = partAt
			}
		}
		part, partAt = nil, -1
	}
	for at := 0; at < len(b); {
		blockEnd := min(at-at%recordBlock+recordBlock, len(b))
		rest := b[at:blockEnd]
		if len(rest) < headerPlain || len(rest) < headerLogSync && allZero(rest) {
			if len(rest) > 0 && !allZero(rest) {
				fail(int64(at))
			}
			at = blockEnd
			continue
		}
		c, ok := parseRecordChunk(rest)
		if !ok {
			fail(int64(at))
			at += afterBadChunk(rest, number)
			continue
		}
		if c.end && c.number == number+1 && partAt < 0 {
			s.closed = true
			break
		}
		if c.end || c.header != headerPlain && c.number != number {
			fail(int64(at)) // left of an earlier log
			at += c.size
			continue
		}
		claimed = max(claimed, c.synced)
		if c.header != headerLogSync { // the first log of a new store claims nothing: what follows in it has to do
			claimed = max(claimed, int64(at))
		}
		if bad >= 0 {
			s.holes = append(s.holes, span{bad, int64(at)})
			bad = -1
		}
		switch {
		case c.first():
			if partAt >= 0 { // it was never finished
				s.holes = append(s.holes, span{partAt, int64(at)})
			}
			part, partAt = append([]byte(nil), c.payload...), int64(at)
		case partAt < 0:
			fail(int64(at)) // its first part is lost
		default:
			part = append(part, c.payload...)
		}
		at += c.size
		if c.last() && partAt >= 0 {
			s.records = append(s.records, readRecord{partAt, part})
			part, partAt = nil, -1
		}
		if bad < 0 {
			s.end = int64(at)
		}
	}
	if partAt >= 0 {
		fail(partAt)
	}
	if s.closed && bad >= 0 { // the mark of the end was written last
		s.holes = append(s.holes, span{bad, int64(len(b))})
	}
	if unfinished && !s.closed {
		s.cut(claimed)
	} else if bad >= 0 && !s.closed {
		s.holes = append(s.holes, span{bad, int64(len(b))})
	}
	return s
}

// cut forgets what lies behind the first hole of which nothing says that it was synced.
func (s *recordScan) cut(claimed int64) {
	for i, h := range s.holes {
		if h.from < claimed {
			continue
		}
		s.holes = s.holes[:i]
		for k := range s.records {
			if s.records[k].at >= h.from {
				s.records = s.records[:k]
				break
			}
		}
		s.end = h.from
		return
	}
}

// recordChunk is one chunk's header and payload.
type recordChunk struct {
	header, size int // bytes: of the header, of both
	kind         byte
	number       uint32
	synced       int64
	payload      []byte
	end          bool // it is none: the log that has the number before this one was closed here
}

func (c *recordChunk) first() bool { return c.kind == 1 || c.kind == 2 }
func (c *recordChunk) last() bool  { return c.kind == 1 || c.kind == 4 }

// parseRecordChunk reads the chunk at the begin of b, the rest of a block.
func parseRecordChunk(b []byte) (c recordChunk, ok bool) {
	t := b[6]
	switch {
	case t >= 1 && t <= 4:
		c.header, c.kind = headerPlain, t
	case t >= 5 && t <= 8:
		c.header, c.kind = headerLog, t-4
	case t >= 9 && t <= 12:
		c.header, c.kind = headerLogSync, t-8
	default:
		return c, false
	}
	if c.kind == 1 && c.header == headerLog && len(b) >= headerLog && allZero(b[:6]) {
		c.size, c.end, c.number = headerLog, true, binary.LittleEndian.Uint32(b[7:])
		return c, true
	}
	c.size = c.header + int(binary.LittleEndian.Uint16(b[4:]))
	if c.size > len(b) {
		return c, false
	}
	if maskedSum(crc32.Checksum(b[6:c.size], castagnoli)) != binary.LittleEndian.Uint32(b) {
		return c, false
	}
	if c.header >= headerLog {
		c.number = binary.LittleEndian.Uint32(b[7:])
	}
	if c.header == headerLogSync {
		c.synced = int64(binary.LittleEndian.Uint64(b[11:]))
	}
	c.payload = b[c.header:c.size]
	return c, true
}

// afterBadChunk is how far behind the begin of b, where a chunk cannot be read, to go on. If its length leads to one that
// can be read, it is to be believed; else the next block is where chunks begin again.
func afterBadChunk(b []byte, number uint32) int {
	for _, header := range [...]int{headerLogSync, headerLog, headerPlain} {
		next := header + int(binary.LittleEndian.Uint16(b[4:]))
		if next+headerPlain > len(b) {
			continue
		}
		if c, ok := parseRecordChunk(b[next:]); ok && (c.header == headerPlain || c.number == number || c.number == number+1) {
			return next
		}
	}
	return len(b)
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// wholeBatch says whether a log's record is a batch that Pebble can apply.
func wholeBatch(repr []byte) (ok bool) {
	defer func() { // it indexes beyond what a hostile length leaves
		if recover() != nil {
			ok = false
		}
	}()
	if _, ok := batchrepr.ReadHeader(repr); !ok {
		return false
	}
	r := batchrepr.Read(repr)
	for {
		if _, _, _, more, err := r.Next(); err != nil || !more {
			return err == nil
		}
	}
}
