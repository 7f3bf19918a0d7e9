package devices_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/devices"
	"holdfast/internal/kv"
)

// storeJournal is a Journal without a cloud.
type storeJournal struct{ *kv.Store }

type storeDone func(error)

func (d storeDone) Done(_, _ uint64, err error) { d(err) }

func (j storeJournal) Commit(ops []kv.Op, _ []devices.Event, done func(error)) error {
	return j.Apply(ops, storeDone(done), 0)
}

func benchQueue(b *testing.B) *devices.Queue {
	b.Helper()
	store := openTestStore(b, vfs.NewMem())
	q, err := devices.OpenQueue(store, devices.QueueConfig{Journal: storeJournal{store}, Log: discardLog(), MaxPending: 10_000_000})
	if err != nil {
		b.Fatal(err)
	}
	return q
}

// submitMany submits n commands from id first on, to devices in turn, and waits for all.
func submitMany(b *testing.B, q *devices.Queue, first, n int, device func(i int) string) {
	b.Helper()
	var wg sync.WaitGroup
	wg.Add(n)
	payload := []byte(`{"level":3,"unit":"percent"}`)
	for i := first; i < first+n; i++ {
		r := devices.Request{ID: fmt.Sprintf("command-%09d-of-the-cloud", i), Device: device(i), Name: "set-level", Payload: payload, ContentType: "application/json", Source: "upstream cloud", Upstream: "cloud"}
		if err := q.Submit(&r, func(_ devices.Command, _ bool, err error) {
			if err != nil {
				b.Error(err)
			}
			wg.Done()
		}); err != nil {
			b.Fatal(err)
		}
	}
	wg.Wait()
}

// BenchmarkSubmit is a submit to a device that is not there, the store included, with so many waiting already.
func BenchmarkSubmit(b *testing.B) {
	for _, pending := range []int{0, 100_000} {
		b.Run(fmt.Sprintf("pending=%d", pending), func(b *testing.B) {
			q := benchQueue(b)
			submitMany(b, q, 0, pending, func(i int) string { return fmt.Sprintf("old-%d", i/250) })
			b.ReportAllocs()
			b.ResetTimer()
			submitMany(b, q, pending, b.N, func(i int) string { return fmt.Sprintf("new-%d", i/100) })
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
		})
	}
}

// BenchmarkListCommands lists by state, with 100,000 commands that wait and 100,000 of history.
func BenchmarkListCommands(b *testing.B) {
	q := benchQueue(b)
	device := func(i int) string { return fmt.Sprintf("d-%d", i%10_000) }
	submitMany(b, q, 0, 200_000, device)
	var left sync.WaitGroup
	left.Add(100_000)
	for i := range 100_000 {
		if err := q.Cancel("", fmt.Sprintf("command-%09d-of-the-cloud", 2*i), "benchmark", "", func(_ devices.Command, err error) {
			if err != nil {
				b.Error(err)
			}
			left.Done()
		}); err != nil {
			b.Fatal(err)
		}
	}
	left.Wait()
	for _, states := range [][]devices.State{{devices.Queued}, {devices.Canceled}, {devices.Sent}, {devices.TimedOut}, {devices.Queued, devices.TimedOut}} {
		b.Run(fmt.Sprintf("states=%v", states), func(b *testing.B) {
			for b.Loop() {
				page, _, err := q.List(devices.CommandFilter{States: states})
				if err != nil || (len(page) == 100) != (states[0] == devices.Queued || states[0] == devices.Canceled) {
					b.Fatalf("%d, %v", len(page), err)
				}
			}
		})
	}
}

// BenchmarkReturn is the return of many devices with three one-way commands each: all delivered, in order.
func BenchmarkReturn(b *testing.B) {
	for _, n := range []int{10_000} {
		b.Run(fmt.Sprintf("devices=%d", n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				q := benchQueue(b)
				for i := range 3 * n {
					r := devices.Request{ID: fmt.Sprintf("c-%d-%d", i%n, i/n), Device: fmt.Sprintf("d-%d", i%n), Name: "set", OneWay: true, Payload: []byte("{}")}
					if err := q.Submit(&r, func(devices.Command, bool, error) {}); err != nil {
						b.Fatal(err)
					}
				}
				var left sync.WaitGroup
				left.Add(n)
				acks := make(chan func(), 3*n)
				links := make([]*fakeLink, n)
				for i := range links {
					l := &fakeLink{device: fmt.Sprintf("d-%d", i)}
					l.onSend = func(d *devices.Delivery) {
						if want := fmt.Sprintf("c-%d-%d", i, l.nextID-1); d.ID != want {
							b.Errorf("device %d got %s, want %s", i, d.ID, want)
						}
						if l.nextID == 3 {
							left.Done()
							return
						}
						token := d.Token
						acks <- func() { q.Acked(l.device, l, token, "") }
					}
					links[i] = l
				}
				stop := make(chan struct{})
				var workers sync.WaitGroup
				for range 8 {
					workers.Go(func() {
						for {
							select {
							case ack := <-acks:
								ack()
							case <-stop:
								return
							}
						}
					})
				}
				b.StartTimer()
				for _, l := range links {
					q.Ready(l.device, l)
				}
				left.Wait()
				b.StopTimer()
				close(stop)
				workers.Wait()
				b.StartTimer()
			}
			b.ReportMetric(float64(3*n*b.N)/b.Elapsed().Seconds(), "commands/s")
		})
	}
}

// TestMemoryOfPendingCommands bounds what a command that waits costs.
func TestMemoryOfPendingCommands(t *testing.T) {
	const n = 20_000
	r := newQueueRig(t, devices.QueueConfig{MaxPending: n})
	for i := range n {
		q := devices.Request{ID: fmt.Sprintf("0198a2b4-7c1d-7e3f-8a5b-%012d", i), Device: fmt.Sprintf("device-%d", i/100), Name: "set-level", Payload: make([]byte, 1000), Source: "api"}
		if err := r.Submit(&q, func(devices.Command, bool, error) {}); err != nil {
			t.Fatal(err)
		}
	}
	r.reopen()
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	with := heap()
	if c := r.Counts(); c.Queued != n {
		t.Fatalf("%d wait", c.Queued)
	}
	r.Queue = nil
	without := heap()
	each := (int64(with) - int64(without)) / n
	t.Logf("%d bytes each", each)
	if each < 100 || each > 600 {
		t.Errorf("a pending command takes %d bytes, want 600 at most", each)
	}
}
