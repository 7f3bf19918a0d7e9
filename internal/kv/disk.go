package kv

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// How a full disk stays usable. The reserve is what only deletes, acknowledgements, cursors and command
// states may use. One half of it is kept as free space: messages are refused before it is touched, and
// what the store still owes for those it has taken (memtables to be flushed, logs to be made) fits in.
// The other half, but no more than ballastMax, is a file of allocated blocks, the ballast. It stands against everybody else who writes
// to this file system: when a write of the store finds no space, a quarter of the ballast is given up and
// the write is done again. It is taken back when there is room.

// Level says how full the disk is.
type Level int32

// The levels. Each is left at a higher mark than it is entered.
const (
	LevelOK   Level = iota
	LevelHigh       // less than twice the reserve is free: QoS 0 is shed, MQTT 3.1.1 publishers are slowed
	LevelFull       // less than the reserve is free: what would take space is refused
)

var levelNames = [...]string{"ok", "high", "full"}

// String gives the level's name: "high".
func (l Level) String() string { return levelNames[l] }

// MarshalText implements encoding.TextMarshaler.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// ErrDiskFull is returned for what is not taken at LevelFull, and when the store cannot be opened for want of space.
var ErrDiskFull = errors.New("disk reserve is reached")

// Usage is what a file system has.
type Usage struct {
	Free, Total uint64 // bytes; Free is what this user can write
	NoFiles     bool   // there is no room for more files, whatever Free says
}

// Guard is how the store watches the disk. The zero value keeps the default reserve without a ballast.
type Guard struct {
	Reserve int64  // bytes; 0: see Reserve
	Ballast string // the file that holds one half of it; "": none
	// Look is for tools: nothing is refused and no ballast made, but one that is there is used.
	Look  bool
	Usage func() (Usage, error) // nil: of the store's folder
}

// Reserve gives the reserve that holds on a file system of total bytes where so much is wanted. Nothing
// wanted (0) is 64 MiB or 1 % of it, whichever is larger, but no more than an eighth; more than a half is never held.
func Reserve(want int64, total uint64) int64 {
	if total == 0 {
		total = 1 << 40
	}
	if want <= 0 {
		want = int64(min(max(64<<20, total/100), total/8))
	}
	return min(want, int64(total/2))
}

// DiskState is how the disk is.
type DiskState struct {
	Level   Level
	Since   time.Time // of the level
	Free    uint64    // bytes free for this user, as they were at the last look; the ballast is not among them
	Total   uint64    // bytes of the file system; 0: not known
	Reserve int64     // bytes
	Ballast int64     // bytes of the reserve that the ballast holds now
	Resume  int64     // bytes that have to become free before LevelFull is left; 0: it is not full, or for a moment only
}

// ballastMax is as much as the store may need to get its memtables into tables, at the start and at work.
const ballastMax = 4 * memTableMax

// lookBytes is how much the store writes between two looks at the disk; there is one each second, too. The look comes before
// the next commit, not beside it, so that whoever fills the disk through here never gets further than that.
const lookBytes = 1 << 20

// guard watches the disk. Nil watches nothing.
type guard struct {
	log     *slog.Logger
	usage   func() (Usage, error)
	reserve int64
	look    bool
	ballast *ballast // nil: none
	level   atomic.Int32
	written atomic.Int64 // since the last look before a commit
	refused atomic.Int64 // when a write last found no space, Unix ns
	wake    chan struct{}

	mu      sync.Mutex // one look at a time; guards what follows
	last    Usage
	since   time.Time
	onLevel []func(Level)
}

