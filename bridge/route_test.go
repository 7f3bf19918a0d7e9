package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// several is an upstream with addresses, each of them an upstream that may be down.
type several struct {
	all   []*bridgetest.Upstream
	at    int
	down  []atomic.Bool
	probe []atomic.Int32 // how often each was probed

	mu    sync.Mutex
	dials []string // where
}

var errDown = errors.New("connection refused")

func (s *several) Use(i int) { s.at = i }

func (s *several) Dial(ctx context.Context, acks bridge.Acks) (bridge.Session, error) {
	s.mu.Lock()
	s.dials = append(s.dials, fmt.Sprint(s.at))
	s.mu.Unlock()
	if s.down[s.at].Load() {
		return nil, errDown
	}
	return s.all[s.at].Dial(ctx, acks)
}

func (s *several) Probe(_ context.Context, i int) error {
	s.probe[i].Add(1)
	if s.down[i].Load() {
		return errDown
	}
	return nil
}

func (s *several) dialled() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.dials)
}

// cut ends the link at an address, which is down from now on.
func (s *several) cut(i int) {
	s.down[i].Store(true)
	s.all[i].End(bridge.ErrPeerClosed)
}

// newSeveral makes a rig with an upstream of n addresses. r.up is the first.
func newSeveral(t *testing.T, n int) (*rig, *several) {
	t.Helper()
	s := &several{down: make([]atomic.Bool, n), probe: make([]atomic.Int32, n)}
	cfg := bridge.Config{Name: "cloud", Format: bridge.FormatPassthrough}
	for i := range n {
		s.all = append(s.all, bridgetest.NewUpstream())
		cfg.URLs = append(cfg.URLs, fmt.Sprintf("mqtt://broker-%d", i))
		s.all[i].OnSend = func(int, int, bridge.Message) bridgetest.Step { return bridgetest.Step{Delay: 100 * time.Millisecond} }
	}
	r := &rig{t: t, src: newSource(t.Errorf, "telemetry"), up: s.all[0], log: &testkit.Buffer{}, done: make(chan error, 1)}
	var err error
	if r.b, err = bridge.NewFrom(cfg, gateway, epoch, r.src, s, slog.New(slog.NewTextHandler(r.log, nil)), nil); err != nil {
		t.Fatal(err)
	}
	return r, s
}

// exact fails unless each of n records has arrived somewhere, in order, and no more than again of them more than once.
func (s *several) exact(t *testing.T, n, again int) {
	t.Helper()
	times := map[uint64]int{}
	for i, u := range s.all {
		last := uint64(0)
		for _, m := range u.Arrived() {
			if m.Seq < last && times[m.Seq] == 0 {
				t.Errorf("at address %d message %d came after %d", i, m.Seq, last)
			}
			last = max(last, m.Seq)
			times[m.Seq]++
		}
	}
	twice := 0
	for seq := uint64(1); seq <= uint64(n); seq++ {
		if times[seq] == 0 {
			t.Errorf("message %d did not arrive", seq)
		}
		twice += max(times[seq]-1, 0)
	}
	if twice > again {
		t.Errorf("%d messages came twice, at most %d should", twice, again)
	}
}

// stream adds records for a time, ten a second.
func (r *rig) stream(from int, d time.Duration) (next int) {
	return r.trickle(from, d, 100*time.Millisecond)
}

func (r *rig) trickle(from int, d, every time.Duration) (next int) {
	for end := time.Now().Add(d); time.Now().Before(end); from++ {
		r.src.add("telemetry", numbered("pump", from, from)...)
		elapse(every)
	}
	return from
}

