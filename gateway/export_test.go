package gateway

import (
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/gateway/httpapi"
	"holdfast/internal/clock"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/internal/tracing"
	"holdfast/spool"
)

// Matcher compiles filters as routes and gives the place of the first that matches, -1 for none.
func Matcher(filters ...string) (func(topic []byte) int, error) {
	var table []route[int]
	for i, f := range filters {
		table = append(table, route[int]{f, i})
	}
	r, err := newRoutes(table, -1)
	if err != nil {
		return nil, err
	}
	return r.match, nil
}

// systemClock is the system's, kept nowhere.
func systemClock() *clock.Clock {
	c, err := clock.Open(nil, clock.Config{})
	if err != nil {
		panic(err)
	}
	return c
}

// NewIntake makes an intake of a spool and routes.
func NewIntake(sp appender, table []config.Route) (*Intake, error) {
	return newIntake(sp, table, systemClock())
}

// SetLevel tells the intake how full the disk is.
func (i *Intake) SetLevel(level func() kv.Level) { i.level = level }

// Reserved says whether only Holdfast itself publishes to a topic.
var Reserved = reserved

// OpenDataDir makes and locks a data directory, as a gateway does.
func OpenDataDir(path string) (interface{ Close() error }, error) { return openDataDir(path, true) }

// WithFS has the store of the gateways that o makes use fs.
func WithFS(o Options, fs vfs.FS) Options {
	o.storeOptions = func(k *kv.Options) { k.FS = fs }
	return o
}

// OpenTokens opens the tokens in store and dir as a gateway does, with a clock that a test holds.
func OpenTokens(store *kv.Store, dir string, now func() time.Time) (httpapi.Tokens, error) {
	return openTokens(store, dir, now)
}

// MaxTokens bounds how many there are.
const MaxTokens = maxTokens

// Watch has fn see each event of g, too, and look at commands meanwhile. Before Run.
func Watch(g *Gateway, fn func(e devices.Event, get func(id string) (devices.Command, error))) {
	show := g.journal.watch
	g.journal.watch = func(e devices.Event) {
		show(e)
		fn(e, g.commands.Get)
	}
}

// NewJournal makes a journal on a spool.
func NewJournal(sp *spool.Spool, gateway string) devices.Journal {
	lane, _ := sp.Lane(spool.SystemLane)
	return &journal{spool: sp, lane: lane, gateway: gateway, clock: systemClock()}
}

// Commands is the gateway's queue.
func Commands(g *Gateway) *devices.Queue { return g.commands }

// Share tells what each part gets of what the process may use.
func Share(files int, memory int64, others int) (tables, http, connections int, scarce string, err error) {
	r, err := share(files, memory, others)
	return r.tables, r.http, r.connections, r.scarce, err
}

// Bounds tells what the broker may hold for devices in a process with so much memory.
func Bounds(memory int64) broker.Config {
	var c broker.Config
	bounds(&c, memory)
	return c
}

// AlarmsOf finds alarms in a status.
var AlarmsOf = alarmsOf

// Alarms remembers alarms.
type Alarms struct{ alarms }

// Update takes those that there are now.
func (a *Alarms) Update(found []httpapi.Alarm, now time.Time, tell func(httpapi.AlarmChange)) []httpapi.Alarm {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.update(found, now, tell)
}

// Quantile says below which value a part of what was counted lies.
var Quantile = quantile

// Rate gives the point between two samples that are d apart.
func Rate(d time.Duration, before, after [2]uint64, bounds []float64, acks [2][]uint64) httpapi.HistoryPoint {
	a := sample{accepted: before[0], delivered: before[1], bounds: bounds, acks: acks[0]}
	b := sample{at: time.UnixMilli(0), elapsed: d, accepted: after[0], delivered: after[1], bounds: bounds, acks: acks[1]}
	return b.point(&a)
}

// Past keeps points.
type Past struct{ history }

// Add takes a point, After gives those after since.
func (p *Past) Add(q httpapi.HistoryPoint)                   { p.add(q) }
func (p *Past) After(since time.Time) []httpapi.HistoryPoint { return p.after(since) }

// ArriveUntold takes m to the disk of a gateway that tells of other messages.
func ArriveUntold(t *tracing.Tracer) func(m *broker.Message, done kv.Done) {
	x := &traces{t: t}
	return func(m *broker.Message, done kv.Done) { x.begin(m, 0, done).Done(0, t.Every()+1, nil) }
}

// SampleOf is what the gateway's counters say now: messages accepted and delivered, acknowledgements that were measured.
func SampleOf(g *Gateway) (accepted, delivered, acks uint64) {
	s := g.sample()
	for _, n := range s.acks {
		acks += n
	}
	return s.accepted, s.delivered, acks
}
