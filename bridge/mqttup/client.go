package mqttup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	paho "github.com/eclipse/paho.mqtt.golang"

	"holdfast/bridge"
)

// maxPublishes is how many Publish calls of a Client wait for their acknowledgement at once; more wait for their turn.
const maxPublishes = 4096

// Client is a connection of a program on the cloud's side: it subscribes, publishes, and mends itself. Many goroutines may
// use it.
type Client struct {
	maxPayload int
	slots      chan struct{}
	ended      chan struct{} // closed when nothing runs any more
	err        error         // of run; read after ended

	mu      sync.Mutex
	conn    *conn // nil: there is none, or it is not subscribed yet
	next    uint64
	waiting map[uint64]*publication // by token
}

type publication struct {
	message bridge.Message
	acked   chan struct{}
}

// Connect connects and subscribes to filters, if there are any, and stays connected until ctx ends, whatever happens to
// the network; join it with Wait. It returns when the subscription has been made for the first time. It tries as long
// as ctx lives, except where the broker refuses it or the filters.
//
// handler is called as by Subscribe. It must not wait for a Publish of the same client: while it is busy nothing is read.
func Connect(ctx context.Context, o Options, filters []string, handler func(topic string, payload []byte)) (*Client, error) {
	s, err := newSubscriber(o, filters)
	if err != nil {
		return nil, err
	}
	c := &Client{
		maxPayload: s.o.MaxPayload, slots: make(chan struct{}, maxPublishes), ended: make(chan struct{}), waiting: make(map[uint64]*publication),
	}
	up := make(chan struct{})
	opened := sync.OnceFunc(func() { close(up) })
	s.acks = c.acked
	s.take = func(*conn) func(paho.Message) {
		return func(m paho.Message) { handler(m.Topic(), m.Payload()) }
	}
	s.up = func(conn *conn) {
		c.opened(conn)
		opened()
	}
	s.down = c.lost
	s.failed = s.impatient("connection lost, trying again")
	go func() {
		c.err = s.run(ctx)
		close(c.ended)
	}()
	select {
	case <-up:
		return c, nil
	case <-c.ended:
		if c.err == nil {
			c.err = context.Cause(ctx)
		}
		return nil, c.err
	}
}

// Wait returns when the client has ended: nil after its ctx has, an error if the broker refuses the filters after all.
func (c *Client) Wait() error {
	<-c.ended
	return c.err
}

// Publish sends a message with QoS 1, not retained, and returns when the broker has acknowledged it. While there is no
// connection it waits for one; what was not acknowledged when a connection ended is sent again, so it may arrive twice.
// With an error it may have arrived, too: ctx ended, the client ended, or the message cannot be sent at all. payload
// must not change until Publish has returned.
func (c *Client) Publish(ctx context.Context, topic string, payload []byte) error {
	if err := checkTopic(topic); err != nil {
		return err
	}
	if len(payload) > c.maxPayload {
		return fmt.Errorf("publish to %s: payload has %d bytes, at most %d are sent", topic, len(payload), c.maxPayload)
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.ended:
		return errEnded
	}
	p := &publication{message: bridge.Message{Topic: topic, Payload: payload}, acked: make(chan struct{})}
	c.mu.Lock()
	c.next++
	p.message.Token = c.next
	c.waiting[p.message.Token] = p
	if c.conn != nil {
		_ = c.conn.publish(&p.message) // if that fails the connection has ended: the next one sends it
	}
	c.mu.Unlock()
	select {
	case <-p.acked:
		return nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, p.message.Token)
		c.mu.Unlock()
		return fmt.Errorf("publish to %s: not acknowledged: %w", topic, context.Cause(ctx))
	case <-c.ended:
		return errEnded
	}
}

var errEnded = errors.New("the client has ended")

func (c *Client) acked(token uint64, _ error) {
	c.mu.Lock()
	p := c.waiting[token]
	delete(c.waiting, token)
	c.mu.Unlock()
	if p != nil {
		close(p.acked)
	}
}

// opened sends again what no earlier connection had acknowledged, in its order.
func (c *Client) opened(conn *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = conn
	tokens := make([]uint64, 0, len(c.waiting))
	for token := range c.waiting {
		tokens = append(tokens, token)
	}
	slices.Sort(tokens)
	for _, token := range tokens {
		_ = conn.publish(&c.waiting[token].message)
	}
}

func (c *Client) lost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = nil
}
