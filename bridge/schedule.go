package bridge

// schedule shares the link among the lanes: strictly by priority, on top of a share that each
// lane with something to send gets at least.
//
// Credit says how far a lane is behind its share of what was sent while it waited, or, below zero, ahead of it.
// The lane of the highest priority goes, unless it is a quantum ahead and another is a quantum
// behind: that one is owed a turn. So an alarm out of the blue goes first whatever the others are owed, for it has taken
// nothing from them; and a flood of alarms leaves each lane below it the share that was promised.
//
// A lane may be two streams, of the newest messages and of the backlog. The turn is the lane's: the newest go, unless
// the backlog waits, too, and is behind its share of what the lane sent meanwhile.
type schedule struct {
	share  []float64 // of the link, by stream, the lane's at its first; together at most 1
	credit []float64 // bytes, within ±4 quanta; of a backlog within its lane
	part   []float64 // of the lane's bytes that a backlog gets while the stream before it waits, too; 0: it is no backlog
}

// quantum is how many bytes of inequality are nobody's concern.
const quantum = 64 << 10

// newSchedule makes a schedule of streams with shares in percent. backfill, which may be nil, has the percentage of each
// stream that is the backlog of the one before it; the shares of those are not looked at.
func newSchedule(shares, backfill []int) *schedule {
	s := &schedule{share: make([]float64, len(shares)), credit: make([]float64, len(shares)), part: make([]float64, len(shares))}
	sum := 0
	for i, share := range shares {
		if i < len(backfill) && backfill[i] > 0 {
			s.part[i] = min(float64(backfill[i])/100, 1)
		} else {
			sum += max(share, 0)
		}
	}
	sum = max(sum, 100)
	for i, share := range shares {
		if s.part[i] == 0 {
			s.share[i] = float64(max(share, 0)) / float64(sum)
		}
	}
	return s
}

// backlog is the stream of the backlog of the lane whose first stream is i; -1 if it has none.
func (s *schedule) backlog(i int) int {
	if i+1 < len(s.part) && s.part[i+1] > 0 {
		return i + 1
	}
	return -1
}

// turn returns the stream whose turn it is if it is that of the lane whose first stream is i; -1: it has nothing to send.
func (s *schedule) turn(i int, waiting func(stream int) bool) int {
	back := s.backlog(i)
	switch {
	case waiting(i):
		if back < 0 || s.credit[back] <= 0 || !waiting(back) {
			return i
		}
		return back
	case back >= 0 && waiting(back):
		return back
	}
	return -1
}

// owed tells whether a stream is a backlog that is behind its share of the lane's bytes.
func (s *schedule) owed(i int) bool { return s.part[i] > 0 && s.credit[i] > 0 }

// pick returns the stream whose turn it is, or -1. waiting tells which have something to send, fits
// whether one of them finds room, its lane being owed a turn or not. Streams are in order of priority.
func (s *schedule) pick(waiting func(stream int) bool, fits func(stream int, owed bool) bool) int {
	first := -1
	for i := range s.share {
		if s.part[i] > 0 {
			continue // its lane has had its look
		}
		turn := s.turn(i, waiting)
		switch {
		case turn < 0:
		case first < 0:
			if first = turn; s.credit[i] > -quantum { // not ahead: nobody comes before it
				if fits(turn, false) {
					return turn
				}
				return -1 // what is below finds less room
			}
		case s.credit[i] >= quantum && fits(turn, true):
			return turn
		}
	}
	if first >= 0 && fits(first, false) {
		return first
	}
	return -1
}

// sent books a send of the stream.
func (s *schedule) sent(stream, size int, waiting func(stream int) bool) {
	for i := range s.share {
		if s.part[i] > 0 {
			continue
		}
		back := s.backlog(i)
		switch {
		case i == stream || back >= 0 && back == stream:
			s.credit[i] = max(s.credit[i]-(1-s.share[i])*float64(size), -4*quantum)
			if back >= 0 {
				s.sentWithin(i, back, stream, float64(size), waiting)
			}
		case waiting(i) || back >= 0 && waiting(back):
			s.credit[i] = min(s.credit[i]+s.share[i]*float64(size), 4*quantum)
		default: // nobody saves up while he has nothing to send, and what was taken is forgiven
			s.credit[i] = min(s.credit[i]+float64(size), 0)
		}
	}
}

// sentWithin books a send within a lane of two streams.
func (s *schedule) sentWithin(newest, back, stream int, size float64, waiting func(stream int) bool) {
	c := &s.credit[back]
	other := newest
	if stream == newest {
		other = back
	}
	switch {
	case !waiting(other): // as above
		*c = min(*c+size, 0)
	case stream == back:
		*c = max(*c-(1-s.part[back])*size, -4*quantum)
	default:
		*c = min(*c+s.part[back]*size, 4*quantum)
	}
}

// room is how much of a window of n a lane of this rank may fill (0 is the first of ranks). The
// lower a lane the more it leaves free, an eighth in all, so that an alarm always finds a place.
func room(n, rank, ranks int) int {
	if ranks <= 1 {
		return n
	}
	reserve := n * rank / (8 * (ranks - 1))
	if reserve < rank { // a small window: still one place for each rank above, as far as it goes
		reserve = rank
	}
	return max(n-reserve, 1)
}
