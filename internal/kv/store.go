package kv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// MaxGroupBytes bounds what one commit may carry; with smaller memtables it is a quarter of one. It stays well below
// half a memtable: Pebble would turn a larger batch into a memtable of its own. A writer that finds the open group this
// full waits, so at most three groups (open, being written, being synced) are in memory.
const MaxGroupBytes = 2 << 20

// ErrBusy is returned to a writer that asked not to wait while the open group is full.
var ErrBusy = errors.New("store is busy")

// Participant gathers records of its own in the open group and writes them with it.
// There is one: the spool. Other parts write rows with Apply.
type Participant interface {
	// Seal takes what has gathered since the last Seal, under the store's lock, and returns
	// it; it comes back in Stage and Committed.
	Seal() any
	// Stage writes what Seal returned into w. It runs on the commit goroutine, without the lock.
	Stage(sealed any, w Writer) error
	// Committed is called after the fsync, before the group's Done calls (with
	// Durability Interval: after the fsync that follows them), in the order of the groups.
	Committed(sealed any, memtable uint64)
	// Mark appends what has to be known of what is committed if the end of the log should be lost, in some hundred bytes.
	// It is called after Committed, on its goroutine, and written beside the log, see Store.Marked.
	Mark(dst []byte) []byte
}

// Writer adds rows to the batch that is being committed.
type Writer interface {
	Set(key, value []byte)
	Delete(key []byte)
}

// Store is the gateway's one Pebble store. All methods may be called from many goroutines.
type Store struct {
	db  *pebble.DB
	opt Options
	m   *metrics

	guard     *guard // nil: none
	maxGroup  int
	opening   atomic.Bool
	toldStall atomic.Int64  // when background work was last said to stall, Unix s
	noTable   atomic.Int64  // when a table last found no space, Unix ns
	stalled   atomic.Int64  // since when writers wait for tables, Unix ns; 0: they do not
	excising  atomic.Int64  // since when Excise runs, which may wait for tables, too; 0: it does not
	dead      chan struct{} // closed when the store has failed
	stop      chan struct{} // closed by Close

	mu     sync.Mutex // guards what follows
	turns  turns      // of those who wait for room in the open group
	open   *Group
	spare  *Group // an empty group to open next
	part   Participant
	closed bool
	failed error

	onGroup []func()      // under mu
	wake    chan struct{} // cap 1: the open group has something in it
	sealed  chan *Group   // committer -> completer; unbuffered, so that two commits are under way at most
	done    sync.WaitGroup
	syncNS  atomic.Int64 // moving average of the fsync's time, ns

	damage   []Damage // found when it was opened
	copied   string   // the folder of a copy, to be removed; "": it is the store itself
	suspects suspects
	marks    *marks // nil: none
	manifest manifestWatch

	memtable atomic.Uint64 // number of the mutable memtable
	flushed  atomic.Uint64 // every memtable up to this one is in tables

	closeOnce sync.Once
	closeErr  error
}

// Open opens or makes the store in dir and starts its commit goroutines. Close ends them.
func Open(dir string, o Options) (*Store, error) {
	if o.FS == nil {
		o.FS = vfs.Default
	}
	if o.Log == nil {
		return nil, errors.New("open store: no logger")
	}
	if o.SyncInterval <= 0 {
		o.SyncInterval = 100 * time.Millisecond
	}
	s := &Store{
		opt:    o,
		m:      newMetrics(o.Metrics),
		wake:   make(chan struct{}, 1),
		sealed: make(chan *Group),
		dead:   make(chan struct{}),
		stop:   make(chan struct{}),
	}
	if s.opt.MaxTables == 0 {
		s.opt.MaxTables = 190
	}
	if s.opt.fullWait == 0 {
		s.opt.fullWait = fullWait
	}
	if dir != "" {
		dir = filepath.Clean(dir)
	}
	if o.Guard != nil {
		g, err := newGuard(o.Guard, dir, o.Log)
		if err != nil {
			return nil, fmt.Errorf("open store %q: %w", dir, err)
		}
		s.guard = g
	}
	s.maxGroup = min(MaxGroupBytes, int(s.guard.memTable()/4))
	if err := s.openPebble(dir); err != nil {
		return nil, err
	}
	// What recovery flushed or created does not count: only memtables of this run are told apart.
	s.memtable.Store(1)
	s.flushed.Store(0)
	s.open = s.newGroup()
	s.done.Add(2)
	go s.commitLoop()
	go s.completeLoop()
	if s.guard != nil {
		s.OnLevel(s.wakeWriters)
		s.guard.check()
		s.done.Go(func() { s.guard.run(s.stop) })
	}
	return s, nil
}

