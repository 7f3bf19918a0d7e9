package spool

import (
	"sort"
	"time"
)

// How a lane drains live_first. It has two readers: one takes the newest, the other the backlog.
//
//	cursor          island    live.done     read up to here
//	  ▼               ▼           ▼             ▼
//	──┤ backlog ░░░░░█████░░░░░░░░┤ in flight   │           end ▶
//
// While the newest reader keeps up it is the only one: done is the cursor, and the lane is what it is in order.
// When it has fallen behind (the link was away, or is too slow), it leaps to where the lane ended a moment ago. What it
// leaps over is the backlog, which the other reader brings in. What the newest reader resolves beyond the backlog is an
// island of the cursor, as durable as the cursor is. An island that the backlog reaches becomes one with the
// cursor; when all have, the two readers are one again.
//
// Each leap may leave an island behind. So there are no more than maxIslands of them, and the more there are, the further
// behind a reader has to be before it leaps again: a link that is always too slow leaps now and then for hours.

// Drain says in which order a lane goes upstream.
type Drain string

// The orders.
const (
	InOrder   Drain = "in_order"   // the oldest first
	LiveFirst Drain = "live_first" // the newest at once, the backlog beside it
)

// DefaultBackfillShare is what the backlog gets of the lane's bytes while newer messages flow, in percent.
const DefaultBackfillShare = 30

const (
	maxIslands = 32
	// leapAge and leapBytes are how far behind a reader has to be, both of them, to leap.
	leapAge   = 5 * time.Second
	leapBytes = 64 << 10
	// freshAge and freshBytes bound what it reads of the time before it leapt, so that a receiver begins with a little of
	// what led to now.
	freshAge   = time.Second
	freshBytes = 4 << 20
)

// stream is the place of the reader of the newest. It is under Spool.mu, and says nothing that the cursor's row does not:
// a start begins behind the last island.
type stream struct {
	done  Position // before it this reader has resolved all that is its own
	leaps []leap   // ahead of done, in order, while there is something in flight between
}

// leap is a stretch that the reader of the newest has passed over.
type leap struct{ from, to Position }

// restart puts the reader of the newest behind all that has an end.
func (c *cursor) restart() {
	c.live = stream{done: c.row.Pos}
	if n := len(c.row.Islands); n > 0 {
		c.live.done = c.row.Islands[n-1].to
	}
}

// liveDone is live.done, or the cursor if a rule has brought that further.
func (c *cursor) liveDone() Position {
	if c.live.done.Seq < c.row.Pos.Seq {
		c.live.done = c.row.Pos
	}
	return c.live.done
}

// backlog is what is pending behind the newest reader's place.
func (c *cursor) backlog() (n Count) {
	if to := c.liveDone(); to.Seq > c.row.Pos.Seq {
		n.add(c.row.Pos, to)
		for _, i := range c.row.Islands {
			if i.to.Seq <= to.Seq {
				n.Messages -= i.to.Seq - i.from.Seq
				n.Bytes -= i.to.Bytes - i.from.Bytes
			}
		}
	}
	return n
}

// behind is the sequence from which on the backlog is open, 0 if there is none.
func (c *cursor) behind() uint64 {
	if len(c.live.leaps) > 0 || c.row.Pos.Seq < c.liveDone().Seq {
		return c.row.Pos.Seq
	}
	return 0
}

// resolveLive ends what the reader of the newest has before end. It says whether there is more backlog now.
func (c *cursor) resolveLive(end Position, how loss) (more bool) {
	for {
		to := end
		if len(c.live.leaps) > 0 && c.live.leaps[0].from.Seq <= end.Seq {
			to = c.live.leaps[0].from
		}
		if done := c.liveDone(); done.Seq <= to.Seq {
			c.live.done = c.resolveFrom(done, to, how)
		}
		if len(c.live.leaps) == 0 || c.live.done.Seq < c.live.leaps[0].from.Seq {
			return more
		}
		if to := c.live.leaps[0].to; c.live.done.Seq < to.Seq {
			c.live.done = to
		}
		c.live.leaps = c.live.leaps[1:]
		more = true
	}
}

// leap passes the newest reader from at on to where it should be, if it is too far behind, and returns its place. more: there
// is more backlog now. The caller holds mu.
func (l *lane) leap(c *cursor, at Position) (to Position, more bool) {
	if l.durable.Bytes-at.Bytes < leapBytes {
		return at, false
	}
	islands := len(c.row.Islands) + len(c.live.leaps)
	now := l.s.elapsed()
	if islands+2 > maxIslands || l.ageAt(at, now) < leapAge<<(islands/4) { // what is in flight may become one, too
		return at, false
	}
	to = l.durable
	for i := len(l.marks) - 1; i >= 0; i-- {
		if m := l.marks[i]; now-m.begun > freshAge || l.durable.Bytes-m.end.Bytes > freshBytes {
			break
		}
		to = l.marks[i].end
	}
	if to.Bytes-at.Bytes < leapBytes || to.Seq <= at.Seq {
		return at, false
	}
	if done := c.liveDone(); len(c.live.leaps) == 0 && done.Seq >= at.Seq {
		c.live.done = to
		return to, true
	}
	c.live.leaps = append(c.live.leaps, leap{at, to})
	return to, false
}

// mark is a place in a lane: what lies before it had come by ended, what lies behind came from begun on, both by Spool.elapsed.
type mark struct {
	end          Position
	ended, begun time.Duration
}

const (
	markEvery = 100 * time.Millisecond
	maxMarks  = 512 // some 50 s at first, and then thinner and thinner
)

// mark notes the time of a commit, before it is taken over. The caller holds mu.
func (l *lane) mark() {
	now := l.s.elapsed()
	ended := l.lastCommit
	l.lastCommit = now
	if n := len(l.marks); n > 0 && now-l.marks[n-1].begun < markEvery {
		return
	}
	if len(l.marks) >= maxMarks {
		thin := l.marks[:0]
		for i, m := range l.marks {
			if i%2 == 0 || i >= maxMarks/2 {
				thin = append(thin, m)
			}
		}
		l.marks = thin
	}
	l.marks = append(l.marks, mark{l.durable, ended, now})
}

// ageAt is how long ago the message at p came, at least.
func (l *lane) ageAt(p Position, now time.Duration) time.Duration {
	i := sort.Search(len(l.marks), func(i int) bool { return l.marks[i].end.Seq > p.Seq })
	if i == len(l.marks) {
		return now - l.lastCommit
	}
	return now - l.marks[i].ended
}

// beforeOpen is how long ago everything came that was there at the start, for all that the spool knows: longer than any leap asks for.
const beforeOpen = 365 * 24 * time.Hour

// throughAll returns the stretches beyond the head that no upstream waits for. The caller holds mu.
func (l *lane) throughAll() []island {
	var all []island
	first := true
	for _, c := range l.cursors {
		if !c.active {
			continue
		}
		its := append([]island{{to: c.row.Pos}}, c.row.Islands...)
		if first {
			all, first = its, false
			continue
		}
		var both []island
		for _, a := range all {
			for _, b := range its {
				if a.from.Seq < b.from.Seq {
					a.from = b.from
				}
				to := a.to
				if b.to.Seq < to.Seq {
					to = b.to
				}
				if a.from.Seq < to.Seq {
					both = append(both, island{a.from, to})
				}
			}
		}
		all = both
	}
	return all
}
