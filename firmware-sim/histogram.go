package firmwaresim

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// histogram counts durations in buckets of at most 1.6 % of their value: 64 to each power of
// two of microseconds, up to 2^32 µs (71 minutes). Many goroutines may use it at once.
type histogram struct {
	counts [(maxPower - subBits + 2) << subBits]atomic.Uint64
	max    atomic.Int64
}

const (
	subBits  = 6
	maxPower = 32
)

func (h *histogram) add(d time.Duration) {
	h.counts[bucket(d)].Add(1)
	for {
		old := h.max.Load()
		if int64(d) <= old || h.max.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}

func (h *histogram) merge(other *histogram) {
	for i := range h.counts {
		h.counts[i].Add(other.counts[i].Load())
	}
	h.max.Store(max(h.max.Load(), other.max.Load()))
}

// bucket: values below 2^subBits have a bucket each, above that the leading subBits+1 bits
// choose it.
func bucket(d time.Duration) int {
	x := uint64(max(d, 0) / time.Microsecond)
	x = min(x, 1<<maxPower-1)
	shift := max(bits.Len64(x)-subBits-1, 0)
	return shift<<subBits + int(x>>shift)
}

// upper is the largest value of a bucket.
func upper(b int) time.Duration {
	if b < 2<<subBits {
		return time.Duration(b) * time.Microsecond
	}
	shift := b>>subBits - 1
	x := uint64(b-shift<<subBits+1)<<shift - 1
	return time.Duration(x) * time.Microsecond
}

// Latency are quantiles of the time from sending a message to its acknowledgement, right to 1.6 %.
type Latency struct {
	P50  time.Duration `json:"p50_ns"`
	P99  time.Duration `json:"p99_ns"`
	P999 time.Duration `json:"p999_ns"`
	Max  time.Duration `json:"max_ns"`
}

func (h *histogram) latency() Latency {
	var counts [len(h.counts)]uint64
	var total uint64
	for i := range counts {
		counts[i] = h.counts[i].Load()
		total += counts[i]
	}
	most := time.Duration(h.max.Load())
	quantile := func(q float64) time.Duration {
		left := uint64(math.Ceil(q * float64(total)))
		for i, n := range counts {
			if left <= n {
				return min(upper(i), most)
			}
			left -= n
		}
		return most
	}
	if total == 0 {
		return Latency{}
	}
	return Latency{P50: quantile(0.5), P99: quantile(0.99), P999: quantile(0.999), Max: most}
}
