// Package bridgetest holds what tests of bridges and upstreams share: an upstream that fails on
// demand, an MQTT broker that follows a script, and the suite that every adapter passes.
package bridgetest

import (
	"context"
	"errors"
	"sync"
	"time"

	"holdfast/bridge"
)

// Step is what an Upstream does with one send. The zero Step takes it and acks it at once.
type Step struct {
	SendErr error         // Send returns it; nothing arrives
	Lose    bool          // it does not arrive, and is not acked
	NoAck   bool          // it arrives and is not acked
	AckErr  error         // the ack's error; it does not arrive if that is permanent
	Delay   time.Duration // of the ack
	Twice   bool          // it is acked twice
	End     error         // the session ends after this send; its ack, if there is one, comes first
	Take    time.Duration // how long the link is busy with it: bytes over rate, say
}

// Upstream is an upstream in memory. It does what its scripts say; without scripts it takes everything.
// It works in a synctest bubble.
type Upstream struct {
	// OnDial may refuse the n-th dial (from 1).
	OnDial func(n int) error
	// OnSend tells what becomes of the n-th send (from 1) of the dial-th session.
	OnSend func(dial, n int, m bridge.Message) Step

	mu      sync.Mutex
	dials   []time.Time
	arrived []bridge.Message
	acked   map[uint64]bool
	byes    int
	open    int
	changed chan struct{}
	last    *session
}

// NewUpstream makes an upstream that takes everything.
func NewUpstream() *Upstream {
	return &Upstream{acked: map[uint64]bool{}, changed: make(chan struct{})}
}

// Arrived returns what has arrived so far, in order.
func (u *Upstream) Arrived() []bridge.Message {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]bridge.Message(nil), u.arrived...)
}

// Acked tells whether an ack without error was given for the token.
func (u *Upstream) Acked(token uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.acked[token]
}

// Dials returns when dials were made.
func (u *Upstream) Dials() []time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]time.Time(nil), u.dials...)
}

// Goodbyes is how many sessions were closed in order.
func (u *Upstream) Goodbyes() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.byes
}

// Open is how many sessions are open: never more than one.
func (u *Upstream) Open() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.open
}

// End ends the present session, if there is one.
func (u *Upstream) End(err error) {
	u.mu.Lock()
	s := u.last
	u.mu.Unlock()
	if s != nil {
		s.end(err)
	}
}

// Wait returns when cond holds for what has arrived, or ctx has ended.
func (u *Upstream) Wait(ctx context.Context, cond func(arrived []bridge.Message) bool) error {
	for {
		u.mu.Lock()
		ok, changed := cond(u.arrived), u.changed
		u.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

type session struct {
	u    *Upstream
	dial int
	acks bridge.Acks

	mu    sync.Mutex
	queue []queued
	n     int
	bytes uint64
	err   error
	wake  chan struct{}
	done  chan struct{}
	join  sync.WaitGroup
}

type queued struct {
	m    bridge.Message
	step Step
}

var errClosed = errors.New("session is closed")

// Dial opens a session unless OnDial refuses.
func (u *Upstream) Dial(ctx context.Context, acks bridge.Acks) (bridge.Session, error) {
	u.mu.Lock()
	u.dials = append(u.dials, time.Now())
	n := len(u.dials)
	u.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if u.OnDial != nil {
		if err := u.OnDial(n); err != nil {
			return nil, err
		}
	}
	s := &session{u: u, dial: n, acks: acks, wake: make(chan struct{}, 1), done: make(chan struct{})}
	u.mu.Lock()
	u.last = s
	u.open++
	u.mu.Unlock()
	s.join.Go(s.work)
	return s, nil
}

func (s *session) Send(m bridge.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	s.n++
	var step Step
	if s.u.OnSend != nil {
		step = s.u.OnSend(s.dial, s.n, m)
	}
	if step.SendErr != nil {
		return step.SendErr
	}
	s.queue = append(s.queue, queued{m, step})
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// work is the link: one send after the other.
func (s *session) work() {
	for {
		s.mu.Lock()
		batch := s.queue
		s.queue = nil
		s.mu.Unlock()
		for _, q := range batch {
			if q.step.Take > 0 && !s.pause(q.step.Take) {
				return
			}
			select {
			case <-s.done:
				return
			default:
			}
			s.arrive(q)
			if q.step.End != nil {
				s.end(q.step.End)
				return
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-s.wake:
		case <-s.done:
			return
		}
	}
}

func (s *session) arrive(q queued) {
	refused := q.step.AckErr != nil && bridge.IsPermanent(q.step.AckErr)
	if !q.step.Lose {
		s.mu.Lock()
		s.bytes += uint64(len(q.m.Payload))
		s.mu.Unlock()
	}
	if !q.step.Lose && !refused {
		s.u.mu.Lock()
		s.u.arrived = append(s.u.arrived, q.m)
		close(s.u.changed)
		s.u.changed = make(chan struct{})
		s.u.mu.Unlock()
	}
	if q.step.Lose || q.step.NoAck {
		return
	}
	times := 1
	if q.step.Twice {
		times = 2
	}
	if q.step.Delay == 0 {
		s.ack(q, times)
		return
	}
	s.join.Go(func() {
		if s.pause(q.step.Delay) {
			s.ack(q, times)
		}
	})
}

func (s *session) ack(q queued, times int) {
	if q.step.AckErr == nil {
		s.u.mu.Lock()
		s.u.acked[q.m.Token] = true
		s.u.mu.Unlock()
	}
	for range times {
		s.acks(q.m.Token, q.step.AckErr)
	}
}

// pause waits, and tells whether the session is still open.
func (s *session) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.done:
		return false
	}
}

func (s *session) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		close(s.done)
	}
}

func (s *session) Progress() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

func (s *session) Done() <-chan struct{} { return s.done }

func (s *session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *session) Close(ctx context.Context) {
	orderly := ctx.Err() == nil && s.Err() == nil
	s.end(errClosed)
	s.join.Wait()
	s.u.mu.Lock()
	s.u.open--
	if orderly {
		s.u.byes++
	}
	s.u.mu.Unlock()
}
