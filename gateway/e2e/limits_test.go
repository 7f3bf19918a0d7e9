package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// TestConnectsPerMinute has a device connect more often than its role allows.
func TestConnectsPerMinute(t *testing.T) {
	t.Parallel()
	s := startGated(t, testkit.GatewayConfig{Devices: `{ roles: [ { name: seldom, limits: { connects_per_minute: 3 } } ] }`})
	for v, reason := range map[mqtt.Version]mqtt.Reason{mqtt.V311: mqtt.ServerUnavailable, mqtt.V5: mqtt.ConnectionRateExceeded} {
		id := fmt.Sprintf("dev-%d", v)
		c := login(v, id, s.register(id, map[string]any{"role": "seldom"}).Secret)
		var d *device
		for range 3 {
			d = s.in(c)
		}
		for range 3 {
			s.out(reason, "for the fourth time in a minute", c)
		}
		stays(t, d, "a connect too many was refused")
	}
	if n, err := s.Metric("holdfast_devices_logins_total", `result="too_often"`); err != nil || n != 6 {
		t.Errorf("%v are counted, %v; want 6", n, err)
	}
}

// outcomes sends packets with QoS 1, so many ahead of their answers, and returns what each is answered, until the connection ends or
// all is answered.
func outcomes(t *testing.T, s *gated, c mqtt.Connect, ahead int, packets []mqtt.Publish) (reasons []mqtt.Reason, end error) {
	t.Helper()
	var mu sync.Mutex
	all := make(chan struct{})
	window := make(chan struct{}, ahead)
	o := mqtt.ClientOptions{Address: s.Addr, Connect: c, OnAck: func(_ *mqtt.Client, a *mqtt.Ack) {
		mu.Lock()
		defer mu.Unlock()
		reasons = append(reasons, a.Reason)
		<-window
		if len(reasons) == len(packets) {
			close(all)
		}
	}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client, err := mqtt.Dial(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { client.Abort(); <-client.Done() }()
send:
	for i := range packets {
		select {
		case window <- struct{}{}:
		case <-client.Done():
			break send
		case <-time.After(20 * time.Second):
			t.Errorf("packet %d may not be sent for 20 s", i)
			break send
		}
		packets[i].QoS, packets[i].ID = 1, uint16(i+1)
		if client.Publish(&packets[i]) != nil {
			break
		}
	}
	select {
	case <-all:
	case <-client.Done():
		end = client.Err()
	case <-time.After(20 * time.Second):
		t.Error("not all is answered after 20 s")
	}
	mu.Lock()
	defer mu.Unlock()
	return slices.Clone(reasons), end
}

// TestMessageLimits has devices publish more than their role allows: MQTT 5 is told so, and disconnected if it goes on; MQTT 3.1.1 is read
// more slowly, and nothing is lost. Another device is not slowed, and SIGHUP changes limits under live connections.
func TestMessageLimits(t *testing.T) {
	t.Parallel()
	roles := func(messages int, bytes string) string {
		return fmt.Sprintf(`{ roles: [ { name: few, publish: ["dt/#"], limits: { messages_per_second: %d } }, { name: small, publish: ["dt/#"], limits: { bytes_per_second: %s } } ] }`,
			messages, bytes)
	}
	s := startGated(t, testkit.GatewayConfig{Devices: roles(20, "10KiB")})
	got := newMailbox()
	watch := s.in(login(mqtt.V5, "watch", s.register("watch", map[string]any{"role": "monitor"}).Secret), hears(got))
	watch.subscribe(t, "dt/#")
	other := s.in(login(mqtt.V311, "other", s.register("other", nil).Secret))
	device := func(v mqtt.Version, role string) mqtt.Connect {
		id := fmt.Sprintf("%s-%d", role, v)
		return login(v, id, s.register(id, map[string]any{"role": role}).Secret)
	}
	numbered := func(n, size int) (all []mqtt.Publish) {
		for i := range n {
			all = append(all, mqtt.Publish{Topic: []byte("dt/n"), Payload: fmt.Appendf(nil, "%06d%s", i, strings.Repeat(".", size-6))})
		}
		return all
	}
	// arrived takes what came until now: numbers, which have to be in order.
	arrived := func() (n int) {
		t.Helper()
		if err := other.publish(t.Context(), "dt/fence", nil, 1); err != nil {
			t.Fatal(err)
		}
		letters := got.until(t, "dt/fence")
		if !slices.IsSortedFunc(letters, func(a, b letter) int { return strings.Compare(a.payload, b.payload) }) {
			t.Error("messages came out of order")
		}
		return len(letters)
	}

	// MQTT 5, a little too much: some are refused, and those alone.
	begin := time.Now()
	reasons, end := outcomes(t, s, device(mqtt.V5, "few"), 100, numbered(100, 20))
	taken, refused := count(reasons, mqtt.Success), count(reasons, mqtt.QuotaExceeded)
	most := 20 + int(20*time.Since(begin).Seconds()) + 1
	if end != nil || taken+refused != 100 || taken < 20 || taken > most {
		t.Errorf("of 100 messages %d are taken and %d refused, %v; want 20 to %d taken, and 0x97 for the others", taken, refused, end, most)
	}
	if n := arrived(); n != taken {
		t.Errorf("%d are acknowledged, %d were taken", taken, n)
	}
	// Far too much: it is sent away.
	many := login(mqtt.V5, "many", s.register("many", map[string]any{"role": "few"}).Secret)
	reasons, end = outcomes(t, s, many, 100, numbered(2000, 20))
	var told *mqtt.Refused
	if !errors.As(end, &told) || told.Reason != mqtt.MessageRateTooHigh || count(reasons, mqtt.QuotaExceeded) < 100 {
		t.Errorf("who sends 2,000 messages at 20 a second is told %v after %d times 0x97", end, count(reasons, mqtt.QuotaExceeded))
	}
	arrived()
	// A backlog of more than may be sent at once, all that the gateway lets be on its way: what was taken of it is acknowledged, so that the
	// device comes back with less.
	backlog := login(mqtt.V5, "backlog", s.register("backlog", map[string]any{"role": "few"}).Secret)
	reasons, end = outcomes(t, s, backlog, 256, numbered(2000, 20))
	if n := arrived(); n != count(reasons, mqtt.Success) || n < 20 || !errors.As(end, &told) || told.Reason != mqtt.MessageRateTooHigh {
		t.Errorf("of a backlog %d are taken and %d acknowledged, %v", n, count(reasons, mqtt.Success), end)
	}
	begin = time.Now()
	reasons, end = outcomes(t, s, device(mqtt.V5, "small"), 100, numbered(30, 1000))
	taken, refused = count(reasons, mqtt.Success), count(reasons, mqtt.QuotaExceeded)
	most = 11 + int(10*time.Since(begin).Seconds()) + 1
	if end != nil || taken+refused != 30 || taken < 10 || taken > most {
		t.Errorf("of 30 messages of 1 kB %d are taken and %d refused, %v; want 10 to %d", taken, refused, end, most)
	}
	if n := arrived(); n != taken {
		t.Errorf("%d are acknowledged, %d were taken", taken, n)
	}

	// MQTT 3.1.1: 60 messages at 20 a second, of which a second's worth may come at once, take two seconds; 30 kB at 10 KiB two, too.
	for role, packets := range map[string][]mqtt.Publish{"few": numbered(60, 20), "small": numbered(30, 1000)} {
		begin := time.Now()
		reasons, end := outcomes(t, s, device(mqtt.V311, role), 100, packets)
		took := time.Since(begin)
		if end != nil || count(reasons, mqtt.Success) != len(packets) {
			t.Errorf("%s, MQTT 3.1.1: %d of %d are acknowledged, %v", role, len(reasons), len(packets), end)
		}
		if took < 1700*time.Millisecond || took > 8*time.Second {
			t.Errorf("%s, MQTT 3.1.1: %d messages take %v", role, len(packets), took)
		}
		if n := arrived(); n != len(packets) {
			t.Errorf("%s, MQTT 3.1.1: %d of %d have come", role, n, len(packets))
		}
	}
	if n, err := s.Metric("holdfast_broker_publish_slowed_seconds_total"); err != nil || n < 3 {
		t.Errorf("the metric tells of %v s, %v", n, err)
	}
	if n, err := s.Metric("holdfast_broker_publish_refused_total", `reason="rate"`); err != nil || n < 100 {
		t.Errorf("the metric tells of %v refused messages, %v", n, err)
	}

	// Limits change under a live connection.
	live := s.in(login(mqtt.V5, "live", s.register("live", map[string]any{"role": "few"}).Secret))
	if err := s.Configure(testkit.GatewayConfig{Devices: roles(0, "10KiB"), YAML: logYAML}); err != nil || !s.Reload() {
		t.Fatal("other limits are refused", err)
	}
	for range 100 {
		if err := live.publish(t.Context(), "dt/live", nil, 1); err != nil {
			t.Fatalf("without a limit: %v", err)
		}
	}
}

func count(reasons []mqtt.Reason, one mqtt.Reason) (n int) {
	for _, r := range reasons {
		if r == one {
			n++
		}
	}
	return n
}

// TestListenerMaxConnections opens more connections than a listener takes.
func TestListenerMaxConnections(t *testing.T) {
	t.Parallel()
	addr := testkit.FreeAddr(t)
	s := startGated(t, testkit.GatewayConfig{
		Limit: 2, Devices: "{ anonymous: true }", Listeners: []string{fmt.Sprintf("{ name: second, protocol: mqtt, address: %q }", addr)},
	})
	first := newDevice(t, s.Addr, "a", mqtt.V5)
	second := newDevice(t, s.Addr, "b", mqtt.V311)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	var slow net.Error
	if _, err := io.Copy(io.Discard, conn); errors.As(err, &slow) && slow.Timeout() {
		t.Error("a third connection is open after 5 s")
	}
	newDevice(t, addr, "c", mqtt.V5) // another listener's limit is its own
	stays(t, first, "a third was turned away")
	stays(t, second, "a third was turned away")
	if n, err := s.Metric("holdfast_broker_connections_turned_away_total", `limit="listener"`); err != nil || n != 1 {
		t.Errorf("%v are counted, %v; want 1", n, err)
	}
	second.close()
	testkit.EventuallyNil(t, 5*time.Second, "a place is free when one has left", func() error {
		_, err := s.try(login(mqtt.V5, "d", ""))
		return err
	})
}

// TestGuessingIsSlow tries wrong tokens from one address: the answers come later and later, and a device behind that very address, which
// shows the right one, does not notice.
func TestGuessingIsSlow(t *testing.T) {
	s := startGated(t, testkit.GatewayConfig{})
	good, victim := login(mqtt.V5, "good", s.register("good", nil).Secret), login(mqtt.V311, "victim", s.register("victim", nil).Secret)
	from := func(host string) func(*device) { return func(d *device) { d.from = host } }
	const bad = "127.9.9.9"
	guess := victim
	guess.Password = []byte("hft_" + strings.Repeat("x", 43))
	var waits []time.Duration
	for range 7 {
		begin := time.Now()
		s.out(mqtt.BadUsernameOrPassword, "with a guess", guess, from(bad))
		waits = append(waits, time.Since(begin))
	}
	t.Logf("the answers to wrong tokens came after %v", waits)
	for n, least := range []time.Duration{0, 0, 100, 200, 400, 800, 1600} {
		if waits[n] < least*time.Millisecond || waits[n] > least*time.Millisecond+time.Second {
			t.Errorf("answer %d came after %v, want %v", n+1, waits[n], least*time.Millisecond)
		}
	}
	// On and on, many at once, and for other devices as well.
	ctx, cancel := context.WithCancel(t.Context())
	var guessing sync.WaitGroup
	defer guessing.Wait()
	defer cancel()
	for n := range 12 {
		guessing.Go(func() {
			for ctx.Err() == nil {
				c := guess
				if n%2 == 0 {
					c.ClientID, c.Username = fmt.Sprintf("nobody-%d", n), fmt.Sprintf("nobody-%d", n)
				}
				d := &device{waiting: map[uint16]chan *mqtt.Ack{}, from: bad}
				if d.connect(ctx, s.Addr, c) == nil {
					t.Error("a guess is let in")
					d.close()
				}
				select { // who is turned away at once would else take the test's processor
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	testkit.Eventually(t, 10*time.Second, "the device that is guessed at is held off from there", func() bool {
		n, err := s.Metric("holdfast_devices_logins_total", `result="too_often"`)
		return err == nil && n > 0
	})
	var worst time.Duration
	for range 100 {
		begin := time.Now()
		s.in(good, from(bad)).close()
		worst = max(worst, time.Since(begin))
	}
	t.Logf("the good device waited %v at most", worst)
	if worst > 500*time.Millisecond {
		t.Errorf("the good device behind the address once waited %v", worst)
	}
	s.out(mqtt.ServerUnavailable, "at whom somebody guesses, from the guesser's address", victim, from(bad))
	begin := time.Now()
	s.in(victim)
	if took := time.Since(begin); took > 500*time.Millisecond {
		t.Errorf("the device that is guessed at waited %v, from its own address", took)
	}
}

// TestFlappingDeviceHurtsNobody has a device come and go a hundred times a second.
func TestFlappingDeviceHurtsNobody(t *testing.T) {
	up := testkit.StartMosquitto(t)
	told := watchPresence(t, up.Addr)
	s := startGated(t, testkit.GatewayConfig{YAML: fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL())})
	good := s.in(login(mqtt.V311, "good", s.register("good", nil).Secret))
	// latency of n messages of the good device, the worst and the median.
	latency := func(until <-chan struct{}) (worst, median time.Duration) {
		var all []time.Duration
		for {
			select {
			case <-until:
				slices.Sort(all)
				return all[len(all)-1], all[len(all)/2]
			case <-time.After(5 * time.Millisecond):
			}
			begin := time.Now()
			if err := good.publish(t.Context(), "dt/good", []byte("here"), 1); err != nil {
				t.Fatal(err)
			}
			all = append(all, time.Since(begin))
		}
	}
	quiet := make(chan struct{})
	time.AfterFunc(time.Second, func() { close(quiet) })
	_, before := latency(quiet)

	c := login(mqtt.V5, "flapper", s.register("flapper", nil).Secret)
	c.SessionExpiry, c.CleanStart = 3600, false
	order(t, s.Gateway, "flapper", "waits", nil)
	flap := func(lasts time.Duration) (n int) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(lasts); time.Now().Before(end); n++ {
			<-tick.C
			d := &device{waiting: map[uint16]chan *mqtt.Ack{}, from: "127.8.8.8"}
			if err := d.connect(t.Context(), s.Addr, c); err != nil {
				t.Errorf("the flapper: %v", err)
				break
			}
			d.close()
		}
		return n
	}
	flap(500 * time.Millisecond) // what is made once
	rss := s.RSS()
	over := make(chan struct{})
	flaps := 0
	go func() {
		defer close(over)
		flaps = flap(4 * time.Second)
	}()
	worst, median := latency(over)
	grown := s.RSS() - rss
	t.Logf("%d times in 4 s; the good device's median %v, was %v, worst %v; memory grew by %d KiB", flaps, median, before, worst, grown>>10)
	if flaps < 200 {
		t.Errorf("it came and went %d times only: the test has shown little", flaps)
	}
	if median > 10*before+20*time.Millisecond || worst > 2*time.Second {
		t.Errorf("another device's messages take %v, %v at worst; %v before", median, worst, before)
	}
	if grown > 32<<20 {
		t.Errorf("memory has grown by %d MiB", grown>>20)
	}

	// The state is true at the end, and the command that waited all the time comes once.
	got := newMailbox()
	d := s.in(c, hears(got))
	d.subscribe(t, "cmd/flapper/req/#")
	got.until(t, "cmd/flapper/req/waits/work")
	becomes(t, s.Gateway, "waits", "DELIVERED")
	var view struct {
		Presence struct {
			Connected bool `json:"connected"`
		} `json:"presence"`
	}
	if err := s.Get("/api/v1/devices/flapper", &view); err != nil || !view.Presence.Connected {
		t.Errorf("it is connected, and shown as %+v, %v", view, err)
	}
	if st, err := s.Status(); err != nil || st.Devices.Connected != 2 {
		t.Errorf("%+v, %v", st.Devices, err)
	}
	if n, err := s.Metric("holdfast_devices_presence_events_suppressed_total"); err != nil || n < float64(flaps) {
		t.Errorf("%v events are counted as held back, %v", n, err)
	}
	drained(t, s.Gateway, "cloud", 20*time.Second)
	// What was told of it: the first dozen comings and goings. The next comes when the minute is over, and is true.
	events := told.of("flapper")
	n := len(events)
	for range n {
		<-events
	}
	if n < 1 || n > 14 {
		t.Errorf("upstream was told %d times of the flapper", n)
	}
	if cycles() >= 20 { // the long form has the time
		e := <-events
		if e.State != "online" {
			t.Errorf("when the minute is over it is told to be %s", e.State)
		}
	}
}
