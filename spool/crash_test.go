package spool_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"holdfast/internal/kv"
	"holdfast/spool"
)

var (
	crashes   = flag.Int("crashes", 12, "crashes that TestCrashKeepsWhatWasAcked simulates")
	crashSeed = flag.Uint64("crash-seed", 0, "seed of the first crash; 0: by the clock")
)

// crashRun is one life of a spool: several appenders, one reader that resolves what it was given.
type crashRun struct {
	mu      sync.Mutex
	acked   map[string]map[uint64]int // lane -> sequence -> number
	written map[string]map[int]bool   // lane -> numbers handed in
	// resolved is how far the reader has resolved: the cursor is never beyond.
	resolved  map[string]uint64
	delivered int
}

type acker struct {
	c    *crashRun
	lane string
	n    sync.WaitGroup
}

func (a *acker) Done(token, seq uint64, err error) {
	if err == nil {
		a.c.mu.Lock()
		a.c.acked[a.lane][seq] = int(token)
		a.c.mu.Unlock()
	}
	a.n.Done()
}

// TestCrashKeepsWhatWasAcked takes the power away at random moments, with any share of the
// unsynced bytes surviving, and looks at what the next start finds. The start after one crash is
// the beginning of the next life, so damage would add up.
func TestCrashKeepsWhatWasAcked(t *testing.T) {
	seed := *crashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	for _, mode := range []struct {
		name string
		d    kv.Durability
	}{{"fsync", kv.Fsync}, {"interval", kv.Interval}} {
		t.Run(mode.name, func(t *testing.T) {
			var fs *vfs.MemFS
			var want *crashRun
			messages := 0
			for i := range *crashes {
				if i%crashesPerStore == 0 {
					fs, want = vfs.NewCrashableMem(), newCrashRun()
				}
				rng := rand.New(rand.NewPCG(seed+uint64(i), 1))
				fs = want.live(t, fs, rng, mode.d)
				if t.Failed() {
					t.Fatalf("crash %d failed; again with: -crashes %d -crash-seed %d", i, i+1, seed)
				}
				if i == *crashes-1 || (i+1)%crashesPerStore == 0 {
					messages += want.delivered + len(want.acked["a"]) + len(want.acked["b"])
				}
			}
			t.Logf("%d crashes, seed %d: %d messages acknowledged, none lost", *crashes, seed, messages)
		})
	}
}

// crashesPerStore is how many crashes one store goes through: it grows with each, and is held in memory.
const crashesPerStore = 50

func newCrashRun() *crashRun {
	return &crashRun{
		acked:    map[string]map[uint64]int{"a": {}, "b": {}},
		written:  map[string]map[int]bool{"a": {}, "b": {}},
		resolved: map[string]uint64{},
	}
}

// live opens the spool on fs, checks it, works for a moment and returns what a power cut leaves.
func (c *crashRun) live(t *testing.T, fs *vfs.MemFS, rng *rand.Rand, d kv.Durability) *vfs.MemFS {
	cfg := lanes("a", "b")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	cfg.TailBytes = 64 << 10
	r := openOnce(t, kv.Options{FS: fs, Durability: d, SyncInterval: 2 * time.Millisecond}, nil, cfg)
	c.check(t, r, d)
	var (
		wg   sync.WaitGroup
		stop atomic.Bool
	)
	for _, lane := range []string{"a", "b"} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			a := &acker{c: c, lane: lane}
			for !stop.Load() {
				c.mu.Lock()
				n := len(c.written[lane])
				c.written[lane][n] = true
				c.mu.Unlock()
				a.n.Add(1)
				if err := r.Append(r.lane(lane), rec(n), nil, a, uint64(n), false); err != nil {
					t.Errorf("append: %v", err)
					return
				}
				if n%97 == 0 {
					a.n.Wait()
				}
			}
			a.n.Wait()
		}()
	}
	consumer, err := r.Consumer("cloud", nil)
	if err != nil {
		t.Fatal(err)
	}
	wg.Add(1)
	readSeed := rng.Uint64()
	go func() {
		defer wg.Done()
		rng := rand.New(rand.NewPCG(readSeed, 2))
		for !stop.Load() {
			for _, rd := range consumer.Lanes() {
				if rng.IntN(20) == 0 {
					rd.Rewind()
				}
				run, err := rd.Next(1 + rng.IntN(20_000))
				if err != nil {
					t.Errorf("next: %v", err)
					return
				}
				if run.Count > 0 && rd.Lane() != spool.SystemLane {
					c.sent(t, rd.Lane(), run)
					if rng.IntN(3) > 0 {
						rd.Resolve(run.End(), spool.Delivered)
						c.mu.Lock()
						c.resolved[rd.Lane()] = max(c.resolved[rd.Lane()], run.End().Seq)
						c.mu.Unlock()
					}
				}
			}
		}
	}()
	var left *vfs.MemFS
	for moments := 5 + rng.IntN(60); moments > 0; moments-- {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the moment of the crash is what varies
	}
	share := []int{0, 0, 30, 70, 100}[rng.IntN(5)]
	c.mu.Lock()
	acked := map[string]map[uint64]int{}
	for lane, m := range c.acked {
		acked[lane] = map[uint64]int{}
		for seq, n := range m {
			acked[lane][seq] = n
		}
	}
	c.mu.Unlock()
	left = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: share, RNG: rng})
	stop.Store(true)
	wg.Wait()
	consumer.Close()
	r.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked = acked // what was acknowledged after the cut was acknowledged by a machine that was off
	return left
}

