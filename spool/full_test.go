package spool_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/internal/kv"
	"holdfast/spool"
)

const mib = 1 << 20

// smallDisk is a disk of 48 MiB with the store and somebody else on it.
type smallDisk struct {
	store atomic.Pointer[kv.Store]
	other atomic.Int64 // bytes that somebody else has
	least atomic.Int64 // the least that was ever seen free
}

const (
	diskSize    = 48 * mib
	diskReserve = 8 * mib
)

func (d *smallDisk) usage() (kv.Usage, error) {
	used := d.other.Load()
	if s := d.store.Load(); s != nil {
		used += int64(s.DiskBytes())
	}
	free := max(diskSize-used, 0)
	for {
		least := d.least.Load()
		if free >= least || d.least.CompareAndSwap(least, free) {
			break
		}
	}
	return kv.Usage{Free: uint64(free), Total: diskSize}, nil
}

// openSmall opens a spool on a small disk.
func openSmall(t *testing.T, cfg spool.Config) (*rig, *smallDisk) {
	d := &smallDisk{}
	d.least.Store(diskSize)
	r := openWith(t, kv.Options{FS: vfs.NewMem(), Guard: &kv.Guard{Reserve: diskReserve, Usage: d.usage}}, cfg)
	d.store.Store(r.store)
	return r, d
}

func (d *smallDisk) level(t *testing.T, want kv.Level) {
	t.Helper()
	eventually(t, "the level is "+want.String(), func() bool { return d.store.Load().CheckDisk().Level == want })
}

// add appends one message that does not compress.
func (r *rig) add(lane string, i int, shed bool) error {
	return r.Append(r.lane(lane), noise(i), nil, nil, 0, shed)
}

