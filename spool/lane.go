package spool

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// lane is one priority class.
type lane struct {
	s          *Spool
	name       string
	number     byte
	configured bool
	rules      atomic.Pointer[rules] // in effect; see SetLimits

	// Under the store's commit lock.
	next Position // of the next record
	open *block   // what has gathered since the last seal; nil: nothing

	headBytes     atomic.Uint64 // head.Bytes, for full
	refused, shed atomic.Uint64 // since the start: not taken because the lane was full, the store behind
	refusedDisk   atomic.Uint64 // since the start: not taken because the disk was full

	wanted atomic.Bool // the disk is full and somebody wants to append
	futile atomic.Bool // the disk is full and the lane has nothing to give

	// Under Spool.mu.
	dirty            bool // the lane's row has to be written
	durable          Position
	head             Position // no upstream needs anything before
	safeHead         Position // head, as the last commit wrote it
	rowHead          Position // head, as Open found it in the lane's row
	cursors          []*cursor
	expired, evicted Count // by retention, while no upstream waited
	parked           Count // copies in rows, with keys; see parked.go

	tail      []tailChunk // fresh chunks in order, the last one ends at durable
	tailBytes int64

	recent     []recentChunk // chunks in the memtable that takes writes, in order
	deletes    []recentChunk // of recent: to be deleted by the next commit, if its memtable still takes writes
	memtables  []memtableMark
	reclaimed  Position // the lane is excised up to here
	deleted    uint64   // record bytes since the last excise that were deleted in a memtable
	seen       uint64   // durable.Seq at the last tick, for quiet
	quiet      int      // ticks since the last message
	heldAtFull uint64   // record bytes when the disk became full; 0: it is not. Only who holds house touches it
	hurry      bool     // however little is finished with, it is wanted back

	// Of a lane that drains live_first; see live.go.
	marks      []mark        // in order
	lastCommit time.Duration // by Spool.elapsed; 0: before the start
}

// cursor is an upstream's place in a lane.
type cursor struct {
	upstream string
	active   bool // configured: what it has not resolved stays
	dirty    bool // its row has to be written
	row      cursorRow
	// committed is the row as the last commit wrote it.
	committed []byte
	holes     []hole // damaged stretches ahead, in order: they count as evicted once everything before is resolved
	lost      []loss // what ended otherwise than delivered since the last commit, to be announced by the next
	live      stream // of a lane that drains live_first; see live.go
}

type hole struct{ from, to Position }

// loss is a stretch of messages that an upstream will not get.
type loss struct {
	from, to     Position
	outcome      Outcome
	reason       string
	fromMS, toMS int64 // receive times, Unix ms; 0: not known
}

// tailChunk is a committed chunk in memory.
type tailChunk struct {
	chunkMeta
	raw []byte
	blk *block // owns raw
	mem int64  // bytes of memory it is counted with
}

// recentChunk says in which memtable a chunk was written.
type recentChunk struct {
	first, end uint64
	size       int
	memtable   uint64
}

// memtableMark says where in the lane a memtable begins.
type memtableMark struct {
	memtable uint64
	first    Position
}

// block is a buffer of records. It is used again when neither the tail nor a reader holds it.
type block struct {
	pool   *blockPool
	raw    []byte
	chunks []chunkMeta // where to cut raw
	refs   atomic.Int32
}

// blockPool keeps a few blocks for the next commits. Unlike a sync.Pool it survives a garbage
// collection, which under load comes more often than a block is used.
type blockPool struct {
	mu    sync.Mutex
	free  []*block
	usual int // decaying maximum of what a block had to hold
}

const maxFreeBlocks = 8

func (p *blockPool) get() *block {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := &block{pool: p}
	if n := len(p.free); n > 0 {
		b, p.free = p.free[n-1], p.free[:n-1]
	}
	b.refs.Store(1)
	return b
}

// trim lets go of the free blocks.
func (p *blockPool) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free, p.usual = nil, 0
}

func (b *block) retain() { b.refs.Add(1) }

func (b *block) release() {
	if b.refs.Add(-1) > 0 || b.pool == nil {
		return
	}
	p := b.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usual = max(len(b.raw), p.usual-p.usual/64)
	if len(p.free) < maxFreeBlocks && cap(b.raw) <= 4*p.usual+64<<10 {
		b.raw, b.chunks = b.raw[:0], b.chunks[:0]
		p.free = append(p.free, b)
	}
}

// fit returns a block of about the size of its records, so that a quiet lane's tail does not hold
// buffers that a burst once needed.
func (b *block) fit() *block {
	if cap(b.raw) < 16<<10 || len(b.raw) >= cap(b.raw)/8 {
		return b
	}
	small := &block{raw: append([]byte(nil), b.raw...), chunks: append([]chunkMeta(nil), b.chunks...)}
	small.refs.Store(1)
	b.release()
	return small
}

