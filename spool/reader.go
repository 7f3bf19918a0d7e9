package spool

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// Consumer is an upstream's place in the spool: a reader for each of its lanes.
type Consumer struct {
	s       *Spool
	ready   chan struct{}
	readers []*Reader
}

// Consumer attaches an upstream to the named lanes (nil: all); the system lane is always among
// them. A new upstream begins with the oldest message that is still there. An upstream has one
// Consumer at a time.
func (s *Spool) Consumer(upstream string, lanes []string) (*Consumer, error) {
	if err := s.attach(upstream, lanes); err != nil {
		return nil, err
	}
	c := &Consumer{s: s, ready: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.consumers {
		if other.readers[0].cur.upstream == upstream {
			return nil, fmt.Errorf("upstream %q has a consumer already", upstream)
		}
	}
	for _, l := range s.lanes {
		cur := l.cursor(upstream)
		if cur == nil || !cur.active {
			continue
		}
		cur.restart()
		r := &Reader{s: s, l: l, cur: cur, pos: cur.row.Pos}
		c.readers = append(c.readers, r)
		if l.rules.Load().Drain == LiveFirst {
			r.part, r.pos = newest, cur.live.done
			c.readers = append(c.readers, &Reader{s: s, l: l, cur: cur, part: backlog, pos: cur.row.Pos})
		}
	}
	s.consumers = append(s.consumers, c)
	c.ready <- struct{}{}
	return c, nil
}

// Ready receives after a commit or a rule may have changed what there is to read.
func (c *Consumer) Ready() <-chan struct{} { return c.ready }

// Lanes returns the readers: the system lane's first, then in the order of the configuration. A lane that drains
// live_first has two: that of the newest messages, then that of the backlog.
func (c *Consumer) Lanes() []*Reader { return c.readers }

// Close ends the readers. Messages go on waiting for the upstream.
func (c *Consumer) Close() {
	c.s.mu.Lock()
	for i, other := range c.s.consumers {
		if other == c {
			c.s.consumers = append(c.s.consumers[:i:i], c.s.consumers[i+1:]...)
			break
		}
	}
	c.s.mu.Unlock()
	for _, r := range c.readers {
		r.forget()
		r.closeIter()
	}
}

// Reader reads one lane for one upstream, or a part of it: the newest messages, or the backlog. Next, Rewind and the consumer's Close belong to one
// goroutine; Resolve, Park and Cursor may be called from any.
type Reader struct {
	s    *Spool
	l    *lane
	cur  *cursor // all but upstream under Spool.mu
	part part

	// Only the reading goroutine touches what follows.
	pos  Position // of the next record
	raw  []byte   // the current chunk's records from pos on
	end  Position // of the current chunk
	tms  Times    // of the current chunk
	stop Position // of what may be read: an island begins there, or what is not this reader's
	blk  *block   // owns raw; nil: buf does
	buf  []byte
	it   *pebble.Iterator
	read int  // bytes read with it
	seek bool // it is not near pos
}

// part is which messages of a lane a reader has.
type part int

const (
	whole   part = iota // all, in order
	newest              // from where the cursor's live stream is
	backlog             // up to there
)

// maxIterBytes is how much is read with one iterator. An open iterator keeps excised tables on disk.
const maxIterBytes = 32 << 20

// Run is a stretch of records that follow each other without a hole.
// Raw is valid until the reader's next Next, Rewind or Close.
type Run struct {
	Pos   Position // of the first record
	Count int
	Raw   []byte // the records, back to back; see ParseRecord
	Times Times
	// Behind, if not 0, is the sequence from which on there is a backlog that these messages went ahead of.
	Behind uint64
}

// End is the position after the run's last record.
func (r Run) End() Position {
	return Position{r.Pos.Seq + uint64(r.Count), r.Pos.Bytes + uint64(len(r.Raw))}
}

// Lane returns the lane's name.
func (r *Reader) Lane() string { return r.l.name }

// Urgent tells whether no budget of an upstream holds the lane up. The system lane's messages are few and what the cloud knows
// the gateway by: they are urgent by nature.
func (r *Reader) Urgent() bool { return r.l.rules.Load().Urgent || r.l.number == 0 }

// Share returns the percentage of the link that the lane gets at least.
func (r *Reader) Share() int { return r.l.rules.Load().Share }

// Backfill returns what the reader of a backlog gets of the lane's bytes while the lane's reader before it in
// Consumer.Lanes has something, in percent; 0: this is no such reader.
func (r *Reader) Backfill() int {
	share := r.l.rules.Load().BackfillShare
	switch {
	case r.part != backlog:
		return 0
	case share <= 0:
		return DefaultBackfillShare
	}
	return share
}

// Cursor returns the position before which everything is resolved.
func (r *Reader) Cursor() Position {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.cur.row.Pos
}

// Rewind makes the next Next begin again with what the reader has not resolved.
func (r *Reader) Rewind() {
	r.forget()
	r.closeIter()
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.pos = r.cur.row.Pos
	if r.part == newest {
		r.pos = r.cur.liveDone()
		if len(r.cur.live.leaps) > 0 { // what was in flight between is read again
			r.cur.live.leaps = nil
			r.s.notify()
		}
	}
}

// Next returns the records that follow those it returned last, up to maxBytes of them but at
// least one. A Run with Count 0 means that there is nothing to read now. An error is about the
// disk; what is damaged is passed over, counted and announced, and is no error.
func (r *Reader) Next(maxBytes int) (Run, error) {
	for {
		r.s.mu.Lock()
		r.advance(r.cur.past(r.pos)) // an island, or a rule took what lay between
		durable := r.l.durable
		r.stop = durable
		behind := uint64(0)
		switch r.part {
		case newest:
			if len(r.raw) == 0 {
				r.leap()
			}
			behind = r.cur.behind()
		case backlog:
			r.stop = r.cur.liveDone()
		case whole:
		}
		if r.pos.Seq >= r.stop.Seq {
			r.s.mu.Unlock()
			r.forget()
			r.closeIter()
			return Run{}, nil
		}
		if i := r.cur.nextIsland(r.pos); i < len(r.cur.row.Islands) && r.cur.row.Islands[i].from.Seq < r.stop.Seq {
			r.stop = r.cur.row.Islands[i].from
		}
		if len(r.raw) == 0 {
			r.forget()
			if c := r.l.fromTail(r.pos.Seq); c != nil {
				c.blk.retain()
				r.blk, r.raw, r.end, r.tms = c.blk, c.raw, c.End(), r.s.times(&c.chunkMeta)
				r.s.mu.Unlock()
				r.closeIter()
				r.skipTo(c.First)
			} else {
				r.s.mu.Unlock()
				if err := r.load(durable); err != nil {
					return Run{}, err
				}
			}
		} else {
			r.s.mu.Unlock()
		}
		if run, ok := r.cut(maxBytes); ok {
			run.Behind = behind
			return run, nil
		}
	}
}

// advance goes on to pos, which is not before where the reader is.
func (r *Reader) advance(pos Position) {
	if pos.Seq == r.pos.Seq {
		return
	}
	if skip := pos.Bytes - r.pos.Bytes; skip < uint64(len(r.raw)) {
		r.raw = r.raw[skip:]
	} else {
		r.forget()
		r.seek = true
	}
	r.pos = pos
}

// leap goes on to the newest messages if the reader is too far behind them. The caller holds mu.
func (r *Reader) leap() {
	to, more := r.l.leap(r.cur, r.pos)
	if to.Seq == r.pos.Seq {
		return
	}
	r.s.cfg.Log.Info("newest messages go first, the backlog follows beside them", "upstream", r.cur.upstream, "lane", r.l.name,
		"first", r.pos.Seq, "last", to.Seq-1, "size_bytes", to.Bytes-r.pos.Bytes, "islands", len(r.cur.row.Islands))
	r.pos, r.seek = to, true
	if more {
		r.s.notify()
	}
}

// forget lets go of the current chunk.
func (r *Reader) forget() {
	r.raw = nil
	if r.blk != nil {
		r.blk.release()
		r.blk = nil
	}
	if cap(r.buf) > 4*maxChunk {
		r.buf = nil
	}
}

func (r *Reader) closeIter() {
	if r.it != nil {
		_ = r.it.Close() // errors were seen while reading
		r.it = nil
	}
}

// skipTo drops the records of the current chunk, which begins at first, that lie before pos.
func (r *Reader) skipTo(first Position) {
	if r.pos.Bytes-first.Bytes <= uint64(len(r.raw)) {
		r.raw = r.raw[r.pos.Bytes-first.Bytes:]
	}
}

// cut takes a run from the front of the current chunk.
func (r *Reader) cut(maxBytes int) (Run, bool) {
	if len(r.raw) == 0 {
		return Run{}, false
	}
	run := Run{Pos: r.pos, Times: r.tms}
	raw, end := r.raw, r.end
	if r.stop.Seq < end.Seq {
		if n := r.stop.Bytes - r.pos.Bytes; n <= uint64(len(raw)) {
			raw, end = raw[:n], r.stop
		}
	}
	if len(raw) <= maxBytes {
		run.Raw, run.Count = raw[:len(raw):len(raw)], int(end.Seq-r.pos.Seq)
	} else {
		n := 0
		for n < len(raw) {
			size := recordLen(raw[n:])
			if size == 0 {
				// The checksum held, so it was written like this: nothing a reader could mend.
				r.forget()
				r.pass(end, errors.New("chunk holds something that is not a record"))
				return Run{}, false
			}
			if run.Count > 0 && n+size > maxBytes {
				break
			}
			n += size
			run.Count++
		}
		run.Raw = raw[:n:n]
	}
	r.raw = r.raw[len(run.Raw):]
	r.pos = run.End()
	return run, true
}

// load makes the stored chunk that holds pos the current one, or the first one after it if pos is
// missing. It may return with nothing current, and is then called again.
func (r *Reader) load(durable Position) error {
	fresh := r.it == nil || r.seek || r.read > maxIterBytes
	var ok bool
	if fresh {
		r.closeIter()
		it, err := r.s.store.Iter(dataBounds(r.l.number))
		if err != nil {
			return err
		}
		r.it, r.read, r.seek = it, 0, false
		if ok = it.SeekLT(keyData(r.l.number, r.pos.Seq+1)); !ok && it.Error() == nil {
			ok = it.First()
		}
	} else {
		ok = r.it.Next()
	}
	for ; ok; ok = r.it.Next() {
		v, err := r.it.ValueAndErr()
		if err != nil {
			return r.passDamage(err, durable)
		}
		m, raw, err := decodeChunk(r.buf, v)
		switch {
		case err != nil:
			return r.passDamage(err, durable)
		case m.End().Seq <= r.pos.Seq:
			continue
		case m.First.Seq >= durable.Seq:
			// Not synced when durable was read: what is looked for is missing before it.
			r.pass(durable, errMissing)
			return nil
		case m.First.Seq > r.pos.Seq:
			r.pass(m.First, errMissing)
		}
		r.buf, r.raw, r.end, r.tms = raw, raw, m.End(), r.s.times(&m)
		r.read += len(v)
		r.skipTo(m.First)
		return nil
	}
	switch err := r.it.Error(); {
	case err != nil:
		return r.passDamage(err, durable)
	case fresh:
		r.pass(durable, errMissing)
	default:
		r.closeIter() // it is older than the chunk
	}
	return nil
}

var errMissing = errors.New("chunks are missing")

// passDamage goes on with the first chunk after pos that can be read, if cause is damage.
func (r *Reader) passDamage(cause error, durable Position) error {
	if err := r.s.store.Passable(cause); err != nil {
		return err
	}
	to, err := r.afterDamage(cause, durable)
	if err != nil {
		return err
	}
	r.pass(to, cause)
	return nil
}

// pass goes on at to, or where what this reader may read ends: what lies between is lost.
func (r *Reader) pass(to Position, cause error) {
	if r.stop.Seq < to.Seq {
		to = r.stop
	}
	r.damaged(r.pos, to, cause)
	r.pos = to
	r.closeIter()
}

// afterDamage returns the begin of the first chunk beyond the damaged one that can be read.
func (r *Reader) afterDamage(cause error, durable Position) (Position, error) {
	if !errors.Is(cause, ErrCorrupt) && !pebble.IsCorruptionError(cause) {
		return Position{}, fmt.Errorf("read lane %q at %d: %w", r.l.name, r.pos.Seq, cause)
	}
	// Steps double, so that a damaged table costs a few dozen looks and not one per chunk.
	var m chunkMeta
	it, err := r.s.store.Iter(dataBounds(r.l.number))
	if err != nil {
		return Position{}, err
	}
	defer it.Close()
	for step := uint64(1); ; step *= 2 {
		seq := r.pos.Seq + step
		if seq >= durable.Seq || seq < r.pos.Seq {
			return durable, nil
		}
		for ok := it.SeekGE(keyData(r.l.number, seq)); ok; ok = it.Next() {
			v, err := it.ValueAndErr()
			if err != nil {
				break
			}
			if m, _, err = decodeChunk(nil, v); err == nil {
				if m.First.Seq >= durable.Seq {
					return durable, nil
				}
				return m.First, nil
			}
		}
	}
}

// damaged counts the records from..to as lost to this upstream as soon as everything before them
// is resolved, and announces them then.
func (r *Reader) damaged(from, to Position, cause error) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, h := range r.cur.holes {
		if h.from.Seq <= from.Seq && to.Seq <= h.to.Seq {
			return // met again after a rewind
		}
	}
	r.s.cfg.Log.Error("messages are damaged on disk", "lane", r.l.name, "first", from.Seq, "last", to.Seq-1, "err", cause.Error()) // as it is it would bring its stack along
	i := 0
	for i < len(r.cur.holes) && r.cur.holes[i].from.Seq <= from.Seq {
		i++
	}
	r.cur.holes = slices.Insert(r.cur.holes, i, hole{from, to})
	// The hole may begin right at the cursor.
	if r.part == newest {
		r.cur.resolveLive(r.cur.liveDone(), loss{})
	} else {
		r.cur.resolve(r.cur.row.Pos, loss{})
	}
	r.s.advanceHead(r.l)
}

