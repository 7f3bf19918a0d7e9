package devices_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/devices"
)

// modelCommand is a command as the model has it: the states that were decided, in order.
type modelCommand struct {
	seq                  int
	id, device, key      string
	urgent, oneWay       bool
	ttl, exec            time.Duration
	notBefore            time.Duration // on the model's clock
	created              time.Duration
	maxAttempts, payload int
	steps                []modelStep
}

type modelStep struct {
	state     devices.State
	late      bool
	attempts  int
	sent      time.Duration
	delivered time.Duration
}

func (c *modelCommand) now() *modelStep { return &c.steps[len(c.steps)-1] }

func (c *modelCommand) ended() bool {
	s := c.now().state
	return s >= devices.Succeeded || s == devices.Delivered && c.oneWay
}

func (c *modelCommand) to(s devices.State) *modelStep {
	next := *c.now()
	next.state = s
	c.steps = append(c.steps, next)
	return c.now()
}

// modelDelivery is what a device got.
type modelDelivery struct {
	l       *fakeLink
	id      string
	token   uint64
	attempt int
}

// queueModel is the queue as simple as it can be: decisions are instant, and nothing is lost but what the test takes back.
type queueModel struct {
	now     time.Duration
	window  int
	ack     time.Duration
	cmds    []*modelCommand
	links   map[string]*fakeLink
	sentOn  map[*modelCommand]*fakeLink
	nextSeq int
}

func (m *queueModel) find(id string) *modelCommand {
	for _, c := range m.cmds {
		if c.id == id {
			return c
		}
	}
	return nil
}

func (m *queueModel) of(device string) (cmds []*modelCommand) {
	for _, c := range m.cmds {
		if c.device == device {
			cmds = append(cmds, c)
		}
	}
	return cmds
}

func (m *queueModel) requeue(c *modelCommand) {
	if c.now().attempts >= c.maxAttempts {
		c.to(devices.DeadLettered)
	} else {
		c.to(devices.Queued)
	}
}

// settle is what time and a connection do to a device's commands.
func (m *queueModel) settle(device string) {
	cmds := m.of(device)
	for _, c := range cmds {
		if c.now().state == devices.Sent && m.sentOn[c] == m.links[device] && m.links[device] != nil && m.now >= c.now().sent+m.ack && m.now < c.created+c.ttl {
			m.links[device] = nil
		}
	}
	for _, c := range cmds {
		s := c.now()
		switch {
		case c.ended():
		case (s.state == devices.Queued || s.state == devices.Sent) && m.now >= c.created+c.ttl:
			c.to(devices.Expired)
		case s.state == devices.Sent && (m.links[device] == nil || m.sentOn[c] != m.links[device]):
			m.requeue(c)
		case (s.state == devices.Delivered || s.state == devices.InProgress) && m.now >= s.delivered+c.exec:
			c.to(devices.TimedOut)
		}
	}
	for m.links[device] != nil {
		c := m.pick(cmds)
		if c == nil {
			return
		}
		s := c.to(devices.Sent)
		s.attempts++
		s.sent = m.now
		m.sentOn[c] = m.links[device]
	}
}

func (m *queueModel) pick(cmds []*modelCommand) *modelCommand {
	used := 0
	for _, c := range cmds {
		if s := c.now().state; !c.ended() && s != devices.Queued {
			used++
		}
	}
	for _, urgent := range []bool{true, false} {
		places := m.window
		if urgent {
			places++
		}
		if used >= places {
			continue
		}
		for _, c := range cmds {
			if c.now().state != devices.Queued || c.urgent != urgent || m.now < c.notBefore {
				continue
			}
			if n := c.now().attempts; n >= 3 && m.now < c.now().sent+min(250*time.Millisecond<<(n-3), 10*time.Second) {
				return nil
			}
			return c
		}
	}
	return nil
}

// answer returns whether it is believed.
func (m *queueModel) answer(device, id string, kind devices.AnswerKind) bool {
	c := m.find(id)
	if c == nil || c.device != device {
		return false
	}
	to := map[devices.AnswerKind]devices.State{
		devices.AnswerSucceeded: devices.Succeeded, devices.AnswerFailed: devices.Failed, devices.AnswerRejected: devices.Rejected,
	}[kind]
	s := c.now()
	switch {
	case to != 0 && s.state.Outcome():
		return s.state == to
	case to == 0 && c.ended(), s.attempts == 0:
		return false
	}
	if s.state == devices.Queued || s.state == devices.Sent {
		c.to(devices.Delivered).delivered = m.now
	}
	switch {
	case to != 0:
		late := c.ended()
		if c.to(to); late {
			c.now().late = true
		}
	case c.now().state == devices.Delivered && !c.oneWay:
		c.to(devices.InProgress)
	}
	m.settle(device)
	return true
}

