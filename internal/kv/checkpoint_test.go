package kv_test

import (
	"errors"
	"log/slog"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/internal/kv"
)

// TestACheckpointHasAllThatWasToldBefore copies the store while others write, and opens the copies.
func TestACheckpointHasAllThatWasToldBefore(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, kv.Options{FS: fs})
	stop := make(chan struct{})
	var writers sync.WaitGroup
	var mu sync.Mutex
	told := 0
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := s.ApplyWait([]kv.Op{row(w*1_000_000 + i)}); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				told++
				mu.Unlock()
			}
		})
	}
	var least []int
	for i := range 5 {
		for {
			mu.Lock()
			n := told
			mu.Unlock()
			if n >= i*200 {
				least = append(least, n)
				break
			}
		}
		if err := s.Checkpoint("copy" + string(rune('a'+i))); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	writers.Wait()
	for i, want := range least {
		to := vfs.NewMem()
		if _, err := vfs.Clone(fs, to, "copy"+string(rune('a'+i)), "data"); err != nil {
			t.Fatal(err)
		}
		c, err := kv.Open("data", kv.Options{FS: to, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		if err := c.Scan([]byte{kv.PrefixSession}, func(_, _ []byte) error { n++; return nil }); err != nil || n < want || n > told {
			t.Errorf("copy %d has %d rows of at least %d, %v", i, n, want, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := s.Checkpoint("copya"); err == nil {
		t.Error("a checkpoint went over another one")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Checkpoint("late"); !errors.Is(err, kv.ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}
