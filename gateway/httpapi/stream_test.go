package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
)

// pipes is a listener without a network, for clocks that stand still: what one side writes waits until the other reads it.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// live runs the API in a synctest bubble; stop ends it.
type live struct {
	*rig
	client *http.Client
	stop   func() error
}

func inBubble(t *testing.T, events int, f func(t *testing.T, l *live)) {
	t.Helper()
	described(t) // outside, once
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, events)
		ln := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		r.api.Serve(ln)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- r.api.Run(ctx) }()
		tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ours, theirs := net.Pipe()
			select {
			case ln.conns <- theirs:
				return ours, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}}
		l := &live{rig: r, client: &http.Client{Transport: tr}}
		l.stop = sync.OnceValue(func() error {
			cancel()
			return <-done
		})
		f(t, l)
		if err := l.stop(); err != nil {
			t.Errorf("Run = %v", err)
		}
		tr.CloseIdleConnections()
	})
}

// do sends a request as a viewer; the body is the caller's to close.
func (l *live) do(method, target, body string, options ...option) *http.Response {
	l.t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), method, "http://gateway"+target, strings.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	as("admin")(req)
	req.Header.Set("Content-Type", "application/json")
	for _, o := range options {
		o(req)
	}
	resp, err := l.client.Do(req)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp
}

// stream is a reader of events.
type stream struct {
	l    *live
	resp *http.Response
	b    *bufio.Reader
	last string // id
}

func (l *live) watch(query, last string) *stream {
	l.t.Helper()
	options := []option{as("viewer")}
	if last != "" {
		options = append(options, header("Last-Event-ID", last))
	}
	resp := l.do("GET", "/api/v1/events"+query, "", options...)
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		l.t.Fatalf("events = %d %v", resp.StatusCode, resp.Header)
	}
	return &stream{l: l, resp: resp, b: bufio.NewReader(resp.Body)}
}

func (s *stream) close() { s.resp.Body.Close() }

// block reads lines up to the next empty one.
func (s *stream) block() (lines []string, err error) {
	for {
		line, err := s.b.ReadString('\n')
		if err != nil {
			return lines, err
		}
		if line = strings.TrimSuffix(line, "\n"); line == "" {
			return lines, nil
		}
		if id, ok := strings.CutPrefix(line, "id: "); ok {
			s.last = id
		}
		lines = append(lines, line)
	}
}

// next gives the next event, as a client reads it, and holds it against the description.
func (s *stream) next() (ev httpapi.Event, err error) {
	s.l.t.Helper()
	for {
		lines, err := s.block()
		if err != nil {
			return ev, err
		}
		var kind, data string
		for _, line := range lines {
			if v, ok := strings.CutPrefix(line, "event: "); ok {
				kind = v
			}
			if v, ok := strings.CutPrefix(line, "data: "); ok {
				data = v
			}
		}
		if data == "" {
			continue
		}
		if err := json.Unmarshal([]byte(data), &ev); err != nil {
			s.l.t.Fatalf("%s: %v", data, err)
		}
		if ev.Kind != kind || ev.ID != s.last {
			s.l.t.Errorf("event %s, id %s, but data %s", kind, s.last, data)
		}
		schema, err := described(s.l.t).schema("components", "schemas", "Event")
		if err != nil {
			s.l.t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader([]byte(data)))
		if err == nil {
			err = schema.Validate(v)
		}
		if err != nil {
			s.l.t.Errorf("event is not what is described: %v\n%s", err, data)
		}
		return ev, nil
	}
}

// want reads an event and wants it to be about something.
func (s *stream) want(about string) {
	s.l.t.Helper()
	ev, err := s.next()
	if err != nil {
		s.l.t.Fatalf("want %s: %v", about, err)
	}
	if got := summary(&ev); got != about {
		s.l.t.Errorf("event %s, want %s", got, about)
	}
}

