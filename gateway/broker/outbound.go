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
// keeps its order and has no hole, and the newest is dropped and counted. Of what all clients may
// hold together one may hold as much as is left: so some is left however many read nothing, and
// who keeps up is not dropped for their sake (docs/decisions/0023).
func (s *session) deliver(x queued) {
	size := x.message.size()
	s.mu.Lock()
	c := s.conn
	left := s.b.cfg.MaxQueuedBytes - int(s.b.queuedBytes.Load())
	reason := ""
	switch {
	case s.gone:
		reason = dropGone
	case c == nil && x.qos == 0:
		reason = dropOffline // MQTT 5.0 §4.1: QoS 0 need not wait for a client
	case s.queue.len() >= s.b.cfg.MaxSessionQueue,
		s.queue.len() > 0 && s.queue.bytes+size > s.b.cfg.MaxSessionQueueBytes:
		reason = dropQueueFull
	case size > left, s.load > 0 && s.load+size > left:
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

// unloadLocked says that m waits no more and is not in flight.
func (s *session) unloadLocked(m *message) {
	s.load -= m.size()
	s.b.queuedBytes.Add(-int64(m.size()))
}

// landedLocked is unloadLocked for a flight, whose message is needed no more.
func (s *session) landedLocked(f *flight) {
	s.flying -= f.message.size()
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
			if x.qos > 0 && (s.unacked >= c.sendMax || s.flying > 0 && s.flying+x.message.size() > s.b.cfg.MaxSessionQueueBytes) {
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
