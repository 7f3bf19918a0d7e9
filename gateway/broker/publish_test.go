package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

func TestPublishIsStoredAndAcknowledged(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev")
		p.publishDone(0, 0, "a/b", "zero")
		p.publishDone(1, 7, "a/b", "one")
		p.publishDone(2, 7, "a/b", "two")
		p.publishDone(2, 7, "a/b", "two again")
		p.publishDone(1, 65535, "ü/+"[:3]+"x", "")
		p.silent()
		want := []stored{
			{device: "dev", topic: "a/b", payload: "zero"},
			{device: "dev", topic: "a/b", payload: "one", flags: 1},
			{device: "dev", topic: "a/b", payload: "two", flags: 2},
			{device: "dev", topic: "a/b", payload: "two again", flags: 2},
			{device: "dev", topic: "ü/x", flags: 1},
		}
		if got := fmt.Sprint(r.in.messages()); got != fmt.Sprint(want) {
			t.Errorf("stored %v, want %v", got, want)
		}
	})
}

// A message that was not stored is never acknowledged as if it were, whatever went wrong.
func TestRefusedPublishIsNeverASuccess(t *testing.T) {
	type refusal struct {
		name   string
		topic  string
		reason mqtt.Reason
		async  bool
	}
	for _, how := range []refusal{
		{name: "quota", reason: mqtt.QuotaExceeded},
		{name: "any error", reason: mqtt.UnspecifiedError},
		{name: "acl", topic: "secret/x", reason: mqtt.NotAuthorized},
		{name: "topic too deep", topic: strings.Repeat("/", 200), reason: mqtt.TopicNameInvalid},
		{name: "commit fails", async: true},
	} {
		for _, qos := range []byte{0, 1, 2} {
			t.Run(fmt.Sprintf("%s/qos=%d", how.name, qos), func(t *testing.T) {
				eachVersion(t, func(t *testing.T, v mqtt.Version) {
					var bad atomic.Bool
					r := newRig(t, func(r *rig) {
						r.auth.publish = func(_, topic string) bool { return !strings.HasPrefix(topic, "secret") }
						r.in.refuse = func(m *broker.Message) error {
							switch {
							case !strings.HasPrefix(string(m.Record.Payload), "bad"):
								return nil
							case how.name == "quota":
								return fmt.Errorf("lane telemetry is full: %w", broker.ErrQuota)
							case how.name == "any error":
								return errors.New("disk is on fire")
							}
							return nil
						}
						if how.async {
							r.in.deliver = func(done func(error)) {
								if bad.Load() {
									done(errors.New("disk is on fire"))
									return
								}
								done(nil)
							}
						}
					})
					topic := how.topic
					if topic == "" {
						topic = "a/b"
					}
					p := r.client(v, "dev")
					p.publishDone(1, 1, "a/b", "good")
					bad.Store(true)
					p.publish(1, 2, "a/b", "good as well")
					if how.async {
						p.closed(0)
						return
					}
					p.publish(qos, 3, topic, "bad")
					p.success(mqtt.TypePuback, 2)
					switch {
					case qos == 0:
						p.publishDone(1, 4, "a/b", "after")
					case v == mqtt.V5:
						if got := p.ack(map[byte]mqtt.Type{1: mqtt.TypePuback, 2: mqtt.TypePubrec}[qos], 3); got != how.reason {
							t.Errorf("told %v, want %v", got, how.reason)
						}
						// the id is free again, and a message with it is not taken for a repeat
						p.publishDone(qos, 3, "a/b", "after")
					default:
						p.closed(0)
						p = r.client(v, "dev")
						p.publishDone(qos, 3, "a/b", "after", dup)
					}
					if got := join(r.in.payloads()); got != "good good as well after" {
						t.Errorf("stored %q", got)
					}
				})
			})
		}
	}
}

func TestAcksComeInTheOrderOfThePublishes(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		r := newRig(t, func(r *rig) { r.in.deliver = randomly(seed) })
		p := r.client(v, "dev")
		var frames []byte
		for i := range 200 {
			m := mqtt.Publish{QoS: 1 + byte(i&1), ID: uint16(i + 1), Topic: []byte("t")}
			frames = mqtt.AppendPublish(frames, v, &m)
			if i%3 == 0 {
				frames = mqtt.AppendPublish(frames, v, &mqtt.Publish{Topic: []byte("t")})
			}
		}
		p.send(frames)
		for i := range 200 {
			p.success(map[int]mqtt.Type{0: mqtt.TypePuback, 1: mqtt.TypePubrec}[i&1], uint16(i+1))
		}
	})
}

