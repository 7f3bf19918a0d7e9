package bridgetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
)

// Subject is an adapter under test with the far side it dials.
type Subject struct {
	Upstream bridge.Upstream
	// Arrived returns what has arrived at the far side and counts, in order. Topic, Payload and
	// Retain are looked at.
	Arrived func() []bridge.Message
	// HoldAcks makes the far side take messages without acknowledging them.
	HoldAcks func()
	// Cut makes the far side end the connection.
	Cut func()
	// Refuse makes the far side refuse connections.
	Refuse func()
	// Impossible are messages that can never be sent.
	Impossible []bridge.Message
}

// ackLog is what came back.
type ackLog struct {
	mu      sync.Mutex
	order   []uint64
	times   map[uint64]int
	errs    []error
	closed  bool
	late    int // after Close had returned
	changed chan struct{}
}

func newAckLog() *ackLog { return &ackLog{times: map[uint64]int{}, changed: make(chan struct{})} }

func (a *ackLog) put(token uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		a.late++
	}
	a.order = append(a.order, token)
	a.times[token]++
	if err != nil {
		a.errs = append(a.errs, err)
	}
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *ackLog) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.order)
}

// wait returns when n acks have come.
func (a *ackLog) wait(t *testing.T, n int) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		a.mu.Lock()
		have, changed := len(a.order), a.changed
		a.mu.Unlock()
		if have >= n {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("%d of %d acks after 20 s", have, n)
		}
	}
}

func dial(t *testing.T, s Subject, acks *ackLog) bridge.Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sess, err := s.Upstream.Dial(ctx, acks.put)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	return sess
}

// shut closes a session within a time, in order or not.
func shut(t *testing.T, sess bridge.Session, acks *ackLog, orderly bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if !orderly {
		cancel()
	}
	began := time.Now()
	sess.Close(ctx)
	acks.mu.Lock()
	acks.closed = true
	acks.mu.Unlock()
	if d := time.Since(began); d > 8*time.Second {
		t.Errorf("Close took %v", d)
	}
	select {
	case <-sess.Done():
	default:
		t.Errorf("Done is open after Close")
	}
}

