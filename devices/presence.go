package devices

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/kv"
)

const (
	presenceShards = 64
	// toldPerMinute is how many comings and goings of one device are told upstream within any minute.
	toldPerMinute = 12
	toldWindow    = time.Minute
	// toldAtOnce and toldPerSecond bound what is told upstream of all devices: the lane of these events is also that of
	// commands, and what many thousands of devices do that come and go must not drive those out. All devices of a large site
	// may come, go and come again at once.
	toldAtOnce    = 30_000
	toldPerSecond = 100

	reasonRestarted = "gateway restarted"
	reasonRemoved   = "the device was removed"
)

// presences is who is connected. Its locks are held shortly; completions take none of them.
type presences struct {
	online atomic.Int64 // connections
	tokens atomic.Uint64
	conns  [presenceShards]presenceShard

	lateMu sync.Mutex          // guards late and all
	late   map[string]struct{} // devices of which something is still to be told
	all    bucket              // of what is told of all devices
	most   float64             // that all holds
	rate   float64             // at which it is filled, a second

	// returned is who connected, or was removed, since the start, until tellCrashed has looked at all that the
	// crash left; nil after that.
	returnedMu sync.Mutex
	returned   map[string]struct{}
}

type presenceShard struct {
	mu    sync.Mutex
	conns map[string]*connection
	told  map[string]*told
}

// connection is the one that a device has now.
type connection struct {
	token uint64
	since time.Time
	info  Connection // its Identity keeps the entry alive
	heard time.Time  // its device's last message before this connection
	entry *entry
	ended atomic.Bool // it was told to go
	rows  bool        // it is kept and told: the device is registered. Under the device's order lock
}

func (c *connection) presence() Presence {
	heard := c.heard
	if c.info.LastMessage != nil {
		if now := c.info.LastMessage(); !now.IsZero() {
			heard = now
		}
	}
	return Presence{
		Connected: true, Since: c.since, LastSeen: c.since, LastMessage: heard, Address: c.info.Address, Protocol: c.info.Protocol,
		Listener: c.info.Listener, TLS: c.info.TLS, Will: c.info.Will,
	}
}

// told is what the cloud was told of a device of late. Under presenceShard.mu.
type told struct {
	at     [toldPerMinute]time.Time // a ring
	next   int
	online bool // what it was told last
	late   bool // something was not told
}

// allow says whether one more may be told now, and notes that it is. all is asked last.
func (t *told) allow(online bool, all func(now time.Time) bool) bool {
	now := time.Now()
	if last := t.at[t.next]; !last.IsZero() && now.Sub(last) < toldWindow || !all(now) {
		return false
	}
	t.at[t.next] = now
	t.next = (t.next + 1) % toldPerMinute
	t.online, t.late = online, false
	return true
}

// idle says whether it can be forgotten.
func (t *told) idle(now time.Time) bool {
	last := t.at[(t.next+toldPerMinute-1)%toldPerMinute]
	return !t.late && now.Sub(last) >= toldWindow
}

func (p *presences) init() {
	for i := range p.conns {
		p.conns[i].conns = map[string]*connection{}
		p.conns[i].told = map[string]*told{}
	}
	p.late = map[string]struct{}{}
	p.most, p.rate = toldAtOnce, toldPerSecond
	p.all = bucket{level: toldAtOnce, last: time.Now()}
	p.returned = map[string]struct{}{}
}

func (r *Registry) presenceShard(id string) *presenceShard {
	return &r.conns[r.hashID(id)%presenceShards]
}

func (r *Registry) connection(id string) *connection {
	s := r.presenceShard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns[id]
}

func (r *Registry) connected(id string) bool { return r.connection(id) != nil }

// connectedAfter lists who is connected, by id, after one.
func (r *Registry) connectedAfter(after string) []string {
	var ids []string
	for i := range r.conns {
		s := &r.conns[i]
		s.mu.Lock()
		for id := range s.conns {
			if id > after {
				ids = append(ids, id)
			}
		}
		s.mu.Unlock()
	}
	slices.Sort(ids)
	return ids
}

