package spool

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// WhenFull says what a full lane does with the next message.
type WhenFull string

// The rules for a full lane.
const (
	DropOldest WhenFull = "drop_oldest"
	Reject     WhenFull = "reject"
)

// SystemLane carries what the gateway itself has to tell: gaps, command states. It is always
// there, is read first, and is not configured.
const SystemLane = "system"

// systemNumber is the system lane's.
const systemNumber = 0

// SystemMaxBytes bounds the system lane; its oldest go first. It holds the events of some 800,000 steps of commands, which
// have to wait for days without a link.
const SystemMaxBytes = 256 << 20

// LaneConfig is one lane's limits.
type LaneConfig struct {
	Name     string        `yaml:"name"`
	Share    int           `yaml:"share"`     // percent of the link that the lane gets at least
	MaxBytes int64         `yaml:"max_bytes"` // record bytes kept; 0: no limit
	MaxAge   time.Duration `yaml:"max_age"`   // 0: no limit
	WhenFull WhenFull      `yaml:"when_full"`
	Drain    Drain         `yaml:"drain"` // "": in order
	// BackfillShare is what the backlog gets of the lane's bytes while newer messages flow, in percent. 0: DefaultBackfillShare.
	BackfillShare int  `yaml:"backfill_share"`
	Urgent        bool `yaml:"urgent"` // sent whatever the budgets of the upstreams say
}

// Config of a spool.
type Config struct {
	Gateway string // the gateway's id, for announcements
	// GapTopic is the topic under which gaps are announced upstream.
	GapTopic string
	Lanes    []LaneConfig
	// Upstreams names the upstreams that messages wait for, and their lanes (nil: all). What other
	// upstreams left behind in the store no longer holds anything back. A nil map keeps them all,
	// which is what tools want that only look.
	Upstreams map[string][]string
	// TailBytes bounds the fresh chunks kept in memory for readers, all lanes together. 0: 4 MiB.
	TailBytes int64
	// ParkedBytes bounds the copies of messages that upstreams refused for good, all lanes together. 0: 64 MiB.
	ParkedBytes int64
	// Clock is the gateway's, by which messages age; nil: one of the store and the system.
	Clock *clock.Clock
	// Restored, if it is not "", is the id of the backup that this store was restored from: what comes next gets a new epoch,
	// unless that was done before.
	Restored string
	Log      *slog.Logger
	Metrics  prometheus.Registerer // nil: none
}

// Errors of Append, besides kv.ErrClosed and the store's failure.
var (
	ErrFull     = errors.New("lane is full")
	ErrTooLarge = errors.New("message is larger than the spool takes")
	ErrNoLane   = errors.New("no such lane")
	// ErrBusy: the store is behind and the caller did not want to wait.
	ErrBusy = kv.ErrBusy
)

// Lane is a lane's handle, stable while the process runs.
type Lane int

// LaneNone stores no record: the Append's Done comes in its place in the order of commits.
const LaneNone Lane = -1

// Position is a place in a lane: the next sequence to be read and how many record bytes lie before it.
type Position struct {
	Seq   uint64 `json:"seq"`
	Bytes uint64 `json:"bytes"`
}

// Outcome is how a message's wait for an upstream ended.
type Outcome int

// The outcomes. What has none yet is pending.
const (
	Delivered Outcome = iota
	Expired
	Evicted
	Parked
	// Elsewhere: it is a replay for another upstream (see Replay). It counts as delivered and is announced, so that
	// nobody misses its sequence.
	Elsewhere
)

// Spool is the store-and-forward log of one gateway. All methods may be called from many goroutines.
type Spool struct {
	store *kv.Store
	cfg   Config
	epoch string
	clock *clock.Clock
	boot  uint32      // the clock's number of this boot
	past  []pastEpoch // see epoch.go; not changed after Open
	lanes []*lane     // by Lane; system is 0
	names map[string]Lane

	blocks    blockPool
	house     sync.Mutex // held by whoever drops messages or gives space back; taken before the others
	mu        sync.Mutex // guards what is committed: see the package comment
	consumers []*Consumer
	free      []*sealed // to be used again

	encodeNS float64 // time to compress a byte, moving average; only Stage touches it

	space   sync.Cond // broadcast when housekeeping was everywhere, or the disk's level changed; its lock is of its own
	closing bool      // under space.L

	wake      chan struct{} // cap 1: housekeeping has something to do
	stop      chan struct{}
	done      sync.WaitGroup
	closeOnce sync.Once
	tailMax   int64
	replaying sync.Mutex // one Replay at a time: two would take the same message

	parking    sync.RWMutex  // read-locked by whoever parks, until the row is handed in; after replaying, before the store's lock
	parkedGone atomic.Uint64 // copies dropped because there were too many

	damaged   bool // something of the store was lost; only Open uses it and what follows
	recovered uint64
	markLost  bool       // and nobody knows how far the log went
	marked    *markState // nil: there is none

	elapsed func() time.Duration // since the spool was opened, and beforeOpen; only marks use it
}

