package kv_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
)

const mib = 1 << 20

// fakeDisk is a file system of which somebody says how full it is.
type fakeDisk struct{ free, total atomic.Uint64 }

func newFakeDisk(free, total uint64) *fakeDisk {
	d := &fakeDisk{}
	d.free.Store(free)
	d.total.Store(total)
	return d
}

func (d *fakeDisk) usage() (kv.Usage, error) {
	return kv.Usage{Free: d.free.Load(), Total: d.total.Load()}, nil
}

func TestReserve(t *testing.T) {
	for _, tc := range []struct {
		want  int64
		total uint64
		is    int64
	}{
		{0, 0, 1 << 40 / 100},
		{0, 64 * mib, 8 * mib},   // a tiny one: an eighth
		{0, 512 * mib, 64 * mib}, // 64 MiB
		{0, 4 << 30, 64 * mib},   // 64 MiB
		{0, 100 << 30, 1 << 30},  // 1 %
		{256 * mib, 4 << 30, 256 * mib},
		{64 * mib, 96 * mib, 48 * mib}, // never more than a half
	} {
		if got := kv.Reserve(tc.want, tc.total); got != tc.is {
			t.Errorf("of %d MiB, %d MiB wanted: %d, want %d", tc.total/mib, tc.want/mib, got, tc.is)
		}
	}
}

// TestLevelsHaveHysteresis fills a disk and empties it again.
func TestLevelsHaveHysteresis(t *testing.T) {
	disk := newFakeDisk(1<<30, 10<<30)
	s := open(t, kv.Options{FS: vfs.NewMem(), Guard: &kv.Guard{Reserve: 100 * mib, Usage: disk.usage}})
	levels := make(chan kv.Level, 100)
	s.OnLevel(func(l kv.Level) { levels <- l })
	for _, step := range []struct {
		free  uint64
		level kv.Level
	}{
		{200, kv.LevelOK},
		{199, kv.LevelHigh},
		{224, kv.LevelHigh},
		{225, kv.LevelOK},
		{199, kv.LevelHigh},
		{100, kv.LevelHigh},
		{99, kv.LevelFull},
		{0, kv.LevelFull},
		{124, kv.LevelFull},
		{125, kv.LevelHigh},
		{100, kv.LevelHigh},
		{99, kv.LevelFull},
		{1000, kv.LevelOK},
	} {
		disk.free.Store(step.free * mib)
		was := s.Level()
		d := s.CheckDisk()
		if d.Level != step.level || s.Level() != step.level {
			t.Fatalf("with %d MiB free after %v: %v, want %v", step.free, was, d.Level, step.level)
		}
		if want := int64(125-int(step.free)) * mib; d.Level == kv.LevelFull && d.Resume != want {
			t.Errorf("with %d MiB free %d bytes have to be freed, want %d", step.free, d.Resume, want)
		}
		if d.Level != was {
			if told := <-levels; told != step.level {
				t.Errorf("%v is told, want %v", told, step.level)
			}
		}
	}
}

// TestBallastIsRealAndGivenUpInParts uses a real folder.
func TestBallastIsRealAndGivenUpInParts(t *testing.T) {
	disk := newFakeDisk(1<<30, 10<<30)
	path := filepath.Join(t.TempDir(), "reserve")
	var broken atomic.Int64 // so many writes find no space
	efs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileWrite && broken.Load() > 0 && broken.Add(-1) >= 0 {
			return syscall.ENOSPC
		}
		return nil
	}))
	fatal := func(err error) { t.Errorf("store failed: %v", err) }
	s := open(t, kv.Options{FS: efs, Fatal: fatal, Guard: &kv.Guard{Reserve: 16 * mib, Usage: disk.usage, Ballast: path}})
	size := func() int64 {
		fi, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return 0
		} else if err != nil {
			t.Fatal(err)
		}
		if got := fi.Sys().(*syscall.Stat_t).Blocks * 512; got < fi.Size() {
			t.Fatalf("%d bytes have only %d bytes of blocks", fi.Size(), got)
		}
		return fi.Size()
	}
	wait := func(what string, want int64) {
		t.Helper()
		for begin := time.Now(); size() != want; {
			if time.Since(begin) > 10*time.Second {
				t.Fatalf("%s: the ballast has %d bytes, want %d", what, size(), want)
			}
			s.CheckDisk()
		}
	}
	wait("at the start", 8*mib)
	disk.free.Store(0)
	s.CheckDisk()
	for i, left := range []int64{6 * mib, 4*mib + mib/2} { // a quarter each time
		broken.Store(1)
		if err := s.ApplyWait([]kv.Op{row(i)}); err != nil {
			t.Fatal(err)
		}
		wait("after a write without space", left)
		if s.Level() != kv.LevelFull {
			t.Error("the disk is not called full")
		}
	}
	if d := s.Disk(); d.Ballast != size() {
		t.Errorf("the store thinks that the ballast has %d bytes, it has %d", d.Ballast, size())
	}
	disk.free.Store(1 << 30)
	wait("with room again", 8*mib)
	if s.Level() == kv.LevelFull {
		t.Error("the disk is still called full")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if size() != 8*mib {
		t.Error("the ballast goes with the process")
	}
}

