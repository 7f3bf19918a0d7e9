package broker

import (
	"time"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// message is a published message that outlives the buffer it was read into: for local
// subscribers, as a retained message, as a will. Nothing of it changes once it is made.
type message struct {
	device string // who published it
	topic  string
	qos    byte
	retain bool
	keep   bool // it sets or clears the retained message of its topic
	at     time.Time
	pub    mqtt.Publish // topic, payload and properties; the slices are the message's own
}

// newMessage copies p, whose topic may have come from an alias.
func newMessage(device string, topic []byte, p *mqtt.Publish, keep bool) *message {
	m := &message{device: device, qos: p.QoS, retain: p.Retain, keep: keep, at: time.Now()}
	room := make([]byte, 0, len(topic)+len(p.Payload)+len(p.ContentType)+len(p.ResponseTopic)+len(p.Correlation)+len(p.Props))
	own := func(b []byte) []byte {
		if b == nil {
			return nil
		}
		start := len(room)
		room = append(room, b...)
		return room[start:len(room):len(room)]
	}
	m.pub = mqtt.Publish{
		Topic: own(topic), Payload: own(p.Payload), UTF8: p.UTF8, HasExpiry: p.HasExpiry, Expiry: p.Expiry,
		ContentType: own(p.ContentType), ResponseTopic: own(p.ResponseTopic), Correlation: own(p.Correlation),
		Props: own(p.Props),
	}
	m.topic = view(m.pub.Topic)
	return m
}

// size is what m counts in memory limits.
func (m *message) size() int {
	if m == nil {
		return 0
	}
	p := &m.pub
	return 320 + len(m.topic) + len(p.Payload) + len(p.ContentType) + len(p.ResponseTopic) + len(p.Correlation) + len(p.Props)
}

// expired says whether m's expiry interval is over, and how many seconds are left of it.
func (m *message) expired(now time.Time) (left uint32, over bool) {
	if !m.pub.HasExpiry {
		return 0, false
	}
	waited := max(now.Sub(m.at), 0)
	total := time.Duration(m.pub.Expiry) * time.Second
	if waited >= total {
		return 0, true
	}
	return uint32((total - waited + time.Second - 1) / time.Second), false
}

// retainedOp is the row that m leaves behind, received at t. An empty payload clears (MQTT-3.3.1-6).
func (m *message) retainedOp(t int64) kv.Op {
	key := retainedKey(m.topic)
	if len(m.pub.Payload) == 0 {
		return kv.Op{Key: key, Delete: true}
	}
	return kv.Op{Key: key, Value: encodeRetained(t, m)}
}
