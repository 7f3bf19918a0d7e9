package spool

import (
	"errors"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"
)

// Selection says which messages of a lane to walk over.
type Selection struct {
	From, To uint64 // first and last sequence; To 0: to the end
	SinceMS  int64  // only what was received at this time, Unix ms, or later; 0: all
}

// Damage is a stretch of messages that cannot be read.
type Damage struct {
	Lane  string `json:"lane"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Cause string `json:"cause"`
}

// Walk calls fn for the messages of a lane that some upstream, or retention, still holds, in order, until fn fails. r is valid
// during the call. What cannot be read is passed over and told to damaged (which may be nil); the error is about what is not
// damage. It holds a chunk in memory, and may run beside everything else.
func (s *Spool) Walk(lane string, sel Selection, fn func(seq uint64, r *Record) error, damaged func(Damage)) error {
	number, ok := s.names[lane]
	if !ok {
		return fmt.Errorf("walk over lane %q: %w", lane, ErrNoLane)
	}
	l := s.lanes[number]
	s.mu.Lock()
	w := walk{s: s, l: l, at: max(sel.From, l.head.Seq), end: l.durable.Seq, since: sel.SinceMS, fn: fn, damaged: damaged}
	s.mu.Unlock()
	if sel.To > 0 && sel.To < w.end {
		w.end = sel.To + 1
	}
	defer w.close()
	for w.at < w.end {
		if err := w.step(); err != nil {
			return err
		}
	}
	return nil
}

// walk is one Walk under way.
type walk struct {
	s       *Spool
	l       *lane
	at, end uint64 // the next sequence, and the first after the last one
	since   int64
	fn      func(seq uint64, r *Record) error
	damaged func(Damage)

	it   *pebble.Iterator
	read int // bytes read with it
	buf  []byte
	rec  Record
}

func (w *walk) close() {
	if w.it != nil {
		_ = w.it.Close() // its errors were seen
		w.it = nil
	}
}

// step hands on the chunk that holds at, or passes over what cannot be read.
func (w *walk) step() error {
	if w.read > maxIterBytes {
		w.close()
	}
	valid := false
	if w.it == nil {
		it, err := w.s.store.Iter(dataBounds(w.l.number))
		if err != nil {
			return fmt.Errorf("walk over lane %q: %w", w.l.name, err)
		}
		w.it, w.read = it, 0
		// at may lie in the middle of a chunk.
		if valid = it.SeekLT(keyData(w.l.number, w.at+1)); valid {
			if v, err := it.ValueAndErr(); err == nil {
				if m, err := parseChunkMeta(v); err == nil && m.End().Seq <= w.at {
					valid = it.Next()
				}
			}
		} else if it.Error() == nil {
			valid = it.First()
		}
	} else {
		valid = w.it.Next()
	}
	if !valid {
		cause := w.it.Error()
		if cause == nil {
			cause = errMissing // nothing follows, and something should
		}
		return w.pass(cause)
	}
	v, err := w.it.ValueAndErr()
	if err != nil {
		return w.pass(err)
	}
	w.read += len(v)
	m, raw, err := decodeChunk(w.buf, v)
	if err == nil && (m.Lane != w.l.number || m.End().Seq <= w.at) {
		err = fmt.Errorf("chunk: %w: it is of lane %d, sequence %d", ErrCorrupt, m.Lane, m.First.Seq)
	}
	if err != nil {
		return w.pass(err)
	}
	w.buf = raw
	if m.First.Seq > w.at {
		// A rule may have taken what lay between since this began: then it is not missing.
		w.lost(min(m.First.Seq, w.end), errMissing)
	}
	if m.Newest < w.since {
		w.at = m.End().Seq
		return nil
	}
	return w.hand(&m, raw)
}

// hand gives a chunk's records to fn.
func (w *walk) hand(m *chunkMeta, raw []byte) error {
	for seq := m.First.Seq; len(raw) > 0 && seq < w.end; seq++ {
		n, err := ParseRecord(raw, &w.rec)
		if err != nil { // its checksum held, so it was written like this
			w.at = max(w.at, seq)
			w.lost(min(m.End().Seq, w.end), err)
			return nil
		}
		raw = raw[n:]
		if seq < w.at || w.rec.Received < w.since {
			continue
		}
		if err := w.fn(seq, &w.rec); err != nil {
			return err
		}
	}
	w.at = m.End().Seq
	return nil
}

// pass goes on with the first chunk after at that can be read, if cause is damage.
func (w *walk) pass(cause error) error {
	if !errors.Is(cause, ErrCorrupt) && !errors.Is(cause, errMissing) && !pebble.IsCorruptionError(cause) {
		return fmt.Errorf("walk over lane %q at %d: %w", w.l.name, w.at, cause)
	}
	w.close()
	next, err := w.s.readableAfter(w.l, w.at, w.end)
	if err != nil {
		return fmt.Errorf("walk over lane %q at %d: %w", w.l.name, w.at, err)
	}
	w.lost(next, cause)
	return nil
}

// lost passes over what lies before to, and tells what of it was not taken by a rule meanwhile.
func (w *walk) lost(to uint64, cause error) {
	w.s.mu.Lock()
	head := w.l.head.Seq
	w.s.mu.Unlock()
	first := max(w.at, min(head, to))
	w.at = to
	if first < to && w.damaged != nil {
		w.damaged(Damage{Lane: w.l.name, First: first, Last: to - 1, Cause: cause.Error()})
	}
}

// readableAfter returns the first sequence after seq, and before end, of a chunk that can be read, or end.
func (s *Spool) readableAfter(l *lane, seq, end uint64) (uint64, error) {
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return 0, err
	}
	defer it.Close()
	// First chunk by chunk; from where the table itself does not give its rows any more, in steps that double.
	for next, step := seq+1, uint64(1); next < end && next > seq; next, step = next+step, step*2 {
		for ok := it.SeekGE(keyData(l.number, next)); ok; ok = it.Next() {
			first, known := dataSeq(it.Key())
			if !known {
				continue
			}
			v, err := it.ValueAndErr()
			if err != nil {
				next = max(next, first)
				break
			}
			if m, _, err := decodeChunk(nil, v); err == nil && m.First.Seq == first {
				return min(first, end), nil
			}
		}
		if it.Error() == nil && !it.Valid() {
			return end, nil
		}
		if step > math.MaxUint64/4 {
			break
		}
	}
	return end, nil
}