func summary(ev *httpapi.Event) string {
	switch {
	case ev.Command != nil:
		return fmt.Sprintf("%s %s %s->%s", ev.Command.Device, ev.Command.ID, ev.Previous, ev.Command.State)
	case ev.Device != nil:
		return fmt.Sprintf("%s connected=%t", ev.Device.ID, ev.Device.Connected)
	case ev.Refusal != nil:
		return fmt.Sprintf("%s %s %s", ev.Refusal.Device, ev.Refusal.ID, ev.Refusal.Code)
	case ev.Upstream != nil:
		return fmt.Sprintf("%s connected=%t", ev.Upstream.Name, ev.Upstream.Connected)
	}
	if ev.Alarm != nil {
		return fmt.Sprintf("%s active=%t", ev.Alarm.Name, ev.Alarm.Active)
	}
	return ev.Kind
}

func command(device, id string, from, to devices.State) devices.Event {
	return devices.Event{Previous: from, Command: &devices.Command{
		ID: id, Device: device, Name: "n", State: to, Created: then, Updated: then, Expires: then, Feedback: "full", Payload: []byte("secret"), Result: []byte("r"),
	}}
}

func presence(device string, connected bool) devices.Event {
	return devices.Event{Device: &devices.PresenceChange{Device: device, Presence: devices.Presence{Connected: connected, Since: then}}}
}

func TestEventsComeAsTheyHappen(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		l.hub.Publish(presence("before", true)) // who comes later does not see it
		s := l.watch("", "")
		defer s.close()
		first, err := s.block()
		if err != nil || len(first) != 2 || first[0] != "retry: 2000" || !strings.HasSuffix(first[1], "-1") {
			t.Errorf("a stream begins with %q, %v", first, err)
		}
		l.hub.Publish(command("pump", "c1", 0, devices.Queued))
		l.hub.Publish(command("pump", "c1", devices.Queued, devices.Sent))
		l.hub.Publish(presence("pump", false))
		l.hub.Publish(devices.Event{Refusal: &devices.Refusal{Device: "x", ID: "c2", Code: "unknown_device", Reason: "r", At: then}})
		l.hub.PublishUpstream(httpapi.UpstreamChange{Name: "cloud", Connected: true})
		l.hub.PublishAlarm(httpapi.AlarmChange{Alarm: httpapi.Alarm{Name: "disk_full", Severity: httpapi.Critical}, Active: true})
		s.want("pump c1 ->QUEUED")
		s.want("pump c1 QUEUED->SENT")
		s.want("pump connected=false")
		s.want("x c2 unknown_device")
		s.want("cloud connected=true")
		s.want("disk_full active=true")
	})
}

func TestEventsHaveNoPayloads(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		ev := command("pump", "c1", 0, devices.Queued)
		l.hub.Publish(ev)
		got, err := s.next()
		if err != nil || got.Command.Payload != nil || got.Command.PayloadBase64 != "" || got.Command.Result != nil || got.Command.TTL != "0s" {
			t.Errorf("%+v, %v", got.Command, err)
		}
		if string(ev.Command.Payload) != "secret" {
			t.Error("the publisher's command was changed")
		}
	})
}

func TestEventsAreFiltered(t *testing.T) {
	inBubble(t, 0, func(_ *testing.T, l *live) {
		kinds, device, cmd := l.watch("?kinds=device,upstream", ""), l.watch("?device=pump", ""), l.watch("?command=c2&kinds=command", "")
		defer kinds.close()
		defer device.close()
		defer cmd.close()
		l.hub.Publish(command("pump", "c1", 0, devices.Queued))
		l.hub.Publish(command("fan", "c2", 0, devices.Queued))
		l.hub.Publish(presence("fan", true))
		l.hub.PublishUpstream(httpapi.UpstreamChange{Name: "cloud"})
		l.hub.Publish(presence("pump", true))
		l.hub.Publish(command("fan", "c2", devices.Queued, devices.Sent))
		for _, w := range []string{"fan connected=true", "cloud connected=false", "pump connected=true"} {
			kinds.want(w)
		}
		for _, w := range []string{"pump c1 ->QUEUED", "pump connected=true"} {
			device.want(w)
		}
		for _, w := range []string{"fan c2 ->QUEUED", "fan c2 QUEUED->SENT"} {
			cmd.want(w)
		}
	})
}