// modelWatch sees what becomes durable, and checks that each step follows from the last.
type modelWatch struct {
	t       *testing.T
	window  int
	durable map[string][]devices.Command // by id; updates of progress are left out
	device  map[string]string
	sends   map[string]int      // by id: the last attempt that went out
	order   map[string][]string // ids by device in the order of submit
}

var legalSteps = map[devices.State][]devices.State{
	0:                    {devices.Queued},
	devices.Queued:       {devices.Sent, devices.Delivered, devices.Expired, devices.Canceled, devices.Superseded},
	devices.Sent:         {devices.Queued, devices.Delivered, devices.Rejected, devices.Expired, devices.Canceled, devices.Superseded, devices.DeadLettered},
	devices.Delivered:    {devices.InProgress, devices.Succeeded, devices.Failed, devices.Rejected, devices.TimedOut, devices.Canceled},
	devices.InProgress:   {devices.Succeeded, devices.Failed, devices.Rejected, devices.TimedOut, devices.Canceled},
	devices.Expired:      {devices.Succeeded, devices.Failed, devices.Rejected},
	devices.TimedOut:     {devices.Succeeded, devices.Failed, devices.Rejected},
	devices.Canceled:     {devices.Succeeded, devices.Failed, devices.Rejected},
	devices.Superseded:   {devices.Succeeded, devices.Failed, devices.Rejected},
	devices.DeadLettered: {devices.Succeeded, devices.Failed, devices.Rejected},
	devices.Succeeded:    nil,
	devices.Failed:       nil,
}

func (w *modelWatch) last(id string) *devices.Command {
	s := w.durable[id]
	if len(s) == 0 {
		return nil
	}
	return &s[len(s)-1]
}

func (w *modelWatch) event(e devices.Event) {
	if e.Command == nil || e.Repeat {
		return
	}
	c := *e.Command
	var from devices.State
	if last := w.last(c.ID); last != nil {
		from = last.State
		if c.Attempts < last.Attempts {
			w.t.Errorf("%s: attempts fell from %d to %d", c.ID, last.Attempts, c.Attempts)
		}
	}
	if e.Previous != from {
		w.t.Errorf("%s: %s said to come from %s, last told was %s", c.ID, c.State, e.Previous, from)
	}
	if c.State == devices.InProgress && from == devices.InProgress {
		return
	}
	if !slices.Contains(legalSteps[from], c.State) {
		w.t.Errorf("%s: %s after %s", c.ID, c.State, from)
	}
	w.durable[c.ID] = append(w.durable[c.ID], c)
	if c.State != devices.Sent {
		return
	}
	used, urgent := 0, false
	for id, s := range w.durable {
		l := s[len(s)-1]
		if w.device[id] == c.Device && (l.State == devices.Sent || l.State == devices.Delivered && !l.OneWay || l.State == devices.InProgress) {
			used++
			urgent = urgent || l.Urgent
		}
	}
	if used > w.window+1 || used > w.window && !urgent {
		w.t.Errorf("%s: %d under way at %s, the window is %d", c.ID, used, c.Device, w.window)
	}
}

// sent is a delivery: what it stands on has to be durable.
func (w *modelWatch) sent(j *queueJournal, d *devices.Delivery) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	last := w.last(d.ID)
	if last == nil || last.State != devices.Sent {
		// It may be further already, if its end came in the same moment; but never before SENT.
		w.t.Errorf("%s sent while what is durable is %+v", d.ID, last)
		return 0
	}
	if last.Attempts <= w.sends[d.ID] {
		w.t.Errorf("%s: attempt %d sent twice", d.ID, last.Attempts)
	}
	if d.Dup != (last.Attempts > 1) {
		w.t.Errorf("%s: attempt %d with DUP %v", d.ID, last.Attempts, d.Dup)
	}
	if w.sends[d.ID] == 0 && last.Attempts == 1 && !last.Urgent {
		for _, id := range w.order[d.Device] {
			if id == d.ID {
				break
			}
			if l := w.last(id); l != nil && l.State == devices.Queued && l.Attempts == 0 && !l.Urgent && l.NotBefore.IsZero() {
				w.t.Errorf("%s sent before %s, which is older and waits", d.ID, id)
			}
		}
	}
	w.sends[d.ID] = last.Attempts
	return last.Attempts
}

