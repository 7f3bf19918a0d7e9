package proof

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
)

// Verdict is what Check found, in messages.
type Verdict struct {
	Published    uint64            `json:"published"`    // by devices, each once
	Acknowledged uint64            `json:"acknowledged"` // to devices
	Arrived      uint64            `json:"arrived"`      // upstream, each once
	SentAgain    uint64            `json:"sent_again"`   // further arrivals of messages that their device sent again
	Removed      uint64            `json:"removed"`      // repeats of the gateway, dropped by their id
	Late         uint64            `json:"late"`         // of Arrived: after newer ones of their lane
	Announced    map[string]uint64 `json:"announced,omitempty"`
	Lost         uint64            `json:"lost"`
	Unexplained  uint64            `json:"unexplained"`
	OutOfOrder   uint64            `json:"out_of_order"`
	// Examples name some of what is wrong.
	Examples []string `json:"examples,omitempty"`
}

// OK says that every promise was kept.
func (v *Verdict) OK() bool { return v.Lost+v.Unexplained+v.OutOfOrder == 0 }

const maxExamples = 12

func (v *Verdict) wrong(count *uint64, n uint64, format string, args ...any) {
	*count += n
	if len(v.Examples) < maxExamples {
		v.Examples = append(v.Examples, fmt.Sprintf(format, args...))
	}
}

// add sums up two verdicts.
func (v *Verdict) add(o Verdict) {
	v.Published += o.Published
	v.Acknowledged += o.Acknowledged
	v.Arrived += o.Arrived
	v.SentAgain += o.SentAgain
	v.Removed += o.Removed
	v.Late += o.Late
	for reason, n := range o.Announced {
		v.announced(reason, n)
	}
	v.Lost += o.Lost
	v.Unexplained += o.Unexplained
	v.OutOfOrder += o.OutOfOrder
	for _, e := range o.Examples {
		v.wrong(new(uint64), 0, "%s", e)
	}
}

// String is the verdict in one paragraph.
func (v *Verdict) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "published %d, acknowledged %d, arrived %d (sent again by devices %d, repeats removed %d)", v.Published, v.Acknowledged, v.Arrived, v.SentAgain, v.Removed)
	for _, reason := range slices.Sorted(maps.Keys(v.Announced)) {
		fmt.Fprintf(&b, ", %d announced as %s", v.Announced[reason], reason)
	}
	fmt.Fprintf(&b, ": %d lost, %d unexplained, %d out of order", v.Lost, v.Unexplained, v.OutOfOrder)
	for _, e := range v.Examples {
		b.WriteString("\n  " + e)
	}
	return b.String()
}

// Options of Check. The zero value is for one upstream called "cloud" and a format with ids.
type Options struct {
	Upstream string // whose books are looked at; "": cloud
	// NoIDs is for the format passthrough: the gateway's repeats come twice, and nothing can be said of sequences.
	NoIDs bool
	// LiveFirst are the lanes in which newer messages may come before older ones.
	LiveFirst []string
	// Reasons are those for which gaps may be announced; nil: any. A gap with another reason is unexplained.
	Reasons []string
	// Pending says that the books may have messages that wait.
	Pending bool
}

