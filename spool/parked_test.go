package spool_test

import (
	"errors"
	"fmt"
	"strings"
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
