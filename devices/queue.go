package devices

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// QueueConfig of a Queue. Zero values mean the default named at each field.
type QueueConfig struct {
	Journal Journal
	// Known says whether a device may get commands; see Registry.Known. nil: every device.
	Known func(device string) error
	// Room says why no new command can be taken for now. nil: there is always room.
	Room       func() error
	Window     int           // commands of one device that are under way at once; 1. One urgent one more is.
	AckTimeout time.Duration // from SENT to the device's PUBACK; 30 s
	MaxPending int           // of all devices together; 200,000
	History    time.Duration // how long a command is kept after its end; 7 days
	MaxHistory int           // and how many; 100,000
	Log        *slog.Logger
	Metrics    prometheus.Registerer // nil: none
	// Clock is the gateway's, by which commands live; nil: one of the store and the system.
	Clock *clock.Clock
}

// Queue of commands. All methods may be called from many goroutines.
//
// A command is decided about under its device's order lock, which is held until the rows are handed in, so that the
// journal gets a device's changes in the order of the decisions. What was decided is the working state of a command;
// what is on disk, and alone is shown, is the state of the last commit that has completed.
type Queue struct {
	store *kv.Store
	cfg   QueueConfig
	log   *slog.Logger
	clock *clock.Clock
	m     *queueMetrics

	seq      atomic.Uint64 // the last one given
	tokens   atomic.Uint64 // the last one given
	stripes  [64]sync.Mutex
	stripeOf maphash.Seed

	wake    chan struct{} // cap 1: Run has something to do sooner than it thinks
	heardAt atomic.Int64  // t before which no device is late, since the gateway stood still; see Run

	// mu is held shortly, never while rows are handed in or while a Link or the store is asked.
	mu      sync.Mutex
	devices map[string]*queueDevice
	ids     map[string]*queuedCommand // without an end, or with one that is not durable yet
	timers  queueTimers
	pokes   map[string][]queueDecision // what Run decides next, by device
	pending int                        // commands without an end, as decided
	states  [len(stateNames)]int       // the same by state, as shown: what is durable
	history int                        // rows of ended commands, as far as counted
	total   QueueCounts                // since the start; states are not kept here
	untold  int                        // answers not believed since one was logged for people
	tellAt  int64                      // t from which the next one is

	// Only OpenQueue and Run touch what follows.
	stale    []string // devices with commands that a former process left in SENT
	retryAt  int64    // t before which no timer is tried: the store took nothing
	lookAt   int64    // t at which to look at the clocks next
	credits  uint64   // what the clock said of them last
	sweepAt  int64    // t at which history is looked through next
	sweepSeq uint64   // where in it
	sweeping bool
	sweepAll bool  // through all of it, not only until it is small enough
	counted  bool  // what former processes left is in history
	openT    int64 // when this process began
}

// queueDevice is one device's commands. It goes when it has none and is not connected.
type queueDevice struct {
	name string

	// order is held from a decision to the return of the commit that follows from it. What follows is under it.
	order   sync.Mutex
	cmds    []*queuedCommand // without an end, in the order of seq
	link    Link             // nil: not ready
	linkGen uint32           // counts the links
	dead    Link             // the link before: it does not become ready again

	// Under Queue.mu.
	users int // who has it in hand
}

// queuedCommand is a command in memory: those without an end, and for a moment those that have just ended.
type queuedCommand struct {
	seq      uint64
	id       string
	dev      *queueDevice
	opts     unique.Handle[commandOptions]
	hash     commandHash
	created  int64 // wall
	createdT int64
	delay    int64 // ms after createdT, before which it is not sent
	oneWay   bool  // these two are in opts, too
	urgent   bool

	// Under the device's order lock.
	work      *commandState // as decided; nil: nothing yet
	progress  *Progress     // told and not stored yet
	progressT int64         // when progress was stored last
	linkGen   uint32        // in SENT: the link
	restarted bool          // a former process left it in SENT

	packetID atomic.Uint32 // of the last delivery; the completing goroutine writes it

	// Under Queue.mu; token is written under both.
	inFlight uint16        // commits that are not durable yet
	timer    int32         // place in Queue.timers, -1: none
	due      int64         // of the timer
	token    uint64        // of the delivery that is under way, 0: none
	shown    *commandState // durable; nil: nothing yet
	payload  []byte        // nil: read it from disk
}