// Check holds what devices were promised against what arrived and what the books say. The fleet has finished, and nothing is on
// its way any more, else what is on its way counts as lost: see Settle. books may be nil.
func Check(f *Fleet, c *Cloud, books *Books, o Options) Verdict {
	if o.Upstream == "" {
		o.Upstream = "cloud"
	}
	var v Verdict
	c.mu.Lock()
	defer c.mu.Unlock()
	c.missing = nil
	v.Removed = c.receiver.Stats().Duplicates
	for name, n := range c.late {
		v.Late += n
		if !slices.Contains(o.LiveFirst, name) {
			v.wrong(&v.OutOfOrder, n, "lane %s: %d messages came after newer ones", name, n)
		}
	}
	for _, err := range c.errors {
		v.wrong(&v.Unexplained, 1, "%v", err)
	}
	for prefix := range c.arrivals {
		if f.halves[prefix] == nil {
			v.wrong(&v.Unexplained, c.arrivals[prefix].Total(), "messages of devices %s-… arrived, and there are none", prefix)
		}
	}
	for _, prefix := range slices.Sorted(maps.Keys(f.halves)) {
		arrivals := c.arrivals[prefix]
		if arrivals == nil {
			arrivals = firmwaresim.NewArrivals()
		}
		c.devices(&v, f.halves[prefix].Ledger().Verify(arrivals), o)
	}
	c.unnamed(&v)
	c.explain(&v)
	if !o.NoIDs {
		c.order(&v, f)
		c.holes(&v)
	}
	for _, g := range slices.SortedFunc(maps.Keys(c.gaps), func(a, b wire.Gap) int { return int(int64(a.First) - int64(b.First)) }) {
		v.announced(g.Reason, g.Count)
		if o.Reasons != nil && !slices.Contains(o.Reasons, g.Reason) {
			v.wrong(&v.Unexplained, g.Count, "lane %s: %d to %d announced as %s, and there was no cause", g.Lane, g.First, g.Last, g.Reason)
		}
	}
	if books != nil {
		c.books(&v, books, o)
	}
	return v
}

// devices takes over the verdict on one half of the fleet. Under mu.
func (c *Cloud) devices(v *Verdict, d firmwaresim.Verdict, o Options) {
	v.Published += d.Published
	v.Acknowledged += d.Acknowledged
	v.Arrived += d.Arrived
	v.SentAgain += d.Duplicates
	v.Unexplained += d.Unknown
	if !o.NoIDs {
		v.Unexplained += d.Repeated
	}
	disorder := d.OutOfOrder
	if len(c.gaps) > 0 {
		disorder -= d.Behind // a gap may have taken the first copy
	}
	v.OutOfOrder += disorder
	if disorder+d.Unknown+d.Repeated > 0 {
		for _, e := range d.Examples {
			if !strings.HasSuffix(e, ": "+firmwaresim.NotArrived) { // explain tells of those
				v.wrong(new(uint64), 0, "%s", e)
			}
		}
	}
	c.missing = append(c.missing, d.Missing...)
}

// span is a stretch of messages of one stream that did not come. Their sequences lie between those of its neighbours that came.
type span struct {
	firmwaresim.Missing
	after, before place
	left          uint64 // messages that nothing explains yet
}

// where tells what lies on both sides.
func (s *span) where() string {
	switch none := ^place(0); {
	case s.after == 0 && s.before == none:
		return "nothing of their stream came"
	case s.after == 0:
		return fmt.Sprintf("the one after them has sequence %d", s.before.seq())
	case s.before == none:
		return fmt.Sprintf("the one before them has sequence %d, none after them came", s.after.seq())
	}
	return fmt.Sprintf("those about them have sequences %d and %d", s.after.seq(), s.before.seq())
}

