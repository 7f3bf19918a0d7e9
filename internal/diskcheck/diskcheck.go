// Package diskcheck measures what a disk makes of fsync, and judges whether it holds what fsync promises: that what was
// synced survives a power cut.
//
// Software alone cannot prove that it does. A disk that acknowledges from a volatile cache and does so at a believable speed looks
// like one that does not. What can be seen is what cannot be true: memory that is called a file system, a sync that is faster than the
// medium, a cache that costs nothing to empty, a mount option that leaves the emptying out.
package diskcheck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Report is what was found out.
type Report struct {
	Facts Facts `json:"facts"`
	// Sync is appending and syncing, as a log does, at several sizes.
	Sync []Timing `json:"sync"`
	// Overwrite is 4 KiB in one place, written and synced, so that nothing but the data itself changes.
	Overwrite Timing `json:"overwrite"`
	// Direct is the same past the kernel's cache and without a sync: into the device's cache, if it has one.
	// DirectSync is with O_DSYNC. Nil: the file system cannot.
	Direct     *Timing `json:"direct,omitempty"`
	DirectSync *Timing `json:"direct_sync,omitempty"`
	// Empty is a sync with nothing to sync.
	Empty Timing `json:"empty"`
	// Speeds of one long write, bytes a second: into the kernel's cache; with the sync at its end; and past the
	// cache (0: the file system cannot).
	Buffered   float64 `json:"buffered_bytes_per_second"`
	Sequential float64 `json:"synced_bytes_per_second"`
	DirectSeq  float64 `json:"direct_bytes_per_second"`

	Verdict Verdict  `json:"verdict"`
	Reasons []string `json:"reasons"` // for the verdict
	Notes   []string `json:"notes"`
}

// Timing is how long one operation took, again and again.
type Timing struct {
	Size      int     `json:"size_bytes"`
	Count     int     `json:"count"`
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_us"`
	P90       float64 `json:"p90_us"`
	P99       float64 `json:"p99_us"`
	P999      float64 `json:"p999_us"`
	Max       float64 `json:"max_us"`
	// Early and Late are the medians of the first and the last quarter.
	Early float64 `json:"early_p50_us"`
	Late  float64 `json:"late_p50_us"`
}

// Options of Measure.
type Options struct {
	Dir    string        // a folder of its own: files are made and removed in it
	Budget time.Duration // about how long it may take
	// MaxBytes bounds what lies on the disk at any time. 0: 256 MiB.
	MaxBytes int64
	// Step is told what is done now. Nil: nobody is.
	Step func(what string)
}

// Sizes that Report.Sync has.
var Sizes = []int{256, 4 << 10, 64 << 10}

const (
	block      = 4 << 10
	logBytes   = 16 << 20 // a log begins anew after that
	maxSamples = 1 << 18
)

// Measure finds out what there is to find out, and judges it.
func Measure(ctx context.Context, o Options) (Report, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = 256 << 20
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	var rep Report
	var err error
	if rep.Facts, err = facts(o.Dir); err != nil {
		return rep, err
	}
	share := func(percent int) time.Duration { return o.Budget * time.Duration(percent) / 100 }
	for i, size := range Sizes {
		o.Step(fmt.Sprintf("fsync of %d bytes", size))
		t, err := appendSynced(ctx, o.Dir, size, share([]int{14, 18, 14}[i]))
		if err != nil {
			return rep, fmt.Errorf("append and sync %d bytes: %w", size, err)
		}
		rep.Sync = append(rep.Sync, t)
	}
	o.Step("fsync in one place")
	if rep.Overwrite, err = inPlace(ctx, o.Dir, 0, true, share(10)); err != nil {
		return rep, fmt.Errorf("overwrite and sync: %w", err)
	}
	if rep.Empty, err = emptySync(ctx, o.Dir, share(2)); err != nil {
		return rep, fmt.Errorf("sync nothing: %w", err)
	}
	if direct != 0 {
		o.Step("writes past the kernel's cache")
		if rep.Direct, err = optional(inPlace(ctx, o.Dir, direct, false, share(8))); err != nil {
			return rep, fmt.Errorf("write directly: %w", err)
		}
		if rep.DirectSync, err = optional(inPlace(ctx, o.Dir, direct|dsync, false, share(10))); err != nil {
			return rep, fmt.Errorf("write directly and synced: %w", err)
		}
	}
	o.Step("one long write")
	if rep.Buffered, rep.Sequential, err = sequential(ctx, o.Dir, 0, o.MaxBytes, share(12)); err != nil {
		return rep, fmt.Errorf("write sequentially: %w", err)
	}
	if rep.Direct != nil {
		if _, rep.DirectSeq, err = sequential(ctx, o.Dir, direct, o.MaxBytes, share(12)); err != nil && !errors.Is(err, errUnsupported) {
			return rep, fmt.Errorf("write sequentially: %w", err)
		}
	}
	rep.judge()
	return rep, nil
}

