package devices

import (
	"slices"
	"sync/atomic"
	"time"
)

// queueClock is the time by which commands live: milliseconds that go on, whatever the wall clock does. While the
// process runs they follow the monotonic clock, and the time that the machine slept. From one process to the next
// they go on by the machine's time since boot, which is exact; over a reboot by the wall clock, if it was known to be
// right before and is so again; else the reboot is a gap of unknown length: the clock goes on from where it was, and
// when the wall clock is right again what was missed is credited to the gap. Nothing expires by a clock that nobody
// vouches for; a machine that never learns the time only counts the time that it runs.
//
// What a gap lasted counts for what began before it and for nothing else. So instants are kept as the clock showed
// them, gaps stand beside them, and a due time is computed from both.
type queueClock struct {
	src      ClockSource
	keepMS   int64         // for how long a gap matters
	elapsed0 time.Duration // src.Elapsed at base
	base     atomic.Int64
	gaps     atomic.Pointer[[]clockGap] // oldest first; the slice is not changed any more

	// Only OpenQueue and then Run touch what follows.
	boot      string
	boot0     time.Duration // since boot, at elapsed0
	sleptMS   int64         // that base has in it
	offset    int64         // wall - t, when last looked at
	synced    bool
	anchor    clockPair // when the wall clock was last known to be right
	doubt     int64     // until this t it is not, whatever Synced says
	writtenMS int64     // t of the last row
}

// moment is one look at the clocks.
type moment struct {
	t    int64 // the queue's clock, ms
	wall int64 // Unix ms, for people
}

// clockGap is a time of which the clock has shown nothing: it lies between what was before At and what was not.
type clockGap struct {
	_    struct{} `cbor:",toarray"`
	At   int64
	Len  int64 // ms, as far as it is known
	Open bool  // more of it may become known
}

// clockPair is one moment on both clocks. Zero: there was none.
type clockPair struct {
	_    struct{} `cbor:",toarray"`
	T    int64
	Wall int64
}

// clockRow is what is stored of the clock.
type clockRow struct {
	T      int64      `cbor:"1,keyasint"`
	Wall   int64      `cbor:"2,keyasint,omitempty"`
	Boot   string     `cbor:"3,keyasint,omitempty"`
	Since  int64      `cbor:"4,keyasint,omitempty"` // ms since that boot
	Synced bool       `cbor:"5,keyasint,omitempty"`
	Anchor clockPair  `cbor:"6,keyasint"`
	Gaps   []clockGap `cbor:"7,keyasint,omitempty"`
}

const (
	clockStart   = 1000                  // t of the very first moment: 0 stays "never"
	clockJump    = 2000                  // ms by which wall and t may drift apart between two looks
	clockDoubt   = 10 * 60 * 1000        // ms without a jump until a clock that jumped is believed again
	clockMaxGaps = 256                   // that are kept apart; the oldest are merged
	clockRewrite = 10 * 60 * 1000        // ms after which the row is written again
	clockLimit   = 1000 * 366 * 86400000 // ms; no row has a time beyond it
)

// openQueueClock goes on from row, nil if there is none, and from latest, the latest t found in other rows (0: none).
func openQueueClock(src ClockSource, row *clockRow, latest int64, keep time.Duration) *queueClock {
	c := &queueClock{src: src, keepMS: max(keep, MaxTTL).Milliseconds(), elapsed0: src.Elapsed()}
	c.boot, c.boot0 = src.Boot()
	var gaps []clockGap
	t := max(latest, clockStart)
	if row != nil {
		gaps, c.anchor = slices.Clone(row.Gaps), row.Anchor
		t = max(t, row.T)
	}
	switch since := c.boot0.Milliseconds(); {
	case row == nil && latest == 0:
	case row != nil && c.boot != "" && c.boot == row.Boot && since >= row.Since:
		t = max(t, row.T+since-row.Since)
	default:
		// What is known to be missing is credited to the first gap that is open, so one is enough: what came between
		// two reboots without a right time is rather kept too long than ended too soon.
		t++ // the gap comes after all that was
		if !slices.ContainsFunc(gaps, func(g clockGap) bool { return g.Open }) {
			gaps = append(gaps, clockGap{At: t, Open: true})
		}
	}
	c.base.Store(t)
	c.gaps.Store(&gaps)
	m := c.now()
	c.offset = m.wall - m.t
	c.look()
	return c
}

