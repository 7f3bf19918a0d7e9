package main

import (
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestHistogramIsWithinAnEighth(t *testing.T) {
	var h histogram
	for i := int64(1); i <= 1_000_000; i++ {
		h.add(i)
	}
	for q, want := range map[float64]float64{0.01: 10_000, 0.5: 500_000, 0.99: 990_000} {
		if got := float64(h.quantile(q)); math.Abs(got-want)/want > 0.125 {
			t.Errorf("quantile %v is %v, want about %v", q, got, want)
		}
	}
	var two histogram
	two.merge(&h)
	two.merge(&h)
	if two.n != 2*h.n || two.quantile(0.5) != h.quantile(0.5) {
		t.Error("merging a histogram with itself changes its median")
	}
}

func TestRatioIsJudgedRoundByRound(t *testing.T) {
	// A slow second round hits both sides: the ratio does not move.
	r := row{what: "x", value: sample{200, 20, 210}, than: "y", against: sample{100, 10, 100}, target: atLeast(1.5, "×")}
	if c := r.cells(); c[3] != "2.00 [2.00–2.10] ×" || c[5] != "yes" {
		t.Errorf("cells %q", c)
	}
	r = row{what: "x", value: sample{3, 5}, target: atMost(3.5, "MiB")}
	if c := r.cells(); c[5] != "no" || c[1] != "4.00 [3.00–5.00]" {
		t.Errorf("cells %q", c)
	}
}

func TestTelemetryIsAsLongAsSaid(t *testing.T) {
	seen := map[string]bool{}
	for _, b := range telemetry(1000) {
		if len(b) != payloadBytes {
			t.Fatalf("%d bytes: %s", len(b), b)
		}
		seen[string(b)] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d different messages of 1000", len(seen))
	}
}

func TestInflightHoldsTheProducer(t *testing.T) {
	f := newInflight(2)
	f.acquire()
	f.acquire()
	passed := make(chan struct{})
	go func() {
		f.acquire()
		close(passed)
	}()
	select {
	case <-passed:
		t.Fatal("a third message under way, two are allowed")
	case <-time.After(20 * time.Millisecond):
	}
	f.Done(0, 0, nil)
	<-passed
}

func TestResultsReplaceTheOldOnes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "b.md")
	if err := os.WriteFile(file, []byte("# B\n\nsaid\n\n## Results\n\nold\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, results := range []string{"first\n", "second\n"} {
		if err := writeResults(file, results); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "# B\n\nsaid\n\n## Results\n\nsecond\n" {
		t.Errorf("%q, %v", b, err)
	}
	if err := os.WriteFile(file, []byte("# B\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if writeResults(file, "x") == nil {
		t.Error("a file without a place for results was written")
	}
}
