package devices_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/devices"
	"holdfast/internal/kv"
)

func TestCommandGoesItsWay(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	c := r.submit(devices.Request{ID: "a", Payload: []byte("x"), ContentType: "text/plain", Source: "api"})
	if c.State != devices.Queued || c.Attempts != 0 {
		t.Errorf("taken as %s after %d attempts", c.State, c.Attempts)
	}
	l := r.link("dev")
	d := l.last(t)
	if d.ID != "a" || d.Name != "work" || string(d.Payload) != "x" || d.ContentType != "text/plain" || d.Dup || d.Expiry != devices.DefaultTTL || d.Device != "dev" {
		t.Errorf("sent %+v", d)
	}
	r.wantState("a", devices.Sent)
	r.ack(l)
	r.wantState("a", devices.Delivered)
	r.mustAnswer("dev", "a", devices.AnswerAccepted, "")
	r.wantState("a", devices.InProgress)
	r.mustAnswer("dev", "a", devices.AnswerProgress, `{"percent":40,"text":"half way"}`)
	if p := r.get("a").Progress; p == nil || p.Percent != 40 || p.Text != "half way" {
		t.Errorf("progress %+v", p)
	}
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, `{"n":1}`)
	c = r.wantState("a", devices.Succeeded)
	if string(c.Result) != `{"n":1}` || c.ResultType != "application/json" || string(c.Payload) != "x" || c.Attempts != 1 || c.Late {
		t.Errorf("ended as %+v", c)
	}
	if got, want := history(c), "QUEUED SENT DELIVERED IN_PROGRESS SUCCEEDED"; got != want {
		t.Errorf("history %s, want %s", got, want)
	}
	r.wantTold("a", "QUEUED SENT DELIVERED IN_PROGRESS IN_PROGRESS SUCCEEDED")
	before := r.get("a")
	r.reopen()
	after := r.get("a")
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("after a restart (-before +after):\n%s", diff)
	}
	if n := r.CommandsInMemory(); n != 0 {
		t.Errorf("%d commands in memory after the end", n)
	}
}

// TestOneCommitFromSubmitToWire holds a submit to a device that is there to one commit: QUEUED and SENT together.
func TestOneCommitFromSubmitToWire(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	l := r.link("dev")
	before := r.j.commits
	if c := r.submit(devices.Request{ID: "a"}); c.State != devices.Sent {
		t.Errorf("taken as %s", c.State)
	}
	if n := r.j.commits - before; n != 1 || len(l.deliveries()) != 1 {
		t.Errorf("%d commits, %d sent", n, len(l.deliveries()))
	}
	r.submit(devices.Request{ID: "b", OneWay: true})
	before = r.j.commits
	r.ack(l)
	r.mustAnswer("dev", "a", devices.AnswerFailed, "")
	if n := r.j.commits - before; n != 2 || len(l.deliveries()) != 2 {
		t.Errorf("%d commits, %d sent", n, len(l.deliveries()))
	}
	r.submit(devices.Request{ID: "c", OneWay: true})
	before = r.j.commits
	r.ack(l) // DELIVERED of b and SENT of c
	if n := r.j.commits - before; n != 1 || len(l.deliveries()) != 3 {
		t.Errorf("%d commits, %d sent", n, len(l.deliveries()))
	}
	r.wantState("b", devices.Delivered)
	r.wantState("c", devices.Sent)
}

