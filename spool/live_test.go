package spool_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// liveFirst is a configuration whose lanes drain live_first.
func liveFirst(names ...string) spool.Config {
	cfg := lanes(names...)
	for i := range cfg.Lanes {
		cfg.Lanes[i].Drain = spool.LiveFirst
	}
	return cfg
}

// parts returns an upstream's readers of a lane: the newest messages', the backlog's.
func (r *rig) parts(upstream, lane string) (newest, backlog *spool.Reader, c *spool.Consumer) {
	r.t.Helper()
	c, err := r.Consumer(upstream, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	r.consumers = append(r.consumers, c)
	for _, rd := range c.Lanes() {
		switch {
		case rd.Lane() != lane:
		case rd.Backfill() > 0:
			backlog = rd
		default:
			newest = rd
		}
	}
	return newest, backlog, c
}

// readOn reads all there is and returns the records' sequences and the position after them.
func readOn(t testing.TB, rd *spool.Reader, maxBytes int) (seqs []int, end spool.Position) {
	t.Helper()
	for {
		run, err := rd.Next(maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		if run.Count == 0 {
			return seqs, end
		}
		for i, n := range numbers(t, run.Raw, run.Count) {
			if seq := int(run.Pos.Seq) + i; seq != n+1 {
				t.Fatalf("sequence %d holds number %d", seq, n)
			}
			seqs = append(seqs, n+1)
		}
		end = run.End()
	}
}

// away is a spool with a backlog of some 200 KiB, opened again, for which no time passes. It ends at sequence 1001.
func away(t *testing.T, cfg spool.Config) *rig {
	fs := vfs.NewMem()
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, fs, cfg)
	for i := range 10 {
		r.put("telemetry", i*100, i*100+100)
	}
	r.close()
	r = open(t, fs, cfg)
	spool.SetElapsed(r.Spool, func() time.Duration { return 0 })
	return r
}

// TestNewestGoFirst is the life of a backlog: what is new goes past it, and when it is through there is one reader again.
func TestNewestGoFirst(t *testing.T) {
	r := away(t, liveFirst("telemetry"))
	newest, backlog, _ := r.parts("cloud", "telemetry")
	r.putChunk("telemetry", 1000, 1010)
	run, err := newest.Next(1 << 20)
	if err != nil || run.Pos.Seq != 1001 || run.Behind != 1 {
		t.Fatalf("the newest begin at %d behind %d, %v; want 1001 behind 1", run.Pos.Seq, run.Behind, err)
	}
	newest.Resolve(run.End(), spool.Delivered)
	a := r.account("cloud", "telemetry")
	if a.Delivered.Messages != 10 || a.Pending.Messages != 1000 || a.Backlog != a.Pending || a.Islands != 1 || a.Cursor != 1 {
		t.Errorf("account %+v, want 10 delivered beyond a backlog of 1000", a)
	}
	r.verify()
	old, end := readOn(t, backlog, 10_000)
	if diff := cmp.Diff(seq(1, 1001), old); diff != "" {
		t.Fatal(diff)
	}
	backlog.Resolve(end, spool.Delivered)
	a = r.account("cloud", "telemetry")
	if a.Pending.Messages != 0 || a.Backlog.Messages != 0 || a.Islands != 0 || a.Cursor != 1011 {
		t.Errorf("account %+v, want everything delivered and no island", a)
	}
	r.putChunk("telemetry", 1010, 1020)
	if run, err = newest.Next(1 << 20); err != nil || run.Pos.Seq != 1011 || run.Behind != 0 {
		t.Errorf("afterwards: %d behind %d, %v; want 1011 behind 0", run.Pos.Seq, run.Behind, err)
	}
	if run, err = backlog.Next(1 << 20); err != nil || run.Count > 0 {
		t.Errorf("afterwards the backlog has %d from %d, %v", run.Count, run.Pos.Seq, err)
	}
}

// TestNoIslandsInNormalLife: a reader that is never far behind, or behind by little, drains in order.
func TestNoIslandsInNormalLife(t *testing.T) {
	for name, c := range map[string]struct {
		put  int
		wait time.Duration
	}{
		"keeps up":       {put: 100, wait: time.Second},
		"little backlog": {put: 3, wait: time.Hour},
		"short outage":   {put: 500, wait: spool.LeapAge / 10},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, vfs.NewMem(), liveFirst("telemetry"))
			var now time.Duration
			spool.SetElapsed(r.Spool, func() time.Duration { return now })
			newest, backlog, _ := r.parts("cloud", "telemetry")
			next := 1
			for i := range 40 {
				r.put("telemetry", i*c.put, i*c.put+c.put)
				now += c.wait
				if i%4 < 3 && name != "keeps up" {
					continue
				}
				got, end := readOn(t, newest, 1<<20)
				if diff := cmp.Diff(seq(next, (i+1)*c.put+1), got); diff != "" {
					t.Fatal(diff)
				}
				next += len(got)
				newest.Resolve(end, spool.Delivered)
				if a := r.account("cloud", "telemetry"); a.Islands != 0 || a.Backlog.Messages != 0 || a.Pending.Messages != 0 {
					t.Fatalf("account %+v", a)
				}
				if run, err := backlog.Next(1 << 20); err != nil || run.Count > 0 {
					t.Fatalf("the backlog has %d from %d, %v", run.Count, run.Pos.Seq, err)
				}
			}
		})
	}
}

