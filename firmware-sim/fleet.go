package firmwaresim

import (
	"container/heap"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
)

// Fleet is a number of simulated devices. One goroutine schedules them all; a connected
// device has one more, which reads.
type Fleet struct {
	cfg      Config
	to       target
	log      *slog.Logger
	devices  []*device
	period   time.Duration // between two samples of a device
	endless  bool          // no rate: as fast as the window allows
	someQoS0 bool
	latency  [8]histogram
	first    histogram         // from being ready for commands to the first one
	names    map[string]string // of commands with a behaviour of their own: each string once
	ghosts   ghosts
	dials    chan struct{} // bounds how many devices dial at once
	draining atomic.Bool   // no more samples and faults
	aborted  atomic.Bool   // Abort was called

	dialling  sync.WaitGroup
	connected sync.WaitGroup // connections that have not called OnClose yet

	started time.Time    // set by Run, then running
	ran     atomic.Bool  // Run was called
	running atomic.Bool  // started is set
	ended   atomic.Int64 // how long sampling went on, once it is over

	mu     sync.Mutex
	agenda agenda            // under mu
	wakeup chan struct{}     // cap 1: the agenda begins earlier than the scheduler thinks
	errors map[string]uint64 // under mu
}

// New checks cfg and makes the devices. It starts nothing. log may be nil.
func New(cfg Config, log *slog.Logger) (*Fleet, error) {
	to, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &Fleet{
		cfg: cfg, to: to, log: log,
		endless: cfg.Rate == 0,
		dials:   make(chan struct{}, 256),
		wakeup:  make(chan struct{}, 1),
		errors:  make(map[string]uint64),
	}
	if cfg.NoSamples {
		f.endless = false
	} else if !f.endless {
		f.period = time.Duration(float64(time.Second) / cfg.Rate)
	}
	f.names = make(map[string]string, len(cfg.Execution.Names))
	for name := range cfg.Execution.Names {
		f.names[name] = name
	}
	for i := range cfg.Devices {
		d := f.newDevice(i)
		for _, q := range d.qos {
			f.someQoS0 = f.someQoS0 || q == 0
		}
		f.devices = append(f.devices, d)
		heap.Push(&f.agenda, d)
	}
	return f, nil
}

func (f *Fleet) newDevice(i int) *device {
	p, _ := profileOf(f.cfg.Profile, i)
	d := &device{
		fleet:    f,
		id:       DeviceID(f.cfg.Prefix, f.cfg.First+i),
		number:   i,
		profile:  p,
		clean:    true, // a device that was never here may find a session that is not its own
		sampleAt: never, breakAt: never, crashAt: never, wakeAt: never, restAt: never,
		slots:    make([]slot, f.cfg.Window),
		accounts: make([]account, len(p.streams)),
	}
	for k := range f.cfg.Window {
		d.free = append(d.free, uint16(f.cfg.Window-1-k))
	}
	d.random = random(f.cfg.Seed ^ uint64(f.cfg.First+i)*0xd1342543de82ef95)
	d.source.seed = d.next()
	d.turn = int(d.next() % uint64(len(p.turns)))
	d.connectAt = time.Duration(float64(i) / f.cfg.ConnectRate * float64(time.Second))
	if f.cfg.Awake > 0 {
		d.connectAt = time.Duration(d.float() * float64(f.cfg.Period))
		d.restAt = d.connectAt + f.cfg.Awake
	}
	d.due = d.connectAt
	if f.cfg.Commands {
		d.commands = &commander{at: never, ready: never}
	}
	if !f.endless && !f.cfg.NoSamples {
		d.sampleAt = d.connectAt + time.Duration(d.float()*float64(f.period))
	}
	app := f.cfg.App
	set(&app, p.app)
	for _, s := range p.streams {
		d.topics = append(d.topics, []byte("dt/"+app+"/"+d.id+"/"+s.name))
		qos := s.qos
		if f.cfg.QoS != ByProfile {
			qos = byte(f.cfg.QoS - QoS0)
		}
		d.qos = append(d.qos, qos)
	}
	return d
}

// DeviceID is the id of the device with this number in a fleet with this prefix.
func DeviceID(prefix string, number int) string { return fmt.Sprintf("%s-%05d", prefix, number) }

// DeviceIDs are the ids of all devices.
func (f *Fleet) DeviceIDs() []string {
	var ids []string
	for _, d := range f.devices {
		ids = append(ids, d.id)
	}
	return ids
}

