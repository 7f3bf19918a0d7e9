package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// worker is a device that takes commands under the test's control. It keeps, as firmware does in its flash, which ids it
// has executed, and comes back with its session after each lost connection.
type worker struct {
	t       *testing.T
	addr    string
	id      string
	version mqtt.Version

	mu       sync.Mutex
	client   *mqtt.Client // the last one; nil before the first
	ready    bool         // client has its subscription
	away     bool         // it does not connect
	next     uint16
	deaf     bool     // PUBACKs are withheld
	answers  []string // what it answers: accepted, progress, succeeded, failed, rejected
	received map[string]int
	executed map[string]int
	order    []string // ids in the order in which they came first
	waiting  map[uint16]answer
	unsent   []answer // not acknowledged yet, in order
	stopped  bool
	gone     chan struct{}
}

type answer struct {
	topic   string
	payload string
}

func startWorker(t *testing.T, addr, id string, version mqtt.Version, answers ...string) *worker {
	t.Helper()
	w := &worker{
		t: t, addr: addr, id: id, version: version, answers: answers, received: map[string]int{}, executed: map[string]int{}, waiting: map[uint16]answer{},
		gone: make(chan struct{}),
	}
	go w.run()
	t.Cleanup(w.stop)
	return w
}

// run keeps the worker connected.
func (w *worker) run() {
	defer close(w.gone)
	for {
		w.mu.Lock()
		stopped, away := w.stopped, w.away
		w.mu.Unlock()
		if stopped {
			return
		}
		if away {
			<-time.After(5 * time.Millisecond)
			continue
		}
		c, err := w.connect()
		if err != nil {
			<-time.After(20 * time.Millisecond)
			continue
		}
		<-c.Done()
		w.mu.Lock()
		w.ready = false
		w.mu.Unlock()
	}
}

func (w *worker) connect() (*mqtt.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: w.addr, ManualAck: true,
		Connect:   mqtt.Connect{Version: w.version, ClientID: w.id, KeepAlive: 60, SessionExpiry: 3600},
		OnMessage: w.onMessage,
		OnAck:     w.onAck,
	})
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.client = c
	if w.stopped || w.away {
		c.Abort()
	}
	clear(w.waiting)
	again := w.unsent
	w.unsent = nil
	for _, a := range again {
		w.answerLocked(a)
	}
	w.mu.Unlock()
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.RequestFilter(w.id), QoS: 1}}}); err != nil {
		c.Abort()
		return c, nil
	}
	w.mu.Lock()
	w.ready = true
	w.mu.Unlock()
	return c, nil
}

// here waits until it is connected and subscribed.
func (w *worker) here() {
	w.t.Helper()
	testkit.Eventually(w.t, 20*time.Second, w.id+" is connected and subscribed", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.ready && w.client.Err() == nil
	})
}

