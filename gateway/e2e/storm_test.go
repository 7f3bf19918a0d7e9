package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// stormSize is how many devices take part: E2E_STORM, or some that a test's time allows.
func stormSize(usual int) int {
	if n, err := strconv.Atoi(os.Getenv("E2E_STORM")); err == nil && n > 0 {
		return n
	}
	return usual
}

// calm is devices that do nothing wrong while others do: each publishes now and then with QoS 1 and waits for the acknowledgement.
// They never reconnect: a connection that ends is a failure.
type calm struct {
	t    *testing.T
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	took []time.Duration
}

func keepCalm(t *testing.T, devices []*device, topic string, every time.Duration) *calm {
	t.Helper()
	c := &calm{t: t, stop: make(chan struct{})}
	t.Cleanup(c.end)
	for i, d := range devices {
		c.wg.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for {
				begin := time.Now()
				if err := d.publish(t.Context(), fmt.Sprintf("%s/%d", topic, i), []byte("calm"), 1); err != nil {
					t.Errorf("a device that does nothing wrong: %v", err)
					return
				}
				c.mu.Lock()
				c.took = append(c.took, time.Since(begin))
				c.mu.Unlock()
				select {
				case <-c.stop:
					return
				case <-tick.C:
				}
			}
		})
	}
	return c
}

func (c *calm) end() {
	select {
	case <-c.stop:
	default:
		close(c.stop)
	}
	c.wg.Wait()
}

// String ends it and tells how long acknowledgements took.
func (c *calm) String() string {
	c.end()
	slices.Sort(c.took)
	n := len(c.took)
	if n == 0 {
		return "no acknowledgement"
	}
	return fmt.Sprintf("%d acknowledgements for others: median %v, p99 %v, longest %v", n, c.took[n/2].Round(10*time.Microsecond),
		c.took[n*99/100].Round(10*time.Microsecond), c.took[n-1].Round(10*time.Microsecond))
}

// poll asks the API for its status now and then until ctx ends, and tells how long it took at most.
func poll(ctx context.Context, t *testing.T, address, token string) string {
	asked := 0
	var slowest time.Duration
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for ctx.Err() == nil {
		begin := time.Now()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/api/v1/status", nil)
		if err != nil {
			t.Error(err)
			return ""
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("the API does not answer: %v", err)
		}
		asked++
		slowest = max(slowest, time.Since(begin))
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Sprintf("the API answered %d times, at slowest after %v", asked, slowest.Round(time.Millisecond))
}

// watched follows the API's events until end, and asks it now and then unless somebody else does. All of it has to answer in time,
// `holdfast status` too.
func watched(t *testing.T, g *testkit.Gateway, bin string, ask bool) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	token, err := g.Token()
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.HTTP+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	wg.Go(func() {
		defer resp.Body.Close()
		for lines := bufio.NewReader(resp.Body); ; {
			if _, err := lines.ReadString('\n'); err != nil {
				if ctx.Err() == nil {
					t.Errorf("the stream of events ended: %v", err)
				}
				return
			}
		}
	})
	answered := ""
	if ask {
		wg.Go(func() { answered = poll(ctx, t, g.HTTP, token) })
	}
	return func() {
		t.Helper()
		if out, errs, code := holdfast(t, bin, "status", "--config", g.File); code != 0 || !strings.Contains(out, "telemetry") {
			t.Errorf("holdfast status: exit code %d: %s%s", code, out, errs)
		}
		cancel()
		wg.Wait()
		t.Log(answered)
		if n := series(t, g); n > 2000 {
			t.Errorf("/metrics has %d series", n)
		}
	}
}

// series counts those of /metrics.
func series(t *testing.T, g *testkit.Gateway) int {
	t.Helper()
	b, err := g.Call(http.MethodGet, "/metrics", nil, http.StatusOK)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range bytes.Lines(b) {
		if line[0] != '#' {
			n++
		}
	}
	return n
}

// metric is 0 if it cannot be asked.
func metric(t *testing.T, g *testkit.Gateway, name string, labels ...string) float64 {
	t.Helper()
	v, err := g.Metric(name, labels...)
	if err != nil {
		t.Error(err)
	}
	return v
}

