package broker

import (
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/kv"
)

// retained holds the retained messages (MQTT 5.0 §3.3.1.3) in a tree of topic levels. mochi's
// index is not used for it: it misses that "a/#" matches "a" and gives $ topics to wildcards.
// Only fanout's goroutine changes it, in the order of the commits.
type retained struct {
	most, mostBytes int

	// mu guards what follows. It may be held while waiting for the store, so nothing that
	// completes commits may take it.
	mu      sync.RWMutex
	root    level
	count   int
	bytes   int
	pending map[string]int // by topic: messages handed in, but not yet set
}

type level struct {
	levels  map[string]*level
	message *message
}

// announce says whether a message with RETAIN may be kept: what clears or replaces one always,
// others while there is room. What is not kept is still stored and delivered. After a yes the
// message is handed in and set, or withdrawn.
func (r *retained) announce(topic []byte, payload int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if payload > 0 && (r.count >= r.most || r.bytes+payload > r.mostBytes) {
		m := r.get(string(topic))
		if m == nil || r.bytes-len(m.pub.Payload)+payload > r.mostBytes {
			return false
		}
	}
	r.pending[string(topic)]++
	return true
}

// withdraw takes an announcement back.
func (r *retained) withdraw(topic string) {
	r.mu.Lock()
	r.settleLocked(topic)
	r.mu.Unlock()
}

func (r *retained) settleLocked(topic string) {
	if r.pending[topic]--; r.pending[topic] <= 0 {
		delete(r.pending, topic)
	}
}

func (r *retained) get(topic string) *message {
	l := &r.root
	for part := range strings.SplitSeq(topic, "/") {
		if l = l.levels[part]; l == nil {
			return nil
		}
	}
	return l.message
}

// set keeps m as the retained message of its topic, or clears it if the payload is empty.
func (r *retained) set(m *message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settleLocked(m.topic)
	r.setLocked(m)
}

func (r *retained) setLocked(m *message) {
	if len(m.pub.Payload) == 0 {
		r.removeLocked(m.topic)
		return
	}
	l := &r.root
	for part := range strings.SplitSeq(m.topic, "/") {
		next := l.levels[part]
		if next == nil {
			next = &level{}
			if l.levels == nil {
				l.levels = map[string]*level{}
			}
			l.levels[strings.Clone(part)] = next
		}
		l = next
	}
	r.countLocked(l.message, -1)
	l.message = m
	r.countLocked(m, 1)
}

func (r *retained) countLocked(m *message, n int) {
	if m != nil {
		r.count += n
		r.bytes += n * len(m.pub.Payload)
	}
}

func (r *retained) removeLocked(topic string) {
	parts := strings.Split(topic, "/")
	path := []*level{&r.root}
	for _, part := range parts {
		l := path[len(path)-1].levels[part]
		if l == nil {
			return
		}
		path = append(path, l)
	}
	last := path[len(path)-1]
	r.countLocked(last.message, -1)
	last.message = nil
	for i := len(parts); i > 0 && path[i].message == nil && len(path[i].levels) == 0; i-- {
		delete(path[i-1].levels, parts[i-1])
	}
}

// match gives the messages whose topics fall under filter.
func (r *retained) match(filter string) (found []*message) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var walk func(l *level, filter []string, top bool)
	walk = func(l *level, filter []string, top bool) {
		if len(filter) == 0 {
			if l.message != nil {
				found = append(found, l.message)
			}
			return
		}
		switch filter[0] {
		case "#":
			if l.message != nil && !top {
				found = append(found, l.message) // "a/#" matches "a"
			}
			for name, next := range l.levels {
				if !top || !strings.HasPrefix(name, "$") { // MQTT-4.7.2-1
					walk(next, filter, false)
				}
			}
		case "+":
			for name, next := range l.levels {
				if !top || !strings.HasPrefix(name, "$") {
					walk(next, filter[1:], false)
				}
			}
		default:
			if next := l.levels[filter[0]]; next != nil {
				walk(next, filter[1:], false)
			}
		}
	}
	walk(&r.root, strings.Split(filter, "/"), true)
	slices.SortFunc(found, func(a, b *message) int {
		if c := a.at.Compare(b.at); c != 0 {
			return c
		}
		return strings.Compare(a.topic, b.topic)
	})
	return found
}

func (r *retained) stats() (count, bytes int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.count, r.bytes
}

// sendRetained queues the retained messages for a new subscription. It runs on fanout's
// goroutine: an older value can not overtake a newer message of the same topic.
func (d *deliverer) sendRetained(want *subscribed) {
	if !want.s.owns(want.c) {
		return
	}
	now := time.Now()
	for i := range want.subs {
		sub := &want.subs[i]
		var ids []uint32
		if sub.identifier != 0 {
			ids = []uint32{sub.identifier}
		}
		for _, m := range d.b.retained.match(sub.match) {
			if d.b.dropExpired(m, now) {
				continue
			}
			if !want.s.held().MaySubscribe(m.topic) {
				d.b.m.dropped(dropDenied)
				continue
			}
			want.s.deliver(queued{message: m, qos: min(m.qos, sub.qos), retain: true, ids: ids})
		}
	}
}

// dropExpired removes a retained message whose time is over, with its row. Where a newer one of
// its topic is handed in already that one replaces both: removed after it, its row would be
// lost. Whoever announces one now waits until this removal is handed in.
func (b *Broker) dropExpired(m *message, now time.Time) (expired bool) {
	if _, over := m.expired(now); !over {
		return false
	}
	r := &b.retained
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending[m.topic] == 0 && r.get(m.topic) == m {
		r.removeLocked(m.topic)
		b.m.dropped(dropExpired)
		b.apply([]kv.Op{{Key: retainedKey(m.topic), Delete: true}})
	}
	return true
}

func retainedKey(topic string) []byte { return append([]byte{kv.PrefixRetained}, topic...) }
