package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// sample is one figure over the rounds.
type sample []float64

func (s sample) median() float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	c := slices.Sorted(slices.Values(s))
	if n := len(c); n%2 == 0 {
		return (c[n/2-1] + c[n/2]) / 2
	}
	return c[len(c)/2]
}

// over divides round by round, so that a slow minute of the machine hits both sides.
func (s sample) over(o sample) sample {
	var r sample
	for i := range min(len(s), len(o)) {
		r = append(r, s[i]/o[i])
	}
	return r
}

func (s sample) format(unit string) string {
	if len(s) == 0 {
		return "–"
	}
	med := number(s.median())
	if len(s) > 1 {
		med += fmt.Sprintf(" [%s–%s]", number(slices.Min(s)), number(slices.Max(s)))
	}
	return strings.TrimSpace(med + " " + unit)
}

func number(x float64) string {
	switch {
	case math.IsNaN(x) || math.IsInf(x, 0):
		return "–"
	case math.Abs(x) >= 1000:
		return thousands(int64(math.Round(x)))
	case math.Abs(x) >= 100:
		return fmt.Sprintf("%.0f", x)
	case math.Abs(x) >= 10:
		return fmt.Sprintf("%.1f", x)
	case math.Abs(x) >= 0.1 || x == 0:
		return fmt.Sprintf("%.2f", x)
	default:
		return fmt.Sprintf("%.3f", x)
	}
}

func thousands(n int64) string {
	if n < 0 {
		return "-" + thousands(-n)
	}
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return thousands(n/1000) + fmt.Sprintf(",%03d", n%1000)
}

// target is what a figure has to reach: a least ratio or value, or a most.
type target struct {
	limit float64
	most  bool // the limit is the most allowed, not the least
	unit  string
}

func atLeast(x float64, unit string) *target { return &target{limit: x, unit: unit} }
func atMost(x float64, unit string) *target  { return &target{limit: x, unit: unit, most: true} }

func (t *target) reached(x float64) bool {
	if t.most {
		return x <= t.limit
	}
	return x >= t.limit
}

func (t *target) String() string {
	sign := "≥"
	if t.most {
		sign = "≤"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %s", sign, number(t.limit), t.unit))
}

// row is one line of the table. With against the target is held against the ratio, else against the value.
type row struct {
	what    string
	value   sample
	unit    string
	than    string // what it is compared with
	against sample
	target  *target
}

func (r row) cells() [6]string {
	judged, ratio := r.value, "–"
	if r.than != "" {
		judged = r.value.over(r.against)
		ratio = judged.format("×")
	}
	want, ok := "–", ""
	if r.target != nil {
		want, ok = r.target.String(), "no"
		if r.target.reached(judged.median()) {
			ok = "yes"
		}
	}
	than := "–"
	if r.than != "" {
		than = r.than + ": " + r.against.format(r.unit)
	}
	return [6]string{r.what, r.value.format(r.unit), than, ratio, want, ok}
}

// section is one figure of the list with the rows measured for it.
type section struct {
	title string
	notes []string
	rows  []row
}

func (s section) write(w io.Writer) {
	fmt.Fprintf(w, "\n### %s\n\n", s.title)
	fmt.Fprintln(w, "| what | Holdfast: median [min–max] | compared with | ratio, round by round | goal | reached |")
	fmt.Fprintln(w, "| --- | --- | --- | --- | --- | --- |")
	for _, r := range s.rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(cellsOf(r), " | "))
	}
	for _, n := range s.notes {
		fmt.Fprintf(w, "\n%s\n", n)
	}
}

func cellsOf(r row) []string {
	c := r.cells()
	return c[:]
}
