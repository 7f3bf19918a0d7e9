package broker_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
)

// limited starts a broker in which dev is held to l.
func limited(t *testing.T, l broker.Limits) *rig {
	t.Helper()
	return newRig(t, func(r *rig) {
		r.auth.limits = func(device string) broker.Limits {
			if device == "dev" {
				return l
			}
			return broker.Limits{}
		}
	})
}

func TestLimitsRefuseMQTT5(t *testing.T) {
	for _, x := range []struct {
		name   string
		limits broker.Limits
		taken  int // of 40 messages of 100 bytes, sent at once
	}{
		{"messages", broker.Limits{MessagesPerSecond: 20}, 20},
		{"at least ten", broker.Limits{MessagesPerSecond: 1}, 10},
		{"bytes", broker.Limits{BytesPerSecond: 1000}, 10},
		{"both", broker.Limits{MessagesPerSecond: 15, BytesPerSecond: 3000}, 15},
	} {
		for _, qos := range []byte{0, 1, 2} {
			t.Run(fmt.Sprintf("%s/qos=%d", x.name, qos), func(t *testing.T) {
				t.Parallel()
				r := limited(t, x.limits)
				p := r.client(mqtt.V5, "dev")
				const n = 40
				begin := time.Now()
				var all []byte
				for i := range n {
					m := mqtt.Publish{QoS: qos, ID: uint16(i + 1), Topic: []byte("t")}
					m.Payload = []byte(strings.Repeat("x", 100-mqtt.PublishSize(mqtt.V5, &m)))
					all = mqtt.AppendPublish(all, mqtt.V5, &m)
				}
				p.send(all)
				taken := 0
				for i := range n {
					if qos == 0 {
						break
					}
					switch reason := p.ack(map[byte]mqtt.Type{1: mqtt.TypePuback, 2: mqtt.TypePubrec}[qos], uint16(i+1)); reason {
					case mqtt.Success:
						taken++
					case mqtt.QuotaExceeded:
					default:
						t.Errorf("answered %v", reason)
					}
				}
				p.silent()
				if qos == 0 {
					eventually(t, "all of them", func() bool {
						return float64(len(r.in.messages()))+r.metric("publish_refused_total", "rate") == n
					})
					taken = len(r.in.messages())
				}
				late := int(time.Since(begin).Seconds()*float64(max(x.limits.MessagesPerSecond, int(x.limits.BytesPerSecond/100)))) + 1
				if taken < x.taken || taken > x.taken+late {
					t.Errorf("%d taken, want %d, and at most %d more for the time it took", taken, x.taken, late)
				}
				if got := r.metric("publish_refused_total", "rate"); int(got) != n-taken {
					t.Errorf("%v counted, want %d", got, n-taken)
				}
			})
		}
	}
}

// A client that does not heed the refusals is disconnected, whatever the QoS.
func TestLimitsDisconnectWhoGoesOn(t *testing.T) {
	for _, qos := range []byte{0, 1} {
		r := limited(t, broker.Limits{MessagesPerSecond: 5})
		p := r.client(mqtt.V5, "dev")
		refused := 0
		for i := range 1000 {
			m := mqtt.Publish{QoS: qos, ID: uint16(i + 1), Topic: []byte("t")}
			_, _ = p.nc.Write(mqtt.AppendPublish(nil, mqtt.V5, &m)) // fails at the end
			if qos == 0 && i < 999 {
				continue
			}
			f, err := p.next(patience)
			if err != nil {
				t.Fatal(err)
			}
			if mqtt.Type(f[0]>>4) != mqtt.TypePuback {
				d, err := mqtt.ParseDisconnect(f, mqtt.V5, mqtt.FromServer)
				if err != nil || d.Reason != mqtt.MessageRateTooHigh {
					t.Errorf("%v, %v", d, err)
				}
				break
			}
			if len(f) > 4 && f[4] == byte(mqtt.QuotaExceeded) {
				refused++
			}
		}
		if qos == 1 && (refused < 50 || refused > 150) {
			t.Errorf("%d refused before", refused)
		}
	}
}

