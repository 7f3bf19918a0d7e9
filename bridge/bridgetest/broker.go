package bridgetest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"holdfast/bridge"
)

// Answer is what a Broker does with one PUBLISH. The zero Answer acknowledges it.
type Answer struct {
	NoAck bool
	Twice bool
	Late  bool   // acknowledged after the next one that is not late, the newest first
	Raw   []byte // sent before any ack
	Close bool   // the connection is closed after that
	Reset bool   // or reset
}

// Connect is a CONNECT that came.
type Connect struct {
	ClientID, Username, Password string
	Clean                        bool
	KeepAlive                    uint16
	WillTopic, WillPayload       string
	WillRetain                   bool
	WillQoS                      byte
}

// Published is a PUBLISH that came.
type Published struct {
	Conn    int // number of the connection, from 1
	Topic   string
	Payload []byte
	QoS     byte
	Retain  bool
	Dup     bool
	ID      uint16
}

// Broker is an MQTT 3.1.1 broker that follows a script. It knows nothing of sessions, and delivers only what
// Deliver tells it to.
type Broker struct {
	// OnConnect returns the CONNACK code of the n-th connection; below zero: the connection is closed
	// without one.
	OnConnect func(n int, c Connect) int
	// AfterConnack may end a connection as soon as it has come about.
	AfterConnack func(n int) Answer
	// OnPublish answers the k-th PUBLISH of the n-th connection (both from 1).
	OnPublish func(n, k int, p Published) Answer
	// OnSubscribe returns the SUBACK codes, or all bytes of the answer if raw.
	OnSubscribe func(filters []string) (codes []byte, raw []byte)
	// Rate is how many bytes a second are read from a connection; 0: no limit.
	Rate int

	ln net.Listener
	wg sync.WaitGroup

	mu          sync.Mutex
	frozen      chan struct{} // not nil: nothing is read until it is closed
	closed      bool
	conns       map[net.Conn]int
	subscribed  map[net.Conn]bool
	connects    []Connect
	published   []Published
	disconnects int
	pings       int
}

// T is the part of testing.TB that is needed here.
type T interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// StartBroker listens on a free port of loopback.
func StartBroker(t T, script func(*Broker)) *Broker {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	b := &Broker{ln: ln, conns: map[net.Conn]int{}, subscribed: map[net.Conn]bool{}}
	if script != nil {
		script(b)
	}
	b.wg.Go(b.accept)
	t.Cleanup(b.Stop)
	return b
}

// Addr is where the broker listens.
func (b *Broker) Addr() string { return b.ln.Addr().String() }

// URL is Addr as an upstream's url.
func (b *Broker) URL() string { return "mqtt://" + b.Addr() }

// Stop ends everything; twice does no harm.
func (b *Broker) Stop() {
	b.mu.Lock()
	b.closed = true
	if b.frozen != nil {
		close(b.frozen)
		b.frozen = nil
	}
	b.mu.Unlock()
	_ = b.ln.Close()
	b.Cut(false)
	b.wg.Wait()
}

// Cut ends all open connections.
func (b *Broker) Cut(reset bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		end(c, reset)
	}
}

// Freeze stops reading from all connections, open and new, until Thaw: they are half open.
func (b *Broker) Freeze() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.frozen == nil {
		b.frozen = make(chan struct{})
	}
}

// Thaw goes on reading.
func (b *Broker) Thaw() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.frozen != nil {
		close(b.frozen)
		b.frozen = nil
	}
}

// Script changes the script.
func (b *Broker) Script(change func(*Broker)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change(b)
}

// Published returns what came so far.
func (b *Broker) Published() []Published {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.published)
}

// Messages returns what came so far on topics that do not begin with gw/.
func (b *Broker) Messages() []bridge.Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	var ms []bridge.Message
	for _, p := range b.published {
		if len(p.Topic) < 3 || p.Topic[:3] != "gw/" {
			ms = append(ms, bridge.Message{Topic: p.Topic, Payload: p.Payload, Retain: p.Retain})
		}
	}
	return ms
}

