package kv

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/cockroachdb/pebble/v2/sstable/colblk"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// A table is blocks of rows, each followed by a byte for its compression (this store has none) and a checksum, then an
// index of them, then a footer that says where the index is. What is damaged of it costs the block that it is in:
// without an index the blocks are found by their checksums.

const (
	blockTrailer = 5
	// largestBlock is more than any block of this store has: a chunk of one record of the largest size, and its neighbours.
	largestBlock = 4 << 20
	// blockHeader is of a block of rows: 4 bytes, then version 1, columns, rows, and for each column its type and where it begins.
	blockHeader  = 11
	blockColumns = 7
	// searchSteps bounds the search for blocks, however much in the rows looks like one.
	searchSteps = 1 << 30
)

// tableLook is what a look at a table found.
type tableLook struct {
	lo, hi pebble.InternalKey
	seqs   [2]uint64
	rows   int
}

// add takes in a row; they come in order.
func (t *tableLook) add(k *pebble.InternalKey) {
	seq := uint64(k.SeqNum())
	if t.rows == 0 {
		t.lo, t.seqs = k.Clone(), [2]uint64{seq, seq}
	}
	t.hi.CopyFrom(*k)
	t.seqs = [2]uint64{min(t.seqs[0], seq), max(t.seqs[1], seq)}
	t.rows++
}

// isChunks says whether there are only chunks of one lane between two keys.
func isChunks(lo, hi []byte) bool {
	return len(lo) > 1 && len(hi) > 1 && lo[0] == PrefixData && hi[0] == PrefixData && lo[1] == hi[1]
}

// tableFile is a table that is read. Whatever Pebble reads of one is a whole block with its trailer, or the footer. If a block's checksum is
// wrong, Pebble looks for the bit that would make it right, which takes seconds for a large one, each time; so it never gets to see
// such a block.
type tableFile struct {
	vfs.File
	size int64
}

// openTable opens a table to be read.
func openTable(fs vfs.FS, path string, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := fs.Open(path, o...)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &tableFile{f, fi.Size()}, nil
}

// ReadAt implements io.ReaderAt.
func (f *tableFile) ReadAt(b []byte, at int64) (int, error) {
	n, err := f.File.ReadAt(b, at)
	if err == nil && len(b) > blockTrailer && at+int64(len(b)) < f.size && !blockHolds(b) {
		return 0, fmt.Errorf("%w: checksum of the block at %d, %d bytes, is wrong", pebble.ErrCorruption, at, len(b)-blockTrailer)
	}
	return n, err
}

// withTable calls fn with the table in path open.
func withTable(fs vfs.FS, path string, o *pebble.Options, fn func(*sstable.Reader) error) (err error) {
	defer func() { // a lying length may lead it anywhere
		if r := recover(); r != nil {
			err = fmt.Errorf("table cannot be read: %v", r)
		}
	}()
	f, err := openTable(fs, path)
	if err != nil {
		return err
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	r, err := sstable.NewReader(context.Background(), readable, o.MakeReaderOptions())
	if err != nil {
		return errors.Join(err, readable.Close())
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return fn(r)
}

// checkTable looks whether a table can be read: its footer and its index, and with all every block.
func checkTable(fs vfs.FS, path string, o *pebble.Options, all bool) error {
	return withTable(fs, path, o, func(r *sstable.Reader) error {
		l, err := r.Layout()
		if err != nil || !all {
			return err
		}
		var b []byte
		for _, h := range l.Data {
			b = slices.Grow(b[:0], int(h.Length+blockTrailer))[:h.Length+blockTrailer]
			if err := r.BlockReader().Readable().ReadAt(context.Background(), b, int64(h.Offset)); err != nil {
				return err
			}
		}
		return nil
	})
}

// boundsOf finds a whole table's first and last row, and, unless it holds chunks, whose sequence numbers rise with their keys,
// reads all others for theirs.
func boundsOf(fs vfs.FS, path string, o *pebble.Options) (t tableLook, err error) {
	err = withTable(fs, path, o, func(r *sstable.Reader) (err error) {
		it, err := r.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, it.Close()) }()
		kv := it.First()
		if kv == nil {
			return errors.Join(it.Error(), errors.New("table has no rows"))
		}
		t.add(&kv.K)
		if kv = it.Last(); kv == nil {
			return it.Error()
		}
		if isChunks(t.lo.UserKey, kv.K.UserKey) {
			t.add(&kv.K)
			return nil
		}
		t = tableLook{}
		for kv = it.First(); kv != nil; kv = it.Next() {
			t.add(&kv.K)
		}
		return it.Error()
	})
	return t, err
}