const mib = 1 << 20

// bystanders are devices that do nothing wrong, in a process of their own: this one is busy being the storm, and what it measured
// would be its own delays.
type bystanders struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.Closer
	lines *bufio.Scanner
}

// bystanderConfig is what that process is told, in its environment.
type bystanderConfig struct {
	Address string
	CA      string            // file
	Secrets map[string]string // by device
	HTTP    string            // the API's address
	Token   string            // and its key
}

func startBystanders(t *testing.T, c bystanderConfig) *bystanders {
	t.Helper()
	conf, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBystanders$", "-test.v")
	cmd.Env = append(os.Environ(), "E2E_BYSTANDERS="+string(conf))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &bystanders{t, cmd, in, bufio.NewScanner(out)}
	b.until("connected")
	return b
}

// until reads up to the line that begins so.
func (b *bystanders) until(start string) string {
	b.t.Helper()
	var all []string
	for b.lines.Scan() {
		if rest, ok := strings.CutPrefix(b.lines.Text(), "bystanders "+start); ok {
			return rest
		}
		all = append(all, b.lines.Text())
	}
	b.t.Fatalf("the bystanders end: %v", all)
	return ""
}

// end ends them and tells how they fared. One that lost its connection fails the test.
func (b *bystanders) end() string {
	b.t.Helper()
	b.stdin.Close()
	s := b.until("fared")
	if err := b.cmd.Wait(); err != nil {
		b.t.Errorf("a device that does nothing wrong: %v: %s", err, s)
	}
	return s
}

// TestBystanders is that process.
func TestBystanders(t *testing.T) {
	var c bystanderConfig
	if json.Unmarshal([]byte(os.Getenv("E2E_BYSTANDERS")), &c) != nil {
		t.Skip("a part of other tests")
	}
	ca, err := os.ReadFile(c.CA)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	var all []*device
	for id, secret := range c.Secrets {
		d := &device{waiting: map[uint16]chan *mqtt.Ack{}, tls: &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}}
		k := login(mqtt.V5, id, secret)
		k.KeepAlive = 2 // it says by itself when no PINGRESP comes in time
		if err := d.connect(t.Context(), c.Address, k); err != nil {
			t.Fatal(err)
		}
		defer d.close()
		all = append(all, d)
	}
	fmt.Println("bystanders connected")
	calm := keepCalm(t, all, "dt/calm", 20*time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan string, 1)
	go func() { answered <- poll(ctx, t, c.HTTP, c.Token) }()
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	fmt.Printf("bystanders fared %v; %s\n", calm, <-answered)
}

