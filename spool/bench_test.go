package spool_test

import (
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// telemetry is a message of 256 bytes payload, as a device would send it.
func telemetry(i int) *spool.Record {
	rng := rand.New(rand.NewPCG(uint64(i), 7))
	p := fmt.Appendf(nil, `{"device":"pump-%04d","ts":%d,"n":%d`, i%1000, 1_700_000_000_000+i, i)
	for k := 0; len(p) < 240; k++ {
		p = fmt.Appendf(p, `,"ch%d":%.3f`, k, rng.Float64()*100)
	}
	p = append(p[:255], '}')
	return &spool.Record{Received: time.Now().UnixMilli(), Device: fmt.Appendf(nil, "pump-%04d", i%1000), Topic: fmt.Appendf(nil, "dt/plant/pump-%04d/flow", i%1000), Flags: spool.FlagQoS1, Payload: p}
}

// window lets n appends be under way.
type window chan struct{}

func (w window) Done(_, _ uint64, err error) {
	if err != nil {
		panic(err)
	}
	<-w
}

func (w window) drain() {
	for range cap(w) {
		w <- struct{}{}
	}
}

// BenchmarkAppend is the spool alone: each message's Done comes after an fsync. The yardstick is a
// plain file with one append and one fdatasync per group, which keeps nothing but the bytes.
//
//	go test -run - -bench Append -benchtime 300000x ./spool
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 64, 1024, 10240} {
		records := make([]*spool.Record, 4096)
		for i := range records {
			records[i] = telemetry(i)
		}
		run := func(b *testing.B, w window, put func(r *spool.Record) error) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			i := 0
			for b.Loop() {
				w <- struct{}{}
				if err := put(records[i%len(records)]); err != nil {
					b.Fatal(err)
				}
				i++
			}
			w.drain()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(i)/b.Elapsed().Seconds(), "msgs/s")
			b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(i), "allocs/msg")
			b.ReportMetric(0, "ns/op")
		}
		for _, kind := range []string{"file", "spool", "spool+reader"} {
			b.Run(fmt.Sprintf("size=256/inflight=%d/to=%s", n, kind), func(b *testing.B) {
				w := make(window, n)
				if kind == "file" {
					f := newRawLog(b)
					run(b, w, func(r *spool.Record) error { return f.append(r, w) })
					f.close()
					return
				}
				store, err := kv.Open(b.TempDir(), kv.Options{Log: slog.New(slog.DiscardHandler)})
				if err != nil {
					b.Fatal(err)
				}
				cfg := lanes("telemetry")
				cfg.Log = slog.New(slog.DiscardHandler)
				sp, err := spool.Open(store, cfg)
				if err != nil {
					b.Fatal(err)
				}
				lane, _ := sp.Lane("telemetry")
				var wg sync.WaitGroup
				stop := make(chan struct{})
				if kind == "spool+reader" {
					c, err := sp.Consumer("cloud", nil)
					if err != nil {
						b.Fatal(err)
					}
					wg.Add(1)
					go func() {
						defer wg.Done()
						defer c.Close()
						drainReader(b, c, stop)
					}()
				}
				payload := uint64(0)
				run(b, w, func(r *spool.Record) error {
					payload += uint64(len(r.Payload) + len(r.Topic) + len(r.Device))
					return sp.Append(lane, r, nil, w, 0, false)
				})
				close(stop)
				wg.Wait()
				wal, flushed, compacted := store.WriteAmplification()
				b.ReportMetric(float64(wal+flushed+compacted)/float64(payload), "written/payload")
				if err := sp.Close(); err != nil {
					b.Error(err)
				}
				if err := store.Close(); err != nil {
					b.Error(err)
				}
			})
		}
	}
}

// drainReader resolves whatever comes at once, as a bridge on a fast link does.
func drainReader(b *testing.B, c *spool.Consumer, stop chan struct{}) {
	for {
		select {
		case <-c.Ready():
		case <-stop:
			return
		}
		for _, rd := range c.Lanes() {
			for {
				run, err := rd.Next(128 << 10)
				if err != nil {
					b.Error(err)
					return
				}
				if run.Count == 0 {
					break
				}
				rd.Resolve(run.End(), spool.Delivered)
			}
		}
	}
}

// rawLog is the least that keeps the promise: records gathered while the last sync ran are appended
// with one write and synced, in preallocated files that are used again.
type rawLog struct {
	b    *testing.B
	f    *os.File
	at   int64
	mu   sync.Mutex
	buf  []byte
	n    int
	wake chan struct{}
	done chan struct{}
}

const rawSegment = 64 << 20

func newRawLog(b *testing.B) *rawLog {
	f, err := os.Create(filepath.Join(b.TempDir(), "raw"))
	if err != nil {
		b.Fatal(err)
	}
	zero := make([]byte, 1<<20)
	for range rawSegment >> 20 {
		if _, err := f.Write(zero); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	l := &rawLog{b: b, f: f, wake: make(chan struct{}, 1), done: make(chan struct{})}
	return l
}

func (l *rawLog) append(r *spool.Record, w window) error {
	l.mu.Lock()
	l.buf = spool.AppendRecord(l.buf, r)
	l.n++
	first := l.n == 1
	l.mu.Unlock()
	if l.done != nil && first {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	if l.at == 0 {
		l.at = 1
		go l.commit(w)
	}
	return nil
}

func (l *rawLog) commit(w window) {
	defer close(l.done)
	at := int64(0)
	var out []byte
	for range l.wake {
		l.mu.Lock()
		out, l.buf = l.buf, out[:0]
		n := l.n
		l.n = 0
		l.mu.Unlock()
		if n == 0 {
			continue
		}
		sum := crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli))
		out = append(out, byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))
		if at+int64(len(out)) > rawSegment {
			at = 0
		}
		if _, err := l.f.WriteAt(out, at); err != nil {
			l.b.Error(err)
		}
		at += int64(len(out))
		if err := unix.Fdatasync(int(l.f.Fd())); err != nil {
			l.b.Error(err)
		}
		for range n {
			w.Done(0, 0, nil)
		}
	}
}

func (l *rawLog) close() {
	close(l.wake)
	<-l.done
	l.f.Close()
}

// BenchmarkDrain reads a backlog from the disk.
func BenchmarkDrain(b *testing.B) {
	const messages = 200_000
	store, err := kv.Open(b.TempDir(), kv.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	cfg := lanes("telemetry")
	cfg.Log = slog.New(slog.DiscardHandler)
	cfg.TailBytes = 1
	sp, err := spool.Open(store, cfg)
	if err != nil {
		b.Fatal(err)
	}
	lane, _ := sp.Lane("telemetry")
	for i := range messages {
		if err := sp.Append(lane, telemetry(i), nil, nil, 0, false); err != nil {
			b.Fatal(err)
		}
	}
	if err := store.Flush(); err != nil {
		b.Fatal(err)
	}
	c, err := sp.Consumer("cloud", nil)
	if err != nil {
		b.Fatal(err)
	}
	rd := c.Lanes()[1]
	n := 0
	for b.Loop() {
		run, err := rd.Next(128 << 10)
		if err != nil {
			b.Fatal(err)
		}
		n += run.Count
		if run.Count == 0 {
			rd.Rewind()
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "msgs/s")
	c.Close()
	if err := sp.Close(); err != nil {
		b.Error(err)
	}
	if err := store.Close(); err != nil {
		b.Error(err)
	}
}
