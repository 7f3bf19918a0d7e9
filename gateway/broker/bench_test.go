package broker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/spool"
)

// spoolIntake is the real way: one lane of a spool.
type spoolIntake struct{ sp *spool.Spool }

func (in *spoolIntake) Publish(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) error {
	m.Record.Received = 1_700_000_000_000
	return in.sp.Append(0, &m.Record, ops, done, token, m.QoS == 0)
}

// voidIntake is done at once: what is left is the broker alone.
type voidIntake struct{}

func (voidIntake) Publish(_ *broker.Message, _ []kv.Op, done kv.Done, token uint64) error {
	done.Done(token, 0, nil)
	return nil
}

// flood publishes n messages of QoS 1 on one connection, window of them unacknowledged, in raw
// frames: it costs as little as a generator can.
func flood(addr, id string, v mqtt.Version, n, window, payload int) error {
	nc, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	if _, err := nc.Write(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: id, CleanStart: true})); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	if _, err := nc.Read(buf); err != nil {
		return err
	}
	one := mqtt.AppendPublish(nil, v, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("dt/bench/" + id + "/temp"), Payload: make([]byte, payload)})
	var many []byte
	for range window {
		many = append(many, one...)
	}
	sent, acked, rest := 0, 0, 0
	for acked < n {
		if k := min(window-(sent-acked), n-sent); k > 0 {
			if _, err := nc.Write(many[:k*len(one)]); err != nil {
				return err
			}
			sent += k
		}
		got, err := nc.Read(buf)
		if err != nil {
			return fmt.Errorf("%d of %d acked: %w", acked, n, err)
		}
		rest += got
		acked, rest = acked+rest/4, rest%4
	}
	return nil
}

func BenchmarkPublish(b *testing.B) {
	for _, how := range []string{"void", "spool"} {
		for _, conns := range []int{1, 10, 100} {
			b.Run(fmt.Sprintf("intake=%s/conns=%d/window=100/size=256", how, conns), func(b *testing.B) {
				benchPublish(b, how, mqtt.V311, conns, 100)
			})
		}
	}
}

func benchPublish(b *testing.B, how string, v mqtt.Version, conns, window int) {
	store, err := kv.Open(b.TempDir(), kv.Options{FS: vfs.Default, Log: quiet})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	var in broker.Intake = voidIntake{}
	if how == "spool" {
		sp, err := spool.Open(store, spool.Config{
			Gateway: "bench", Log: quiet,
			Lanes: []spool.LaneConfig{{Name: "telemetry", Share: 100, MaxBytes: 1 << 30, WhenFull: spool.DropOldest}},
		})
		if err != nil {
			b.Fatal(err)
		}
		defer sp.Close()
		in = &spoolIntake{sp}
	}
	cfg := broker.Config{Listeners: []broker.Listener{{Name: "lan", Protocol: "mqtt", Address: "127.0.0.1:0"}}}
	br, err := broker.New(cfg, store, in, &allow{}, nil, quiet, nil)
	if err != nil {
		b.Fatal(err)
	}
	if err := br.Listen(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- br.Run(ctx) }()
	addr := br.Addrs()[0].String()

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	var wg sync.WaitGroup
	per := b.N/conns + 1
	for i := range conns {
		wg.Go(func() {
			if err := flood(addr, fmt.Sprintf("dev%d", i), v, per, window, 256); err != nil && !errors.Is(err, io.EOF) {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(per*conns)/b.Elapsed().Seconds(), "msgs/s")
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(per*conns), "mallocs/msg")
	b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(per*conns), "B/msg")
	cancel()
	if err := <-ended; err != nil {
		b.Error(err)
	}
}
