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

// chunkStarts returns the first sequence of each chunk in the first configured lane, and the end.
func chunkStarts(t *testing.T, r *rig) (starts []uint64) {
	t.Helper()
	err := r.store.Scan([]byte{kv.PrefixData, 1}, func(k, _ []byte) error {
		starts = append(starts, binary.BigEndian.Uint64(k[2:]))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(starts, r.Lanes()[1].Accepted.Messages+1)
}

// TestDamageIsPassedOverCountedAndAnnounced spoils chunks of some ten records each.
func TestDamageIsPassedOverCountedAndAnnounced(t *testing.T) {
	flip := func(t *testing.T, r *rig, seq uint64) kv.Op {
		v, ok, err := r.store.Get(dataKey(seq))
		if err != nil || !ok {
			t.Fatalf("no chunk at %d: %v", seq, err)
		}
		v[len(v)/2] ^= 1
		return kv.Op{Key: dataKey(seq), Value: v}
	}
	// Each spoils the chunks from..to-1, counted from the lane's first; negative ones from its last.
	cases := map[string]struct {
		from, to int
		spoil    func(t *testing.T, r *rig, seq uint64) kv.Op
	}{
		"flipped": {2, 3, flip},
		"missing": {3, 4, func(_ *testing.T, _ *rig, seq uint64) kv.Op { return kv.Op{Key: dataKey(seq), Delete: true} }},
		"first":   {0, 1, flip},
		"last":    {-1, 0, func(_ *testing.T, _ *rig, seq uint64) kv.Op { return kv.Op{Key: dataKey(seq), Delete: true} }},
		"empty":   {5, 6, func(_ *testing.T, _ *rig, seq uint64) kv.Op { return kv.Op{Key: dataKey(seq), Value: []byte{}} }},
		"all":     {0, 0, flip},
	}
	for name, c := range cases {
		for _, ack := range []string{"late", "at once"} {
			t.Run(name+"/ack "+ack, func(t *testing.T) {
				fs := vfs.NewMem()
				r := open(t, fs, lanes("telemetry"))
				for i := range 10 {
					r.put("telemetry", i*10, i*10+10)
				}
				starts := chunkStarts(t, r)
				chunks := len(starts) - 1
				from, to := (c.from+chunks)%chunks, c.to
				if to <= from {
					to = chunks
				}
				var ops []kv.Op
				for _, seq := range starts[from:to] {
					ops = append(ops, c.spoil(t, r, seq))
				}
				if err := r.store.ApplyWait(ops); err != nil {
					t.Fatal(err)
				}
				first, last := starts[from], starts[to]-1
				lost := last - first + 1
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
				a := r.account("cloud", "telemetry")
				if a.Evicted.Messages != lost || a.Delivered.Messages != 100-lost || a.Pending.Messages != 0 {
					t.Fatalf("account %+v", a)
				}
				if ack == "late" {
					var want []int
					for i := range 100 {
						if i+1 < int(first) || i+1 > int(last) {
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
				want := fmt.Sprintf(`"first":%d,"last":%d,"count":%d`, first, last, lost)
				if len(g) != 1 || !strings.Contains(g[0], want) || !strings.Contains(g[0], `"reason":"damaged"`) {
					t.Fatalf("announced %v, want %s", g, want)
				}
			})
		}
	}
}
