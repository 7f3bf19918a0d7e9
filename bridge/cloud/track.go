package cloud

// track is what is known of one lane of one epoch of a gateway.
type track struct {
	key laneKey

	// Sequences up to floor are settled: they count as seen. It is 0 until the bound is reached.
	floor uint64
	// base is the first sequence that ever came; what lies below it is not expected.
	base, max uint64
	seen      ranges // above floor
	announced ranges // above floor: named by gap announcements
	missing   uint64 // sequences between base and max, not seen and not announced
}

type laneKey struct{ gateway, epoch, lane string }

// verdict on a sequence that came.
type verdict int

const (
	fresh     verdict = iota // for the first time, in order
	late                     // for the first time, after a higher one
	duplicate                // not for the first time
)

// come notes that seq came and appends to holes what it passed over.
func (t *track) come(seq uint64, holes []Range) (verdict, []Range) {
	if seq <= t.floor || seq <= t.max && t.seen.has(seq) {
		return duplicate, holes
	}
	t.seen = t.seen.add(Range{seq, seq})
	if t.base == 0 {
		t.base, t.max = seq, seq
		return fresh, holes
	}
	if seq < t.max {
		if seq > t.base && !t.announced.has(seq) {
			t.missing--
		}
		return late, holes
	}
	if seq > t.max+1 {
		before := len(holes)
		holes = t.announced.without(holes, Range{t.max + 1, seq - 1})
		for _, h := range holes[before:] {
			t.missing += h.Count()
		}
	}
	t.max = seq
	return fresh, holes
}

// announce notes that r will not come, and returns how many of those were missing.
func (t *track) announce(r Range) (explained uint64) {
	if r.Last <= t.floor {
		return 0
	}
	r.First = max(r.First, t.floor+1)
	if t.base < t.max {
		// Count only what counts as missing: between base and max, not seen, not announced before.
		within := Range{max(r.First, t.base+1), min(r.Last, t.max)}
		if within.First <= within.Last {
			for _, open := range t.announced.without(nil, within) {
				for _, hole := range t.seen.without(nil, open) {
					explained += hole.Count()
				}
			}
		}
	}
	t.missing -= explained
	t.announced = t.announced.add(r)
	return explained
}

// bound keeps memory: with more than limit ranges the lowest are settled. What was missing there stays
// counted as missing, and would be taken for a duplicate if it came after all.
func (t *track) bound(limit int) {
	for len(t.seen) > limit {
		t.settle(t.seen[0].Last)
	}
	for len(t.announced) > limit {
		if t.announced[0].First > t.max { // all of it is about a future that never comes
			t.announced = t.announced[:len(t.announced)-1]
			continue
		}
		t.settle(min(t.announced[0].Last, t.max))
	}
}

func (t *track) settle(seq uint64) {
	t.floor = seq
	t.seen = t.seen.cut(seq)
	t.announced = t.announced.cut(seq)
}

// holes are the ranges that are missing above floor.
func (t *track) holes() (holes []Range) {
	from := max(t.base, t.floor)
	if from >= t.max {
		return nil
	}
	for _, open := range t.announced.without(nil, Range{from + 1, t.max}) {
		holes = t.seen.without(holes, open)
	}
	return holes
}
