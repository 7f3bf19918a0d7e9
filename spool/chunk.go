package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/minio/minlz"

	"holdfast/internal/clock"
)

// Chunk, version 2: the records that one group commit brought to one lane. Integers are big-endian.
//
//	0      4     5     6      7      8       16      20      24         32        40       48     52       60        68     end-4
//	| "HFch" | ver | enc | lane | zero | first | count | raw len | bytes before | oldest | newest | boot | booted | service | body | crc32c of all before |
//
// first is the sequence of the first record, count how many follow each other; raw len is the length
// of the records back to back, bytes before those of all earlier records of the lane; oldest and newest
// are the lowest and highest receive time, Unix ms. enc says how body holds the records.
//
// boot is the number of the machine's boot during which they were received (package clock; 0: not known), booted when that was
// by the wall clock that gave their receive times, Unix ms: received - booted is the machine's time since boot, exact though the wall
// clock be wrong. service is the service clock at newest.
//
// Version 1 has no boot, booted and service: its body begins at 48.
//
// Written to disk: never renumber, never reuse.
const (
	chunkMagic    = "HFch"
	chunkV1       = 1
	chunkV2       = 2
	chunkHeaderV1 = 48
	chunkHeader   = 68
	chunkTrailer  = 4

	encPlain = 0
	encMinLZ = 1 // one MinLZ block
)

const (
	// maxChunk bounds a chunk's records, so that a damaged block costs little and reading one
	// stays short. A single record may be larger.
	maxChunk = 128 << 10
	// MaxRecord bounds one record. It must fit a group commit with room for others.
	MaxRecord = 1<<20 + 128<<10
	// minCompress is the size below which compression does not earn its call.
	minCompress = 512
)

// Errors of decoders.
var (
	ErrCorrupt = errors.New("damaged")
	ErrVersion = errors.New("written by a newer holdfast: version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// chunkMeta is a chunk's header.
type chunkMeta struct {
	Lane           byte
	First          Position
	Count          int
	RawLen         int
	Oldest, Newest int64
	Boot           uint32 // 0: not known
	Booted         int64
	Service        int64 // 0: not known
}

// stamp sets the service clock at the newest record of a chunk that is committed now.
func (m *chunkMeta) stamp(now clock.Moment) {
	m.Service = now.T
	if m.Boot != 0 {
		m.Service -= min(max(now.Uptime()-(m.Newest-m.Booted), 0), now.T-1)
	}
}

// headerLen is the length of the header of a chunk whose first bytes b are.
func headerLen(b []byte) int {
	if b[4] == chunkV1 {
		return chunkHeaderV1
	}
	return chunkHeader
}

// End is the position after the chunk's last record.
func (m *chunkMeta) End() Position {
	return Position{m.First.Seq + uint64(m.Count), m.First.Bytes + uint64(m.RawLen)}
}

// appendChunk appends the chunk that holds raw. It compresses, if it may, when that saves at least an eighth.
func appendChunk(dst []byte, m *chunkMeta, raw []byte, compress bool) []byte {
	start := len(dst)
	dst = append(dst, chunkMagic...)
	dst = append(dst, chunkV2, encPlain, m.Lane, 0)
	dst = binary.BigEndian.AppendUint64(dst, m.First.Seq)
	dst = binary.BigEndian.AppendUint32(dst, uint32(m.Count))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(raw)))
	dst = binary.BigEndian.AppendUint64(dst, m.First.Bytes)
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Oldest))
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Newest))
	dst = binary.BigEndian.AppendUint32(dst, m.Boot)
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Booted))
	dst = binary.BigEndian.AppendUint64(dst, uint64(m.Service))
	if !compress || len(raw) < minCompress {
		dst = append(dst, raw...)
	} else {
		body := len(dst)
		out, err := minlz.AppendEncoded(dst, raw, minlz.LevelFastest)
		if err == nil && len(out)-body < len(raw)-len(raw)/8 {
			dst = out
			dst[start+5] = encMinLZ
		} else {
			dst = append(dst[:body], raw...)
		}
	}
	return binary.BigEndian.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// parseChunkMeta reads a chunk's header and checks its form, not its checksum.
func parseChunkMeta(b []byte) (chunkMeta, error) {
	switch {
	case len(b) < chunkHeaderV1+chunkTrailer || string(b[:4]) != chunkMagic || b[4] == 0:
		return chunkMeta{}, fmt.Errorf("chunk: %w: no header in %d bytes", ErrCorrupt, len(b))
	case b[4] > chunkV2:
		return chunkMeta{}, fmt.Errorf("chunk: %w %d", ErrVersion, b[4])
	case len(b) < headerLen(b)+chunkTrailer:
		return chunkMeta{}, fmt.Errorf("chunk: %w: no header in %d bytes", ErrCorrupt, len(b))
	}
	m := chunkMeta{
		Lane:   b[6],
		First:  Position{binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[24:])},
		Count:  int(binary.BigEndian.Uint32(b[16:])),
		RawLen: int(binary.BigEndian.Uint32(b[20:])),
		Oldest: int64(binary.BigEndian.Uint64(b[32:])),
		Newest: int64(binary.BigEndian.Uint64(b[40:])),
	}
	if b[4] != chunkV1 {
		m.Boot = binary.BigEndian.Uint32(b[48:])
		m.Booted = int64(binary.BigEndian.Uint64(b[52:]))
		m.Service = int64(binary.BigEndian.Uint64(b[60:]))
	}
	if m.Count == 0 || m.RawLen < m.Count || m.RawLen > maxChunk+MaxRecord || m.First.Seq == 0 ||
		m.First.Seq+uint64(m.Count) < m.First.Seq {
		return chunkMeta{}, fmt.Errorf("chunk: %w: %d records in %d bytes from sequence %d", ErrCorrupt, m.Count, m.RawLen, m.First.Seq)
	}
	return m, nil
}

// decodeChunk checks the chunk b and returns its records, in dst's memory if they fit there.
// The result never aliases b.
func decodeChunk(dst, b []byte) (chunkMeta, []byte, error) {
	m, err := parseChunkMeta(b)
	if err != nil {
		return m, nil, err
	}
	sum := len(b) - chunkTrailer
	if got, want := crc32.Checksum(b[:sum], castagnoli), binary.BigEndian.Uint32(b[sum:]); got != want {
		return m, nil, fmt.Errorf("chunk: %w: checksum %08x, stored %08x", ErrCorrupt, got, want)
	}
	body := b[headerLen(b):sum]
	switch b[5] {
	case encPlain:
		dst = append(dst[:0], body...)
	case encMinLZ:
		n, err := minlz.DecodedLen(body)
		if err != nil || n != m.RawLen {
			return m, nil, fmt.Errorf("chunk: %w: body claims %d bytes, header %d", ErrCorrupt, n, m.RawLen)
		}
		if dst, err = minlz.Decode(dst[:cap(dst)], body); err != nil {
			return m, nil, fmt.Errorf("chunk: %w: %v", ErrCorrupt, err)
		}
	default:
		return m, nil, fmt.Errorf("chunk: %w, encoding %d", ErrVersion, b[5])
	}
	if len(dst) != m.RawLen {
		return m, nil, fmt.Errorf("chunk: %w: %d bytes of records, header says %d", ErrCorrupt, len(dst), m.RawLen)
	}
	return m, dst, nil
}
