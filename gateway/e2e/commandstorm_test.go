package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// TestCommandStorm sends a steady stream of commands of every kind to devices that flap, crash and sleep, through a link that breaks
// in every way, while the gateway is killed, or stopped in order, over and over. In the end three ledgers agree on every command that the
// broker has acknowledged to the cloud: what upstream was told, what the API tells, what the device has done. None is lost, none is
// done twice, each device gets them in order, each has one end.
func TestCommandStorm(t *testing.T) {
	for _, c := range []struct {
		how    string
		cycles int
		end    func(t *testing.T, g *testkit.Gateway)
	}{
		{"killed", cycles(), func(_ *testing.T, g *testkit.Gateway) { g.Kill() }},
		{"stopped", max(cycles()/2, 3), func(t *testing.T, g *testkit.Gateway) {
			begin := time.Now()
			if code := g.Stop(); code != 0 {
				t.Errorf("exit code %d after SIGTERM", code)
			}
			if d := time.Since(begin); d > 10*time.Second {
				t.Errorf("an orderly stop took %v", d)
			}
		}},
	} {
		t.Run(c.how, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			rng, seed := seeded(t)
			up := testkit.StartMosquitto(t)
			link := testkit.StartProxy(t, up.Addr)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+
				"devices: { anonymous: true, commands: { ack_timeout: 1s } }\n"+
				fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q, format: batch }\n", "mqtt://"+link.Addr()))
			air := testkit.StartProxy(t, g.Addr)
			air.Set(radio)
			force := startTroops(t, air.Addr(), seed)
			hq := openHeadquarters(t, g, up.Addr, seed)
			g.AwaitCommands(t)
			for _, device := range force.devices() {
				known(t, g, device)
				hq.command(device)
			}
			var faults atomic.Int64
			calm := link.Flap(seed, testkit.Faults{Latency: 2 * time.Millisecond}, 600*time.Millisecond, 600*time.Millisecond, func(string, ...any) { faults.Add(1) })
			quiet := air.Flap(seed, radio, 2*time.Second, 400*time.Millisecond, func(string, ...any) { faults.Add(1) })
			var slowest time.Duration
			for n := range c.cycles {
				life := time.Duration(150+rng.IntN(800)) * time.Millisecond
				if n%4 == 3 {
					life += 2 * time.Second
				}
				<-time.After(life)
				c.end(t, g)
				if n%8 == 0 {
					verifyStore(t, path, g.Dir)
				}
				if n%3 == 2 {
					<-time.After(time.Duration(rng.IntN(500)) * time.Millisecond) // it is gone for longer
				}
				slowest = max(slowest, g.Restart())
				balanced(t, g)
			}
			hq.stop()
			calm()
			quiet()
			link.Set(testkit.Faults{})
			link.Reset() // what hangs in there would be given up after 30 s

			begin := time.Now()
			hq.awaitEnds(g)
			force.finish(t) // outcomes that come late
			drained(t, g, "cloud", 60*time.Second)
			balanced(t, g)
			sum, _ := reconcile(t, g, hq, force)
			t.Logf("%d times %s, %d link faults, slowest start %v, all over %v after the storm; %s",
				c.cycles, c.how, faults.Load(), slowest.Round(time.Millisecond), time.Since(begin).Round(100*time.Millisecond), sum)
			t.Log(force)
			if code := g.Stop(); code != 0 {
				t.Errorf("exit code %d after SIGTERM", code)
			}
			verifyStore(t, path, g.Dir)
		})
	}
}

// radio is the way to the devices: slow enough that acknowledgements are under way when something ends.
var radio = testkit.Faults{Latency: 5 * time.Millisecond}

// known waits until the gateway knows a device that connects by itself.
func known(t *testing.T, g *testkit.Gateway, device string) {
	t.Helper()
	testkit.EventuallyNil(t, 20*time.Second, "device "+device+" is known", func() error {
		return g.Get("/api/v1/devices/"+device, new(json.RawMessage))
	})
}

