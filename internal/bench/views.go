package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
)

// get reads an answer to its end.
func (a *api) get(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	resp, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %.200s", path, resp.Status, b)
	}
	return err
}

// watch is a browser with the overview open: the stream of events, the status each two seconds, the history each ten. It ends with ctx.
func (a *api) watch(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() { _ = a.get(ctx, "/events") })
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		_ = a.get(ctx, "/status")
		if n%5 == 0 {
			_ = a.get(ctx, "/history")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// measureViewers takes messages in while browsers look on, and while nobody does.
func measureViewers(ctx context.Context, c config, s *section) error {
	watched := func(n int) contender {
		return contender{fmt.Sprintf("%d viewers", n), func(e *env) *started {
			g := startGateway(e, c, nobody(e), "batch")
			a := newAPI(e, g.gateway, 0)
			ctx, stop := context.WithCancel(ctx)
			var all sync.WaitGroup
			for range n {
				all.Go(func() { a.watch(ctx) })
			}
			e.Cleanup(func() { stop(); all.Wait() })
			return g
		}}
	}
	none, one, twenty := watched(0), watched(1), watched(20)
	r, err := contest(ctx, c, load{conns: 100, window: 100, qos: 1}, []contender{none, one, twenty})
	if err != nil {
		return err
	}
	for _, x := range []struct {
		contender
		goal float64
	}{{one, 0.98}, {twenty, 0.95}} {
		s.rows = append(s.rows, row{what: "100 × 100: " + x.name, value: r[x.name].acks, unit: "acks/s", than: none.name, against: r[none.name].acks, target: atLeast(x.goal, "×")})
	}
	s.notes = append(s.notes, "A viewer is the dashboard's overview: the stream of events, the status each 2 s, the history each 10 s. They run on the same cores.")
	return nil
}

// measureLists asks for each list of a gateway with many devices and commands.
func measureLists(ctx context.Context, c config, s *section) error {
	const asked = 30
	lists := []struct{ what, path string }{
		{"devices, first page", "/devices?limit=100"},
		{"devices, a page in the middle", "/devices?limit=100&after=" + benchDevice(c.devices/2)},
		{"devices, a search that finds nothing", "/devices?search=nobody"},
		{"devices, those connected", "/devices?connected=true"},
		{"commands, first page", "/commands?limit=100"},
		{"commands, a state that none is in", "/commands?state=SUCCEEDED"},
		{"commands of one device", "/devices/" + benchDevice(c.devices/2) + "/commands"},
		{"status", "/status"},
	}
	took := make([]sample, len(lists))
	err := round(c.dir, func(e *env) {
		up := testkit.StartMosquitto(e)
		g := testkit.StartGateway(e, c.bin, "bench", commandsYAML(up))
		a := newAPI(e, g, 64)
		if err := parallel(c.devices, 64, func(i int) error { return a.post(ctx, "/devices", map[string]string{"id": benchDevice(i)}, nil) }); err != nil {
			e.Fatalf("register: %v", err)
		}
		g.AwaitCommands(e)
		sendCommands(ctx, e, up.Addr, c.commands, func(i int) (string, *wire.Submit) {
			return benchDevice(i % c.devices), &wire.Submit{ID: fmt.Sprintf("c-%07d", i), Name: "set", Payload: []byte(`{"level":3}`), OneWay: true}
		})
		awaitSubmitted(e, g, uint64(c.commands))
		for i, l := range lists {
			var times []time.Duration
			for range asked {
				begin := time.Now()
				if err := a.get(ctx, l.path); err != nil {
					e.Fatalf("%v", err)
				}
				times = append(times, time.Since(begin))
			}
			slices.Sort(times)
			took[i] = sample{float64(times[asked/2].Microseconds()) / 1000, float64(times[asked-1].Microseconds()) / 1000}
		}
	})
	if err != nil {
		return err
	}
	for i, l := range lists {
		s.rows = append(s.rows,
			row{what: l.what, value: took[i][:1], unit: "ms", target: atMost(100, "ms")},
			row{what: l.what + ", the slowest of 30", value: took[i][1:], unit: "ms"})
	}
	s.notes = append(s.notes, fmt.Sprintf("%s devices are registered, %s commands wait.", thousands(int64(c.devices)), thousands(int64(c.commands))))
	return nil
}
