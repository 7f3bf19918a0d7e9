package e2e_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// order submits a command over the API.
func order(t *testing.T, g *testkit.Gateway, device, id string, more map[string]any) {
	t.Helper()
	body := map[string]any{"id": id, "name": "work"}
	for k, v := range more {
		body[k] = v
	}
	if _, err := g.Call(http.MethodPost, "/api/v1/devices/"+device+"/commands", body, http.StatusCreated); err != nil {
		t.Fatal(err)
	}
}

// becomes waits until the API tells of a state.
func becomes(t *testing.T, g *testkit.Gateway, id, state string) (v commandView) {
	t.Helper()
	testkit.EventuallyNil(t, 20*time.Second, id+" is "+state, func() (err error) {
		if v, err = command(t, g, id); err == nil && v.State != state {
			err = fmt.Errorf("it is %+v", v)
		}
		return err
	})
	return v
}

// grain is by how much two times of a history may be nearer to each other than what lay between them: both are cut to
// milliseconds, and so is the clock that time-outs go by.
const grain = 2 * time.Millisecond

// steps are the states of the history.
func (v *commandView) steps() string {
	var s []string
	for _, step := range v.History {
		s = append(s, step.State)
	}
	return strings.Join(s, " ")
}

// at is when a command came into a state for the first time.
func (v *commandView) at(t *testing.T, state string) time.Time {
	t.Helper()
	for _, step := range v.History {
		if step.State == state {
			return step.At
		}
	}
	t.Fatalf("%s was never %s: %s", v.ID, state, v.steps())
	return time.Time{}
}

// TestCommandsFromTwoUpstreams has two clouds that command the same device: both are told of every step, each of what was refused to
// it, and an id is one command whoever uses it, also when both submit it while the gateway is down.
func TestCommandsFromTwoUpstreams(t *testing.T) {
	t.Parallel()
	path := bin(t)
	brokers := []*testkit.Mosquitto{testkit.StartMosquitto(t), testkit.StartMosquitto(t)}
	a, b := openOffice(t, brokers[0].Addr), openOffice(t, brokers[1].Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: a, url: %q }\n  - { name: b, url: %q, format: cloudevents }\n",
		brokers[0].URL(), brokers[1].URL()))
	w := startWorker(t, g.Addr, "shared", mqtt.V5, "accepted", "succeeded")
	w.here()
	g.AwaitCommands(t)
	both := func(id, end string) commandView {
		t.Helper()
		agree(t, g, a, w, id, end, false)
		return agree(t, g, b, w, id, end, false)
	}
	refused := func(by, other *office, device, id, code string) {
		t.Helper()
		testkit.Eventually(t, 10*time.Second, id+" is refused", func() bool { return len(by.refusals(id)) > 0 })
		// What comes through to the other after that would have come after a refusal, too.
		fence := "after-" + id + "-" + code
		by.submit(w.id, fence, nil)
		both(fence, "SUCCEEDED")
		if got := by.refusals(id); !slices.Equal(got, []string{code}) {
			t.Errorf("%s to %s was refused %v, want %s", id, device, got, code)
		}
		if got := other.refusals(id); len(got) > 0 {
			t.Errorf("%s to %s: a refusal was told to who had not asked: %v", id, device, got)
		}
	}

	a.submit(w.id, "of-a", nil)
	b.submit(w.id, "of-b", nil)
	both("of-a", "SUCCEEDED")
	both("of-b", "SUCCEEDED")

	a.submit("nobody", "to-nobody", nil)
	refused(a, b, "nobody", "to-nobody", "unknown_device")
	if got := b.all("to-nobody"); len(got) > 0 {
		t.Errorf("b was told of %+v", got)
	}
	b.submit(w.id, "too-late", map[string]any{"ttl": 0})
	refused(b, a, w.id, "too-late", "expired")

	w.set(false) // it takes them and says nothing
	a.submit(w.id, "used", map[string]any{"payload": "one"})
	becomes(t, g, "used", "DELIVERED")
	b.submit(w.id, "used", map[string]any{"payload": "two"})
	w.say("used", "accepted") // else the fence would wait behind it
	w.set(false, "accepted", "succeeded")
	w.say("used", "succeeded")
	refused(b, a, w.id, "used", "conflict")
	if v := both("used", "SUCCEEDED"); v.Payload != "one" {
		t.Errorf("the payload is %q", v.Payload)
	}

	// Each may call off what the other has asked for.
	w.set(false)
	a.submit(w.id, "called-off", nil)
	becomes(t, g, "called-off", "DELIVERED")
	b.cancel(w.id, "called-off")
	both("called-off", "CANCELED")
	w.set(false, "accepted", "succeeded")
	b.cancel(w.id, "never-was")
	refused(b, a, w.id, "never-was", "unknown_command")

	var ids []string
	g.Kill()
	var asking sync.WaitGroup
	for n := range 20 {
		ids = append(ids, fmt.Sprintf("of-both-%d", n))
	}
	for _, o := range []*office{a, b} {
		asking.Go(func() {
			for _, id := range ids {
				o.submit(w.id, id, map[string]any{"payload": map[string]any{"id": id}})
			}
		})
	}
	asking.Wait()
	g.Restart()
	for _, id := range ids {
		both(id, "SUCCEEDED")
		repeats := 0
		testkit.Eventually(t, 10*time.Second, "who asked second is answered", func() bool {
			repeats = 0
			for _, e := range append(a.all(id), b.all(id)...) {
				if e.Repeat {
					repeats++
				}
			}
			return repeats > 0
		})
		if received, executed := w.seen(id); executed != 1 || received != 1 {
			t.Errorf("%s came %d times and was executed %d times", id, received, executed)
		}
		if repeats != 1 || len(a.refusals(id))+len(b.refusals(id)) > 0 {
			t.Errorf("%s: %d answers to a repeat, refusals %v and %v", id, repeats, a.refusals(id), b.refusals(id))
		}
	}
	for _, up := range []string{"a", "b"} {
		drained(t, g, up, 20*time.Second)
	}
	balanced(t, g)
}

