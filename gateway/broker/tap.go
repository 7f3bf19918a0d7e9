package broker

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
)

// ErrFilter is about a topic filter that is none (MQTT 5.0 §4.7).
var ErrFilter = errors.New("no topic filter: # stands last and alone in its level, + alone in its level")

// Passed is a message that devices published and that is on disk, as a tap sees it. Nobody changes what it points to, so a tap
// may keep it.
type Passed struct {
	Device, Topic, ContentType string
	Payload                    []byte
	QoS                        byte
	Retain                     bool
	Received                   time.Time
}

// taps are those who look on. A change makes what connections and the fan-out remember of a topic's listeners stale, as a
// subscription does.
type taps struct {
	mu  sync.Mutex // one change at a time
	all atomic.Pointer[[]*tap]
}

type tap struct {
	filter string
	see    func(*Passed)
}

// matching says whether anybody looks on at topic.
func (t *taps) matching(topic string) bool {
	all := t.all.Load()
	return all != nil && slices.ContainsFunc(*all, func(t *tap) bool { return mqtt.Match(t.filter, topic) })
}

// pass shows m to those whose filter matches.
func (t *taps) pass(m *message) {
	all := t.all.Load()
	if all == nil {
		return
	}
	var p *Passed
	for _, t := range *all {
		if !mqtt.Match(t.filter, m.topic) {
			continue
		}
		if p == nil {
			p = &Passed{
				Device: m.device, Topic: m.topic, ContentType: string(m.pub.ContentType), Payload: m.pub.Payload,
				QoS: m.qos, Retain: m.retain, Received: m.at,
			}
		}
		t.see(p)
	}
}

// Tap shows what devices publish to topics that match filter, from now on, once it is on disk and in the order of the commits. see
// is called by the fan-out and holds up every local subscriber while it works: it must not wait for anything. It is not called
// any more soon after end, which may be called twice. ErrFilter.
func (b *Broker) Tap(filter string, see func(*Passed)) (end func(), err error) {
	if !mqtt.ValidFilter(filter) {
		return nil, ErrFilter
	}
	added := &tap{filter, see}
	b.changeTaps(func(all []*tap) []*tap { return append(all, added) })
	return sync.OnceFunc(func() {
		b.changeTaps(func(all []*tap) []*tap { return slices.DeleteFunc(all, func(t *tap) bool { return t == added }) })
	}), nil
}

func (b *Broker) changeTaps(change func([]*tap) []*tap) {
	b.taps.mu.Lock()
	defer b.taps.mu.Unlock()
	var all []*tap
	if old := b.taps.all.Load(); old != nil {
		all = slices.Clone(*old)
	}
	if all = change(all); len(all) == 0 {
		b.taps.all.Store(nil)
	} else {
		b.taps.all.Store(&all)
	}
	b.subs.changed() // after the change: what is looked up from now on sees it
}
