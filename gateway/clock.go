package gateway

import (
	"sync/atomic"
	"time"
)

// clock gives receive times and whether they can be trusted: boxes without a battery for their
// clock come up in 1970, and a cloud that sorts by time has to know.
//
// Asking the kernel is a system call, so it is done once a second at most, by whoever comes first.
type clock struct {
	now    func() time.Time
	synced func() bool
	asked  atomic.Int64 // Unix ms
	state  atomic.Bool  // not synchronised when last asked
}

func newClock() *clock {
	c := &clock{now: time.Now, synced: clockSynced}
	c.read() // so that nobody meets it unasked
	return c
}

// read gives the time in Unix ms, and whether the clock is not synchronised.
func (c *clock) read() (ms int64, unsynced bool) {
	ms = c.now().UnixMilli()
	asked := c.asked.Load()
	if age := ms - asked; (age >= 1000 || age < 0) && c.asked.CompareAndSwap(asked, ms) {
		c.state.Store(!c.synced())
	}
	return ms, c.state.Load()
}
