package broker

import (
	"slices"
	"time"

	"holdfast/internal/mqtt"
)

// queued is a message on its way to one client.
type queued struct {
	message *message
	qos     byte
	retain  bool
	ids     []uint32 // subscription identifiers; shared with others, never changed
}

// flight is a QoS 1 or 2 message that was sent and is not yet answered to the end.
type flight struct {
	queued
	id       uint16
	received bool // PUBREC came: PUBREL is what is sent again
}

// queue is a first in, first out queue.
type queue struct {
	items []queued
	head  int
	bytes int
}

func (q *queue) len() int { return len(q.items) - q.head }

func (q *queue) push(x queued) {
	if q.head > 32 && q.head > len(q.items)/2 {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, x)
	q.bytes += x.message.size()
}

func (q *queue) front() *queued { return &q.items[q.head] }

func (q *queue) pop() {
	q.bytes -= q.items[q.head].message.size()
	q.items[q.head] = queued{}
	q.head++
	if q.head == len(q.items) {
		*q = queue{} // an idle client keeps no room
	}
}

// popNewest takes the last one back.
func (q *queue) popNewest() *message {
	last := len(q.items) - 1
	m := q.items[last].message
	q.bytes -= m.size()
	q.items[last] = queued{}
	if q.items = q.items[:last]; q.head == last {
		*q = queue{}
	}
	return m
}

// dropQueuedLocked takes out what drop says, as denied.
func (s *session) dropQueuedLocked(drop func(m *message) bool) {
	if !slices.ContainsFunc(s.queue.items[s.queue.head:], func(x queued) bool { return drop(x.message) }) {
		return
	}
	var kept queue
	for _, x := range s.queue.items[s.queue.head:] {
		if !drop(x.message) {
			kept.push(x)
			continue
		}
		s.unloadLocked(x.message)
		s.b.m.queued.Dec()
		s.b.m.dropped(dropDenied)
	}
	s.queue = kept
}

// deliver queues a message for the client. A queue that is full takes nothing more: what waits
// keeps its order and has no hole, and the newest is dropped and counted. Only the fan-out calls it.
func (s *session) deliver(x queued) {
	size := x.message.size()
	s.mu.Lock()
	if s.takesLocked(&x) == "" && !s.b.fits(size) {
		// What all clients may hold is held: by the longest queues most of all, and they have to give.
		mine := s.load
		s.mu.Unlock()
		s.b.pushOut(mine + size)
		s.mu.Lock()
	}
	c := s.conn
	reason := s.takesLocked(&x)
	switch {
	case reason != "":
	case !s.b.fits(size):
		reason = dropAllFull
	default:
		s.queue.push(x)
		s.load += size
		s.b.queuedBytes.Add(int64(size))
	}
	s.mu.Unlock()
	if reason != "" {
		s.b.m.dropped(reason)
		return
	}
	s.b.m.queued.Inc()
	if c != nil {
		c.deliver()
	}
}

// takesLocked says why the session does not take x, whatever all others hold; "": it does.
func (s *session) takesLocked(x *queued) string {
	switch {
	case s.gone:
		return dropGone
	case s.conn == nil && x.qos == 0:
		return dropOffline // MQTT 5.0 §4.1: QoS 0 need not wait for a client
	case s.queue.len() >= s.b.cfg.MaxSessionQueue,
		s.queue.len() > 0 && s.queue.bytes+x.message.size() > s.b.cfg.MaxSessionQueueBytes:
		return dropQueueFull
	}
	return ""
}

func (b *Broker) fits(size int) bool { return int(b.queuedBytes.Load())+size <= b.cfg.MaxQueuedBytes }

// pushOut makes room by halving the longest queues, as long as they are longer than least: who keeps up holds little, and
// loses nothing for the sake of those who read nothing (docs/decisions/0023). It makes much room at once, since it looks at all
// sessions, and looks no more for a while where it finds none. Only the fan-out calls it, with no lock held.
func (b *Broker) pushOut(least int) {
	now := time.Now()
	if now.Before(b.noRoomUntil) && least >= b.noRoomFor {
		return
	}
	type holder struct {
		s     *session
		bytes int
	}
	var long []holder
	b.sessMu.RLock()
	all := make([]*session, 0, len(b.sessions))
	for _, s := range b.sessions {
		all = append(all, s)
	}
	b.sessMu.RUnlock()
	for _, s := range all {
		s.mu.Lock()
		if s.queue.bytes > least {
			long = append(long, holder{s, s.queue.bytes})
		}
		s.mu.Unlock()
	}
	slices.SortFunc(long, func(a, b holder) int { return b.bytes - a.bytes })
	goal := b.cfg.MaxQueuedBytes - b.cfg.MaxQueuedBytes/8
	for _, h := range long {
		h.s.cut(max(h.bytes/2, least))
		if int(b.queuedBytes.Load()) < goal {
			return
		}
	}
	if len(long) == 0 {
		b.noRoomUntil, b.noRoomFor = now.Add(100*time.Millisecond), least
	}
}

