package cloud

import (
	"container/list"
	"fmt"
	"slices"
	"strings"
	"sync"

	"holdfast/bridge/wire"
)

// Config of a Receiver. The zero value is a working one.
type Config struct {
	// MaxRaw is the most bytes of records that a batch may hold; 0: wire.DefaultMaxRaw. A gateway
	// that takes larger messages than that needs it larger.
	MaxRaw int
	// MaxRanges bounds the ranges of sequences kept for a lane, 16 bytes each; 0: 4096. A lane
	// without holes needs one. With more the oldest are settled: what was missing there counts as
	// missing for ever.
	MaxRanges int
	// MaxLanes bounds the lanes kept, over all gateways and epochs; 0: 100,000. With more, the
	// one unused for longest is forgotten: what is sent again in it would be seen again.
	MaxLanes int
}

// Kind says what a Delivery tells.
type Kind int

// The kinds.
const (
	Message   Kind = iota // a device message, for the first time
	Duplicate             // a message that came before: do not use it
	Hole                  // sequences that were passed over and that neither a gap nor a backlog explains, so far
	Gap                   // a gateway announced that messages will not come
	State                 // a gateway's birth or death
	Event                 // something else on a gateway's topics

	CommandEvent // a step of a command; not looked at for repeats, see Client
	DeviceEvent  // a device came or went
)

// Delivery is one thing that Receive found in a publish.
type Delivery struct {
	Kind    Kind
	Gateway string // "" for passthrough
	Topic   string // of the publish

	// Message, Duplicate:
	ID       wire.MessageID // zero for passthrough, which has no ids
	Message  wire.Message   // for passthrough Topic and Payload only
	Replayed bool           // the gateway says that it sent it before, or may have, or that it comes from a backlog
	Late     bool           // a higher sequence of the lane came first

	// Hole and Gap:
	Epoch, Lane string
	Missing     Range
	Gap         wire.Gap // Gap
	Explained   uint64   // Gap: how many sequences that were missing it explains

	State   wire.State         // State
	Payload []byte             // Event, CommandEvent, DeviceEvent: as it came
	Command *wire.CommandEvent // CommandEvent
	Device  *wire.DeviceEvent  // DeviceEvent
}

// Stats of a Receiver since it was made. Sums of sequences and messages, not of calls, unless said.
type Stats struct {
	Publishes    uint64 `json:"publishes"`     // calls of Receive
	PublishBytes uint64 `json:"publish_bytes"` // of their topics and payloads
	Invalid      uint64 `json:"invalid"`       // calls that ended in an error
	Messages     uint64 `json:"messages"`      // for the first time, passthrough too
	MessageBytes uint64 `json:"message_bytes"` // of their topics and payloads, as the devices sent them
	Duplicates   uint64 `json:"duplicates"`
	Passthrough  uint64 `json:"passthrough"` // of Messages: those without an id
	Late         uint64 `json:"late"`        // of Messages: those that filled a hole, came from a backlog or before the first
	Holes        uint64 `json:"holes"`       // holes seen, whether filled or explained later or not
	Gaps         uint64 `json:"gaps"`        // announcements
	Missing      uint64 `json:"missing"`     // now: sequences of all lanes that neither came nor were explained
}

// LaneStat is what a Receiver knows of a lane.
type LaneStat struct {
	Gateway string  `json:"gateway"`
	Epoch   string  `json:"epoch"`
	Lane    string  `json:"lane"`
	First   uint64  `json:"first"` // the first sequence that ever came, or the one before a backlog that it went ahead of
	Last    uint64  `json:"last"`  // the highest
	Missing uint64  `json:"missing"`
	Holes   []Range `json:"holes"`   // where they are
	Awaited uint64  `json:"awaited"` // still to come from a backlog that newer messages went ahead of
}