// Connects returns the CONNECTs that came so far.
func (b *Broker) Connects() []Connect {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.connects)
}

// Disconnects is how many connections ended with a DISCONNECT, Pings how many PINGREQs came.
func (b *Broker) Disconnects() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.disconnects
}

// Pings is how many PINGREQs came.
func (b *Broker) Pings() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pings
}

// Deliver writes raw bytes to every connection that has subscribed.
func (b *Broker) Deliver(raw []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.subscribed {
		_, _ = c.Write(raw)
	}
}

// PublishFrame encodes a PUBLISH.
func PublishFrame(topic string, payload []byte, qos byte, id uint16) []byte {
	body := append(binary.BigEndian.AppendUint16(nil, uint16(len(topic))), topic...)
	if qos > 0 {
		body = binary.BigEndian.AppendUint16(body, id)
	}
	return frame(3<<4|qos<<1, append(body, payload...))
}

func (b *Broker) accept() {
	for {
		c, err := b.ln.Accept()
		if err != nil {
			return
		}
		b.mu.Lock()
		if b.closed {
			b.mu.Unlock()
			_ = c.Close()
			return
		}
		b.conns[c] = 0
		b.mu.Unlock()
		b.wg.Go(func() {
			_ = b.serve(c)
			b.mu.Lock()
			delete(b.conns, c)
			delete(b.subscribed, c)
			b.mu.Unlock()
			_ = c.Close()
		})
	}
}

func end(c net.Conn, reset bool) {
	if tc, ok := c.(*net.TCPConn); ok && reset {
		_ = tc.SetLinger(0)
	}
	_ = c.Close()
}

var errScript = errors.New("the script ends the connection")

// source reads as fast as the script allows.
type source struct {
	b *Broker
	c net.Conn
}

func (s source) Read(p []byte) (int, error) {
	s.b.mu.Lock()
	frozen, rate := s.b.frozen, s.b.Rate
	s.b.mu.Unlock()
	if frozen != nil {
		<-frozen
	}
	if rate > 0 {
		p = p[:min(len(p), max(rate/20, 1))]
		<-time.After(time.Duration(len(p)) * time.Second / time.Duration(rate))
	}
	return s.c.Read(p)
}

func (b *Broker) serve(c net.Conn) error {
	r := bufio.NewReaderSize(source{b, c}, 64<<10)
	first, body, err := readFrame(r)
	if err != nil {
		return err
	}
	if first != 1<<4 {
		return fmt.Errorf("first frame is 0x%02x", first)
	}
	connect, err := parseConnect(body)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.connects = append(b.connects, connect)
	n := len(b.connects)
	b.conns[c] = n
	onConnect, after := b.OnConnect, b.AfterConnack
	b.mu.Unlock()
	code := 0
	if onConnect != nil {
		code = onConnect(n, connect)
	}
	if code < 0 {
		return errScript
	}
	if _, err := c.Write([]byte{2 << 4, 2, 0, byte(code)}); err != nil || code != 0 {
		return err
	}
	var late []uint16
	if after != nil {
		if err := answer(c, after(n), 0, nil); err != nil {
			return err
		}
	}
	for k := 0; ; {
		first, body, err := readFrame(r)
		if err != nil {
			return err
		}
		switch first >> 4 {
		case 3:
			p, err := parsePublish(first, body)
			if err != nil {
				return err
			}
			p.Conn = n
			k++
			b.mu.Lock()
			b.published = append(b.published, p)
			on := b.OnPublish
			b.mu.Unlock()
			var a Answer
			if on != nil {
				a = on(n, k, p)
			}
			if err := answer(c, a, p.ID, &late); err != nil {
				return err
			}
		case 8:
			if err := b.subscribe(c, body); err != nil {
				return err
			}
		case 12:
			b.mu.Lock()
			b.pings++
			b.mu.Unlock()
			if _, err := c.Write([]byte{13 << 4, 0}); err != nil {
				return err
			}
		case 14:
			b.mu.Lock()
			b.disconnects++
			b.mu.Unlock()
			return nil
		}
	}
}

