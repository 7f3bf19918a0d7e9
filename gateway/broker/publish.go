package broker

import (
	"bytes"
	"context"
	"errors"
	"time"
	"unsafe"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/spool"
)

// Message is what a device publishes, on its way to an Intake. All of it is valid only
// during Intake.Publish: its slices and strings lie in the connection's read buffer.
type Message struct {
	Record spool.Record // Received is left to the intake, which always sets it
	QoS    byte
	Retain bool
}

// Intake takes what devices publish and makes it durable.
type Intake interface {
	// Publish hands in m together with ops, rows that are committed atomically with it. It
	// copies what it keeps. done is called once, from any goroutine but, for one device, in
	// the order of the Publish calls, when both are on stable storage or will never be. An
	// error means that nothing was taken and done will not be called; one that wraps
	// ErrQuota is told to MQTT 5 clients as 0x97, any other as 0x80. It may block for as
	// long as too much is waiting: the broker then does not read that device.
	Publish(m *Message, ops []kv.Op, done kv.Done, token uint64) error
}

// began is what moments are measured from that are only compared with each other: the wall clock may jump.
var began = time.Now()

// slot is the place of one packet in a connection's order of answers. Its number is the
// token under which its commit is handed in.
type slot struct {
	kind    slotKind
	done    bool        // the outcome is known
	failed  bool        // no answer may be given: the connection ends here
	quota   bool        // a QoS 1 or 2 message that the answer takes off the receive maximum
	reason  mqtt.Reason // what the answer says
	id      uint16
	size    int32    // bytes counted in unacked
	at      int64    // when it was read, ns after began; 0: its latency is not taken
	message *message // to be fanned out after the commit; nil: nobody waits for it
	raw     *answer  // answers other than acknowledgements
}

type slotKind uint8

const (
	slotNone    slotKind = iota // QoS 0: no answer, only its place in the order
	slotPuback                  // QoS 1
	slotPubrec                  // QoS 2, the message
	slotPubcomp                 // QoS 2, its release
	slotRaw                     // CONNACK, SUBACK, UNSUBACK: bytes
)

// answer is a packet that waits for a commit, and what follows it.
type answer struct {
	packet  []byte
	connack bool
	retain  *subscribed // retained messages to send after a SUBACK; nil: none
}

// inflow is what a connection needs to publish. Only serve touches it.
type inflow struct {
	pub     mqtt.Publish
	msg     Message
	props   spool.Props
	aliases [][]byte          // by alias; nil: not set
	heard   map[string]uint64 // topic -> generation of subscriptions << 1 | somebody listens
	key     []byte
	ops     [2]kv.Op
	n       int // messages, to sample
}

const maxHeard = 64

// slowPause comes before each message of a client that is slowed down: it sends 50 a second at most.
const slowPause = 20 * time.Millisecond

// publish handles a PUBLISH: it finds its place in the order of answers, then hands it in.
// On the usual way (QoS 1, no subscriber, no properties but an alias) it allocates nothing.
func (c *conn) publish(frame []byte) error {
	in := c.in
	if in == nil {
		in = &inflow{heard: map[string]uint64{}}
		c.in = in
	}
	p := &in.pub
	if err := mqtt.ParsePublish(frame, c.version, p); err != nil {
		return err
	}
	c.tally.messages[p.QoS]++
	c.tally.bytes += len(frame)
	topic := p.Topic
	if p.Alias != 0 {
		var err error
		if topic, err = in.alias(p.Alias, topic, c.b.cfg.TopicAliasMaximum); err != nil {
			return err
		}
	}
	if c.traced() {
		c.b.log.Debug("publish received", "client", c.id, "topic", string(topic), "qos", p.QoS, "retain", p.Retain, "dup", p.Dup,
			"packet_id", p.ID, "size_bytes", len(p.Payload))
	}
	s := slot{kind: slotNone, id: p.ID, size: int32(len(frame))}
	switch p.QoS {
	case 1:
		s.kind, s.quota = slotPuback, true
	case 2:
		s.kind = slotPubrec
		s.quota = c.sess.counts(c, p.ID)
	}
	if in.n++; in.n&63 == 0 && p.QoS > 0 {
		s.at = int64(time.Since(began))
	}

	if c.version != mqtt.V5 && c.b.cfg.Slow != nil && c.b.cfg.Slow() {
		if err := c.pause(slowPause); err != nil {
			return err
		}
	}
	refused := mqtt.Success
	over := false
	if m := c.meter.Load(); m != nil {
		var err error
		if over, err = c.overLimit(m, p.QoS, p.ID, len(frame)); err != nil {
			return err
		}
	}
	switch {
	case over:
		refused = mqtt.QuotaExceeded
	case tooDeep(topic, c.b.cfg.MaxTopicLevels):
		refused = mqtt.TopicNameInvalid
	case !c.rights.MayPublish(topic):
		refused = mqtt.NotAuthorized
	}
	if refused == mqtt.Success {
		keep := p.Retain && c.b.announce(topic, len(p.Payload))
		if keep || c.heard(topic) {
			s.message = newMessage(c.id, topic, p, keep)
			if err := c.b.fan.reserve(s.message.size()); err != nil {
				return errStopping
			}
		}
	}
	token, err := c.reserve(&s)
	if err != nil {
		c.b.takeBack(s.message)
		return err
	}
	if over {
		return c.refuseAs(token, p.QoS, refused, "rate")
	}
	if refused != mqtt.Success {
		return c.refuse(token, p.QoS, refused)
	}

	if p.QoS == 2 {
		return c.handIn2(in, topic, s.message, token)
	}
	if err := c.handIn(in, topic, s.message, token, in.ops[:0]); err != nil {
		return c.refuse(token, p.QoS, err.reason)
	}
	return nil
}

