package kv_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/atomicfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

// onlyFile returns the one file of a folder whose name contains part.
func onlyFile(t *testing.T, fs vfs.FS, dir, part string) string {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.Contains(n, part) })
	if len(names) != 1 {
		t.Fatalf("files with %q: %v", part, names)
	}
	return path.Join(dir, names[0])
}

// crashed leaves a store as a kill -9 does after commits of one row each, 20 KB large; flushed puts them into tables before.
func crashed(t *testing.T, commits int, flushed bool) *vfs.MemFS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	s := openAt(t, fs, "data/store", nil)
	for i := range commits {
		if err := s.ApplyWait([]kv.Op{{Key: deviceKey(i), Value: bytes.Repeat([]byte{byte(i)}, 20_000)}}); err != nil {
			t.Fatal(err)
		}
	}
	left := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if flushed { // a start puts the log into tables
		if err := openAt(t, left, "data/store", nil).Close(); err != nil {
			t.Fatal(err)
		}
	}
	return left
}

func deviceKey(i int) []byte { return fmt.Appendf([]byte{kv.PrefixDevice}, "%04d", i) }

func kept(t *testing.T, s *kv.Store, commits int) (there []int) {
	t.Helper()
	for i := range commits {
		v, found, err := s.Get(deviceKey(i))
		if err != nil {
			t.Fatal(err)
		}
		if found {
			if !bytes.Equal(v, bytes.Repeat([]byte{byte(i)}, 20_000)) {
				t.Errorf("row %d has other bytes", i)
			}
			there = append(there, i)
		}
	}
	return there
}

// TestCommitsBehindADamagedPlaceOfTheLogAreKept: one flipped bit costs one commit, and Pebble alone all that follow.
func TestCommitsBehindADamagedPlaceOfTheLogAreKept(t *testing.T) {
	const commits = 8 // that fit one log
	fs := crashed(t, commits, false)
	log := onlyFile(t, fs, "data/store", ".log")
	b := readFile(t, fs, log)
	b[20_000*4] ^= 1
	writeFile(t, fs, log, b)
	s := openAt(t, fs, "data/store", nil)
	defer s.Close()
	there := kept(t, s, commits)
	if len(there) != commits-1 || !slices.Contains(there, commits-1) {
		t.Errorf("%d of %d commits are there: %v", len(there), commits, there)
	}
	d := s.Damage()
	if len(d) != 1 || d[0].File != path.Base(log) || d[0].Kept < commits-1 || d[0].SetAside == "" {
		t.Fatalf("damage %+v", d)
	}
	if aside := readFile(t, fs, d[0].SetAside); !bytes.Equal(aside, b) {
		t.Error("what is set aside is not the damaged file")
	}
	if report := readFile(t, fs, path.Join(path.Dir(d[0].SetAside), "report.json")); !bytes.Contains(report, []byte(path.Base(log))) {
		t.Errorf("report %s", report)
	}
}

// TestRowsBeforeTheCutOfATableAreKept cuts off a table's index and footer, and a part of its rows.
func TestRowsBeforeTheCutOfATableAreKept(t *testing.T) {
	const commits = 40
	fs := crashed(t, commits, true)
	table := ""
	names, err := fs.List("data/store")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if f := path.Join("data/store", n); strings.HasSuffix(n, ".sst") && len(readFile(t, fs, f)) > 20_000*commits/2 {
			table = f
		}
	}
	b := readFile(t, fs, table)
	writeFile(t, fs, table, b[:20_000*25])
	s := openAt(t, fs, "data/store", nil)
	defer s.Close()
	if there := kept(t, s, commits); len(there) < 23 || len(there) > 25 {
		t.Errorf("%d rows are there", len(there))
	}
	if d := s.Damage(); len(d) != 1 || !strings.Contains(d[0].What, "bytes instead of") || d[0].From == "" {
		t.Errorf("damage %+v", d)
	}
}