func (w *worker) onMessage(c *mqtt.Client, p *mqtt.Publish) {
	device, id, _, ok := wire.ParseRequestTopic(string(p.Topic))
	if !ok || device != w.id {
		w.t.Errorf("device %s got topic %s", w.id, p.Topic)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.received[id]++; w.received[id] == 1 {
		w.order = append(w.order, id)
	} else if !p.Dup {
		w.t.Errorf("%s came %d times to %s, the last time without DUP", id, w.received[id], w.id)
	}
	if p.QoS != 1 || p.Retain {
		w.t.Errorf("%s came with QoS %d, retain %v", id, p.QoS, p.Retain)
	}
	if w.version == mqtt.V5 && (string(p.ResponseTopic) != wire.AnswerPrefix(w.id, id) || string(p.Correlation) != id || !p.HasExpiry) {
		w.t.Errorf("%s came with response topic %q, correlation data %q, expiry %v", id, p.ResponseTopic, p.Correlation, p.HasExpiry)
	}
	if w.deaf {
		return
	}
	_ = c.QueueAck(mqtt.TypePuback, p.ID, mqtt.Success)
	w.sayLocked(id, w.answers...)
}

// sayLocked executes a command, if it has not done so before, and answers.
func (w *worker) sayLocked(id string, kinds ...string) {
	if w.executed[id] == 0 {
		w.executed[id] = 1
	}
	for _, kind := range kinds {
		payload := ""
		switch kind {
		case "progress":
			payload = `{"percent":40,"text":"half way"}`
		case "succeeded", "failed", "rejected":
			payload = fmt.Sprintf(`{"by":%q}`, w.id)
		}
		w.answerLocked(answer{wire.AnswerTopic(w.id, id, kind), payload})
	}
}

// say answers a command that it has received at some time.
func (w *worker) say(id string, kinds ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sayLocked(id, kinds...)
}

// answerLocked sends an answer, which stays in flash until it is acknowledged.
func (w *worker) answerLocked(a answer) {
	w.unsent = append(w.unsent, a)
	w.next = w.next%60000 + 1
	w.waiting[w.next] = a
	if w.client == nil {
		return
	}
	_ = w.client.Queue(&mqtt.Publish{QoS: 1, ID: w.next, Topic: []byte(a.topic), Payload: []byte(a.payload)})
	w.client.Flush()
}

func (w *worker) onAck(_ *mqtt.Client, a *mqtt.Ack) {
	w.mu.Lock()
	defer w.mu.Unlock()
	sent, ok := w.waiting[a.ID]
	if !ok {
		return
	}
	delete(w.waiting, a.ID)
	if i := slices.Index(w.unsent, sent); i >= 0 {
		w.unsent = slices.Delete(w.unsent, i, i+1)
	}
}

// set changes how it behaves from now on.
func (w *worker) set(deaf bool, answers ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaf, w.answers = deaf, answers
}

// drop loses its connection.
func (w *worker) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.client != nil {
		w.client.Abort()
	}
}

// leave takes it off-line until it may come back.
func (w *worker) leave() {
	w.mu.Lock()
	w.away = true
	if w.client != nil {
		w.client.Abort()
	}
	w.mu.Unlock()
}

func (w *worker) comeBack() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.away = false
}

// came are the ids that it has received, in the order of their first arrival.
func (w *worker) came() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.order)
}

func (w *worker) seen(id string) (received, executed int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.received[id], w.executed[id]
}

func (w *worker) stop() {
	w.mu.Lock()
	w.stopped = true
	if w.client != nil {
		w.client.Abort()
	}
	w.mu.Unlock()
	<-w.gone
}

// office is the cloud: it sends commands at the upstream broker and notes what is told of them.
type office struct {
	t      *testing.T
	client *mqtt.Client

	mu      sync.Mutex
	next    uint16
	waiting map[uint16]chan struct{}
	prints  map[string]bool                // what came, to the byte
	events  map[string][]wire.CommandEvent // by id, each once, in the order of its first arrival
	ended   map[string]bool                // ids of which an end was told
	again   int                            // events that came more than once
	notify  chan struct{}                  // cap 1
}

func openOffice(t *testing.T, addr string) *office {
	t.Helper()
	o := &office{t: t, waiting: map[uint16]chan struct{}{}, prints: map[string]bool{}, events: map[string][]wire.CommandEvent{}, ended: map[string]bool{}, notify: make(chan struct{}, 1)}
	o.connect(addr)
	return o
}

// connect is also for a broker that was restarted.
func (o *office) connect(addr string) {
	t := o.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address:   addr,
		Connect:   mqtt.Connect{Version: mqtt.V311, ClientID: "office", CleanStart: true, KeepAlive: 60},
		OnMessage: o.onMessage,
		OnAck: func(_ *mqtt.Client, a *mqtt.Ack) {
			o.mu.Lock()
			defer o.mu.Unlock()
			if w := o.waiting[a.ID]; w != nil {
				delete(o.waiting, a.ID)
				close(w)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Abort(); <-c.Done() })
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.CommandEventFilter(gatewayID, "", ""), QoS: 1}}}); err != nil {
		t.Fatal(err)
	}
	o.client = c
}

func (o *office) onMessage(_ *mqtt.Client, p *mqtt.Publish) {
	ev, err := wire.DecodeCommandEvent(p.Payload)
	if err != nil {
		o.t.Errorf("event on %s: %v", p.Topic, err)
		return
	}
	_, device, id, state, ok := wire.ParseCommandEventTopic(string(p.Topic))
	if !ok || device != ev.Device || state != ev.State || id != ev.ID {
		o.t.Errorf("event on %s says %+v", p.Topic, ev)
	}
	o.mu.Lock()
	if print := string(p.Topic) + " " + string(wire.UncorrectEvent(p.Payload)); o.prints[print] {
		o.again++
	} else {
		o.prints[print] = true
		o.events[id] = append(o.events[id], ev)
		if ev.Final && ev.State != wire.StateRefused {
			o.ended[id] = true
		}
	}
	o.mu.Unlock()
	select {
	case o.notify <- struct{}{}:
	default:
	}
}

