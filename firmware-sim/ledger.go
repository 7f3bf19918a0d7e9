package firmwaresim

import (
	"fmt"
	"slices"
	"strings"
	"sync"
)

// ranges is a set of numbers as sorted, disjoint, not adjoining ranges. What comes in order,
// as acknowledgements and arrivals nearly do, costs no room.
type ranges []span

type span struct{ first, last uint64 }

// add says whether n is new.
func (r *ranges) add(n uint64) bool {
	s := *r
	k := len(s)
	if k > 0 && n == s[k-1].last+1 {
		s[k-1].last = n
		return true
	}
	if k == 0 || n > s[k-1].last {
		*r = append(s, span{n, n})
		return true
	}
	// i: the first range that does not end before n
	i, _ := slices.BinarySearchFunc(s, n, func(x span, n uint64) int {
		if x.last < n {
			return -1
		}
		return 1
	})
	if s[i].first <= n {
		return false
	}
	before := i > 0 && s[i-1].last+1 == n
	after := s[i].first == n+1
	switch {
	case before && after:
		s[i-1].last = s[i].last
		*r = slices.Delete(s, i, i+1)
	case before:
		s[i-1].last = n
	case after:
		s[i].first = n
	default:
		*r = slices.Insert(s, i, span{n, n})
	}
	return true
}

func (r ranges) count() (n uint64) {
	for _, s := range r {
		n += s.last - s.first + 1
	}
	return n
}

// minus gives what of r is not in other.
func (r ranges) minus(other ranges) (left ranges) {
	i := 0
	for _, s := range r {
		for i < len(other) && other[i].last < s.first {
			i++
		}
		for j := i; j < len(other) && other[j].first <= s.last; j++ {
			if other[j].first > s.first {
				left = append(left, span{s.first, other[j].first - 1})
			}
			if other[j].last >= s.last {
				s.first = s.last + 1
				break
			}
			s.first = other[j].last + 1
		}
		if s.first <= s.last {
			left = append(left, s)
		}
	}
	return left
}

func (s span) String() string {
	if s.first == s.last {
		return fmt.Sprint(s.first)
	}
	return fmt.Sprintf("%d-%d", s.first, s.last)
}

// account is what one stream of one device has to say.
type account struct {
	made    uint64 // samples 1 … made were taken
	sent    uint64 // how many of them were sent at least once
	unsent  ranges // dropped on the device without ever being sent
	acked   ranges
	again   ranges // sent more than once
	refused uint64 // refused by the server with a reason
}

// Ledger holds what each device has published and what of it was acknowledged, at the moment
// when Fleet.Ledger made it. Memory grows with the gaps in it, not with the messages.
type Ledger struct {
	devices map[string]map[string]account
}

// Verdict is the outcome of Ledger.Verify, in messages.
type Verdict struct {
	Published    uint64 `json:"published"`    // sent at least once
	Acknowledged uint64 `json:"acknowledged"` // by PUBACK or PUBREC
	Arrived      uint64 `json:"arrived"`      // each message once
	Duplicates   uint64 `json:"duplicates"`   // further arrivals
	Lost         uint64 `json:"lost"`         // acknowledged and not arrived
	OutOfOrder   uint64 `json:"out_of_order"` // arrived first after a later one of its stream
	Unknown      uint64 `json:"unknown"`      // arrived although never sent
	Repeated     uint64 `json:"repeated"`     // arrived more than once although sent only once
	// Behind is how many of OutOfOrder their device had sent more than once: where a rule may take the first copy, the second one
	// comes later than what was sent between them.
	Behind uint64 `json:"behind,omitempty"`
	// Missing is what is lost, by device, stream and number.
	Missing []Missing `json:"-"`
	// Examples name some of what is lost, out of order or unknown.
	Examples []string `json:"examples,omitempty"`
}

// Missing are messages that were acknowledged and did not arrive.
type Missing struct {
	Device, Stream string
	First, Last    uint64 // both inclusive
}

// OK says that nothing is lost, out of order or unknown. Duplicates are allowed: whoever was
// not acknowledged sends again. Whether Repeated is depends on the way of the arrivals: where
// repeats of a gateway are dropped by their ids there should be none.
func (v Verdict) OK() bool { return v.Lost == 0 && v.OutOfOrder == 0 && v.Unknown == 0 }

const maxExamples = 10

// NotArrived is what an example of Verdict.Lost ends with.
const NotArrived = "acknowledged, not arrived"

func (v *Verdict) example(device, stream, what string, r ranges) {
	for _, s := range r {
		if len(v.Examples) == maxExamples {
			return
		}
		v.Examples = append(v.Examples, fmt.Sprintf("%s %s n=%v: %s", device, stream, s, what))
	}
}