// optional makes nil of a timing that the file system does not allow.
func optional(t Timing, err error) (*Timing, error) {
	if errors.Is(err, errUnsupported) {
		return nil, nil
	}
	return &t, err
}

var errUnsupported = errors.New("the file system cannot")

// repeat times op until the time is over.
func repeat(ctx context.Context, size int, budget time.Duration, op func() error, between func() error) (Timing, error) {
	samples := make([]time.Duration, 0, 1024)
	var spent time.Duration
	for end := time.Now().Add(budget); len(samples) < maxSamples; {
		begin := time.Now()
		if len(samples) > 0 && begin.After(end) {
			break
		}
		if err := op(); err != nil {
			return Timing{}, err
		}
		d := time.Since(begin)
		samples = append(samples, d)
		spent += d
		if err := ctx.Err(); err != nil {
			return Timing{}, err
		}
		if between != nil {
			if err := between(); err != nil {
				return Timing{}, err
			}
		}
	}
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
	t := Timing{Size: size, Count: len(samples), PerSecond: float64(len(samples)) / max(spent.Seconds(), 1e-9)}
	quarter := max(len(samples)/4, 1)
	median := func(part []time.Duration) float64 {
		part = slices.Sorted(slices.Values(part))
		return us(part[len(part)/2])
	}
	t.Early, t.Late = median(samples[:quarter]), median(samples[len(samples)-quarter:])
	slices.Sort(samples)
	at := func(share float64) float64 { return us(samples[min(int(share*float64(len(samples))), len(samples)-1)]) }
	t.P50, t.P90, t.P99, t.P999, t.Max = at(0.5), at(0.9), at(0.99), at(0.999), us(samples[len(samples)-1])
	return t, nil
}

// appendSynced is what a log does: append, sync, and now and then a new file.
func appendSynced(ctx context.Context, dir string, size int, budget time.Duration) (_ Timing, err error) {
	path := filepath.Join(dir, "append")
	open := func() (*os.File, error) { return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) }
	f, err := open()
	if err != nil {
		return Timing{}, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	b := noise(size)
	written := 0
	return repeat(ctx, size, budget, func() error {
		b[written/size%size]++ // never the same
		n, err := f.Write(b)
		written += n
		if err != nil {
			return err
		}
		return datasync(f)
	}, func() error {
		if written < logBytes {
			return nil
		}
		written = 0
		next, err := open()
		if err != nil {
			return err
		}
		err = f.Close()
		f = next
		return err
	})
}

// inPlace writes one block again and again.
func inPlace(ctx context.Context, dir string, flags int, sync bool, budget time.Duration) (_ Timing, err error) {
	path := filepath.Join(dir, "overwrite")
	if err := os.WriteFile(path, noise(64*block), 0o600); err != nil {
		return Timing{}, err
	}
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0)
	if err != nil {
		return Timing{}, unsupported(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return Timing{}, err
	}
	b, n := aligned(block), 0
	copy(b, noise(block))
	t, err := repeat(ctx, block, budget, func() error {
		n++
		b[n%block]++
		if _, err := f.WriteAt(b, 8*block); err != nil {
			return unsupported(err)
		}
		if sync {
			return datasync(f)
		}
		return nil
	}, nil)
	return t, err
}

func emptySync(ctx context.Context, dir string, budget time.Duration) (_ Timing, err error) {
	path := filepath.Join(dir, "empty")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Timing{}, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	if err := f.Sync(); err != nil {
		return Timing{}, err
	}
	return repeat(ctx, 0, budget, func() error { return datasync(f) }, nil)
}

// sequential writes in pieces of 1 MiB, for a while or until maxBytes, and then syncs: before and after give the speed without
// and with that.
func sequential(ctx context.Context, dir string, flags int, maxBytes int64, budget time.Duration) (before, after float64, err error) {
	path := filepath.Join(dir, "sequential")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|flags, 0o600)
	if err != nil {
		return 0, 0, unsupported(err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	b := aligned(1 << 20)
	copy(b, noise(len(b)))
	written := int64(0)
	begin := time.Now()
	for written < maxBytes && (written == 0 || time.Since(begin) < budget*2/3) {
		b[written>>20%int64(len(b))]++
		n, err := f.Write(b)
		written += int64(n)
		if err != nil {
			if written == 0 {
				err = unsupported(err)
			}
			return 0, 0, err
		}
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
	}
	took := time.Since(begin)
	if err := f.Sync(); err != nil {
		return 0, 0, err
	}
	speed := func(d time.Duration) float64 { return float64(written) / max(d.Seconds(), 1e-9) }
	return speed(took), speed(time.Since(begin)), nil
}

// noise is data that nobody can compress.
func noise(n int) []byte {
	b := make([]byte, n)
	x := uint64(0x9e3779b97f4a7c15)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}