// TestNothingShowsBeforeItIsStored holds commits back and looks everywhere.
func TestNothingShowsBeforeItIsStored(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	l := r.link("dev")
	r.j.hold = true
	answered, repeated := false, false
	req := devices.Request{ID: "a", Device: "dev", Name: "work"}
	if err := r.Submit(&req, func(c devices.Command, repeat bool, err error) {
		answered = true
		if c.State != devices.Sent || repeat || err != nil {
			t.Errorf("done with %s, %v, %v", c.State, repeat, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := r.Submit(&req, func(c devices.Command, repeat bool, err error) {
		repeated = true
		if c.State != devices.Sent || !repeat || err != nil {
			t.Errorf("repeat done with %s, %v, %v", c.State, repeat, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	r.flush()
	if _, err := r.Get("a"); err == nil {
		t.Error("Get shows a command that is not stored")
	}
	if page, _, _ := r.List(devices.CommandFilter{}); len(page) != 0 {
		t.Errorf("List shows %v", page)
	}
	if c := r.Counts(); c != (devices.QueueCounts{}) {
		t.Errorf("Counts shows %+v", c)
	}
	if answered || repeated || len(l.deliveries()) != 0 || r.told("a") != "" {
		t.Error("something was told before it was stored")
	}
	r.j.release(t, 1)
	r.flush()
	if c := r.Counts(); c != (devices.QueueCounts{Sent: 1, Submitted: 1}) {
		t.Errorf("Counts shows %+v", c)
	}
	if !answered || repeated || len(l.deliveries()) != 1 || r.told("a") != "QUEUED SENT" {
		t.Errorf("answered %v, repeat answered %v, sent %d, told %s", answered, repeated, len(l.deliveries()), r.told("a"))
	}
	r.j.release(t, -1)
	r.flush()
	if !repeated {
		t.Error("the repeat was never answered")
	}
	r.j.hold = true
	r.Acked("dev", l, l.last(t).Token, "")
	r.flush()
	r.wantState("a", devices.Sent)
	if page, _, _ := r.List(devices.CommandFilter{Device: "dev"}); len(page) != 1 || page[0].State != devices.Sent {
		t.Errorf("List shows %v", page)
	}
	// It ends while the commit before is still under way.
	if err := r.Answer("dev", "a", devices.AnswerSucceeded, nil, "", nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	r.wantState("a", devices.Sent)
	r.j.release(t, 1)
	r.flush()
	r.wantState("a", devices.Delivered)
	r.j.release(t, -1)
	r.flush()
	r.wantState("a", devices.Succeeded)
}

func TestNoSendAfterItWasCalledOff(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	l := r.link("dev")
	r.j.hold = true
	req := devices.Request{ID: "a", Device: "dev", Name: "work"}
	if err := r.Submit(&req, func(devices.Command, bool, error) {}); err != nil {
		t.Fatal(err)
	}
	if err := r.Cancel("dev", "a", "", "", func(devices.Command, error) {}); err != nil {
		t.Fatal(err)
	}
	r.j.release(t, -1)
	r.flush()
	if n := len(l.deliveries()); n != 0 {
		t.Errorf("%d sent after it was canceled", n)
	}
	r.wantTold("a", "QUEUED SENT CANCELED")
}

func TestAbsentDeviceIsNotSentTo(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a", Name: "one"})
	r.submit(devices.Request{ID: "b", Name: "two"})
	l := &fakeLink{device: "dev", covers: func(string) bool { return false }}
	r.Ready("dev", l)
	r.flush()
	if len(l.deliveries()) != 0 {
		t.Error("sent before it subscribed")
	}
	l.mu.Lock()
	l.covers = func(topic string) bool { return topic == "cmd/dev/req/b/two" }
	l.mu.Unlock()
	r.Ready("dev", l)
	r.flush()
	if got := l.ids(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("sent %v: what the device subscribed to waits behind what it did not", got)
	}
}

func TestWindowAndUrgent(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	for i := range 3 {
		r.submit(devices.Request{ID: numbered("n", i)})
	}
	l := r.link("dev")
	r.ack(l) // n-0 is being executed, for minutes perhaps
	r.submit(devices.Request{ID: "stop", Urgent: true})
	r.submit(devices.Request{ID: "stop2", Urgent: true})
	if got := l.ids(); !slices.Equal(got, []string{"n-0", "stop"}) {
		t.Fatalf("sent %v", got)
	}
	r.ack(l)
	r.mustAnswer("dev", "stop", devices.AnswerSucceeded, "")
	r.ack(l)
	r.mustAnswer("dev", "n-0", devices.AnswerSucceeded, "")
	r.mustAnswer("dev", "stop2", devices.AnswerSucceeded, "")
	r.ack(l)
	r.mustAnswer("dev", "n-1", devices.AnswerRejected, "")
	if got := l.ids(); !slices.Equal(got, []string{"n-0", "stop", "stop2", "n-1", "n-2"}) {
		t.Errorf("sent %v", got)
	}

	r = newQueueRig(t, devices.QueueConfig{Window: 3})
	l = r.link("dev")
	for i := range 5 {
		r.submit(devices.Request{ID: numbered("n", i)})
	}
	if got := l.ids(); !slices.Equal(got, []string{"n-0", "n-1", "n-2"}) {
		t.Errorf("window of 3: sent %v", got)
	}
}

func TestLostConnectionRepeatsWithDup(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a", MaxAttempts: 2, Payload: bytes.Repeat([]byte("p"), 2000)})
	l1 := r.link("dev")
	first := l1.last(t)
	r.Gone("dev", l1)
	r.flush()
	if c := r.wantState("a", devices.Queued); c.Reason != "connection lost before it was acknowledged" || c.Attempts != 1 {
		t.Errorf("reason %q, attempts %d", c.Reason, c.Attempts)
	}
	r.Ready("dev", l1) // late: it has ended
	r.flush()
	if len(l1.deliveries()) != 1 {
		t.Error("sent on a connection that has ended")
	}
	l2 := r.link("dev")
	d := l2.last(t)
	if !d.Dup || d.PacketID != 1 || len(d.Payload) != 2000 || d.Token == first.Token {
		t.Errorf("repeated with dup %v, packet id %d, %d bytes", d.Dup, d.PacketID, len(d.Payload))
	}
	r.Acked("dev", l1, first.Token, "") // of the old connection
	r.flush()
	r.wantState("a", devices.Sent)
	r.Gone("dev", l1) // once more: the device has another by now
	r.flush()
	r.wantState("a", devices.Sent)
	l3 := r.link("dev") // takes over without a word of the old one
	if c := r.wantState("a", devices.DeadLettered); c.Reason != "sent 2 times and never acknowledged; the last time: connection lost before it was acknowledged" {
		t.Errorf("reason %q", c.Reason)
	}
	if len(l3.deliveries()) != 0 {
		t.Error("sent more than MaxAttempts times")
	}
	r.wantTold("a", "QUEUED SENT QUEUED SENT DEAD_LETTERED")
}

func TestNoAckInTime(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{AckTimeout: 10 * time.Second})
	r.submit(devices.Request{ID: "a"})
	l := r.link("dev")
	r.pass(9999 * time.Millisecond)
	r.wantState("a", devices.Sent)
	r.pass(time.Millisecond)
	if c := r.wantState("a", devices.Queued); c.Reason != "no acknowledgement within 10s" {
		t.Errorf("reason %q", c.Reason)
	}
	if l.ended == "" || len(l.deliveries()) != 1 {
		t.Errorf("ended with %q, sent %d times on one connection", l.ended, len(l.deliveries()))
	}
	r.Ready("dev", l) // a SUBACK that came late
	r.Gone("dev", l)
	r.flush()
	if l2 := r.link("dev"); !l2.last(t).Dup {
		t.Error("repeated without DUP")
	}
}

func TestRestartPutsSentBack(t *testing.T) {
	for _, early := range []bool{false, true} {
		r := newQueueRig(t, devices.QueueConfig{})
		r.submit(devices.Request{ID: "a"})
		r.link("dev")
		r.reopen()
		r.wantState("a", devices.Sent)
		var l *fakeLink
		if early { // the device is back before Run runs
			l = r.link("dev")
		}
		r.tick()
		if !early {
			if c := r.wantState("a", devices.Queued); c.Reason != "gateway restarted" {
				t.Errorf("reason %q", c.Reason)
			}
			l = r.link("dev")
		}
		if d := l.last(t); !d.Dup || len(l.deliveries()) != 1 {
			t.Errorf("early %v: sent %+v, %d times", early, d, len(l.deliveries()))
		}
		if got := history(r.get("a")); got != "QUEUED SENT QUEUED SENT" {
			t.Errorf("history %s", got)
		}
		r.Gone("dev", l)
		r.flush()
		if c := r.wantState("a", devices.Queued); c.Reason != "connection lost before it was acknowledged" {
			t.Errorf("reason %q", c.Reason)
		}
	}
}

func TestPubackThatSaysNo(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.submit(devices.Request{ID: "b"})
	l := r.link("dev")
	r.Acked("dev", l, l.last(t).Token, "quota exceeded")
	r.flush()
	if c := r.wantState("a", devices.Rejected); c.Reason != "quota exceeded" {
		t.Errorf("reason %q", c.Reason)
	}
	r.wantState("b", devices.Sent)
	if err := r.answer("dev", "a", devices.AnswerSucceeded, ""); !errors.Is(err, devices.ErrAnswer) {
		t.Errorf("another outcome: %v", err)
	}
}

func TestSendThatFails(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "big"})
	r.submit(devices.Request{ID: "small"})
	l := &fakeLink{device: "dev", err: fmt.Errorf("%w: 5000 bytes, at most 4096", devices.ErrPacketTooLarge)}
	r.Ready("dev", l)
	r.flush()
	l.mu.Lock()
	l.err = nil
	l.mu.Unlock()
	r.tick()
	if c := r.wantState("big", devices.DeadLettered); !strings.Contains(c.Reason, "5000 bytes, at most 4096") {
		t.Errorf("reason %q", c.Reason)
	}
	if got := l.ids(); !slices.Equal(got, []string{"small"}) {
		t.Errorf("sent %v", got)
	}
	r.ack(l)
	r.mustAnswer("dev", "small", devices.AnswerSucceeded, "")

	l.mu.Lock()
	l.err = devices.ErrGone
	l.mu.Unlock()
	r.submit(devices.Request{ID: "late"})
	r.tick()
	r.wantState("late", devices.Queued)
	if l2 := r.link("dev"); l2.last(t).ID != "late" {
		t.Error("not sent on the next connection")
	}
}

func TestFlappingDeviceKeepsItsCommand(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	for range 200 { // two seconds, a hundred times each
		l := r.link("dev")
		r.Gone("dev", l)
		r.pass(10 * time.Millisecond)
	}
	if c := r.wantState("a", devices.Queued); c.Attempts > 6 {
		t.Errorf("%d attempts", c.Attempts)
	}
	l := r.link("dev")
	r.pass(10 * time.Second)
	if l.last(t).ID != "a" {
		t.Error("not sent to a device that stays")
	}
}

func TestExpiry(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{AckTimeout: time.Hour})
	r.submit(devices.Request{ID: "a", TTL: time.Minute})
	r.submit(devices.Request{ID: "b", TTL: time.Minute, ExecutionTimeout: 30 * time.Second})
	r.submit(devices.Request{ID: "c", TTL: time.Minute})
	l := r.link("dev")
	r.pass(20 * time.Second)
	if got := l.last(t); got.Expiry != time.Minute {
		t.Errorf("a sent with %v to live", got.Expiry)
	}
	r.ack(l)
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	if got := l.last(t); got.ID != "b" || got.Expiry != 40*time.Second {
		t.Errorf("sent %s with %v to live", got.ID, got.Expiry)
	}
	token := l.last(t).Token
	r.pass(40 * time.Second)
	r.wantState("b", devices.Expired) // SENT, not acknowledged
	r.wantState("c", devices.Expired) // QUEUED
	if l.ended != "" {
		t.Errorf("connection ended: %s", l.ended)
	}
	r.Acked("dev", l, token, "") // too late
	r.flush()
	r.wantState("b", devices.Expired)
	r.mustAnswer("dev", "b", devices.AnswerSucceeded, "") // but it was sent, and done
	if c := r.wantState("b", devices.Succeeded); !c.Late || c.Reason != "it was EXPIRED before" {
		t.Errorf("late %v, reason %q", c.Late, c.Reason)
	}
	if err := r.answer("dev", "c", devices.AnswerSucceeded, ""); !errors.Is(err, devices.ErrAnswer) {
		t.Errorf("outcome of a command that was never sent: %v", err)
	}
}

func TestExpiryLeavesTheConnection(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{AckTimeout: 10 * time.Second})
	r.submit(devices.Request{ID: "a", TTL: 10 * time.Second})
	l := r.link("dev")
	r.pass(20 * time.Second) // both at once: there is nothing to repeat
	r.wantState("a", devices.Expired)
	if l.ended != "" {
		t.Errorf("connection ended: %s", l.ended)
	}
}

// TestFirstOutcomeStandsBeforeItIsStored: what was decided holds, also while nobody can see it yet.
func TestFirstOutcomeStandsBeforeItIsStored(t *testing.T) {
	for name, stored := range map[string]bool{"its end is stored": true, "its end is not stored yet": false} {
		t.Run(name, func(t *testing.T) {
			r := newQueueRig(t, devices.QueueConfig{})
			r.submit(devices.Request{ID: "a", ExecutionTimeout: time.Minute})
			l := r.link("dev")
			r.ack(l)
			r.j.hold = !stored
			r.pass(time.Minute)
			r.j.hold = true
			r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
			if !stored {
				r.j.release(t, 1)
				r.flush()
			}
			r.wantState("a", devices.TimedOut)
			if err := r.answer("dev", "a", devices.AnswerFailed, ""); !errors.Is(err, devices.ErrAnswer) {
				t.Errorf("another outcome: %v", err)
			}
			r.j.release(t, -1)
			r.flush()
			r.wantState("a", devices.Succeeded)
			if n := r.CommandsInMemory(); n != 0 {
				t.Errorf("%d commands in memory", n)
			}
		})
	}
}

func TestExecutionTimeout(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a", ExecutionTimeout: time.Minute})
	r.submit(devices.Request{ID: "b"})
	l := r.link("dev")
	r.ack(l)
	r.pass(30 * time.Second)
	r.mustAnswer("dev", "a", devices.AnswerProgress, "50") // does not extend it
	r.pass(30 * time.Second)
	if c := r.wantState("a", devices.TimedOut); c.Reason != "no outcome within 1m0s" {
		t.Errorf("reason %q", c.Reason)
	}
	r.wantState("b", devices.Sent)
	if err := r.answer("dev", "a", devices.AnswerProgress, "60"); !errors.Is(err, devices.ErrAnswer) {
		t.Errorf("progress after the end: %v", err)
	}
	r.reopen()
	r.mustAnswer("dev", "a", devices.AnswerFailed, "no")
	c := r.wantState("a", devices.Failed)
	if !c.Late || string(c.Result) != "no" {
		t.Errorf("%+v", c)
	}
	if got := history(c); got != "QUEUED SENT DELIVERED IN_PROGRESS TIMED_OUT FAILED" {
		t.Errorf("history %s", got)
	}
	r.mustAnswer("dev", "a", devices.AnswerFailed, "again")
	if err := r.answer("dev", "a", devices.AnswerSucceeded, ""); !errors.Is(err, devices.ErrAnswer) {
		t.Errorf("another outcome: %v", err)
	}
	r.wantState("a", devices.Failed)
	r.wantTold("a", "FAILED") // since the restart: once
}

func TestNotBefore(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "later", NotBefore: r.clock.wall.Add(time.Hour)})
	r.submit(devices.Request{ID: "now"})
	l := r.link("dev")
	if got := l.ids(); !slices.Equal(got, []string{"now"}) {
		t.Errorf("sent %v", got)
	}
	r.ack(l)
	r.mustAnswer("dev", "now", devices.AnswerSucceeded, "")
	r.clock.jump(10 * 365 * 24 * time.Hour)
	r.pass(time.Hour - time.Millisecond)
	if len(l.deliveries()) != 1 {
		t.Error("sent before its time")
	}
	r.pass(time.Millisecond)
	if got := l.ids(); !slices.Equal(got, []string{"now", "later"}) {
		t.Errorf("sent %v", got)
	}
	_, _, err := r.trySubmit(devices.Request{ID: "x", TTL: time.Hour, NotBefore: r.clock.wall.Add(time.Hour)})
	wantRefusal(t, err, devices.CodeInvalid, "not_before")
}

func TestCancel(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.submit(devices.Request{ID: "b"})
	r.submit(devices.Request{ID: "c"})
	c, err := r.CancelWait(t.Context(), "c", "not needed")
	if err != nil || c.State != devices.Canceled || c.Reason != "not needed" {
		t.Errorf("canceled: %+v, %v", c, err)
	}
	l := r.link("dev")
	if _, err := r.CancelWait(t.Context(), "a", ""); err != nil { // SENT: best effort, and the place is free
		t.Fatal(err)
	}
	if got := l.ids(); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("sent %v", got)
	}
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "") // it was too late
	if c := r.wantState("a", devices.Succeeded); !c.Late {
		t.Error("not marked late")
	}
	_, err = r.CancelWait(t.Context(), "a", "")
	wantRefusal(t, err, devices.CodeEnded, "it is SUCCEEDED")
	_, err = r.CancelWait(t.Context(), "nobody", "")
	wantRefusal(t, err, devices.CodeUnknown, "nobody")
	_, err = r.CancelWait(t.Context(), "not an id", "")
	wantRefusal(t, err, devices.CodeUnknown, "")
	told := make(chan error, 1)
	if err := r.Cancel("other", "b", "", "cloud", func(_ devices.Command, err error) { told <- err }); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, <-told, devices.CodeUnknown, "b")
	if got := r.refusals(); len(got) != 1 || got[0].To != "cloud" || !got[0].Upstream {
		t.Errorf("refusals told: %+v", got)
	}
	r.wantState("b", devices.Sent)
	r.reopen()
	r.wantState("c", devices.Canceled)
}

