package spool_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// powerless leaves what is on the disk when the process is gone.
func powerless(fs *vfs.MemFS) *vfs.MemFS {
	return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
}

// rewrite changes the files of the store whose names have a suffix.
func rewrite(t *testing.T, fs vfs.FS, suffix string, change func([]byte) []byte) {
	t.Helper()
	names, err := fs.List("data")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, n := range names {
		if !strings.HasSuffix(n, suffix) {
			continue
		}
		found = true
		f, err := fs.Open(path.Join("data", n))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(f)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		w, err := fs.Create(path.Join("data", n), vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(change(b))
		if err = errors.Join(err, w.Sync(), w.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if !found {
		t.Fatalf("no file %s", suffix)
	}
}

// filled has 100 messages in ten chunks, of which the upstream has had the first 30.
func filled(t *testing.T) *vfs.MemFS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	r := open(t, fs, lanes("telemetry", "bulk"))
	rd, _ := r.reader("cloud", "telemetry")
	for i := range 10 {
		r.putChunk("telemetry", i*10, i*10+10)
	}
	for rd.Cursor().Seq < 31 {
		run, err := rd.Next(1)
		if err != nil {
			t.Fatal(err)
		}
		rd.Resolve(run.End(), spool.Delivered)
	}
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	return powerless(fs)
}

func drained(t *testing.T, r *rig) []int {
	t.Helper()
	rd, _ := r.reader("cloud", "telemetry")
	got, end := read(t, rd, 1<<20)
	rd.Resolve(end, spool.Delivered)
	if err := r.store.Flush(); err != nil {
		t.Fatal(err)
	}
	return got
}

// TestEndOfTheLogThatIsLostIsAnnounced: Pebble takes a log that was cut off for one that was never longer.
func TestEndOfTheLogThatIsLostIsAnnounced(t *testing.T) {
	fs := filled(t)
	rewrite(t, fs, ".log", func(b []byte) []byte { return b[:len(b)/2] })
	r := open(t, fs, lanes("telemetry", "bulk"))
	epoch := r.Epoch()
	if lost := r.Recovered(); lost == 0 || lost >= 100 {
		t.Fatalf("%d messages lost", lost)
	}
	first := max(101-r.Recovered(), 31) // more may be lost than is missed
	lost := 101 - first
	got := drained(t, r)
	if diff := cmp.Diff(seq(30, int(first-1)), got); diff != "" {
		t.Error(diff)
	}
	want := fmt.Sprintf(`"first":%d,"last":100,"count":%d`, first, lost)
	if g := gaps(t, r); len(g) != 1 || !strings.Contains(g[0], want) || !strings.Contains(g[0], `"reason":"damaged"`) {
		t.Errorf("announced %v, want %s", g, want)
	}
	r.put("telemetry", 100, 101)
	if a := r.account("cloud", "telemetry"); a.Accepted.Messages != 101 || a.Delivered.Messages != first-1 || a.Evicted.Messages != lost || !a.Balanced() {
		t.Errorf("account %+v", a)
	}
	if at, _, _ := r.EpochOf("telemetry", 101); at != epoch {
		t.Errorf("the mark was there, and the epoch is %s, not %s", at, epoch)
	}
}

// TestRowsThatAreLostComeFromTheMark takes away everything but the chunks.
func TestRowsThatAreLostComeFromTheMark(t *testing.T) {
	fs := filled(t)
	r := open(t, fs, lanes("telemetry", "bulk"))
	epoch, before := r.Epoch(), r.account("cloud", "telemetry")
	var gone []kv.Op
	for _, prefix := range [][]byte{[]byte("mepoch"), []byte("mlane/"), {kv.PrefixLane}, {kv.PrefixCursor}} {
		err := r.store.Scan(prefix, func(k, _ []byte) error {
			gone = append(gone, kv.Op{Key: append([]byte{}, k...), Delete: true})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(gone) < 8 {
		t.Fatalf("%d rows", len(gone))
	}
	if err := r.store.ApplyWait(gone); err != nil {
		t.Fatal(err)
	}
	fs = powerless(fs)
	for range 2 { // the second start finds the rows again
		r = open(t, fs, lanes("bulk", "telemetry")) // in another order: numbers are not guessed
		if r.Epoch() != epoch {
			t.Errorf("epoch %s, was %s", r.Epoch(), epoch)
		}
		if _, c := r.reader("cloud", "telemetry"); c != nil {
			c.Close()
		}
		if diff := cmp.Diff(before, r.account("cloud", "telemetry")); diff != "" {
			t.Error(diff)
		}
		if err := r.store.Flush(); err != nil {
			t.Fatal(err)
		}
		fs = powerless(fs)
	}
	if diff := cmp.Diff(seq(30, 100), drained(t, open(t, fs, lanes("bulk", "telemetry")))); diff != "" {
		t.Error(diff)
	}
}

// TestEpochEndsWhereNobodyKnowsHowFarTheLogWent: else ids would be given twice.
func TestEpochEndsWhereNobodyKnowsHowFarTheLogWent(t *testing.T) {
	for name, damage := range map[string]func(fs vfs.FS){
		"marks": func(fs vfs.FS) {
			for _, n := range []string{"mark", "mark.2"} {
				rewrite(t, fs, n, func(b []byte) []byte { b[20] ^= 1; return b })
			}
		},
		"marks and log": func(fs vfs.FS) {
			for _, n := range []string{"mark", "mark.2"} {
				rewrite(t, fs, n, func(b []byte) []byte { return b[:9] })
			}
			rewrite(t, fs, ".log", func(b []byte) []byte { return b[:len(b)/2] })
		},
	} {
		fs := filled(t)
		was := open(t, powerless(fs), lanes("telemetry", "bulk")).Epoch()
		damage(fs)
		r := open(t, fs, lanes("telemetry", "bulk"))
		if r.Epoch() == was {
			t.Errorf("%s: the epoch goes on", name)
		}
		if old, _, _ := r.EpochOf("telemetry", 1); old != was {
			t.Errorf("%s: what there was is of %s, not of %s", name, old, was)
		}
	}
}
