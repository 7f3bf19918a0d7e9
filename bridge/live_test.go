package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/cloud"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// Streams of a schedule in which telemetry is two.
const (
	newest = iota + 2
	backlog
	bulkBelow
)

func liveSchedule() bridge.Schedule {
	return bridge.NewLiveSchedule([]int{0, 50, 40, 40, 10}, []int{0, 0, 0, 30, 0})
}

func TestBacklogGetsItsPartOfTheLane(t *testing.T) {
	const total = 100 << 20
	size := func(int) int { return 3000 }
	for name, c := range map[string]struct {
		waiting []bool
		want    []float64
	}{
		"both":                      {[]bool{false, false, true, true, false}, []float64{0, 0, .7, .3, 0}},
		"both under a flood":        {[]bool{false, true, true, true, true}, []float64{0, .5, .28, .12, .1}},
		"no newer messages":         {[]bool{false, false, false, true, true}, []float64{0, 0, 0, .9, .1}},
		"no newer, under a flood":   {[]bool{false, true, false, true, true}, []float64{0, .5, 0, .4, .1}},
		"no backlog, under a flood": {[]bool{false, true, true, false, true}, []float64{0, .5, .4, 0, .1}},
	} {
		t.Run(name, func(t *testing.T) {
			got, _ := serve(liveSchedule(), c.waiting, size, total)
			for i, want := range c.want {
				if have := float64(got[i]) / total; math.Abs(have-want) > 0.01 {
					t.Errorf("stream %d got %.3f of the link, want %.2f", i, have, want)
				}
			}
		})
	}
}

// TestNewestDoNotWaitForTheBacklog: however long the backlog had the lane for itself, the next message goes before it.
func TestNewestDoNotWaitForTheBacklog(t *testing.T) {
	s := liveSchedule()
	size := func(int) int { return 3000 }
	serve(s, []bool{false, false, false, true, true}, size, 10<<20)
	if _, order := serve(s, []bool{false, false, true, true, false}, size, 1); order[0] != newest {
		t.Errorf("stream %d went before the newest", order[0])
	}
	// And the backlog not for ever after the newest were alone.
	serve(s, []bool{false, false, true, false, true}, size, 10<<20)
	if got, _ := serve(s, []bool{false, false, true, true, false}, size, 1<<20); got[backlog] < 250<<10 {
		t.Errorf("the backlog got %d bytes of a mebibyte", got[backlog])
	}
}

// TestBacklogFillsInBesideTheNewest drains a lane that drains live_first over a link that breaks, through restarts of everything that
// leave a backlog each. Every message arrives, the newest in order, the backlog in order and marked, and a
// receiver sees no hole.
func TestBacklogFillsInBesideTheNewest(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatCloudEvents, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			const perRound, rounds = 500, 4
			fs := vfs.NewMem()
			up := bridgetest.NewUpstream()
			var mu sync.Mutex
			random := rand.New(rand.NewPCG(5, 6))
			lossy := true
			up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
				mu.Lock()
				defer mu.Unlock()
				var step bridgetest.Step
				switch random.IntN(30) {
				case 0:
					step.End = errors.New("connection reset")
				case 1:
					step.Lose, step.End = true, errors.New("connection reset")
				}
				if !lossy {
					step = bridgetest.Step{}
				}
				if m.Lane == "telemetry" && m.Seq <= 300 && m.Seq+uint64(m.Count) > 300 {
					step = bridgetest.Step{SendErr: bridge.Permanent(errNever)}
				}
				return step
			}
			written := 0
			for round := range rounds {
				// Everything from before a start counts as old.
				store, sp := openLive(t, fs)
				written = putLive(t, sp, written, perRound)
				if err := errors.Join(sp.Close(), store.Close()); err != nil {
					t.Fatal(err)
				}
				store, sp = openLive(t, fs)
				b, err := bridge.New(bridge.Config{
					Name: "cloud", URL: "mqtt://broker.example.com", Format: format, Window: 8,
					Tuning: bridge.Tuning{BackoffMin: time.Millisecond, BackoffMax: 2 * time.Millisecond, BatchBytes: 3000, Kicks: 1 << 20},
				}, gateway, sp, up, testkit.Logger(t), nil)
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				written = putLive(t, sp, written, 10) // newer than the backlog
				go func() { ended <- b.Run(ctx) }()
				account := func() spool.Account {
					for _, a := range sp.Accounts() {
						if !a.Balanced() {
							t.Errorf("account does not balance: %+v", a)
						}
						if a.Lane == "telemetry" {
							return a
						}
					}
					t.Fatal("no account")
					return spool.Account{}
				}
				target := uint64(written) / 3 // stop in the middle
				written = putLive(t, sp, written, 50)
				if last := round == rounds-1; last {
					target = uint64(written)
					mu.Lock()
					lossy = false
					mu.Unlock()
				}
				testkit.EventuallyNil(t, 20*time.Second, "messages go up", func() error {
					a := account()
					if n := a.Delivered.Messages + a.Parked.Messages; n < target {
						return fmt.Errorf("%d of %d: %+v", n, target, a)
					}
					return nil
				})
				cancel()
				if err := <-ended; err != nil {
					t.Errorf("Run: %v", err)
				}
				if a := account(); round == rounds-1 && (a.Pending.Messages != 0 || a.Islands != 0 || a.Parked.Messages != 1) {
					t.Errorf("at the end: %+v", a)
				}
				if err := errors.Join(sp.Close(), store.Close()); err != nil {
					t.Error(err)
				}
			}
			checkStreams(t, up.Arrived(), format, written)
		})
	}
}

