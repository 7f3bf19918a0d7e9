package firmwaresim_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/testkit"
)

// station plays a gateway: it sends commands until they are acknowledged, to who has subscribed, and notes answers.
type station struct {
	*mqtttest.Server
	t *testing.T

	mu         sync.Mutex
	version    mqtt.Version
	subscribed map[string]int // how often
	clean      map[string]int // connections that began anew
	disconnect map[string]int
	orders     map[string][]*sent // by device
	answers    []said
	// May be set before the first device comes. judge answers an answer, the nth that comes; see mqtttest.Script.
	// deaf: so many PUBACKs are heard, then a connection ends instead.
	judge func(a said, n int) mqtttest.Answer
	deaf  int

	heard, pubacks int
}

type sent struct {
	id, name, payload string
	packet            uint16
	acked             bool
	reason            mqtt.Reason
	last              time.Time
}

// said is an answer as it arrived.
type said struct{ device, id, kind, body, media string }

func newStation(t *testing.T, v mqtt.Version) *station {
	s := &station{t: t, version: v, subscribed: map[string]int{}, clean: map[string]int{}, disconnect: map[string]int{}, orders: map[string][]*sent{}}
	s.Server = mqtttest.New(t, mqtttest.Script{
		Connect: func(c *mqtt.Connect) mqtt.Connack {
			s.mu.Lock()
			defer s.mu.Unlock()
			if c.CleanStart {
				s.clean[c.ClientID]++
			}
			for _, o := range s.orders[c.ClientID] {
				o.last = time.Time{} // again on this connection
			}
			return mqtt.Connack{}
		},
		Publish: func(client string, p *mqtt.Publish) mqtttest.Answer {
			device, id, kind, ok := wire.ParseAnswerTopic(p.Topic)
			if !ok {
				return mqtttest.Answer{}
			}
			if device != client || p.QoS != 1 {
				t.Errorf("%s answers on %s with QoS %d", client, p.Topic, p.QoS)
			}
			a := said{device, id, kind, string(p.Payload), string(p.ContentType)}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.heard++
			var judged mqtttest.Answer
			if s.judge != nil {
				judged = s.judge(a, s.heard)
			}
			if !judged.Reason.Failed() {
				s.answers = append(s.answers, a)
			}
			return judged
		},
		Frame: func(client string, f []byte) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			switch mqtt.Type(f[0] >> 4) {
			case mqtt.TypeSubscribe:
				sub, err := mqtt.ParseSubscribe(f, v)
				if err != nil || len(sub.Filters) != 1 || sub.Filters[0].Filter != "cmd/"+client+"/req/#" || sub.Filters[0].QoS != 1 {
					t.Errorf("%s subscribes to %+v, %v", client, sub, err)
				}
				s.subscribed[client]++
			case mqtt.TypePuback:
				var a mqtt.Ack
				if err := mqtt.ParseAck(f, v, &a); err != nil {
					t.Error(err)
				}
				if s.pubacks++; s.deaf > 0 && s.pubacks%s.deaf == 0 {
					return false
				}
				if o := s.orders[client][a.ID-1]; !o.acked {
					o.acked, o.reason = true, a.Reason
				}
			case mqtt.TypeDisconnect:
				s.disconnect[client]++
			default:
			}
			return true
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			s.deliver()
			<-time.After(2 * time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return s
}

// deliver sends what is not acknowledged: on a new connection, and after some time.
func (s *station) deliver() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for device, orders := range s.orders {
		for _, o := range orders {
			if s.subscribed[device] == 0 || o.acked || time.Since(o.last) < 300*time.Millisecond {
				continue
			}
			frame := mqtt.AppendPublish(nil, s.version, &mqtt.Publish{
				QoS: 1, ID: o.packet, Dup: !o.last.IsZero(), Topic: []byte(wire.RequestTopic(device, o.id, o.name)), Payload: []byte(o.payload),
			})
			if s.Send(device, frame) {
				o.last = time.Now()
			}
		}
	}
}

func (s *station) order(device, id, name, payload string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.orders[device] = append(s.orders[device], &sent{id: id, name: name, payload: payload, packet: uint16(len(s.orders[device]) + 1)})
}

// of gives the kinds of the answers to a command as they came, each followed by what they say.
func (s *station) of(id string) (kinds []string, bodies []said) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.answers {
		if a.id == id {
			kinds = append(kinds, a.kind)
			bodies = append(bodies, a)
		}
	}
	return kinds, bodies
}

// views is each command with the outcome that came first, as a gateway would see it.
func (s *station) views() (views []firmwaresim.CommandView) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for device, orders := range s.orders {
		for _, o := range orders {
			v := firmwaresim.CommandView{Device: device, ID: o.id, State: "QUEUED"}
			if o.acked {
				v.State = "DELIVERED"
			}
			for _, a := range s.answers {
				if a.device == device && a.id == o.id && slices.Contains([]string{"succeeded", "failed", "rejected"}, a.kind) {
					v.State = strings.ToUpper(a.kind)
					break
				}
			}
			views = append(views, v)
		}
	}
	return views
}