// Resolve ends everything that the reader has had up to end (exclusive) as o, ends being given in the order in which
// they were read. An end before the last one changes nothing: a rule may have taken the messages meanwhile. The moved cursor is
// durable with the next commit, within a second at most; what was not delivered is announced by it.
func (r *Reader) Resolve(end Position, o Outcome) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.resolve(end, o)
}

func (r *Reader) resolve(end Position, o Outcome) {
	if end.Seq <= r.cur.row.Pos.Seq || r.part == newest && end.Seq <= r.cur.live.done.Seq {
		return
	}
	if end.Seq > r.l.durable.Seq {
		panic(fmt.Sprintf("spool: resolve up to %d of lane %q, which ends at %d", end.Seq, r.l.name, r.l.durable.Seq))
	}
	how := loss{outcome: o}
	switch o {
	case Delivered:
	case Expired:
		how.reason = gapExpired
	case Evicted:
		how.reason = gapDamaged // to whom it reads, it is not readable
	case Parked:
		how.reason = gapParked
	case Elsewhere:
		how.outcome, how.reason = Delivered, gapOther
	}
	if r.part != newest {
		r.cur.resolve(end, how)
	} else if more := r.cur.resolveLive(end, how); more {
		r.s.notify()
	}
	r.s.advanceHead(r.l)
}

// Park ends everything that the reader has had up to end as parked, and keeps record, the one just before
// end, where an operator finds it. The two are one commit.
func (r *Reader) Park(end Position, record []byte, reason string) error {
	r.s.parking.RLock()
	defer r.s.parking.RUnlock()
	g, err := r.s.store.BeginFirst()
	if err != nil {
		return err
	}
	defer g.End()
	row := parkedRow{AtMS: uint64(max(r.s.clock.Time().UnixMilli(), 0)), Reason: reason, Record: record}
	key, value := keyParked(r.l.number, end.Seq-1, r.cur.upstream), row.append(nil)
	g.Set(key, value)
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.l.parked.Messages++
	r.l.parked.Bytes += uint64(len(key) + len(value))
	r.resolve(end, Parked)
	return nil
}
