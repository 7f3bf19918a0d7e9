package spool

import (
	"fmt"
	"slices"
)

// rules are a lane's limits, with what follows from them. They are replaced as a whole.
type rules struct {
	LaneConfig
	maxChunk int
	softMax  uint64 // record bytes from which a lane that drops its oldest does so
	// Made once: refusals come when there is the least time for them.
	errFull, errDisk error
}

func newRules(c LaneConfig) *rules {
	r := &rules{LaneConfig: c, maxChunk: maxChunk, errDisk: fmt.Errorf("append to lane %q: %w: %w", c.Name, ErrFull, ErrDisk)}
	if c.MaxBytes > 0 {
		// A small lane has small chunks: what is dropped at once is a part of it.
		r.maxChunk = int(min(maxChunk, max(c.MaxBytes/16, 1)))
		r.softMax = uint64(c.MaxBytes) - dropStride(uint64(c.MaxBytes))
		r.errFull = fmt.Errorf("append to lane %q: %w (max_bytes %d)", c.Name, ErrFull, c.MaxBytes)
	}
	return r
}

// SetLimits replaces the limits of lanes, each named by its LaneConfig; all of them or, after an error, none. They hold from the next
// message on; a lane that holds too much now, or too old, drops that within a second, as its rules say. Share, Urgent and BackfillShare
// are for consumers that begin later. Drain can change only while no consumer reads the lane.
func (s *Spool) SetLimits(lanes []LaneConfig) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var changed []*lane
	for _, c := range lanes {
		n, ok := s.Lane(c.Name)
		if !ok || n == systemNumber {
			return fmt.Errorf("set limits of lane %q: %w", c.Name, ErrNoLane)
		}
		l := s.lanes[n]
		if live := c.Drain == LiveFirst; live != (l.rules.Load().Drain == LiveFirst) && s.isRead(l) {
			return fmt.Errorf("set limits of lane %q: drain cannot change while the lane is read", c.Name)
		}
		changed = append(changed, l)
	}
	for i, l := range changed {
		live := lanes[i].Drain == LiveFirst
		switch was := l.rules.Load().Drain == LiveFirst; {
		case live && !was:
			l.marks, l.lastCommit = []mark{{end: l.durable}}, 0 // as at a start: what is there is old
		case was && !live:
			l.marks = nil
		}
		l.rules.Store(newRules(lanes[i]))
	}
	s.wakeHousekeeping()
	return nil
}

// isRead says whether a consumer has a reader for l. The caller holds mu.
func (s *Spool) isRead(l *lane) bool {
	return slices.ContainsFunc(s.consumers, func(c *Consumer) bool {
		return slices.ContainsFunc(c.readers, func(r *Reader) bool { return r.l == l })
	})
}

// Detach ends the wait of an upstream that is no longer configured, or no longer for these lanes (nil: all, the system lane among
// them): nothing is kept for it there. If it comes back, what was dropped meanwhile counts as evicted, and it is told (gap, reason
// detached). It must have no consumer.
func (s *Spool) Detach(upstream string, lanes []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.ContainsFunc(s.consumers, func(c *Consumer) bool { return c.readers[0].cur.upstream == upstream }) {
		return fmt.Errorf("detach upstream %q: it has a consumer", upstream)
	}
	for _, l := range s.lanes {
		c := l.cursor(upstream)
		if c == nil || !c.active || lanes != nil && !slices.Contains(lanes, l.name) {
			continue
		}
		c.active = false
		c.holes = nil // met again by whoever reads them again
		c.restart()
		s.left(l, c)
		s.advanceHead(l)
	}
	s.wakeHousekeeping()
	return nil
}

// left tells that messages wait no longer for an upstream. The caller holds mu.
func (s *Spool) left(l *lane, c *cursor) {
	if c.row.Pos.Seq < l.durable.Seq {
		s.cfg.Log.Warn("upstream is no longer configured, its messages no longer wait for it",
			"upstream", c.upstream, "lane", l.name, "pending", l.durable.Seq-c.row.Pos.Seq-c.row.apart().Messages)
	}
}
