package kv

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
)

// ballast is a file that does nothing but take space, so that there is some to give up. Nil has none.
// It is written past the store's file system layer, which calls it.
type ballast struct {
	path string
	mu   sync.Mutex   // one change at a time
	held atomic.Int64 // bytes of blocks
}

func openBallast(path string) *ballast {
	b := &ballast{path: path}
	if fi, err := os.Stat(path); err == nil {
		b.held.Store(min(fi.Size(), allocated(fi)))
	}
	return b
}

func (b *ballast) size() int64 {
	if b == nil {
		return 0
	}
	return b.held.Load()
}

// releasePart is how much of the ballast is given up at once: whoever else writes may take it as soon as it is free.
const releasePart = 1.0 / 4

// release gives up a part, and says whether there was any.
func (b *ballast) release() bool {
	if b == nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	fi, err := os.Stat(b.path)
	if err != nil {
		b.held.Store(0)
		return false
	}
	left := b.held.Load() - max(int64(float64(fi.Size())*releasePart), 1<<20)
	if left <= 0 {
		left = 0
		err = os.Remove(b.path)
	} else {
		err = os.Truncate(b.path, left)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	b.held.Store(left)
	return true
}

// take makes the file size bytes long, all of them on disk; after an error it is as long as it was.
func (b *ballast) take(size int64) (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f, err := os.OpenFile(b.path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("take disk reserve: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	had := b.held.Load()
	if err = f.Truncate(had); err == nil { // what is beyond has no blocks
		err = allocate(f, size)
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = fill(f, had, size-had)
	}
	if err != nil {
		return fmt.Errorf("take disk reserve of %d bytes: %w", size, errors.Join(err, f.Truncate(had)))
	}
	b.held.Store(size)
	return nil
}

// fill writes what no file system can make smaller.
func fill(f *os.File, from, n int64) error {
	var seed [32]byte
	noise := rand.NewChaCha8(seed)
	buf := make([]byte, 256<<10)
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		_, _ = noise.Read(part) // never fails
		if _, err := f.WriteAt(part, from); err != nil {
			return err
		}
		from, n = from+int64(len(part)), n-int64(len(part))
	}
	return nil
}