// troops are simulated devices that take commands: flaky ones of both protocol versions that crash, and sleepers.
type troops struct {
	fleets map[string]*firmwaresim.Fleet // by the prefix of their ids
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func startTroops(t *testing.T, addr string, seed uint64) *troops {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	f := &troops{fleets: map[string]*firmwaresim.Fleet{}, cancel: cancel}
	t.Cleanup(func() {
		cancel()
		f.wg.Wait()
	})
	for prefix, more := range map[string]firmwaresim.Config{
		"scout":   {Version: mqtt.V311, Flaky: 0.3, Crash: 0.15, NoSamples: true},
		"post":    {Version: mqtt.V5, Flaky: 0.3, Crash: 0.15, Rate: 10},
		"sleeper": {Version: mqtt.V5, Flaky: 0.1, Awake: 500 * time.Millisecond, Period: 1500 * time.Millisecond, NoSamples: true},
	} {
		more.Broker, more.Prefix, more.Devices, more.Seed = "mqtt://"+addr, prefix, 4, seed
		more.Commands = true
		more.Execution = firmwaresim.Execution{Duration: 15 * time.Millisecond, Fail: 0.1, Reject: 0.05}
		more.MinBackoff, more.MaxBackoff, more.Drain = 20*time.Millisecond, 300*time.Millisecond, 30*time.Second
		fleet, err := firmwaresim.New(more, nil)
		if err != nil {
			t.Fatal(err)
		}
		f.fleets[prefix] = fleet
		f.wg.Go(func() {
			if _, err := fleet.Run(ctx); err != nil {
				t.Errorf("fleet %s: %v", prefix, err)
			}
		})
	}
	return f
}

func (f *troops) devices() (ids []string) {
	for _, fleet := range f.fleets {
		ids = append(ids, fleet.DeviceIDs()...)
	}
	slices.Sort(ids)
	return ids
}

// finish waits until the devices have done all that they were told and have got rid of their answers.
func (f *troops) finish(t *testing.T) {
	t.Helper()
	testkit.EventuallyNil(t, 60*time.Second, "the devices have done and told all", func() error {
		for prefix, fleet := range f.fleets {
			if s := fleet.Snapshot(); s.Commands.Open > 0 || s.Answers > 0 {
				return fmt.Errorf("%s: %d commands open, %d answers not acknowledged; %v", prefix, s.Commands.Open, s.Answers, fleet.Errors())
			}
		}
		return nil
	})
	f.cancel()
	f.wg.Wait()
	for prefix, fleet := range f.fleets {
		if s := fleet.Snapshot(); s.Commands.Strange > 0 || s.InFlash+s.InFlight > 0 {
			t.Errorf("fleet %s: %+v, errors %v", prefix, s, fleet.Errors())
		}
	}
}

// ledger is what all devices have done.
func (f *troops) ledger() *firmwaresim.CommandLedger {
	var all []firmwaresim.CommandRecord
	for _, fleet := range f.fleets {
		all = append(all, fleet.CommandLedger().Records()...)
	}
	return firmwaresim.NewCommandLedger(all)
}

// String tells what the devices went through.
func (f *troops) String() string {
	var s []string
	for _, prefix := range slices.Sorted(maps.Keys(f.fleets)) {
		x := f.fleets[prefix].Snapshot()
		s = append(s, fmt.Sprintf("%s: %d connections, %d links broken, %d crashes, %d commands, %d repeats", prefix, x.Connects, x.Breaks, x.Crashes,
			x.Commands.Received, x.Commands.Repeats))
	}
	return strings.Join(s, "; ")
}

// headquarters is the cloud: a commander for each device submits, over a link of its own that is reset now and then, and an office beside it
// notes all that is told.
type headquarters struct {
	t       *testing.T
	gateway *testkit.Gateway
	office  *office
	client  *mqttup.Client
	cloud   *cloud.Client
	seed    uint64
	noHours bool // the gateway's clock is wrong: no command says at which hour it is to be sent; set before command
	quit    chan struct{}
	wg      sync.WaitGroup

	mu        sync.Mutex
	orders    map[string]*submitted // all of them: the broker, or the gateway, acknowledges each in the end
	followers []*cloud.Command
	conflicts map[string]bool // ids that were used for something else, too
	repeated  int
	canceled  int
	local     int
}

type submitted struct {
	device string
	submit wire.Submit
}

func openHeadquarters(t *testing.T, g *testkit.Gateway, addr string, seed uint64) *headquarters {
	t.Helper()
	hq := &headquarters{
		t: t, gateway: g, office: openOffice(t, addr), seed: seed, quit: make(chan struct{}), orders: map[string]*submitted{}, conflicts: map[string]bool{},
	}
	link := testkit.StartProxy(t, addr)
	hq.cloud = cloud.NewClient(cloud.ClientConfig{
		Publisher: cloud.PublishFunc(func(ctx context.Context, topic string, payload []byte) error {
			return hq.client.Publish(ctx, topic, payload)
		}),
		Retry: 300 * time.Millisecond,
	})
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	hq.client, err = mqttup.Connect(ctx, mqttup.Options{URL: "mqtt://" + link.Addr(), ClientID: "headquarters", Persistent: true}, cloud.Filters(gatewayID),
		func(topic string, payload []byte) {
			if _, err := hq.cloud.Handle(topic, payload); err != nil {
				t.Error(err)
			}
		})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hq.stop()
		cancel()
		if err := hq.client.Wait(); err != nil {
			t.Error(err)
		}
	})
	hq.wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 0x6871))
		for {
			select {
			case <-hq.quit:
				return
			case <-time.After(time.Duration(500+rng.IntN(1500)) * time.Millisecond):
				link.Reset()
			}
		}
	})
	return hq
}

