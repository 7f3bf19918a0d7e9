package testkit

import (
	"runtime"
	"sync"
	"time"
)

// FakeClocks says whether there are any here: elsewhere NewFakeClock skips the test.
const FakeClocks = runtime.GOOS == "linux" && runtime.GOARCH == "amd64"

// FakeClock is the wall clock of a Command: what the machine's shows, and an offset that the test sets at any time. The
// program's monotonic clock goes on. It can also say for the kernel whether it vouches for the wall clock.
//
// Go programs take the time from the vDSO, a page of code that the kernel maps into each process; the fake writes over
// that of the stopped child, before its first instruction, and over functions of the program that ask the kernel. That
// needs Linux on amd64 and a static binary; elsewhere NewFakeClock skips the test.
type FakeClock struct {
	t T

	// Functions of the program that are written over, by their full names: one that says whether the kernel vouches for
	// the wall clock, func() bool, and one that tells the machine's boots apart, func() (string, time.Duration).
	SyncedFunc, BootFunc string

	mu     sync.Mutex // guards what follows
	offset time.Duration
	synced bool
	reboot bool
	live   *fakedProcess // nil: none
}

// Set has the wall clock show what the machine's does plus offset, in whole seconds, from now on and in later lives. synced: the
// kernel vouches for it.
func (c *FakeClock) Set(offset time.Duration, synced bool) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset, c.synced = offset, synced
	if c.live != nil {
		_ = c.live.set(offset, synced) // fails if the program is gone: then the next one gets it
	}
}

// At has the wall clock show wall now; see Set.
func (c *FakeClock) At(wall time.Time, synced bool) {
	c.t.Helper()
	c.Set(time.Until(wall).Round(time.Second), synced)
}

// Reboots has each later start of the program count as one of the machine.
func (c *FakeClock) Reboots() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reboot = true
}

// Now is what the program's wall clock shows.
func (c *FakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.offset).Round(0)
}