// cut drops the newest messages of the queue until no more than most bytes are left.
func (s *session) cut(most int) {
	n := 0
	s.mu.Lock()
	for s.queue.len() > 0 && s.queue.bytes > most {
		s.unloadLocked(s.queue.popNewest())
		n++
	}
	s.mu.Unlock()
	s.b.m.queued.Sub(float64(n))
	s.b.m.drops.WithLabelValues(dropAllFull).Add(float64(n))
}

// unloadLocked says that m waits no more and is not in flight.
func (s *session) unloadLocked(m *message) {
	s.load -= m.size()
	s.b.queuedBytes.Add(-int64(m.size()))
}

// mayFlyLocked says whether one more message may be sent that the client has to acknowledge: what is in flight can not be dropped
// for others, so half of what all may hold is kept from it.
func (s *session) mayFlyLocked(size int) bool {
	return s.flying+size <= s.b.cfg.MaxSessionQueueBytes && int(s.b.flyingBytes.Load())+size <= s.b.cfg.MaxQueuedBytes/2
}

// landedLocked is unloadLocked for a flight, whose message is needed no more.
func (s *session) landedLocked(f *flight) {
	s.flying -= f.message.size()
	s.b.flyingBytes.Add(-int64(f.message.size()))
	s.unloadLocked(f.message)
	f.message = nil
}

// deliver has flush ask the session for messages.
func (c *conn) deliver() {
	c.mu.Lock()
	c.wantFill = true
	c.startFlushLocked()
	c.mu.Unlock()
}