// stop ends the stream; all that was begun is with the broker when it returns.
func (hq *headquarters) stop() {
	select {
	case <-hq.quit:
	default:
		close(hq.quit)
	}
	hq.wg.Wait()
}

// awaitEnds waits until the gateway has every command that was submitted, and each has reached an end.
func (hq *headquarters) awaitEnds(g *testkit.Gateway) {
	t := hq.t
	t.Helper()
	g.AwaitCommands(t)
	testkit.EventuallyNil(t, 60*time.Second, "what waited at the broker has come", func() error {
		listed := listCommands(t, g)
		for id := range hq.orders {
			if listed[id] == "" {
				return fmt.Errorf("%s has not, and others: the gateway has %d of %d", id, len(listed), len(hq.orders))
			}
		}
		return nil
	})
	testkit.EventuallyNil(t, 90*time.Second, "every command has ended", func() error {
		s, err := g.Status()
		if n := s.Commands; err == nil && n.Queued+n.Sent+n.Delivered+n.InProgress > 0 {
			return fmt.Errorf("%+v", n)
		}
		return err
	})
}

// publish returns when the broker has acknowledged it.
func (hq *headquarters) publish(device string, action wire.CommandAction, body []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := hq.client.Publish(ctx, wire.CommandTopic(gatewayID, device, action), body); err != nil {
		hq.t.Errorf("headquarters: %v", err)
	}
}

// command starts the stream of one device's commands.
func (hq *headquarters) command(device string) {
	hq.wg.Go(func() {
		rng := rand.New(rand.NewPCG(hq.seed, uint64(len(device))<<32|uint64(device[len(device)-1])))
		var open []string
		last := uint64(0)
		for k := uint64(1); ; k++ {
			select {
			case <-hq.quit:
				return
			case <-time.After(time.Duration(10+rng.IntN(60)) * time.Millisecond):
			}
			// Far fewer than a queue takes: to be refused is no part of this, and the end of the storm is not to take long.
			if open = slices.DeleteFunc(open, hq.office.over); len(open) > 15 {
				k--
				continue
			}
			s, ordered := randomSubmit(rng)
			if hq.noHours {
				s.NotBefore = wire.Time{}
			}
			s.ID = fmt.Sprintf("%s.%d", device, k)
			if ordered {
				last++
				s.Payload, s.ContentType = fmt.Appendf(nil, `{"n":%d}`, last), "application/json"
			} else {
				s.Payload = []byte("any time")
			}
			open = append(open, s.ID)
			hq.send(rng, device, s, ordered)
		}
	})
}