// After a message that was not stored, nothing that came later is acknowledged: sent again, it
// would come after what it was sent before.
func TestNothingIsAcknowledgedAfterAFailedCommit(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		h := &held{}
		r := newRig(t, func(r *rig) { r.in.deliver = h.deliver })
		p := r.client(v, "dev")
		for i := range 3 {
			p.publish(1, uint16(i+1), "t", "x")
		}
		eventually(t, "hand-in", func() bool { return h.len() == 3 })
		dones := h.dones
		dones[2](nil)
		dones[1](nil)
		p.silent() // nothing is acknowledged out of turn
		dones[0](errors.New("disk is on fire"))
		p.closed(0)
	})
}

func TestMessagesAreDeliveredInTheOrderOfThePublishes(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.in.deliver = randomly(1) })
		s := r.client(v, "sub")
		s.subscribe(1, mqtt.Subscription{Filter: "#", QoS: 0})
		p := r.client(v, "dev")
		for i := range 100 {
			p.publish(byte(i%2), uint16(i%2*(i+1)), "t", fmt.Sprint(i))
		}
		for i := range 100 {
			if got := string(s.message().Payload); got != fmt.Sprint(i) {
				t.Fatalf("message %d is %s", i, got)
			}
		}
	})
}

func TestQoS2RepeatIsAnsweredAndNotStoredAgain(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		t.Run("after its commit", func(t *testing.T) {
			r := newRig(t, nil)
			p := r.client(v, "dev", keep)
			p.publish(2, 5, "t", "x")
			p.success(mqtt.TypePubrec, 5)
			p.publish(2, 5, "t", "x", dup)
			p.success(mqtt.TypePubrec, 5)
			p = r.client(v, "dev", keep)
			p.publish(2, 5, "t", "x", dup)
			p.success(mqtt.TypePubrec, 5)
			p.pub(mqtt.TypePubrel, 5)
			p.success(mqtt.TypePubcomp, 5)
			if got := join(r.in.payloads()); got != "x" {
				t.Errorf("stored %q", got)
			}
		})
		t.Run("during its commit", func(t *testing.T) {
			h := &held{}
			r := newRig(t, func(r *rig) { r.in.deliver = h.deliver })
			p := r.client(v, "dev", keep)
			p.publish(2, 5, "t", "x")
			p.publish(2, 5, "t", "x", dup)
			eventually(t, "hand-in", func() bool { return h.len() == 1 })
			q := r.client(v, "dev", keep) // takes the session over
			q.publish(2, 5, "t", "x", dup)
			r.counted(2, "publish_repeated_total")
			q.silent()
			h.release(nil, true)
			q.success(mqtt.TypePubrec, 5)
			q.pub(mqtt.TypePubrel, 5)
			q.success(mqtt.TypePubcomp, 5)
			if got := join(r.in.payloads()); got != "x" {
				t.Errorf("stored %q", got)
			}
		})
		t.Run("its commit fails", func(t *testing.T) {
			h := &held{}
			r := newRig(t, func(r *rig) { r.in.deliver = h.deliver })
			p := r.client(v, "dev", keep)
			p.publish(2, 5, "t", "x")
			eventually(t, "hand-in", func() bool { return h.len() == 1 })
			q := r.client(v, "dev", keep)
			q.publish(2, 5, "t", "x", dup)
			r.counted(1, "publish_repeated_total")
			h.release(errors.New("disk is on fire"), true)
			q.closed(0)
			q = r.client(v, "dev", keep)
			q.publishDone(2, 5, "t", "x", dup)
			if got := join(r.in.payloads()); got != "x" {
				t.Errorf("stored %q", got)
			}
		})
	})
}

