// Package mqtttest has what tests of MQTT clients talk to: a small scripted server that
// does what it is told, and Debian's mosquitto where that is installed.
package mqtttest

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"

	"holdfast/internal/mqtt"
)

// Script decides what a Server does. Its functions are called by one goroutine per
// connection; a nil function does what a good server does.
type Script struct {
	// Connect answers a CONNECT; SessionPresent is filled in.
	Connect func(c *mqtt.Connect) mqtt.Connack
	// Publish answers a PUBLISH. p is valid during the call.
	Publish func(client string, p *mqtt.Publish) Answer
	// TLS makes the server speak TLS; nil: it does not.
	TLS *tls.Config
	// Frame sees every other packet of a connected client; false closes the connection.
	Frame func(client string, frame []byte) bool
}

// Answer says what becomes of a PUBLISH.
type Answer struct {
	Reason mqtt.Reason
	Silent bool // take it, but send no acknowledgement
	Drop   bool // acknowledge it, but pass it on to nobody: the server lies
	Close  bool // then close the connection
}

// Server is a server for tests. It keeps sessions as far as MQTT asks: session present, the
// packet identifiers of QoS 2, and passes messages on to subscribers with QoS 0.
type Server struct {
	Addr string

	t        testing.TB
	script   Script
	listener net.Listener
	wg       sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	conns    map[string]*conn // by client identifier
	sessions map[string]*session
}

type session struct {
	received map[uint16]bool // QoS 2, not yet released
	filters  []string
}

type conn struct {
	net.Conn
	v     mqtt.Version
	write sync.Mutex
	ended chan struct{} // closed when nothing of it is handled any more
}

// New starts a server on a free loopback port. It ends with the test.
func New(t testing.TB, script Script) *Server {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if script.TLS != nil {
		l = tls.NewListener(l, script.TLS)
	}
	s := &Server{Addr: l.Addr().String(), t: t, script: script, listener: l, conns: map[string]*conn{}, sessions: map[string]*session{}}
	s.wg.Go(s.accept)
	t.Cleanup(s.Close)
	return s
}