// handIn hands the message in with ops and what its retained message needs.
func (c *conn) handIn(in *inflow, topic []byte, m *message, token uint64, ops []kv.Op) *refusal {
	if m != nil && m.keep {
		ops = append(ops, m.retainedOp(c.b.clock.Read().T))
	}
	c.fillRecord(in, topic, &in.pub)
	err := c.b.intake.Publish(&in.msg, ops, c, token)
	if err == nil {
		c.took.Store(in.msg.Record.Received)
		return nil
	}
	if in.pub.QoS > 0 { // QoS 0 is shed in numbers; it is counted
		c.b.log.Log(context.Background(), c.b.noticeLevel(err), "publish refused", "client", c.id, "err", err)
	}
	if errors.Is(err, ErrQuota) {
		return &refusal{mqtt.QuotaExceeded, "publish refused"}
	}
	return &refusal{mqtt.UnspecifiedError, "publish refused"}
}

// handIn2 is handIn for QoS 2: the packet id is stored with the message, and a repeat is not
// stored again.
func (c *conn) handIn2(in *inflow, topic []byte, m *message, token uint64) error {
	id := in.pub.ID
	c.handing.Lock()
	defer c.handing.Unlock()
	verdict, stored, era := c.sess.received(c, id, token)
	switch verdict {
	case rxNew:
	case rxRepeat: // MQTT-4.3.3-10: stored already
		c.b.m.repeats.Inc()
		c.dropMessage(token)
		c.complete(token, mqtt.Success)
		return nil
	case rxWait: // the first is being committed: both are answered then
		c.b.m.repeats.Inc()
		c.dropMessage(token)
		return nil
	case rxFull:
		return c.refuse(token, 2, mqtt.QuotaExceeded)
	case rxStale:
		c.dropMessage(token)
		return errTakenOver
	}
	ops := in.ops[:0]
	if stored {
		in.key = appendQoS2Key(in.key[:0], c.id, era, id)
		ops = append(ops, kv.Op{Key: in.key, Value: rowV1})
	}
	if err := c.handIn(in, topic, m, token, ops); err != nil {
		c.sess.committed(c, id, token, err)
		return c.refuse(token, 2, err.reason)
	}
	return nil
}

// refuse answers a message that was not taken. It never says success: MQTT 3.1.1 has no other
// answer than none, so there the connection ends, once all before it is answered, and the
// device sends again.
func (c *conn) refuse(token uint64, qos byte, reason mqtt.Reason) error {
	return c.refuseAs(token, qos, reason, refusedLabel(reason))
}

func (c *conn) refuseAs(token uint64, qos byte, reason mqtt.Reason, label string) error {
	c.b.m.refused.WithLabelValues(label).Inc()
	c.dropMessage(token)
	if qos == 0 || c.version == mqtt.V5 {
		c.complete(token, reason)
		return nil
	}
	c.fail(token, errNoWords)
	return errNoWords
}

// fail says that the packet in slot token gets no answer: the connection ends with err when
// all before it are answered.
func (c *conn) fail(token uint64, err error) {
	c.mu.Lock()
	s := &c.ring[token&uint64(len(c.ring)-1)]
	s.done, s.failed = true, true
	if c.failure == nil {
		c.failure = err
	}
	c.releaseLocked()
	c.mu.Unlock()
}