// A QoS 2 message is stored exactly once whatever breaks in between: the connection, or the gateway.
func TestQoS2AcrossReconnectsAndRestarts(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newRig(t, nil)
		const total = 300
		// The device: what it still owes for each id, and in which state.
		type owed struct {
			payload  string
			released bool // PUBREC came
		}
		var order []uint16
		flight := map[uint16]*owed{}
		next := 0
		for round := 0; next < total || len(flight) > 0; round++ {
			if round > 1000 {
				t.Fatal("no end")
			}
			if round%10 == 9 {
				r.restart()
			}
			p, a := r.connect(v, "dev", keep)
			if a.SessionPresent != (round > 0) {
				t.Fatalf("round %d: session present %v", round, a.SessionPresent)
			}
			for _, id := range order {
				if o := flight[id]; o.released {
					p.pub(mqtt.TypePubrel, id)
				} else {
					p.publish(2, id, "t", o.payload, dup)
				}
			}
			for rng.IntN(20) > 0 && next < total && len(flight) < 50 {
				id := uint16(next%97 + 1)
				if flight[id] != nil {
					break
				}
				flight[id] = &owed{payload: fmt.Sprint(next)}
				order = append(order, id)
				p.publish(2, id, "t", fmt.Sprint(next))
				next++
			}
			// read some of the answers, then cut the line
			for n := rng.IntN(60); n > 0 && len(flight) > 0; n-- {
				f, err := p.next(patience)
				if err != nil {
					t.Fatal(err)
				}
				var a mqtt.Ack
				if err := mqtt.ParseAck(f, v, &a); err != nil {
					t.Fatal(err)
				}
				o := flight[a.ID]
				switch {
				case o == nil || a.Reason.Failed() && a.Type == mqtt.TypePubrec:
					t.Fatalf("answer %+v", a)
				case a.Type == mqtt.TypePubrec:
					o.released = true
					p.pub(mqtt.TypePubrel, a.ID)
				case a.Type == mqtt.TypePubcomp:
					delete(flight, a.ID)
					for i, id := range order {
						if id == a.ID {
							order = append(order[:i], order[i+1:]...)
							break
						}
					}
				}
			}
			p.nc.Close()
		}
		if got, want := join(r.in.payloads()), join(numbers(total)); got != want {
			t.Errorf("stored %s\nwant %s", got, want)
		}
	})
}

func TestPacketIDsOfAClearedSessionAreForgotten(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev", keep)
		p.publish(2, 5, "t", "old")
		p.success(mqtt.TypePubrec, 5)
		// A clean start while the session is kept: another message may have this id now.
		p = r.client(v, "dev", keep, func(k *mqtt.Connect) { k.CleanStart = true })
		p.nc.Close()
		r.restart()
		p = r.client(v, "dev", keep)
		p.publishDone(2, 5, "t", "new")
		if got := join(r.in.payloads()); got != "old new" {
			t.Errorf("stored %q", got)
		}
	})
}

// A crash can leave the id of a session that was cleared: it belongs to another era.
func TestPacketIDsOfAnotherEraAreForgotten(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		r.client(v, "dev", keep)
		r.stop()
		store, err := kv.Open("db", kv.Options{FS: r.fs, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		key, value := broker.StaleID("dev", 5)
		if err := store.ApplyWait([]kv.Op{{Key: key, Value: value}}); err != nil {
			t.Fatal(err)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.client(v, "dev", keep).publishDone(2, 5, "t", "new")
		if got := join(r.in.payloads()); got != "new" {
			t.Errorf("stored %q", got)
		}
		if _, found, err := r.store.Get(key); err != nil || found {
			t.Errorf("the row is still there: %v", err)
		}
	})
}

func TestPubrelOfAnUnknownID(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev")
		p.pub(mqtt.TypePubrel, 9)
		want := mqtt.Success
		if v == mqtt.V5 {
			want = mqtt.PacketIDNotFound
		}
		if got := p.ack(mqtt.TypePubcomp, 9); got != want {
			t.Errorf("told %v, want %v", got, want)
		}
	})
}

