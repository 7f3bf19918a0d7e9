package mqttup_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/testkit"
)

const filter = "gw/ward-3-east/cmd/+/+"

// taker is a TakeCommands that runs.
type taker struct {
	t      *testing.T
	cancel context.CancelFunc
	done   chan error
	states chan error // nil: up

	mu  sync.Mutex
	got []mqttup.Incoming
}

func commandOptions(url string) mqttup.Options {
	o := mqttup.CommandsFromConfig(bridge.Config{Name: "cloud", URL: url}, "ward-3-east")
	return o
}

// take runs TakeCommands. handler nil: what comes is kept and not acknowledged.
func take(t *testing.T, o mqttup.Options, handler func(mqttup.Incoming)) *taker {
	t.Helper()
	k := &taker{t: t, done: make(chan error, 1), states: make(chan error, 1000)}
	if handler == nil {
		handler = k.keep
	}
	o.OnState = func(up bool, err error) {
		if up != (err == nil) {
			t.Errorf("state %v with %v", up, err)
		}
		k.states <- err
	}
	if o.Log == nil {
		o.Log = testkit.Logger(t)
	}
	var ctx context.Context
	ctx, k.cancel = context.WithCancel(context.Background())
	go func() { k.done <- mqttup.TakeCommands(ctx, o, filter, handler) }()
	t.Cleanup(k.stop)
	return k
}

func (k *taker) stop() {
	if k.cancel == nil {
		return
	}
	k.cancel()
	k.cancel = nil
	if err := <-k.done; err != nil {
		k.t.Errorf("TakeCommands returned %v", err)
	}
}

func (k *taker) keep(m mqttup.Incoming) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.got = append(k.got, m)
}

func (k *taker) all() []mqttup.Incoming {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.got)
}

func (k *taker) payloads() (list []string) {
	for _, m := range k.all() {
		list = append(list, string(m.Payload))
	}
	return list
}

func (k *taker) waitUp() {
	k.t.Helper()
	for {
		select {
		case err := <-k.states:
			if err == nil {
				return
			}
		case <-time.After(30 * time.Second):
			k.t.Fatal("not subscribed within 30 s")
		}
	}
}

func (k *taker) waitFor(n int) []mqttup.Incoming {
	k.t.Helper()
	testkit.EventuallyNil(k.t, 20*time.Second, "the messages come", func() error {
		if got := len(k.all()); got < n {
			return fmt.Errorf("%d of %d", got, n)
		}
		return nil
	})
	return k.all()
}

// acked is a server that notes the PUBACKs and PINGREQs of its clients, and sends what it is told.
type acked struct {
	*mqtttest.Server
	mu  sync.Mutex
	log []int // packet ids; 0: a PINGREQ
}

func newAcked(t *testing.T) *acked {
	a := &acked{}
	a.Server = mqtttest.New(t, mqtttest.Script{Frame: func(_ string, f []byte) bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		switch f[0] >> 4 {
		case 4:
			a.log = append(a.log, int(binary.BigEndian.Uint16(f[2:])))
		case 12:
			a.log = append(a.log, 0)
		}
		return true
	}})
	return a
}

func (a *acked) send(t *testing.T, raw []byte) {
	t.Helper()
	testkit.Eventually(t, 10*time.Second, "the client is there", func() bool { return a.Send("holdfast-ward-3-east-cloud-cmd", raw) })
}

func (a *acked) acks() (ids []int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range a.log {
		if id > 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

func (a *acked) pings() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.log) - len(slices.DeleteFunc(slices.Clone(a.log), func(id int) bool { return id == 0 }))
}

// quiet waits until the client has said two things that come later than any ack it might have sent before.
func (a *acked) quiet(t *testing.T) {
	t.Helper()
	n := a.pings()
	testkit.Eventually(t, 20*time.Second, "pings come", func() bool { return a.pings() >= n+2 })
}