func TestAStreamGoesOnWhereItEnded(t *testing.T) {
	inBubble(t, 4, func(t *testing.T, l *live) {
		s := l.watch("", "")
		l.hub.Publish(presence("d1", true))
		s.want("d1 connected=true")
		s.close()
		for _, d := range []string{"d2", "d3", "d4", "d5"} {
			l.hub.Publish(presence(d, true))
		}
		// By header, and for those that cannot send one, in the query.
		query := l.watch("?last_event_id="+s.last, "")
		header := l.watch("?last_event_id=nonsense", s.last)
		for _, again := range []*stream{query, header} {
			for _, d := range []string{"d2", "d3", "d4", "d5"} {
				again.want(d + " connected=true")
			}
			again.close()
		}

		// One more, and the first that was missed is no longer there: that is said, and all that is there is told.
		l.hub.Publish(presence("d6", true))
		for _, last := range []string{s.last, "0123456789abcdef-3", "nonsense", strings.Split(s.last, "-")[0] + "-99"} {
			again := l.watch("", last)
			again.want("reset")
			if at := again.last; at != strings.Split(s.last, "-")[0]+"-2" {
				t.Errorf("reset has the id %s", at)
			}
			for _, d := range []string{"d3", "d4", "d5", "d6"} {
				again.want(d + " connected=true")
			}
			again.close()
		}
	})
}

// TestAStreamThatSawNothingMissesNothing: the id that a stream begins with, and that its heartbeats bring, is enough to
// come back with.
func TestAStreamThatSawNothingMissesNothing(t *testing.T) {
	inBubble(t, 4, func(t *testing.T, l *live) {
		s := l.watch("?device=pump", "")
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for i := range 3 { // more than the ring keeps, while it looks on
			for range 3 {
				l.hub.Publish(presence("fan", true))
			}
			beat, err := s.block()
			if err != nil || !strings.HasPrefix(beat[0], ":") || time.Since(begin) != time.Duration(i+1)*15*time.Second {
				t.Errorf("after %v: %q, %v", time.Since(begin), beat, err)
			}
		}
		s.close()
		l.hub.Publish(presence("pump", true))
		again := l.watch("?device=pump", s.last)
		defer again.close()
		again.want("pump connected=true")
	})
}

func TestAStreamOutlivesTheTimeoutsOfRequests(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		for begin := time.Now(); time.Since(begin) < 10*time.Minute; {
			if _, err := s.block(); err != nil {
				t.Fatalf("after %v: %v", time.Since(begin), err)
			}
		}
		l.hub.Publish(presence("pump", true))
		s.want("pump connected=true")
	})
}

func TestAReaderThatTakesNothingIsCut(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		l.hub.Publish(presence("d", true))
		s.want("d connected=true")
		begin := time.Now()
		for range 1000 { // nobody waits for it
			l.hub.Publish(presence("d", true))
		}
		synctest.Wait()
		if waited := time.Since(begin); waited != 0 {
			t.Errorf("publishing waited %v for a reader", waited)
		}
		l.wantMetric("holdfast_httpapi_event_streams 1")
		time.Sleep(11 * time.Second) //nolint:forbidigo // in a bubble
		synctest.Wait()
		l.wantMetric("holdfast_httpapi_event_streams_cut_total 1")
		l.wantMetric("holdfast_httpapi_event_streams 0")
	})
}

func TestAReaderThatIsTooSlowIsCutAndTold(t *testing.T) {
	inBubble(t, 100, func(t *testing.T, l *live) {
		s := l.watch("", "")
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		l.hub.Publish(presence("d", true))
		synctest.Wait() // its write waits for the reader
		for range 1000 {
			l.hub.Publish(presence("d", true))
		}
		var err error
		n := 0
		for ; err == nil; n++ {
			_, err = s.next()
		}
		if !errors.Is(err, io.EOF) || n > 200 {
			t.Errorf("%d events, then %v", n, err)
		}
		s.close()
		synctest.Wait()
		l.wantMetric("holdfast_httpapi_event_streams_cut_total 1")
		again := l.watch("", s.last)
		defer again.close()
		again.want("reset")
	})
}

