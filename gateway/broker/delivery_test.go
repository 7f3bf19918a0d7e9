package broker_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
)

func filter(f string, qos byte) mqtt.Subscription { return mqtt.Subscription{Filter: f, QoS: qos} }

// take reads n messages, answers them, and gives their payloads.
func (p *peer) take(n int) (payloads []string) {
	p.t.Helper()
	for range n {
		m := p.message()
		payloads = append(payloads, string(m.Payload))
		switch m.QoS {
		case 1:
			p.pub(mqtt.TypePuback, m.ID)
		case 2:
			id := m.ID
			p.pub(mqtt.TypePubrec, id)
			p.success(mqtt.TypePubrel, id)
			p.pub(mqtt.TypePubcomp, id)
		}
	}
	return payloads
}

func TestWhoGetsAMessage(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, x := range []struct {
			filter, topic string
			want          bool
		}{
			{"a/b", "a/b", true},
			{"a/b", "a", false},
			{"a/b", "a/b/c", false},
			{"A/b", "a/b", false},
			{"a/+", "a/b", true},
			{"a/+", "a", false},
			{"a/+", "a/", true},
			{"+", "a", true},
			{"+", "/a", false},
			{"+/+", "/a", true},
			{"/+", "/a", true},
			{"a/+/c", "a/b/c", true},
			{"a/+/c", "a//c", true},
			{"#", "a/b/c", true},
			{"a/#", "a/b/c", true},
			{"a/#", "a", true},
			{"a/#", "ab", false},
			{"a/b/#", "a/b", true},
			// mochi's index misses these two.
			{"a/+/#", "a/b", true},
			{"+/#", "a", true},
			{"a/+/#", "a", false},
			{"a/+/#", "a/b/c/d", true},
			{"#", "$x/a", false},
			{"+/a", "$x/a", false},
			{"$x/#", "$x/a", true},
			{"$x/a", "$x/a", true},
			{"+/#", "$x", false},
			// and gives these to wildcards.
			{"$share/g/#", "$x/a", false},
			{"$share/g/+/a", "$x/a", false},
			{"$share/g/a/#", "a", true},
			{"$share/g/a/+/#", "a/b", true},
			{"$share/g//a", "/a", true},
			{"é/+", "é/b", true},
		} {
			t.Run(x.filter+" and "+x.topic, func(t *testing.T) {
				r := newRig(t, nil)
				s := r.client(v, "sub")
				if got := s.subscribe(1, filter(x.filter, 1), filter("mark", 1)); got[0] != mqtt.GrantedQoS1 {
					t.Fatalf("SUBACK %v", got)
				}
				p := r.client(v, "pub")
				p.publishDone(1, 1, x.topic, "x")
				p.publishDone(1, 2, "mark", "mark")
				want := []string{"mark"}
				if x.want {
					want = []string{"x", "mark"}
				}
				if x.filter == "$share/g/#" { // shared and ordinary subscriptions give a copy each
					want = append(want, "mark")
				}
				if got := s.take(len(want)); join(got) != join(want) {
					t.Errorf("got %v, want %v", got, want)
				}
				s.silent()
			})
		}
	})
}

func TestOverlappingSubscriptionsGiveOneCopy(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "sub")
		s.subscribeAs(1, 7, filter("a/+", 0))
		s.subscribeAs(2, 8, filter("a/#", 2), filter("#", 1))
		s.subscribeAs(3, 0, filter("+/b", 1))
		p := r.client(v, "pub")
		p.publishDone(2, 1, "a/b", "x")
		m := s.message()
		slices.Sort(m.SubscriptionIDs)
		if m.QoS != 2 || v == mqtt.V5 && fmt.Sprint(m.SubscriptionIDs) != "[7 8]" {
			t.Errorf("QoS %d, identifiers %v", m.QoS, m.SubscriptionIDs)
		}
		s.silent()
	})
}

func TestNoLocal(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V5, "dev")
	p.subscribe(1, mqtt.Subscription{Filter: "a/+", NoLocal: true})
	p.publish(0, 0, "a/b", "own")
	p.silent()
	r.client(mqtt.V5, "other").publish(0, 0, "a/b", "theirs")
	if got := p.take(1); got[0] != "theirs" {
		t.Errorf("got %v", got)
	}
	// Another subscription without it matches too: that one delivers (mochi merges it away).
	p.subscribeAs(2, 9, filter("a/#", 0))
	p.publish(0, 0, "a/b", "own again")
	if m := p.message(); string(m.Payload) != "own again" || fmt.Sprint(m.SubscriptionIDs) != "[9]" {
		t.Errorf("%s %v", m.Payload, m.SubscriptionIDs)
	}
}

