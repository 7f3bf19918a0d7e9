package mqttup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/bridge"
)

// conn is what paho gets for a connection. paho reads a frame in four system calls and writes each packet
// in one, blocks its pings behind a write that is stuck, believes lengths that the peer merely claims, and panics
// on a SUBACK with too many codes. Here reads are buffered and every frame's head is checked before paho
// sees it; writes go to a buffer and never block; one goroutine writes that buffer out, and ends the connection
// when nothing moves any more. It writes a little at a time, and a ping that comes meanwhile overtakes what is left.
//
// The bridge's own messages join on their way: publish puts them into the buffer, and their PUBACKs are
// taken out of what is read. An ack is given on paho's reading goroutine.
type conn struct {
	net.Conn // the transport: TCP, or TLS on it; its writes have deadlines by progress
	tcp      *progressConn

	// Only paho's reading goroutine touches these.
	in        *bufio.Reader
	frame     int    // bytes of the present frame that paho has not read
	rewritten []byte // the head of the present frame, if it is another than came; comes before frame
	skip      int    // bytes behind frame that paho does not get
	guard     guard

	pace      int           // bytes a second that a large packet is written with; 0: as fast as it goes
	keepAlive time.Duration // for pace

	resumed bool        // the broker had kept the session; written before anybody else has the connection
	acks    bridge.Acks // nil: publish is not used
	flights flights     // what publish sent and nobody acknowledged

	mu      sync.Mutex
	out     []byte // whole packets, written by paho and by publish, not yet by flush
	control []byte // PINGREQ and PUBACK, which overtake out
	sends   bool   // there is a PUBLISH in out
	urgent  bool   // one of them is of a lane that does not wait
	closing bool   // close once out is written
	err     error  // why the connection ended: the first reason wins
	wake    chan struct{}
	hurry   chan struct{} // rings when urgent is set
	over    chan struct{} // closed with err
	flushed chan struct{} // flush has returned

	reading  atomic.Int64  // ticks since when paho waits for bytes; 0: it does not, its handler may be busy
	pingSent atomic.Int64  // ticks of an unanswered PINGREQ; 0: none
	unacked  atomic.Int64  // PUBLISHes without a PUBACK
	sentTo   atomic.Uint64 // where on the transport the last PUBLISH ends; without limit while one is being written
}

const (
	readBuffer = 16 << 10
	// maxPending bounds what paho may have written and the transport not yet taken. The bridge's
	// window keeps far below it.
	maxPending = 64 << 20
	// lastWrite is how long Close waits for the buffer to be written: a DISCONNECT, as a rule.
	lastWrite = time.Second
	// lastWords is how long a write that failed waits for the reader to tell why.
	lastWords = 100 * time.Millisecond
)

var errClosed = errors.New("connection closed by the gateway")

// newConn starts the goroutine that writes. o.Stall is how long nothing may move.
func newConn(transport net.Conn, tcp *progressConn, g guard, acks bridge.Acks, o Options) *conn {
	c := &conn{
		Conn: transport, tcp: tcp, guard: g, acks: acks, pace: o.Pace, keepAlive: o.KeepAlive,
		in:      bufio.NewReaderSize(transport, readBuffer),
		wake:    make(chan struct{}, 1),
		hurry:   make(chan struct{}, 1),
		over:    make(chan struct{}),
		flushed: make(chan struct{}),
	}
	go c.flush(o.Stall)
	return c
}

// guard says which frames may come. Others end the connection.
type guard struct {
	maxPublish int // largest PUBLISH; 0: none may come
	cutTo      int // 0, or how many bytes paho gets of a payload that has more; then no PUBLISH is too large
	filters    int // of the one SUBSCRIBE that was sent
}

// check looks at a frame's first byte and remaining length (MQTT 3.1.1 §2.2).
func (g guard) check(first byte, length int) error {
	want := -1
	switch first >> 4 {
	case 2, 4: // CONNACK, PUBACK
		want = 2
	case 13: // PINGRESP
		want = 0
	case 9: // SUBACK
		if g.filters > 0 {
			want = 2 + g.filters
		}
	case 3: // PUBLISH
		if length <= g.maxPublish || g.cutTo > 0 {
			want = length
		}
	}
	if want != length {
		return fmt.Errorf("unexpected frame 0x%02x of %d bytes from the upstream", first, length)
	}
	return nil
}