// fill moves messages from the queue into c's out, as many as the client's receive maximum and
// one write allow: first those of an earlier connection, with DUP (MQTT-4.4.0-1), then commands (link.go),
// then new ones.
func (s *session) fill(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != c {
		return
	}
	now := time.Now()
	high := outHigh
	if s.b.writing.Load() > int64(s.b.cfg.MaxWriteBytes/2) {
		high = outLow
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.ending {
		if c.out != nil && len(c.out.b) > high {
			c.wantFill = true
			return
		}
		switch {
		case s.resend < len(s.flights):
			if s.unacked >= c.sendMax {
				return
			}
			s.sendLocked(c, &s.flights[s.resend], now, true)
			s.resend++
			s.unacked++
		case c.link.waitingLocked() && s.unacked < c.sendMax: // else QoS 0 may still go
			c.link.sendCommandLocked()
			s.unacked++
		case s.queue.len() > 0:
			x := *s.queue.front()
			if x.qos > 0 && (s.unacked >= c.sendMax || s.flying > 0 && !s.mayFlyLocked(x.message.size())) {
				return
			}
			s.queue.pop()
			s.b.m.queued.Dec()
			if _, over := x.message.expired(now); over {
				s.unloadLocked(x.message)
				s.b.m.dropped(dropExpired)
				continue
			}
			f := flight{queued: x}
			if x.qos > 0 {
				f.id = s.nextIDLocked()
			}
			if !s.sendLocked(c, &f, now, false) {
				s.unloadLocked(x.message)
				s.b.m.dropped(dropTooLarge) // MQTT-3.1.2-25: as if it had been sent
				continue
			}
			if x.qos == 0 {
				s.unloadLocked(x.message)
			} else {
				s.flying += x.message.size()
				s.b.flyingBytes.Add(int64(x.message.size()))
				s.flights = append(s.flights, f)
				s.resend = len(s.flights)
				s.unacked++
			}
		default:
			return
		}
	}
}

// sendLocked puts a message, or the PUBREL of one, into out. It says no if the message is
// larger than the client takes.
func (s *session) sendLocked(c *conn, f *flight, now time.Time, again bool) bool {
	if f.received {
		c.appendLocked(func(b []byte) []byte {
			return mqtt.AppendAck(b, mqtt.TypePubrel, f.id, c.version, mqtt.Success)
		})
		return true
	}
	p := f.message.pub
	p.QoS, p.Retain, p.ID, p.Dup = f.qos, f.retain, f.id, again
	p.SubscriptionIDs = f.ids
	p.Expiry, _ = f.message.expired(now)
	if c.maxPacket > 0 && mqtt.PublishSize(c.version, &p) > int(c.maxPacket) {
		return false
	}
	c.appendLocked(func(b []byte) []byte { return mqtt.AppendPublish(b, c.version, &p) })
	if c.traced() {
		c.b.log.Debug("publish sent", "client", c.id, "topic", string(p.Topic), "qos", p.QoS, "retain", p.Retain, "dup", p.Dup,
			"packet_id", p.ID, "size_bytes", len(p.Payload))
	}
	s.b.m.sent[f.qos].Inc()
	return true
}

// nextIDLocked gives a packet id that is not in use. There always is one: no client has 65,535
// messages in flight.
func (s *session) nextIDLocked() uint16 {
	for {
		s.lastID++
		if s.lastID != 0 && !s.inUseLocked(s.lastID) {
			return s.lastID
		}
	}
}

// inUseLocked says whether a delivery or a command has the packet id.
func (s *session) inUseLocked(id uint16) bool {
	if s.flightLocked(id) >= 0 {
		return true
	}
	if s.conn == nil || s.conn.link == nil {
		return false
	}
	for i := range s.conn.link.commands {
		if s.conn.link.commands[i].pub.ID == id {
			return true
		}
	}
	return false
}

func (s *session) flightLocked(id uint16) int {
	for i := range s.flights {
		if s.flights[i].id == id {
			return i
		}
	}
	return -1
}

// answered handles PUBACK, PUBREC and PUBCOMP of the client.
func (s *session) answered(c *conn, a *mqtt.Ack) error {
	if a.Type == mqtt.TypePuback {
		// The watcher hears of it before it hears of a connection that takes over: it would send the command again.
		c.handing.Lock()
		defer c.handing.Unlock()
	}
	token, command, err := s.settle(c, a)
	if command {
		c.b.watcher.Acked(c.link, token, a.Reason)
	}
	return err
}

// settle takes what was answered off. command says that it was one, and token is its token.
func (s *session) settle(c *conn, a *mqtt.Ack) (token uint64, command bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != c {
		return 0, false, errTakenOver
	}
	if i := c.link.commandLocked(a.ID); i >= 0 && a.Type == mqtt.TypePuback {
		token = c.link.commands[i].token
		c.link.ackedLocked(i)
		s.unacked--
		s.refillLocked(c)
		return token, true, nil
	}
	s.settleLocked(c, a)
	return 0, false, nil
}

// refillLocked has c take what an answer made room for.
func (s *session) refillLocked(c *conn) {
	if s.resend < len(s.flights) || c.link.waitingLocked() || s.queue.len() > 0 {
		c.deliver()
	}
}

func (s *session) settleLocked(c *conn, a *mqtt.Ack) {
	i := s.flightLocked(a.ID)
	var f *flight
	if i >= 0 {
		f = &s.flights[i]
	}
	done := false
	switch a.Type { //nolint:exhaustive // PUBREL goes to release2
	case mqtt.TypePuback:
		done = f != nil && f.qos == 1
	case mqtt.TypePubrec:
		switch {
		case f == nil || f.qos != 2:
			// Unknown, as after a restart of the gateway: the client is let go on.
			reason := mqtt.Success
			if c.version == mqtt.V5 {
				reason = mqtt.PacketIDNotFound
			}
			s.pubrelLocked(c, a.ID, reason)
		case a.Reason.Failed():
			done = true // MQTT 5.0 §4.3.3: the message is refused and its id free
		default:
			f.received = true
			s.landedLocked(f) // only PUBREL is sent from now on
			s.pubrelLocked(c, a.ID, mqtt.Success)
			s.refillLocked(c)
		}
	case mqtt.TypePubcomp:
		done = f != nil && f.received
	}
	if !done {
		return
	}
	if a.Reason.Failed() {
		s.b.m.dropped(dropRefused)
	}
	s.landedLocked(f)
	s.flights = append(s.flights[:i], s.flights[i+1:]...)
	s.flights[:cap(s.flights)][len(s.flights)] = flight{}
	if i < s.resend {
		s.resend--
		s.unacked--
	}
	if len(s.flights) == 0 {
		s.flights = nil
	}
	s.refillLocked(c)
}

func (s *session) pubrelLocked(c *conn, id uint16, reason mqtt.Reason) {
	c.mu.Lock()
	c.appendLocked(func(b []byte) []byte { return mqtt.AppendAck(b, mqtt.TypePubrel, id, c.version, reason) })
	c.mu.Unlock()
	c.dirty = true // answered runs on serve
}
