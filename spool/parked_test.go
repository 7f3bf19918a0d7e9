package spool_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/spool"
)

// parkedCounts are what the lanes say of their copies.
func parkedCounts(r *rig, lane string) spool.Count {
	for _, l := range r.Lanes() {
		if l.Name == lane {
			return l.Parked
		}
	}
	return spool.Count{}
}

// TestParkedHaveALimit: beyond it the oldest of the lane that has most go. Accounts stay, and so does what the other lane has.
func TestParkedHaveALimit(t *testing.T) {
	const most = 64 << 10
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": {"alarm", "bulk"}}
	cfg.ParkedBytes = most
	fs := vfs.NewMem()
	r := open(t, fs, cfg)
	r.put("alarm", 0, 10)
	parkAll(t, r, "cloud", "alarm")
	for from := 0; from < 2000; from += 500 {
		r.put("bulk", from, from+500)
		parkAll(t, r, "cloud", "bulk")
	}
	fits := func() bool {
		a, b := parkedCounts(r, "alarm"), parkedCounts(r, "bulk")
		return a.Bytes+b.Bytes <= most && a.Messages == 10
	}
	eventually(t, "what is parked fits", fits)
	check := func(when string) {
		t.Helper()
		all := parked(t, r)
		a, b := parkedCounts(r, "alarm"), parkedCounts(r, "bulk")
		if len(all) != int(a.Messages+b.Messages) || a.Messages != 10 || b.Messages < 50 || b.Messages > 1000 || b.Bytes < most/2 {
			t.Errorf("%s: %d are there, alarm counts %+v, bulk %+v", when, len(all), a, b)
		}
		for i, name := range all[10:] {
			if want := fmt.Sprintf("cloud/bulk/%d", 2000-int(b.Messages)+1+i); name != want {
				t.Fatalf("%s: %s is there in place of %s", when, name, want)
			}
		}
	}
	check("after the refusals")
	if a := r.account("cloud", "bulk"); a.Parked.Messages != 2000 {
		t.Errorf("account %+v", a)
	}
	before := parkedCounts(r, "bulk")
	r.close()
	r = open(t, fs, cfg)
	if got := parkedCounts(r, "bulk"); got != before {
		t.Errorf("after a restart %+v are counted, before %+v", got, before)
	}
	check("after a restart")
	if n, err := r.Replay("alarm", "cloud", nil); err != nil || n != 10 || parkedCounts(r, "alarm") != (spool.Count{}) {
		t.Errorf("%d replayed, %v; %+v are left", n, err, parkedCounts(r, "alarm"))
	}
}

// TestParkedGiveTheirSpaceBack: to the file system, at once, as the limit says and when somebody drops them.
func TestParkedGiveTheirSpaceBack(t *testing.T) {
	const most = 4 * mib
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": {"alarm", "bulk"}}
	cfg.ParkedBytes = 1 << 30
	fs := vfs.NewMem()
	r := open(t, fs, cfg)
	for range 4 { // 16 MiB in all
		for i := range most / noiseSize {
			if err := r.add("bulk", i, false); err != nil {
				t.Fatal(err)
			}
		}
		parkAll(t, r, "cloud", "bulk")
	}
	// What else is on disk, logs and what the lane itself has not given back yet, only gets less.
	freed := func(before, n uint64) func() bool { return func() bool { return r.store.DiskBytes() <= before-n } }
	before := r.store.DiskBytes()
	if before < 4*most {
		t.Fatalf("%d bytes are on disk", before)
	}
	r.close()
	cfg.ParkedBytes = most
	r = open(t, fs, cfg)
	eventually(t, "what is too much has left the disk", func() bool { return parkedCounts(r, "bulk").Bytes <= most && freed(before, 2*most)() })
	before = r.store.DiskBytes()
	gone, err := r.PurgeParked("bulk", "cloud")
	if err != nil || gone.Bytes < most/2 {
		t.Fatalf("%+v gone, %v", gone, err)
	}
	eventually(t, "what was dropped has left the disk", freed(before, gone.Bytes/2))
}

// TestPurgeParked drops what one upstream has refused, then the rest.
func TestPurgeParked(t *testing.T) {
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": {"alarm", "bulk"}, "site": {"alarm", "bulk"}}
	r := open(t, vfs.NewMem(), cfg)
	r.put("alarm", 0, 3000) // more than a commit takes
	r.put("bulk", 0, 2)
	for _, up := range []string{"cloud", "site"} {
		parkAll(t, r, up, "alarm")
		parkAll(t, r, up, "bulk")
	}
	if n := len(parked(t, r)); n != 6004 || parkedCounts(r, "alarm").Messages != 6000 {
		t.Fatalf("%d parked, %+v", n, parkedCounts(r, "alarm"))
	}
	gone, err := r.PurgeParked("alarm", "site")
	left := parked(t, r)
	if err != nil || gone.Messages != 3000 || len(left) != 3004 || strings.Contains(strings.Join(left, " "), "site/alarm/") {
		t.Errorf("%+v gone, %v; %d left", gone, err, len(left))
	}
	if gone, err := r.PurgeParked("alarm", "nobody"); err != nil || gone.Messages != 0 {
		t.Errorf("of nobody: %+v, %v", gone, err)
	}
	if gone, err := r.PurgeParked("alarm", ""); err != nil || gone.Messages != 3000 || parkedCounts(r, "alarm") != (spool.Count{}) {
		t.Errorf("all: %+v, %v", gone, err)
	}
	if left := parked(t, r); len(left) != 4 || parkedCounts(r, "bulk").Messages != 4 {
		t.Errorf("%v left, %+v", left, parkedCounts(r, "bulk"))
	}
	if a := r.account("site", "alarm"); a.Parked.Messages != 3000 {
		t.Errorf("account %+v", a)
	}
	if _, err := r.PurgeParked("none", ""); !errors.Is(err, spool.ErrNoLane) {
		t.Errorf("an unknown lane: %v", err)
	}
	r.verify()
}

// TestPurgeWhileOthersPark: what comes meanwhile is dropped and counted as dropped, or stays and counts as there.
func TestPurgeWhileOthersPark(t *testing.T) {
	const n, sites = 300, 8
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": {"bulk"}}
	for i := range sites {
		cfg.Upstreams[fmt.Sprint("site-", i)] = []string{"bulk"}
	}
	r := open(t, vfs.NewMem(), cfg)
	r.put("bulk", 0, n)
	parkAll(t, r, "cloud", "bulk")
	var parking sync.WaitGroup
	for i := range sites {
		parking.Go(func() { parkAll(t, r, fmt.Sprint("site-", i), "bulk") }) // behind cloud: among the rows that go
	}
	done := make(chan struct{})
	go func() {
		parking.Wait()
		close(done)
	}()
	gone := uint64(0)
	for more := true; more; {
		select {
		case <-done:
			more = false
		default:
		}
		c, err := r.PurgeParked("bulk", "")
		if err != nil {
			t.Fatal(err)
		}
		gone += c.Messages
	}
	if left := parked(t, r); len(left) != 0 || gone != (sites+1)*n || parkedCounts(r, "bulk") != (spool.Count{}) {
		t.Errorf("%d gone of %d, %d left, %+v are counted", gone, (sites+1)*n, len(left), parkedCounts(r, "bulk"))
	}
}
