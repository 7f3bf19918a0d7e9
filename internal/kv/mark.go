package kv

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A log whose end is damaged looks like one that was never written so far: what was acknowledged would be gone without
// a word, and its sequences given out again. So after each commit's fsync, and before anybody is told of it, what was committed
// is noted in two small files, one after the other, without an fsync: a torn write, or damage, leaves one. A power cut may take the note
// back, never make it say too much.
//
// So does a manifest that is cut between two edits: tables, and logs that are in tables, would be gone. How much of it was synced is noted
// with the next commit after each of its edits; it only grows.
//
//	0        4     5        13                21              29       31      ...     end
//	| "HFmk" | ver | number | manifest number | manifest size | length | state | crc32c of all before | zeros to 16 KiB
//
// Version 1 has no manifest. Written to disk: never renumber, never reuse.
const (
	markMagic    = "HFmk"
	markV1       = 1
	markV2       = 2
	markHeaderV1 = 15
	markHeader   = 31
	markSize     = 16 << 10
	markTrailer  = 4
)

// mark is what one of the files says.
type mark struct {
	number                 uint64 // rises with each commit
	manifest, manifestSize uint64 // number of the manifest, and bytes that it had at least; 0: not known
	state                  []byte // nil: none
}

// manifestWatch knows how much of the manifest is on stable storage: no more, since a power cut may keep the mark and take the rest.
// Pebble's goroutines tell it of each sync, and of a new manifest once the marker names it.
type manifestWatch struct {
	mu            sync.Mutex // guards what follows
	current       uint64     // number of the manifest that the marker names; 0: none was made since the start
	synced, bytes uint64     // the last one that was synced, and how much of it
}

func (w *manifestWatch) sync(number, bytes uint64) {
	w.mu.Lock()
	w.synced, w.bytes = number, bytes
	w.mu.Unlock()
}

func (w *manifestWatch) made(number uint64) {
	w.mu.Lock()
	w.current = number
	w.mu.Unlock()
}

// safe gives the manifest that is in use and how much of it is safe. ok is false if that is not known.
func (w *manifestWatch) safe() (number, bytes uint64, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.current, w.bytes, w.current != 0 && w.synced == w.current
}

var markNames = [...]string{"mark", "mark.2"}

// marks is those files. Nil writes nothing. Only the goroutine that completes commits writes them.
type marks struct {
	mark  // the one that was found at the start; state stays so, the rest is of the last that was written
	watch *manifestWatch
	files []vfs.File
	log   *slog.Logger
	lost  bool // there was one that cannot be read
	bad   []string
	buf   []byte
	told  bool
}

// readMarks reads the files. whole are those that may be written over as they are, bad those that are damaged.
func readMarks(fsys vfs.FS, dir string) (last mark, whole [len(markNames)]bool, bad []string, err error) {
	for i, name := range markNames {
		b, _, err := readTolerant(fsys, fsys.PathJoin(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return mark{}, whole, nil, err
		}
		if err != nil {
			continue
		}
		found, ok := parseMark(b)
		if whole[i] = len(b) == markSize && (ok || allZero(b)); !whole[i] && len(b) > 0 {
			bad = append(bad, name)
		}
		if ok && found.number > last.number {
			last = found
		}
	}
	return last, whole, bad, nil
}

// openMarks opens the files, or makes them; with look it only reads them.
func openMarks(fsys vfs.FS, dir string, log *slog.Logger, watch *manifestWatch, look bool) (*marks, error) {
	m := &marks{log: log, watch: watch}
	var whole [len(markNames)]bool
	var err error
	if m.mark, whole, m.bad, err = readMarks(fsys, dir); err != nil {
		return nil, err
	}
	// Zeros are what a power cut may leave of it.
	m.lost = len(m.bad) > 0 && m.state == nil
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
	if m.state != nil {
		copy(b, m.mark.encode(nil))
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}

func (m *mark) appendHeader(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint64(append(append(dst, markMagic...), markV2), m.number)
	dst = binary.BigEndian.AppendUint64(dst, m.manifest)
	return append(binary.BigEndian.AppendUint64(dst, m.manifestSize), 0, 0)
}

// endMark fills in the length of the state, which stands behind the header, and appends the checksum.
func endMark(b []byte) []byte {
	binary.BigEndian.PutUint16(b[markHeader-2:], uint16(len(b)-markHeader))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func (m *mark) encode(dst []byte) []byte { return endMark(append(m.appendHeader(dst), m.state...)) }

func parseMark(b []byte) (m mark, ok bool) {
	if len(b) < markHeaderV1+markTrailer || string(b[:4]) != markMagic {
		return mark{}, false
	}
	header := markHeader
	switch b[4] {
	case markV1:
		header = markHeaderV1
	case markV2:
		if len(b) < markHeader+markTrailer {
			return mark{}, false
		}
		m.manifest, m.manifestSize = binary.BigEndian.Uint64(b[13:]), binary.BigEndian.Uint64(b[21:])
	default:
		return mark{}, false
	}
	end := header + int(binary.BigEndian.Uint16(b[header-2:]))
	if end+markTrailer > len(b) || crc32.Checksum(b[:end], castagnoli) != binary.BigEndian.Uint32(b[end:]) {
		return mark{}, false
	}
	m.number, m.state = binary.BigEndian.Uint64(b[5:]), append([]byte{}, b[header:end]...)
	return m, true
}

// write notes the state that appendTo gives. A disk that does not take it fails at the next commit.
func (m *marks) write(appendTo func([]byte) []byte) {
	if m == nil || len(m.files) == 0 {
		return
	}
	m.number++
	if number, bytes, ok := m.watch.safe(); ok {
		m.manifest, m.manifestSize = number, bytes
	}
	b := appendTo(m.appendHeader(m.buf[:0]))
	if len(b)+markTrailer > markSize {
		if !m.told {
			m.told = true
			m.log.Warn("too many lanes for the mark of what is committed: damage of the log's end may go unnoticed", "size_bytes", len(b)-markHeader)
		}
		return
	}
	b = endMark(b)
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
	return s.marks.state
}

// MarkLost says whether there was a mark that cannot be read.
func (s *Store) MarkLost() bool { return s.marks != nil && s.marks.lost }
