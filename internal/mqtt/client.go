package mqtt

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Errors of a client.
var (
	ErrClosed    = errors.New("connection is closed")
	ErrKeepAlive = errors.New("no answer to PINGREQ within the keep alive time")
)

// Refused is the error of a server that says no: a CONNACK that refuses, or a DISCONNECT.
type Refused struct {
	Packet Type // TypeConnack or TypeDisconnect
	Reason Reason
	Text   string // the server's reason string
}

// Error gives packet, reason and reason string.
func (r *Refused) Error() string {
	s := "server answered " + r.Packet.String() + " " + r.Reason.String()
	if r.Text != "" {
		s += fmt.Sprintf(" %q", r.Text)
	}
	return s
}

// ClientOptions say how to connect and what to call. Only Address is needed.
//
// The callbacks come from one goroutine, in the order of the packets. They must not block:
// nothing is read meanwhile. In them, use Queue, not Publish: what they queue leaves in one
// write when all that was read at once is handled.
type ClientOptions struct {
	Address string
	TLS     *tls.Config // nil: plain TCP
	// Dialer replaces net.Dialer.DialContext.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
	// Connect is what to send. Version 0 is 5. KeepAlive > 0 makes the client send
	// PINGREQs by itself and close when they stay unanswered.
	Connect      Connect
	WriteTimeout time.Duration // of one write; 0: 10 s
	MaxPacket    int           // longest packet taken; 0: 16 MiB

	// OnAck is told of each PUBACK, PUBREC and PUBCOMP. PUBREL is sent by itself after a
	// PUBREC that does not fail. a is valid during the call.
	OnAck func(c *Client, a *Ack)
	// OnMessage is told of each PUBLISH (each QoS 2 message once). p is valid during the call.
	OnMessage func(c *Client, p *Publish)
	// OnBatch is called when all that one read brought is handled.
	OnBatch func(c *Client)
	// OnDrained is called, from another goroutine than the rest, when all that was queued
	// has been written.
	OnDrained func(c *Client)
	// OnClose is called once, last of all, unless Dial itself failed.
	OnClose func(c *Client, err error)

	// ManualAck leaves PUBACK, PUBREC and PUBCOMP to the caller: see Client.Ack.
	ManualAck bool
	// Received holds the packet identifiers of QoS 2 messages that were received and not yet
	// released. Only the client's goroutine uses it while the client lives. Give the same
	// again for the next connection of a session; nil begins anew.
	Received map[uint16]bool
}

// Client is a connection to a server, for simulated devices, load generators and tests. It
// keeps no messages: packet identifiers, what is in flight, and sending that again are the
// caller's. It costs one goroutine, a second while there is something to write, and
// allocates nothing for a message sent and acknowledged.
//
// All methods may be called by many goroutines at once.
type Client struct {
	o       ClientOptions
	conn    net.Conn
	v       Version
	connack *Connack
	in      []byte // only the reading goroutine; what Dial has read beyond CONNACK lies in in[:have]
	have    int
	done    chan struct{}
	alive   *time.Timer // nil: no keep alive

	wrote, heard atomic.Bool  // since keepAlive last looked
	waiting      atomic.Int32 // how often keepAlive has looked since an unanswered PINGREQ

	mu      sync.Mutex
	idle    sync.Cond // on mu: the writer has ended
	out     []byte    // under mu: what waits to be written
	spare   []byte    // under mu: an empty buffer, while there is no writer
	writing bool      // under mu: a writer runs
	closing bool      // under mu: DISCONNECT is queued, nothing may follow
	err     error     // under mu: why it ended; nil while it lives
	acks    map[uint16]chan *Suback
	pings   []chan struct{}
	nextSub uint16
}

// SubscribeIDs is where Subscribe and Unsubscribe take their packet identifiers from. Those of
// PUBLISH packets must be below.
const SubscribeIDs = 0xFF00