// TestAddressesAreTriedInTurnAndLeftForTheFirst: the first goes down and comes back. Moving back loses nothing, doubles nothing and
// keeps the order.
func TestAddressesAreTriedInTurnAndLeftForTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newSeveral(t, 3)
		s.down[1].Store(true)
		r.start()
		n := r.stream(1, time.Minute)
		if st := r.b.Status(); st.URL != "mqtt://broker-0" {
			t.Fatalf("begins at %s", st.URL)
		}
		s.cut(0)
		n = r.stream(n, 5*time.Second)
		if st := r.b.Status(); st.URL != "mqtt://broker-2" || !st.Connected {
			t.Fatalf("5 s after the first went down: %+v", st)
		}
		if got := s.dialled(); !slices.Equal(got, []string{"0", "0", "1", "2"}) {
			t.Errorf("tried %v", got)
		}
		n = r.stream(n, 10*time.Minute)
		if p := s.probe[0].Load(); p < 8 || p > 11 {
			t.Errorf("the first was probed %d times in 10 minutes", p)
		}
		if len(s.dialled()) != 4 {
			t.Errorf("a probe of what is down disturbed the link: %v", s.dialled())
		}
		s.down[0].Store(false)
		n = r.stream(n, 70*time.Second)
		if st := r.b.Status(); st.URL != "mqtt://broker-0" || !st.Connected {
			t.Errorf("a minute after the first came back: %+v", st)
		}
		if s.all[2].Goodbyes() != 1 {
			t.Errorf("left without a goodbye")
		}
		r.settled(time.Second)
		s.exact(t, n-1, 4) // what was in flight when the first went down
		if got := r.src.outcomes("telemetry"); got[spool.Delivered] != n-1 {
			t.Errorf("outcomes %v", got)
		}
		if r.logged(`"upstream moves"`) != 1 {
			t.Errorf("log:\n%s", r.log)
		}
	})
}

// TestAllAddressesDown pauses between rounds, not within one, and tells each error once.
func TestAllAddressesDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newSeveral(t, 3)
		for i := range s.down {
			s.down[i].Store(true)
		}
		r.start()
		elapse(10 * time.Minute)
		got := s.dialled()
		for i, at := range got {
			if at != fmt.Sprint(i%3) {
				t.Fatalf("tried %v", got)
			}
		}
		if len(got) < 60 || len(got) > 3*90 { // a round each 15 s on average
			t.Errorf("%d attempts in 10 minutes", len(got))
		}
		if st := r.b.Status(); st.Attempts < len(got)-3 || st.Connected {
			t.Errorf("%d attempts made, status %+v", len(got), st)
		}
		if n := r.logged(`"upstream not reachable"`); n != 3 {
			t.Errorf("told %d times:\n%s", n, r.log)
		}
	})
}

// TestFirstAddressThatOnlyLooksWell: it answers and takes nothing. The link goes there less and less often.
func TestFirstAddressThatOnlyLooksWell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newSeveral(t, 2)
		s.all[0].OnSend = func(int, int, bridge.Message) bridgetest.Step {
			return bridgetest.Step{Lose: true, End: bridge.ErrPeerClosed}
		}
		r.start()
		n := r.trickle(1, 4*time.Hour, 2*time.Second)
		if kicks := len(s.all[0].Dials()); kicks < 3 || kicks > 12 {
			t.Errorf("went %d times in 4 hours to where it is kicked", kicks)
		}
		r.settled(10 * time.Second)
		if got := r.src.outcomes("telemetry"); got[spool.Delivered] != n-1 {
			t.Errorf("outcomes %v", got)
		}
		s.exact(t, n-1, 100)
	})
}

// TestStopWhileTheLinkMoves ends in time and loses nothing.
func TestStopWhileTheLinkMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newSeveral(t, 2)
		s.down[0].Store(true)
		s.all[1].OnSend = func(int, int, bridge.Message) bridgetest.Step { return bridgetest.Step{Delay: 3 * time.Second} }
		r.start()
		elapse(30 * time.Second)
		s.down[0].Store(false)
		r.stream(1, 31*time.Second) // the probe is through, acks are waited for
		if r.logged(`"upstream moves"`) != 1 {
			t.Fatalf("does not move yet:\n%s", r.log)
		}
		before := time.Now()
		r.stop()
		if d := time.Since(before); d > 6*time.Second {
			t.Errorf("stop took %v", d)
		}
	})
}