// Open opens the spool in store, which it joins as the participant of the group commit. It takes
// the same time for an empty spool and a full one: it reads a row per lane and upstream.
func Open(store *kv.Store, cfg Config) (*Spool, error) {
	s := &Spool{
		store: store, cfg: cfg,
		names:    map[string]Lane{},
		encodeNS: 3, // until it is measured
		wake:     make(chan struct{}, 1),
		stop:     make(chan struct{}),
	}
	s.space.L = &sync.Mutex{}
	if s.clock = cfg.Clock; s.clock == nil {
		var err error
		if s.clock, err = clock.Open(store, clock.Config{Log: cfg.Log}); err != nil {
			return nil, err
		}
	}
	s.boot = s.clock.Boot()
	opened := time.Now()
	s.elapsed = func() time.Duration { return beforeOpen + time.Since(opened) }
	if s.cfg.TailBytes <= 0 {
		s.cfg.TailBytes = 4 << 20
	}
	if s.cfg.ParkedBytes <= 0 {
		s.cfg.ParkedBytes = 64 << 20
	}
	s.readMark()
	if err := s.openEpoch(); err != nil {
		return nil, err
	}
	if err := s.openLanes(); err != nil {
		return nil, err
	}
	if err := s.sawTimes(); err != nil {
		return nil, err
	}
	if err := s.readPastEpochs(); err != nil {
		return nil, err
	}
	if err := s.writeGateway(); err != nil {
		return nil, err
	}
	if s.cfg.Restored != "" {
		if err := s.beginEpoch(s.cfg.Restored); err != nil {
			return nil, err
		}
	} else if err := s.epochAfterDamage(); err != nil {
		return nil, err
	}
	s.tailMax = s.cfg.TailBytes / int64(len(s.lanes))
	if err := s.openCursors(); err != nil {
		return nil, err
	}
	s.openParked()
	if cfg.Metrics != nil {
		if err := cfg.Metrics.Register(collector{s}); err != nil {
			return nil, fmt.Errorf("open spool: %w", err)
		}
	}
	store.Join(s)
	store.OnLevel(s.levelChanged)
	s.done.Add(1)
	go s.housekeeping()
	return s, nil
}

// openLanes gives every lane its number. Numbers outlive configurations: a lane that is no longer
// configured takes nothing more, but is still read until it is empty.
func (s *Spool) openLanes() error {
	numbers, ops, err := s.laneNumbers()
	if err != nil {
		return err
	}
	configs := append([]LaneConfig{{Name: SystemLane, Share: 100, MaxBytes: SystemMaxBytes, WhenFull: DropOldest}}, s.cfg.Lanes...)
	configured := len(configs)
	for _, name := range slices.Sorted(maps.Keys(numbers)) {
		if !slices.ContainsFunc(configs, func(c LaneConfig) bool { return c.Name == name }) {
			configs = append(configs, LaneConfig{Name: name, Share: 1, WhenFull: Reject})
		}
	}
	for i, c := range configs {
		if _, twice := s.names[c.Name]; twice {
			return fmt.Errorf("lane %q is configured twice, or uses the name of the gateway's own lane", c.Name)
		}
		number, found := numbers[c.Name]
		if !found {
			if len(numbers) > 250 {
				return fmt.Errorf("lane %q: the store has held %d lanes, and there are numbers for 250", c.Name, len(numbers))
			}
			number = newNumber(numbers)
			numbers[c.Name] = number
			ops = append(ops, kv.Op{Key: append(slices.Clone(prefixLaneNum), c.Name...), Value: []byte{number}})
		}
		l := &lane{s: s, name: c.Name, number: number, configured: i < configured}
		l.rules.Store(newRules(c))
		row := laneRow{Next: Position{Seq: 1}, Head: Position{Seq: 1}}
		v, kept, err := s.store.Get(keyLane(number))
		if err != nil {
			return err
		}
		if kept {
			err := row.parse(v)
			switch {
			case unreadable(err):
				s.cfg.Log.Error("row of a lane is damaged", "lane", c.Name, "err", err)
				row, kept, s.damaged = laneRow{Next: Position{Seq: 1}, Head: Position{Seq: 1}}, false, true
			case err != nil:
				return fmt.Errorf("lane %q: %w", c.Name, err)
			}
		}
		if err := s.recoverLane(l, &row, kept); err != nil {
			return err
		}
		l.next, l.durable = row.Next, row.Next
		l.expired, l.evicted = row.Expired, row.Evicted
		l.setHead(row.Head)
		l.safeHead, l.reclaimed = row.Head, row.Head
		if c.Drain == LiveFirst {
			l.marks = []mark{{end: l.durable}}
		}
		s.names[c.Name] = Lane(len(s.lanes))
		s.lanes = append(s.lanes, l)
	}
	if len(ops) == 0 {
		return nil
	}
	return s.store.ApplyWait(ops)
}

