package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// api is a client of one gateway's HTTP API that keeps its connections.
type api struct {
	base, token string
	http        http.Client
}

func newAPI(e *env, g *testkit.Gateway, conns int) *api {
	token, err := g.Token()
	if err != nil {
		e.Fatalf("read the administrator's token: %v", err)
	}
	a := &api{base: "http://" + g.HTTP + "/api/v1", token: token}
	a.http.Transport = &http.Transport{MaxIdleConnsPerHost: conns, MaxConnsPerHost: conns}
	e.Cleanup(a.http.CloseIdleConnections)
	return a
}

// post sends body as JSON and reads the answer into into, unless that is nil.
func (a *api) post(ctx context.Context, path string, body, into any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.base+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("POST %s: %s: %.200s", path, resp.Status, answer)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(answer, into)
}

// parallel calls f(0) … f(n-1), so many at once, and returns the first error.
func parallel(n, at int, f func(i int) error) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, at)
	for range at {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(i); err != nil {
					errs <- err
					next.Store(int64(n))
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// commandsYAML is an upstream that takes commands.
func commandsYAML(up *testkit.Mosquitto) string {
	return fmt.Sprintf("log: { level: warn, format: text }\nupstreams:\n  - { name: cloud, url: %q }\n", up.URL())
}

func benchDevice(i int) string { return fmt.Sprintf("dev-%05d", i) }

// returning is a device of the return storm.
type returning struct {
	id         string
	client     *mqtt.Client
	subscribed time.Time // when SUBSCRIBE was sent
	first      time.Duration
	got        []string // command ids in the order of arrival
	wrong      string
}

// measureReturn lets devices come back at once to the commands that wait for them.
func measureReturn(ctx context.Context, c config, s *section) error {
	const each = 3
	n := c.devices
	var p50, p99, all, rss, rate sample
	for range c.rounds {
		err := round(c.dir, func(e *env) {
			up := testkit.StartMosquitto(e)
			g := testkit.StartGateway(e, c.bin, "bench", commandsYAML(up))
			devices := make([]*returning, n)
			for i := range devices {
				devices[i] = &returning{id: benchDevice(i)}
			}
			g.AwaitCommands(e)
			// They have been here before: that is how a gateway without a register knows them.
			if err := parallel(n, 64, func(i int) error { return devices[i].visit(ctx, g.Addr) }); err != nil {
				e.Fatalf("first visit: %v", err)
			}
			sendCommands(ctx, e, up.Addr, n*each, func(i int) (string, *wire.Submit) {
				return benchDevice(i % n), &wire.Submit{ID: fmt.Sprintf("c-%05d-%d", i%n, i/n), Name: "set", Payload: []byte(`{"level":3}`), OneWay: true}
			})
			awaitSubmitted(e, g, uint64(n*each))
			var done sync.WaitGroup
			done.Add(n)
			begin := time.Now()
			gap := time.Second / time.Duration(n)
			err := parallel(n, 256, func(i int) error {
				if d := time.Until(begin.Add(time.Duration(i) * gap)); d > 0 {
					time.Sleep(d)
				}
				return devices[i].comeBack(ctx, g.Addr, each, done.Done)
			})
			if err != nil {
				e.Fatalf("come back: %v", err)
			}
			finished := make(chan struct{})
			go func() { done.Wait(); close(finished) }()
			select {
			case <-finished:
			case <-time.After(60 * time.Second):
				e.Fatalf("not all commands came within 60 s")
			}
			took := time.Since(begin)
			rss = append(rss, float64(g.RSS())/(1<<20))
			firsts := make([]time.Duration, 0, n)
			for i, d := range devices {
				want := []string{fmt.Sprintf("c-%05d-0", i), fmt.Sprintf("c-%05d-1", i), fmt.Sprintf("c-%05d-2", i)}
				d.client.Abort()
				<-d.client.Done()
				if d.wrong != "" || !slices.Equal(d.got, want) {
					e.Fatalf("device %s got %v, want %v once each in order; %s", d.id, d.got, want, d.wrong)
				}
				firsts = append(firsts, d.first)
			}
			slices.Sort(firsts)
			p50 = append(p50, firsts[len(firsts)/2].Seconds()*1000)
			p99 = append(p99, firsts[len(firsts)*99/100].Seconds()*1000)
			all = append(all, took.Seconds()*1000)
			rate = append(rate, float64(n*each)/took.Seconds())
		})
		if err != nil {
			return err
		}
	}
	what := fmt.Sprintf("%s devices × %d commands, all back within 1 s", thousands(int64(n)), each)
	s.rows = []row{
		{what: what + ": SUBSCRIBE to first command, p99", value: p99, unit: "ms", target: atMost(1000, "ms")},
		{what: "the same, p50", value: p50, unit: "ms"},
		{what: "from the first CONNECT to the last command", value: all, unit: "ms"},
		{what: "commands delivered, each in order and once", value: rate, unit: "/s"},
		{what: "memory of the gateway at the end", value: rss, unit: "MiB RSS"},
	}
	return nil
}

func (d *returning) visit(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{Address: addr, Connect: mqtt.Connect{Version: mqtt.V311, ClientID: d.id, CleanStart: true, KeepAlive: 600}})
	if err != nil {
		return err
	}
	return c.Disconnect(mqtt.Success)
}

func (d *returning) comeBack(ctx context.Context, addr string, each int, done func()) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	var err error
	d.client, err = mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: addr,
		Connect: mqtt.Connect{Version: mqtt.V311, ClientID: d.id, CleanStart: true, KeepAlive: 600},
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
			device, id, _, ok := wire.ParseRequestTopic(string(p.Topic))
			switch {
			case !ok || device != d.id:
				d.wrong = "topic " + string(p.Topic)
			case p.Dup:
				d.wrong = "sent twice: " + id
			}
			if len(d.got) == 0 {
				d.first = time.Since(d.subscribed)
			}
			if d.got = append(d.got, id); len(d.got) == each {
				done()
			}
		},
	})
	if err != nil {
		return err
	}
	d.subscribed = time.Now()
	_, err = d.client.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.RequestFilter(d.id), QoS: 1}}})
	return err
}

