package devices

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/kv"
)

const (
	queueLookGap    = 5000           // ms between two looks at the clocks
	queueSweepGap   = 10 * 60 * 1000 // ms between two looks through history
	queueSweepStep  = 512            // rows of history that one step looks at
	queueTimerBatch = 4096           // commands whose time has come that one step takes
	queueGrace      = 3000           // ms in which, after the gateway stood still, what devices have said meanwhile is heard first

	// queueAsleep is how late a step comes when the gateway has stood still.
	queueAsleep = 300 * time.Millisecond
)

// Run puts what a crash left in SENT back to QUEUED, keeps the time-outs, and removes old history, until ctx ends.
func (q *Queue) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	due := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-q.wake:
		case <-timer.C:
		}
		if time.Since(due) > queueAsleep {
			// Acknowledgements may lie in the devices' sockets, and nobody has looked.
			q.heardAt.Store(q.clock.Read().T + queueGrace)
		}
		wait := q.tick(ctx)
		due = time.Now().Add(wait)
		timer.Reset(wait)
	}
}

// tick does what is due, a piece of it if that is much, and returns how long nothing more will be.
func (q *Queue) tick(ctx context.Context) time.Duration {
	q.restart(ctx)
	now := q.clock.Read().T
	credited := q.lookAtClock(now)
	now = q.clock.Read().T
	if now < q.retryAt {
		return time.Duration(q.retryAt-now) * time.Millisecond
	}
	q.decidePokes(ctx)
	q.decideDue(ctx, now, credited)
	more := q.sweep(ctx, now)

	q.mu.Lock()
	next := q.lookAt
	if p := q.timers.next(); p != nil {
		next = min(next, p.due)
	}
	if len(q.pokes) > 0 || more {
		next = now
	}
	q.mu.Unlock()
	next = max(next, q.retryAt)
	return time.Duration(max(next-q.clock.Read().T, 0)) * time.Millisecond
}

// restart puts back what a former process left in SENT.
func (q *Queue) restart(ctx context.Context) {
	for len(q.stale) > 0 && ctx.Err() == nil {
		q.decide(q.stale[0], (*queueTx).settle)
		q.stale = q.stale[1:]
	}
}

// lookAtClock looks at the clock now and then. credited: a gap in it has grown, so that what was not due may be.
func (q *Queue) lookAtClock(now int64) (credited bool) {
	if now < q.lookAt {
		return false
	}
	q.lookAt = now + queueLookGap
	before := q.credits
	q.credits = q.clock.Look()
	return q.credits != before
}

// decidePokes decides what came up where nothing could be committed.
func (q *Queue) decidePokes(ctx context.Context) {
	q.mu.Lock()
	pokes := q.pokes
	q.pokes = map[string][]queueDecision{}
	q.mu.Unlock()
	for device, fns := range pokes {
		for _, fn := range fns {
			if ctx.Err() != nil {
				return
			}
			if err := q.try(device, fn); err != nil {
				q.putOff(err)
				q.poke(device, fn)
			}
		}
	}
}

// decideDue decides about the devices with a command whose time has come; all: about every device.
func (q *Queue) decideDue(ctx context.Context, now int64, all bool) {
	var due []string
	seen := map[string]bool{}
	q.mu.Lock()
	for n := 0; n < queueTimerBatch || all; n++ {
		p := q.timers.next()
		if p == nil || p.due > now && !all {
			break
		}
		q.timers.remove(p)
		if name := p.dev.name; !seen[name] {
			seen[name] = true
			due = append(due, name)
		}
	}
	q.mu.Unlock()
	for _, device := range due {
		// After ctx has ended nothing is decided, but the timers are set again.
		err := q.try(device, func(tx *queueTx) {
			tx.rearm = true
			if ctx.Err() == nil {
				tx.settle()
			}
		})
		if err != nil {
			q.putOff(err)
		}
	}
}

// putOff notes that the store takes nothing.
func (q *Queue) putOff(err error) {
	if now := q.clock.Read().T; q.retryAt <= now {
		q.log.Warn("commands wait: the store takes nothing", "err", err)
		q.retryAt = now + queueRetry
	}
}

// sweep removes ended commands that are too old or too many, one step at a time, the oldest first. more: it has not
// come to the end.
func (q *Queue) sweep(ctx context.Context, now int64) (more bool) {
	q.mu.Lock()
	tooMany := q.history - q.cfg.MaxHistory
	q.mu.Unlock()
	if !q.sweeping {
		q.sweepAll = now >= q.sweepAt
		if !q.sweepAll && (!q.counted || tooMany <= q.cfg.MaxHistory/50) {
			return false
		}
		q.sweeping, q.sweepSeq = true, 0
	}
	if q.sweepAll || tooMany > 0 {
		var err error
		if more, err = q.sweepStep(ctx, now, max(tooMany, 0)); err != nil {
			q.log.Warn("history of commands not looked through", "err", err)
			more = false
		}
	}
	if !more {
		q.sweeping = false
		if q.sweepAll {
			q.sweepAt, q.counted = now+queueSweepGap, true
		}
	}
	return more
}

// sweepStep looks at some rows of history.
func (q *Queue) sweepStep(ctx context.Context, now int64, tooMany int) (more bool, err error) {
	type ended struct {
		seq uint64
		id  string
	}
	old := map[string][]ended{}
	keep := milliseconds(q.cfg.History)
	rows, found := 0, 0
	start := commandKey(commandKindEnded, q.sweepSeq)
	it, err := q.store.Iter(start, kv.PrefixEnd([]byte{kv.PrefixCommand, commandKindEnded}))
	if err != nil {
		return false, err
	}
	for it.First(); it.Valid(); it.Next() {
		if rows == queueSweepStep {
			more = true
			break
		}
		rows++
		seq, ok := commandSeq(it.Key())
		if !ok {
			continue
		}
		q.sweepSeq = seq + 1
		v, err := it.ValueAndErr()
		if err != nil {
			return false, errors.Join(err, it.Close())
		}
		r, err := parseCommandRow(v)
		if err != nil {
			q.log.Debug("command left alone: its row cannot be read", "key", fmt.Sprintf("%x", it.Key()), "err", err)
			continue
		}
		if !q.counted && r.UpdatedT < q.openT { // what has ended since is counted as it ends
			found++
		}
		if tooMany > 0 {
			tooMany--
		} else if q.clock.Between(r.UpdatedT, now) < keep {
			continue
		}
		old[r.Device] = append(old[r.Device], ended{seq, r.ID})
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return false, err
	}
	q.mu.Lock()
	q.history += found
	q.mu.Unlock()
	for device, rows := range old {
		if ctx.Err() != nil {
			return false, nil
		}
		// Under the device's order lock: a late outcome comes before, and then it stays, or after, and then it is unknown.
		err := q.try(device, func(tx *queueTx) {
			n := 0
			for _, r := range rows {
				q.mu.Lock()
				_, busy := q.ids[r.id]
				q.mu.Unlock()
				if busy {
					continue
				}
				n++
				tx.ops = append(tx.ops,
					kv.Op{Key: commandKey(commandKindEnded, r.seq), Delete: true},
					kv.Op{Key: commandKey(commandKindBody, r.seq), Delete: true},
					kv.Op{Key: commandIDKey(r.id), Delete: true},
					kv.Op{Key: commandDeviceKey(device, r.seq), Delete: true},
				)
			}
			q.mu.Lock()
			q.history -= n
			q.mu.Unlock()
		})
		if err != nil {
			q.putOff(err)
			return false, nil
		}
	}
	return more, nil
}