// The answer belongs to the connection that published, wherever the session is by then.
func TestTakeoverAndDisconnectDuringACommit(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, qos := range []byte{1, 2} {
			h := &held{}
			r := newRig(t, func(r *rig) { r.in.deliver = h.deliver })
			p := r.client(v, "dev", keep)
			p.publish(qos, 3, "t", "a")
			eventually(t, "hand-in", func() bool { return h.len() == 1 })
			q := r.client(v, "dev", keep)
			p.closed(mqtt.SessionTakenOver)
			q.publish(1, 3+uint16(qos), "t", "b")
			eventually(t, "hand-in", func() bool { return h.len() == 2 })
			x := r.client(v, "other")
			x.publish(qos, 1, "t", "c")
			eventually(t, "hand-in", func() bool { return h.len() == 3 })
			x.send(mqtt.AppendDisconnect(nil, v, mqtt.Success, ""))
			x.closed(0)
			h.release(nil, true)
			q.success(mqtt.TypePuback, 3+uint16(qos)) // and nothing before it
			q.silent()
			if got := join(r.in.payloads()); got != "a b c" {
				t.Errorf("stored %q", got)
			}
			eventually(t, "end of the other session", func() bool { return r.b.Stats().Sessions == 1 })
			r.stop()
		}
	})
}

// A QoS 2 message that is just being handed in when its session is taken over comes before
// whatever comes on the new connection: its repeat there is not stored, so its place is the old one.
func TestTakeoverWaitsForTheHandIn(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		inside, goOn := make(chan struct{}), make(chan struct{})
		r := newRig(t, func(r *rig) {
			r.in.refuse = func(m *broker.Message) error {
				if string(m.Record.Payload) == "first" {
					close(inside)
					<-goOn
				}
				return nil
			}
		})
		p := r.client(v, "dev", keep)
		p.publish(2, 5, "t", "first")
		<-inside
		q := r.dial(v)
		k := mqtt.Connect{Version: v, ClientID: "dev"}
		keep(&k)
		q.send(mqtt.AppendConnect(nil, &k))
		q.publish(2, 5, "t", "first", dup)
		q.publish(1, 6, "t", "later")
		p.closed(mqtt.SessionTakenOver) // it is told at once
		if f, err := q.next(100 * time.Millisecond); err == nil {
			t.Errorf("got % x while the old connection hands in", f)
		}
		close(goOn)
		q.connack()
		q.success(mqtt.TypePubrec, 5)
		q.success(mqtt.TypePuback, 6)
		if got := join(r.in.payloads()); got != "first later" {
			t.Errorf("stored %q", got)
		}
	})
}

// A client that floods and never reads its acks is held back and then closed; nobody else feels it.
func TestFloodIsHeldBack(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) {
			r.cfg.MaxUnackedBytes = 64 << 10
			r.cfg.WriteTimeout = 500 * time.Millisecond
		})
		p := r.client(v, "flood")
		frame := mqtt.AppendPublish(nil, v, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("t"), Payload: make([]byte, 16)})
		var many []byte
		for range 2000 {
			many = append(many, frame...)
		}
		stuck := make(chan struct{})
		go func() {
			defer close(stuck)
			_ = p.nc.SetWriteDeadline(time.Now().Add(20 * time.Second))
			for {
				if _, err := p.nc.Write(many); err != nil {
					return
				}
			}
		}()
		other := r.client(v, "calm")
		late := 0
		for i := range 200 {
			begin := time.Now()
			other.publishDone(1, uint16(i+1), "t", "x")
			if time.Since(begin) > time.Second {
				late++
			}
		}
		if late > 5 { // a machine may stand still for a moment
			t.Errorf("%d of 200 acknowledgements came after more than a second", late)
		}
		<-stuck // closed: 3.1.1 because it does not read, 5 because it was told a receive maximum
		why := map[mqtt.Version]string{mqtt.V311: "slow", mqtt.V5: "protocol"}[v]
		r.counted(1, "connections_ended_total", why)
	})
}

// While commits take long, what one client may hand in is bounded in bytes and in messages.
func TestUnackedBytesAreBounded(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		h := &held{}
		r := newRig(t, func(r *rig) {
			r.in.deliver = h.deliver
			r.cfg.MaxUnackedBytes = 10_000
			r.cfg.ReceiveMaximum = 50
		})
		p := r.client(v, "dev")
		var frames []byte
		for i := range 40 {
			frames = mqtt.AppendPublish(frames, v, &mqtt.Publish{QoS: 1, ID: uint16(i + 1), Topic: []byte("t"), Payload: make([]byte, 990)})
		}
		p.send(frames)
		eventually(t, "hand-in", func() bool { return h.len() == 10 })
		q := r.client(v, "other") // QoS 0 counts too, by messages
		frames = nil
		for range 80 {
			frames = mqtt.AppendPublish(frames, v, &mqtt.Publish{Topic: []byte("t")})
		}
		q.send(frames)
		eventually(t, "hand-in", func() bool { return h.len() == 60 })
		h.release(nil, true)
		for i := range 40 {
			p.success(mqtt.TypePuback, uint16(i+1))
		}
		q.silent()
		eventually(t, "all stored", func() bool { return len(r.in.messages()) == 120 })
	})
}

