package proof

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// Step is one cycle: the gateway lives under load while the link is as it is, then something happens to it, and after a while it
// is started again.
type Step struct {
	Life  time.Duration
	Link  string // what the way upstream is like meanwhile
	Fault string // what happens then
	Gone  time.Duration
	Seed  uint64 // for whatever the fault decides by chance
}

// Choice is something that may be drawn, Weight times as often as one of weight 1.
type Choice struct {
	Name   string
	Weight int
}

// PlanConfig says what a schedule is drawn from. Faults has to have something in it.
type PlanConfig struct {
	Steps            int
	Faults, Links    []Choice
	MinLife, MaxLife time.Duration
	MaxGone          time.Duration // half of the steps are not gone at all; 0: none is
}

// Plan draws a schedule: the same seed and configuration give the same one.
func Plan(seed uint64, c PlanConfig) []Step {
	rng := rand.New(rand.NewPCG(seed, 0x706c616e))
	between := func(least, most time.Duration) time.Duration {
		return least + time.Duration(rng.Int64N(int64(most-least)+1)).Truncate(time.Millisecond)
	}
	steps := make([]Step, c.Steps)
	for i := range steps {
		s := &steps[i]
		s.Life, s.Link, s.Fault = between(c.MinLife, c.MaxLife), draw(rng, c.Links), draw(rng, c.Faults)
		if gone := between(0, c.MaxGone); rng.IntN(2) == 0 {
			s.Gone = gone
		}
		s.Seed = rng.Uint64()
	}
	return steps
}

func draw(rng *rand.Rand, from []Choice) string {
	sum := 0
	for _, c := range from {
		sum += c.Weight
	}
	if sum == 0 {
		return ""
	}
	n := rng.IntN(sum)
	for _, c := range from {
		if n -= c.Weight; n < 0 {
			return c.Name
		}
	}
	return ""
}

// String tells the schedule, one step a line.
func (s Step) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v", s.Life)
	if s.Link != "" {
		fmt.Fprintf(&b, " with the link %s", s.Link)
	}
	fmt.Fprintf(&b, ", then %s", s.Fault)
	if s.Gone > 0 {
		fmt.Fprintf(&b, ", gone for %v", s.Gone)
	}
	return b.String()
}