func TestSupersede(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "other", SupersedeKey: "x"})
	r.submit(devices.Request{ID: "a1", SupersedeKey: "k"})
	r.submit(devices.Request{ID: "a2", SupersedeKey: "k"})
	if c := r.wantState("a1", devices.Superseded); c.Reason != "superseded by a2" {
		t.Errorf("reason %q", c.Reason)
	}
	before := r.j.commits
	r.submit(devices.Request{ID: "a3", SupersedeKey: "k"})
	if n := r.j.commits - before; n != 1 {
		t.Errorf("%d commits for old and new", n)
	}
	l := r.link("dev")
	r.ack(l)
	r.submit(devices.Request{ID: "other2", SupersedeKey: "x"}) // the first is delivered: it stays
	r.wantState("other", devices.Delivered)
	r.mustAnswer("dev", "other", devices.AnswerSucceeded, "")
	r.wantState("a3", devices.Sent)
	r.submit(devices.Request{ID: "a4", SupersedeKey: "k"})
	r.wantState("a3", devices.Superseded)
	if got := l.ids(); !slices.Equal(got, []string{"other", "a3", "other2"}) {
		t.Errorf("sent %v", got)
	}
	for i := range devices.MaxPendingPerDevice {
		r.submit(devices.Request{Device: "full", ID: numbered("f", i), SupersedeKey: numbered("k", i)})
	}
	_, _, err := r.trySubmit(devices.Request{Device: "full"})
	wantRefusal(t, err, devices.CodeQueueFull, "256 commands wait for device full")
	r.submit(devices.Request{Device: "full", ID: "again", SupersedeKey: "k-7"}) // makes room first
	r.wantState("f-7", devices.Superseded)
}