// readTolerant reads a file, with zeros for what the disk does not give.
func readTolerant(fs vfs.FS, path string) (b []byte, unread int64, err error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	b = make([]byte, fi.Size())
	if _, err := f.ReadAt(b, 0); err == nil || errors.Is(err, io.EOF) {
		return b, 0, nil
	}
	const piece = 4 << 10
	for at := 0; at < len(b); at += piece {
		part := b[at:min(at+piece, len(b))]
		if _, err := f.ReadAt(part, int64(at)); err != nil && !errors.Is(err, io.EOF) {
			clear(part)
			unread += int64(len(part))
		}
	}
	return b, unread, nil
}

// saved is what could be read of a damaged table.
type saved struct {
	blocks    []span // of rows, that could be read
	lostBytes int64
}

// findBlocks finds the blocks of rows in a table: by its index if that can be read, else by their checksums.
func findBlocks(fs vfs.FS, path string, b []byte, o *pebble.Options) (s saved) {
	index := 0
	err := withTable(fs, path, o, func(r *sstable.Reader) error {
		l, err := r.Layout()
		if err != nil {
			return err
		}
		for _, h := range l.Data {
			index++
			to := h.Offset + h.Length
			if to+blockTrailer <= uint64(len(b)) && blockHolds(b[h.Offset:to+blockTrailer]) {
				s.blocks = append(s.blocks, span{int64(h.Offset), int64(to)})
			} else {
				s.lostBytes += int64(h.Length)
			}
		}
		return nil
	})
	if err == nil && index > 0 {
		return s
	}
	s = saved{}
	steps := searchSteps
	for at := 0; at < len(b); {
		to := blockEnd(b, at, &steps)
		if to > 0 {
			s.blocks = append(s.blocks, span{int64(at), int64(to)})
			at = to + blockTrailer
			continue
		}
		next := nextBlock(b, at+1, &steps)
		s.lostBytes += int64(next - at)
		at = next
	}
	return s
}

// blockHolds says whether a block's checksum, its last bytes, is right.
func blockHolds(b []byte) bool {
	sum := len(b) - 4
	return maskedSum(crc32.Checksum(b[:sum], castagnoli)) == binary.LittleEndian.Uint32(b[sum:])
}

// looksLikeBlock says whether a block of rows may begin with b.
func looksLikeBlock(b []byte) bool {
	const firstColumn = blockHeader + 5*blockColumns
	return len(b) > firstColumn && b[4] == 1 && binary.LittleEndian.Uint16(b[5:]) == blockColumns &&
		binary.LittleEndian.Uint32(b[blockHeader+1:]) == firstColumn
}

// blockEnd returns where the block of rows that begins at at ends, 0 if none does.
func blockEnd(b []byte, at int, steps *int) int {
	if !looksLikeBlock(b[at:]) {
		return 0
	}
	sum := ^uint32(0)
	most := min(len(b)-4, at+min(largestBlock, *steps))
	*steps -= max(most-at, 0)
	for i := at; i < most; i++ {
		sum = castagnoli[byte(sum)^b[i]] ^ sum>>8
		if i-at >= blockHeader && b[i] == 0 && maskedSum(^sum) == binary.LittleEndian.Uint32(b[i+1:]) {
			return i
		}
	}
	return 0
}

