package kv

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// diskFS stands between Pebble and the file system and decides what a failed write means:
//
//   - No space, before anything was synced: the kernel did not take these bytes, so the write may be done
//     again. The guard gives up ballast for it. If that is not enough a table's failure goes to Pebble,
//     which writes another one later; the log and the manifest wait for space, and the store with them.
//     When it has waited for fullWait the store has failed: somebody has to free space.
//   - A sync that failed, or a write for any other reason: nobody knows what the disk has. The store has
//     failed, and the caller never returns: Pebble would try again, or take the commit for done.
//
// Reads, and whatever lies outside of the store's folder, pass.
type diskFS struct {
	vfs.FS
	s   *Store
	dir string
}

func (d *diskFS) Unwrap() vfs.FS { return d.FS }

const (
	// fullWait is how long a commit waits for space before the store has failed.
	fullWait = 30 * time.Second
	// fullPause is between two tries, also of Pebble, which makes none of its own.
	fullPause = 100 * time.Millisecond
)

// ours says whether the file is one of the store's.
func (d *diskFS) ours(name string) bool { return strings.HasPrefix(name, d.dir) }

// table says whether Pebble can do without the file, and writes another.
func table(name string) bool { return strings.HasSuffix(name, ".sst") }

// again runs write until it does not fail for want of space any more.
func (d *diskFS) again(op, name string, write func() error) error {
	err := write()
	if err == nil || !d.ours(name) {
		return err
	}
	for start := time.Now(); isFull(err); {
		if !d.s.guard.noSpace() {
			switch {
			case d.s.opening.Load(), time.Since(start) > d.s.opt.fullWait, table(name) && d.s.stalledTooLong():
				return d.failed(op, name, err)
			case table(name):
				d.s.noTable.Store(time.Now().UnixNano())
				time.Sleep(fullPause) //nolint:forbidigo // Pebble tries again at once, for ever
				return err
			}
			time.Sleep(fullPause) //nolint:forbidigo // there is nobody who would tell of free space
		}
		err = write()
	}
	if err != nil {
		return d.failed(op, name, err)
	}
	return nil
}

// stalledTooLong says whether somebody waits for tables that cannot be written.
func (s *Store) stalledTooLong() bool {
	now := time.Now().UnixNano()
	for _, since := range []int64{s.stalled.Load(), s.excising.Load()} {
		if since != 0 && now-since > int64(s.opt.fullWait) {
			return true
		}
	}
	return false
}

// tableRefused says whether tables find no space now.
func (s *Store) tableRefused() bool {
	return time.Now().UnixNano()-s.noTable.Load() < int64(closeWait)
}

// failed ends the store for what the disk answered, unless Pebble can live with it.
func (d *diskFS) failed(op, name string, err error) error {
	switch {
	case !d.ours(name), errors.Is(err, os.ErrNotExist):
		return err
	case table(name) && (errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)):
		return err // Pebble writes another when there are descriptors
	case isFull(err):
		d.s.fail(fmt.Errorf("%s %s: %w: free some space on the file system of %s, then start again", op, name, err, d.dir))
	default:
		d.s.fail(fmt.Errorf("%s %s: %w: the disk is failing or was taken away; look at the kernel's log, then start again", op, name, err))
	}
	d.s.hang()
	return err
}

func (d *diskFS) wrap(f vfs.File, name string) vfs.File {
	if f == nil || !d.ours(name) {
		return f
	}
	return &diskFile{File: f, d: d, name: name, manifest: manifestNumber(d.PathBase(name))}
}

// Create makes a file. Before the one that names a manifest the folder is synced: else a power cut could keep that name
// and not the manifest's.
func (d *diskFS) Create(name string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	if d.ours(name) && strings.HasPrefix(d.PathBase(name), "marker.manifest") {
		if err := syncFolder(d, d.PathDir(name)); err != nil {
			return nil, err
		}
	}
	err = d.again("create", name, func() (err error) { f, err = d.FS.Create(name, c); return err })
	if err != nil {
		return nil, err
	}
	return d.wrap(f, name), nil
}

