package bridge

// schedule shares the link among the lanes: strictly by priority, on top of a share that each
// lane with something to send gets at least.
//
// Credit says how far a lane is behind its share of what was sent while it waited, or, below zero, ahead of it.
// The lane of the highest priority goes, unless it is a quantum ahead and another is a quantum
// behind: that one is owed a turn. So an alarm out of the blue goes first whatever the others are owed, for it has taken
// nothing from them; and a flood of alarms leaves each lane below it the share that was promised.
type schedule struct {
	share  []float64 // of the link, by lane; together at most 1
	credit []float64 // bytes, within ±4 quanta
}

// quantum is how many bytes of inequality are nobody's concern.
const quantum = 64 << 10

func newSchedule(shares []int) *schedule {
	sum := 0
	for _, s := range shares {
		sum += max(s, 0)
	}
	sum = max(sum, 100)
	s := &schedule{share: make([]float64, len(shares)), credit: make([]float64, len(shares))}
	for i := range shares {
		s.share[i] = float64(max(shares[i], 0)) / float64(sum)
	}
	return s
}

// pick returns the lane whose turn it is, or -1. waiting tells which have something to send, fits
// whether one of them finds room, being owed a turn or not. Lanes are in order of priority.
func (s *schedule) pick(waiting func(lane int) bool, fits func(lane int, owed bool) bool) int {
	first := -1
	for i := range s.share {
		switch {
		case !waiting(i):
		case first < 0:
			if first = i; s.credit[i] > -quantum { // not ahead: nobody comes before it
				if fits(i, false) {
					return i
				}
				return -1 // what is below finds less room
			}
		case s.credit[i] >= quantum && fits(i, true):
			return i
		}
	}
	if first >= 0 && fits(first, false) {
		return first
	}
	return -1
}

// sent books a send of the lane.
func (s *schedule) sent(lane, size int, waiting func(lane int) bool) {
	for i := range s.share {
		switch {
		case i == lane:
			s.credit[i] = max(s.credit[i]-(1-s.share[i])*float64(size), -4*quantum)
		case waiting(i):
			s.credit[i] = min(s.credit[i]+s.share[i]*float64(size), 4*quantum)
		default: // nobody saves up while he has nothing to send, and what was taken is forgiven
			s.credit[i] = min(s.credit[i]+float64(size), 0)
		}
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