func TestSubmitIsIdempotent(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	req := devices.Request{ID: "a", Payload: []byte("p"), TTL: time.Hour, Upstream: "cloud", Feedback: devices.FeedbackNone, SupersedeKey: "k"}
	r.submit(req)
	again := func(want devices.State) {
		t.Helper()
		c, repeat, err := r.trySubmit(req)
		if err != nil || !repeat || c.State != want || c.ID != "a" {
			t.Errorf("repeat: %s, %v, %v", c.State, repeat, err)
		}
	}
	again(devices.Queued)
	r.wantTold("a", "-QUEUED +QUEUED")
	if e := r.j.events[len(r.j.events)-1]; e.To != "cloud" || !e.Upstream || e.Previous != devices.Queued {
		t.Errorf("repeat told as %+v", e)
	}
	for name, change := range map[string]func(*devices.Request){
		"device":      func(r *devices.Request) { r.Device = "other" },
		"name":        func(r *devices.Request) { r.Name = "rest" },
		"payload":     func(r *devices.Request) { r.Payload = []byte("q") },
		"type":        func(r *devices.Request) { r.ContentType = "text/plain" },
		"ttl":         func(r *devices.Request) { r.TTL++ },
		"not before":  func(r *devices.Request) { r.NotBefore = time.Unix(1, 0) },
		"execution":   func(r *devices.Request) { r.ExecutionTimeout = time.Hour },
		"attempts":    func(r *devices.Request) { r.MaxAttempts = 3 },
		"one way":     func(r *devices.Request) { r.OneWay = true },
		"urgent":      func(r *devices.Request) { r.Urgent = true },
		"key":         func(r *devices.Request) { r.SupersedeKey = "l" },
		"feedback":    func(r *devices.Request) { r.Feedback = devices.FeedbackFull },
		"no feedback": func(r *devices.Request) { r.Feedback = "" },
	} {
		t.Run(name, func(t *testing.T) {
			other := req
			change(&other)
			_, _, err := r.trySubmit(other)
			wantRefusal(t, err, devices.CodeConflict, "a")
		})
	}
	r.wantState("a", devices.Queued)
	l := r.link("dev")
	again(devices.Sent)
	r.ack(l)
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	again(devices.Succeeded)
	r.reopen()
	again(devices.Succeeded)
	if c := r.Counts(); c.Submitted != 0 {
		t.Errorf("a repeat counts as submitted: %+v", c)
	}
	r.submit(devices.Request{ID: ""})
	if c := r.submit(devices.Request{}); len(c.ID) != 36 || c.ID[14] != '7' {
		t.Errorf("id %q made", c.ID)
	}
}

