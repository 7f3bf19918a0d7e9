package kv

import (
	"context"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/batchrepr"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// logRow is a row as a log has it. key and value lie in the log's bytes.
type logRow struct {
	key   pebble.InternalKey
	value []byte
}

// appendRows adds the rows of a batch that is whole.
func appendRows(rows []logRow, repr []byte) []logRow {
	h, _ := batchrepr.ReadHeader(repr)
	r, seq := batchrepr.Read(repr), h.SeqNum
	for {
		kind, key, value, ok, err := r.Next()
		if !ok || err != nil {
			return rows
		}
		if kind == pebble.InternalKeyKindLogData {
			continue // it has no place in the order
		}
		if knownKind(kind) {
			rows = append(rows, logRow{pebble.MakeInternalKey(key, seq, kind), value})
		}
		seq++
	}
}

// rowSource gives rows in the order of tables; key is valid until next.
type rowSource struct {
	it     sstable.Iterator // nil: rows
	rows   []logRow
	key    pebble.InternalKey
	value  []byte
	ok     bool
	closes func() error
}

func (r *rowSource) next(first bool) error {
	if r.it == nil {
		if r.ok = len(r.rows) > 0; r.ok {
			r.key, r.value, r.rows = r.rows[0].key, r.rows[0].value, r.rows[1:]
		}
		return nil
	}
	kv := r.it.Next
	if first {
		kv = r.it.First
	}
	row := kv()
	if r.ok = row != nil; !r.ok {
		return r.it.Error()
	}
	v, _, err := row.Value(nil)
	r.key, r.value = row.K, v
	return err
}

func openSource(fs vfs.FS, path string, o *pebble.Options) (*rowSource, error) {
	f, err := openTable(fs, path)
	if err != nil {
		return nil, err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r, err := sstable.NewReader(context.Background(), readable, o.MakeReaderOptions())
	if err != nil {
		return nil, errors.Join(err, readable.Close())
	}
	it, err := r.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return &rowSource{it: it, closes: func() error { return errors.Join(it.Close(), r.Close()) }}, nil
}

// merge writes the rows of tables and logs to new tables, each row once, as it was last, with the sequence number seq. Rows that are
// deleted are left out, chunks of which are not: a table that is not among these may have them.
func (m *mender) merge(tables []uint64, logged []logRow, seq uint64) (made []tableEntry, err error) {
	sources := []*rowSource{{rows: logged, closes: func() error { return nil }}}
	defer func() {
		for _, s := range sources {
			err = errors.Join(err, s.closes())
		}
	}()
	for _, n := range tables {
		s, err := openSource(m.fs, m.path(m.tables[n]), m.opts)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
	}
	for _, s := range sources {
		if err := s.next(true); err != nil {
			return nil, err
		}
	}
	out := tableWriter{m: m}
	var last []byte
	any := false
	for {
		var least *rowSource
		for _, s := range sources {
			if s.ok && (least == nil || pebbleCompare(s.key, least.key) < 0) {
				least = s
			}
		}
		if least == nil {
			break
		}
		if !any || string(last) != string(least.key.UserKey) {
			any, last = true, append(last[:0], least.key.UserKey...)
			kind := least.key.Kind()
			deleted := kind == pebble.InternalKeyKindDelete || kind == pebble.InternalKeyKindSingleDelete
			chunk := len(last) > 0 && last[0] == PrefixData
			switch {
			case deleted && chunk:
				err = out.add(pebble.MakeInternalKey(last, pebble.SeqNum(seq), pebble.InternalKeyKindDelete), nil)
			case !deleted:
				err = out.add(pebble.MakeInternalKey(last, pebble.SeqNum(seq), pebble.InternalKeyKindSet), least.value)
			}
			if err != nil {
				return nil, errors.Join(err, out.abandon())
			}
		}
		if err := least.next(false); err != nil {
			return nil, errors.Join(err, out.abandon())
		}
	}
	return out.made, out.finish()
}

// tableWriter writes rows to tables that are cut like the store's own.
type tableWriter struct {
	m    *mender
	w    sstable.RawWriter // nil: no table is begun
	look tableLook
	lane []byte
	made []tableEntry
}

func (t *tableWriter) add(k pebble.InternalKey, v []byte) error {
	group := k.UserKey[:min(len(k.UserKey), 1)]
	switch {
	case len(k.UserKey) > 1 && k.UserKey[0] == PrefixData:
		group = k.UserKey[:2]
	case len(group) > 0 && group[0] < PrefixData:
		group = []byte{0}
	case len(group) > 0 && group[0] > PrefixData:
		group = []byte{0xff}
	}
	if t.w != nil && (string(group) != string(t.lane) || t.w.EstimatedSize() > 2*memTableMax) {
		if err := t.finish(); err != nil {
			return err
		}
	}
	if t.w == nil {
		f, err := t.m.fs.Create(t.m.path(fmt.Sprintf("%06d.sst", t.m.nextFile)), vfs.WriteCategoryUnspecified)
		if err != nil {
			return err
		}
		t.w = sstable.NewRawWriter(objstorageprovider.NewFileWritable(f), t.m.opts.MakeWriterOptions(0, pebble.FormatNewest.MaxTableFormat()))
		t.look, t.lane = tableLook{}, append([]byte(nil), group...)
	}
	if err := t.w.Add(k, v, false); err != nil {
		return err
	}
	t.look.add(&k)
	return nil
}

func (t *tableWriter) finish() error {
	if t.w == nil {
		return nil
	}
	w := t.w
	t.w = nil
	if err := w.Close(); err != nil {
		return err
	}
	meta, err := w.Metadata()
	if err != nil {
		return err
	}
	n := t.m.nextFile
	t.m.nextFile++
	t.made = append(t.made, tableEntry{number: n, file: n, size: meta.Size, lo: t.look.lo, hi: t.look.hi, seqs: t.look.seqs})
	return nil
}

func (t *tableWriter) abandon() error {
	if t.w == nil {
		return nil
	}
	return t.w.Close()
}