// Receiver turns publishes into deliveries. All its methods may be called by many goroutines at once;
// the messages of a lane come out in order only if its publishes are given one after the other,
// as they arrived.
type Receiver struct {
	maxRaw, maxRanges, maxLanes int

	mu    sync.Mutex
	lanes map[laneKey]*list.Element // of recent; the values are *track
	// recent has the lane used last in front.
	recent *list.List
	stats  Stats // without Missing
}

// New makes a receiver that has seen nothing.
func New(cfg Config) *Receiver {
	or := func(n, otherwise int) int {
		if n <= 0 {
			return otherwise
		}
		return n
	}
	return &Receiver{
		maxRaw: or(cfg.MaxRaw, wire.DefaultMaxRaw), maxRanges: or(cfg.MaxRanges, 4096), maxLanes: or(cfg.MaxLanes, 100_000),
		lanes: make(map[laneKey]*list.Element), recent: list.New(),
	}
}

// Receive reads one publish in any format and says what it holds, in order: a Hole comes before
// the message that showed it. Topics that are not a gateway's are passthrough: a message without an id.
// What is returned shares memory with payload.
//
// An error (wire.ErrFormat, wire.ErrVersion) means that nothing of the publish was noted: given
// again, to a newer program perhaps, it is not a duplicate.
func (r *Receiver) Receive(topic string, payload []byte) ([]Delivery, error) {
	out, err := r.receive(topic, payload)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Publishes++
	r.stats.PublishBytes += uint64(len(topic) + len(payload))
	if err != nil {
		r.stats.Invalid++
	}
	return out, err
}

func (r *Receiver) receive(topic string, payload []byte) ([]Delivery, error) {
	switch t := wire.ParseTopic(topic); t.Kind {
	case wire.KindBatch:
		b, err := wire.DecodeBatchLimit(payload, r.maxRaw)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", topic, err)
		}
		if b.Gateway != t.Gateway || b.Lane != t.Name {
			return nil, fmt.Errorf("%s: batch of gateway %q, lane %q: %w", topic, b.Gateway, b.Lane, wire.ErrFormat)
		}
		return r.messages(topic, laneKey{b.Gateway, b.Epoch, b.Lane}, b.First, b.Messages, b.Replayed, b.Behind), nil

	case wire.KindMessage:
		ev, err := wire.DecodeCloudEvent(payload)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", topic, err)
		}
		if ev.ID.Gateway != t.Gateway || ev.Message.Device != t.Name {
			return nil, fmt.Errorf("%s: event of gateway %q, device %q: %w", topic, ev.ID.Gateway, ev.Message.Device, wire.ErrFormat)
		}
		return r.messages(topic, laneKey{ev.ID.Gateway, ev.ID.Epoch, ev.ID.Lane}, ev.ID.Seq, []wire.Message{ev.Message}, ev.Replayed, ev.Behind), nil

	case wire.KindGap:
		g, err := wire.DecodeGap(payload)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", topic, err)
		}
		if g.Gateway != t.Gateway {
			return nil, fmt.Errorf("%s: gap of gateway %q: %w", topic, g.Gateway, wire.ErrFormat)
		}
		return []Delivery{r.gap(topic, g)}, nil

	case wire.KindState:
		s, err := wire.DecodeState(payload)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", topic, err)
		}
		return []Delivery{{Kind: State, Gateway: t.Gateway, Topic: topic, State: s}}, nil

	case wire.KindCommandEvent:
		e, err := commandEvent(topic, t, payload)
		if err != nil {
			return nil, err
		}
		return []Delivery{{Kind: CommandEvent, Gateway: t.Gateway, Topic: topic, Payload: payload, Command: e}}, nil

	case wire.KindDeviceEvent:
		e, err := deviceEvent(topic, t, payload)
		if err != nil {
			return nil, err
		}
		return []Delivery{{Kind: DeviceEvent, Gateway: t.Gateway, Topic: topic, Payload: payload, Device: e}}, nil

	case wire.KindEvent, wire.KindCommand:
		return []Delivery{{Kind: Event, Gateway: t.Gateway, Topic: topic, Payload: payload}}, nil

	default:
		r.mu.Lock()
		defer r.mu.Unlock()
		m := wire.Message{Topic: topic, Payload: payload}
		r.stats.Passthrough++
		r.count(&m)
		return []Delivery{{Kind: Message, Topic: topic, Message: m}}, nil
	}
}