func TestRefusals(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{MaxPending: 3, Known: func(device string) error {
		switch device {
		case "unknown":
			return fmt.Errorf("device %q: %w", device, devices.ErrUnknownDevice)
		case "disabled":
			return fmt.Errorf("device %q: %w", device, devices.ErrDisabled)
		case "odd":
			return devices.ErrBadID
		case "broken":
			return errors.New("disk")
		}
		return nil
	}})
	long := strings.Repeat("x", 129)
	for name, c := range map[string]struct {
		req  devices.Request
		code string
	}{
		"id too long":            {devices.Request{ID: long}, devices.CodeInvalid},
		"id with a wildcard":     {devices.Request{ID: "a+"}, devices.CodeInvalid},
		"id with a slash":        {devices.Request{ID: "a/b"}, devices.CodeInvalid},
		"id begins with a dash":  {devices.Request{ID: "-a"}, devices.CodeInvalid},
		"id with a dollar":       {devices.Request{ID: "$a"}, devices.CodeInvalid},
		"id not ASCII":           {devices.Request{ID: "ä"}, devices.CodeInvalid},
		"device with a wildcard": {devices.Request{Device: "a/#"}, devices.CodeInvalid},
		"device too long":        {devices.Request{Device: strings.Repeat("x", 256)}, devices.CodeInvalid},
		"unknown device":         {devices.Request{Device: "unknown"}, devices.CodeUnknownDevice},
		"disabled device":        {devices.Request{Device: "disabled"}, devices.CodeDisabled},
		"not a device":           {devices.Request{Device: "odd"}, devices.CodeInvalid},
		"cannot be known":        {devices.Request{Device: "broken"}, devices.CodeUnavailable},
		"name of two levels":     {devices.Request{Name: "a/b"}, devices.CodeInvalid},
		"name with #":            {devices.Request{Name: "#"}, devices.CodeInvalid},
		"name with $":            {devices.Request{Name: "$x"}, devices.CodeInvalid},
		"name with NUL":          {devices.Request{Name: "a\x00"}, devices.CodeInvalid},
		"name too long":          {devices.Request{Name: long}, devices.CodeInvalid},
		"name not UTF-8":         {devices.Request{Name: "\xff"}, devices.CodeInvalid},
		"payload too large":      {devices.Request{Payload: make([]byte, 64<<10+1)}, devices.CodeTooLarge},
		"expired":                {devices.Request{TTL: -1}, devices.CodeExpired},
		"ttl too long":           {devices.Request{TTL: devices.MaxTTL + 1}, devices.CodeInvalid},
		"execution too long":     {devices.Request{ExecutionTimeout: devices.MaxExecution + 1}, devices.CodeInvalid},
		"execution negative":     {devices.Request{ExecutionTimeout: -1}, devices.CodeInvalid},
		"too many attempts":      {devices.Request{MaxAttempts: 1001}, devices.CodeInvalid},
		"attempts negative":      {devices.Request{MaxAttempts: -1}, devices.CodeInvalid},
		"key too long":           {devices.Request{SupersedeKey: long}, devices.CodeInvalid},
		"key not UTF-8":          {devices.Request{SupersedeKey: "\xff"}, devices.CodeInvalid},
		"feedback":               {devices.Request{Feedback: "some"}, devices.CodeInvalid},
		"content type too long":  {devices.Request{ContentType: long}, devices.CodeInvalid},
		"content type binary":    {devices.Request{ContentType: "a\n"}, devices.CodeInvalid},
		"never to be sent":       {devices.Request{NotBefore: r.clock.wall.Add(25 * time.Hour)}, devices.CodeInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			c.req.Upstream = "cloud"
			before := len(r.refusals())
			_, _, err := r.trySubmit(c.req)
			wantRefusal(t, err, c.code, "")
			told := r.refusals()
			if len(told) != before+1 || told[before].To != "cloud" || !told[before].Upstream || told[before].Refusal.Code != c.code {
				t.Errorf("told %+v", told[before:])
			}
			c.req.Upstream = ""
			_, _, err = r.trySubmit(c.req)
			wantRefusal(t, err, c.code, "")
			if n := len(r.refusals()); n != before+1 {
				t.Error("told upstream what nobody there asked")
			}
		})
	}
	for device, want := range map[string]string{
		"unknown":  "there is no device unknown at this gateway: holdfast device add registers it",
		"disabled": "device disabled is disabled: holdfast device enable lets it in again",
	} {
		if _, _, err := r.trySubmit(devices.Request{Device: device}); err == nil || err.Error() != want {
			t.Errorf("refused with %q, want %q", err, want)
		}
	}
	_, err := r.Get("no/id")
	wantRefusal(t, err, devices.CodeUnknown, "")
	if _, _, err := r.SubmitWait(t.Context(), &devices.Request{Device: "dev"}); err == nil {
		t.Error("a command without a name was taken")
	}
	for i := range 3 {
		r.submit(devices.Request{ID: numbered("a", i), Device: numbered("d", i)})
	}
	_, _, err = r.trySubmit(devices.Request{})
	wantRefusal(t, err, devices.CodeQueueFull, "3 commands wait")
	if n := r.CommandsInMemory(); n != 3 {
		t.Errorf("%d commands in memory", n)
	}
	if n := r.DevicesInMemory(); n != 3 {
		t.Errorf("%d devices in memory", n)
	}
	told := make(chan error, 1)
	if err := r.Refuse(&devices.Refusal{Code: devices.CodeInvalid, Reason: "no JSON"}, "cloud", func(err error) { told <- err }); err != nil {
		t.Fatal(err)
	}
	if err := <-told; err != nil {
		t.Errorf("refused with %v", err)
	}
}

func TestLimitsAreAllowed(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	c := r.submit(devices.Request{
		ID: "a" + strings.Repeat("-", 127), Name: strings.Repeat("ü", 64), Payload: make([]byte, 64<<10), ContentType: strings.Repeat("a", 128),
		TTL: devices.MaxTTL, ExecutionTimeout: devices.MaxExecution, MaxAttempts: 1000, SupersedeKey: strings.Repeat("k", 128),
		NotBefore: r.clock.wall.Add(devices.MaxTTL - time.Millisecond), OneWay: true, Urgent: true, Feedback: devices.FeedbackNegative, Source: "api", Upstream: "cloud",
	})
	got := r.get(c.ID)
	r.reopen()
	if again := r.get(c.ID); fmt.Sprint(got) != fmt.Sprint(again) || len(again.Payload) != 64<<10 {
		t.Errorf("restored as %+v", again)
	}
}

func TestFeedback(t *testing.T) {
	for f, want := range map[devices.Feedback][2]string{
		devices.FeedbackFull:     {"QUEUED SENT DELIVERED SUCCEEDED", "QUEUED SENT DELIVERED FAILED"},
		"":                       {"QUEUED SENT DELIVERED SUCCEEDED", "QUEUED SENT DELIVERED FAILED"},
		devices.FeedbackNone:     {"-QUEUED -SENT -DELIVERED -SUCCEEDED", "-QUEUED -SENT -DELIVERED -FAILED"},
		devices.FeedbackPositive: {"-QUEUED -SENT -DELIVERED SUCCEEDED", "-QUEUED -SENT -DELIVERED -FAILED"},
		devices.FeedbackNegative: {"-QUEUED -SENT -DELIVERED -SUCCEEDED", "-QUEUED -SENT -DELIVERED FAILED"},
	} {
		r := newQueueRig(t, devices.QueueConfig{})
		l := r.link("dev")
		for i, kind := range []devices.AnswerKind{devices.AnswerSucceeded, devices.AnswerFailed} {
			id := numbered("a", i)
			r.submit(devices.Request{ID: id, Feedback: f})
			r.ack(l)
			r.mustAnswer("dev", id, kind, "")
			r.wantTold(id, want[i])
		}
		r.submit(devices.Request{ID: "one-way", Feedback: f, OneWay: true})
		r.ack(l)
		wantOneWay := map[devices.Feedback]string{
			devices.FeedbackFull: "QUEUED SENT DELIVERED", "": "QUEUED SENT DELIVERED", devices.FeedbackPositive: "-QUEUED -SENT DELIVERED",
		}[f]
		if wantOneWay == "" {
			wantOneWay = "-QUEUED -SENT -DELIVERED"
		}
		r.wantTold("one-way", wantOneWay)
	}
}