// TestUpstreamBrokerRestarts restarts the upstream broker while commands wait there for the gateway. What the broker has kept
// comes; what it has lost is all that is lost: the subscription is made again, new commands come, and the events of what the gateway did meanwhile.
func TestUpstreamBrokerRestarts(t *testing.T) {
	for _, c := range []struct {
		name string
		conf []string
		kept bool
		down bool // the gateway, too
		kill bool
	}{
		{name: "persistent, stopped", conf: []string{"persistence true"}, kept: true},
		{name: "persistent, killed", conf: []string{"persistence true", "autosave_on_changes true", "autosave_interval 1"}, kept: true, kill: true},
		{name: "persistent, the gateway killed too", conf: []string{"persistence true"}, kept: true, down: true},
		{name: "forgetful", kill: true},
		{name: "forgetful, the gateway killed too", down: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := bin(t)
			up := testkit.StartMosquitto(t, c.conf...)
			link := testkit.StartProxy(t, up.Addr)
			o := openOffice(t, up.Addr)
			g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", "mqtt://"+link.Addr()))
			w := startWorker(t, g.Addr, "dev", mqtt.V311, "accepted", "succeeded")
			w.here()
			g.AwaitCommands(t)
			o.submit(w.id, "before", nil)
			agree(t, g, o, w, "before", "SUCCEEDED", false)
			drained(t, g, "cloud", 10*time.Second) // a broker that forgets forgets what is on its way to the office, too

			link.Set(testkit.Faults{Refuse: true})
			link.Reset()
			testkit.Eventually(t, 10*time.Second, "the gateway knows that no commands come", func() bool {
				s, err := g.Status()
				return err == nil && !s.Upstreams[0].Commands
			})
			order(t, g, w.id, "meanwhile", nil)
			becomes(t, g, "meanwhile", "SUCCEEDED")
			if c.down {
				g.Kill()
			}
			var waiting []string
			for n := range 20 {
				id := fmt.Sprintf("waiting-%d", n)
				waiting = append(waiting, id)
				o.submit(w.id, id, nil)
			}
			const perhaps = "perhaps" // mosquitto saves when there is more than one change that it has not saved
			if c.kept && c.kill {
				o.submit(w.id, perhaps, nil)
			}
			if c.kill {
				up.Kill()
			} else if code := up.Stop(); code != 0 {
				t.Fatalf("mosquitto ended with %d", code)
			}
			up.Restart()
			o.connect(up.Addr)
			link.Set(testkit.Faults{})
			if c.down {
				g.Restart()
			}
			g.AwaitCommands(t)
			var after []string
			for n := range 5 {
				id := fmt.Sprintf("after-%d", n)
				after = append(after, id)
				o.submit(w.id, id, nil)
			}
			for _, id := range after {
				agree(t, g, o, w, id, "SUCCEEDED", false)
			}
			agree(t, g, o, w, "meanwhile", "SUCCEEDED", false)
			want := append([]string{"before", "meanwhile"}, waiting...)
			if c.kept {
				for _, id := range waiting {
					agree(t, g, o, w, id, "SUCCEEDED", false)
				}
			} else {
				want = want[:2]
				for _, id := range waiting {
					if _, err := g.Call(http.MethodGet, "/api/v1/commands/"+id, nil, http.StatusNotFound); err != nil {
						t.Error(err)
					}
				}
			}
			got := slices.DeleteFunc(w.came(), func(id string) bool { return id == perhaps })
			if want = append(want, after...); !slices.Equal(got, want) {
				t.Errorf("the device got %v, want %v", got, want)
			}
			if lost := !c.kept && !c.down; strings.Contains(g.Logs(), "has forgotten the session") != lost {
				t.Errorf("the log tells that the broker has forgotten the session: %v, want %v", !lost, lost)
			}
		})
	}
}