// explain holds what did not come against what gaps announced: a sequence that was announced and did not come explains one
// message, and only one whose neighbours lie on both sides of it. Nothing is lost if they can all be matched. Under mu.
func (c *Cloud) explain(v *Verdict) {
	gone := map[string][]place{} // by lane
	for key, l := range c.lanes {
		if key.lane == systemLane {
			continue
		}
		taken := bits(nil) // gaps may overlap
		for _, r := range slices.Concat(l.announced, l.unnamed) {
			for seq := r.First; seq <= r.Last; seq++ {
				if !l.came.has(seq) && !taken.has(seq) {
					taken.set(seq)
					gone[key.lane] = append(gone[key.lane], place(c.epochs[key.epoch]<<epochShift|seq))
				}
			}
		}
	}
	spans := map[string][]*span{} // by lane; "": of streams of which nothing came
	for _, m := range c.missing {
		s := &span{Missing: m, before: ^place(0), left: m.Last - m.First + 1}
		t := c.traces[stream{m.Device, m.Stream}]
		if t == nil {
			t = new(trace)
		}
		for i := min(m.First-1, uint64(len(t.places))); i > 0 && s.after == 0; i-- {
			s.after = t.places[i-1]
		}
		for i := m.Last; i < uint64(len(t.places)); i++ {
			if t.places[i] != 0 {
				s.before = t.places[i]
				break
			}
		}
		spans[t.lane] = append(spans[t.lane], s)
	}
	var rest uint64 // of what was announced
	for lane, places := range gone {
		slices.Sort(places)
		rest += match(places, spans[lane])
	}
	for _, s := range spans[""] {
		n := min(rest, s.left)
		rest -= n
		s.left -= n
	}
	for _, lane := range spans {
		for _, s := range lane {
			if s.left > 0 {
				v.wrong(&v.Lost, s.left, "%s %s n=%d-%d: acknowledged, %d of them not arrived and not announced; %s", s.Device, s.Stream, s.First, s.Last, s.left, s.where())
			}
		}
	}
}

// match gives each place, in order, to the span about it that ends first, and returns how many nobody wanted.
func match(places []place, spans []*span) (rest uint64) {
	slices.SortFunc(spans, func(a, b *span) int { return cmp.Compare(a.after, b.after) })
	var open []*span // those that have begun, by their ends
	next := 0
	for _, p := range places {
		for ; next < len(spans) && spans[next].after < p; next++ {
			i, _ := slices.BinarySearchFunc(open, spans[next], func(a, b *span) int { return cmp.Compare(a.before, b.before) })
			open = slices.Insert(open, i, spans[next])
		}
		for len(open) > 0 && (open[0].before <= p || open[0].left == 0) {
			open = open[1:]
		}
		if len(open) == 0 {
			rest++
			continue
		}
		open[0].left--
	}
	return rest
}

// order checks that the gateway gave sequences in the order in which each device sent. Under mu.
func (c *Cloud) order(v *Verdict, f *Fleet) {
	ledgers := map[string]*firmwaresim.Ledger{}
	for prefix, half := range f.halves {
		ledgers[prefix] = half.Ledger()
	}
	for s, t := range c.traces {
		var highest place
		var n int
		for i, p := range t.places {
			if p == 0 {
				continue
			}
			prefix, _, _ := strings.Cut(s.device, "-")
			if p < highest && (len(c.gaps) == 0 || ledgers[prefix] == nil || !ledgers[prefix].SentAgain(s.device, s.name, uint64(n))) {
				v.wrong(&v.OutOfOrder, 1, "%s %s: n=%d has sequence %d, n=%d before it has %d", s.device, s.name, i+1, p.seq(), n, highest.seq())
				continue
			}
			highest, n = p, i+1
		}
	}
}

// holes are sequences that neither came nor were announced as a gap. What a lane that is not drained in order still owes counts as well:
// nothing is on its way any more. Under mu.
func (c *Cloud) holes(v *Verdict) {
	for key, l := range c.lanes {
		if key.lane == systemLane {
			continue
		}
		holes := l.holes()
		if n := size(holes); n > 0 {
			v.wrong(&v.Unexplained, n, "lane %s of %s: %d sequences missing, no gap names them: %v", key.lane, key.epoch, n, holes[:min(len(holes), 5)])
		}
	}
}

func size(all []cloud.Range) (n uint64) {
	for _, r := range all {
		n += r.Count()
	}
	return n
}

// holes are what is missing between the first and the last sequence that came or was announced.
func (l *lane) holes() (where []cloud.Range) {
	var announced bits
	first, last := l.first, l.last
	for _, r := range slices.Concat(l.announced, l.unnamed) {
		if first == 0 {
			first = r.First
		}
		first, last = min(first, r.First), max(last, r.Last)
		for seq := r.First; seq <= r.Last; seq++ {
			announced.set(seq)
		}
	}
	for seq := first; seq <= last; seq++ {
		if l.came.has(seq) || announced.has(seq) {
			continue
		}
		if k := len(where) - 1; k >= 0 && where[k].Last+1 == seq {
			where[k].Last = seq
		} else {
			where = append(where, cloud.Range{First: seq, Last: seq})
		}
	}
	return where
}

