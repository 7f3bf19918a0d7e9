package bridge_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"holdfast/bridge"
)

const (
	system = iota
	alarm
	telemetry
	bulk
)

var shares = []int{0, 50, 40, 10}

// serve lets the schedule share out total bytes among lanes that always have something to send, in
// sends of the given sizes, and returns what each got and in which order.
func serve(s bridge.Schedule, backlogged []bool, size func(lane int) int, total int) (got []int, order []int) {
	got = make([]int, len(backlogged))
	waiting := func(i int) bool { return backlogged[i] }
	for total > 0 {
		i := s.Pick(waiting, func(int, bool) bool { return true })
		n := size(i)
		s.Sent(i, n, waiting)
		got[i] += n
		total -= n
		order = append(order, i)
	}
	return got, order
}

func TestEachLaneGetsItsShareUnderAFlood(t *testing.T) {
	const total = 100 << 20
	s := bridge.NewSchedule(shares)
	got, _ := serve(s, []bool{false, true, true, true}, func(int) int { return 3000 }, total)
	for lane, share := range []float64{0, .5, .4, .1} {
		if have := float64(got[lane]) / total; math.Abs(have-share) > 0.01 {
			t.Errorf("lane %d got %.3f of the link, want %.2f", lane, have, share)
		}
	}
}

func TestWhatNobodyClaimsGoesByPriority(t *testing.T) {
	const total = 100 << 20
	got, _ := serve(bridge.NewSchedule(shares), []bool{false, false, true, true}, func(int) int { return 3000 }, total)
	if have := float64(got[bulk]) / total; math.Abs(have-.1) > 0.01 {
		t.Errorf("bulk got %.3f of the link, want its 0.1 and no more", have)
	}
}

// TestNoLaneStarves: whatever the shares and the sizes of sends, a lane with something to send gets
// what it was promised, but for what may be owed at the end.
func TestNoLaneStarves(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shares := rapid.SliceOfN(rapid.IntRange(0, 100), 2, 6).Draw(t, "shares")
		sizes := rapid.SliceOfN(rapid.IntRange(1000, 200<<10), len(shares), len(shares)).Draw(t, "sizes")
		backlogged := rapid.SliceOfN(rapid.Bool(), len(shares), len(shares)).Draw(t, "backlogged")
		if !containsTrue(backlogged) {
			t.Skip("no lane has anything to send")
		}
		const total = 16 << 20
		got, _ := serve(bridge.NewSchedule(shares), backlogged, func(i int) int { return sizes[i] }, total)
		sum := 0
		for _, s := range shares {
			sum += s
		}
		for i, b := range backlogged {
			if !b {
				continue
			}
			promised := float64(total) * float64(shares[i]) / float64(max(sum, 100))
			// Late by the quantum that makes a lane owed, for it and those who are owed before it, and by a send.
			if late := promised - float64(got[i]); late > float64(2*len(shares)*(bridge.Quantum+200<<10)) {
				t.Fatalf("lane %d of %v got %d bytes, promised %.0f", i, shares, got[i], promised)
			}
		}
	})
}

func containsTrue(bs []bool) bool {
	for _, b := range bs {
		if b {
			return true
		}
	}
	return false
}

// TestAlarmGoesNext: however long the lower lanes have been sending or waiting, the first alarms go before
// anything else that is not sent yet.
func TestAlarmGoesNext(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := bridge.NewSchedule(shares)
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		most := rapid.SampledFrom([]int{300, 10_000, 128 << 10}).Draw(t, "largest send")
		size := func(int) int { return 1 + random.IntN(most) }
		before := rapid.IntRange(0, 10<<20).Draw(t, "bytes before")
		serve(s, []bool{false, false, rapid.Bool().Draw(t, "telemetry"), true}, size, before)
		_, order := serve(s, []bool{false, true, true, true}, func(int) int { return 300 }, bridge.Quantum)
		for k, lane := range order {
			if lane != alarm {
				t.Fatalf("send %d after the alarms came was of lane %d", k, lane)
			}
		}
	})
}

// TestOwedLaneUsesTheReserve: a flood of alarms that keeps the window full may not keep the
// others out.
func TestOwedLaneUsesTheReserve(t *testing.T) {
	s := bridge.NewSchedule(shares)
	all := func(int) bool { return true }
	const window = 32
	sends := 0
	fits := func(lane int, owed bool) bool {
		if owed {
			lane = 0
		}
		return sends < bridge.Room(window, lane, len(shares))
	}
	got := make([]int, len(shares))
	for range 20_000 {
		for {
			i := s.Pick(func(i int) bool { return i != system }, fits)
			if i < 0 {
				break
			}
			sends++
			got[i]++
			s.Sent(i, 1000, all)
		}
		sends-- // an ack
	}
	for lane := alarm; lane <= bulk; lane++ {
		if got[lane] < 500 {
			t.Errorf("lane %d sent %d of 20,000", lane, got[lane])
		}
	}
}

func TestRoomLeavesPlaceForAlarms(t *testing.T) {
	for _, window := range []int{1, 2, 3, 4, 8, 16, 100, 256, 1000, 16384} {
		for ranks := 1; ranks <= 6; ranks++ {
			for rank := range ranks {
				r := bridge.Room(window, rank, ranks)
				if r < 1 || r > window {
					t.Errorf("window %d: rank %d of %d may use %d", window, rank, ranks, r)
				}
				if rank > 0 && window > ranks && r >= bridge.Room(window, rank-1, ranks) {
					t.Errorf("window %d: rank %d of %d leaves no place for the rank above", window, rank, ranks)
				}
			}
			if r := bridge.Room(window, ranks-1, ranks); window >= 64 && r < window*3/4 {
				t.Errorf("window %d: the lowest of %d may use only %d", window, ranks, r)
			}
		}
	}
}