// TestCommandTimes goes through what happens to a command by time alone.
func TestCommandTimes(t *testing.T) {
	t.Parallel()
	path := bin(t)
	up := testkit.StartMosquitto(t)
	o := openOffice(t, up.Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"devices: { anonymous: true, commands: { ack_timeout: 1s } }\n"+
		fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	all := []string{"accepted", "progress", "succeeded"}
	untilReceived := func(t *testing.T, w *worker, id string, times int) {
		t.Helper()
		testkit.Eventually(t, 20*time.Second, fmt.Sprintf("%s has come %d times", id, times), func() bool {
			received, _ := w.seen(id)
			return received >= times
		})
	}
	stories := map[string]func(t *testing.T, w *worker){
		"attempts are used up": func(t *testing.T, w *worker) {
			w.set(true)
			id := w.id + ".a"
			order(t, g, w.id, id, map[string]any{"max_attempts": 2})
			v := agree(t, g, o, w, id, "DEAD_LETTERED", false)
			if received, _ := w.seen(id); v.steps() != "QUEUED SENT QUEUED SENT DEAD_LETTERED" || received != 2 || v.Attempts != 2 {
				t.Errorf("received %d times; %+v", received, v)
			}
			if want := "sent 2 times and never acknowledged; the last time: no acknowledgement within 1s"; v.Reason != want {
				t.Errorf("reason %q, want %q", v.Reason, want)
			}
			w.set(false, all...)
			order(t, g, w.id, w.id+".b", nil) // it holds up nobody
			agree(t, g, o, w, w.id+".b", "SUCCEEDED", false)
			w.say(id, "succeeded")
			if v = agree(t, g, o, w, id, "SUCCEEDED", false); !v.Late {
				t.Errorf("not marked late: %+v", v)
			}
		},
		"no acknowledgement in time": func(t *testing.T, w *worker) {
			w.set(true)
			id := w.id + ".a"
			order(t, g, w.id, id, nil)
			untilReceived(t, w, id, 1)
			w.set(false, all...)
			v := agree(t, g, o, w, id, "SUCCEEDED", false)
			if received, _ := w.seen(id); v.Attempts != 2 || received != 2 {
				t.Errorf("received %d times; %+v", received, v)
			}
			if d := v.History[2].At.Sub(v.at(t, "SENT")); d < time.Second-grain || v.History[2].Reason != "no acknowledgement within 1s" {
				t.Errorf("put back after %v: %s", d, v.History[2].Reason)
			}
		},
		"no outcome in time": func(t *testing.T, w *worker) {
			w.set(false, "accepted")
			id := w.id + ".a"
			order(t, g, w.id, id, map[string]any{"execution_timeout": "700ms"})
			v := agree(t, g, o, w, id, "TIMED_OUT", false)
			if d := v.at(t, "TIMED_OUT").Sub(v.at(t, "DELIVERED")); d < 700*time.Millisecond-grain || v.Late {
				t.Errorf("timed out after %v: %+v", d, v)
			}
			w.say(id, "progress") // is not believed any more
			w.say(id, "succeeded")
			if v = agree(t, g, o, w, id, "SUCCEEDED", false); !v.Late || v.Reason != "it was TIMED_OUT before" || v.Result == "" {
				t.Errorf("%+v", v)
			}
			w.say(id, "failed") // the first outcome stands
			w.set(false, all...)
			order(t, g, w.id, w.id+".b", nil)
			agree(t, g, o, w, w.id+".b", "SUCCEEDED", false)
			if v = agree(t, g, o, w, id, "SUCCEEDED", false); v.steps() != "QUEUED SENT DELIVERED IN_PROGRESS TIMED_OUT SUCCEEDED" {
				t.Errorf("%s", v.steps())
			}
		},
		"expires while its device is away": func(t *testing.T, w *worker) {
			w.set(false, all...)
			w.leave()
			id := w.id + ".a"
			testkit.EventuallyNil(t, 10*time.Second, "the device is gone", func() error {
				var d struct{ Presence struct{ Connected bool } }
				if err := g.Get("/api/v1/devices/"+w.id, &d); err != nil || !d.Presence.Connected {
					return err
				}
				return fmt.Errorf("connected")
			})
			order(t, g, w.id, id, map[string]any{"ttl": "700ms"})
			order(t, g, w.id, w.id+".b", nil)
			v := agree(t, g, o, w, id, "EXPIRED", false)
			if d := v.at(t, "EXPIRED").Sub(v.at(t, "QUEUED")); d < 700*time.Millisecond-grain || v.Attempts != 0 {
				t.Errorf("expired after %v: %+v", d, v)
			}
			w.comeBack()
			agree(t, g, o, w, w.id+".b", "SUCCEEDED", false)
			if got := w.came(); !slices.Equal(got, []string{w.id + ".b"}) {
				t.Errorf("the device got %v", got)
			}
		},
		"not before": func(t *testing.T, w *worker) {
			w.set(false, all...)
			when := time.Now().Add(1200 * time.Millisecond).Truncate(time.Millisecond)
			order(t, g, w.id, w.id+".a", map[string]any{"not_before": when.UTC().Format(time.RFC3339Nano)})
			order(t, g, w.id, w.id+".b", nil)
			agree(t, g, o, w, w.id+".b", "SUCCEEDED", false)
			v := agree(t, g, o, w, w.id+".a", "SUCCEEDED", false)
			if sent := v.at(t, "SENT"); sent.Before(when.Add(-grain)) || sent.After(when.Add(5*time.Second)) {
				t.Errorf("not before %v, sent %v", when, sent)
			}
			if got := w.came(); !slices.Equal(got, []string{w.id + ".b", w.id + ".a"}) {
				t.Errorf("the device got %v", got)
			}
		},
		"a stuck one frees its place": func(t *testing.T, w *worker) {
			w.set(false, "accepted")
			order(t, g, w.id, w.id+".a", map[string]any{"execution_timeout": "800ms"})
			becomes(t, g, w.id+".a", "IN_PROGRESS")
			w.set(false, all...)
			order(t, g, w.id, w.id+".b", nil)
			order(t, g, w.id, w.id+".c", nil)
			stuck := agree(t, g, o, w, w.id+".a", "TIMED_OUT", false)
			b := agree(t, g, o, w, w.id+".b", "SUCCEEDED", false)
			c := agree(t, g, o, w, w.id+".c", "SUCCEEDED", false)
			if b.at(t, "SENT").Before(stuck.at(t, "TIMED_OUT")) || c.at(t, "SENT").Before(b.at(t, "SUCCEEDED")) {
				t.Errorf("two were under way at once: %+v %+v %+v", stuck, b, c)
			}
			if got := w.came(); !slices.Equal(got, []string{w.id + ".a", w.id + ".b", w.id + ".c"}) {
				t.Errorf("the device got %v", got)
			}
		},
		"urgent ones overtake": func(t *testing.T, w *worker) {
			w.set(false, "accepted")
			order(t, g, w.id, w.id+".a", map[string]any{"execution_timeout": "60s"})
			becomes(t, g, w.id+".a", "IN_PROGRESS")
			w.set(false, all...)
			order(t, g, w.id, w.id+".b", nil)
			order(t, g, w.id, w.id+".c", nil)
			order(t, g, w.id, w.id+".u", map[string]any{"urgent": true})
			order(t, g, w.id, w.id+".v", map[string]any{"urgent": true})
			agree(t, g, o, w, w.id+".u", "SUCCEEDED", false)
			agree(t, g, o, w, w.id+".v", "SUCCEEDED", false)
			for id, state := range map[string]string{".a": "IN_PROGRESS", ".b": "QUEUED", ".c": "QUEUED"} {
				if v, err := command(t, g, w.id+id); err != nil || v.State != state {
					t.Errorf("%s is %+v (%v)", id, v, err)
				}
			}
			w.say(w.id+".a", "succeeded")
			agree(t, g, o, w, w.id+".c", "SUCCEEDED", false)
			if got, i := w.came(), w.id; !slices.Equal(got, []string{i + ".a", i + ".u", i + ".v", i + ".b", i + ".c"}) {
				t.Errorf("the device got %v", got)
			}
		},
	}
	t.Run("stories", func(t *testing.T) {
		for name, story := range stories {
			for _, version := range []mqtt.Version{mqtt.V311, mqtt.V5} {
				t.Run(fmt.Sprintf("%s, MQTT %v", name, version), func(t *testing.T) {
					t.Parallel()
					w := startWorker(t, g.Addr, strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), ",", "")+strings.ReplaceAll(version.String(), ".", ""), version)
					w.here()
					story(t, w)
				})
			}
		}
	})
	drained(t, g, "cloud", 20*time.Second)
	balanced(t, g)
}