// Verify compares the ledger with what arrived. Arrivals of devices that the ledger does not
// know count as unknown.
func (l *Ledger) Verify(arrived *Arrivals) Verdict {
	arrived.mu.Lock()
	defer arrived.mu.Unlock()
	var v Verdict
	for device, streams := range l.devices {
		for stream, a := range streams {
			v.Published += a.sent
			v.Acknowledged += a.acked.count()
			var got ranges
			if s := arrived.streams[device][stream]; s != nil {
				got = s.seen
			}
			lost := a.acked.minus(got)
			v.Lost += lost.count()
			for _, r := range lost {
				v.Missing = append(v.Missing, Missing{device, stream, r.first, r.last})
			}
			v.example(device, stream, NotArrived, lost)
		}
	}
	for device, streams := range arrived.streams {
		for stream, s := range streams {
			a := l.devices[device][stream]
			v.Arrived += s.seen.count()
			v.Duplicates += s.duplicates
			v.OutOfOrder += s.disorder.count()
			unsettled := s.disorder.minus(a.again)
			v.Behind += s.disorder.count() - unsettled.count()
			v.example(device, stream, "arrived first after a later one", s.disorder)
			var sent ranges
			if a.made > 0 {
				sent = ranges{{1, a.made}}.minus(a.unsent)
			}
			unknown := s.seen.minus(sent)
			v.Unknown += unknown.count()
			v.example(device, stream, "arrived, never sent", unknown)
			repeated := s.again.minus(a.again)
			v.Repeated += repeated.count()
			v.example(device, stream, "arrived more than once, sent once", repeated)
		}
	}
	slices.Sort(v.Examples)
	return v
}

// SentAgain says whether a device has sent a message more than once.
func (l *Ledger) SentAgain(device, stream string, n uint64) bool {
	for _, s := range l.devices[device][stream].again {
		if s.first <= n && n <= s.last {
			return true
		}
	}
	return false
}

// String is the verdict in one paragraph.
func (v Verdict) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "published %d, acknowledged %d, arrived %d, duplicates %d, lost %d, out of order %d, unknown %d",
		v.Published, v.Acknowledged, v.Arrived, v.Duplicates, v.Lost, v.OutOfOrder, v.Unknown)
	for _, e := range v.Examples {
		b.WriteString("\n  " + e)
	}
	return b.String()
}

// Arrivals notes what arrives upstream. Many goroutines may use it at once, but messages of
// one stream must be added in the order of their arrival.
type Arrivals struct {
	mu      sync.Mutex
	streams map[string]map[string]*arrived // by device and stream; under mu
	total   uint64                         // under mu
}

type arrived struct {
	seen       ranges
	again      ranges // arrived more than once
	disorder   ranges // arrived first after a later one
	duplicates uint64
	highest    uint64
	late       uint64 // highest of those added as late
}

// NewArrivals begins with nothing.
func NewArrivals() *Arrivals { return &Arrivals{streams: make(map[string]map[string]*arrived)} }

// Add notes the arrival of message n of a stream.
func (a *Arrivals) Add(device, stream string, n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream([]byte(device), []byte(stream)).add(n)
	a.total++
}

// AddLate is Add for a message that comes after newer ones by design: out of a backlog that is sent beside what is new. Such
// messages have an order among themselves.
func (a *Arrivals) AddLate(device, stream string, n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream([]byte(device), []byte(stream)).addLate(n)
	a.total++
}

// AddPayload notes the arrival of a message by its payload. An error says that it is not of
// a simulated device.
func (a *Arrivals) AddPayload(payload []byte) error {
	device, stream, n, _, ok := scanPayload(payload)
	if !ok {
		p, err := ParsePayload(payload)
		if err != nil {
			return err
		}
		a.Add(p.Device, p.Stream, p.N)
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stream(device, stream).add(n)
	a.total++
	return nil
}

// Total is how many arrivals there were, duplicates included.
func (a *Arrivals) Total() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.total
}

func (a *Arrivals) stream(device, stream []byte) *arrived {
	streams := a.streams[string(device)]
	if streams == nil {
		streams = make(map[string]*arrived)
		a.streams[string(device)] = streams
	}
	s := streams[string(stream)]
	if s == nil {
		s = new(arrived)
		streams[string(stream)] = s
	}
	return s
}

func (s *arrived) add(n uint64) { s.come(n, &s.highest) }

func (s *arrived) addLate(n uint64) { s.come(n, &s.late) }

// come notes n, which should be higher than all that came the same way.
func (s *arrived) come(n uint64, highest *uint64) {
	if !s.seen.add(n) {
		s.duplicates++
		s.again.add(n)
		return
	}
	if n < *highest {
		s.disorder.add(n)
		return
	}
	*highest = n
}
