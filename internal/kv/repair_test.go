package kv_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/internal/kv"
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

// markedPart takes part in every commit.
type markedPart struct{ state []byte }

func (p *markedPart) Seal() any                  { return p }
func (p *markedPart) Stage(any, kv.Writer) error { return nil }
func (p *markedPart) Committed(any, uint64)      {}
func (p *markedPart) Mark(dst []byte) []byte     { return append(dst, p.state...) }
