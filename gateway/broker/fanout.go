package broker

import (
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"

	"holdfast/internal/mqtt"
)

// fanout passes committed messages on to local subscribers: one goroutine, in the order of the
// commits. Whatever has to be in one order with the messages goes through it as well. Its
// memory is bounded where messages come in: publishers wait in reserve, the store's completing
// goroutine never does. Slow subscribers do not hold it up: their queues drop.
type fanout struct {
	most int // bytes

	mu     sync.Mutex // guards what follows
	cond   sync.Cond  // broadcast when something changed
	tasks  []task
	bytes  int // of messages that are reserved, whether in tasks yet or not
	closed bool
}

// task is one thing to do: pass a message on, or send retained messages to a new subscriber.
type task struct {
	message    *message
	subscribed *subscribed
	purge      bool // remove retained messages that have expired
}

func newFanout(most int) *fanout {
	f := &fanout{most: most}
	f.cond.L = &f.mu
	return f
}

// reserve waits until there is room for n bytes. Whoever reserves hands a message in and pushes
// it when it is committed, or frees it.
func (f *fanout) reserve(n int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.closed && f.bytes > 0 && f.bytes+n > f.most {
		f.cond.Wait()
	}
	if f.closed {
		return errStopping
	}
	f.bytes += n
	return nil
}

// free ends the reservation of m; nil is fine.
func (f *fanout) free(m *message) {
	if m == nil {
		return
	}
	f.mu.Lock()
	f.bytes -= m.size()
	f.cond.Broadcast()
	f.mu.Unlock()
}

// push adds a task. It never blocks.
func (f *fanout) push(t task) {
	f.mu.Lock()
	f.tasks = append(f.tasks, t)
	f.cond.Broadcast()
	f.mu.Unlock()
}

// close ends run when nothing is left to do.
func (f *fanout) close() {
	f.mu.Lock()
	f.closed = true
	f.cond.Broadcast()
	f.mu.Unlock()
}

// run does the tasks until close.
func (f *fanout) run(do func(*task)) {
	var tasks []task
	for {
		f.mu.Lock()
		for len(f.tasks) == 0 && !f.closed {
			f.cond.Wait()
		}
		if len(f.tasks) == 0 {
			f.mu.Unlock()
			return
		}
		tasks, f.tasks = f.tasks, tasks[:0]
		f.mu.Unlock()
		for i := range tasks {
			do(&tasks[i])
			f.free(tasks[i].message)
			tasks[i] = task{}
		}
	}
}

// deliverer is the state of fanout's goroutine.
type deliverer struct {
	b     *Broker
	gen   uint64
	plans map[string]*plan
	turns map[string]int // by filter of a shared subscription: whose turn it is
}

// plan says who gets the messages of one topic, for one generation of subscriptions.
type plan struct {
	targets []target
	groups  []group
}

// target is one client and how it gets a message: with several matching subscriptions one copy
// with the highest QoS and all identifiers (MQTT-3.3.4-2, MQTT-3.3.4-3).
type target struct {
	s      *session
	all    way
	others way // without the subscriptions with No Local: how it gets its own messages
}

type way struct {
	any               bool
	qos               byte
	retainAsPublished bool
	ids               []uint32
}

// group is a shared subscription: each message goes to one of its members.
type group struct {
	filter  string
	members []target
}

const maxPlans = 1024

func newDeliverer(b *Broker) *deliverer {
	return &deliverer{b: b, plans: map[string]*plan{}, turns: map[string]int{}}
}

// guarded does a task. A panic loses this one and nothing else.
func (d *deliverer) guarded(t *task) {
	defer func() {
		if p := recover(); p != nil {
			d.b.m.panics.Inc()
			d.b.log.Error("delivery lost by a panic: please report this", "err", fmt.Errorf("panic: %v", p), "stack", string(debug.Stack()))
		}
	}()
	d.do(t)
}

func (d *deliverer) do(t *task) {
	if t.message != nil {
		d.pass(t.message)
	}
	if t.subscribed != nil {
		d.sendRetained(t.subscribed)
	}
	if t.purge {
		now := time.Now()
		for _, m := range d.b.retained.match("#") {
			d.b.dropExpired(m, now)
		}
	}
}

