package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/record"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// A manifest is a file of records, each an edit of what tables there are. Of an edit's fields, which begin with a tag,
// these are the ones that say something here; the rest is passed over.
//
// Read from and written to disk, as Pebble has them: never renumber.
const (
	editComparer       = 1
	editLogNumber      = 2 // logs from here on are not in tables yet
	editNextFile       = 3
	editLastSequence   = 4
	editCompactPointer = 5
	editDeletedTable   = 6
	editTable1         = 7
	editPrevLog        = 9
	editTable2         = 100
	editTable3         = 102
	editTable4         = 103
	editTable5         = 104
	editBacking        = 105 // a file that holds tables which are parts of it
	editNoBacking      = 106
	editBlobFile       = 107
	editNoBlobFile     = 108

	fieldEnd      = 1
	fieldVirtual  = 66 // the table is a part of a file with another number
	fieldBlobRefs = 69
	fieldNeeded   = 1 << 6 // who does not know such a field cannot read the table
)

// errManifest says that an edit is not one.
var errManifest = errors.New("not an edit of a manifest")

// table is one of the store's tables, as a manifest has it.
type tableEntry struct {
	level    int
	number   uint64 // of the table
	file     uint64 // that holds it; another number if the table is a part of it
	size     uint64 // of the table's rows; of the file, if it is all of it
	lo, hi   pebble.InternalKey
	seqs     [2]uint64 // lowest and highest
	inOthers bool      // its file holds more than it shows
}

// manifest is what one says.
type manifest struct {
	records [][]byte
	whole   bool // all of it could be read
	tables  map[uint64]tableEntry
	gone    map[uint64]bool   // files of tables that are there no longer
	backing map[uint64]uint64 // sizes of files that hold parts, by number
	minLog  uint64            // 0: not said
	lastSeq uint64
}

// readManifest reads as many edits as can be read.
func readManifest(b []byte) *manifest {
	m := &manifest{tables: map[uint64]tableEntry{}, gone: map[uint64]bool{}, backing: map[uint64]uint64{}}
	s := scanRecords(b, 0, false)
	m.whole = len(s.holes) == 0
	for _, r := range s.records {
		if len(s.holes) > 0 && r.at >= s.holes[0].from {
			break
		}
		if m.edit(r.payload) != nil {
			m.whole = false
			break
		}
		m.records = append(m.records, r.payload)
	}
	if len(m.records) == 0 {
		m.whole = false
	}
	return m
}

// edit takes in one edit, or nothing of it.
func (m *manifest) edit(b []byte) error {
	r := fields{b: b}
	var added []tableEntry
	var removed, noBacking []uint64
	minLog, lastSeq := m.minLog, m.lastSeq
	backing := map[uint64]uint64{}
	for len(r.b) > 0 && r.err == nil {
		switch tag := r.number(); tag {
		case editComparer:
			if name := r.bytes(); r.err == nil && string(name) != pebble.DefaultComparer.Name {
				return fmt.Errorf("%w: keys are ordered by %q", errManifest, name)
			}
		case editLogNumber:
			minLog = r.number()
		case editLastSequence:
			lastSeq = r.number()
		case editPrevLog, editNextFile:
			r.number()
		case editCompactPointer:
			r.number()
			r.bytes()
		case editDeletedTable:
			r.number()
			removed = append(removed, r.number())
		case editBacking:
			n := r.number()
			backing[n] = r.number()
		case editNoBacking:
			noBacking = append(noBacking, r.number())
		case editTable1, editTable2, editTable3, editTable4, editTable5:
			added = append(added, r.table(tag))
		case editBlobFile:
			for range 5 {
				r.number()
			}
		case editNoBlobFile:
			r.number()
			r.number()
		default:
			return fmt.Errorf("%w: field %d", errManifest, tag)
		}
	}
	if r.err != nil {
		return r.err
	}
	m.minLog, m.lastSeq = minLog, lastSeq
	for n, size := range backing {
		m.backing[n] = size
		delete(m.gone, n)
	}
	for _, n := range removed {
		if t, ok := m.tables[n]; ok && !t.inOthers {
			m.gone[t.file] = true
		}
		delete(m.tables, n)
	}
	for _, t := range added {
		m.tables[t.number] = t
		delete(m.gone, t.file)
	}
	for n := range backing { // the table that the file was is gone, the file is not
		delete(m.gone, n)
	}
	for _, n := range noBacking {
		delete(m.backing, n)
		m.gone[n] = true
	}
	return nil
}