func TestRetainAsPublished(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		a, b := r.client(v, "a"), r.client(v, "b")
		a.subscribe(1, mqtt.Subscription{Filter: "t", RetainAsPublished: true})
		b.subscribe(1, filter("t", 0))
		p := r.client(v, "pub")
		p.publish(0, 0, "t", "x", retain)
		if m := a.message(); m.Retain != (v == mqtt.V5) {
			t.Errorf("asked for: RETAIN %v", m.Retain)
		}
		if m := b.message(); m.Retain {
			t.Error("not asked for, but RETAIN")
		}
		p.publish(0, 0, "t", "y")
		if m := a.message(); m.Retain {
			t.Error("RETAIN from nowhere")
		}
	})
}

func TestRetained(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "pub")
		p.publishDone(1, 1, "a", "A", retain)
		p.publishDone(2, 2, "a/b", "AB", retain)
		p.publishDone(0, 0, "$x/b", "XB", retain)
		p.publishDone(1, 3, "a/c", "old", retain)
		p.publishDone(1, 4, "a/c", "AC", retain)
		p.publishDone(1, 5, "a/d", "AD", retain)
		p.publishDone(1, 6, "a/d", "", retain) // cleared
		p.publishDone(1, 7, "a/e", "not retained")
		eventually(t, "fan-out", func() bool { return r.b.Stats().Retained == 4 })
		check := func(t *testing.T) {
			s := r.client(v, "sub")
			for i, x := range []struct{ filter, want string }{
				{"a/#", "A AB AC"},
				{"a", "A"},
				{"+", "A"},
				{"#", "A AB AC"},
				{"a/+", "AB AC"},
				{"+/b", "AB"},
				{"$x/+", "XB"},
				{"a/+/#", "AB AC"},
				{"$share/g/a/#", ""},
				{"a/d", ""},
				{"x/#", ""},
			} {
				s.subscribeAs(uint16(i+1), uint32(i+1), filter(x.filter, 1))
				want := strings.Fields(x.want)
				var got []string
				for range want {
					m := s.message()
					if !m.Retain || m.QoS > 1 {
						t.Errorf("%s: RETAIN %v, QoS %d", x.filter, m.Retain, m.QoS)
					}
					if v == mqtt.V5 && fmt.Sprint(m.SubscriptionIDs) != fmt.Sprint([]int{i + 1}) {
						t.Errorf("%s: identifiers %v", x.filter, m.SubscriptionIDs)
					}
					got = append(got, string(m.Payload))
					if m.QoS == 1 {
						s.pub(mqtt.TypePuback, m.ID)
					}
				}
				slices.Sort(got)
				if join(got) != x.want {
					t.Errorf("%s: got %v, want %s", x.filter, got, x.want)
				}
				s.silent()
			}
		}
		t.Run("now", check)
		r.restart()
		t.Run("after a restart", check)
	})
}

func TestRetainHandling(t *testing.T) {
	r := newRig(t, nil)
	first := r.client(mqtt.V5, "first")
	first.subscribe(1, filter("t", 0))
	p := r.client(mqtt.V5, "pub")
	p.publishDone(1, 1, "t", "x", retain)
	// It is kept, and passed on, shortly after it is acknowledged: who subscribes before that is over gets it once more as it passes.
	first.take(1)
	for _, x := range []struct {
		handling   byte
		new, again bool
	}{{0, true, true}, {1, true, false}, {2, false, false}} {
		s := r.client(mqtt.V5, fmt.Sprint("sub", x.handling))
		sub := mqtt.Subscription{Filter: "t", RetainHandling: x.handling}
		for i, want := range []bool{x.new, x.again} {
			s.subscribe(uint16(i+1), sub)
			if want {
				s.take(1)
			}
			s.silent()
		}
		// Gone and made again, it is new again.
		s.send(mqtt.AppendUnsubscribe(nil, mqtt.V5, &mqtt.Unsubscribe{ID: 3, Filters: []string{"t"}}))
		s.frame(mqtt.TypeUnsuback)
		s.subscribe(4, sub)
		if x.new {
			s.take(1)
		}
		s.silent()
	}
}

func TestRetainedMessagesExpire(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	p := r.client(mqtt.V5, "pub")
	p.publishDone(1, 1, "t", "short", retain, func(m *mqtt.Publish) { m.HasExpiry, m.Expiry = true, 1 })
	p.publishDone(1, 2, "u", "long", retain, func(m *mqtt.Publish) { m.HasExpiry, m.Expiry = true, 100 })
	// They are kept shortly after they are acknowledged: who subscribes in between gets them as they pass.
	eventually(t, "both are kept", func() bool { return r.b.Stats().Retained == 2 })
	s := r.client(mqtt.V5, "sub")
	begin := time.Now()
	for short := true; short; { // until none comes before the other
		s.send(mqtt.AppendSubscribe(nil, mqtt.V5, &mqtt.Subscribe{ID: 1, Filters: []mqtt.Subscription{filter("t", 0), filter("u", 0)}}))
		s.frame(mqtt.TypeSuback)
		if short = string(s.message().Payload) == "short"; short {
			s.message()
		}
		if time.Since(begin) > patience {
			t.Fatal("does not expire")
		}
	}
	if d := time.Since(begin); d < 500*time.Millisecond {
		t.Errorf("expired after %v", d)
	}
	s.subscribe(2, filter("t", 0)) // it may have expired on its way the last time
	eventually(t, "removal", func() bool { return r.b.Stats().Retained == 1 })
	r.restart()
	if n := r.b.Stats().Retained; n != 1 {
		t.Errorf("%d came back", n)
	}
	s = r.client(mqtt.V5, "sub")
	s.subscribe(1, filter("u", 0))
	if m := s.message(); !m.HasExpiry || m.Expiry > 100 || m.Expiry < 90 {
		t.Errorf("expiry %v %d", m.HasExpiry, m.Expiry)
	}
}

