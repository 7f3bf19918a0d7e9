package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/kv"
	"holdfast/spool"
)

const storeInFlight = 1024

// inflight lets one producer have a number of messages under way and waits for room without polling. Done may come
// from any goroutine.
type inflight struct {
	limit   uint64
	sent    uint64 // only the producer
	ended   atomic.Uint64
	waiting atomic.Bool
	wake    chan struct{}
	failed  atomic.Pointer[error]
}

func newInflight(limit uint64) *inflight {
	return &inflight{limit: limit, wake: make(chan struct{}, 1)}
}

// acquire waits for room for one more. It returns false after a failure.
func (f *inflight) acquire() bool {
	for f.sent-f.ended.Load() >= f.limit {
		f.waiting.Store(true)
		if f.sent-f.ended.Load() < f.limit {
			break
		}
		<-f.wake
	}
	f.waiting.Store(false)
	f.sent++
	return f.failed.Load() == nil
}

// drain waits until everything has ended.
func (f *inflight) drain() {
	for f.ended.Load() < f.sent {
		f.waiting.Store(true)
		if f.ended.Load() == f.sent {
			break
		}
		<-f.wake
	}
}

// Done implements kv.Done.
func (f *inflight) Done(_, _ uint64, err error) {
	if err != nil {
		failed := err // only then on the heap
		f.failed.Store(&failed)
	}
	f.ended.Add(1)
	if f.waiting.Load() {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
}

func (f *inflight) err() error {
	if e := f.failed.Load(); e != nil {
		return *e
	}
	return nil
}

// rawLog is the yardstick: what an append-only file can do. Whatever gathered while the last group was syncing is
// written with one write, checked by one CRC-32C and synced with one fdatasync. Segments of 64 MiB are written
// before and used again, which is the fastest way to sync a file.
type rawLog struct {
	segments [2]*os.File
	current  int
	offset   int64

	mu     sync.Mutex
	buf    []byte
	count  int
	closed bool
	cond   sync.Cond
}

const segmentBytes = 64 << 20

func openRawLog(dir string) (*rawLog, error) {
	l := &rawLog{}
	l.cond.L = &l.mu
	zero := make([]byte, 1<<20)
	for i := range l.segments {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("segment-%d", i)))
		if err != nil {
			return nil, err
		}
		l.segments[i] = f
		for n := 0; n < segmentBytes; n += len(zero) {
			if _, err := f.Write(zero); err != nil {
				return nil, err
			}
		}
		if err := f.Sync(); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func (l *rawLog) append(header, payload []byte) {
	l.mu.Lock()
	l.buf = append(append(l.buf, header...), payload...)
	l.count++
	if l.count == 1 {
		l.cond.Signal()
	}
	l.mu.Unlock()
}

func (l *rawLog) close() {
	l.mu.Lock()
	l.closed = true
	l.cond.Signal()
	l.mu.Unlock()
}

// run commits until close, and tells done of each message in order.
func (l *rawLog) run(done kv.Done) {
	var spare []byte
	table := crc32.MakeTable(crc32.Castagnoli)
	for {
		l.mu.Lock()
		for l.count == 0 && !l.closed {
			l.cond.Wait()
		}
		group, n := l.buf, l.count
		l.buf, l.count = spare[:0], 0
		l.mu.Unlock()
		if n == 0 {
			return
		}
		sum := crc32.Checksum(group, table)
		group = append(group, byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
		if l.offset+int64(len(group)) > segmentBytes {
			l.current, l.offset = 1-l.current, 0
		}
		f := l.segments[l.current]
		_, err := f.WriteAt(group, l.offset)
		if err == nil {
			err = unix.Fdatasync(int(f.Fd()))
		}
		l.offset += int64(len(group))
		for range n {
			done.Done(0, 0, err)
		}
		spare = group
	}
}

// storeResult is one round of appending.
type storeResult struct {
	perSecond float64
	mallocs   float64 // heap allocations per message
	store     float64 // bytes the store wrote (log, flushes, compactions), per record byte; not of the raw file
}

// meter takes the process's counters before and after.
type meter struct {
	begin time.Time
	mem   runtime.MemStats
}

func startMeter() (m meter) {
	runtime.GC()
	runtime.ReadMemStats(&m.mem)
	m.begin = time.Now()
	return m
}

func (m meter) end(messages uint64) storeResult {
	d := time.Since(m.begin)
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	return storeResult{
		perSecond: float64(messages) / d.Seconds(),
		mallocs:   float64(after.Mallocs-m.mem.Mallocs) / float64(messages),
	}
}

func rawRound(e *env, d time.Duration, payloads [][]byte) storeResult {
	l, err := openRawLog(e.TempDir())
	if err != nil {
		e.Fatalf("raw file: %v", err)
	}
	f := newInflight(storeInFlight)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.run(f)
	}()
	header := make([]byte, 30) // what a record has besides its payload: time, device, topic, flags
	m := startMeter()
	for i := 0; time.Since(m.begin) < d || i%256 != 0; i++ {
		if !f.acquire() {
			break
		}
		l.append(header, payloads[i%len(payloads)])
	}
	f.drain()
	r := m.end(f.sent)
	l.close()
	<-ended
	for _, s := range l.segments {
		s.Close()
	}
	if err := f.err(); err != nil {
		e.Fatalf("raw file: %v", err)
	}
	return r
}

func openSpool(dir string, fatal func(error)) (*kv.Store, *spool.Spool, error) {
	log := slog.New(slog.DiscardHandler)
	store, err := kv.Open(dir, kv.Options{Log: log, Fatal: fatal})
	if err != nil {
		return nil, nil, err
	}
	sp, err := spool.Open(store, spool.Config{
		Gateway:   "bench",
		Lanes:     []spool.LaneConfig{{Name: "telemetry", Share: 100, WhenFull: spool.DropOldest}},
		Upstreams: map[string][]string{"cloud": nil},
		Log:       log,
	})
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	return store, sp, nil
}

// spoolRound appends with a reader that keeps up, as in a gateway whose upstream is there.
func spoolRound(e *env, d time.Duration, payloads [][]byte) storeResult {
	store, sp, err := openSpool(e.TempDir(), func(err error) { panic(err) })
	if err != nil {
		e.Fatalf("spool: %v", err)
	}
	lane, ok := sp.Lane("telemetry")
	if !ok {
		e.Fatalf("spool has no lane")
	}
	consumer, err := sp.Consumer("cloud", nil)
	if err != nil {
		e.Fatalf("spool: %v", err)
	}
	var read atomic.Uint64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			for _, r := range consumer.Lanes() {
				for {
					run, err := r.Next(256 << 10)
					if err != nil || run.Count == 0 {
						break
					}
					r.Resolve(spool.Position{Seq: run.Pos.Seq + uint64(run.Count), Bytes: run.Pos.Bytes + uint64(len(run.Raw))}, spool.Delivered)
					read.Add(uint64(run.Count))
				}
			}
			select {
			case <-consumer.Ready():
			case <-stop:
				return
			}
		}
	}()
	f := newInflight(storeInFlight)
	rec := spool.Record{Device: []byte("pump-0017"), Topic: []byte("dt/pumps/pump-0017"), Flags: spool.FlagQoS1}
	rec.Received = time.Now().UnixMilli()
	one := uint64(len(spool.AppendRecord(nil, &spool.Record{Received: rec.Received, Device: rec.Device, Topic: rec.Topic, Flags: rec.Flags, Payload: payloads[0]})))
	m := startMeter()
	for i := 0; time.Since(m.begin) < d || i%256 != 0; i++ {
		if !f.acquire() {
			break
		}
		rec.Payload = payloads[i%len(payloads)]
		if err := sp.Append(lane, &rec, nil, f, 0, false); err != nil {
			e.Fatalf("spool: %v", err)
		}
	}
	f.drain()
	r := m.end(f.sent)
	wal, flushed, compacted := store.WriteAmplification()
	r.store = float64(wal+flushed+compacted) / float64(f.sent*one)
	for deadline := time.Now().Add(10 * time.Second); read.Load() < f.sent && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	<-stopped
	if got := read.Load(); got != f.sent {
		e.Fatalf("spool: %d messages appended, %d read", f.sent, got)
	}
	consumer.Close()
	if err := errors.Join(f.err(), sp.Close(), store.Close()); err != nil {
		e.Fatalf("spool: %v", err)
	}
	return r
}

