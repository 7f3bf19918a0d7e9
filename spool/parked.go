package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/kv"
)

// What an upstream has refused for good is in the account parked, and a copy of it in a row of its own, outside of its lane and
// its limits: an operator looks at it, has it replayed, or drops it. Copies have a limit of their own, or an upstream that
// refuses everything would fill the disk.

// ParkedMessage is a message that an upstream refused for good.
type ParkedMessage struct {
	Lane, Upstream string
	Seq            uint64
	AtMS           int64 // when it was parked, Unix ms
	Reason         string
	Record         []byte // see ParseRecord; the receiver's

	size int64 // of the row
}

// Parked calls fn for each parked message, in the order of lanes and sequences.
func (s *Spool) Parked(fn func(ParkedMessage) error) error {
	return s.ParkedFrom(SystemLane, 0, fn)
}

// ParkedFrom is Parked from a place on: the lane's first parked message from sequence seq on. ErrNoLane.
func (s *Spool) ParkedFrom(lane string, seq uint64, fn func(ParkedMessage) error) error {
	from, ok := s.names[lane]
	if !ok {
		return fmt.Errorf("parked messages of lane %q: %w", lane, ErrNoLane)
	}
	for _, l := range s.lanes[from:] {
		if err := s.parkedOf(l, seq, fn); err != nil {
			if errors.Is(err, errStopScan) {
				return nil
			}
			return err
		}
		seq = 0
	}
	return nil
}

func (s *Spool) parkedOf(l *lane, seq uint64, fn func(ParkedMessage) error) error {
	return s.parkedRows(l, seq, func(m *ParkedMessage, value []byte) error {
		var row parkedRow
		if err := row.parse(value); err != nil {
			return fmt.Errorf("parked message %d of lane %q: %w", m.Seq, l.name, err)
		}
		m.AtMS, m.Reason, m.Record = int64(row.AtMS), row.Reason, row.Record
		return fn(*m)
	})
}

// parkedRows calls fn with what the key of each row says, and its value, which is valid until fn returns.
func (s *Spool) parkedRows(l *lane, seq uint64, fn func(m *ParkedMessage, value []byte) error) (err error) {
	prefix := []byte{kv.PrefixParked, l.number}
	it, err := s.store.Iter(keyParked(l.number, seq, ""), kv.PrefixEnd(prefix))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("parked messages of lane %q: %w", l.name, err)
		}
		k := it.Key()[len(prefix):]
		if len(k) < 8 {
			return fmt.Errorf("parked row %x: %w", k, ErrCorrupt)
		}
		m := ParkedMessage{Lane: l.name, Upstream: string(k[8:]), Seq: binary.BigEndian.Uint64(k), size: int64(len(it.Key()) + len(v))}
		if err := fn(&m, v); err != nil {
			return err
		}
	}
	return it.Error()
}

// countParked notes that copies came (or went).
func (s *Spool) countParked(l *lane, messages int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.parked.Messages += uint64(int64(messages))
	l.parked.Bytes += uint64(bytes)
}

// openParked counts the copies that are there. What cannot be read is not counted.
func (s *Spool) openParked() {
	for _, l := range s.lanes {
		err := s.parkedRows(l, 0, func(m *ParkedMessage, _ []byte) error {
			s.countParked(l, 1, m.size)
			return nil
		})
		if err != nil {
			s.cfg.Log.Warn("parked messages of a lane cannot all be read", "lane", l.name, "err", err)
		}
	}
}

// limitParked drops the oldest copies of the lane that has most of them while all together are more than Config.ParkedBytes: an
// eighth of that more than is too much, so that this is seldom.
func (s *Spool) limitParked() error {
	most := uint64(s.cfg.ParkedBytes)
	var largest *lane
	sum := uint64(0)
	s.mu.Lock()
	for _, l := range s.lanes {
		sum += l.parked.Bytes
		if largest == nil || l.parked.Bytes > largest.parked.Bytes {
			largest = l
		}
	}
	s.mu.Unlock()
	if sum <= most || !s.replaying.TryLock() { // a replay is on its way to make room itself
		return nil
	}
	defer s.replaying.Unlock()
	gone, err := s.dropParked(largest, "", sum-most+most/8)
	if gone.Messages > 0 {
		s.parkedGone.Add(gone.Messages)
		s.cfg.Log.Warn("too much is parked: the oldest copies are dropped, and can no longer be replayed", "lane", largest.name, "messages", gone.Messages,
			"size_bytes", gone.Bytes, "most_bytes", most)
	}
	return err
}

// PurgeParked drops the copies of messages of a lane that upstream ("": any) has refused for good, and returns how much that was.
// They keep their account. ErrNoLane.
func (s *Spool) PurgeParked(name, upstream string) (gone Count, err error) {
	number, ok := s.names[name]
	if !ok {
		return Count{}, fmt.Errorf("purge what is parked of lane %q: %w", name, ErrNoLane)
	}
	s.replaying.Lock()
	defer s.replaying.Unlock()
	if gone, err = s.dropParked(s.lanes[number], upstream, 1<<63); err != nil {
		err = fmt.Errorf("purge what is parked of lane %q: %w", name, err)
	}
	return gone, err
}

// dropParked drops the oldest copies of a lane, n bytes of rows at least if there are as many. Their space goes back to the file
// system at once, unless copies of other upstreams lie among them: then as compactions come to them. The caller holds replaying.
func (s *Spool) dropParked(l *lane, upstream string, n uint64) (gone Count, err error) {
	s.parking.Lock() // what came in between would go with the others, and not be counted
	defer s.parking.Unlock()
	if err := s.store.Flush(); err != nil { // what was refused before is in reach
		return Count{}, err
	}
	last, mixed := uint64(0), false
	var rows []kv.Op // of upstream, if the copies are mixed
	err = s.parkedRows(l, 0, func(m *ParkedMessage, _ []byte) error {
		switch {
		case gone.Bytes >= n && m.Seq > last:
			return errStopScan
		case upstream != "" && m.Upstream != upstream:
			mixed = true
			return nil
		}
		last = m.Seq
		gone.Messages++
		gone.Bytes += uint64(m.size)
		if upstream != "" {
			rows = append(rows, kv.Op{Key: keyParked(l.number, m.Seq, m.Upstream), Delete: true})
		}
		return nil
	})
	if err != nil && !errors.Is(err, errStopScan) || gone.Messages == 0 {
		return Count{}, err
	}
	if mixed {
		for some := range slices.Chunk(rows, replayRecords) {
			if err := s.store.ApplyWait(some); err != nil {
				return Count{}, err
			}
		}
	} else if err := s.store.Excise(keyParked(l.number, 0, ""), keyParked(l.number, last+1, "")); err != nil {
		return Count{}, err
	}
	s.countParked(l, -int(gone.Messages), -int64(gone.Bytes))
	return gone, nil
}