// Run runs the fleet until its duration is over, every device has made its messages, or ctx
// ends; then until all in flash is acknowledged, at most for the drain time. It may be
// called once. The error is for a fleet that never got a single connection.
func (f *Fleet) Run(ctx context.Context) (Report, error) {
	if f.ran.Swap(true) {
		return Report{}, fmt.Errorf("a fleet runs only once")
	}
	f.started = time.Now()
	f.running.Store(true)
	// Connections outlive sampling: they end when the fleet has drained.
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	f.log.Info("fleet starts", "devices", len(f.devices), "broker", f.to.address, "rate", f.cfg.Rate, "seed", f.cfg.Seed)
	sampling := ctx
	if f.cfg.Duration > 0 {
		var cancel context.CancelFunc
		sampling, cancel = context.WithTimeout(ctx, f.cfg.Duration)
		defer cancel()
	}
	f.schedule(sampling, life, func() bool { return f.aborted.Load() || f.cfg.Messages > 0 && f.all((*device).doneSampling) })
	f.ended.Store(int64(f.elapsed()))
	f.draining.Store(true)
	if f.cfg.Drain > 0 {
		f.Wake(wakeSpread)
		drain, stop := context.WithTimeout(life, f.cfg.Drain)
		f.schedule(drain, life, func() bool { return f.aborted.Load() || f.all((*device).idle) })
		stop()
	}
	cancel()
	f.stop()
	r := f.report()
	f.log.Info("fleet ended", "published", r.Published, "acknowledged", r.Acknowledged, "unacknowledged", r.Unacknowledged, "errors", len(r.Errors))
	if r.Connects == 0 {
		why := "no attempt has come to its end"
		if len(r.Errors) > 0 {
			why = strings.Join(slices.Sorted(maps.Keys(r.Errors)), "; ")
		}
		return r, fmt.Errorf("no device could connect to %s: %s", f.to.address, why)
	}
	return r, nil
}

// Abort has Run end soon, whatever is not acknowledged yet.
func (f *Fleet) Abort() { f.aborted.Store(true) }

// all says whether holds is true for each device, asked under its mu.
func (f *Fleet) all(holds func(*device) bool) bool {
	for _, d := range f.devices {
		d.mu.Lock()
		ok := holds(d)
		d.mu.Unlock()
		if !ok {
			return false
		}
	}
	return true
}

// lookEvery is how often schedule asks whether it is done.
const lookEvery = 20 * time.Millisecond

// schedule lets each device do what is due until ctx ends or done says so. What devices
// start ends with life.
func (f *Fleet) schedule(ctx, life context.Context, done func() bool) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var due []*device
	nextLook := f.elapsed()
	for ctx.Err() == nil {
		now := f.elapsed()
		if now >= nextLook {
			if done() {
				return
			}
			nextLook = f.elapsed() + lookEvery
		}
		due = due[:0]
		wait := lookEvery
		f.mu.Lock()
		for len(f.agenda) > 0 && f.agenda[0].due <= now {
			d := heap.Pop(&f.agenda).(*device)
			d.due = never
			due = append(due, d)
		}
		if len(f.agenda) > 0 {
			wait = min(wait, f.agenda[0].due-now)
		}
		f.mu.Unlock()
		for _, d := range due {
			next := d.run(life, now)
			f.mu.Lock()
			d.due = min(d.due, next) // a wake meanwhile has set due
			heap.Push(&f.agenda, d)
			f.mu.Unlock()
		}
		if len(due) > 0 {
			continue // time has gone by
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-f.wakeup:
		case <-ctx.Done():
		}
	}
}

// wake has the scheduler look at d no later than at.
func (f *Fleet) wake(d *device, at time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if at >= d.due {
		return
	}
	d.due = at
	if d.place >= 0 {
		heap.Fix(&f.agenda, d.place)
		select {
		case f.wakeup <- struct{}{}:
		default:
		}
	}
}

// stop ends all connections and waits for what runs. Dialling has been told to end.
func (f *Fleet) stop() {
	f.dialling.Wait()
	for _, d := range f.devices {
		d.mu.Lock()
		c := d.client
		d.client, d.stopped = nil, true
		d.mu.Unlock()
		if c == nil {
			continue
		}
		f.dials <- struct{}{}
		f.dialling.Go(func() {
			_ = c.Disconnect(mqtt.Success)
			<-f.dials
		})
	}
	f.dialling.Wait()
	f.connected.Wait()
	f.ghosts.close()
}

// linked makes a dialer whose connection is a link, and puts that into into.
func (f *Fleet) linked(dial func(context.Context, string, string) (net.Conn, error), into **link) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		*into = &link{Conn: conn, ghosts: &f.ghosts}
		return *into, nil
	}
}

func (f *Fleet) elapsed() time.Duration { return time.Since(f.started) }

func (f *Fleet) unixMilli(at time.Duration) int64 { return f.started.Add(at).UnixMilli() }

