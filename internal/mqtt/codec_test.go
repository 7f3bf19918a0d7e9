package mqtt_test

import (
	"testing"

	"holdfast/internal/mqtt"
)

func versions(t *testing.T, fn func(t *testing.T, v mqtt.Version)) {
	for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
		t.Run("version="+v.String(), func(t *testing.T) { fn(t, v) })
	}
}

func TestHotPathAllocatesNothing(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		in := &mqtt.Publish{
			QoS: 1, ID: 7, Topic: []byte("dt/ward/bed-1/vitals"), Payload: make([]byte, 256),
			HasExpiry: true, Expiry: 60, Correlation: []byte{1}, ContentType: []byte("application/json"),
			Props: mqtt.AppendUserProperty(nil, "a", "b"),
		}
		frame := mqtt.AppendPublish(nil, v, in)
		if len(frame) != mqtt.PublishSize(v, in) {
			t.Fatalf("PublishSize %d, frame has %d bytes", mqtt.PublishSize(v, in), len(frame))
		}
		var p mqtt.Publish
		var a mqtt.Ack
		buf := make([]byte, 0, 1024)
		acks := [][]byte{mqtt.AppendAck(nil, mqtt.TypePuback, 1, v, 0), mqtt.AppendAck(nil, mqtt.TypePubrel, 1, v, 0)}
		if n := testing.AllocsPerRun(100, func() {
			if err := mqtt.ParsePublish(frame, v, &p); err != nil {
				t.Fatal(err)
			}
			for _, ack := range acks {
				if err := mqtt.ParseAck(ack, v, &a); err != nil {
					t.Fatal(err)
				}
			}
			buf = mqtt.AppendPublish(buf[:0], v, &p)
			buf = mqtt.AppendAck(buf, mqtt.TypePubrec, 1, v, mqtt.QuotaExceeded)
			if _, _, _, _, ok, err := mqtt.PeekHeader(frame); !ok || err != nil {
				t.Fatal(ok, err)
			}
			if !mqtt.ValidTopic(p.Topic) || !mqtt.Match("dt/+/#", p.Topic) {
				t.Fatal("topic")
			}
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
