package devices_test

import (
	"testing"
	"time"

	"holdfast/devices"
)

const year = 365 * 24 * time.Hour

// clockRig has one command that lives for an hour and one that is being executed, for half an hour at most.
func clockRig(t *testing.T, clock *fakeClock) *queueRig {
	t.Helper()
	r := openQueueRig(t, newCrashableFS(), clock, devices.QueueConfig{AckTimeout: 20 * time.Minute})
	t.Cleanup(func() { r.close() })
	r.tick()
	r.submit(devices.Request{ID: "waits", Device: "absent", TTL: time.Hour})
	r.submit(devices.Request{ID: "works", ExecutionTimeout: 30 * time.Minute})
	l := r.link("dev")
	r.ack(l)
	r.tick()
	return r
}

// lives checks that both end when so much time has passed, and not before. A reboot takes a millisecond of it.
func (r *queueRig) lives(work, wait time.Duration) {
	r.t.Helper()
	const slack = 2 * time.Millisecond
	r.tick()
	r.pass(work - slack)
	r.wantState("works", devices.Delivered)
	r.pass(slack)
	r.wantState("works", devices.TimedOut)
	r.pass(wait - work - slack)
	r.wantState("waits", devices.Queued)
	r.pass(slack)
	r.wantState("waits", devices.Expired)
}

func TestWallClockJumpsChangeNothing(t *testing.T) {
	for name, jump := range map[string]time.Duration{"ahead": 10 * year, "back": -10 * year, "a minute": time.Minute} {
		for _, synced := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				clock := newFakeClock()
				clock.synced = synced
				r := clockRig(t, clock)
				clock.jump(jump)
				r.pass(10 * time.Minute)
				if c := r.get("waits"); !c.Expires.Equal(c.Updated.Add(time.Hour)) {
					t.Errorf("updated %v, expires %v", c.Updated, c.Expires)
				}
				clock.jump(-2 * jump)
				r.pass(5 * time.Minute)
				r.lives(15*time.Minute, 45*time.Minute)
			})
		}
	}
}

func TestWallClockJumpsOverARestart(t *testing.T) {
	for name, jump := range map[string]time.Duration{"ahead": 10 * year, "back": -10 * year} {
		t.Run(name, func(t *testing.T) {
			clock := newFakeClock()
			r := clockRig(t, clock)
			clock.jump(jump)
			clock.advance(10 * time.Minute) // it is not running: the time since boot tells
			r.crash()
			r.lives(20*time.Minute, 50*time.Minute)
		})
	}
}

func TestRebootWithARightClock(t *testing.T) {
	clock := newFakeClock()
	r := clockRig(t, clock)
	r.pass(5 * time.Minute)
	clock.reboot(10 * time.Minute)
	r.crash()
	r.lives(15*time.Minute, 45*time.Minute)
}

// TestRebootAfterAJump: before the machine went down its clock was set, so one of two wall clocks was wrong.
func TestRebootAfterAJump(t *testing.T) {
	for name, jump := range map[string]time.Duration{"ahead": 10 * year, "back": -10 * year} {
		t.Run(name, func(t *testing.T) {
			clock := newFakeClock()
			r := clockRig(t, clock)
			clock.jump(jump)
			r.pass(5 * time.Minute)
			clock.jump(-jump)
			clock.reboot(time.Minute)
			r.crash()
			r.lives(25*time.Minute, 55*time.Minute) // the minute is lost, nothing more
		})
	}
}

// TestBootIn1970 is the box without a battery: its clock begins in 1970 and is right some time later.
func TestBootIn1970(t *testing.T) {
	clock := newFakeClock()
	r := clockRig(t, clock)
	r.pass(5 * time.Minute)
	right := clock.wall
	clock.reboot(0)
	clock.set(func(c *fakeClock) { c.wall, c.synced = time.Unix(0, 0), false })
	r.crash()
	r.tick()
	r.wantState("waits", devices.Queued)
	r.submit(devices.Request{ID: "new", Device: "absent", TTL: 11 * time.Minute})
	r.pass(5 * time.Minute)
	r.wantState("works", devices.Delivered)
	// It was off for eight minutes: that counts for what came before, not for what came since.
	clock.set(func(c *fakeClock) { c.wall, c.synced = right.Add(13*time.Minute), true })
	r.pass(devices.CommandTimerLook)
	clock.advance(-devices.CommandTimerLook)
	r.pass(6*time.Minute - 2*time.Millisecond)
	r.wantState("new", devices.Queued)
	r.pass(2 * time.Millisecond) // 24 of 30 minutes of the one, 24 of 60, 11 of 11
	r.wantState("new", devices.Expired)
	r.lives(6*time.Minute, 36*time.Minute)
}

// TestUnsyncedRebootsAddUp: twice off, and right at last.
func TestUnsyncedRebootsAddUp(t *testing.T) {
	clock := newFakeClock()
	r := clockRig(t, clock)
	start := clock.wall
	for range 2 {
		r.pass(time.Minute)
		clock.reboot(0)
		clock.set(func(c *fakeClock) { c.wall, c.synced = time.Unix(0, 0), false })
		r.crash()
		r.tick()
	}
	r.pass(time.Minute)
	clock.set(func(c *fakeClock) { c.wall, c.synced = start.Add(20*time.Minute), true })
	r.pass(10 * time.Second)
	r.clock.advance(-10 * time.Second)
	r.lives(10*time.Minute, 40*time.Minute)
}

// TestNeverSynced: nobody knows how long it was off, so only the time that it runs counts.
func TestNeverSynced(t *testing.T) {
	clock := newFakeClock()
	clock.synced = false
	r := clockRig(t, clock)
	r.pass(10 * time.Minute)
	clock.reboot(10 * year)
	r.crash()
	r.lives(20*time.Minute, 50*time.Minute)
}

func TestSleepCounts(t *testing.T) {
	clock := newFakeClock()
	r := clockRig(t, clock)
	clock.set(func(c *fakeClock) { c.since += 10 * time.Minute; c.wall = c.wall.Add(10 * time.Minute) })
	r.pass(devices.CommandTimerLook)
	r.clock.advance(-devices.CommandTimerLook)
	r.lives(20*time.Minute, 50*time.Minute)
}

func TestSystemClocks(t *testing.T) {
	fs, clock := newCrashableFS(), newFakeClock()
	r := openQueueRig(t, fs, clock, devices.QueueConfig{})
	r.close()
	cfg := devices.QueueConfig{Journal: r.j, Log: discardLog()}
	store := openTestStore(t, fs)
	q, err := devices.OpenQueue(store, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if c := q.Counts(); c.Queued != 0 {
		t.Errorf("counts %+v", c)
	}
}