// answer writes what the script says. late are the ids whose acks are held back.
func answer(c net.Conn, a Answer, id uint16, late *[]uint16) error {
	out := append([]byte(nil), a.Raw...)
	if id != 0 && !a.NoAck {
		if a.Late {
			*late = append(*late, id)
		} else {
			ids := []uint16{id}
			for _, l := range slices.Backward(*late) {
				ids = append(ids, l)
			}
			*late = nil
			if a.Twice {
				ids = append(ids, id)
			}
			for _, id := range ids {
				out = append(out, 4<<4, 2, byte(id>>8), byte(id))
			}
		}
	}
	if len(out) > 0 {
		if _, err := c.Write(out); err != nil {
			return err
		}
	}
	if a.Reset || a.Close {
		end(c, a.Reset)
		return errScript
	}
	return nil
}

func (b *Broker) subscribe(c net.Conn, body []byte) error {
	if len(body) < 2 {
		return io.ErrUnexpectedEOF
	}
	id, rest := body[:2], body[2:]
	var filters []string
	var codes []byte
	for len(rest) > 0 {
		filter, r, err := text(rest)
		if err != nil || len(r) == 0 {
			return io.ErrUnexpectedEOF
		}
		filters, codes, rest = append(filters, filter), append(codes, r[0]), r[1:]
	}
	b.mu.Lock()
	b.subscribed[c] = true
	on := b.OnSubscribe
	b.mu.Unlock()
	if on != nil {
		own, raw := on(filters)
		if raw != nil {
			_, err := c.Write(raw)
			return err
		}
		codes = own
	}
	_, err := c.Write(frame(9<<4, append(slices.Clone(id), codes...)))
	return err
}

func frame(first byte, body []byte) []byte {
	out := []byte{first}
	n := len(body)
	for {
		d := byte(n % 128)
		if n /= 128; n > 0 {
			d |= 0x80
		}
		out = append(out, d)
		if n == 0 {
			return append(out, body...)
		}
	}
}

func readFrame(r *bufio.Reader) (first byte, body []byte, err error) {
	if first, err = r.ReadByte(); err != nil {
		return 0, nil, err
	}
	length, err := binary.ReadUvarint(r)
	if err != nil || length > 1<<28-1 {
		return 0, nil, io.ErrUnexpectedEOF
	}
	body = make([]byte, length)
	_, err = io.ReadFull(r, body)
	return first, body, err
}

// text takes a length-prefixed string off b.
func text(b []byte) (s string, rest []byte, err error) {
	if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
		return "", nil, io.ErrUnexpectedEOF
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	return string(b[2:n]), b[n:], nil
}

func parseConnect(b []byte) (c Connect, err error) {
	const head = "\x00\x04MQTT\x04"
	if len(b) < len(head)+3 || string(b[:len(head)]) != head {
		return c, errors.New("not a CONNECT of MQTT 3.1.1")
	}
	flags := b[len(head)]
	c.Clean, c.WillRetain, c.WillQoS = flags&2 != 0, flags&0x20 != 0, flags>>3&3
	c.KeepAlive = binary.BigEndian.Uint16(b[len(head)+1:])
	rest := b[len(head)+3:]
	for _, f := range []struct {
		flag byte
		to   *string
	}{{0, &c.ClientID}, {4, &c.WillTopic}, {4, &c.WillPayload}, {0x80, &c.Username}, {0x40, &c.Password}} {
		if f.flag == 0 || flags&f.flag != 0 {
			if *f.to, rest, err = text(rest); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

func parsePublish(first byte, b []byte) (p Published, err error) {
	p.Dup, p.QoS, p.Retain = first&8 != 0, first>>1&3, first&1 != 0
	if p.Topic, b, err = text(b); err != nil {
		return p, err
	}
	if p.QoS > 0 {
		if len(b) < 2 {
			return p, io.ErrUnexpectedEOF
		}
		p.ID, b = binary.BigEndian.Uint16(b), b[2:]
	}
	p.Payload = b
	return p, nil
}