// randomSubmit makes a command of some kind. ordered: it goes to its device after those before it.
func randomSubmit(rng *rand.Rand) (s wire.Submit, ordered bool) {
	names := []string{"do", "do", "do", "do", "set-level", "set-level", "query", "query", "echo", "fail", "reject", "ignore", "update", "reboot"}
	s.Name = names[rng.IntN(len(names))]
	ordered = true
	switch rng.IntN(12) {
	case 0:
		s.Urgent, ordered = true, false
	case 1:
		s.OneWay = true
	case 2:
		s.SupersedeKey = "level"
	case 3:
		s.TTL, s.HasTTL = wire.Duration(time.Duration(50+rng.IntN(1000))*time.Millisecond), true
	case 4:
		s.NotBefore, ordered = wire.Time{Time: time.Now().Add(time.Duration(rng.IntN(1500)) * time.Millisecond).UTC()}, false
	case 5:
		s.MaxAttempts = 1 + rng.IntN(3)
	case 6:
		s.ExecutionTimeout = wire.Duration(time.Duration(20+rng.IntN(300)) * time.Millisecond)
	}
	if s.Name == "ignore" && s.ExecutionTimeout == 0 {
		s.ExecutionTimeout = wire.Duration(300 * time.Millisecond)
	}
	return s, ordered
}

// send submits in one of the ways in which a cloud does.
func (hq *headquarters) send(rng *rand.Rand, device string, s wire.Submit, ordered bool) {
	body, err := wire.EncodeSubmit(&s)
	if err != nil {
		hq.t.Error(err)
		return
	}
	hq.mu.Lock()
	hq.orders[s.ID] = &submitted{device, s}
	hq.mu.Unlock()
	how := rng.IntN(20)
	if how < 4 && !ordered { // it takes a way of its own
		hq.wg.Go(func() { hq.overAPI(device, s.ID, body) })
		return
	}
	if how == 4 && !ordered {
		// Followed, and asked for again until the gateway answers.
		hq.wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
			defer cancel()
			f, err := hq.cloud.Submit(ctx, gatewayID, device, s)
			if err != nil {
				hq.t.Errorf("headquarters: %v", err)
			}
			if f != nil {
				hq.mu.Lock()
				hq.followers = append(hq.followers, f)
				hq.mu.Unlock()
			}
		})
		return
	}
	hq.publish(device, wire.ActionSubmit, body)
	later := time.Duration(rng.IntN(400)) * time.Millisecond
	switch how {
	case 5, 6: // once more
		hq.note(func() { hq.repeated++ })
		hq.publish(device, wire.ActionSubmit, body)
	case 7: // the id of another
		hq.note(func() { hq.conflicts[s.ID] = true })
		hq.publish(device, wire.ActionSubmit, fmt.Appendf(nil, `{"id":%q,"name":"another"}`, s.ID))
	case 8, 9:
		hq.note(func() { hq.canceled++ })
		hq.wg.Go(func() {
			<-time.After(later)
			hq.publish(device, wire.ActionCancel, fmt.Appendf(nil, `{"id":%q}`, s.ID))
		})
	}
}

// overAPI submits at the gateway itself until it says that it has the command.
func (hq *headquarters) overAPI(device, id string, body []byte) {
	hq.note(func() { hq.local++ })
	for deadline := time.Now().Add(60 * time.Second); ; <-time.After(30 * time.Millisecond) {
		_, err := hq.gateway.Call(http.MethodPost, "/api/v1/devices/"+device+"/commands", json.RawMessage(body), http.StatusCreated, http.StatusOK)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			hq.t.Errorf("%s over the API: %v", id, err)
			return
		}
	}
}

func (hq *headquarters) note(f func()) {
	hq.mu.Lock()
	defer hq.mu.Unlock()
	f()
}

