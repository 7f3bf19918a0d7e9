package devices_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"holdfast/devices"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// lastBreath is a Journal of a process that dies at one of its commits: the one before which it dies is lost, the one
// after which it dies is stored, and nobody is told.
type lastBreath struct {
	*queueJournal
	mu     sync.Mutex
	at     int // dies at this commit, counted from 1; 0: never
	after  bool
	n      int
	dead   bool
	events [][]devices.Event // of each commit
}

func (j *lastBreath) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.dead {
		return nil // nobody waits for it any more
	}
	j.n++
	j.events = append(j.events, events)
	if j.n == j.at {
		j.dead = true
		if j.after {
			return j.store.ApplyWait(ops)
		}
		return nil
	}
	return j.queueJournal.Commit(ops, events, done)
}

// commandLives are the lives of some commands, written without waiting for anything but the store.
var commandLives = map[string]func(r *queueRig){
	"succeeds": func(r *queueRig) {
		r.take(devices.Request{ID: "a", Payload: make([]byte, 2000)})
		r.take(devices.Request{ID: "b", OneWay: true})
		l := r.link("dev")
		r.acks(l)
		r.says("a", devices.AnswerAccepted)
		r.pass(2 * time.Second)
		r.says("a", devices.AnswerProgress)
		r.says("a", devices.AnswerSucceeded)
		r.acks(l)
	},
	"is lost and found": func(r *queueRig) {
		r.take(devices.Request{ID: "a"})
		r.Gone("dev", r.link("dev"))
		r.pass(time.Minute)
		r.Gone("dev", r.link("dev"))
		l := r.link("dev")
		r.pass(time.Minute) // no ack
		r.pass(time.Minute)
		_ = l
		l = r.link("dev")
		r.acks(l)
		r.says("a", devices.AnswerRejected)
	},
	"expires": func(r *queueRig) {
		r.take(devices.Request{ID: "a", TTL: time.Minute})
		r.take(devices.Request{ID: "b", TTL: time.Minute})
		r.Gone("dev", r.link("dev"))
		r.pass(time.Minute)
		r.says("a", devices.AnswerSucceeded)
	},
	"times out": func(r *queueRig) {
		r.take(devices.Request{ID: "a", ExecutionTimeout: time.Minute})
		r.acks(r.link("dev"))
		r.pass(time.Minute)
		r.says("a", devices.AnswerFailed)
	},
	"is canceled": func(r *queueRig) {
		r.take(devices.Request{ID: "a"})
		r.take(devices.Request{ID: "b"})
		_ = r.Cancel("", "b", "", "", func(devices.Command, error) {})
		l := r.link("dev")
		_ = r.Cancel("", "a", "", "", func(devices.Command, error) {})
		r.flush()
		r.acks(l)
	},
	"is superseded": func(r *queueRig) {
		r.take(devices.Request{ID: "a", SupersedeKey: "k"})
		r.take(devices.Request{ID: "b", SupersedeKey: "k"})
		r.link("dev")
		r.take(devices.Request{ID: "c", SupersedeKey: "k"})
	},
	"is given up": func(r *queueRig) {
		r.take(devices.Request{ID: "a", MaxAttempts: 2})
		r.Gone("dev", r.link("dev"))
		r.Gone("dev", r.link("dev"))
		r.flush()
	},
}

func (r *queueRig) take(q devices.Request) {
	q.Device, q.Name = "dev", "work"
	if err := r.Submit(&q, func(devices.Command, bool, error) {}); err != nil {
		r.t.Errorf("submit: %v", err)
	}
	r.flush()
}

func (r *queueRig) acks(l *fakeLink) {
	if ds := l.deliveries(); len(ds) > 0 {
		r.ack(l)
	}
}

func (r *queueRig) says(id string, kind devices.AnswerKind) {
	if err := r.answer("dev", id, kind, "1"); err != nil && !errors.Is(err, devices.ErrAnswer) {
		r.t.Errorf("answer: %v", err)
	}
}