// openPebble opens Pebble and checks the format. Pebble does not come back from a write that the disk refuses: then the
// goroutine that opens stays behind, and the process has to end.
func (s *Store) openPebble(dir string) error {
	s.opening.Store(true)
	defer s.opening.Store(false)
	opened := make(chan error, 1)
	go func() {
		db, err := s.openWhole(dir)
		if err != nil {
			opened <- fmt.Errorf("open store %q: %w", dir, err)
			return
		}
		s.db = db
		err = s.checkFormat()
		if err == nil {
			if s.marks, err = openMarks(s.opt.FS, cmp.Or(s.copied, dir), s.opt.Log, &s.manifest, s.opt.Look); err == nil {
				s.damagedMarks()
			}
		}
		if err != nil {
			opened <- errors.Join(err, db.Close())
			return
		}
		opened <- nil
	}()
	select {
	case err := <-opened:
		return err
	case <-s.dead:
		return fmt.Errorf("open store %q: %w", dir, s.failure())
	}
}

// Join makes p take part in every group commit. Call it once, before traffic.
func (s *Store) Join(p Participant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.part != nil {
		panic("kv: a second participant joined the group commit")
	}
	s.marks.write(p.Mark) // nobody else writes it yet
	s.part = p
}

// OnGroup registers fn to run after the Done calls of each group, on their goroutine.
func (s *Store) OnGroup(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onGroup = append(s.onGroup[:len(s.onGroup):len(s.onGroup)], fn) // the completer may hold the old one
}

// Group is the commit that is gathering. Begin hands it out with the store locked; End unlocks.
// In between nothing may block.
type Group struct {
	s       *Store
	batch   *pebble.Batch
	size    int // bytes gathered, the participant's included
	entries int // of Begin
	dones   []completion
	usual   int // decaying maximum of the batch's size
	sealed  any
	empty   bool // nothing to write
	began   time.Time
	// memtable is the one that took the batch: read right after it was applied, by the only writer.
	memtable uint64
}

type completion struct {
	done       Done
	token, seq uint64
}

// Begin locks the store and returns the open group. While the group is full it waits for its turn, or
// returns ErrBusy if it may not. After an error there is nothing to End.
func (s *Store) Begin(mayWait bool) (*Group, error) { return s.begin(mayWait, false, false) }

// BeginFirst is Begin for what must not wait behind a flood: alarms, what frees space, what devices and commands stand on.
func (s *Store) BeginFirst() (*Group, error) { return s.begin(true, true, false) }

// BeginMessage is Begin, or BeginFirst, for what is refused on a full disk: instead of waiting there it returns ErrDiskFull.
func (s *Store) BeginMessage(mayWait, first bool) (*Group, error) {
	return s.begin(mayWait, first && mayWait, true)
}

func (s *Store) begin(mayWait, first, message bool) (*Group, error) {
	var t *turn
	s.mu.Lock()
	for {
		full := s.open.size >= s.maxGroup
		switch {
		case s.failed != nil:
			err := s.failed
			s.mu.Unlock()
			return nil, err
		case s.closed:
			s.mu.Unlock()
			return nil, ErrClosed
		case !full && (t != nil || !mayWait || s.turns.none(first) || s.open.more() > 8*s.turns.waiting()):
			// As long as there is ample room for all who wait, whoever comes meanwhile takes nothing from them.
			s.open.entries++
			return s.open, nil
		case !mayWait:
			s.mu.Unlock()
			return nil, ErrBusy
		case message && s.Level() == LevelFull: // the commit that is under way may wait for space
			s.mu.Unlock()
			return nil, ErrDiskFull
		}
		again := t != nil
		if !again {
			t = &turn{first: first}
		}
		s.turns.wait(t, again)
		s.mu.Unlock()
		<-t.come
		s.mu.Lock()
		s.turns.called--
	}
}

// wakeWriters has those who wait for the open group look again.
func (s *Store) wakeWriters(Level) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turns.call(s.turns.all())
}

// Set adds or replaces a row. key and value are copied.
func (g *Group) Set(key, value []byte) {
	_ = g.batch.Set(key, value, nil) // fails only on a closed batch
	g.size += len(key) + len(value)
}

// Delete removes a row.
func (g *Group) Delete(key []byte) {
	_ = g.batch.Delete(key, nil)
	g.size += len(key)
}

