package firmwaresim_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	firmwaresim "holdfast/firmware-sim"
)

// TestRanges drives the set against a plain map.
func TestRanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) (*firmwaresim.Ranges, map[uint64]bool) {
			set, model := new(firmwaresim.Ranges), map[uint64]bool{}
			for _, n := range rapid.SliceOfN(rapid.Uint64Range(1, 40), 0, 60).Draw(t, name) {
				if got := set.Add(n); got == model[n] {
					t.Fatalf("Add(%d) = %v", n, got)
				}
				model[n] = true
			}
			check(t, set, model)
			return set, model
		}
		a, inA := draw("a")
		b, inB := draw("b")
		rest := map[uint64]bool{}
		for n := range inA {
			if !inB[n] {
				rest[n] = true
			}
		}
		check(t, a.Minus(b), rest)
		check(t, a, inA) // unchanged
	})
}

func check(t *rapid.T, set *firmwaresim.Ranges, want map[uint64]bool) {
	n, last := 0, uint64(0)
	for _, s := range set.Spans() {
		if s[0] > s[1] || last > 0 && s[0] <= last+1 {
			t.Fatalf("ranges %v overlap or adjoin", set.Spans())
		}
		for x := s[0]; x <= s[1]; x++ {
			if !want[x] {
				t.Fatalf("%d is in %v, not in the model", x, set.Spans())
			}
			n++
		}
		last = s[1]
	}
	if n != len(want) {
		t.Fatalf("%d numbers in %v, %d in the model", n, set.Spans(), len(want))
	}
}