// sorted gives the tables in the order of their numbers.
func (m *manifest) sorted() []tableEntry {
	ts := make([]tableEntry, 0, len(m.tables))
	for _, t := range m.tables {
		ts = append(ts, t)
	}
	slices.SortFunc(ts, func(a, b tableEntry) int { return int(int64(a.number - b.number)) })
	return ts
}

// fields reads an edit's fields. After an error all are zero.
type fields struct {
	b   []byte
	err error
}

func (r *fields) number() uint64 {
	n, size := binary.Uvarint(r.b)
	if size <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[size:]
	return n
}

func (r *fields) bytes() []byte {
	n := r.number()
	if n > uint64(len(r.b)) {
		r.fail()
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *fields) key() pebble.InternalKey {
	b := r.bytes()
	if len(b) < 8 {
		r.fail()
		return pebble.InternalKey{}
	}
	n := len(b) - 8
	return pebble.InternalKey{UserKey: slices.Clone(b[:n]), Trailer: pebble.InternalKeyTrailer(binary.LittleEndian.Uint64(b[n:]))}
}

func (r *fields) fail() {
	if r.err == nil {
		r.err = fmt.Errorf("%w: it ends early", errManifest)
	}
	r.b = nil
}

// table reads a new table. Its kinds differ in how they tell of its keys, and in what may follow.
func (r *fields) table(tag uint64) (t tableEntry) {
	t.level, t.number = int(r.number()), r.number()
	t.file = t.number
	if tag == editTable3 {
		r.number()
	}
	t.size = r.number()
	if tag == editTable5 { // there are range keys, which this store never writes
		r.fail()
		return t
	}
	t.lo, t.hi = r.key(), r.key()
	if tag != editTable1 {
		t.seqs = [2]uint64{r.number(), r.number()}
	}
	if tag != editTable4 {
		return t
	}
	for r.err == nil {
		switch f := r.number(); {
		case f == fieldEnd:
			return t
		case f == fieldVirtual:
			t.inOthers, t.file = true, r.number()
		case f == fieldBlobRefs, f&fieldNeeded != 0: // this store never writes them
			r.fail()
		default:
			r.bytes()
		}
	}
	return t
}

// appendTable appends the fields of a new table that is all of its file.
func appendTable(b []byte, t *tableEntry) []byte {
	for _, n := range [...]uint64{editTable2, uint64(t.level), t.number, t.size} {
		b = binary.AppendUvarint(b, n)
	}
	for _, k := range [...]pebble.InternalKey{t.lo, t.hi} {
		b = binary.AppendUvarint(b, uint64(len(k.UserKey)+8))
		b = append(b, k.UserKey...)
		b = binary.LittleEndian.AppendUint64(b, uint64(k.Trailer))
	}
	return binary.AppendUvarint(binary.AppendUvarint(b, t.seqs[0]), t.seqs[1])
}

// appendRemoved appends the fields that take a table out.
func appendRemoved(b []byte, t *tableEntry) []byte {
	for _, n := range [...]uint64{editDeletedTable, uint64(t.level), t.number} {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

// writeRecords makes a file of records and syncs it. next, if it is not 0, is the number after that of the log which the file is: so
// a log says that it was closed in order.
func writeRecords(fs vfs.FS, path string, next uint32, records func(yield func([]byte) bool)) (err error) {
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := record.NewWriter(f)
	for r := range records {
		var to io.Writer
		if to, err = w.Next(); err != nil {
			return err
		}
		if _, err = to.Write(r); err != nil {
			return err
		}
	}
	size := w.Size()
	if err = w.Close(); err != nil {
		return err
	}
	if next != 0 {
		var end []byte
		if rest := recordBlock - int(size%recordBlock); rest < headerLog {
			end = make([]byte, rest)
		}
		end = append(end, 0, 0, 0, 0, 0, 0, 5)
		if _, err = f.Write(binary.LittleEndian.AppendUint32(end, next)); err != nil {
			return err
		}
	}
	return f.Sync()
}