// commanded runs a fleet that takes commands until the test stops it.
func commanded(t *testing.T, cfg firmwaresim.Config) (f *firmwaresim.Fleet, stop func() firmwaresim.Report) {
	t.Helper()
	cfg.Commands = true
	f, err := firmwaresim.New(cfg, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	var r firmwaresim.Report
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		if r, err = f.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = func() firmwaresim.Report {
		cancel()
		<-done
		return r
	}
	t.Cleanup(func() { stop() })
	return f, stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 30 s for %s", what)
		}
	}
}

func (s *station) answered(id, kind string) func() bool {
	return func() bool {
		kinds, _ := s.of(id)
		return slices.Contains(kinds, kind)
	}
}

func TestEachBehaviour(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		s := newStation(t, v)
		const d = "sim-00001"
		s.order(d, "1", "anything", `{"n":1}`)
		s.order(d, "2", "echo", `"said"`)
		s.order(d, "3", "update", `{"n":2,"url":"x"}`)
		s.order(d, "4", "fail", "")
		s.order(d, "5", "reject", "")
		s.order(d, "6", "ignore", "")
		s.order(d, "7", "slow", "\x00\x01")
		s.order(d, "8", "query", "[]")
		s.order(d, "9", "blink", "{}")
		s.order(d, "10", "reboot", "")
		s.order(d, "11", "echo", `{"n":3}`)
		f, stop := commanded(t, firmwaresim.Config{
			Broker: "mqtt://" + s.Addr, Version: v, Rate: 50, QoS: firmwaresim.QoS1,
			Execution: firmwaresim.Execution{Duration: 5 * time.Millisecond, Progress: 1, Names: map[string]firmwaresim.Behaviour{"blink": firmwaresim.Slow}},
		})
		eventually(t, "the last command", s.answered("11", "succeeded"))
		r := stop()
		for id, want := range map[string]string{
			"1": "accepted progress succeeded", "2": "accepted succeeded",
			"3": "accepted" + strings.Repeat(" progress", 10) + " succeeded",
			"4": "accepted progress failed", "5": "rejected", "6": "", "7": "accepted succeeded", "8": "accepted progress succeeded", "9": "accepted succeeded",
			"10": "accepted succeeded", "11": "accepted succeeded",
		} {
			if kinds, _ := s.of(id); strings.Join(kinds, " ") != want {
				t.Errorf("command %s was answered by %q, want %q", id, kinds, want)
			}
		}
		_, echo := s.of("2")
		if a := echo[1]; a.body != `"said"` {
			t.Errorf("the echo is %+v", a)
		}
		_, update := s.of("3")
		var p struct {
			Percent int
			Text    string
		}
		if err := json.Unmarshal([]byte(update[5].body), &p); err != nil || p.Percent != 45 || p.Text != "step 5 of 11" {
			t.Errorf("progress %+v, %v", update[5], err)
		}
		if v == mqtt.V5 && update[5].media != "application/json" {
			t.Errorf("progress is %q", update[5].media)
		}
		l := f.CommandLedger()
		verdict := l.Verify(s.views())
		// The one that is ignored stays DELIVERED.
		if !verdict.OK() || verdict.Received != 11 || verdict.Executed != 9 || verdict.Open != 1 {
			t.Errorf("%v", verdict)
		}
		if x, ok := l.Get(d, "10"); !ok || x.Name != "reboot" || x.Executed != 1 || x.Outcome != "succeeded" || !x.Acknowledged || x.Open {
			t.Errorf("%+v", x)
		}
		if x, _ := l.Get(d, "6"); x.Executed != 0 || x.Outcome != "" || x.Open || x.Acknowledged {
			t.Errorf("%+v", x)
		}
		if r.Crashes != 1 || r.Commands.Received != 11 || r.Commands.Answered != 10 || r.Commands.Open != 0 || r.Answers != 0 || r.Unacknowledged != 0 || r.FirstCommand.Max <= 0 {
			t.Errorf("%+v", r)
		}
		// The reboot began a new session, and subscribed again.
		if want := map[mqtt.Version]int{mqtt.V5: 2, mqtt.V311: 2}[v]; s.clean[d] != want || s.subscribed[d] != 2 {
			t.Errorf("%d clean starts, %d subscriptions", s.clean[d], s.subscribed[d])
		}
		if text := r.String(); !strings.Contains(text, "commands           11 received") || !strings.Contains(text, "first command") {
			t.Errorf("the report does not tell of commands:\n%s", text)
		}
	})
}

