package broker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/spool"
)

const (
	readMin   = 512      // read buffer of a connection that is silent
	readMax   = 64 << 10 // and of one that sends as fast as it can
	readSmall = 4 << 10  // and where all together have too much
	readMaxTS = 16 << 10 // the same over TLS and websocket, which have buffers of their own
	shrinkIn  = time.Second
	outLow    = 4 << 10  // what is written at once to each where much is written to all
	outHigh   = 64 << 10 // with this much unsent, nothing more is read or added to deliver
	closeIn   = time.Second

	// A deadline that strikes this late says that the gateway itself stood still: stopped, frozen, or
	// without a processor. The peer's silence meanwhile is not the peer's.
	asleep = time.Second
	// lookAgain is how long a peer whose time is over is listened to once more: what it sent may lie unread.
	lookAgain = 50 * time.Millisecond
	// afterSleep is the same after the gateway stood still, or the machine: what was lost is sent again.
	afterSleep = 5 * time.Second
)

// conn is one device's connection, from Accept to the end. One goroutine (serve) reads it,
// splits the bytes into packets and handles them one after the other. Acknowledgements come
// from the goroutine that completes commits: it only appends to out. What is in out is
// written by flush, a goroutine that exists only while there is something to write.
//
// Lock order: session.life, conn.handing, session.mu, conn.mu, then fanout.mu or Broker.touchMu.
type conn struct {
	b         *Broker
	listener  *Listener
	addr      netip.Addr
	remote    string
	sock      net.Conn     // the TCP connection: deadlines are set here
	nc        net.Conn     // what packets go over: sock, TLS on it, or a websocket
	nested    bool         // nc has a buffer of its own
	vault     *vault       // the certificates of a TLS listener
	opened    time.Time    // when it was accepted
	writeFrom atomic.Int64 // when the write began that is under way, ns since opened; 0: there is none
	writeDue  atomic.Int64 // deadline of the write that is under way, ns since opened; see writeSock

	// Only serve touches these.
	buf       []byte
	r, w      int           // buf[r:w] is read and not yet handled
	keepAlive time.Duration // one and a half times the client's; 0: none
	lastSeen  time.Time     // end of the last packet
	begun     time.Time     // when the first byte of an unfinished packet came; zero: there is none
	shrink    time.Time     // when a large and empty buffer is given back; zero: it is small
	armed     time.Time     // deadline that sock has now; zero: none
	waited    time.Duration // for a place to compute its handshake: not the peer's time
	pardoned  time.Time     // the deadline after which it is listened to once more, until pardon
	pardon    time.Time
	dirty     bool    // this goroutine put something into out and has not started flush
	in        *inflow // nil until the first PUBLISH
	tally     tally
	goodbye   *mqtt.Disconnect // the client's DISCONNECT

	// Written by serve while it handles CONNECT, before the session knows the connection;
	// not changed after that.
	version   mqtt.Version
	id        string
	device    []byte // id once more
	rights    Rights
	sess      *session
	link      *Link  // nil: nobody watches
	sendMax   int    // the client's receive maximum
	maxPacket uint32 // the client's; 0: none
	window    int    // QoS 1 and 2 messages it may have unacknowledged

	ended  atomic.Bool           // ending, for those without the lock
	halted atomic.Bool           // the gateway stops: take nothing more in
	took   atomic.Int64          // when the Intake last took a message of it, Unix ms; 0: none yet
	meter  atomic.Pointer[meter] // nil: it may publish as much as it can; what is in it only serve touches
	peer   atomic.Pointer[peer]  // nil: it showed no certificate

	// handing is held by serve from the look at a QoS 2 packet id to the hand-in that follows
	// from it, and from the look at a PUBACK until the Watcher has heard of it. Whoever takes the
	// session over passes through it once, so that nothing of the old connection is handed in among
	// what comes on the new one. Before session.mu.
	handing sync.Mutex

	mu          sync.Mutex         // guards what follows
	cond        sync.Cond          // broadcast when room came free in ring or out, and at the end
	ring        []slot             // power of two, grown on demand; see publish.go
	head, tail  uint64             // ring[head..tail) is in use; a slot's number is its token
	unacked     int                // bytes of the messages in ring
	inflight    int                // QoS 1 and 2 messages that the client must count against receive maximum
	mute        bool               // a message was not stored: nothing that comes after may be acknowledged
	failure     error              // why, if it is known
	out         *outbuf            // what is to be written; nil: nothing
	flushing    bool               // a flush goroutine is running
	touched     bool               // in Broker.touched
	wantFill    bool               // the session has something to deliver
	established bool               // CONNACK is in out or was written
	ending      bool               // only what is in out is written any more, then the socket is closed
	dead        bool               // the socket is closed, or about to be, by flush
	cause       error              // why it ends
	will        *will              // nil: none, or taken by whoever publishes it
	cancel      context.CancelFunc // ends the wait for the Authorizer; nil: there is none
}

