package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"holdfast/internal/powercut"
	"holdfast/internal/proof"
)

// roundSteps is how often a gateway of TestCrash is broken before all is held against all, and another one begins.
const roundSteps = 25

// crashPlan is one of the two halves of TestCrash.
type crashPlan struct {
	name    string
	powered bool
	faults  []proof.Choice
}

var crashPlans = []crashPlan{
	{"kill -9", false, []proof.Choice{{Name: "kill -9", Weight: 1}}},
	{"power cut", true, []proof.Choice{{Name: "power cut", Weight: 3}, {Name: "slow disk and power cut", Weight: 2}}},
}

// TestCrash breaks a gateway under load over and over: killed on the machine's own disk, and with the power cut under it. After each
// start the books add up and hold what devices were told; `spool verify` has read a copy of what the crash left. After each round
// everything that was acknowledged has arrived, in order, and the books are exact.
//
// CRASHES is how often in each way, CRASH_SEED the seed of the first round; that of the next is one more. CRASH_FAULTS names faults
// to draw from in place of those.
func TestCrash(t *testing.T) {
	t.Parallel()
	bin(t)
	crashes := number("CRASHES", 6)
	seed := uint64(number("CRASH_SEED", int(time.Now().UnixNano()%1_000_000)))
	r := proof.NewReport("crash", seed, fmt.Sprintf("make crash CRASHES=%d CRASH_SEED=%d", crashes, seed))
	defer told(t, r, "CRASH_REPORT")
	t.Run("all", func(t *testing.T) {
		for _, plan := range crashPlans {
			if os.Getenv("CRASH_FAULTS") != "" && !plan.powered {
				continue // faults by name want a disk of our own
			}
			for first := 0; first < crashes; first += roundSteps {
				seed, steps := seed+uint64(first/roundSteps), min(roundSteps, crashes-first)
				t.Run(fmt.Sprintf("%s/seed=%d", plan.name, seed), func(t *testing.T) {
					t.Parallel()
					crashRound(t, r, plan, seed, steps)
				})
			}
		}
	})
}

func crashRound(t *testing.T, r *proof.Report, plan crashPlan, seed uint64, steps int) {
	// A shorter round is the beginning of a longer one.
	all := proof.Plan(seed, proof.PlanConfig{
		Steps: steps, Faults: choices("CRASH_FAULTS", plan.faults), Links: linkChoices,
		MinLife: 120 * time.Millisecond, MaxLife: 500 * time.Millisecond, MaxGone: 60 * time.Millisecond,
	})
	x := startTrial(t, r, forms[seed%uint64(len(forms))], seed, plan.powered, load{devices: 10, rate: 100})
	t.Cleanup(func() {
		if t.Failed() {
			r.Failed("%s failed: make crash CRASHES=%d CRASH_SEED=%d", t.Name(), steps, seed)
			t.Logf("schedule:%s", schedule(all))
		}
	})
	for _, s := range all {
		x.step(s)
	}
	x.finish()
}

// TestCheckerFindsLies runs TestCrash on a disk whose fsync says yes and does nothing, as under a gateway that acknowledges before
// its commit is on disk. It has to fail, and to say why.
func TestCheckerFindsLies(t *testing.T) {
	t.Parallel()
	path := bin(t)
	if err := powercut.Available(); err != nil {
		t.Skip(err)
	}
	report := filepath.Join(t.TempDir(), "report.json")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrash$", "-test.count=1")
	cmd.Env = append(os.Environ(), "HOLDFAST_BIN="+path, "CRASHES=8", "CRASH_SEED=4", "CRASH_FAULTS=lying disk and power cut", "CRASH_REPORT="+report)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("a disk that lies was not found out:\n%s", out)
	}
	var got struct {
		OK      bool
		Verdict proof.Verdict
		Failed  []string
	}
	b, err := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	if err != nil {
		t.Fatalf("the report: %v\n%s", err, out)
	}
	t.Logf("found: %d lost, %d unexplained; %.500q", got.Verdict.Lost, got.Verdict.Unexplained, got.Failed)
	if got.OK || got.Verdict.Lost+got.Verdict.Unexplained == 0 && len(got.Failed) == 0 {
		t.Errorf("the report does not say it: %s", b)
	}
}

// number reads a number from the environment.
func number(variable string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(variable)); err == nil && n > 0 {
		return n
	}
	return otherwise
}
