package bridge

import (
	"time"

	"holdfast/spool"
)

// window is what is in flight: for each lane a queue of flights in the order of the spool. A flight
// lands when its outcome is known, in any order; the cursor follows the landed flights at the head
// of the lane's queue and nothing else.
//
// A token names a flight: its number in the lane, shifted, and the lane. Numbers go on for the life of a Bridge and
// are never used again, so an ack that comes twice, or from a connection that is gone, names a
// flight that is not there (or has landed) and is ignored. No generation has to be carried along.
//
// The window does no I/O and knows no clock. Only Run's goroutine uses it.
type window struct {
	lanes []laneWindow
	sends int // flights that wait for an ack, or have one and wait for those before them
	bytes int // what those hold
	order uint64
}

type laneWindow struct {
	ring  []flight // a power of two long; flight number n stands at n & (len-1)
	first uint64   // number of the oldest flight
	next  uint64   // number of the next flight
	dirty bool     // something landed since settle
}

// flight is a stretch of records on its way to an outcome.
type flight struct {
	end     spool.Position // after the last record
	records int
	size    int           // bytes it holds in the window
	sent    time.Duration // by the bridge's clock
	ahead   int           // bytes in flight when it was sent, its own included
	order   uint64        // of the send among all lanes
	landed  bool
	outcome spool.Outcome
	record  []byte // the record, if it is one: what Park keeps
	reason  string // why it is parked
}

// Tokens: 16 bits lane, 48 bits number. 100,000 sends a second use them up in 89 years.
const laneBits = 16

func newToken(lane int, n uint64) uint64 { return n<<laneBits | uint64(lane) }

func newWindow(lanes int) *window {
	w := &window{lanes: make([]laneWindow, lanes)}
	for i := range w.lanes {
		w.lanes[i] = laneWindow{ring: make([]flight, 16), first: 1, next: 1}
	}
	return w
}

// takeOff adds a send at the end of a lane and returns its token.
func (w *window) takeOff(lane int, f flight) uint64 {
	w.order++
	f.order, f.landed = w.order, false
	return newToken(lane, w.push(lane, f))
}

// pass adds records that need no send, with their outcome. What follows others of its kind joins
// them, so that a lane full of expired messages behind one unacked send takes no room.
func (w *window) pass(lane int, f flight, o spool.Outcome) {
	l := &w.lanes[lane]
	f.landed, f.outcome = true, o
	l.dirty = true
	if l.next > l.first && o != spool.Parked {
		if last := l.at(l.next - 1); last.landed && last.outcome == o && last.size == 0 {
			last.end, last.records = f.end, last.records+f.records
			return
		}
	}
	if o == spool.Parked {
		f.size = len(f.record)
	} else {
		f.size, f.record = 0, nil
	}
	w.push(lane, f)
}

func (w *window) push(lane int, f flight) uint64 {
	l := &w.lanes[lane]
	if l.next-l.first == uint64(len(l.ring)) {
		l.grow()
	}
	n := l.next
	l.next++
	*l.at(n) = f
	w.sends++
	w.bytes += f.size
	return n
}

// find returns the flight that a token names if it still waits for its ack.
func (w *window) find(token uint64) (*flight, int) {
	lane, n := int(token&(1<<laneBits-1)), token>>laneBits
	if lane >= len(w.lanes) {
		return nil, 0
	}
	l := &w.lanes[lane]
	if n < l.first || n >= l.next {
		return nil, 0
	}
	if f := l.at(n); !f.landed {
		return f, lane
	}
	return nil, 0
}

// land records a flight's outcome. f is from find.
func (w *window) land(lane int, f *flight, o spool.Outcome) {
	f.landed, f.outcome = true, o
	w.lanes[lane].dirty = true
}

// settle takes the landed flights at the head of a lane out of the window and hands their ends to
// resolve, stretches of one outcome as one; a parked flight stands alone.
func (w *window) settle(lane int, resolve func(f *flight)) {
	l := &w.lanes[lane]
	if !l.dirty {
		return
	}
	l.dirty = false
	var run flight
	for l.first < l.next {
		f := l.at(l.first)
		if !f.landed {
			break
		}
		if run.records > 0 && (f.outcome != run.outcome || f.outcome == spool.Parked) {
			resolve(&run)
			run = flight{}
		}
		records := run.records + f.records
		run = *f
		run.records = records
		w.drop(l)
	}
	if run.records > 0 {
		resolve(&run)
	}
}

// reset empties a lane: what was in flight is as if it had never been sent.
func (w *window) reset(lane int) {
	l := &w.lanes[lane]
	for l.first < l.next {
		w.drop(l)
	}
	l.dirty = false
}

// head returns the oldest send that waits for its ack, and its lane; nil if none does.
func (w *window) head() (head *flight, lane int) {
	for i := range w.lanes {
		l := &w.lanes[i]
		for n := l.first; n < l.next; n++ {
			if f := l.at(n); !f.landed {
				if head == nil || f.order < head.order {
					head, lane = f, i
				}
				break
			}
		}
	}
	return head, lane
}

// oldest is head's order number; 0 if nothing waits.
func (w *window) oldest() uint64 {
	if f, _ := w.head(); f != nil {
		return f.order
	}
	return 0
}

func (w *window) drop(l *laneWindow) {
	f := l.at(l.first)
	w.sends--
	w.bytes -= f.size
	*f = flight{} // free what it held
	l.first++
}

func (l *laneWindow) at(n uint64) *flight { return &l.ring[n&uint64(len(l.ring)-1)] }

func (l *laneWindow) grow() {
	old := *l
	l.ring = make([]flight, 2*len(old.ring))
	for n := l.first; n < l.next; n++ {
		*l.at(n) = *old.at(n)
	}
}