// sendCommands publishes n commands at the upstream broker, as the cloud does.
func sendCommands(ctx context.Context, e *env, addr string, n int, command func(i int) (device string, s *wire.Submit)) {
	const window = 512
	room := make(chan struct{}, window)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	client, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: addr,
		Connect: mqtt.Connect{Version: mqtt.V311, ClientID: "bench-cloud", CleanStart: true, KeepAlive: 60},
		OnAck:   func(*mqtt.Client, *mqtt.Ack) { <-room },
	})
	if err != nil {
		e.Fatalf("connect to the upstream: %v", err)
	}
	for i := range n {
		device, s := command(i)
		b, err := wire.EncodeSubmit(s)
		if err != nil {
			e.Fatalf("encode a command: %v", err)
		}
		select {
		case room <- struct{}{}:
		case <-client.Done():
			e.Fatalf("upstream closed the connection: %v", client.Err())
		}
		p := mqtt.Publish{QoS: 1, ID: uint16(i%60000) + 1, Topic: []byte(wire.CommandTopic("bench", device, wire.ActionSubmit)), Payload: b}
		if err := client.Publish(&p); err != nil {
			e.Fatalf("publish a command: %v", err)
		}
	}
	for range window {
		room <- struct{}{}
	}
	if err := client.Disconnect(mqtt.Success); err != nil {
		e.Fatalf("disconnect from the upstream: %v", err)
	}
}

