package proof_test

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/proof"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const epoch = "0190163d-8694-739b-aea5-966c26f8ad91"

// toy is a gateway that keeps what devices send in one lane, and sends it up when it is told to: the checker's tests break it
// on the way.
type toy struct {
	server *mqtttest.Server

	mu  sync.Mutex
	log []wire.Message // under mu: sequence 1, 2, 3 …
}

func startToy(t *testing.T) *toy {
	g := &toy{}
	g.server = mqtttest.New(t, mqtttest.Script{Publish: func(client string, p *mqtt.Publish) mqtttest.Answer {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.log = append(g.log, wire.Message{
			Received: 1764000000000, Device: client, Topic: string(p.Topic), Flags: wire.FlagQoS1, Payload: slices.Clone(p.Payload),
		})
		return mqtttest.Answer{}
	}})
	return g
}

// sent is one message under a sequence.
type sent struct {
	seq uint64
	wire.Message
}

func (g *toy) sent() (all []sent) {
	for i, m := range g.log {
		all = append(all, sent{uint64(i + 1), m})
	}
	return all
}

// books of a gateway that got rid of n messages, of which gone will not arrive.
func books(n, gone int) *proof.Books {
	b := &proof.Books{Epoch: epoch}
	b.Ledger.Balanced = true
	count := func(n int) proof.Count { return proof.Count{Messages: uint64(n), Bytes: 100 * uint64(n)} }
	b.Ledger.Accounts = []proof.Account{{
		Upstream: "cloud", Lane: "telemetry", Accepted: count(n), Delivered: count(n - gone), Evicted: count(gone),
	}}
	return b
}

func (g *toy) up(t *testing.T, all []sent, gaps ...wire.Gap) *proof.Cloud {
	t.Helper()
	c := proof.NewCloud()
	highest := uint64(0)
	for _, m := range all {
		b, err := wire.AppendCloudEvent(nil, "toy", epoch, "telemetry", m.seq, m.Message, m.seq < highest, 0)
		highest = max(highest, m.seq)
		if err != nil {
			t.Fatal(err)
		}
		c.Take(wire.MessageTopic("toy", m.Device), b)
	}
	for _, gap := range gaps {
		gap.Gateway, gap.Epoch, gap.Upstream = "toy", epoch, "cloud"
		if gap.Lane == "" {
			gap.Lane = "telemetry"
		}
		b, err := json.Marshal(gap)
		if err != nil {
			t.Fatal(err)
		}
		c.Take(wire.GapTopic("toy"), b)
		c.Take(wire.GapTopic("toy"), b) // announcements come at least once, too
	}
	return c
}