func TestOutcomesByProbability(t *testing.T) {
	s := newStation(t, mqtt.V5)
	const commands = 200
	for i := range commands {
		s.order("sim-00001", fmt.Sprint(i), "set", fmt.Sprintf(`{"n":%d}`, i+1))
	}
	f, stop := commanded(t, firmwaresim.Config{
		Broker: "mqtt://" + s.Addr, NoSamples: true, Seed: 5,
		Execution: firmwaresim.Execution{Duration: -1, Progress: -1, Fail: 0.2, Reject: 0.2, Ignore: 0.2},
	})
	eventually(t, "all commands", func() bool {
		c := f.Snapshot().Commands
		return c.Received == commands && c.Open == 0
	})
	r := stop()
	count := map[string]int{}
	for _, x := range f.CommandLedger().Records() {
		count[x.Outcome]++
	}
	for outcome, want := range map[string]int{"succeeded": 80, "failed": 40, "rejected": 40, "": 40} {
		if n := count[outcome]; n < want/2 || n > want*2 {
			t.Errorf("%d commands with outcome %q, want about %d", n, outcome, want)
		}
	}
	if v := f.CommandLedger().Verify(s.views()); !v.OK() || v.Open != uint64(count[""]) {
		t.Errorf("%v", v)
	}
	if r.Sampled != 0 || r.Published != 0 {
		t.Errorf("samples although there are to be none: %+v", r.Snapshot)
	}
}

func TestARepeatIsAnsweredFromFlash(t *testing.T) {
	s := newStation(t, mqtt.V5)
	const d = "sim-00001"
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, NoSamples: true, Execution: firmwaresim.Execution{Duration: -1, Progress: -1}})
	s.order(d, "a", "echo", `{"n":7}`)
	eventually(t, "the outcome", s.answered("a", "succeeded"))
	s.order(d, "r", "reboot", "") // flash survives it
	eventually(t, "the reboot", s.answered("r", "succeeded"))
	s.order(d, "a", "echo", `{"n":8}`)
	eventually(t, "the answer to the repeat", func() bool {
		kinds, _ := s.of("a")
		return len(kinds) == 3
	})
	s.order(d, "other", "echo", "")
	eventually(t, "another", s.answered("other", "succeeded"))
	stop()
	kinds, bodies := s.of("a")
	if !slices.Equal(kinds, []string{"accepted", "succeeded", "succeeded"}) || bodies[1] != bodies[2] || bodies[2].body != `{"n":7}` {
		t.Errorf("answers %+v", bodies)
	}
	if x, _ := f.CommandLedger().Get(d, "a"); x.Received != 2 || x.Executed != 1 || x.N != 7 {
		t.Errorf("%+v", x)
	}
}

