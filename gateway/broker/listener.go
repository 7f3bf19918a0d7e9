package broker

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// Which limit turned a connection away.
const (
	limitTotal    = "total"
	limitListener = "listener"
	limitAddress  = "address"
)

// perAddress is the default of MaxConnectionsPerAddress.
const perAddress = 512

var errTimeout = errors.New("took too long")

// socket is a listener that is bound.
type socket struct {
	*Listener
	ln    net.Listener
	vault *vault      // nil: no TLS
	tls   *tls.Config // what it gives to handshakes
}

// bind opens the listener. now is what time it is for certificates.
func (l *Listener) bind(silence time.Duration, now func() time.Time) (*socket, error) {
	s := &socket{Listener: l}
	if l.Secure() {
		v, err := newVault(l, now)
		if err != nil {
			return nil, fmt.Errorf("listener %q: %w", l.Name, err)
		}
		s.vault, s.tls = v, v.config()
	}
	// What is set on a listener holds for all that it accepts: no system calls for each.
	ln, err := (&net.ListenConfig{KeepAlive: -1, Control: silentPeers(silence)}).Listen(context.Background(), "tcp", l.Address)
	if err != nil {
		return nil, fmt.Errorf("listener %q: %w", l.Name, err)
	}
	s.ln = ln
	return s, nil
}

// accept takes connections in until the broker stops. An error is not the end: out of
// descriptors, a gateway that stopped listening would be lost although all else recovers.
func (b *Broker) accept(s *socket) {
	defer b.wg.Done()
	const first, most = 5 * time.Millisecond, time.Second
	delay := time.Duration(0)
	for {
		nc, err := s.ln.Accept()
		switch {
		case err == nil:
			if delay > 0 {
				b.log.Info("listener accepts again", "listener", s.Name)
				delay = 0
			}
			b.admit(s, nc)
		case b.stopped():
			return
		default:
			b.m.acceptErrors.Inc()
			if delay == 0 {
				b.log.Warn("listener can not accept, will try again", "listener", s.Name, "err", err)
			}
			delay = min(max(2*delay, first), most)
			select {
			case <-b.stop:
				return
			case <-time.After(delay):
			}
		}
	}
}

// admit starts a connection, unless there are too many.
func (b *Broker) admit(s *socket, nc net.Conn) {
	c := &conn{b: b, listener: s.Listener, sock: nc, nc: nc, opened: time.Now(), remote: nc.RemoteAddr().String()}
	c.cond.L = &c.mu
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		c.addr = a.AddrPort().Addr().Unmap()
	}
	if s.tls != nil {
		c.vault = s.vault
		c.nc, c.nested = tls.Server(&gate{Conn: nc, c: c}, s.tls), true
	}
	if limit := b.register(c); limit != "" {
		b.m.turnedAway.WithLabelValues(limit).Inc()
		nc.Close()
		return
	}
	go c.serve()
}

// register counts c, or says which limit is reached.
func (b *Broker) register(c *conn) (limit string) {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	most := b.cfg.MaxConnectionsPerAddress
	if most == 0 && !c.addr.IsLoopback() {
		most = perAddress
	}
	switch {
	case b.stopping, len(b.conns) >= b.cfg.MaxConnections:
		return limitTotal
	case c.listener.MaxConnections > 0 && b.byListener[c.listener] >= c.listener.MaxConnections:
		return limitListener
	case most > 0 && b.byAddr[c.addr] >= most:
		return limitAddress
	}
	b.conns[c] = struct{}{}
	b.byListener[c.listener]++
	b.byAddr[c.addr]++
	b.wg.Add(1)
	return ""
}

// forget undoes register; twice without harm.
func (b *Broker) forget(c *conn) {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	if _, ok := b.conns[c]; !ok {
		return
	}
	delete(b.conns, c)
	b.byListener[c.listener]--
	if b.byAddr[c.addr]--; b.byAddr[c.addr] == 0 {
		delete(b.byAddr, c.addr)
	}
}

// open does what comes before CONNECT: the handshakes of TLS and websocket. All of it has to
// be over, CONNECT included, within ConnectTimeout.
func (c *conn) open() error {
	if t, ok := c.nc.(*tls.Conn); ok {
		if err := c.handshake(t, c.vault); err != nil {
			return err
		}
	}
	if !c.listener.websocket() {
		return nil
	}
	ws, err := c.upgrade()
	if err != nil {
		return fmt.Errorf("websocket handshake: %w", err)
	}
	c.nc, c.nested = &wsConn{Conn: c.nc, ws: ws}, true
	return nil
}