func TestCommandsAreAcknowledgedWhenTheHandlerSaysSo(t *testing.T) {
	t.Parallel()
	a := newAcked(t)
	o := commandOptions("mqtt://" + a.Addr)
	o.KeepAlive = time.Second
	k := take(t, o, nil)
	k.waitUp()
	var raw []byte
	for i := 1; i <= 5; i++ {
		raw = append(raw, bridgetest.PublishFrame("gw/ward-3-east/cmd/d/submit", fmt.Append(nil, i), 1, uint16(100+i))...)
	}
	raw = append(raw, bridgetest.PublishFrame("gw/ward-3-east/cmd/d/submit", []byte("QoS 0"), 0, 0)...)
	a.send(t, raw)
	got := k.waitFor(6)
	if want := []string{"1", "2", "3", "4", "5", "QoS 0"}; !slices.Equal(k.payloads(), want) {
		t.Errorf("got %q", k.payloads())
	}
	a.quiet(t)
	if acks := a.acks(); len(acks) > 0 {
		t.Fatalf("acknowledged before the handler said so: %v", acks)
	}
	got[5].Ack()
	for _, i := range []int{2, 1, 4} { // from other goroutines, out of order
		done := make(chan struct{})
		go func() {
			got[i].Ack()
			close(done)
		}()
		<-done
	}
	a.quiet(t)
	if acks := a.acks(); len(acks) > 0 {
		t.Fatalf("acknowledged out of order: %v", acks)
	}
	got[0].Ack()
	got[0].Ack()
	got[2].Ack()
	testkit.Eventually(t, 10*time.Second, "acks", func() bool { return len(a.acks()) >= 3 })
	got[3].Ack()
	testkit.Eventually(t, 10*time.Second, "acks", func() bool { return len(a.acks()) >= 5 })
	a.quiet(t)
	if acks, want := a.acks(), []int{101, 102, 103, 104, 105}; !slices.Equal(acks, want) {
		t.Errorf("acks %v, want %v", acks, want)
	}
	k.stop()
	got[0].Ack() // the connection has ended: nothing happens
	mqttup.Incoming{}.Ack()
}

func TestUnacknowledgedCommandsAreBounded(t *testing.T) {
	t.Parallel()
	a := newAcked(t)
	const bound, n = 1024, 5000
	var acknowledged atomic.Int64 // or about to be
	given := make(chan mqttup.Incoming, n)
	count := 0
	k := take(t, commandOptions("mqtt://"+a.Addr), func(m mqttup.Incoming) {
		if count++; int64(count) > acknowledged.Load()+bound {
			t.Errorf("message %d is given with %d acknowledged", count, acknowledged.Load())
		}
		given <- m
	})
	k.waitUp()
	var raw []byte
	for i := 1; i <= n; i++ {
		raw = append(raw, bridgetest.PublishFrame("gw/ward-3-east/cmd/d/submit", fmt.Append(nil, i), 1, uint16(i))...)
	}
	a.send(t, raw)
	testkit.Eventually(t, 10*time.Second, "the bound is reached", func() bool { return len(given) == bound })
	for done := 0; done < n; {
		for group := max(len(given), 1); group > 0; group-- {
			m := <-given
			acknowledged.Add(1)
			m.Ack()
			done++
		}
	}
	testkit.Eventually(t, 10*time.Second, "all acks", func() bool { return len(a.acks()) == n })
	if !slices.IsSorted(a.acks()) {
		t.Error("the acks are out of order")
	}
}

func TestRetainedAndOversizedCommands(t *testing.T) {
	t.Parallel()
	a := newAcked(t)
	k := take(t, commandOptions("mqtt://"+a.Addr), nil)
	k.waitUp()
	frame := func(flags byte, payload []byte, id uint16) []byte {
		f := bridgetest.PublishFrame("gw/ward-3-east/cmd/d/submit", payload, 1, id)
		f[0] |= flags
		return f
	}
	a.send(t, slices.Concat(
		frame(1, nil, 1), // a retained message is removed
		frame(1, []byte("kept"), 2),
		frame(8, []byte("again"), 3),
		frame(0, bytes.Repeat([]byte{'x'}, wire.MaxSubmit), 4),
		frame(0, bytes.Repeat([]byte{'x'}, wire.MaxSubmit+1), 5),
		frame(0, bytes.Repeat([]byte{'x'}, 5<<20), 6),
		frame(0, nil, 7),
		bridgetest.PublishFrame("gw/ward-3-east/cmd/d/submit", bytes.Repeat([]byte{'x'}, 1<<20), 0, 0),
		frame(0, []byte("last"), 8)))
	got := k.waitFor(8)
	for i, want := range []struct {
		n             int
		retained, dup bool
	}{
		{n: 4, retained: true},
		{n: 5, dup: true},
		{n: wire.MaxSubmit},
		{n: wire.MaxSubmit + 1},
		{n: wire.MaxSubmit + 1},
		{n: 0},
		{n: wire.MaxSubmit + 1},
		{n: 4},
	} {
		if m := got[i]; len(m.Payload) != want.n || m.Retained != want.retained || m.Dup != want.dup || m.Topic != "gw/ward-3-east/cmd/d/submit" {
			t.Errorf("message %d: %s, %d bytes, retained %v, dup %v; want %+v", i, m.Topic, len(m.Payload), m.Retained, m.Dup, want)
		}
		got[i].Ack()
	}
	if _, err := wire.DecodeSubmit(got[4].Payload); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("what was cut is refused with %v", err)
	}
	testkit.Eventually(t, 10*time.Second, "all acks", func() bool { return slices.Equal(a.acks(), []int{1, 2, 3, 4, 5, 6, 7, 8}) })
}