// Too many: still taken and delivered, but not kept; and those that are kept can be replaced.
func TestRetainedMessagesAreBounded(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.MaxRetained = 3 })
		p := r.client(v, "pub")
		for i := range 5 {
			p.publishDone(1, 1, fmt.Sprint("t", i), "x", retain)
			eventually(t, "fan-out", func() bool { return r.b.Stats().Retained == min(i+1, 3) })
		}
		p.publishDone(1, 1, "t1", "y", retain)
		s := r.client(v, "sub")
		s.subscribe(1, filter("t1", 0))
		if got := s.take(1); got[0] != "y" {
			t.Errorf("got %v", got)
		}
		r.counted(2, "retained_refused_total")
		if n := len(r.in.messages()); n != 6 {
			t.Errorf("%d stored", n)
		}
	})
}

// A value that is retained before a subscription is never delivered after a newer one.
func TestRetainedNeverOvertakesANewerMessage(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V311, "pub")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				p.publish(0, 0, "t", fmt.Sprintf("%09d", i), retain)
			}
		}
	}()
	for i := range 50 {
		s := r.client(mqtt.V311, fmt.Sprint("sub", i))
		s.subscribe(1, filter("t", 0))
		last := ""
		for range 20 {
			got := string(s.message().Payload)
			if got < last {
				t.Fatalf("%s after %s", got, last)
			}
			last = got
		}
		s.nc.Close()
	}
	close(stop)
	<-done
}

func TestSharedSubscriptionsTakeTurns(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		var members []*peer
		for i := range 3 {
			s := r.client(v, fmt.Sprint("m", i), keep)
			s.subscribeAs(1, 5, filter("$share/g/t/#", 1))
			members = append(members, s)
		}
		other := r.client(v, "other")
		other.subscribe(1, filter("$share/h/t/+", 1), filter("t/x", 0))
		p := r.client(v, "pub")
		for i := range 9 {
			p.publishDone(1, uint16(i+1), "t/x", fmt.Sprint(i))
		}
		var all []string
		for _, s := range members {
			got := s.take(3)
			all = append(all, got...)
			s.silent()
		}
		slices.Sort(all)
		if join(all) != join(numbers(9)) {
			t.Errorf("together they got %v", all)
		}
		other.take(18) // a copy for each: shared and ordinary subscriptions do not overlap
		other.silent()

		// One is offline: it gets nothing while another is there.
		members[0].nc.Close()
		members[1].nc.Close()
		eventually(t, "ends", func() bool { return r.b.Stats().Connections == 3 })
		for i := range 4 {
			p.publishDone(1, uint16(i+1), "t/x", fmt.Sprint(i))
		}
		if got := join(members[2].take(4)); got != "0 1 2 3" {
			t.Errorf("the one that is there got %s", got)
		}
		other.take(8)
		// All are: then one of them gets it when it comes back.
		members[2].nc.Close()
		eventually(t, "ends", func() bool { return r.b.Stats().Connections == 2 })
		p.publishDone(1, 1, "t/x", "late")
		n := 0
		for i := range 3 {
			s := r.client(v, fmt.Sprint("m", i), keep)
			for {
				f, err := s.next(50 * time.Millisecond)
				if err != nil {
					break
				}
				n++
				var m mqtt.Publish
				if err := mqtt.ParseDelivery(f, v, &m); err != nil || string(m.Payload) != "late" {
					t.Errorf("%v %s", err, m.Payload)
				}
			}
		}
		if n != 1 {
			t.Errorf("delivered %d times", n)
		}
	})
}