// tls gives the TLS layer, if there is one.
func (c *conn) tls() (*tls.Conn, bool) {
	nc := c.nc
	if w, ok := nc.(*wsConn); ok {
		nc = w.Conn
	}
	t, ok := nc.(*tls.Conn)
	return t, ok
}

// maxRequest bounds the HTTP request of a websocket.
const maxRequest = 8 << 10

var (
	wsBuffers = &sync.Pool{}
	upgrader  = websocket.Upgrader{
		ReadBufferSize:  1024,
		WriteBufferSize: 1024,
		WriteBufferPool: wsBuffers,
		Subprotocols:    []string{"mqtt"}, // MQTT-6.0.0-3, MQTT-6.0.0-4
		// CheckOrigin nil: a browser's request must come from the same host. Else any web
		// page could talk to a loopback listener of whoever looks at it.
	}
)

// upgrade does the HTTP part of a websocket without an http.Server: one goroutine, our
// deadline, no second registry of connections.
func (c *conn) upgrade() (*websocket.Conn, error) {
	under := &patient{Conn: c.nc, c: c}
	br := bufio.NewReaderSize(io.LimitReader(under, maxRequest), 1024)
	r, err := http.ReadRequest(br)
	if err != nil {
		return nil, err
	}
	w := &response{conn: under, br: br, header: http.Header{}}
	offered := false
	for _, p := range websocket.Subprotocols(r) {
		offered = offered || p == "mqtt"
	}
	if !offered {
		http.Error(w, "subprotocol mqtt is missing", http.StatusBadRequest)
		return nil, errors.New("subprotocol mqtt is missing")
	}
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return nil, err
	}
	// One message may hold many packets and is not kept as a whole; the limit keeps its
	// length honest.
	ws.SetReadLimit(int64(c.b.cfg.MaxPacket) + 1<<20)
	return ws, nil
}

// patient is what the websocket reads from: reads wait under the connection's deadlines, since
// gorilla takes a deadline that strikes for the end.
type patient struct {
	net.Conn
	c *conn
}

func (p *patient) Read(b []byte) (int, error) { return p.c.read(p.Conn, b) }

func (p *patient) Write(b []byte) (int, error) {
	if p.Conn == p.c.sock {
		return p.c.writeSock(b)
	}
	return p.Conn.Write(b)
}

func (*patient) SetDeadline(time.Time) error     { return nil }
func (*patient) SetReadDeadline(time.Time) error { return nil }

// response is the http.ResponseWriter of the upgrade.
type response struct {
	conn   net.Conn
	br     *bufio.Reader
	header http.Header
	wrote  bool
}

func (r *response) Header() http.Header { return r.header }

func (r *response) WriteHeader(status int) {
	if r.wrote {
		return
	}
	r.wrote = true
	_ = r.conn.SetWriteDeadline(time.Now().Add(closeIn))
	fmt.Fprintf(r.conn, "HTTP/1.1 %d %s\r\nConnection: close\r\n", status, http.StatusText(status))
	_ = r.header.Write(r.conn)
	fmt.Fprint(r.conn, "\r\n")
}

func (r *response) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	return r.conn.Write(b)
}

func (r *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return r.conn, bufio.NewReadWriter(r.br, bufio.NewWriterSize(r.conn, 512)), nil
}

// wsConn is a websocket as a stream: packets need not end where messages do (MQTT-6.0.0-2).
type wsConn struct {
	net.Conn // what the websocket stands on
	ws       *websocket.Conn
	message  io.Reader // nil: between messages
}

func (w *wsConn) Read(p []byte) (int, error) {
	for {
		if w.message == nil {
			kind, r, err := w.ws.NextReader()
			if err != nil {
				return 0, unwrapClose(err)
			}
			if kind != websocket.BinaryMessage { // MQTT-6.0.0-1
				_ = w.ws.WriteControl(websocket.CloseMessage,
					websocket.FormatCloseMessage(websocket.CloseUnsupportedData, "MQTT is binary"), time.Now().Add(closeIn))
				return 0, errors.New("websocket message is not binary")
			}
			w.message = r
		}
		n, err := w.message.Read(p)
		if errors.Is(err, io.EOF) {
			w.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, unwrapClose(err)
		}
	}
}

// unwrapClose makes an orderly end of a websocket the end of a stream.
func unwrapClose(err error) error {
	if websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
		return io.EOF
	}
	return err
}

func (w *wsConn) Write(p []byte) (int, error) {
	if err := w.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (w *wsConn) SetWriteDeadline(t time.Time) error { return w.ws.SetWriteDeadline(t) }

func (w *wsConn) Close() error {
	_ = w.ws.WriteControl(websocket.CloseMessage,
		websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(closeIn))
	return w.Conn.Close()
}