// TestDevicesComeAllAtOnce has registered devices come over TLS at the same moment, each with its token, a session and a command that
// waits for it. All get in and get their command; those that are connected already are served meanwhile.
// E2E_STORM=10000 is the long form.
func TestDevicesComeAllAtOnce(t *testing.T) {
	n := stormSize(300)
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Cur < uint64(n)+500 {
		t.Skipf("%d devices need as many descriptors, and some: ulimit -n is %d, %v", n, files.Cur, err)
	}
	path := bin(t)
	a := newAuthority(t, path)
	secure := testkit.FreeAddr(t)
	s := startGated(t, testkit.GatewayConfig{
		Listeners: []string{fmt.Sprintf("{ name: tls, protocol: mqtts, address: %q, tls: { cert: %q, key: %q } }", secure, a.path("server.crt"), a.path("server.key"))},
	})
	s.tls = secure
	conf := a.client("")
	ids := make([]string, n)
	secrets := make([]string, n)
	many(16, n, func(i int) {
		ids[i] = fmt.Sprintf("storm-%05d", i)
		secrets[i] = s.register(ids[i], nil).Secret
		body := map[string]any{"id": ids[i], "name": "hello", "one_way": true}
		if _, err := s.Call(http.MethodPost, "/api/v1/devices/"+ids[i]+"/commands", body, http.StatusCreated); err != nil {
			t.Error(err)
		}
	})
	const others = 10
	token, err := s.Token()
	if err != nil {
		t.Fatal(err)
	}
	bystanding := bystanderConfig{Address: secure, CA: a.path("ca.crt"), Secrets: map[string]string{}, HTTP: s.HTTP, Token: token}
	for i := range others {
		id := fmt.Sprintf("calm-%d", i)
		bystanding.Secrets[id] = s.register(id, nil).Secret
	}
	before := startBystanders(t, bystanding)
	<-time.After(time.Second)
	t.Logf("before: %s", before.end())
	restingRSS := s.RSS()

	commitsBefore, spentBefore := metric(t, s.Gateway, "holdfast_kv_commit_seconds_count"), metric(t, s.Gateway, "holdfast_kv_commit_seconds_sum")
	during := startBystanders(t, bystanding)
	end := watched(t, s.Gateway, path, false)
	var in, again, commanded atomic.Int64
	var slowest atomic.Int64
	begin := time.Now()
	clients := make([]*mqtt.Client, n)
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.Abort()
				<-c.Done()
			}
		}
	}()
	many(n, n, func(i int) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		c := login(mqtt.V311, ids[i], secrets[i])
		c.CleanStart = false
		o := mqtt.ClientOptions{
			Address: secure, TLS: &tls.Config{RootCAs: conf.RootCAs, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}, Connect: c,
			OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
				if bytes.HasPrefix(p.Topic, []byte("cmd/"+ids[i]+"/req/")) {
					commanded.Add(1)
				}
			},
		}
		client, err := mqtt.Dial(ctx, o)
		// All devices' own handshakes are computed here, by one process, so that some take longer than a CONNECT may.
		for pause := time.Second; err != nil && ctx.Err() == nil; pause *= 2 {
			again.Add(1)
			select {
			case <-ctx.Done():
			case <-time.After(pause/2 + rand.N(pause)):
			}
			client, err = mqtt.Dial(ctx, o)
		}
		if err != nil {
			t.Errorf("%s: %v", ids[i], err)
			return
		}
		clients[i] = client
		slowest.Store(max(slowest.Load(), int64(time.Since(begin))))
		in.Add(1)
		if _, err := client.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/" + ids[i] + "/req/#", QoS: 1}}}); err != nil {
			t.Errorf("%s: %v", ids[i], err)
		}
	})
	testkit.Eventually(t, time.Minute, "every device has its command", func() bool { return commanded.Load() == int64(n) })
	t.Logf("%d devices over TLS, %d tried again: all in after %v, with their commands after %v; the gateway holds %d MiB, %d at most, before %d: %.1f KiB a device",
		in.Load(), again.Load(), time.Duration(slowest.Load()).Round(time.Millisecond), time.Since(begin).Round(time.Millisecond),
		s.RSS()/mib, s.PeakRSS()/mib, restingRSS/mib, float64(s.PeakRSS()-restingRSS)/1024/float64(n))
	if n := s.Devices(); n != int(in.Load())+others {
		t.Errorf("%d devices are connected, not %d", n, int(in.Load())+others)
	}
	t.Logf("during: %s", during.end())
	commits, spent := metric(t, s.Gateway, "holdfast_kv_commit_seconds_count"), metric(t, s.Gateway, "holdfast_kv_commit_seconds_sum")
	t.Logf("%.0f commits took %.1f ms in the mean; handshakes waited %.1f s in all, %v were given up", commits-commitsBefore, 1000*(spent-spentBefore)/(commits-commitsBefore), metric(t, s.Gateway, "holdfast_broker_handshake_wait_seconds_total"),
		metric(t, s.Gateway, "holdfast_broker_handshakes_abandoned_total"))
	end()
	if most := restingRSS + 64*mib + int64(n)*150*1024; s.PeakRSS() > most {
		t.Errorf("it held %d MiB, more than %d", s.PeakRSS()/mib, most/mib)
	}
}

// Devices is how many are connected.
func (s *gated) Devices() int {
	st, err := s.Status()
	if err != nil {
		s.t.Error(err)
		return 0
	}
	return st.Devices.Connected
}

// many calls f for each of 0…n-1, so many at once.
func many(atOnce, n int, f func(i int)) {
	var wg sync.WaitGroup
	places := make(chan struct{}, atOnce)
	for i := range n {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			f(i)
		})
	}
	wg.Wait()
}

