package devices

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"holdfast/internal/kv"
)

// Get returns a command with payload, result and history. A *Refusal with CodeUnknown: there is none.
func (q *Queue) Get(id string) (Command, error) {
	unknown := &Refusal{ID: clip(id), Code: CodeUnknown, Reason: fmt.Sprintf("there is no command %.60s: see holdfast command list", clip(id)), At: time.UnixMilli(q.clock.Read().Wall)}
	if !validCommandID(id) {
		return Command{}, unknown
	}
	p, err := q.lookup(id)
	if err != nil {
		return Command{}, fmt.Errorf("command %s: %w", id, err)
	}
	if p == nil {
		return Command{}, unknown
	}
	q.mu.Lock()
	s := p.shown
	q.mu.Unlock()
	if s == nil {
		return Command{}, unknown // its first commit is under way
	}
	c := q.command(p, s)
	if c.Payload, err = q.payload(p); err != nil {
		q.log.Warn("payload of a command not shown", "device", c.Device, "command", id, "err", err)
	}
	c.Payload = slices.Clone(c.Payload)
	c.History = make([]Step, len(s.steps))
	for i, step := range s.steps {
		c.History[i] = Step{State: step.State, At: time.UnixMilli(step.At), Reason: step.Reason}
	}
	return c, nil
}

// CommandFilter chooses commands.
type CommandFilter struct {
	Device string
	States []State // none: all
	Before uint64  // only those submitted before this cursor; 0: from the newest
	Limit  int     // at most; 0: 100
}

// List returns commands, the newest first, without payload, result and history. next is what to give as Before for the
// following page; 0: that was the last.
func (q *Queue) List(f CommandFilter) (page []Command, next uint64, err error) {
	if f.Limit <= 0 {
		f.Limit = 100
	}
	before := f.Before
	if before == 0 {
		before = 1<<64 - 1
	}
	add := func(seq uint64, p *queuedCommand) (full bool) {
		// Memory knows what of it is durable.
		q.mu.Lock()
		if m := q.ids[p.id]; m != nil && m.seq == seq {
			p = m
		}
		s := p.shown
		q.mu.Unlock()
		if s == nil || len(f.States) > 0 && !slices.Contains(f.States, s.state) {
			return false
		}
		if len(page) == f.Limit {
			return true
		}
		c := q.command(p, s)
		c.Result, c.ResultType = nil, ""
		page = append(page, c)
		next = seq
		return false
	}
	walk := q.listAll
	switch {
	case len(f.Device) > 255:
		return nil, 0, nil
	case f.Device != "":
		walk = q.listDevice
	case len(f.States) > 0:
		walk = q.listStates
	}
	full, err := walk(f, before, add)
	if err != nil {
		return nil, 0, fmt.Errorf("list commands: %w", err)
	}
	if !full {
		next = 0
	}
	return page, next, nil
}

// listDevice walks over a device's commands, the newest first, until add has enough.
func (q *Queue) listDevice(f CommandFilter, before uint64, add func(seq uint64, p *queuedCommand) bool) (full bool, err error) {
	it, err := q.store.Iter(commandDevicePrefix(f.Device), commandDeviceKey(f.Device, before))
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, it.Error(), it.Close()) }()
	for ok := it.Last(); ok && !full; ok = it.Prev() {
		seq, valid := commandSeq(it.Key())
		if !valid {
			continue
		}
		p, err := q.read(seq, nil)
		if err != nil {
			q.log.Debug("command not listed: its row cannot be read", "seq", seq, "err", err)
			continue
		}
		if p != nil {
			full = add(seq, p)
		}
	}
	return full, nil
}

