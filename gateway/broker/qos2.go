package broker

import (
	"errors"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// rx is a QoS 2 message from the client whose packet id is not released yet (MQTT 5.0 §4.3.3,
// method A: stored at PUBLISH, the id forgotten at PUBREL).
type rx struct {
	state   rxState
	c       *conn  // whose slot token is the last one that was handed in for this id
	token   uint64 //
	counted *conn  // the connection that counts it against its receive maximum
	waiters []rxWaiter
}

type rxWaiter struct {
	c     *conn
	token uint64
}

type rxState uint8

const (
	rxCommitting rxState = iota // message and id are handed in
	rxReceived                  // both are stored; PUBREC went out or is about to
	rxReleasing                 // the removal of the id is handed in
)

// What to do with a QoS 2 PUBLISH.
type rxVerdict uint8

const (
	rxNew    rxVerdict = iota // store it
	rxRepeat                  // answer it
	rxWait                    // it is answered when the first one's commit ends
	rxFull                    // too many ids are not released
	rxStale                   // another connection has the session
)

// maxUnreleased bounds the ids that a client leaves unreleased; MQTT 5 clients are held to
// receive maximum well before, on each connection anew.
const maxUnreleased = 4096

// counts says whether a PUBLISH with this id counts against c's receive maximum: repeats on the
// same connection do not.
func (s *session) counts(c *conn, id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.rx[id]
	return e == nil || e.counted != c
}

// received finds out what a QoS 2 PUBLISH is, and takes note of a new one. The row of a new
// one's id is of this era; stored says whether the session has rows at all.
func (s *session) received(c *conn, id uint16, token uint64) (v rxVerdict, stored bool, era uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.receivedLocked(c, id, token), s.stored, s.era
}

func (s *session) receivedLocked(c *conn, id uint16, token uint64) rxVerdict {
	if s.conn != c {
		return rxStale
	}
	if e := s.rx[id]; e != nil {
		e.counted = c
		switch e.state {
		case rxReceived:
			return rxRepeat
		case rxCommitting:
			e.waiters = append(e.waiters, rxWaiter{c, token})
			return rxWait
		case rxReleasing:
			// The client has let go of the id already: this is another message.
		}
	}
	if len(s.rx) >= maxUnreleased {
		return rxFull
	}
	if s.rx == nil {
		s.rx = map[uint16]*rx{}
	}
	s.rx[id] = &rx{c: c, token: token, counted: c}
	return rxNew
}

// committed ends the commit of a QoS 2 message. After an error the id is free again.
func (s *session) committed(c *conn, id uint16, token uint64, err error) {
	s.mu.Lock()
	e := s.rx[id]
	if e == nil || e.c != c || e.token != token || e.state != rxCommitting {
		s.mu.Unlock() // the session was cleared meanwhile
		return
	}
	waiters := e.waiters
	e.waiters = nil
	if err == nil {
		e.state = rxReceived
	} else {
		delete(s.rx, id)
	}
	s.mu.Unlock()
	var refused *refusal
	for _, w := range waiters {
		switch {
		case err == nil:
			w.c.settle(w.token, mqtt.Success)
		case errors.As(err, &refused) && w.c.version == mqtt.V5:
			w.c.settle(w.token, refused.reason)
		default:
			w.c.fail(w.token, errCommit)
		}
	}
}

// release2 handles a PUBREL: the id is removed durably before PUBCOMP lets the client use it
// again. Were it forgotten after the PUBCOMP only, a crash in between would make the next
// message with this id look like a repeat.
func (c *conn) release2(a *mqtt.Ack) error {
	s := c.sess
	token, err := c.reserve(&slot{kind: slotPubcomp, id: a.ID})
	if err != nil {
		return err
	}
	c.handing.Lock()
	defer c.handing.Unlock()
	s.mu.Lock()
	e := s.rx[a.ID]
	switch {
	case s.conn != c:
		s.mu.Unlock()
		return errTakenOver
	case e == nil:
		s.mu.Unlock()
		// Unknown: it was released before. 3.1.1 has no word for that and wants PUBCOMP.
		reason := mqtt.Success
		if c.version == mqtt.V5 {
			reason = mqtt.PacketIDNotFound
		}
		c.complete(token, reason)
		return nil
	case e.state == rxCommitting:
		s.mu.Unlock()
		return &refusal{mqtt.ProtocolError, "PUBREL before PUBREC"}
	}
	e.state, e.c, e.token = rxReleasing, c, token
	if e.counted == c {
		c.countOff(token)
		e.counted = nil
	}
	stored, era := s.stored, s.era
	if !stored {
		delete(s.rx, a.ID)
	}
	s.mu.Unlock()
	if !stored {
		c.complete(token, mqtt.Success)
		return nil
	}
	key := appendQoS2Key(nil, s.id, era, a.ID)
	if err := c.b.store.Apply([]kv.Op{{Key: key, Delete: true}}, c, token); err != nil {
		return err // no PUBCOMP: the client asks again
	}
	return nil
}

// countOff has the answer in slot token take a message off the receive maximum.
func (c *conn) countOff(token uint64) {
	c.mu.Lock()
	c.ring[token&uint64(len(c.ring)-1)].quota = true
	c.mu.Unlock()
}

// released ends the commit that removed an id.
func (s *session) released(c *conn, id uint16, token uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.rx[id]
	if err == nil && e != nil && e.c == c && e.token == token && e.state == rxReleasing {
		delete(s.rx, id)
	}
}
