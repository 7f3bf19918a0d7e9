package broker_test

import (
	"testing"

	"holdfast/internal/mqtt"
)

func TestSmoke(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev")
		p.publishDone(0, 0, "a/b", "zero")
		p.publishDone(1, 7, "a/b", "one")
		p.publishDone(2, 7, "a/b", "two")
		if got := join(r.in.payloads()); got != "zero one two" {
			t.Fatalf("stored %q", got)
		}
		p.silent()
		s := r.client(v, "sub")
		s.subscribe(1, mqtt.Subscription{Filter: "a/#", QoS: 2})
		p.publishDone(1, 9, "a/b", "hello")
		m := s.message()
		if string(m.Payload) != "hello" || m.QoS != 1 {
			t.Fatalf("%+v", m)
		}
		s.pub(mqtt.TypePuback, m.ID)
		s.silent()
	})
}