// post publishes; acked is closed when the broker has acknowledged it.
func (o *office) post(topic string, payload []byte) (acked <-chan struct{}) {
	o.t.Helper()
	w := make(chan struct{})
	o.mu.Lock()
	o.next = o.next%60000 + 1
	id := o.next
	o.waiting[id] = w
	o.mu.Unlock()
	if err := o.client.Publish(&mqtt.Publish{QoS: 1, ID: id, Topic: []byte(topic), Payload: payload}); err != nil {
		o.t.Errorf("publish %s: %v", topic, err)
	}
	return w
}

// publish returns when the broker has acknowledged it.
func (o *office) publish(topic string, payload []byte) {
	o.t.Helper()
	select {
	case <-o.post(topic, payload):
	case <-o.client.Done():
		o.t.Errorf("publish %s: connection lost: %v", topic, o.client.Err())
	case <-time.After(10 * time.Second):
		o.t.Errorf("publish %s: not acknowledged", topic)
	}
}

// submit sends {"id":…,"name":"work", …more}.
func (o *office) submit(device, id string, more map[string]any) {
	o.t.Helper()
	o.publish(wire.CommandTopic(gatewayID, device, wire.ActionSubmit), submitBody(o.t, id, more))
}

func submitBody(t *testing.T, id string, more map[string]any) []byte {
	t.Helper()
	body := map[string]any{"id": id, "name": "work"}
	maps.Copy(body, more)
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (o *office) cancel(device, id string) {
	o.t.Helper()
	o.publish(wire.CommandTopic(gatewayID, device, wire.ActionCancel), fmt.Appendf(nil, `{"id":%q}`, id))
}

// all are the events of an id so far.
func (o *office) all(id string) []wire.CommandEvent {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.events[id])
}

// over says whether an end of a command was told.
func (o *office) over(id string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended[id]
}

// steps are the changes of state told of a command so far. Progress, refusals and answers to repeats are none.
func (o *office) steps(id string) (steps []wire.CommandEvent) {
	for _, e := range o.all(id) {
		if !e.Repeat && e.State != wire.StateRefused && e.Previous != e.State {
			steps = append(steps, e)
		}
	}
	return steps
}

// states are the states of steps, and how often it had been sent.
func (o *office) states(id string) (states []string) {
	for _, e := range o.steps(id) {
		states = append(states, fmt.Sprintf("%s %d", e.State, e.Attempts))
	}
	return states
}

// refusals are the codes of what was refused of an id.
func (o *office) refusals(id string) (codes []string) {
	for _, e := range o.all(id) {
		if e.State == wire.StateRefused {
			codes = append(codes, e.Code)
		}
	}
	return codes
}

func (o *office) has(id, state string) bool {
	return slices.ContainsFunc(o.steps(id), func(e wire.CommandEvent) bool { return e.State == state })
}

// await waits until a command was told to be in a state. It looks at each arrival, not now and then: what is killed at a
// state has to be killed at once. given: it is not waited for any longer; nil: for ever.
func (o *office) await(id, state string, within time.Duration, given <-chan struct{}) bool {
	deadline := time.After(within)
	for !o.has(id, state) {
		select {
		case <-o.notify:
		case <-time.After(5 * time.Millisecond): // another waiter took the notice
		case <-given:
			return false
		case <-deadline:
			return false
		}
	}
	return true
}

// commandView is what the API tells of a command.
type commandView struct {
	ID       string `json:"id"`
	Device   string `json:"device"`
	State    string `json:"state"`
	Attempts int    `json:"attempts"`
	Reason   string `json:"reason"`
	Late     bool   `json:"late"`
	OneWay   bool   `json:"one_way"`
	Payload  string `json:"payload"`
	Result   string `json:"result"`
	History  []struct {
		State  string    `json:"state"`
		At     time.Time `json:"at"`
		Reason string    `json:"reason"`
	} `json:"history"`
}

