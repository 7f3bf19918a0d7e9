package broker

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// subscriptions counts what mochi's index holds.
type subscriptions struct {
	generation atomic.Uint64 // goes up with each change: what was looked up before is stale
	count      atomic.Int64
	parents    atomic.Int64 // how many filters end in "+/#"; see Broker.candidates
}

func (s *subscriptions) changed() { s.generation.Add(1) }

// capture is the net.Conn of a session's mochi client: it takes the answer that mochi writes.
type capture struct {
	net.Conn // nil: mochi calls nothing but Write
	s        *session
	refused  map[string]mqtt.Reason // filters that hook.OnACLCheck said no to, and why
	reasons  []byte
	packet   []byte
}

func (w *capture) Write(p []byte) (int, error) {
	w.packet = append(w.packet, p...)
	return len(p), nil
}

// Close is called by mochi if it stops the client, which it does in no call that is made here.
func (w *capture) Close() error { return nil }

// mochiClient gives mochi's view of the session. life is held.
func (s *session) mochiClient(c *conn) (*mochi.Client, *capture) {
	if s.client == nil {
		s.answer = &capture{s: s}
		s.client = s.b.server.NewClient(nil, "holdfast", s.id, false)
		s.client.Net.Conn = s.answer
	}
	s.client.Properties.ProtocolVersion = byte(c.version)
	*s.answer = capture{s: s}
	return s.client, s.answer
}

// subscribed is what a SUBSCRIBE asks of the retained messages.
type subscribed struct {
	s    *session
	c    *conn
	subs []subscription
}

// subscribe handles SUBSCRIBE. mochi changes its index and makes the SUBACK; the session takes
// note, and the SUBACK leaves when the session's rows are durable: a client that finds its
// session again after a crash need not subscribe again.
func (c *conn) subscribe(frame []byte) error {
	k, err := mqtt.ParseSubscribe(frame, c.version)
	if err != nil {
		return err
	}
	token, requests, err := c.subscribeTo(k)
	if err != nil || c.link == nil || !requests {
		return err
	}
	// The watcher is told when the SUBACK is in out, from this goroutine: it is not worth more.
	if err := c.awaitAnswer(token); err != nil {
		return err
	}
	s := c.sess
	s.mu.Lock()
	for _, f := range k.Filters {
		if i := s.subLocked(f.Filter); i >= 0 && s.conn == c {
			s.subs[i].answered = true
		}
	}
	s.mu.Unlock()
	c.b.watcher.Subscribed(c.link)
	return nil
}

// subscribeTo makes the subscriptions and hands the SUBACK in as token. requests says whether
// commands may come by one of them.
func (c *conn) subscribeTo(k *mqtt.Subscribe) (token uint64, requests bool, err error) {
	s := c.sess
	s.life.Lock()
	defer s.life.Unlock()
	if !s.owns(c) {
		return 0, false, errTakenOver
	}
	client, got := s.mochiClient(c)
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1},
		PacketID:    k.ID,
		Filters:     make(packets.Subscriptions, len(k.Filters)),
	}
	for i, f := range k.Filters {
		pk.Filters[i] = packets.Subscription{
			Filter: f.Filter, Qos: f.QoS, NoLocal: f.NoLocal, RetainAsPublished: f.RetainAsPublished,
			RetainHandling: f.RetainHandling, Identifier: int(k.SubscriptionID),
		}
	}
	got.refused = s.judge(k, c.rights)
	if err := c.b.server.InjectPacket(client, pk); err != nil {
		return 0, false, fmt.Errorf("subscribe: %w", err)
	}
	if len(got.packet) == 0 || len(got.reasons) != len(k.Filters) {
		return 0, false, errors.New("subscribe: mochi gave no SUBACK")
	}

	want := &subscribed{s: s, c: c}
	var ops []kv.Op
	s.mu.Lock()
	for i, f := range k.Filters {
		if mqtt.Reason(got.reasons[i]).Failed() {
			continue
		}
		sub := newSubscription(f.Filter)
		sub.qos = f.QoS
		sub.noLocal, sub.retainAsPublished, sub.retainHandling = f.NoLocal, f.RetainAsPublished, f.RetainHandling
		sub.identifier = k.SubscriptionID
		if sub.requests() {
			requests = true
			i := s.subLocked(sub.filter)
			sub.answered = i >= 0 && s.subs[i].qos > 0 && s.subs[i].answered
		} else {
			sub.answered = true
		}
		existed := s.putLocked(sub)
		if !sub.shared && f.RetainHandling != 2 && (f.RetainHandling == 0 || !existed) {
			want.subs = append(want.subs, sub)
		}
		if s.stored {
			ops = append(ops, kv.Op{Key: subscriptionKey(s.id, sub.filter), Value: sub.encode()})
		}
	}
	s.mu.Unlock()
	c.b.subs.changed()
	a := &answer{packet: got.packet}
	if len(want.subs) > 0 {
		a.retain = want
	}
	token, err = c.answerAfter(ops, a)
	return token, requests, err
}