type outbuf struct{ b []byte }

var outbufs = sync.Pool{New: func() any { return &outbuf{b: make([]byte, 0, 1024)} }}

// past is a deadline that wakes a reader at once.
var past = time.Unix(1, 0)

// tally counts what serve has handled since it last had to wait for bytes, so that the shared
// counters are not touched for each message.
type tally struct {
	messages [3]int
	bytes    int
}

func (t *tally) flush(m *metrics) {
	for qos, n := range t.messages {
		if n > 0 {
			m.received[qos].Add(float64(n))
		}
	}
	if t.bytes > 0 {
		m.receivedBytes.Add(float64(t.bytes))
	}
	*t = tally{}
}

// serve is the connection's goroutine.
func (c *conn) serve() {
	defer c.b.wg.Done()
	err := c.guarded(c.run)
	switch {
	case errors.Is(err, errStopping):
		c.drain()
	case errors.Is(err, errNoWords):
		c.awaitEnd()
	case errors.Is(err, errOverRate):
		c.drain() // else it comes back with what was taken, too, and gets no further
	}
	c.end(err)
	if e := c.guarded(func() error { c.leave(); return nil }); e != nil {
		c.b.forget(c)
	}
	_ = c.guarded(func() error { c.tellDisconnected(); return nil })
}

// guarded runs f. A panic, mochi's or ours, ends this connection and nothing else.
func (c *conn) guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.b.m.panics.Inc()
			err = fmt.Errorf("panic: %v", p)
			c.b.log.Error("connection ended by a panic: please report this", "remote", c.remote, "client", c.id,
				"err", err, "stack", string(debug.Stack()))
		}
	}()
	return f()
}

func (c *conn) run() error {
	if err := c.open(); err != nil {
		return err
	}
	return c.readLoop()
}

// leave takes the connection out of everything that knows it.
func (c *conn) leave() {
	c.tally.flush(c.b.m)
	c.setBuf(nil)
	if c.sess != nil {
		c.sess.detach(c)
	}
	c.b.forget(c)
	c.mu.Lock()
	cause := c.cause
	c.mu.Unlock()
	c.b.m.ended(cause)
	c.b.log.Log(context.Background(), c.b.noticeLevel(cause), "connection ended", "client", c.id, "remote", c.remote,
		"listener", c.listener.Name, "err", cause)
}

// drain waits until all that was handed in is committed and acknowledged.
func (c *conn) drain() {
	c.waitFor(func() bool { return c.head == c.tail })
}

func (c *conn) awaitEnd() {
	c.waitFor(func() bool { return c.ending })
}

func (c *conn) waitFor(done func() bool) {
	late := time.AfterFunc(c.b.cfg.ShutdownTimeout, func() { c.end(errStopping) })
	defer late.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !done() && !c.ending {
		c.cond.Wait()
	}
}