func TestOfflineSessionGetsItsMessagesInOrder(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "sub", keep)
		s.subscribe(1, filter("t", 2))
		s.nc.Close()
		eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
		p := r.client(v, "pub")
		for i := range 300 {
			p.publishDone(byte(1+i%2), uint16(i+1), "t", fmt.Sprint(i))
		}
		p.publishDone(0, 0, "t", "QoS 0 does not wait")
		r.counted(1, "deliveries_dropped_total", "offline")
		s = r.client(v, "sub", keep)
		var got []string
		for open := 0; len(got) < 300 || open > 0; {
			f, err := s.next(patience)
			if err != nil {
				t.Fatalf("after %d: %v", len(got), err)
			}
			if mqtt.Type(f[0]>>4) == mqtt.TypePubrel {
				s.send(mqtt.AppendAck(nil, mqtt.TypePubcomp, uint16(f[2])<<8|uint16(f[3]), v, mqtt.Success))
				open--
				continue
			}
			var m mqtt.Publish
			if err := mqtt.ParseDelivery(f, v, &m); err != nil {
				t.Fatal(err)
			}
			if m.Dup {
				t.Fatalf("%s was never sent, but has DUP", m.Payload)
			}
			got = append(got, string(m.Payload))
			if m.QoS == 1 {
				s.pub(mqtt.TypePuback, m.ID)
				continue
			}
			s.pub(mqtt.TypePubrec, m.ID)
			open++
		}
		if join(got) != join(numbers(300)) {
			t.Errorf("got %v", got)
		}
	})
}

// A device that loses its connection again and again gets every QoS 1 message, in order, and
// again only with DUP. Its own publishes use the same packet ids.
func TestDeliveryAcrossReconnects(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		{
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 1))
			r := newRig(t, func(r *rig) { r.cfg.MaxInflight = 10 })
			s := r.client(v, "sub", keep)
			s.subscribe(1, filter("t", 1))
			p := r.client(v, "pub")
			const total = 200
			for i := range total {
				p.publishDone(1, uint16(i+1), "t", fmt.Sprint(i))
			}
			var got []string
			seen := map[string]bool{}
			for round := 0; len(got) < total; round++ {
				if round > 0 {
					s.nc.Close()
					var a *mqtt.Connack
					if s, a = r.connect(v, "sub", keep); !a.SessionPresent {
						t.Fatal("the session is gone")
					}
				}
				for n := rng.IntN(30); n > 0 && len(got) < total; n-- {
					if rng.IntN(4) == 0 { // its own message, with an id that the other direction uses
						s.publish(1, uint16(rng.IntN(12)+1), "up", "")
					}
					f, err := s.next(50 * time.Millisecond)
					if errors.Is(err, os.ErrDeadlineExceeded) {
						break // all that may be in flight is, and was left unanswered
					}
					if err != nil {
						t.Fatalf("%d of %d: %v", len(got), total, err)
					}
					switch mqtt.Type(f[0] >> 4) {
					case mqtt.TypePublish:
						var m mqtt.Publish
						if err := mqtt.ParseDelivery(f, v, &m); err != nil {
							t.Fatal(err)
						}
						x := string(m.Payload)
						if seen[x] && !m.Dup {
							t.Fatalf("%s again without DUP", x)
						}
						if !seen[x] {
							seen[x] = true
							got = append(got, x)
						}
						if rng.IntN(5) > 0 {
							s.pub(mqtt.TypePuback, m.ID)
						}
					case mqtt.TypePuback:
					default:
						t.Fatalf("% x", f)
					}
				}
			}
			if join(got) != join(numbers(total)) {
				t.Errorf("got %v", got)
			}
			r.stop()
		}
	})
}

func TestDeliveryOfQoS2AcrossReconnects(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 2))
		r := newRig(t, func(r *rig) { r.cfg.MaxInflight = 10 })
		s := r.client(v, "sub", keep)
		s.subscribe(1, filter("t", 2))
		p := r.client(v, "pub")
		const total = 200
		for i := range total {
			p.publishDone(2, uint16(i+1), "t", fmt.Sprint(i))
		}
		var got []string
		open := map[uint16]bool{} // taken and not released: the device's half of the exchange
		done := 0
		for round := 0; done < total; round++ {
			if round > 0 {
				s.nc.Close()
				s = r.client(v, "sub", keep)
			}
			for n := rng.IntN(40); n > 0 && done < total; n-- {
				f, err := s.next(50 * time.Millisecond)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					break // all that may be in flight is, and was left unanswered
				}
				if err != nil {
					t.Fatalf("%d of %d: %v", len(got), total, err)
				}
				if mqtt.Type(f[0]>>4) == mqtt.TypePubrel {
					var a mqtt.Ack
					if err := mqtt.ParseAck(f, v, &a); err != nil || a.Reason != mqtt.Success {
						t.Fatal(err, a)
					}
					if open[a.ID] {
						delete(open, a.ID)
						done++
					}
					if rng.IntN(5) > 0 {
						s.pub(mqtt.TypePubcomp, a.ID)
					}
					continue
				}
				var m mqtt.Publish
				if err := mqtt.ParseDelivery(f, v, &m); err != nil {
					t.Fatal(err)
				}
				if open[m.ID] && !m.Dup {
					t.Fatalf("id %d is in use", m.ID)
				}
				if !open[m.ID] {
					open[m.ID] = true
					got = append(got, string(m.Payload))
				}
				if rng.IntN(5) > 0 {
					s.pub(mqtt.TypePubrec, m.ID)
				}
			}
		}
		if join(got) != join(numbers(total)) {
			t.Errorf("got %v", got)
		}
	})
}