// announcementLost is what a hole counts as whose own announcement was lost, where a gap in the lane of announcements says so.
const announcementLost = "announcement lost"

// unnamed forgives as many holes as announcements were lost and announced as that: each may have named one. Under mu.
func (c *Cloud) unnamed(v *Verdict) {
	for _, l := range c.lanes {
		l.unnamed = nil
	}
	left := c.lostAnnouncements()
	for key, l := range c.lanes {
		if key.lane == systemLane || left == 0 {
			continue
		}
		holes := l.holes()
		l.unnamed = holes[:min(uint64(len(holes)), left)]
		left -= uint64(len(l.unnamed))
		if n := size(l.unnamed); n > 0 {
			v.announced(announcementLost, n)
		}
	}
}

func (c *Cloud) lostAnnouncements() (n uint64) {
	for g := range c.gaps {
		if g.Lane == systemLane {
			n += g.Count
		}
	}
	return n
}

func (v *Verdict) announced(reason string, n uint64) {
	if v.Announced == nil {
		v.Announced = map[string]uint64{}
	}
	v.Announced[reason] += n
}

// books checks what the gateway says of itself. Under mu.
func (c *Cloud) books(v *Verdict, b *Books, o Options) {
	for _, err := range b.Balance() {
		v.wrong(&v.Unexplained, 1, "%v", err)
	}
	for _, a := range b.Ledger.Accounts {
		if a.Upstream != o.Upstream || a.Lane == systemLane {
			continue
		}
		if a.Pending.Messages > 0 && !o.Pending {
			v.wrong(&v.Unexplained, a.Pending.Messages, "lane %s: %d messages still wait", a.Lane, a.Pending.Messages)
		}
		if o.NoIDs {
			continue
		}
		told := uint64(0)
		for g := range c.gaps {
			if g.Lane == a.Lane && g.Epoch == b.Epoch && (g.Upstream == o.Upstream || g.Upstream == "") {
				told += g.Count
			}
		}
		if gone := a.gone(); gone != told && !o.Pending && (told > gone || c.lostAnnouncements() == 0) {
			v.wrong(&v.Unexplained, max(gone, told)-min(gone, told), "lane %s: the books say that %d will not arrive, %d were announced: %+v", a.Lane, gone, told, a)
		}
		came := uint64(0)
		if l := c.lanes[laneKey{b.Epoch, a.Lane}]; l != nil {
			came = l.count
		}
		switch {
		case came < a.Delivered.Messages:
			v.wrong(&v.Lost, a.Delivered.Messages-came, "lane %s: the books say that %d were delivered, %d came", a.Lane, a.Delivered.Messages, came)
		case came > a.Accepted.Messages:
			v.wrong(&v.Unexplained, came-a.Accepted.Messages, "lane %s: %d came, the books say that %d were accepted", a.Lane, came, a.Accepted.Messages)
		}
	}
}

// Settle is Check once all is there: an upstream broker may still be handing on what the gateway got rid of. It returns when
// nothing is lost or unexplained any more, or after within. ask gives the books anew each time; nil: there are none.
func Settle(ctx context.Context, within time.Duration, f *Fleet, c *Cloud, ask func() (*Books, error), o Options) (Verdict, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(within); ; {
		var books *Books
		if ask != nil {
			var err error
			if books, err = ask(); err != nil {
				return Verdict{}, fmt.Errorf("ask the gateway for its books: %w", err)
			}
		}
		v := Check(f, c, books, o)
		if v.Lost+v.Unexplained == 0 || time.Now().After(deadline) {
			return v, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
}
