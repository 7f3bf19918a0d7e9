package clock

import (
	"slices"

	"holdfast/internal/kv"
)

// gap is a time of which the service clock has shown nothing: it lies between what was before At and what was not.
type gap struct {
	_    struct{} `cbor:",toarray"`
	At   int64
	Len  int64 // ms, as far as it is known
	Open bool  // more of it may become known
}

// pair is one moment on both clocks. Zero: there was none.
type pair struct {
	_    struct{} `cbor:",toarray"`
	T    int64
	Wall int64
}

// now is Read without a question to the kernel.
func (c *Clock) now() Moment {
	wall, elapsed := c.src.read()
	return Moment{T: c.base.Load() + (elapsed - c.elapsed0).Milliseconds(), Wall: wall}
}

// goOn has the clock go on from row, nil if there is none.
func (c *Clock) goOn(row *clockRow) {
	var gaps []gap
	t := int64(start)
	if row != nil {
		gaps, c.anchor, c.believed, c.first = slices.Clone(row.Gaps), row.Anchor, row.Believed, row.First
		t = max(t, row.T)
		c.opened.any = true
		if c.believed.T == 0 {
			c.believed = c.anchor // the row is of a version that kept one of the two
		}
		if since := c.boot0.Milliseconds(); c.bootID != "" && c.bootID == row.Boot && since >= row.Since {
			t = max(t, row.T+since-row.Since)
		} else {
			t++ // the gap comes after all that was
			gaps = c.openGap(gaps, t)
		}
	}
	if c.first == 0 {
		c.first, c.opened.first = t, true
	}
	c.opened.t = t
	c.base.Store(t)
	c.gaps.Store(&gaps)
	m := c.now()
	c.offset, c.since = m.Wall-m.T, m.T
}

// openGap adds a gap at t. What is known to be missing is credited to the first gap that is open, so one is enough: what came between
// two reboots without a right time is rather kept too long than ended too soon.
func (c *Clock) openGap(gaps []gap, t int64) []gap {
	if slices.ContainsFunc(gaps, func(g gap) bool { return g.Open }) {
		return gaps
	}
	c.opened.gap = true
	return append(gaps, gap{At: t, Open: true})
}

// Saw tells the clock of a time t that stands in some row: it goes on from there, should its own row be older, or lost. It is for those
// that read their rows right after Open, before anybody else asks for the time.
func (c *Clock) Saw(t int64) {
	if op, ok := c.goOnFrom(t); ok {
		c.save(op)
	}
}

func (c *Clock) goOnFrom(t int64) (op kv.Op, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now().T
	if t < now || t > limit {
		return kv.Op{}, false
	}
	t++
	gaps := slices.Clone(*c.gaps.Load())
	switch {
	case c.opened.gap:
		gaps[len(gaps)-1].At = t
	case !c.opened.any:
		c.opened.any = true
		gaps = c.openGap(gaps, t)
	}
	if c.opened.first {
		c.first = t
	}
	c.gaps.Store(&gaps)
	c.base.Add(t - now)
	c.offset -= t - now
	c.since += t - now
	return c.row(), true
}

// Between is the time from start to end in ms, gaps included.
func (c *Clock) Between(start, end int64) int64 { return c.between(start, end) }

func (c *Clock) between(start, end int64) int64 {
	ms := end - start
	for _, g := range *c.gaps.Load() {
		if start < g.At && g.At <= end {
			ms += g.Len
		}
	}
	return ms
}

// Due returns the t at which ms have passed since start.
func (c *Clock) Due(start, ms int64) int64 {
	t := start + ms
	for _, g := range *c.gaps.Load() {
		if start < g.At {
			t -= g.Len
		}
	}
	return t
}

// First is the t from which on what is stored tells its time; what is older than that tells none.
func (c *Clock) First() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first
}

// jumped says whether the wall clock has moved against t since the last look. The caller holds mu.
func (c *Clock) jumped(m Moment) bool {
	d := m.Wall - m.T - c.offset
	return d > jump || d < -jump
}

// Look compares the clocks, and has stored what changed. It returns how often a gap has grown so far: when that is another number than the
// last time, what was not due may be.
func (c *Clock) Look() (credits uint64) {
	c.looking.Lock()
	defer c.looking.Unlock()
	c.ask(c.stamp.Load())
	credits, ops := c.look(c.stamp.Load().unsynced)
	if len(ops) > 0 {
		c.save(ops...)
	}
	return credits
}

// look is Look, and returns what is to be stored.
func (c *Clock) look(unsynced bool) (credits uint64, ops []kv.Op) {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed := c.slept()
	m := c.now()
	if c.jumped(m) {
		changed = true
		if !unsynced && c.synced {
			// It was right before and is right now? One of the two is not so, and nobody says which.
			c.anchor, c.doubt = pair{}, m.T+doubtful
		}
	}
	c.offset = m.Wall - m.T
	if c.synced == unsynced || !c.looked {
		changed = true
		c.turn(!unsynced, m)
	}
	if c.synced && m.T >= c.doubt {
		credited := c.credit(m)
		c.anchor = pair{T: m.T, Wall: m.Wall}
		c.believed = c.anchor
		changed = c.vouch() || credited || changed
		if credited {
			c.credits++
		}
	}
	if changed || m.T-c.written >= rewrite {
		ops = []kv.Op{c.row(), c.bootOp()}
	}
	return c.credits, ops
}

// turn notes that the wall clock is vouched for now, or not any more.
func (c *Clock) turn(synced bool, m Moment) {
	c.synced, c.since, c.looked = synced, m.T, true
	if synced {
		c.log.Info("clock is synchronised", "wall_ms", m.Wall, "boot", c.boot)
		return
	}
	c.log.Warn("clock is not synchronised: receive times may be wrong, and say so until it is", "wall_ms", m.Wall, "boot", c.boot)
}

// slept adds the time asleep, which the monotonic clock does not show.
func (c *Clock) slept() (changed bool) {
	if c.bootID == "" {
		return false
	}
	_, since := c.src.boot()
	_, elapsed := c.src.read()
	slept := (since - c.boot0 - (elapsed - c.elapsed0)).Milliseconds()
	if slept <= c.sleptMS+jump {
		return false
	}
	c.base.Add(slept - c.sleptMS)
	c.sleptMS = slept
	return true
}

// credit closes the open gap, now that the wall clock is right.
func (c *Clock) credit(m Moment) bool {
	gaps := *c.gaps.Load()
	i := slices.IndexFunc(gaps, func(g gap) bool { return g.Open })
	if i < 0 {
		return false
	}
	gaps = slices.Clone(gaps)
	missing := int64(0)
	if c.anchor.T > 0 && gaps[i].At > c.anchor.T {
		missing = max(m.Wall-c.anchor.Wall-c.between(c.anchor.T, m.T), 0)
	}
	gaps[i].Open = false
	if gaps[i].Len += missing; gaps[i].Len == 0 {
		gaps = slices.Delete(gaps, i, i+1)
	}
	c.opened.gap = false
	c.gaps.Store(&gaps)
	return missing > 0
}

// vouch notes when this boot was, now that the wall clock is right.
func (c *Clock) vouch() (changed bool) {
	s, b := c.stamp.Load(), c.boots[c.boot]
	if b.Known && b.Booted == s.booted {
		return false
	}
	b.Known, b.Booted = true, s.booted
	c.boots[c.boot] = b
	return true
}