// Close closes all connections and ends the server.
func (s *Server) Close() {
	_ = s.listener.Close()
	s.mu.Lock()
	s.closed = true
	for _, c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Cut closes the connection of a client, all if client is empty, and says how many it were.
func (s *Server) Cut(client string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.conns {
		if client == "" || id == client {
			_ = c.Close()
			n++
		}
	}
	return n
}

// Connected is how many clients are connected.
func (s *Server) Connected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Sessions is how many sessions the server keeps, those of connected clients included.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// Send writes bytes to a client as they are. It says whether the client is connected.
func (s *Server) Send(client string, b []byte) bool {
	s.mu.Lock()
	c := s.conns[client]
	s.mu.Unlock()
	return c != nil && c.send(b) == nil
}

func (c *conn) send(b []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	_, err := c.Write(b)
	return err
}

func (s *Server) accept() {
	for {
		raw, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.wg.Go(func() {
			defer raw.Close()
			c := &conn{Conn: raw, ended: make(chan struct{})}
			defer close(c.ended)
			s.serve(c)
		})
	}
}

// readFrame reads one packet.
func readFrame(r *bufio.Reader) ([]byte, error) {
	for n := 2; ; n++ {
		head, err := r.Peek(n)
		if err != nil {
			return nil, err
		}
		_, _, _, size, ok, err := mqtt.PeekHeader(head)
		if err != nil {
			return nil, err
		}
		if ok {
			frame := make([]byte, size)
			_, err := io.ReadFull(r, frame)
			return frame, err
		}
	}
}

func (s *Server) serve(c *conn) {
	r := bufio.NewReaderSize(c, 64<<10)
	frame, err := readFrame(r)
	if err != nil {
		return
	}
	connect, err := mqtt.ParseConnect(frame)
	if err != nil {
		s.t.Errorf("mqtttest: CONNECT %x: %v", frame, err)
		return
	}
	c.v = connect.Version
	answer := mqtt.Connack{}
	if s.script.Connect != nil {
		answer = s.script.Connect(connect)
	}
	id := connect.ClientID
	s.mu.Lock()
	for old := s.conns[id]; old != nil; old = s.conns[id] {
		_ = old.Close()
		s.mu.Unlock()
		<-old.ended // what it has already read comes before what the new one brings
		s.mu.Lock()
	}
	ses := s.sessions[id]
	answer.SessionPresent = ses != nil && !connect.CleanStart
	if !answer.SessionPresent {
		ses = &session{received: map[uint16]bool{}}
	}
	if answer.Reason == mqtt.Success && !s.closed {
		s.conns[id], s.sessions[id] = c, ses
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.conns[id] == c {
			delete(s.conns, id)
			if c.v == mqtt.V5 && connect.SessionExpiry == 0 || c.v == mqtt.V311 && connect.CleanStart {
				delete(s.sessions, id)
			}
		}
	}()
	if c.send(mqtt.AppendConnack(nil, c.v, &answer)) != nil || answer.Reason != mqtt.Success {
		return
	}
	for {
		frame, err := readFrame(r)
		if err != nil {
			return
		}
		if err := mqtt.ValidateFromClient(frame, c.v); err != nil {
			s.t.Errorf("mqtttest: client %q sent %x: %v", id, frame, err)
			return
		}
		if !s.handle(c, id, ses, frame) {
			return
		}
	}
}

func (s *Server) handle(c *conn, id string, ses *session, frame []byte) bool {
	t := mqtt.Type(frame[0] >> 4)
	if t == mqtt.TypePublish {
		return s.publish(c, id, ses, frame)
	}
	if s.script.Frame != nil && !s.script.Frame(id, frame) {
		return false
	}
	var out []byte
	switch t {
	case mqtt.TypePubrel:
		var a mqtt.Ack
		_ = mqtt.ParseAck(frame, c.v, &a)
		s.mu.Lock()
		delete(ses.received, a.ID)
		s.mu.Unlock()
		out = mqtt.AppendAck(nil, mqtt.TypePubcomp, a.ID, c.v, mqtt.Success)
	case mqtt.TypeSubscribe:
		sub, _ := mqtt.ParseSubscribe(frame, c.v)
		ack := mqtt.Suback{ID: sub.ID}
		s.mu.Lock()
		for _, f := range sub.Filters {
			ses.filters = append(ses.filters, f.Filter)
			ack.Reasons = append(ack.Reasons, mqtt.Success)
		}
		s.mu.Unlock()
		out = mqtt.AppendSuback(nil, c.v, &ack)
	case mqtt.TypeUnsubscribe:
		unsub, _ := mqtt.ParseUnsubscribe(frame, c.v)
		ack := mqtt.Suback{ID: unsub.ID}
		s.mu.Lock()
		for _, f := range unsub.Filters {
			reason := mqtt.NoSubscriptionExisted
			for i, have := range ses.filters {
				if have == f {
					ses.filters = append(ses.filters[:i:i], ses.filters[i+1:]...)
					reason = mqtt.Success
					break
				}
			}
			ack.Reasons = append(ack.Reasons, reason)
		}
		s.mu.Unlock()
		out = mqtt.AppendUnsuback(nil, c.v, &ack)
	case mqtt.TypePingreq:
		out = mqtt.AppendPingresp(nil)
	case mqtt.TypeDisconnect:
		return false
	default: // acknowledgements of what the test has sent
	}
	return len(out) == 0 || c.send(out) == nil
}

func (s *Server) publish(c *conn, id string, ses *session, frame []byte) bool {
	var p mqtt.Publish
	_ = mqtt.ParsePublish(frame, c.v, &p)
	s.mu.Lock()
	again := p.QoS == 2 && ses.received[p.ID]
	s.mu.Unlock()
	var answer Answer
	if s.script.Publish != nil && !again {
		answer = s.script.Publish(id, &p)
	}
	if p.QoS == 2 && !answer.Reason.Failed() {
		s.mu.Lock()
		ses.received[p.ID] = true
		s.mu.Unlock()
	}
	if !again && !answer.Reason.Failed() && !answer.Drop {
		s.forward(&p)
	}
	if p.QoS > 0 && !answer.Silent {
		t := mqtt.TypePuback
		if p.QoS == 2 {
			t = mqtt.TypePubrec
		}
		if c.send(mqtt.AppendAck(nil, t, p.ID, c.v, answer.Reason)) != nil {
			return false
		}
	}
	return !answer.Close
}

// forward passes p on to everyone with a matching subscription.
func (s *Server) forward(p *mqtt.Publish) {
	s.mu.Lock()
	var to []*conn
	for id, c := range s.conns {
		for _, f := range s.sessions[id].filters {
			if mqtt.Match(f, p.Topic) {
				to = append(to, c)
				break
			}
		}
	}
	s.mu.Unlock()
	for _, c := range to {
		_ = c.send(mqtt.AppendPublish(nil, c.v, &mqtt.Publish{Topic: p.Topic, Payload: p.Payload}))
	}
}
