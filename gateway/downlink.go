package gateway

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// downlink joins the broker's connections with the registry's presence and the queue's commands: a device is
// here, so its next command goes out; it answers, so the command's state moves. It implements broker.Watcher.
type downlink struct {
	registry *devices.Registry
	queue    *devices.Queue

	mu   sync.Mutex
	here map[*broker.Link]uint64 // presence token of each connection
}

func newDownlink(r *devices.Registry, q *devices.Queue) *downlink {
	return &downlink{registry: r, queue: q, here: map[*broker.Link]uint64{}}
}

// Connected implements broker.Watcher.
func (d *downlink) Connected(l *broker.Link) {
	info := l.Info()
	var id *devices.Identity
	if r, ok := l.Rights().(rights); ok {
		id = r.Identity
	}
	token := d.registry.Connected(l.Client(), devices.Connection{
		Identity: id, Alive: l.Alive, LastMessage: l.LastMessage,
		Address: info.Remote, Protocol: info.Protocol, Listener: info.Listener, TLS: info.TLS, Will: info.Will,
	})
	d.mu.Lock()
	d.here[l] = token
	d.mu.Unlock()
}

// Subscribed implements broker.Watcher.
func (d *downlink) Subscribed(l *broker.Link) { d.queue.Ready(l.Client(), link{l}) }

// Acked implements broker.Watcher.
func (d *downlink) Acked(l *broker.Link, token uint64, reason mqtt.Reason) {
	refused := ""
	if reason.Failed() {
		refused = fmt.Sprintf("the device's PUBACK says: %v", reason)
	}
	d.queue.Acked(l.Client(), link{l}, token, refused)
}

// Disconnected implements broker.Watcher.
func (d *downlink) Disconnected(l *broker.Link, cause string) {
	d.mu.Lock()
	token := d.here[l]
	delete(d.here, l)
	d.mu.Unlock()
	d.queue.Gone(l.Client(), link{l})
	d.registry.Disconnected(l.Client(), token, cause)
}

// link is a broker's connection as the queue sees it. Two of the same connection are equal.
type link struct{ *broker.Link }

// Send implements devices.Link: the command as MQTT carries it. Correlation data, response topic, expiry and content
// type reach MQTT 5 devices only; what all need is in the topic.
func (l link) Send(d *devices.Delivery) (uint16, error) {
	p := mqtt.Publish{
		QoS: 1, Dup: d.Dup,
		Topic:         []byte(wire.RequestTopic(d.Device, d.ID, d.Name)),
		Payload:       d.Payload,
		ContentType:   []byte(d.ContentType),
		ResponseTopic: []byte(wire.AnswerPrefix(d.Device, d.ID)),
		Correlation:   []byte(d.ID),
		HasExpiry:     true,
		Expiry:        uint32((max(d.Expiry, 0) + time.Second - 1) / time.Second),
	}
	id, err := l.Link.Send(&p, d.Token, d.PacketID)
	switch {
	case errors.Is(err, broker.ErrLinkGone):
		return 0, devices.ErrGone
	case errors.Is(err, broker.ErrTooLarge):
		return 0, fmt.Errorf("%w: %w", devices.ErrPacketTooLarge, err)
	}
	return id, err
}

// End implements devices.Link.
func (l link) End(reason string) { l.Link.End(mqtt.AdministrativeAction, reason) }

// answer hands what a device says of a command to the queue. taken is false if m is an ordinary message.
func (d *downlink) answer(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) (taken bool, err error) {
	device, id, kind, ok := wire.ParseAnswerTopic(m.Record.Topic)
	if !ok {
		return false, nil
	}
	if device != string(m.Record.Device) {
		id = "" // a role that lets it publish there does not make it that device: no command of its own is meant
	}
	contentType := ""
	if p := m.Record.Props; p != nil {
		contentType = strings.Clone(p.ContentType) // a view of the read buffer
	}
	return true, d.queue.Answer(string(m.Record.Device), id, devices.AnswerKind(kind), m.Record.Payload, contentType, ops, done, token)
}