// readLoop reads and handles packets until the connection ends. It never returns nil.
func (c *conn) readLoop() error {
	c.setBuf(make([]byte, readMin))
	c.lastSeen = c.opened
	for {
		n, err := c.split()
		if err != nil {
			return err
		}
		now := time.Now()
		switch {
		case c.r == c.w:
			c.begun = time.Time{}
		case n > 0 || c.begun.IsZero():
			c.begun = now
		}
		if n > 0 {
			c.lastSeen = now
		}
		if err := c.fillBuffer(now); err != nil {
			return err
		}
	}
}

// split handles the whole packets that lie in the buffer and returns their number.
func (c *conn) split() (n int, err error) {
	for c.r < c.w {
		switch {
		case c.ended.Load():
			return n, errEnded
		case c.halted.Load():
			return n, errStopping
		}
		t, _, _, size, ok, err := mqtt.PeekHeader(c.buf[c.r:c.w])
		switch {
		case c.sess == nil && t != mqtt.TypeConnect:
			return n, fmt.Errorf("first packet is not CONNECT but %v", t) // MQTT-3.1.0-1: no answer
		case err != nil:
			return n, err
		case c.sess == nil && ok && size > c.b.cfg.MaxConnectPacket:
			return n, fmt.Errorf("CONNECT of %d bytes", size)
		case ok && size > c.b.cfg.MaxPacket:
			return n, &refusal{mqtt.PacketTooLarge, fmt.Sprintf("%v of %d bytes", t, size)}
		case !ok || c.w-c.r < size:
			return n, nil
		}
		frame := c.buf[c.r : c.r+size]
		c.r += size
		n++
		if err := c.handle(t, frame); err != nil {
			return n, err
		}
	}
	return n, nil
}

// handle handles one packet. frame is valid only during the call.
func (c *conn) handle(t mqtt.Type, frame []byte) error {
	if c.sess == nil {
		return c.connect(frame)
	}
	if t != mqtt.TypePublish && c.traced() {
		c.b.log.Debug("packet received", "client", c.id, "type", t.String(), "size_bytes", len(frame))
	}
	switch t { //nolint:exhaustive // the others come below
	case mqtt.TypePublish:
		return c.publish(frame)
	case mqtt.TypePuback, mqtt.TypePubrec, mqtt.TypePubrel, mqtt.TypePubcomp:
		var a mqtt.Ack
		if err := mqtt.ParseAck(frame, c.version, &a); err != nil {
			return err
		}
		if t == mqtt.TypePubrel {
			return c.release2(&a)
		}
		return c.sess.answered(c, &a)
	case mqtt.TypeSubscribe:
		return c.subscribe(frame)
	case mqtt.TypeUnsubscribe:
		return c.unsubscribe(frame)
	}
	if err := mqtt.ValidateFromClient(frame, c.version); err != nil {
		return err
	}
	switch t { //nolint:exhaustive // ValidateFromClient refuses the others
	case mqtt.TypePingreq:
		c.mu.Lock()
		c.appendLocked(mqtt.AppendPingresp)
		c.mu.Unlock()
		c.dirty = true
		return nil
	case mqtt.TypeDisconnect:
		return c.disconnect(frame)
	}
	return fmt.Errorf("packet %v was let through", t)
}

// traced says whether somebody wants to see each packet.
func (c *conn) traced() bool { return c.b.cfg.Traced != nil && c.b.cfg.Traced(c.id) }

func (c *conn) disconnect(frame []byte) error {
	d, err := mqtt.ParseDisconnect(frame, c.version, mqtt.FromClient)
	if err != nil {
		return err
	}
	if d.HasSessionExpiry && d.SessionExpiry > 0 && c.sess.ends() {
		// MQTT 5.0 §3.14.2.2.2: 0 in CONNECT cannot become more in DISCONNECT
		return &refusal{mqtt.ProtocolError, "session expiry interval of DISCONNECT was 0 in CONNECT"}
	}
	c.goodbye = d
	return errGoodbye
}