// rawPeer connects and reads only the CONNACK.
func rawPeer(t *testing.T, addr string, c mqtt.Connect) net.Conn {
	t.Helper()
	nc := testkit.Dial(t, addr)
	if _, err := nc.Write(mqtt.AppendConnect(nil, &c)); err != nil {
		t.Fatal(err)
	}
	_ = nc.SetReadDeadline(time.Now().Add(10 * time.Second))
	var head [2]byte
	if _, err := io.ReadFull(nc, head[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, nc, int64(head[1])); err != nil { // a CONNACK is short
		t.Fatal(err)
	}
	return nc
}

// TestSubscribersThatReadNothing has many clients subscribe to everything and read nothing, with QoS 0 and 1, and others that are away
// with a session. Publishers are not slowed, a subscriber that reads gets everything, memory stays.
func TestSubscribersThatReadNothing(t *testing.T) {
	t.Parallel()
	n := stormSize(150)
	path := bin(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+`routes: [ { match: "local/#", lane: none } ]`+"\n")
	var deaf []net.Conn
	for i := range n {
		c := mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprint("deaf-", i), CleanStart: i%3 != 2}
		nc := rawPeer(t, g.Addr, c)
		_ = nc.(*net.TCPConn).SetReadBuffer(4096)
		sub := mqtt.AppendSubscribe(nil, mqtt.V311, &mqtt.Subscribe{ID: 1, Filters: []mqtt.Subscription{{Filter: "local/#", QoS: byte(i % 2)}}})
		if _, err := nc.Write(sub); err != nil {
			t.Fatal(err)
		}
		deaf = append(deaf, nc)
	}
	testkit.Eventually(t, 10*time.Second, "all have subscribed", func() bool { return metric(t, g, "holdfast_broker_subscriptions") == float64(n) })
	for i, nc := range deaf {
		if i%3 == 2 { // away, with a session
			nc.Close()
		}
	}
	const size, messages, ahead = 16 << 10, 1500, 4
	got := make(chan struct{}, messages)
	reader := newDevice(t, g.Addr, "reader", mqtt.V5)
	reader.close()
	reader.heard = func(*mqtt.Publish) { got <- struct{}{} }
	if err := reader.connect(t.Context(), g.Addr, mqtt.Connect{Version: mqtt.V5, ClientID: "reader", CleanStart: true}); err != nil {
		t.Fatal(err)
	}
	reader.subscribe(t, "local/#")
	end := watched(t, g, path, true)
	pub := newDevice(t, g.Addr, "publisher", mqtt.V5)
	payload := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(payload)
	begin := time.Now()
	var slowest time.Duration
	await := func(i int) {
		select {
		case <-got:
		case <-time.After(20 * time.Second):
			t.Fatalf("the subscriber that reads got %d of %d", i, messages)
		}
	}
	for i := range messages {
		if i >= ahead { // so that the one that reads keeps up, whatever else this machine has to do
			await(i - ahead)
		}
		at := time.Now()
		if err := pub.publish(t.Context(), "local/x", payload, 1); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		slowest = max(slowest, time.Since(at))
	}
	took := time.Since(begin)
	for i := range ahead {
		await(messages - ahead + i)
	}
	queued := metric(t, g, "holdfast_broker_deliveries_queued_bytes")
	t.Logf("%d messages of %d KiB to %d subscribers that read nothing: in %v, slowest acknowledgement %v; %.0f MiB wait, peak RSS %d MiB", messages, size>>10, n,
		took.Round(time.Millisecond), slowest.Round(time.Millisecond), queued/mib, g.PeakRSS()/mib)
	if queued > 64*mib {
		t.Errorf("%.0f MiB wait for subscribers", queued/mib)
	}
	if most := int64(400 * mib); g.PeakRSS() > most {
		t.Errorf("it held %d MiB", g.PeakRSS()/mib)
	}
	if metric(t, g, "holdfast_broker_deliveries_dropped_total") == 0 {
		t.Error("nothing was dropped: the test shows nothing")
	}
	// With QoS 1 the system takes all that may be under way to one client, so nobody sees that he does not read: he just gets no more.
	testkit.Eventually(t, 30*time.Second, "those with QoS 0 are cut", func() bool {
		return metric(t, g, "holdfast_broker_connections_ended_total", `reason="slow"`) >= float64(n/3)
	})
	end()
}