// TestTablesWithoutAManifest takes away what says which tables there are.
func TestTablesWithoutAManifest(t *testing.T) {
	const commits = 40
	for _, part := range []string{"MANIFEST-", "marker.manifest", "marker.format-version", "OPTIONS-"} {
		fs := crashed(t, commits, true)
		names, err := fs.List("data/store")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if strings.Contains(n, part) {
				if err := fs.Remove(path.Join("data/store", n)); err != nil {
					t.Fatal(err)
				}
			}
		}
		s := openAt(t, fs, "data/store", nil)
		if there := kept(t, s, commits); len(there) != commits {
			t.Errorf("without %s: %d rows are there", part, len(there))
		}
		if len(s.Damage()) == 0 && part != "OPTIONS-" {
			t.Errorf("without %s: nothing is told", part)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNewerStoreIsNotDamage: neither a newer format of ours nor one of Pebble's is mended.
func TestNewerStoreIsNotDamage(t *testing.T) {
	ours := crashed(t, 3, true)
	s := openAt(t, ours, "data/store", nil)
	format := binary.BigEndian.AppendUint32(nil, kv.FormatVersion+1)
	if err := s.ApplyWait([]kv.Op{{Key: append([]byte{kv.PrefixMeta}, "format"...), Value: format}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	pebbles := crashed(t, 3, true)
	marker := onlyFile(t, pebbles, "data/store", "marker.format-version")
	if err := pebbles.Rename(marker, "data/store/marker.format-version.000099.999"); err != nil {
		t.Fatal(err)
	}
	for name, fs := range map[string]*vfs.MemFS{"ours": ours, "pebble's": pebbles} {
		s, err := kv.Open("data/store", kv.Options{FS: fs, Log: discard()})
		if !errors.Is(err, kv.ErrVersion) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
		if names, _ := fs.List("data"); len(names) != 1 {
			t.Errorf("%s: something was set aside: %v", name, names)
		}
	}
}

// TestMarkTellsHowFarTheLogWent is about the file itself; what the spool does with it is its own test.
func TestMarkTellsHowFarTheLogWent(t *testing.T) {
	fs := vfs.NewCrashableMem()
	s := openAt(t, fs, "data/store", nil)
	p := &markedPart{}
	s.Join(p)
	for i := range 10 {
		p.state = fmt.Appendf(nil, "state %d", i)
		if err := s.ApplyWait([]kv.Op{{Key: deviceKey(i), Value: []byte("x")}}); err != nil {
			t.Fatal(err)
		}
	}
	left := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spoil func(b []byte) []byte
		files []string
		want  string
		lost  bool
	}{
		"whole":       {func(b []byte) []byte { return b }, []string{"mark"}, "state 9", false},
		"one flipped": {func(b []byte) []byte { b[17] ^= 1; return b }, []string{"mark"}, "state 9", false},
		"one empty":   {func([]byte) []byte { return nil }, []string{"mark.2"}, "state 9", false},
		"both":        {func(b []byte) []byte { return b[:20] }, []string{"mark", "mark.2"}, "", true},
		"zeroed":      {func(b []byte) []byte { clear(b); return b }, []string{"mark", "mark.2"}, "", false},
	} {
		fs := left.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
		for _, f := range c.files {
			f = path.Join("data/store", f)
			writeFile(t, fs, f, c.spoil(readFile(t, fs, f)))
		}
		s := openAt(t, fs, "data/store", nil)
		if got := string(s.Marked()); got != c.want || s.MarkLost() != c.lost {
			t.Errorf("%s: marked %q, lost %v", name, got, s.MarkLost())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestManifestThatIsCutAnywhere: where it is cut between two edits, nothing in it says so, but the mark does.
func TestManifestThatIsCutAnywhere(t *testing.T) {
	const lives, commits = 3, 10
	fs := vfs.NewCrashableMem()
	var left *vfs.MemFS
	for life := range lives { // each start puts the log of the one before into tables
		s := openAt(t, fs, "data/store", nil)
		s.Join(&markedPart{state: []byte("x")})
		for i := range commits {
			i += life * commits
			if err := s.ApplyWait([]kv.Op{{Key: deviceKey(i), Value: bytes.Repeat([]byte{byte(i)}, 20_000)}}); err != nil {
				t.Fatal(err)
			}
		}
		left = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, current, err := atomicfs.LocateMarker(left, "data/store", "manifest")
	if err != nil {
		t.Fatal(err)
	}
	manifest := path.Join("data/store", current)
	whole := readFile(t, left, manifest)
	for size := range len(whole) {
		fs := left.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
		writeFile(t, fs, manifest, whole[:size])
		s := openAt(t, fs, "data/store", nil)
		if there := kept(t, s, lives*commits); len(there) != lives*commits || len(s.Damage()) == 0 {
			t.Errorf("cut to %d of %d bytes: %d rows are there, told is %v", size, len(whole), len(there), s.Damage())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s := openAt(t, left, "data/store", nil)
	if len(s.Damage()) > 0 {
		t.Errorf("whole, and told is %v", s.Damage())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestMarkKnowsOnlyWhatIsSafeOfAManifest cuts the power in the middle of an edit of the manifest, after a commit beside it: what was not synced
// is gone, and that is no damage.
func TestMarkKnowsOnlyWhatIsSafeOfAManifest(t *testing.T) {
	for nth := 2; nth <= 8; nth++ { // the first makes the store
		t.Run(fmt.Sprint(nth), func(t *testing.T) { markInAnEdit(t, nth) })
	}
}

func markInAnEdit(t *testing.T, nth int) {
	mem := vfs.NewCrashableMem()
	size := func(fs vfs.FS, name string) int64 {
		st, err := fs.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	var mu sync.Mutex
	safe := map[string]int64{} // of each manifest, what was synced
	syncs := 0
	stuck, release := make(chan string), make(chan struct{})
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind != errorfs.OpFileSync || !strings.HasPrefix(path.Base(op.Path), "MANIFEST-") {
			return nil
		}
		mu.Lock()
		syncs++
		hold := syncs == nth
		if !hold {
			safe[op.Path] = size(mem, op.Path)
		}
		mu.Unlock()
		if hold {
			stuck <- op.Path
			<-release
		}
		return nil
	}))
	s := openAt(t, fs, "data/store", nil)
	s.Join(&markedPart{state: []byte("x")})
	var manifest string
	rows := 0
	for manifest == "" { // flushes, each with an edit
		if err := s.ApplyWait([]kv.Op{{Key: deviceKey(rows), Value: bytes.Repeat([]byte{byte(rows)}, 20_000)}}); err != nil {
			t.Fatal(err)
		}
		rows++
		// Not faster than flushes: writers that wait for room would wait for ever for the edit that is held.
		testkit.Eventually(t, 30*time.Second, "the flush, or the edit that is held", func() bool {
			select {
			case manifest = <-stuck:
				return true
			default:
				mutable, flushed := s.Memtable()
				return mutable <= flushed+2 // half of a memtable alone is not flushed
			}
		})
	}
	if err := s.ApplyWait([]kv.Op{{Key: deviceKey(rows), Value: bytes.Repeat([]byte{byte(rows)}, 20_000)}}); err != nil { // the mark
		t.Fatal(err)
	}
	rows++
	left := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
	mu.Lock()
	cut := safe[manifest]
	mu.Unlock()
	if cut == 0 || cut >= size(left, manifest) {
		t.Fatalf("%d of %d bytes of %s were synced: the test has shown nothing", cut, size(left, manifest), manifest)
	}
	writeFile(t, left, manifest, readFile(t, left, manifest)[:cut])
	close(release)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, left, "data/store", nil)
	if there := kept(t, s, rows); len(there) != rows || len(s.Damage()) > 0 {
		t.Errorf("%d of %d rows are there, told is %v", len(there), rows, s.Damage())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestMarkOfVersion1 is read, and says nothing of the manifest.
func TestMarkOfVersion1(t *testing.T) {
	fs := crashed(t, 3, true)
	b := append([]byte("HFmk\x01"), 0, 0, 0, 0, 0, 0, 0, 7, 0, 5)
	b = append(b, "state"...)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	for _, name := range []string{"mark", "mark.2"} {
		writeFile(t, fs, path.Join("data/store", name), append(bytes.Clone(b), make([]byte, 16<<10-len(b))...))
	}
	s := openAt(t, fs, "data/store", nil)
	if string(s.Marked()) != "state" || s.MarkLost() || len(s.Damage()) > 0 {
		t.Errorf("marked %q, lost %v, told %v", s.Marked(), s.MarkLost(), s.Damage())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// markedPart takes part in every commit.
type markedPart struct{ state []byte }

func (p *markedPart) Seal() any                  { return p }
func (p *markedPart) Stage(any, kv.Writer) error { return nil }
func (p *markedPart) Committed(any, uint64)      {}
func (p *markedPart) Mark(dst []byte) []byte     { return append(dst, p.state...) }

// refusingFS refuses to lock a folder a number of times, with an error that nobody knows, and to open tables while told to.
type refusingFS struct {
	vfs.FS
	locks  int
	tables error
}

func (f *refusingFS) Lock(name string) (io.Closer, error) {
	if f.locks > 0 {
		f.locks--
		return nil, errors.New("nobody foresaw this")
	}
	return f.FS.Lock(name)
}

func (f *refusingFS) Open(name string, o ...vfs.OpenOption) (vfs.File, error) {
	if f.tables != nil && strings.HasSuffix(name, ".sst") {
		return nil, &os.PathError{Op: "open", Path: name, Err: f.tables}
	}
	return f.FS.Open(name, o...)
}

// TestStoreThatNoRepairOpensGoesAsideWhole: the gateway begins anew.
func TestStoreThatNoRepairOpensGoesAsideWhole(t *testing.T) {
	mem := crashed(t, 8, true)
	s := openAt(t, &refusingFS{FS: mem, locks: 2}, "data/store", nil)
	defer s.Close()
	d := s.Damage()
	if len(d) != 1 || !strings.Contains(d[0].What, "nobody foresaw this") || !strings.HasSuffix(d[0].SetAside, "/store") {
		t.Fatalf("damage %+v", d)
	}
	if there := kept(t, s, 8); len(there) != 0 {
		t.Errorf("a new store has rows %v", there)
	}
	old := openAt(t, mem, d[0].SetAside, nil) // it was none the worse
	defer old.Close()
	if there := kept(t, old, 8); len(there) != 8 {
		t.Errorf("the one that was set aside has rows %v", there)
	}
}

// TestLookAtAStoreThatNoRepairOpens: the tool is told, and the store stays where it is.
func TestLookAtAStoreThatNoRepairOpens(t *testing.T) {
	mem := crashed(t, 8, true)
	before := snapshot(t, mem, "data/store")
	s := openAt(t, &refusingFS{FS: mem, locks: 3}, "data/store", func(o *kv.Options) { o.Look = true })
	if d := s.Damage(); len(d) != 1 || !strings.Contains(d[0].What, "nobody foresaw this") || d[0].SetAside != "" {
		t.Errorf("damage %+v", d)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if names, _ := mem.List("data"); len(names) != 1 || snapshot(t, mem, "data/store") != before {
		t.Errorf("the store was touched: %v", names)
	}
}

// TestWhatCannotBeOpenedIsNotDamaged: without descriptors, or without rights, a start ends with that error and touches nothing.
func TestWhatCannotBeOpenedIsNotDamaged(t *testing.T) {
	for _, refusal := range []error{syscall.EMFILE, fs.ErrPermission} {
		mem := crashed(t, 8, true)
		before := snapshot(t, mem, "data/store")
		s, err := kv.Open("data/store", kv.Options{FS: &refusingFS{FS: mem, tables: refusal}, Log: discard()})
		if !errors.Is(err, refusal) {
			t.Fatalf("%v: %v, %v", refusal, s, err)
		}
		if names, _ := mem.List("data"); len(names) != 1 || snapshot(t, mem, "data/store") != before {
			t.Errorf("%v: the store was touched: %v", refusal, names)
		}
	}
}

// spoilTable damages the first table that fits while the store is open; at gives the place.
func spoilTable(t *testing.T, fs vfs.FS, fits func(b []byte) bool, at func(b []byte) int) {
	t.Helper()
	names, err := fs.List("data/store")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if !strings.HasSuffix(n, ".sst") {
			continue // the open store may be removing it
		}
		f := path.Join("data/store", n)
		if b := readFile(t, fs, f); fits(b) {
			place := at(b)
			w, err := fs.OpenReadWrite(f, vfs.WriteCategoryUnspecified) // who has it open sees it, too
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.WriteAt([]byte{b[place] ^ 1}, int64(place))
			if err = errors.Join(err, w.Sync(), w.Close()); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no such table")
}

// TestDamageWhileTheStoreIsOpen: rows of others than the spool that cannot be read, and chunks that a damaged index hides, end the store; the
// next start keeps what can be read. A damaged chunk is the reader's to pass over.
func TestDamageWhileTheStoreIsOpen(t *testing.T) {
	const commits = 8              // one table, which nothing compacts
	if os.Getenv(childEnv) == "" { // a store that has failed leaves its goroutines to the end of the process
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDamageWhileTheStoreIsOpen$", "-test.v")
		cmd.Env = append(os.Environ(), childEnv+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestDamageWhileTheStoreIsOpen")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	footer := func(b []byte) int { return len(b) - 5 }
	for name, c := range map[string]struct {
		prefix byte
		at     func([]byte) int
		fails  bool
		left   int
	}{
		"a row":           {kv.PrefixDevice, func([]byte) int { return 30_000 }, true, commits - 1},
		"a chunk":         {kv.PrefixData, func([]byte) int { return 30_000 }, false, commits - 1},
		"index of chunks": {kv.PrefixData, footer, true, commits},
	} {
		t.Run(name, func(t *testing.T) {
			key := func(i int) []byte {
				if c.prefix == kv.PrefixData {
					return binary.BigEndian.AppendUint64([]byte{c.prefix, 1}, uint64(i+1))
				}
				return deviceKey(i)
			}
			mem := vfs.NewCrashableMem()
			s := openAt(t, mem, "data/store", nil)
			for i := range commits {
				if err := s.ApplyWait([]kv.Op{{Key: key(i), Value: bytes.Repeat([]byte{byte(i)}, 20_000)}}); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			for range 3 { // into tables, and nothing is left to be compacted
				if err := openAt(t, mem, "data/store", nil).Close(); err != nil {
					t.Fatal(err)
				}
			}
			failed := make(chan error, 1)
			s, err := kv.Open("data/store", kv.Options{FS: mem, Log: discard(), Guard: smallTables(), Fatal: func(err error) { failed <- err }})
			if err != nil {
				t.Fatal(err)
			}
			spoilTable(t, mem, func(b []byte) bool { return len(b) > 100_000 }, c.at)
			var met error
			if c.prefix != kv.PrefixData {
				met = s.Scan([]byte{c.prefix}, func(_, _ []byte) error { return nil })
			} else {
				it, err := s.Iter([]byte{c.prefix}, []byte{c.prefix + 1})
				if err != nil {
					t.Fatal(err)
				}
				for ok := it.First(); ok; ok = it.Next() {
				}
				met = it.Error()
				_ = it.Close()
				if err := s.Passable(met); (err != nil) != c.fails {
					t.Errorf("may a reader pass: %v", err)
				}
			}
			if !kv.IsDamage(met) {
				t.Fatalf("met %v", met)
			}
			if c.fails {
				if err := <-failed; !strings.Contains(err.Error(), "start again") {
					t.Errorf("%v names no way out", err)
				}
			}
			_ = s.Close() // it has failed, or is as it was
			if c.fails {
				mem = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
			}
			s = openAt(t, mem, "data/store", nil)
			defer s.Close()
			there := 0
			for i := range commits {
				if _, found, err := s.Get(key(i)); found && err == nil {
					there++
				}
			}
			if there != c.left || len(s.Damage()) != 1 {
				t.Errorf("%d rows are there, damage %+v", there, s.Damage())
			}
		})
	}
}