// kindName gives the name of an operation that writes, "" for others.
func kindName(k errorfs.OpKind) string {
	return map[errorfs.OpKind]string{
		errorfs.OpCreate: "create", errorfs.OpFileWrite: "write", errorfs.OpFileWriteAt: "write_at", errorfs.OpFileSync: "sync",
		errorfs.OpFileSyncData: "sync_data", errorfs.OpFileSyncTo: "sync_to", errorfs.OpRename: "rename", errorfs.OpReuseForWrite: "reuse",
		errorfs.OpRemove: "remove", errorfs.OpLink: "link", errorfs.OpMkdirAll: "mkdir", errorfs.OpFilePreallocate: "preallocate",
		errorfs.OpOpenDir: "open_dir", errorfs.OpFileClose: "close",
	}[k]
}

// TestDiskFaults lets the disk fail at each kind of write, at many places of it, at the start and at work, once, for a
// while and for good, and looks at what a restart after a power cut finds: what was acknowledged is there, nothing hangs,
// and the store either goes on or says in one line why not. A store that fails is left as it is, so this runs in a
// process of its own. HOLDFAST_FAULT_SEED and HOLDFAST_FAULTS (cases) replay and prolong it.
func TestDiskFaults(t *testing.T) {
	seed, cases := uint64(time.Now().UnixNano()), 40
	if v := os.Getenv("HOLDFAST_FAULT_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	if v := os.Getenv("HOLDFAST_FAULTS"); v != "" {
		cases, _ = strconv.Atoi(v)
	}
	if os.Getenv(childEnv) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDiskFaults$", "-test.v")
		cmd.Env = append(os.Environ(), childEnv+"=1", "HOLDFAST_FAULT_SEED="+strconv.FormatUint(seed, 10))
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestDiskFaults")) {
			t.Fatalf("HOLDFAST_FAULT_SEED=%d: %v\n%s", seed, err, out)
		}
		return
	}
	// What there is to fail at: a life without faults, counted.
	places, times := (&fault{}).count(t)
	ends := map[string]int{}
	for i := range cases {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		f := &fault{
			place: places[i%len(places)],
			err:   []error{syscall.ENOSPC, syscall.EIO}[(i+i/len(places)+int(seed%2))%2],
			mode:  []string{"once", "a while", "for good"}[rng.IntN(3)],
		}
		f.skip = rng.Int64N(times[f.place])
		begin := time.Now()
		end := f.run(t, rng)
		ends[end]++
		if os.Getenv("HOLDFAST_FAULTS_SHOW") != "" {
			t.Logf("%v ended %s (%v)", f, end, time.Since(begin).Round(time.Millisecond))
		}
		if t.Failed() {
			t.Fatalf("case %d: %v ended %s", i, f, end)
		}
	}
	t.Logf("how %d cases ended: %v", cases, ends)
	for _, end := range []string{"went on", "failed"} {
		if cases >= 40 && ends[end] < cases/10 {
			t.Errorf("only %d cases %s", ends[end], end)
		}
	}
}

// place is where a fault happens.
type place struct {
	kind errorfs.OpKind
	file string // what kind of file: log, sst, MANIFEST …
	open bool   // while the store is opened for the second time
}