// presence of a registered device.
func (r *Registry) presence(id string) Presence {
	if c := r.connection(id); c != nil {
		p := c.presence()
		p.LastSeen = r.wall() // its keep-alive says so
		return p
	}
	if e := r.entries.find(id); e != nil {
		if gone := e.lastPresence(); gone != nil {
			return *gone
		}
	}
	row, found, err := r.store.Get(presenceKey(id))
	if err != nil || !found {
		return Presence{}
	}
	p, err := decodePresence(row)
	if err != nil {
		r.unreadable(presenceKey(id), err)
		return Presence{}
	}
	if p.Connected { // a crash left it so, and tellCrashed has not come to it
		p = crashed(p, r.started)
	}
	return p
}

// crashed is the presence of a device that a crash disconnected.
func crashed(p Presence, at time.Time) Presence {
	p.Connected, p.Since, p.Reason = false, at, reasonRestarted
	return p
}

func (e *entry) lastPresence() *Presence {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gone
}

func (e *entry) setLastPresence(p *Presence) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.gone = p
}

// Connected notes that a device is here. The token names this connection. It registers an anonymous device. It does
// not wait for the disk, but it may wait while the store is behind.
func (r *Registry) Connected(id string, c Connection) (token uint64) {
	conn := &connection{token: r.tokens.Add(1), since: r.wall(), info: c}
	for _, s := range []*string{&conn.info.Address, &conn.info.Protocol, &conn.info.Listener, &conn.info.Will} {
		*s = strings.Clone(clip(*s)) // what it was a part of may be large
	}
	id = strings.Clone(id)
	r.arrive(id, conn)
	// It may have been removed, disabled or left without its credential since Authenticate: whoever did that looked
	// for a connection before this one was there, or comes to the same end as this.
	r.judgeConnection(id)
	return conn.token
}

func (r *Registry) arrive(id string, conn *connection) {
	defer r.lock(id).Unlock()
	e, err := r.load(id)
	if err != nil {
		r.log.Warn("presence of device not stored", "device", id, "err", err)
		e = r.entries.get(id)
	}
	conn.entry = e
	conn.heard = r.presence(id).LastMessage
	r.noteReturn(id)
	s := r.presenceShard(id)
	s.mu.Lock()
	switch {
	case s.conns[id] == nil:
		r.online.Add(1)
	case conn.info.Alive != nil && !conn.info.Alive():
		s.mu.Unlock()
		return // a newer one was faster
	}
	s.conns[id] = conn
	s.mu.Unlock()
	e.setLastPresence(nil)
	if err != nil {
		return
	}
	old, bad := e.latest()
	if bad != nil {
		return
	}
	next := old
	if old == nil {
		next = r.selfRegistered(id, conn)
	}
	if next == nil {
		return
	}
	ops := make([]kv.Op, 0, 4)
	if next != old {
		ops = append(ops, kv.Op{Key: deviceKey(id), Value: next.encode()})
	}
	p := conn.presence()
	ops = append(ops,
		kv.Op{Key: presenceKey(id), Value: encodePresence(&p)},
		kv.Op{Key: connectedKey(id), Value: connectedRow},
	)
	conn.rows = true
	err = r.commitDevice(e, old, next, ops, []Event{r.presenceEvent(id, p)}, func(error) {})
	switch {
	case err == nil:
		r.entries.cache.touch(e)
	case errors.Is(err, ErrTooManyDevices):
		conn.rows = false
		s.mu.Lock()
		delete(s.told, id)
		s.mu.Unlock()
		r.fullOnce.Do(func() {
			r.log.Warn("no more devices register themselves, further ones stay unknown and get no commands", "err", err)
		})
	default:
		r.presenceLost(id, err)
	}
}

// selfRegistered is the device that a client who is not registered becomes; nil: it cannot be one.
func (r *Registry) selfRegistered(id string, conn *connection) *device {
	if !r.policy.Load().anonymous || CheckID(id) != nil || strings.HasPrefix(id, brokerIDPrefix) {
		return nil
	}
	return &device{id: id, enabled: true, anonymous: true, role: AnonymousRole, created: conn.since, updated: conn.since}
}

func (r *Registry) presenceLost(id string, err error) {
	if errors.Is(err, kv.ErrClosed) {
		r.log.Debug("presence of device not stored", "device", id, "err", err)
		return
	}
	r.log.Warn("presence of device not stored", "device", id, "err", err)
}