func (s *Spool) openCursors() error {
	for _, l := range s.lanes {
		prefix := keyCursor(l.number, "")
		err := s.store.Scan(prefix, func(k, v []byte) error {
			c := &cursor{upstream: string(k[len(prefix):])}
			if err := c.row.parse(v); unreadable(err) {
				s.cfg.Log.Error("row of a cursor is damaged: what may have been sent is sent again", "lane", l.name, "upstream", c.upstream, "err", err)
				return nil
			} else if err != nil {
				return fmt.Errorf("lane %q, upstream %q: %w", l.name, c.upstream, err)
			}
			c.active = s.cfg.Upstreams == nil
			c.committed = append(c.committed, v...)
			l.cursors = append(l.cursors, c)
			return nil
		})
		if err != nil {
			return err
		}
		s.recoverCursors(l)
	}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.Upstreams)) {
		if err := s.attach(name, s.cfg.Upstreams[name]); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lanes {
		for _, c := range l.cursors {
			if !c.active {
				s.left(l, c)
			}
		}
		s.advanceHead(l)
	}
	return nil
}

// attach makes the upstream's cursors in the named lanes hold messages back from now on. A new
// upstream begins with the oldest message that is still there.
func (s *Spool) attach(upstream string, lanes []string) error {
	if upstream == "" {
		return errors.New("an upstream needs a name")
	}
	chosen := []*lane{s.lanes[0]}
	for _, l := range s.lanes[1:] {
		if lanes == nil || slices.Contains(lanes, l.name) {
			chosen = append(chosen, l)
		}
	}
	for _, name := range lanes {
		if _, ok := s.names[name]; !ok {
			return fmt.Errorf("upstream %q: lane %q: %w", upstream, name, ErrNoLane)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range chosen {
		c := l.cursor(upstream)
		switch {
		case c == nil:
			l.cursors = append(l.cursors, &cursor{upstream: upstream, active: true, dirty: true, row: cursorRow{Start: l.head, Pos: l.head}})
		case !c.active:
			c.active = true
			c.resolve(l.head, loss{outcome: Evicted, reason: gapDetached})
		}
	}
	return nil
}

// Epoch is the spool's own id: a UUIDv7 made when it was created, or restored from a backup. A replaced disk has another, so
// that message ids are never used twice. EpochOf tells that of a message, which may be older.
func (s *Spool) Epoch() string { return s.epoch }

// Lane returns the handle of a configured lane.
func (s *Spool) Lane(name string) (Lane, bool) {
	l, ok := s.names[name]
	return l, ok && s.lanes[l].configured
}

// Append hands in a copy of r, and of ops: row writes that are committed in the same batch. An error
// means that nothing was taken and done will not be called. Otherwise done (which may be nil) is
// called once, with the record's sequence, 0 for LaneNone. With shed it does not wait while the
// store is behind, but returns ErrBusy. It allocates nothing in the steady state.
func (s *Spool) Append(to Lane, r *Record, ops []kv.Op, done kv.Done, token uint64, shed bool) error {
	l, err := s.laneFor(to)
	if err != nil {
		return err
	}
	if l != nil {
		if err := l.takes(r); err != nil {
			return err
		}
	}
	g, err := s.begin(l, 1, shed)
	if err != nil {
		return err
	}
	defer g.End()
	seq := uint64(0)
	if l != nil {
		n := 0
		seq, n = l.append(r)
		g.Grow(n)
	}
	g.Ops(ops)
	if done != nil {
		g.Done(done, token, seq)
	}
	return nil
}

// begin opens the commit for n records of l, which may be nil: then there are only rows. Those lanes are served first that are not to
// wait behind a flood: the gateway's own, and the first that is configured if it is not the only one.
func (s *Spool) begin(l *lane, n int, shed bool) (*kv.Group, error) {
	if l == nil {
		return s.store.Begin(!shed)
	}
	for {
		if err := l.admit(n, shed); err != nil {
			return nil, err
		}
		var g *kv.Group
		var err error
		switch {
		case l.number == systemNumber && !shed:
			g, err = s.store.BeginFirst()
		case l.number == systemNumber:
			g, err = s.store.Begin(false)
		default:
			g, err = s.store.BeginMessage(!shed, len(s.cfg.Lanes) > 1 && l == s.lanes[1])
		}
		switch {
		case errors.Is(err, ErrBusy):
			l.shed.Add(uint64(n))
			return nil, err
		case errors.Is(err, kv.ErrDiskFull):
			continue // admit knows what to do
		case err != nil:
			return nil, err
		}
		again, err := l.makeRoom(n, shed)
		if !again && err == nil {
			return g, nil
		}
		head := l.headBytes.Load()
		g.End()
		if err == nil {
			err = l.waitForDrop(head)
		}
		if err != nil {
			return nil, err
		}
	}
}

// AppendAll is Append for several records of one lane, all of them or none: one batch takes them, and ops with
// them. done gets the last one's sequence, 0 if there is none.
func (s *Spool) AppendAll(to Lane, rs []Record, ops []kv.Op, done kv.Done, token uint64) error {
	if len(rs) == 0 {
		to = LaneNone
	}
	l, err := s.laneFor(to)
	if err != nil {
		return err
	}
	for i := range rs {
		if err := l.takes(&rs[i]); err != nil {
			return err
		}
	}
	g, err := s.begin(l, len(rs), false)
	if err != nil {
		return err
	}
	defer g.End()
	seq := uint64(0)
	if l != nil {
		for i := range rs {
			n := 0
			seq, n = l.append(&rs[i])
			g.Grow(n)
		}
	}
	g.Ops(ops)
	if done != nil {
		g.Done(done, token, seq)
	}
	return nil
}

// laneFor gives a lane that takes messages; nil for LaneNone.
func (s *Spool) laneFor(to Lane) (*lane, error) {
	switch {
	case to == LaneNone:
		return nil, nil
	case to < 0 || int(to) >= len(s.lanes) || !s.lanes[to].configured:
		return nil, fmt.Errorf("append to lane %d: %w", to, ErrNoLane)
	}
	return s.lanes[to], nil
}

// size is about what the properties add to a record.
func (p *Props) size() int {
	if p == nil {
		return 0
	}
	n := len(p.ContentType) + len(p.ResponseTopic) + len(p.Correlation) + len(p.Upstream) + 64
	for _, u := range p.User {
		n += len(u[0]) + len(u[1]) + 12
	}
	return n
}

// Reasons for a gap, as announced.
const (
	gapMaxBytes = "max_bytes"      // the lane was full
	gapMaxAge   = "max_age"        // the messages were too old
	gapDamaged  = "damaged"        // the disk no longer gives them back
	gapDetached = "detached"       // they were dropped while the upstream was not configured
	gapExpired  = "expired"        // their own MQTT 5 message expiry interval had passed
	gapParked   = "parked"         // the upstream refused them for good
	gapPurged   = "purged"         // somebody had them dropped
	gapDiskFull = "disk_full"      // the disk was full
	gapOther    = "other_upstream" // they are replays of what another upstream had refused
)

// gap is the announcement of messages that an upstream will not get (docs/formats.md).
type gap struct {
	Gateway  string `json:"gateway"`
	Epoch    string `json:"epoch"`
	Lane     string `json:"lane"`
	Upstream string `json:"upstream"`
	First    uint64 `json:"first"`
	Last     uint64 `json:"last"`
	Count    uint64 `json:"count"`
	Bytes    uint64 `json:"bytes"`
	FromMS   int64  `json:"from_ms"`
	ToMS     int64  `json:"to_ms"`
	Reason   string `json:"reason"`
}

// announce appends what cursors have lost since the last commit to the system lane, so that it is
// written by the commit that writes the cursors. The caller holds the commit lock and mu.
func (s *Spool) announce(st *sealed) {
	for _, l := range s.lanes {
		for _, c := range l.cursors {
			for _, lost := range s.byEpoch(l, c.lost) {
				epoch, _, _ := s.EpochOf(l.name, lost.from.Seq)
				a := gap{
					Gateway: s.cfg.Gateway, Epoch: epoch, Lane: l.name, Upstream: c.upstream,
					First: lost.from.Seq, Last: lost.to.Seq - 1, Count: lost.to.Seq - lost.from.Seq, Bytes: lost.to.Bytes - lost.from.Bytes,
					FromMS: lost.fromMS, ToMS: lost.toMS, Reason: lost.reason,
				}
				if l.number != 0 || lost.outcome == Evicted {
					// An announcement that an upstream refuses is not worth another one.
					s.lanes[0].append(s.announcement(a))
				}
				st.gaps = append(st.gaps, a)
			}
			clear(c.lost)
			c.lost = c.lost[:0]
		}
	}
}

func (s *Spool) announcement(a gap) *Record {
	payload, err := json.Marshal(a)
	if err != nil {
		panic(err) // strings and numbers always marshal
	}
	now := s.clock.Read()
	r := &Record{
		Received: now.Wall, Uptime: now.Uptime(),
		Topic:   []byte(s.cfg.GapTopic),
		Flags:   FlagQoS1,
		Payload: payload,
		Props:   &Props{ContentType: "application/json", Upstream: a.Upstream},
	}
	if now.Unsynced {
		r.Flags |= FlagClockUnsynced
	}
	return r
}

// sealed is what one group commit takes of the spool.
type sealed struct {
	lanes []sealedLane
	rows  []byte // encoded rows, back to back
	ends  []rowEnd
	heads []sealedHead
	// cursors are those whose rows are written.
	cursors []sealedCursor
	gaps    []gap  // announced by this commit
	chunk   []byte // room to encode a chunk
	now     clock.Moment
}

type sealedLane struct {
	l   *lane
	blk *block
	end Position
}

// rowEnd says where a row's key and value end in sealed.rows. A row without a value is deleted.
type rowEnd struct{ key, value int }

// sealedCursor says which of sealed.ends is a cursor's row.
type sealedCursor struct {
	c   *cursor
	end int
}

type sealedHead struct {
	l    *lane
	head Position
}

// Seal implements kv.Participant.
func (s *Spool) Seal() any {
	s.mu.Lock()
	defer s.mu.Unlock()
	var st *sealed
	if n := len(s.free); n > 0 {
		st, s.free = s.free[n-1], s.free[:n-1]
	} else {
		st = &sealed{}
	}
	s.announce(st)
	st.now = s.clock.Read()
	mutable, _ := s.store.Memtable()
	for _, l := range s.lanes {
		if l.open != nil {
			st.lanes = append(st.lanes, sealedLane{l, l.open, l.next})
			l.open = nil
			l.dirty = true
		}
		for _, c := range l.cursors {
			if c.dirty {
				c.dirty = false
				st.row(append(append(st.rows, kv.PrefixCursor, l.number), c.upstream...), c.row.append)
				st.cursors = append(st.cursors, sealedCursor{c, len(st.ends) - 1})
			}
		}
		for _, d := range l.deletes {
			if d.memtable == mutable {
				st.row(appendDataKey(st.rows, l.number, d.first), nil)
				l.deleted += uint64(d.size)
			}
		}
		l.deletes = l.deletes[:0]
		if l.dirty {
			l.dirty = false
			row := laneRow{Next: l.next, Head: l.head, Expired: l.expired, Evicted: l.evicted}
			st.row(append(st.rows, kv.PrefixLane, l.number), row.append)
			st.heads = append(st.heads, sealedHead{l, l.head})
		}
	}
	if len(st.lanes) == 0 && len(st.ends) == 0 {
		s.free = append(s.free, st)
		return nil
	}
	return st
}

// row adds a row whose key was just appended to st.rows, giving withKey.
func (st *sealed) row(withKey []byte, value func([]byte) []byte) {
	e := rowEnd{key: len(withKey)}
	st.rows = withKey
	if value != nil {
		st.rows = value(withKey)
	}
	e.value = len(st.rows)
	st.ends = append(st.ends, e)
}

// Stage implements kv.Participant: one chunk or more for each lane, then the rows.
func (s *Spool) Stage(v any, w kv.Writer) error {
	st := v.(*sealed)
	for _, a := range st.gaps {
		if a.Reason == gapOther {
			continue // nothing is lost
		}
		s.cfg.Log.Warn("messages will not reach an upstream", "lane", a.Lane, "upstream", a.Upstream, "reason", a.Reason,
			"first", a.First, "last", a.Last, "size_bytes", a.Bytes)
	}
	size := 0
	for _, sl := range st.lanes {
		size += len(sl.blk.raw)
	}
	compress := s.worthCompressing(size)
	start := time.Now()
	var key [dataKeyLen]byte
	for _, sl := range st.lanes {
		raw := sl.blk.raw
		for i := range sl.blk.chunks {
			m := &sl.blk.chunks[i]
			m.stamp(st.now)
			st.chunk = appendChunk(st.chunk[:0], m, raw[:m.RawLen], compress)
			raw = raw[m.RawLen:]
			w.Set(appendDataKey(key[:0], m.Lane, m.First.Seq), st.chunk)
		}
	}
	if compress && size >= 4<<10 {
		rate := float64(time.Since(start)) / float64(size)
		s.encodeNS += (rate - s.encodeNS) / 16
	}
	at := 0
	for _, e := range st.ends {
		if e.value == e.key {
			w.Delete(st.rows[at:e.key])
		} else {
			w.Set(st.rows[at:e.key], st.rows[e.key:e.value])
		}
		at = e.value
	}
	return nil
}

// worthCompressing says whether a commit of size bytes should be compressed. Compression halves what
// the disk has to take, and its wear, but the commits behind wait for it. So it may take half as
// long as the fsync it precedes: always on slow flash, and on a fast disk until the load is so high
// that compression would be what limits it.
func (s *Spool) worthCompressing(size int) bool {
	return time.Duration(s.encodeNS*float64(size)) <= s.store.SyncTime()/2
}

// Committed implements kv.Participant: what was sealed is on disk, readers may have it.
func (s *Spool) Committed(v any, memtable uint64) {
	st := v.(*sealed)
	for i := range st.lanes {
		st.lanes[i].blk = st.lanes[i].blk.fit()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sl := range st.lanes {
		sl.l.commit(sl.blk, sl.end, memtable)
	}
	for _, h := range st.heads {
		h.l.safeHead = h.head
	}
	for _, sc := range st.cursors {
		e := st.ends[sc.end]
		sc.c.committed = append(sc.c.committed[:0], st.rows[e.key:e.value]...)
	}
	if len(st.lanes) > 0 {
		s.notify()
	}
	clear(st.lanes)
	st.lanes, st.rows, st.ends, st.heads, st.gaps = st.lanes[:0], st.rows[:0], st.ends[:0], st.heads[:0], st.gaps[:0]
	st.cursors = st.cursors[:0]
	if cap(st.chunk) > 4*maxChunk {
		st.chunk = nil
	}
	s.free = append(s.free, st)
}

// notify tells the consumers to look again. The caller holds mu.
func (s *Spool) notify() {
	for _, c := range s.consumers {
		select {
		case c.ready <- struct{}{}:
		default:
		}
	}
}

func (s *Spool) wakeHousekeeping() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Close ends the spool's own goroutine. The store commits what was handed in when it is closed,
// which has to come after.
func (s *Spool) Close() error {
	s.closeOnce.Do(func() {
		close(s.stop)
		s.space.L.Lock()
		s.closing = true
		s.space.Broadcast()
		s.space.L.Unlock()
		s.done.Wait()
	})
	return nil
}