// TestCommandTimesGoOnWhileTheGatewayIsOff: the clock of a command does not stop with the process.
func TestCommandTimesGoOnWhileTheGatewayIsOff(t *testing.T) {
	t.Parallel()
	path := bin(t)
	up := testkit.StartMosquitto(t)
	o := openOffice(t, up.Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	away := startWorker(t, g.Addr, "away", mqtt.V311, "succeeded")
	slow := startWorker(t, g.Addr, "slow", mqtt.V5, "accepted")
	away.here()
	slow.here()
	away.leave()
	order(t, g, slow.id, "timed-out", map[string]any{"execution_timeout": "900ms"})
	becomes(t, g, "timed-out", "IN_PROGRESS")
	when := time.Now().Add(900 * time.Millisecond)
	order(t, g, away.id, "expired", map[string]any{"ttl": "900ms"})
	order(t, g, away.id, "due", map[string]any{"not_before": when.UTC().Format(time.RFC3339Nano)})
	g.Kill()
	<-time.After(time.Until(when) + 100*time.Millisecond)
	g.Restart()
	began := time.Now()
	away.comeBack()
	v := agree(t, g, o, away, "expired", "EXPIRED", false)
	if received, _ := away.seen("expired"); received != 0 || v.Attempts != 0 {
		t.Errorf("it came %d times: %+v", received, v)
	}
	agree(t, g, o, away, "due", "SUCCEEDED", false)
	agree(t, g, o, slow, "timed-out", "TIMED_OUT", false)
	for id, state := range map[string]string{"expired": "EXPIRED", "timed-out": "TIMED_OUT", "due": "SENT"} {
		v, err := command(t, g, id)
		if err != nil {
			t.Fatal(err)
		}
		if at := v.at(t, state); at.After(began.Add(700 * time.Millisecond)) {
			t.Errorf("%s was %s %v after the start: it waited anew", id, state, at.Sub(began))
		}
	}
}
