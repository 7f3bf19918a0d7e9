package main

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// measureIdle takes the memory of a gateway that has nothing to do, alone and with many quiet connections.
func measureIdle(ctx context.Context, c config, s *section) error {
	const settle = 3 * time.Second
	var alone, linked, perConn sample
	for range c.rounds {
		err := round(c.dir, func(e *env) {
			x := startGateway(e, c, "", "")
			time.Sleep(settle)
			alone = append(alone, float64(x.RSS())/(1<<20))
			conns := connectIdle(ctx, e, x.addr, c.idle)
			time.Sleep(settle)
			perConn = append(perConn, (float64(x.RSS())/1024-alone[len(alone)-1]*1024)/float64(c.idle))
			for _, conn := range conns {
				conn.Abort()
				<-conn.Done()
			}
		})
		if err != nil {
			return err
		}
		err = round(c.dir, func(e *env) {
			up := testkit.StartMosquitto(e)
			x := startGateway(e, c, up.Addr, "batch")
			time.Sleep(settle)
			linked = append(linked, float64(x.RSS())/(1<<20))
		})
		if err != nil {
			return err
		}
	}
	s.rows = []row{
		{what: "idle gateway, no upstream", value: alone, unit: "MiB RSS", target: atMost(40, "MiB")},
		{what: "idle gateway, linked to an upstream", value: linked, unit: "MiB RSS", target: atMost(40, "MiB")},
		{what: thousands(int64(c.idle)) + " idle connections", value: perConn, unit: "KiB RSS each", target: atMost(20, "KiB")},
	}
	return nil
}

// connectIdle opens connections from several loopback addresses, as a gateway limits those of one.
func connectIdle(ctx context.Context, e *env, addr string, n int) []*mqtt.Client {
	clients := make([]*mqtt.Client, n)
	errs := make(chan error, n)
	slots := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i := range clients {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i/100))}}
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			var err error
			clients[i], err = mqtt.Dial(ctx, mqtt.ClientOptions{
				Address: addr, Dialer: dialer.DialContext,
				Connect: mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprintf("idle-%05d", i), CleanStart: true, KeepAlive: 600},
			})
			if err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		e.Fatalf("open %d idle connections: %v (%d failed)", n, err, len(errs)+1)
	default:
	}
	return clients
}

// measureStart times starts after kill -9, with a full spool and with an empty one, in turn.
func measureStart(ctx context.Context, c config, s *section) error {
	starts := max(9, c.rounds)
	var full, empty sample
	err := round(c.dir, func(e *env) {
		lanes := "spool: { lanes: [ { name: telemetry, share: 100, max_bytes: 1024GiB, max_age: 8760h, when_full: drop_oldest } ] }\nroutes: []\n"
		yaml := gatewayYAML(nobody(e), "batch") + lanes
		a := testkit.StartGateway(e, c.bin, "bench", yaml)
		a.Kill()
		fill := exec.CommandContext(ctx, c.self, "fill", "-dir", filepath.Join(a.Dir, storeFolder), "-gb", fmt.Sprint(c.spoolGB))
		fill.Stderr = c.log
		if err := fill.Run(); err != nil {
			e.Fatalf("fill the spool: %v", err)
		}
		b := testkit.StartGateway(e, c.bin, "bench", yaml)
		b.Kill()
		for range starts {
			full = append(full, a.Restart().Seconds()*1000)
			a.Kill()
			empty = append(empty, b.Restart().Seconds()*1000)
			b.Kill()
		}
	})
	s.rows = []row{{
		what: fmt.Sprintf("start to `ready` after kill -9, %s GB spooled", number(c.spoolGB)), value: full, unit: "ms",
		than: "empty spool", against: empty, target: atMost(1.2, "×"),
	}}
	return err
}