// fillBuffer waits for more bytes.
func (c *conn) fillBuffer(now time.Time) error {
	c.tally.flush(c.b.m)
	if err := c.flushBeforeWait(); err != nil {
		return err
	}
	most := readMax
	if c.nested {
		most = readMaxTS
	}
	if c.r > 0 {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	if c.w == len(c.buf) {
		// One packet that is larger than the buffer: grow by what has come, never by what
		// its length claims.
		size := 2 * len(c.buf)
		if size > readSmall && c.b.reading.Load()+int64(size) > 2*int64(c.b.cfg.MaxReadBytes) {
			return &refusal{mqtt.QuotaExceeded, "packet is large, and so much is being read from all clients"}
		}
		c.grow(size)
	}
	for {
		c.shrink = time.Time{}
		if len(c.buf) > readMin && c.w == 0 && !c.listener.websocket() {
			c.shrink = now.Add(shrinkIn)
		}
		n, err := c.read(c.nc, c.buf[c.w:])
		if errors.Is(err, errIdle) {
			c.giveBack()
			continue
		}
		if err != nil {
			return err
		}
		c.w += n
		if c.w == len(c.buf) && len(c.buf) < most {
			if c.b.reading.Load() > int64(c.b.cfg.MaxReadBytes) {
				most = readSmall
			}
			if size := min(4*len(c.buf), most); size > len(c.buf) {
				c.grow(size)
			}
		}
		return nil
	}
}

// giveBack frees what a busy connection needed and a silent one does not.
func (c *conn) giveBack() {
	c.setBuf(make([]byte, readMin))
	c.mu.Lock()
	if c.head == c.tail {
		c.ring = nil
	}
	c.mu.Unlock()
	if c.in != nil {
		c.in.pub = mqtt.Publish{} // views of the old buffer
		c.in.msg = Message{}
		c.in.props = spool.Props{}
	}
}

func (c *conn) grow(size int) {
	buf := make([]byte, size)
	copy(buf, c.buf[:c.w])
	c.setBuf(buf)
}

func (c *conn) setBuf(b []byte) {
	c.b.reading.Add(int64(len(b) - len(c.buf)))
	c.buf = b
}

// errIdle wakes fillBuffer to give a large buffer back.
var errIdle = errors.New("idle")

// read reads from nc, which is sock or stands on it, under the deadlines that hold now. They
// are set lazily: an earlier deadline of the socket is left alone and looked at when it
// strikes, so that a busy connection sets none.
func (c *conn) read(nc io.Reader, p []byte) (int, error) {
	for {
		due := c.due()
		wake := due
		if !due.IsZero() && due.Equal(c.pardoned) {
			wake = c.pardon
		}
		if !c.shrink.IsZero() && (wake.IsZero() || c.shrink.Before(wake)) {
			wake = c.shrink
		}
		if !wake.IsZero() && (c.armed.IsZero() || wake.Before(c.armed)) {
			c.arm(wake)
		}
		// After arm, which may have undone a wake-up: end and halt set these first.
		switch {
		case c.ended.Load():
			return 0, errEnded
		case c.halted.Load():
			return 0, errStopping
		}
		n, err := nc.Read(p)
		switch {
		case n > 0:
			return n, nil
		case err == nil:
			continue
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return 0, err
		}
		now := time.Now()
		switch {
		case c.ended.Load():
			return 0, errEnded
		case c.halted.Load():
			return 0, errStopping
		case !due.IsZero() && !now.Before(due) && !due.Equal(c.pardoned):
			// A deadline wins over bytes that have come: whoever was not read in time is not silent.
			c.pardoned, c.pardon = due, now.Add(c.indulgence(now.Sub(due)))
			c.arm(c.pardon)
			continue
		case !due.IsZero() && due.Equal(c.pardoned) && !now.Before(c.pardon):
			return 0, c.overdue()
		case !c.shrink.IsZero() && !now.Before(c.shrink):
			c.arm(due)
			return 0, errIdle
		}
		c.arm(wake)
	}
}

// indulgence is how long the peer is listened to after its deadline, which has struck so much too late.
func (c *conn) indulgence(late time.Duration) time.Duration {
	if late < asleep {
		return lookAgain
	}
	c.b.m.overslept.Inc()
	if c.keepAlive > 0 {
		return min(afterSleep, c.keepAlive)
	}
	return afterSleep
}

func (c *conn) arm(t time.Time) {
	c.armed = t
	_ = c.sock.SetReadDeadline(t) // fails on a closed socket only, as the next read does
}

// due tells when the connection is given up if nothing more comes; zero: never.
func (c *conn) due() time.Time {
	if c.sess == nil {
		return c.opened.Add(c.b.cfg.ConnectTimeout + c.waited)
	}
	var due time.Time
	if c.keepAlive > 0 {
		due = c.lastSeen.Add(c.keepAlive)
	}
	if !c.begun.IsZero() {
		if t := c.begun.Add(c.b.cfg.PacketTimeout); due.IsZero() || t.Before(due) {
			due = t
		}
	}
	return due
}

func (c *conn) overdue() error {
	switch {
	case c.sess == nil:
		return fmt.Errorf("no CONNECT within %v: %w", c.b.cfg.ConnectTimeout, errTimeout)
	case c.keepAlive > 0 && time.Since(c.lastSeen) >= c.keepAlive:
		return &refusal{mqtt.KeepAliveTimeout, fmt.Sprintf("no packet within %v", c.keepAlive)} // MQTT-3.1.2-22
	}
	return &refusal{mqtt.UnspecifiedError, fmt.Sprintf("packet not complete within %v", c.b.cfg.PacketTimeout)}
}

// flushBeforeWait has this goroutine's answers written, and waits while the peer does not read them.
func (c *conn) flushBeforeWait() error {
	if !c.dirty {
		return nil
	}
	c.dirty = false
	c.mu.Lock()
	defer c.mu.Unlock()
	c.startFlushLocked()
	for c.out != nil && len(c.out.b) > outHigh && !c.ending {
		c.cond.Wait()
	}
	return nil
}

// Write side.

// appendLocked adds packets to out. It starts nothing: flushes come in groups.
func (c *conn) appendLocked(add func([]byte) []byte) {
	if c.ending {
		return
	}
	if c.out == nil {
		c.out = outbufs.Get().(*outbuf)
	}
	c.out.b = add(c.out.b)
	if len(c.out.b) > c.b.cfg.MaxOutboundBytes {
		c.endLocked(errSlow)
	}
}

func (c *conn) startFlushLocked() {
	if c.flushing || c.dead {
		return
	}
	if c.out == nil && !c.ending && (!c.wantFill || !c.established) {
		return
	}
	c.flushing = true
	c.b.wg.Add(1) // never from zero: serve or a flush is counted while the connection is not dead
	go c.flush()
}

// flush writes what is in out, takes more from the session while it has some, and ends when
// there is nothing left. It closes the socket of a connection that is ending.
func (c *conn) flush() {
	defer c.b.wg.Done()
	for {
		c.mu.Lock()
		if c.out == nil && c.wantFill && c.established && !c.ending {
			c.wantFill = false
			c.mu.Unlock()
			c.sess.fill(c)
			continue
		}
		o := c.out
		c.out = nil
		if o == nil {
			c.flushing = false
			closing := c.ending && !c.dead
			if closing {
				c.dead = true
			}
			c.mu.Unlock()
			if closing {
				c.close()
			}
			return
		}
		timeout := c.b.cfg.WriteTimeout
		if c.ending {
			timeout = closeIn
		}
		c.cond.Broadcast() // room in out
		c.mu.Unlock()

		n, err := c.write(o.b, timeout)
		c.b.m.sentBytes.Add(float64(n))
		if cap(o.b) <= outHigh {
			o.b = o.b[:0]
			outbufs.Put(o)
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = errSlow
			}
			c.mu.Lock()
			c.out = nil // what was cut off makes the rest worthless
			c.endLocked(err)
			c.out = nil
			c.mu.Unlock()
		}
	}
}

