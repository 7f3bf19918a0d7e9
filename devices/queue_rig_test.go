package devices_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/devices"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/internal/testkit"
)

// queueJournal is a devices.Journal on a store: it notes events when they are durable, can hold commits back, and can
// refuse them.
type queueJournal struct {
	handIn  sync.Mutex // held over the hand-in, which may block; nothing that a done calls takes it
	mu      sync.Mutex
	store   *kv.Store
	refuse  error
	held    []heldCommit
	hold    bool
	events  []devices.Event // durable ones, in order
	commits int
	onEvent func(devices.Event) // under mu
}

type heldCommit struct {
	ops    []kv.Op
	events []devices.Event
	done   func(error)
}

type queueCommitDone struct {
	j *queueJournal
	c heldCommit
}

func (d *queueCommitDone) Done(_, _ uint64, err error) {
	if err == nil {
		d.j.mu.Lock()
		d.j.events = append(d.j.events, d.c.events...)
		if d.j.onEvent != nil {
			for _, e := range d.c.events {
				d.j.onEvent(e)
			}
		}
		d.j.mu.Unlock()
	}
	d.c.done(err)
}

func (j *queueJournal) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	c := heldCommit{events: events, done: done}
	for _, o := range ops {
		c.ops = append(c.ops, kv.Op{Key: slices.Clone(o.Key), Value: slices.Clone(o.Value), Delete: o.Delete})
	}
	j.handIn.Lock()
	defer j.handIn.Unlock()
	j.mu.Lock()
	err, hold := j.refuse, j.hold
	if err == nil {
		j.commits++
		if hold {
			j.held = append(j.held, c)
		}
	}
	j.mu.Unlock()
	if err != nil || hold {
		return err
	}
	return j.store.Apply(c.ops, &queueCommitDone{j, c}, 0)
}

// release lets n held commits go, all if n < 0, and holds on if there are more.
func (j *queueJournal) release(t testing.TB, n int) {
	t.Helper()
	j.handIn.Lock()
	defer j.handIn.Unlock()
	j.mu.Lock()
	if n < 0 || n >= len(j.held) {
		n = len(j.held)
	}
	gone := j.held[:n]
	j.held = slices.Clone(j.held[n:])
	j.hold = len(j.held) > 0
	j.mu.Unlock()
	for _, c := range gone {
		if err := j.store.Apply(c.ops, &queueCommitDone{j, c}, 0); err != nil {
			t.Errorf("apply: %v", err)
		}
	}
}

// fakeClock is a clock.Source under the test's control.
type fakeClock struct {
	mu      sync.Mutex
	elapsed time.Duration
	wall    time.Time
	boot    string
	since   time.Duration
	synced  bool
}

func newFakeClock() *fakeClock {
	return &fakeClock{wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), boot: "boot-1", since: time.Hour, synced: true}
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.elapsed += d
	c.wall = c.wall.Add(d)
	c.since += d
}

// jump sets the wall clock only.
func (c *fakeClock) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall = c.wall.Add(d)
}

// reboot is one: the machine is off for d.
func (c *fakeClock) reboot(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall = c.wall.Add(d)
	c.boot += "+"
	c.since = 0
}

func (c *fakeClock) set(fn func(c *fakeClock)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(c)
}

func (c *fakeClock) source() clock.Source {
	return clock.Source{
		Now:     func() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.wall },
		Elapsed: func() time.Duration { c.mu.Lock(); defer c.mu.Unlock(); return c.elapsed },
		Boot:    func() (string, time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); return c.boot, c.since },
		Synced:  func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.synced },
	}
}

// fakeLink is one connection.
type fakeLink struct {
	mu      sync.Mutex
	lost    bool
	device  string
	covers  func(topic string) bool // nil: all
	sent    []devices.Delivery
	err     error // of Send
	ended   string
	nextID  uint16
	onSend  func(d *devices.Delivery)
	onEnd   func()
	refused int
}

func (l *fakeLink) Covers(topic string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.covers == nil || l.covers(topic)
}

