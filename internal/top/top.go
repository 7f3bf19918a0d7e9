// Package top is the dashboard's overview in a terminal, for whoever comes over SSH. It asks the gateway's API again and again and keeps
// nothing.
package top

import (
	"context"
	"io"
	"time"

	tea "charm.land/bubbletea/v2"

	"holdfast/gateway/httpapi"
)

// Options of Run.
type Options struct {
	// Look asks the gateway how it is.
	Look  func(ctx context.Context) (*httpapi.Status, error)
	Every time.Duration // from one look to the next
	In    io.Reader     // keys
	Out   io.Writer     // a terminal
}

// Run shows the gateway until q, Esc or Ctrl-C is pressed, or ctx ends. A gateway that does not answer is shown as away, with its last
// figures, and asked again.
func Run(ctx context.Context, o Options) error {
	m := &model{ctx: ctx, look: o.Look, every: o.Every, now: time.Now, width: 80, height: 24}
	_, err := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(o.In), tea.WithOutput(o.Out), tea.WithoutSignalHandler()).Run()
	if ctx.Err() != nil {
		return nil // it was asked to stop
	}
	return err
}

// looked is what a look gave.
type looked struct {
	st  *httpapi.Status
	err error
	at  time.Time
}

type due struct{} // the next look

// model is all that is shown. bubbletea calls its methods one at a time.
type model struct {
	ctx   context.Context // bubbletea's commands take none
	look  func(context.Context) (*httpapi.Status, error)
	every time.Duration
	now   func() time.Time

	width, height int
	paused        bool
	last          looked // that had no error
	err           error  // of the last look
	rates         rates
	past          []float64 // messages taken in a second, the newest last
}

// rates are messages a second.
type rates struct {
	known   bool
	in, out float64
	lanes   map[[2]string]flow // by upstream and lane
}

type flow struct{ in, out float64 }

const pastMost = 300

// Init implements tea.Model.
func (m *model) Init() tea.Cmd { return m.ask }

func (m *model) ask() tea.Msg {
	ctx, cancel := context.WithTimeout(m.ctx, 10*time.Second)
	defer cancel()
	st, err := m.look(ctx)
	return looked{st, err, m.now()}
}

func (m *model) wait() tea.Cmd { return tea.Tick(m.every, func(time.Time) tea.Msg { return due{} }) }

// Update implements tea.Model.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tea.KeyPressMsg:
		switch msg.String() {
		case "q", "esc", "ctrl+c":
			return m, tea.Quit
		case "p", "space":
			m.paused = !m.paused
			if !m.paused {
				return m, m.ask
			}
		}
	case due:
		if !m.paused {
			return m, m.ask
		}
	case looked:
		m.take(msg)
		if !m.paused {
			return m, m.wait()
		}
	}
	return m, nil
}

// take takes in what a look gave, and what has happened since the one before.
func (m *model) take(l looked) {
	if m.err = l.err; l.err != nil {
		return
	}
	before := m.last
	m.last = l
	m.rates = rates{lanes: map[[2]string]flow{}}
	seconds := l.at.Sub(before.at).Seconds()
	if before.st == nil || !before.st.StartedAt.Equal(l.st.StartedAt) || seconds <= 0 {
		return // counters begin anew
	}
	per := func(before, now uint64) float64 {
		if now < before {
			return 0
		}
		return float64(now-before) / seconds
	}
	m.rates.known = true
	accepted := map[string]uint64{}
	for _, lane := range before.st.Lanes {
		accepted[lane.Name] = lane.Accepted.Messages
	}
	for _, lane := range l.st.Lanes {
		m.rates.in += per(accepted[lane.Name], lane.Accepted.Messages)
	}
	for _, b := range before.st.Ledger.Accounts {
		for _, a := range l.st.Ledger.Accounts {
			if a.Lane == b.Lane && a.Upstream == b.Upstream {
				f := flow{per(b.Accepted.Messages, a.Accepted.Messages), per(b.Delivered.Messages, a.Delivered.Messages)}
				m.rates.lanes[[2]string{a.Upstream, a.Lane}] = f
				m.rates.out += f.out
			}
		}
	}
	m.past = append(m.past, m.rates.in)
	m.past = m.past[max(len(m.past)-pastMost, 0):]
}