// What a device has forgotten it does again: the ledger has to see that.
func TestADeviceForgets(t *testing.T) {
	s := newStation(t, mqtt.V5)
	const d = "sim-00001"
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, NoSamples: true, Execution: firmwaresim.Execution{Duration: -1, Progress: -1}})
	s.order(d, "first", "set", "")
	for i := range firmwaresim.Remembered {
		s.order(d, fmt.Sprint(i), "set", "")
	}
	eventually(t, "all", s.answered(fmt.Sprint(firmwaresim.Remembered-1), "succeeded"))
	s.order(d, "1", "set", "")     // still there
	s.order(d, "first", "set", "") // not any more
	eventually(t, "the second time", func() bool {
		x, _ := f.CommandLedger().Get(d, "first")
		return x.Executed == 2 && !x.Open
	})
	stop()
	v := f.CommandLedger().Verify(nil)
	if v.ExecutedTwice != 1 || v.OK() || v.Received != firmwaresim.Remembered+1 || v.Repeats != 2 || len(v.Examples) != 1 {
		t.Errorf("%v", v)
	}
}

func TestFlashTakesOnlySoManyCommands(t *testing.T) {
	s := newStation(t, mqtt.V5)
	const d = "sim-00001"
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, NoSamples: true, Drain: -1, Execution: firmwaresim.Execution{Duration: time.Hour}})
	for i := range firmwaresim.Remembered + 1 {
		s.order(d, fmt.Sprint(i), "set", "")
	}
	eventually(t, "all PUBACKs", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !slices.ContainsFunc(s.orders[d], func(o *sent) bool { return !o.acked })
	})
	r := stop()
	if last := s.orders[d][firmwaresim.Remembered]; last.reason != mqtt.QuotaExceeded {
		t.Errorf("one too many is answered by %v", last.reason)
	}
	if _, ok := f.CommandLedger().Get(d, fmt.Sprint(firmwaresim.Remembered)); ok || r.Commands.Open != firmwaresim.Remembered {
		t.Errorf("%+v", r.Commands)
	}
}

func TestARestartInterruptsACommand(t *testing.T) {
	t.Parallel()
	s := newStation(t, mqtt.V5)
	const d = "sim-00001"
	s.order(d, "slow", "slow", `{"n":1}`)
	s.order(d, "waits", "echo", `{"n":2}`)
	s.order(d, "query", "query", `{"n":3}`)
	f, stop := commanded(t, firmwaresim.Config{
		Broker: "mqtt://" + s.Addr, NoSamples: true, Crash: 0.9, Seed: 1, MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond, Drain: 20 * time.Second,
		Execution: firmwaresim.Execution{Duration: 3 * time.Second, Names: map[string]firmwaresim.Behaviour{"query": firmwaresim.Query}},
	})
	eventually(t, "the query to be begun again", func() bool {
		x, _ := f.CommandLedger().Get(d, "query")
		return x.Resumed > 0
	})
	stop() // no more crashes: it comes to its end now
	if kinds, bodies := s.of("slow"); !slices.Equal(slices.Compact(kinds), []string{"accepted", "failed"}) || !strings.Contains(bodies[len(bodies)-1].body, "interrupted by a restart") {
		t.Errorf("%+v", bodies)
	}
	l := f.CommandLedger()
	if x, _ := l.Get(d, "query"); x.Outcome != "succeeded" || x.Executed != 1 {
		t.Errorf("%+v", x)
	}
	if x, _ := l.Get(d, "waits"); x.Outcome != "succeeded" || x.Executed != 1 {
		t.Errorf("%+v", x)
	}
	if v := l.Verify(s.views()); !v.OK() || v.Open != 0 {
		t.Errorf("%v", v)
	}
}

