package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
)

// startDemoCloud runs the demo's upstream as long as the test.
func startDemoCloud(t *testing.T, step func(*wire.CommandEvent)) *demoCloud {
	t.Helper()
	c, err := newDemoCloud(t.TempDir(), slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		t.Fatal(err)
	}
	c.step = step
	ctx, cancel := context.WithCancel(t.Context())
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- c.run(ctx, func() { close(up) }, func(string, []byte) error { return nil }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	<-up
	return c
}

// takeCommands is the gateway's side of the way down. stop ends it and joins.
func takeCommands(t *testing.T, url string, handler func(mqttup.Incoming)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	up, ended := make(chan struct{}), make(chan struct{})
	o := mqttup.Options{URL: url, ClientID: mqttup.CommandsClientID(demoGateway, "cloud"), OnUp: sync.OnceFunc(func() { close(up) })}
	go func() {
		defer close(ended)
		if err := mqttup.TakeCommands(ctx, o, wire.CommandFilter(demoGateway), handler); err != nil {
			t.Error(err)
		}
	}()
	<-up
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	return stop
}

// What the cloud sends while the gateway is away waits, in order, and what the gateway has not acknowledged comes again.
func TestDemoCloudKeepsCommandsForAGatewayThatIsAway(t *testing.T) {
	c := startDemoCloud(t, func(*wire.CommandEvent) {})
	var mu sync.Mutex
	var got []string
	note := func(ack bool) func(mqttup.Incoming) {
		return func(m mqttup.Incoming) {
			s, err := wire.DecodeSubmit(m.Payload)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			got = append(got, s.ID)
			mu.Unlock()
			if ack {
				m.Ack()
			}
		}
	}
	has := func(n int) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(got) >= n
		}
	}
	submit := func(id string) {
		if err := c.submit(t.Context(), demoGateway, "d", &wire.Submit{ID: id, Name: "set"}); err != nil {
			t.Fatal(err)
		}
	}
	stop := takeCommands(t, "mqtt://"+c.address, note(false))
	submit("1")
	await(t, "a command", has(1))
	stop()
	for id := 2; id <= 50; id++ {
		submit(fmt.Sprint(id))
	}
	stop = takeCommands(t, "mqtt://"+c.address, note(true))
	await(t, "all commands", has(51))
	stop()
	want := []string{"1"}
	for id := 1; id <= 50; id++ {
		want = append(want, fmt.Sprint(id))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 20 s for %s", what)
		}
	}
}

// downlink plays the gateway of the demo's commands: it takes them from the cloud, hands each device its own one after
// the other, and tells the cloud.
type downlink struct {
	t       *testing.T
	devices *mqtttest.Server
	cloud   *demoCloud
	lie     bool // it tells another end

	mu      sync.Mutex
	queues  map[string][]wire.Submit
	outside chan wire.CommandEvent
}