// pass gives a message to its subscribers.
func (d *deliverer) pass(m *message) {
	if m.keep {
		d.b.retained.set(m)
	}
	d.b.taps.pass(m)
	p := d.plan(m.topic)
	for i := range p.targets {
		t := &p.targets[i]
		w := &t.all
		if t.s.id == m.device {
			w = &t.others // MQTT-3.8.3-3
		}
		d.give(t.s, w, m)
	}
	for i := range p.groups {
		g := &p.groups[i]
		if t := d.choose(g, m.topic); t != nil {
			d.give(t.s, &t.all, m)
		}
	}
}

func (d *deliverer) give(s *session, w *way, m *message) {
	if !w.any {
		return
	}
	if !s.held().MaySubscribe(m.topic) {
		d.b.m.dropped(dropDenied)
		return
	}
	// MQTT-3.3.1-12 and 3.1.1's MQTT-3.3.1-9: RETAIN only for those who asked for it.
	s.deliver(queued{message: m, qos: min(m.qos, w.qos), retain: m.retain && w.retainAsPublished, ids: w.ids})
}

// choose takes the members of a shared subscription in turn, those that are offline only if all are.
// Who has no right to the topic is passed over; nil: nobody has.
func (d *deliverer) choose(g *group, topic string) *target {
	turn := d.turns[g.filter]
	var offline *target
	denied := false
	for i := range g.members {
		t := &g.members[(turn+i)%len(g.members)]
		if !t.s.held().MaySubscribe(topic) {
			denied = true
			continue
		}
		if t.s.online() {
			d.turns[g.filter] = turn + i + 1
			return t
		}
		if offline == nil {
			offline = t
			d.turns[g.filter] = turn + i + 1
		}
	}
	if offline == nil && denied {
		d.b.m.dropped(dropDenied)
	}
	return offline
}

func (s *session) online() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil
}

// plan looks up who is subscribed to topic, or remembers.
func (d *deliverer) plan(topic string) *plan {
	// Read first: a change in between makes the plan stale, not wrong for ever.
	gen := d.b.subs.generation.Load()
	if gen != d.gen || len(d.plans) >= maxPlans {
		clear(d.plans)
		if len(d.turns) > maxPlans {
			clear(d.turns)
		}
		d.gen = gen
	}
	if p := d.plans[topic]; p != nil {
		return p
	}
	p := d.look(topic)
	d.plans[topic] = p
	return p
}

func (d *deliverer) look(topic string) *plan {
	clients := map[string]bool{}
	shared := map[string]map[string]bool{} // filter -> clients
	d.b.candidates(topic, func(found *mochi.Subscribers) {
		for id := range found.Subscriptions {
			clients[id] = true
		}
		for filter, members := range found.Shared {
			for id := range members {
				if shared[filter] == nil {
					shared[filter] = map[string]bool{}
				}
				shared[filter][id] = true
			}
		}
	})
	p := &plan{}
	for id := range clients {
		if s := d.b.lookup(id); s != nil {
			t := s.target(func(sub *subscription) bool { return !sub.shared && mqtt.Match(sub.match, topic) })
			if t.all.any {
				p.targets = append(p.targets, t)
			}
		}
	}
	for filter, members := range shared {
		g := group{filter: filter}
		for id := range members {
			if s := d.b.lookup(id); s != nil {
				t := s.target(func(sub *subscription) bool { return sub.filter == filter && mqtt.Match(sub.match, topic) })
				if t.all.any {
					g.members = append(g.members, t)
				}
			}
		}
		if len(g.members) > 0 {
			slices.SortFunc(g.members, func(a, b target) int { return strings.Compare(a.s.id, b.s.id) }) // turns need an order
			p.groups = append(p.groups, g)
		}
	}
	return p
}

// target merges the session's subscriptions that match.
func (s *session) target(match func(*subscription) bool) target {
	t := target{s: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.subs {
		sub := &s.subs[i]
		if !match(sub) {
			continue
		}
		t.all.add(sub)
		if !sub.noLocal {
			t.others.add(sub)
		}
	}
	return t
}

func (w *way) add(sub *subscription) {
	w.any = true
	w.qos = max(w.qos, sub.qos)
	w.retainAsPublished = w.retainAsPublished || sub.retainAsPublished
	if sub.identifier != 0 && !slices.Contains(w.ids, sub.identifier) {
		w.ids = append(w.ids, sub.identifier)
	}
}
