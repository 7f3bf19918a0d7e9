package spool

import (
	"errors"
	"fmt"

	"holdfast/internal/kv"
)

// Report is what Verify found.
type Report struct {
	Epoch    string       `json:"epoch"`
	Lanes    []LaneReport `json:"lanes"`
	Accounts []Account    `json:"accounts"`
	Problems []string     `json:"problems"` // empty: every accepted message is accounted for and readable
}

// LaneReport is what Verify read of one lane.
type LaneReport struct {
	Lane        string `json:"lane"`
	Chunks      int    `json:"chunks"`
	Kept        Count  `json:"kept"` // from the head on
	StoredBytes uint64 `json:"stored_bytes"`
}

// Verify reads every chunk that is still needed, checks checksums, sequences and record boundaries,
// and holds them against the lanes' rows and the upstreams' accounts. progress (may be nil) is told
// the messages read so far. It is meant for a spool that nobody appends to.
func (s *Spool) Verify(progress func(messages uint64)) (Report, error) {
	rep := Report{Epoch: s.epoch, Accounts: s.Accounts()}
	problem := func(format string, args ...any) { rep.Problems = append(rep.Problems, fmt.Sprintf(format, args...)) }
	for _, d := range s.store.Damage() {
		problem("%s", d.String())
	}
	total := uint64(0)
	for _, l := range s.lanes {
		s.mu.Lock()
		head, end := l.head, l.durable
		for _, c := range l.cursors {
			name := fmt.Sprintf("lane %q, upstream %q", l.name, c.upstream)
			if !c.row.balanced() {
				problem("%s: accounts %+v do not add up to its cursor", name, c.row)
			}
			if c.row.Pos.Seq > end.Seq || c.row.Pos.Bytes > end.Bytes {
				problem("%s: cursor at %d is beyond the lane's end %d", name, c.row.Pos.Seq, end.Seq)
			}
			if n := len(c.row.Islands); n > 0 && (c.row.Islands[n-1].to.Seq > end.Seq || c.row.Islands[n-1].to.Bytes > end.Bytes) {
				problem("%s: what was delivered ahead of the cursor ends at %d, beyond the lane's end %d", name, c.row.Islands[n-1].to.Seq, end.Seq)
			}
		}
		s.mu.Unlock()
		lr := LaneReport{Lane: l.name}
		it, err := s.store.Iter(dataBounds(l.number))
		if err != nil {
			return rep, err
		}
		at, buf := head, []byte(nil)
		missing := func(to Position) {
			problem("lane %q: messages %d to %d are missing", l.name, at.Seq, to.Seq-1)
			at = to
		}
		for ok := it.First(); ; ok = it.Next() {
			if !ok {
				cause := it.Error()
				if !kv.IsDamage(cause) {
					break
				}
				problem("lane %q: chunks behind message %d: %v", l.name, max(at.Seq, 1)-1, cause)
				next, err := s.readableAfter(l, at.Seq, end.Seq)
				if err != nil {
					return rep, errors.Join(err, it.Close())
				}
				if ok = it.SeekGE(keyData(l.number, next)); !ok {
					break
				}
			}
			seq, _ := dataSeq(it.Key())
			v, err := it.ValueAndErr()
			if err != nil {
				problem("lane %q: chunk at %d: %v", l.name, seq, err)
				continue
			}
			m, raw, err := decodeChunk(buf, v)
			switch {
			case err != nil:
				problem("lane %q: chunk at %d: %v", l.name, seq, err)
				continue
			case m.First.Seq != seq || m.Lane != l.number:
				problem("lane %q: chunk under key %d says lane %d, sequence %d", l.name, seq, m.Lane, m.First.Seq)
				continue
			}
			buf = raw
			if m.End().Seq <= head.Seq {
				continue // finished with, not yet given back
			}
			if n := countRecords(raw); n != m.Count {
				problem("lane %q: chunk at %d holds %d records, its header says %d", l.name, seq, n, m.Count)
			}
			if m.First.Seq > at.Seq {
				missing(m.First)
			} else if lr.Chunks > 0 && m.First != at {
				problem("lane %q: chunk at %d begins at %+v, the one before ends at %+v", l.name, seq, m.First, at)
			}
			at = m.End()
			lr.Chunks++
			lr.StoredBytes += uint64(len(v))
			total += uint64(m.Count)
			if progress != nil {
				progress(total)
			}
		}
		if err := it.Error(); err != nil && !kv.IsDamage(err) {
			return rep, fmt.Errorf("read lane %q after %d: %w", l.name, at.Seq, errors.Join(err, it.Close()))
		}
		_ = it.Close() // what it met is told
		if at.Seq < end.Seq {
			missing(end)
		}
		lr.Kept.add(head, at)
		rep.Lanes = append(rep.Lanes, lr)
	}
	for _, a := range rep.Accounts {
		if !a.Balanced() {
			problem("lane %q, upstream %q: %d accepted, but the accounts add up to another number", a.Lane, a.Upstream, a.Accepted.Messages)
		}
	}
	return rep, nil
}

func countRecords(raw []byte) (n int) {
	for len(raw) > 0 {
		size := recordLen(raw)
		if size == 0 {
			return -1
		}
		raw = raw[size:]
		n++
	}
	return n
}

// Peek calls fn for up to limit messages of a lane that some upstream still waits for, from sequence
// from on. r is valid during the call. Its time is as it would be sent now: put right, if it was wrong and that is known.
func (s *Spool) Peek(name string, from uint64, limit int, fn func(seq uint64, r *Record) error) error {
	number, ok := s.names[name]
	if !ok {
		return fmt.Errorf("peek into lane %q: %w", name, ErrNoLane)
	}
	l := s.lanes[number]
	s.mu.Lock()
	pos, end := max(from, l.head.Seq), l.durable.Seq
	through := l.throughAll()
	s.mu.Unlock()
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return err
	}
	defer it.Close()
	var rec Record
	ok = it.SeekLT(keyData(l.number, pos+1)) || it.First()
	for ; ok && limit > 0; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		m, raw, err := decodeChunk(nil, v)
		if errors.Is(err, ErrCorrupt) {
			continue // Verify and Walk tell of it
		}
		if err != nil {
			return fmt.Errorf("lane %q: %w", name, err)
		}
		for seq := m.First.Seq; len(raw) > 0 && limit > 0 && seq < end; seq++ {
			n, err := ParseRecord(raw, &rec)
			if err != nil {
				return fmt.Errorf("lane %q, message %d: %w", name, seq, err)
			}
			raw = raw[n:]
			for len(through) > 0 && through[0].to.Seq <= seq {
				through = through[1:]
			}
			if seq < pos || len(through) > 0 && through[0].from.Seq <= seq {
				continue
			}
			s.times(&m).correct(&rec)
			if err := fn(seq, &rec); err != nil {
				return err
			}
			limit--
		}
	}
	return it.Error()
}