// takes says whether r is small enough.
func (l *lane) takes(r *Record) error {
	if n := len(r.Device) + len(r.Topic) + len(r.Payload) + r.Props.size(); n > MaxRecord-128 {
		return fmt.Errorf("append %d bytes to lane %q: %w", n, l.name, ErrTooLarge)
	}
	return nil
}

// makeRoom has a full lane do what its rule says before n more records come. again says that they have to wait, for
// housekeeping to drop what is too much. The caller holds the commit lock.
func (l *lane) makeRoom(n int, shed bool) (again bool, err error) {
	r := l.rules.Load()
	if r.MaxBytes <= 0 {
		return false, nil
	}
	held := l.next.Bytes - l.headBytes.Load()
	switch {
	case r.WhenFull == Reject:
		if held >= uint64(r.MaxBytes) {
			l.refused.Add(uint64(n))
			return false, r.errFull
		}
	case held >= r.softMax:
		l.s.wakeHousekeeping()
		if held < uint64(r.MaxBytes) || l.number == systemNumber {
			return false, nil
		}
		if shed {
			l.shed.Add(uint64(n))
			return false, ErrBusy
		}
		return true, nil
	}
	return false, nil
}

// append adds r to what gathers and returns its sequence and size. The caller holds the commit lock.
func (l *lane) append(r *Record) (seq uint64, n int) { return l.appendAged(r, r.Received) }

// appendAged is append with another time, Unix ms, from which the lane's limits count r's age.
func (l *lane) appendAged(r *Record, sinceMS int64) (seq uint64, n int) {
	if l.open == nil {
		l.open = l.s.blocks.get()
	}
	b := l.open
	before := len(b.raw)
	b.raw = AppendRecord(b.raw, r)
	n = len(b.raw) - before
	boot, booted := uint32(0), int64(0)
	if r.Uptime > 0 {
		boot, booted = l.s.boot, r.Received-r.Uptime
	}
	var m *chunkMeta
	if k := len(b.chunks); k > 0 && b.chunks[k-1].RawLen+n <= l.rules.Load().maxChunk && b.chunks[k-1].Booted == booted && b.chunks[k-1].Boot == boot {
		m = &b.chunks[k-1]
		m.Oldest, m.Newest = min(m.Oldest, sinceMS), max(m.Newest, sinceMS)
	} else {
		b.chunks = append(b.chunks, chunkMeta{
			Lane: l.number, First: l.next, Oldest: sinceMS, Newest: sinceMS, Boot: boot, Booted: booted,
		})
		m = &b.chunks[k]
	}
	m.Count++
	m.RawLen += n
	seq = l.next.Seq
	l.next.Seq++
	l.next.Bytes += uint64(n)
	return seq, n
}

// setHead moves the head. The caller holds mu, or is alone.
func (l *lane) setHead(p Position) {
	l.head = p
	l.headBytes.Store(p.Bytes)
}

// commit takes over a block that is on disk now. The caller holds mu.
func (l *lane) commit(b *block, end Position, memtable uint64) {
	if n := len(l.memtables); n == 0 || l.memtables[n-1].memtable != memtable {
		l.memtables = append(l.memtables, memtableMark{memtable, l.durable})
		l.recent = nil // what an earlier memtable took is excised, not deleted
	}
	if l.rules.Load().Drain == LiveFirst {
		l.mark()
	}
	l.durable = end
	for i := range b.chunks {
		m := &b.chunks[i]
		l.recent = append(l.recent, recentChunk{m.First.Seq, m.End().Seq, m.RawLen, memtable})
	}
	if l.waiting() {
		raw, slack := b.raw, int64(cap(b.raw)-len(b.raw))
		for _, m := range b.chunks {
			b.retain()
			c := tailChunk{m, raw[:m.RawLen:m.RawLen], b, int64(m.RawLen) + slack}
			l.tail = append(l.tail, c)
			l.tailBytes += c.mem
			raw, slack = raw[m.RawLen:], 0
		}
		l.trimTail()
	}
	b.release()
}

// waiting says whether an upstream will read what is committed now.
func (l *lane) waiting() bool {
	for _, c := range l.cursors {
		if c.active {
			return true
		}
	}
	return false
}

// trimTail drops chunks that nobody needs or that are too much. The caller holds mu.
func (l *lane) trimTail() {
	n := 0
	for n < len(l.tail) && (l.tail[n].End().Seq <= l.head.Seq || l.tailBytes > l.s.tailMax) {
		l.tailBytes -= l.tail[n].mem
		l.tail[n].blk.release()
		n++
	}
	if n > 0 {
		clear(l.tail[:n])
		l.tail = l.tail[n:]
	}
}