// dropMessage takes back the fan-out of a slot.
func (c *conn) dropMessage(token uint64) {
	c.mu.Lock()
	s := &c.ring[token&uint64(len(c.ring)-1)]
	m := s.message
	s.message = nil
	c.mu.Unlock()
	c.b.takeBack(m)
}

// fillRecord makes the record of p. The strings in its properties are views of the read
// buffer, which is why an Intake must not keep them.
func (c *conn) fillRecord(in *inflow, topic []byte, p *mqtt.Publish) {
	m := &in.msg
	m.QoS, m.Retain = p.QoS, p.Retain
	m.Record = spool.Record{Device: c.device, Topic: topic, Payload: p.Payload}
	m.Record.Flags = recordFlags(p)
	if fillProps(&in.props, p) {
		m.Record.Props = &in.props
	}
}

func recordFlags(p *mqtt.Publish) (f spool.Flags) {
	switch p.QoS {
	case 1:
		f = spool.FlagQoS1
	case 2:
		f = spool.FlagQoS2
	}
	if p.Retain {
		f |= spool.FlagRetain
	}
	if p.Dup {
		f |= spool.FlagDup
	}
	return f
}

// fillProps makes views of p's properties and says whether there are any.
func fillProps(to *spool.Props, p *mqtt.Publish) bool {
	*to = spool.Props{User: to.User[:0]}
	to.ContentType = view(p.ContentType)
	to.ResponseTopic = view(p.ResponseTopic)
	to.Correlation = p.Correlation
	to.UTF8 = p.UTF8
	if p.HasExpiry {
		to.Expiry = max(p.Expiry, 1) // 0 would mean none
	}
	for name, value := range p.Props.User() {
		to.User = append(to.User, [2]string{view(name), view(value)})
	}
	return to.ContentType != "" || to.ResponseTopic != "" || to.Correlation != nil || to.UTF8 ||
		to.Expiry > 0 || len(to.User) > 0
}

// view is b as a string, without a copy: valid while b does not change.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// alias resolves or sets a topic alias (MQTT 5.0 §3.3.2.3.4). They end with the connection.
func (in *inflow) alias(alias uint16, topic []byte, most uint16) ([]byte, error) {
	if alias > most {
		return nil, &refusal{mqtt.TopicAliasInvalid, "topic alias above the maximum"} // MQTT-3.3.2-9
	}
	if in.aliases == nil {
		in.aliases = make([][]byte, int(most)+1)
	}
	if len(topic) == 0 {
		if in.aliases[alias] == nil {
			return nil, &refusal{mqtt.ProtocolError, "topic alias that was never set"}
		}
		return in.aliases[alias], nil
	}
	if !bytes.Equal(in.aliases[alias], topic) {
		in.aliases[alias] = bytes.Clone(topic)
	}
	return topic, nil
}

// tooDeep bounds the work of everything that walks a topic level by level.
func tooDeep[T string | []byte](topic T, most int) bool {
	n := 1
	for i := range len(topic) {
		if topic[i] == '/' {
			n++
		}
	}
	return n > most
}

// heard says whether anybody here may be subscribed to topic. It errs on the side of yes.
func (c *conn) heard(topic []byte) bool {
	gen := c.b.subs.generation.Load()
	if v, ok := c.in.heard[string(topic)]; ok && v>>1 == gen {
		return v&1 == 1
	}
	if c.b.subs.count.Load() == 0 && c.b.taps.all.Load() == nil {
		return false
	}
	v := gen << 1
	t := string(topic)
	if c.b.listening(t) {
		v |= 1
	}
	if len(c.in.heard) >= maxHeard {
		clear(c.in.heard)
	}
	c.in.heard[t] = v
	return v&1 == 1
}

// reserve takes the next place in the order of answers. It waits while the client has too
// much under way; meanwhile it is not read: that is the back-pressure.
func (c *conn) reserve(s *slot) (token uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.quota && c.version == mqtt.V5 && c.inflight >= c.window {
		return 0, &refusal{mqtt.ReceiveMaximumExceeded, "more unacknowledged messages than the receive maximum"}
	}
	for !c.ending && c.fullLocked(s) {
		c.startFlushLocked() // it may wait for what is in there
		c.cond.Wait()
	}
	if c.ending {
		return 0, errEnded
	}
	if int(c.tail-c.head) == len(c.ring) {
		ring := make([]slot, max(8, 2*len(c.ring)))
		for i := c.head; i < c.tail; i++ {
			ring[i&uint64(len(ring)-1)] = c.ring[i&uint64(len(c.ring)-1)]
		}
		c.ring = ring
	}
	if s.at == 0 && c.head == c.tail && (s.kind == slotPuback || s.kind == slotPubrec) {
		s.at = int64(time.Since(began))
	}
	token = c.tail
	c.tail++
	c.ring[token&uint64(len(c.ring)-1)] = *s
	c.unacked += int(s.size)
	if s.quota {
		c.inflight++
	}
	return token, nil
}