// Read gives paho whole frames that passed the guard.
func (c *conn) Read(p []byte) (int, error) {
	if c.frame == 0 && len(c.rewritten) == 0 {
		if err := c.begin(); err != nil {
			return 0, c.fail(readError(err))
		}
	}
	if len(c.rewritten) > 0 {
		n := copy(p, c.rewritten)
		c.rewritten = c.rewritten[n:]
		return n, nil
	}
	if err := c.await(); err != nil {
		return 0, c.fail(readError(err))
	}
	n, err := c.in.Read(p[:min(len(p), c.frame)])
	c.frame -= n
	if err != nil {
		return n, c.fail(readError(err))
	}
	return n, nil
}

// await returns when there is something to read.
func (c *conn) await() error {
	if c.in.Buffered() > 0 {
		return nil
	}
	c.reading.Store(ticks())
	_, err := c.in.Peek(1)
	c.reading.Store(0)
	return err
}

// begin finds the next frame that is for paho.
func (c *conn) begin() error {
	for {
		if err := c.await(); err != nil {
			return err
		}
		if c.skip > 0 {
			n, err := c.in.Discard(min(c.skip, c.in.Buffered()))
			c.skip -= n
			if err != nil {
				return err
			}
			continue
		}
		first, length, head, err := c.head()
		if err != nil {
			return err
		}
		if err := c.guard.check(first, length); err != nil {
			return err
		}
		switch first >> 4 {
		case 4:
			c.unacked.Add(-1)
			frame, err := c.in.Peek(head + length)
			if err != nil {
				return err
			}
			if id := uint16(frame[head])<<8 | uint16(frame[head+1]); id >= firstID && c.acks != nil {
				_, _ = c.in.Discard(len(frame)) // they were there to peek at
				c.puback(id)
				continue
			}
		case 13:
			c.pingSent.Store(0)
		case 3:
			if c.guard.cutTo > 0 {
				return c.cut(first, length, head)
			}
		}
		c.frame = head + length
		return nil
	}
}

// cut begins a PUBLISH whose payload may have more bytes than paho is given.
func (c *conn) cut(first byte, length, head int) error {
	start, err := c.in.Peek(min(head+length, head+2))
	if err != nil {
		return err
	}
	most := 2 + c.guard.cutTo // topic length, topic, packet id, payload (MQTT 3.1.1 §3.3)
	if len(start) == head+2 {
		most += int(start[head])<<8 | int(start[head+1])
	}
	if first&6 != 0 {
		most += 2
	}
	if c.frame = head + length; length <= most {
		return nil
	}
	_, _ = c.in.Discard(head) // it was there to peek at
	c.rewritten = appendLength([]byte{first}, most)
	c.frame, c.skip = most, length-most
	return nil
}

// puback takes the acknowledgement of what publish sent. One that comes twice, or when the connection has
// ended, does not count.
func (c *conn) puback(id uint16) {
	token, ok := c.flights.land(id)
	select {
	case <-c.over:
	default:
		if ok {
			c.acks(token, nil)
		}
	}
}

// head looks at a fixed header: the first byte, the remaining length, and how many bytes it takes (MQTT
// 3.1.1 §2.2).
func (c *conn) head() (first byte, length, size int, err error) {
	for size = 2; size <= 5; size++ {
		head, err := c.in.Peek(size)
		if err != nil {
			return 0, 0, 0, err
		}
		b := head[size-1]
		length |= int(b&0x7f) << (7 * (size - 2))
		if b&0x80 == 0 {
			return head[0], length, size, nil
		}
	}
	return 0, 0, 0, errors.New("malformed frame length from the upstream")
}