// answerAfter gives an answer when ops are committed.
func (c *conn) answerAfter(ops []kv.Op, a *answer) (token uint64, err error) {
	if c.maxPacket > 0 && len(a.packet) > int(c.maxPacket) {
		return 0, &refusal{mqtt.PacketTooLarge, "the answer is larger than the client's maximum packet size"}
	}
	token, err = c.reserve(&slot{kind: slotRaw, raw: a})
	if err != nil {
		return 0, err
	}
	if len(ops) == 0 {
		c.complete(token, mqtt.Success)
		return token, nil
	}
	return token, c.b.store.Apply(ops, c, token)
}

// awaitAnswer waits until the answer in slot token is in out.
func (c *conn) awaitAnswer(token uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dirty { // it may be in out already, and this goroutine be the one to have it written
		c.dirty = false
		c.startFlushLocked()
	}
	for c.head <= token && !c.ending {
		c.cond.Wait()
	}
	if c.ending {
		return errEnded
	}
	return nil
}

// judge finds the filters of a SUBSCRIBE that are refused, and why.
func (s *session) judge(k *mqtt.Subscribe, rights Rights) map[string]mqtt.Reason {
	refused := map[string]mqtt.Reason{}
	s.mu.Lock()
	room := s.b.cfg.MaxSubscriptions - len(s.subs)
	var fresh []string
	for _, f := range k.Filters {
		if s.subLocked(f.Filter) < 0 && !slices.Contains(fresh, f.Filter) {
			fresh = append(fresh, f.Filter)
		}
	}
	s.mu.Unlock()
	for _, f := range k.Filters {
		_, inner, shared := mqtt.SplitShared(f.Filter)
		switch {
		case !shared && len(f.Filter) >= 6 && strings.EqualFold(f.Filter[:6], "$share"):
			// mochi would take $Share and the like for a shared subscription
			refused[f.Filter] = mqtt.TopicFilterInvalid
		case tooDeep(inner, s.b.cfg.MaxTopicLevels):
			refused[f.Filter] = mqtt.TopicFilterInvalid
		case !rights.MaySubscribe(inner):
			refused[f.Filter] = mqtt.NotAuthorized
		}
	}
	for _, f := range fresh {
		if _, no := refused[f]; no {
			continue
		}
		if room--; room < 0 {
			refused[f] = mqtt.QuotaExceeded
		}
	}
	return refused
}

