package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
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
	t    *testing.T
	addr string
	id   string

	mu       sync.Mutex
	client   *mqtt.Client
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

func startWorker(t *testing.T, addr, id string, answers ...string) *worker {
	t.Helper()
	w := &worker{
		t: t, addr: addr, id: id, answers: answers, received: map[string]int{}, executed: map[string]int{}, waiting: map[uint16]answer{},
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
		stopped := w.stopped
		w.mu.Unlock()
		if stopped {
			return
		}
		c, err := w.connect()
		if err != nil {
			<-time.After(20 * time.Millisecond)
			continue
		}
		<-c.Done()
	}
}

func (w *worker) connect() (*mqtt.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: w.addr, ManualAck: true,
		Connect:   mqtt.Connect{Version: mqtt.V5, ClientID: w.id, KeepAlive: 60, SessionExpiry: 3600},
		OnMessage: w.onMessage,
		OnAck:     w.onAck,
	})
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.client = c
	if w.stopped {
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
	}
	return c, nil
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
	}
	if w.deaf {
		return
	}
	_ = c.QueueAck(mqtt.TypePuback, p.ID, mqtt.Success)
	if w.executed[id] == 0 {
		w.executed[id] = 1
	}
	for _, kind := range w.answers {
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

// answerLocked sends an answer, which stays in flash until it is acknowledged.
func (w *worker) answerLocked(a answer) {
	w.unsent = append(w.unsent, a)
	w.next = w.next%60000 + 1
	w.waiting[w.next] = a
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

	mu     sync.Mutex
	next   uint16
	events map[string][]wire.CommandEvent // by id, in the order of arrival
	notify chan struct{}                  // cap 1
}

func openOffice(t *testing.T, addr string) *office {
	t.Helper()
	o := &office{t: t, events: map[string][]wire.CommandEvent{}, notify: make(chan struct{}, 1)}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var err error
	o.client, err = mqtt.Dial(ctx, mqtt.ClientOptions{
		Address:   addr,
		Connect:   mqtt.Connect{Version: mqtt.V311, ClientID: "office", CleanStart: true, KeepAlive: 60},
		OnMessage: o.onMessage,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.client.Abort(); <-o.client.Done() })
	if _, err := o.client.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.CommandEventFilter(gatewayID, "", ""), QoS: 1}}}); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *office) onMessage(_ *mqtt.Client, p *mqtt.Publish) {
	ev, err := wire.DecodeCommandEvent(p.Payload)
	if err != nil {
		o.t.Errorf("event on %s: %v", p.Topic, err)
		return
	}
	_, device, id, state, ok := wire.ParseCommandEventTopic(string(p.Topic))
	if !ok || device != ev.Device || state != ev.State || id != ev.ID && ev.ID != "" {
		o.t.Errorf("event on %s says %+v", p.Topic, ev)
	}
	o.mu.Lock()
	o.events[id] = append(o.events[id], ev)
	o.mu.Unlock()
	select {
	case o.notify <- struct{}{}:
	default:
	}
}

func (o *office) publish(topic string, payload []byte) {
	o.mu.Lock()
	o.next = o.next%60000 + 1
	id := o.next
	o.mu.Unlock()
	if err := o.client.Publish(&mqtt.Publish{QoS: 1, ID: id, Topic: []byte(topic), Payload: payload}); err != nil {
		o.t.Errorf("publish %s: %v", topic, err)
	}
}

// submit sends {"id":…,"name":"work", …more}.
func (o *office) submit(device, id string, more map[string]any) {
	body := map[string]any{"id": id, "name": "work"}
	for k, v := range more {
		body[k] = v
	}
	b, err := json.Marshal(body)
	if err != nil {
		o.t.Fatal(err)
	}
	o.publish(wire.CommandTopic(gatewayID, device, wire.ActionSubmit), b)
}

func (o *office) cancel(device, id string) {
	o.publish(wire.CommandTopic(gatewayID, device, wire.ActionCancel), fmt.Appendf(nil, `{"id":%q}`, id))
}

// states are the states told of a command so far, repeats of the same event left out.
func (o *office) states(id string) (states []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.events[id] {
		if e.Repeat {
			continue
		}
		step := fmt.Sprintf("%s %d", e.State, e.Attempts)
		if !slices.Contains(states, step) {
			states = append(states, step)
		}
	}
	return states
}

