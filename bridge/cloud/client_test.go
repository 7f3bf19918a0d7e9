package cloud_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
)

// wired is a Publisher whose far side is the test.
type wired struct {
	sent []string // topic and payload
	to   func(n int, topic string, payload []byte) error
}

func (w *wired) Publish(_ context.Context, topic string, payload []byte) error {
	w.sent = append(w.sent, topic+" "+string(payload))
	if w.to == nil {
		return nil
	}
	return w.to(len(w.sent), topic, payload)
}

// step makes an event of command c-1 of device d.
func step(state string, change ...func(*wire.CommandEvent)) wire.CommandEvent {
	e := wire.CommandEvent{Gateway: "g", Device: "d", ID: "c-1", State: state, ClockState: "synced", At: wire.Time{Time: time.UnixMilli(1764000000000)}}
	for _, f := range change {
		f(&e)
	}
	return e
}

func handle(t *testing.T, c *cloud.Client, events ...wire.CommandEvent) {
	t.Helper()
	for _, e := range events {
		if ok, err := c.Handle(wire.CommandEventTopic(e.Gateway, e.Device, e.ID, e.State), e.Encode()); !ok || err != nil {
			t.Errorf("%+v: %v, %v", e, ok, err)
		}
	}
}

func attempts(n int) func(*wire.CommandEvent) { return func(e *wire.CommandEvent) { e.Attempts = n } }

func late(e *wire.CommandEvent) { e.Late = true }

func repeat(e *wire.CommandEvent) {
	e.Repeat = true
	e.At.Time = e.At.Add(time.Minute)
}

func progress(n int) func(*wire.CommandEvent) {
	return func(e *wire.CommandEvent) { e.Progress = &wire.EventProgress{Percent: &n} }
}

// states is what Events gives.
func states(ctx context.Context, f *cloud.Command) (list []string) {
	for e, err := range f.Events(ctx) {
		if err != nil {
			return append(list, "error")
		}
		s := e.State
		if e.Progress != nil {
			s += fmt.Sprint(" ", *e.Progress.Percent)
		}
		if e.Attempts > 0 {
			s += fmt.Sprint("/", e.Attempts)
		}
		list = append(list, s)
	}
	return list
}

func TestEventsComeOnceAndInOrder(t *testing.T) {
	queued, sent1, back, sent2 := step("QUEUED"), step("SENT", attempts(1)), step("QUEUED", attempts(1)), step("SENT", attempts(2))
	delivered, done := step("DELIVERED", attempts(2)), step("SUCCEEDED", attempts(2))
	timedOut := step("TIMED_OUT", attempts(2))
	// Made when the gateway's clock was wrong, and sent again after it was put right.
	wrong := step("IN_PROGRESS", attempts(2), func(e *wire.CommandEvent) { e.ClockState, e.At.Time = wire.ClockUnsynced, time.Unix(100, 0) })
	right := wrong
	right.ClockState, right.At, right.Uncorrected = wire.ClockSynced, delivered.At, &wrong.At
	for name, c := range map[string]struct {
		oneWay bool
		late   time.Duration
		in     []wire.CommandEvent
		want   string
	}{
		"plain": {in: []wire.CommandEvent{queued, sent1, delivered, done}, want: "QUEUED SENT/1 DELIVERED/2 SUCCEEDED/2"},
		"sent twice by the gateway": {
			in: []wire.CommandEvent{queued, sent1, queued, sent1, back, sent2, sent1, back, sent2, delivered, delivered, queued, done}, want: "QUEUED SENT/1 QUEUED/1 SENT/2 DELIVERED/2 SUCCEEDED/2",
		},
		"sent twice, and the clock put right in between": {
			in: []wire.CommandEvent{queued, sent1, delivered, wrong, sent1, delivered, right, done}, want: "QUEUED SENT/1 DELIVERED/2 IN_PROGRESS/2 SUCCEEDED/2",
		},
		"asked again":     {in: []wire.CommandEvent{queued, step("QUEUED", repeat), sent1, step("SENT", attempts(1), repeat), delivered, done}, want: "QUEUED SENT/1 DELIVERED/2 SUCCEEDED/2"},
		"only a repeat":   {in: []wire.CommandEvent{step("DELIVERED", attempts(2), repeat), done}, want: "DELIVERED/2 SUCCEEDED/2"},
		"progress":        {in: []wire.CommandEvent{step("IN_PROGRESS", progress(10)), step("IN_PROGRESS", progress(50)), step("IN_PROGRESS", progress(10)), step("IN_PROGRESS", progress(50), repeat), done}, want: "IN_PROGRESS 10 IN_PROGRESS 50 SUCCEEDED/2"},
		"one-way":         {oneWay: true, in: []wire.CommandEvent{sent1, delivered}, want: "SENT/1 DELIVERED/2"},
		"says final":      {in: []wire.CommandEvent{step("DELIVERED", func(e *wire.CommandEvent) { e.Final = true })}, want: "DELIVERED"},
		"an end":          {in: []wire.CommandEvent{queued, timedOut}, want: "QUEUED TIMED_OUT/2"},
		"a late outcome":  {late: time.Hour, in: []wire.CommandEvent{queued, timedOut, delivered, step("FAILED", late), done}, want: "QUEUED TIMED_OUT/2 FAILED"},
		"no late outcome": {late: time.Hour, in: []wire.CommandEvent{queued, timedOut, sent1}, want: "QUEUED TIMED_OUT/2"},
		"refused":         {in: []wire.CommandEvent{step("REFUSED")}, want: "REFUSED"},
		"refused cancel":  {in: []wire.CommandEvent{delivered, step("REFUSED"), done}, want: "DELIVERED/2 REFUSED SUCCEEDED/2"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var c1 *cloud.Client
				w := &wired{to: func(int, string, []byte) error {
					handle(t, c1, c.in[0])
					return nil
				}}
				c1 = cloud.NewClient(cloud.ClientConfig{Publisher: w, Late: c.late})
				f, err := c1.Submit(t.Context(), "g", "d", wire.Submit{ID: "c-1", Name: "n", OneWay: c.oneWay})
				var refused *cloud.RefusedError
				if errors.As(err, &refused) {
					if c.want != "REFUSED" || f != nil || refused.Event.ID != "c-1" {
						t.Errorf("%v, %v", f, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				handle(t, c1, c.in[1:]...)
				if got := strings.Join(states(t.Context(), f), " "); got != c.want {
					t.Errorf("got  %s\nwant %s", got, c.want)
				}
			})
		})
	}
}

func TestSubmitIsRepeatedUntilItIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var at []time.Duration
		var c *cloud.Client
		w := &wired{to: func(n int, topic string, payload []byte) error {
			at = append(at, time.Since(began))
			s, err := wire.DecodeSubmit(payload)
			if err != nil || topic != "gw/g/cmd/d/submit" || len(s.ID) != 36 {
				t.Errorf("%s %s: %v", topic, payload, err)
			}
			if n == 4 {
				go handle(t, c, step("QUEUED", func(e *wire.CommandEvent) { e.ID = s.ID }))
			}
			return nil
		}}
		c = cloud.NewClient(cloud.ClientConfig{Publisher: w})
		f, err := c.Submit(t.Context(), "g", "d", wire.Submit{Name: "n"})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if want := []time.Duration{0, 5 * time.Second, 15 * time.Second, 35 * time.Second}; !slices.Equal(at, want) {
			t.Errorf("published at %v", at)
		}
		if slices.Sort(w.sent); len(slices.Compact(w.sent)) != 1 {
			t.Errorf("a repeat is another command: %q", w.sent)
		}
		if f.Last().State != "QUEUED" {
			t.Errorf("last is %+v", f.Last())
		}
	})
}

func TestSubmitThatNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wired{}
		c := cloud.NewClient(cloud.ClientConfig{Publisher: w})
		ctx, cancel := context.WithTimeout(t.Context(), 7*time.Second)
		defer cancel()
		f, err := c.Submit(ctx, "g", "d", wire.Submit{ID: "c-1", Name: "n"})
		if !errors.Is(err, cloud.ErrUnanswered) || !errors.Is(err, context.DeadlineExceeded) || f == nil || len(w.sent) != 2 {
			t.Fatalf("%v, %v, %d published", f, err, len(w.sent))
		}
		go handle(t, c, step("QUEUED"), step("EXPIRED")) // the gateway comes back
		if e, err := f.Wait(t.Context()); err != nil || e.State != "EXPIRED" {
			t.Errorf("%+v, %v", e, err)
		}
		f.Close()
		f.Close()

		// What is not waited for.
		f, err = c.Submit(t.Context(), "g", "d", wire.Submit{ID: "c-1", Name: "n", Feedback: "negative"})
		if err != nil || len(w.sent) != 3 {
			t.Fatal(err)
		}
		f.Close()
		if _, err := f.Wait(t.Context()); err == nil {
			t.Error("a closed one is waited for")
		}

		// What never reached the broker.
		lost := errors.New("lost")
		w.to = func(int, string, []byte) error { return lost }
		if f, err := c.Submit(t.Context(), "g", "d", wire.Submit{ID: "c-1", Name: "n"}); !errors.Is(err, lost) || f != nil || errors.Is(err, cloud.ErrUnanswered) {
			t.Errorf("%v, %v", f, err)
		}
		// What did, though the broker's word was lost.
		w.to = func(int, string, []byte) error {
			handle(t, c, step("QUEUED"))
			return lost
		}
		if f, err = c.Submit(t.Context(), "g", "d", wire.Submit{ID: "c-1", Name: "n"}); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if _, err := c.Submit(t.Context(), "g", "d", wire.Submit{}); err == nil {
			t.Error("a command without a name is sent")
		}
	})
}