func (r *rig) wantMetric(line string) {
	r.t.Helper()
	if b := string(r.ask("GET", "/metrics").body); !strings.Contains(b, line+"\n") {
		r.t.Errorf("metrics lack %s", line)
	}
}

func TestStreamsAreCounted(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		var open []*stream
		for range httpapi.MaxStreams {
			open = append(open, l.watch("", ""))
		}
		a := l.ask("GET", "/api/v1/events")
		if a.status != 503 || a.code() != "too_many_streams" || a.header.Get("Retry-After") == "" {
			t.Errorf("one more: %d %s", a.status, a.body)
		}
		open[0].close()
		synctest.Wait()
		open[0] = l.watch("", "")
		for _, s := range open {
			s.close()
		}
	})
}

func TestStreamsEndAtOnceWhenTheServerStops(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := s.block()
			ended <- err
		}()
		time.Sleep(11 * time.Second) //nolint:forbidigo // in a bubble: its last write is long ago
		begin := time.Now()
		if err := l.stop(); err != nil {
			t.Errorf("Run = %v", err)
		}
		// Clean, and not cut after the time that requests have to end.
		if err := <-ended; !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || time.Since(begin) >= 500*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	})
}

func TestAStreamEndsWithItsToken(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		if err := l.tokens.Remove("the-viewer"); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := s.block(); !errors.Is(err, io.EOF) || time.Since(begin) > 15*time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	})
}

// TestHalfAnAnswerIsSeenToBeHalf: a panic after something was written must not look like the end.
func TestHalfAnAnswerIsSeenToBeHalf(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		s := l.watch("", "")
		defer s.close()
		if _, err := s.block(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.tokens.panics.Store(true)
		if _, err := s.block(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("the stream ends with %v", err)
		}
		synctest.Wait()
		l.tokens.panics.Store(false)
		l.watch("", "").close()
	})
}

// TestEventsKeepNoPayloads: 10,000 events of 64 KiB would be all the memory of a small gateway.
func TestEventsKeepNoPayloads(t *testing.T) {
	hub := httpapi.NewEvents(0)
	gone := make(chan struct{})
	func() {
		payload := make([]byte, 64<<10)
		runtime.AddCleanup(&payload[0], func(c chan struct{}) { close(c) }, gone)
		hub.Publish(devices.Event{Command: &devices.Command{ID: "c1", Device: "pump", Payload: payload}})
	}()
	for deadline := time.Now().Add(10 * time.Second); ; {
		runtime.GC()
		select {
		case <-gone:
			runtime.KeepAlive(hub)
			return
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatal("the hub holds a payload")
		}
	}
}

func TestWaitingForACommandEndsWithIt(t *testing.T) {
	inBubble(t, 8, func(t *testing.T, l *live) {
		for name, send := range map[string]func() *http.Response{
			"sent": func() *http.Response {
				return l.do("POST", "/api/v1/devices/pump/commands?wait=60s", `{"id":"sent","name":"n"}`)
			},
			"asked for": func() *http.Response {
				l.do("POST", "/api/v1/devices/pump/commands", `{"id":"asked for","name":"n"}`).Body.Close()
				return l.do("GET", "/api/v1/commands/asked%20for?wait=60", "")
			},
		} {
			begin := time.Now()
			moved := make(chan struct{})
			go func() {
				defer close(moved)
				// Longer than a request may take to be read, or to be answered; other commands move meanwhile, more than are remembered.
				time.Sleep(20 * time.Second) //nolint:forbidigo // in a bubble
				l.queue.move(name, devices.Sent)
				for range 20 {
					l.hub.Publish(command("pump", "another", devices.Queued, devices.Sent))
				}
				time.Sleep(25 * time.Second) //nolint:forbidigo // in a bubble
				l.queue.move(name, devices.Succeeded)
			}()
			resp := send()
			var c httpapi.Command
			err := json.NewDecoder(resp.Body).Decode(&c)
			resp.Body.Close()
			if err != nil || c.State != devices.Succeeded || time.Since(begin) != 45*time.Second {
				t.Errorf("%s: %v after %v, %v", name, c.State, time.Since(begin), err)
			}
			<-moved
		}
	})
}