// TestQueueModel drives a queue and a simple model with the same random operations: submits, repeats, conflicts,
// cancellations, devices that come and go, acks, stale acks, answers true and false, time, jumps of the wall clock,
// commits that are held back, and crashes at any of these moments. What is told of each command is what the model says,
// in order, and as much of it as is durable.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		window := rapid.IntRange(1, 3).Draw(rt, "window")
		const ack = 20 * time.Second
		clock := newFakeClock()
		r := &queueRig{t: t, fs: newCrashableFS(), clock: clock, cfg: devices.QueueConfig{Window: window, AckTimeout: ack}, quiet: true}
		m := &queueModel{window: window, ack: ack, links: map[string]*fakeLink{}, sentOn: map[*modelCommand]*fakeLink{}}
		w := &modelWatch{t: t, window: window, durable: map[string][]devices.Command{}, device: map[string]string{}, sends: map[string]int{}, order: map[string][]string{}}
		var deliveries []modelDelivery
		open := func() {
			r.open()
			r.j.onEvent = w.event
		}
		open()
		defer func() { r.close() }()
		names := []string{"d1", "d2"}
		device := func(rt *rapid.T) string { return rapid.SampledFrom(names).Draw(rt, "device") }
		some := func(rt *rapid.T) *modelCommand {
			if len(m.cmds) == 0 {
				rt.Skip("no command")
			}
			// Mostly the newer ones: the old have ended.
			n := len(m.cmds)
			return m.cmds[n-1-rapid.IntRange(0, min(n-1, 12)).Draw(rt, "which")]
		}
		request := func(c *modelCommand) *devices.Request {
			q := &devices.Request{
				ID: c.id, Device: c.device, Name: "work", TTL: c.ttl, ExecutionTimeout: c.exec, MaxAttempts: c.maxAttempts,
				OneWay: c.oneWay, Urgent: c.urgent, SupersedeKey: c.key, Upstream: "cloud", Payload: make([]byte, c.payload),
			}
			if c.notBefore > 0 {
				q.NotBefore = time.UnixMilli(1_900_000_000_000).Add(c.notBefore) // only told apart here
			}
			return q
		}
		holding := func() bool {
			r.j.mu.Lock()
			defer r.j.mu.Unlock()
			return r.j.hold
		}
		fatal := func(format string, args ...any) { rt.Helper(); rt.Fatalf(format, args...) }
		requests := map[string]*devices.Request{}

		rt.Repeat(map[string]func(*rapid.T){
			"submit": func(rt *rapid.T) {
				m.nextSeq++
				c := &modelCommand{
					seq: m.nextSeq, id: fmt.Sprintf("c%d", m.nextSeq), device: device(rt), created: m.now,
					urgent: rapid.IntRange(0, 4).Draw(rt, "urgent") == 0, oneWay: rapid.IntRange(0, 3).Draw(rt, "one way") == 0,
					ttl:         time.Duration(rapid.SampledFrom([]int{5, 60, 3600}).Draw(rt, "ttl")) * time.Second,
					exec:        time.Duration(rapid.SampledFrom([]int{10, 100}).Draw(rt, "exec")) * time.Second,
					maxAttempts: rapid.IntRange(1, 5).Draw(rt, "attempts"),
					key:         rapid.SampledFrom([]string{"", "", "k", "l"}).Draw(rt, "key"),
					payload:     rapid.SampledFrom([]int{0, 10, 3000}).Draw(rt, "payload"),
					steps:       []modelStep{{state: devices.Queued}},
				}
				q := request(c)
				if rapid.IntRange(0, 5).Draw(rt, "later") == 0 {
					c.notBefore = m.now + 3*time.Second
					q.NotBefore = r.clk.Time().Add(3 * time.Second)
				}
				requests[c.id] = q
				r.j.mu.Lock()
				w.device[c.id] = c.device
				w.order[c.device] = append(w.order[c.device], c.id)
				r.j.mu.Unlock()
				for _, old := range m.of(c.device) {
					if s := old.now().state; c.key != "" && old.key == c.key && (s == devices.Queued || s == devices.Sent) {
						old.to(devices.Superseded)
					}
				}
				m.cmds = append(m.cmds, c)
				if m.links[c.device] != nil {
					m.settle(c.device)
				}
				if err := r.Submit(q, func(_ devices.Command, repeat bool, err error) {
					if repeat || err != nil {
						t.Errorf("submit %s: repeat %v, %v", c.id, repeat, err)
					}
				}); err != nil {
					fatal("submit: %v", err)
				}
			},
			"repeat": func(rt *rapid.T) {
				c := some(rt)
				q := *requests[c.id]
				conflict := rapid.Bool().Draw(rt, "conflict")
				if conflict {
					q.Payload = []byte("something else")
				}
				want := c.now().state
				if err := r.Submit(&q, func(got devices.Command, repeat bool, err error) {
					var ref *devices.Refusal
					switch {
					case conflict:
						if !errors.As(err, &ref) || ref.Code != devices.CodeConflict {
							t.Errorf("conflicting submit of %s: %v", c.id, err)
						}
					case err != nil || !repeat || got.State != want:
						t.Errorf("repeat of %s: %s, %v, %v; want %s", c.id, got.State, repeat, err, want)
					}
				}); err != nil {
					fatal("repeat: %v", err)
				}
			},
			"cancel": func(rt *rapid.T) {
				c := some(rt)
				ended := c.ended()
				if !ended {
					c.to(devices.Canceled)
					m.settle(c.device)
				}
				if err := r.Cancel("", c.id, "", "", func(_ devices.Command, err error) {
					if (err != nil) != ended {
						t.Errorf("cancel %s: %v, ended before: %v", c.id, err, ended)
					}
				}); err != nil {
					fatal("cancel: %v", err)
				}
			},
			"ready": func(rt *rapid.T) {
				d := device(rt)
				l := m.links[d]
				if l == nil || rapid.Bool().Draw(rt, "take over") {
					l = &fakeLink{device: d}
					l.onSend = func(got *devices.Delivery) {
						deliveries = append(deliveries, modelDelivery{l, got.ID, got.Token, w.sent(r.j, got)})
					}
				}
				m.links[d] = l
				m.settle(d)
				r.Ready(d, l)
			},
			"gone": func(rt *rapid.T) {
				d := device(rt)
				l := m.links[d]
				if l == nil {
					rt.Skip("not there")
				}
				m.links[d] = nil
				m.settle(d)
				r.Gone(d, l)
			},
			"ack": func(rt *rapid.T) {
				if !holding() {
					r.flush()
				}
				r.j.mu.Lock()
				n := len(deliveries)
				if n == 0 {
					r.j.mu.Unlock()
					rt.Skip("nothing sent")
				}
				d := deliveries[n-1-rapid.IntRange(0, min(n-1, 3)).Draw(rt, "delivery")]
				r.j.mu.Unlock()
				refused := rapid.SampledFrom([]string{"", "", "", "no"}).Draw(rt, "refused")
				dev := d.l.device
				if c := m.find(d.id); c != nil && m.links[dev] == d.l && c.now().state == devices.Sent && c.now().attempts == d.attempt && m.sentOn[c] == d.l {
					if refused != "" {
						c.to(devices.Rejected)
					} else {
						c.to(devices.Delivered).delivered = m.now
					}
				}
				m.settle(dev)
				r.Acked(dev, d.l, d.token, refused)
			},
			"answer": func(rt *rapid.T) {
				c := some(rt)
				d := c.device
				if rapid.IntRange(0, 9).Draw(rt, "impostor") == 0 {
					d = names[0]
				}
				kind := rapid.SampledFrom([]devices.AnswerKind{
					devices.AnswerAccepted, devices.AnswerProgress, devices.AnswerSucceeded, devices.AnswerFailed, devices.AnswerRejected,
				}).Draw(rt, "kind")
				believed := m.answer(d, c.id, kind)
				err := r.Answer(d, c.id, kind, []byte(`{"percent":1}`), "", nil, nil, 0)
				if believed != (err == nil) || err != nil && !errors.Is(err, devices.ErrAnswer) {
					fatal("answer %s of %s from %s: %v; the model believes it: %v", kind, c.id, d, err, believed)
				}
			},
			"pass": func(rt *rapid.T) {
				d := time.Duration(rapid.SampledFrom([]int{1, 100, 1000, 5000, 10_000, 30_000, 100_000}).Draw(rt, "ms")) * time.Millisecond
				m.now += d
				for _, dev := range names {
					m.settle(dev)
				}
				r.pass(d)
			},
			"jump": func(rt *rapid.T) {
				clock.jump(time.Duration(rapid.SampledFrom([]int{-10, 10}).Draw(rt, "years")) * year)
			},
			"hold": func(*rapid.T) {
				r.j.mu.Lock()
				r.j.hold = true
				r.j.mu.Unlock()
			},
			"release": func(rt *rapid.T) {
				if !holding() {
					rt.Skip("nothing is held")
				}
				r.j.release(t, rapid.IntRange(0, 5).Draw(rt, "commits"))
			},
			"crash": func(*rapid.T) {
				r.flush()
				r.j.mu.Lock()
				r.j.onEvent = nil
				r.j.mu.Unlock()
				r.crash()
				r.j.onEvent = w.event
				// What was not durable has never happened.
				m.links = map[string]*fakeLink{}
				m.cmds = slices.DeleteFunc(m.cmds, func(c *modelCommand) bool {
					c.steps = c.steps[:len(w.durable[c.id])]
					if len(c.steps) == 0 {
						if _, err := r.Get(c.id); err == nil {
							fatal("%s is there after the crash, and was not stored before", c.id)
						}
						delete(w.device, c.id)
					}
					return len(c.steps) == 0
				})
				for _, c := range m.cmds {
					if got, err := r.Get(c.id); err != nil || got.State != c.now().state {
						fatal("%s after the crash: %s, %v; durable was %s", c.id, got.State, err, c.now().state)
					}
				}
				for _, dev := range names {
					m.settle(dev)
				}
				r.verifyRows()
				r.tick()
			},
			"": func(*rapid.T) {
				r.flush()
				held := holding()
				r.j.mu.Lock()
				defer r.j.mu.Unlock()
				pending, shown := 0, devices.QueueCounts{} // as decided, and as durable
				for _, c := range m.cmds {
					if !c.ended() {
						pending++
					}
					told := w.durable[c.id]
					if len(told) > 0 && !told[len(told)-1].Ended() {
						switch told[len(told)-1].State { //nolint:exhaustive // the others are ends
						case devices.Queued:
							shown.Queued++
						case devices.Sent:
							shown.Sent++
						case devices.Delivered:
							shown.Delivered++
						case devices.InProgress:
							shown.InProgress++
						}
					}
					if !held && len(told) != len(c.steps) || len(told) > len(c.steps) {
						fatal("%s: told %v, the model says %v", c.id, statesOf(told), c.steps)
					}
					for i, got := range told {
						if s := c.steps[i]; got.State != s.state || got.Attempts != s.attempts || got.Late != s.late {
							fatal("%s: step %d is %s after %d attempts, late %v; the model says %+v", c.id, i, got.State, got.Attempts, got.Late, s)
						}
					}
					got, err := r.Get(c.id)
					switch {
					case len(told) == 0:
						if err == nil {
							fatal("%s is shown before it is stored", c.id)
						}
					case err != nil:
						fatal("get %s: %v", c.id, err)
					case got.State != told[len(told)-1].State || got.Attempts != told[len(told)-1].Attempts || len(got.Payload) != c.payload:
						fatal("get %s: %s after %d attempts, the last thing told is %s", c.id, got.State, got.Attempts, told[len(told)-1].State)
					}
				}
				n := r.Counts()
				got := devices.QueueCounts{Queued: n.Queued, Sent: n.Sent, Delivered: n.Delivered, InProgress: n.InProgress}
				if got != shown {
					fatal("counts %+v, durable are %+v", got, shown)
				}
				if !held {
					if got := r.CommandsInMemory(); got != pending {
						fatal("%d in memory, %d are pending", got, pending)
					}
					if got := r.TimersInMemory(); got != pending {
						fatal("%d timers, %d are pending", got, pending)
					}
				}
				if t.Failed() {
					fatal("see above")
				}
			},
		})
	})
}

func statesOf(cmds []devices.Command) string {
	var s []string
	for _, c := range cmds {
		s = append(s, c.State.String())
	}
	return strings.Join(s, " ")
}