// TestIslandsAreBounded flaps the link: after every outage the newest go first, until there are too many islands; then they
// follow in order, and when the backlog is through all is as before.
func TestIslandsAreBounded(t *testing.T) {
	fs := vfs.NewMem()
	cfg := liveFirst("telemetry")
	r := open(t, fs, cfg)
	var now time.Duration
	spool.SetElapsed(r.Spool, func() time.Duration { return now })
	newest, _, c := r.parts("cloud", "telemetry")
	written, leaps := 0, 0
	var got []int
	for range 3 * spool.MaxIslands {
		r.put("telemetry", written, written+400) // some 70 KiB
		now += 24 * time.Hour
		r.put("telemetry", written+400, written+410)
		written += 410
		newest.Rewind()
		seqs, end := readOn(t, newest, 1<<20)
		if seqs[0] > written-410 && len(seqs) < 410 {
			leaps++
		}
		got = append(got, seqs...)
		newest.Resolve(end, spool.Delivered)
		if a := r.account("cloud", "telemetry"); a.Islands > spool.MaxIslands {
			t.Fatalf("%d islands", a.Islands)
		}
	}
	if leaps < spool.MaxIslands-2 || leaps > spool.MaxIslands {
		t.Errorf("the newest went first %d times", leaps)
	}
	r.verify()
	// The other order finishes what this one has begun.
	c.Close()
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	r.close()
	cfg.Lanes[0].Drain = spool.InOrder
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r = open(t, fs, cfg)
	if a := r.account("cloud", "telemetry"); a.Islands != leaps || a.Delivered.Messages != uint64(len(got)) || a.Backlog.Messages != a.Pending.Messages {
		t.Errorf("after a restart %+v, want %d islands and %d delivered", a, leaps, len(got))
	}
	newest, backlog, _ := r.parts("cloud", "telemetry")
	if backlog != nil {
		t.Error("a lane that drains in order has a reader of the backlog")
	}
	rest, end := readOn(t, newest, 10_000)
	newest.Resolve(end, spool.Delivered)
	have := map[int]int{}
	for _, s := range append(got, rest...) {
		have[s]++
	}
	for s := 1; s <= written; s++ {
		if have[s] != 1 {
			t.Fatalf("sequence %d came %d times", s, have[s])
		}
	}
	if a := r.account("cloud", "telemetry"); a.Islands != 0 || a.Pending.Messages != 0 {
		t.Errorf("at the end %+v", a)
	}
}

