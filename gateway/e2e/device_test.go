package e2e_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"holdfast/internal/mqtt"
)

// device is one simulated device under the test's control, where the fleet of firmware-sim would decide too much by
// itself. One goroutine at a time.
type device struct {
	client *mqtt.Client
	next   uint16

	tls   *tls.Config           // nil: none
	from  string                // the address of its own, "": any; loopback has many
	heard func(p *mqtt.Publish) // what it is sent; nil: it does not care

	mu      sync.Mutex
	waiting map[uint16]chan *mqtt.Ack
}

func newDevice(t *testing.T, addr, id string, v mqtt.Version) *device {
	t.Helper()
	d := &device{waiting: map[uint16]chan *mqtt.Ack{}}
	if err := d.connect(t.Context(), addr, mqtt.Connect{Version: v, ClientID: id, CleanStart: true, KeepAlive: 60}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	return d
}

func (d *device) connect(ctx context.Context, addr string, c mqtt.Connect) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	o := mqtt.ClientOptions{Address: addr, TLS: d.tls, Connect: c, OnAck: d.onAck}
	if d.from != "" {
		o.Dialer = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(d.from)}}).DialContext
	}
	if d.heard != nil {
		o.OnMessage = func(_ *mqtt.Client, p *mqtt.Publish) { d.heard(p) }
	}
	var err error
	d.client, err = mqtt.Dial(ctx, o)
	return err
}

func (d *device) onAck(_ *mqtt.Client, a *mqtt.Ack) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w := d.waiting[a.ID]; w != nil {
		seen := *a
		select {
		case w <- &seen:
		default: // PUBREC and PUBCOMP of which only one is waited for
		}
	}
}

// publish sends one message and waits until it is acknowledged (QoS 2: until PUBCOMP).
func (d *device) publish(ctx context.Context, topic string, payload []byte, qos byte) error {
	return d.send(ctx, &mqtt.Publish{QoS: qos, Topic: []byte(topic), Payload: payload})
}

// send is publish for a message with more to it. It fills in the packet id.
func (d *device) send(ctx context.Context, p *mqtt.Publish) error {
	d.next = d.next%1000 + 1
	acks := make(chan *mqtt.Ack, 2)
	d.mu.Lock()
	d.waiting[d.next] = acks
	d.mu.Unlock()
	p.ID = d.next
	if err := d.client.Publish(p); err != nil {
		return err
	}
	for range p.QoS {
		select {
		case a := <-acks:
			if a.Reason.Failed() {
				return fmt.Errorf("refused: %v", a.Reason)
			}
		case <-d.client.Done():
			return fmt.Errorf("connection lost: %w", d.client.Err())
		case <-time.After(10 * time.Second):
			return fmt.Errorf("no acknowledgement of packet %d within 10 s", d.next)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (d *device) close() {
	d.client.Abort()
	<-d.client.Done()
}
