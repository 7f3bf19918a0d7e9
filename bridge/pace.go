package bridge

import "time"

// pace bounds the bytes in flight to what the link carries in about a second, because whatever is in
// flight stands before an alarm that comes now. It learns from the acks: their latency
// beyond a second says that bytes are waiting somewhere on the way (this box, a modem, a proxy), so there are
// too many of them; acks well within it while the limit holds us back say that there is room. A
// window in messages alone would put minutes of backlog in front of an alarm on a slow link.
type pace struct {
	lo, hi  int
	goal    time.Duration
	limit   int           // bytes that may be in flight
	fastest time.Duration // least latency of this session: the bare round trip; 0: no ack yet
	since   uint64        // sends up to this one were made under another limit
}

const (
	paceGoal  = time.Second
	paceFirst = 16 << 10 // at the start of each session: 16 s at 1 KiB/s, doubled every round trip on a better link
	paceLow   = 2 << 10
	paceHigh  = 4 << 20
	rateLow   = 1 << 10 // bytes/s: what a link is taken for until it has acked
)

func newPace(hi int) *pace {
	return &pace{lo: min(paceLow, hi), hi: hi, goal: paceGoal, limit: min(paceFirst, hi)}
}

// restart begins a session: nothing is known of its link but that it may be worse than the last one's.
func (p *pace) restart() {
	p.limit, p.fastest, p.since = min(p.limit, paceFirst), 0, 0
}

// acked learns from one ack: the send of size bytes was the order-th, the newest is newest, and inFlight bytes
// were out when the ack came.
func (p *pace) acked(latency time.Duration, size int, order, newest uint64, inFlight int) {
	if p.fastest == 0 || latency < p.fastest {
		p.fastest = max(latency, 1)
	}
	if order <= p.since {
		return
	}
	goal := max(p.goal, 2*p.fastest)
	switch {
	case latency > goal:
		scale := max(float64(goal)/float64(latency), 1.0/8)
		p.limit = max(int(float64(p.limit)*scale), p.lo)
		p.since = newest
	case latency < goal/2 && inFlight >= p.limit/2:
		p.limit = min(p.limit+size, p.hi)
	}
}

// patience is how much longer than the ack time-out bytes in flight may take on a link like this.
func (p *pace) patience(inFlight int) time.Duration {
	rate := rateLow
	if p.fastest > 0 {
		rate = max(int(float64(p.limit)/p.goal.Seconds()/4), rateLow/2)
	}
	return time.Duration(float64(inFlight) / float64(rate) * float64(time.Second))
}
