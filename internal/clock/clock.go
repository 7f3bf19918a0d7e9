package clock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/kv"
)

// Source is where time comes from; nil functions are the system's.
type Source struct {
	Now func() time.Time // wall clock
	// Elapsed is the time since some moment of this process, whatever happens to the wall clock.
	Elapsed func() time.Duration
	// Boot gives the id of this boot of the machine and the time since it, which counts while the machine sleeps.
	// "": not known.
	Boot func() (id string, since time.Duration)
	// Synced says whether the wall clock is known to be right.
	Synced func() bool
}

// Config of a Clock.
type Config struct {
	Source Source
	Log    *slog.Logger // nil: none
}

// Moment is one look at the clocks.
type Moment struct {
	T        int64 // the service clock, ms
	Wall     int64 // the machine's clock, Unix ms
	Booted   int64 // when the machine booted, by Wall: it changes when Wall jumps, and else not
	Unsynced bool  // nobody vouches for Wall
}

// Uptime is the time since the machine booted, in ms, at least 1.
func (m Moment) Uptime() int64 { return max(m.Wall-m.Booted, 1) }

// Clock is the one clock of a gateway. All methods may be called from many goroutines.
type Clock struct {
	store *kv.Store
	log   *slog.Logger
	src   source

	elapsed0 time.Duration // src.read at base
	base     atomic.Int64
	gaps     atomic.Pointer[[]gap] // oldest first; the slice is not changed any more
	stamp    atomic.Pointer[stamp]
	asking   sync.Mutex // who changes stamp
	looking  sync.Mutex // one Look at a time; held while its rows are handed in, which may wait

	mu       sync.Mutex // guards what follows
	boot     uint32     // number of this boot; written by Open only
	bootID   string
	boot0    time.Duration // since boot, at elapsed0
	boots    map[uint32]bootRow
	sleptMS  int64 // that base has in it
	offset   int64 // wall - t, when last looked at
	looked   bool  // Look was called
	synced   bool
	since    int64 // t at which synced became what it is
	anchor   pair  // when the wall clock was last known to be right
	believed pair  // the same, but a doubt leaves it
	doubt    int64 // until this t it is not, whatever Synced says
	first    int64 // t from which on chunks tell their time
	written  int64 // t of the last row
	credits  uint64
	opened   opening
}

// opening is what Saw has to set right.
type opening struct {
	any   bool  // something was there before
	gap   bool  // the open gap was made by Open
	t     int64 // of Open
	first bool  // first was set by Open
}

// stamp is what the kernel said last.
type stamp struct {
	off      int64 // wall - elapsed, ms
	booted   int64
	unsynced bool
	asked    time.Duration
}

const (
	start    = 1000                  // t of the very first moment: 0 stays "never"
	jitter   = 5                     // ms that two readings of two clocks may differ by
	maxReads = 100                   // until a reading is taken although the clock jumped meanwhile, again and again
	askEvery = time.Second           // how long the kernel's word is believed
	jump     = 2000                  // ms by which wall and t may drift apart between two looks
	doubtful = 10 * 60 * 1000        // ms without a jump until a clock that jumped is believed again
	rewrite  = 10 * 60 * 1000        // ms after which the row is written again
	keep     = 400 * 86400000        // ms for which a gap is kept
	maxGaps  = 256                   // that are kept apart; the oldest are merged
	maxBoots = 4096                  // that are remembered
	limit    = 1000 * 366 * 86400000 // ms; no row has a time beyond it
)

var discard = slog.New(slog.DiscardHandler)

// Open makes the clock of a store go on, and stores that it did. A store has one Clock at a time. Without a store (nil) the clock
// begins anew each time.
func Open(store *kv.Store, cfg Config) (*Clock, error) {
	c := &Clock{store: store, log: cfg.Log, src: cfg.Source.reader()}
	if c.log == nil {
		c.log = discard
	}
	ops, err := c.load()
	if err != nil {
		return nil, fmt.Errorf("open clock: %w", err)
	}
	if store == nil {
		return c, nil
	}
	if err := store.ApplyWait(ops); err != nil {
		return nil, fmt.Errorf("open clock: %w", err)
	}
	return c, nil
}

