package clock_test

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const year = 365 * 24 * time.Hour

// machine has clocks that stand still but for the test.
type machine struct {
	mu      sync.Mutex
	elapsed time.Duration
	wall    time.Time
	boot    string
	since   time.Duration
	synced  bool
	asked   int // how often Synced was
}

func newMachine() *machine {
	return &machine{wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), boot: "boot-1", since: time.Hour, synced: true}
}

func (m *machine) source() clock.Source {
	return clock.Source{
		Now:     func() time.Time { m.mu.Lock(); defer m.mu.Unlock(); return m.wall },
		Elapsed: func() time.Duration { m.mu.Lock(); defer m.mu.Unlock(); return m.elapsed },
		Boot:    func() (string, time.Duration) { m.mu.Lock(); defer m.mu.Unlock(); return m.boot, m.since },
		Synced:  func() bool { m.mu.Lock(); defer m.mu.Unlock(); m.asked++; return m.synced },
	}
}

func (m *machine) do(fn func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fn()
}

func (m *machine) advance(d time.Duration) {
	m.do(func() { m.elapsed += d; m.wall = m.wall.Add(d); m.since += d })
}

func (m *machine) set(wall time.Time, synced bool) { m.do(func() { m.wall, m.synced = wall, synced }) }

// reboot is one: the machine is off for d, and its wall clock goes on.
func (m *machine) reboot(d time.Duration) {
	m.do(func() { m.wall = m.wall.Add(d); m.boot += "+"; m.since = 0; m.elapsed = 0 })
}

