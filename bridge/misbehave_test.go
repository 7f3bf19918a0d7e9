package bridge_test

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// TestUpstreamsThatMisbehave runs a bridge against a broker that breaks the rules on its first connections and keeps them later.
// Whatever it does: nothing counts as delivered that it has not acknowledged, everything arrives, in order, and nothing is parked.
func TestUpstreamsThatMisbehave(t *testing.T) {
	const messages, bad = 300, 4
	puback := func(id uint16) []byte { return []byte{0x40, 2, byte(id >> 8), byte(id)} }
	type answer = bridgetest.Answer
	type published = bridgetest.Published
	always := func(a answer) func(int, published) answer { return func(int, published) answer { return a } }
	every := func(n int, a answer) func(int, published) answer {
		return func(k int, _ published) answer {
			if k%n == 0 {
				return a
			}
			return answer{}
		}
	}
	for _, c := range []struct {
		name string
		// publish answers the k-th PUBLISH of a bad connection; the first is the birth message, which is acknowledged.
		publish func(k int, p published) answer
		connect int // the CONNACK code of bad connections; below 0: closed without one
		connack answer
		stalls  bool // it takes time-outs: fewer of them
		forever bool // the bad ways never end, and need not
	}{
		{name: "takes and never acks", publish: always(answer{NoAck: true}), stalls: true},
		{name: "acks some and falls silent", publish: func(k int, _ published) answer { return answer{NoAck: k > 20} }, stalls: true},
		{name: "forgets one ack in ten", publish: every(10, answer{NoAck: true}), stalls: true},
		{name: "acks twice", publish: always(answer{Twice: true}), forever: true},
		{name: "acks out of order", publish: func(k int, _ published) answer { return answer{Late: k%4 != 0} }, stalls: true},
		{name: "acks what was never sent", forever: true, publish: func(k int, _ published) answer {
			return answer{Raw: append(append(puback(uint16(50_000+k)), puback(0)...), puback(7)...)}
		}},
		{name: "acks what comes next", stalls: true, publish: func(_ int, p published) answer { return answer{NoAck: true, Raw: puback(p.ID + 1)} }},
		{name: "acks what was acknowledged before", forever: true, publish: func(_ int, p published) answer { return answer{Raw: puback(p.ID - 1)} }},
		{name: "half of a PUBACK, then nothing", stalls: true, publish: func(int, published) answer { return answer{NoAck: true, Raw: []byte{0x40, 2, 0}} }},
		{name: "half of a PUBACK, then the end", publish: every(10, answer{NoAck: true, Raw: []byte{0x40, 2, 1}, Close: true})},
		{name: "garbage", publish: every(10, answer{Raw: []byte("HTTP/1.1 400 Bad Request\r\n\r\n")})},
		{name: "a PUBACK that is too long", publish: every(10, answer{Raw: []byte{0x40, 4, 1, 0, 0, 0}})},
		{name: "a second CONNACK", publish: every(10, answer{Raw: []byte{0x20, 2, 0, 0}}), forever: true},
		{name: "acks some and closes", publish: every(10, answer{Close: true})},
		{name: "acks some and resets", publish: every(10, answer{NoAck: true, Reset: true})},
		{name: "closes as soon as it is connected", connack: answer{Close: true}},
		{name: "closes the connection without a word", connect: -1},
		{name: "refuses: protocol version", connect: 1},
		{name: "refuses: client id", connect: 2},
		{name: "refuses: unavailable", connect: 3},
		{name: "refuses: user name", connect: 4},
		{name: "refuses: not authorized", connect: 5},
		{name: "refuses: a code that there is not", connect: 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			last := bad
			if c.stalls {
				last = 2
			}
			if c.forever {
				last = 1 << 30
			}
			var mu sync.Mutex
			acked := map[int]bool{}
			b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
				b.OnConnect = func(n int, _ bridgetest.Connect) int {
					if n <= last {
						return c.connect
					}
					return 0
				}
				b.AfterConnack = func(n int) answer {
					if n <= last {
						return c.connack
					}
					return answer{}
				}
				b.OnPublish = func(n, k int, p published) (a answer) {
					if n <= last && c.publish != nil && !strings.HasPrefix(p.Topic, "gw/") {
						a = c.publish(k, p)
					}
					if number, ok := strings.CutPrefix(string(p.Payload), "pump-"); ok && !a.NoAck {
						i, err := strconv.Atoi(number)
						if err != nil {
							t.Error(err)
						}
						mu.Lock()
						acked[i] = true
						mu.Unlock()
					}
					return a
				}
			})
			src := newSource(t.Errorf, "telemetry")
			// A broker that acks what it was not asked about says so of that, too: then its word is all there is.
			if c.name != "acks what comes next" {
				src.onResolve = func(lane string, number int) {
					mu.Lock()
					defer mu.Unlock()
					if lane == "telemetry" && !acked[number] {
						t.Errorf("message %d counts as delivered and was not acknowledged", number)
					}
				}
			}
			src.add("telemetry", numbered("pump", 1, messages)...)
			br := drain(t, src, bridge.Config{Format: bridge.FormatPassthrough, Window: 32, Tuning: bridge.Tuning{
				AckTimeout: 300 * time.Millisecond, ConnectTimeout: 2 * time.Second, BackoffMin: 2 * time.Millisecond, BackoffMax: 20 * time.Millisecond,
			}}, b.Addr())
			testkit.Eventually(t, 30*time.Second, "everything has an outcome", func() bool { return src.cursor("telemetry") == messages })
			if got := src.outcomes("telemetry"); got[spool.Delivered] != messages {
				t.Errorf("outcomes %v", got)
			}
			next := 1
			for _, m := range b.Messages() {
				n, err := strconv.Atoi(strings.TrimPrefix(string(m.Payload), "pump-"))
				switch {
				case err != nil:
					t.Errorf("%q arrived", m.Payload)
				case n > next:
					t.Fatalf("message %d arrived before %d", n, next)
				case n == next:
					next++
				}
			}
			if next != messages+1 {
				t.Errorf("%d of %d messages arrived", next-1, messages)
			}
			if st := br.Status(); !c.forever && len(b.Connects()) <= last {
				t.Errorf("%d connections, %+v: it did not misbehave long enough", len(b.Connects()), st)
			}
		})
	}
}

