package mqttup

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"holdfast/bridge"
	"holdfast/bridge/wire"
)

type packetOfPaho = packets.ControlPacket

// session is one paho client's life. Three steps, each a goroutine that takes all there is:
//
//	Send ─▶ queue ─▶ publish: paho's Publish ─▶ tokens ─▶ collect: waits for each in order ─▶ acks
type session struct {
	o      Options
	client paho.Client
	conn   *conn
	lost   <-chan struct{} // paho has let go of everything
	acks   bridge.Acks

	mu    sync.Mutex
	queue []bridge.Message
	wake  chan struct{}

	tokens chan sent
	over   atomic.Bool // nothing counts as acked any more
	cut    chan struct{}
	once   sync.Once
	joined sync.WaitGroup
}

// sent is a message whose PUBACK is awaited.
type sent struct {
	token paho.Token
	name  uint64
}

// Dial connects, and publishes the birth message. The session begins when the broker has acknowledged
// that: so it is known to take messages, and a link that is kicked at once has never come up.
func (u *Upstream) Dial(ctx context.Context, acks bridge.Acks) (bridge.Session, error) {
	o := u.o
	pc, c, lost, err := client(ctx, o, guard{}, func(po *paho.ClientOptions) {
		po.SetOrderMatters(true)
		if o.Gateway != "" {
			po.SetBinaryWill(wire.StateTopic(o.Gateway), o.state(wire.StateOffline), 1, true)
		}
	})
	if err != nil {
		return nil, err
	}
	s := &session{
		o: o, client: pc, conn: c, lost: lost, acks: acks,
		wake:   make(chan struct{}, 1),
		tokens: make(chan sent, 1024),
		cut:    make(chan struct{}),
	}
	if o.Gateway != "" {
		birth := pc.Publish(wire.StateTopic(o.Gateway), 1, true, o.state(wire.StateOnline))
		if err := s.await(ctx, birth); err != nil {
			s.end()
			<-lost
			<-c.flushed
			return nil, fmt.Errorf("birth message to %s: %w", wire.StateTopic(o.Gateway), err)
		}
	}
	s.joined.Go(s.publish)
	s.joined.Go(s.collect)
	return s, nil
}

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

// Send queues m. See bridge.Session.
func (s *session) Send(m bridge.Message) error {
	if err := checkTopic(m.Topic); err != nil {
		return bridge.Permanent(err)
	}
	if len(m.Payload) > s.o.MaxPayload {
		return bridge.Permanent(fmt.Errorf("payload has %d bytes, the upstream is sent at most %d", len(m.Payload), s.o.MaxPayload))
	}
	select {
	case <-s.conn.over:
		return s.Err()
	default:
	}
	s.mu.Lock()
	s.queue = append(s.queue, m)
	first := len(s.queue) == 1
	s.mu.Unlock()
	if first {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	return nil
}

// publish hands what is queued to paho.
func (s *session) publish() {
	defer close(s.tokens)
	var batch []bridge.Message
	for {
		select {
		case <-s.wake:
		case <-s.conn.over:
			s.end()
			return
		case <-s.cut:
			return
		}
		clear(batch)
		s.mu.Lock()
		batch, s.queue = s.queue, batch[:0]
		s.mu.Unlock()
		for i := range batch {
			m := &batch[i]
			t := s.client.Publish(m.Topic, 1, m.Retain, m.Payload)
			select {
			case s.tokens <- sent{t, m.Token}:
			case <-s.cut:
				return
			}
		}
	}
}

// collect reports acks in the order of the sends. A token that is done says nothing by itself: paho completes them
// when it gives up, too.
func (s *session) collect() {
	for {
		var next sent
		var ok bool
		select {
		case next, ok = <-s.tokens:
		case <-s.cut:
			return
		}
		if !ok {
			return
		}
		select {
		case <-next.token.Done():
		default:
			select {
			case <-next.token.Done():
			case <-s.conn.over:
				s.end()
				return
			case <-s.cut:
				return
			}
		}
		if err := next.token.Error(); err != nil {
			_ = s.conn.fail(fmt.Errorf("publish: %w", err))
			s.end()
			return
		}
		if s.over.Load() || s.conn.reason() != nil {
			s.end()
			return
		}
		s.acks(next.name, nil)
	}
}

// end makes the session count for nothing any more and frees whoever waits.
func (s *session) end() {
	s.once.Do(func() {
		s.over.Store(true)
		_ = s.conn.fail(errClosed)
		close(s.cut)
	})
}

func (s *session) Progress() uint64      { return s.conn.tcp.progress() }
func (s *session) Done() <-chan struct{} { return s.conn.over }
func (s *session) Err() error            { return s.conn.reason() }

// Close says goodbye if ctx leaves time for it: the death message, and a DISCONNECT that keeps the broker from
// sending it again as the will.
func (s *session) Close(ctx context.Context) {
	if ctx.Err() == nil && !s.over.Load() && s.conn.reason() == nil {
		var err error
		if s.o.Gateway != "" {
			err = s.await(ctx, s.client.Publish(wire.StateTopic(s.o.Gateway), 1, true, s.o.state(wire.StateOffline)))
		}
		if err == nil {
			// paho's Disconnect would do, but it does not tell when its goroutines have ended;
			// a lost connection does.
			_, _ = s.conn.Write([]byte{0xE0, 0})
			_ = s.conn.Close()
			<-s.conn.flushed
		}
	}
	s.end()
	s.joined.Wait()
	<-s.lost
	<-s.conn.flushed
}
