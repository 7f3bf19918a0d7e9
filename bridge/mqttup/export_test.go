package mqttup

import (
	"net"
	"time"

	"holdfast/bridge"
)

// ReadFrames reads all that a peer sends as paho would be given it, with a guard of a subscriber of n filters.
func ReadFrames(transport net.Conn, filters, maxPublish int) (frames []byte, err error) {
	return readFrames(transport, guard{maxPublish: maxPublish, filters: filters})
}

func readFrames(transport net.Conn, g guard) (frames []byte, err error) {
	c := newConn(transport, &progressConn{Conn: transport, stall: time.Second}, g, nil, Options{Stall: time.Second, KeepAlive: time.Second})
	defer func() {
		_ = c.fail(errClosed)
		<-c.flushed
	}()
	buf := make([]byte, 512)
	for {
		n, err := c.Read(buf)
		frames = append(frames, buf[:n]...)
		if err != nil {
			return frames, err
		}
	}
}

// Flights opens the table of packet ids.
type Flights struct{ f flights }

func (f *Flights) Start(token uint64) (uint16, error)     { return f.f.start(token) }
func (f *Flights) Land(id uint16) (token uint64, ok bool) { return f.f.land(id) }

const FirstID = firstID

// ReadFramesCut is ReadFrames with a guard of TakeCommands.
func ReadFramesCut(transport net.Conn, cutTo int) (frames []byte, err error) {
	return readFrames(transport, guard{maxPublish: cutTo, cutTo: cutTo, filters: 1})
}

// Conn opens a connection, without paho.
type Conn struct{ c *conn }

func NewConn(transport net.Conn, o Options, acks bridge.Acks) Conn {
	tcp := &progressConn{Conn: transport, stall: o.Stall, meter: o.Meter}
	return Conn{newConn(tcp, tcp, guard{}, acks, o)}
}

func (c Conn) Publish(m *bridge.Message) error { return c.c.publish(m) }
func (c Conn) Write(p []byte) (int, error)     { return c.c.Write(p) }
func (c Conn) Read(p []byte) (int, error)      { return c.c.Read(p) }
func (c Conn) Err() error                      { return c.c.reason() }
func (c Conn) End()                            { _ = c.c.fail(errClosed); <-c.c.flushed }

// Whole tells how long the packets at the front of b are that together have at most n bytes, or else the first one.
func Whole(b []byte, n int) int { return whole(b, n) }