const (
	defaultWriteTimeout = 10 * time.Second
	defaultMaxPacket    = 16 << 20
	firstReadBuffer     = 1 << 10 // ten thousand idle devices in one process
	fullReadBuffer      = 64 << 10
	keptWriteBuffer     = 64 << 10
)

// Dial connects and waits for the CONNACK. A refusal is a *Refused. ctx bounds the dialling
// only, not the life of the client.
func Dial(ctx context.Context, o ClientOptions) (*Client, error) {
	if o.Connect.Version == 0 {
		o.Connect.Version = V5
	}
	if o.WriteTimeout == 0 {
		o.WriteTimeout = defaultWriteTimeout
	}
	if o.MaxPacket == 0 {
		o.MaxPacket = defaultMaxPacket
	}
	if o.Received == nil {
		o.Received = make(map[uint16]bool)
	}
	dial := o.Dialer
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	conn, err := dial(ctx, "tcp", o.Address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", o.Address, err)
	}
	if o.TLS != nil {
		conn = tls.Client(conn, o.TLS)
	}
	c := &Client{o: o, conn: conn, v: o.Connect.Version, done: make(chan struct{}), in: make([]byte, firstReadBuffer)}
	c.idle.L = &c.mu
	if err := c.handshake(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect to %s as %q: %w", o.Address, o.Connect.ClientID, err)
	}
	keepAlive := o.Connect.KeepAlive
	if c.connack.HasKeepAlive {
		keepAlive = c.connack.KeepAlive
	}
	if keepAlive > 0 {
		period := time.Duration(keepAlive) * time.Second / 2
		c.mu.Lock()
		c.alive = time.AfterFunc(period, func() { c.keepAlive(period) })
		c.mu.Unlock()
	}
	go c.read()
	return c, nil
}

// handshake sends CONNECT and waits for CONNACK.
func (c *Client) handshake(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := c.exchange(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("waiting for CONNACK: %w", ctx.Err())
	}
	if err == nil && !stop() {
		return fmt.Errorf("waiting for CONNACK: %w", ctx.Err())
	}
	return err
}

func (c *Client) exchange(ctx context.Context) error {
	if t, ok := c.conn.(*tls.Conn); ok {
		if err := t.HandshakeContext(ctx); err != nil {
			return err
		}
	}
	if _, err := c.conn.Write(AppendConnect(nil, &c.o.Connect)); err != nil {
		return err
	}
	for {
		frame, err := c.frame(c.in[:c.have])
		if err != nil {
			return err
		}
		if frame != nil {
			c.connack, err = ParseConnack(frame, c.v)
			if err != nil {
				return err
			}
			if c.connack.Reason != Success {
				return &Refused{Packet: TypeConnack, Reason: c.connack.Reason, Text: c.connack.ReasonString}
			}
			c.have = copy(c.in, c.in[len(frame):c.have])
			return nil
		}
		c.grow(false)
		n, err := c.conn.Read(c.in[c.have:])
		c.have += n
		if err != nil {
			return fmt.Errorf("waiting for CONNACK: %w", err)
		}
	}
}

// frame gives the first whole frame of b, nil if there is none yet.
func (c *Client) frame(b []byte) ([]byte, error) {
	_, _, _, size, ok, err := PeekHeader(b)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, nil
	case size > c.o.MaxPacket:
		return nil, &Error{Reason: PacketTooLarge, Text: fmt.Sprintf("packet of %d bytes, at most %d are taken", size, c.o.MaxPacket)}
	case size > len(b):
		return nil, nil
	}
	return b[:size:size], nil
}

// grow makes room to read: more than was there if it is full, or if full reads say that
// much comes. By doubling: a length that is only claimed reserves nothing.
func (c *Client) grow(busy bool) {
	if c.have == len(c.in) || busy && len(c.in) < fullReadBuffer {
		bigger := make([]byte, 2*len(c.in))
		copy(bigger, c.in[:c.have])
		c.in = bigger
	}
}