// ended says whether nothing more is to happen but, perhaps, a late outcome.
func (v *commandView) ended() bool {
	return v.State == "DELIVERED" && v.OneWay || slices.Contains([]string{
		"SUCCEEDED", "FAILED", "REJECTED", "EXPIRED", "TIMED_OUT", "CANCELED", "SUPERSEDED", "DEAD_LETTERED",
	}, v.State)
}

func command(t *testing.T, g *testkit.Gateway, id string) (v commandView, err error) {
	t.Helper()
	b, err := g.Call(http.MethodGet, "/api/v1/commands/"+id, nil, http.StatusOK)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(b, &v)
}

// TestKillAtEveryState kills the gateway at each state that a command can be in: the moment that the cloud is told of it, and
// blindly around the commits that lead to it. Each cycle has a command for a device with MQTT 3.1.1 and one for a device with 5. After the
// restart they go their way, and what was told upstream, what the API tells and what the devices have done agree, step by step.
func TestKillAtEveryState(t *testing.T) {
	all := []string{"accepted", "progress", "succeeded"}
	cancel := func(o *office, w *worker, id string) { o.cancel(w.id, id) }
	supersede := func(o *office, w *worker, id string) {
		o.submit(w.id, id+"-newer", map[string]any{"supersede_key": "k", "one_way": true})
	}
	drop := func(_ *office, w *worker, _ string) { w.drop() }
	say := func(kinds ...string) func(*worker, string) {
		return func(w *worker, id string) { w.say(id, kinds...) }
	}
	for _, c := range []struct {
		kill    string // at this state
		more    map[string]any
		deaf    bool                                  // until the gateway is back
		answers []string                              // before
		act     func(o *office, w *worker, id string) // when it is with the device; leads to the state
		then    []string                              // answers to what comes after the restart
		late    func(w *worker, id string)            // after the restart
		end     string
	}{
		{kill: "QUEUED", answers: all, then: all, end: "SUCCEEDED"},
		{kill: "SENT", deaf: true, then: all, end: "SUCCEEDED"},
		{kill: "DELIVERED", then: all, late: say(all...), end: "SUCCEEDED"},
		{kill: "DELIVERED", more: map[string]any{"one_way": true}, end: "DELIVERED"},
		{kill: "DELIVERED", more: map[string]any{"one_way": true}, late: say("succeeded"), end: "SUCCEEDED"},
		{kill: "IN_PROGRESS", answers: []string{"accepted"}, then: all, late: say("progress", "succeeded"), end: "SUCCEEDED"},
		{kill: "SUCCEEDED", answers: all, then: all, end: "SUCCEEDED"},
		{kill: "FAILED", answers: []string{"accepted", "failed"}, then: all, end: "FAILED"},
		{kill: "REJECTED", answers: []string{"rejected"}, then: all, end: "REJECTED"},
		{kill: "EXPIRED", deaf: true, more: map[string]any{"ttl": "300ms"}, end: "EXPIRED"},
		{kill: "EXPIRED", deaf: true, more: map[string]any{"ttl": "300ms"}, late: say("failed"), end: "FAILED"},
		{kill: "TIMED_OUT", more: map[string]any{"execution_timeout": "300ms"}, end: "TIMED_OUT"},
		{kill: "TIMED_OUT", more: map[string]any{"execution_timeout": "300ms"}, late: say("succeeded"), end: "SUCCEEDED"},
		{kill: "CANCELED", deaf: true, act: cancel, end: "CANCELED"},
		{kill: "CANCELED", deaf: true, act: cancel, late: say("succeeded"), end: "SUCCEEDED"},
		{kill: "SUPERSEDED", deaf: true, more: map[string]any{"supersede_key": "k"}, act: supersede, end: "SUPERSEDED"},
		{kill: "SUPERSEDED", deaf: true, more: map[string]any{"supersede_key": "k"}, act: supersede, late: say("succeeded"), end: "SUCCEEDED"},
		{kill: "DEAD_LETTERED", deaf: true, more: map[string]any{"max_attempts": 1}, act: drop, end: "DEAD_LETTERED"},
		{kill: "DEAD_LETTERED", deaf: true, more: map[string]any{"max_attempts": 1}, act: drop, late: say("rejected"), end: "REJECTED"},
	} {
		t.Run(c.kill+" to "+c.end, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			rng, _ := seeded(t)
			up := testkit.StartMosquitto(t)
			o := openOffice(t, up.Addr)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+
				fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q, format: batch }\n", up.URL()))
			workers := []*worker{startWorker(t, g.Addr, "three", mqtt.V311, c.answers...), startWorker(t, g.Addr, "five", mqtt.V5, c.answers...)}
			g.AwaitCommands(t)
			for n := range max(cycles()/2, 2) {
				blind := n%2 == 1
				id := func(w *worker) string { return fmt.Sprintf("%s-%d-%s", strings.ToLower(c.kill), n, w.id) }
				for _, w := range workers {
					w.set(c.deaf, c.answers...)
					w.here()
				}
				var acting sync.WaitGroup
				given := make(chan struct{})
				for _, w := range workers {
					o.submit(w.id, id(w), c.more)
					if c.act != nil {
						acting.Go(func() {
							if o.await(id(w), "SENT", 20*time.Second, given) {
								c.act(o, w, id(w))
							}
						})
					}
				}
				watched := id(workers[n/2%len(workers)])
				if blind {
					// From a random state on, somewhere around the commits that follow.
					for _, state := range []string{"QUEUED", "SENT"}[:rng.IntN(3)] {
						o.await(watched, state, 5*time.Second, nil)
					}
					<-time.After(time.Duration(rng.IntN(8_000)) * time.Microsecond)
				} else if !o.await(watched, c.kill, 20*time.Second, nil) {
					t.Fatalf("state %s of %s never came: %v", c.kill, watched, o.states(watched))
				}
				g.Kill()
				close(given)
				acting.Wait()
				for _, w := range workers {
					then := c.then
					if blind && c.late == nil && !c.deaf {
						then = c.answers
					} else if c.deaf {
						then = all // it may not have come to the state: it has to come to an end all the same
					}
					w.set(false, then...)
				}
				// What upstream was told is durable: a device whose PUBACK is, never gets the command again.
				delivered := map[*worker]int{}
				for _, w := range workers {
					if o.has(id(w), "DELIVERED") {
						delivered[w], _ = w.seen(id(w))
					}
				}
				g.Restart()
				for _, w := range workers {
					w.here()
				}
				for _, w := range workers {
					loose := blind || id(w) != watched
					if c.late != nil {
						if received, _ := w.seen(id(w)); received > 0 {
							c.late(w, id(w))
						} else {
							loose = true // it was over before it could be sent
						}
					}
					agree(t, g, o, w, id(w), c.end, loose)
					if n, was := delivered[w]; was {
						if received, _ := w.seen(id(w)); received != n {
							t.Errorf("%s: its PUBACK was durable at the kill, but it came %d times before and %d times in all", id(w), n, received)
						}
					}
				}
			}
			drained(t, g, "cloud", 20*time.Second)
			balanced(t, g)
			g.Kill()
			verifyStore(t, path, g.Dir)
		})
	}
}

