package mqttup

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"holdfast/bridge"
)

// openTransport connects to u's host, by TLS if it says so. Files are read anew each time, so that a
// certificate that was renewed is taken with the next connection.
func openTransport(ctx context.Context, u *url.URL, o Options) (net.Conn, *progressConn, error) {
	secure := u.Scheme == "mqtts"
	var config *tls.Config
	if secure {
		var err error
		if config, err = tlsConfig(o.TLS, u.Hostname(), o.Now); err != nil {
			return nil, nil, err
		}
	}
	port := u.Port()
	if port == "" {
		port = "1883"
		if secure {
			port = "8883"
		}
	}
	d := net.Dialer{
		Resolver: o.Resolver,
		// A connection without traffic to a host that is gone ends within 30 s.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
			return setSocketOptions(c, o.Stall)
		},
	}
	dial := d.DialContext
	if o.Dialer != nil {
		dial = o.Dialer
	}
	raw, err := dial(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, nil, fmt.Errorf("connect: %w", err)
	}
	pc := &progressConn{Conn: raw, stall: o.Stall, meter: o.Meter}
	pc.moved.Store(ticks())
	if sc, ok := raw.(syscall.Conn); ok {
		pc.raw, _ = sc.SyscallConn()
	}
	if !secure {
		return pc, pc, nil
	}
	tc := tls.Client(pc, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, nil, fmt.Errorf("tls: %w", plain(err))
	}
	return tc, pc, nil
}

// tlsConfig reads the files. There is no way to skip verification.
func tlsConfig(o TLS, server string, now func() time.Time) (*tls.Config, error) {
	c := &tls.Config{Time: now, MinVersion: tls.VersionTLS12, ServerName: server}
	if o.CA != "" {
		pem, err := os.ReadFile(o.CA)
		if err != nil {
			return nil, fmt.Errorf("tls ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls ca %s: holds no certificate in PEM form", o.CA)
		}
	}
	if o.Cert != "" || o.Key != "" {
		pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
		if err != nil {
			return nil, fmt.Errorf("tls cert %s, key %s: %w", o.Cert, o.Key, err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// password reads the file at each connection, so that it can be changed at any time.
func password(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("password_file: %w", err)
	}
	p := strings.TrimRight(string(b), "\r\n")
	if p == "" {
		return "", fmt.Errorf("password_file %s is empty", file)
	}
	return p, nil
}

var began = time.Now()

// ticks is a time in ns that no jump of the wall clock moves, and that is never 0.
func ticks() int64 { return int64(time.Since(began)) + 1 }

// progressConn is a TCP connection whose writes end when nothing moves for stall, however long the
// whole takes. It lies below TLS, which a write that ran out of time half way would break.
type progressConn struct {
	net.Conn
	raw     syscall.RawConn // nil: not a socket
	stall   time.Duration
	written atomic.Uint64 // bytes that the kernel has taken
	taken   atomic.Uint64 // bytes that the peer's kernel had taken when looked at last
	moved   atomic.Int64  // ticks when either changed last
	meter   *bridge.Meter // nil: none
	speed   speed         // only Write and portion touch it, which one goroutine calls at a time

	mu   sync.Mutex
	last time.Time // after this nothing is written; zero: not set
}

func (c *progressConn) Write(p []byte) (n int, err error) {
	c.moved.Store(ticks())
	c.resume(time.Now())
	for {
		c.mu.Lock()
		// A look from time to time: the deadline of one write says nothing about when it last moved.
		until := time.Now().Add(c.stall / 4)
		hurried := !c.last.IsZero()
		if hurried {
			until = c.last
		}
		err := c.Conn.SetWriteDeadline(until)
		c.mu.Unlock()
		if err != nil {
			return n, err
		}
		m, err := c.Conn.Write(p[n:])
		n += m
		if m > 0 {
			c.written.Add(uint64(m))
			c.meter.Add(m)
			c.moved.Store(ticks())
			c.measure(time.Now())
		}
		if err == nil || hurried || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if time.Duration(ticks()-c.lastMove()) > c.stall {
			return n, err
		}
	}
}

// hurry sets the time after which writes fail.
func (c *progressConn) hurry(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = t
	_ = c.Conn.SetWriteDeadline(t)
}

// interrupt fails the write that waits, and all that follow.
func (c *progressConn) interrupt() { c.hurry(time.Unix(1, 0)) }

// look notes whether the peer has taken bytes since the last look.
func (c *progressConn) look() {
	taken := c.written.Load()
	if c.raw != nil {
		taken -= min(unsentBytes(c.raw), taken)
	}
	if c.taken.Swap(taken) != taken {
		c.moved.Store(ticks())
	}
}

// lastMove is when bytes last moved, in ticks.
func (c *progressConn) lastMove() int64 {
	c.look()
	return c.moved.Load()
}

// speed is what the link takes, as far as it is known, and what follows from it. Whatever is written and not on its way yet stands
// before a ping that comes now, so that must not be more than the link takes in a moment.
type speed struct {
	since time.Time // of the present measurement
	ended time.Time // the last write
	from  uint64    // taken at since
	rate  float64   // bytes a second; 0: not known
	kept  int       // what the kernel keeps unsent, as told to it last; 0: it was not told
}

const (
	measureFor  = 250 * time.Millisecond
	portionLow  = 2 << 10 // of one write: a second at 2 KiB/s
	portionHigh = 64 << 10
	unsentLow   = 4 << 10 // of what waits in the kernel
	unsentHigh  = 128 << 10
)

// resume begins to measure anew if nothing was written for a while: that says nothing about the link. A write that takes long does.
func (c *progressConn) resume(now time.Time) {
	if s := &c.speed; now.Sub(s.ended) > measureFor {
		c.look()
		s.since, s.from = now, c.taken.Load()
	}
}

// measure learns from a write that has just ended.
func (c *progressConn) measure(now time.Time) {
	s := &c.speed
	s.ended = now
	d := now.Sub(s.since)
	if d < measureFor {
		return
	}
	c.look()
	taken := c.taken.Load()
	// What a link once took it may take again, but each measurement halves the belief in it.
	s.rate = max(float64(taken-min(s.from, taken))/d.Seconds(), s.rate/2, 1)
	s.since, s.from = now, taken
	unsent := min(max(int(s.rate/4), unsentLow), unsentHigh)
	if c.raw != nil && (unsent > 2*s.kept || unsent < s.kept/2) {
		s.kept = unsent
		setUnsent(c.raw, unsent)
	}
}

// portion is how many bytes are to be written at once.
func (c *progressConn) portion() int {
	if c.speed.rate == 0 {
		return portionHigh / 4
	}
	return min(max(int(c.speed.rate/4), portionLow), portionHigh)
}
