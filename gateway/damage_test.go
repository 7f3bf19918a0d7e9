package gateway_test

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/devices"
	"holdfast/gateway"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

var (
	damages    = flag.Int("damages", 60, "how many damaged stores to start from")
	damageSeed = flag.Uint64("damage-seed", 0, "the first one's seed")
)

// stored is what a gateway had acknowledged when its power went.
type stored struct {
	fs       *vfs.MemFS
	epoch    string
	messages map[string][]uint64        // by lane: the sequences of what was acknowledged, in order; the payload tells lane and number
	resolved map[string]map[uint64]bool // by lane: what the upstream has
	devices  []string
	commands []string
}

const damageTopic = "gw/gw1/evt/gap"

// damagePayload tells which message it is.
func damagePayload(lane string, n, size int, rnd *rand.Rand) []byte {
	b := fmt.Appendf(nil, "%s %d ", lane, n)
	for len(b) < 20+size/2+rnd.IntN(size) {
		b = binary.LittleEndian.AppendUint64(b, rnd.Uint64())
	}
	return b
}

// parts is a gateway's store and those who write to it.
type parts struct {
	store    *kv.Store
	clock    *clock.Clock
	spool    *spool.Spool
	registry *devices.Registry
	queue    *devices.Queue
}

func (p *parts) close() error {
	var err error
	if p.spool != nil {
		err = p.spool.Close()
	}
	return errors.Join(err, p.store.Close())
}

