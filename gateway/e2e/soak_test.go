package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"holdfast/internal/powercut"
	"holdfast/internal/proof"
)

// roundTime is how long a gateway of TestSoak goes through everything before all is held against all, and another one begins.
const roundTime = 45 * time.Second

var soakFaults = []proof.Choice{
	{Name: "kill -9", Weight: 4},
	{Name: "power cut", Weight: 4},
	{Name: "slow disk and power cut", Weight: 2},
	{Name: "stop", Weight: 2},
	{Name: "freeze", Weight: 2},
	{Name: "clock jumps", Weight: 2},
	{Name: "boot with another clock", Weight: 2},
	{Name: "fsync fails", Weight: 1},
	{Name: "fsync fails and power cut", Weight: 1},
	{Name: "write fails", Weight: 1},
}

// hardFaults are those under which a command may be refused, or lost with what is damaged: rounds with an odd seed have them, and no
// commands.
var hardFaults = []proof.Choice{{Name: "disk full", Weight: 3}, {Name: "damage", Weight: 2}}

// TestSoak does everything at once: devices of both protocol versions on flaky links that send messages and get commands, an upstream
// behind a link that fails in every way, a disk that fails, is slow, and loses its power, a gateway that is killed, stopped and frozen,
// and a wall clock that jumps by years.
// SOAK is how long, SOAK_SEED the seed of the first round; that of the next is one more. SOAK_FAULTS
// names faults to draw from in place of the usual ones.
func TestSoak(t *testing.T) {
	t.Parallel()
	bin(t)
	if err := powercut.Available(); err != nil {
		t.Skip(err)
	}
	lasts, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		lasts = 8 * time.Second
	}
	seed := uint64(number("SOAK_SEED", int(time.Now().UnixNano()%1_000_000)))
	r := proof.NewReport("soak", seed, fmt.Sprintf("make soak SOAK=%v SOAK_SEED=%d", lasts, seed))
	defer told(t, r, "SOAK_REPORT")
	t.Run("all", func(t *testing.T) {
		rounds := uint64(max(1, lasts/roundTime))
		for n := range rounds {
			t.Run(fmt.Sprintf("seed=%d", seed+n), func(t *testing.T) {
				t.Parallel()
				soakRound(t, r, seed+n, min(lasts, roundTime))
			})
		}
	})
}

func soakRound(t *testing.T, r *proof.Report, seed uint64, lasts time.Duration) {
	usual := soakFaults
	if seed%2 == 1 {
		usual = slices.Concat(soakFaults, hardFaults)
	}
	from := choices("SOAK_FAULTS", usual)
	hard := slices.ContainsFunc(from, func(c proof.Choice) bool {
		return slices.ContainsFunc(hardFaults, func(h proof.Choice) bool { return h.Name == c.Name && c.Weight > 0 })
	})
	all := proof.Plan(seed, proof.PlanConfig{
		Steps: 10_000, Faults: from, Links: linkChoices,
		MinLife: 200 * time.Millisecond, MaxLife: 1500 * time.Millisecond, MaxGone: 300 * time.Millisecond,
	})
	steps := 0
	t.Cleanup(func() {
		if t.Failed() {
			r.Failed("%s failed: make soak SOAK=%v SOAK_SEED=%d", t.Name(), lasts, seed)
			t.Logf("schedule:%s", schedule(all[:steps]))
		}
	})
	x := startTrial(t, r, forms[seed%uint64(len(forms))], seed, true, load{devices: 10, rate: 50, commands: !hard, clock: true})
	for begin := time.Now(); time.Since(begin) < lasts; steps++ {
		x.step(all[steps])
	}
	x.finish()
}