func TestCancel(t *testing.T) {
	for name, c := range map[string]struct {
		in      []wire.CommandEvent
		state   string
		refused string
	}{
		"in time":  {[]wire.CommandEvent{step("CANCELED")}, "CANCELED", ""},
		"too late": {[]wire.CommandEvent{step("IN_PROGRESS"), step("SUCCEEDED")}, "SUCCEEDED", ""},
		"refused":  {[]wire.CommandEvent{step("REFUSED", func(e *wire.CommandEvent) { e.Code = "already_ended" })}, "", "already_ended"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var client *cloud.Client
				w := &wired{to: func(int, string, []byte) error {
					handle(t, client, c.in...)
					return nil
				}}
				client = cloud.NewClient(cloud.ClientConfig{Publisher: w})
				e, err := client.Cancel(t.Context(), "g", "d", "c-1", "why")
				var refused *cloud.RefusedError
				if e.State != c.state || errors.As(err, &refused) != (c.refused != "") || refused != nil && refused.Event.Code != c.refused {
					t.Errorf("%+v, %v", e, err)
				}
				if want := `gw/g/cmd/d/cancel {"id":"c-1","reason":"why"}`; w.sent[0] != want {
					t.Errorf("sent %s", w.sent[0])
				}
			})
		})
	}
}

func TestFollowersEndWithTheirContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := cloud.NewClient(cloud.ClientConfig{Publisher: &wired{}})
		f := c.Follow("g", "d", "c-1")
		defer f.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		handle(t, c, step("QUEUED"), step("SENT", func(e *wire.CommandEvent) { e.Device = "other" }))
		if e, err := f.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || e.State != "QUEUED" {
			t.Errorf("%+v, %v", e, err)
		}
		// Nobody reads: the newest are kept.
		for i := range 5000 {
			handle(t, c, step("IN_PROGRESS", progress(i)))
		}
		handle(t, c, step("SUCCEEDED"))
		got := states(t.Context(), f)
		if len(got) != 1024 || got[1023] != "SUCCEEDED" || got[1022] != "IN_PROGRESS 4999" {
			t.Errorf("%d events, the last %q", len(got), got[max(0, len(got)-2):])
		}
	})
}

func TestHandle(t *testing.T) {
	var told []string
	c := cloud.NewClient(cloud.ClientConfig{
		Publisher: &wired{},
		OnCommand: func(e wire.CommandEvent) { told = append(told, e.State) },
		OnDevice:  func(e wire.DeviceEvent) { told = append(told, e.Device+" "+e.State) },
	})
	online, offline := wire.DeviceEvent{Gateway: "g", Device: "d", State: "online"}, wire.DeviceEvent{Gateway: "g", Device: "d", State: "offline"}
	for range 2 {
		handle(t, c, step("QUEUED"), step("SENT", attempts(1)))
		for _, e := range []wire.DeviceEvent{online, offline} {
			if ok, err := c.Handle(wire.DeviceEventTopic("g", "d", e.State == "online"), e.Encode()); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
	}
	if want := []string{"QUEUED", "SENT", "d online", "d offline"}; !slices.Equal(told, want) {
		t.Errorf("told %q", told)
	}
	if ok, err := c.Handle("gw/g/data/telemetry", nil); ok || err != nil {
		t.Errorf("a batch: %v, %v", ok, err)
	}
	queued := step("QUEUED")
	for topic, payload := range map[string][]byte{
		"gw/g/evt/cmd/d/c-1/QUEUED":    []byte("{}"),
		"gw/h/evt/cmd/d/c-1/QUEUED":    queued.Encode(),
		"gw/g/evt/cmd/d/c-2/QUEUED":    queued.Encode(),
		"gw/g/evt/device/other/online": online.Encode(),
		"gw/g/evt/device/d/online":     []byte("["),
	} {
		if ok, err := c.Handle(topic, payload); !ok || !errors.Is(err, wire.ErrFormat) {
			t.Errorf("%s: %v, %v", topic, ok, err)
		}
	}
	if want := []string{"gw/+/evt/cmd/+/+/+", "gw/+/evt/device/+/+"}; !slices.Equal(cloud.Filters(""), want) {
		t.Errorf("filters %q", cloud.Filters(""))
	}
}

// Events of a command that is submitted again come while it is submitted. The race detector says whether both touch the same.
func TestEventsComeDuringSubmit(t *testing.T) {
	c := cloud.NewClient(cloud.ClientConfig{Publisher: &wired{}})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			default:
				handle(t, c, step("QUEUED", attempts(n)))
			}
		}
	}()
	for range 100 {
		f, err := c.Submit(t.Context(), "g", "d", wire.Submit{ID: "c-1", Name: "stop"})
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	close(stop)
	<-stopped
}