// agree waits until a command has ended, and holds the three views of it against each other. loose: the kill came at an unknown
// moment, so the command may also have ended in another way that the three agree on.
func agree(t *testing.T, g *testkit.Gateway, o *office, w *worker, id, end string, loose bool) commandView {
	t.Helper()
	var v commandView
	testkit.EventuallyNil(t, 30*time.Second, "command "+id+" ends", func() (err error) {
		if v, err = command(t, g, id); err != nil {
			return err
		}
		if v.State == end || loose && v.ended() {
			return nil
		}
		received, executed := w.seen(id)
		return fmt.Errorf("it is %+v; device: received %d, executed %d; told upstream: %v", v, received, executed, o.states(id))
	})
	// After the end only a late outcome may follow, and that would be another state: look once more when upstream knows.
	testkit.EventuallyNil(t, 20*time.Second, "upstream knows all of command "+id, func() (err error) {
		if v, err = command(t, g, id); err != nil {
			return err
		}
		return sameSteps(&v, o.steps(id))
	})
	received, executed := w.seen(id)
	switch {
	case (v.State == "SUCCEEDED" || v.State == "FAILED") && executed != 1:
		t.Errorf("%s: %s, but the device executed it %d times", id, v.State, executed)
	case received > v.Attempts:
		t.Errorf("%s: the device got it %d times, the gateway counts %d attempts", id, received, v.Attempts)
	}
	return v
}

