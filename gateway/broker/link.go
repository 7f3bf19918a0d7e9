package broker

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/internal/mqtt"
)

// Errors of Link.Send. Nothing was written and nothing will be.
var (
	ErrLinkGone = errors.New("connection has ended")
	ErrTooLarge = errors.New("larger than the client's maximum packet size")
)

// Watcher is told of connections, so that it can send commands on them. All of it is called on
// the connection's goroutine, and no lock is held: it may wait for the store, and meanwhile the
// client is not read.
type Watcher interface {
	// Connected: CONNACK is on its way. The calls below come after it.
	Connected(l *Link)
	// Subscribed: a SUBACK is on its way that granted QoS 1 or 2 for a filter which may match
	// request topics, cmd/{device}/req/…; or, right after Connected, the session brought such a
	// subscription along. What Send writes comes after that SUBACK.
	Subscribed(l *Link)
	// Acked: the client's PUBACK for what was sent with this token.
	Acked(l *Link, token uint64, reason mqtt.Reason)
	// Disconnected: the connection has ended; nothing comes after this. cause is a short text
	// for people. A newer connection of the client may be Connected already.
	Disconnected(l *Link, cause string)
}

// Link is one connection, for a Watcher: two are the same if their pointers are. Its methods do
// not block and may be called from any goroutine, at any time, also when the connection has ended.
type Link struct {
	c    *conn
	info LinkInfo

	// Guarded by session.mu.
	commands []command // in the order of Send; commands[:sent] are written and not answered
	sent     int

	connected bool // Connected was called; only serve touches it
}

// LinkInfo describes a connection. It does not change.
type LinkInfo struct {
	Client         string
	Remote         string // host:port
	Listener       string // name
	Protocol       string // for people: "MQTT 5 over TLS"
	Version        mqtt.Version
	TLS            bool
	Will           string // its topic; "": there is none
	SessionPresent bool   // the session goes on from an earlier connection
}

// command is a PUBLISH of Link.Send.
type command struct {
	pub   mqtt.Publish
	token uint64
}

// newLink makes the link of a connection that has sent a CONNECT that is right.
func newLink(c *conn, k *mqtt.Connect) *Link {
	l := &Link{c: c, info: LinkInfo{Client: c.id, Remote: c.remote, Listener: c.listener.Name, Version: c.version}}
	l.info.Protocol = "MQTT " + c.version.String()
	if c.listener.websocket() {
		l.info.Protocol += " over websocket"
	}
	if l.info.TLS = c.listener.Secure(); l.info.TLS {
		l.info.Protocol += " over TLS"
	}
	if k.Will != nil {
		l.info.Will = k.Will.Topic
	}
	return l
}

// Client is the client id.
func (l *Link) Client() string { return l.info.Client }

// Rights are what Authorizer.Connect let the client in with.
func (l *Link) Rights() Rights { return l.c.rights }

// Info describes the connection.
func (l *Link) Info() LinkInfo { return l.info }

// Alive says whether the connection has not ended. It has before a newer one of the client is Connected.
func (l *Link) Alive() bool { return !l.c.ended.Load() }