// reconcile holds the ledgers against each other, and returns what there was of each end, and the devices' verdict.
func reconcile(t *testing.T, g *testkit.Gateway, hq *headquarters, force *troops) (string, firmwaresim.CommandVerdict) {
	t.Helper()
	o, ledger := hq.office, force.ledger()
	listed := listCommands(t, g)
	var views, told []firmwaresim.CommandView
	ends := map[string]int{}
	late := 0
	for _, id := range slices.Sorted(maps.Keys(hq.orders)) {
		order := hq.orders[id]
		if listed[id] == "" {
			t.Errorf("lost: %s was acknowledged to the cloud, and the gateway has no such command; told upstream: %v", id, o.states(id))
			continue
		}
		var v commandView
		testkit.EventuallyNil(t, 10*time.Second, "upstream knows all of command "+id, func() (err error) {
			if v, err = command(t, g, id); err != nil {
				return err
			}
			return sameSteps(&v, o.steps(id))
		})
		steps := o.steps(id)
		switch {
		case !v.ended():
			t.Errorf("%s has no end: %+v", id, v)
		case v.Device != order.device || v.Payload != string(order.submit.Payload):
			t.Errorf("%s is %+v, and was %+v", id, v, order)
		case listed[id] != v.State:
			t.Errorf("%s is %s in the list, %s by itself", id, listed[id], v.State)
		}
		r, has := ledger.Get(order.device, id)
		switch {
		case has && r.Outcome != "" && (!strings.EqualFold(r.Outcome, v.State) || !r.Acknowledged):
			t.Errorf("%s: the device says %s (acknowledged %v), the gateway %s: %v", id, r.Outcome, r.Acknowledged, v.State, o.states(id))
		case r.Received > v.Attempts:
			t.Errorf("%s: the device got it %d times, the gateway counts %d attempts", id, r.Received, v.Attempts)
		case has && r.Name != order.submit.Name:
			t.Errorf("%s came as %q, and was %q", id, r.Name, order.submit.Name)
		}
		for _, e := range o.all(id) {
			if e.State == wire.StateRefused && e.Code != "already_ended" && !(e.Code == "conflict" && hq.conflicts[id]) {
				t.Errorf("%s was refused: %s %s", id, e.Code, e.Reason)
			}
		}
		if hq.conflicts[id] && !slices.Contains(o.refusals(id), "conflict") {
			t.Errorf("%s was used for another command, and nothing was refused: %v", id, o.all(id))
		}
		ends[v.State]++
		if v.Late {
			late++
		}
		views = append(views, firmwaresim.CommandView{Device: v.Device, ID: id, State: v.State, OneWay: v.OneWay})
		if len(steps) > 0 {
			told = append(told, firmwaresim.CommandView{Device: order.device, ID: id, State: steps[len(steps)-1].State, OneWay: order.submit.OneWay})
		}
	}
	for id := range listed {
		if hq.orders[id] == nil {
			t.Errorf("the gateway has a command that nobody sent: %s", id)
		}
	}
	o.mu.Lock()
	for id := range o.events {
		if hq.orders[id] == nil {
			t.Errorf("upstream was told of a command that nobody sent: %+v", o.events[id])
		}
	}
	events, again := len(o.prints), o.again
	o.mu.Unlock()
	for _, f := range hq.followers {
		if state := f.Last().State; state != listed[f.ID] {
			t.Errorf("%s is %s for the cloud's client, %s at the gateway", f.ID, state, listed[f.ID])
		}
		f.Close()
	}
	for name, v := range map[string]firmwaresim.CommandVerdict{"the API": ledger.Verify(views), "upstream": ledger.Verify(told)} {
		if !v.OK() || v.Open > 0 {
			t.Errorf("devices and %s disagree: %v", name, v)
		}
	}
	v := ledger.Verify(views)
	if v.Executed == 0 || v.Repeats == 0 && cycles() >= 20 { // that a PUBACK is lost takes some luck
		t.Errorf("the test has shown nothing: %v", v)
	}
	return fmt.Sprintf("%d commands (%d submitted again, %d called off, %d followed, %d over the API, %d conflicts) ended %v, %d of them late; %d events, %d came again; devices: %v",
		len(hq.orders), hq.repeated, hq.canceled, len(hq.followers), hq.local, len(hq.conflicts), ends, late, events, again, v), v
}

// listCommands gives the states of all commands, by id.
func listCommands(t *testing.T, g *testkit.Gateway) map[string]string {
	t.Helper()
	states := map[string]string{}
	for next := ""; ; {
		var page struct {
			Commands []struct{ ID, State string }
			Next     string
		}
		if err := g.Get("/api/v1/commands?limit=1000&before="+url.QueryEscape(next), &page); err != nil {
			t.Fatal(err)
		}
		for _, c := range page.Commands {
			if states[c.ID] != "" {
				t.Errorf("command %s is listed twice", c.ID)
			}
			states[c.ID] = c.State
		}
		if next = page.Next; next == "" {
			return states
		}
	}
}
