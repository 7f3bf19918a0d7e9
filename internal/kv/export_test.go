package kv

import (
	"context"
	"time"
)

// SetFullWait sets how long a log waits for space.
func (o *Options) SetFullWait(d time.Duration) { o.fullWait = d }

// FlushTables writes the memtables to tables.
func (s *Store) FlushTables() error { return s.db.Flush() }

// Compact compacts every row, and returns when that is done or called off.
func (s *Store) Compact(ctx context.Context) error {
	return s.db.Compact(ctx, []byte{0}, []byte{0xff}, false)
}