// read handles what comes until the connection ends.
func (c *Client) read() {
	err := c.readAll()
	c.mu.Lock()
	if c.closing {
		err = ErrClosed // however the server ended it: that was what we asked for
	}
	err = c.fail(err)
	c.mu.Unlock()
	_ = c.conn.Close() // after fail: what the server said counts, not that writing ends with it
	c.mu.Lock()
	for c.writing {
		c.idle.Wait()
	}
	c.mu.Unlock()
	if c.o.OnClose != nil {
		c.o.OnClose(c, err)
	}
	close(c.done)
}

func (c *Client) readAll() error {
	var p Publish
	var a Ack
	for {
		start := 0
		for {
			frame, err := c.frame(c.in[start:c.have])
			if err != nil {
				return err
			}
			if frame == nil {
				break
			}
			if err := c.handle(frame, &p, &a); err != nil {
				return err
			}
			start += len(frame)
		}
		if start > 0 && c.o.OnBatch != nil {
			c.o.OnBatch(c)
		}
		c.Flush()
		busy := c.have == len(c.in)
		if start > 0 {
			c.have = copy(c.in, c.in[start:c.have])
		}
		c.grow(busy)
		n, err := c.conn.Read(c.in[c.have:])
		c.have += n
		if n > 0 {
			c.heard.Store(true)
			continue
		}
		if err != nil {
			return err
		}
	}
}

func (c *Client) handle(frame []byte, p *Publish, a *Ack) error {
	switch t := Type(frame[0] >> 4); t {
	case TypePublish:
		if err := ParseDelivery(frame, c.v, p); err != nil {
			return err
		}
		return c.deliver(p)
	case TypePuback, TypePubrec, TypePubrel, TypePubcomp:
		if err := ParseAck(frame, c.v, a); err != nil {
			return err
		}
		if t == TypePubrel {
			delete(c.o.Received, a.ID)
			if !c.o.ManualAck {
				c.answer(TypePubcomp, a.ID)
			}
			return nil
		}
		if c.o.OnAck != nil {
			c.o.OnAck(c, a)
		}
		if t == TypePubrec && !a.Reason.Failed() {
			c.answer(TypePubrel, a.ID)
		}
		return nil
	case TypeSuback, TypeUnsuback:
		s, err := parseSuback(frame, t, c.v)
		if err != nil {
			return err
		}
		c.mu.Lock()
		waiter := c.acks[s.ID]
		delete(c.acks, s.ID)
		c.mu.Unlock()
		if waiter != nil {
			waiter <- s
		}
		return nil
	case TypePingresp:
		if err := parseEmpty(frame, t, c.v); err != nil {
			return err
		}
		c.waiting.Store(0)
		c.mu.Lock()
		if len(c.pings) > 0 {
			close(c.pings[0])
			c.pings = c.pings[1:]
		}
		c.mu.Unlock()
		return nil
	case TypeDisconnect:
		d, err := ParseDisconnect(frame, c.v, FromServer)
		if err != nil {
			return err
		}
		return &Refused{Packet: TypeDisconnect, Reason: d.Reason, Text: d.ReasonString}
	default:
		return violation("", t.String()+" from a server")
	}
}

func (c *Client) deliver(p *Publish) error {
	if p.QoS == 2 {
		if !c.o.Received[p.ID] && c.o.OnMessage != nil {
			c.o.OnMessage(c, p)
		}
		c.o.Received[p.ID] = true
	} else if c.o.OnMessage != nil {
		c.o.OnMessage(c, p)
	}
	if c.o.ManualAck || p.QoS == 0 {
		return nil
	}
	t := TypePuback
	if p.QoS == 2 {
		t = TypePubrec
	}
	c.answer(t, p.ID)
	return nil
}

// answer queues what the protocol demands. It does nothing once DISCONNECT is queued, behind
// which nothing may follow.
func (c *Client) answer(t Type, id uint16) { _ = c.QueueAck(t, id, Success) }