func TestReceiveMaximumOfTheClient(t *testing.T) {
	r := newRig(t, nil)
	s := r.client(mqtt.V5, "sub", keep, func(k *mqtt.Connect) { k.ReceiveMaximum = 3 })
	s.subscribe(1, filter("t", 2))
	p := r.client(mqtt.V5, "pub")
	for i := range 40 {
		p.publishDone(byte(1+i%2), uint16(i+1), "t", fmt.Sprint(i))
	}
	check := func(first int) (ids []uint16) {
		for i := range 3 {
			m := s.message()
			if string(m.Payload) != fmt.Sprint(first+i) {
				t.Fatalf("got %s, want %d", m.Payload, first+i)
			}
			ids = append(ids, m.ID)
		}
		s.silent() // and not one more
		return ids
	}
	ids := check(0) // QoS 1, 2, 1
	s.pub(mqtt.TypePubrec, ids[1])
	s.success(mqtt.TypePubrel, ids[1])
	s.silent() // PUBREC frees nothing
	s.pub(mqtt.TypePubcomp, ids[1])
	if got := s.message(); string(got.Payload) != "3" {
		t.Fatalf("got %s", got.Payload)
	}
	s.silent()
	// A new connection has a new quota, and what is in flight comes first.
	s = r.client(mqtt.V5, "sub", keep, func(k *mqtt.Connect) { k.ReceiveMaximum = 2 })
	for _, want := range []string{"0", "2"} {
		if m := s.message(); string(m.Payload) != want || !m.Dup {
			t.Fatalf("got %s, DUP %v, want %s", m.Payload, m.Dup, want)
		}
	}
	s.silent()
	s.pub(mqtt.TypePuback, ids[0])
	if m := s.message(); string(m.Payload) != "3" || !m.Dup {
		t.Fatalf("got %s, DUP %v", m.Payload, m.Dup)
	}
	s.silent()
}

// Packet ids go round, past 0 and past those that are in use.
func TestPacketIDsGoRound(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "sub")
		s.subscribe(1, filter("t", 1))
		p := r.client(v, "pub")
		var ids []uint16
		for i := range 4 {
			p.publishDone(1, 1, "t", "x")
			ids = append(ids, s.message().ID)
			if i == 1 {
				broker.SetLastID(r.b, "sub", 65534)
			}
		}
		if want := []uint16{1, 2, 65535, 3}; !slices.Equal(ids, want) {
			t.Errorf("ids %v, want %v", ids, want)
		}
	})
}

func TestMaximumPacketSizeOfTheClient(t *testing.T) {
	r := newRig(t, nil)
	s := r.client(mqtt.V5, "sub", func(k *mqtt.Connect) { k.MaximumPacketSize = 100 })
	s.subscribe(1, filter("t", 1))
	p := r.client(mqtt.V5, "pub")
	p.publishDone(1, 1, "t", strings.Repeat("x", 100))
	p.publishDone(1, 2, "t", "small")
	if got := s.take(1); got[0] != "small" {
		t.Errorf("got %s", got)
	}
	r.counted(1, "deliveries_dropped_total", "too_large")
}

func TestFullQueueDropsTheNewest(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.MaxSessionQueue = 10 })
		s := r.client(v, "sub", keep)
		s.subscribe(1, filter("t", 1))
		s.nc.Close()
		eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
		p := r.client(v, "pub")
		for i := range 25 {
			p.publishDone(1, uint16(i+1), "t", fmt.Sprint(i))
		}
		r.counted(15, "deliveries_dropped_total", "queue_full")
		s = r.client(v, "sub", keep)
		if got := join(s.take(10)); got != join(numbers(10)) {
			t.Errorf("got %s", got)
		}
		s.silent()
		if n := r.metric("deliveries_queued"); n != 0 {
			t.Errorf("%v are said to be queued", n)
		}
	})
}

func TestQueueIsBoundedInBytes(t *testing.T) {
	r := newRig(t, func(r *rig) { r.cfg.MaxSessionQueueBytes = 100_000 })
	s := r.client(mqtt.V311, "sub", keep)
	s.subscribe(1, filter("t", 1))
	s.nc.Close()
	eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
	p := r.client(mqtt.V311, "pub")
	for i := range 20 {
		p.publishDone(1, uint16(i+1), "t", strings.Repeat("x", 10_000))
	}
	r.counted(11, "deliveries_dropped_total", "queue_full")
}

