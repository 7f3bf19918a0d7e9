package kv

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"log/slog"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A log whose end is damaged looks like one that was never written so far: what was acknowledged would be gone without
// a word, and its sequences given out again. So after each commit's fsync, and before anybody is told of it, what was committed
// is noted in a small file of its own, without an fsync: two slots in turn, so that a torn write leaves the other.
// A power cut may take the note back, never make it say too much.
//
//	0      4     5          13      15      ...     end of the slot
//	| "HFmk" | ver | number | length | state | crc32c of all before | zeros
//
// Written to disk: never renumber, never reuse.
const (
	markName    = "mark"
	markMagic   = "HFmk"
	markV1      = 1
	markHeader  = 15
	markSlot    = 4 << 10
	markTrailer = 4
)

// marks is that file. Nil writes nothing. Only the goroutine that completes commits writes it.
type marks struct {
	f      vfs.File
	log    *slog.Logger
	number uint64
	last   []byte // the state found at the start; nil: none
	lost   bool   // there was one, or may have been, that cannot be read
	buf    []byte
	told   bool
}

// openMarks opens the file, or makes it. One that cannot be read has no last state.
func openMarks(fsys vfs.FS, dir string, log *slog.Logger) (*marks, error) {
	m := &marks{log: log}
	path := fsys.PathJoin(dir, markName)
	b, _, err := readTolerant(fsys, path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for at := 0; at+markSlot <= len(b); at += markSlot {
		if n, state, ok := parseMark(b[at : at+markSlot]); ok && n > m.number {
			m.number, m.last = n, append([]byte{}, state...)
		}
	}
	m.lost = err == nil && m.last == nil
	if len(b) == 2*markSlot {
		m.f, err = fsys.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
		return m, err
	}
	// Its blocks are allocated now: on a full disk it can still be written.
	if m.f, err = fsys.Create(path, vfs.WriteCategoryUnspecified); err != nil {
		return nil, err
	}
	zeros := make([]byte, 2*markSlot)
	if m.last != nil {
		copy(zeros, appendMark(nil, m.number, m.last))
	}
	if _, err := m.f.Write(zeros); err != nil {
		return nil, errors.Join(err, m.f.Close())
	}
	return m, m.f.Sync()
}

func appendMark(dst []byte, number uint64, state []byte) []byte {
	dst = append(append(dst, markMagic...), markV1)
	dst = binary.BigEndian.AppendUint64(dst, number)
	dst = append(binary.BigEndian.AppendUint16(dst, uint16(len(state))), state...)
	return binary.BigEndian.AppendUint32(dst, crc32.Checksum(dst, castagnoli))
}

func parseMark(b []byte) (number uint64, state []byte, ok bool) {
	if string(b[:4]) != markMagic || b[4] != markV1 {
		return 0, nil, false
	}
	end := markHeader + int(binary.BigEndian.Uint16(b[13:]))
	if end+markTrailer > len(b) || crc32.Checksum(b[:end], castagnoli) != binary.BigEndian.Uint32(b[end:]) {
		return 0, nil, false
	}
	return binary.BigEndian.Uint64(b[5:]), b[markHeader:end], true
}

// write notes the state that appendTo gives. A disk that does not take it fails at the next commit.
func (m *marks) write(appendTo func([]byte) []byte) {
	if m == nil {
		return
	}
	m.number++
	b := append(m.buf[:0], markMagic...)
	b = binary.BigEndian.AppendUint64(append(b, markV1), m.number)
	b = appendTo(append(b, 0, 0))
	state := len(b) - markHeader
	if len(b)+markTrailer > markSlot {
		if !m.told {
			m.told = true
			m.log.Warn("too many lanes for the mark of what is committed: damage of the log's end may go unnoticed", "size_bytes", state)
		}
		return
	}
	binary.BigEndian.PutUint16(b[13:], uint16(state))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	m.buf = b
	if _, err := m.f.WriteAt(b, int64(m.number%2)*markSlot); err != nil && !m.told {
		m.told = true
		m.log.Warn("mark of what is committed cannot be written", "err", err)
	}
}

func (m *marks) close() error {
	if m == nil {
		return nil
	}
	return m.f.Close()
}

// Marked returns what the participant's Mark gave for the last commit before the store was opened; nil: that is not known.
func (s *Store) Marked() []byte {
	if s.marks == nil {
		return nil
	}
	return s.marks.last
}

// MarkLost says whether there was a mark that cannot be read, or a store that has taken one may not have.
func (s *Store) MarkLost() bool { return s.marks != nil && s.marks.lost }