// commandOptions is what many commands have in common; equal ones are kept once.
type commandOptions struct {
	name, contentType, supersedeKey, source, upstream string
	ttl, execution                                    int64 // ms
	maxAttempts                                       int32
	feedback                                          uint8
	oneWay, urgent                                    bool
}

// commandState is what changes of a command. It is not changed after the decision that made it.
type commandState struct {
	state      State
	late       bool
	packetID   uint16
	attempts   int32
	reason     string
	updated    int64 // wall
	updatedT   int64
	sentT      int64 // of the last attempt
	deliveredT int64
	progress   *Progress
	result     *commandResult
	steps      []commandStep
}

type commandResult struct {
	payload     []byte
	contentType string
}

const (
	queueKeepPayload = 512    // bytes; larger payloads are read when they are sent
	queueMaxSteps    = 32     // of a command's history
	queueProgressGap = 1000   // ms between two stored progress updates
	queueRetry       = 1000   // ms after the store took nothing
	queueTellGap     = 60_000 // ms between two answers not believed of which people are told
)

// OpenQueue opens the queue in store. It reads a row for each command that has no end yet.
func OpenQueue(store *kv.Store, cfg QueueConfig) (*Queue, error) {
	if cfg.Log == nil || cfg.Journal == nil {
		return nil, errors.New("open command queue: no logger or no journal")
	}
	setDefault(&cfg.Window, 1)
	setDefault(&cfg.AckTimeout, 30*time.Second)
	setDefault(&cfg.MaxPending, 200_000)
	setDefault(&cfg.History, 7*24*time.Hour)
	setDefault(&cfg.MaxHistory, 100_000)
	q := &Queue{
		store: store, cfg: cfg, log: cfg.Log, stripeOf: maphash.MakeSeed(), wake: make(chan struct{}, 1),
		devices: map[string]*queueDevice{}, ids: map[string]*queuedCommand{}, pokes: map[string][]queueDecision{},
	}
	latest, err := q.load()
	if err != nil {
		return nil, fmt.Errorf("open command queue: %w", err)
	}
	if err := q.openClock(latest); err != nil {
		return nil, fmt.Errorf("open command queue: %w", err)
	}
	now := q.clock.Read().T
	q.openT = now
	for _, d := range q.devices {
		for _, p := range d.cmds {
			q.timers.set(p, q.nextDue(p, now))
		}
	}
	if q.m, err = newQueueMetrics(cfg.Metrics, q); err != nil {
		return nil, fmt.Errorf("open command queue: %w", err)
	}
	return q, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// load reads the commands without an end. latest is the latest time in their rows.
func (q *Queue) load() (latest int64, err error) {
	stale := map[string]bool{}
	left := 0
	err = q.store.Scan([]byte{kv.PrefixCommand, commandKindOpen}, func(key, value []byte) error {
		seq, ok := commandSeq(key)
		if !ok {
			return nil
		}
		r, err := parseCommandRow(value)
		if err != nil {
			left++
			q.log.Error("command left alone: its row cannot be read", "key", fmt.Sprintf("%x", key), "err", err)
			return nil
		}
		d := q.devices[r.Device]
		if d == nil {
			d = &queueDevice{name: r.Device}
			q.devices[r.Device] = d
		}
		p, s := r.load(seq, d)
		if s.state == Sent {
			p.restarted = true
			if !stale[d.name] {
				stale[d.name] = true
				q.stale = append(q.stale, d.name)
			}
		}
		d.cmds = append(d.cmds, p)
		q.ids[p.id] = p
		q.states[s.state]++
		q.pending++
		latest = max(latest, s.updatedT, p.createdT)
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, kind := range [...]byte{commandKindBody, commandKindOpen, commandKindEnded} {
		seq, err := q.lastSeq(kind)
		if err != nil {
			return 0, err
		}
		q.seq.Store(max(q.seq.Load(), seq))
	}
	q.log.Info("command queue open", "pending", len(q.ids), "unreadable", left)
	return latest, nil
}

// lastSeq is the highest sequence among the rows of a kind.
func (q *Queue) lastSeq(kind byte) (seq uint64, err error) {
	prefix := []byte{kv.PrefixCommand, kind}
	it, err := q.store.Iter(prefix, kv.PrefixEnd(prefix))
	if err != nil {
		return 0, err
	}
	if it.Last() {
		seq, _ = commandSeq(it.Key())
	}
	return seq, errors.Join(it.Error(), it.Close())
}

// openClock has the clock go on from latest at least.
func (q *Queue) openClock(latest int64) (err error) {
	if q.clock = q.cfg.Clock; q.clock == nil {
		if q.clock, err = clock.Open(q.store, clock.Config{Log: q.log}); err != nil {
			return err
		}
	}
	q.clock.Saw(latest)
	q.credits = q.clock.Look()
	return nil
}

// Submit takes a command. It keeps nothing of r. done is called once: with the command, when that is on stable storage,
// and whether it is a repeat of one that was taken before; or with a *Refusal as the error, when what is told upstream
// of it is on stable storage (at once, if r.Upstream is not set). It must not block. It may be called before Submit
// returns. An error that Submit returns means that the store takes nothing; then done is not called.
//
// The same id with the same body is the same command; its state is told to r.Upstream again.
func (q *Queue) Submit(r *Request, done func(c Command, repeat bool, err error)) error {
	if code, reason := checkRequest(r); code != "" {
		return q.refuse(&Refusal{ID: r.ID, Device: r.Device, Code: code, Reason: reason}, r.Upstream, func(err error) { done(Command{}, false, err) })
	}
	tx := q.begin(r.Device)
	refusal := tx.submit(r, done)
	if refusal != nil {
		tx.end()
		return q.refuse(refusal, r.Upstream, func(err error) { done(Command{}, false, err) })
	}
	defer tx.end()
	return tx.commit()
}

// submit decides about a request: a new command, or one that is there already.
func (tx *queueTx) submit(r *Request, done func(c Command, repeat bool, err error)) *Refusal {
	q := tx.q
	refuse := func(code, format string, args ...any) *Refusal {
		return &Refusal{ID: r.ID, Device: r.Device, Code: code, Reason: fmt.Sprintf(format, args...)}
	}
	hash := requestHash(r)
	id := r.ID
	if id == "" {
		u, err := uuid.NewV7()
		if err != nil {
			return refuse(CodeUnavailable, "no id could be made: %v", err)
		}
		id = u.String()
	} else {
		// From the look whether the id is taken to its reservation nobody else may do the same.
		stripe := &q.stripes[maphash.String(q.stripeOf, id)%uint64(len(q.stripes))]
		stripe.Lock()
		defer stripe.Unlock()
		p, err := q.lookup(id)
		switch {
		case err != nil:
			return refuse(CodeConflict, "the id is in use, and what for cannot be read: %v", err)
		case p != nil && (p.dev.name != tx.d.name || p.hash != hash):
			return refuse(CodeConflict, "the id %s is in use for another command to %s: repeat it unchanged, or take a new id", id, p.dev.name)
		case p != nil:
			tx.repeat(p, r.Upstream, done)
			return nil
		}
	}
	if q.cfg.Room != nil {
		if err := q.cfg.Room(); err != nil {
			return refuse(CodeUnavailable, "%v", err)
		}
	}
	if q.cfg.Known != nil {
		switch err := q.cfg.Known(r.Device); {
		case err == nil:
		case errors.Is(err, ErrUnknownDevice):
			return refuse(CodeUnknownDevice, "there is no device %s at this gateway: holdfast device add registers it", r.Device)
		case errors.Is(err, ErrDisabled):
			return refuse(CodeDisabled, "device %s is disabled: holdfast device enable lets it in again", r.Device)
		case errors.Is(err, ErrBadID):
			return refuse(CodeInvalid, "%v", err)
		default:
			return refuse(CodeUnavailable, "it is not known whether there is a device %s: %v", r.Device, err)
		}
	}
	opts := commandOptions{
		name: r.Name, contentType: r.ContentType, supersedeKey: r.SupersedeKey, source: clip(r.Source), upstream: r.Upstream,
		ttl: milliseconds(r.TTL), execution: milliseconds(r.ExecutionTimeout), maxAttempts: int32(r.MaxAttempts),
		oneWay: r.OneWay, urgent: r.Urgent,
	}
	if opts.ttl == 0 {
		opts.ttl = DefaultTTL.Milliseconds()
	}
	if opts.execution == 0 {
		opts.execution = DefaultExecution.Milliseconds()
	}
	if opts.maxAttempts == 0 {
		opts.maxAttempts = DefaultMaxAttempts
	}
	for i, f := range feedbackLevels {
		if f == r.Feedback {
			opts.feedback = uint8(i)
		}
	}
	delay := int64(0)
	if !r.NotBefore.IsZero() {
		today := q.clock.Time()
		if delay = max(r.NotBefore.UnixMilli()-today.UnixMilli(), 0); delay >= opts.ttl {
			return refuse(CodeInvalid, "not_before is %v away, but its time to live is over in %v: raise ttl, and compare with the gateway's clock, which shows %s",
				time.Duration(delay)*time.Millisecond, time.Duration(opts.ttl)*time.Millisecond, today.UTC().Format(time.RFC3339))
		}
	}

	p := &queuedCommand{
		id: id, dev: tx.d, opts: unique.Make(opts), hash: hash,
		created: tx.now.Wall, createdT: tx.now.T, delay: delay, oneWay: r.OneWay, urgent: r.Urgent, timer: -1,
	}
	replaced := 0
	if opts.supersedeKey != "" {
		for _, old := range tx.d.cmds {
			if s := old.work.state; (s == Queued || s == Sent) && old.opts.Value().supersedeKey == opts.supersedeKey {
				replaced++
			}
		}
	}
	if n := len(tx.d.cmds) - replaced; n >= MaxPendingPerDevice {
		return refuse(CodeQueueFull, "%d commands wait for device %s, more are not kept: cancel some, or wait until it has taken them", n, tx.d.name)
	}
	q.mu.Lock()
	if n := q.pending - replaced; n >= q.cfg.MaxPending {
		q.mu.Unlock()
		return refuse(CodeQueueFull, "%d commands wait for their devices, more are not kept: cancel some, or wait until they are taken", n)
	}
	p.seq = q.seq.Add(1)
	q.ids[id] = p
	q.mu.Unlock()

	if replaced > 0 {
		for _, old := range tx.d.cmds {
			if s := old.work.state; (s == Queued || s == Sent) && old.opts.Value().supersedeKey == opts.supersedeKey {
				tx.move(old, Superseded, "superseded by "+id)
			}
		}
	}
	tx.create(p, r.Payload)
	if tx.d.link != nil {
		tx.settle()
	}
	tx.then = func(err error) {
		if err != nil {
			done(Command{}, false, err)
			return
		}
		done(*tx.last(p), false, nil)
	}
	return nil
}

// repeat tells again what is known of p.
func (tx *queueTx) repeat(p *queuedCommand, upstream string, done func(c Command, repeat bool, err error)) {
	// The working state: what it waits for was handed in before this is, so it is durable when done is called.
	c := tx.q.command(p, p.work)
	if upstream != "" {
		tx.events = append(tx.events, Event{Command: &c, Previous: c.State, Repeat: true, Upstream: true, To: upstream})
	}
	tx.force = true
	tx.then = func(err error) {
		if err != nil {
			done(Command{}, false, err)
			return
		}
		done(c, true, nil)
	}
}

// SubmitWait is Submit and waits. If ctx ends first, the command may be taken all the same.
func (q *Queue) SubmitWait(ctx context.Context, r *Request) (c Command, repeat bool, err error) {
	type result struct {
		c      Command
		repeat bool
		err    error
	}
	w := make(chan result, 1)
	if err := q.Submit(r, func(c Command, repeat bool, err error) { w <- result{c, repeat, err} }); err != nil {
		return Command{}, false, err
	}
	select {
	case got := <-w:
		return got.c, got.repeat, got.err
	case <-ctx.Done():
		return Command{}, false, fmt.Errorf("wait until command is stored: %w", context.Cause(ctx))
	}
}

// Refuse tells an upstream that what it sent is no command. done is called when that is on stable storage, with nil,
// unless the store failed. An error that Refuse returns means that the store takes nothing; then done is not called.
func (q *Queue) Refuse(r *Refusal, upstream string, done func(error)) error {
	return q.refuse(r, upstream, func(err error) {
		if errors.As(err, new(*Refusal)) {
			err = nil
		}
		done(err)
	})
}

// refuse calls done with r when the upstream that asked will be told.
func (q *Queue) refuse(r *Refusal, upstream string, done func(error)) error {
	told := *r
	if told.At.IsZero() {
		told.At = time.UnixMilli(q.clock.Read().Wall)
	}
	told.ID, told.Device, told.Reason = clip(told.ID), clip(told.Device), clip(told.Reason)
	q.mu.Lock()
	q.total.Refused++
	q.mu.Unlock()
	q.m.refused.WithLabelValues(refusalCode(told.Code)).Inc()
	q.log.Debug("command refused", "device", told.Device, "command", told.ID, "code", told.Code, "reason", told.Reason)
	if upstream == "" {
		done(&told)
		return nil
	}
	return q.cfg.Journal.Commit(nil, []Event{{Refusal: &told, Upstream: true, To: upstream}}, func(err error) {
		if err != nil {
			done(err)
			return
		}
		done(&told)
	})
}

// Cancel calls a command off: for sure while it was not sent, else as far as the device has not finished. device is
// whose command it has to be, "": anyone's. upstream is who asks, "" for none. done is called once, as with Submit;
// refused are a command that is not known (CodeUnknown) and one that has ended (CodeEnded).
func (q *Queue) Cancel(device, id, reason, upstream string, done func(c Command, err error)) error {
	refuse := func(code, format string, args ...any) error {
		r := &Refusal{ID: id, Device: device, Code: code, Reason: fmt.Sprintf(format, args...)}
		return q.refuse(r, upstream, func(err error) { done(Command{}, err) })
	}
	var p *queuedCommand
	var err error
	if validCommandID(id) {
		if p, err = q.lookup(id); err != nil {
			return refuse(CodeUnavailable, "command %s cannot be read: %v", id, err)
		}
	}
	if p == nil || device != "" && p.dev.name != device {
		return refuse(CodeUnknown, "there is no command %.60s: see holdfast command list", clip(id))
	}
	device = p.dev.name
	tx := q.begin(device)
	for _, p := range tx.d.cmds {
		if p.id != id {
			continue
		}
		defer tx.end()
		if reason == "" {
			reason = "called off"
		}
		tx.move(p, Canceled, clip(reason))
		tx.settle()
		tx.then = func(err error) {
			if err != nil {
				done(Command{}, err)
				return
			}
			done(*tx.last(p), nil)
		}
		return tx.commit()
	}
	tx.end()
	is := ""
	if c, err := q.Get(id); err == nil && c.Ended() { // else its end is not durable yet
		is = ": it is " + c.State.String()
	}
	return refuse(CodeEnded, "command %s has ended already%s", id, is)
}

// CancelWait is Cancel and waits.
func (q *Queue) CancelWait(ctx context.Context, id, reason string) (Command, error) {
	type result struct {
		c   Command
		err error
	}
	w := make(chan result, 1)
	if err := q.Cancel("", id, reason, "", func(c Command, err error) { w <- result{c, err} }); err != nil {
		return Command{}, err
	}
	select {
	case got := <-w:
		return got.c, got.err
	case <-ctx.Done():
		return Command{}, fmt.Errorf("wait until command is canceled: %w", context.Cause(ctx))
	}
}

// Remove calls off all commands of a device that was removed. Those that have ended stay as history.
func (q *Queue) Remove(device string) {
	q.decide(device, func(tx *queueTx) {
		for _, p := range tx.d.cmds {
			if !p.work.ended(p.oneWay) {
				tx.move(p, Canceled, "device was removed")
			}
		}
	})
}

// Ready says that a device is connected over l and has its session, and perhaps new subscriptions. Called again for each
// SUBACK. After Gone l does not become ready again, and one that has ended does not at all: it may say so after a newer
// one has.
func (q *Queue) Ready(device string, l Link) {
	q.decide(device, func(tx *queueTx) {
		d := tx.d
		if l != d.link && l != d.dead && l.Alive() {
			if d.link != nil {
				d.dead = d.link
			}
			d.link = l
			d.linkGen++
		}
		tx.settle()
	})
}

// Gone says that l has ended.
func (q *Queue) Gone(device string, l Link) {
	q.decide(device, func(tx *queueTx) {
		if tx.d.link == l {
			tx.unlink()
		}
		tx.settle()
	})
}

// Acked says that the device acknowledged the delivery token on l. refused is the reason of a PUBACK that says no (MQTT
// 5), "" else.
func (q *Queue) Acked(device string, l Link, token uint64, refused string) {
	q.decide(device, func(tx *queueTx) {
		p := tx.delivery(token)
		if p == nil || tx.d.link != l || p.linkGen != tx.d.linkGen {
			q.m.stale.Inc()
			tx.settle()
			return
		}
		q.m.acked.Observe(float64(tx.now.T-p.work.sentT) / 1000)
		if refused != "" {
			tx.move(p, Rejected, clip(refused))
		} else {
			tx.deliver(p, "")
		}
		tx.settle()
	})
}

// QueueCounts are commands without an end, by state, and totals since the process started.
type QueueCounts struct {
	Queued      int    `json:"queued"`
	Sent        int    `json:"sent"`
	Delivered   int    `json:"delivered"`
	InProgress  int    `json:"in_progress"`
	Submitted   uint64 `json:"submitted"` // without refused ones and repeats
	Succeeded   uint64 `json:"succeeded"` // one-way commands: delivered
	Failed      uint64 `json:"failed"`    // every end that is not a success. A late outcome counts again.
	Refused     uint64 `json:"refused"`
	Disbelieved uint64 `json:"disbelieved"` // answers
}

// Counts at this moment. Cheap.
func (q *Queue) Counts() QueueCounts {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := q.total
	c.Queued, c.Sent, c.Delivered, c.InProgress = q.states[Queued], q.states[Sent], q.states[Delivered], q.states[InProgress]
	return c
}

// lookup finds a command in memory or on disk; nil: there is none. One from disk has ended, and is a copy.
func (q *Queue) lookup(id string) (*queuedCommand, error) {
	for {
		q.mu.Lock()
		p := q.ids[id]
		q.mu.Unlock()
		if p != nil {
			return p, nil
		}
		v, found, err := q.store.Get(commandIDKey(id))
		if err != nil || !found {
			return nil, err
		}
		if len(v) != 8 {
			return nil, fmt.Errorf("command %s: id: %w", id, errDamaged)
		}
		p, err = q.read(binary.BigEndian.Uint64(v), nil)
		if err != nil || p == nil {
			return p, err
		}
		// What is on disk but not in memory has ended, or memory has got it since.
		if p.work.ended(p.oneWay) {
			return p, nil
		}
		q.mu.Lock()
		_, again := q.ids[id]
		q.mu.Unlock()
		if !again {
			if p, err = q.read(binary.BigEndian.Uint64(v), nil); err != nil || p == nil || p.work.ended(p.oneWay) {
				return p, err
			}
			return nil, fmt.Errorf("command %s: %w: it has no end and is not in memory", id, errDamaged)
		}
	}
}

// read reads a command from disk, for the device d; nil: for one that is made for it. It returns nil if there is none.
func (q *Queue) read(seq uint64, d *queueDevice) (*queuedCommand, error) {
	// From the first kind it may be moved to the second while this looks, not back.
	for _, kind := range [...]byte{commandKindOpen, commandKindEnded} {
		v, found, err := q.store.Get(commandKey(kind, seq))
		if err != nil {
			return nil, err
		}
		if !found {
			continue
		}
		r, err := parseCommandRow(v)
		if err != nil {
			return nil, err
		}
		if d == nil || d.name != r.Device {
			d = &queueDevice{name: r.Device}
		}
		p, _ := r.load(seq, d)
		return p, nil
	}
	return nil, nil
}
