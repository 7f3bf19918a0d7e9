package spool

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"holdfast/internal/kv"
)

// ReplayOf is the user property of a replayed copy: {lane}/{sequence} of the message that was parked first. Gateway and epoch
// are the copy's own.
const ReplayOf = "holdfast-replay-of"

// Bounds of what one commit takes of a replay.
const (
	replayRecords = 1024
	replayBytes   = 4 << 20
)

// ErrNotWaiting is returned where an upstream does not read the lane, so that what is put there for it would wait for nobody.
var ErrNotWaiting = errors.New("upstream does not take this lane")

// Replay puts messages that upstream has refused for good back into their lane, for that upstream only, and returns how
// many. seqs names them by their sequences, nil means all that are parked when it is called; those that are not parked are passed over. What is replayed is a
// new message at the end of the lane, with its own id, the receive time it had, and the user property ReplayOf: the parked
// one has had its end, and stays in the account parked. The copy and the removal of the parked one are one commit, so a
// crash neither loses nor doubles a message. One that cannot be read stays parked and is told in the error; the others are replayed
// all the same. ErrNoLane, ErrNotWaiting, and ErrFull when a lane that rejects is full: n were replayed before.
func (s *Spool) Replay(lane, upstream string, seqs []uint64) (n int, err error) {
	s.replaying.Lock()
	defer s.replaying.Unlock()
	number, ok := s.names[lane]
	if !ok {
		return 0, fmt.Errorf("replay into lane %q: %w", lane, ErrNoLane)
	}
	l := s.lanes[number]
	s.mu.Lock()
	c := l.cursor(upstream)
	waits := c != nil && c.active
	s.mu.Unlock()
	if !waits {
		return 0, fmt.Errorf("replay into lane %q: %w: %q", lane, ErrNotWaiting, upstream)
	}
	if seqs != nil {
		seqs = slices.Compact(slices.Sorted(slices.Values(seqs)))
	}
	var broken error
	var last uint64 // what a copy leaves parked again comes behind it, and is not of this replay
	s.mu.Lock()
	end := l.durable.Seq
	s.mu.Unlock()
	for last < end {
		batch, more, err := s.parkedBatch(l, upstream, seqs, last, end)
		if err != nil {
			return n, errors.Join(broken, err)
		}
		done, bad, err := s.replay(l, upstream, batch)
		n += done
		if broken == nil {
			broken = bad
		}
		if err != nil {
			return n, errors.Join(broken, err)
		}
		if !more {
			break
		}
		last = batch[len(batch)-1].Seq
	}
	if n > 0 {
		s.cfg.Log.Info("parked messages replayed", "lane", lane, "upstream", upstream, "messages", n)
	}
	return n, broken
}

// parkedBatch gives what is parked for upstream after a sequence and before another one, as much as one commit takes.
func (s *Spool) parkedBatch(l *lane, upstream string, seqs []uint64, after, end uint64) (batch []ParkedMessage, more bool, err error) {
	size := 0
	err = s.ParkedFrom(l.name, after+1, func(m ParkedMessage) error {
		switch {
		case m.Lane != l.name || m.Seq >= end:
			return errStopScan
		case m.Upstream != upstream:
			return nil
		}
		if _, wanted := slices.BinarySearch(seqs, m.Seq); seqs != nil && !wanted {
			return nil
		}
		if len(batch) == replayRecords || size >= replayBytes {
			more = true
			return errStopScan
		}
		size += len(m.Record)
		batch = append(batch, m)
		return nil
	})
	return batch, more, err
}

// errStopScan ends a scan that has seen enough.
var errStopScan = errors.New("enough")

// replay moves one batch. bad is about the first message that cannot be read.
func (s *Spool) replay(l *lane, upstream string, batch []ParkedMessage) (n int, bad, err error) {
	now := s.clock.Read().Wall
	var copies []Record
	var ops []kv.Op
	size := int64(0) // of the rows
	for i := range batch {
		m := &batch[i]
		var r Record
		k, err := ParseRecord(m.Record, &r)
		if err == nil && k != len(m.Record) {
			err = ErrRecord // several, of which one could not be read
		}
		if err == nil {
			r.Props = replayProps(r.Props, l.name, m.Seq, upstream)
			err = l.takes(&r)
		}
		if err != nil {
			if bad == nil {
				bad = fmt.Errorf("message %d of lane %q stays parked: %w", m.Seq, l.name, err)
			}
			continue
		}
		copies = append(copies, r)
		ops = append(ops, kv.Op{Key: keyParked(l.number, m.Seq, upstream), Delete: true})
		size += m.size
	}
	if len(copies) == 0 {
		return 0, bad, nil
	}
	done := make(replayed, 1)
	if err := s.handInCopies(l, copies, ops, now, done); err != nil {
		return 0, bad, err
	}
	if err := <-done; err != nil {
		return 0, bad, err
	}
	s.countParked(l, -len(copies), -size)
	return len(copies), bad, nil
}

func (s *Spool) handInCopies(l *lane, copies []Record, ops []kv.Op, nowMS int64, done kv.Done) error {
	g, err := s.begin(l, len(copies), false)
	if err != nil {
		return err
	}
	defer g.End()
	for i := range copies {
		// Aged from now on: by its receive time it might be too old for the lane before anybody has seen it.
		_, size := l.appendAged(&copies[i], nowMS)
		g.Grow(size)
	}
	g.Ops(ops)
	g.Done(done, 0, 0)
	return nil
}

// replayed waits for a commit.
type replayed chan error

func (r replayed) Done(_, _ uint64, err error) { r <- err }

// replayProps are a copy's properties: p with who it is for and what it is a copy of. A copy of a copy keeps the name of the first.
func replayProps(p *Props, lane string, seq uint64, upstream string) *Props {
	if p == nil {
		p = &Props{}
	}
	again := p.Upstream != "" && slices.ContainsFunc(p.User, func(u [2]string) bool { return u[0] == ReplayOf })
	p.Upstream = upstream
	if !again {
		p.User = append(p.User, [2]string{ReplayOf, lane + "/" + strconv.FormatUint(seq, 10)})
	}
	return p
}
