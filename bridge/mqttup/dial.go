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
)

// openTransport connects to u's host, by TLS if it says so. Files are read anew each time, so that a
// certificate that was renewed is taken with the next connection.
func openTransport(ctx context.Context, u *url.URL, o TLS, stall time.Duration, now func() time.Time) (net.Conn, *progressConn, error) {
	secure := u.Scheme == "mqtts"
	var config *tls.Config
	if secure {
		var err error
		if config, err = tlsConfig(o, u.Hostname(), now); err != nil {
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
		// A connection without traffic to a host that is gone ends within 30 s.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
			return setSocketOptions(c, stall)
		},
	}
	raw, err := d.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, nil, fmt.Errorf("connect: %w", err)
	}
	pc := &progressConn{Conn: raw, stall: stall}
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

	mu   sync.Mutex
	last time.Time // after this nothing is written; zero: not set
}

func (c *progressConn) Write(p []byte) (n int, err error) {
	c.moved.Store(ticks())
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
			c.moved.Store(ticks())
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