func TestReceiveMaximumOfTheGateway(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, qos := range []byte{1, 2} {
			h := &held{}
			r := newRig(t, func(r *rig) {
				r.in.deliver = h.deliver
				r.cfg.ReceiveMaximum = 5
			})
			p, a := r.connect(v, "dev")
			if v == mqtt.V5 && a.ReceiveMaximum != 5 {
				t.Fatalf("announced %d", a.ReceiveMaximum)
			}
			for i := range 6 {
				p.publish(qos, uint16(i+1), "t", "x")
			}
			if v == mqtt.V5 {
				p.closed(mqtt.ReceiveMaximumExceeded)
				h.release(nil, true)
			} else { // it can not know: it is slowed down
				eventually(t, "hand-in", func() bool { return h.len() == 5 })
				h.release(nil, true)
				for i := range 6 {
					p.success(map[byte]mqtt.Type{1: mqtt.TypePuback, 2: mqtt.TypePubrec}[qos], uint16(i+1))
				}
			}
			r.stop()
		}
	})
}

// QoS 2 counts until PUBCOMP.
func TestReceiveMaximumCountsUnreleasedMessages(t *testing.T) {
	r := newRig(t, func(r *rig) { r.cfg.ReceiveMaximum = 3 })
	p := r.client(mqtt.V5, "dev")
	for i := range 20 { // never more than three at once
		for k := range 3 {
			p.publish(2, uint16(k+1), "t", fmt.Sprint(i))
		}
		for k := range 3 {
			p.success(mqtt.TypePubrec, uint16(k+1))
		}
		p.publish(2, 1, "t", fmt.Sprint(i), dup) // a repeat does not count
		p.success(mqtt.TypePubrec, 1)
		for k := range 3 {
			p.pub(mqtt.TypePubrel, uint16(k+1))
			p.success(mqtt.TypePubcomp, uint16(k+1))
		}
	}
	for k := range 3 {
		p.publish(2, uint16(k+1), "t", "")
		p.success(mqtt.TypePubrec, uint16(k+1))
	}
	p.publish(1, 4, "t", "one too many")
	p.closed(mqtt.ReceiveMaximumExceeded)
}

// A 3.1.1 client that never releases is not slowed down, since its PUBREL must get through,
// but it can not go on for ever.
func TestUnreleasedIDsAreBounded(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V311, "dev")
	for i := range 4096 {
		p.publish(2, uint16(i+1), "t", "")
		p.success(mqtt.TypePubrec, uint16(i+1))
	}
	p.publish(2, 5000, "t", "")
	p.closed(0)
}

