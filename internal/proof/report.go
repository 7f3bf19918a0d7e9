package proof

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	firmwaresim "holdfast/firmware-sim"
)

// Report is what a run tells: how often what was broken, and what came of it. Its methods may be called from many goroutines.
type Report struct {
	mu      sync.Mutex
	name    string
	seed    uint64
	replay  string
	began   time.Time
	cycles  uint64
	faults  map[string]uint64
	slowest time.Duration
	verdict Verdict
	orders  firmwaresim.CommandVerdict
	failed  []string
}

// NewReport begins one. replay is the command that does the same again.
func NewReport(name string, seed uint64, replay string) *Report {
	return &Report{name: name, seed: seed, replay: replay, began: time.Now(), faults: map[string]uint64{}}
}

// Cycle counts a start after a fault, and how long it took.
func (r *Report) Cycle(start time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cycles++
	r.slowest = max(r.slowest, start)
}

// Fault counts one.
func (r *Report) Fault(kind string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[kind]++
}

// Verdict adds that of one round.
func (r *Report) Verdict(v Verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.verdict.add(v)
}

// Commands adds the verdict on the commands of one round.
func (r *Report) Commands(v firmwaresim.CommandVerdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := &r.orders
	o.Received += v.Received
	o.Repeats += v.Repeats
	o.Executed += v.Executed
	o.ExecutedTwice += v.ExecutedTwice
	o.OutOfOrder += v.OutOfOrder
	o.Lost += v.Lost
	o.Disagreed += v.Disagreed
	o.Unknown += v.Unknown
	o.Open += v.Open
	o.Examples = append(o.Examples, v.Examples...)
}

// Failed notes what else went wrong: a start that was refused, an account that did not add up in between.
func (r *Report) Failed(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = append(r.failed, fmt.Sprintf(format, args...))
}

// OK says that every promise was kept, and that something was shown.
func (r *Report) OK() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ok()
}

func (r *Report) ok() bool {
	return len(r.failed) == 0 && r.verdict.OK() && r.orders.OK() && r.orders.Open == 0 && r.verdict.Acknowledged > 0
}

// String is for people.
func (r *Report) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	v := &r.verdict
	word := "KEPT"
	if !r.ok() {
		word = "BROKEN"
	}
	fmt.Fprintf(&b, "%s: %s\n", r.name, word)
	line := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "  %-12s "+format+"\n", append([]any{what}, args...)...)
	}
	line("seed", "%d (again: %s)", r.seed, r.replay)
	line("cycles", "%d in %v, slowest start %v", r.cycles, time.Since(r.began).Round(time.Second), r.slowest.Round(time.Millisecond))
	line("messages", "%d published, %d acknowledged, %d arrived", v.Published, v.Acknowledged, v.Arrived)
	line("again", "%d sent again by devices, %d repeats of the gateway removed by id", v.SentAgain, v.Removed)
	var faults []string
	for _, kind := range slices.Sorted(maps.Keys(r.faults)) {
		faults = append(faults, fmt.Sprintf("%d %s", r.faults[kind], kind))
	}
	line("faults", "%s", strings.Join(faults, ", "))
	for _, reason := range slices.Sorted(maps.Keys(v.Announced)) {
		line("announced", "%d messages that will not arrive: %s", v.Announced[reason], reason)
	}
	line("verdict", "%d lost, %d unexplained, %d out of order", v.Lost, v.Unexplained, v.OutOfOrder)
	if o := &r.orders; o.Received > 0 {
		line("commands", "%d received, %d again, %d executed: %d twice, %d out of order, %d lost, %d seen differently, %d unknown, %d open",
			o.Received, o.Repeats, o.Executed, o.ExecutedTwice, o.OutOfOrder, o.Lost, o.Disagreed, o.Unknown, o.Open)
	}
	for _, e := range slices.Concat(r.failed, v.Examples, r.orders.Examples) {
		line("", "%s", e)
	}
	return b.String()
}

// MarshalJSON is for programs.
func (r *Report) MarshalJSON() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	orders := &r.orders
	if orders.Received == 0 {
		orders = nil
	}
	return json.Marshal(struct {
		Name    string                      `json:"name"`
		OK      bool                        `json:"ok"`
		Seed    uint64                      `json:"seed"`
		Replay  string                      `json:"replay"`
		Began   time.Time                   `json:"began"`
		Seconds float64                     `json:"seconds"`
		Cycles  uint64                      `json:"cycles"`
		Slowest int64                       `json:"slowest_start_ms"`
		Faults  map[string]uint64           `json:"faults"`
		Verdict *Verdict                    `json:"verdict"`
		Orders  *firmwaresim.CommandVerdict `json:"commands,omitempty"`
		Failed  []string                    `json:"failed,omitempty"`
	}{r.name, r.ok(), r.seed, r.replay, r.began.UTC(), time.Since(r.began).Seconds(), r.cycles, r.slowest.Milliseconds(), r.faults, &r.verdict, orders, r.failed})
}

// WriteJSON writes the report to a file; path "": nowhere.
func (r *Report) WriteJSON(path string) error {
	if path == "" {
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}
