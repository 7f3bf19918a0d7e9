package spool_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/spool"
)

const year = 365 * 24 * time.Hour

// held is a machine whose clocks stand still but for the test.
type held struct {
	mu      sync.Mutex
	elapsed time.Duration
	wall    time.Time
	boot    string
	since   time.Duration
	synced  bool
}

func newHeld() *held {
	return &held{wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), boot: "boot-1", since: time.Hour, synced: true}
}

func (h *held) source() clock.Source {
	return clock.Source{
		Now:     func() time.Time { h.mu.Lock(); defer h.mu.Unlock(); return h.wall },
		Elapsed: func() time.Duration { h.mu.Lock(); defer h.mu.Unlock(); return h.elapsed },
		Boot:    func() (string, time.Duration) { h.mu.Lock(); defer h.mu.Unlock(); return h.boot, h.since },
		Synced:  func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.synced },
	}
}

// advance lets time pass.
func (h *held) advance(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.elapsed += d
	h.wall = h.wall.Add(d)
	h.since += d
}

// set sets the wall clock, and whether the kernel vouches for it.
func (h *held) set(wall time.Time, synced bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall, h.synced = wall, synced
}

// reboot is one: the machine is off for d, and its wall clock goes on.
func (h *held) reboot(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall = h.wall.Add(d)
	h.boot += "+"
	h.since = 0
}

func (h *held) now() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wall
}

// putNow appends records as an intake does, and waits for their commit.
func (r *rig) putNow(lane string, from, to int) {
	r.t.Helper()
	for i := from; i < to; i++ {
		m, now := rec(i), r.clk.Read()
		m.Received, m.Uptime = now.Wall, now.Uptime()
		if now.Unsynced {
			m.Flags |= spool.FlagClockUnsynced
		}
		if err := r.Append(r.lane(lane), m, nil, nil, 0, false); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := r.store.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

// expired applies the limits and tells how many messages are too old.
func (r *rig) expired() uint64 {
	r.t.Helper()
	if err := r.Limit(); err != nil {
		r.t.Fatal(err)
	}
	return r.account("cloud", "telemetry").Expired.Messages
}

func (r *rig) wantExpired(want uint64, when string) {
	r.t.Helper()
	if got := r.expired(); got != want {
		r.t.Errorf("%s: %d expired, want %d", when, got, want)
	}
}

// aging is a lane that keeps messages for an hour, for one upstream.
func aging() spool.Config {
	cfg := lanes("telemetry")
	cfg.Lanes[0].MaxAge = time.Hour
	cfg.Upstreams = map[string][]string{"cloud": nil}
	return cfg
}

func TestNoJumpMakesMessagesOld(t *testing.T) {
	for name, jump := range map[string]time.Duration{"ahead": 10 * year, "back": -10 * year} {
		for _, synced := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, synced=%v", name, synced), func(t *testing.T) {
				fs, h := vfs.NewMem(), newHeld()
				h.set(h.now(), synced)
				r := openHeld(t, kv.Options{FS: fs}, h, aging())
				r.putNow("telemetry", 0, 10)
				h.set(h.now().Add(jump), synced)
				r.putNow("telemetry", 10, 20)
				r.wantExpired(0, "after the jump")
				h.advance(20 * time.Minute)
				r.clk.Look()
				r.wantExpired(0, "20 minutes later")
				r.close()
				h.advance(20 * time.Minute)
				h.set(h.now().Add(-2*jump), synced)
				r = openHeld(t, kv.Options{FS: fs}, h, aging())
				r.clk.Look()
				r.wantExpired(0, "after a restart, and the other way")
				r.putNow("telemetry", 20, 30)
				h.advance(20 * time.Minute)
				r.wantExpired(0, "an hour after the first")
				h.advance(time.Millisecond * 10)
				r.wantExpired(20, "after more than an hour")
				h.advance(time.Hour)
				r.wantExpired(30, "at the end")
				r.verify()
			})
		}
	}
}