func (p place) String() string {
	when := "at work"
	if p.open {
		when = "at the start"
	}
	return fmt.Sprintf("%s of a %s %s", kindName(p.kind), p.file, when)
}

// fileKind gives the kind of file that a path names.
func fileKind(path string) string {
	base := filepath.Base(path)
	for _, kind := range []string{".log", ".sst", "MANIFEST", "OPTIONS", "marker", "LOCK"} {
		if strings.Contains(base, kind) {
			return strings.Trim(kind, ".")
		}
	}
	return "folder"
}

type fault struct {
	place
	err  error
	mode string
	skip int64 // so many go well before

	opening atomic.Bool
	armed   atomic.Bool
	seen    atomic.Int64
	until   atomic.Int64 // Unix ns; 0: it has not begun
	met     atomic.Int64

	mu      sync.Mutex
	counted map[place]int64 // nil: faults happen
}

func (f *fault) String() string {
	return fmt.Sprintf("%v: %v, %s, after %d, met %d times", f.place, f.err, f.mode, f.skip, f.met.Load())
}

func (f *fault) inject(op errorfs.Op) error {
	at := place{op.Kind, fileKind(op.Path), f.opening.Load()}
	if !f.armed.Load() || kindName(op.Kind) == "" {
		return nil
	}
	if f.counted != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.counted[at]++
		return nil
	}
	if at.kind != f.kind || at.file != f.file || f.met.Load() == 0 && at.open != f.open {
		return nil
	}
	if at.open == f.open && f.seen.Add(1) <= f.skip {
		return nil
	}
	switch f.mode {
	case "once":
		if f.met.Load() > 0 {
			return nil
		}
	case "a while":
		f.until.CompareAndSwap(0, time.Now().Add(150*time.Millisecond).UnixNano())
		if time.Now().UnixNano() > f.until.Load() {
			return nil
		}
	}
	f.met.Add(1)
	return f.err
}

// count gives the places that a life meets, in a fixed order, and how often.
func (f *fault) count(t *testing.T) ([]place, map[place]int64) {
	f.counted = map[place]int64{}
	f.run(t, rand.New(rand.NewPCG(1, 1)))
	places := slices.SortedFunc(maps.Keys(f.counted), func(a, b place) int { return strings.Compare(a.String(), b.String()) })
	if len(places) < 15 {
		t.Fatalf("only %v", places)
	}
	return places, f.counted
}

const (
	faultRows = 280
	faultSize = 16 << 10
)

// run is a life of a store: it is filled, emptied in part, and lives on after what happened.
func (f *fault) run(t *testing.T, rng *rand.Rand) (end string) {
	mem := vfs.NewCrashableMem()
	fatal := make(chan error, 1)
	options := func() kv.Options {
		disk := newFakeDisk(1<<30, 10<<30)
		o := kv.Options{
			FS: errorfs.Wrap(mem, errorfs.InjectorFunc(f.inject)), Log: discard(), Fatal: func(err error) { fatal <- err },
			Guard: &kv.Guard{Reserve: 8 * mib, Usage: disk.usage}, // small memtables
		}
		o.SetFullWait(400 * time.Millisecond)
		return o
	}
	// within runs what must come to an end.
	within := func(what string, fn func() error) error {
		done := make(chan error, 1)
		go func() { done <- fn() }()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			stacks := make([]byte, 1<<20)
			t.Errorf("%v: %s hangs\n%s", f, what, stacks[:runtime.Stack(stacks, true)])
			return errors.New("hangs")
		}
	}
	var s *kv.Store
	start := func() error {
		return within("open", func() (err error) { s, err = kv.Open("data", options()); return err })
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if err := s.ApplyWait([]kv.Op{faultRow(i)}); err != nil {
			t.Fatal(err)
		}
	}
	acked := 100
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f.armed.Store(true)
	f.opening.Store(true)
	if err := start(); err != nil {
		return f.judge(t, mem, acked, 0, err, fatal, rng)
	}
	f.opening.Store(false)
	excised := 0
	var failed error
	for i := 100; i < faultRows && failed == nil; i++ {
		if failed = within("apply", func() error { return s.ApplyWait([]kv.Op{faultRow(i)}) }); failed == nil {
			acked = i + 1
		}
		if i%60 == 59 && failed == nil {
			if failed = within("excise", func() error { return excise(s, i-60, fatal) }); failed == nil {
				excised = i - 60
			} else {
				excised = -1 // it may have taken effect, or not
			}
		}
	}
	if failed == nil {
		failed = within("close", s.Close)
	}
	return f.judge(t, mem, acked, excised, failed, fatal, rng)
}