// write writes b over whatever layers there are.
func (c *conn) write(b []byte, timeout time.Duration) (int, error) {
	now := time.Since(c.opened)
	due := now + timeout
	c.writeFrom.Store(int64(now))
	c.writeDue.Store(int64(due))
	defer func() {
		c.writeFrom.Store(0)
		c.b.writing.Add(-int64(len(b)))
	}()
	if c.b.writing.Add(int64(len(b))) > int64(c.b.cfg.MaxWriteBytes) {
		c.b.relieve()
	}
	_ = c.nc.SetWriteDeadline(c.opened.Add(due))
	if !c.nested {
		return c.writeSock(b)
	}
	return c.nc.Write(b)
}

// writeSock writes to the socket. A deadline that strikes late is put off once: while the gateway stood still nobody
// could have taken what it writes.
func (c *conn) writeSock(b []byte) (n int, err error) {
	for again := false; ; again = true {
		var m int
		m, err = c.sock.Write(b[n:])
		n += m
		if !errors.Is(err, os.ErrDeadlineExceeded) || again || c.ended.Load() {
			return n, err
		}
		now, due := time.Since(c.opened), time.Duration(c.writeDue.Load())
		if due == 0 || now-due < asleep {
			return n, err
		}
		c.b.m.overslept.Inc()
		_ = c.sock.SetWriteDeadline(time.Now().Add(afterSleep))
		if c.ended.Load() { // whose own, shorter deadline this has undone
			_ = c.sock.SetWriteDeadline(time.Now().Add(closeIn))
		}
	}
}

