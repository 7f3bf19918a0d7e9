package top

import (
	"fmt"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
	"github.com/charmbracelet/x/ansi"

	"holdfast/gateway/httpapi"
)

var (
	bold  = lipgloss.NewStyle().Bold(true)
	faint = lipgloss.NewStyle().Faint(true)
	good  = lipgloss.NewStyle().Foreground(lipgloss.Green)
	warn  = lipgloss.NewStyle().Foreground(lipgloss.Yellow)
	bad   = lipgloss.NewStyle().Foreground(lipgloss.Red).Bold(true)
)

// View implements tea.Model.
func (m *model) View() tea.View {
	v := tea.NewView(m.screen())
	v.AltScreen = true
	return v
}

// screen is as many lines as there is room for, what matters most first.
func (m *model) screen() string {
	lines := m.lines()
	foot := "q quit  p pause"
	if m.paused {
		foot = bold.Render("PAUSED") + "  p go on  q quit"
	}
	if most := max(m.height-1, 1); len(lines) > most {
		lines = lines[:most]
	}
	if m.height > 1 {
		for len(lines) < m.height-1 {
			lines = append(lines, "")
		}
		lines = append(lines, faint.Render(foot))
	}
	for i, l := range lines {
		lines[i] = ansi.Truncate(l, m.width, "…")
	}
	return strings.Join(lines, "\n")
}

func (m *model) lines() []string {
	st := m.last.st
	switch {
	case st == nil && m.err != nil:
		return []string{bad.Render("no answer: ") + oneLine(m.err.Error()), "it is asked again"}
	case st == nil:
		return []string{"asking the gateway …"}
	}
	state := good.Render("ready")
	if !st.Ready {
		state = bad.Render("NOT READY: " + st.NotReady)
	}
	if m.err != nil {
		state = bad.Render(fmt.Sprintf("AWAY for %s: ", span(m.now().Sub(m.last.at)))) + oneLine(m.err.Error())
	}
	clock := "clock synced"
	if !st.ClockSync {
		clock = warn.Render("clock not synced")
	}
	d, q := &st.Devices, &st.Commands
	all := []string{
		fmt.Sprintf("%s  %s  up %s  %s", bold.Render(st.Gateway), state, span(time.Duration(st.UptimeS)*time.Second), st.Version),
		fmt.Sprintf("devices %d of %d connected  commands %d waiting, %d under way  disk %s, %s free  %s", d.Connected, d.Registered, q.Queued,
			q.Sent+q.Delivered+q.InProgress, size(st.Store.Bytes), size(st.Store.FreeBytes), clock),
	}
	speed := "in –  out –"
	if m.rates.known {
		speed = fmt.Sprintf("in %.1f/s  out %.1f/s", m.rates.in, m.rates.out)
	}
	all = append(all, speed+"  "+m.spark())
	for _, a := range st.Alarms {
		style := warn
		if a.Severity == httpapi.Critical {
			style = bad
		}
		all = append(all, style.Render("! ")+a.Text)
	}
	if st.Ledger.Balanced {
		n := uint64(0)
		for _, a := range st.Ledger.Accounts {
			n += a.Accepted.Messages
		}
		all = append(all, good.Render("ledger balances")+fmt.Sprintf(": each of %d accepted messages is in one account", n))
	} else {
		all = append(all, bad.Render("THE LEDGER DOES NOT BALANCE: please report this"))
	}
	all = append(append(all, ""), m.upstreams(st)...)
	all = append(append(all, ""), m.lanes(st)...)
	if m.err != nil { // figures of the past
		for i := 1; i < len(all); i++ {
			all[i] = faint.Render(ansi.Strip(all[i]))
		}
	}
	return all
}

func (m *model) upstreams(st *httpapi.Status) []string {
	if len(st.Upstreams) == 0 {
		return []string{"no upstream: messages are kept by the limits of their lanes"}
	}
	rows := [][]string{{"UPSTREAM", "LINK", "FOR", "IN FLIGHT", "ACKED", "LAST ERROR"}}
	for _, u := range st.Upstreams {
		link := good.Render(u.State)
		if !u.Connected {
			link = bad.Render(u.State)
		}
		rows = append(rows, []string{u.Name, link, span(st.Clock.Wall.Sub(u.Since)), fmt.Sprint(u.InFlight), fmt.Sprint(u.AckedMessages), oneLine(u.LastError)})
	}
	return table(m.width, rows, []int{4, 3, 5})
}

func (m *model) lanes(st *httpapi.Status) []string {
	rows := [][]string{{"LANE", "UPSTREAM", "WAITING", "SIZE", "OLDEST", "IN/S", "OUT/S", "EMPTY IN"}}
	for _, a := range st.Ledger.Accounts {
		f, known := m.rates.lanes[[2]string{a.Upstream, a.Lane}]
		in, out, empty := "–", "–", "–"
		if known {
			in, out = fmt.Sprintf("%.1f", f.in), fmt.Sprintf("%.1f", f.out)
		}
		switch {
		case a.Upstream == "":
		case a.Pending.Messages == 0:
			empty = "empty"
		case known && f.out > f.in:
			empty = span(time.Duration(float64(a.Pending.Messages) / (f.out - f.in) * float64(time.Second)))
		default:
			empty = "not yet"
		}
		oldest := "–"
		if !a.Oldest.IsZero() {
			oldest = span(st.Clock.Wall.Sub(a.Oldest))
		}
		name := a.Upstream
		if name == "" {
			name = "(none)"
		}
		rows = append(rows, []string{a.Lane, name, fmt.Sprint(a.Pending.Messages), size(a.Pending.Bytes), oldest, in, out, empty})
	}
	return table(m.width, rows, []int{5, 6, 3, 1, 7, 4})
}

// table sets rows in columns, and leaves out those columns that go first until it fits.
func table(width int, rows [][]string, goFirst []int) []string {
	keep := make([]int, len(rows[0]))
	for i := range keep {
		keep[i] = i
	}
	widths := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			widths[i] = max(widths[i], ansi.StringWidth(c))
		}
	}
	total := func() (n int) {
		for _, i := range keep {
			n += widths[i] + 2
		}
		return n - 2
	}
	for _, i := range goFirst {
		if total() <= width {
			break
		}
		keep = slices.DeleteFunc(keep, func(k int) bool { return k == i })
	}
	lines := make([]string, len(rows))
	for n, r := range rows {
		var b strings.Builder
		for _, i := range keep {
			b.WriteString(r[i] + strings.Repeat(" ", widths[i]-ansi.StringWidth(r[i])+2))
		}
		lines[n] = strings.TrimRight(b.String(), " ")
	}
	lines[0] = faint.Render(lines[0])
	return lines
}

// spark draws the last rates, as many as there is room for.
func (m *model) spark() string {
	bars := []rune("▁▂▃▄▅▆▇█")
	past := m.past[max(len(m.past)-max(min(m.width-30, 60), 0), 0):]
	top := slices.Max(append([]float64{1}, past...))
	var b strings.Builder
	for _, v := range past {
		b.WriteRune(bars[int(v/top*float64(len(bars)-1)+0.5)])
	}
	return b.String()
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }

func span(d time.Duration) string {
	switch {
	case d < 0:
		return "–"
	case d < 90*time.Second:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 90*time.Minute:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 36*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	default:
		return fmt.Sprintf("%d d", int(d.Hours()/24))
	}
}

func size(n uint64) string {
	f, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	if i > 0 && f < 10 {
		return fmt.Sprintf("%.1f %s", f, units[i])
	}
	return fmt.Sprintf("%.0f %s", f, units[i])
}
