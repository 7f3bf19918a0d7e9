package main

import (
	"bytes"
	"context"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"
)

// gcPercent keeps the heap of a gateway small: what lives is little and what is allocated per message
// is less, so collecting twice as often costs a few percent of a core under full load.
const gcPercent = 50

// tuneMemory sets the collector for a small box unless the environment has its own word. The limit
// is soft: near it the collector works harder, long before the kernel looks for somebody to kill.
//
// It returns how many bytes the process may use, 0 if that is not known.
func tuneMemory(log *slog.Logger) int64 {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	total := availableMemory("/")
	if os.Getenv("GOMEMLIMIT") != "" {
		if own := debug.SetMemoryLimit(-1); total == 0 || own < total {
			return own
		}
		return total
	}
	if total == 0 {
		return 0
	}
	limit := total / 2
	debug.SetMemoryLimit(limit)
	log.Debug("memory limit set", "limit_bytes", limit, "available_bytes", total)
	return total
}

// A gateway that has had a busy minute holds memory which it will not need for hours, and on a small
// box somebody else does. The collector alone gives it back after several of its two-minute rounds.
const (
	trimEvery = 10 * time.Second
	trimQuiet = 1 << 20  // bytes allocated within trimEvery: at most this much is quiet
	trimWorth = 16 << 20 // bytes allocated since the last time: less is not worth a collection
)

// trimMemory gives memory back to the system each time that work has ended, until ctx ends.
func trimMemory(ctx context.Context) {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	trim(ctx, func() uint64 {
		metrics.Read(sample)
		return sample[0].Value.Uint64()
	}, func() {
		runtime.GC() // what lies in pools survives one collection
		debug.FreeOSMemory()
	})
}

// trim calls free when little was allocated in the last interval and much since the last free.
// allocated gives the bytes since the program began.
func trim(ctx context.Context, allocated func() uint64, free func()) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	last, freed := allocated(), uint64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := allocated()
		if now-last < trimQuiet && now-freed > trimWorth {
			free()
			now = allocated()
			freed = now
		}
		last = now
	}
}

// availableMemory is what this process may use at most: the machine's memory or its control
// group's limit, whichever is less; 0 if neither is known. root is "/" but in tests.
func availableMemory(root string) int64 {
	least := int64(math.MaxInt64)
	note := func(n int64, ok bool) {
		if ok && n > 0 {
			least = min(least, n)
		}
	}
	note(memTotal(filepath.Join(root, "proc/meminfo")))
	// /proc/self/cgroup: "0::/path" of version 2, "7:memory:/path" of version 1. A container sees its
	// own group as the root, so that is looked at as well.
	groups, _ := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case f[1] == "":
			for dir := f[2]; ; dir = filepath.Dir(dir) { // a limit above holds below
				note(readLimit(filepath.Join(root, "sys/fs/cgroup", dir, "memory.max")))
				if dir == "/" || dir == "." {
					break
				}
			}
		case strings.Contains(f[1], "memory"):
			for dir := f[2]; ; dir = filepath.Dir(dir) {
				note(readLimit(filepath.Join(root, "sys/fs/cgroup/memory", dir, "memory.limit_in_bytes")))
				if dir == "/" || dir == "." {
					break
				}
			}
		}
	}
	if least == math.MaxInt64 {
		return 0
	}
	return least
}

func readLimit(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	return n, err == nil // "max" is no number
}

func memTotal(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "MemTotal:" && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			return n << 10, err == nil
		}
	}
	return 0, false
}