// TestCommandsSurviveEverything lets links break and devices crash while the server swallows acknowledgements, hangs
// up, and refuses answers for now.
func TestCommandsSurviveEverything(t *testing.T) {
	t.Parallel()
	versions(t, func(t *testing.T, v mqtt.Version) {
		s := newStation(t, v)
		s.judge = func(_ said, n int) mqtttest.Answer {
			switch {
			case n%17 == 0:
				return mqtttest.Answer{Silent: true, Close: true}
			case n%19 == 0:
				return mqtttest.Answer{Close: true}
			case n%23 == 0 && v == mqtt.V5:
				return mqtttest.Answer{Reason: mqtt.QuotaExceeded}
			}
			return mqtttest.Answer{}
		}
		s.deaf = 13
		const devices, commands = 10, 12
		f, stop := commanded(t, firmwaresim.Config{
			Broker: "mqtt://" + s.Addr, Version: v, Devices: devices, Rate: 50, Flaky: 0.5, Crash: 0.3, Seed: 11, Drain: 20 * time.Second,
			MinBackoff: 5 * time.Millisecond, MaxBackoff: 50 * time.Millisecond, Execution: firmwaresim.Execution{Duration: 20 * time.Millisecond, Fail: 0.1, Reject: 0.1},
		})
		for i := range commands {
			for _, d := range f.DeviceIDs() {
				s.order(d, fmt.Sprintf("%s.%d", d, i), []string{"set", "echo", "query", "reboot"}[i%4], fmt.Sprintf(`{"n":%d}`, i+1))
			}
		}
		eventually(t, "all outcomes", func() bool {
			c := f.Snapshot().Commands
			return c.Received == devices*commands && c.Open == 0
		})
		r := stop()
		verdict := f.CommandLedger().Verify(s.views())
		t.Logf("\n%v%v", r, verdict)
		if !verdict.OK() || verdict.Open != 0 || verdict.Repeats == 0 || r.Answers != 0 || r.Unacknowledged != 0 {
			t.Errorf("%v", verdict)
		}
		if r.Breaks == 0 || r.Crashes == 0 || r.Commands.Refused != 0 || r.Commands.Answered != devices*commands {
			t.Errorf("%+v", r.Snapshot)
		}
	})
}

// An answer that is refused for good is given up, and the ledger does not say that it was acknowledged.
func TestAnswersMayBeRefused(t *testing.T) {
	s := newStation(t, mqtt.V5)
	s.judge = func(a said, _ int) mqtttest.Answer {
		if a.kind == "succeeded" {
			return mqtttest.Answer{Reason: mqtt.NotAuthorized}
		}
		return mqtttest.Answer{}
	}
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, NoSamples: true, Execution: firmwaresim.Execution{Duration: -1}})
	s.order("sim-00001", "a", "set", "")
	eventually(t, "the refusal", func() bool { return f.Snapshot().Commands.Refused == 1 })
	r := stop()
	if x, _ := f.CommandLedger().Get("sim-00001", "a"); x.Outcome != "succeeded" || x.Acknowledged || r.Answers != 0 {
		t.Errorf("%+v", x)
	}
}

func TestWhatIsNoCommandIsCounted(t *testing.T) {
	s := newStation(t, mqtt.V5)
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, NoSamples: true})
	eventually(t, "the device", func() bool { return f.Snapshot().Connected == 1 })
	for _, topic := range []string{"cmd/another/req/1/set", "cmd/sim-00001/req/1", "x"} {
		s.Send("sim-00001", mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{Topic: []byte(topic)}))
	}
	eventually(t, "all", func() bool { return f.Snapshot().Commands.Strange == 3 })
	if r := stop(); r.Commands.Received != 0 {
		t.Errorf("%+v", r.Commands)
	}
}

