package kv_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

var damages = flag.Int("kv-damages", 15, "how many damaged stores to open")

// smallTables is a disk so small that tables have 1 MiB.
func smallTables() *kv.Guard {
	return &kv.Guard{Reserve: 8 << 20, Usage: func() (kv.Usage, error) { return kv.Usage{Free: 1 << 40, Total: 1 << 41}, nil }}
}

func openAt(t *testing.T, fs vfs.FS, dir string, change func(*kv.Options)) *kv.Store {
	t.Helper()
	o := kv.Options{FS: fs, Log: slog.New(slog.DiscardHandler), Guard: smallTables(), Fatal: func(err error) { t.Errorf("store failed: %v", err) }}
	if change != nil {
		change(&o)
	}
	s, err := kv.Open(dir, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

// chunkRow is a row that a lane's chunk may be.
func chunkRow(lane byte, seq uint64, rnd *rand.Rand) kv.Op {
	v := make([]byte, 200+rnd.IntN(40_000))
	for i := range v {
		v[i] = byte(rnd.Uint32())
	}
	binary.BigEndian.PutUint64(v, seq)
	return kv.Op{Key: binary.BigEndian.AppendUint64([]byte{kv.PrefixData, lane}, seq), Value: v}
}

// filledStore writes chunks of two lanes and many small rows, some of them again and again, and leaves the files as a kill -9 does.
func filledStore(t *testing.T, seed uint64) (fs *vfs.MemFS, rows map[string][]byte) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 1))
	fs = vfs.NewCrashableMem()
	rows = map[string][]byte{}
	s := openAt(t, fs, "data/store", nil)
	defer s.Close()
	seqs := [2]uint64{1, 1}
	for range 40 + rnd.IntN(200) {
		var ops []kv.Op
		for lane := range seqs {
			if rnd.IntN(3) > 0 {
				op := chunkRow(byte(lane+1), seqs[lane], rnd)
				seqs[lane] += 1 + rnd.Uint64N(50)
				ops = append(ops, op)
			}
		}
		for range rnd.IntN(20) {
			p := []byte{kv.PrefixDevice, kv.PrefixCommand, kv.PrefixMeta, kv.PrefixSession}[rnd.IntN(4)]
			op := kv.Op{Key: fmt.Appendf([]byte{p}, "row-%04d", rnd.IntN(2000)), Value: fmt.Appendf(nil, "value-%d-%s", rnd.Uint64(), strings.Repeat("x", rnd.IntN(300)))}
			op.Delete = rnd.IntN(10) == 0
			ops = append(ops, op)
		}
		if err := s.ApplyWait(ops); err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			if rows[string(op.Key)] = op.Value; op.Delete {
				delete(rows, string(op.Key))
			}
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rnd}), rows
}

// spoil damages one to three places of the store's files, and says what it did.
func spoil(t *testing.T, fs vfs.FS, dir string, rnd *rand.Rand) (what []string) {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	for range 1 + rnd.IntN(3) {
		name := names[rnd.IntN(len(names))]
		f := path.Join(dir, name)
		b := readFile(t, fs, f)
		if len(b) == 0 {
			continue
		}
		if rnd.IntN(20) == 0 && !strings.HasPrefix(name, "mark") {
			if err := fs.Remove(f); err != nil {
				t.Fatal(err)
			}
			names = slices.DeleteFunc(names, func(n string) bool { return n == name })
			what = append(what, name+": removed")
			continue
		}
		b, how := testkit.Spoil(b, rnd)
		what = append(what, name+": "+how)
		writeFile(t, fs, f, b)
	}
	return what
}