// TestPublishersOutrunTheDisk has publishers send as fast as they are acknowledged, and a disk that takes its time with each fsync.
// They are held back, each gets its share, memory stays, and who sends little is served meanwhile, alarms as others.
func TestPublishersOutrunTheDisk(t *testing.T) {
	t.Parallel()
	path := bin(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed (Debian: apt-get install strace)")
	}
	if out, err := exec.CommandContext(t.Context(), strace, "-f", "--seccomp-bpf", "-e", "trace=fdatasync", "true").CombinedOutput(); err != nil {
		t.Skipf("strace cannot trace here: %v: %s", err, out)
	}
	const delay = 150 * time.Millisecond
	g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
		Devices: "{ anonymous: true }", YAML: logYAML,
		Before: fmt.Sprintf("set -- %q -D -f -o /dev/null --seccomp-bpf -e trace=fsync,fdatasync -e inject=fsync,fdatasync:delay_enter=%d \"$0\" \"$@\"; exec \"$@\"",
			strace, delay.Microseconds()),
	})
	resting := g.RSS()
	var calmOnes []*device
	for i := range 5 {
		calmOnes = append(calmOnes, newDevice(t, g.Addr, fmt.Sprint("calm-", i), mqtt.V311))
	}
	others := keepCalm(t, calmOnes[1:], "dt/calm", 50*time.Millisecond)
	alarms := keepCalm(t, calmOnes[:1], "alarm/calm", 50*time.Millisecond)
	end := watched(t, g, path, true)
	const flooders = 30
	acked := make([]atomic.Int64, flooders)
	payload := make([]byte, 16<<10)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(payload)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	many(flooders, flooders, func(i int) {
		c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
			Address: g.Addr, Connect: mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprint("flood-", i), CleanStart: true},
			WriteTimeout: time.Minute,
			OnAck: func(c *mqtt.Client, a *mqtt.Ack) {
				acked[i].Add(1)
				_ = c.Queue(&mqtt.Publish{QoS: 1, ID: a.ID, Topic: []byte("dt/flood"), Payload: payload})
			},
		})
		if err != nil {
			t.Error(err)
			return
		}
		for id := range uint16(200) {
			_ = c.Queue(&mqtt.Publish{QoS: 1, ID: id + 1, Topic: []byte("dt/flood"), Payload: payload})
		}
		c.Flush()
		select {
		case <-ctx.Done():
		case <-c.Done():
			t.Errorf("a publisher that outruns the disk was ended: %v", c.Err())
		}
		c.Abort()
		<-c.Done()
	})
	least, most, sum := int64(1<<62), int64(0), int64(0)
	for i := range acked {
		n := acked[i].Load()
		least, most, sum = min(least, n), max(most, n), sum+n
	}
	t.Logf("fsync takes %v; %d publishers got %d acknowledgements, from %d to %d each; peak RSS %d MiB, before %d", delay, flooders, sum, least, most,
		g.PeakRSS()/mib, resting/mib)
	t.Logf("alarms: %v", alarms)
	t.Logf("others: %v", others)
	end()
	if g.PeakRSS() > resting+150*mib {
		t.Errorf("it held %d MiB", g.PeakRSS()/mib)
	}
	if least == 0 || sum < flooders*10 {
		t.Errorf("a publisher got nothing acknowledged: %d at least, %d in all", least, sum)
	}
	balanced(t, g)
}