func TestAllQueuesTogetherAreBounded(t *testing.T) {
	r := newRig(t, func(r *rig) { r.cfg.MaxQueuedBytes = 50_000 })
	for i := range 3 {
		s := r.client(mqtt.V311, fmt.Sprint(i), keep)
		s.subscribe(1, filter("t", 1))
		s.nc.Close()
	}
	eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
	p := r.client(mqtt.V311, "pub")
	for i := range 3 {
		p.publishDone(1, uint16(i+1), "t", strings.Repeat("x", 10_000))
	}
	r.counted(5, "deliveries_dropped_total", "all_queues_full")
	for i := range 3 { // what was taken out makes room again
		s := r.client(mqtt.V311, fmt.Sprint(i), keep)
		for {
			f, err := s.next(50 * time.Millisecond)
			if err != nil {
				break
			}
			var m mqtt.Publish
			if err := mqtt.ParseDelivery(f, mqtt.V311, &m); err != nil {
				t.Fatal(err)
			}
			s.pub(mqtt.TypePuback, m.ID)
		}
	}
	p.publishDone(1, 9, "t", "room")
	r.client(mqtt.V311, "2", keep).take(1)
}

// TestSlowSubscribersTakeNothingFromOthers has sessions that nobody empties fill all the room that they may: who keeps up gets
// every message all the same, and so does one more who sleeps for a moment.
func TestSlowSubscribersTakeNothingFromOthers(t *testing.T) {
	const size, most = 1000, 100_000
	r := newRig(t, func(r *rig) { r.cfg.MaxQueuedBytes = most })
	for i := range 20 {
		s := r.client(mqtt.V5, fmt.Sprint("asleep", i), keep)
		s.subscribe(1, filter("t", 1))
		s.nc.Close()
	}
	deaf := r.client(mqtt.V5, "deaf") // takes its messages and acknowledges none
	deaf.subscribe(1, filter("t", 1))
	eventually(t, "they are gone", func() bool { return r.b.Stats().Connections == 1 })
	fast := r.client(mqtt.V311, "fast")
	fast.subscribe(1, filter("t", 0))
	p := r.client(mqtt.V5, "pub")
	for i := range 200 {
		p.publishDone(1, uint16(i+1), "t", fmt.Sprintf("%0*d", size, i))
		if got, want := fast.take(1)[0], fmt.Sprintf("%0*d", size, i); got != want {
			t.Fatalf("message %d: the subscriber that reads got %.20s…", i, got)
		}
		if n := r.metric("deliveries_queued_bytes"); n > most {
			t.Fatalf("%v bytes wait for all clients, more than %d", n, most)
		}
	}
	if r.metric("deliveries_dropped_total", "all_queues_full") == 0 {
		t.Error("nothing was dropped: the test shows nothing")
	}
	late := r.client(mqtt.V5, "late", keep)
	late.subscribe(1, filter("t", 1))
	late.nc.Close()
	eventually(t, "it is gone", func() bool { return r.b.Stats().Connections == 3 })
	p.publishDone(1, 1, "t", "for a late one")
	if got := r.client(mqtt.V5, "late", keep).take(1); got[0] != "for a late one" {
		t.Errorf("got %.20s", got)
	}
}

// TestUnacknowledgedDeliveriesAreBounded has a client read and acknowledge nothing: what it may hold in flight is bounded in bytes,
// counts with what waits, and is given back by its answers.
func TestUnacknowledgedDeliveriesAreBounded(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.MaxSessionQueueBytes = 35_000 })
		s := r.client(v, "sub")
		s.subscribe(1, filter("t", 2))
		p := r.client(v, "pub")
		var ids []uint16
		for i, qos := range []byte{1, 2, 1, 1, 1} { // three are sent, two wait
			p.publishDone(qos, uint16(i+1), "t", strings.Repeat("x", 10_000))
			if i < 3 {
				ids = append(ids, s.message().ID)
			}
		}
		s.silent()
		eventually(t, "all are counted", func() bool { return r.metric("deliveries_queued_bytes") > 50_000 })
		s.pub(mqtt.TypePuback, ids[0])
		ids = append(ids, s.message().ID)
		s.pub(mqtt.TypePubrec, ids[1])
		s.frame(mqtt.TypePubrel)
		ids = append(ids, s.message().ID)
		s.pub(mqtt.TypePubcomp, ids[1])
		for _, id := range ids[2:] {
			s.pub(mqtt.TypePuback, id)
		}
		r.counted(0, "deliveries_queued_bytes")
		p.publishDone(1, 9, "t", strings.Repeat("x", 10_000))
		s.message()
		s.nc.Close()
		r.counted(0, "deliveries_queued_bytes")
	})
}

