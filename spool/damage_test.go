package spool_test

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// dataKey is the key of the chunk that begins with seq in the first configured lane.
func dataKey(seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kv.PrefixData, 1}, seq)
}

// TestDamageIsPassedOverCountedAndAnnounced spoils chunks of ten records each.
func TestDamageIsPassedOverCountedAndAnnounced(t *testing.T) {
	flip := func(t *testing.T, r *rig, seq uint64) kv.Op {
		v, ok, err := r.store.Get(dataKey(seq))
		if err != nil || !ok {
			t.Fatalf("no chunk at %d: %v", seq, err)
		}
		v[len(v)/2] ^= 1
		return kv.Op{Key: dataKey(seq), Value: v}
	}
	cases := map[string]struct {
		spoil func(t *testing.T, r *rig) []kv.Op
		lost  []int
	}{
		"flipped": {func(t *testing.T, r *rig) []kv.Op { return []kv.Op{flip(t, r, 21)} }, seq(20, 30)},
		"missing": {func(*testing.T, *rig) []kv.Op { return []kv.Op{{Key: dataKey(31), Delete: true}} }, seq(30, 40)},
		"first":   {func(t *testing.T, r *rig) []kv.Op { return []kv.Op{flip(t, r, 1)} }, seq(0, 10)},
		"last":    {func(*testing.T, *rig) []kv.Op { return []kv.Op{{Key: dataKey(91), Delete: true}} }, seq(90, 100)},
		"empty": {func(*testing.T, *rig) []kv.Op {
			return []kv.Op{{Key: dataKey(51), Value: []byte{}}}
		}, seq(50, 60)},
		"all": {func(t *testing.T, r *rig) (ops []kv.Op) {
			for s := uint64(1); s < 100; s += 10 {
				ops = append(ops, flip(t, r, s))
			}
			return ops
		}, seq(0, 100)},
	}
	for name, c := range cases {
		for _, ack := range []string{"late", "at once"} {
			t.Run(name+"/ack "+ack, func(t *testing.T) {
				fs := vfs.NewMem()
				r := open(t, fs, lanes("telemetry"))
				for i := range 10 {
					r.put("telemetry", i*10, i*10+10)
				}
				if err := r.store.ApplyWait(c.spoil(t, r)); err != nil {
					t.Fatal(err)
				}
				rep, err := r.Verify(nil)
				if err != nil || len(rep.Problems) == 0 {
					t.Fatalf("verify found nothing: %+v, %v", rep, err)
				}
				rd, _ := r.reader("cloud", "telemetry")
				var got []int
				end := rd.Cursor()
				for range 2 { // read, rewind, read: announced once all the same
					rd.Rewind()
					got = nil
					for {
						run, err := rd.Next(1 << 20)
						if err != nil {
							t.Fatal(err)
						}
						if run.Count == 0 {
							break
						}
						got = append(got, numbers(t, run.Raw, run.Count)...)
						end = run.End()
						if ack == "at once" {
							rd.Resolve(end, spool.Delivered)
						}
					}
				}
				rd.Resolve(end, spool.Delivered)
				lost := len(c.lost)
				a := r.account("cloud", "telemetry")
				if a.Evicted.Messages != uint64(lost) || a.Delivered.Messages != uint64(100-lost) || a.Pending.Messages != 0 {
					t.Fatalf("account %+v", a)
				}
				if ack == "late" {
					var want []int
					for i := range 100 {
						if i < c.lost[0] || i > c.lost[lost-1] {
							want = append(want, i)
						}
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Fatal(diff)
					}
				}
				if err := r.store.Flush(); err != nil {
					t.Fatal(err)
				}
				g := gaps(t, r)
				want := fmt.Sprintf(`"first":%d,"last":%d,"count":%d`, c.lost[0]+1, c.lost[lost-1]+1, lost)
				if len(g) != 1 || !strings.Contains(g[0], want) || !strings.Contains(g[0], `"reason":"damaged"`) {
					t.Fatalf("announced %v, want %s", g, want)
				}
			})
		}
	}
}