func TestTopicAliases(t *testing.T) {
	alias := func(a uint16) func(*mqtt.Publish) { return func(m *mqtt.Publish) { m.Alias = a } }
	start := func(t *testing.T) (*rig, *peer) {
		r := newRig(t, func(r *rig) { r.cfg.TopicAliasMaximum = 4 })
		p, a := r.connect(mqtt.V5, "dev", keep)
		if a.TopicAliasMaximum != 4 {
			t.Fatalf("announced %d", a.TopicAliasMaximum)
		}
		return r, p
	}
	t.Run("resolved", func(t *testing.T) {
		r, p := start(t)
		p.publish(1, 1, "one", "a", alias(1))
		p.publish(1, 2, "two", "b", alias(4))
		p.publish(1, 3, "", "c", alias(1))
		p.publish(1, 4, "three", "d", alias(1))
		p.publish(1, 5, "", "e", alias(1))
		p.publish(1, 6, "", "f", alias(4))
		for i := range 6 {
			p.success(mqtt.TypePuback, uint16(i+1))
		}
		got := ""
		for _, m := range r.in.messages() {
			got += m.topic + "=" + m.payload + " "
			if m.props != "" {
				t.Errorf("properties %s", m.props)
			}
		}
		if got != "one=a two=b one=c three=d three=e two=f " {
			t.Errorf("stored %s", got)
		}
	})
	t.Run("end with the connection", func(t *testing.T) {
		r, p := start(t)
		p.publishDone(1, 1, "one", "a", alias(1))
		p = r.client(mqtt.V5, "dev", keep)
		p.publish(1, 2, "", "b", alias(1))
		p.closed(mqtt.ProtocolError)
	})
	t.Run("above the maximum", func(t *testing.T) {
		_, p := start(t)
		p.publish(1, 1, "one", "a", alias(5))
		p.closed(mqtt.TopicAliasInvalid)
	})
	t.Run("never set", func(t *testing.T) {
		_, p := start(t)
		p.publish(1, 1, "", "a", alias(2))
		p.closed(mqtt.ProtocolError)
	})
	t.Run("acl sees the topic", func(t *testing.T) {
		r, p := start(t)
		r.auth.publish = func(_, topic string) bool { return topic != "secret" }
		p.publish(1, 1, "secret", "a", alias(2))
		if got := p.ack(mqtt.TypePuback, 1); got != mqtt.NotAuthorized {
			t.Errorf("told %v", got)
		}
		p.publish(1, 2, "", "a", alias(2))
		if got := p.ack(mqtt.TypePuback, 2); got != mqtt.NotAuthorized {
			t.Errorf("told %v", got)
		}
	})
}

func everyProperty(m *mqtt.Publish) {
	m.UTF8, m.HasExpiry, m.Expiry = true, true, 60
	m.ContentType, m.ResponseTopic, m.Correlation = []byte("text/plain"), []byte("re/ply"), []byte{0, 1}
	m.Props = mqtt.AppendUserProperty(mqtt.AppendUserProperty(nil, "k", "v"), "k", "w")
}

func TestPropertiesReachTheRecordAndTheSubscriber(t *testing.T) {
	r := newRig(t, nil)
	s := r.client(mqtt.V5, "sub")
	s.subscribe(1, mqtt.Subscription{Filter: "#", QoS: 1})
	old := r.client(mqtt.V311, "old")
	old.subscribe(1, mqtt.Subscription{Filter: "#", QoS: 1})
	p := r.client(mqtt.V5, "dev")
	p.publishDone(1, 1, "t", "hello", everyProperty)
	want := "{ContentType:text/plain ResponseTopic:re/ply Correlation:[0 1] User:[[k v] [k w]] UTF8:true Expiry:60 Upstream:}"
	if got := r.in.messages()[0].props; got != want {
		t.Errorf("record has %s, want %s", got, want)
	}
	m := s.message()
	user := ""
	for k, v := range m.Props.User() {
		user += string(k) + "=" + string(v) + " "
	}
	if !m.UTF8 || !m.HasExpiry || m.Expiry > 60 || m.Expiry < 50 || string(m.ContentType) != "text/plain" ||
		string(m.ResponseTopic) != "re/ply" || string(m.Correlation) != "\x00\x01" || user != "k=v k=w " {
		t.Errorf("delivered %+v, user %s", m, user)
	}
	if got := string(old.message().Payload); got != "hello" {
		t.Errorf("3.1.1 got %q", got)
	}
}

// The broker's share of a QoS 1 publish costs no allocation: that is what keeps the collector
// off the back of a small box. The rest of what is counted here is of the whole process.
func TestPublishAllocatesNothing(t *testing.T) {
	eachVersionInTurn(t, func(t *testing.T, v mqtt.Version) {
		store, err := kv.Open("db", kv.Options{FS: vfs.NewMem(), Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		cfg := broker.Config{Listeners: []broker.Listener{{Name: "lan", Protocol: "mqtt", Address: "127.0.0.1:0"}}}
		b, err := broker.New(cfg, store, voidIntake{}, &allow{}, nil, quiet, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Listen(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error)
		go func() { ended <- b.Run(ctx) }()
		defer func() { cancel(); <-ended }()
		addr := b.Addrs()[0].String()
		const n = 20_000
		if err := flood(addr, "warm", v, 1000, 200, 256); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if err := flood(addr, "dev", v, n, 200, 256); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		if mallocs := float64(after.Mallocs-before.Mallocs) / n; mallocs > 0.2 {
			t.Errorf("%.2f allocations for each message", mallocs)
		}
	})
}
