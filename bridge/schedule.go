package bridge

// schedule shares the link among the lanes: strictly by priority, on top of a share that each
// lane with something to send gets at least.
//
// While others send, a lane that waits earns credit, its share of their bytes. A lane with
// a quantum of credit is owed a turn and comes before those of higher priority; what it sends is
// taken off. So an alarm out of the blue goes first, for nobody earns while the alarm lane is
// silent; and a flood of alarms leaves each lane below it the share that was promised.
type schedule struct {
	share  []float64 // of the link, by lane; together at most 1
	credit []float64 // bytes
}

// quantum is how many bytes a lane is behind before it is served out of turn.
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
		if !waiting(i) {
			s.credit[i] = min(s.credit[i], 0) // nobody saves up while he has nothing to send
			continue
		}
		if s.credit[i] >= quantum && fits(i, true) {
			return i
		}
		if first < 0 && fits(i, false) {
			first = i
		}
	}
	return first
}

// sent books a send of the lane.
func (s *schedule) sent(lane, size int, waiting func(lane int) bool) {
	for i := range s.share {
		if i == lane || waiting(i) {
			s.credit[i] = min(s.credit[i]+s.share[i]*float64(size), 2*quantum)
		}
	}
	s.credit[lane] = max(s.credit[lane]-float64(size), -quantum)
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