// TestCutFrames: whatever the sizes and however the bytes come, paho gets whole frames, long ones cut.
func TestCutFrames(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		const cutTo = 50
		var raw, want []byte
		for range random.IntN(10) {
			qos := byte(random.IntN(2))
			topic := strings.Repeat("t", 1+random.IntN(200))
			payload := bytes.Repeat([]byte{'p'}, random.IntN(400))
			if random.IntN(5) == 0 {
				payload = bytes.Repeat([]byte{'p'}, 40_000)
			}
			raw = append(raw, bridgetest.PublishFrame(topic, payload, qos, 7)...)
			want = append(want, bridgetest.PublishFrame(topic, payload[:min(len(payload), cutTo)], qos, 7)...)
			if random.IntN(3) == 0 {
				raw = append(raw, 0xd0, 0)
				want = append(want, 0xd0, 0)
			}
		}
		near, far := net.Pipe()
		go func() {
			for rest := raw; len(rest) > 0; {
				n := min(len(rest), 1+random.IntN(5000))
				_, _ = far.Write(rest[:n])
				rest = rest[n:]
			}
			_ = far.Close()
		}()
		got, _ := mqttup.ReadFramesCut(near, cutTo)
		_ = near.Close()
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, want %d", len(got), len(want))
		}
	}
}