func (o *office) has(id, state string) bool {
	return slices.ContainsFunc(o.states(id), func(s string) bool { return strings.HasPrefix(s, state+" ") })
}

// await waits until an event with the state has come. It looks at each arrival, not now and then: what is killed at a
// state has to be killed at once.
func (o *office) await(id, state string, within time.Duration) bool {
	deadline := time.After(within)
	for !o.has(id, state) {
		select {
		case <-o.notify:
		case <-time.After(5 * time.Millisecond): // another waiter took the notice
		case <-deadline:
			return false
		}
	}
	return true
}

// commandView is what the API tells of a command.
type commandView struct {
	State    string `json:"state"`
	Attempts int    `json:"attempts"`
	Reason   string `json:"reason"`
	Late     bool   `json:"late"`
	Result   string `json:"result"`
	History  []struct {
		State string `json:"state"`
	} `json:"history"`
}

func command(t *testing.T, g *testkit.Gateway, id string) (v commandView, err error) {
	t.Helper()
	b, err := g.Call(http.MethodGet, "/api/v1/commands/"+id, nil, http.StatusOK)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(b, &v)
}

// TestKillAtEveryState kills the gateway at each state that a command can be in: the moment that the cloud is told of
// it, and a few milliseconds around what leads to it. After the restart the command goes its way, and what was told
// upstream, what the API tells and what the device has done agree.
func TestKillAtEveryState(t *testing.T) {
	all := []string{"accepted", "progress", "succeeded"}
	for _, c := range []struct {
		kill    string // at this state
		more    map[string]any
		deaf    bool     // until the gateway is back
		answers []string // before
		then    []string // answers after the restart
		act     func(o *office, w *worker, id string)
		end     string
		never   bool // the device must not have got it
	}{
		{kill: "QUEUED", then: all, answers: all, end: "SUCCEEDED"},
		{kill: "SENT", deaf: true, then: all, end: "SUCCEEDED"},
		{kill: "DELIVERED", answers: nil, then: all, act: answerLater(all...), end: "SUCCEEDED"},
		{kill: "DELIVERED", more: map[string]any{"one_way": true}, end: "DELIVERED"},
		{kill: "IN_PROGRESS", answers: []string{"accepted"}, act: answerLater("progress", "succeeded"), end: "SUCCEEDED"},
		{kill: "SUCCEEDED", answers: all, then: all, end: "SUCCEEDED"},
		{kill: "FAILED", answers: []string{"accepted", "failed"}, then: all, end: "FAILED"},
		{kill: "REJECTED", answers: []string{"rejected"}, then: all, end: "REJECTED"},
		{kill: "EXPIRED", deaf: true, more: map[string]any{"ttl": "400ms"}, end: "EXPIRED"},
		{kill: "TIMED_OUT", more: map[string]any{"execution_timeout": "300ms"}, end: "TIMED_OUT"},
		{kill: "TIMED_OUT", more: map[string]any{"execution_timeout": "300ms"}, act: answerLater("succeeded"), end: "SUCCEEDED"},
		{kill: "CANCELED", deaf: true, act: func(o *office, w *worker, id string) { o.cancel(w.id, id) }, end: "CANCELED"},
		{kill: "SUPERSEDED", deaf: true, more: map[string]any{"supersede_key": "k"}, act: func(o *office, w *worker, id string) {
			o.submit(w.id, id+"-newer", map[string]any{"supersede_key": "k", "one_way": true})
		}, end: "SUPERSEDED"},
		{kill: "DEAD_LETTERED", deaf: true, more: map[string]any{"max_attempts": 1}, act: func(_ *office, w *worker, _ string) { w.drop() }, end: "DEAD_LETTERED"},
	} {
		t.Run(c.kill+" to "+c.end, func(t *testing.T) {
			path := bin(t)
			rng, _ := seeded(t)
			up := testkit.StartMosquitto(t)
			o := openOffice(t, up.Addr)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+
				fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q, format: batch }\n", up.URL()))
			w := startWorker(t, g.Addr, "worker", c.answers...)
			known(t, g, "worker")
			g.AwaitCommands(t)
			for n := range max(cycles()/2, 2) {
				id := fmt.Sprintf("%s-%d", strings.ToLower(c.kill), n)
				w.set(c.deaf, c.answers...)
				o.submit("worker", id, c.more)
				acted := make(chan struct{})
				go func() {
					defer close(acted)
					first := "SENT"
					if !c.deaf {
						first = "DELIVERED"
					}
					if c.act != nil && (c.kill == "CANCELED" || c.kill == "SUPERSEDED" || c.kill == "DEAD_LETTERED") && o.await(id, first, 10*time.Second) {
						c.act(o, w, id)
					}
				}()
				if n%2 == 0 {
					if !o.await(id, c.kill, 20*time.Second) {
						t.Fatalf("state %s of %s never came: %v", c.kill, id, o.states(id))
					}
				} else {
					// Blind: somewhere around the commits.
					<-time.After(time.Duration(rng.IntN(30_000)) * time.Microsecond)
				}
				g.Kill()
				<-acted
				then := c.then
				if n%2 == 1 && c.deaf {
					then = all // it may not have come to the state: it has to come to an end all the same
				}
				w.set(false, then...)
				g.Restart()
				if c.act != nil && c.kill != "CANCELED" && c.kill != "SUPERSEDED" && c.kill != "DEAD_LETTERED" {
					c.act(o, w, id)
				}
				agree(t, g, o, w, id, c.end, n%2 == 1)
			}
		})
	}
}