func (l *fakeLink) Alive() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.lost
}

func (l *fakeLink) Send(d *devices.Delivery) (uint16, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		l.refused++
		return 0, l.err
	}
	l.nextID++
	l.sent = append(l.sent, *d)
	if l.onSend != nil {
		l.onSend(d)
	}
	return l.nextID, nil
}

func (l *fakeLink) End(reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = reason
	if l.onEnd != nil {
		l.onEnd()
	}
}

func (l *fakeLink) deliveries() []devices.Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.sent)
}

func (l *fakeLink) last(t testing.TB) devices.Delivery {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.sent) == 0 {
		t.Fatalf("nothing was sent to %s", l.device)
	}
	return l.sent[len(l.sent)-1]
}

func (l *fakeLink) ids() (ids []string) {
	for _, d := range l.deliveries() {
		ids = append(ids, d.ID)
	}
	return ids
}

// queueRig is a queue on a store in memory. Nothing in it happens by itself: time passes in pass.
type queueRig struct {
	*devices.Queue
	t     testing.TB
	fs    *vfs.MemFS
	store *kv.Store
	j     *queueJournal
	clock *fakeClock
	clk   *clock.Clock
	cfg   devices.QueueConfig
	quiet bool // no log
}

func openQueueRig(t testing.TB, fs *vfs.MemFS, clock *fakeClock, cfg devices.QueueConfig) *queueRig {
	t.Helper()
	_, test := t.(*testing.T)
	r := &queueRig{t: t, fs: fs, clock: clock, cfg: cfg, quiet: !test}
	r.open()
	return r
}

func newQueueRig(t testing.TB, cfg devices.QueueConfig) *queueRig {
	t.Helper()
	r := openQueueRig(t, vfs.NewCrashableMem(), newFakeClock(), cfg)
	t.Cleanup(r.close)
	return r
}

func (r *queueRig) open() {
	r.t.Helper()
	log := testkit.Logger(r.t)
	if r.quiet {
		log = slog.New(slog.DiscardHandler)
	}
	store, err := kv.Open("store", kv.Options{FS: r.fs, Log: log})
	if err != nil {
		r.t.Fatal(err)
	}
	r.store = store
	r.j = &queueJournal{store: store}
	cfg := r.cfg
	cfg.Journal = r.j
	if cfg.Log == nil {
		cfg.Log = log
	}
	if r.clk, err = clock.Open(store, clock.Config{Source: r.clock.source(), Log: cfg.Log}); err != nil {
		r.t.Fatal(err)
	}
	cfg.Clock = r.clk
	if r.Queue, err = devices.OpenQueue(store, cfg); err != nil {
		r.t.Fatal(err)
	}
}

func (r *queueRig) close() {
	r.t.Helper()
	if err := r.store.Close(); err != nil {
		r.t.Errorf("close: %v", err)
	}
}

// reopen is a restart without a crash.
func (r *queueRig) reopen() {
	r.t.Helper()
	r.flush()
	r.close()
	r.open()
}

// crash takes the power away: what is not synced is lost.
func (r *queueRig) crash() {
	r.t.Helper()
	left := r.fs.CrashClone(vfs.CrashCloneCfg{})
	r.j.mu.Lock()
	r.j.refuse = errors.New("off")
	r.j.held = nil
	r.j.mu.Unlock()
	r.close()
	r.fs = left
	r.open()
}