func newStore(t testing.TB) *kv.Store {
	t.Helper()
	s, err := kv.Open("store", kv.Options{FS: vfs.NewMem(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// open is a start of the gateway.
func open(t testing.TB, s *kv.Store, m *machine) *clock.Clock {
	t.Helper()
	if s != nil {
		if err := s.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	c, err := clock.Open(s, clock.Config{Source: m.source(), Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// aged checks how much time has passed since t by the clock. It may be a few ms short: a start is one at least.
func aged(t *testing.T, c *clock.Clock, since int64, want time.Duration) {
	t.Helper()
	if got := c.Between(since, c.Read().T); got < want.Milliseconds() || got > want.Milliseconds()+5 {
		t.Errorf("%v passed by the clock, %v really", time.Duration(got)*time.Millisecond, want)
	}
}

func TestTheKernelIsAskedOnceASecond(t *testing.T) {
	m := newMachine()
	m.synced = false
	c := open(t, nil, m)
	for range 10 {
		if now := c.Read(); !now.Unsynced || now.Wall != m.wall.UnixMilli() {
			t.Fatalf("read %+v", now)
		}
	}
	if m.asked != 1 {
		t.Errorf("asked %d times in one moment", m.asked)
	}
	m.synced = true
	m.advance(999 * time.Millisecond)
	if !c.Read().Unsynced || m.asked != 1 {
		t.Errorf("after 999 ms: asked %d times", m.asked)
	}
	m.advance(time.Millisecond)
	if c.Read().Unsynced || m.asked != 2 {
		t.Errorf("after 1 s: asked %d times", m.asked)
	}
	m.set(m.wall.Add(-time.Hour), false) // it was set: that is when the answer changes
	if !c.Read().Unsynced || m.asked != 3 {
		t.Errorf("after a step back: asked %d times", m.asked)
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	c, err := clock.Open(nil, clock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(1000, func() { c.Read() }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestBootedMovesOnlyWithTheWallClock: it is what cuts chunks.
func TestBootedMovesOnlyWithTheWallClock(t *testing.T) {
	m := newMachine()
	c := open(t, nil, m)
	at := c.Read()
	if at.Uptime() != time.Hour.Milliseconds() {
		t.Errorf("up for %d ms", at.Uptime())
	}
	for range 100 {
		m.advance(77*time.Second + 333*time.Microsecond) // the milliseconds of the clocks do not turn together
		if now := c.Read(); now.Booted != at.Booted {
			t.Fatalf("the boot moved by %d ms", now.Booted-at.Booted)
		}
	}
	m.do(func() { m.since += year; m.wall = m.wall.Add(year) }) // it slept
	if now := c.Read(); now.Booted != at.Booted {
		t.Fatalf("the boot moved by %d ms over a sleep", now.Booted-at.Booted)
	}
	m.do(func() { m.wall = m.wall.Add(-10 * year) })
	if now := c.Read(); now.Booted != at.Booted-(10*year).Milliseconds() {
		t.Fatalf("the clock went back by ten years, and the boot moved by %v", time.Duration(now.Booted-at.Booted)*time.Millisecond)
	}
}

// TestReadsAroundAJumpAgree: a time from before a jump never comes with a boot from after it.
func TestReadsAroundAJumpAgree(t *testing.T) {
	m := newMachine()
	c := open(t, nil, m)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if now := c.Read(); now.Uptime() != time.Hour.Milliseconds() {
					t.Errorf("up for %d ms: %+v", now.Uptime(), now)
					return
				}
			}
		})
	}
	for i := range 300 {
		m.do(func() { m.wall = m.wall.Add(year * time.Duration(1-2*(i%2))) })
		c.Read()
	}
	close(stop)
	readers.Wait()
}

func TestNoJumpMovesT(t *testing.T) {
	for _, synced := range []bool{true, false} {
		s, m := newStore(t), newMachine()
		m.synced = synced
		c := open(t, s, m)
		c.Look()
		at := c.Read().T
		for _, jump := range []time.Duration{10 * year, -20 * year, 10 * year, time.Minute} {
			m.do(func() { m.wall = m.wall.Add(jump) })
			m.advance(10 * time.Second)
			c.Look()
		}
		aged(t, c, at, 40*time.Second)
		// Nor over a restart of the process, a minute later.
		m.do(func() { m.wall = m.wall.Add(-10 * year) })
		m.advance(time.Minute)
		c = open(t, s, m)
		aged(t, c, at, 100*time.Second)
		c.Look()
		aged(t, c, at, 100*time.Second)
	}
}

// TestBootIn1970 is the box without a battery.
func TestBootIn1970(t *testing.T) {
	s, m := newStore(t), newMachine()
	c := open(t, s, m)
	c.Look()
	before := c.Read().T
	right := m.wall
	m.reboot(0)
	m.set(time.Unix(0, 0), false)
	c = open(t, s, m)
	c.Look()
	after := c.Read()
	aged(t, c, before, 0)
	if got := c.Time(); !got.Truncate(time.Second).Equal(right) {
		t.Errorf("believed %v, when it knew last that it was %v", got, right)
	}
	m.advance(5 * time.Minute)
	aged(t, c, before, 5*time.Minute)
	if _, known := c.Correction(c.Boot(), after.Booted); known {
		t.Error("it knows the time")
	}
	m.set(right.Add(3*year), true)
	credits := c.Look()
	aged(t, c, before, 3*year)         // it was off for all but five minutes
	aged(t, c, after.T, 5*time.Minute) // which does not count for what came since
	if c.Look() != credits || credits == 0 {
		t.Errorf("credited %d times", credits)
	}
	ms, known := c.Correction(c.Boot(), after.Booted)
	if want := right.Add(3*year - 5*time.Minute).UnixMilli(); !known || after.Wall+ms != want {
		t.Errorf("what came first came %v after it really did (%v)", time.Duration(after.Wall+ms-want)*time.Millisecond, known)
	}
	if got := c.Time(); !got.Equal(m.wall) {
		t.Errorf("believed %v, it is %v", got, m.wall)
	}
	// The next boot still knows.
	boot := c.Boot()
	m.reboot(time.Minute)
	m.set(time.Unix(0, 0), false)
	c = open(t, s, m)
	if again, known := c.Correction(boot, after.Booted); !known || again != ms || c.Boot() != boot+1 {
		t.Errorf("after another boot, %d: %d, %v; before %d", c.Boot(), again, known, ms)
	}
}

func TestRebootsWithoutTheTimeAddUp(t *testing.T) {
	s, m := newStore(t), newMachine()
	c := open(t, s, m)
	c.Look()
	at, right := c.Read().T, m.wall
	for range 3 {
		m.advance(time.Minute)
		latest := c.Read().T
		m.reboot(0)
		m.set(time.Unix(0, 0), false)
		c = open(t, s, m)
		c.Saw(latest) // there is some row of then
		c.Look()
	}
	aged(t, c, at, 3*time.Minute)
	m.set(right.Add(20*time.Minute), true)
	c.Look()
	aged(t, c, at, 20*time.Minute)
}

// TestADoubtIsNotBelieved: a clock that is said to be right before and after a jump was wrong once.
func TestADoubtIsNotBelieved(t *testing.T) {
	for _, jump := range []time.Duration{10 * year, -10 * year} {
		s, m := newStore(t), newMachine()
		c := open(t, s, m)
		c.Look()
		at, right := c.Read(), m.wall
		m.do(func() { m.wall = m.wall.Add(jump) })
		if got := c.Time(); !got.Equal(right) {
			t.Errorf("before anybody looked: believed %v, it is %v", got, right)
		}
		c.Look()
		if st := c.State(); !st.Doubt || !st.Synced {
			t.Errorf("state %+v", st)
		}
		if _, known := c.Correction(c.Boot(), at.Booted); known {
			t.Error("one of two right clocks is believed")
		}
		m.advance(9 * time.Minute)
		c.Look()
		if got := c.Time(); !got.Equal(right.Add(9 * time.Minute)) {
			t.Errorf("believed %v, it is %v", got, right.Add(9*time.Minute))
		}
		latest := c.Read().T
		m.reboot(0)
		c = open(t, s, m)
		c.Saw(latest)
		c.Look()
		aged(t, c, at.T, 9*time.Minute)
		m.advance(11 * time.Minute)
		c.Look()
		if got := c.Time(); !got.Equal(m.wall) {
			t.Errorf("believed %v though the clock stands by %v for 20 minutes", got, m.wall)
		}
	}
}

// TestWithoutABootID: each start is a boot.
func TestWithoutABootID(t *testing.T) {
	s, m := newStore(t), newMachine()
	m.boot = ""
	c := open(t, s, m)
	c.Look()
	at := c.Read()
	if at.Uptime() != 1 || c.Boot() != 1 {
		t.Errorf("%+v in boot %d", at, c.Boot())
	}
	m.advance(time.Minute)
	c = open(t, s, m)
	if c.Look(); c.Boot() != 2 {
		t.Errorf("boot %d", c.Boot())
	}
	aged(t, c, at.T, time.Minute) // by the wall clock, which was right
}

func TestSawGoesOnFromTheLatest(t *testing.T) {
	t.Run("the row is lost", func(t *testing.T) {
		s, m := newStore(t), newMachine()
		c := open(t, s, m)
		c.Saw(1_000_000)
		c.Saw(500_000)
		now := c.Read().T
		if now <= 1_000_000 || c.First() <= 1_000_000 {
			t.Errorf("goes on at %d; what is older than %d tells no time", now, c.First())
		}
		c.Look()
		aged(t, c, 1_000_000, 0)
	})
	t.Run("the row is older, and the machine was off", func(t *testing.T) {
		s, m := newStore(t), newMachine()
		c := open(t, s, m)
		c.Look()
		at := c.Read().T
		m.advance(5 * time.Minute) // without a row
		latest := c.Read().T
		m.reboot(time.Hour)
		c = open(t, s, m)
		c.Saw(latest)
		c.Look()
		aged(t, c, at, 65*time.Minute)
		aged(t, c, latest, time.Hour)
	})
	t.Run("nonsense", func(t *testing.T) {
		c := open(t, newStore(t), newMachine())
		before := c.Read().T
		c.Saw(1 << 62)
		c.Saw(-1)
		aged(t, c, before, 0)
	})
}

// oldRow is the row of the clock as format 1 has it, at its place: t is 86401000 in boot "b", 7200 s after that.
const oldRow = "01a7011a05265fe8021b0000019ab697e800036162041a006ddd0005f506821a05265c001b0000019ab697e41807818319138819ea60f4"

func TestTheClockOfFormat1IsTakenOver(t *testing.T) {
	s, m := newStore(t), newMachine()
	row, err := hex.DecodeString(oldRow)
	if err != nil {
		t.Fatal(err)
	}
	place := []byte{kv.PrefixCommand, 0}
	if err := s.ApplyWait([]kv.Op{{Key: place, Value: row}}); err != nil {
		t.Fatal(err)
	}
	m.boot, m.since = "b", 7260*time.Second
	for range 2 {
		c := open(t, s, m)
		aged(t, c, 86_401_000, time.Minute)
		if got := c.Between(4000, 6000); got != 62_000 {
			t.Errorf("its gap is %d ms long", got-2000)
		}
		if got := c.First(); got < 86_461_000 || got > 86_461_005 {
			t.Errorf("chunks tell their time from %d on", got)
		}
	}
	if _, found, err := s.Get(place); found || err != nil {
		t.Errorf("it is still at its old place: %v, %v", found, err)
	}
}

func TestRowsThatCannotBeRead(t *testing.T) {
	for name, value := range map[string]string{"damaged": "\x01\xff", "empty": "", "of no version": "\x00", "impossible": "\x01\xa1\x01\x20"} {
		t.Run(name, func(t *testing.T) {
			s, m := newStore(t), newMachine()
			open(t, s, m)
			if err := s.ApplyWait([]kv.Op{{Key: clock.KeyClock, Value: []byte(value)}, {Key: clock.BootKey(1), Value: []byte(value)}}); err != nil {
				t.Fatal(err)
			}
			c := open(t, s, m)
			if c.Boot() != 2 {
				t.Errorf("boot %d: a number that was given is given again", c.Boot())
			}
			if now := c.Read(); now.T <= 0 {
				t.Errorf("%+v", now)
			}
		})
	}
	t.Run("newer", func(t *testing.T) {
		s, m := newStore(t), newMachine()
		if err := s.ApplyWait([]kv.Op{{Key: clock.KeyClock, Value: []byte{2}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := clock.Open(s, clock.Config{Source: m.source()}); !errors.Is(err, clock.ErrVersion) {
			t.Errorf("opened: %v", err)
		}
	})
}

func TestBootsAreForgotten(t *testing.T) {
	s, m := newStore(t), newMachine()
	open(t, s, m)
	if err := s.ApplyWait([]kv.Op{{Key: clock.BootKey(clock.MaxBoots + 5), Value: []byte("\x01\xa1\x02\x01")}}); err != nil {
		t.Fatal(err)
	}
	c := open(t, s, m)
	left := 0
	if err := s.Scan([]byte("mboot/"), func(_, _ []byte) error { left++; return nil }); err != nil {
		t.Fatal(err)
	}
	if c.Boot() != clock.MaxBoots+6 || left != 2 {
		t.Errorf("boot %d, %d rows", c.Boot(), left)
	}
}

func TestStateTellsSinceWhen(t *testing.T) {
	s, m := newStore(t), newMachine()
	m.synced = false
	c := open(t, s, m)
	c.Look()
	m.advance(time.Minute)
	if st := c.State(); st.Synced || !st.Since.Equal(m.wall.Add(-time.Minute)) {
		t.Errorf("%+v, it is %v", st, m.wall)
	}
	m.set(m.wall.Add(year), true)
	m.advance(time.Second)
	if st := c.State(); !st.Synced || !st.Since.Equal(m.wall) {
		t.Errorf("before anybody looked: %+v, it is %v", st, m.wall)
	}
	c.Look()
	m.advance(time.Hour)
	if st := c.State(); !st.Synced || !st.Since.Equal(m.wall.Add(-time.Hour)) {
		t.Errorf("%+v, it is %v", st, m.wall)
	}
}

func TestRunLooksAndStores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine()
		m.synced = false
		s, err := kv.Open("store", kv.Options{FS: vfs.NewMem(), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		c := open(t, s, m)
		wrong := c.Read()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- c.Run(ctx) }()
		synctest.Wait()
		m.set(m.wall.Add(year), true)
		<-time.After(1500 * time.Millisecond)
		if ms, known := c.Correction(c.Boot(), wrong.Booted); !known || ms != year.Milliseconds() {
			t.Errorf("%d, %v", ms, known)
		}
		m.advance(time.Minute)
		at := c.Read().T
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if err := s.Flush(); err != nil {
			t.Fatal(err)
		}
		m.reboot(0)
		m.set(time.Unix(0, 0), false)
		if now := open(t, s, m).Read().T; now < at || now > at+5 {
			t.Errorf("t was %d at the end of Run, and is %d at the next start", at, now)
		}
	})
}

func TestSystemClocks(t *testing.T) {
	c, err := clock.Open(newStore(t), clock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	c.Look()
	now, really := c.Read(), time.Now()
	if d := really.UnixMilli() - now.Wall; d < 0 || d > 10_000 || now.Uptime() < 1 {
		t.Errorf("%+v, it is %v", now, really)
	}
}

func BenchmarkRead(b *testing.B) {
	c, err := clock.Open(nil, clock.Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		c.Read()
	}
}