// fromTail returns the chunk in memory that holds seq, nil if there is none. The caller holds mu.
func (l *lane) fromTail(seq uint64) *tailChunk {
	if len(l.tail) == 0 || seq < l.tail[0].First.Seq {
		return nil
	}
	lo, hi := 0, len(l.tail)
	for lo < hi { // the first chunk that ends after seq
		mid := (lo + hi) / 2
		if l.tail[mid].End().Seq <= seq {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(l.tail) || l.tail[lo].First.Seq > seq {
		return nil
	}
	return &l.tail[lo]
}

func (l *lane) cursor(upstream string) *cursor {
	for _, c := range l.cursors {
		if c.upstream == upstream {
			return c
		}
	}
	return nil
}

// resolve moves the cursor to end. What lies between and has no end yet ended as how says, but for the holes in it. The
// caller holds mu.
func (c *cursor) resolve(end Position, how loss) { c.resolveFrom(c.row.Pos, end, how) }

// resolveFrom ends what has no end yet from from to end as how says, but for the holes in it, and the hole that
// follows. It returns the place behind. The caller holds mu.
func (c *cursor) resolveFrom(from, end Position, how loss) Position {
	for at := c.past(from); ; at = c.past(at) {
		h := c.hole(at)
		part := how
		part.from, part.to = at, end
		switch {
		case h != nil && h.from.Seq <= at.Seq:
			part = loss{from: at, to: h.to, outcome: Evicted, reason: gapDamaged}
		case at.Seq >= end.Seq:
			return at
		case h != nil && h.from.Seq < end.Seq:
			part.to = h.from
		}
		if i := c.nextIsland(at); i < len(c.row.Islands) && c.row.Islands[i].from.Seq < part.to.Seq {
			part.to = c.row.Islands[i].from
		}
		// What is known of the time is that of the two ends.
		if part.from != from {
			part.fromMS = 0
		}
		if part.to != end {
			part.toMS = 0
		}
		c.row.outcome(part.outcome).add(part.from, part.to)
		c.through(part.from, part.to)
		if part.reason != "" {
			c.lose(part)
		}
		at = part.to
	}
}

// through notes that from..to has an end.
func (c *cursor) through(from, to Position) {
	c.dirty = true
	is := c.row.Islands
	if from.Seq <= c.row.Pos.Seq {
		c.row.Pos = to
		for len(is) > 0 && is[0].from.Seq <= c.row.Pos.Seq {
			c.row.Pos = is[0].to
			is = is[1:]
		}
		if len(is) < len(c.row.Islands) {
			c.row.Islands = slices.Clone(is)
		}
	} else {
		i := c.nextIsland(from)
		before, after := i > 0 && is[i-1].to == from, i < len(is) && is[i].from == to
		switch {
		case before && after:
			is[i-1].to = is[i].to
			c.row.Islands = slices.Delete(is, i, i+1)
		case before:
			is[i-1].to = to
		case after:
			is[i].from = from
		default:
			c.row.Islands = slices.Insert(is, i, island{from, to})
		}
	}
	if len(c.holes) > 0 {
		c.holes = slices.DeleteFunc(c.holes, func(h hole) bool { return c.past(h.from).Seq >= h.to.Seq })
	}
}

// past returns the first place from p on that has no end yet.
func (c *cursor) past(p Position) Position {
	if p.Seq < c.row.Pos.Seq {
		return c.row.Pos
	}
	if len(c.row.Islands) > 0 {
		if i := c.nextIsland(p); i > 0 && p.Seq < c.row.Islands[i-1].to.Seq {
			return c.row.Islands[i-1].to
		}
	}
	return p
}

// nextIsland is the index of the first island that begins behind p.
func (c *cursor) nextIsland(p Position) int {
	for i := range c.row.Islands {
		if c.row.Islands[i].from.Seq > p.Seq {
			return i
		}
	}
	return len(c.row.Islands)
}

// hole returns the first hole that ends behind p, nil if there is none.
func (c *cursor) hole(p Position) *hole {
	for i := range c.holes {
		if c.holes[i].to.Seq > p.Seq {
			return &c.holes[i]
		}
	}
	return nil
}

// lose notes a loss, as one with the last if it goes on with it.
func (c *cursor) lose(part loss) {
	if n := len(c.lost); n > 0 {
		last := &c.lost[n-1]
		if last.to == part.from && last.reason == part.reason {
			last.to, last.toMS = part.to, part.toMS
			return
		}
	}
	c.lost = append(c.lost, part)
}

// advanceHead moves the lane's head to the slowest upstream. The caller holds mu.
func (s *Spool) advanceHead(l *lane) {
	to, any := l.durable, false
	for _, c := range l.cursors {
		if c.active {
			any = true
			if c.row.Pos.Seq < to.Seq {
				to = c.row.Pos
			}
		}
	}
	if any {
		s.moveHead(l, to)
	}
}

// moveHead lets go of everything before to. The caller holds mu.
func (s *Spool) moveHead(l *lane, to Position) {
	if to.Seq <= l.head.Seq {
		return
	}
	l.setHead(to)
	l.dirty = true
	n := 0
	for n < len(l.recent) && l.recent[n].end <= to.Seq {
		n++
	}
	if n > 0 {
		l.deletes = append(l.deletes, l.recent[:n]...)
		l.recent = l.recent[n:]
	}
	l.trimTail()
}