func TestSleepersKeepTheirSession(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		s := newStation(t, v)
		f, stop := commanded(t, firmwaresim.Config{
			Broker: "mqtt://" + s.Addr, Version: v, Devices: 5, Rate: 20, QoS: firmwaresim.QoS1, Awake: 30 * time.Millisecond, Period: 200 * time.Millisecond,
			MinBackoff: time.Millisecond, Execution: firmwaresim.Execution{Duration: 50 * time.Millisecond, Progress: -1},
		})
		eventually(t, "some to sleep and some to have slept", func() bool {
			x := f.Snapshot()
			return x.Asleep > 0 && x.Connects >= 15 && x.Asleep+x.Connected <= 5
		})
		for _, d := range f.DeviceIDs() {
			s.order(d, "1-"+d, "set", "")
			s.order(d, "2-"+d, "echo", "")
		}
		// Longer than the device is awake: the outcome comes when it wakes up again.
		eventually(t, "all outcomes", func() bool { return f.Snapshot().Commands.Answered == 10 })
		r := stop()
		if verdict := f.CommandLedger().Verify(s.views()); !verdict.OK() || verdict.Open != 0 || r.Unacknowledged != 0 {
			t.Errorf("%v\n%v", verdict, r)
		}
		if len(r.Errors) > 0 {
			t.Errorf("sleeping is no fault: %v", r.Errors)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range f.DeviceIDs() {
			if s.clean[d] != 1 || s.subscribed[d] != 1 || s.disconnect[d] < 3 {
				t.Errorf("%s began %d sessions, subscribed %d times, disconnected %d times", d, s.clean[d], s.subscribed[d], s.disconnect[d])
			}
		}
	})
}

func TestSleepAndWake(t *testing.T) {
	s := newStation(t, mqtt.V5)
	f, stop := commanded(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, Devices: 6, NoSamples: true, Execution: firmwaresim.Execution{Duration: -1}})
	f.Sleep("sim-00006")
	eventually(t, "five devices", func() bool { return f.Snapshot().Connected == 5 })
	f.Sleep("sim-00001", "sim-00002")
	eventually(t, "two to sleep", func() bool { return s.Connected() == 3 })
	if x := f.Snapshot(); x.Asleep != 3 || x.Connected != 3 {
		t.Errorf("%+v", x)
	}
	f.Wake(10*time.Millisecond, "sim-00002")
	eventually(t, "one to wake", func() bool { return f.Snapshot().Connected == 4 })
	f.Sleep()
	eventually(t, "all to sleep", func() bool { return s.Connected() == 0 })
	for _, d := range f.DeviceIDs() {
		s.order(d, d, "set", "")
	}
	f.Wake(50 * time.Millisecond)
	eventually(t, "all outcomes", func() bool { return f.Snapshot().Commands.Answered == 6 })
	r := stop()
	f.Sleep() // too late
	if len(r.Errors) > 0 || f.Snapshot().Connected != 0 {
		t.Errorf("%+v", r)
	}
}

// A command can reach a device before the device knows that it is connected, or while it falls asleep.
func TestCommandsMeetSleepers(t *testing.T) {
	t.Parallel()
	s := newStation(t, mqtt.V5)
	f, stop := commanded(t, firmwaresim.Config{
		Broker: "mqtt://" + s.Addr, Devices: 20, NoSamples: true, Awake: 5 * time.Millisecond, Period: 20 * time.Millisecond, Flaky: 0.5, Crash: 0.05,
		MinBackoff: time.Millisecond, MaxBackoff: 5 * time.Millisecond, Drain: 20 * time.Second, Execution: firmwaresim.Execution{Duration: time.Millisecond},
	})
	const commands = 20
	for i := range commands {
		for _, d := range f.DeviceIDs() {
			s.order(d, fmt.Sprintf("%s.%d", d, i), "query", fmt.Sprintf(`{"n":%d}`, i+1))
		}
	}
	eventually(t, "all commands", func() bool { return f.Snapshot().Commands.Answered == 20*commands })
	r := stop()
	if verdict := f.CommandLedger().Verify(s.views()); !verdict.OK() || verdict.Open != 0 || r.Answers != 0 {
		t.Errorf("%v\n%v", verdict, r)
	}
}

