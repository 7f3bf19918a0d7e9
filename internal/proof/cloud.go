package proof

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
)

// Cloud is the far end: it takes what arrives upstream through the receiver that drops repeats by id, and remembers what it needs
// for a verdict. Its methods may be called from many goroutines, but Take for one publish after the other, as they arrived.
type Cloud struct {
	receiver *cloud.Receiver

	mu       sync.Mutex                       // guards what follows
	arrivals map[string]*firmwaresim.Arrivals // of simulated devices, by the prefix of their ids
	traces   map[stream]*trace
	epochs   map[string]uint64 // number of each epoch, from 1, in the order in which they were heard of
	lanes    map[laneKey]*lane
	gaps     map[wire.Gap]bool
	others   []cloud.Delivery // messages of other devices, in the order of arrival
	errors   []error
	missing  []firmwaresim.Missing // of the fleet that Check looks at
	late     map[string]uint64     // messages that came after newer ones, by lane
}

type stream struct{ device, name string }

type laneKey struct{ epoch, lane string }

// lane is what came of one lane in one epoch.
type lane struct {
	came        bits
	count       uint64
	first, last uint64        // lowest and highest that came; 0: none did
	announced   []cloud.Range // gaps
	backlog     uint64        // the last sequence that came after a newer one
	unnamed     []cloud.Range // holes whose announcement was lost, and that is announced; see Check
}

// trace is where the messages of one stream lie: places[n-1] is that of message n, 0 if it did not come with an id.
type trace struct {
	lane   string
	places []place
}

// place orders what a lane holds over its epochs: number of the epoch, then the sequence.
type place uint64

const epochShift = 48

func (p place) seq() uint64 { return uint64(p) & (1<<epochShift - 1) }

// NewCloud makes one to which nothing has come.
func NewCloud() *Cloud {
	return &Cloud{
		// Every hole is remembered, however many there are.
		receiver: cloud.New(cloud.Config{MaxRanges: 1 << 20}),
		arrivals: map[string]*firmwaresim.Arrivals{},
		traces:   map[stream]*trace{},
		epochs:   map[string]uint64{},
		lanes:    map[laneKey]*lane{},
		gaps:     map[wire.Gap]bool{},
		late:     map[string]uint64{},
	}
}

// Receiver is what drops the repeats.
func (c *Cloud) Receiver() *cloud.Receiver { return c.receiver }

// Take takes one publish. It keeps nothing of payload but what it copies.
func (c *Cloud) Take(topic string, payload []byte) {
	payload = slices.Clone(payload) // what Receive returns shares memory with it
	all, err := c.receiver.Receive(topic, payload)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.errors = append(c.errors, err)
	}
	for i := range all {
		switch d := &all[i]; d.Kind {
		case cloud.Message:
			c.message(d)
		case cloud.Gap:
			if d.Missing.Count() > maxTrace {
				c.errors = append(c.errors, fmt.Errorf("gap of %d messages in lane %s: there never were so many", d.Missing.Count(), d.Lane))
				continue
			}
			if !c.gaps[d.Gap] { // else told again
				c.gaps[d.Gap] = true
				l := c.lane(d.Epoch, d.Lane)
				l.announced = append(l.announced, d.Missing)
			}
		default: // repeats are dropped, holes count in the receiver, states and events are not asked for
		}
	}
}

func (c *Cloud) lane(epoch, name string) *lane {
	key := laneKey{epoch, name}
	l := c.lanes[key]
	if l == nil {
		l = new(lane)
		epoch = strings.Clone(epoch)
		c.lanes[laneKey{epoch, strings.Clone(name)}] = l
		if c.epochs[epoch] == 0 {
			c.epochs[epoch] = uint64(len(c.epochs)) + 1
		}
	}
	return l
}

// message notes one that came for the first time. Under mu.
func (c *Cloud) message(d *cloud.Delivery) {
	if d.ID.Seq > 0 {
		l := c.lane(d.Epoch, d.Lane)
		l.came.set(d.ID.Seq)
		l.count++
		if d.Late {
			if d.ID.Seq <= l.backlog || !d.Replayed {
				c.errors = append(c.errors, fmt.Errorf("%s came after %d of the same backlog, marked as replayed: %v", d.ID, l.backlog, d.Replayed))
			}
			l.backlog = max(l.backlog, d.ID.Seq)
		}
		if l.first == 0 {
			l.first = d.ID.Seq
		}
		l.first, l.last = min(l.first, d.ID.Seq), max(l.last, d.ID.Seq)
	}
	p, err := firmwaresim.ParsePayload(d.Message.Payload)
	if err != nil {
		c.others = append(c.others, *d)
		return
	}
	if d.Gateway != "" && d.Message.Device != p.Device {
		c.errors = append(c.errors, fmt.Errorf("message of device %s says it is of %s", p.Device, d.Message.Device))
	}
	prefix, _, _ := strings.Cut(p.Device, "-")
	arrivals := c.arrivals[prefix]
	if arrivals == nil {
		arrivals = firmwaresim.NewArrivals()
		c.arrivals[strings.Clone(prefix)] = arrivals
	}
	if d.Late {
		c.late[d.Lane]++
		arrivals.AddLate(p.Device, p.Stream, p.N)
	} else {
		arrivals.Add(p.Device, p.Stream, p.N)
	}
	if d.ID.Seq > 0 {
		c.trace(d, &p)
	}
}

func (c *Cloud) trace(d *cloud.Delivery, p *firmwaresim.Payload) {
	t := c.traces[stream{p.Device, p.Stream}]
	if t == nil {
		t = &trace{lane: strings.Clone(d.Lane)}
		c.traces[stream{strings.Clone(p.Device), strings.Clone(p.Stream)}] = t
	}
	if t.lane != d.Lane {
		return // another route by now: there is no order between lanes
	}
	epoch := c.epochs[d.Epoch]
	if p.N > maxTrace {
		return // no device made so many: Check finds that it was never sent
	}
	for uint64(len(t.places)) < p.N {
		t.places = append(t.places, 0)
	}
	at := &t.places[p.N-1]
	if here := place(epoch<<epochShift | d.ID.Seq); *at == 0 || here < *at { // of two sendings the first counts
		*at = here
	}
}

const maxTrace = 100_000_000

// Others are the messages of devices that are not simulated, in the order of their arrival.
func (c *Cloud) Others() []cloud.Delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clip(c.others)
}

// Errors are publishes that could not be read, and messages that contradict themselves.
func (c *Cloud) Errors() []error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clip(c.errors)
}

// bits is a set of numbers that are dense.
type bits []uint64

func (b *bits) set(n uint64) {
	word := n / 64
	if word >= 1<<32 {
		return
	}
	for uint64(len(*b)) <= word {
		*b = append(*b, 0)
	}
	(*b)[word] |= 1 << (n % 64)
}

func (b bits) has(n uint64) bool {
	word := n / 64
	return word < uint64(len(b)) && b[word]&(1<<(n%64)) != 0
}
