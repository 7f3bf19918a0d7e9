package spool_test

import (
	"errors"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// walked gives the sequences that Walk hands on, and the damage that it tells.
func walked(t *testing.T, r *rig, sel spool.Selection) (seqs []uint64, damage []spool.Damage) {
	t.Helper()
	err := r.Walk("telemetry", sel, func(seq uint64, rec *spool.Record) error {
		if rec.Received != int64(1_700_000_000_000+seq-1) {
			t.Errorf("%d is the record received at %d", seq, rec.Received)
		}
		seqs = append(seqs, seq)
		return nil
	}, func(d spool.Damage) { damage = append(damage, d) })
	if err != nil {
		t.Fatal(err)
	}
	return seqs, damage
}

func span(from, to uint64) (seqs []uint64) {
	for ; from <= to; from++ {
		seqs = append(seqs, from)
	}
	return seqs
}

func TestWalkHandsOnWhatWasChosen(t *testing.T) {
	r := open(t, vfs.NewMem(), lanes("telemetry"))
	for i := range 10 {
		r.put("telemetry", i*10, i*10+10)
	}
	for _, c := range []struct {
		sel  spool.Selection
		want []uint64
	}{
		{spool.Selection{}, span(1, 100)},
		{spool.Selection{From: 1, To: 1}, span(1, 1)},
		{spool.Selection{From: 35}, span(35, 100)},
		{spool.Selection{From: 35, To: 41}, span(35, 41)},
		{spool.Selection{From: 41, To: 40}, nil},
		{spool.Selection{From: 101}, nil},
		{spool.Selection{To: 1000}, span(1, 100)},
		{spool.Selection{SinceMS: 1_700_000_000_054}, span(55, 100)},
		{spool.Selection{From: 60, To: 70, SinceMS: 1_700_000_000_054}, span(60, 70)},
		{spool.Selection{SinceMS: 1_800_000_000_000}, nil},
	} {
		got, damage := walked(t, r, c.sel)
		if diff := cmp.Diff(c.want, got); diff != "" || len(damage) > 0 {
			t.Errorf("%+v: %s %v", c.sel, diff, damage)
		}
	}
	stop := errors.New("stop")
	n := 0
	err := r.Walk("telemetry", spool.Selection{}, func(uint64, *spool.Record) error { n++; return stop }, nil)
	if !errors.Is(err, stop) || n != 1 {
		t.Errorf("stopped: %v after %d", err, n)
	}
	if err := r.Walk("nowhere", spool.Selection{}, nil, nil); !errors.Is(err, spool.ErrNoLane) {
		t.Errorf("no lane: %v", err)
	}
	// What an upstream has taken is not there any more, and that is no damage.
	rd, _ := r.reader("cloud", "telemetry")
	run, err := rd.Next(400)
	if err != nil {
		t.Fatal(err)
	}
	rd.Resolve(run.End(), spool.Delivered)
	got, damage := walked(t, r, spool.Selection{})
	if diff := cmp.Diff(span(run.End().Seq, 100), got); diff != "" || len(damage) > 0 {
		t.Errorf("after an ack: %s %v", diff, damage)
	}
}

func TestWalkPassesOverDamageAndTellsIt(t *testing.T) {
	flip := func(v []byte) []byte {
		if len(v) == 0 {
			return []byte{1}
		}
		v[len(v)/2] ^= 1
		return v
	}
	cases := map[string]struct {
		spoil []int // chunks, counted from the first
		how   func(v []byte) []byte
	}{
		"one flipped":   {[]int{4}, flip},
		"first missing": {[]int{0}, nil},
		"last flipped":  {[]int{9}, flip},
		"last missing":  {[]int{9}, nil},
		"two beside":    {[]int{3, 4}, flip},
		"two apart":     {[]int{2, 7}, nil},
		"empty":         {[]int{5}, func([]byte) []byte { return []byte{} }},
		"all":           {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, flip},
		"another's":     {[]int{6}, func(v []byte) []byte { return v[:len(v)-1] }},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r := open(t, vfs.NewMem(), lanes("telemetry"))
			for i := range 10 {
				r.put("telemetry", i*10, i*10+10)
			}
			starts := chunkStarts(t, r)
			if len(starts) != 11 {
				t.Skipf("%d chunks", len(starts)-1) // two commits met
			}
			var ops []kv.Op
			lost := map[uint64]bool{}
			for _, i := range c.spoil {
				op := kv.Op{Key: dataKey(starts[i]), Delete: c.how == nil}
				if c.how != nil {
					v, _, err := r.store.Get(op.Key)
					if err != nil {
						t.Fatal(err)
					}
					op.Value = c.how(v)
				}
				ops = append(ops, op)
				for s := starts[i]; s < starts[i+1]; s++ {
					lost[s] = true
				}
			}
			if err := r.store.ApplyWait(ops); err != nil {
				t.Fatal(err)
			}
			var want []uint64
			for s := uint64(1); s <= 100; s++ {
				if !lost[s] {
					want = append(want, s)
				}
			}
			got, damage := walked(t, r, spool.Selection{})
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			told := map[uint64]bool{}
			for _, d := range damage {
				for s := d.First; s <= d.Last; s++ {
					if told[s] || d.Cause == "" || d.Lane != "telemetry" {
						t.Errorf("%+v", d)
					}
					told[s] = true
				}
			}
			if diff := cmp.Diff(lost, told); diff != "" {
				t.Error(diff)
			}
		})
	}
}