func (c *conn) fullLocked(s *slot) bool {
	switch {
	case c.halted.Load(): // the answer is still given; serve stops with the next packet
		return false
	case c.unacked > 0 && c.unacked+int(s.size) > c.b.cfg.MaxUnackedBytes:
		return true
	}
	// All that is in the ring waits for a commit, so it empties whatever the client does.
	return int(c.tail-c.head) >= c.window
}

// complete says how the packet in slot token ended, where nothing is to be committed.
func (c *conn) complete(token uint64, reason mqtt.Reason) {
	c.settle(token, reason)
	c.dirty = true
}

// settle is complete for other goroutines than serve.
func (c *conn) settle(token uint64, reason mqtt.Reason) {
	c.mu.Lock()
	s := &c.ring[token&uint64(len(c.ring)-1)]
	s.done, s.reason = true, reason
	c.releaseLocked()
	c.mu.Unlock()
}

// Done is called by the store's completing goroutine when a message or a row of this
// connection is committed, in the order in which they were handed in. The connection may be
// gone by then, or its session taken over: an answer goes to this connection or nowhere.
func (c *conn) Done(token, _ uint64, err error) {
	c.mu.Lock()
	s := &c.ring[token&uint64(len(c.ring)-1)]
	if s.kind == slotPubrec || s.kind == slotPubcomp {
		kind, id := s.kind, s.id
		c.mu.Unlock()
		// Before the answer can reach the client, whose next packet finds the new state.
		if kind == slotPubrec {
			c.sess.committed(c, id, token, err)
		} else {
			c.sess.released(c, id, token, err)
		}
		c.mu.Lock()
		s = &c.ring[token&uint64(len(c.ring)-1)]
	}
	s.done, s.failed = true, err != nil
	if token == c.head {
		c.releaseLocked()
	}
	c.mu.Unlock()
}

// releaseLocked gives the answers whose turn has come. Messages are passed on to local
// subscribers in the same order, also those of a connection that is gone.
func (c *conn) releaseLocked() {
	acks := 0
	for c.head < c.tail {
		s := &c.ring[c.head&uint64(len(c.ring)-1)]
		if !s.done {
			break
		}
		if s.failed {
			c.mute = true
		} else if !c.mute {
			c.answerLocked(s)
			if s.kind != slotNone {
				acks++
			}
		}
		if s.message != nil {
			if s.failed {
				c.b.fan.free(s.message) // the store has failed, so the announcement does not matter
			} else {
				c.b.fan.push(task{message: s.message})
			}
		}
		c.unacked -= int(s.size)
		if s.quota && (s.kind != slotPubrec || s.reason.Failed()) && c.inflight > 0 {
			c.inflight--
		}
		if s.at != 0 {
			c.b.m.ackSeconds.Observe(float64(int64(time.Since(began))-s.at) / 1e9)
		}
		*s = slot{}
		c.head++
	}
	if c.mute {
		if c.failure == nil {
			c.failure = errCommit
		}
		c.endLocked(c.failure)
	}
	if acks > 0 {
		c.b.m.acked.Add(float64(acks))
	}
	if c.out != nil && !c.touched && !c.flushing {
		c.touched = true
		c.b.touch(c)
	}
	c.cond.Broadcast()
}

func (c *conn) answerLocked(s *slot) {
	var t mqtt.Type
	switch s.kind {
	case slotNone:
		return
	case slotPuback:
		t = mqtt.TypePuback
	case slotPubrec:
		t = mqtt.TypePubrec
	case slotPubcomp:
		t = mqtt.TypePubcomp
	case slotRaw:
		c.appendLocked(func(b []byte) []byte { return append(b, s.raw.packet...) })
		if s.raw.connack {
			c.established = true
		}
		if s.raw.retain != nil {
			c.b.fan.push(task{subscribed: s.raw.retain})
		}
		return
	}
	id, v, reason := s.id, c.version, s.reason
	if c.traced() {
		c.b.log.Debug("publish answered", "client", c.id, "packet_id", id, "reason", reason.String(), "type", t.String())
	}
	c.appendLocked(func(b []byte) []byte { return mqtt.AppendAck(b, t, id, v, reason) })
}