// Ops adds rows in the given order.
func (g *Group) Ops(ops []Op) {
	for i := range ops {
		if ops[i].Delete {
			g.Delete(ops[i].Key)
		} else {
			g.Set(ops[i].Key, ops[i].Value)
		}
	}
}

// Grow counts n bytes that the participant has gathered.
func (g *Group) Grow(n int) { g.size += n }

// Done has d told how the group ended. Calls keep the order in which they were asked for.
func (g *Group) Done(d Done, token, seq uint64) {
	g.dones = append(g.dones, completion{d, token, seq})
}

// End unlocks the store and has the group committed.
func (g *Group) End() {
	s := g.s
	if s.turns.called == 0 && s.turns.all() > 0 && g.size < s.maxGroup {
		s.turns.call(g.more())
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// more is how many writers g has room for, as large as those in it, and at least one.
func (g *Group) more() int { return g.fits(g.s.maxGroup - g.size) }

func (g *Group) fits(bytes int) int { return max(bytes/max(g.size/max(g.entries, 1), 1), 1) }

// Apply hands in rows that are committed together with the next group; done may be nil.
// It waits while too much is under way. An error means that nothing was taken.
func (s *Store) Apply(ops []Op, done Done, token uint64) error {
	g, err := s.BeginFirst()
	if err != nil {
		return err
	}
	g.Ops(ops)
	if done != nil {
		g.Done(done, token, 0)
	}
	g.End()
	return nil
}

// ApplyWait is Apply and waits for the commit.
func (s *Store) ApplyWait(ops []Op) error {
	w := make(waiter, 1)
	if err := s.Apply(ops, w, 0); err != nil {
		return err
	}
	select {
	case err := <-w:
		return err
	case <-s.dead: // the commit may never come back
		return s.failure()
	}
}

// Flush waits until everything handed in before it is committed.
func (s *Store) Flush() error { return s.ApplyWait(nil) }

type waiter chan error

func (w waiter) Done(_, _ uint64, err error) { w <- err }

// Get returns a copy of a committed row's value. A row may be seen shortly before its fsync.
func (s *Store) Get(key []byte) (value []byte, found bool, err error) {
	v, closer, err := s.db.Get(key)
	switch {
	case errors.Is(err, pebble.ErrNotFound):
		return nil, false, nil
	case err != nil:
		return nil, false, s.rowsDamaged(key, fmt.Errorf("get row %x: %w", key, err))
	}
	value = append([]byte{}, v...)
	return value, true, closer.Close()
}

// Scan calls fn for each row whose key starts with prefix, in key order, until fn fails.
// The slices are valid during the call.
func (s *Store) Scan(prefix []byte, fn func(key, value []byte) error) (err error) {
	it, err := s.Iter(prefix, PrefixEnd(prefix))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return s.rowsDamaged(prefix, fmt.Errorf("scan rows %x: %w", prefix, err))
		}
		if err := fn(it.Key(), v); err != nil {
			return err
		}
	}
	if err := it.Error(); err != nil {
		return s.rowsDamaged(prefix, fmt.Errorf("scan rows %x: %w", prefix, err))
	}
	return nil
}

