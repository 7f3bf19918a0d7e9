package kv

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// suspects are the tables of which something could not be read while the store was open.
type suspects struct {
	mu    sync.Mutex
	paths []string
	since time.Time // of the first of failed
	fails int       // compactions that damage ended
}

// stuck is told that damage ended a compaction, and says whether that is all that compactions do now. Pebble leaves such tables
// alone for some minutes, unless they are of the highest level, where it tries again at once, for ever.
func (s *suspects) stuck() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.since) > time.Minute {
		s.since, s.fails = time.Now(), 0
	}
	s.fails++
	return s.fails > 3
}

// note adds a table, and has the next start know of it. It says whether it is a new one.
func (s *suspects) note(fs vfs.FS, dir, path string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.paths {
		if p == path {
			return false
		}
	}
	s.paths = append(s.paths, path)
	f, err := fs.Create(fs.PathJoin(dir, suspectsName), vfs.WriteCategoryUnspecified)
	if err != nil {
		return true // the next start finds less at once, and more when it reads
	}
	for _, p := range s.paths {
		if _, err = f.Write([]byte(filepath.Base(p) + "\n")); err != nil {
			break
		}
	}
	_ = errors.Join(err, f.Sync(), f.Close())
	return true
}

func (s *suspects) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paths[:len(s.paths):len(s.paths)]
}

// IsDamage says whether an error is about damaged bytes, and not about the disk.
func IsDamage(err error) bool { return pebble.IsCorruptionError(err) }

// Passable says whether a reader that met damage, as cause tells, may go on behind it. If the damage hides more than it hit (a table's
// index, say), the store fails instead: the next start gets out what can be read.
func (s *Store) Passable(cause error) error {
	if !pebble.IsCorruptionError(cause) || s.opt.Look {
		return nil
	}
	o := &pebble.Options{}
	o.EnsureDefaults()
	for _, path := range s.suspects.list() {
		if err := checkTable(s.opt.FS, path, o, false); err != nil && isDamage(err) {
			s.fail(fmt.Errorf("table %s is damaged: %w: start again, the start sets it aside and keeps what can be read", filepath.Base(path), err))
			return s.failure()
		}
	}
	return nil
}

// rowsDamaged ends a store of which rows that are no chunks cannot be read: the next start sets them aside and goes on.
func (s *Store) rowsDamaged(key []byte, err error) error {
	if !pebble.IsCorruptionError(err) || s.opt.Look || len(key) > 0 && key[0] == PrefixData {
		return err
	}
	s.fail(fmt.Errorf("%w: start again, the start sets aside what is damaged", err))
	return err
}