// awaitSubmitted waits until a gateway has taken n commands.
func awaitSubmitted(e *env, g *testkit.Gateway, n uint64) {
	testkit.EventuallyNil(e, 5*time.Minute, "all commands are taken", func() error {
		st, err := g.Status()
		switch {
		case err != nil:
			return err
		case st.Commands.Refused > 0:
			e.Fatalf("%d commands were refused", st.Commands.Refused)
		case st.Commands.Submitted < n:
			return fmt.Errorf("%d of %d", st.Commands.Submitted, n)
		}
		return nil
	})
}

// measureWay times a command from the request that submits it to its arrival at a device that is there.
func measureWay(ctx context.Context, c config, s *section) error {
	var p50, p99 sample
	for range c.rounds {
		err := round(c.dir, func(e *env) {
			g := testkit.StartGateway(e, c.bin, "bench", "log: { level: warn, format: text }\n")
			arrived := make(chan time.Time, 1)
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			client, err := mqtt.Dial(ctx, mqtt.ClientOptions{
				Address:   g.Addr,
				Connect:   mqtt.Connect{Version: mqtt.V5, ClientID: "dev", CleanStart: true, KeepAlive: 600},
				OnMessage: func(*mqtt.Client, *mqtt.Publish) { arrived <- time.Now() },
			})
			if err != nil {
				e.Fatalf("connect: %v", err)
			}
			defer func() { client.Abort(); <-client.Done() }()
			if _, err := client.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.RequestFilter("dev"), QoS: 1}}}); err != nil {
				e.Fatalf("subscribe: %v", err)
			}
			a := newAPI(e, g, 1)
			var took []time.Duration
			for end := time.Now().Add(c.seconds); time.Now().Before(end); {
				begin := time.Now()
				if err := a.post(ctx, "/devices/dev/commands", map[string]any{"name": "set", "payload": "1", "one_way": true}, nil); err != nil {
					e.Fatalf("submit: %v", err)
				}
				select {
				case at := <-arrived:
					took = append(took, at.Sub(begin))
				case <-ctx.Done():
					e.Fatalf("a command did not come")
				}
			}
			slices.Sort(took)
			p50 = append(p50, took[len(took)/2].Seconds()*1000)
			p99 = append(p99, took[len(took)*99/100].Seconds()*1000)
		})
		if err != nil {
			return err
		}
	}
	s.rows = []row{
		{what: "HTTP request to PUBLISH at the device, fsync, p50", value: p50, unit: "ms", target: atMost(3, "ms")},
		{what: "the same, p99", value: p99, unit: "ms"},
	}
	return nil
}

// measureSubmit sends commands for devices that are away, over the upstream topic.
func measureSubmit(ctx context.Context, c config, s *section) error {
	n := c.commands
	perDevice := 100
	devices := max(n/perDevice, 1)
	var rate, first, last, rss sample
	for range c.rounds {
		err := round(c.dir, func(e *env) {
			up := testkit.StartMosquitto(e)
			g := testkit.StartGateway(e, c.bin, "bench", commandsYAML(up))
			g.AwaitCommands(e)
			if err := parallel(devices, 32, func(i int) error {
				return (&returning{id: benchDevice(i)}).visit(ctx, g.Addr)
			}); err != nil {
				e.Fatalf("first visit: %v", err)
			}
			part := n / 10
			var marks []time.Duration
			begin := time.Now()
			go sendCommands(ctx, e, up.Addr, n, func(i int) (string, *wire.Submit) {
				return benchDevice(i % devices), &wire.Submit{ID: fmt.Sprintf("c-%d", i), Name: "set", Payload: []byte(`{"level":3,"why":"the cloud says so"}`)}
			})
			for k := range 10 {
				awaitSubmitted(e, g, uint64((k+1)*part))
				marks = append(marks, time.Since(begin))
			}
			rate = append(rate, float64(n)/marks[9].Seconds())
			first = append(first, float64(3*part)/marks[2].Seconds())
			last = append(last, float64(3*part)/(marks[9]-marks[6]).Seconds())
			rss = append(rss, float64(g.RSS())/(1<<20))
		})
		if err != nil {
			return err
		}
	}
	s.rows = []row{
		{what: fmt.Sprintf("%s commands over the upstream topic, stored and acknowledged", thousands(int64(n))), value: rate, unit: "/s", target: atLeast(5000, "/s")},
		{what: "the last three tenths of them", value: last, unit: "/s", than: "the first three tenths", against: first, target: atLeast(0.8, "×")},
		{what: "memory of the gateway at the end", value: rss, unit: "MiB RSS"},
	}
	return nil
}