// sent checks what a reader hands out while the spool works: it is what was written under that sequence.
func (c *crashRun) sent(t *testing.T, lane string, run spool.Run) {
	got := numbers(t, run.Raw, run.Count)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, n := range got {
		seq := run.Pos.Seq + uint64(i)
		if want, ok := c.acked[lane][seq]; ok && want != n {
			t.Errorf("lane %s: sequence %d is %d, acknowledged was %d", lane, seq, n, want)
		}
	}
}

// check holds a freshly opened spool against what was acknowledged before the crash.
func (c *crashRun) check(t *testing.T, r *rig, d kv.Durability) {
	t.Helper()
	r.verify()
	consumer, err := r.Consumer("cloud", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	for _, rd := range consumer.Lanes() {
		lane := rd.Lane()
		if lane == spool.SystemLane {
			continue
		}
		cursor := rd.Cursor().Seq
		if cursor > max(c.resolved[lane], 1) {
			t.Errorf("lane %s: cursor at %d, resolved up to %d", lane, cursor, c.resolved[lane])
		}
		found := map[uint64]int{}
		next := cursor
		for {
			run, err := rd.Next(10_000)
			if err != nil {
				t.Fatal(err)
			}
			if run.Count == 0 {
				break
			}
			if run.Pos.Seq != next {
				t.Errorf("lane %s: hole from %d to %d", lane, next, run.Pos.Seq)
			}
			for i, n := range numbers(t, run.Raw, run.Count) {
				found[run.Pos.Seq+uint64(i)] = n
				if !c.written[lane][n] {
					t.Errorf("lane %s: sequence %d holds %d, which nobody wrote", lane, run.Pos.Seq+uint64(i), n)
				}
			}
			next = run.End().Seq
		}
		for seq, n := range c.acked[lane] {
			if seq < cursor {
				delete(c.acked[lane], seq) // delivered: it need not be looked at again after the next crash
				c.delivered++
				continue
			}
			got, ok := found[seq]
			switch {
			case !ok && d == kv.Interval:
				delete(c.acked[lane], seq) // the interval's price: what was acked since the last sync may go
			case !ok:
				t.Errorf("lane %s: sequence %d (%d) was acknowledged and is lost", lane, seq, n)
			case got != n:
				t.Errorf("lane %s: sequence %d holds %d, acknowledged was %d", lane, seq, got, n)
			}
		}
		// Sequences beyond the end will be given again: nobody outside has seen them.
		for seq, n := range found {
			c.acked[lane][seq] = n
		}
		c.resolved[lane] = cursor
	}
	for _, a := range r.Accounts() {
		if !a.Balanced() {
			t.Errorf("account does not balance: %+v", a)
		}
	}
}

// TestFailedSyncAcksNothing breaks the disk under a working spool, in a process of its own, which a
// failed store has to end.
func TestFailedSyncAcksNothing(t *testing.T) {
	if os.Getenv(childEnv) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFailedSyncAcksNothing$", "-test.v")
		cmd.Env = append(os.Environ(), childEnv+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestFailedSyncAcksNothing")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	for _, op := range []errorfs.OpKind{errorfs.OpFileSync, errorfs.OpFileSyncData} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			var broken atomic.Bool
			mem := vfs.NewMem()
			fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(o errorfs.Op) error {
				if broken.Load() && (o.Kind == errorfs.OpFileSync || o.Kind == errorfs.OpFileSyncData || o.Kind == errorfs.OpFileSyncTo) {
					return errors.New("input/output error")
				}
				return nil
			}))
			fatal := make(chan error, 1)
			log := slog.New(slog.NewTextHandler(os.Stderr, nil)) // a failed store leaves goroutines behind, which log after the test's end
			store, err := kv.Open("data", kv.Options{FS: fs, Log: log, Fatal: func(err error) { fatal <- err }})
			if err != nil {
				t.Fatal(err)
			}
			cfg := lanes("a")
			cfg.Log = log
			sp, err := spool.Open(store, cfg)
			if err != nil {
				t.Fatal(err)
			}
			lane, _ := sp.Lane("a")
			broken.Store(true)
			w := make(outcome, 1)
			if err := sp.Append(lane, rec(0), nil, w, 0, false); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-w:
				if err == nil {
					t.Error("a message was acknowledged whose sync failed")
				}
			case <-fatal:
				// Pebble reported it first; the completion never comes, which is no acknowledgement either.
			}
			if err := sp.Append(lane, rec(1), nil, nil, 0, false); err == nil {
				t.Error("a failed store takes messages")
			}
			_ = sp.Close()
		})
	}
}

type outcome chan error

func (o outcome) Done(_, _ uint64, err error) { o <- err }