// publishers connects to a broker and publishes.
func publishing(t *testing.T, url string) func(topic, payload string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c, err := mqttup.Connect(ctx, mqttup.Options{URL: url, ClientID: "publisher"}, nil, nil)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	})
	return func(topic, payload string) {
		t.Helper()
		if err := c.Publish(within(t, 10*time.Second), topic, []byte(payload)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCommandsWaitAtTheBroker(t *testing.T) {
	t.Parallel()
	m := testkit.StartMosquitto(t, "max_queued_messages 0")
	publish := publishing(t, m.URL())
	k := take(t, commandOptions(m.URL()), nil)
	k.waitUp()
	k.stop()
	var want []string
	for i := range 200 {
		want = append(want, fmt.Sprint(i))
		publish("gw/ward-3-east/cmd/d/submit", want[i])
	}
	k = take(t, commandOptions(m.URL()), func(_ mqttup.Incoming) {})
	k.waitUp()
	k.stop() // acknowledged none
	came := make(chan string, 1000)
	again := take(t, commandOptions(m.URL()), func(m mqttup.Incoming) {
		m.Ack()
		came <- string(m.Payload)
	})
	for i := range want {
		select {
		case got := <-came:
			if got != want[i] {
				t.Fatalf("message %d is %q", i, got)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("message %d does not come", i)
		}
	}
	// The broker has at most 20 in flight, so it has read the acknowledgements of those before. What it had not
	// read when the connection ended may come again.
	again.waitUp()
	for range 40 {
		publish("gw/ward-3-east/cmd/d/submit", "more")
		<-came
	}
	again.stop()
	last := take(t, commandOptions(m.URL()), nil)
	last.waitUp()
	publish("gw/ward-3-east/cmd/d/submit", "marker")
	testkit.Eventually(t, 10*time.Second, "the marker comes", func() bool { return slices.Contains(last.payloads(), "marker") })
	for _, got := range last.payloads() {
		if got != "marker" && got != "more" {
			t.Errorf("what was acknowledged came again: %q", got)
		}
	}
}

// A broker that forgets loses what waited there. The subscription is made again, and it is told, once, that something may be lost.
func TestBrokerThatForgetsIsToldOf(t *testing.T) {
	t.Parallel()
	for name, conf := range map[string]string{"keeps": "persistence true", "forgets": "persistence false"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := testkit.StartMosquitto(t, conf)
			o := commandOptions(m.URL())
			log := &counting{Handler: testkit.Logger(t).Handler()}
			o.Log = slog.New(log)
			k := take(t, o, nil)
			k.waitUp()
			before := log.count("forgotten")
			m.Stop()
			m.Restart()
			k.waitUp()
			publishing(t, m.URL())("gw/ward-3-east/cmd/d/submit", "new")
			k.waitFor(1)
			want := 0
			if name == "forgets" {
				want = 1
			}
			if n := log.count("WARN broker has forgotten the session"); n != want || before != 0 {
				t.Errorf("told %d times, want %d; before that %d times", n, want, before)
			}
		})
	}
}

func TestUnacknowledgedCommandsComeAgain(t *testing.T) {
	t.Parallel()
	m := testkit.StartMosquitto(t)
	link := testkit.StartProxy(t, m.Addr)
	publish := publishing(t, m.URL())
	k := take(t, commandOptions("mqtt://"+link.Addr()), nil)
	k.waitUp()
	for i := range 10 {
		publish("gw/ward-3-east/cmd/d/submit", fmt.Sprint(i))
	}
	first := k.waitFor(10)
	link.Reset()
	again := k.waitFor(20)[10:]
	for i, m := range again {
		if string(m.Payload) != fmt.Sprint(i) || !m.Dup {
			t.Errorf("message %d is %q, dup %v", i, m.Payload, m.Dup)
		}
	}
	for _, m := range first { // of a connection that has ended: they acknowledge nothing
		m.Ack()
	}
	for _, m := range again[:5] {
		m.Ack()
	}
	publish("gw/ward-3-east/cmd/d/submit", "later")
	k.waitFor(21)
	link.Reset()
	k.waitFor(27)
	if got, want := k.payloads()[21:], []string{"5", "6", "7", "8", "9", "later"}; !slices.Equal(got, want) {
		t.Errorf("after half was acknowledged %q came again", got)
	}
}

// counting counts lines by message and level.
type counting struct {
	slog.Handler
	mu    sync.Mutex
	lines []string
}

func (c *counting) Handle(ctx context.Context, r slog.Record) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := r.Level.String() + " " + r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	c.lines = append(c.lines, text)
	return c.Handler.Handle(ctx, r)
}

func (c *counting) count(text string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

func TestCommandsAreNeverGivenUp(t *testing.T) {
	for name, c := range map[string]struct {
		bad  func(*bridgetest.Broker)
		is   error
		text string
	}{
		"bad credentials": {func(b *bridgetest.Broker) { b.OnConnect = func(int, bridgetest.Connect) int { return 4 } }, bridge.ErrRefused, "bad user name"},
		"refused subscription": {
			func(b *bridgetest.Broker) {
				b.OnSubscribe = func([]string) ([]byte, []byte) { return []byte{0x80}, nil }
			},
			nil, `the broker refuses filter "gw/ward-3-east/cmd/+/+": permit user "ward", client id "holdfast-ward-3-east-cloud-cmd" to subscribe to it`,
		},
		"storm": {
			func(b *bridgetest.Broker) {
				b.AfterConnack = func(int) bridgetest.Answer { return bridgetest.Answer{Reset: true} }
			},
			bridge.ErrPeerClosed, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := bridgetest.StartBroker(t, c.bad)
			lines := &counting{Handler: testkit.Logger(t).Handler()}
			o := commandOptions(b.URL())
			o.Username, o.Log = "ward", slog.New(lines)
			o.PasswordFile = passwordFile(t)
			k := take(t, o, nil)
			began := time.Now()
			for range 3 {
				err := <-k.states
				if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("state %v, want %v … %s", err, c.is, c.text)
				}
			}
			// A reset shows in one word or another.
			if n := lines.count("WARN commands are not taken"); n != 1 && (n < 1 || name != "storm") {
				t.Errorf("the same trouble was told %d times", n)
			}
			b.Script(func(b *bridgetest.Broker) { b.OnConnect, b.OnSubscribe, b.AfterConnack = nil, nil, nil })
			k.waitUp()
			if n := lines.count("INFO commands are taken"); n != 1 {
				t.Errorf("%d lines about being up", n)
			}
			for _, c := range b.Connects() {
				if c.Clean || c.ClientID != "holdfast-ward-3-east-cloud-cmd" || c.WillTopic != "" {
					t.Errorf("CONNECT %+v", c)
				}
			}
			if n := len(b.Connects()); n > 3 && time.Since(began) < time.Millisecond {
				t.Errorf("%d connections within %v", n, time.Since(began))
			}
		})
	}
	for _, o := range []mqttup.Options{{}, {URL: "http://h", ClientID: "c"}} {
		if err := mqttup.TakeCommands(t.Context(), o, filter, func(mqttup.Incoming) {}); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
	if err := mqttup.TakeCommands(t.Context(), commandOptions("mqtt://h"), "", func(mqttup.Incoming) {}); err == nil {
		t.Error("no filter is accepted")
	}
}