// TestCrashAtEveryCommit has the process die at each commit of some lives of commands, before and after the commit took
// effect, and looks at what the next one finds: each command as the commits that took effect left it, in rows that
// agree; and each comes to an end.
func TestCrashAtEveryCommit(t *testing.T) {
	for name, life := range commandLives {
		t.Run(name, func(t *testing.T) {
			ref := runLife(t, life, 0, false)
			commits := ref.j.events
			if len(commits) < 3 {
				t.Fatalf("a life of %d commits", len(commits))
			}
			for at := 1; at <= len(commits); at++ {
				for _, after := range []bool{false, true} {
					t.Run(fmt.Sprintf("commit=%d/took_effect=%v", at, after), func(t *testing.T) {
						r := runLife(t, life, at, after)
						stored := commits[:at-1]
						if after {
							stored = commits[:at]
						}
						r.checkLife(stored)
					})
				}
			}
		})
	}
}

type lifeRig struct {
	*queueRig
	j *lastBreath
}

func runLife(t *testing.T, life func(r *queueRig), at int, after bool) *lifeRig {
	r := &lifeRig{queueRig: &queueRig{t: t, fs: vfs.NewCrashableMem(), clock: newFakeClock(), quiet: true, cfg: devices.QueueConfig{AckTimeout: 30 * time.Second}}}
	r.open()
	r.j = &lastBreath{queueJournal: r.queueRig.j, at: at, after: after}
	cfg := r.cfg
	cfg.Journal, cfg.Log = r.j, discardLog()
	var err error
	if cfg.Clock, err = clock.Open(r.store, clock.Config{Source: r.clock.source()}); err != nil {
		t.Fatal(err)
	}
	if r.Queue, err = devices.OpenQueue(r.store, cfg); err != nil {
		t.Fatal(err)
	}
	life(r.queueRig)
	r.flush()
	if at == 0 {
		r.close()
		return r
	}
	if !r.j.dead {
		t.Fatalf("it never came to commit %d", at)
	}
	r.crash()
	t.Cleanup(r.close)
	return r
}

func (r *lifeRig) checkLife(stored [][]devices.Event) {
	r.t.Helper()
	r.verifyRows()
	want := map[string][]devices.Command{}
	for _, events := range stored {
		for _, e := range events {
			if e.Command != nil {
				if c := want[e.Command.ID]; len(c) > 0 && c[len(c)-1].State == e.Command.State {
					c[len(c)-1] = *e.Command // progress
					continue
				}
				want[e.Command.ID] = append(want[e.Command.ID], *e.Command)
			}
		}
	}
	for _, id := range []string{"a", "b", "c"} {
		got, err := r.Get(id)
		steps := want[id]
		if len(steps) == 0 {
			if err == nil {
				r.t.Errorf("%s is %s and was never stored", id, got.State)
			}
			continue
		}
		last := steps[len(steps)-1]
		if err != nil || got.State != last.State || got.Attempts != last.Attempts || got.Reason != last.Reason || got.Late != last.Late {
			r.t.Errorf("%s is %s after %d attempts (%s), %v; stored was %s after %d", id, got.State, got.Attempts, got.Reason, err, last.State, last.Attempts)
		}
		if h := history(got); h != statesOf(steps) {
			r.t.Errorf("%s has been %s; stored was %s", id, h, statesOf(steps))
		}
	}
	// It goes on: the device comes back and does what it is told.
	r.tick()
	l := r.link("dev")
	for range 10 {
		for _, d := range l.deliveries() {
			r.Acked("dev", l, d.Token, "")
			r.flush()
			_ = r.answer("dev", d.ID, devices.AnswerSucceeded, "")
		}
		r.pass(10 * time.Second)
	}
	r.pass(24 * time.Hour)
	for id, steps := range want {
		got := r.get(id)
		ended := steps[len(steps)-1]
		if !got.Ended() {
			r.t.Errorf("%s has no end: it is %s (%s)", id, got.State, got.Reason)
		}
		if ended.Ended() && got.State != ended.State {
			r.t.Errorf("%s had ended as %s and is %s", id, ended.State, got.State)
		}
		if ended.Ended() && slices.Contains(l.ids(), id) {
			r.t.Errorf("%s was sent after its end", id)
		}
	}
	r.verifyRows()
}

