package spool

import "time"

// SetElapsed gives a spool the clock by which a lane that drains live_first tells how old messages are. Call it before the first append.
func SetElapsed(s *Spool, now func() time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.elapsed = func() time.Duration { return beforeOpen + now() }
}

// DropBefore has a lane's rule drop the chunks that begin before seq.
func DropBefore(s *Spool, name string, seq uint64) error {
	_, err := s.dropUntil(s.lanes[s.names[name]], Evicted, gapMaxBytes, func(m *chunkMeta) bool { return m.First.Seq >= seq }, nil)
	return err
}

// The limits of a lane that drains live_first.
const (
	MaxIslands = maxIslands
	LeapAge    = leapAge
	LeapBytes  = leapBytes
)