// TestPeersThatReadNothingAreEnded has subscribers take nothing of what is written to them: together it is bounded, and they are
// ended before their own time for a write is over. Who reads is not disturbed.
func TestPeersThatReadNothingAreEnded(t *testing.T) {
	t.Parallel()
	const deaf = 20
	r := newRig(t, func(r *rig) {
		r.cfg.MaxWriteBytes, r.cfg.WriteTimeout = 2<<20, time.Minute
	})
	for i := range deaf {
		s := r.client(mqtt.V5, fmt.Sprint("deaf", i))
		s.subscribe(1, filter("t", 0))
		_ = s.nc.(*net.TCPConn).SetReadBuffer(4096)
	}
	fast := r.client(mqtt.V311, "fast")
	fast.subscribe(1, filter("t", 0))
	p := r.client(mqtt.V5, "pub")
	payload := strings.Repeat("x", 200_000)
	begin := time.Now()
	for i := 0; r.metric("connections_ended_total", "slow") < deaf; i++ {
		p.publishDone(1, uint16(i%1000+1), "t", payload)
		if got := fast.take(1)[0]; got != payload {
			t.Fatal("another message")
		}
		if n := r.metric("write_buffered_bytes"); n > deaf*300_000 {
			t.Fatalf("%v bytes are being written", n)
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%v of %d are ended after 20 s", r.metric("connections_ended_total", "slow"), deaf)
		}
	}
	fast.silent()
	r.counted(0, "write_buffered_bytes")
}

func TestMessagesExpireInTheQueue(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	s := r.client(mqtt.V5, "sub", keep)
	s.subscribe(1, filter("t", 1))
	s.nc.Close()
	eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
	p := r.client(mqtt.V5, "pub")
	expiry := func(s uint32) func(*mqtt.Publish) { return func(m *mqtt.Publish) { m.HasExpiry, m.Expiry = true, s } }
	p.publishDone(1, 1, "t", "at once", expiry(0))
	p.publishDone(1, 2, "t", "short", expiry(1))
	p.publishDone(1, 3, "t", "long", expiry(100))
	p.publishDone(1, 4, "t", "for ever")
	if f, err := p.next(1200 * time.Millisecond); err == nil {
		t.Fatalf("% x", f)
	}
	s = r.client(mqtt.V5, "sub", keep)
	m := s.message()
	if string(m.Payload) != "long" || !m.HasExpiry || m.Expiry > 99 || m.Expiry < 90 {
		t.Errorf("%s %d", m.Payload, m.Expiry)
	}
	if m := s.message(); string(m.Payload) != "for ever" || m.HasExpiry {
		t.Errorf("%s", m.Payload)
	}
}

// A subscriber that does not read loses its own messages and holds up nobody.
func TestSlowSubscriberHoldsUpNobody(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.WriteTimeout = time.Second })
		slow := r.client(v, "slow")
		slow.subscribe(1, filter("t", 0))
		quick := r.client(v, "quick")
		quick.subscribe(1, filter("t", 0))
		p := r.client(v, "pub")
		payload := strings.Repeat("x", 50_000)
		for i := range 400 {
			p.publishDone(1, uint16(i+1), "t", payload)
			quick.take(1)
		}
		if n := r.metric("deliveries_dropped_total", "queue_full"); n == 0 {
			t.Error("nothing was dropped: the test proves nothing")
		}
		r.counted(1, "connections_ended_total", "slow")
	})
}

func TestACLOfSubscriptions(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		var withdrawn atomic.Bool
		r := newRig(t, func(r *rig) {
			r.auth.subscribe = func(_, f string) bool { return !strings.HasPrefix(f, "secret") && (!withdrawn.Load() || f != "t") }
		})
		s := r.client(v, "sub")
		got := s.subscribe(1, filter("t", 1), filter("secret/x", 1), filter("$share/g/secret/y", 2), filter("u", 2))
		want := []mqtt.Reason{1, mqtt.NotAuthorized, mqtt.NotAuthorized, 2}
		if v == mqtt.V311 {
			want = []mqtt.Reason{1, 0x80, 0x80, 2}
		}
		if !slices.Equal(got, want) {
			t.Errorf("SUBACK %v, want %v", got, want)
		}
		p := r.client(v, "pub")
		p.publishDone(1, 1, "secret/x", "")
		p.publishDone(1, 2, "secret/y", "")
		p.publishDone(1, 3, "t", "x")
		if got := s.take(1); got[0] != "x" {
			t.Errorf("got %v", got)
		}
		// A right that is withdrawn holds at the next delivery, also of retained messages.
		withdrawn.Store(true)
		p.publishDone(1, 4, "t", "y", retain)
		p.publishDone(1, 5, "u", "z")
		if got := s.take(1); got[0] != "z" {
			t.Errorf("got %v", got)
		}
		s.subscribe(2, filter("#", 0))
		r.counted(2, "deliveries_dropped_total", "denied")
		s.silent()
	})
}

