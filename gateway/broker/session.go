package broker

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// session is what outlives a connection (MQTT 5.0 §4.1): subscriptions, packet ids in both
// directions, messages that wait. Its existence, its subscriptions and the ids of QoS 2
// messages from the client are rows and survive the gateway; messages that wait for the
// client are in memory only.
type session struct {
	b  *Broker
	id string // client id

	// life makes attach, subscribe, detach and expiry one after the other, and with them the
	// order of the rows that they hand in. What holds it may wait for the store, so nothing
	// that completes commits may take it.
	life   sync.Mutex
	client *mochi.Client // mochi's view of the session, made at the first SUBSCRIBE; under life
	answer *capture      // the client's net.Conn; under life

	rights atomic.Pointer[held] // nil: to be asked for

	mu        sync.Mutex // guards what follows; never held while waiting for anything
	conn      *conn      // nil: offline
	fresh     bool       // no connection has had it yet
	gone      bool       // it has ended and is not in Broker.sessions any more
	forgotten bool       // nobody is to find it again; see Broker.End
	stored    bool       // it has rows
	version   mqtt.Version
	era       uint64
	who       string    // principal of the last connection; "": nobody in particular
	expiry    uint32    // seconds that it outlives its connection; neverEnds: it does not end
	left      time.Time // when it went offline
	endsAt    time.Time
	timer     *time.Timer // to endsAt; nil: connected, or never
	subs      []subscription
	rx        map[uint16]*rx
	waiting   *pendingWill // nil: none
	queue     queue
	load      int      // bytes of the messages in queue and flights
	flying    int      // of those in flights
	flights   []flight // sent or to be sent again, in order
	resend    int      // flights[resend:] were not sent on this connection yet
	unacked   int      // sent on this connection and not yet answered
	lastID    uint16
}

const neverEnds = math.MaxUint32

// subscription is one of a session's.
type subscription struct {
	filter            string // with $share/name/
	match             string // without
	shared            bool
	qos               byte
	noLocal           bool
	retainAsPublished bool
	retainHandling    byte
	identifier        uint32 // 0: none
	answered          bool   // its SUBACK is on its way, as far as Link.Covers must know
}

// requests says whether commands may come by the subscription.
func (s *subscription) requests() bool { return !s.shared && s.qos > 0 && mayRequest(s.match) }

// newEra gives a number that no earlier incarnation of a session had.
func newEra() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

// session finds or makes the session of a client id. Where there are too many, offline ones of nobody in particular make room.
func (b *Broker) session(id string) (*session, error) {
	s, err := b.findSession(id)
	if err != nil && b.makeRoom() {
		s, err = b.findSession(id)
	}
	return s, err
}

// makeRoom ends sessions of clients that are offline and were let in without credentials, those first that have been so for
// longest: whoever connects under ever new ids must not keep all others out. It ends some at once, since it looks at all. It says
// whether there is room.
func (b *Broker) makeRoom() bool {
	b.roomMu.Lock()
	defer b.roomMu.Unlock()
	if b.sessionCount() < b.cfg.MaxSessions {
		return true // somebody else has made some meanwhile
	}
	type candidate struct {
		s    *session
		left time.Time
	}
	var all []*session
	b.sessMu.RLock()
	for _, s := range b.sessions {
		all = append(all, s)
	}
	b.sessMu.RUnlock()
	var found []candidate
	for _, s := range all {
		s.mu.Lock()
		if s.conn == nil && !s.fresh && !s.gone && s.who == "" {
			found = append(found, candidate{s, s.left})
		}
		s.mu.Unlock()
	}
	slices.SortFunc(found, func(a, b candidate) int { return a.left.Compare(b.left) })
	made := 0
	for _, f := range found[:min(len(found), max(b.cfg.MaxSessions/100, 1))] {
		if f.s.evict(f.left) {
			made++
		}
	}
	b.m.evicted.Add(float64(made))
	if made > 0 {
		b.log.Log(context.Background(), b.noticeLevel(nil), "too many sessions, those offline for longest were ended", "ended", made, "most", b.cfg.MaxSessions)
	}
	return made > 0
}

// evict ends a session that has been offline since left.
func (s *session) evict(left time.Time) bool {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	if s.conn != nil || s.fresh || s.gone || !s.left.Equal(left) {
		s.mu.Unlock()
		return false
	}
	s.endOffline()
	return true
}