// openParts opens them as a gateway does.
func openParts(fs vfs.FS, fatal func(error), change func(*kv.Options)) (*parts, error) {
	log := slog.New(slog.DiscardHandler)
	o := kv.Options{
		FS: fs, Log: log, Fatal: fatal,
		// A disk so small that tables have 1 MiB.
		Guard: &kv.Guard{Reserve: 8 << 20, Usage: func() (kv.Usage, error) { return kv.Usage{Free: 1 << 40, Total: 1 << 41}, nil }},
	}
	if change != nil {
		change(&o)
	}
	p := &parts{}
	var err error
	if p.store, err = kv.Open("data/store", o); err != nil {
		return nil, err
	}
	if p.clock, err = clock.Open(p.store, clock.Config{Log: log}); err != nil {
		return nil, errors.Join(err, p.close())
	}
	p.spool, err = spool.Open(p.store, spool.Config{
		Gateway: "gw1", GapTopic: damageTopic, Clock: p.clock, Log: log, Upstreams: map[string][]string{"cloud": nil},
		Lanes: []spool.LaneConfig{
			{Name: "alarm", Share: 50, WhenFull: spool.Reject},
			{Name: "telemetry", Share: 40, MaxBytes: 64 << 20, WhenFull: spool.DropOldest, Drain: spool.LiveFirst},
		},
	})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	journal := gateway.NewJournal(p.spool, "gw1")
	p.registry, err = devices.OpenRegistry(p.store, devices.RegistryConfig{Journal: journal, Log: log, Now: p.clock.Time, Kick: func(string, string, bool) {}})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	p.queue, err = devices.OpenQueue(p.store, devices.QueueConfig{Journal: journal, Known: p.registry.Known, Log: log, Clock: p.clock})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// fillStore has a gateway take messages, deliver a part of them, and know devices and commands.
func fillStore(t *testing.T, seed uint64) *stored {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewCrashableMem()
	size := 400 << (4 * rnd.IntN(2)) // the small ones fit a log, the others fill tables
	p, err := openParts(fs, func(err error) { t.Errorf("store failed: %v", err) }, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	st := &stored{messages: map[string][]uint64{}, resolved: map[string]map[uint64]bool{"alarm": {}, "telemetry": {}, spool.SystemLane: {}}, epoch: p.spool.Epoch()}
	c, err := p.spool.Consumer("cloud", nil)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 4 + rnd.IntN(12) {
		for range rnd.IntN(5) {
			id := fmt.Sprintf("device-%03d", len(st.devices))
			if _, _, err := p.registry.Add(t.Context(), devices.NewDevice{ID: id}); err != nil {
				t.Fatal(err)
			}
			st.devices = append(st.devices, id)
		}
		for range rnd.IntN(8) {
			if len(st.devices) == 0 {
				break
			}
			id := fmt.Sprintf("command-%03d", len(st.commands))
			r := &devices.Request{ID: id, Device: st.devices[rnd.IntN(len(st.devices))], Name: "set", Payload: []byte(id)}
			if _, _, err := p.queue.SubmitWait(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			st.commands = append(st.commands, id)
		}
		for _, lane := range []string{"alarm", "telemetry"} {
			for range 1 + rnd.IntN(4) {
				putMessages(t, p, st, lane, 1+rnd.IntN(40), size, rnd)
			}
		}
		if round == 0 {
			continue
		}
		for _, r := range c.Lanes() {
			for range rnd.IntN(3) {
				run, err := r.Next(1 << rnd.IntN(17))
				if err != nil {
					t.Fatal(err)
				}
				if run.Count > 0 {
					r.Resolve(run.End(), spool.Delivered)
					for seq := run.Pos.Seq; seq < run.End().Seq; seq++ {
						st.resolved[r.Lane()][seq] = true
					}
				}
			}
			r.Rewind()
		}
		if err := p.store.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	st.fs = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rnd})
	return st
}

// putMessages appends n messages that are acknowledged when it returns.
func putMessages(t *testing.T, p *parts, st *stored, lane string, n, size int, rnd *rand.Rand) {
	t.Helper()
	number, ok := p.spool.Lane(lane)
	if !ok {
		t.Fatalf("no lane %q", lane)
	}
	var acks ackNumbers
	for range n {
		now := p.clock.Read()
		r := &spool.Record{
			Received: now.Wall, Uptime: now.Uptime(), Device: []byte("device-000"), Topic: []byte("dt/a/device-000/x"), Flags: spool.FlagQoS1,
			Payload: damagePayload(lane, len(st.messages[lane])+acks.asked, size, rnd),
		}
		acks.asked++
		if err := p.spool.Append(number, r, nil, &acks, 0, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.store.Flush(); err != nil {
		t.Fatal(err)
	}
	acks.mu.Lock()
	defer acks.mu.Unlock()
	if acks.err != nil || len(acks.seqs) != n {
		t.Fatalf("%d of %d acknowledged: %v", len(acks.seqs), n, acks.err)
	}
	st.messages[lane] = append(st.messages[lane], acks.seqs...)
}

type ackNumbers struct {
	asked int
	mu    sync.Mutex
	seqs  []uint64
	err   error
}

func (a *ackNumbers) Done(_, seq uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seqs, a.err = append(a.seqs, seq), cmp.Or(a.err, err)
}

// spoilFiles damages one to three places of a folder's files by what rnd says, and tells which.
func spoilFiles(t *testing.T, fs vfs.FS, dir string, rnd *rand.Rand) (what []string) {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	for range 1 + rnd.IntN(3) {
		name := names[rnd.IntN(len(names))]
		b := readAll(t, fs, path.Join(dir, name))
		if len(b) == 0 {
			continue
		}
		b, how := testkit.Spoil(b, rnd)
		what = append(what, name+": "+how)
		f, err := fs.Create(path.Join(dir, name), vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(b)
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return what
}

func readAll(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// drained is what an upstream gets.
type drained struct {
	messages map[string][]uint64
	gaps     map[string][][2]uint64 // by lane: first and last
}

// drain reads all that is left for the upstream, as often as gaps bring more.
func drain(t *testing.T, p *parts, st *stored) drained {
	t.Helper()
	c, err := p.spool.Consumer("cloud", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d := drained{messages: map[string][]uint64{}, gaps: map[string][][2]uint64{}}
	for idle := 0; idle < 2; idle++ {
		for _, r := range c.Lanes() {
			for {
				run, err := r.Next(64 << 10)
				if err != nil {
					t.Fatalf("read lane %q: %v", r.Lane(), err)
				}
				if run.Count == 0 {
					break
				}
				idle = -1
				d.take(t, st, r.Lane(), run)
				r.Resolve(run.End(), spool.Delivered)
			}
		}
		if err := p.store.Flush(); err != nil { // gaps are announced by a commit
			t.Fatal(err)
		}
	}
	return d
}

func (d *drained) take(t *testing.T, st *stored, lane string, run spool.Run) {
	t.Helper()
	raw, seq := run.Raw, run.Pos.Seq
	for ; len(raw) > 0; seq++ {
		var r spool.Record
		n, err := spool.ParseRecord(raw, &r)
		if err != nil {
			t.Fatal(err)
		}
		raw = raw[n:]
		if lane == spool.SystemLane {
			var g struct {
				Epoch, Lane string
				First, Last uint64
			}
			if string(r.Topic) == damageTopic {
				if err := json.Unmarshal(r.Payload, &g); err != nil {
					t.Fatal(err)
				}
				d.gaps[g.Lane] = append(d.gaps[g.Lane], [2]uint64{g.First, g.Last})
			}
			continue
		}
		d.messages[lane] = append(d.messages[lane], seq)
		if st == nil {
			continue
		}
		i, known := slices.BinarySearch(st.messages[lane], seq)
		if !known {
			t.Errorf("lane %q: message %d was never acknowledged", lane, seq)
		} else if want := fmt.Sprintf("%s %d ", lane, i); !strings.HasPrefix(string(r.Payload), want) {
			t.Errorf("lane %q: message %d is %.20q, not %q", lane, seq, r.Payload, want)
		}
	}
}

// TestDamagedStores starts gateways from stores that are damaged at random places, by seed: none refuses to start, none panics, nothing
// that was acknowledged is missing without a word, and no id is given twice.
func TestDamagedStores(t *testing.T) {
	const perStore = 50 // damaged in so many ways
	var st *stored
	total, places, lost, told := 0, 0, 0, 0
	for i := range uint64(*damages) {
		seed := *damageSeed + i
		if i%perStore == 0 {
			st = fillStore(t, seed)
		}
		fs := st.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(0, 0))})
		rnd := rand.New(rand.NewPCG(seed, 2))
		what := spoilFiles(t, fs, "data/store", rnd)
		total, places = total+1, places+len(what)
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) {
			defer func() {
				if r := recover(); r != nil {
					t.Errorf("panic: %v", r)
				}
				if t.Failed() {
					t.Errorf("damaged were %q; run it alone with -damages=1 -damage-seed=%d if that is a multiple of %d", what, seed, perStore)
				}
			}()
			missing, gaps := startDamaged(t, fs, st, rnd)
			lost, told = lost+missing, told+gaps
		}) {
			return
		}
	}
	t.Logf("%d stores damaged at %d places: 0 refused to start, 0 panics; %d messages lost, all of them told in %d gaps", total, places, lost, told)
}

func startDamaged(t *testing.T, fs vfs.FS, st *stored, rnd *rand.Rand) (lost, gaps int) {
	looked := -1
	if rnd.IntN(3) == 0 {
		looked = verifyDamaged(t, fs)
	}
	var p *parts
	var err error
	failed := make(chan error, 1)
	for try := 0; ; try++ { // a store that failed over damage starts again: what it met is set aside then
		p, err = openParts(fs, func(err error) { failed <- err }, nil)
		if err == nil {
			break
		}
		if try == 2 || len(failed) == 0 {
			t.Fatalf("refused to start: %v", err)
		}
		t.Logf("store failed: %v", <-failed)
	}
	found := len(p.store.Damage())
	d := drain(t, p, st)
	if len(failed) > 0 {
		t.Fatalf("store failed: %v", <-failed)
	}
	for lane, seqs := range st.messages {
		if !ascends(d.messages[lane]) && lane == "alarm" {
			t.Errorf("lane %q is out of order: %v", lane, d.messages[lane])
		}
		got := map[uint64]bool{}
		for _, seq := range d.messages[lane] {
			got[seq] = true
		}
		for _, seq := range seqs {
			if st.resolved[lane][seq] || got[seq] || inGap(d.gaps[lane], seq) {
				continue
			}
			if p.spool.Epoch() != st.epoch {
				continue // nobody knows how far the log went, and that is what a new epoch says
			}
			t.Errorf("lane %q: message %d is missing, and no gap says so: gaps %v", lane, seq, d.gaps[lane])
			break
		}
		for _, seq := range seqs {
			if inGap(d.gaps[lane], seq) && !got[seq] {
				lost++
			}
		}
		gaps += len(d.gaps[lane])
	}
	if looked == 0 && lost > 0 {
		t.Errorf("verify found nothing, and %d messages are lost", lost)
	}
	for _, a := range p.spool.Accounts() {
		if !a.Balanced() {
			t.Errorf("account does not balance: %+v", a)
		}
	}
	gone := 0
	for _, id := range st.devices {
		if _, err := p.registry.Get(id); err != nil {
			gone++
		}
	}
	for _, id := range st.commands {
		if c, err := p.queue.Get(id); err != nil {
			gone++
		} else if c.Name != "set" {
			t.Errorf("command %s has another name: %q", id, c.Name)
		}
	}
	if gone > 0 && found == 0 && p.spool.Recovered() == 0 {
		t.Errorf("%d devices and commands are gone, and nothing is told", gone)
	}
	goesOn(t, p, st)
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	return lost, gaps
}

// goesOn checks that what comes next has ids of its own.
func goesOn(t *testing.T, p *parts, st *stored) {
	t.Helper()
	for _, lane := range []string{"alarm", "telemetry"} {
		after := &stored{messages: map[string][]uint64{}}
		putMessages(t, p, after, lane, 3, 100, rand.New(rand.NewPCG(1, 1)))
		last := st.messages[lane][len(st.messages[lane])-1]
		for _, seq := range after.messages[lane] {
			epoch, _, _ := p.spool.EpochOf(lane, seq)
			if seq <= last && epoch == st.epoch {
				t.Errorf("lane %q: id %d of epoch %s is given again, it went up to %d", lane, seq, epoch, last)
			}
		}
	}
	drain(t, p, nil)
}

func ascends(seqs []uint64) bool { return slices.IsSorted(seqs) }

func inGap(gaps [][2]uint64, seq uint64) bool {
	return slices.ContainsFunc(gaps, func(g [2]uint64) bool { return g[0] <= seq && seq <= g[1] })
}

// verifyDamaged looks at the store as a tool does, and counts what it finds.
func verifyDamaged(t *testing.T, fs vfs.FS) int {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := kv.Open("data/store", kv.Options{FS: fs, Log: log, Look: true, Fatal: func(err error) { t.Errorf("a look failed the store: %v", err) }})
	if err != nil {
		t.Fatalf("a look: %v", err)
	}
	defer func() {
		if names, err := fs.List("data"); err != nil || !slices.Equal(names, []string{"store"}) {
			t.Errorf("a look left %q: %v", names, err)
		}
	}()
	sp, err := spool.Open(store, spool.Config{Log: log})
	if err != nil {
		t.Fatalf("a look: %v", errors.Join(err, store.Close()))
	}
	rep, err := sp.Verify(nil)
	if err = errors.Join(err, sp.Close(), store.Close()); err != nil {
		t.Fatalf("a look: %v", err)
	}
	return len(rep.Problems) + len(store.Damage())
}