func TestSubackReasons(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.MaxSubscriptions = 3; r.cfg.MaxTopicLevels = 5 })
		s := r.client(v, "sub")
		got := s.subscribe(1, filter("a", 0), filter("$Share/g/a", 1), filter("1/2/3/4/5/6", 1), filter("b", 1), filter("c", 2), filter("d", 0), filter("a", 2))
		want := []mqtt.Reason{0, mqtt.TopicFilterInvalid, mqtt.TopicFilterInvalid, 1, 2, mqtt.QuotaExceeded, 2}
		if v == mqtt.V311 {
			want = []mqtt.Reason{0, 0x80, 0x80, 1, 2, 0x80, 2}
		}
		if !slices.Equal(got, want) {
			t.Errorf("SUBACK %v, want %v", got, want)
		}
		r.client(v, "other").subscribe(1, filter("x", 0))
		s.send(mqtt.AppendUnsubscribe(nil, v, &mqtt.Unsubscribe{ID: 2, Filters: []string{"b", "x", "none"}}))
		a, err := mqtt.ParseUnsuback(s.frame(mqtt.TypeUnsuback), v)
		if err != nil {
			t.Fatal(err)
		}
		codes := []mqtt.Reason{0, mqtt.NoSubscriptionExisted, mqtt.NoSubscriptionExisted}
		if v == mqtt.V5 && !slices.Equal(a.Reasons, codes) {
			t.Errorf("UNSUBACK %v, want %v", a.Reasons, codes)
		}
		s.publishDone(0, 0, "b", "gone")
		s.publishDone(0, 0, "c", "there")
		if got := s.take(1); got[0] != "there" {
			t.Errorf("got %v", got)
		}
	})
}

// Subscriptions survive the gateway, with their options; so does that there are none any more.
func TestSubscriptionsSurviveARestart(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "sub", keep)
		s.subscribeAs(1, 7, mqtt.Subscription{Filter: "a/+", QoS: 1, NoLocal: true, RetainAsPublished: true}, filter("b", 2))
		s.subscribeAs(2, 8, filter("$share/g/c", 1))
		s.subscribe(3, filter("d", 1))
		s.send(mqtt.AppendUnsubscribe(nil, v, &mqtt.Unsubscribe{ID: 4, Filters: []string{"d"}}))
		s.frame(mqtt.TypeUnsuback)
		gone := r.client(v, "gone") // a session without a future leaves nothing
		gone.subscribe(1, filter("a/b", 1))
		r.restart()
		if st := r.b.Stats(); st.Sessions != 1 || st.Subscriptions != 3 {
			t.Fatalf("restored %+v", st)
		}
		p := r.client(v, "pub")
		p.publishDone(1, 1, "a/x", "before", retain) // waits in the session
		s, a := r.connect(v, "sub", keep)
		if !a.SessionPresent {
			t.Fatal("no session")
		}
		m := s.message()
		if m.QoS != 1 || v == mqtt.V5 && (!m.Retain || fmt.Sprint(m.SubscriptionIDs) != "[7]") {
			t.Errorf("%+v", m)
		}
		s.pub(mqtt.TypePuback, m.ID)
		p.publishDone(2, 2, "b", "two")
		p.publishDone(1, 3, "d", "none")
		if got := s.take(1); got[0] != "two" {
			t.Errorf("got %s", got)
		}
		p.publishDone(2, 4, "c", "shared")
		if got := s.take(1); got[0] != "shared" {
			t.Errorf("got %s", got)
		}
		s.publishDone(1, 5, "a/x", "own")
		if v == mqtt.V311 {
			s.take(1)
		}
		s.silent()
	})
}

// An unknown PUBREC is let go on, as after a restart that lost what was in flight.
func TestPubrecOfAnUnknownID(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "sub")
		s.pub(mqtt.TypePubrec, 77)
		want := mqtt.Success
		if v == mqtt.V5 {
			want = mqtt.PacketIDNotFound
		}
		if got := s.ack(mqtt.TypePubrel, 77); got != want {
			t.Errorf("told %v, want %v", got, want)
		}
		s.pub(mqtt.TypePubcomp, 77)
		s.pub(mqtt.TypePuback, 78)
		s.silent()
	})
}

// What a client refuses is over, and does not come again.
func TestRefusedDelivery(t *testing.T) {
	r := newRig(t, nil)
	s := r.client(mqtt.V5, "sub", keep, func(k *mqtt.Connect) { k.ReceiveMaximum = 1 })
	s.subscribe(1, filter("t", 2))
	p := r.client(mqtt.V5, "pub")
	p.publishDone(1, 1, "t", "a")
	p.publishDone(2, 2, "t", "b")
	p.publishDone(2, 3, "t", "c")
	m := s.message()
	s.send(mqtt.AppendAck(nil, mqtt.TypePuback, m.ID, mqtt.V5, mqtt.NotAuthorized))
	m = s.message()
	s.send(mqtt.AppendAck(nil, mqtt.TypePubrec, m.ID, mqtt.V5, mqtt.QuotaExceeded))
	if got := s.take(1); got[0] != "c" {
		t.Errorf("got %v", got)
	}
	s.silent()
	r.client(mqtt.V5, "sub", keep).silent()
	r.counted(2, "deliveries_dropped_total", "refused")
}

func TestNobodyListens(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V311, "pub")
	p.publishDone(1, 1, "t", "before") // remembers that nobody listens
	s := r.client(mqtt.V311, "sub")
	s.subscribe(1, filter("t", 0))
	p.publishDone(1, 2, "t", "after")
	if got := s.take(1); got[0] != "after" {
		t.Errorf("got %v", got)
	}
}
