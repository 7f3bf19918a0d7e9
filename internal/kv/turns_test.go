package kv_test

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/internal/kv"
)

// sluggish takes its time with each write, so that groups fill up.
type sluggish struct{}

func (sluggish) Done(uint64, uint64, error) { <-time.After(time.Microsecond) }

// TestWritersTakeTurns has writers hand in as fast as they can what the disk cannot take: each gets its share, and one who is to be
// served first does not wait behind them.
func TestWritersTakeTurns(t *testing.T) {
	s := open(t, kv.Options{FS: vfs.NewMem()})
	const writers, size, perGroup = 40, 32 << 10, kv.MaxGroupBytes / (32 << 10)
	var taken [writers]atomic.Int64
	var all atomic.Int64
	put := func(begin func() (*kv.Group, error)) {
		g, err := begin()
		if err != nil {
			t.Error(err)
			return
		}
		g.Set([]byte{kv.PrefixSession}, make([]byte, size))
		g.Done(sluggish{}, 0, 0)
		g.End()
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				put(func() (*kv.Group, error) { return s.Begin(true) })
				if all.Add(1) > 3*perGroup { // the first are taken by who was there first
					taken[i].Add(1)
				}
			}
		})
	}
	var overtaken []int64
	for all.Load() < 10*perGroup {
		from := all.Load()
		put(s.BeginFirst)
		overtaken = append(overtaken, all.Load()-from)
		<-time.After(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	var counts []int64
	for i := range taken {
		counts = append(counts, taken[i].Load())
	}
	slices.Sort(counts)
	slices.Sort(overtaken)
	t.Logf("%d messages of %d writers, from %d to %d each; before one that is first come %d, at most %d", all.Load(), writers, counts[0], counts[writers-1],
		overtaken[len(overtaken)/2], overtaken[len(overtaken)-1])
	if counts[0]*4 < counts[writers-1] {
		t.Errorf("one writer got %d, another %d", counts[0], counts[writers-1])
	}
	// It is called with the next group; those of the group before may still be on their way in.
	if most := overtaken[len(overtaken)-1]; most > 3*perGroup {
		t.Errorf("%d messages went before one that is to be first", most)
	}
}