// TestCheckFinds breaks a gateway in each way that matters, after everything was acknowledged, and looks whether the checker says
// so, and says so where it belongs.
func TestCheckFinds(t *testing.T) {
	g := startToy(t)
	f, err := proof.StartFleet(t.Context(), proof.FleetConfig{
		Broker: "mqtt://" + g.server.Addr, Devices: 4, Rate: 1000, Seed: 1, Calm: true,
		Change: func(c *firmwaresim.Config) { c.Messages, c.QoS = 100, firmwaresim.QoS1 },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for f.Floor() < 400 && ctx.Err() == nil {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
		}
	}
	if err := f.Finish(); err != nil {
		t.Fatal(err)
	}
	all := g.sent()
	if len(all) != 400 || f.Floor() != 400 {
		t.Fatalf("%d messages came, %d acknowledged", len(all), f.Floor())
	}
	// next is the next message of the same stream as all[i].
	next := func(i int) int {
		p, err := firmwaresim.ParsePayload(all[i].Payload)
		if err != nil {
			t.Fatal(err)
		}
		for k := i + 1; k < len(all); k++ {
			if q, err := firmwaresim.ParsePayload(all[k].Payload); err == nil && q.Device == p.Device && q.Stream == p.Stream {
				return k
			}
		}
		t.Fatal("there is none")
		return 0
	}
	without := func(i ...int) []sent {
		var left []sent
		for k := range all {
			if !slices.Contains(i, k) {
				left = append(left, all[k])
			}
		}
		return left
	}
	laterFirst := func() []sent {
		left := slices.Clone(all)
		i, k := 100, next(100)
		m := left[k]
		copy(left[i+1:k+1], left[i:k])
		left[i] = m
		return left
	}
	type counts struct{ Lost, Unexplained, OutOfOrder uint64 }
	for _, c := range []struct {
		name  string
		all   func() []sent
		gaps  []wire.Gap
		books *proof.Books
		o     proof.Options
		want  counts
	}{
		{name: "nothing wrong"},
		{name: "repeats with the same ids", all: func() []sent { return append(slices.Clone(all), all[100:150]...) }},
		{name: "one lost", all: func() []sent { return without(100) }, want: counts{Lost: 1 + 1, Unexplained: 1}}, // the books say that it was delivered
		{name: "one lost, and the books say so", all: func() []sent { return without(100) }, books: books(400, 1), want: counts{Lost: 1, Unexplained: 1 + 1}},
		{name: "the end lost", all: func() []sent { return all[:395] }, want: counts{Lost: 5 + 5}},
		{
			name: "one lost and sequences closed up", all: func() []sent {
				left := without(100)
				for i := range left {
					left[i].seq = uint64(i + 1)
				}
				return left
			}, books: books(399, 0), want: counts{Lost: 1},
		},
		{
			name: "gone by a rule", all: func() []sent { return without(100, 101) }, books: books(400, 2),
			gaps: []wire.Gap{{First: 101, Last: 102, Count: 2, Reason: "max_bytes"}},
		},
		{
			name: "gone without a cause", all: func() []sent { return without(100) }, books: books(400, 1),
			gaps: []wire.Gap{{First: 101, Last: 101, Count: 1, Reason: "max_bytes"}}, o: proof.Options{Reasons: []string{"max_age"}},
			want: counts{Unexplained: 1},
		},
		{
			name: "gone and told to nobody", all: func() []sent { return without(100) }, books: books(400, 1),
			gaps: []wire.Gap{}, want: counts{Lost: 1, Unexplained: 2},
		},
		{
			name: "another one announced than is gone", all: func() []sent { return without(100) }, books: books(400, 1),
			gaps: []wire.Gap{{First: 300, Last: 300, Count: 1, Reason: "damaged"}}, want: counts{Lost: 1, Unexplained: 1},
		},
		{
			name: "one announced, two gone", all: func() []sent { return without(100, next(100)) }, books: books(400, 1),
			gaps: []wire.Gap{{First: 101, Last: 101, Count: 1, Reason: "damaged"}}, want: counts{Lost: 1 + 1, Unexplained: 1},
		},
		{
			name: "gone with its announcement, and that is announced", all: func() []sent { return without(100, 101) }, books: books(400, 2),
			gaps: []wire.Gap{{Lane: "system", First: 7, Last: 7, Count: 1, Reason: "damaged"}},
		},
		{
			name: "two holes, and one announcement gone", all: func() []sent { return without(100, 200) }, books: books(400, 2),
			gaps: []wire.Gap{{Lane: "system", First: 7, Last: 7, Count: 1, Reason: "damaged"}}, want: counts{Lost: 1, Unexplained: 1},
		},
		{
			// Of two streams one ends between the two sequences: it has to be given the first.
			name: "two gone whose neighbours overlap", all: func() []sent { return without(100, 101) }, books: books(400, 2),
			gaps: []wire.Gap{{First: 101, Last: 101, Count: 1, Reason: "damaged"}, {First: 102, Last: 102, Count: 1, Reason: "damaged"}},
		},
		{name: "a hole in the sequences", all: func() []sent {
			left := slices.Clone(all)
			for i := 200; i < len(left); i++ {
				left[i].seq += 7
			}
			return left
		}, want: counts{Unexplained: 7}},
		{
			name: "two of a stream change places", all: func() []sent {
				left := slices.Clone(all)
				i, k := 100, next(100)
				left[i].Message, left[k].Message = left[k].Message, left[i].Message
				return left
			}, want: counts{OutOfOrder: 2}, // by arrival and by sequence
		},
		{
			name: "a later one comes first", all: laterFirst, want: counts{OutOfOrder: uint64(next(100) - 100)}, // all of those between are late
		},
		{name: "a later one comes first where it may", all: laterFirst, o: proof.Options{LiveFirst: []string{"telemetry"}}},
		{
			name: "stored twice", all: func() []sent {
				left := append(slices.Clone(all), all[100])
				left[400].seq = 401
				return left
			}, books: books(401, 0), want: counts{Unexplained: 1},
		},
		{
			name: "invented", all: func() []sent {
				left := append(slices.Clone(all), all[100])
				left[400].seq = 401
				left[400].Device = "three-00001"
				left[400].Payload = []byte(`{"device":"three-00001","stream":"vitals","n":9999,"ts":1764000000000}`)
				return left
			}, books: books(401, 0), want: counts{Unexplained: 1},
		},
		{name: "books that do not add up", books: func() *proof.Books {
			b := books(400, 0)
			b.Ledger.Accounts[0].Delivered.Messages--
			return b
		}(), want: counts{Unexplained: 1}},
		{name: "books of fewer than came", books: books(390, 0), want: counts{Unexplained: 10}},
		{name: "something left behind", books: func() *proof.Books {
			b := books(400, 0)
			a := &b.Ledger.Accounts[0]
			a.Accepted.Messages, a.Pending.Messages = 403, 3
			return b
		}(), want: counts{Unexplained: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.all == nil {
				c.all = func() []sent { return all }
			}
			if c.books == nil {
				c.books = books(400, 0)
			}
			v := proof.Check(f, g.up(t, c.all(), c.gaps...), c.books, c.o)
			if got := (counts{v.Lost, v.Unexplained, v.OutOfOrder}); got != c.want {
				t.Errorf("want %+v, got %v", c.want, &v)
			}
			if v.OK() != (c.want == counts{}) || !v.OK() && len(v.Examples) == 0 {
				t.Errorf("OK %v: %v", v.OK(), &v)
			}
		})
	}
}

func TestPlanFollowsItsSeed(t *testing.T) {
	c := proof.PlanConfig{
		Steps: 1000, Faults: []proof.Choice{{"kill -9", 3}, {"power cut", 1}, {"never", 0}}, Links: []proof.Choice{{"up", 1}, {"away", 1}},
		MinLife: 100 * time.Millisecond, MaxLife: 200 * time.Millisecond, MaxGone: 50 * time.Millisecond,
	}
	one := proof.Plan(7, c)
	if diff := cmp.Diff(one, proof.Plan(7, c)); diff != "" {
		t.Error(diff)
	}
	if cmp.Equal(one, proof.Plan(8, c)) {
		t.Error("another seed gives the same schedule")
	}
	n := map[string]int{}
	for _, s := range one {
		n[s.Fault]++
		n[s.Link]++
		if s.Life < c.MinLife || s.Life > c.MaxLife || s.Gone > c.MaxGone {
			t.Fatal(s)
		}
	}
	if n["never"] > 0 || n["kill -9"] < 650 || n["power cut"] < 150 || n["up"] < 400 || n["away"] < 400 {
		t.Errorf("drawn: %v", n)
	}
}

func TestReport(t *testing.T) {
	r := proof.NewReport("crash", 42, "make crash CRASH_SEED=42")
	r.Cycle(30 * time.Millisecond)
	r.Cycle(20 * time.Millisecond)
	r.Fault("power cut")
	r.Fault("power cut")
	r.Verdict(proof.Verdict{Published: 10, Acknowledged: 9, Arrived: 10, Announced: map[string]uint64{"max_age": 1}})
	r.Verdict(proof.Verdict{Published: 5, Acknowledged: 5, Arrived: 5, Announced: map[string]uint64{"max_age": 2}})
	if !r.OK() {
		t.Error("not OK")
	}
	for _, want := range []string{
		"crash: KEPT", "42 (again: make crash CRASH_SEED=42)", "2 in ", "slowest start 30ms", "15 published, 14 acknowledged", "2 power cut",
		"3 messages that will not arrive: max_age", "0 lost, 0 unexplained, 0 out of order",
	} {
		if !strings.Contains(r.String(), want) {
			t.Errorf("no %q in\n%v", want, r)
		}
	}
	r.Verdict(proof.Verdict{Lost: 1, Examples: []string{"this one"}})
	r.Failed("start %d was refused", 3)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		OK      bool
		Seed    uint64
		Cycles  int
		Verdict proof.Verdict
		Failed  []string
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if r.OK() || got.OK || got.Seed != 42 || got.Cycles != 2 || got.Verdict.Lost != 1 || len(got.Failed) != 1 || !strings.Contains(r.String(), "BROKEN") {
		t.Errorf("%s\n%v", b, r)
	}
	if proof.NewReport("nothing shown", 1, "").OK() {
		t.Error("a run that acknowledged nothing has shown nothing")
	}
}