// TestRetentionOfABoxThatBootsIn1970: what waits is not thrown away when its clock stands at 1970, nor when it is set right, nor is it
// kept for ever.
func TestRetentionOfABoxThatBootsIn1970(t *testing.T) {
	fs, h := vfs.NewMem(), newHeld()
	r := openHeld(t, kv.Options{FS: fs}, h, aging())
	r.clk.Look()
	r.putNow("telemetry", 0, 10)
	r.close()
	right := h.now()
	h.reboot(0)
	h.set(time.Unix(0, 0), false)
	r = openHeld(t, kv.Options{FS: fs}, h, aging())
	r.clk.Look()
	r.putNow("telemetry", 10, 20)
	r.wantExpired(0, "in 1970")
	h.advance(10 * time.Minute)
	r.putNow("telemetry", 20, 30)
	h.set(right.Add(40*time.Minute), true) // it was off for half an hour
	r.clk.Look()
	r.putNow("telemetry", 30, 40)
	r.wantExpired(0, "when the clock is right")
	h.advance(20*time.Minute + 10*time.Millisecond)
	r.wantExpired(10, "an hour after the first")
	h.advance(30 * time.Minute)
	r.wantExpired(20, "an hour after those of 1970")
	h.advance(10 * time.Minute)
	r.wantExpired(40, "an hour after the last")
}

// TestRetentionWithoutEverKnowingTheTime: the time that it runs counts.
func TestRetentionWithoutEverKnowingTheTime(t *testing.T) {
	fs, h := vfs.NewMem(), newHeld()
	for range 3 {
		h.set(time.Unix(0, 0), false)
		r := openHeld(t, kv.Options{FS: fs}, h, aging())
		r.clk.Look()
		r.putNow("telemetry", 0, 10)
		h.advance(19 * time.Minute)
		r.wantExpired(0, "while it ran for less than an hour")
		r.putNow("telemetry", 0, 1) // so that there is a row of now
		r.close()
		h.reboot(year)
	}
	r := openHeld(t, kv.Options{FS: fs}, h, aging())
	r.clk.Look()
	r.wantExpired(0, "after it ran for 57 minutes")
	h.advance(4 * time.Minute)
	r.wantExpired(10, "after it ran for 61 minutes")
}