// listAll walks over all commands, the newest first, until add has enough.
func (q *Queue) listAll(_ CommandFilter, before uint64, add func(seq uint64, p *queuedCommand) bool) (full bool, err error) {
	prefix := []byte{kv.PrefixCommand, commandKindOpen}
	open, err := q.store.Iter(prefix, commandKey(commandKindOpen, before))
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, open.Error(), open.Close()) }()
	// Of the same moment: a command that ends meanwhile is seen once.
	ended, err := open.Clone(pebble.CloneOptions{IterOptions: &pebble.IterOptions{
		LowerBound: []byte{kv.PrefixCommand, commandKindEnded}, UpperBound: commandKey(commandKindEnded, before),
	}})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, ended.Error(), ended.Close()) }()
	openOK, endedOK := open.Last(), ended.Last()
	for (openOK || endedOK) && !full {
		it, ok := open, &openOK
		if endedOK {
			a, _ := commandSeq(ended.Key())
			if b := uint64(0); !openOK {
				it, ok = ended, &endedOK
			} else if b, _ = commandSeq(open.Key()); a > b {
				it, ok = ended, &endedOK
			}
		}
		seq, valid := commandSeq(it.Key())
		v, err := it.ValueAndErr()
		if err != nil {
			return false, err
		}
		if r, err := parseCommandRow(v); err != nil || !valid {
			q.log.Debug("command not listed: its row cannot be read", "seq", seq, "err", err)
		} else {
			p, _ := r.load(seq, &queueDevice{name: r.Device})
			full = add(seq, p)
		}
		*ok = it.Prev()
	}
	return full, nil
}

// listStates walks over the commands in some states, the newest first, until add has enough. It may meet others, too.
// Memory knows who has no end, and of a row of history only the state is decoded, unless it is wanted.
func (q *Queue) listStates(f CommandFilter, before uint64, add func(seq uint64, p *queuedCommand) bool) (full bool, err error) {
	// First those without an end: what ends between the two looks is met twice, not missed.
	open := q.openIn(f.States, before, f.Limit+1)
	if slices.ContainsFunc(f.States, func(s State) bool { return s >= Delivered && s != InProgress }) { // else history has none
		it, err := q.store.Iter([]byte{kv.PrefixCommand, commandKindEnded}, commandKey(commandKindEnded, before))
		if err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, it.Error(), it.Close()) }()
		for ok := it.Last(); ok && !full; ok = it.Prev() {
			seq, _ := commandSeq(it.Key())
			for len(open) > 0 && open[0].seq > seq && !full {
				full = add(open[0].seq, open[0])
				open = open[1:]
			}
			if full || len(open) > 0 && open[0].seq == seq {
				continue
			}
			v, err := it.ValueAndErr()
			if err != nil {
				return false, err
			}
			if s := commandRowState(v); s != 0 && !slices.Contains(f.States, s) {
				continue
			}
			if r, err := parseCommandRow(v); err != nil {
				q.log.Debug("command not listed: its row cannot be read", "seq", seq, "err", err)
			} else {
				p, _ := r.load(seq, &queueDevice{name: r.Device})
				full = add(seq, p)
			}
		}
	}
	for len(open) > 0 && !full {
		full = add(open[0].seq, open[0])
		open = open[1:]
	}
	return full, nil
}

// openIn returns the newest commands in memory that are in one of the states, at most limit of those before a sequence, the newest first.
func (q *Queue) openIn(states []State, before uint64, limit int) (found []*queuedCommand) {
	const together = 1000 // looked at without letting others have the lock
	newest := func() {
		slices.SortFunc(found, func(a, b *queuedCommand) int { return cmp.Compare(b.seq, a.seq) })
		found = found[:min(limit, len(found))]
	}
	after, n := uint64(0), 0
	q.mu.Lock()
	for _, p := range q.ids {
		if p.seq > after && p.seq < before && p.shown != nil && slices.Contains(states, p.shown.state) {
			found = append(found, p)
		}
		if n++; n%together != 0 {
			continue
		}
		q.mu.Unlock()
		if len(found) > 4*limit {
			newest()
			after = found[limit-1].seq
		}
		q.mu.Lock()
	}
	q.mu.Unlock()
	newest()
	return found
}