// Who is disconnected in the middle of a burst has its acknowledgements first: a device that sends its backlog at once comes back with
// what is left, not with all of it.
func TestLimitsAcknowledgeBeforeTheEnd(t *testing.T) {
	r := limited(t, broker.Limits{MessagesPerSecond: 5})
	p := r.client(mqtt.V5, "dev")
	var burst []byte
	for i := range 250 { // less than the receive maximum
		burst = mqtt.AppendPublish(burst, mqtt.V5, &mqtt.Publish{QoS: 1, ID: uint16(i + 1), Topic: []byte("t")})
	}
	_, _ = p.nc.Write(burst) // may fail at the end
	taken := 0
	for {
		f, err := p.next(patience)
		if err != nil {
			t.Fatal(err)
		}
		if mqtt.Type(f[0]>>4) == mqtt.TypeDisconnect {
			if d, err := mqtt.ParseDisconnect(f, mqtt.V5, mqtt.FromServer); err != nil || d.Reason != mqtt.MessageRateTooHigh {
				t.Errorf("%v, %v", d, err)
			}
			break
		}
		if len(f) == 4 || f[4] == byte(mqtt.Success) {
			taken++
		}
	}
	if n := len(r.in.messages()); taken != n || n < 10 {
		t.Errorf("%d are acknowledged, %d were taken", taken, n)
	}
}

// A QoS 2 message that is stored is acknowledged when it is repeated, over the limit or not.
func TestLimitsSpareRepeats(t *testing.T) {
	r := limited(t, broker.Limits{MessagesPerSecond: 1})
	p := r.client(mqtt.V5, "dev")
	for i := range 10 {
		p.publish(2, uint16(i+1), "t", fmt.Sprint(i))
		p.success(mqtt.TypePubrec, uint16(i+1))
	}
	p.publish(2, 11, "t", "too many")
	if reason := p.ack(mqtt.TypePubrec, 11); reason != mqtt.QuotaExceeded {
		t.Errorf("PUBREC %v", reason)
	}
	p.publish(2, 10, "t", "9", dup)
	p.success(mqtt.TypePubrec, 10)
	if n := len(r.in.messages()); n != 10 {
		t.Errorf("%d stored", n)
	}
}

// MQTT 3.1.1 has no refusal: the client is slowed down, and everything is taken.
func TestLimitsSlowMQTT311(t *testing.T) {
	for _, x := range []struct {
		name   string
		limits broker.Limits
		size   int
	}{
		{"messages", broker.Limits{MessagesPerSecond: 40}, 50},
		{"bytes", broker.Limits{BytesPerSecond: 4000}, 100},
	} {
		for _, qos := range []byte{0, 1} {
			t.Run(fmt.Sprintf("%s/qos=%d", x.name, qos), func(t *testing.T) {
				t.Parallel()
				r := limited(t, x.limits)
				p := r.client(mqtt.V311, "dev")
				begin := time.Now()
				for i := range 80 { // 40 at once, and 40 in the second after
					p.publish(qos, uint16(i+1), "t", strings.Repeat("x", x.size-7))
				}
				for i := range 80 {
					if qos == 1 {
						p.success(mqtt.TypePuback, uint16(i+1))
					}
				}
				p.silent()
				if d := time.Since(begin); d < 900*time.Millisecond || d > 4*time.Second {
					t.Errorf("took %v", d)
				}
				eventually(t, "all of them", func() bool { return len(r.in.messages()) == 80 })
				if s := r.metric("publish_slowed_seconds_total"); s < 0.2 {
					t.Errorf("slowed for %v s", s)
				}
			})
		}
	}
}

// On a disk that is nearly full only who cannot be told is slowed down.
func TestSlowSlowsMQTT311(t *testing.T) {
	t.Parallel()
	for v, slowed := range map[mqtt.Version]bool{mqtt.V311: true, mqtt.V5: false} {
		var slow atomic.Bool
		r := newRig(t, func(r *rig) { r.cfg.Slow = slow.Load })
		p := r.client(v, "dev")
		send := func(from uint16) {
			for i := range uint16(10) {
				p.publish(1, from+i, "t", "x")
			}
			for i := range uint16(10) {
				p.success(mqtt.TypePuback, from+i)
			}
		}
		send(1)
		if s := r.metric("publish_slowed_seconds_total"); s > 0 {
			t.Errorf("version %v: slowed for %v s before it was asked for", v, s)
		}
		slow.Store(true)
		send(11)
		if s := r.metric("publish_slowed_seconds_total"); (s > 0.19) != slowed {
			t.Errorf("version %v: slowed for %v s", v, s)
		}
	}
}