// TestDamageBesideIslands spoils chunks in the backlog, at its end, and among the newest: each message counts once, each
// loss is announced, and nothing that was delivered is.
func TestDamageBesideIslands(t *testing.T) {
	cfg := liveFirst("telemetry")
	cfg.TailBytes = 1
	fs := vfs.NewMem()
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, fs, cfg)
	for i := range 100 {
		r.putChunk("telemetry", i*10, i*10+10)
	}
	r.close()
	r = open(t, fs, cfg)
	spool.SetElapsed(r.Spool, func() time.Duration { return 0 })
	for i := 100; i < 110; i++ {
		r.putChunk("telemetry", i*10, i*10+10)
	}
	var ops []kv.Op
	for _, seq := range []uint64{1, 501, 511, 991, 1001, 1051, 1091} {
		ops = append(ops, kv.Op{Key: dataKey(seq), Delete: true})
	}
	if err := r.store.ApplyWait(ops); err != nil {
		t.Fatal(err)
	}
	newest, backlog, c := r.parts("cloud", "telemetry")
	live, end := readOn(t, newest, 1<<20)
	if diff := cmp.Diff(append(seq(1011, 1051), seq(1061, 1091)...), live); diff != "" {
		t.Fatal(diff)
	}
	newest.Resolve(end, spool.Delivered)
	if a := r.account("cloud", "telemetry"); a.Evicted.Messages != 30 || a.Islands != 1 {
		t.Errorf("after the newest: %+v, want 30 of them evicted", a)
	}
	old, end := readOn(t, backlog, 3000)
	if diff := cmp.Diff(append(seq(11, 501), seq(521, 991)...), old); diff != "" {
		t.Fatal(diff)
	}
	backlog.Resolve(end, spool.Delivered)
	a := r.account("cloud", "telemetry")
	if a.Evicted.Messages != 70 || a.Delivered.Messages != 1030 || a.Pending.Messages != 0 || a.Islands != 0 {
		t.Errorf("at the end: %+v", a)
	}
	lost := announced(t, r, c)
	for s := 1; s <= 1100; s++ {
		want := 0
		for _, from := range []int{1, 501, 511, 991, 1001, 1051, 1091} {
			if s >= from && s < from+10 {
				want = 1
			}
		}
		if len(lost[s]) != want {
			t.Errorf("sequence %d was announced as lost %d times, want %d", s, len(lost[s]), want)
		}
	}
}