func TestCommandsAgainstMosquitto(t *testing.T) {
	t.Parallel()
	addr := testkit.StartMosquitto(t).Addr
	versions(t, func(t *testing.T, v mqtt.Version) {
		prefix := fmt.Sprintf("v%d", byte(v))
		var mu sync.Mutex
		outcomes := map[string]string{}
		c, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
			Address: addr, Connect: mqtt.Connect{Version: v, ClientID: "cloud-" + prefix, CleanStart: true},
			OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
				if device, id, kind, ok := wire.ParseAnswerTopic(p.Topic); ok && strings.HasPrefix(device, prefix) && kind != "accepted" && kind != "progress" {
					mu.Lock()
					outcomes[id] = kind
					mu.Unlock()
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Disconnect(mqtt.Success) }()
		if _, err := c.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/+/res/#", QoS: 1}}}); err != nil {
			t.Fatal(err)
		}
		f, stop := commanded(t, firmwaresim.Config{
			Broker: "mqtt://" + addr, Version: v, Prefix: prefix, Devices: 10, Rate: 20, Flaky: 0.3, Seed: 3,
			MinBackoff: 5 * time.Millisecond, MaxBackoff: 50 * time.Millisecond, Execution: firmwaresim.Execution{Duration: 10 * time.Millisecond},
		})
		eventually(t, "all devices to subscribe", func() bool { return f.Snapshot().Subscribed == 10 })
		f.Sleep() // mosquitto keeps what comes for their sessions
		for i := range 3 {
			for _, d := range f.DeviceIDs() {
				p := mqtt.Publish{QoS: 1, ID: uint16(i*100 + slices.Index(f.DeviceIDs(), d) + 1), Topic: []byte(wire.RequestTopic(d, fmt.Sprintf("%s.%d", d, i), "set")), Payload: fmt.Appendf(nil, `{"n":%d}`, i+1)}
				if err := c.Publish(&p); err != nil {
					t.Fatal(err)
				}
			}
		}
		f.Wake(100 * time.Millisecond)
		eventually(t, "all outcomes", func() bool { return f.Snapshot().Commands.Answered == 30 })
		stop()
		verdict := f.CommandLedger().Verify(nil)
		eventually(t, "all outcomes to arrive", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(outcomes) == 30
		})
		if !verdict.OK() || verdict.Received != 30 || verdict.Executed != 30 {
			t.Errorf("%v", verdict)
		}
	})
}