func newDownlink(t *testing.T, c *demoCloud) *downlink {
	d := &downlink{t: t, cloud: c, queues: map[string][]wire.Submit{}, outside: make(chan wire.CommandEvent, 1000)}
	d.devices = mqtttest.New(t, mqtttest.Script{
		Frame: func(device string, f []byte) bool {
			if mqtt.Type(f[0]>>4) == mqtt.TypeSubscribe {
				d.next(device)
			}
			return true
		},
		Publish: func(_ string, p *mqtt.Publish) mqtttest.Answer {
			device, id, kind, ok := wire.ParseAnswerTopic(p.Topic)
			if !ok {
				t.Errorf("publish to %s", p.Topic)
				return mqtttest.Answer{}
			}
			state := map[string]string{"accepted": "IN_PROGRESS", "progress": "IN_PROGRESS"}[kind]
			if state == "" {
				state = strings.ToUpper(kind)
				if d.lie {
					state = "FAILED"
				}
			}
			d.outside <- wire.CommandEvent{Gateway: demoGateway, Device: device, ID: id, State: state}
			if state != "IN_PROGRESS" {
				d.mu.Lock()
				if q := d.queues[device]; len(q) > 0 && q[0].ID == id {
					d.queues[device] = q[1:]
				}
				d.mu.Unlock()
				d.next(device)
			}
			return mqtttest.Answer{}
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case e := <-d.outside:
				e.Final = outcome(e.State)
				for range 2 { // at least once
					if err := c.sender.Publish(ctx, wire.CommandEventTopic(e.Gateway, e.Device, e.ID, e.State), e.Encode()); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return d
}

func (d *downlink) take(m mqttup.Incoming) {
	_, device, _, ok := wire.ParseCommandTopic(m.Topic)
	s, err := wire.DecodeSubmit(m.Payload)
	if !ok || err != nil {
		d.t.Errorf("%s: %v", m.Topic, err)
		return
	}
	d.mu.Lock()
	d.queues[device] = append(d.queues[device], s)
	d.mu.Unlock()
	m.Ack()
	d.outside <- wire.CommandEvent{Gateway: demoGateway, Device: device, ID: s.ID, State: "QUEUED"}
	d.next(device)
}

// next sends a device the command whose turn it is, if the device is there.
func (d *downlink) next(device string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q := d.queues[device]; len(q) > 0 {
		d.devices.Send(device, mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte(wire.RequestTopic(device, q[0].ID, q[0].Name)), Payload: q[0].Payload}))
	}
}

func TestDemoCommands(t *testing.T) {
	for _, lie := range []bool{false, true} {
		var out bytes.Buffer
		d := &demo{out: &out, dir: "/the/folder", duration: 2 * time.Second, seed: 1, began: time.Now(), orders: newOrders(), gateway: &child{ended: make(chan struct{})}}
		d.cloud = startDemoCloud(t, d.orders.note)
		down := newDownlink(t, d.cloud)
		down.lie = lie
		d.address = down.devices.Addr
		stop := takeCommands(t, "mqtt://"+d.cloud.address, down.take)
		var err error
		if d.sleepers, err = d.newSleepers(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() {
			_, err := d.sleepers.Run(ctx)
			ran <- err
		}()
		do := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%v after\n%s", err, &out)
			}
		}
		do(d.commandSleepers(ctx))
		stop() // the cut
		do(d.commandIntoTheCut(ctx))
		all := d.sleepers.DeviceIDs()
		d.wake(all[:2])
		await(t, "two devices", func() bool { return d.sleepers.Snapshot().Connected == 2 })
		for _, device := range all[:2] {
			down.next(device) // their sessions are there: they do not subscribe
		}
		takeCommands(t, "mqtt://"+d.cloud.address, down.take)
		d.wake(all[2:])
		await(t, "four devices", func() bool { return d.sleepers.Snapshot().Asleep == 0 })
		await(t, "the rest", func() bool {
			for _, device := range all {
				down.next(device)
			}
			<-time.After(20 * time.Millisecond)
			return d.sleepers.Snapshot().Commands.Received == 16
		})
		do(d.finishCommands(ctx))
		cancel()
		do(<-ran)
		l := ledger{Commands: d.settleCommands()}
		d.printLedger(&l)
		c := l.Commands
		if c.Sent != 16 || c.Executed != 15 || c.ExecutedTwice != 0 || c.Lost != 0 || c.Slowest <= 0 || c.OutOfOrder != 0 {
			t.Errorf("%+v", c)
		}
		if ok := !lie; l.balanced() != ok || (c.Disagreed == 0) != ok || (c.Unexpected == 0) != ok || c.Succeeded != map[bool]uint64{true: 15}[ok] {
			t.Errorf("the gateway lies: %v, and the ledger says %+v\n%s", lie, c, &out)
		}
		at := 0
		steps := []string{
			"4 more take commands", "COMMAND: 12 commands for 4 devices that are asleep: QUEUED", "COMMAND: 4 more from the cloud", "AWAKE: sleeper-00001, sleeper-00002;",
			"AWAKE: sleeper-00003, sleeper-00004;", ": set SUCCEEDED, update SUCCEEDED, reboot SUCCEEDED, ", "Commands\n", "executed twice", "SUCCEEDED", "Every command has reached its end",
		}
		if lie {
			steps = []string{"but the device says", "disagreed", "THIS IS WRONG: commands"}
		}
		for _, step := range steps {
			i := strings.Index(out.String()[at:], step)
			if i < 0 {
				t.Fatalf("the story does not tell %q, or not in its place:\n%s", step, &out)
			}
			at += i
		}
		if lie == strings.Contains(out.String(), "Every command has reached its end") {
			t.Errorf("the story is\n%s", &out)
		}
	}
}

func TestOrdersFollowWhatTheGatewayTells(t *testing.T) {
	for _, c := range []struct {
		steps []string
		state string
		final bool
	}{
		{nil, "", false},
		{[]string{"QUEUED"}, "QUEUED", false},
		{[]string{"QUEUED", "SENT", "QUEUED"}, "QUEUED", false},
		{[]string{"QUEUED", "SENT", "DELIVERED", "IN_PROGRESS", "SUCCEEDED"}, "SUCCEEDED", true},
		{[]string{"SUCCEEDED", "QUEUED", "SENT"}, "SUCCEEDED", true}, // told again
		{[]string{"SUCCEEDED", "TIMED_OUT!"}, "SUCCEEDED", true},
		{[]string{"TIMED_OUT!", "IN_PROGRESS"}, "TIMED_OUT", true},
		{[]string{"TIMED_OUT!", "FAILED"}, "FAILED", true}, // late
		{[]string{"REFUSED"}, "REFUSED", true},
		{[]string{"EXPIRED!"}, "EXPIRED", true},
	} {
		o := newOrders()
		o.add("d", "1", "set", "SUCCEEDED")
		for _, s := range c.steps {
			state, final := strings.CutSuffix(s, "!")
			o.note(&wire.CommandEvent{Device: "d", ID: "1", State: state, Final: final})
			o.note(&wire.CommandEvent{Device: "e", ID: "1", State: "FAILED"}) // not ours
			o.note(&wire.CommandEvent{Device: "d", ID: "2", State: "FAILED"})
		}
		if x := o.list[0]; x.state != c.state || x.final != c.final {
			t.Errorf("%q leads to %q, final %v", c.steps, x.state, x.final)
		}
	}
}

func TestTheLedgerOfCommandsFindsWhatIsWrong(t *testing.T) {
	type record = firmwaresim.CommandRecord
	good := record{Device: "d", ID: "1", Name: "set", N: 1, Received: 1, Executed: 1, Outcome: "succeeded", Acknowledged: true}
	for _, c := range []struct {
		name    string
		state   string
		records []record
		check   func(commandLedger) bool
		ok      bool
		example string
	}{
		{"all well", "SUCCEEDED", []record{good}, func(l commandLedger) bool { return l.Succeeded == 1 && l.Executed == 1 }, true, ""},
		{"no end", "QUEUED", nil, func(l commandLedger) bool { return l.Lost == 1 }, false, "d 1: has no end"},
		{"not received", "SUCCEEDED", nil, func(l commandLedger) bool { return l.Lost == 1 }, false, "never had it"},
		{"refused", "REFUSED", nil, func(l commandLedger) bool { return l.OtherEnds == 1 && l.Unexpected == 1 }, false, "REFUSED, not SUCCEEDED: because"},
		{"another end", "FAILED", []record{good}, func(l commandLedger) bool { return l.Disagreed == 1 }, false, "but the device says"},
		{"twice", "SUCCEEDED", []record{good, good}, func(l commandLedger) bool { return l.ExecutedTwice == 1 && l.Repeats == 1 }, false, "executed 2 times"},
		{"invented", "SUCCEEDED", []record{good, {Device: "d", ID: "x", Received: 1}}, func(l commandLedger) bool { return l.Disagreed == 1 }, false, "nobody has sent it"},
	} {
		o := newOrders()
		o.add("d", "1", "set", "SUCCEEDED")
		o.note(&wire.CommandEvent{Device: "d", ID: "1", State: c.state, Reason: "because"})
		l, examples := o.ledger(firmwaresim.NewCommandLedger(c.records))
		if l.balanced() != c.ok || !c.check(l) || l.Sent != 1 {
			t.Errorf("%s: %+v", c.name, l)
		}
		if text := strings.Join(examples, "\n"); !strings.Contains(text, c.example) || c.ok != (text == "") {
			t.Errorf("%s: examples %q", c.name, examples)
		}
		if (&ledger{Commands: l}).balanced() != c.ok {
			t.Errorf("%s: the whole ledger does not notice", c.name)
		}
		b, err := json.Marshal(ledger{Commands: l})
		if err != nil || !strings.Contains(string(b), `"commands":{"sent":1,`) {
			t.Errorf("%s, %v", b, err)
		}
	}
}