// fault counts an error and logs the first of its kind.
func (f *Fleet) fault(kind, device string, err error) {
	f.mu.Lock()
	f.errors[kind]++
	first := f.errors[kind] == 1
	f.mu.Unlock()
	if first {
		f.log.Warn("device has lost its server; more of the kind is only counted", "device", device, "kind", kind, "err", err)
	}
}

// agenda is a heap of devices by when they are due. Guarded by Fleet.mu, and with it due and
// place of every device.
type agenda []*device

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].due < a[j].due }
func (a agenda) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].place, a[j].place = i, j
}

// Push is for container/heap.
func (a *agenda) Push(x any) {
	d := x.(*device)
	d.place = len(*a)
	*a = append(*a, d)
}

// Pop is for container/heap.
func (a *agenda) Pop() any {
	last := len(*a) - 1
	d := (*a)[last]
	*a = (*a)[:last]
	d.place = -1
	return d
}

// Snapshot is the state of a fleet at one moment, as counts of messages unless said otherwise.
type Snapshot struct {
	Elapsed        time.Duration `json:"elapsed_ns"`
	Devices        int           `json:"devices"`
	Connected      int           `json:"connected"` // devices
	Asleep         int           `json:"asleep,omitzero"`
	Subscribed     int           `json:"subscribed,omitzero"` // devices, to their commands
	Sampled        uint64        `json:"sampled"`             // made by the devices
	Published      uint64        `json:"published"`           // sent at least once
	QoS0           uint64        `json:"published_qos0"`      // of Published: without an acknowledgement
	Acknowledged   uint64        `json:"acknowledged"`
	Refused        uint64        `json:"refused"`           // by the server, with a reason
	Resent         uint64        `json:"resent"`            // sendings beyond the first
	Dropped        uint64        `json:"dropped_on_device"` // never sent: flash was full, or QoS 0 while offline
	Abandoned      uint64        `json:"abandoned"`         // sent, not acknowledged, then dropped from a full flash
	InFlight       int           `json:"in_flight"`         // samples, as all above
	InFlash        int           `json:"in_flash"`          // not in flight
	PayloadBytes   uint64        `json:"payload_bytes"`
	Connects       uint64        `json:"connects"` // connections made
	FailedConnects uint64        `json:"failed_connects"`
	Breaks         uint64        `json:"breaks"`           // simulated losses of a link
	Crashes        uint64        `json:"crashes"`          // simulated, those of a command Reboot included
	Answers        int           `json:"answers,omitzero"` // to commands, not acknowledged yet
	Commands       CommandCounts `json:"commands,omitzero"`
}

// Snapshot may be called at any time.
func (f *Fleet) Snapshot() Snapshot {
	s := Snapshot{Devices: len(f.devices)}
	if f.running.Load() {
		s.Elapsed = f.elapsed()
	}
	for _, d := range f.devices {
		d.mu.Lock()
		if d.client != nil {
			s.Connected++
		}
		c := &d.counts
		s.Sampled += d.made
		s.Published += c.published
		s.QoS0 += c.qos0
		s.Acknowledged += c.acked
		s.Refused += c.refused
		s.Resent += c.resent
		s.Dropped += c.dropped
		s.Abandoned += c.abandoned
		s.InFlight += len(d.slots) - len(d.free)
		s.InFlash += d.flash.n
		s.PayloadBytes += c.bytes
		s.Connects += c.connects
		s.FailedConnects += c.refusals
		s.Breaks += c.breaks
		s.Crashes += c.crashes
		if d.asleep {
			s.Asleep++
		}
		if m := d.commands; m != nil {
			n := m.counts
			n.Open = m.open()
			if m.subscribed {
				s.Subscribed++
			}
			s.Commands.add(&n)
			s.Answers += len(m.texts)
			s.InFlight -= len(m.texts) - m.answers.n
		}
		d.mu.Unlock()
	}
	return s
}

// Ledger gives the ledger as it stands. While the fleet runs, more may have been published
// when it returns.
func (f *Fleet) Ledger() *Ledger {
	l := &Ledger{devices: make(map[string]map[string]account, len(f.devices))}
	for _, d := range f.devices {
		streams := make(map[string]account, len(d.accounts))
		d.mu.Lock()
		for i, a := range d.accounts {
			a.acked = append(ranges(nil), a.acked...)
			a.unsent = append(ranges(nil), a.unsent...)
			a.again = append(ranges(nil), a.again...)
			streams[d.profile.streams[i].name] = a
		}
		d.mu.Unlock()
		l.devices[d.id] = streams
	}
	return l
}

// Errors counts what went wrong by kind, but for the simulated faults.
func (f *Fleet) Errors() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.errors)
}