// excise does not come back from a store that fails.
func excise(s *kv.Store, to int, fatal chan error) error {
	done := make(chan error, 1)
	go func() { done <- s.Excise(faultRow(0).Key, faultRow(to).Key) }()
	select {
	case err := <-done:
		return err
	case err := <-fatal:
		fatal <- err
		return err
	}
}

func faultRow(i int) kv.Op {
	op := row(i)
	op.Value = bytes.Repeat([]byte{byte(i), byte(i >> 8), byte(i * 31)}, faultSize/3)
	return op
}

// judge cuts the power and looks at what is left.
func (f *fault) judge(t *testing.T, mem *vfs.MemFS, acked, excised int, failed error, fatal chan error, rng *rand.Rand) string {
	end := "went on"
	if f.met.Load() == 0 {
		end = "not met"
	}
	if failed != nil {
		end = "failed"
		said := ""
		wait := 10 * time.Second
		if f.opening.Load() { // Open itself says it, too
			wait, said = 0, failed.Error()
		}
		select {
		case err := <-fatal:
			said = err.Error()
		case <-time.After(wait):
		}
		if said == "" || strings.Contains(said, "\n") {
			t.Errorf("%v: %v, and what is told is %q", f, failed, said)
		}
		if errors.Is(f.err, syscall.ENOSPC) && f.mode != "for good" && !strings.HasPrefix(said, "sync ") && !strings.HasPrefix(said, "pebble: ") && !f.open {
			t.Errorf("%v: a disk that was full for a moment ended the store: %s", f, said)
		}
	} else if errors.Is(f.err, syscall.EIO) && f.met.Load() > 0 && (f.kind == errorfs.OpFileSync || f.kind == errorfs.OpFileSyncData || f.kind == errorfs.OpFileWrite) {
		t.Errorf("%v: the store goes on over a failed %s", f, kindName(f.kind))
	}
	crashed := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: []int{0, 50, 100}[rng.IntN(3)], RNG: rng})
	s, err := kv.Open("data", kv.Options{FS: crashed, Log: discard(), Fatal: func(err error) { t.Errorf("after a restart: %v", err) }})
	if err != nil {
		t.Errorf("%v: it does not start again: %v", f, err)
		return end
	}
	defer s.Close()
	if excised < 0 {
		excised = acked
	}
	var missing []int
	for i := excised; i < acked; i++ {
		v, found, err := s.Get(faultRow(i).Key)
		if err != nil || !found || !bytes.Equal(v, faultRow(i).Value) {
			missing = append(missing, i)
		}
	}
	if d := cmp.Diff([]int(nil), missing); d != "" {
		t.Errorf("%v: acknowledged and not there: %s", f, d)
	}
	return end
}

// TestNoSpaceRefusesAndHealsByItself has tables find no space for a while: nothing that waits hangs beyond it.
func TestNoSpaceRefusesAndHealsByItself(t *testing.T) {
	var full atomic.Bool
	efs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && (op.Kind == errorfs.OpCreate || op.Kind == errorfs.OpFileWrite) && strings.HasSuffix(op.Path, ".sst") {
			return syscall.ENOSPC
		}
		return nil
	}))
	disk := newFakeDisk(1<<30, 10<<30)
	s := open(t, kv.Options{
		FS: efs, Fatal: func(err error) { t.Errorf("store failed: %v", err) },
		Guard: &kv.Guard{Reserve: 8 * mib, Usage: disk.usage},
	})
	full.Store(true)
	var rec recorder
	n, refused := 0, false
	for begin := time.Now(); time.Since(begin) < 20*time.Second && !refused; {
		g, err := s.BeginMessage(true, false)
		switch {
		case errors.Is(err, kv.ErrDiskFull):
			refused = true
			continue
		case err != nil:
			t.Fatal(err)
		}
		op := faultRow(n)
		g.Set(op.Key, op.Value)
		g.Done(&rec, uint64(n), 0)
		g.End()
		n++
	}
	if !refused || s.Level() != kv.LevelFull {
		t.Fatalf("after %d rows nothing is refused, the level is %v", n, s.Level())
	}
	full.Store(false)
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if len(rec.got) != n || rec.err != nil {
		t.Errorf("%d of %d rows committed, %v", len(rec.got), n, rec.err)
	}
	for begin := time.Now(); s.Level() != kv.LevelOK; s.CheckDisk() {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("the level stays")
		}
	}
}

