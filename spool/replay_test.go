package spool_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// parkAll has the upstream refuse all that waits in the lane.
func parkAll(t *testing.T, r *rig, upstream, lane string) {
	t.Helper()
	c, err := r.Consumer(upstream, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, rd := range c.Lanes() {
		for rd.Lane() == lane {
			run, err := rd.Next(1)
			if err != nil {
				t.Fatal(err)
			}
			if run.Count == 0 {
				break
			}
			if err := rd.Park(run.End(), run.Raw, "no"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
}

// parked lists what is parked: upstream/lane/sequence.
func parked(t *testing.T, r *rig) []string {
	t.Helper()
	all := []string{}
	err := r.Parked(func(m spool.ParkedMessage) error {
		all = append(all, fmt.Sprintf("%s/%s/%d", m.Upstream, m.Lane, m.Seq))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// waiting gives what waits in a lane, with the properties of replays.
func waiting(t *testing.T, r *rig, lane string) []string {
	t.Helper()
	all := []string{}
	err := r.Peek(lane, 0, 1<<20, func(seq uint64, rec *spool.Record) error {
		var i int
		if _, err := fmt.Sscanf(string(rec.Payload), `{"n":%d,`, &i); err != nil {
			return err
		}
		s := fmt.Sprintf("%d=%d", seq, i)
		if rec.Props != nil {
			s += fmt.Sprint(" for ", rec.Props.Upstream, " ", rec.Props.User)
		}
		all = append(all, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestReplayMakesNewMessagesOfParkedOnes(t *testing.T) {
	cfg := lanes("telemetry", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": nil, "lab": {"telemetry"}}
	fs := vfs.NewMem()
	r := open(t, fs, cfg)
	r.put("telemetry", 0, 5)
	r.put("bulk", 5, 7)
	parkAll(t, r, "cloud", "telemetry")
	parkAll(t, r, "lab", "telemetry")
	parkAll(t, r, "cloud", "bulk")

	// What is not parked, and what another upstream has refused, is passed over.
	if n, err := r.Replay("telemetry", "cloud", []uint64{4, 2, 4, 99}); n != 2 || err != nil {
		t.Fatalf("%d replayed, %v", n, err)
	}
	want := []string{"6=1 for cloud [[holdfast-replay-of telemetry/2]]", "7=3 for cloud [[holdfast-replay-of telemetry/4]]"}
	if d := cmp.Diff(want, waiting(t, r, "telemetry")); d != "" {
		t.Error(d)
	}
	if n, err := r.Replay("telemetry", "cloud", []uint64{4, 2}); n != 0 || err != nil {
		t.Errorf("a second time %d were replayed, %v", n, err)
	}
	if n, err := r.Replay("telemetry", "cloud", nil); n != 3 || err != nil {
		t.Errorf("of the rest %d were replayed, %v", n, err)
	}
	left := []string{"lab/telemetry/1", "lab/telemetry/2", "lab/telemetry/3", "lab/telemetry/4", "lab/telemetry/5", "cloud/bulk/1", "cloud/bulk/2"}
	if d := cmp.Diff(left, parked(t, r)); d != "" {
		t.Error(d)
	}
	a := r.account("cloud", "telemetry")
	if a.Parked.Messages != 5 || a.Pending.Messages != 5 || a.Accepted.Messages != 10 {
		t.Errorf("parked ones had their end, the copies are new: %+v", a)
	}

	// Refused and replayed again, a copy still names the message that was parked first.
	parkAll(t, r, "cloud", "telemetry")
	if n, err := r.Replay("telemetry", "cloud", []uint64{7}); n != 1 || err != nil {
		t.Fatalf("%d replayed, %v", n, err)
	}
	if got := waiting(t, r, "telemetry"); got[len(got)-1] != "11=3 for cloud [[holdfast-replay-of telemetry/4]]" {
		t.Errorf("a copy of a copy: %v", got)
	}

	// The other upstream passes over the copies, and is told that it misses nothing.
	rd, _ := r.reader("lab", "telemetry")
	_, end := read(t, rd, 1<<20)
	rd.Resolve(end, spool.Elsewhere)
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	if a := r.account("lab", "telemetry"); a.Delivered.Messages != 6 || a.Parked.Messages != 5 {
		t.Errorf("account of the other upstream: %+v", a)
	}
	var last string
	if err := r.Peek(spool.SystemLane, 0, 1000, func(_ uint64, rec *spool.Record) error {
		last = string(rec.Payload)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(last, `"upstream":"lab","first":6,"last":11,"count":6`) || !strings.Contains(last, `"reason":"other_upstream"`) {
		t.Errorf("announced %s", last)
	}
	r.verify()
}

func TestReplayRefusesWhatNobodyWouldTake(t *testing.T) {
	cfg := lanes("telemetry", "small")
	cfg.Upstreams = map[string][]string{"cloud": {"telemetry", "small"}, "lab": {"telemetry"}}
	cfg.Lanes[1].MaxBytes, cfg.Lanes[1].WhenFull = 500, spool.Reject
	r := open(t, vfs.NewMem(), cfg)
	if _, err := r.Replay("none", "cloud", nil); !errors.Is(err, spool.ErrNoLane) {
		t.Errorf("unknown lane: %v", err)
	}
	for _, up := range []string{"lab", "nobody", ""} {
		if _, err := r.Replay("small", up, nil); !errors.Is(err, spool.ErrNotWaiting) {
			t.Errorf("upstream %q does not read the lane: %v", up, err)
		}
	}
	r.put("small", 0, 1)
	parkAll(t, r, "cloud", "small")
	r.put("small", 200, 202)
	if n, err := r.Replay("small", "cloud", nil); n != 0 || !errors.Is(err, spool.ErrFull) {
		t.Errorf("into a full lane: %d, %v", n, err)
	}
	if d := cmp.Diff([]string{"cloud/small/1"}, parked(t, r)); d != "" {
		t.Errorf("it is not parked any more: %s", d)
	}
}

// TestReplayLeavesWhatItCannotRead parks garbage among messages.
func TestReplayLeavesWhatItCannotRead(t *testing.T) {
	cfg := lanes("telemetry")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, vfs.NewMem(), cfg)
	r.put("telemetry", 0, 3)
	c, err := r.Consumer("cloud", nil)
	if err != nil {
		t.Fatal(err)
	}
	rd := c.Lanes()[1]
	for i := range 3 {
		run, err := rd.Next(1)
		if err != nil {
			t.Fatal(err)
		}
		raw := run.Raw
		if i == 1 {
			raw = []byte("garbage")
		}
		if err := rd.Park(run.End(), raw, "no"); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Replay("telemetry", "cloud", nil); n != 2 || !errors.Is(err, spool.ErrRecord) || !strings.Contains(err.Error(), "message 2 ") {
		t.Errorf("%d replayed, %v", n, err)
	}
	if d := cmp.Diff([]string{"cloud/telemetry/2"}, parked(t, r)); d != "" {
		t.Error(d)
	}
}

// TestReplayedMessageIsNotTooOldAtOnce: the lane's max_age counts from the replay, and what came before the copy keeps its own.
func TestReplayedMessageIsNotTooOldAtOnce(t *testing.T) {
	h := newHeld()
	cfg := lanes("telemetry", "mark")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	cfg.Lanes[0].MaxAge, cfg.Lanes[1].MaxAge = time.Hour, time.Hour
	r := openHeld(t, kv.Options{FS: vfs.NewMem()}, h, cfg)
	r.put("telemetry", 0, 2)
	parkAll(t, r, "cloud", "telemetry")
	h.advance(24 * time.Hour)
	r.put("mark", 0, 1)
	h.advance(5 * time.Minute)
	r.put("mark", 1, 2)
	h.advance(25 * time.Minute)
	if n, err := r.Replay("telemetry", "cloud", nil); n != 2 || err != nil {
		t.Fatalf("%d replayed, %v", n, err)
	}
	h.advance(31 * time.Minute)
	for i := range 2 { // the second one goes in a round of housekeeping that has looked at the copies
		eventually(t, "housekeeping has looked", func() bool { return r.account("cloud", "mark").Expired.Messages == uint64(i+1) })
		h.advance(5 * time.Minute)
	}
	if a := r.account("cloud", "telemetry"); a.Pending.Messages != 2 || a.Expired.Messages != 0 {
		t.Errorf("account %+v", a)
	}
	h.advance(time.Hour)
	eventually(t, "the copies are too old", func() bool { return r.account("cloud", "telemetry").Expired.Messages == 2 })
}

// TestReplayTakesManyInSeveralCommits has more than one commit takes, and two replays at once.
func TestReplayTakesManyInSeveralCommits(t *testing.T) {
	cfg := lanes("telemetry")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, vfs.NewMem(), cfg)
	const n = 2500
	r.put("telemetry", 0, n)
	parkAll(t, r, "cloud", "telemetry")
	var total int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			did, err := r.Replay("telemetry", "cloud", nil)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			total += did
		})
	}
	wg.Wait()
	if total != n || len(parked(t, r)) != 0 {
		t.Errorf("%d of %d replayed, %d left", total, n, len(parked(t, r)))
	}
	rd, _ := r.reader("cloud", "telemetry")
	got, _ := read(t, rd, 1<<20)
	if len(got) != n {
		t.Fatalf("%d copies", len(got))
	}
	for i := range got {
		if got[i] != i {
			t.Fatalf("copy %d is of message %d", i, got[i])
		}
	}
}

// TestCrashInReplayNeitherLosesNorDoubles takes the power away while messages are replayed.
func TestCrashInReplayNeitherLosesNorDoubles(t *testing.T) {
	seed := *crashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("again with: -crash-seed %d", seed)
	for i := range max(*crashes/4, 3) {
		rng := rand.New(rand.NewPCG(seed+uint64(i), 3))
		cfg := lanes("telemetry")
		cfg.Upstreams = map[string][]string{"cloud": nil}
		fs := vfs.NewCrashableMem()
		r := openWith(t, kv.Options{FS: fs}, cfg)
		const n = 60
		r.put("telemetry", 0, n)
		parkAll(t, r, "cloud", "telemetry")
		stop, done := make(chan struct{}), make(chan struct{})
		replayed := 0
		go func() {
			defer close(done)
			for seq := uint64(1); seq <= n; seq += 3 {
				select {
				case <-stop:
					return
				default:
				}
				k, err := r.Replay("telemetry", "cloud", []uint64{seq, seq + 1, seq + 2})
				if err != nil {
					t.Error(err)
				}
				replayed += k
			}
		}()
		for range rng.IntN(2000) {
			r.Accounts() // a while, without a clock
		}
		clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		close(stop)
		<-done
		again := openWith(t, kv.Options{FS: clone}, cfg)
		seen := map[int]int{}
		for _, s := range waiting(t, again, "telemetry") {
			var seq, number int
			if _, err := fmt.Sscanf(s, "%d=%d", &seq, &number); err != nil {
				t.Fatal(err)
			}
			seen[number]++
		}
		if err := again.Parked(func(m spool.ParkedMessage) error {
			seen[numbers(t, m.Record, 1)[0]]++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for number := range n {
			if seen[number] != 1 {
				t.Errorf("crash %d: message %d is there %d times", i, number, seen[number])
			}
		}
		again.account("cloud", "telemetry")
		again.verify()
	}
}