// TestKindsOfKicksBackOff: however the upstream ends it, a link that does nothing is tried less and less often, and each attempt is
// counted.
func TestKindsOfKicksBackOff(t *testing.T) {
	kick := func(after time.Duration, r *rig) {
		time.AfterFunc(after, func() { r.up.End(bridge.ErrPeerClosed) })
	}
	for _, c := range []struct {
		name string
		dial func(r *rig, n int) error
		send func(n int) bridgetest.Step
	}{
		{"accepts and closes", func(*rig, int) error { return fmt.Errorf("connect: %w", bridge.ErrPeerClosed) }, nil},
		{"refuses", func(*rig, int) error { return fmt.Errorf("%w: not authorized", bridge.ErrRefused) }, nil},
		{"never answers", func(*rig, int) error { return fmt.Errorf("%w: no answer", bridge.ErrStalled) }, nil},
		{"closes at once", func(r *rig, _ int) error { kick(time.Millisecond, r); return nil }, nil},
		{"closes after half a second", func(r *rig, _ int) error { kick(500*time.Millisecond, r); return nil }, func(int) bridgetest.Step { return bridgetest.Step{NoAck: true} }},
		{"acks some and closes", func(*rig, int) error { return nil }, func(n int) bridgetest.Step {
			if n == 5 {
				return bridgetest.Step{Lose: true, End: bridge.ErrPeerClosed}
			}
			return bridgetest.Step{}
		}},
		{"resets", func(*rig, int) error { return nil }, func(int) bridgetest.Step { return bridgetest.Step{Lose: true, End: errors.New("connection reset")} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
				r.up.OnDial = func(n int) error { return c.dial(r, n) }
				if c.send != nil {
					r.up.OnSend = func(_, n int, _ bridge.Message) bridgetest.Step { return c.send(n) }
				}
				r.src.add("telemetry", numbered("pump", 1, 2000)...)
				r.start()
				elapse(10 * time.Minute)
				dials := r.up.Dials()
				if n := len(dials); n < 15 || n > 90 { // pauses of 15 s on average
					t.Errorf("%d attempts in 10 minutes", n)
				}
				for i := 1; i < len(dials); i++ {
					if d := dials[i].Sub(dials[i-1]); d > 31*time.Second {
						t.Errorf("a pause of %v", d)
					}
				}
				if st := r.b.Status(); st.Attempts < len(dials)-1 {
					t.Errorf("%d attempts were made, status says %d", len(dials), st.Attempts)
				}
			})
		})
	}
}
