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
// is noted in two small files, one after the other, without an fsync: a torn write, or damage, leaves one. A power cut may take the note
// back, never make it say too much.
//
//	0      4     5          13      15      ...     end
//	| "HFmk" | ver | number | length | state | crc32c of all before | zeros to 16 KiB
//
// Written to disk: never renumber, never reuse.
const (
	markMagic   = "HFmk"
	markV1      = 1
	markHeader  = 15
	markSize    = 16 << 10
	markTrailer = 4
)

var markNames = [...]string{"mark", "mark.2"}

// marks is those files. Nil writes nothing. Only the goroutine that completes commits writes them.
type marks struct {
	files  []vfs.File
	log    *slog.Logger
	number uint64
	last   []byte // the state found at the start; nil: none
	lost   bool   // there was one that cannot be read
	bad    []string
	buf    []byte
	told   bool
}

// openMarks opens the files, or makes them; with look it only reads them.
func openMarks(fsys vfs.FS, dir string, log *slog.Logger, look bool) (*marks, error) {
	m := &marks{log: log}
	whole := [len(markNames)]bool{}
	for i, name := range markNames {
		b, _, err := readTolerant(fsys, fsys.PathJoin(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err != nil {
			continue
		}
		n, state, ok := parseMark(b)
		if whole[i] = len(b) == markSize && (ok || allZero(b)); !whole[i] && len(b) > 0 {
			m.bad = append(m.bad, name)
		}
		if ok && n > m.number {
			m.number, m.last = n, append([]byte{}, state...)
		}
	}
	// Zeros are what a power cut may leave of it.
	m.lost = len(m.bad) > 0 && m.last == nil
	if look {
		return m, nil
	}
	for i, name := range markNames {
		if err := m.open(fsys, fsys.PathJoin(dir, name), whole[i]); err != nil {
			return nil, errors.Join(err, m.close())
		}
	}
	return m, nil
}

// open opens a file that is whole, or makes it. All its blocks are allocated: on a full disk it can still be written.
func (m *marks) open(fsys vfs.FS, path string, whole bool) error {
	if whole {
		f, err := fsys.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
		if err == nil {
			m.files = append(m.files, f)
		}
		return err
	}
	f, err := fsys.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	m.files = append(m.files, f)
	b := make([]byte, markSize)
	if m.last != nil {
		copy(b, appendMark(nil, m.number, m.last))
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

func appendMark(dst []byte, number uint64, state []byte) []byte {
	dst = append(append(dst, markMagic...), markV1)
	dst = binary.BigEndian.AppendUint64(dst, number)
	dst = append(binary.BigEndian.AppendUint16(dst, uint16(len(state))), state...)
	return binary.BigEndian.AppendUint32(dst, crc32.Checksum(dst, castagnoli))
}

func parseMark(b []byte) (number uint64, state []byte, ok bool) {
	if len(b) < markHeader+markTrailer {
		return 0, nil, false
	}
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
	if m == nil || len(m.files) == 0 {
		return
	}
	m.number++
	b := append(m.buf[:0], markMagic...)
	b = binary.BigEndian.AppendUint64(append(b, markV1), m.number)
	b = appendTo(append(b, 0, 0))
	state := len(b) - markHeader
	if len(b)+markTrailer > markSize {
		if !m.told {
			m.told = true
			m.log.Warn("too many lanes for the mark of what is committed: damage of the log's end may go unnoticed", "size_bytes", state)
		}
		return
	}
	binary.BigEndian.PutUint16(b[13:], uint16(state))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	m.buf = b
	for _, f := range m.files {
		if _, err := f.WriteAt(b, 0); err != nil && !m.told {
			m.told = true
			m.log.Warn("mark of what is committed cannot be written", "err", err)
		}
	}
}

func (m *marks) close() error {
	if m == nil {
		return nil
	}
	var err error
	for _, f := range m.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// Marked returns what the participant's Mark gave for the last commit before the store was opened; nil: that is not known.
func (s *Store) Marked() []byte {
	if s.marks == nil {
		return nil
	}
	return s.marks.last
}

// MarkLost says whether there was a mark that cannot be read.
func (s *Store) MarkLost() bool { return s.marks != nil && s.marks.lost }
