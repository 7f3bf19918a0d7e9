package bridge_test

import (
	"testing"
	"time"

	"holdfast/bridge"
)

// link is a wire with a rate and a round trip, fed so that the pace's limit is always in use. run sends for a time
// and returns the bytes carried and how long a send waits at the end.
type link struct {
	rate  float64 // bytes a second
	rtt   time.Duration
	now   time.Duration
	free  time.Duration // when the wire is free again
	order uint64
	queue []linkSend
	bytes int
}

type linkSend struct {
	size       int
	ahead      int
	order      uint64
	sent, back time.Duration
}

func (l *link) run(p bridge.Pace, d time.Duration, most int) (carried int, last time.Duration) {
	for end := l.now + d; l.now < end; {
		for l.bytes < p.Limit() {
			size := min(most, max(p.Limit()/2, 1))
			l.free = max(l.free, l.now) + time.Duration(float64(size)/l.rate*float64(time.Second))
			l.order++
			l.queue = append(l.queue, linkSend{size, l.bytes + size, l.order, l.now, l.free + l.rtt})
			l.bytes += size
		}
		s := l.queue[0]
		l.queue = l.queue[1:]
		l.now = s.back
		p.Acked(l.now-s.sent, s.size, s.ahead, s.order, l.order, l.bytes)
		l.bytes -= s.size
		carried, last = carried+s.size, l.now-s.sent
	}
	return carried, last
}

func TestPaceFindsWhatALinkCarries(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name    string
		rate    float64
		rtt     time.Duration
		wait    time.Duration // at most, once found
		use     float64       // of the rate, at least
		settled time.Duration
	}{
		{"modem 1 KiB/s", 1 << 10, 300 * ms, 3 * time.Second, .85, 5 * time.Minute},
		{"2G 10 KiB/s", 10 << 10, 600 * ms, 2 * time.Second, .8, time.Minute},
		{"satellite 100 KiB/s", 100 << 10, 1500 * ms, 3500 * ms, .6, time.Minute},
		{"LTE 1 MiB/s", 1 << 20, 60 * ms, 1500 * ms, .9, 30 * time.Second},
		{"far 8 MiB/s", 8 << 20, 250 * ms, 1500 * ms, .9, 30 * time.Second},
		{"loopback 1 GiB/s", 1 << 30, ms / 10, 100 * ms, .9, 5 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, l := bridge.NewPace(4<<20), &link{rate: c.rate, rtt: c.rtt}
			l.run(p, c.settled, 128<<10)
			carried, last := l.run(p, time.Minute, 128<<10)
			if last > c.wait {
				t.Errorf("a send waits %v, want at most %v", last, c.wait)
			}
			if use := float64(carried) / (c.rate * 60); use < c.use {
				t.Errorf("carried %.2f of what the link can, want %.2f", use, c.use)
			}
		})
	}
}

// TestPaceFollowsALinkThatGetsSlow: from 1 MiB/s to 4 KiB/s and back.
func TestPaceFollowsALinkThatGetsSlow(t *testing.T) {
	p, l := bridge.NewPace(4<<20), &link{rate: 1 << 20, rtt: 50 * time.Millisecond}
	l.run(p, time.Minute, 128<<10)
	l.rate = 4 << 10
	l.run(p, 15*time.Minute, 128<<10) // what was on its way takes its time
	if _, last := l.run(p, time.Minute, 128<<10); last > 2*time.Second {
		t.Errorf("on the slow link a send waits %v", last)
	}
	l.rate = 1 << 20
	l.run(p, time.Minute, 128<<10)
	if carried, _ := l.run(p, time.Minute, 128<<10); carried < 50<<20 {
		t.Errorf("back on the fast link %d bytes in a minute", carried)
	}
}

func TestPaceStartsEachSessionLow(t *testing.T) {
	p, l := bridge.NewPace(4<<20), &link{rate: 1 << 30, rtt: time.Millisecond}
	l.run(p, time.Second, 128<<10)
	if p.Limit() < 1<<20 {
		t.Fatalf("limit on a fast link is %d", p.Limit())
	}
	p.Restart()
	if p.Limit() > 16<<10 {
		t.Errorf("limit after a restart is %d: a link of 1 KiB/s would need minutes for its first ack", p.Limit())
	}
	if got := p.Patience(p.Limit()); got < 15*time.Second {
		t.Errorf("patience with an unknown link is %v", got)
	}
}

// TestPaceFollowsALinkThatGetsFar: its traffic goes by satellite from now on.
func TestPaceFollowsALinkThatGetsFar(t *testing.T) {
	p, l := bridge.NewPace(4<<20), &link{rate: 1 << 20, rtt: 20 * time.Millisecond}
	l.run(p, time.Minute, 128<<10)
	l.rtt = 2 * time.Second
	l.run(p, 3*time.Minute, 128<<10)
	carried, last := l.run(p, time.Minute, 128<<10)
	if carried < 30<<20 || last > 4*time.Second {
		t.Errorf("%d bytes in a minute, a send waits %v", carried, last)
	}
}