func newGuard(o *Guard, dir string, log *slog.Logger) (*guard, error) {
	g := &guard{log: log, usage: o.Usage, look: o.Look, wake: make(chan struct{}, 1), since: time.Now()}
	if g.usage == nil {
		if _, err := os.Stat(dir); err != nil {
			dir = filepath.Dir(dir) // it is made later
		}
		g.usage = func() (Usage, error) { return usage(dir) }
	}
	u, err := g.usage()
	if err != nil {
		return nil, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	g.last = u
	g.reserve = Reserve(o.Reserve, u.Total)
	if o.Reserve > g.reserve {
		log.Warn("disk reserve is more than a half of the file system: it is cut to that", "reserve_bytes", g.reserve, "total_bytes", u.Total)
	}
	if o.Ballast != "" {
		g.ballast = openBallast(o.Ballast)
	}
	return g, nil
}

// memTable is the size of memtables that suits the reserve: three of them to be flushed, and two logs
// to be made, fit into each half of it, more or less.
func (g *guard) memTable() uint64 {
	if g == nil {
		return memTableMax
	}
	size := uint64(memTableMax)
	for size > memTableMin && int64(size) > g.reserve/8 {
		size /= 2
	}
	return size
}

// wrote counts bytes written by the store.
func (g *guard) wrote(n int) {
	if g != nil {
		g.written.Add(int64(n))
	}
}

// beforeCommit looks at the disk if enough was written since the last time.
func (g *guard) beforeCommit() {
	if g == nil || g.written.Load() < lookBytes {
		return
	}
	g.written.Store(0)
	was := Level(g.level.Load())
	if g.check().Level != was {
		g.poke() // who tells of it has the time
	}
}

// poke asks for a look at the disk.
func (g *guard) poke() {
	if g == nil {
		return
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// noSpace is told that a write found no space. It gives up a part of the ballast, and says whether there was one.
func (g *guard) noSpace() (again bool) {
	if g == nil {
		return false
	}
	g.refused.Store(time.Now().UnixNano())
	if !g.look {
		g.level.Store(int32(LevelFull))
	}
	freed := g.ballast.release()
	g.poke()
	return freed
}

// afterRefusal is how long the level stays full after a write found no space, whatever the file system says of itself.
const afterRefusal = 2 * time.Second

// takeBallast takes it, or back what was given up of it, if there is room.
func (g *guard) takeBallast() {
	size := min(g.reserve/2, ballastMax)
	if g.ballast == nil || g.look || Level(g.level.Load()) == LevelFull || g.ballast.size() >= size {
		return
	}
	if err := g.ballast.take(size); err != nil {
		g.log.Debug("disk reserve cannot be taken yet", "err", err)
	}
}

// check looks at the disk and sets the level.
func (g *guard) check() DiskState {
	g.mu.Lock()
	defer g.mu.Unlock()
	u, err := g.usage()
	if err != nil {
		return g.stateLocked() // the file system has worse problems
	}
	g.last = u
	free := int64(min(u.Free, 1<<62))
	if u.NoFiles {
		free = 0
	}
	r, avail := g.reserve, free+g.ballast.size()
	now := time.Now()
	was := Level(g.level.Load())
	is := LevelOK
	switch {
	case avail < r, was == LevelFull && avail < r+r/4, now.UnixNano()-g.refused.Load() < int64(afterRefusal):
		is = LevelFull
	case avail < 2*r, was >= LevelHigh && avail < 2*r+r/4:
		is = LevelHigh
	}
	if g.look {
		return g.stateLocked()
	}
	g.level.Store(int32(is))
	return g.stateLocked()
}

// tell logs a level that is new, and tells it to who wants to know.
func (g *guard) tell(told Level) Level {
	d := g.check()
	g.takeBallast()
	if d.Level == told {
		return told
	}
	g.mu.Lock()
	g.since = time.Now()
	fns := g.onLevel
	g.mu.Unlock()
	facts := []any{"was", told.String(), "free_bytes", d.Free, "reserve_bytes", d.Reserve, "ballast_bytes", d.Ballast}
	switch {
	case d.Level == LevelFull:
		g.log.Error("disk is full: messages are refused, or the oldest dropped, as their lane says; what is stored is still sent", facts...)
	case d.Level == LevelHigh && told == LevelFull:
		g.log.Warn("disk has room again: messages are taken", facts...)
	case d.Level == LevelHigh:
		g.log.Warn("disk is nearly full: QoS 0 is shed, MQTT 3.1.1 publishers are slowed", facts...)
	default:
		g.log.Info("disk has enough room again", facts...)
	}
	for _, fn := range fns {
		fn(d.Level)
	}
	return d.Level
}

// run looks at the disk until stop is closed.
func (g *guard) run(stop <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	told := LevelOK
	for {
		told = g.tell(told)
		select {
		case <-stop:
			return
		case <-g.wake:
		case <-tick.C:
		}
	}
}

func (g *guard) stateLocked() DiskState {
	d := DiskState{
		Level: Level(g.level.Load()), Since: g.since, Free: g.last.Free, Total: g.last.Total, Reserve: g.reserve, Ballast: g.ballast.size(),
	}
	if d.Level == LevelFull {
		d.Resume = max(d.Reserve+d.Reserve/4-d.Ballast-int64(min(d.Free, 1<<62)), 0)
	}
	return d
}

// MemTableSize is about how much one table takes at most, bytes.
func (s *Store) MemTableSize() uint64 { return s.guard.memTable() }

// Level says how full the disk is: an atomic load.
func (s *Store) Level() Level {
	if s.guard == nil {
		return LevelOK
	}
	return Level(s.guard.level.Load())
}

// Disk tells how the disk was at the last look.
func (s *Store) Disk() DiskState {
	if s.guard == nil {
		return DiskState{}
	}
	s.guard.mu.Lock()
	defer s.guard.mu.Unlock()
	return s.guard.stateLocked()
}

// DiskUsage tells what the file system of a folder has.
func DiskUsage(dir string) (Usage, error) { return usage(dir) }

// CheckDisk looks at the disk now.
func (s *Store) CheckDisk() DiskState {
	if s.guard == nil {
		return DiskState{}
	}
	defer s.guard.poke() // a new level is told by the goroutine that does that
	return s.guard.check()
}

// OnLevel registers fn to be called when the level has changed. It must not block.
func (s *Store) OnLevel(fn func(Level)) {
	if s.guard == nil {
		return
	}
	s.guard.mu.Lock()
	defer s.guard.mu.Unlock()
	s.guard.onLevel = append(s.guard.onLevel[:len(s.guard.onLevel):len(s.guard.onLevel)], fn)
}

// WaitRemoved waits until tables that nobody needs any more have left the disk, for a second at most, or until stop is
// closed. Those that a running compaction reads are waited for, those that an open iterator holds are not.
func (s *Store) WaitRemoved(stop <-chan struct{}) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		m := s.db.Metrics()
		if m.Table.ObsoleteCount == 0 && (m.Table.ZombieCount == 0 || m.Compact.NumInProgress == 0) {
			break
		}
		select {
		case <-tick.C:
		case <-stop:
			return ErrClosed
		case <-s.dead:
			return s.failure()
		}
	}
	return nil
}

// isFull says whether err is about missing space.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