// verifyRows checks that the rows of commands belong together.
func (r *queueRig) verifyRows() {
	r.t.Helper()
	rows := map[byte]map[string]string{}
	for kind := byte(0); kind <= 5; kind++ {
		rows[kind] = map[string]string{}
		if err := r.store.Scan([]byte{kv.PrefixCommand, kind}, func(k, v []byte) error {
			rows[kind][string(k[2:])] = string(v)
			return nil
		}); err != nil {
			r.t.Fatal(err)
		}
	}
	bySeq := map[string]string{}
	for id, seq := range rows[4] {
		if bySeq[seq] != "" {
			r.t.Errorf("ids %s and %s are one command", id, bySeq[seq])
		}
		bySeq[seq] = id
		_, body := rows[1][seq]
		_, open := rows[2][seq]
		_, ended := rows[3][seq]
		if !body || open == ended {
			r.t.Errorf("command %s: body %v, row without end %v, with end %v", id, body, open, ended)
		}
		devices := 0
		for k := range rows[5] {
			if strings.HasSuffix(k, seq) {
				devices++
			}
		}
		if devices != 1 {
			r.t.Errorf("command %s is in %d devices' lists", id, devices)
		}
	}
	for _, kind := range []byte{1, 2, 3} {
		for seq := range rows[kind] {
			if bySeq[seq] == "" {
				r.t.Errorf("row %d of a command without an id: %x", kind, seq)
			}
		}
	}
	if len(rows[5]) != len(rows[4]) {
		r.t.Errorf("%d commands, %d in lists", len(rows[4]), len(rows[5]))
	}
}

// TestRunKeepsTime has Run itself do what tests elsewhere do by hand, on time's own clock.
func TestRunKeepsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
		store := openTestStore(t, vfs.NewMem())
		defer store.Close()
		j := &queueJournal{store: store}
		start := time.Now()
		clk, err := clock.Open(store, clock.Config{Source: clock.Source{
			Boot: func() (string, time.Duration) { return "boot", time.Since(start) }, Synced: func() bool { return true },
		}})
		if err != nil {
			t.Fatal(err)
		}
		q, err := devices.OpenQueue(store, devices.QueueConfig{Journal: j, Log: discardLog(), AckTimeout: 10 * time.Second, Clock: clk})
		if err != nil {
			t.Fatal(err)
		}
		type told struct {
			state devices.State
			after time.Duration
		}
		var mu sync.Mutex
		var events []told
		j.onEvent = func(e devices.Event) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, told{e.Command.State, time.Since(start).Round(time.Second)})
		}
		stopped := make(chan error, 1)
		ctx, cancel := contextWithCancel(t)
		go func() { stopped <- q.Run(ctx) }()
		l := &fakeLink{device: "dev"}
		l.onEnd = func() { go q.Gone("dev", l) }
		q.Ready("dev", l)
		if _, _, err := q.SubmitWait(t.Context(), &devices.Request{ID: "a", Device: "dev", Name: "work", TTL: time.Minute, ExecutionTimeout: 20 * time.Second}); err != nil {
			t.Fatal(err)
		}
		<-time.After(15 * time.Second)
		l2 := &fakeLink{device: "dev"}
		q.Ready("dev", l2)
		<-time.After(5 * time.Second)
		q.Acked("dev", l2, l2.last(t).Token, "")
		if _, _, err := q.SubmitWait(t.Context(), &devices.Request{ID: "b", Device: "other", Name: "work", TTL: time.Minute}); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * time.Hour)
		cancel()
		if err := <-stopped; err != nil {
			t.Errorf("run: %v", err)
		}
		mu.Lock()
		defer mu.Unlock()
		want := []told{
			{devices.Queued, 0},
			{devices.Sent, 0},
			{devices.Queued, 10 * time.Second},
			{devices.Sent, 15 * time.Second},
			{devices.Delivered, 20 * time.Second},
			{devices.Queued, 20 * time.Second},
			{devices.TimedOut, 40 * time.Second},
			{devices.Expired, 80 * time.Second},
		}
		if !slices.Equal(events, want) {
			t.Errorf("told %v, want %v", events, want)
		}
		if l.ended == "" {
			t.Error("the silent connection was not ended")
		}
	})
}
