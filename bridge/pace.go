package bridge

import "time"

// pace bounds the bytes in flight to what the link carries in about a second beyond its round trip,
// because whatever is in flight stands before an alarm that comes now. A window in messages alone would
// put minutes of backlog in front of an alarm on a slow link.
//
// It learns from the acks. A send's latency is the round trip and the time that the bytes in front of it
// took; a line through the last few dozen sends (latency over bytes in front) tells the two apart. What waits
// longer than goal beyond the round trip has too many bytes in front of it: the limit shrinks.
// What waits less than half of that, while the limit holds us back, lets it grow.
type pace struct {
	lo, hi int
	limit  int           // bytes that may be in flight
	trip   time.Duration // the round trip by the best of our knowledge
	least  time.Duration // the trip is at most this: the least latency seen; 0: no ack in this session
	since  uint64        // sends up to this one were made under another limit

	// Sums over the acks, older ones weighing less: of the weights, of bytes in front x, latency y (seconds),
	// their squares and products.
	w, x, y, xx, xy float64
}

const (
	paceGoal  = time.Second
	paceFirst = 16 << 10 // at the start of each session: 16 s at 1 KiB/s, doubled every round trip on a better link
	paceLow   = 2 << 10
	paceHigh  = 4 << 20
	paceDecay = 0.95
	rateLow   = 1 << 10 // bytes/s: what a link is taken for until it has acked
)

func newPace(hi int) *pace {
	p := &pace{lo: min(paceLow, hi), hi: hi, limit: hi}
	p.restart()
	return p
}

// restart begins a session: nothing is known of its link but that it may be worse than the last one's.
func (p *pace) restart() {
	*p = pace{lo: p.lo, hi: p.hi, limit: min(p.limit, paceFirst)}
}

// acked learns from one ack: of the order-th send, of size bytes, when the newest is newest. ahead bytes were in flight
// with it when it was made, its own included, and inFlight when its ack came.
func (p *pace) acked(latency time.Duration, size, ahead int, order, newest uint64, inFlight int) {
	// With hardly anything in flight a latency is nearly a round trip, be it longer than it used to be.
	if latency = max(latency, 1); p.least == 0 || latency < p.least || p.limit == p.lo && order > p.since {
		p.least = latency
	}
	p.learn(float64(ahead), latency.Seconds())
	if order <= p.since {
		return
	}
	switch {
	case latency > p.trip+paceGoal:
		scale := max(float64(p.trip+paceGoal)/float64(latency), 1.0/8)
		p.limit = max(int(float64(p.limit)*scale), p.lo)
		p.since = newest
	case latency < p.trip+paceGoal/2 && inFlight >= p.limit/2:
		p.limit = min(p.limit+size, p.hi)
	}
}

// learn adds a point and finds where the line through all meets zero bytes: the round trip. Points
// that are too close together give no line, and the last one stays.
func (p *pace) learn(x, y float64) {
	p.w = p.w*paceDecay + 1
	p.x = p.x*paceDecay + x
	p.y = p.y*paceDecay + y
	p.xx = p.xx*paceDecay + x*x
	p.xy = p.xy*paceDecay + x*y
	mx, my := p.x/p.w, p.y/p.w
	spread := p.xx/p.w - mx*mx
	if spread < mx*mx/100 { // within a tenth
		p.trip = min(p.trip, p.least)
		return
	}
	slope := (p.xy/p.w - mx*my) / spread
	p.trip = clamp(time.Duration((my-slope*mx)*float64(time.Second)), 0, p.least)
}

// patience is how much longer than the ack time-out bytes in flight may take on a link like this.
func (p *pace) patience(inFlight int) time.Duration {
	rate := float64(rateLow)
	if p.least > 0 {
		rate = max(float64(p.limit)/(p.trip+paceGoal).Seconds()/4, rateLow/2)
	}
	return time.Duration(float64(inFlight) / rate * float64(time.Second))
}
