package broker

import (
	"slices"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// End ends the connections of a client at once, one that is in CONNECT included, and says whether
// there was any. An MQTT 5 client is told reason and text. With forget its session goes as well:
// subscriptions, queue, packet ids and their rows. That is over when the connection is, or soon
// after for a client that is offline; a connection that comes in between finds nothing of it and
// keeps what it makes. Who is to stay out must be refused by the Authorizer before End is called.
// It does not block.
func (b *Broker) End(client string, reason mqtt.Reason, text string, forget bool) bool {
	why := &ordered{reason, text}
	// First those in CONNECT: they leave connecting only when the session knows them.
	b.connMu.Lock()
	conns := slices.Clone(b.connecting[client])
	b.connMu.Unlock()
	if s := b.lookup(client); s != nil {
		s.mu.Lock()
		if s.conn != nil && !slices.Contains(conns, s.conn) {
			conns = append(conns, s.conn)
		}
		if forget && !s.gone && !s.fresh {
			s.forgotten = true
		}
		s.mu.Unlock()
		if forget && b.enter() {
			go func() {
				defer b.wg.Done()
				s.forget()
			}()
		}
	}
	any := false
	for _, c := range conns {
		any = c.end(why) || any
	}
	return any
}

// forget ends a session that End has marked, unless it is a connection's to do.
func (s *session) forget() {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	if !s.forgotten || s.gone || s.conn != nil {
		s.mu.Unlock()
		return
	}
	s.endOffline()
}

// endOffline ends a session that has no connection; a will that waits is due then at the latest. life
// is held, and mu, which it lets go.
func (s *session) endOffline() {
	var w *will
	var ops []kv.Op
	if s.waiting != nil {
		w = s.waiting.will
		ops = s.stopWillLocked(ops)
	}
	ops = s.endLocked(ops)
	s.mu.Unlock()
	if w != nil {
		s.b.publishWill(s.id, w, ops...)
		return
	}
	s.b.apply(ops)
}

// enterConnect notes that c is in CONNECT, so that End finds it.
func (b *Broker) enterConnect(c *conn) {
	b.connMu.Lock()
	b.connecting[c.id] = append(b.connecting[c.id], c)
	b.connMu.Unlock()
}

// leaveConnect ends that; twice without harm. The session knows c by now, or never will.
func (b *Broker) leaveConnect(c *conn) {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	list := b.connecting[c.id]
	i := slices.Index(list, c)
	switch {
	case i < 0:
	case len(list) == 1:
		delete(b.connecting, c.id)
	default:
		b.connecting[c.id] = slices.Delete(list, i, i+1)
	}
}

// Recheck looks at the rights of the named clients again, of all if none is named: subscriptions
// that a session may no longer have are removed with their rows, and new limits hold. What is
// published and delivered is measured by the rights at that moment anyway. It may wait for the store.
func (b *Broker) Recheck(clients ...string) {
	var all []*session
	if len(clients) == 0 {
		b.sessMu.RLock()
		for _, s := range b.sessions {
			all = append(all, s)
		}
		b.sessMu.RUnlock()
	}
	for _, id := range clients {
		if s := b.lookup(id); s != nil {
			all = append(all, s)
		}
	}
	for _, s := range all {
		s.recheck()
	}
}

func (s *session) recheck() {
	if !s.b.enter() {
		return
	}
	defer s.b.wg.Done()
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	c := s.conn
	idle := len(s.subs) == 0 && s.queue.len() == 0
	s.mu.Unlock()
	if c == nil {
		s.rights.Store(nil) // who is offline is asked about anew: it may be somebody else's by now
	} else {
		c.setLimits()
	}
	if idle {
		return
	}
	rights := s.held()
	s.mu.Lock()
	ops, n := s.withdrawLocked(rights, nil)
	s.mu.Unlock()
	s.tellWithdrawn(n)
	s.b.apply(ops)
}

// withdrawLocked removes the subscriptions that the session has no right to, appends the removal of
// their rows, and drops what waits because of them. life is held, and mu.
func (s *session) withdrawLocked(rights Rights, ops []kv.Op) (_ []kv.Op, withdrawn int) {
	s.subs = slices.DeleteFunc(s.subs, func(sub subscription) bool {
		if rights.MaySubscribe(sub.match) {
			return false
		}
		withdrawn++
		s.b.unindex(s.id, &sub)
		if s.client != nil {
			s.client.State.Subscriptions.Delete(sub.filter)
		}
		if s.stored {
			ops = append(ops, kv.Op{Key: subscriptionKey(s.id, sub.filter), Delete: true})
		}
		return true
	})
	if len(s.subs) == 0 {
		s.subs = nil
	}
	s.dropQueuedLocked(func(m *message) bool { return !rights.MaySubscribe(m.topic) })
	return ops, withdrawn
}

func (s *session) tellWithdrawn(n int) {
	if n == 0 {
		return
	}
	s.b.subs.changed()
	s.b.m.withdrawn.Add(float64(n))
	s.b.log.Info("subscriptions withdrawn", "client", s.id, "subscriptions", n)
}