func measureStore(ctx context.Context, c config, s *section) error {
	json, random := telemetry(4096), noise(4096)
	var raw, sp, mallocs, store, storeNoise sample
	for range c.rounds {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		err := round(c.dir, func(e *env) {
			raw = append(raw, rawRound(e, c.seconds, json).perSecond)
			r := spoolRound(e, c.seconds, json)
			sp, mallocs, store = append(sp, r.perSecond), append(mallocs, r.mallocs), append(store, r.store)
			storeNoise = append(storeNoise, spoolRound(e, c.seconds, random).store)
		})
		if err != nil {
			return err
		}
	}
	const file = "raw file, one write + fdatasync per group, recycled segments"
	s.rows = []row{
		{what: "append, 256 B JSON, 1,024 in flight, reader keeps up", value: sp, unit: "msg/s", than: file, against: raw, target: atLeast(0.6, "×")},
		{what: "heap allocations", value: mallocs, unit: "per message", target: atMost(0.1, "")},
		{what: "write amplification (log, flushes, compactions), JSON", value: store, unit: "per record byte", target: atMost(1.2, "")},
		{what: "write amplification, random payload", value: storeNoise, unit: "per record byte", target: atMost(1.2, "")},
	}
	return nil
}

// fillSpool is `bench fill`: it writes a backlog below a data folder, as a gateway would have left it.
func fillSpool(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("fill", flag.ContinueOnError)
	dir := flags.String("dir", "", "the store's folder")
	gb := flags.Float64("gb", 1, "record bytes to write, in GB")
	if err := flags.Parse(args); err != nil {
		return err
	}
	store, sp, err := openSpool(*dir, func(err error) { panic(err) })
	if err != nil {
		return err
	}
	lane, _ := sp.Lane("telemetry")
	f := newInflight(4096)
	random, payload := rand.NewChaCha8([32]byte{}), make([]byte, 1<<10) // nothing that compression could make smaller
	rec := spool.Record{Received: time.Now().UnixMilli(), Device: []byte("pump-0017"), Topic: []byte("dt/pumps/pump-0017"), Flags: spool.FlagQoS1, Payload: payload}
	for written := 0.0; written < *gb*1e9 && f.acquire() && ctx.Err() == nil; written += 1 << 10 {
		_, _ = random.Read(payload) // never fails
		if err := sp.Append(lane, &rec, nil, f, 0, false); err != nil {
			return err
		}
	}
	f.drain()
	fmt.Fprintln(stderr, "msg=ready")
	return errors.Join(f.err(), sp.Close(), store.Close())
}