// answerLater has the worker answer what it got before; a command that it did not get is answered when it comes.
func answerLater(kinds ...string) func(*office, *worker, string) {
	return func(_ *office, w *worker, id string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.answers = kinds
		if w.executed[id] == 0 || w.client == nil {
			return
		}
		for _, kind := range kinds {
			payload := ""
			if kind != "accepted" && kind != "progress" {
				payload = fmt.Sprintf(`{"by":%q}`, w.id)
			}
			w.answerLocked(answer{wire.AnswerTopic(w.id, id, kind), payload})
		}
	}
}

// known waits until the gateway knows a device that connects by itself.
func known(t *testing.T, g *testkit.Gateway, device string) {
	t.Helper()
	testkit.EventuallyNil(t, 10*time.Second, "the device is known", func() error {
		_, err := g.Call(http.MethodGet, "/api/v1/devices/"+device, nil, http.StatusOK)
		return err
	})
}

// agree waits until a command has ended, and holds the three views of it against each other. loose: the kill came at an unknown
// moment, so the command may also have ended in another way that the three agree on.
func agree(t *testing.T, g *testkit.Gateway, o *office, w *worker, id, end string, loose bool) {
	t.Helper()
	var v commandView
	testkit.EventuallyNil(t, 30*time.Second, "command "+id+" ends", func() (err error) {
		if v, err = command(t, g, id); err != nil {
			return err
		}
		if v.State == end || loose && slices.Contains([]string{"SUCCEEDED", "FAILED", "REJECTED", "EXPIRED", "TIMED_OUT", "CANCELED", "SUPERSEDED", "DEAD_LETTERED"}, v.State) {
			return nil
		}
		received, executed := w.seen(id)
		return fmt.Errorf("it is %+v; device: received %d, executed %d; told upstream: %v", v, received, executed, o.states(id))
	})
	if !o.await(id, v.State, 20*time.Second) {
		t.Fatalf("%s: the API says %s, upstream was told %v", id, v.State, o.states(id))
	}
	// The link was cut by each kill, so upstream may be told things again, but never something else.
	told := o.states(id)
	if last := told[len(told)-1]; last != fmt.Sprintf("%s %d", v.State, v.Attempts) {
		t.Errorf("%s: the API says %s after %d attempts, the last thing told upstream is %s (%v)", id, v.State, v.Attempts, last, told)
	}
	for _, step := range v.History {
		if !slices.ContainsFunc(told, func(s string) bool { return strings.HasPrefix(s, step.State+" ") }) {
			t.Errorf("%s: upstream was never told of %s: %v", id, step.State, told)
		}
	}
	received, executed := w.seen(id)
	switch {
	case (v.State == "SUCCEEDED" || v.State == "FAILED") && executed != 1:
		t.Errorf("%s: %s, but the device executed it %d times", id, v.State, executed)
	case received > v.Attempts:
		t.Errorf("%s: the device got it %d times, the gateway counts %d attempts", id, received, v.Attempts)
	}
}
