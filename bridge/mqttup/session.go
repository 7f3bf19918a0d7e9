package mqttup

import (
	"context"
	"fmt"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"holdfast/bridge"
	"holdfast/bridge/wire"
)

type packetOfPaho = packets.ControlPacket

// session is one connection's life. paho has it connect, with its will, keep alive and say goodbye. What
// the bridge sends goes past it: paho takes 6 µs, 38 allocations and three goroutines a message, and completes
// tokens when it gives up as well as when the broker acknowledges. Send writes the PUBLISH into the
// connection's buffer under a packet id that paho does not use, and the connection's reader answers
// for its PUBACK before paho sees it.
type session struct {
	o      Options
	client paho.Client
	conn   *conn
	lost   <-chan struct{} // paho has let go of everything
}

// Dial connects, and publishes the birth message. The session begins when the broker has acknowledged
// that: so it is known to take messages, and a link that is kicked at once has never come up.
func (u *Upstream) Dial(ctx context.Context, acks bridge.Acks) (bridge.Session, error) {
	o := u.o
	pc, c, lost, err := client(ctx, o, guard{}, acks, func(po *paho.ClientOptions, _ *conn) {
		po.SetOrderMatters(true)
		if o.Gateway != "" {
			po.SetBinaryWill(wire.StateTopic(o.Gateway), o.state(wire.StateOffline), 1, true)
		}
	})
	if err != nil {
		return nil, err
	}
	s := &session{o: o, client: pc, conn: c, lost: lost}
	if o.Gateway != "" {
		birth := pc.Publish(wire.StateTopic(o.Gateway), 1, true, o.state(wire.StateOnline))
		if err := s.await(ctx, birth); err != nil {
			_ = c.fail(errClosed)
			<-lost
			<-c.flushed
			return nil, fmt.Errorf("birth message to %s: %w", wire.StateTopic(o.Gateway), err)
		}
	}
	return s, nil
}

var disconnect = []byte{0xE0, 0}

// await waits for a token, the end of the connection or of ctx.
func (s *session) await(ctx context.Context, t paho.Token) error {
	select {
	case <-t.Done():
		if s.conn.reason() == nil {
			return t.Error()
		}
		return s.conn.reason()
	case <-s.conn.over:
		return s.conn.reason()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Send writes m into the connection's buffer. See bridge.Session.
func (s *session) Send(m bridge.Message) error {
	if err := checkTopic(m.Topic); err != nil {
		return bridge.Permanent(err)
	}
	if len(m.Payload) > s.o.MaxPayload {
		return bridge.Permanent(fmt.Errorf("payload has %d bytes, the upstream is sent at most %d", len(m.Payload), s.o.MaxPayload))
	}
	return s.conn.publish(&m)
}

func (s *session) Progress() uint64      { return s.conn.progress() }
func (s *session) Done() <-chan struct{} { return s.conn.over }
func (s *session) Err() error            { return s.conn.reason() }

// Close says goodbye if ctx leaves time for it: the death message, and a DISCONNECT that keeps the broker from
// sending it again as the will.
func (s *session) Close(ctx context.Context) {
	if ctx.Err() == nil && s.conn.reason() == nil {
		var err error
		if s.o.Gateway != "" {
			err = s.await(ctx, s.client.Publish(wire.StateTopic(s.o.Gateway), 1, true, s.o.state(wire.StateOffline)))
		}
		if err == nil {
			// paho's Disconnect would do, but it does not tell when its goroutines have ended;
			// a lost connection does.
			_, _ = s.conn.Write(disconnect)
			_ = s.conn.Close()
			<-s.conn.flushed
		}
	}
	_ = s.conn.fail(errClosed)
	<-s.lost
	<-s.conn.flushed
}