func (r *Receiver) messages(topic string, key laneKey, first uint64, messages []wire.Message, replayed bool, behind uint64) []Delivery {
	out := make([]Delivery, 0, len(messages)+1)
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.track(key)
	var holes []Range
	for i := range messages {
		d := Delivery{
			Gateway: key.gateway, Topic: topic, Epoch: key.epoch, Lane: key.lane, Message: messages[i], Replayed: replayed,
			ID: wire.MessageID{Gateway: key.gateway, Epoch: key.epoch, Lane: key.lane, Seq: first + uint64(i)},
		}
		var v verdict
		v, holes = t.come(d.ID.Seq, behind, holes[:0])
		for _, h := range holes {
			r.stats.Holes++
			out = append(out, Delivery{Kind: Hole, Gateway: key.gateway, Topic: topic, Epoch: key.epoch, Lane: key.lane, Missing: h})
		}
		switch v {
		case duplicate:
			d.Kind = Duplicate
			r.stats.Duplicates++
		case late:
			d.Late = true
			r.stats.Late++
			r.count(&d.Message)
		case fresh:
			r.count(&d.Message)
		}
		out = append(out, d)
	}
	t.bound(r.maxRanges)
	return out
}

func (r *Receiver) count(m *wire.Message) {
	r.stats.Messages++
	r.stats.MessageBytes += uint64(len(m.Topic) + len(m.Payload))
}

func (r *Receiver) gap(topic string, g wire.Gap) Delivery {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.track(laneKey{g.Gateway, g.Epoch, g.Lane})
	missing := Range{g.First, g.Last}
	d := Delivery{
		Kind: Gap, Gateway: g.Gateway, Topic: topic, Epoch: g.Epoch, Lane: g.Lane, Gap: g,
		Missing: missing, Explained: t.announce(missing),
	}
	t.bound(r.maxRanges)
	r.stats.Gaps++
	return d
}

// track finds or makes a lane's track. Under mu.
func (r *Receiver) track(key laneKey) *track {
	if e, ok := r.lanes[key]; ok {
		r.recent.MoveToFront(e)
		return e.Value.(*track)
	}
	// What is kept must not hold on to a publish of which these strings are a part.
	key = laneKey{strings.Clone(key.gateway), strings.Clone(key.epoch), strings.Clone(key.lane)}
	t := &track{key: key}
	r.lanes[key] = r.recent.PushFront(t)
	for len(r.lanes) > r.maxLanes {
		oldest := r.recent.Back()
		delete(r.lanes, r.recent.Remove(oldest).(*track).key)
	}
	return t
}

// Stats counts what came so far.
func (r *Receiver) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	for e := r.recent.Front(); e != nil; e = e.Next() {
		s.Missing += e.Value.(*track).missing
	}
	return s
}

// Lanes tells what is known of each lane, by gateway, lane and epoch, which sorts by age.
func (r *Receiver) Lanes() []LaneStat {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]LaneStat, 0, len(r.lanes))
	for e := r.recent.Front(); e != nil; e = e.Next() {
		t := e.Value.(*track)
		out = append(out, LaneStat{t.key.gateway, t.key.epoch, t.key.lane, t.base, t.max, t.missing, t.holes(), t.awaited()})
	}
	slices.SortFunc(out, func(a, b LaneStat) int {
		return strings.Compare(a.Gateway+"\x00"+a.Lane+"\x00"+a.Epoch, b.Gateway+"\x00"+b.Lane+"\x00"+b.Epoch)
	})
	return out
}
