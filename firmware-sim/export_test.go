package firmwaresim

import "time"

// Quantiles of durations, through the histogram.
func Quantiles(list []time.Duration) Latency {
	var h histogram
	for _, d := range list {
		h.add(d)
	}
	return h.latency()
}

// AppendPayload makes the payload of a sample of profile p.
func AppendPayload(dst []byte, p, stream int, device string, seed, n uint64, ts int64, size int) []byte {
	return appendPayload(dst, device, &source{seed: seed}, profiles[p], stream, n, ts, size)
}

// Streams is how many streams profile p has.
func Streams(p int) int { return len(profiles[p].streams) }

// ProfileCount is how many profiles there are.
func ProfileCount() int { return len(profiles) }

// Ranges is a set of numbers.
type Ranges struct{ r ranges }

// Add says whether n is new.
func (r *Ranges) Add(n uint64) bool { return r.r.add(n) }

// Minus gives what is not in other.
func (r *Ranges) Minus(other *Ranges) *Ranges { return &Ranges{r.r.minus(other.r)} }

// Spans are the ranges themselves.
func (r *Ranges) Spans() (s [][2]uint64) {
	for _, x := range r.r {
		s = append(s, [2]uint64{x.first, x.last})
	}
	return s
}

// NewLedger makes a ledger of one stream. again: what was sent more than once.
func NewLedger(device, stream string, made uint64, unsent, acked []uint64, again ...uint64) *Ledger {
	a := account{made: made, sent: made - uint64(len(unsent))}
	for _, n := range unsent {
		a.unsent.add(n)
	}
	for _, n := range acked {
		a.acked.add(n)
	}
	for _, n := range again {
		a.again.add(n)
	}
	return &Ledger{devices: map[string]map[string]account{device: {stream: a}}}
}