func (d *diskFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := d.FS.OpenReadWrite(name, c, o...)
	if err != nil {
		return nil, err
	}
	return d.wrap(f, name), nil
}

// syncFolder has the names in a folder on stable storage.
func syncFolder(fs vfs.FS, name string) error {
	f, err := fs.OpenDir(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Open opens a file to be read.
func (d *diskFS) Open(name string, o ...vfs.OpenOption) (vfs.File, error) {
	if d.ours(name) && table(name) {
		return openTable(d.FS, name, o...)
	}
	return d.FS.Open(name, o...)
}

// OpenDir is for syncing names.
func (d *diskFS) OpenDir(name string) (vfs.File, error) {
	f, err := d.FS.OpenDir(name)
	if err != nil {
		return nil, err
	}
	return d.wrap(f, name), nil
}

func (d *diskFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (f vfs.File, err error) {
	err = d.again("reuse log as", name, func() (err error) { f, err = d.FS.ReuseForWrite(old, name, c); return err })
	if err != nil {
		return nil, err
	}
	return d.wrap(f, name), nil
}

func (d *diskFS) Link(old, name string) error {
	return d.again("link", name, func() error { return d.FS.Link(old, name) })
}

func (d *diskFS) Rename(old, name string) error {
	return d.again("rename to", name, func() error { return d.FS.Rename(old, name) })
}

func (d *diskFS) MkdirAll(name string, perm os.FileMode) error {
	return d.again("make folder", name, func() error { return d.FS.MkdirAll(name, perm) })
}

func (d *diskFS) Lock(name string) (c io.Closer, err error) {
	c, err = d.FS.Lock(name)
	for isFull(err) && d.s.guard.noSpace() {
		c, err = d.FS.Lock(name)
	}
	return c, err // most of the time somebody else has it
}

// diskFile is a file that is written.
type diskFile struct {
	vfs.File
	d        *diskFS
	name     string
	manifest uint64 // its number, if it is one; else 0
	written  uint64 // bytes of a manifest; one goroutine at a time writes and syncs it
}

func (f *diskFile) Write(p []byte) (n int, err error) {
	err = f.d.again("write", f.name, func() error {
		k, err := f.File.Write(p[n:])
		n += k
		return err
	})
	f.d.s.guard.wrote(n)
	if f.manifest != 0 {
		f.written += uint64(n)
	}
	return n, err
}

func (f *diskFile) WriteAt(p []byte, at int64) (n int, err error) {
	err = f.d.again("write", f.name, func() error {
		k, err := f.File.WriteAt(p[n:], at+int64(n))
		n += k
		return err
	})
	f.d.s.guard.wrote(n)
	return n, err
}

func (f *diskFile) Sync() error {
	err := f.synced(f.File.Sync())
	if err == nil && f.manifest != 0 {
		f.d.s.manifest.sync(f.manifest, f.written)
	}
	return err
}

func (f *diskFile) SyncData() error { return f.synced(f.File.SyncData()) }

func (f *diskFile) SyncTo(length int64) (bool, error) {
	full, err := f.File.SyncTo(length)
	return full, f.synced(err)
}

// synced says what a sync's end means. None is tried again: the kernel forgets the error with the page.
// A table whose sync found no space is another matter, since Pebble writes another one.
func (f *diskFile) synced(err error) error {
	switch {
	case err == nil:
		return nil
	case isFull(err) && table(f.name) && !f.d.s.opening.Load() && !f.d.s.stalledTooLong():
		f.d.s.guard.noSpace()
		f.d.s.noTable.Store(time.Now().UnixNano())
		time.Sleep(fullPause) //nolint:forbidigo // Pebble tries again at once, for ever
		return err
	}
	return f.d.failed("sync", f.name, err)
}
