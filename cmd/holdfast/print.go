package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"holdfast/spool"
)

func (p *program) printJSON(v any) error {
	enc := json.NewEncoder(p.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printJSONLine is for lists that may be long.
func (p *program) printJSONLine(v any) error { return json.NewEncoder(p.stdout).Encode(v) }

// table prints rows with their columns under each other, the first row being their names. Columns of
// figures are aligned to the right.
func (p *program) table(rows ...[]string) {
	for col := range rows[0] {
		width, figures := 0, true
		for n, r := range rows {
			width = max(width, len(r[col]))
			figures = figures && (n == 0 || figure.MatchString(r[col]))
		}
		for _, r := range rows {
			if figures && len(rows) > 1 {
				r[col] = strings.Repeat(" ", width-len(r[col])) + r[col]
			}
		}
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush() // to memory
	for line := range strings.Lines(b.String()) {
		fmt.Fprintln(p.stdout, strings.TrimRight(line, " \n"))
	}
}

var figure = regexp.MustCompile(`^[0-9.]+( [KMG]?i?B)?$|^none$`)

func bytesText[T int64 | uint64](n T) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String()
}

// printLanes shows what each lane holds; live also what only a running gateway knows.
func (p *program) printLanes(lanes []spool.LaneStat, live bool) {
	rows := [][]string{{"LANE", "ACCEPTED", "KEPT", "SIZE"}}
	if live {
		rows[0] = append(rows[0], "LIMIT", "REFUSED", "SHED")
	}
	for _, l := range lanes {
		row := []string{l.Name, fmt.Sprint(l.Accepted.Messages), fmt.Sprint(l.Kept.Messages), bytesText(l.Kept.Bytes)}
		if live {
			limit := "none"
			if l.MaxBytes > 0 {
				limit = bytesText(l.MaxBytes)
			}
			row = append(row, limit, fmt.Sprint(l.Refused), fmt.Sprint(l.Shed))
		}
		rows = append(rows, row)
	}
	p.table(rows...)
}

// printAccounts shows where the messages are, for each upstream and lane.
func (p *program) printAccounts(accounts []spool.Account, balanced bool) {
	rows := [][]string{{"UPSTREAM", "LANE", "ACCEPTED", "DELIVERED", "EXPIRED", "EVICTED", "PARKED", "PENDING"}}
	// Only while newer messages go ahead of a backlog: what of the pending lies behind them.
	backlog := slices.ContainsFunc(accounts, func(a spool.Account) bool { return a.Islands > 0 || a.Backlog.Messages > 0 })
	if backlog {
		rows[0] = append(rows[0], "BACKLOG")
	}
	for _, a := range accounts {
		up := a.Upstream
		if up == "" {
			up = "(none)"
		}
		n := func(c spool.Count) string { return fmt.Sprint(c.Messages) }
		row := []string{up, a.Lane, n(a.Accepted), n(a.Delivered), n(a.Expired), n(a.Evicted), n(a.Parked), n(a.Pending)}
		if backlog {
			row = append(row, n(a.Backlog))
		}
		rows = append(rows, row)
	}
	p.table(rows...)
	if balanced {
		fmt.Fprintln(p.stdout, "balanced: every accepted message is in exactly one account")
	} else {
		fmt.Fprintln(p.stdout, "NOT BALANCED: accepted is not the sum of the others; please report this")
	}
}