// TestConnectStorm has clients connect and disconnect as fast as they can for a while: under new ids, with sessions and without, many
// under the same id, with wrong passwords. What they took comes back, the log stays short, and who is connected notices nothing.
func TestConnectStorm(t *testing.T) {
	path := bin(t)
	_, seed := seeded(t)
	u := testkit.StartMosquitto(t)
	g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
		Devices: "{ anonymous: true }",
		YAML:    "log: { level: info, format: json }\nupstreams:\n" + upstreamYAML("cloud", u.Addr, "batch", ""),
	})
	var steady []*device
	for i := range 5 {
		steady = append(steady, newDevice(t, g.Addr, fmt.Sprint("calm-", i), mqtt.V5))
	}
	known := &gated{Gateway: g, t: t, bin: path}
	known.register("known", nil)
	for i := range 200 { // buffers, caches and the like are there before it is measured
		rawPeer(t, g.Addr, mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprint("first-", i), CleanStart: true}).Close()
	}
	testkit.Eventually(t, 10*time.Second, "they are gone", func() bool { return metric(t, g, "holdfast_broker_connections_open") == 5 })
	goroutines, resting := metric(t, g, "go_goroutines"), g.RSS()
	lines := strings.Count(g.Logs(), "\n")

	during := keepCalm(t, steady, "dt/calm", 50*time.Millisecond)
	end := watched(t, g, path, true)
	duration := 5 * time.Second
	if d, err := time.ParseDuration(os.Getenv("E2E_STORM_FOR")); err == nil {
		duration = d
	}
	var tries, let atomic.Int64
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	begin := time.Now()
	many(24, 24, func(k int) {
		rng := rand.New(rand.NewPCG(seed, uint64(k)))
		for i := 0; ctx.Err() == nil; i++ {
			c := mqtt.Connect{Version: []mqtt.Version{mqtt.V311, mqtt.V5}[rng.IntN(2)], CleanStart: rng.IntN(2) == 0}
			if c.Version == mqtt.V5 && !c.CleanStart {
				c.SessionExpiry = 3600
			}
			switch rng.IntN(4) {
			case 0, 1:
				c.ClientID = fmt.Sprintf("new-%d-%d", k, i)
			case 2:
				c.ClientID = fmt.Sprintf("fought-for-%d", rng.IntN(3))
			case 3:
				c.ClientID, c.HasUsername, c.Username, c.HasPassword = "known", true, "known", true
				c.Password = []byte("hft_wrong")
			}
			from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 3, byte(k), byte(i%250+1))}, Timeout: 5 * time.Second}
			nc, err := from.DialContext(ctx, "tcp", g.Addr)
			if err != nil {
				continue
			}
			tries.Add(1)
			_ = nc.(*net.TCPConn).SetLinger(0) // no port waits in TIME_WAIT
			_ = nc.SetDeadline(time.Now().Add(time.Second))
			out := mqtt.AppendConnect(nil, &c)
			if rng.IntN(2) == 0 {
				_, _ = nc.Write(mqtt.AppendDisconnect(out, c.Version, mqtt.Success, ""))
			} else if _, err := nc.Write(out); err == nil {
				var b [4]byte
				if _, err := io.ReadFull(nc, b[:]); err == nil && b[3] == 0 {
					let.Add(1)
				}
			}
			nc.Close()
		}
	})
	took := time.Since(begin)
	rate := float64(tries.Load()) / took.Seconds()
	t.Logf("during: %v", during)
	end()
	testkit.EventuallyNil(t, 30*time.Second, "what the storm took comes back", func() error {
		if n := metric(t, g, "holdfast_broker_connections_open"); n != float64(len(steady)) {
			return fmt.Errorf("%v connections", n)
		}
		if n := metric(t, g, "go_goroutines"); n > goroutines+20 {
			return fmt.Errorf("%v goroutines, before %v", n, goroutines)
		}
		return nil
	})
	log := g.Logs()
	logged := strings.Count(log, "\n") - lines
	sessions := metric(t, g, "holdfast_broker_sessions")
	st := balanced(t, g)
	events := uint64(0)
	for _, a := range st.Ledger.Accounts {
		if a.Lane == "system" {
			events = a.Accepted.Messages
		}
	}
	t.Logf("%.0f connects a second for %v, %d were seen let in; %v sessions are left; %d lines logged; %d events; RSS %d MiB, before %d, at most %d", rate,
		took.Round(time.Millisecond), let.Load(), sessions, logged, events, g.RSS()/mib, resting/mib, g.PeakRSS()/mib)
	if most := int(took.Seconds()*20) + 100; logged > most {
		t.Errorf("%d lines logged, more than %d", logged, most)
		counts := map[string]int{}
		for line := range strings.Lines(log) {
			var l struct{ Msg string }
			_ = json.Unmarshal([]byte(line), &l)
			counts[l.Msg]++
		}
		t.Log(counts)
	}
	if most := uint64(30_000 + 100*took.Seconds() + 1000); events > most {
		t.Errorf("%d events of devices, more than %d", events, most)
	}
	if sessions > 50_000 {
		t.Errorf("%v sessions", sessions)
	}
	if g.PeakRSS() > resting+150*mib {
		t.Errorf("it held %d MiB", g.PeakRSS()/mib)
	}
}