func (b *Broker) findSession(id string) (*session, error) {
	b.sessMu.Lock()
	defer b.sessMu.Unlock()
	if s := b.sessions[id]; s != nil {
		return s, nil
	}
	if len(b.sessions) >= b.cfg.MaxSessions {
		return nil, &refusal{mqtt.QuotaExceeded, "too many sessions"}
	}
	s := &session{b: b, id: id, fresh: true, era: newEra()}
	b.sessions[id] = s
	return s, nil
}

func (b *Broker) lookup(id string) *session {
	b.sessMu.RLock()
	defer b.sessMu.RUnlock()
	return b.sessions[id]
}

// attach gives the session of k's client to c. An older connection of the client is told and
// closed without waiting for anything (MQTT-3.1.4-3). The CONNACK that welcome makes goes out
// when what attach had to write is durable: a client that reads "session present 0" after a
// crash of the gateway must not meet the packet ids of a session that it saw cleared.
func (b *Broker) attach(c *conn, k *mqtt.Connect, expiry uint32, welcome func(present bool) []byte) error {
	var s *session
	for {
		var err error
		if s, err = b.session(c.id); err != nil {
			return err
		}
		s.life.Lock()
		s.mu.Lock()
		if !s.gone {
			break
		}
		s.mu.Unlock()
		s.life.Unlock()
	}
	defer s.life.Unlock()

	old := s.conn
	fresh := s.fresh
	who := principal(c.rights)
	if c.ended.Load() { // by Broker.End, which has not found it here
		s.mu.Unlock()
		return errEnded
	}
	if old != nil && !old.ended.Load() && s.who != "" && s.who != who {
		s.mu.Unlock()
		return &refusal{mqtt.NotAuthorized, "the client id is in use by somebody else"}
	}
	// A session that ends with its connection ends when that is taken over, too; and nobody
	// inherits somebody else's.
	ended := !fresh && (k.CleanStart || old != nil && s.expiry == 0 || s.who != who || s.forgotten)
	var (
		ops   []kv.Op
		wills []*will
	)
	if w := s.waiting; w != nil {
		ops = s.stopWillLocked(ops)
		if ended { // MQTT-3.1.3-9 lets it go only if the session goes on
			wills = append(wills, w.will)
		}
	}
	if old != nil {
		if w := old.takeWill(); w != nil && (ended || w.delay == 0) {
			wills = append(wills, w)
		}
	}
	if ended {
		ops = s.clearLocked(ops)
		s.era = newEra()
	}
	withdrawn := 0
	if !fresh && !ended { // the rights may be others than when it was here last
		ops, withdrawn = s.withdrawLocked(c.rights, ops)
	}
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	s.conn, s.fresh, s.expiry, s.version, s.who, s.forgotten = c, false, expiry, c.version, who, false
	s.rights.Store(&held{c.rights})
	for i := range s.subs {
		s.subs[i].answered = true
	}
	s.resend, s.unacked = 0, 0
	switch {
	case expiry > 0:
		s.stored = true
		row := sessionRow{version: c.version, expiry: expiry, era: s.era, who: who}
		ops = append(ops, kv.Op{Key: sessionKey(s.id), Value: row.encode()})
	case s.stored:
		ops = s.dropRowsLocked(ops) // from now on it ends with the connection, also by a crash
	}
	if len(s.flights)+s.queue.len() > 0 {
		c.deliver()
	}
	c.sess = s
	s.mu.Unlock()

	s.tellWithdrawn(withdrawn)
	if old != nil {
		b.m.takeovers.Inc()
		old.end(errTakenOver)
		old.handing.Lock()   // waits for the store at most, never for the old peer
		old.handing.Unlock() //nolint:staticcheck // empty on purpose
	}
	for _, w := range wills {
		b.publishWill(s.id, w)
	}
	token, err := c.reserve(&slot{kind: slotRaw, raw: &answer{packet: welcome(!fresh && !ended), connack: true}})
	if err != nil {
		return err
	}
	if len(ops) == 0 {
		c.complete(token, mqtt.Success)
		return nil
	}
	return b.store.Apply(ops, c, token)
}