// readError names why a read ended.
func readError(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w: %v", bridge.ErrPeerClosed, plain(err))
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Errorf("%w: %v", bridge.ErrStalled, plain(err))
	}
	return err
}

// plain drops the addresses that net puts into its errors: a connection's own port is new each time,
// and would make each error look like a new one.
func plain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// Write takes a packet from paho. It never blocks; p is copied.
func (c *conn) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.mu.Lock()
	if err := c.roomLocked(len(p)); err != nil {
		c.mu.Unlock()
		return 0, err
	}
	idle := len(c.out) == 0 && len(c.control) == 0
	to := &c.out
	switch { // paho writes whole packets
	case p[0]>>4 == 3:
		c.sends = true
		c.unacked.Add(1)
	case p[0] == 0xC0:
		c.pingSent.CompareAndSwap(0, ticks())
		to = &c.control
	case p[0]>>4 == 4: // among PUBACKs the order stays
		to = &c.control
	}
	*to = append(*to, p...)
	c.mu.Unlock()
	if idle {
		c.ring()
	}
	return len(p), nil
}

// publish sends m past paho. It never blocks; m is copied.
func (c *conn) publish(m *bridge.Message) error {
	id, err := c.flights.start(m.Token)
	if err != nil {
		return c.fail(err)
	}
	c.mu.Lock()
	if err := c.roomLocked(len(m.Topic) + len(m.Payload)); err != nil {
		c.mu.Unlock()
		return err
	}
	idle := len(c.out) == 0 && len(c.control) == 0
	c.out = appendPublish(c.out, id, m)
	c.sends = true
	c.urgent = c.urgent || m.Urgent
	c.unacked.Add(1)
	c.mu.Unlock()
	if idle {
		c.ring()
	}
	if m.Urgent {
		select {
		case c.hurry <- struct{}{}:
		default:
		}
	}
	return nil
}

// roomLocked tells whether n bytes more may be written. If they would be too many, that is the end.
func (c *conn) roomLocked(n int) error {
	if c.err == nil && len(c.out)+len(c.control)+n > maxPending {
		c.endLocked(fmt.Errorf("%w: %d bytes wait to be written", bridge.ErrStalled, len(c.out)))
	}
	return c.err
}

func (c *conn) ring() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// flush writes out what paho wrote, as much as there is in one go.
func (c *conn) flush(stall time.Duration) {
	defer close(c.flushed)
	defer c.Conn.Close()
	watch := time.NewTicker(max(stall/8, time.Millisecond))
	defer watch.Stop()
	var spare []byte
	for {
		c.mu.Lock()
		out, sends, urgent, control := c.out, c.sends, c.urgent, len(c.control) > 0
		closing, ended := c.closing, c.err != nil
		c.out, c.sends, c.urgent = spare[:0], false, false
		c.mu.Unlock()
		spare = nil
		if ended && !closing {
			return
		}
		if len(out) > 0 || control {
			if sends {
				c.sentTo.Store(math.MaxUint64)
			}
			err := c.writeOut(out, urgent)
			if sends {
				c.sentTo.Store(c.tcp.written.Load())
			}
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					// The reader knows better why: the peer's last words, a TLS alert for example, may be there to read.
					select {
					case <-c.over:
					case <-time.After(lastWords):
					}
				}
				_ = c.fail(readError(err))
				return
			}
			if cap(out) <= 1<<20 { // a burst's buffer is not kept
				spare = out
			}
			continue
		}
		if closing {
			return
		}
		select {
		case <-c.wake:
		case <-c.over:
		case <-watch.C:
			// While messages wait for acks the answer to a ping waits behind them, and the bridge watches.
			if sent, reading := c.pingSent.Load(), c.reading.Load(); sent != 0 && reading != 0 && c.unacked.Load() <= 0 {
				last := max(sent, reading, c.tcp.lastMove())
				if quiet := time.Duration(ticks() - last); quiet > stall {
					_ = c.fail(fmt.Errorf("%w: ping not answered for %v", bridge.ErrStalled, quiet.Round(time.Millisecond)))
				}
			}
		}
	}
}