// unsubscribe handles UNSUBSCRIBE.
func (c *conn) unsubscribe(frame []byte) error {
	k, err := mqtt.ParseUnsubscribe(frame, c.version)
	if err != nil {
		return err
	}
	s := c.sess
	s.life.Lock()
	defer s.life.Unlock()
	if !s.owns(c) {
		return errTakenOver
	}
	client, got := s.mochiClient(c)
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1},
		PacketID:    k.ID,
		Filters:     make(packets.Subscriptions, len(k.Filters)),
	}
	var ops []kv.Op
	s.mu.Lock()
	known := make([]bool, len(k.Filters))
	for i, f := range k.Filters {
		pk.Filters[i] = packets.Subscription{Filter: f}
		if known[i] = s.removeLocked(f); known[i] && s.stored {
			ops = append(ops, kv.Op{Key: subscriptionKey(s.id, f), Delete: true})
		}
	}
	s.mu.Unlock()
	if err := c.b.server.InjectPacket(client, pk); err != nil {
		return fmt.Errorf("unsubscribe: %w", err)
	}
	c.b.subs.changed()
	if len(got.packet) == 0 {
		return errors.New("unsubscribe: mochi gave no UNSUBACK")
	}
	if c.version == mqtt.V5 {
		// mochi says "success" for a filter that only another client has: the codes are ours.
		codes := got.packet[len(got.packet)-len(known):]
		for i, was := range known {
			codes[i] = byte(mqtt.NoSubscriptionExisted)
			if was {
				codes[i] = byte(mqtt.Success)
			}
		}
	}
	_, err = c.answerAfter(ops, &answer{packet: got.packet})
	return err
}

// owns says whether c is still the session's connection.
func (s *session) owns(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn == c
}

func newSubscription(filter string) subscription {
	sub := subscription{filter: filter, match: filter}
	_, sub.match, sub.shared = mqtt.SplitShared(filter)
	return sub
}

func (s *session) subLocked(filter string) int {
	for i := range s.subs {
		if s.subs[i].filter == filter {
			return i
		}
	}
	return -1
}

// putLocked adds or replaces a subscription (MQTT-3.8.4-3) and says whether it was there.
func (s *session) putLocked(sub subscription) (existed bool) {
	if i := s.subLocked(sub.filter); i >= 0 {
		s.subs[i] = sub
		return true
	}
	s.subs = append(s.subs, sub)
	s.b.counted(&sub, 1)
	return false
}

func (s *session) removeLocked(filter string) (existed bool) {
	i := s.subLocked(filter)
	if i < 0 {
		return false
	}
	s.b.counted(&s.subs[i], -1)
	s.subs = append(s.subs[:i], s.subs[i+1:]...)
	if len(s.subs) == 0 {
		s.subs = nil
	}
	return true
}

func (b *Broker) counted(sub *subscription, n int64) {
	b.subs.count.Add(n)
	if isParent(sub.match) {
		b.subs.parents.Add(n)
	}
}

// isParent says whether a filter ends in a wildcard level and #.
func isParent(filter string) bool { return filter == "+/#" || strings.HasSuffix(filter, "/+/#") }

// index puts a restored subscription into mochi's index.
func (b *Broker) index(id string, sub *subscription) {
	b.server.Topics.Subscribe(id, packets.Subscription{
		Filter: sub.filter, Qos: sub.qos, NoLocal: sub.noLocal, RetainAsPublished: sub.retainAsPublished,
		RetainHandling: sub.retainHandling, Identifier: int(sub.identifier),
	})
	b.counted(sub, 1)
}

// unindex takes one out.
func (b *Broker) unindex(id string, sub *subscription) {
	b.server.Topics.Unsubscribe(sub.filter, id)
	b.counted(sub, -1)
}

// candidates gives mochi's subscribers of a topic, a superset of those who get it: the filters
// of each are matched again (fanout.go), since mochi merges options that do not merge and takes
// $share/x/# for a match of topics with $. What mochi misses is looked up a second time: that
// "a/+/#" matches "a/b" (MQTT 5.0 §4.7.1.2), it finds for "a/b/".
func (b *Broker) candidates(topic string, each func(*mochi.Subscribers)) {
	each(b.server.Topics.Subscribers(topic))
	if b.subs.parents.Load() > 0 {
		each(b.server.Topics.Subscribers(topic + "/"))
	}
}

// listening says whether anybody may be subscribed to topic, or looks on.
func (b *Broker) listening(topic string) (yes bool) {
	if b.taps.matching(topic) {
		return true
	}
	b.candidates(topic, func(s *mochi.Subscribers) {
		yes = yes || len(s.Subscriptions)+len(s.Shared) > 0
	})
	return yes
}
