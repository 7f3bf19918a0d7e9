package kv_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"holdfast/internal/kv"
)

// childEnv is set in a process of its own, which a store that failed has to end.
const childEnv = "HOLDFAST_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, o kv.Options) *kv.Store {
	t.Helper()
	o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := kv.Open("data", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func row(i int) kv.Op {
	return kv.Op{Key: binary.BigEndian.AppendUint32([]byte{kv.PrefixSession}, uint32(i)), Value: fmt.Appendf(nil, "value %d", i)}
}

// recorder notes how writes ended.
type recorder struct {
	mu  sync.Mutex
	got []uint64
	err error
}

func (r *recorder) Done(token, _ uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, token)
	r.err = errors.Join(r.err, err)
}

func TestRowsSurviveARestart(t *testing.T) {
	for _, d := range []kv.Durability{kv.Fsync, kv.Interval} {
		fs := vfs.NewMem()
		s := open(t, kv.Options{FS: fs, Durability: d, SyncInterval: time.Millisecond})
		var rec recorder
		var want []uint64
		for i := range 1000 {
			if err := s.Apply([]kv.Op{row(i)}, &rec, uint64(i)); err != nil {
				t.Fatal(err)
			}
			want = append(want, uint64(i))
		}
		if err := s.ApplyWait([]kv.Op{{Key: row(7).Key, Delete: true}}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, rec.got); diff != "" || rec.err != nil {
			t.Fatal(diff, rec.err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, kv.Options{FS: fs})
		n := 0
		err := s.Scan([]byte{kv.PrefixSession}, func(k, v []byte) error {
			if n == 7 {
				n++
			}
			if string(k) != string(row(n).Key) || string(v) != string(row(n).Value) {
				t.Errorf("row %d is %x = %q", n, k, v)
			}
			n++
			return nil
		})
		if err != nil || n != 1000 {
			t.Fatalf("%d rows, %v", n, err)
		}
		if _, found, err := s.Get(row(7).Key); found || err != nil {
			t.Errorf("deleted row: %v, %v", found, err)
		}
	}
}

// blocker holds the completer up until it is released.
type blocker struct{ entered, release chan struct{} }

func (b blocker) Done(uint64, uint64, error) {
	close(b.entered)
	<-b.release
}

func TestFullGroupMakesWritersWait(t *testing.T) {
	s := open(t, kv.Options{FS: vfs.NewMem()})
	b := blocker{make(chan struct{}), make(chan struct{})}
	if err := s.Apply(nil, b, 0); err != nil {
		t.Fatal(err)
	}
	<-b.entered
	big := kv.Op{Key: []byte{kv.PrefixSession}, Value: make([]byte, kv.MaxGroupBytes/2)}
	busy := false
	for range 10 { // three groups fit: being completed, being written, open
		g, err := s.Begin(false)
		if errors.Is(err, kv.ErrBusy) {
			busy = true
			break
		} else if err != nil {
			t.Fatal(err)
		}
		g.Set(big.Key, big.Value)
		g.End()
	}
	if !busy {
		t.Error("the store takes without end what it cannot commit")
	}
	waited := make(chan error)
	go func() { waited <- s.Apply([]kv.Op{row(1)}, nil, 0) }()
	close(b.release)
	if err := <-waited; err != nil {
		t.Errorf("a writer that waited: %v", err)
	}
}

func TestCloseCommitsWhatWasHandedIn(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, kv.Options{FS: fs})
	var rec recorder
	for i := range 100 {
		if err := s.Apply([]kv.Op{row(i)}, &rec, uint64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if len(rec.got) != 100 || rec.err != nil {
		t.Fatalf("%d of 100 told, %v", len(rec.got), rec.err)
	}
	if err := s.Apply([]kv.Op{row(1)}, nil, 0); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("apply after close: %v", err)
	}
	s = open(t, kv.Options{FS: fs})
	if _, found, err := s.Get(row(99).Key); !found || err != nil {
		t.Errorf("last row: %v, %v", found, err)
	}
}

func TestOnGroupRunsAfterTheDones(t *testing.T) {
	s := open(t, kv.Options{FS: vfs.NewMem()})
	var rec recorder
	told := make(chan int, 100)
	s.OnGroup(func() { told <- len(rec.got) })
	if err := s.Apply([]kv.Op{row(1)}, &rec, 1); err != nil {
		t.Fatal(err)
	}
	if n := <-told; n != 1 {
		t.Errorf("%d told when the group ended", n)
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, kv.Options{FS: fs})
	if err := s.ApplyWait([]kv.Op{{Key: []byte{kv.PrefixMeta, 'f', 'o', 'r', 'm', 'a', 't'}, Value: []byte{0, 0, 0, 99}}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	_, err := kv.Open("data", kv.Options{FS: fs, Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, kv.ErrVersion) {
		t.Fatalf("open: %v", err)
	}
}

func TestOlderFormatIsUpgraded(t *testing.T) {
	fs := vfs.NewMem()
	key := []byte{kv.PrefixMeta, 'f', 'o', 'r', 'm', 'a', 't'}
	s := open(t, kv.Options{FS: fs})
	if err := s.ApplyWait([]kv.Op{{Key: key, Value: []byte{0, 0, 0, 1}}, row(1)}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, kv.Options{FS: fs})
	if v, found, err := s.Get(key); err != nil || !found || binary.BigEndian.Uint32(v) != kv.FormatVersion {
		t.Errorf("format %x, %v", v, err)
	}
	if _, found, err := s.Get(row(1).Key); !found || err != nil {
		t.Errorf("its row: %v, %v", found, err)
	}
}

func TestExcise(t *testing.T) {
	s := open(t, kv.Options{FS: vfs.NewMem()})
	for i := range 100 {
		if err := s.Apply([]kv.Op{row(i)}, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.Excise(row(10).Key, row(90).Key); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := s.Scan([]byte{kv.PrefixSession}, func(_, _ []byte) error { n++; return nil }); err != nil || n != 20 {
		t.Fatalf("%d rows left, %v", n, err)
	}
}

// TestMemtableNumbers holds what Memtable says against the tables that are there: what it calls
// flushed can be excised without a flush.
func TestMemtableNumbers(t *testing.T) {
	s := open(t, kv.Options{FS: vfs.NewMem()})
	first, _ := s.Memtable()
	value := make([]byte, 64<<10)
	for i := range 400 { // 25 MiB: three memtables
		if err := s.ApplyWait([]kv.Op{{Key: row(i).Key, Value: value}}); err != nil {
			t.Fatal(err)
		}
	}
	now, flushed := s.Memtable()
	if now < first+2 || flushed >= now {
		t.Errorf("memtable %d at first, %d now, flushed up to %d", first, now, flushed)
	}
}

func TestPrefixEnd(t *testing.T) {
	for _, c := range []struct{ in, want string }{{"a", "b"}, {"a\xff", "b"}, {"\xff", ""}, {"d\x00", "d\x01"}} {
		if got := string(kv.PrefixEnd([]byte(c.in))); got != c.want {
			t.Errorf("PrefixEnd(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

func TestDefaultFileSystem(t *testing.T) {
	dir := t.TempDir()
	s, err := kv.Open(dir, kv.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ApplyWait([]kv.Op{row(1)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) == 0 {
		t.Fatalf("nothing in %s: %v", dir, err)
	}
	db, err := pebble.Open(dir, &pebble.Options{ReadOnly: true, Logger: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if db.FormatMajorVersion() != pebble.FormatNewest {
		t.Errorf("format %d", db.FormatMajorVersion())
	}
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(string, ...any) {}