func (c *conn) close() {
	_ = c.sock.SetWriteDeadline(time.Now().Add(closeIn)) // TLS and websocket say goodbye
	c.nc.Close()
	c.sock.Close()
}

// end ends the connection for the reason err; only the first call counts. What is already in
// out is written, with a DISCONNECT after it where MQTT 5 has one, then the socket is closed.
// It never blocks.
func (c *conn) end(err error) (first bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endLocked(err)
}

func (c *conn) endLocked(err error) (first bool) {
	if c.ending {
		return false
	}
	if reason, told := reasonOf(err); told && c.established && c.version == mqtt.V5 { // 3.1.1 has none from servers
		if c.out == nil {
			c.out = outbufs.Get().(*outbuf)
		}
		c.out.b = c.appendGoodbye(c.out.b, reason, err)
	}
	c.ending, c.cause = true, err
	c.ended.Store(true)
	_ = c.sock.SetReadDeadline(past)
	_ = c.sock.SetWriteDeadline(time.Now().Add(closeIn))
	c.cond.Broadcast()
	if c.cancel != nil {
		c.cancel()
	}
	c.startFlushLocked()
	return true
}

// appendGoodbye appends a DISCONNECT, with a text where there is one and the client takes it.
func (c *conn) appendGoodbye(b []byte, reason mqtt.Reason, err error) []byte {
	var wanted *ordered
	if !errors.As(err, &wanted) || wanted.text == "" {
		return mqtt.AppendDisconnect(b, c.version, reason, "")
	}
	with := mqtt.AppendDisconnect(b, c.version, reason, wanted.text)
	if c.maxPacket > 0 && len(with)-len(b) > int(c.maxPacket) { // MQTT-3.14.2-3
		return mqtt.AppendDisconnect(b, c.version, reason, "")
	}
	return with
}

// halt makes serve stop taking packets in; what is handed in is still acknowledged.
func (c *conn) halt() {
	c.halted.Store(true)
	_ = c.sock.SetReadDeadline(past)
	c.mu.Lock()
	if c.cancel != nil {
		c.cancel()
	}
	c.cond.Broadcast()
	c.mu.Unlock()
}