// measureRegistry times what a large registry costs who connects, and the start.
func measureRegistry(ctx context.Context, c config, s *section) error {
	var full, empty, add, startFull, startEmpty sample
	err := round(c.dir, func(e *env) {
		yaml := "log: { level: warn, format: text }\n"
		big := testkit.StartGateway(e, c.bin, "bench", yaml)
		small := testkit.StartGateway(e, c.bin, "bench", yaml)
		a, b := newAPI(e, big, 32), newAPI(e, small, 32)
		const shown = 200 // devices that connect
		secrets := map[*testkit.Gateway][]string{big: make([]string, shown), small: make([]string, shown)}
		register := func(a *api, g *testkit.Gateway, n int) {
			err := parallel(n, 32, func(i int) error {
				var made struct {
					Secret string `json:"secret"`
				}
				if err := a.post(ctx, "/devices", map[string]any{"id": benchDevice(i)}, &made); err != nil {
					return err
				}
				// Those that connect lie all over the registry.
				if step := max(n/shown, 1); i%step == 0 && i/step < shown {
					secrets[g][i/step] = made.Secret
				}
				return nil
			})
			if err != nil {
				e.Fatalf("register devices: %v", err)
			}
		}
		begin := time.Now()
		register(a, big, c.registry)
		add = append(add, float64(c.registry)/time.Since(begin).Seconds())
		register(b, small, shown)
		for range max(9, c.rounds) {
			big.Kill()
			startFull = append(startFull, big.Restart().Seconds()*1000)
			small.Kill()
			startEmpty = append(startEmpty, small.Restart().Seconds()*1000)
		}
		connect := func(g *testkit.Gateway, n int) float64 {
			step := max(n/shown, 1)
			took := make([]time.Duration, 0, 5*shown)
			for k := range 5 * shown {
				i := k % shown
				begin := time.Now()
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				client, err := mqtt.Dial(ctx, mqtt.ClientOptions{Address: g.Addr, Connect: mqtt.Connect{
					Version: mqtt.V311, ClientID: benchDevice(i * step), CleanStart: true, KeepAlive: 60,
					HasUsername: true, Username: benchDevice(i * step), HasPassword: true, Password: []byte(secrets[g][i]),
				}})
				cancel()
				if err != nil {
					e.Fatalf("connect: %v", err)
				}
				took = append(took, time.Since(begin))
				client.Abort()
				<-client.Done()
			}
			slices.Sort(took)
			return took[len(took)*99/100].Seconds() * 1000
		}
		for range max(5, c.rounds) {
			full = append(full, connect(big, c.registry))
			empty = append(empty, connect(small, shown))
		}
	})
	if err != nil {
		return err
	}
	more := make(sample, len(full))
	for i := range full {
		more[i] = full[i] - empty[i]
	}
	devices := thousands(int64(c.registry)) + " devices registered"
	s.rows = []row{
		{what: devices + ": CONNECT with a token to CONNACK, p99, above that of a registry with 200", value: more, unit: "ms", target: atMost(1, "ms")},
		{what: "the two p99 themselves", value: full, unit: "ms", than: "200 devices", against: empty},
		{what: devices + ": start to `ready` after kill -9", value: startFull, unit: "ms", than: "200 devices", against: startEmpty, target: atMost(1.2, "×")},
		{what: "registering over HTTP, 32 at once, each on disk", value: add, unit: "/s"},
	}
	return nil
}