func readFile(t *testing.T, fs vfs.FS, name string) []byte {
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

func writeFile(t *testing.T, fs vfs.FS, name string, b []byte) {
	t.Helper()
	f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(slices.Clone(b)); err != nil { // under the race detector it spoils what it was given
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// readRows reads everything, and passes over what is damaged.
func readRows(t *testing.T, s *kv.Store) (rows map[string][]byte, damaged bool) {
	t.Helper()
	rows = map[string][]byte{}
	it, err := s.Iter([]byte{0}, []byte{0xff})
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	next := []byte{0}
	for ok := it.First(); ; ok = it.Next() {
		for !ok {
			err := it.Error()
			if err == nil {
				return rows, damaged
			}
			if !kv.IsDamage(err) {
				t.Fatal(err)
			}
			damaged = true
			if len(next) == 10 && next[0] == kv.PrefixData && next[9] < 0xff {
				next = slices.Clone(next)
				binary.BigEndian.PutUint64(next[2:], binary.BigEndian.Uint64(next[2:])+1)
			} else {
				next = kv.PrefixEnd(next)
			}
			if next == nil || next[0] >= 0xf0 {
				return rows, true
			}
			ok = it.SeekGE(next)
		}
		v, err := it.ValueAndErr()
		if err != nil {
			t.Fatal(err)
		}
		rows[string(it.Key())] = slices.Clone(v)
		next = append(slices.Clone(it.Key()), 0)
		if it.Key()[0] == kv.PrefixData && len(it.Key()) == 10 {
			next = slices.Clone(it.Key())
			binary.BigEndian.PutUint64(next[2:], binary.BigEndian.Uint64(next[2:])+1)
		}
	}
}

// TestDamagedStoreOpens spoils stores at random places. Each opens; what is missing is told, by a Damage or where it is read; nothing is
// invented; and the store works, also after another start, which finds nothing.
func TestDamagedStoreOpens(t *testing.T) {
	kinds := map[string]int{}
	for seed := range uint64(*damages) {
		fs, want := filledStore(t, seed)
		rnd := rand.New(rand.NewPCG(seed, 2))
		what := spoil(t, fs, "data/store", rnd)
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			defer func() {
				if r := recover(); r != nil || t.Failed() {
					t.Errorf("seed %d, damage %q: %v", seed, what, r)
				}
			}()
			if rnd.IntN(4) == 0 {
				lookAt(t, fs)
			}
			s := openAt(t, fs, "data/store", nil)
			got, damaged := readRows(t, s)
			told := damaged || len(s.Damage()) > 0
			missing := 0
			for k, v := range want {
				if have, ok := got[k]; !ok || !bytes.Equal(have, v) {
					missing++
					if ok && k[0] == kv.PrefixData {
						t.Errorf("chunk %x has other bytes", k)
					}
				}
			}
			for _, d := range s.Damage() {
				kinds[strings.TrimLeft(strings.TrimLeft(d.File, "0123456789"), ".")]++
			}
			last := slices.ContainsFunc(what, func(w string) bool { return strings.Contains(w, ".log") || strings.Contains(w, ": removed") })
			if missing > 0 && !told && !last { // what the end of a log has lost, the spool's mark tells
				t.Errorf("%d rows are missing or old, and nothing was told", missing)
			}
			op := kv.Op{Key: []byte{kv.PrefixDevice, 'z'}, Value: []byte("new")}
			if err := s.ApplyWait([]kv.Op{op}); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openAt(t, fs, "data/store", nil)
			if d := s.Damage(); len(d) > 0 && !damaged { // what was met while reading is set aside now
				t.Errorf("second start found %+v", d)
			}
			if v, found, err := s.Get(op.Key); !found || err != nil || string(v) != "new" {
				t.Errorf("row written after the repair: %q, %v, %v", v, found, err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
		if !ok {
			break
		}
	}
	t.Logf("damage found: %v", kinds)
}

// lookAt opens the store as a tool does: it changes nothing.
func lookAt(t *testing.T, fs vfs.FS) {
	t.Helper()
	before := snapshot(t, fs, "data/store")
	s := openAt(t, fs, "data/store", func(o *kv.Options) { o.Look = true })
	damaged := slices.ContainsFunc(s.Damage(), func(d kv.Damage) bool {
		return !strings.HasPrefix(d.File, "mark") || strings.HasPrefix(d.File, "marker")
	})
	readRows(t, s)
	for _, d := range s.Damage() {
		if d.SetAside != "" {
			t.Errorf("a look set %s aside as %s", d.File, d.SetAside)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if !damaged { // it was opened as it is; what was met in reading is for the next start to find, not for a look to note
		if names, _ := fs.List("data/store"); slices.Contains(names, "suspects") {
			t.Error("a look noted what it met")
		}
		return
	}
	after := snapshot(t, fs, "data/store")
	if before != after {
		t.Errorf("a look changed the store:\n%s\nwas\n%s", after, before)
	}
	if names, _ := fs.List("data"); len(names) != 1 {
		t.Errorf("a look left %v behind", names)
	}
}

func snapshot(t *testing.T, fs vfs.FS, dir string) string {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "%s %d\n", n, len(readFile(t, fs, path.Join(dir, n))))
	}
	return b.String()
}