func TestVerify(t *testing.T) {
	for _, c := range []struct {
		name    string
		made    uint64
		unsent  []uint64
		acked   []uint64
		again   []uint64 // sent more than once
		arrived []uint64
		late    []uint64 // arrived out of a backlog
		want    firmwaresim.Verdict
		ok      bool
		example string
	}{
		{
			name: "all well", made: 4, acked: []uint64{1, 2, 3, 4}, arrived: []uint64{1, 2, 3, 4}, ok: true,
			want: firmwaresim.Verdict{Published: 4, Acknowledged: 4, Arrived: 4},
		},
		{
			name: "acknowledged and lost", made: 4, acked: []uint64{1, 2, 3, 4}, arrived: []uint64{1, 4},
			want: firmwaresim.Verdict{Published: 4, Acknowledged: 4, Arrived: 2, Lost: 2}, example: "d s n=2-3: acknowledged, not arrived",
		},
		{
			name: "nothing arrived", made: 1, acked: []uint64{1},
			want: firmwaresim.Verdict{Published: 1, Acknowledged: 1, Lost: 1}, example: "d s n=1: acknowledged",
		},
		{
			name: "not acknowledged and not arrived", made: 3, acked: []uint64{1, 3}, arrived: []uint64{1, 3}, ok: true,
			want: firmwaresim.Verdict{Published: 3, Acknowledged: 2, Arrived: 2},
		},
		{
			name: "not acknowledged but arrived", made: 2, acked: []uint64{1}, arrived: []uint64{1, 2}, ok: true,
			want: firmwaresim.Verdict{Published: 2, Acknowledged: 1, Arrived: 2},
		},
		{
			name: "sent again", made: 3, acked: []uint64{1, 2, 3}, again: []uint64{1, 2, 3}, arrived: []uint64{1, 2, 1, 2, 3, 3}, ok: true,
			want: firmwaresim.Verdict{Published: 3, Acknowledged: 3, Arrived: 3, Duplicates: 3},
		},
		{
			name: "sent once, arrived twice", made: 3, acked: []uint64{1, 2, 3}, again: []uint64{1}, arrived: []uint64{1, 1, 2, 3, 3}, ok: true,
			want: firmwaresim.Verdict{Published: 3, Acknowledged: 3, Arrived: 3, Duplicates: 2, Repeated: 1}, example: "d s n=3: arrived more than once, sent once",
		},
		{
			name: "a backlog beside what is new", made: 6, acked: []uint64{1, 2, 3, 4, 5, 6}, arrived: []uint64{1, 5, 6}, late: []uint64{2, 3, 4}, ok: true,
			want: firmwaresim.Verdict{Published: 6, Acknowledged: 6, Arrived: 6},
		},
		{
			name: "a backlog out of order", made: 6, acked: []uint64{1, 2, 3, 4, 5, 6}, arrived: []uint64{1, 5, 6}, late: []uint64{2, 4, 3},
			want: firmwaresim.Verdict{Published: 6, Acknowledged: 6, Arrived: 6, OutOfOrder: 1}, example: "d s n=3: arrived first after a later one",
		},
		{
			name: "out of order", made: 3, acked: []uint64{1, 2, 3}, arrived: []uint64{1, 3, 2},
			want: firmwaresim.Verdict{Published: 3, Acknowledged: 3, Arrived: 3, OutOfOrder: 1}, example: "d s n=2: arrived first after a later one",
		},
		{
			name: "out of order, sent again", made: 4, acked: []uint64{1, 2, 3, 4}, again: []uint64{2}, arrived: []uint64{1, 3, 2, 4},
			want: firmwaresim.Verdict{Published: 4, Acknowledged: 4, Arrived: 4, OutOfOrder: 1, Behind: 1}, example: "d s n=2: arrived first after a later one",
		},
		{
			name: "invented", made: 2, acked: []uint64{1, 2}, arrived: []uint64{1, 2, 3},
			want: firmwaresim.Verdict{Published: 2, Acknowledged: 2, Arrived: 3, Unknown: 1}, example: "d s n=3: arrived, never sent",
		},
		{
			name: "dropped on the device and yet there", made: 3, unsent: []uint64{2}, acked: []uint64{1, 3}, arrived: []uint64{1, 2, 3},
			want: firmwaresim.Verdict{Published: 2, Acknowledged: 2, Arrived: 3, Unknown: 1}, example: "d s n=2: arrived, never sent",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := firmwaresim.NewArrivals()
			for _, n := range c.arrived {
				a.Add("d", "s", n)
			}
			for _, n := range c.late {
				a.AddLate("d", "s", n)
			}
			got := firmwaresim.NewLedger("d", "s", c.made, c.unsent, c.acked, c.again...).Verify(a)
			if c.example != "" && !slices.ContainsFunc(got.Examples, func(e string) bool { return strings.HasPrefix(e, c.example) }) {
				t.Errorf("examples %q, want one with %q", got.Examples, c.example)
			}
			if c.example == "" && len(got.Examples) > 0 {
				t.Errorf("examples %q, want none", got.Examples)
			}
			got.Examples = nil
			if got.String() != c.want.String() || got.Repeated != c.want.Repeated || got.Behind != c.want.Behind || got.OK() != c.ok {
				t.Errorf("got  %v, ok %v\nwant %v, ok %v", got, got.OK(), c.want, c.ok)
			}
		})
	}
}

func TestVerifyKnowsStrangers(t *testing.T) {
	a := firmwaresim.NewArrivals()
	a.Add("stranger", "s", 1)
	if v := firmwaresim.NewLedger("d", "s", 0, nil, nil).Verify(a); v.Unknown != 1 || v.OK() {
		t.Errorf("verdict %v", v)
	}
}

func TestQuantiles(t *testing.T) {
	var list []time.Duration
	for i := range 100_000 {
		list = append(list, time.Duration(i+1)*7*time.Microsecond)
	}
	got := firmwaresim.Quantiles(list)
	for _, c := range []struct {
		name      string
		got, want time.Duration
	}{
		{"p50", got.P50, list[49_999]}, {"p99", got.P99, list[98_999]}, {"p99.9", got.P999, list[99_899]}, {"max", got.Max, list[99_999]},
	} {
		if c.got < c.want || float64(c.got) > 1.016*float64(c.want) {
			t.Errorf("%s %v, want %v to 1.6 %% more", c.name, c.got, c.want)
		}
	}
	if l := firmwaresim.Quantiles(nil); l != (firmwaresim.Latency{}) {
		t.Errorf("of nothing: %v", l)
	}
	if l := firmwaresim.Quantiles([]time.Duration{100 * time.Hour, -1}); l.Max != 100*time.Hour {
		t.Errorf("beyond the last bucket: %v", l)
	}
}
