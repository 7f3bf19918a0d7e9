package bridge_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/cloud"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// TestAfterARestoreNothingNewIsTakenForARepeat sends, to one cloud, what a spool had, what it took after a backup was made, and
// then what the spool that was restored from the backup has and takes. In the cloud each message is there once, the old ones that
// come again are known by their ids, and the new ones of both are told apart although their sequences are the same.
func TestAfterARestoreNothingNewIsTakenForARepeat(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatCloudEvents} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			receiver := cloud.New(cloud.Config{})
			seen := map[string]int{}
			original := openRestored(t, filepath.Join(dir, "store"), "")
			original.put("before", 300)
			original.drain(format, receiver, seen, 100) // the link is slow: the backup has 200 that wait
			if err := original.store.Checkpoint(filepath.Join(dir, "copy")); err != nil {
				t.Fatal(err)
			}
			original.put("lost", 120)
			original.drain(format, receiver, seen, 420)
			original.close()

			restored := openRestored(t, filepath.Join(dir, "copy"), "backup-1")
			restored.put("after", 150)
			restored.drain(format, receiver, seen, 0)
			restored.close()
			for what, n := range map[string]int{"before": 300, "lost": 120, "after": 150} {
				for i := range n {
					if got := seen[fmt.Sprintf("%s-%d", what, i)]; got != 1 {
						t.Fatalf("%s-%d is there %d times", what, i, got)
					}
				}
			}
			if s := receiver.Stats(); s.Missing != 0 || s.Duplicates < 200 {
				t.Errorf("%+v", s)
			}
		})
	}
}

type restoredSpool struct {
	t     *testing.T
	store *kv.Store
	sp    *spool.Spool
}

func openRestored(t *testing.T, dir, restored string) *restoredSpool {
	t.Helper()
	store, err := kv.Open(dir, kv.Options{Log: testkit.Logger(t), Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := spool.Open(store, spool.Config{
		Gateway: gateway, GapTopic: "gw/" + gateway + "/evt/gap", Log: testkit.Logger(t), Restored: restored,
		Lanes: []spool.LaneConfig{{Name: "telemetry", Share: 40}}, Upstreams: map[string][]string{"cloud": nil},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &restoredSpool{t, store, sp}
}

func (r *restoredSpool) put(what string, n int) {
	r.t.Helper()
	lane, _ := r.sp.Lane("telemetry")
	d := &done{t: r.t}
	for i := range n {
		m := message("pump", "dt/pump", fmt.Sprintf("%s-%d", what, i))
		d.wg.Add(1)
		if err := r.sp.Append(lane, &m, nil, d, 0, false); err != nil {
			r.t.Fatal(err)
		}
	}
	d.wg.Wait()
}

// drain sends until the upstream has acknowledged the first upTo sequences, 0: all, and hands what arrived to the receiver.
func (r *restoredSpool) drain(format string, receiver *cloud.Receiver, seen map[string]int, upTo uint64) {
	r.t.Helper()
	up := bridgetest.NewUpstream()
	up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
		if upTo > 0 && m.Lane == "telemetry" && m.Seq+uint64(m.Count) > upTo+1 {
			return bridgetest.Step{Lose: true} // it did not arrive
		}
		return bridgetest.Step{}
	}
	b, err := bridge.New(bridge.Config{
		Name: "cloud", URL: "mqtt://broker.example.com", Format: format,
		Tuning: bridge.Tuning{BatchRecords: 20, BackoffMin: time.Millisecond, DrainTimeout: time.Millisecond},
	}, gateway, r.sp, up, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	testkit.EventuallyNil(r.t, 20*time.Second, "it is drained", func() error {
		for _, a := range r.sp.Accounts() {
			if a.Lane == "telemetry" && (upTo > 0 && a.Cursor < upTo-20 || upTo == 0 && a.Pending.Messages > 0) {
				return fmt.Errorf("%+v", a)
			}
		}
		return nil
	})
	cancel()
	if err := <-ended; err != nil {
		r.t.Error(err)
	}
	for _, m := range up.Arrived() {
		ds, err := receiver.Receive(m.Topic, m.Payload)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, d := range ds {
			if d.Kind == cloud.Message {
				seen[string(d.Message.Payload)]++
			}
		}
	}
}

func (r *restoredSpool) close() {
	r.t.Helper()
	if err := r.sp.Close(); err != nil {
		r.t.Error(err)
	}
	if err := r.store.Close(); err != nil {
		r.t.Error(err)
	}
}