// announced returns the reasons under which each sequence of a lane was announced as lost.
func announced(t testing.TB, r *rig, c *spool.Consumer) map[int][]string {
	t.Helper()
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	lost := map[int][]string{}
	system := c.Lanes()[0]
	system.Rewind()
	for {
		run, err := system.Next(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if run.Count == 0 {
			return lost
		}
		var rec spool.Record
		for raw := run.Raw; len(raw) > 0; {
			n, err := spool.ParseRecord(raw, &rec)
			if err != nil {
				t.Fatal(err)
			}
			raw = raw[n:]
			var gap struct {
				First, Last, Count int
				Reason             string
			}
			if err := json.Unmarshal(rec.Payload, &gap); err != nil {
				t.Fatal(err)
			}
			if gap.Count != gap.Last-gap.First+1 {
				t.Errorf("gap %s: the count is wrong", rec.Payload)
			}
			for s := gap.First; s <= gap.Last; s++ {
				lost[s] = append(lost[s], gap.Reason)
			}
		}
	}
}

// TestLiveModel drives a lane that drains live_first and a plain slice with the same operations: appends, reads and ends on
// both readers, rewinds, parked and expired messages, a rule that drops the oldest, restarts, and changes of the
// order. Each message has one end, the accounts are the model's counts, and what is announced is what is lost.
func TestLiveModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		const pending = spool.Outcome(-1)
		fs := vfs.NewMem()
		cfg := lanes("lane")
		cfg.Upstreams = map[string][]string{"cloud": nil}
		cfg.TailBytes = int64(rapid.SampledFrom([]int{1, 20_000, 1 << 20}).Draw(rt, "tail"))
		type part struct {
			rd   *spool.Reader
			runs []spool.Run // read and without an end
			last uint64      // sequence behind the last one read since a rewind
		}
		var (
			ends     []spool.Outcome // of sequence i+1
			now      time.Duration
			r        *rig
			parts    []*part
			consumer *spool.Consumer
		)
		start := func(rt *rapid.T) {
			cfg.Lanes[0].Drain = rapid.SampledFrom([]spool.Drain{spool.LiveFirst, spool.LiveFirst, spool.InOrder}).Draw(rt, "drain")
			r = open(t, fs, cfg)
			spool.SetElapsed(r.Spool, func() time.Duration { return now })
			newest, backlog, c := r.parts("cloud", "lane")
			consumer, parts = c, []*part{{rd: newest}}
			if backlog != nil {
				parts = append(parts, &part{rd: backlog})
			}
		}
		stop := func() {
			consumer.Close()
			if err := r.store.Flush(); err != nil {
				rt.Fatal(err)
			}
			r.close()
		}
		inFlight := func(seq uint64) bool {
			for _, p := range parts {
				for _, run := range p.runs {
					if run.Pos.Seq <= seq && seq < run.End().Seq {
						return true
					}
				}
			}
			return false
		}
		readOne := func(rt *rapid.T, p *part, most int) bool {
			run, err := p.rd.Next(most)
			if err != nil {
				rt.Fatal(err)
			}
			if run.Count == 0 {
				return false
			}
			if run.Pos.Seq < p.last {
				rt.Fatalf("read %d after %d", run.Pos.Seq, p.last)
			}
			for i, n := range numbers(t, run.Raw, run.Count) {
				seq := run.Pos.Seq + uint64(i)
				switch {
				case n != int(seq)-1:
					rt.Fatalf("sequence %d holds %d", seq, n)
				case ends[seq-1] != pending:
					rt.Fatalf("sequence %d was read, but ended as %d", seq, ends[seq-1])
				case inFlight(seq):
					rt.Fatalf("sequence %d was read twice", seq)
				}
			}
			if run.Behind != 0 {
				for seq := uint64(1); seq < run.Behind; seq++ {
					if ends[seq-1] == pending {
						rt.Fatalf("backlog from %d on, but %d is pending", run.Behind, seq)
					}
				}
			} else if p == parts[0] && len(parts) > 1 {
				for seq := uint64(1); seq < run.Pos.Seq; seq++ {
					if ends[seq-1] == pending && !inFlight(seq) {
						rt.Fatalf("no backlog before %d, but %d is pending", run.Pos.Seq, seq)
					}
				}
			}
			p.last = run.End().Seq
			run.Raw = make([]byte, len(run.Raw)) // for End
			p.runs = append(p.runs, run)
			return true
		}
		resolve := func(p *part, k int, o spool.Outcome) {
			for i, run := range p.runs[:k] {
				for seq := run.Pos.Seq; seq < run.End().Seq; seq++ {
					if ends[seq-1] == pending {
						ends[seq-1] = o
					}
				}
				if o != spool.Parked {
					continue
				}
				if err := p.rd.Park(p.runs[i].End(), []byte("record"), "no"); err != nil {
					rt.Fatal(err)
				}
			}
			if o != spool.Parked {
				p.rd.Resolve(p.runs[k-1].End(), o)
			}
			p.runs = p.runs[k:]
		}
		rewind := func(p *part) {
			p.rd.Rewind()
			p.runs, p.last = nil, 0
		}
		pick := func(rt *rapid.T) *part { return parts[rapid.IntRange(0, len(parts)-1).Draw(rt, "part")] }
		start(rt)
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				n := rapid.SampledFrom([]int{1, 20, 500}).Draw(rt, "n")
				r.put("lane", len(ends), len(ends)+n)
				for range n {
					ends = append(ends, pending)
				}
			},
			"outage": func(rt *rapid.T) { // a backlog that is worth a leap
				for range 2 {
					r.put("lane", len(ends), len(ends)+450)
					for range 450 {
						ends = append(ends, pending)
					}
					now += time.Duration(rapid.SampledFrom([]int{0, 10, 100}).Draw(rt, "seconds")) * time.Second
				}
			},
			"flap": func(rt *rapid.T) { // the link comes back after such an outage, for a moment
				r.put("lane", len(ends), len(ends)+450)
				now += time.Hour
				r.put("lane", len(ends)+450, len(ends)+460)
				for range 460 {
					ends = append(ends, pending)
				}
				for _, p := range parts {
					rewind(p)
				}
				if readOne(rt, parts[0], rapid.IntRange(1, 3000).Draw(rt, "max")) && rapid.Bool().Draw(rt, "acked") {
					resolve(parts[0], 1, spool.Delivered)
				}
			},
			"time": func(rt *rapid.T) { now += time.Duration(rapid.IntRange(0, 10_000).Draw(rt, "ms")) * time.Millisecond },
			"read": func(rt *rapid.T) { readOne(rt, pick(rt), rapid.IntRange(1, 100_000).Draw(rt, "max")) },
			"resolve": func(rt *rapid.T) {
				p := pick(rt)
				if len(p.runs) == 0 {
					return
				}
				o := rapid.SampledFrom([]spool.Outcome{spool.Delivered, spool.Delivered, spool.Expired, spool.Parked}).Draw(rt, "outcome")
				resolve(p, rapid.IntRange(1, len(p.runs)).Draw(rt, "runs"), o)
			},
			"rewind": func(rt *rapid.T) { rewind(pick(rt)) },
			"link lost": func(*rapid.T) {
				for _, p := range parts {
					rewind(p)
				}
			},
			"drop": func(rt *rapid.T) {
				starts := chunkStarts(t, r)
				to := starts[rapid.IntRange(0, len(starts)-1).Draw(rt, "chunk")]
				if err := spool.DropBefore(r.Spool, "lane", to); err != nil {
					rt.Fatal(err)
				}
				for i := range ends[:to-1] {
					if ends[i] == pending {
						ends[i] = spool.Evicted
					}
				}
			},
			"restart": func(rt *rapid.T) {
				stop()
				start(rt)
			},
			"": func(rt *rapid.T) {
				count := map[spool.Outcome]uint64{}
				for _, o := range ends {
					count[o]++
				}
				a := r.account("cloud", "lane")
				got := fmt.Sprint(a.Accepted.Messages, a.Delivered.Messages, a.Parked.Messages, a.Expired.Messages, a.Evicted.Messages, a.Pending.Messages)
				want := fmt.Sprint(len(ends), count[spool.Delivered], count[spool.Parked], count[spool.Expired], count[spool.Evicted], count[pending])
				if got != want || a.Islands > spool.MaxIslands || a.Backlog.Messages > a.Pending.Messages {
					rt.Fatalf("accounts %s, want %s; %+v", got, want, a)
				}
			},
		})
		// Let everything come to an end.
		for _, p := range parts {
			rewind(p)
		}
		for more := true; more; {
			more = false
			for _, p := range parts {
				if readOne(rt, p, 50_000) {
					more = true
					resolve(p, len(p.runs), spool.Delivered)
				}
			}
		}
		if a := r.account("cloud", "lane"); a.Pending.Messages != 0 || a.Islands != 0 {
			rt.Fatalf("nothing is left to read, but %+v", a)
		}
		lost := announced(t, r, consumer)
		for i, o := range ends {
			reasons := map[spool.Outcome]string{spool.Expired: "[expired]", spool.Parked: "[parked]", spool.Evicted: "[max_bytes]", spool.Delivered: "[]", pending: "[]"}
			if got := fmt.Sprint(lost[i+1]); got != reasons[o] {
				rt.Fatalf("sequence %d ended as %d and was announced as lost for %s", i+1, o, got)
			}
		}
		r.verify()
		stop()
	})
}

