package spool_test

import (
	"sync"
	"time"

	"holdfast/internal/clock"
)

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