// writeOut writes whole packets, some at a time, and what has come as control before each of them.
func (c *conn) writeOut(out []byte, urgent bool) error {
	for {
		c.mu.Lock()
		control := c.control
		c.control = nil
		c.mu.Unlock()
		if len(control) > 0 {
			if _, err := c.Conn.Write(control); err != nil {
				return err
			}
		}
		if len(out) == 0 {
			return nil
		}
		n := whole(out, c.tcp.portion())
		var err error
		if c.pace > 0 && n > c.pace/2 && !urgent {
			err = c.writePaced(out[:n])
		} else {
			_, err = c.Conn.Write(out[:n])
		}
		if err != nil {
			return err
		}
		out = out[n:]
	}
}

// whole is how long the packets at the front of b are that together have at most n bytes, or else the first one alone.
func whole(b []byte, n int) int {
	end := 0
	for end < len(b) {
		length, shift, at := 0, 0, end+1
		for ; at < len(b) && b[at]&0x80 != 0; at++ {
			length |= int(b[at]&0x7f) << shift
			shift += 7
		}
		if at == len(b) { // not whole: it is not ours to judge
			return len(b)
		}
		length |= int(b[at]) << shift
		next := min(at+1+length, len(b))
		if end > 0 && next > n {
			break
		}
		end = next
	}
	return end
}

// writePaced writes one packet that is more than pace allows at once. It is not spread over more than half of
// a keep-alive interval, because no ping fits in between and the broker counts packets; nor any longer once something urgent
// waits behind it.
func (c *conn) writePaced(p []byte) error {
	rate := max(c.pace, int(float64(len(p))/(c.keepAlive/2).Seconds()))
	tick := time.NewTicker(time.Second / pacedParts)
	defer tick.Stop()
	for len(p) > 0 {
		n := min(max(rate/pacedParts, 1), len(p))
		if _, err := c.Conn.Write(p[:n]); err != nil {
			return err
		}
		p = p[n:]
		for wait := len(p) > 0; wait; {
			wait = false
			select {
			case <-tick.C:
			case <-c.hurry:
				c.mu.Lock()
				wait = !c.urgent // it rang for what is written already
				c.mu.Unlock()
				if !wait {
					_, err := c.Conn.Write(p)
					return err
				}
			case <-c.over: // the rest goes as fast as it can, if at all
				_, err := c.Conn.Write(p)
				return err
			}
		}
	}
	return nil
}

// pacedParts is in how many parts a second's worth is written.
const pacedParts = 8

// fail ends the connection for a reason and returns the reason that counts: the first.
func (c *conn) fail(err error) error {
	c.mu.Lock()
	c.endLocked(err)
	err = c.err
	closing := c.closing
	c.mu.Unlock()
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0)) // wakes a read that waits; flush closes
	if !closing {                               // else the last words are on their way, for lastWrite at most
		c.tcp.interrupt()
	}
	return err
}

func (c *conn) endLocked(err error) {
	if c.err == nil {
		c.err = err
		close(c.over)
	}
}

// Close ends the connection after what was written before, if that goes within lastWrite.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.err == nil {
		c.closing = true
		c.tcp.hurry(time.Now().Add(lastWrite))
		c.endLocked(errClosed)
	}
	c.mu.Unlock()
	c.ring()
	return nil
}

// reason is why the connection ended, once it has.
func (c *conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// progress changes while bytes of what is published move. Pings move, too, on a link whose far side takes
// messages and never acknowledges them.
func (c *conn) progress() uint64 {
	c.tcp.look()
	to := c.sentTo.Load()
	return min(c.tcp.taken.Load(), to) + min(c.tcp.written.Load(), to)
}

// The deadlines that paho sets: those for reading matter while it connects; those for writing would
// cost two system calls a message, and progressConn has better ones.

func (c *conn) SetDeadline(t time.Time) error     { return c.Conn.SetReadDeadline(t) }
func (c *conn) SetWriteDeadline(time.Time) error  { return nil }
func (c *conn) SetReadDeadline(t time.Time) error { return c.Conn.SetReadDeadline(t) }
