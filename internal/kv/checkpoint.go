package kv

import (
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Checkpoint makes a copy of the store as it is now in dir, which must not be there, while the store works on. Tables are
// hard links where the file system has them, and hold their space until they are removed in both places; the log and the
// rest, a few MB, are copied. It is on stable storage when this returns; after an error dir is gone.
//
// All that is in the copy is on stable storage here, too: a commit that the copy has and that this store could still lose
// would let two stores give one sequence to different messages.
func (s *Store) Checkpoint(dir string) error {
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.db.Checkpoint(dir, pebble.WithFlushedWAL()); err != nil {
		return fmt.Errorf("copy store to %q: %w", dir, err)
	}
	// Commits went on while the log was copied.
	if err := s.db.LogData(nil, pebble.Sync); err != nil {
		s.fail(fmt.Errorf("sync write-ahead log: %w", err))
		_ = s.opt.FS.RemoveAll(dir) // the error above is the one to tell
		return fmt.Errorf("copy store to %q: %w", dir, err)
	}
	return nil
}

func (s *Store) usable() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	return s.failed
}