func TestWaitingIsBounded(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		begin := time.Now()
		resp := l.do("POST", "/api/v1/devices/pump/commands?wait=1h", `{"id":"c1","name":"n"}`)
		resp.Body.Close()
		if resp.StatusCode != 201 || time.Since(begin) != time.Minute {
			t.Errorf("%d after %v", resp.StatusCode, time.Since(begin))
		}
		// So many may wait; one more is answered at once.
		var wg sync.WaitGroup
		for range httpapi.MaxWaiters {
			wg.Go(func() { l.do("GET", "/api/v1/commands/c1?wait=30s", "").Body.Close() })
		}
		synctest.Wait()
		begin = time.Now()
		l.do("GET", "/api/v1/commands/c1?wait=30s", "").Body.Close()
		if time.Since(begin) != 0 {
			t.Errorf("one more waited %v", time.Since(begin))
		}
		wg.Wait()
		// A command that has ended is not waited for, nor one that is not there.
		l.queue.move("c1", devices.Failed)
		begin = time.Now()
		l.do("GET", "/api/v1/commands/c1?wait=30s", "").Body.Close()
		if a := l.ask("GET", "/api/v1/commands/c9?wait=30s"); a.status != 404 || time.Since(begin) != 0 {
			t.Errorf("%d after %v", a.status, time.Since(begin))
		}
		// Stopping waits for nobody who waits.
		l.do("POST", "/api/v1/devices/pump/commands", `{"id":"c2","name":"n"}`).Body.Close()
		wg.Go(func() { l.do("GET", "/api/v1/commands/c2?wait=30s", "").Body.Close() })
		synctest.Wait()
		begin = time.Now()
		if err := l.stop(); err != nil || time.Since(begin) >= 500*time.Millisecond {
			t.Errorf("stopped after %v: %v", time.Since(begin), err)
		}
		wg.Wait()
	})
}

// TestEveryReaderSeesEveryEventInOrder has many publish at once while many read.
func TestEveryReaderSeesEveryEventInOrder(t *testing.T) {
	const publishers, each, readers = 4, 500, 4
	inBubble(t, publishers*each, func(t *testing.T, l *live) {
		var wg sync.WaitGroup
		for range readers {
			s := l.watch("", "")
			wg.Go(func() {
				defer s.close()
				seen := map[string]int{}
				for n := range publishers * each {
					ev, err := s.next()
					if err != nil {
						t.Errorf("after %d events: %v", n, err)
						return
					}
					if !strings.HasSuffix(ev.ID, "-"+strconv.Itoa(n+1)) {
						t.Errorf("event %d has the id %s", n+1, ev.ID)
						return
					}
					if ev.Command.ID != strconv.Itoa(seen[ev.Command.Device]) {
						t.Errorf("%s: command %s comes after %d", ev.Command.Device, ev.Command.ID, seen[ev.Command.Device])
						return
					}
					seen[ev.Command.Device]++
				}
			})
		}
		for p := range publishers {
			wg.Go(func() {
				for i := range each {
					l.hub.Publish(command("d"+strconv.Itoa(p), strconv.Itoa(i), 0, devices.Queued))
				}
			})
		}
		wg.Wait()
	})
}

func BenchmarkPublish(b *testing.B) {
	hub := httpapi.NewEvents(0)
	ev := command("pump", "c1", devices.Queued, devices.Sent)
	b.ReportAllocs()
	for b.Loop() {
		hub.Publish(ev)
	}
}