// TestFullDiskDropsTheOldestAndStaysUsable writes three times what the disk has into a lane that may hold more than it.
func TestFullDiskDropsTheOldestAndStaysUsable(t *testing.T) {
	r, d := openSmall(t, lanes("bulk", "other"))
	rd, c := r.reader("cloud", "bulk")
	r.put("other", 0, 100)
	const n = 3 * diskSize / 2 / noiseSize
	for i := range n {
		if err := r.add("bulk", i, false); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	if d.least.Load() == 0 {
		t.Error("the store itself took the last byte") // and there is no ballast here
	}
	// Housekeeping may still be dropping, and tells of it with the next commit.
	var a spool.Account
	eventually(t, "all that was dropped is announced", func() bool {
		a = r.account("cloud", "bulk")
		return announcedFull(t, r) == a.Evicted.Messages && r.account("cloud", "bulk") == a
	})
	if a.Accepted.Messages != n || a.Evicted.Messages < n/4 {
		t.Fatalf("account %+v", a)
	}
	if got := r.account("cloud", "other"); got.Pending.Messages != 100 {
		t.Errorf("another lane lost messages: %+v", got)
	}
	for { // the rest is there
		run, err := rd.Next(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if run.Count == 0 {
			break
		}
		rd.Resolve(run.End(), spool.Delivered)
	}
	if a := r.account("cloud", "bulk"); a.Pending.Messages != 0 || a.Delivered.Messages+a.Evicted.Messages != n {
		t.Errorf("drained: %+v", a)
	}
	c.Close()
	d.level(t, kv.LevelOK)
	r.verify()
}

// announcedFull is how many messages are told to be gone for want of space: the first ones, without a hole.
func announcedFull(t *testing.T, r *rig) uint64 {
	t.Helper()
	next := uint64(1)
	for _, g := range gaps(t, r) {
		var first, last uint64
		if i := strings.Index(g, `"first":`); !strings.Contains(g, `"reason":"disk_full"`) {
			t.Fatalf("gap %s", g)
		} else if _, err := fmt.Sscanf(g[i:], `"first":%d,"last":%d,`, &first, &last); err != nil || first != next {
			t.Fatalf("gap %s does not follow %d: %v", g, next, err)
		}
		next = last + 1
	}
	return next - 1
}

// TestFullDiskRejectsUntilItIsDrained fills the disk with a lane that rejects.
func TestFullDiskRejectsUntilItIsDrained(t *testing.T) {
	cfg := lanes("alarm", "bulk")
	cfg.Lanes[0].WhenFull = spool.Reject
	r, d := openSmall(t, cfg)
	rd, _ := r.reader("cloud", "alarm")
	taken, err := 0, error(nil)
	for ; err == nil && taken < 2*diskSize/(8<<10); taken++ {
		if err = r.add("alarm", taken, false); err != nil {
			break
		}
	}
	if !errors.Is(err, spool.ErrFull) || !errors.Is(err, spool.ErrDisk) || !strings.Contains(err.Error(), "alarm") {
		t.Fatalf("after %d messages: %v", taken, err)
	}
	d.other.Store(diskSize / 4) // more than the logs that flushes give back: it stays full
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	if d.level(t, kv.LevelFull); r.Lanes()[1].NoDisk == 0 {
		t.Error("it is not counted")
	}
	// A lane that drops its oldest has none: it rejects, too, and does not make everybody wait.
	if err := r.add("bulk", 0, false); !errors.Is(err, spool.ErrDisk) {
		t.Errorf("append to a lane that has nothing to drop: %v", err)
	}
	if err := r.add("bulk", 0, true); !errors.Is(err, spool.ErrBusy) {
		t.Errorf("append of what may be shed: %v", err)
	}
	// What the gateway has to tell, rows and cursors go on.
	if err := r.Append(r.lane(spool.SystemLane), rec(0), []kv.Op{{Key: []byte{kv.PrefixCommand, 1}, Value: []byte("x")}}, nil, 0, false); err != nil {
		t.Errorf("append to the system lane: %v", err)
	}
	if err := r.Append(spool.LaneNone, nil, []kv.Op{{Key: []byte{kv.PrefixCommand, 1}, Delete: true}}, nil, 0, false); err != nil {
		t.Errorf("rows alone: %v", err)
	}
	for n := 0; ; {
		run, err := rd.Next(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if run.Count == 0 {
			if n != taken {
				t.Errorf("%d read, %d taken", n, taken)
			}
			break
		}
		n += run.Count
		rd.Resolve(run.End(), spool.Delivered)
	}
	d.level(t, kv.LevelOK) // by itself
	if err := r.add("alarm", 1, false); err != nil {
		t.Errorf("append with room again: %v", err)
	}
	r.verify()
}

// TestDiskFilledBySomebodyElse has no room that could be made.
func TestDiskFilledBySomebodyElse(t *testing.T) {
	r, d := openSmall(t, lanes("bulk"))
	r.reader("cloud", "bulk")
	r.put("bulk", 0, 100)
	d.other.Store(diskSize)
	d.level(t, kv.LevelFull)
	eventually(t, "messages are refused", func() bool { return errors.Is(r.add("bulk", 1, false), spool.ErrDisk) })
	if a := r.account("cloud", "bulk"); a.Evicted.Messages != 0 {
		t.Errorf("messages were dropped that gave nothing back: %+v", a)
	}
	d.other.Store(0)
	d.level(t, kv.LevelOK)
	eventually(t, "messages are taken", func() bool { return r.add("bulk", 1, false) == nil })
	r.verify()
}

func TestHighDiskShedsWhatMayBeShed(t *testing.T) {
	r, d := openSmall(t, lanes("bulk"))
	d.other.Store(diskSize - int64(r.store.DiskBytes()) - 3*diskReserve/2)
	d.level(t, kv.LevelHigh)
	if err := r.add("bulk", 1, true); !errors.Is(err, spool.ErrBusy) || r.Lanes()[1].Shed != 1 {
		t.Errorf("append of what may be shed: %v, %d counted", err, r.Lanes()[1].Shed)
	}
	if err := r.add("bulk", 1, false); err != nil {
		t.Errorf("append: %v", err)
	}
}

// TestSystemLaneDoesNotEatTheReserve has the gateway tell more than there is room for.
func TestSystemLaneDoesNotEatTheReserve(t *testing.T) {
	r, d := openSmall(t, lanes("bulk"))
	r.reader("cloud", "bulk")
	d.other.Store(diskSize - 2*diskReserve - 16*mib)
	for i := range 8 * mib / noiseSize { // from before it was full: it stays
		if err := r.add(spool.SystemLane, i, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	d.other.Store(diskSize - int64(r.store.DiskBytes()) - diskReserve/2)
	d.level(t, kv.LevelFull)
	held := func() int64 { return int64(r.Lanes()[0].Kept.Bytes) }
	was := held()
	for i := range 16 * mib / noiseSize {
		if err := r.add(spool.SystemLane, i, false); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the system lane is as large as it was", func() bool { return held() <= was+diskReserve/8+mib })
	if held() < was/2 {
		t.Errorf("it has %d bytes left of %d", held(), was)
	}
	r.verify()
}

func TestPurgeOnAFullDisk(t *testing.T) {
	cfg := lanes("alarm")
	cfg.Lanes[0].WhenFull = spool.Reject
	r, d := openSmall(t, cfg)
	r.reader("cloud", "alarm")
	n := 0
	for ; r.add("alarm", n, false) == nil; n++ {
	}
	d.level(t, kv.LevelFull)
	gone, err := r.Purge("alarm", time.Time{}, uint64(n/2))
	if err != nil || gone.Messages != uint64(n/2) {
		t.Fatalf("purged %+v of %d: %v", gone, n, err)
	}
	d.level(t, kv.LevelOK)
	if err := r.add("alarm", 1, false); err != nil {
		t.Error(err)
	}
	r.verify()
}

// TestLaneNeverHoldsMoreThanItMay looks at a lane while many append to it.
func TestLaneNeverHoldsMoreThanItMay(t *testing.T) {
	for _, most := range []int64{256 << 10, 4 * mib} {
		cfg := lanes("a", "b")
		cfg.Lanes[0].MaxBytes = most
		cfg.Lanes[1].MaxBytes, cfg.Lanes[1].WhenFull = most, spool.Reject
		r := open(t, vfs.NewMem(), cfg)
		r.reader("cloud", "a")
		var wg sync.WaitGroup
		var refused atomic.Int64
		for w := range 4 {
			wg.Go(func() {
				for i := range 100 {
					if err := r.add("a", w*1000+i, false); err != nil {
						t.Errorf("append: %v", err)
						return
					}
					if err := r.add("b", w*1000+i, false); errors.Is(err, spool.ErrFull) {
						refused.Add(1)
					} else if err != nil {
						t.Errorf("append: %v", err)
					}
					for _, l := range r.Lanes()[1:] {
						if l.Kept.Bytes > uint64(most)+noiseSize+1<<10 { // and one message
							t.Errorf("lane %s holds %d bytes of %d", l.Name, l.Kept.Bytes, most)
						}
					}
				}
			})
		}
		wg.Wait()
		if err := r.store.Flush(); err != nil {
			t.Fatal(err)
		}
		if a := r.account("cloud", "a"); a.Accepted.Messages != 400 || a.Pending.Bytes < uint64(most)/2 {
			t.Errorf("of %d: %+v", most, a)
		}
		if a := r.account("cloud", "b"); a.Accepted.Messages+uint64(refused.Load()) != 400 {
			t.Errorf("of %d: %+v, %d refused", most, a, refused.Load())
		}
		r.verify()
	}
}

// TestDiskUseIsBounded writes many times what two lanes may hold, with an upstream that is away: what the store takes stays
// below the figure in docs/operations.md.
func TestDiskUseIsBounded(t *testing.T) {
	cfg := lanes("a", "b")
	cfg.Lanes[0].MaxBytes, cfg.Lanes[1].MaxBytes = 12*mib, 4*mib
	r := open(t, vfs.NewMem(), cfg)
	r.reader("cloud", "a")
	most := uint64(0)
	for i := range 80 * mib / noiseSize {
		if err := r.add([]string{"a", "b"}[i%2], i, false); err != nil {
			t.Fatal(err)
		}
		if i%64 == 0 {
			most = max(most, r.store.DiskBytes())
		}
	}
	// 1.1 of what the lanes hold, a stride of 16 MiB each that waits to be given back, and the logs and tables of four memtables.
	const bound = 16*mib*11/10 + 2*16*mib + 8*9*mib
	t.Logf("%d MiB at most, the bound is %d MiB", most/mib, bound/mib)
	if most > bound {
		t.Errorf("the store took %d MiB, more than %d", most/mib, bound/mib)
	}
	r.verify()
}