// openLive opens a spool whose lane telemetry drains live_first.
func openLive(t *testing.T, fs vfs.FS) (*kv.Store, *spool.Spool) {
	t.Helper()
	store, err := kv.Open("data", kv.Options{FS: fs, Log: testkit.Logger(t), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := spool.Open(store, spool.Config{
		Gateway: gateway, GapTopic: "gw/" + gateway + "/evt/gap", Log: testkit.Logger(t),
		Lanes:     []spool.LaneConfig{{Name: "alarm", Share: 50}, {Name: "telemetry", Share: 40, Drain: spool.LiveFirst}},
		Upstreams: map[string][]string{"cloud": nil},
	})
	if err != nil {
		t.Fatal(err)
	}
	return store, sp
}

// putLive appends n messages after the first written ones, and returns how many there are then.
func putLive(t *testing.T, sp *spool.Spool, written, n int) int {
	t.Helper()
	lane, _ := sp.Lane("telemetry")
	d := &done{t: t}
	for range n {
		written++
		m := message("pump", "dt/pump", fmt.Sprintf("telemetry-%d-%s", written, strings.Repeat("x", 250)))
		d.wg.Add(1)
		if err := sp.Append(lane, &m, nil, d, 0, false); err != nil {
			t.Fatal(err)
		}
	}
	d.wg.Wait()
	return written
}

// TestMessageThatKillsTheLinkIsParkedBesideTheNewest: the acks of the newest messages do not clear one of the backlog.
func TestMessageThatKillsTheLinkIsParkedBesideTheNewest(t *testing.T) {
	fs := vfs.NewMem()
	store, sp := openLive(t, fs)
	putLive(t, sp, 0, 500)
	if err := errors.Join(sp.Close(), store.Close()); err != nil {
		t.Fatal(err)
	}
	store, sp = openLive(t, fs)
	putLive(t, sp, 500, 10)
	up := bridgetest.NewUpstream()
	newer := 510
	up.OnDial = func(int) error {
		newer = putLive(t, sp, newer, 1) // goes first and is acked
		return nil
	}
	up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
		if m.Lane == "telemetry" && m.Seq == 77 {
			return bridgetest.Step{Lose: true, End: bridge.ErrPeerClosed}
		}
		return bridgetest.Step{}
	}
	b, err := bridge.New(bridge.Config{
		Name: "cloud", URL: "mqtt://broker.example.com", Format: bridge.FormatPassthrough, Window: 8,
		Tuning: bridge.Tuning{BackoffMin: time.Millisecond, BackoffMax: 2 * time.Millisecond, Kicks: 5},
	}, gateway, sp, up, testkit.Logger(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	testkit.EventuallyNil(t, 20*time.Second, "one is parked and the others arrive", func() error {
		for _, a := range sp.Accounts() {
			if a.Lane == "telemetry" && (a.Parked.Messages != 1 || a.Backlog.Messages > 0) {
				return fmt.Errorf("%+v", a)
			}
		}
		return nil
	})
	cancel()
	if err := errors.Join(<-ended, sp.Close(), store.Close()); err != nil {
		t.Error(err)
	}
}

// checkStreams looks at what arrived of lane telemetry, whose message i says so; one is parked.
func checkStreams(t *testing.T, arrived []bridge.Message, format string, written int) {
	t.Helper()
	receiver := cloud.New(cloud.Config{})
	seen := map[uint64]bool{}
	var ahead, behind uint64 // the last sequence that came ahead of its turn or in it; and of a backlog
	replayed := 0
	for _, m := range arrived {
		all, err := receiver.Receive(m.Topic, m.Payload)
		if err != nil {
			t.Fatal(err)
		}
		for i, d := range all {
			switch {
			case m.Lane != "telemetry":
				continue
			case d.Kind == cloud.Hole && d.Missing == cloud.Range{First: 300, Last: 300}: // the one that is refused
				continue
			case d.Kind == cloud.Hole:
				t.Errorf("hole %+v", d.Missing)
				continue
			}
			seq := d.ID.Seq
			if format == bridge.FormatPassthrough {
				seq = m.Seq + uint64(i)
			}
			if !strings.HasPrefix(string(d.Message.Payload), fmt.Sprintf("telemetry-%d-", seq)) {
				t.Fatalf("sequence %d is %s", seq, d.Message.Payload)
			}
			if seen[seq] {
				continue
			}
			seen[seq] = true
			if format == bridge.FormatPassthrough {
				continue
			}
			if d.Kind != cloud.Message {
				t.Errorf("%d came for the first time as a duplicate", seq)
			}
			last := &ahead
			if d.Late {
				last = &behind
				if !d.Replayed {
					t.Errorf("%d is late and not marked as replayed", seq)
				}
				replayed++
			}
			if seq <= *last {
				t.Errorf("%d came after %d", seq, *last)
			}
			*last = seq
		}
	}
	if len(seen) != written-1 {
		t.Errorf("%d of %d messages arrived", len(seen), written-1)
	}
	if format == bridge.FormatPassthrough {
		return
	}
	if replayed == 0 {
		t.Error("there was no backlog: the test has shown nothing")
	}
	for _, l := range receiver.Lanes() {
		if l.Lane == "telemetry" && (l.Missing != 0 || l.Awaited != 0) {
			t.Errorf("at the end %+v, want nothing missing: what is parked was announced", l)
		}
	}
}