// TestWaitRemovedWaitsForCompactions: a compaction that runs still reads the tables that are excised under it, so their space is not free yet.
func TestWaitRemovedWaitsForCompactions(t *testing.T) {
	var hold, ended atomic.Bool
	stuck, release := make(chan struct{}), make(chan struct{})
	disk := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpCreate && strings.HasSuffix(op.Path, ".sst") && hold.CompareAndSwap(true, false) {
			close(stuck)
			<-release
		}
		return nil
	}))
	s := openAt(t, disk, "data", nil)
	defer s.Close()
	compacted := make(chan struct{})
	for held := false; !held; { // until a compaction is held, which may have been over before it was to be
		for range 2 { // tables that overlap
			for i := range 50 {
				if err := s.ApplyWait([]kv.Op{{Key: row(i).Key, Value: make([]byte, 20_000)}}); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.FlushTables(); err != nil {
				t.Fatal(err)
			}
		}
		hold.Store(true)
		compacted = make(chan struct{})
		go func() {
			defer close(compacted)
			_ = s.Compact(t.Context()) // the excise may call it off
		}()
		select {
		case <-stuck:
			held = true
		case <-compacted:
			held = !hold.Swap(false)
		}
	}
	if err := s.Excise(row(0).Key, kv.PrefixEnd([]byte{kv.PrefixSession})); err != nil {
		t.Fatal(err)
	}
	go func() {
		<-time.After(300 * time.Millisecond) // less than it waits
		ended.Store(true)
		close(release)
	}()
	if err := s.WaitRemoved(nil); err != nil || !ended.Load() {
		t.Errorf("it has not waited for the compaction: %v", err)
	}
	<-compacted
}

// TestFlushCalledOffByAnExcise: Pebble calls off a flush whose rows lie around the range, and does it again. That is no failure.
func TestFlushCalledOffByAnExcise(t *testing.T) {
	var hold atomic.Bool
	stuck, release := make(chan struct{}), make(chan struct{})
	disk := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpCreate && strings.HasSuffix(op.Path, ".sst") && hold.CompareAndSwap(true, false) {
			close(stuck)
			<-release
		}
		return nil
	}))
	var said bytes.Buffer
	s := openAt(t, disk, "data", func(o *kv.Options) { o.Log = slog.New(slog.NewTextHandler(&said, nil)) })
	put := func(prefixes ...byte) {
		t.Helper()
		for _, prefix := range prefixes {
			if err := s.ApplyWait([]kv.Op{{Key: []byte{prefix, 1}, Value: []byte("x")}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(kv.PrefixParked)
	if err := s.FlushTables(); err != nil {
		t.Fatal(err)
	}
	put(kv.PrefixMeta, kv.PrefixSession) // around it
	hold.Store(true)
	flushed := make(chan error, 1)
	go func() { flushed <- s.FlushTables() }()
	<-stuck
	if err := s.Excise([]byte{kv.PrefixParked}, kv.PrefixEnd([]byte{kv.PrefixParked})); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []byte{kv.PrefixMeta, kv.PrefixParked, kv.PrefixSession} {
		if _, found, err := s.Get([]byte{prefix, 1}); err != nil || found != (prefix != kv.PrefixParked) {
			t.Errorf("row %c: %t, %v", prefix, found, err)
		}
	}
	if err := s.Close(); err != nil || said.Len() > 0 {
		t.Errorf("%v; the log says\n%s", err, said.String())
	}
}