// TestOutOfDescriptors has more clients come than the process has descriptors for. Those that are connected go on, the store opens its
// tables, and when the others go new ones come in.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	path := bin(t)
	for _, limit := range []int{64, 128} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			t.Parallel()
			away := testkit.FreeAddr(t)
			g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
				Devices: "{ anonymous: true }", YAML: logYAML + "upstreams:\n" + upstreamYAML("cloud", away, "batch", ""),
				Before: fmt.Sprintf("ulimit -n %d", limit),
			})
			if !strings.Contains(g.Logs(), "connections are limited") {
				t.Error("it does not say that there are few descriptors")
			}
			first := newDevice(t, g.Addr, "first", mqtt.V5)
			var crowd []net.Conn
			for range 3 * limit {
				nc := testkit.Dial(t, g.Addr)
				crowd = append(crowd, nc)
			}
			testkit.Eventually(t, 10*time.Second, "some are turned away", func() bool {
				return metric(t, g, "holdfast_broker_connections_turned_away_total", `limit="total"`) > 0
			})
			// Tables are written, and read again later: 60 MB are several memtables.
			payload := make([]byte, 200<<10)
			_, _ = rand.NewChaCha8([32]byte{1}).Read(payload)
			for i := range 300 {
				if err := first.publish(t.Context(), "dt/x", payload, 1); err != nil {
					t.Fatalf("message %d: %v", i, err)
				}
			}
			if out, errs, code := holdfast(t, path, "status", "--config", g.File); code != 0 {
				t.Errorf("holdfast status: exit code %d: %s%s", code, out, errs)
			}
			open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", g.PID()))
			if err != nil {
				t.Fatal(err)
			}
			if len(open) >= limit {
				t.Errorf("all %d descriptors are taken", len(open))
			}
			for _, nc := range crowd {
				nc.Close()
			}
			testkit.Eventually(t, 10*time.Second, "a new one comes in", func() bool {
				d := &device{waiting: map[uint16]chan *mqtt.Ack{}}
				if d.connect(t.Context(), g.Addr, mqtt.Connect{Version: mqtt.V311, ClientID: "late", CleanStart: true}) != nil {
					return false
				}
				d.close()
				return true
			})
			_, port, _ := strings.Cut(away, ":")
			testkit.StartMosquitto(t, "listener "+port+" 127.0.0.1")
			drained(t, g, "cloud", 30*time.Second)
			balanced(t, g)
		})
	}
}

// sleeper is a device that goes on whatever the gateway does: it pings in time and never gives up by itself.
type sleeper struct {
	nc   net.Conn
	stop chan struct{}
	wg   sync.WaitGroup
	end  atomic.Pointer[error]
	got  atomic.Int64 // packets
}

func startSleeper(t *testing.T, addr string, c mqtt.Connect) *sleeper {
	t.Helper()
	s := &sleeper{nc: rawPeer(t, addr, c), stop: make(chan struct{})}
	_ = s.nc.SetReadDeadline(time.Time{})
	s.wg.Go(func() {
		var b [4096]byte
		for {
			n, err := s.nc.Read(b[:])
			if err != nil {
				s.end.Store(&err)
				return
			}
			s.got.Add(int64(n))
		}
	})
	s.wg.Go(func() {
		tick := time.NewTicker(time.Duration(c.KeepAlive) * time.Second / 4)
		defer tick.Stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick.C:
				_, _ = s.nc.Write(mqtt.AppendPingreq(nil))
			}
		}
	})
	t.Cleanup(func() {
		close(s.stop)
		s.nc.Close()
		s.wg.Wait()
	})
	return s
}

