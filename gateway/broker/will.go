package broker

import (
	"bytes"
	"time"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/spool"
)

// will is what a client wants published when its connection ends without a DISCONNECT
// (MQTT 5.0 §3.1.2.5). It goes the way of a publish, with the client's rights at that time.
type will struct {
	message mqtt.Publish
	delay   time.Duration // 0: at once
	rights  Rights        // of the connection; nil: it has waited, and what the client may is asked again
}

// newWill copies k. The delay is not longer than the session, at whose end a will is due.
func newWill(k *mqtt.Will, expiry uint32, rights Rights) *will {
	w := &will{
		rights: rights,
		delay:  time.Duration(min(k.Delay, expiry)) * time.Second,
		message: mqtt.Publish{
			QoS: k.QoS, Retain: k.Retain, Topic: []byte(k.Topic), Payload: k.Payload,
			UTF8: k.UTF8, HasExpiry: k.HasExpiry, Expiry: k.Expiry,
			ContentType: k.ContentType, ResponseTopic: k.ResponseTopic, Correlation: k.Correlation,
			Props: bytes.Clone(k.Props),
		},
	}
	return w
}

// takeWill gives the will to the one who publishes or drops it.
func (c *conn) takeWill() *will {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.will
	c.will = nil
	return w
}

// pendingWill waits for its delay, with a row: it survives the gateway.
type pendingWill struct {
	will  *will
	due   time.Time
	timer *time.Timer
}

func willKey(id string) []byte { return append([]byte{kv.PrefixWill}, id...) }

// waitWillLocked has w published after its delay, unless the client comes back before.
func (s *session) waitWillLocked(ops []kv.Op, w *will, from time.Time) []kv.Op {
	due := from.Add(w.delay)
	w.rights = nil
	s.waiting = &pendingWill{will: w, due: due}
	s.startWillLocked()
	m := newMessage(s.id, w.message.Topic, &w.message, w.message.Retain)
	return append(ops, kv.Op{Key: willKey(s.id), Value: encodeWill(s.b.clock.Read().T, uint32(w.delay/time.Second), m)})
}

func (s *session) startWillLocked() {
	if s.b.stopped() {
		return
	}
	s.waiting.timer = time.AfterFunc(time.Until(s.waiting.due), s.willDue)
}

// stopWillLocked forgets the waiting will and appends the removal of its row.
func (s *session) stopWillLocked(ops []kv.Op) []kv.Op {
	if s.waiting.timer != nil {
		s.waiting.timer.Stop()
	}
	s.waiting = nil
	return append(ops, kv.Op{Key: willKey(s.id), Delete: true})
}

func (s *session) willDue() {
	if !s.b.enter() {
		return
	}
	defer s.b.wg.Done()
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	p := s.waiting
	if p == nil || time.Now().Before(p.due) {
		s.mu.Unlock()
		return
	}
	ops := s.stopWillLocked(nil)
	s.mu.Unlock()
	s.b.publishWill(s.id, p.will, ops...)
}

// publishWill hands a will in, together with ops.
func (b *Broker) publishWill(id string, w *will, ops ...kv.Op) {
	if !b.handInWill(id, w, ops) {
		b.apply(ops)
	}
}

func (b *Broker) handInWill(id string, w *will, ops []kv.Op) bool {
	p := &w.message
	rights := w.rights
	if rights == nil {
		rights = b.auth.Rights(id)
	}
	if !rights.MayPublish(p.Topic) {
		b.m.refusedFor(mqtt.NotAuthorized)
		b.log.Warn("will refused: not authorized", "client", id, "topic", string(p.Topic))
		return false
	}
	keep := p.Retain && b.announce(p.Topic, len(p.Payload))
	m := newMessage(id, p.Topic, p, keep)
	if err := b.fan.reserve(m.size()); err != nil {
		return false
	}
	msg := Message{QoS: p.QoS, Retain: p.Retain, Record: spool.Record{
		Device: []byte(id), Topic: p.Topic, Payload: p.Payload, Flags: recordFlags(p) | spool.FlagWill,
	}}
	var props spool.Props
	if fillProps(&props, p) {
		msg.Record.Props = &props
	}
	if keep {
		ops = append(ops, m.retainedOp(b.clock.Read().T))
	}
	if err := b.intake.Publish(&msg, ops, &willDone{b, m}, 0); err != nil {
		b.takeBack(m)
		b.m.refusedFor(mqtt.UnspecifiedError)
		b.log.Warn("will refused", "client", id, "topic", string(p.Topic), "err", err)
		return false
	}
	b.m.wills.Inc()
	return true
}

// willDone passes a will on when it is committed.
type willDone struct {
	b *Broker
	m *message
}

// Done is kv.Done.
func (w *willDone) Done(_, _ uint64, err error) {
	if err != nil {
		w.b.fan.free(w.m)
		return
	}
	w.b.fan.push(task{message: w.m})
}
