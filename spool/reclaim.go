package spool

import (
	"errors"

	"holdfast/internal/kv"
)

// How space goes back to the disk. A log-structured store never overwrites: a tombstone on a chunk
// that has reached a table would be one more thing to write, and would hold the space until some
// compaction meets both. So there are two ways, and neither leaves one behind:
//
//   - A chunk that is finished with while the memtable that holds it still takes writes gets a plain
//     Delete in the next commit. Row and tombstone meet in that memtable and neither is ever flushed.
//     A gateway whose upstream keeps up writes its log, and nothing else.
//   - A chunk that has been flushed waits until exciseBytes of them have gathered, or the lane is
//     quiet, or the disk is short of space; then the whole range is excised, which drops tables from the manifest.
//
// Excise is durable at once, so it never passes the head that the last commit wrote, and it stays
// below the first sequence that is not in tables yet: a range in a memtable would force its flush.

// exciseBytes is how much finished data a lane holds before it is excised: two tables, 16 MiB but on a small disk.
func (s *Spool) exciseBytes() uint64 { return 2 * s.store.MemTableSize() }

// quietTicks is after how many looks without new messages a lane is excised however little it is.
const quietTicks = 3

// reclaim excises the lane's finished chunks when they are worth it. The caller holds house.
func (s *Spool) reclaim(l *lane, ticked bool) error {
	_, flushed := s.store.Memtable()
	s.mu.Lock()
	head, inTables := l.safeHead, l.inTables(flushed)
	finished := head.Bytes - l.reclaimed.Bytes
	finished -= min(finished, l.deleted)
	if ticked {
		if l.seen == l.durable.Seq {
			l.quiet++
		} else {
			l.seen, l.quiet = l.durable.Seq, 0
		}
	}
	hurry := l.hurry || ticked && s.store.Level() != kv.LevelOK
	worth := finished >= s.exciseBytes() || (finished > 0 && (l.quiet >= quietTicks || hurry))
	if finished == 0 {
		l.hurry = false
	}
	s.mu.Unlock()
	if !worth {
		return nil
	}
	end, err := s.finishedBefore(l, head)
	if err != nil {
		return err
	}
	if inTables.Seq < end.Seq {
		end = inTables
	}
	if end.Seq <= l.reclaimed.Seq {
		return nil
	}
	if err := s.store.Excise(keyData(l.number, 0), keyData(l.number, end.Seq)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.reclaimed, l.deleted = end, 0
	return nil
}

// finishedBefore returns the begin of the chunk that holds head, or head if it begins one.
func (s *Spool) finishedBefore(l *lane, head Position) (Position, error) {
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return Position{}, err
	}
	var m chunkMeta
	ok, err := chunkAt(it, l, head.Seq, &m)
	err = errors.Join(err, it.Close())
	if err != nil {
		return Position{}, err
	}
	if ok {
		return m.First, nil
	}
	return head, nil
}

var _ kv.Participant = (*Spool)(nil)