// detach is the end of c for its session.
func (s *session) detach(c *conn) {
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	if s.conn != c {
		s.mu.Unlock() // taken over: attach has seen to everything
		return
	}
	s.conn = nil
	stopping := c.halted.Load()
	goodbye := c.goodbye
	if goodbye != nil && goodbye.HasSessionExpiry {
		s.expiry = min(goodbye.SessionExpiry, s.b.expiryMax())
	}
	w := c.takeWill()
	if stopping || goodbye != nil && goodbye.Reason != mqtt.DisconnectWithWill {
		w = nil // MQTT-3.14.4-3; and a gateway that is stopped is no death of its devices
	}
	var ops []kv.Op
	now := time.Now()
	switch {
	case s.expiry == 0, s.forgotten:
		ops = s.endLocked(ops)
	default:
		s.stored, s.left = true, now
		gone := s.b.clock.Read()
		row := sessionRow{version: s.version, expiry: s.expiry, era: s.era, disconnected: max(gone.Wall, 1), disconnectedT: gone.T, who: s.who}
		ops = append(ops, kv.Op{Key: sessionKey(s.id), Value: row.encode()})
		s.startTimerLocked(now)
		if w != nil && w.delay > 0 && !stopping {
			ops = s.waitWillLocked(ops, w, now)
			w = nil
		}
	}
	s.mu.Unlock()
	if w != nil {
		s.b.publishWill(s.id, w, ops...)
		return
	}
	s.b.apply(ops)
}

// startTimerLocked has the session end after its expiry interval.
func (s *session) startTimerLocked(from time.Time) {
	if s.expiry == neverEnds || s.b.stopped() {
		return
	}
	s.endsAt = from.Add(time.Duration(s.expiry) * time.Second)
	s.timer = time.AfterFunc(time.Until(s.endsAt), s.expire)
}

// expire ends a session whose time is over.
func (s *session) expire() {
	if !s.b.enter() {
		return
	}
	defer s.b.wg.Done()
	s.life.Lock()
	defer s.life.Unlock()
	s.mu.Lock()
	if s.conn != nil || s.gone || s.timer == nil || time.Now().Before(s.endsAt) {
		s.mu.Unlock() // a connection was faster
		return
	}
	s.endOffline()
	s.b.m.expired.Inc() // it has: who sees the count finds nothing of it any more
}

// endLocked ends the session: the next connection of this client finds none.
func (s *session) endLocked(ops []kv.Op) []kv.Op {
	ops = s.clearLocked(ops)
	s.gone = true
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	s.b.sessMu.Lock()
	if s.b.sessions[s.id] == s {
		delete(s.b.sessions, s.id)
	}
	s.b.sessMu.Unlock()
	return ops
}

// clearLocked forgets the session's state and appends the removal of its rows.
func (s *session) clearLocked(ops []kv.Op) []kv.Op {
	ops = s.dropRowsLocked(ops)
	for i := range s.subs {
		s.b.unindex(s.id, &s.subs[i])
	}
	if len(s.subs) > 0 {
		s.subs = nil
		s.b.subs.changed()
	}
	s.client, s.answer = nil, nil // attach, detach and expire hold life
	s.rx = nil
	s.b.m.queued.Sub(float64(s.queue.len()))
	s.b.queuedBytes.Add(-int64(s.load))
	s.b.flyingBytes.Add(-int64(s.flying))
	s.load, s.flying = 0, 0
	s.queue = queue{}
	s.flights, s.resend, s.unacked = nil, 0, 0
	return ops
}

// dropRowsLocked appends the removal of the session's rows and keeps its state.
func (s *session) dropRowsLocked(ops []kv.Op) []kv.Op {
	if !s.stored {
		return ops
	}
	s.stored = false
	ops = append(ops, kv.Op{Key: sessionKey(s.id), Delete: true})
	for i := range s.subs {
		ops = append(ops, kv.Op{Key: subscriptionKey(s.id, s.subs[i].filter), Delete: true})
	}
	for id := range s.rx {
		ops = append(ops, kv.Op{Key: appendQoS2Key(nil, s.id, s.era, id), Delete: true})
	}
	return ops
}

// ends says whether the session ends with its connection.
func (s *session) ends() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.expiry == 0
}

// expiryMax is the longest session expiry that is granted, in seconds.
func (b *Broker) expiryMax() uint32 {
	return uint32(min(int64(b.cfg.SessionExpiryMax/time.Second), neverEnds-1))
}

// apply hands rows in that nobody waits for.
func (b *Broker) apply(ops []kv.Op) {
	if len(ops) == 0 {
		return
	}
	if err := b.store.Apply(ops, nil, 0); err != nil {
		b.log.Warn("session rows are not written", "rows", len(ops), "err", err)
	}
}
