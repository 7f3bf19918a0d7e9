package mqttup

import (
	"context"
	"fmt"
	"sync"

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

	queue  handover[bridge.Message]
	tokens handover[sent]
	joined sync.WaitGroup
}

// handover passes things from one goroutine to another, as many as there are at once. It has no
// bound of its own: the bridge's window is one.
type handover[T any] struct {
	mu    sync.Mutex
	items []T
	wake  chan struct{} // has a token if items is not empty
}

func (h *handover[T]) put(v T) {
	h.mu.Lock()
	h.items = append(h.items, v)
	first := len(h.items) == 1
	h.mu.Unlock()
	if first {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

// take returns what there is, and gives used, from which all was taken, to be filled again.
func (h *handover[T]) take(used []T) []T {
	clear(used)
	h.mu.Lock()
	defer h.mu.Unlock()
	items := h.items
	h.items = used[:0]
	return items
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
		queue:  handover[bridge.Message]{wake: make(chan struct{}, 1)},
		tokens: handover[sent]{wake: make(chan struct{}, 1)},
	}
	if o.Gateway != "" {
		birth := pc.Publish(wire.StateTopic(o.Gateway), 1, true, o.state(wire.StateOnline))
		if err := s.await(ctx, birth); err != nil {
			_ = c.fail(errClosed)
			<-lost
			<-c.flushed
			return nil, fmt.Errorf("birth message to %s: %w", wire.StateTopic(o.Gateway), err)
		}
	}
	s.joined.Go(s.publish)
	s.joined.Go(s.collect)
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
	s.queue.put(m)
	return nil
}

// publish hands what is queued to paho.
func (s *session) publish() {
	var batch []bridge.Message
	for {
		select {
		case <-s.queue.wake:
		case <-s.conn.over:
			return
		}
		batch = s.queue.take(batch)
		for i := range batch {
			m := &batch[i]
			s.tokens.put(sent{s.client.Publish(m.Topic, 1, m.Retain, m.Payload), m.Token})
			m.Payload = nil // it can be large, and batch lives until there is more
			select {
			case <-s.conn.over:
				return
			default:
			}
		}
	}
}

// collect reports acks in the order of the sends. A token that is done says nothing by itself: paho completes them
// when it gives up, too.
func (s *session) collect() {
	var batch []sent
	for {
		select {
		case <-s.tokens.wake:
		case <-s.conn.over:
			return
		}
		batch = s.tokens.take(batch)
		for i := range batch {
			if err := s.puback(batch[i].token); err != nil {
				_ = s.conn.fail(err)
				return
			}
			s.acks(batch[i].name, nil)
		}
	}
}

// puback waits until the broker has acknowledged a message. nil means that it has, and that the
// connection on which it did was open when we looked.
func (s *session) puback(t paho.Token) error {
	select {
	case <-t.Done():
	default:
		select {
		case <-t.Done():
		case <-s.conn.over:
		}
	}
	if err := s.conn.reason(); err != nil {
		return err
	}
	if err := t.Error(); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
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
	s.joined.Wait()
	<-s.lost
	<-s.conn.flushed
}