// fail notes why the client ends, the first reason only, and wakes who waits. Under mu.
func (c *Client) fail(err error) error {
	if c.err != nil {
		return c.err
	}
	c.err = err
	if err == nil {
		c.err = ErrClosed
	}
	if c.alive != nil {
		c.alive.Stop()
	}
	for _, w := range c.acks {
		close(w)
	}
	for _, w := range c.pings {
		close(w)
	}
	c.acks, c.pings = nil, nil
	return c.err
}

// Version is the protocol version spoken.
func (c *Client) Version() Version { return c.v }

// Connack is what the server answered to CONNECT. Do not change it.
func (c *Client) Connack() *Connack { return c.connack }

// Done is closed when the connection has ended and nothing of the client runs any more.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the client ended, nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Publish sends p, whose packet identifier the caller has chosen, below SubscribeIDs. It
// returns at once; p and its slices are free again. How many may be in flight (Connack's
// ReceiveMaximum) is the caller's to keep.
func (c *Client) Publish(p *Publish) error {
	err := c.Queue(p)
	c.Flush()
	return err
}

// Queue is Publish without the sending, which the next Flush does.
func (c *Client) Queue(p *Publish) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.refuses(); err != nil {
		return err
	}
	c.out = AppendPublish(c.out, c.v, p)
	return nil
}

// Ack sends an acknowledgement, or PUBREL.
func (c *Client) Ack(t Type, id uint16, reason Reason) error {
	err := c.QueueAck(t, id, reason)
	c.Flush()
	return err
}

// QueueAck is Ack without the sending, which the next Flush does.
func (c *Client) QueueAck(t Type, id uint16, reason Reason) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.refuses(); err != nil {
		return err
	}
	c.out = AppendAck(c.out, t, id, c.v, reason)
	return nil
}

// Raw sends b as it is, right or wrong.
func (c *Client) Raw(b []byte) error {
	c.mu.Lock()
	if err := c.refuses(); err != nil {
		c.mu.Unlock()
		return err
	}
	c.out = append(c.out, b...)
	c.mu.Unlock()
	c.Flush()
	return nil
}

// refuses says why nothing more can be sent. Under mu.
func (c *Client) refuses() error {
	if c.closing {
		return ErrClosed
	}
	return c.err
}

// Buffered is how many bytes wait to be written.
func (c *Client) Buffered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.out)
}

// Flush sends what is queued. It does not wait for it.
func (c *Client) Flush() {
	c.mu.Lock()
	start := len(c.out) > 0 && !c.writing && c.err == nil
	if start {
		c.writing = true
	}
	c.mu.Unlock()
	if start {
		go c.write()
	}
}

// write writes what waits until nothing does. What is queued meanwhile goes in the next write.
func (c *Client) write() {
	c.mu.Lock()
	for {
		for len(c.out) > 0 && c.err == nil {
			b := c.out
			c.out, c.spare = c.spare[:0], nil
			c.mu.Unlock()
			c.wrote.Store(true)
			_ = c.conn.SetWriteDeadline(time.Now().Add(c.o.WriteTimeout))
			_, err := c.conn.Write(b)
			c.mu.Lock()
			if err != nil {
				_ = c.fail(fmt.Errorf("write: %w", err))
				_ = c.conn.Close() // ends the reader
			}
			if cap(b) <= keptWriteBuffer || len(b) > cap(b)/4 {
				c.spare = b[:0]
			}
		}
		if c.o.OnDrained == nil || c.err != nil {
			break
		}
		c.mu.Unlock()
		c.o.OnDrained(c)
		c.mu.Lock()
		if len(c.out) == 0 || c.err != nil {
			break
		}
	}
	c.writing = false
	c.idle.Broadcast()
	c.mu.Unlock()
}

// Subscribe subscribes and waits for the answer. s.ID is chosen.
func (c *Client) Subscribe(ctx context.Context, s *Subscribe) (*Suback, error) {
	return c.request(ctx, func(id uint16) {
		with := *s
		with.ID = id
		c.out = AppendSubscribe(c.out, c.v, &with)
	})
}

