package diskcheck

import "fmt"

// Verdict is what can be said of a disk.
type Verdict string

// The verdicts.
const (
	Holds       Verdict = "holds"         // nothing speaks against it
	Suspicious  Verdict = "suspicious"    // something does; it may have a good reason
	DoesNotHold Verdict = "does not hold" // a power cut takes what was synced
)

// What no disk does.
const (
	impossibleSync   = 8.0   // microseconds: a sync that is done faster has not been anywhere
	rotations        = 250.0 // a second: 15,000 rpm. A place on a platter comes by no more often
	freeFlush        = 1.5   // a sync that takes no more than this many times the bare write
	freeFlushSlack   = 15.0  // microseconds, for the system calls
	cacheSpeed       = 4.0   // a synced long write that is this many times as fast as the disk itself
	longPause        = 1e6   // microseconds
	slowerUnderLoad  = 4.0
	smallestSyncRate = 50.0
)

// judge fills in verdict, reasons and notes.
func (r *Report) judge() {
	var fails, doubts []string
	fail := func(format string, args ...any) { fails = append(fails, fmt.Sprintf(format, args...)) }
	doubt := func(format string, args ...any) { doubts = append(doubts, fmt.Sprintf(format, args...)) }
	note := func(format string, args ...any) { r.Notes = append(r.Notes, fmt.Sprintf(format, args...)) }
	f := &r.Facts
	place := f.kind()

	switch place {
	case inMemory:
		fail("this is memory (%s): a power cut takes everything", orElse(f.Disk, f.Type))
	case layered:
		doubt("this is a container's own layer (%s): it goes with the container; mount a volume for data_dir", f.Type)
	case remote:
		doubt("this is a %s file system: what fsync means is decided at its other end, which cannot be seen from here", f.Type)
	case onDisk:
	}
	if o := f.has("nobarrier", "barrier=0"); o != "" {
		fail("mounted with %s: the disk is never asked to empty its write cache", o)
	}
	p50 := r.Overwrite.P50
	if place != inMemory && p50 < impossibleSync {
		fail("an fsync takes %.1f µs, faster than any disk writes: it does nothing", p50)
	}

	if place == onDisk && len(fails) == 0 {
		rotating := f.Rotational != nil && *f.Rotational && !f.Virtual
		switch {
		case rotating && r.Overwrite.PerSecond > rotations:
			doubt("%.0f syncs a second in one place of a rotating disk, which passes under its head at most %.0f times: a cache acknowledges them, "+
				"and only one with a battery keeps them", r.Overwrite.PerSecond, rotations)
		case f.WriteCache == "write back" && r.Direct != nil && p50 < r.Direct.P50*freeFlush+freeFlushSlack:
			whose := "the disk has"
			if f.Virtual {
				whose = "the host has"
			}
			doubt("emptying the write cache costs nothing (%.0f µs synced, %.0f µs without): %s power-loss protection, or ignores the request", p50, r.Direct.P50, whose)
		}
		if r.DirectSeq > 0 && r.Sequential > cacheSpeed*r.DirectSeq {
			doubt("a long write is synced at %s/s, but the disk itself takes %s/s: fsync returns before the data is there",
				bytes(r.Sequential), bytes(r.DirectSeq))
		}
	}

	if f.Virtual && place == onDisk {
		note("a virtual disk: whether fsync reaches a medium is decided by the host (QEMU: cache=none, writethrough or directsync do, unsafe does not)")
	}
	if f.WriteCache == "write through" && place == onDisk && len(f.Disk) > 0 {
		note("the device says that it has no volatile write cache, so nothing is ever flushed: it has to be believed")
	}
	switch {
	case hasPrefix(f.Disk, "loop"):
		note("a loop device: what lies below its file decides")
	case hasPrefix(f.Disk, "mmcblk"):
		note("an SD card or eMMC: a power cut in the middle of a write can damage data beside it; prefer one with power-loss protection")
	case hasPrefix(f.Disk, "nbd"), hasPrefix(f.Disk, "rbd"), hasPrefix(f.Disk, "drbd"):
		note("a disk over the network: its other end decides")
	}
	if f.has("data=writeback") != "" {
		note("mounted with data=writeback: no harm to what is synced")
	}
	if f.Type == "" {
		note("this system does not say what the file system is")
	}
	if len(r.Sync) > 1 {
		t := &r.Sync[1]
		if t.Max > longPause {
			note("single syncs take up to %.1f s: acknowledgements wait for them", t.Max/1e6)
		}
		if t.Count >= 100 && t.Late > slowerUnderLoad*t.Early {
			note("it became slower under load: %.2f ms a sync at first, %.2f ms at last", t.Early/1000, t.Late/1000)
		}
		if t.PerSecond < smallestSyncRate {
			note("%.0f syncs a second are few: many messages share one, but each waits %.0f ms", t.PerSecond, t.P50/1000)
		}
	}

	switch {
	case len(fails) > 0:
		r.Verdict, r.Reasons = DoesNotHold, append(fails, doubts...)
	case len(doubts) > 0:
		r.Verdict, r.Reasons = Suspicious, doubts
	default:
		r.Verdict, r.Reasons = Holds, []string{"nothing that was measured speaks against it"}
	}
	if r.Notes == nil {
		r.Notes = []string{}
	}
}

func hasPrefix(s, prefix string) bool { return len(s) >= len(prefix) && s[:len(prefix)] == prefix }

func orElse(s, other string) string {
	if s != "" {
		return s
	}
	return other
}

func bytes(n float64) string {
	if n >= 1<<30 {
		return fmt.Sprintf("%.1f GiB", n/(1<<30))
	}
	return fmt.Sprintf("%.0f MiB", n/(1<<20))
}
