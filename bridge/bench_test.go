package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

// loop is a source that gives the same block of records again and again, n in all.
type loop struct {
	ready  chan struct{}
	reader *loopReader
}

type loopReader struct {
	raw  []byte
	ends []int // of each record in raw
	n    uint64
	pos  spool.Position
	cur  atomic.Uint64 // sequence up to which all is resolved
	done chan struct{}
}

func newLoop(n int) *loop {
	r := &loopReader{n: uint64(n), pos: spool.Position{Seq: 1}, done: make(chan struct{})}
	now := time.Now().UnixMilli()
	for i := range 10_000 {
		payload := fmt.Appendf(nil, `{"device":"pump-%03d","ts":%d,"seq":%d,"temperature":%.2f,"pressure":%.3f,"vibration":{"x":%.4f,"y":%.4f,"z":%.4f},"state":"running"}`,
			i%100, now+int64(i), i, 20+float64(i*7919%1000)/100, 3+float64(i*104729%1000)/1000,
			float64(i*31%9973)/9973, float64(i*37%9973)/9973, float64(i*41%9973)/9973)
		for len(payload) < 256 {
			payload = append(payload, ' ')
		}
		r.raw = spool.AppendRecord(r.raw, &spool.Record{
			Received: now + int64(i), Device: fmt.Appendf(nil, "pump-%03d", i%100),
			Topic: fmt.Appendf(nil, "dt/plant/pump-%03d/telemetry", i%100), Flags: spool.FlagQoS1, Payload: payload,
		})
		r.ends = append(r.ends, len(r.raw))
	}
	return &loop{ready: make(chan struct{}, 1), reader: r}
}

func (s *loop) Ready() <-chan struct{}   { return s.ready }
func (s *loop) Readers() []bridge.Reader { return []bridge.Reader{none{}, s.reader} }
func (s *loop) Close()                   {}

func (r *loopReader) Lane() string { return "telemetry" }
func (r *loopReader) Share() int   { return 40 }
func (*loopReader) Backfill() int  { return 0 }
func (r *loopReader) Urgent() bool { return false }

func (r *loopReader) Next(maxBytes int) (spool.Run, error) {
	first := int((r.pos.Seq - 1) % uint64(len(r.ends)))
	begin := 0
	if first > 0 {
		begin = r.ends[first-1]
	}
	k := 0
	for first+k < len(r.ends) && r.pos.Seq+uint64(k) <= r.n && (k == 0 || r.ends[first+k]-begin <= maxBytes) {
		k++
	}
	run := spool.Run{Pos: r.pos, Count: k}
	if k > 0 {
		run.Raw = r.raw[begin:r.ends[first+k-1]]
	}
	r.pos = run.End()
	return run, nil
}

func (r *loopReader) Rewind() {
	if r.cur.Load() != r.n+1 {
		panic("the link was lost")
	}
}

func (r *loopReader) Resolve(end spool.Position, _ spool.Outcome) {
	r.cur.Store(end.Seq)
	if end.Seq == r.n+1 {
		close(r.done)
	}
}
func (r *loopReader) Park(spool.Position, []byte, string) error { panic("parked") }

// none is a lane without records.
type none struct{}

func (none) Lane() string                              { return spool.SystemLane }
func (none) Share() int                                { return 100 }
func (none) Backfill() int                             { return 0 }
func (none) Urgent() bool                              { return false }
func (none) Next(int) (spool.Run, error)               { return spool.Run{}, nil }
func (none) Rewind()                                   {}
func (none) Resolve(spool.Position, spool.Outcome)     {}
func (none) Park(spool.Position, []byte, string) error { return nil }

// BenchmarkDrain drains b.N 256-byte messages into mosquitto.
func BenchmarkDrain(b *testing.B) {
	for _, c := range []struct {
		format string
		window int
	}{{"batch", 256}, {"passthrough", 100}, {"passthrough", 256}, {"passthrough", 1000}, {"cloudevents", 256}} {
		b.Run(fmt.Sprintf("format=%s/window=%d", c.format, c.window), func(b *testing.B) {
			addr := testkit.StartMosquitto(b, "max_inflight_messages 0").Addr
			up, err := mqttup.New(mqttup.Options{URL: "mqtt://" + addr, ClientID: "bench", Gateway: "bench", Epoch: "e"})
			if err != nil {
				b.Fatal(err)
			}
			src := newLoop(b.N)
			br, err := bridge.NewFrom(bridge.Config{Name: "cloud", URL: "mqtt://" + addr, Format: c.format, Window: c.window},
				"bench", "e", src, up, slog.New(slog.DiscardHandler), nil)
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			ended := make(chan error, 1)
			b.ReportAllocs()
			b.ResetTimer()
			go func() { ended <- br.Run(ctx) }()
			select {
			case <-src.reader.done:
			case err := <-ended:
				b.Fatal("Run returned early: ", err)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
			b.ReportMetric(float64(br.Status().SentBytes)/float64(b.N), "sent-B/op")
			cancel()
			if err := <-ended; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkDrainSpool drains b.N messages that wait in a spool on disk.
func BenchmarkDrainSpool(b *testing.B) {
	for _, format := range []string{"batch", "passthrough"} {
		b.Run("format="+format, func(b *testing.B) {
			addr := testkit.StartMosquitto(b, "max_inflight_messages 0").Addr
			store, err := kv.Open(b.TempDir(), kv.Options{Log: slog.New(slog.DiscardHandler), Fatal: func(err error) { b.Error(err) }})
			if err != nil {
				b.Fatal(err)
			}
			sp, err := spool.Open(store, spool.Config{
				Gateway: "bench", Log: slog.New(slog.DiscardHandler), Lanes: []spool.LaneConfig{{Name: "telemetry", Share: 40}}, Upstreams: map[string][]string{"cloud": nil},
			})
			if err != nil {
				b.Fatal(err)
			}
			lane, _ := sp.Lane("telemetry")
			src := newLoop(b.N)
			d := &done{t: b}
			var r spool.Record
			for raw, k := src.reader.raw, 0; k < b.N; k++ {
				if len(raw) == 0 {
					raw = src.reader.raw
				}
				n, err := spool.ParseRecord(raw, &r)
				if err != nil {
					b.Fatal(err)
				}
				raw = raw[n:]
				d.wg.Add(1)
				if err := sp.Append(lane, &r, nil, d, 0, false); err != nil {
					b.Fatal(err)
				}
			}
			d.wg.Wait()
			cfg := bridge.Config{Name: "cloud", URL: "mqtt://" + addr, Format: format}
			up, err := mqttup.FromConfig(cfg, "bench", sp.Epoch(), "bench", nil)
			if err != nil {
				b.Fatal(err)
			}
			br, err := bridge.New(cfg, "bench", sp, up, slog.New(slog.DiscardHandler), nil)
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			ended := make(chan error, 1)
			b.ReportAllocs()
			b.ResetTimer()
			go func() { ended <- br.Run(ctx) }()
			for br.Status().AckedMessages < uint64(b.N) {
				<-time.After(time.Millisecond)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
			cancel()
			if err := errors.Join(<-ended, sp.Close(), store.Close()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