// Unsubscribe unsubscribes and waits for the answer. u.ID is chosen.
func (c *Client) Unsubscribe(ctx context.Context, u *Unsubscribe) (*Suback, error) {
	return c.request(ctx, func(id uint16) {
		with := *u
		with.ID = id
		c.out = AppendUnsubscribe(c.out, c.v, &with)
	})
}

func (c *Client) request(ctx context.Context, encode func(id uint16)) (*Suback, error) {
	answer := make(chan *Suback, 1)
	c.mu.Lock()
	if err := c.refuses(); err != nil {
		c.mu.Unlock()
		return nil, err
	}
	if len(c.acks) >= 0x10000-SubscribeIDs {
		c.mu.Unlock()
		return nil, errors.New("too many subscribe and unsubscribe requests wait for their answer")
	}
	if c.acks == nil {
		c.acks = make(map[uint16]chan *Suback)
	}
	id := SubscribeIDs | c.nextSub&0xFF
	for c.acks[id] != nil {
		c.nextSub++
		id = SubscribeIDs | c.nextSub&0xFF
	}
	c.nextSub++
	c.acks[id] = answer
	encode(id)
	c.mu.Unlock()
	c.Flush()
	select {
	case s := <-answer:
		if s == nil {
			return nil, c.Err()
		}
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Ping sends a PINGREQ and waits for the answer.
func (c *Client) Ping(ctx context.Context) error {
	answer := make(chan struct{})
	c.mu.Lock()
	if err := c.refuses(); err != nil {
		c.mu.Unlock()
		return err
	}
	c.pings = append(c.pings, answer)
	c.out = AppendPingreq(c.out)
	c.mu.Unlock()
	c.Flush()
	select {
	case <-answer:
		return c.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepAlive runs twice in the keep alive time: it sends PINGREQ if nothing was sent or
// nothing was heard, and gives up when one stayed unanswered three times as long.
func (c *Client) keepAlive(period time.Duration) {
	heard, wrote := c.heard.Swap(false), c.wrote.Swap(false)
	if heard {
		c.waiting.Store(0)
	} else if c.waiting.Load() > 2 {
		c.abort(ErrKeepAlive)
		return
	}
	c.mu.Lock()
	if c.refuses() != nil {
		c.mu.Unlock()
		return
	}
	if (!heard || !wrote) && c.waiting.Add(1) == 1 {
		c.pings = append(c.pings, make(chan struct{})) // so that Ping is not answered by this one
		c.out = AppendPingreq(c.out)
	}
	c.alive.Reset(period)
	c.mu.Unlock()
	c.Flush()
}

// Disconnect sends DISCONNECT after all that is queued, and waits until the server has
// closed, a second at most. It must not be called from a callback. An error says that the
// connection broke before all was written.
func (c *Client) Disconnect(reason Reason) error {
	c.mu.Lock()
	if c.refuses() != nil {
		c.mu.Unlock()
		<-c.done
		return nil
	}
	c.out = AppendDisconnect(c.out, c.v, reason, "")
	c.closing = true
	c.mu.Unlock()
	c.Flush()
	c.mu.Lock()
	for c.writing {
		c.idle.Wait()
	}
	err := c.fail(ErrClosed)
	if errors.Is(err, ErrClosed) {
		err = nil
	}
	c.mu.Unlock()
	// The server closes; reading on until it does keeps what it still sends from turning
	// the close into a reset, which would overtake our DISCONNECT.
	if half, ok := c.conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(time.Second))
	<-c.done
	return err
}

// Abort closes the connection without a DISCONNECT, as a device does that crashes. It does
// not wait; what was queued may be lost.
func (c *Client) Abort() { c.abort(ErrClosed) }

func (c *Client) abort(err error) {
	c.mu.Lock()
	_ = c.fail(err)
	c.mu.Unlock()
	_ = c.conn.Close()
}