func TestAnswersThatCannotBeTrue(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.submit(devices.Request{ID: "b"})
	l := r.link("dev")
	no := func(device, id string, kind devices.AnswerKind, payload string) {
		t.Helper()
		before := r.Counts().Disbelieved
		done := &countDone{}
		err := r.Answer(device, id, kind, []byte(payload), "", []kv.Op{{Key: []byte("x"), Value: []byte("y")}}, done, 1)
		if !errors.Is(err, devices.ErrAnswer) {
			t.Errorf("%s of %s from %s: %v", kind, id, device, err)
		}
		r.flush()
		if _, found, _ := r.store.Get([]byte("x")); found || done.n != 0 {
			t.Error("ops were taken")
		}
		if n := r.Counts().Disbelieved - before; n != 1 {
			t.Errorf("counted %d times", n)
		}
	}
	no("dev", "nobody", devices.AnswerSucceeded, "")
	no("dev", strings.Repeat("x", 70000), devices.AnswerSucceeded, "")
	no("dev", "a/b", devices.AnswerSucceeded, "")
	no("other", "a", devices.AnswerSucceeded, "")
	no("dev", "b", devices.AnswerSucceeded, "") // QUEUED, never sent
	no("dev", "a", "perhaps", "")
	no("dev", "a", devices.AnswerProgress, `{"percent":`)
	no("dev", "a", devices.AnswerProgress, `{"percent":101}`)
	r.wantState("a", devices.Sent)
	// The PUBACK is still on its way: the answer says that it was delivered.
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	if got := history(r.get("a")); got != "QUEUED SENT DELIVERED SUCCEEDED" {
		t.Errorf("history %s", got)
	}
	r.Acked("dev", l, 1, "")
	r.flush()
	no("dev", "a", devices.AnswerFailed, "")
	no("dev", "a", devices.AnswerAccepted, "")
	no("other", "a", devices.AnswerSucceeded, "")
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "twice")
	r.wantTold("a", "QUEUED SENT DELIVERED SUCCEEDED")
	if n := r.DevicesInMemory(); n != 1 {
		t.Errorf("%d devices in memory", n)
	}
}

type countDone struct{ n int }

func (c *countDone) Done(uint64, uint64, error) { c.n++ }

func TestAnswerAfterLostConnection(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.submit(devices.Request{ID: "b"})
	l := r.link("dev")
	r.Gone("dev", l)
	r.flush()
	r.wantState("a", devices.Queued)
	r.mustAnswer("dev", "a", devices.AnswerAccepted, "")
	r.wantTold("a", "QUEUED SENT QUEUED DELIVERED IN_PROGRESS")
	if l2 := r.link("dev"); len(l2.deliveries()) != 0 {
		t.Errorf("sent %v: the device has a, and the window is one", l2.ids())
	}
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	r.wantState("b", devices.Sent)
}

func TestOneWayOutcomeIsLate(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a", OneWay: true})
	l := r.link("dev")
	r.mustAnswer("dev", "a", devices.AnswerAccepted, "") // says no more than that it is delivered
	r.wantTold("a", "QUEUED SENT DELIVERED")
	r.Acked("dev", l, l.last(t).Token, "")
	r.flush()
	r.wantTold("a", "QUEUED SENT DELIVERED")
	r.mustAnswer("dev", "a", devices.AnswerFailed, "")
	if c := r.wantState("a", devices.Failed); !c.Late {
		t.Error("not marked late")
	}
}

func TestAnswerTakesOps(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.link("dev")
	for i, kind := range []devices.AnswerKind{devices.AnswerAccepted, devices.AnswerAccepted, devices.AnswerSucceeded, devices.AnswerSucceeded} {
		done := &countDone{}
		key := []byte(numbered("x", i))
		if err := r.Answer("dev", "a", kind, nil, "", []kv.Op{{Key: key, Value: []byte("y")}}, done, 1); err != nil {
			t.Fatal(err)
		}
		r.flush()
		if _, found, _ := r.store.Get(key); !found || done.n != 1 {
			t.Errorf("%s: ops taken %v, done %d times", kind, found, done.n)
		}
		if kind == devices.AnswerSucceeded { // without ops, and nothing changes: somebody waits all the same
			if err := r.Answer("dev", "a", kind, nil, "", nil, done, 1); err != nil {
				t.Fatal(err)
			}
			if r.flush(); done.n != 2 {
				t.Errorf("done %d times", done.n)
			}
		}
	}
}

func TestProgressIsRateLimited(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.link("dev")
	r.mustAnswer("dev", "a", devices.AnswerProgress, "0")
	for i := range 50 {
		r.mustAnswer("dev", "a", devices.AnswerProgress, fmt.Sprint(i))
	}
	r.wantTold("a", "QUEUED SENT DELIVERED IN_PROGRESS")
	if p := r.get("a").Progress; p.Percent != 0 {
		t.Errorf("progress %d", p.Percent)
	}
	r.pass(time.Second)
	if p := r.get("a").Progress; p.Percent != 49 {
		t.Errorf("progress %d after a second", p.Percent)
	}
	r.wantTold("a", "QUEUED SENT DELIVERED IN_PROGRESS IN_PROGRESS")
	r.pass(10 * time.Second)
	r.mustAnswer("dev", "a", devices.AnswerProgress, "60") // at once
	if p := r.get("a").Progress; p.Percent != 60 {
		t.Errorf("progress %d", p.Percent)
	}
	r.mustAnswer("dev", "a", devices.AnswerProgress, "99")
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	if c := r.get("a"); c.Progress.Percent != 99 {
		t.Errorf("last progress %d", c.Progress.Percent)
	}
	r.pass(10 * time.Second)
	r.wantTold("a", "QUEUED SENT DELIVERED IN_PROGRESS IN_PROGRESS IN_PROGRESS SUCCEEDED")
}

func TestLargeResultKeepsTheOutcome(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	l := r.link("dev")
	r.submit(devices.Request{ID: "a"})
	r.ack(l)
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, strings.Repeat("x", 64<<10+1))
	if c := r.wantState("a", devices.Succeeded); len(c.Result) != 0 || !strings.Contains(c.Reason, "65537 bytes was not kept") {
		t.Errorf("result of %d bytes, reason %q", len(c.Result), c.Reason)
	}
}

func TestRemoveCancels(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{Window: 2})
	for i := range 3 {
		r.submit(devices.Request{ID: numbered("a", i)})
	}
	l := r.link("dev")
	r.ack(l)
	r.Remove("dev")
	r.flush()
	for i := range 3 {
		if c := r.wantState(numbered("a", i), devices.Canceled); c.Reason != "device was removed" {
			t.Errorf("reason %q", c.Reason)
		}
	}
	r.Gone("dev", l)
	r.flush()
	if n := r.DevicesInMemory(); n != 0 {
		t.Errorf("%d devices in memory", n)
	}
	if n := r.TimersInMemory(); n != 0 {
		t.Errorf("%d timers in memory", n)
	}
}

