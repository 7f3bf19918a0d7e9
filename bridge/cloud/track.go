package cloud

// track is what is known of one lane of one epoch of a gateway.
type track struct {
	key laneKey

	// Sequences up to floor are settled: they count as seen. It is 0 until the bound is reached.
	floor uint64
	// What lies up to base is not expected: the first sequence that ever came, or what was sent before a backlog that it
	// went ahead of. max is 0 until one has come.
	base, max uint64
	// sent: the gateway has sent all sequences up to it. It is max but where newer ones went ahead of a backlog.
	sent      uint64
	seen      ranges // above floor
	announced ranges // above floor: named by gap announcements
	missing   uint64 // sequences after base up to sent, not seen and not announced
}

type laneKey struct{ gateway, epoch, lane string }

// verdict on a sequence that came.
type verdict int

const (
	fresh     verdict = iota // for the first time, in order
	late                     // for the first time, after a higher one
	duplicate                // not for the first time
)

// come notes that seq came and appends to holes what is missing now. behind is what the gateway said with it: 0, or from
// where on a backlog is still to come (wire.BatchHeader).
func (t *track) come(seq, behind uint64, holes []Range) (verdict, []Range) {
	if seq <= t.floor || seq <= t.max && t.seen.has(seq) {
		return duplicate, holes
	}
	t.seen = t.seen.add(Range{seq, seq})
	sent := seq // in its turn: then so were all before it
	if behind != 0 && behind < seq {
		sent = behind - 1
	}
	if t.max == 0 {
		t.base, t.max, t.sent = sent, seq, sent
		return fresh, holes
	}
	v := fresh
	if seq < t.max {
		v = late
		if seq > t.base && seq <= t.sent && !t.announced.has(seq) {
			t.missing--
		}
	}
	t.max = max(t.max, seq)
	if sent <= t.sent {
		return v, holes
	}
	if seq != t.sent+1 { // else the usual one: the next sequence
		before := len(holes)
		holes = t.unseen(holes, max(t.sent, t.base), sent)
		for _, h := range holes[before:] {
			t.missing += h.Count()
		}
	}
	t.sent = sent
	return v, holes
}

// unseen appends to dst what neither came nor was announced from after+1 up to last.
func (t *track) unseen(dst []Range, after, last uint64) []Range {
	if after >= last {
		return dst
	}
	for _, open := range t.announced.without(nil, Range{after + 1, last}) {
		dst = t.seen.without(dst, open)
	}
	return dst
}

// announce notes that r will not come, and returns how many of those were missing.
func (t *track) announce(r Range) (explained uint64) {
	if r.Last <= t.floor {
		return 0
	}
	r.First = max(r.First, t.floor+1)
	// Count only what counts as missing: from base up to what was sent, not seen, not announced before.
	for _, hole := range t.unseen(nil, max(r.First-1, t.base), min(r.Last, t.sent)) {
		explained += hole.Count()
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
	if seq > t.sent { // nothing below is waited for any more
		for _, h := range t.unseen(nil, max(t.sent, t.base, t.floor), seq) {
			t.missing += h.Count()
		}
		t.sent = seq
	}
	t.floor = seq
	t.seen = t.seen.cut(seq)
	t.announced = t.announced.cut(seq)
}

// holes are the ranges that are missing above floor.
func (t *track) holes() []Range { return t.unseen(nil, max(t.base, t.floor), t.sent) }

// awaited is how many sequences a gateway has still to send of a backlog that newer ones went ahead of.
func (t *track) awaited() (n uint64) {
	for _, r := range t.unseen(nil, max(t.sent, t.base, t.floor), t.max) {
		n += r.Count()
	}
	return n
}