// Disconnected notes that the connection token has ended. If a newer one of the device is there, nothing changes. As
// Connected, it does not wait for the disk.
func (r *Registry) Disconnected(id string, token uint64, reason string) {
	defer r.lock(id).Unlock()
	s := r.presenceShard(id)
	s.mu.Lock()
	c := s.conns[id]
	if c == nil || c.token != token {
		s.mu.Unlock()
		return
	}
	now := r.wall()
	p := c.presence()
	p.Connected, p.Since, p.LastSeen, p.Reason = false, now, now, clip(reason)
	if c.rows {
		c.entry.setLastPresence(&p) // before it is no longer connected, so that nobody asks the row before it is written
	}
	delete(s.conns, id)
	s.mu.Unlock()
	r.online.Add(-1)
	if !c.rows {
		return
	}
	ops := []kv.Op{
		{Key: presenceKey(id), Value: encodePresence(&p)},
		{Key: connectedKey(id), Delete: true},
	}
	// The entry lives until the row can be read.
	if err := r.journal.Commit(ops, []Event{r.presenceEvent(id, p)}, func(error) { _ = c.entry }); err != nil {
		r.presenceLost(id, err)
	}
}

// allowOfAll takes a token from the bucket of all devices, if there is one.
func (p *presences) allowOfAll(now time.Time) bool {
	p.lateMu.Lock()
	defer p.lateMu.Unlock()
	return p.all.take(now, p.most, p.rate)
}

// presenceEvent is what is told of a change of presence, upstream too unless the device flaps.
func (r *Registry) presenceEvent(id string, p Presence) Event {
	s := r.presenceShard(id)
	s.mu.Lock()
	t := s.told[id]
	if t == nil {
		t = &told{}
		s.told[id] = t
	}
	upstream := t.allow(p.Connected, r.allowOfAll)
	later := !upstream && !t.late
	t.late = !upstream
	s.mu.Unlock()
	if !upstream {
		r.m.suppressed.Inc()
	}
	if later {
		r.lateMu.Lock()
		r.late[id] = struct{}{}
		r.lateMu.Unlock()
	}
	return Event{Device: &PresenceChange{Device: id, Presence: p}, Upstream: upstream}
}

// forget makes the presence of a device go with it: the events that are left to tell. The device's order lock is held.
func (r *Registry) forget(id string) []Event {
	r.noteReturn(id)
	s := r.presenceShard(id)
	s.mu.Lock()
	c := s.conns[id]
	delete(s.told, id)
	s.mu.Unlock()
	if e := r.entries.find(id); e != nil {
		e.setLastPresence(nil)
	}
	if c == nil || !c.rows {
		return nil
	}
	c.rows = false
	now := r.wall()
	p := c.presence()
	p.Connected, p.Since, p.LastSeen, p.Reason = false, now, now, reasonRemoved
	return []Event{{Device: &PresenceChange{Device: id, Presence: p}, Upstream: true}}
}

// judgeConnection ends the connection of a device that may not have it.
func (r *Registry) judgeConnection(id string) {
	c := r.connection(id)
	if c == nil {
		return
	}
	d, err := c.entry.durable()
	if err != nil {
		return // it was let in before its row could not be read: it stays until it goes
	}
	if reason := r.mayStay(d, c.info.Identity); reason != "" {
		if !c.ended.Swap(true) {
			r.log.Info("device disconnected", "device", id, "reason", reason)
		}
		r.kick(id, reason, d == nil)
	}
}

// mayStay says why a device that was let in as identity may no longer be connected; "": it may.
func (r *Registry) mayStay(d *device, i *Identity) string {
	p := r.policy.Load()
	switch {
	case d == nil && (!p.anonymous || i != nil && !i.anonymous):
		return reasonRemoved
	case d == nil:
		return ""
	case !d.enabled:
		return "the device is disabled"
	case d.anonymous && !p.anonymous:
		return "devices.anonymous is off now"
	case p.role(d) == nil:
		return "its role is no longer there"
	case i == nil:
		return ""
	case i.anonymous && !d.anonymous:
		return "the device is registered now and needs its credentials"
	case i.credential != "":
		if c := d.credential(i.credential); c == nil {
			return "its credential was revoked"
		} else if c.expired(r.now()) {
			return "its credential has expired"
		}
	case i.certified && d.has(kindCertificate):
		return "the device has pinned certificates now, and came with another"
	}
	return ""
}