func TestList(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	l := r.link("d-0")
	for i := range 30 {
		r.submit(devices.Request{ID: numbered("c", i), Device: numbered("d", i%3), OneWay: true, Payload: []byte("p")})
		if i%3 == 0 && i < 15 {
			r.ack(l)
		}
	}
	for i := 1; i < 30; i += 6 { // 1, 7, 13, 19, 25
		if _, err := r.CancelWait(t.Context(), numbered("c", i), ""); err != nil {
			t.Fatal(err)
		}
	}
	ids := func(f devices.CommandFilter) (ids []string) {
		t.Helper()
		for {
			page, next, err := r.List(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range page {
				ids = append(ids, c.ID[2:])
				if c.Payload != nil || c.History != nil || c.Result != nil {
					t.Errorf("too much: %+v", c)
				}
			}
			if next == 0 {
				return ids
			}
			if len(page) != f.Limit {
				t.Errorf("page of %d, and there is more", len(page))
			}
			f.Before = next
		}
	}
	check := func() {
		t.Helper()
		want := func(keep func(i int) bool) (ids []string) {
			for i := 29; i >= 0; i-- {
				if keep(i) {
					ids = append(ids, fmt.Sprint(i))
				}
			}
			return ids
		}
		for name, c := range map[string]struct {
			f    devices.CommandFilter
			keep func(i int) bool
		}{
			"all":          {devices.CommandFilter{}, func(int) bool { return true }},
			"pages":        {devices.CommandFilter{Limit: 7}, func(int) bool { return true }},
			"full pages":   {devices.CommandFilter{Limit: 10}, func(int) bool { return true }},
			"device":       {devices.CommandFilter{Device: "d-1", Limit: 3}, func(i int) bool { return i%3 == 1 }},
			"queued":       {devices.CommandFilter{States: []devices.State{devices.Queued}, Limit: 4}, func(i int) bool { return i%6 != 1 && (i%3 != 0 || i > 15) }},
			"canceled":     {devices.CommandFilter{States: []devices.State{devices.Canceled}, Limit: 2}, func(i int) bool { return i%6 == 1 }},
			"timed out":    {devices.CommandFilter{States: []devices.State{devices.TimedOut}}, func(int) bool { return false }},
			"open and not": {devices.CommandFilter{States: []devices.State{devices.Queued, devices.Canceled, devices.TimedOut}, Limit: 3}, func(i int) bool { return i%3 != 0 || i > 15 }},
			"each of them": {devices.CommandFilter{States: []devices.State{devices.Queued, devices.Sent, devices.Delivered, devices.Canceled}, Limit: 4}, func(int) bool { return true }},
			"delivered":    {devices.CommandFilter{States: []devices.State{devices.Delivered}, Limit: 2}, func(i int) bool { return i%3 == 0 && i < 15 }},
			"device state": {devices.CommandFilter{Device: "d-0", States: []devices.State{devices.Sent, devices.Delivered}}, func(i int) bool { return i%3 == 0 && i <= 15 }},
			"nobody":       {devices.CommandFilter{Device: "d"}, func(int) bool { return false }},
		} {
			if got, want := ids(c.f), want(c.keep); !slices.Equal(got, want) {
				t.Errorf("%s: %v, want %v", name, got, want)
			}
		}
	}
	check()
	r.reopen()
	check()
}

func TestHistoryIsRemoved(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{History: time.Hour, MaxHistory: 100})
	l := r.link("dev")
	run := func(prefix string, n int) {
		for i := range n {
			r.submit(devices.Request{ID: numbered(prefix, i), OneWay: true})
			r.ack(l)
		}
	}
	run("a", 50)
	r.submit(devices.Request{ID: "waits", Device: "absent"})
	r.pass(40 * time.Minute)
	run("b", 50)
	r.pass(30 * time.Minute) // a is older than an hour
	left := func() (n int) {
		page, _, err := r.List(devices.CommandFilter{Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		return len(page)
	}
	if n := left(); n != 51 {
		t.Errorf("%d commands left, want 51", n)
	}
	if _, err := r.Get("a-0"); err == nil {
		t.Error("a-0 is still there")
	}
	rows := 0
	if err := r.store.Scan([]byte{kv.PrefixCommand}, func([]byte, []byte) error { rows++; return nil }); err != nil {
		t.Fatal(err)
	}
	if want := 51 * 4; rows != want {
		t.Errorf("%d rows, want %d", rows, want)
	}
	run("c", 100)
	r.tick()
	if n := left(); n != 101 {
		t.Errorf("%d commands left, want 101", n)
	}
	r.wantState("waits", devices.Queued)
	r.submit(devices.Request{ID: "a-0", OneWay: true}) // the id is free again
	r.ack(l)
	r.pass(time.Second)
	r.reopen()
	r.tick() // counts what is there
	l = r.link("dev")
	run("d", 200)
	r.tick()
	if n := left(); n > 103 || n < 100 {
		t.Errorf("%d commands left after a restart, want 100 and the one that waits", n)
	}
}

// TestHistoryKeepsWhatIsBeingChanged: a late outcome is on its way to disk while its command is old enough to go.
func TestHistoryKeepsWhatIsBeingChanged(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{History: time.Hour})
	r.submit(devices.Request{ID: "a", ExecutionTimeout: time.Minute})
	r.ack(r.link("dev"))
	r.pass(time.Minute)
	r.j.hold = true
	r.mustAnswer("dev", "a", devices.AnswerSucceeded, "")
	r.pass(2 * time.Hour)
	r.j.release(t, -1)
	r.flush()
	r.wantState("a", devices.Succeeded)
	r.verifyRows()
}

func TestStoreThatTakesNothing(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{Window: 1})
	r.submit(devices.Request{ID: "a", MaxAttempts: 3})
	r.submit(devices.Request{ID: "k1", SupersedeKey: "k"})
	refuse := func(err error) {
		r.j.mu.Lock()
		defer r.j.mu.Unlock()
		r.j.refuse = err
	}
	full := errors.New("full")
	refuse(full)
	for range 2 {
		if _, _, err := r.trySubmit(devices.Request{ID: "b"}); !errors.Is(err, full) {
			t.Fatalf("submit: %v", err)
		}
		if _, _, err := r.trySubmit(devices.Request{ID: "k2", SupersedeKey: "k"}); !errors.Is(err, full) {
			t.Fatalf("supersede: %v", err)
		}
	}
	if _, err := r.CancelWait(t.Context(), "a", ""); !errors.Is(err, full) {
		t.Fatalf("cancel: %v", err)
	}
	l := r.link("dev")
	if n := len(l.deliveries()); n != 0 {
		t.Errorf("%d sent", n)
	}
	for _, id := range []string{"a", "k1"} {
		r.wantState(id, devices.Queued)
	}
	if c := r.Counts(); c.Queued != 2 || c.Sent != 0 {
		t.Errorf("counts %+v", c)
	}
	refuse(nil)
	r.pass(2 * time.Second)
	if got := l.ids(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("sent %v once the store takes again", got)
	}
	refuse(full)
	if err := r.answer("dev", "a", devices.AnswerSucceeded, ""); !errors.Is(err, full) {
		t.Fatalf("answer: %v", err)
	}
	r.Acked("dev", l, l.last(t).Token, "")
	r.Gone("dev", l)
	r.Tick(t.Context())
	r.wantState("a", devices.Sent)
	refuse(nil)
	r.pass(2 * time.Second)
	// The ack came on a connection that has ended since: nobody can say that it was stored, so it is repeated.
	c := r.wantState("a", devices.Queued)
	if c.Attempts != 1 {
		t.Errorf("%d attempts", c.Attempts)
	}
	r.link("dev")
	refuse(full)
	l = r.link("dev") // takes over
	refuse(nil)
	r.pass(2 * time.Second)
	if d := l.last(t); d.ID != "a" || !d.Dup {
		t.Errorf("sent %+v on the new connection", d)
	}
	refuse(full)
	r.pass(25 * time.Hour)
	r.wantState("a", devices.Sent)
	refuse(nil)
	r.pass(2 * time.Second)
	r.wantState("a", devices.Expired)
	r.wantState("k1", devices.Expired)
	if c := r.Counts(); c.Queued != 0 || r.CommandsInMemory() != 0 {
		t.Errorf("counts %+v, %d in memory", c, r.CommandsInMemory())
	}
}