func TestVerifyCommands(t *testing.T) {
	type record = firmwaresim.CommandRecord
	type view = firmwaresim.CommandView
	done := func(id string, n uint64) record {
		return record{Device: "d", ID: id, Name: "set", N: n, Received: 1, Executed: 1, Outcome: "succeeded", Acknowledged: true}
	}
	with := func(r record, change func(*record)) record {
		change(&r)
		return r
	}
	for _, c := range []struct {
		name    string
		records []record
		views   []view
		wrong   string // one field of the verdict, "" none
		count   uint64
		example string
	}{
		{name: "all well", records: []record{done("a", 1), done("b", 2)}, views: []view{{Device: "d", ID: "a", State: "SUCCEEDED"}, {Device: "d", ID: "b", State: "SUCCEEDED"}}},
		{name: "not looked at from outside", records: []record{done("a", 1)}},
		{name: "executed twice", records: []record{with(done("a", 1), func(r *record) { r.Executed = 2 })}, wrong: "executed_twice", count: 1, example: "d a: set was executed 2 times"},
		{name: "forgotten and executed again", records: []record{done("a", 1), done("b", 2), done("a", 0)}, wrong: "executed_twice", count: 1, example: "d a"},
		{name: "out of order", records: []record{done("b", 2), done("a", 1)}, wrong: "out_of_order", count: 1, example: "d a: n=1 came first after n=2"},
		{name: "urgent has no number", records: []record{done("b", 2), done("u", 0), done("c", 3)}},
		{name: "order is by device", records: []record{done("b", 2), with(done("a", 1), func(r *record) { r.Device = "e" })}},
		{name: "lost", views: []view{{Device: "d", ID: "a", State: "TIMED_OUT"}}, wrong: "lost", count: 1, example: "d a: TIMED_OUT, but the device never had it"},
		{name: "not sent yet", views: []view{{Device: "d", ID: "a", State: "QUEUED"}}, wrong: "open", count: 1},
		{name: "expired", views: []view{{Device: "d", ID: "a", State: "EXPIRED"}}},
		{name: "expired, for the PUBACK was lost", records: []record{{Device: "d", ID: "a", Received: 1}}, views: []view{{Device: "d", ID: "a", State: "EXPIRED"}}},
		{name: "the outcome was acknowledged and is not seen", records: []record{done("a", 1)}, views: []view{{Device: "d", ID: "a", State: "TIMED_OUT"}}, wrong: "disagreed", count: 1, example: "d a: TIMED_OUT, but the device was acknowledged that it succeeded"},
		{name: "another outcome", records: []record{done("a", 1)}, views: []view{{Device: "d", ID: "a", State: "FAILED"}}, wrong: "disagreed", count: 1, example: `d a: FAILED, but the device says "succeeded"`},
		{name: "an outcome of nobody", records: []record{{Device: "d", ID: "a", Received: 1}}, views: []view{{Device: "d", ID: "a", State: "REJECTED"}}, wrong: "disagreed", count: 1, example: `d a: REJECTED, but the device says "nothing"`},
		{name: "one way", records: []record{done("a", 1)}, views: []view{{Device: "d", ID: "a", State: "DELIVERED", OneWay: true}}},
		{name: "invented", records: []record{done("a", 1)}, views: []view{}, wrong: "unknown", count: 1, example: "d a: nobody has sent it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := firmwaresim.NewCommandLedger(c.records).Verify(c.views)
			b, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]any{}
			if err := json.Unmarshal(b, &got); err != nil {
				t.Fatal(err)
			}
			for _, field := range []string{"executed_twice", "out_of_order", "lost", "disagreed", "unknown", "open"} {
				want := uint64(0)
				if field == c.wrong {
					want = c.count
				}
				if uint64(got[field].(float64)) != want {
					t.Errorf("%s is %v, want %d: %v", field, got[field], want, v)
				}
			}
			if ok := c.wrong == "" || c.wrong == "open"; v.OK() != ok || c.example != "" && (len(v.Examples) != 1 || !strings.HasPrefix(v.Examples[0], c.example)) {
				t.Errorf("OK is %v, %v", v.OK(), v)
			}
		})
	}
	if b, err := json.Marshal(firmwaresim.NewCommandLedger(nil)); err != nil || !bytes.Equal(b, []byte("[]")) {
		t.Errorf("an empty ledger is %s, %v", b, err)
	}
}

func TestCommandConfigErrors(t *testing.T) {
	_, err := firmwaresim.New(firmwaresim.Config{
		Broker: "mqtt://x", Awake: time.Hour, Execution: firmwaresim.Execution{Fail: 0.7, Reject: 0.7, Progress: 200, Names: map[string]firmwaresim.Behaviour{"x": 99}},
	}, nil)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"awake 1h0m0s in each 1m0s", "fail 0.7, reject 0.7", "progress 200", `behaviour 99 of command "x"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	if _, err := firmwaresim.ParseBehaviour("dance"); err == nil || !strings.Contains(err.Error(), "reboot") {
		t.Errorf("%v", err)
	}
	for _, b := range []firmwaresim.Behaviour{firmwaresim.Do, firmwaresim.Ignore} {
		if got, err := firmwaresim.ParseBehaviour(b.String()); err != nil || got != b {
			t.Errorf("%v, %v", got, err)
		}
	}
}