// endExpired ends connections whose credential has expired.
func (r *Registry) endExpired() {
	now := r.now()
	var due []string
	for i := range r.conns {
		s := &r.conns[i]
		s.mu.Lock()
		for id, c := range s.conns {
			if at := c.info.Identity.expires(); !at.IsZero() && !now.Before(at) {
				due = append(due, id)
			}
		}
		s.mu.Unlock()
	}
	for _, id := range due {
		r.judgeConnection(id)
	}
}

// tellLate tells how devices are that flapped, as soon as the minute is over.
func (r *Registry) tellLate() {
	r.lateMu.Lock()
	due := r.late
	if len(due) > 0 {
		r.late = map[string]struct{}{}
	}
	r.lateMu.Unlock()
	if len(due) == 0 {
		return
	}
	for id := range due {
		if !r.tellNow(id) {
			r.lateMu.Lock()
			r.late[id] = struct{}{}
			r.lateMu.Unlock()
		}
	}
}

// tellNow tells the cloud how a device is if it was told otherwise. done is false if it may not be told yet.
func (r *Registry) tellNow(id string) (done bool) {
	defer r.lock(id).Unlock()
	s := r.presenceShard(id)
	s.mu.Lock()
	t, c := s.told[id], s.conns[id]
	online := c != nil && c.rows
	if t == nil || t.online == online {
		if t != nil {
			t.late = false
		}
		s.mu.Unlock()
		return true
	}
	if !t.allow(online, r.allowOfAll) {
		s.mu.Unlock()
		return false
	}
	s.mu.Unlock()
	ev := Event{Device: &PresenceChange{Device: id, Presence: r.presence(id)}, Upstream: true}
	if err := r.journal.Commit(nil, []Event{ev}, func(error) {}); err != nil {
		r.presenceLost(id, err)
	}
	return true
}

// forgetTold lets go of devices that have been quiet.
func (r *Registry) forgetTold() {
	now := time.Now()
	for i := range r.conns {
		s := &r.conns[i]
		s.mu.Lock()
		for id, t := range s.told {
			if t.idle(now) {
				delete(s.told, id)
			}
		}
		s.mu.Unlock()
	}
}

func (r *Registry) noteReturn(id string) {
	r.returnedMu.Lock()
	defer r.returnedMu.Unlock()
	if r.returned != nil {
		r.returned[id] = struct{}{}
	}
}

// tellCrashed tells of the devices that were connected when the gateway ended without a word, unless they are back.
// Only their rows are read.
func (r *Registry) tellCrashed(ctx context.Context) error {
	prefix := connectedKey("")
	var ids []string
	if err := r.store.Scan(prefix, func(key, _ []byte) error {
		ids = append(ids, string(key[len(prefix):]))
		return nil
	}); err != nil {
		return err
	}
	n := 0
	for _, id := range ids {
		if ctx.Err() != nil {
			return nil // the next start goes on
		}
		gone, err := r.tellCrash(id)
		if err != nil {
			return err
		}
		if gone {
			n++
		}
	}
	r.returnedMu.Lock()
	r.returned = nil
	r.returnedMu.Unlock()
	if n > 0 {
		r.log.Info("devices disconnected by the last stop", "devices", n)
	}
	return nil
}

func (r *Registry) tellCrash(id string) (gone bool, err error) {
	defer r.lock(id).Unlock()
	r.returnedMu.Lock()
	_, returned := r.returned[id]
	r.returnedMu.Unlock()
	if returned {
		return false, nil
	}
	row, found, err := r.store.Get(presenceKey(id))
	if err != nil {
		return false, err
	}
	ops := []kv.Op{{Key: connectedKey(id), Delete: true}}
	var p Presence
	if found {
		p, err = decodePresence(row)
	}
	if err != nil {
		r.unreadable(presenceKey(id), err)
	}
	if errors.Is(err, ErrVersion) {
		return false, nil // the version that wrote it will tell
	}
	p = crashed(p, r.started)
	ops = append(ops, kv.Op{Key: presenceKey(id), Value: encodePresence(&p)})
	err = r.journal.Commit(ops, []Event{r.presenceEvent(id, p)}, func(error) {})
	return err == nil, err
}
