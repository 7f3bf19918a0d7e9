package spool

import (
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// housekeepingInterval is how often ages are looked at, and the longest that a moved cursor waits
// for a commit when nothing else is written.
const housekeepingInterval = time.Second

func (s *Spool) housekeeping() {
	defer s.done.Done()
	tick := time.NewTicker(housekeepingInterval)
	defer tick.Stop()
	for {
		ticked := false
		select {
		case <-s.stop:
			return
		case <-s.wake:
		case <-tick.C:
			ticked = true
		}
		if err := s.keepHouse(ticked); err != nil {
			s.cfg.Log.Warn("spool housekeeping stalls", "err", err)
		}
	}
}

// keepHouse applies the lanes' limits, commits cursors that moved, and gives space back.
func (s *Spool) keepHouse(ticked bool) error {
	for _, l := range s.lanes {
		if err := s.limit(l); err != nil {
			return err
		}
		if err := s.reclaim(l, ticked); err != nil {
			return err
		}
	}
	if ticked && s.quietNow() {
		s.blocks.trim()
		s.store.Trim()
		s.mu.Lock()
		s.free = nil
		s.mu.Unlock()
	}
	if ticked && s.anythingDirty() {
		g, err := s.store.BeginFirst()
		if err != nil {
			return err
		}
		g.End() // an empty group takes the moved cursors along
	}
	return nil
}

// quietNow says whether the last message came quietTicks ago: true once in each quiet time.
func (s *Spool) quietNow() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	least := s.lanes[0].quiet
	for _, l := range s.lanes {
		least = min(least, l.quiet)
	}
	return least == quietTicks
}

func (s *Spool) anythingDirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lanes {
		if l.dirty || len(l.deletes) > 0 {
			return true
		}
		for _, c := range l.cursors {
			if c.dirty {
				return true
			}
		}
	}
	return false
}

// limit drops what is too old, then what is too much.
func (s *Spool) limit(l *lane) error {
	if l.cfg.MaxAge > 0 {
		cutoff := s.cfg.Now().Add(-l.cfg.MaxAge).UnixMilli()
		err := s.dropUntil(l, Expired, gapMaxAge, func(m *chunkMeta) bool { return m.Newest >= cutoff })
		if err != nil {
			return err
		}
	}
	if l.cfg.MaxBytes > 0 && l.cfg.WhenFull == DropOldest {
		s.mu.Lock()
		held := l.durable.Bytes - l.head.Bytes
		// A little more than has to go, so that a full lane drops now and then and not all the time.
		want := l.head.Bytes + held - uint64(l.cfg.MaxBytes) + uint64(min(l.cfg.MaxBytes/64, 16<<20))
		s.mu.Unlock()
		if held >= uint64(l.cfg.MaxBytes) {
			return s.dropUntil(l, Evicted, gapMaxBytes, func(m *chunkMeta) bool { return m.First.Bytes >= want })
		}
	}
	return nil
}

// dropUntil lets go of the lane's oldest chunks up to the first one to keep. Bytes before a chunk
// and times rise with the sequence, so the place is found by bisection, whatever the backlog.
func (s *Spool) dropUntil(l *lane, o Outcome, reason string, keep func(*chunkMeta) bool) error {
	s.mu.Lock()
	head, end := l.head, l.durable
	s.mu.Unlock()
	if head.Seq >= end.Seq {
		return nil
	}
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return err
	}
	defer it.Close()
	var first, last, m chunkMeta
	lo, hi, to := head.Seq, end.Seq, head
	ok, err := chunkAt(it, l, head.Seq, &first)
	switch {
	case err != nil:
		return err
	case ok && keep(&first):
		return nil // the usual case: one look at the oldest chunk
	case ok:
		lo, last, to = first.End().Seq, first, first.End()
	}
	for lo < hi {
		ok, err := chunkAt(it, l, lo+(hi-lo)/2, &m)
		switch {
		case err != nil:
			return err
		case !ok: // damaged or missing: what lies beyond decides
			lo += (hi-lo)/2 + 1
		case keep(&m):
			hi = max(m.First.Seq, lo)
		default:
			lo, last, to = m.End().Seq, m, m.End()
		}
	}
	if to.Seq <= head.Seq {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range l.cursors {
		if c.active {
			c.resolve(to, loss{outcome: o, reason: reason, fromMS: first.Oldest, toMS: last.Newest})
		}
	}
	if !l.waiting() {
		n := &l.evicted
		if o == Expired {
			n = &l.expired
		}
		if to.Seq > l.head.Seq {
			n.add(l.head, to)
			s.moveHead(l, to)
		}
	}
	s.advanceHead(l)
	s.notify()
	return nil
}

// chunkAt reads the header of the stored chunk that holds seq. ok is false if there is none that can be read.
func chunkAt(it *pebble.Iterator, l *lane, seq uint64, m *chunkMeta) (ok bool, err error) {
	if !it.SeekLT(keyData(l.number, seq+1)) {
		return false, it.Error()
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return false, err
	}
	if *m, err = parseChunkMeta(v); err != nil {
		return false, nil //nolint:nilerr // a damaged chunk is the reader's to report
	}
	return m.First.Seq <= seq && seq < m.End().Seq, nil
}
