package spool

import (
	"fmt"
	"time"
)

// Purge drops messages of a lane because somebody said so: those received before olderThan (zero: of
// any age) with a sequence up to upTo (0: all there are now), from the oldest on until the first that is
// to stay. They count as evicted, are announced as a gap with the reason "purged", and their space goes
// back to the file system before Purge returns, but for what has not left the log yet, which follows
// within seconds. It returns what left the lane. It works while messages come and go, and on a full disk.
func (s *Spool) Purge(name string, olderThan time.Time, upTo uint64) (Count, error) {
	number, ok := s.names[name]
	if !ok {
		return Count{}, fmt.Errorf("purge lane %q: %w", name, ErrNoLane)
	}
	if err := s.store.Flush(); err != nil { // what was acknowledged before the call is in reach
		return Count{}, fmt.Errorf("purge lane %q: %w", name, err)
	}
	s.house.Lock()
	defer s.house.Unlock()
	l := s.lanes[number]
	s.mu.Lock()
	end := l.durable
	s.mu.Unlock()
	var (
		gone Count
		err  error
	)
	if olderThan.IsZero() && (upTo == 0 || upTo >= end.Seq-1) {
		gone = s.drop(l, end, loss{outcome: Evicted, reason: gapPurged}) // what cannot be read goes as well
	} else {
		cutoff := olderThan.UnixMilli()
		stays := func(seq uint64, received int64) bool {
			return !olderThan.IsZero() && received >= cutoff || upTo != 0 && seq > upTo
		}
		gone, err = s.dropUntil(l, Evicted, gapPurged,
			func(m *chunkMeta) bool { return stays(m.End().Seq-1, m.Newest) },
			func(seq uint64, r *Record) bool { return stays(seq, r.Received) })
	}
	if err == nil {
		err = s.giveBack(l)
	}
	if err != nil {
		return gone, fmt.Errorf("purge lane %q: %w", name, err)
	}
	return gone, nil
}

// giveBack commits the lane's new head and excises what lies before it. The caller holds house.
func (s *Spool) giveBack(l *lane) error {
	s.mu.Lock()
	l.hurry = true
	s.mu.Unlock()
	if err := s.store.Flush(); err != nil {
		return err
	}
	return s.reclaim(l, false)
}