// LastMessage is when the Intake last took a message that came on this connection; zero: never.
func (l *Link) LastMessage() time.Time {
	ms := l.c.took.Load()
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// Covers says whether the client has subscribed to topic with QoS 1 or 2, not counting shared
// subscriptions, over this connection or before it in the same session. For request topics that
// means: and its SUBACK is on its way.
func (l *Link) Covers(topic string) bool {
	s := l.c.sess
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != l.c {
		return false
	}
	for i := range s.subs {
		sub := &s.subs[i]
		if sub.answered && !sub.shared && sub.qos > 0 && mqtt.Match(sub.match, topic) {
			return true
		}
	}
	return false
}

// Send has p written to this connection with QoS 1, whatever p says of QoS, id and RETAIN; p.Dup stays. The
// commands keep their order. They count against the client's receive maximum together with the
// session's deliveries, wait here while that is full or the client does not read, and go before
// deliveries that were not sent yet. Who sends bounds how many wait.
//
// packetID is used if it is not 0 and nothing else of the session has it, else another one. The one
// used is returned, and the client's PUBACK comes back as Watcher.Acked with token. The session does
// not keep the command: when the connection ends it is forgotten, and whether it arrived is unknown.
//
// p is copied, the slices in it are not: they must not change any more. An error is ErrLinkGone, or
// wraps ErrTooLarge.
//
// It is written with the group of commits that is being completed, or within a millisecond.
func (l *Link) Send(p *mqtt.Publish, token uint64, packetID uint16) (uint16, error) {
	c := l.c
	s := c.sess
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != c || c.ended.Load() {
		return 0, ErrLinkGone
	}
	cmd := command{pub: *p, token: token}
	cmd.pub.QoS, cmd.pub.Retain, cmd.pub.SubscriptionIDs = 1, false, s.identifiersLocked(c, p.Topic)
	if c.maxPacket > 0 {
		if size := mqtt.PublishSize(c.version, &cmd.pub); size > int(c.maxPacket) {
			return 0, fmt.Errorf("%w: %d bytes, and it takes %d", ErrTooLarge, size, c.maxPacket)
		}
	}
	if packetID == 0 || s.inUseLocked(packetID) {
		packetID = s.nextIDLocked()
	}
	cmd.pub.ID = packetID
	l.commands = append(l.commands, cmd)
	c.mu.Lock()
	c.wantFill = true
	if !c.touched && !c.flushing {
		c.touched = true
		c.b.touch(c)
	}
	c.mu.Unlock()
	return packetID, nil
}

// identifiersLocked gives the subscription identifiers that a message on topic carries (MQTT-3.3.4-3).
func (s *session) identifiersLocked(c *conn, topic []byte) (ids []uint32) {
	if c.version != mqtt.V5 {
		return nil
	}
	for i := range s.subs {
		sub := &s.subs[i]
		if sub.identifier != 0 && !sub.shared && mqtt.Match(sub.match, view(topic)) && !slices.Contains(ids, sub.identifier) {
			ids = append(ids, sub.identifier)
		}
	}
	return ids
}

// End ends the connection. An MQTT 5 client is told reason and text.
func (l *Link) End(reason mqtt.Reason, text string) {
	l.c.end(&ordered{reason, text})
}

// commandLocked finds a command that was sent by its packet id; -1: there is none. session.mu is held.
func (l *Link) commandLocked(id uint16) int {
	if l == nil {
		return -1
	}
	for i := range l.commands[:l.sent] {
		if l.commands[i].pub.ID == id {
			return i
		}
	}
	return -1
}

// ackedLocked takes command i off.
func (l *Link) ackedLocked(i int) {
	l.commands = append(l.commands[:i], l.commands[i+1:]...)
	l.commands[:cap(l.commands)][len(l.commands)] = command{}
	l.sent--
	if len(l.commands) == 0 {
		l.commands = nil // an idle client keeps no room
	}
}

// waitingLocked says whether commands are to be written.
func (l *Link) waitingLocked() bool { return l != nil && l.sent < len(l.commands) }

// sendCommandLocked puts the next command into out. session.mu and conn.mu are held.
func (l *Link) sendCommandLocked() {
	c := l.c
	p := &l.commands[l.sent].pub
	l.sent++
	c.appendLocked(func(b []byte) []byte { return mqtt.AppendPublish(b, c.version, p) })
	if c.traced() {
		c.b.log.Debug("command sent", "client", c.id, "topic", string(p.Topic), "dup", p.Dup, "packet_id", p.ID, "size_bytes", len(p.Payload))
	}
	c.b.m.sent[1].Inc()
	c.b.m.commands.Inc()
}

// mayRequest says whether filter may match the topic of a command: cmd/{device}/req/…
func mayRequest(filter string) bool {
	for _, want := range []string{"cmd", "", "req"} {
		level, rest, more := strings.Cut(filter, "/")
		switch {
		case level == "#":
			return true
		case level != "+" && want != "" && level != want:
			return false
		case !more:
			return false
		}
		filter = rest
	}
	return true
}