func TestRowOfANewerVersionIsKept(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	r.submit(devices.Request{ID: "b"})
	var key, value []byte
	if err := r.store.Scan([]byte{kv.PrefixCommand, 2}, func(k, v []byte) error {
		if key == nil {
			key, value = bytes.Clone(k), bytes.Clone(v)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string][]byte{"newer": append([]byte{99}, value[1:]...), "damaged": value[:len(value)/2], "empty": {}} {
		t.Run(name, func(t *testing.T) {
			if err := r.store.ApplyWait([]kv.Op{{Key: key, Value: v}}); err != nil {
				t.Fatal(err)
			}
			r.reopen()
			if n := r.CommandsInMemory(); n != 1 {
				t.Errorf("%d commands in memory", n)
			}
			if _, err := r.Get("a"); err == nil {
				t.Error("shown")
			}
			_, _, err := r.trySubmit(devices.Request{ID: "a"})
			wantRefusal(t, err, devices.CodeConflict, "cannot be read")
			if err := r.answer("dev", "a", devices.AnswerSucceeded, ""); !errors.Is(err, devices.ErrAnswer) {
				t.Errorf("answer: %v", err)
			}
			_, err = r.CancelWait(t.Context(), "a", "")
			wantRefusal(t, err, devices.CodeUnavailable, "")
			if page, _, err := r.List(devices.CommandFilter{}); err != nil || len(page) != 1 {
				t.Errorf("list: %v, %v", page, err)
			}
			if page, _, err := r.List(devices.CommandFilter{Device: "dev"}); err != nil || len(page) != 1 {
				t.Errorf("list: %v, %v", page, err)
			}
			r.wantState("b", devices.Queued)
			if got, _, _ := r.store.Get(key); !bytes.Equal(got, v) {
				t.Error("the row was touched")
			}
		})
	}
}

func TestSequenceGoesOnAfterARestart(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a"})
	if _, err := r.CancelWait(t.Context(), "a", ""); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	r.submit(devices.Request{ID: "b"})
	page, _, err := r.List(devices.CommandFilter{})
	if err != nil || len(page) != 2 || page[0].ID != "b" {
		t.Errorf("list: %v, %v", page, err)
	}
}

func TestHistoryOfManyAttemptsIsBounded(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	r.submit(devices.Request{ID: "a", MaxAttempts: 1000})
	for range 100 {
		l := r.link("dev")
		r.Gone("dev", l)
		r.pass(10 * time.Second)
	}
	c := r.wantState("a", devices.Queued)
	if len(c.History) != 32 || c.History[0].State != devices.Queued || c.History[1].State != devices.Sent || c.Attempts != 100 {
		t.Errorf("%d steps after %d attempts", len(c.History), c.Attempts)
	}
}

func TestRunEnds(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Error(err)
	}
}

// A device that goes on answering what cannot be true is told of once a minute, with the number of the others.
func TestAnswersNotBelievedDoNotFillTheLog(t *testing.T) {
	var log bytes.Buffer
	r := newQueueRig(t, devices.QueueConfig{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	lies := func(n int) string {
		log.Reset()
		for range n {
			if err := r.Answer("dev", "nothing", devices.AnswerSucceeded, nil, "", nil, nil, 0); !errors.Is(err, devices.ErrAnswer) {
				t.Fatal(err)
			}
		}
		return log.String()
	}
	if s := lies(1000); strings.Count(s, "\n") != 1 || !strings.Contains(s, "device=dev command=nothing") {
		t.Errorf("log of 1000: %s", s)
	}
	r.clock.advance(time.Minute)
	if s := lies(10); strings.Count(s, "\n") != 1 || !strings.Contains(s, "others_before=999") {
		t.Errorf("log a minute later: %s", s)
	}
}

// A device reconnects while its old connection still says that it has subscribed: who says it last is not the newer one.
func TestAConnectionThatWasTakenOverTakesNothingBack(t *testing.T) {
	r := newQueueRig(t, devices.QueueConfig{})
	older := &fakeLink{device: "dev"}
	newer := &fakeLink{device: "dev"}
	older.lost = true // as soon as the newer one is there
	r.Ready("dev", newer)
	r.Ready("dev", older)
	r.Gone("dev", older)
	r.flush()
	r.submit(devices.Request{ID: "a"})
	if n := len(newer.deliveries()); n != 1 {
		t.Errorf("%d deliveries on the connection that is there, want 1", n)
	}
	if n := len(older.deliveries()); n != 0 {
		t.Errorf("%d deliveries on the one that has ended", n)
	}
	r.ack(newer)
	r.wantState("a", devices.Delivered)
}

// TestNoRoomRefusesNewCommands has a disk that is full: what is there goes on, also the same command again.
func TestNoRoomRefusesNewCommands(t *testing.T) {
	var full atomic.Bool
	r := newQueueRig(t, devices.QueueConfig{Room: func() error {
		if full.Load() {
			return errors.New("disk is full: free some")
		}
		return nil
	}})
	old := &devices.Request{ID: "old", Device: "d", Name: "n"}
	if _, _, err := r.SubmitWait(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	full.Store(true)
	_, _, err := r.SubmitWait(t.Context(), &devices.Request{ID: "new", Device: "d", Name: "n"})
	wantRefusal(t, err, devices.CodeUnavailable, "free some")
	if _, repeat, err := r.SubmitWait(t.Context(), old); err != nil || !repeat {
		t.Errorf("the same again: repeat %t, %v", repeat, err)
	}
	if _, err := r.CancelWait(t.Context(), "old", ""); err != nil {
		t.Errorf("cancel: %v", err)
	}
}