// TestChunksTellTheirTime: what was received by a wrong clock can be put right, in this boot and in the next, from memory and from disk.
func TestChunksTellTheirTime(t *testing.T) {
	fs, h := vfs.NewMem(), newHeld()
	right := h.now()
	h.set(time.Unix(0, 0), false)
	r := openHeld(t, kv.Options{FS: fs}, h, aging())
	r.clk.Look()
	r.putNow("telemetry", 0, 10)
	h.advance(time.Minute)
	h.set(time.Unix(0, 0).Add(year), false) // somebody has set it, wrongly
	r.putNow("telemetry", 10, 20)
	h.advance(time.Minute)
	runs := func(r *rig) (all []spool.Run) {
		t.Helper()
		rd, c := r.reader("cloud", "telemetry")
		defer c.Close()
		for {
			run, err := rd.Next(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			if run.Count == 0 {
				return all
			}
			run.Raw = bytes.Clone(run.Raw)
			all = append(all, run)
		}
	}
	check := func(r *rig, when string, known bool) {
		t.Helper()
		n := 0
		for _, run := range runs(r) {
			ms, ok := run.Times.Correction()
			for raw := run.Raw; len(raw) > 0; n++ {
				var m spool.Record
				size, err := spool.ParseRecord(raw, &m)
				if err != nil {
					t.Fatal(err)
				}
				raw = raw[size:]
				want := right.Add(time.Minute * time.Duration(n/10))
				if got := time.UnixMilli(m.Received + ms).UTC(); ok != known || known && !got.Equal(want) {
					t.Errorf("%s: message %d came at %v, really at %v (known: %v)", when, n, got, want, ok)
				}
				if got := run.Times.Age(m.Received, 0); known && got < 0 || got > time.Hour.Milliseconds() {
					t.Errorf("%s: message %d is %d ms old", when, n, got)
				}
			}
		}
		if n != 20 {
			t.Errorf("%s: %d messages", when, n)
		}
		if !known {
			return
		}
		err := r.Peek("telemetry", 1, 100, func(seq uint64, m *spool.Record) error {
			if want := right.Add(time.Minute * time.Duration((seq-1)/10)); m.Received != want.UnixMilli() || m.Flags&spool.FlagClockUnsynced != 0 {
				t.Errorf("%s: peeked at message %d of %d, flags %x", when, seq, m.Received, m.Flags)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	check(r, "by the wrong clock", false)
	h.set(right.Add(2*time.Minute), true)
	r.clk.Look()
	check(r, "from memory", true)
	r.close()
	r = openHeld(t, kv.Options{FS: fs}, h, aging())
	check(r, "from disk", true)
	r.close()
	h.reboot(time.Minute)
	h.set(time.Unix(0, 0), false)
	r = openHeld(t, kv.Options{FS: fs}, h, aging())
	check(r, "in the next boot", true)
}

// TestAChunkEndsWhereTheClockJumps even within one commit, so that one header speaks for all of its records.
func TestAChunkEndsWhereTheClockJumps(t *testing.T) {
	h := newHeld()
	r := openHeld(t, kv.Options{FS: vfs.NewMem()}, h, aging())
	rd, _ := r.reader("cloud", "telemetry")
	var rs []spool.Record
	for i := range 40 {
		m, now := rec(i), r.clk.Read()
		m.Received, m.Uptime = now.Wall, now.Uptime()
		if i%10 == 9 {
			m.Received += year.Milliseconds() * int64(i)
		}
		if i == 35 {
			m.Uptime = 0
		}
		rs = append(rs, *m)
	}
	if err := r.AppendAll(r.lane("telemetry"), rs, nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	var counts []int
	for {
		run, err := rd.Next(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if run.Count == 0 {
			break
		}
		counts = append(counts, run.Count)
	}
	if diff := cmp.Diff([]int{9, 1, 9, 1, 9, 1, 5, 1, 3, 1}, counts); diff != "" {
		t.Error(diff)
	}
	r.verify()
}

// format1 is a store as version 1 left it: 60 messages, the last 20 by a clock that was not synchronised, and a command.
func format1(t *testing.T) vfs.FS {
	t.Helper()
	f, err := os.Open("testdata/format1.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	fs := vfs.NewMem()
	if err := fs.MkdirAll("data", 0o700); err != nil {
		t.Fatal(err)
	}
	for tr := tar.NewReader(z); ; {
		head, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return fs
		}
		if err != nil {
			t.Fatal(err)
		}
		if head.Typeflag != tar.TypeReg {
			continue
		}
		w, err := fs.Create("data/"+path.Base(head.Name), vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, tr); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Sync(), w.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAStoreOfFormat1GoesOn(t *testing.T) {
	fs, h := format1(t), newHeld()
	h.set(h.now().Add(20*year), true) // whatever the clock says now: these messages never said how old they are
	for range 2 {
		r := openHeld(t, kv.Options{FS: fs}, h, aging())
		r.clk.Look()
		r.wantExpired(0, "on opening")
		rd, _ := r.reader("cloud", "telemetry")
		n := 0
		for {
			run, err := rd.Next(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			if run.Count == 0 {
				break
			}
			if _, known := run.Times.Correction(); known {
				t.Error("their clock is known")
			}
			for raw := run.Raw; len(raw) > 0; n++ {
				var got spool.Record
				size, err := spool.ParseRecord(raw, &got)
				if err != nil {
					t.Fatal(err)
				}
				want := rec(n)
				if n >= 40 {
					want.Received, want.Flags = int64(20_000+n), want.Flags|spool.FlagClockUnsynced
				}
				if diff := cmp.Diff(*want, got); diff != "" {
					t.Fatalf("message %d: %s", n, diff)
				}
				raw = raw[size:]
			}
		}
		if n != 60 {
			t.Errorf("%d messages", n)
		}
		r.verify()
		if v, found, err := r.store.Get([]byte("mformat")); err != nil || !found || !bytes.Equal(v, []byte{0, 0, 0, kv.FormatVersion}) {
			t.Errorf("format %x, %v", v, err)
		}
		r.close()
	}
	r := openHeld(t, kv.Options{FS: fs}, h, aging())
	r.putNow("telemetry", 60, 70)
	h.advance(time.Hour + 10*time.Millisecond)
	r.wantExpired(70, "an hour after this version first saw them")
}

// TestALostClockRowEndsNothing: the chunks tell how late it was.
func TestALostClockRowEndsNothing(t *testing.T) {
	fs, h := vfs.NewMem(), newHeld()
	r := openHeld(t, kv.Options{FS: fs}, h, aging())
	h.advance(1000 * time.Hour)
	r.putNow("telemetry", 0, 10)
	at := r.clk.Read().T
	if err := r.store.ApplyWait([]kv.Op{{Key: []byte("mclock"), Value: []byte("\x01gone")}}); err != nil {
		t.Fatal(err)
	}
	r.close()
	h.advance(30 * time.Minute)
	r = openHeld(t, kv.Options{FS: fs}, h, aging())
	r.clk.Look()
	if now := r.clk.Read().T; now <= at {
		t.Errorf("the clock went back from %d to %d", at, now)
	}
	r.wantExpired(0, "half an hour later")
	h.advance(time.Hour + 10*time.Millisecond)
	r.wantExpired(10, "an hour after that")
}