// sameSteps holds the history of a command against the changes of state that upstream was told of, each once and in the order of
// arrival: they are the same, to the reason, and each goes on from the one before.
func sameSteps(v *commandView, told []wire.CommandEvent) error {
	show := func() string {
		s := "API:"
		for _, step := range v.History {
			s += " " + step.State
		}
		s += "; upstream:"
		for _, e := range told {
			s += " " + e.State
		}
		return s
	}
	if len(told) != len(v.History) {
		return fmt.Errorf("%s: %d steps in the history, %d were told: %s", v.ID, len(v.History), len(told), show())
	}
	sent, before := 0, ""
	for i, step := range v.History {
		e := &told[i]
		if step.State == "SENT" {
			sent++
		}
		last := i == len(told)-1
		switch {
		case e.State != step.State || e.Reason != step.Reason:
			return fmt.Errorf("%s: step %d is %s (%s), and told is %s (%s): %s", v.ID, i, step.State, step.Reason, e.State, e.Reason, show())
		case e.Previous != before:
			return fmt.Errorf("%s: step %d was told to come after %s, not after %s: %s", v.ID, i, e.Previous, before, show())
		case e.Attempts != sent:
			return fmt.Errorf("%s: step %d was told with %d attempts, it was sent %d times: %s", v.ID, i, e.Attempts, sent, show())
		case last && (e.State != v.State || e.Attempts != v.Attempts || e.Late != v.Late || e.Final != v.ended()):
			return fmt.Errorf("%s: the last that was told is %+v, the API says %+v", v.ID, e, v)
		case step.State == "SENT" && before != "QUEUED":
			return fmt.Errorf("%s: sent again after %s: %s", v.ID, before, show())
		}
		before = step.State
	}
	if sent != v.Attempts {
		return fmt.Errorf("%s: %d attempts, %d steps SENT: %s", v.ID, v.Attempts, sent, show())
	}
	return nil
}

// TestKillInABurst kills the gateway while a burst of commands comes in and goes out, so that at any moment some are between being read and
// being stored, between being stored and being sent, and between being sent and being acknowledged. What the gateway told the broker that
// it has, it has; what a device has got was SENT on disk before.
func TestKillInABurst(t *testing.T) {
	t.Parallel()
	path := bin(t)
	rng, _ := seeded(t)
	up := testkit.StartMosquitto(t, "max_inflight_messages 0")
	o := openOffice(t, up.Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	var workers []*worker
	for n := range 8 {
		workers = append(workers, startWorker(t, g.Addr, fmt.Sprintf("dev-%d", n), []mqtt.Version{mqtt.V311, mqtt.V5}[n%2], "succeeded"))
	}
	g.AwaitCommands(t)
	const each = 25
	kills := max(cycles(), 15)
	total := 0
	for n := range kills {
		for _, w := range workers {
			w.here()
		}
		id := func(w *worker, k int) string { return fmt.Sprintf("burst-%d-%s-%d", n, w.id, k) }
		var all []<-chan struct{}
		for k := range each {
			for _, w := range workers {
				all = append(all, o.post(wire.CommandTopic(gatewayID, w.id, wire.ActionSubmit), submitBody(t, id(w, k), nil)))
			}
		}
		<-time.After(time.Duration(rng.IntN(30_000)) * time.Microsecond)
		g.Kill()
		for _, acked := range all {
			select {
			case <-acked:
			case <-time.After(10 * time.Second):
				t.Fatal("the broker does not acknowledge")
			}
		}
		g.Restart()
		for k := range each {
			for _, w := range workers {
				agree(t, g, o, w, id(w, k), "SUCCEEDED", false)
				total++
			}
		}
	}
	for _, w := range workers {
		var want []string
		for n := range kills {
			for k := range each {
				want = append(want, fmt.Sprintf("burst-%d-%s-%d", n, w.id, k))
			}
		}
		if got := w.came(); !slices.Equal(got, want) {
			t.Errorf("device %s got its commands in the order %v", w.id, got)
		}
	}
	if got := len(listCommands(t, g)); got != total {
		t.Errorf("%d commands were sent, the gateway has %d", total, got)
	}
}