func TestCommandsClientID(t *testing.T) {
	seen := map[string]string{}
	for _, c := range [][2]string{
		{"ward-3-east", "cloud"},
		{"ward-3-east", "cloud-cmd"},
		{"ward", "3-east-cloud"},
		{strings.Repeat("x", 48), "cloud"},
		{strings.Repeat("x", 49), "cloud"},
		{strings.Repeat("x", 100), "cloud"},
		{strings.Repeat("x", 100), "clouds"},
		{"Zürich", "cloud"},
	} {
		for _, id := range []string{mqttup.ClientID(c[0], c[1]), mqttup.CommandsClientID(c[0], c[1])} {
			if other, ok := seen[id]; ok || len(id) > 64 {
				t.Errorf("%q has %q, as has %q", c, id, other)
			}
			seen[id] = strings.Join(c[:], ", ")
		}
	}
	if id := mqttup.CommandsClientID("ward-3-east", "cloud"); id != "holdfast-ward-3-east-cloud-cmd" {
		t.Error(id)
	}
}

// flood publishes n commands, and returns when all have come and were acknowledged in groups, as by a group commit. They may be
// delivered more than once only with Dup.
func flood(t testing.TB, url string, o mqttup.Options, n int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	commit := make(chan mqttup.Incoming, 2048)
	all := make(chan struct{})
	var workers sync.WaitGroup
	workers.Go(func() { // the group commit
		seen := make([]bool, n)
		for left := n; left > 0; {
			group := []mqttup.Incoming{<-commit}
			for len(commit) > 0 {
				group = append(group, <-commit)
			}
			for _, m := range group {
				i := int(binary.BigEndian.Uint32(m.Payload))
				if seen[i] {
					t.Errorf("command %d came twice, dup %v", i, m.Dup)
				} else {
					seen[i] = true
					left--
				}
				m.Ack()
			}
		}
		close(all)
	})
	up := make(chan struct{}, 10)
	o.OnUp = func() { up <- struct{}{} }
	workers.Go(func() {
		if err := mqttup.TakeCommands(ctx, o, filter, func(m mqttup.Incoming) { commit <- m }); err != nil {
			t.Error(err)
		}
	})
	<-up
	c, err := mqttup.Connect(ctx, mqttup.Options{URL: url, ClientID: "flood"}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var next sync.Mutex
	i := 0
	var publishers sync.WaitGroup
	for range 64 {
		publishers.Go(func() {
			for {
				next.Lock()
				mine := i
				i++
				next.Unlock()
				if mine >= n {
					return
				}
				if err := c.Publish(ctx, "gw/ward-3-east/cmd/d/submit", binary.BigEndian.AppendUint32(nil, uint32(mine))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	<-all
	publishers.Wait()
	cancel()
	workers.Wait()
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
}

func TestTwentyThousandCommands(t *testing.T) {
	m := testkit.StartMosquitto(t, "max_queued_messages 0")
	const n = 20_000
	began := time.Now()
	flood(t, m.URL(), commandOptions(m.URL()), n)
	t.Logf("%.0f commands/s", n/time.Since(began).Seconds())
}

func BenchmarkCommands(b *testing.B) {
	m := testkit.StartMosquitto(b, "max_queued_messages 0")
	b.ResetTimer()
	flood(b, m.URL(), commandOptions(m.URL()), b.N)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
}
