package powercut

import (
	"syscall"
	"time"
)

// Faults is what a disk does besides its work. The zero value does nothing.
type Faults struct {
	// WriteErr fails every write, create, rename, link, remove and truncate; SyncErr every fsync, of files and folders, and what it
	// should have synced is lost. 0: none does.
	WriteErr, SyncErr syscall.Errno
	// After is how many calls of the kind that fails still succeed; Times how many then fail, 0: all.
	After, Times int
	// SyncTakes is how long an fsync takes, besides its work.
	SyncTakes time.Duration
	// Lie makes every fsync say yes and do nothing: what a program that forgets it looks like, and a bad disk.
	Lie bool
}

// SetFaults replaces the faults.
func (d *Disk) SetFaults(f Faults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults, d.calls = f, 0
}

// call is a kind of system call.
type call int

const (
	callWrite call = iota
	callSync
)

// fail says whether a call fails, and how.
func (d *Disk) fail(kind call) syscall.Errno {
	e := d.faults.WriteErr
	if kind == callSync {
		e = d.faults.SyncErr
	}
	if e == 0 {
		return 0
	}
	d.calls++
	if n := d.calls - d.faults.After; n <= 0 || d.faults.Times > 0 && n > d.faults.Times {
		return 0
	}
	d.stats.Failed++
	return e
}

// sync is fsync of a file or a folder, called and returning with mu locked. It lets go of mu while the disk takes its time; void
// says that the power went meanwhile.
func (d *Disk) sync(n *inode) (e syscall.Errno, void bool) {
	until, life, lie := d.clock, d.life, d.faults.Lie
	if takes := d.faults.SyncTakes; takes > 0 {
		d.mu.Unlock()
		<-time.After(takes)
		d.mu.Lock()
		if d.life != life {
			return 0, true
		}
	}
	if n.dir() {
		d.stats.FolderSyncs++
	} else {
		d.stats.Syncs++
	}
	if e := d.fail(callSync); e != 0 {
		if !n.dir() {
			n.lose(until)
		}
		return e, false
	}
	switch {
	case lie:
	case n.dir():
		d.syncNames(n, until)
	default:
		n.syncFile(until)
	}
	return 0, false
}