// TestCrashWithIslands takes the power away at random moments while the newest go first. What is acknowledged is delivered or
// still there, the accounts add up, and at most what was resolved since the last commit is read again.
func TestCrashWithIslands(t *testing.T) {
	seed := *crashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	var fs *vfs.MemFS
	var acked, committed uint64 // sequences up to here are acknowledged; were, when the last look at the disk was taken
	var resolved map[uint64]bool
	var messages uint64 // of the stores before
	islands := 0
	for i := range *crashes {
		if i%crashesPerStore == 0 {
			messages += acked
			fs, resolved, acked, committed = vfs.NewCrashableMem(), map[uint64]bool{}, 0, 0
		}
		rng := rand.New(rand.NewPCG(seed+uint64(i), 3))
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf(format+"; again with: -crashes %d -crash-seed %d", append(args, i+1, seed)...)
		}
		cfg := liveFirst("lane")
		cfg.Upstreams = map[string][]string{"cloud": nil}
		cfg.TailBytes = 64 << 10
		r := openOnce(t, kv.Options{FS: fs}, nil, cfg)
		var now time.Duration
		spool.SetElapsed(r.Spool, func() time.Duration { return now })
		r.verify()
		newest, backlog, c := r.parts("cloud", "lane")
		a := r.account("cloud", "lane")
		if a.Accepted.Messages < acked {
			fail("%d messages left of %d that were acknowledged", a.Accepted.Messages, acked)
		}
		acked = a.Accepted.Messages
		// Everything that is pending can be read, once, and everything else was resolved.
		found := map[uint64]bool{}
		for _, rd := range []*spool.Reader{newest, backlog} {
			seqs, _ := readOn(t, rd, 50_000)
			for k, s := range seqs {
				if found[uint64(s)] || k > 0 && s <= seqs[k-1] {
					fail("sequence %d is read twice or out of order", s)
				}
				found[uint64(s)] = true
			}
		}
		if uint64(len(found)) != a.Pending.Messages {
			fail("%d messages are pending, %d can be read", a.Pending.Messages, len(found))
		}
		for s := uint64(1); s <= acked; s++ {
			if !found[s] && !resolved[s] {
				fail("sequence %d was acknowledged and is neither there nor delivered", s)
			}
			if s <= committed && resolved[s] && found[s] {
				delete(resolved, s) // it will be resolved again
			}
		}
		newest.Rewind()
		backlog.Rewind()
		var read [2]uint64 // sequences from here on were read since the last rewind
		for range 5 + rng.IntN(10) {
			r.put("lane", int(acked), int(acked)+450)
			acked += 450
			now += time.Duration(rng.IntN(20)) * time.Second
			for k, rd := range []*spool.Reader{newest, backlog} {
				if rng.IntN(8) == 0 {
					rd.Rewind()
					read[k] = 0
				}
				for range rng.IntN(4) {
					run, err := rd.Next(1 + rng.IntN(60_000))
					if err != nil {
						fail("next: %v", err)
					}
					if run.Count == 0 {
						break
					}
					if read[k] == 0 {
						read[k] = run.Pos.Seq
					}
					if rng.IntN(3) > 0 {
						rd.Resolve(run.End(), spool.Delivered)
						for s := read[k]; s < run.End().Seq; s++ {
							resolved[s] = true // at most: what is between and of the other reader is found
						}
						read[k] = 0
					}
				}
			}
			islands = max(islands, r.account("cloud", "lane").Islands)
		}
		committed = acked
		left := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: []int{0, 0, 30, 70, 100}[rng.IntN(5)], RNG: rng})
		c.Close()
		r.close()
		fs = left
	}
	if islands == 0 {
		t.Error("there never was an island: the test has shown nothing")
	}
	t.Logf("%d crashes, seed %d: %d messages, up to %d islands", *crashes, seed, messages+acked, islands)
}