// PrefixEnd returns the first key after all keys that start with prefix.
func PrefixEnd(prefix []byte) []byte {
	end := append([]byte{}, prefix...)
	for i := len(end) - 1; i >= 0; i-- {
		end[i]++
		if end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

// Iter opens an iterator over [start, end). An open iterator keeps deleted tables on disk: close it soon.
func (s *Store) Iter(start, end []byte) (*pebble.Iterator, error) {
	return s.db.NewIter(&pebble.IterOptions{LowerBound: start, UpperBound: end})
}

// Excise removes [start, end) at once and for good: no tombstone, no compaction, and the tables
// that held only such rows leave the disk. It is meant for rows that are in tables already
// (see Memtable); rows in a memtable would force a flush. It is durable when it returns, so
// whatever says that these rows are no longer needed has to be durable before the call.
func (s *Store) Excise(start, end []byte) error {
	if s.opt.Look {
		return nil
	}
	s.excising.Store(time.Now().UnixNano())
	defer s.excising.Store(0)
	err := s.db.Excise(context.Background(), pebble.KeyRange{Start: start, End: end})
	if err != nil {
		return fmt.Errorf("excise rows %x to %x: %w", start, end, err)
	}
	s.m.excises.Inc()
	return nil
}

// Memtable tells which memtable takes writes now (they are numbered from 1 in each run) and up
// to which one all are in tables. Rows of the mutable memtable are the only ones for which a
// delete costs nothing: row and tombstone meet before either is written to a table.
func (s *Store) Memtable() (mutable, flushed uint64) {
	return s.memtable.Load(), s.flushed.Load()
}

// WriteAmplification returns bytes written by Pebble (log, flushes, compactions) since Open.
func (s *Store) WriteAmplification() (wal, flushed, compacted uint64) {
	m := s.db.Metrics()
	for i := range m.Levels {
		flushed += m.Levels[i].TableBytesFlushed
		compacted += m.Levels[i].TableBytesCompacted
	}
	return m.WAL.BytesWritten, flushed, compacted
}

// DiskBytes returns what the store takes on disk.
func (s *Store) DiskBytes() uint64 { return s.db.Metrics().DiskSpaceUsage() }

// commitLoop is the only writer of the store.
func (s *Store) commitLoop() {
	defer s.done.Done()
	defer close(s.sealed)
	var last time.Time // start of the last commit
	for {
		<-s.wake
		if d := s.linger() - time.Since(last); d > 0 {
			time.Sleep(d) //nolint:forbidigo // the pause is the point: it gathers more for one fsync
		}
		last = time.Now()
		g, closing := s.seal()
		if g != nil {
			s.write(g)
		}
		if closing {
			return
		}
	}
}

// linger is the least time between the starts of two commits. A disk that syncs in well under a
// millisecond gets none. On slow flash half a sync's time, 5 ms at most, makes one larger write
// out of two small ones, which costs little latency and halves the wear.
func (s *Store) linger() time.Duration {
	avg := s.SyncTime()
	if avg < time.Millisecond || s.opt.Durability == Interval {
		return 0
	}
	return min(avg/2, 5*time.Millisecond)
}

func (s *Store) seal() (*Group, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.open
	if s.part != nil {
		g.sealed = s.part.Seal()
	}
	if g.size == 0 && len(g.dones) == 0 && g.sealed == nil {
		return nil, s.closed
	}
	next := s.spare
	s.spare = nil
	if next == nil {
		next = s.newGroup()
	}
	s.open = next
	if s.turns.all() > 0 {
		s.turns.call(g.fits(s.maxGroup))
	}
	return g, s.closed
}

func (s *Store) write(g *Group) {
	g.began = time.Now()
	s.guard.beforeCommit()
	err := s.failure()
	if err == nil && g.sealed != nil {
		err = s.part.Stage(g.sealed, writer{g.batch})
	}
	if err == nil {
		if g.batch.Empty() || s.opt.Look {
			// Nothing to store: the group only waits for its place in the order.
			g.empty = true
		} else {
			if s.opt.Durability == Fsync {
				err = s.db.ApplyNoSyncWait(g.batch, pebble.Sync)
			} else {
				err = s.db.Apply(g.batch, pebble.NoSync)
			}
			g.memtable = s.memtable.Load()
		}
	}
	if err != nil {
		s.fail(fmt.Errorf("write group commit: %w", err))
	}
	s.sealed <- g
}

type writer struct{ b *pebble.Batch }

func (w writer) Set(key, value []byte) { _ = w.b.Set(key, value, nil) }
func (w writer) Delete(key []byte)     { _ = w.b.Delete(key, nil) }

// completeLoop waits for each group's fsync and tells those who wait for it, in order.
func (s *Store) completeLoop() {
	defer s.done.Done()
	var (
		unsynced []*Group // Interval: told, not yet synced
		tick     <-chan time.Time
	)
	if s.opt.Durability == Interval {
		t := time.NewTicker(s.opt.SyncInterval)
		defer t.Stop()
		tick = t.C
	}
	syncAll := func() {
		if len(unsynced) == 0 {
			return
		}
		start := time.Now()
		if err := s.db.LogData(nil, pebble.Sync); err != nil {
			s.fail(fmt.Errorf("sync write-ahead log: %w", err))
		}
		s.synced(start)
		for _, g := range unsynced {
			if s.failure() == nil && g.sealed != nil {
				s.part.Committed(g.sealed, g.memtable)
				s.marks.write(s.part.Mark)
			}
			s.recycle(g)
		}
		clear(unsynced)
		unsynced = unsynced[:0]
	}
	for {
		select {
		case <-tick:
			syncAll()
		case g, ok := <-s.sealed:
			if !ok {
				syncAll()
				return
			}
			s.complete(g)
			if s.opt.Durability == Interval {
				unsynced = append(unsynced, g)
			} else {
				s.recycle(g)
			}
		}
	}
}

func (s *Store) complete(g *Group) {
	if !g.empty && s.opt.Durability == Fsync && s.failure() == nil {
		start := time.Now()
		if err := g.batch.SyncWait(); err != nil {
			s.fail(fmt.Errorf("sync group commit: %w", err))
		}
		s.synced(start)
	}
	s.mu.Lock()
	err, after := s.failed, s.onGroup
	s.mu.Unlock()
	s.m.groups.Inc()
	s.m.commit.Observe(time.Since(g.began).Seconds())
	if err == nil && g.sealed != nil && s.opt.Durability == Fsync {
		s.part.Committed(g.sealed, g.memtable)
		s.marks.write(s.part.Mark)
	}
	for i := range g.dones {
		c := &g.dones[i]
		c.done.Done(c.token, c.seq, err)
	}
	for _, fn := range after {
		fn()
	}
}

func (s *Store) synced(start time.Time) {
	took, avg := int64(time.Since(start)), s.syncNS.Load()
	if avg == 0 {
		avg = took
	}
	s.syncNS.Store(avg + (took-avg)/16)
}

// SyncTime is a moving average of how long an fsync takes, 0 before the first.
func (s *Store) SyncTime() time.Duration { return time.Duration(s.syncNS.Load()) }

// recycle keeps a group and its buffers for the next commit but one. usual forgets a burst: buffers
// four times larger than what commits of late needed are let go.
func (s *Store) recycle(g *Group) {
	if s.failure() != nil {
		return // its batch may still be in Pebble's hands
	}
	size := g.batch.Len()
	g.usual = max(size, g.usual-g.usual/64)
	if cap(g.batch.Repr()) > 4*g.usual+64<<10 || cap(g.dones) > 4<<10+g.usual/16 {
		g.batch.Close()
		g = s.newGroup()
	} else {
		g.batch.Reset()
		clear(g.dones)
		g.dones = g.dones[:0]
		g.sealed, g.size, g.entries, g.empty = nil, 0, 0, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spare == nil {
		s.spare = g
		return
	}
	g.batch.Close()
}

// Trim lets go of the buffers that commits keep for the next ones. It is for quiet times.
func (s *Store) Trim() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.failed != nil {
		return
	}
	if s.open.size == 0 && len(s.open.dones) == 0 {
		s.open.batch.Close()
		s.open = s.newGroup()
	}
	if s.spare != nil {
		s.spare.batch.Close()
		s.spare = nil
	}
}

func (s *Store) newGroup() *Group {
	return &Group{s: s, batch: s.db.NewBatch(pebble.WithMaxRetainedSizeBytes(2 * MaxGroupBytes))}
}

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// fail ends the store: a failed write or sync is never tried again and never acknowledged over,
// because nobody knows what the disk has kept (the kernel drops the error with the page).
func (s *Store) fail(err error) {
	s.mu.Lock()
	first := s.failed == nil
	if first {
		s.failed = err
		close(s.dead)
	}
	s.turns.call(s.turns.all())
	s.mu.Unlock()
	if first {
		s.opt.Log.Error("store failed", "err", err)
		if s.opt.Fatal != nil {
			s.opt.Fatal(err)
		}
	}
}

// closeWait is how long Close waits before it looks whether that has an end.
const closeWait = time.Second

// hang is where calls of Pebble end whose failure must not reach it.
func (s *Store) hang() { select {} }

// Close commits what was handed in, ends the goroutines and closes Pebble. Later calls return
// what the first returned. After a failure it leaves Pebble open: the process has to end, and
// the next start recovers.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.turns.call(s.turns.all())
		s.mu.Unlock()
		select {
		case s.wake <- struct{}{}:
		default:
		}
		close(s.stop)
		ended := make(chan struct{})
		go func() {
			s.done.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-s.dead: // a commit may never come back
		}
		if s.closeErr = s.failure(); s.closeErr != nil {
			return
		}
		s.open.batch.Close()
		defer func() { s.closeErr = errors.Join(s.closeErr, s.marks.close(), s.removeCopy()) }()
		closed := make(chan error, 1)
		go func() { closed <- s.db.Close() }()
		for {
			select {
			case s.closeErr = <-closed:
				return
			case <-s.dead:
				s.closeErr = s.failure()
				return
			case <-time.After(closeWait):
			}
			if s.tableRefused() {
				// Pebble waits for a flush that cannot be done. All of it is in the log.
				s.opt.Log.Warn("disk has no space for the store's tables: the next start reads its log instead")
				return
			}
		}
	})
	return s.closeErr
}