func message(n int) bridge.Message {
	return bridge.Message{
		Token: uint64(n)<<16 | 2, Topic: fmt.Sprintf("dt/dev%d/t", n%7), Payload: fmt.Appendf(nil, "payload %d", n),
		Retain: n%5 == 0, Lane: "telemetry", Seq: uint64(n), Count: 1,
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// Suite is what every Upstream has to pass. subject makes a fresh one.
func Suite(t *testing.T, subject func(t *testing.T) Subject) {
	t.Run("arrives in order and is acked once", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		sess := dial(t, s, acks)
		const n, window = 20_000, 500
		for i := 1; i <= n; i++ {
			if i > window {
				acks.wait(t, i-window)
			}
			if err := sess.Send(message(i)); err != nil {
				t.Fatalf("send %d: %v", i, err)
			}
		}
		acks.wait(t, n)
		shut(t, sess, acks, true)
		arrived := s.Arrived()
		if len(arrived) != n {
			t.Fatalf("%d of %d arrived", len(arrived), n)
		}
		for i, m := range arrived {
			if want := message(i + 1); m.Topic != want.Topic || string(m.Payload) != string(want.Payload) || m.Retain != want.Retain {
				t.Fatalf("arrival %d is %q on %s, retain %v", i+1, m.Payload, m.Topic, m.Retain)
			}
		}
		for i := 1; i <= n; i++ {
			if k := acks.times[message(i).Token]; k != 1 {
				t.Fatalf("send %d was acked %d times", i, k)
			}
		}
		if len(acks.times) != n || len(acks.errs) > 0 {
			t.Errorf("%d tokens, errors %v", len(acks.times), acks.errs)
		}
		if acks.late > 0 {
			t.Errorf("%d acks after Close", acks.late)
		}
	})

	t.Run("payloads of all sizes", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		sess := dial(t, s, acks)
		sizes := []int{0, 1, 2, 100, 127, 128, 16383, 16384, 65535, 65536, 1 << 20}
		for i, size := range sizes {
			m := message(i + 1)
			m.Payload = []byte(strings.Repeat(string(rune('a'+i)), size))
			if err := sess.Send(m); err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
		}
		acks.wait(t, len(sizes))
		shut(t, sess, acks, true)
		for i, m := range s.Arrived() {
			if want := strings.Repeat(string(rune('a'+i)), sizes[i]); string(m.Payload) != want {
				t.Errorf("payload %d has %d bytes, want %d, or others", i, len(m.Payload), len(want))
			}
		}
	})

	t.Run("what can never be sent is permanent and ends nothing", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		sess := dial(t, s, acks)
		for _, m := range s.Impossible {
			if err := sess.Send(m); !bridge.IsPermanent(err) {
				t.Errorf("topic %.40q, %d bytes: %v is not permanent", m.Topic, len(m.Payload), err)
			}
		}
		if err := sess.Send(message(1)); err != nil {
			t.Errorf("send after that: %v", err)
		}
		acks.wait(t, 1)
		shut(t, sess, acks, true)
	})

	t.Run("a cut connection acks nothing", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		sess := dial(t, s, acks)
		s.HoldAcks()
		for i := 1; i <= 300; i++ {
			if err := sess.Send(message(i)); err != nil {
				t.Fatalf("send %d: %v", i, err)
			}
		}
		eventually(t, "messages arrive", func() bool { return len(s.Arrived()) == 300 })
		s.Cut()
		select {
		case <-sess.Done():
		case <-time.After(20 * time.Second):
			t.Fatal("the session does not notice")
		}
		if err := sess.Err(); !errors.Is(err, bridge.ErrPeerClosed) {
			t.Errorf("the session ended with %v", err)
		}
		if err := sess.Send(message(301)); err == nil || bridge.IsPermanent(err) {
			t.Errorf("send on the ended session: %v", err)
		}
		shut(t, sess, acks, false)
		if n := acks.count(); n != 0 {
			t.Errorf("%d acks of messages that were not acknowledged", n)
		}
	})

	t.Run("sending while the connection is cut neither hangs nor acks", func(t *testing.T) {
		for range 5 {
			s, acks := subject(t), newAckLog()
			sess := dial(t, s, acks)
			cut := make(chan struct{})
			go func() {
				defer close(cut)
				acks.wait(t, 200)
				s.Cut()
			}()
			sent := 0
			for i := 1; ; i++ {
				if err := sess.Send(message(i)); err != nil {
					break
				}
				if sent++; sent > 500+acks.count() {
					<-time.After(time.Millisecond)
				}
			}
			<-cut
			shut(t, sess, acks, false)
			arrived := len(s.Arrived())
			if n := acks.count(); n > arrived {
				t.Errorf("%d acks, %d arrived", n, arrived)
			}
			if acks.late > 0 {
				t.Errorf("%d acks after Close", acks.late)
			}
		}
	})

	t.Run("the next session begins anew", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		for round := range 4 {
			sess := dial(t, s, acks)
			if err := sess.Send(message(round + 1)); err != nil {
				t.Fatal(err)
			}
			acks.wait(t, round+1)
			if round%2 == 0 {
				s.Cut()
				<-sess.Done()
			}
			sess.Close(t.Context())
			sess.Close(t.Context()) // a second time does no harm
		}
	})

	t.Run("closing does not wait for acks", func(t *testing.T) {
		for _, orderly := range []bool{true, false} {
			s, acks := subject(t), newAckLog()
			sess := dial(t, s, acks)
			s.HoldAcks()
			for i := 1; i <= 100; i++ {
				if err := sess.Send(message(i)); err != nil {
					t.Fatal(err)
				}
			}
			shut(t, sess, acks, orderly)
			if n := acks.count(); n != 0 {
				t.Errorf("%d acks", n)
			}
		}
	})

	t.Run("progress moves with what is sent", func(t *testing.T) {
		s, acks := subject(t), newAckLog()
		sess := dial(t, s, acks)
		before := sess.Progress()
		m := message(1)
		m.Payload = make([]byte, 1<<20)
		if err := sess.Send(m); err != nil {
			t.Fatal(err)
		}
		acks.wait(t, 1)
		// The ack may be here before the write that it answers has returned.
		deadline := time.After(10 * time.Second)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for sess.Progress() == before {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("progress stays at %d", before)
			}
		}
		shut(t, sess, acks, true)
	})

	t.Run("a refused dial says so", func(t *testing.T) {
		s := subject(t)
		s.Refuse()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := s.Upstream.Dial(ctx, newAckLog().put); !errors.Is(err, bridge.ErrRefused) {
			t.Errorf("dial: %v", err)
		}
	})

	t.Run("a dial ends with its context", func(t *testing.T) {
		s := subject(t)
		s.HoldAcks()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		began := time.Now()
		sess, err := s.Upstream.Dial(ctx, newAckLog().put)
		if err == nil { // an upstream that needs no ack to be up
			sess.Close(ctx)
		}
		if d := time.Since(began); d > 8*time.Second {
			t.Errorf("dial took %v", d)
		}
		ended, end := context.WithCancel(t.Context())
		end()
		if sess, err := s.Upstream.Dial(ended, newAckLog().put); err == nil {
			sess.Close(ended)
			t.Errorf("dial with an ended context went through")
		}
	})
}