// A pause is short against the keep alive, and a stop does not wait for it.
func TestPausesAreShort(t *testing.T) {
	t.Parallel()
	r := limited(t, broker.Limits{BytesPerSecond: 10})
	p := r.client(mqtt.V311, "dev", func(k *mqtt.Connect) { k.KeepAlive = 2 })
	p.publishDone(1, 1, "t", strings.Repeat("x", 1000)) // 100 s worth
	begin := time.Now()
	p.publishDone(1, 2, "t", "x")
	if d := time.Since(begin); d < 400*time.Millisecond || d > time.Second {
		t.Errorf("a pause of %v, want a quarter of the keep alive", d)
	}
	q := r.client(mqtt.V311, "dev") // no keep alive: 10 s
	p.closed(0)
	q.publishDone(1, 1, "t", strings.Repeat("x", 1000))
	q.publish(1, 2, "t", "x")
	eventually(t, "pause", func() bool { return r.metric("publish_slowed_seconds_total") > 5 })
	r.client(mqtt.V311, "dev").silent() // takes over at once
	q.closed(0)
	q = r.client(mqtt.V311, "dev")
	q.publishDone(1, 1, "t", strings.Repeat("x", 1000))
	q.publish(1, 2, "t", "x")
	eventually(t, "pause", func() bool { return r.metric("publish_slowed_seconds_total") > 15 })
	begin = time.Now()
	r.stop()
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("stop took %v", d)
	}
}

func TestRecheckSetsLimits(t *testing.T) {
	var most atomic.Int64
	r := newRig(t, func(r *rig) {
		r.auth.limits = func(string) broker.Limits { return broker.Limits{MessagesPerSecond: int(most.Load())} }
	})
	p := r.client(mqtt.V5, "dev")
	refused := func() (n int) {
		for i := range 30 {
			p.publish(1, uint16(i+1), "t", "")
			if p.ack(mqtt.TypePuback, uint16(i+1)) == mqtt.QuotaExceeded {
				n++
			}
		}
		return n
	}
	if n := refused(); n != 0 {
		t.Errorf("%d refused without a limit", n)
	}
	most.Store(1)
	r.b.Recheck()
	if n := refused(); n < 15 || n > 20 {
		t.Errorf("%d of 30 refused", n)
	}
	most.Store(0)
	r.b.Recheck("dev")
	if n := refused(); n != 0 {
		t.Errorf("%d refused when the limit was gone", n)
	}
}

// TestReadBuffersAreBounded has many clients send the beginnings of large packets: with too much of it they are refused, and who
// sends small packets is not.
func TestReadBuffersAreBounded(t *testing.T) {
	t.Parallel()
	const most = 1 << 20
	r := newRig(t, func(r *rig) { r.cfg.MaxReadBytes = most })
	small := r.client(mqtt.V5, "small")
	whole := mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("t"), Payload: make([]byte, 200_000)})
	var large []*peer
	for i := range 30 {
		p := r.client(mqtt.V5, fmt.Sprint("large", i))
		_, _ = p.nc.Write(whole[:150_000]) // some are ended meanwhile
		large = append(large, p)
	}
	eventually(t, "some are refused", func() bool { return r.metric("connections_ended_total", "protocol") > 0 })
	if n := r.metric("read_buffered_bytes"); n > 2*most {
		t.Errorf("read buffers hold %v bytes, more than %d", n, 2*most)
	}
	for i := range 100 {
		small.publishDone(1, uint16(i+1), "t", "hello")
	}
	for _, p := range large {
		p.nc.Close()
	}
	eventually(t, "the others are gone", func() bool { return r.b.Stats().Connections == 1 })
	small.publishDone(1, 1, "t", strings.Repeat("x", 200_000))
}
