package spool

import (
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/internal/kv"
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
	s.house.Lock()
	defer s.house.Unlock()
	defer s.passed()
	for _, l := range s.lanes {
		if ticked {
			l.futile.Store(false) // another try
		}
		if err := s.limit(l); err != nil {
			return err
		}
		if err := s.relieve(l); err != nil {
			return err
		}
		if err := s.reclaim(l, ticked); err != nil {
			return err
		}
	}
	if err := s.limitParked(); err != nil {
		return err
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

// dropStride is how much a lane that may hold most record bytes drops at once, and how far below most it begins with that, so
// that who appends need not wait for it: a 64th, in a small lane more, so that it is a few chunks.
func dropStride(most uint64) uint64 { return min(max(most/64, min(most/8, 1<<20)), 16<<20) }

// limit drops what is too old, then what is too much.
func (s *Spool) limit(l *lane) error {
	r := l.rules.Load()
	if r.MaxAge > 0 {
		now, age := s.clock.Read().T, r.MaxAge.Milliseconds()
		_, err := s.dropUntil(l, Expired, gapMaxAge, func(m *chunkMeta) bool { return s.clock.Between(s.service(m), now) <= age }, nil)
		if err != nil {
			return err
		}
	}
	if r.MaxBytes > 0 && r.WhenFull == DropOldest {
		s.mu.Lock()
		held := l.durable.Bytes - l.head.Bytes
		// A little more than has to go, so that a full lane drops now and then and not all the time.
		want := l.head.Bytes + held - r.softMax + dropStride(uint64(r.MaxBytes))
		s.mu.Unlock()
		if held >= r.softMax {
			_, err := s.dropUntil(l, Evicted, gapMaxBytes, func(m *chunkMeta) bool { return m.First.Bytes >= want }, nil)
			return err
		}
	}
	return nil
}

// dropUntil lets go of the lane's oldest chunks up to the first one to keep. Bytes before a chunk
// and times rise with the sequence, so the place is found by bisection, whatever the backlog. With
// within, which says of a record whether it stays, it goes on into the first chunk to keep, up to the
// first record to keep. It returns what left the lane. The caller holds house.
func (s *Spool) dropUntil(l *lane, o Outcome, reason string, keep func(*chunkMeta) bool, within func(uint64, *Record) bool) (gone Count, err error) {
	s.mu.Lock()
	head, end := l.head, l.durable
	s.mu.Unlock()
	if head.Seq >= end.Seq {
		return gone, nil
	}
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return gone, err
	}
	defer it.Close()
	var first, last, m chunkMeta
	lo, hi, to := head.Seq, end.Seq, head
	ok, err := chunkAt(it, l, head.Seq, &first)
	switch {
	case err != nil:
		return gone, err
	case ok && keep(&first):
		if within == nil {
			return gone, nil // the usual case: one look at the oldest chunk
		}
		hi = lo
	case ok:
		lo, last, to = first.End().Seq, first, first.End()
	}
	for lo < hi {
		ok, err := chunkAt(it, l, lo+(hi-lo)/2, &m)
		switch {
		case err != nil:
			return gone, err
		case !ok: // damaged or missing: what lies beyond decides
			lo += (hi-lo)/2 + 1
		case keep(&m):
			hi = max(m.First.Seq, lo)
		default:
			lo, last, to = m.End().Seq, m, m.End()
		}
	}
	fromMS, toMS := s.wall(&first, first.Oldest), s.wall(&last, last.Newest)
	if within != nil && to.Seq < end.Seq {
		if to, toMS, err = dropWithin(it, l, to, toMS, within); err != nil {
			return gone, err
		}
	}
	if to.Seq <= head.Seq {
		return gone, nil
	}
	return s.drop(l, to, loss{outcome: o, reason: reason, fromMS: fromMS, toMS: toMS}), nil
}

// drop lets go of everything before to, for every upstream, and returns what left the lane.
func (s *Spool) drop(l *lane, to Position, how loss) (gone Count) {
	s.mu.Lock()
	defer s.mu.Unlock()
	head := l.head
	for _, c := range l.cursors {
		if c.active {
			c.resolve(to, how)
		}
	}
	if !l.waiting() && to.Seq > head.Seq {
		n := &l.evicted
		if how.outcome == Expired {
			n = &l.expired
		}
		n.add(head, to)
		s.moveHead(l, to)
	}
	s.advanceHead(l)
	s.notify()
	gone.add(head, l.head)
	return gone
}

// dropWithin moves to forward in its chunk, up to the first record that stays says of. toMS is when the last record
// before it was received.
func dropWithin(it *pebble.Iterator, l *lane, to Position, toMS int64, stays func(uint64, *Record) bool) (Position, int64, error) {
	if !it.SeekLT(keyData(l.number, to.Seq+1)) {
		return to, toMS, unlessDamage(it.Error())
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return to, toMS, unlessDamage(err)
	}
	m, raw, err := decodeChunk(nil, v)
	if err != nil || m.First.Seq > to.Seq || m.End().Seq <= to.Seq || to.Bytes-m.First.Bytes > uint64(len(raw)) {
		return to, toMS, nil //nolint:nilerr // a damaged chunk is the reader's to report
	}
	raw = raw[to.Bytes-m.First.Bytes:]
	var r Record
	for len(raw) > 0 {
		n, err := ParseRecord(raw, &r)
		if err != nil || stays(to.Seq, &r) {
			return to, toMS, nil //nolint:nilerr // as above
		}
		raw = raw[n:]
		toMS = r.Received
		to.Seq++
		to.Bytes += uint64(n)
	}
	return to, toMS, nil
}

// chunkAt reads the header of the stored chunk that holds seq. ok is false if there is none that can be read.
func chunkAt(it *pebble.Iterator, l *lane, seq uint64, m *chunkMeta) (ok bool, err error) {
	if !it.SeekLT(keyData(l.number, seq+1)) {
		return false, unlessDamage(it.Error())
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return false, unlessDamage(err)
	}
	if *m, err = parseChunkMeta(v); err != nil {
		return false, nil //nolint:nilerr // a damaged chunk is the reader's to report
	}
	return m.First.Seq <= seq && seq < m.End().Seq, nil
}

// unlessDamage leaves out what is the reader's to report.
func unlessDamage(err error) error {
	if kv.IsDamage(err) {
		return nil
	}
	return err
}
