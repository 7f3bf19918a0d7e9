package bridge

import (
	"log/slog"
	"time"

	cron "github.com/netresearch/go-cron"

	"holdfast/spool"
)

// Window opens the window to tests: positions and sizes are all that they care about.
type Window struct{ w *window }

func NewWindow(lanes int) Window { return Window{newWindow(lanes)} }

func (w Window) Send(lane int, end spool.Position, records, size int) uint64 {
	return w.w.takeOff(lane, flight{end: end, records: records, size: size})
}

func (w Window) Pass(lane int, end spool.Position, records int, o spool.Outcome, record []byte) {
	w.w.pass(lane, flight{end: end, records: records, record: record}, o)
}

func (w Window) Ack(token uint64, o spool.Outcome) bool {
	f, lane := w.w.find(token)
	if f == nil {
		return false
	}
	w.w.land(lane, f, o)
	return true
}

func (w Window) Settle(lane int, resolve func(end spool.Position, records int, o spool.Outcome)) {
	w.w.settle(lane, func(f *flight) { resolve(f.end, f.records, f.outcome) })
}

func (w Window) Reset(lane int) { w.w.reset(lane) }
func (w Window) Sends() int     { return w.w.sends }
func (w Window) Bytes() int     { return w.w.bytes }
func (w Window) Oldest() uint64 { return w.w.oldest() }

// Slots is how many flights the lane's queue has room for.
func (w Window) Slots(lane int) int { return len(w.w.lanes[lane].ring) }

// Schedule opens the schedule.
type Schedule struct{ s *schedule }

func NewSchedule(shares []int) Schedule { return Schedule{newSchedule(shares, nil)} }

func NewLiveSchedule(shares, backfill []int) Schedule { return Schedule{newSchedule(shares, backfill)} }

func (s Schedule) Pick(waiting func(int) bool, fits func(int, bool) bool) int {
	return s.s.pick(waiting, fits)
}
func (s Schedule) Sent(lane, size int, waiting func(int) bool) { s.s.sent(lane, size, waiting) }

const Quantum = quantum

func Room(n, rank, ranks int) int { return room(n, rank, ranks) }

// Backoff opens the backoff, with a fixed share of the ceiling in place of chance.
type Backoff struct{ b *backoff }

func NewBackoff(lo, hi time.Duration, share float64) Backoff {
	b := newBackoff(lo, hi)
	b.rand = func(n int64) int64 { return int64(share * float64(n-1)) }
	return Backoff{b}
}

func NewRandomBackoff(lo, hi time.Duration) Backoff { return Backoff{newBackoff(lo, hi)} }

func (b Backoff) Next(healthy time.Duration) time.Duration { return b.b.next(healthy) }

// Pace opens the pace.
type Pace struct{ p *pace }

func NewPace(hi int) Pace { return Pace{newPace(hi)} }

func (p Pace) Acked(latency time.Duration, size, ahead int, order, newest uint64, inFlight int) {
	p.p.acked(latency, size, ahead, order, newest, inFlight)
}
func (p Pace) Limit() int                       { return p.p.limit }
func (p Pace) Restart()                         { p.p.restart() }
func (p Pace) Patience(bytes int) time.Duration { return p.p.patience(bytes) }

// Stalled runs a watchdog.
type Watchdog struct{ d watchdog }

func (d *Watchdog) Stalled(now time.Duration, oldest, acked, progress uint64, patience time.Duration) bool {
	return d.d.stalled(now, oldest, acked, progress, patience)
}

// Day opens a budget's day, with a clock that stands.
type Day struct{ b *budget }

func NewDay(counted, now time.Time, synced bool) Day {
	b := &budget{
		log: slog.New(slog.DiscardHandler), wall: func() time.Time { return now }, synced: func() bool { return synced },
		usage: Usage{Day: dayOf(counted), Bytes: 1 << 40},
	}
	return Day{b}
}

// Turned tells whether a new count has begun, after the process has run for so long.
func (d Day) Turned(now time.Duration) bool {
	d.b.turnDay(now)
	return d.b.usage.Bytes == 0
}

func OpenAt(windows []TimeWindow, t time.Time) (bool, time.Time, error) {
	var starts []cron.Schedule
	for _, w := range windows {
		s, err := parseCron(w.Cron)
		if err != nil {
			return false, time.Time{}, err
		}
		starts = append(starts, s)
	}
	open, until := openAt(starts, windows, t)
	return open, until, nil
}

// OnWire is how many bytes a send of so many takes.
func OnWire(size int) int { return size + framing(size) }
