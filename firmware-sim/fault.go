package firmwaresim

import (
	"errors"
	"math"
	"net"
	"sync"
	"time"
)

// fault is a way in which a connection ends.
type fault byte

const (
	reset    fault = iota // the peer sees a reset; bytes under way are lost
	hangUp                // the peer sees an orderly end, without a DISCONNECT
	midWrite              // the next packet is cut short, then reset
	vanish                // the peer sees nothing: the device comes back on another connection
	faults
)

var errLinkLost = errors.New("simulated loss of the link")

// ghostTime is how long the peer of a vanished link keeps seeing the old connection.
const ghostTime = 5 * time.Second

// link is a connection that can be made to fail.
type link struct {
	net.Conn
	ghosts *ghosts

	mu    sync.Mutex
	cut   float64 // under mu: > 0: the next write stops after this share of its bytes
	ghost bool    // under mu: closing is left to ghosts
}

// fail makes the link fail. The caller then aborts the client above it, except for midWrite,
// where the client notices by itself.
func (l *link) fail(how fault, r *random) {
	switch how {
	case reset:
		l.reset()
	case hangUp: // closing does it
	case midWrite:
		l.mu.Lock()
		l.cut = 0.01 + 0.98*r.float()
		l.mu.Unlock()
	case vanish:
		l.mu.Lock()
		l.ghost = true
		l.mu.Unlock()
		_ = l.SetDeadline(time.Unix(1, 0)) // the client's reader and writer end
	default:
		panic("there is no such fault")
	}
}

// failing says whether fail was called.
func (l *link) failing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cut > 0 || l.ghost
}

// reset lets the close that follows be a reset.
func (l *link) reset() {
	if tcp, ok := l.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}

// Write writes b, or a part of it.
func (l *link) Write(b []byte) (int, error) {
	l.mu.Lock()
	cut, ghost := l.cut, l.ghost
	l.mu.Unlock()
	if ghost {
		return 0, errLinkLost
	}
	if cut > 0 {
		n, _ := l.Conn.Write(b[:int(cut*float64(len(b)))])
		l.reset()
		_ = l.Conn.Close()
		return n, errLinkLost
	}
	return l.Conn.Write(b)
}

// SetWriteDeadline keeps a vanished link dead.
func (l *link) SetWriteDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ghost {
		return errLinkLost
	}
	return l.Conn.SetWriteDeadline(t)
}

// Close closes the link, one that has vanished only later.
func (l *link) Close() error {
	l.mu.Lock()
	ghost := l.ghost
	l.mu.Unlock()
	if ghost && l.ghosts.keep(l.Conn) {
		return nil
	}
	return l.Conn.Close()
}

// CloseWrite is that of the connection below, if it has one.
func (l *link) CloseWrite() error {
	if half, ok := l.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// ghosts are the connections that devices have forgotten and servers have not.
type ghosts struct {
	mu     sync.Mutex
	conns  map[net.Conn]*time.Timer // under mu; nil when the fleet has ended
	closed bool                     // under mu
}

func (g *ghosts) keep(c net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	if g.conns == nil {
		g.conns = make(map[net.Conn]*time.Timer)
	}
	if g.conns[c] == nil {
		g.conns[c] = time.AfterFunc(ghostTime, func() {
			_ = c.Close()
			g.mu.Lock()
			delete(g.conns, c)
			g.mu.Unlock()
		})
	}
	return true
}

// close ends them all.
func (g *ghosts) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for c, timer := range g.conns {
		timer.Stop()
		_ = c.Close()
	}
	g.conns = nil
}

// untilFault draws the time to the next fault that has this probability each second.
func untilFault(p float64, r *random) time.Duration {
	if p <= 0 {
		return never
	}
	rate := -math.Log(1 - p)
	seconds := -math.Log(1-r.float()) / rate
	return time.Duration(min(seconds*float64(time.Second), float64(never)))
}