// flush waits until all that was handed in is durable and told.
func (r *queueRig) flush() {
	r.t.Helper()
	if err := r.store.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

// tick has Run's work done until nothing is due.
func (r *queueRig) tick() {
	r.t.Helper()
	r.flush()
	for range 100 {
		wait := r.Tick(r.t.Context())
		r.flush()
		if wait > 0 {
			return
		}
	}
	r.t.Fatal("the queue never rests")
}

// pass lets time pass.
func (r *queueRig) pass(d time.Duration) {
	r.t.Helper()
	r.clock.advance(d)
	r.tick()
}

// submit takes a command and fails the test if it is refused.
func (r *queueRig) submit(req devices.Request) devices.Command {
	r.t.Helper()
	c, _, err := r.trySubmit(req)
	if err != nil {
		r.t.Fatalf("submit %s: %v", req.ID, err)
	}
	return c
}

func (r *queueRig) trySubmit(req devices.Request) (devices.Command, bool, error) {
	r.t.Helper()
	if req.Name == "" {
		req.Name = "work"
	}
	if req.Device == "" {
		req.Device = "dev"
	}
	return r.SubmitWait(r.t.Context(), &req)
}

func (r *queueRig) link(device string) *fakeLink {
	r.t.Helper()
	l := &fakeLink{device: device}
	r.Ready(device, l)
	r.flush()
	return l
}

// ack acknowledges the last delivery on l.
func (r *queueRig) ack(l *fakeLink) {
	r.t.Helper()
	r.Acked(l.device, l, l.last(r.t).Token, "")
	r.flush()
}

func (r *queueRig) answer(device, id string, kind devices.AnswerKind, payload string) error {
	r.t.Helper()
	err := r.Answer(device, id, kind, []byte(payload), "", nil, nil, 0)
	r.flush()
	return err
}

func (r *queueRig) mustAnswer(device, id string, kind devices.AnswerKind, payload string) {
	r.t.Helper()
	if err := r.answer(device, id, kind, payload); err != nil {
		r.t.Fatalf("answer %s to %s: %v", kind, id, err)
	}
}

func (r *queueRig) state(id string) devices.State {
	r.t.Helper()
	return r.get(id).State
}

func (r *queueRig) get(id string) devices.Command {
	r.t.Helper()
	c, err := r.Get(id)
	if err != nil {
		r.t.Fatalf("get %s: %v", id, err)
	}
	return c
}

func (r *queueRig) wantState(id string, want devices.State) devices.Command {
	r.t.Helper()
	c := r.get(id)
	if c.State != want {
		r.t.Errorf("%s is %s (%s), want %s", id, c.State, c.Reason, want)
	}
	return c
}

// told gives the events of a command as "QUEUED SENT …", a minus before those that are not for the cloud, and a plus
// before repeats.
func (r *queueRig) told(id string) string {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	var s []string
	for _, e := range r.j.events {
		if e.Command == nil || e.Command.ID != id {
			continue
		}
		mark := ""
		switch {
		case e.Repeat:
			mark = "+"
		case !e.Upstream:
			mark = "-"
		}
		s = append(s, mark+e.Command.State.String())
	}
	return strings.Join(s, " ")
}

func (r *queueRig) wantTold(id, want string) {
	r.t.Helper()
	if got := r.told(id); got != want {
		r.t.Errorf("told of %s: %q, want %q", id, got, want)
	}
}

func (r *queueRig) refusals() (all []devices.Event) {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	for _, e := range r.j.events {
		if e.Refusal != nil {
			all = append(all, e)
		}
	}
	return all
}

func wantRefusal(t testing.TB, err error, code, text string) *devices.Refusal {
	t.Helper()
	var r *devices.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("error %v is no refusal, want %s", err, code)
	}
	if r.Code != code || !strings.Contains(r.Reason, text) {
		t.Errorf("refused with %s: %s; want %s: …%s…", r.Code, r.Reason, code, text)
	}
	return r
}

func history(c devices.Command) string {
	var s []string
	for _, h := range c.History {
		s = append(s, h.State.String())
	}
	return strings.Join(s, " ")
}

func numbered(prefix string, n int) string { return fmt.Sprintf("%s-%d", prefix, n) }

func newCrashableFS() *vfs.MemFS { return vfs.NewCrashableMem() }

func discardLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

func openTestStore(t testing.TB, fs vfs.FS) *kv.Store {
	t.Helper()
	store, err := kv.Open("store", kv.Options{FS: fs, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func contextWithCancel(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithCancel(t.Context())
}