// Read looks at the clocks. It costs little more than time.Now, asks the kernel once a second at most, and never waits for the
// store.
func (c *Clock) Read() Moment {
	for try := 0; ; try++ {
		wall, elapsed := c.src.read()
		s := c.stamp.Load()
		if d := wall - elapsed.Milliseconds() - s.off; try == maxReads || d <= jitter && d >= -jitter && elapsed-s.asked < askEvery {
			return Moment{T: c.base.Load() + (elapsed - c.elapsed0).Milliseconds(), Wall: wall, Booted: s.booted, Unsynced: s.unsynced}
		}
		c.ask(s) // a reading from before a jump must not meet a stamp from after it, so read again
	}
}

// ask asks the kernel, unless somebody else did so since old.
func (c *Clock) ask(old *stamp) {
	c.asking.Lock()
	defer c.asking.Unlock()
	if s := c.stamp.Load(); s != old {
		return
	}
	s := c.kernel()
	if old != nil {
		if d := s.off - old.off; d <= jitter && d >= -jitter {
			s.off = old.off
		}
		if d := s.booted - old.booted; d <= jitter && d >= -jitter {
			s.booted = old.booted
		}
	}
	c.stamp.Store(s)
}

// kernel reads all clocks at one moment, as far as that can be had.
func (c *Clock) kernel() *stamp {
	unsynced := !c.src.synced()
	for try := 0; ; try++ {
		id, since := c.src.boot()
		wall, elapsed := c.src.read()
		if id == "" {
			since = elapsed - c.elapsed0
		} else if _, after := c.src.boot(); after-since > 2*time.Millisecond && try < 3 {
			continue // something came between
		}
		return &stamp{off: wall - elapsed.Milliseconds(), booted: wall - since.Milliseconds(), unsynced: unsynced, asked: elapsed}
	}
}

// Boot is the number of this boot of the machine in this store, from 1. Where the system tells boots not apart, each Open counts as
// one.
func (c *Clock) Boot() uint32 { return c.boot }

// Run looks at the clocks each second until ctx ends.
func (c *Clock) Run(ctx context.Context) error {
	c.Look()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			c.mu.Lock()
			op := c.row()
			c.mu.Unlock()
			c.save(op)
			return nil
		case <-tick.C:
			c.Look()
		}
	}
}

// save hands rows in. Nobody waits for them: what is lost is looked up again.
func (c *Clock) save(ops ...kv.Op) {
	if c.store == nil {
		return
	}
	if err := c.store.Apply(ops, nil, 0); err != nil && !errors.Is(err, kv.ErrClosed) {
		c.log.Debug("clock not stored: the store takes nothing", "err", err)
	}
}

// State is what a gateway tells of its clock.
type State struct {
	Synced bool
	Since  time.Time // from when on it is so, by the wall clock as it is now
	Boot   uint32
	Doubt  bool // it jumped while it was vouched for, and is not believed for a while
	Wall   time.Time
	// Settled: the last look has found it as it is now. Else it was set a moment ago.
	Settled bool
}

// State says what is known of the wall clock now.
func (c *Clock) State() State {
	m := c.Read()
	c.mu.Lock()
	defer c.mu.Unlock()
	st := State{Synced: !m.Unsynced, Boot: c.boot, Doubt: c.synced && m.T < c.doubt, Since: time.UnixMilli(m.Wall), Wall: time.UnixMilli(m.Wall)}
	st.Settled = st.Synced == c.synced && !c.jumped(m)
	if st.Synced == c.synced {
		st.Since = time.UnixMilli(m.Wall - c.between(c.since, m.T))
	}
	return st
}

// Time is the wall time as far as it can be believed: the machine's if it is vouched for, else what was last known to be right and
// the time that has passed since; the machine's again if there never was a right one. What ends at a
// date that people gave (certificates, tokens) is held against it.
func (c *Clock) Time() time.Time {
	m := c.Read()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.believed.T == 0 || !m.Unsynced && c.synced && m.T >= c.doubt && !c.jumped(m) {
		return time.UnixMilli(m.Wall)
	}
	return time.UnixMilli(c.believed.Wall + c.between(c.believed.T, m.T))
}

// Correction says what has to be added to a wall time that was read in a boot of the machine when Booted was booted, so
// that it is right. known is false as long as nobody vouches for a clock of that boot.
func (c *Clock) Correction(boot uint32, booted int64) (ms int64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if boot == c.boot && c.now().T < c.doubt {
		return 0, false
	}
	b := c.boots[boot]
	return b.Booted - booted, b.Known
}
