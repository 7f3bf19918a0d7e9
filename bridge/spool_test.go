package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// done counts commits.
type done struct {
	wg sync.WaitGroup
	t  testing.TB
}

func (d *done) Done(_, _ uint64, err error) {
	if err != nil {
		d.t.Errorf("append: %v", err)
	}
	d.wg.Done()
}

// TestDrainsARealSpool: what a spool took goes to two upstreams, one of them flaky, across restarts of
// everything; at the end the accounts balance and each upstream has every message in order.
func TestDrainsARealSpool(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	const perRound, rounds = 2000, 3
	names := []string{"cloud", "lab"}
	ups := map[string]*bridgetest.Upstream{}
	for _, name := range names {
		ups[name] = bridgetest.NewUpstream()
	}
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(1, 2))
	ups["lab"].OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
		mu.Lock()
		defer mu.Unlock()
		step := bridgetest.Step{Delay: time.Duration(random.IntN(3)) * time.Millisecond}
		switch random.IntN(60) {
		case 0:
			step.End = errors.New("connection reset")
		case 1:
			step.Lose, step.End = true, bridge.ErrPeerClosed
		}
		if m.Lane == "telemetry" && m.Seq <= 100 && m.Seq+uint64(m.Count) > 100 {
			step = bridgetest.Step{SendErr: bridge.Permanent(errNever)}
		}
		return step
	}
	for round := range rounds {
		store, err := kv.Open(dir, kv.Options{Log: testkit.Logger(t), Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		sp, err := spool.Open(store, spool.Config{
			Gateway: gateway, GapTopic: "gw/" + gateway + "/evt/gap", Log: testkit.Logger(t),
			Lanes:     []spool.LaneConfig{{Name: "alarm", Share: 50}, {Name: "telemetry", Share: 40}},
			Upstreams: map[string][]string{"cloud": nil, "lab": nil},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for i, name := range names {
			b, err := bridge.New(bridge.Config{
				Name: name, URL: "mqtt://broker.example.com", Format: []string{bridge.FormatBatch, bridge.FormatPassthrough}[i], Window: 20,
				Tuning: bridge.Tuning{BackoffMin: time.Millisecond, BackoffMax: 5 * time.Millisecond, BatchBytes: 3000, Kicks: 1 << 20},
			}, gateway, sp, ups[name], testkit.Logger(t), nil)
			if err != nil {
				t.Fatal(err)
			}
			running.Go(func() {
				if err := b.Run(ctx); err != nil {
					t.Errorf("Run of %s: %v", name, err)
				}
			})
		}
		d := &done{t: t}
		for _, lane := range []string{"alarm", "telemetry"} {
			l, _ := sp.Lane(lane)
			for i := range perRound {
				m := message("pump", "dt/pump", fmt.Sprintf("%s-%d", lane, round*perRound+i+1))
				d.wg.Add(1)
				if err := sp.Append(l, &m, nil, d, 0, false); err != nil {
					t.Fatal(err)
				}
			}
		}
		d.wg.Wait()
		if round == rounds-1 { // else: stopped in the middle
			testkit.EventuallyNil(t, 20*time.Second, "nothing is pending", func() error {
				for _, a := range sp.Accounts() {
					if a.Upstream != "" && a.Pending.Messages > 0 {
						return fmt.Errorf("%+v", a)
					}
				}
				return nil
			})
		}
		cancel()
		running.Wait()
		for _, a := range sp.Accounts() {
			if a.Accepted.Messages != a.Delivered.Messages+a.Expired.Messages+a.Evicted.Messages+a.Parked.Messages+a.Pending.Messages {
				t.Errorf("account does not balance: %+v", a)
			}
			if round == rounds-1 && a.Upstream == "lab" && a.Lane == "telemetry" && a.Parked.Messages != 1 {
				t.Errorf("account %+v, want one parked", a)
			}
		}
		if err := sp.Close(); err != nil {
			t.Error(err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, name := range names {
		next := map[string]int{}
		for _, m := range ups[name].Arrived() {
			for _, u := range units(t, m) {
				if u.lane == spool.SystemLane {
					continue
				}
				if int(u.seq) == next[u.lane]+2 && name == "lab" && u.lane == "telemetry" && u.seq == 101 {
					next[u.lane]++ // the one that lab refuses
				}
				if int(u.seq) > next[u.lane]+1 {
					t.Fatalf("%s: %s/%d arrived after %d", name, u.lane, u.seq, next[u.lane])
				}
				if want := fmt.Sprintf("%s-%d", u.lane, u.seq); u.payload != want {
					t.Fatalf("%s: %s/%d is %q", name, u.lane, u.seq, u.payload)
				}
				next[u.lane] = max(next[u.lane], int(u.seq))
			}
		}
		for _, lane := range []string{"alarm", "telemetry"} {
			if next[lane] != rounds*perRound {
				t.Errorf("%s: %d of lane %s arrived", name, next[lane], lane)
			}
		}
	}
}