// nextBlock returns the first place from at on where a block of rows may begin, len(b) if there is none.
func nextBlock(b []byte, at int, steps *int) int {
	signature := []byte{1, blockColumns, 0}
	for at < len(b) {
		i := bytes.Index(b[min(at+4, len(b)):], signature)
		if i < 0 {
			break
		}
		at += i
		if blockEnd(b, at, steps) > 0 {
			return at
		}
		at++
	}
	return len(b)
}

// keySchema is how tables of this store hold keys: the default of Pebble's options.
var keySchema = colblk.DefaultKeySchema(pebble.DefaultComparer, 16)

// blockRows calls fn for each row of a block. The slices are valid during the call.
func blockRows(b []byte, fn func(k *pebble.InternalKey, v []byte) error) (err error) {
	var failed error
	defer func() {
		if r := recover(); r != nil && failed == nil {
			err = fmt.Errorf("block cannot be read: %v", r)
		}
	}()
	var d colblk.DataBlockDecoder
	var it colblk.DataBlockIter
	d.Init(&keySchema, slices.Clone(b)) // it wants memory of its own, that is aligned
	it.InitOnce(&keySchema, pebble.DefaultComparer, nil)
	if err := it.Init(&d, block.NoTransforms); err != nil {
		return err
	}
	for kv := it.First(); kv != nil; kv = it.Next() {
		if failed = fn(&kv.K, kv.InPlaceValue()); failed != nil {
			return failed
		}
	}
	return nil
}

// saveTable writes what can be read of the damaged table b between two keys, both inclusive (nil: all), to a new one in path. With no
// row to write there is no file.
func saveTable(fs vfs.FS, path string, b []byte, s *saved, lo, hi []byte, o *pebble.Options) (t tableLook, size uint64, err error) {
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return t, 0, err
	}
	w := sstable.NewRawWriter(objstorageprovider.NewFileWritable(f), o.MakeWriterOptions(0, pebble.FormatNewest.MaxTableFormat()))
	defer func() {
		if err != nil || t.rows == 0 {
			err = errors.Join(err, fs.Remove(path))
		}
	}()
	var broken error
	for _, at := range s.blocks {
		bad := blockRows(b[at.from:at.to], func(k *pebble.InternalKey, v []byte) error {
			if lo != nil && bytes.Compare(k.UserKey, lo) < 0 || hi != nil && bytes.Compare(k.UserKey, hi) > 0 {
				return nil
			}
			if !knownKind(k.Kind()) || t.rows > 0 && pebbleCompare(t.hi, *k) >= 0 {
				return errors.New("rows are out of order")
			}
			if broken = w.Add(*k, v, false); broken != nil {
				return broken
			}
			t.add(k)
			return nil
		})
		if broken != nil {
			return t, 0, errors.Join(broken, w.Close())
		}
		if bad != nil {
			s.lostBytes += at.to - at.from
		}
	}
	if err := w.Close(); err != nil {
		return t, 0, err
	}
	m, err := w.Metadata()
	if err != nil {
		return t, 0, err
	}
	return t, m.Size, nil
}

// knownKind says whether this store writes rows of the kind.
func knownKind(k pebble.InternalKeyKind) bool {
	switch k { //nolint:exhaustive // the others are what it does not write
	case pebble.InternalKeyKindSet, pebble.InternalKeyKindDelete, pebble.InternalKeyKindSetWithDelete, pebble.InternalKeyKindSingleDelete:
		return true
	}
	return false
}

// pebbleCompare orders rows as tables hold them: by key, the newest first.
func pebbleCompare(a, b pebble.InternalKey) int {
	if c := bytes.Compare(a.UserKey, b.UserKey); c != 0 {
		return c
	}
	switch {
	case a.Trailer > b.Trailer:
		return -1
	case a.Trailer < b.Trailer:
		return 1
	}
	return 0
}