// now may be called by anybody.
func (c *queueClock) now() moment {
	return moment{t: c.base.Load() + (c.src.Elapsed() - c.elapsed0).Milliseconds(), wall: c.src.Now().UnixMilli()}
}

// between is the time from start to end in ms, gaps included.
func (c *queueClock) between(start, end int64) int64 {
	ms := end - start
	for _, g := range *c.gaps.Load() {
		if start < g.At && g.At <= end {
			ms += g.Len
		}
	}
	return ms
}

// due returns the t at which ms have passed since start.
func (c *queueClock) due(start, ms int64) int64 {
	t := start + ms
	for _, g := range *c.gaps.Load() {
		if start < g.At {
			t -= g.Len
		}
	}
	return t
}

// look compares the clocks. changed: what is stored of the clock is no longer right. credited: a gap has grown, so that
// what was not due may be.
func (c *queueClock) look() (changed, credited bool) {
	if c.boot != "" {
		_, since := c.src.Boot()
		slept := (since - c.boot0 - (c.src.Elapsed() - c.elapsed0)).Milliseconds()
		if slept > c.sleptMS+clockJump {
			c.base.Add(slept - c.sleptMS)
			c.sleptMS = slept
			changed = true
		}
	}
	m := c.now()
	synced := c.src.Synced()
	offset := m.wall - m.t
	if d := offset - c.offset; d > clockJump || d < -clockJump {
		changed = true
		if synced && c.synced {
			// It was right before and is right now? One of the two is not so, and nobody says which.
			c.anchor, c.doubt = clockPair{}, m.t+clockDoubt
		}
	}
	c.offset = offset
	if synced != c.synced {
		c.synced, changed = synced, true
	}
	if c.synced && m.t >= c.doubt {
		credited = c.credit(m)
		c.anchor = clockPair{T: m.t, Wall: m.wall}
	}
	return changed || credited || m.t-c.writtenMS >= clockRewrite, credited
}

// credit closes the open gap, now that the wall clock is right.
func (c *queueClock) credit(m moment) bool {
	gaps := *c.gaps.Load()
	i := slices.IndexFunc(gaps, func(g clockGap) bool { return g.Open })
	if i < 0 {
		return false
	}
	gaps = slices.Clone(gaps)
	missing := int64(0)
	if c.anchor.T > 0 && gaps[i].At > c.anchor.T {
		missing = max(m.wall-c.anchor.Wall-c.between(c.anchor.T, m.t), 0)
	}
	gaps[i].Open = false
	if gaps[i].Len += missing; gaps[i].Len == 0 {
		gaps = slices.Delete(gaps, i, i+1)
	}
	c.gaps.Store(&gaps)
	return missing > 0
}

// row is what to store now.
func (c *queueClock) row() *clockRow {
	m := c.now()
	gaps := slices.Clone(*c.gaps.Load())
	gaps = slices.DeleteFunc(gaps, func(g clockGap) bool { return !g.Open && m.t-g.At > c.keepMS })
	for len(gaps) > clockMaxGaps {
		gaps[0].Len += gaps[1].Len // at the older one: rather too long than too short
		gaps[0].Open = gaps[0].Open || gaps[1].Open
		gaps = slices.Delete(gaps, 1, 2)
	}
	c.gaps.Store(&gaps)
	c.writtenMS = m.t
	_, since := c.src.Boot()
	return &clockRow{T: m.t, Wall: m.wall, Boot: c.boot, Since: since.Milliseconds(), Synced: c.synced, Anchor: c.anchor, Gaps: gaps}
}

// withDefaults fills in the system's clocks.
func (s ClockSource) withDefaults() ClockSource {
	if s.Now == nil {
		s.Now = time.Now
	}
	if s.Elapsed == nil {
		start := time.Now()
		s.Elapsed = func() time.Duration { return time.Since(start) }
	}
	if s.Boot == nil {
		s.Boot = systemBoot
	}
	if s.Synced == nil {
		s.Synced = systemClockSynced
	}
	return s
}
