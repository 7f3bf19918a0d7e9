package spool

import (
	"errors"

	"holdfast/internal/kv"
)

// What a full disk means for messages. The store's guard says how full it is (kv.Level); what the lanes do about it is
// here. The system lane, rows and cursors go on at every level: the reserve is theirs.
//
//	high  what may be shed (QoS 0) is
//	full  a lane that rejects does; one that drops its oldest gives space back for those who wait to append, and
//	      rejects if it has none to give: what is in the log only takes no table's space

// ErrDisk is in the error of an Append that was refused because the disk is full; ErrFull is, too.
var ErrDisk = errors.New("disk reserve is reached")

// leastDrop is the least that a lane drops at once on a full disk.
const leastDrop = 1 << 20

// admit says whether the lane takes n more records while the disk is as full as it is. It may wait until there is room,
// unless what comes may be shed. The usual case costs an atomic load.
func (l *lane) admit(n int, shed bool) error {
	level := l.s.store.Level()
	if level == kv.LevelOK || l.number == systemNumber {
		return nil
	}
	if shed {
		if level == kv.LevelFull {
			l.want()
		}
		l.shed.Add(uint64(n))
		return ErrBusy
	}
	if level == kv.LevelHigh {
		return nil
	}
	if r := l.rules.Load(); r.WhenFull == Reject || !l.waitForSpace() {
		l.refusedDisk.Add(uint64(n))
		return r.errDisk
	}
	return nil
}

// want asks housekeeping to have the lane make room.
func (l *lane) want() {
	l.wanted.Store(true)
	l.s.wakeHousekeeping()
}

// waitForSpace waits until the disk has room again; false: the lane has nothing to give for it.
func (l *lane) waitForSpace() bool {
	s := l.s
	s.space.L.Lock()
	defer s.space.L.Unlock()
	for s.store.Level() == kv.LevelFull && !s.closing {
		if l.futile.Load() {
			return false
		}
		l.want()
		s.space.Wait()
	}
	return !s.closing
}

// waitForDrop waits until housekeeping has looked at the lane, which holds all that it may and had its head at head.
func (l *lane) waitForDrop(head uint64) error {
	s := l.s
	s.space.L.Lock()
	defer s.space.L.Unlock()
	if s.closing {
		return kv.ErrClosed
	}
	if l.headBytes.Load() == head {
		s.wakeHousekeeping()
		s.space.Wait()
	}
	return nil
}

// passed tells those who wait that housekeeping has been everywhere once.
func (s *Spool) passed() {
	s.space.L.Lock()
	defer s.space.L.Unlock()
	s.space.Broadcast()
}

// levelChanged is told by the store.
func (s *Spool) levelChanged(level kv.Level) {
	if level != kv.LevelFull {
		for _, l := range s.lanes {
			l.wanted.Store(false)
			l.futile.Store(false)
		}
	}
	s.wakeHousekeeping() // from now on however little is finished with is given back, or need not be
	s.passed()
}

// relieve has the lane drop its oldest messages while the disk is full, if somebody waits to append to it. The caller
// holds house.
func (s *Spool) relieve(l *lane) error {
	if s.store.Level() != kv.LevelFull {
		l.heldAtFull = 0
		return nil
	}
	if l.number == systemNumber {
		return s.boundSystem(l)
	}
	if !l.wanted.Load() || l.rules.Load().WhenFull != DropOldest {
		return nil
	}
	for {
		d := s.store.CheckDisk()
		if d.Level != kv.LevelFull || d.Resume == 0 {
			return nil
		}
		gone, err := s.dropFromTables(l, max(uint64(d.Resume), leastDrop))
		if err == nil && gone.Messages > 0 {
			if err = s.giveBack(l); err == nil {
				err = s.store.WaitRemoved(s.stop)
			}
		}
		if err != nil || gone.Messages == 0 {
			l.futile.Store(true) // until the level changes, or the next tick
			return err
		}
	}
}

// boundSystem keeps what the gateway itself has to tell from using the reserve up: it may grow by an eighth of it.
func (s *Spool) boundSystem(l *lane) error {
	s.mu.Lock()
	held := l.durable.Bytes - l.head.Bytes
	if l.heldAtFull == 0 {
		l.heldAtFull = max(held, 1)
	}
	most := l.heldAtFull + uint64(s.store.Disk().Reserve)/8
	s.mu.Unlock()
	if held <= most {
		return nil
	}
	gone, err := s.dropFromTables(l, held-most+(most-l.heldAtFull)/2)
	if err == nil && gone.Messages > 0 {
		err = s.giveBack(l)
	}
	return err
}

// dropFromTables drops at least n bytes of the lane's oldest messages, but none that no table holds: they would give no
// space back.
func (s *Spool) dropFromTables(l *lane, n uint64) (Count, error) {
	_, flushed := s.store.Memtable()
	s.mu.Lock()
	want, inTables := l.head.Bytes+n, l.inTables(flushed)
	s.mu.Unlock()
	return s.dropUntil(l, Evicted, gapDiskFull, func(m *chunkMeta) bool {
		return m.First.Bytes >= want || m.End().Seq > inTables.Seq
	}, nil)
}

// inTables is the lane's first position that is not in tables yet. The caller holds mu.
func (l *lane) inTables(flushed uint64) Position {
	for len(l.memtables) > 0 && l.memtables[0].memtable <= flushed {
		l.memtables = l.memtables[1:]
	}
	if len(l.memtables) > 0 {
		return l.memtables[0].first
	}
	return l.durable
}
