package spool_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// restoredFrom copies the store while it is open, as a backup does, into a file system of its own.
func restoredFrom(t *testing.T, r *rig, from vfs.FS) vfs.FS {
	t.Helper()
	if err := r.store.Checkpoint("copy"); err != nil {
		t.Fatal(err)
	}
	to := vfs.NewMem()
	if ok, err := vfs.Clone(from, to, "copy", "data"); err != nil || !ok {
		t.Fatal(ok, err)
	}
	return to
}

// TestARestoredSpoolNeverUsesAnIDAgain: what was in the backup keeps its ids, what comes after it has others than what the
// original took after it.
func TestARestoredSpoolNeverUsesAnIDAgain(t *testing.T) {
	fs := vfs.NewMem()
	r := open(t, fs, lanes("telemetry", "bulk"))
	r.put("telemetry", 0, 50)
	first := r.Epoch()
	copied := restoredFrom(t, r, fs)
	r.put("telemetry", 50, 70) // {first}/telemetry/51 … 70, which the backup does not know

	cfg := lanes("telemetry", "bulk", "late")
	cfg.Restored = "backup-1"
	n := open(t, copied, cfg)
	second := n.Epoch()
	if second == first {
		t.Fatal("the epoch stays")
	}
	n.put("telemetry", 100, 110)
	n.put("late", 0, 1)
	want := func(r *rig, lane string, seq uint64, epoch string, begin uint64) {
		t.Helper()
		got, from, end := r.EpochOf(lane, seq)
		if got != epoch || from > seq || end <= seq || from > 1 && from != begin {
			t.Errorf("%s/%d is of epoch %s from %d to %d, want %s from %d", lane, seq, got, from, end, epoch, begin)
		}
	}
	want(n, "telemetry", 1, first, 1)
	want(n, "telemetry", 50, first, 1)
	want(n, "telemetry", 51, second, 51)
	want(n, "bulk", 1, second, 1)
	want(n, "late", 1, second, 1)
	n.verify()
	n.close()

	// The start that takes the mark away may crash: the next one finds it again.
	n = open(t, copied, cfg)
	if n.Epoch() != second {
		t.Error("another epoch for the same restore")
	}
	n.close()
	cfg.Restored = ""
	n = open(t, copied, cfg)
	want(n, "telemetry", 50, first, 1)
	want(n, "telemetry", 60, second, 51)
	n.put("telemetry", 110, 120)
	n.close()
	cfg.Restored = "backup-2" // of this one
	n = open(t, copied, cfg)
	third := n.Epoch()
	want(n, "telemetry", 1, first, 1)
	want(n, "telemetry", 70, second, 51)
	want(n, "telemetry", 71, third, 71)
	want(n, "late", 1, second, 1)
	want(n, "late", 2, third, 2)
	if diff := cmp.Diff([]string{first, second}, n.PastEpochs()); diff != "" {
		t.Error(diff)
	}
}

// TestAGapNamesIDsThatThereAre: what is lost on both sides of a restore is announced under both epochs.
func TestAGapNamesIDsThatThereAre(t *testing.T) {
	fs := vfs.NewMem()
	r := open(t, fs, lanes("telemetry"))
	r.put("telemetry", 0, 50)
	copied := restoredFrom(t, r, fs)
	cfg := lanes("telemetry")
	cfg.Restored = "backup-1"
	n := open(t, copied, cfg)
	rd, _ := n.reader("cloud", "telemetry")
	n.put("telemetry", 50, 70)
	_, end := read(t, rd, 1<<20)
	rd.Resolve(end, spool.Expired)
	n.put("telemetry", 70, 71)
	g := gaps(t, n)
	if len(g) != 2 || !strings.Contains(g[0], fmt.Sprintf(`"epoch":%q,"lane":"telemetry","upstream":"cloud","first":1,"last":50,"count":50`, r.Epoch())) ||
		!strings.Contains(g[1], fmt.Sprintf(`"epoch":%q,"lane":"telemetry","upstream":"cloud","first":51,"last":70,"count":20`, n.Epoch())) {
		t.Errorf("announced %v", g)
	}
}

func TestADamagedRowOfEpochsStopsNothing(t *testing.T) {
	fs := vfs.NewMem()
	r := open(t, fs, lanes("telemetry"))
	r.put("telemetry", 0, 5)
	key := []byte{kv.PrefixMeta, 'e', 'p', 'o', 'c', 'h', 's'}
	if err := r.store.ApplyWait([]kv.Op{{Key: key, Value: []byte("\x01[{")}}); err != nil {
		t.Fatal(err)
	}
	r.close()
	r = open(t, fs, lanes("telemetry"))
	if e, _, _ := r.EpochOf("telemetry", 1); e != r.Epoch() {
		t.Errorf("epoch %s", e)
	}
	if err := r.store.ApplyWait([]kv.Op{{Key: key, Value: []byte("\x09x")}}); err != nil {
		t.Fatal(err)
	}
	r.close()
	store, err := kv.Open("data", kv.Options{FS: fs, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := spool.Open(store, spool.Config{Log: logger(t)}); err == nil || !strings.Contains(err.Error(), "newer holdfast") {
		t.Errorf("a newer row: %v", err)
	}
}