// TestGatewayStandsStill stops the process with SIGSTOP for longer than keep-alives and the time for an acknowledgement last. When it
// goes on no device that went on sending is gone, the command under way was not given up, and the upstream is back.
// E2E_STOP=60s is the long form.
func TestGatewayStandsStill(t *testing.T) {
	t.Parallel()
	stopFor := 7 * time.Second
	if d, err := time.ParseDuration(os.Getenv("E2E_STOP")); err == nil {
		stopFor = d
	}
	u := startUpstream(t)
	path := bin(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"devices: { anonymous: true, commands: { ack_timeout: 2s } }\nupstreams:\n"+
		upstreamYAML("cloud", u.broker.Addr, "batch", ""))
	var sleepers []*sleeper
	for i := range 40 {
		v := []mqtt.Version{mqtt.V311, mqtt.V5}[i%2]
		sleepers = append(sleepers, startSleeper(t, g.Addr, mqtt.Connect{Version: v, ClientID: fmt.Sprint("sleeper-", i), CleanStart: true, KeepAlive: uint16(2 + i%3)}))
	}
	// A device with a command that it acknowledges while the gateway stands still.
	commanded := make(chan uint16, 10)
	worker, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
		Address: g.Addr, ManualAck: true, Connect: mqtt.Connect{Version: mqtt.V5, ClientID: "worker", CleanStart: true},
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) { commanded <- p.ID },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { worker.Abort(); <-worker.Done() })
	if _, err := worker.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "cmd/worker/req/#", QoS: 1}}}); err != nil {
		t.Fatal(err)
	}
	d := newDevice(t, g.Addr, "publisher", mqtt.V311)
	if err := d.publish(t.Context(), "dt/before", nil, 1); err != nil {
		t.Fatal(err)
	}
	body := map[string]any{"id": "in-flight", "name": "do", "one_way": true, "max_attempts": 1}
	if _, err := g.Call(http.MethodPost, "/api/v1/devices/worker/commands", body, http.StatusCreated); err != nil {
		t.Fatal(err)
	}
	id := <-commanded
	g.Signal(syscall.SIGSTOP)
	if err := worker.Ack(mqtt.TypePuback, id, mqtt.Success); err != nil {
		t.Error(err)
	}
	sent := make(chan error, 1)
	go func() { sent <- d.publish(t.Context(), "dt/during", nil, 1) }()
	<-time.After(stopFor)
	g.Signal(syscall.SIGCONT)
	begin := time.Now()
	if stopFor < 10*time.Second {
		if err := <-sent; err != nil {
			t.Errorf("what was sent meanwhile: %v", err)
		}
		t.Logf("acknowledgements go on after %v", time.Since(begin).Round(time.Millisecond))
	} else {
		<-sent // the device's own patience is over
	}
	testkit.Eventually(t, 10*time.Second, "the command is delivered", func() bool {
		v, err := command(t, g, "in-flight")
		return err == nil && v.ended()
	})
	if v, err := command(t, g, "in-flight"); err != nil || v.State != "DELIVERED" || v.Attempts != 1 {
		t.Errorf("the command that was acknowledged: %+v, %v", v, err)
	}
	if err := d.publish(t.Context(), "dt/after", nil, 1); err != nil {
		t.Error(err)
	}
	// Deadlines that struck meanwhile have had their effect when everybody has been answered anew.
	before := make([]int64, len(sleepers))
	for i, s := range sleepers {
		before[i] = s.got.Load()
	}
	for i, s := range sleepers {
		testkit.Eventually(t, 10*time.Second, "an answer", func() bool { return s.got.Load() > before[i] || s.end.Load() != nil })
		if err := s.end.Load(); err != nil {
			t.Errorf("sleeper %d, keep alive %d s, went on and was ended: %v", i, 2+i%3, *err)
		}
	}
	testkit.Eventually(t, 20*time.Second, "upstream has it all", func() bool { return len(u.inbox.Others()) == 3 })
	balanced(t, g)
}
