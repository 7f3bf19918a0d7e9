package diskcheck_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/internal/diskcheck"
)

func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestMeasureMeasuresAndCleansUp(t *testing.T) {
	dir := t.TempDir()
	var steps []string
	r, err := diskcheck.Measure(t.Context(), diskcheck.Options{
		Dir: dir, Budget: 200 * time.Millisecond, MaxBytes: 4 << 20, Step: func(what string) { steps = append(steps, what) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Sync) != 3 || len(steps) < 4 || r.Verdict == "" || len(r.Reasons) == 0 || r.Sequential <= 0 || r.Buffered < r.Sequential {
		t.Errorf("%+v after %q", r, steps)
	}
	for _, x := range append(r.Sync, r.Overwrite, r.Empty) {
		if x.Count < 1 || x.PerSecond <= 0 || x.P50 <= 0 || x.P50 > x.P99 || x.P99 > x.Max {
			t.Errorf("%+v", x)
		}
	}
	empty(t, dir)
}

func TestMeasureEndsWhenItIsInterrupted(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	_, err := diskcheck.Measure(ctx, diskcheck.Options{Dir: dir, Budget: time.Hour, Step: func(string) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	empty(t, dir)
}

func TestMemoryIsCalledMemory(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-") //nolint:usetesting // it has to be there
	if err != nil {
		t.Skip("no memory file system here")
	}
	defer os.RemoveAll(dir)
	r, err := diskcheck.Measure(t.Context(), diskcheck.Options{Dir: dir, Budget: 50 * time.Millisecond, MaxBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if r.Facts.Type != "tmpfs" {
		t.Skipf("/dev/shm is %q", r.Facts.Type)
	}
	if r.Verdict != diskcheck.DoesNotHold || r.Reasons[0] != "this is memory (tmpfs): a power cut takes everything" {
		t.Errorf("%s: %q", r.Verdict, r.Reasons)
	}
}

// TestJudge has reports of disks as they are, and of some that lie.
func TestJudge(t *testing.T) {
	yes, no := true, false
	timing := func(us float64) *diskcheck.Timing {
		return &diskcheck.Timing{Count: 1000, PerSecond: 1e6 / us, P50: us, P99: us * 2, Max: us * 10, Early: us, Late: us}
	}
	report := func(f diskcheck.Facts, sync, direct float64, seq, directSeq float64) diskcheck.Report {
		r := diskcheck.Report{Facts: f, Overwrite: *timing(sync), Sequential: seq, DirectSeq: directSeq}
		if direct > 0 {
			r.Direct = timing(direct)
		}
		for range 3 {
			r.Sync = append(r.Sync, *timing(sync * 1.5))
		}
		return r
	}
	const mib = 1 << 20
	cases := map[string]struct {
		r    diskcheck.Report
		want diskcheck.Verdict
		says string // in a reason or a note
	}{
		"consumer NVMe":           {report(diskcheck.Facts{Type: "ext4", Disk: "nvme0n1", WriteCache: "write back", Rotational: &no}, 900, 20, 900*mib, 1200*mib), diskcheck.Holds, ""},
		"NVMe with capacitors":    {report(diskcheck.Facts{Type: "xfs", Disk: "nvme0n1", WriteCache: "write through", Rotational: &no}, 22, 18, 1500*mib, 1700*mib), diskcheck.Holds, "it has to be believed"},
		"hard disk":               {report(diskcheck.Facts{Type: "ext4", Disk: "sda", WriteCache: "write back", Rotational: &yes}, 8400, 120, 150*mib, 160*mib), diskcheck.Holds, ""},
		"SD card":                 {report(diskcheck.Facts{Type: "ext4", Disk: "mmcblk0", WriteCache: "write through", Rotational: &no}, 6000, 3000, 15*mib, 18*mib), diskcheck.Holds, "an SD card"},
		"tmpfs":                   {report(diskcheck.Facts{Type: "tmpfs"}, 0.8, 0, 3000*mib, 0), diskcheck.DoesNotHold, "this is memory (tmpfs): a power cut takes everything"},
		"swap in memory":          {report(diskcheck.Facts{Type: "ext4", Disk: "zram0"}, 20, 15, 3000*mib, 3000*mib), diskcheck.DoesNotHold, "this is memory (zram0)"},
		"nobarrier":               {report(diskcheck.Facts{Type: "ext4", Disk: "sda", Options: []string{"rw", "nobarrier"}, WriteCache: "write back"}, 900, 50, 400*mib, 400*mib), diskcheck.DoesNotHold, "mounted with nobarrier"},
		"barrier=0":               {report(diskcheck.Facts{Type: "ext4", Disk: "sda", Options: []string{"rw", "barrier=0"}}, 900, 50, 400*mib, 400*mib), diskcheck.DoesNotHold, "barrier=0"},
		"fsync does nothing":      {report(diskcheck.Facts{Type: "ext4", Disk: "sda", WriteCache: "write back"}, 2, 60, 400*mib, 400*mib), diskcheck.DoesNotHold, "it does nothing"},
		"platter with a cache":    {report(diskcheck.Facts{Type: "ext4", Disk: "sda", WriteCache: "write back", Rotational: &yes}, 300, 150, 150*mib, 160*mib), diskcheck.Suspicious, "at most 250 times"},
		"flush costs nothing":     {report(diskcheck.Facts{Type: "ext4", Disk: "sda", WriteCache: "write back", Rotational: &no}, 65, 55, 400*mib, 400*mib), diskcheck.Suspicious, "power-loss protection, or ignores"},
		"host's flush is nothing": {report(diskcheck.Facts{Type: "ext4", Disk: "vda", Virtual: true, WriteCache: "write back", Rotational: &yes}, 65, 55, 400*mib, 400*mib), diskcheck.Suspicious, "the host has"},
		"virtual disk":            {report(diskcheck.Facts{Type: "ext4", Disk: "vda", Virtual: true, WriteCache: "write back", Rotational: &yes}, 110, 33, 400*mib, 1000*mib), diskcheck.Holds, "decided by the host"},
		"faster than the disk":    {report(diskcheck.Facts{Type: "ext4", Disk: "sda", Rotational: &no}, 500, 90, 2000*mib, 400*mib), diskcheck.Suspicious, "fsync returns before the data is there"},
		"container":               {report(diskcheck.Facts{Type: "overlay"}, 500, 90, 400*mib, 400*mib), diskcheck.Suspicious, "container's own layer"},
		"9p":                      {report(diskcheck.Facts{Type: "9p"}, 500, 0, 400*mib, 0), diskcheck.Suspicious, "9p file system: what fsync means is decided at its other end"},
		"nfs":                     {report(diskcheck.Facts{Type: "nfs4"}, 500, 0, 400*mib, 0), diskcheck.Suspicious, "other end"},
		"fuse":                    {report(diskcheck.Facts{Type: "fuse.sshfs"}, 500, 0, 400*mib, 0), diskcheck.Suspicious, "other end"},
		"nothing is known":        {report(diskcheck.Facts{}, 500, 0, 400*mib, 0), diskcheck.Holds, "does not say"},
		"slow":                    {report(diskcheck.Facts{Type: "ext4", Disk: "sda"}, 40_000, 0, 4*mib, 0), diskcheck.Holds, "are few"},
	}
	for name, c := range cases {
		c.r.Judge()
		said := strings.Join(append(c.r.Reasons, c.r.Notes...), "\n")
		if c.r.Verdict != c.want || !strings.Contains(said, c.says) || len(c.r.Reasons) == 0 {
			t.Errorf("%s: %s, want %s: %s", name, c.r.Verdict, c.want, said)
		}
	}
	r := report(diskcheck.Facts{Type: "ext4", Disk: "sda"}, 500, 0, 4*mib, 0)
	r.Sync[1].Max, r.Sync[1].Late = 3e6, r.Sync[1].Early*10
	r.Judge()
	if said := strings.Join(r.Notes, "\n"); !strings.Contains(said, "up to 3.0 s") || !strings.Contains(said, "slower under load") {
		t.Errorf("notes %q", r.Notes)
	}
}
