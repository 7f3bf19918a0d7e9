package bridge_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

func TestMain(m *testing.M) {
	// The decoder that all share must not be made in a synctest bubble.
	b := wire.NewBatchEncoder().Append(nil, wire.BatchHeader{Gateway: "g", Epoch: "e", Lane: "l", First: 1, Count: 1},
		spool.AppendRecord(nil, &spool.Record{}))
	if _, err := wire.DecodeBatch(b); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const (
	gateway = "ward-3-east"
	epoch   = "0190a0b0-0000-7000-8000-000000000000"
)

// elapse lets time pass in a synctest bubble, where that costs none.
func elapse(d time.Duration) { <-time.After(d) }

// rig is a bridge between a source and an upstream in memory.
type rig struct {
	t    *testing.T
	src  *source
	up   *bridgetest.Upstream
	b    *bridge.Bridge
	log  *testkit.Buffer
	stop func()
	done chan error
}

// newRig makes a bridge in a synctest bubble. It runs when start is called and stops with the test.
func newRig(t *testing.T, cfg bridge.Config, lanes ...string) *rig {
	t.Helper()
	if len(lanes) == 0 {
		lanes = []string{"alarm", "telemetry", "bulk"}
	}
	r := &rig{t: t, src: newSource(t.Errorf, lanes...), up: bridgetest.NewUpstream(), log: &testkit.Buffer{}, done: make(chan error, 1)}
	cfg.Name, cfg.URL = "cloud", "mqtt://broker.example.com"
	b, err := bridge.NewFrom(cfg, gateway, epoch, r.src, r.up, slog.New(slog.NewTextHandler(r.log, nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.b = b
	return r
}

func (r *rig) start() {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { r.done <- r.b.Run(ctx) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-r.done; err != nil {
				r.t.Errorf("Run: %v", err)
			}
			if r.up.Open() != 0 {
				r.t.Errorf("%d sessions are still open after Run", r.up.Open())
			}
			r.src.mu.Lock()
			defer r.src.mu.Unlock()
			if !r.src.closed {
				r.t.Errorf("Run did not close its source")
			}
		})
	}
	r.t.Cleanup(r.stop)
}

// settled waits until every record has an outcome. In a bubble that costs no time.
func (r *rig) settled(within time.Duration) {
	r.t.Helper()
	for end := time.Now().Add(within); ; elapse(10 * time.Millisecond) {
		synctest.Wait()
		open := ""
		r.src.mu.Lock()
		for _, l := range r.src.lanes {
			if l.cursor < len(l.records) {
				open += fmt.Sprintf(" %s %d of %d", l.name, l.cursor, len(l.records))
			}
		}
		r.src.mu.Unlock()
		if open == "" {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("not settled after %v:%s\n%+v\n%s", within, open, r.b.Status(), r.log)
		}
	}
}

// logged is how often a message was logged.
func (r *rig) logged(msg string) int { return r.log.Count("msg=" + msg) }

// unit is a record that arrived.
type unit struct {
	lane    string
	seq     uint64
	payload string
}

// units takes a send apart.
func units(t *testing.T, m bridge.Message) []unit {
	t.Helper()
	if !strings.HasPrefix(m.Topic, "gw/"+gateway+"/data/") {
		return []unit{{m.Lane, m.Seq, string(m.Payload)}}
	}
	batch, err := wire.DecodeBatch(m.Payload)
	if err != nil {
		t.Fatal(err)
	}
	if batch.Gateway != gateway || batch.Epoch == "" || batch.Lane != m.Lane || batch.First != m.Seq || batch.Count != m.Count {
		t.Errorf("batch %+v in a send of %d from %s/%d", batch.BatchHeader, m.Count, m.Lane, m.Seq)
	}
	var us []unit
	for i, msg := range batch.Messages {
		us = append(us, unit{m.Lane, m.Seq + uint64(i), string(msg.Payload)})
	}
	return us
}

// arrivals returns what arrived first of each record, by lane in the order of arrival, and fails if that is
// not the lanes' order or a record is not what was in the lane.
func (r *rig) arrivals() map[string][]unit {
	r.t.Helper()
	got := map[string][]unit{}
	high := map[string]uint64{}
	for _, m := range r.up.Arrived() {
		for _, u := range units(r.t, m) {
			if u.seq <= high[u.lane] {
				continue // again
			}
			high[u.lane] = u.seq
			got[u.lane] = append(got[u.lane], u)
			var want spool.Record
			r.src.mu.Lock()
			raw := r.src.lane(u.lane).records[u.seq-1].raw
			r.src.mu.Unlock()
			if _, err := spool.ParseRecord(raw, &want); err != nil {
				r.t.Fatal(err)
			}
			if strings.HasPrefix(u.payload, `{"specversion"`) {
				continue
			}
			if u.payload != string(want.Payload) {
				r.t.Errorf("%s/%d arrived as %.60q, want %.60q", u.lane, u.seq, u.payload, want.Payload)
			}
		}
	}
	return got
}

// complete fails unless each record of the lane arrived, in order.
func (r *rig) complete(lane string, n int) {
	r.t.Helper()
	got := r.arrivals()[lane]
	if len(got) != n {
		r.t.Fatalf("lane %s: %d of %d records arrived", lane, len(got), n)
	}
	for i, u := range got {
		if u.seq != uint64(i+1) {
			r.t.Fatalf("lane %s: arrival %d is record %d", lane, i+1, u.seq)
		}
	}
}

func TestPassthroughSendsWhatTheDeviceSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough, TopicPrefix: "site7/"})
		retained := message("pump", "dt/pump/state", "on")
		retained.Flags |= spool.FlagRetain | spool.FlagQoS2
		r.src.add("telemetry", message("pump", "dt/pump/t", "21.5"), retained)
		r.start()
		r.settled(time.Second)
		got := r.up.Arrived()
		if len(got) != 2 {
			t.Fatalf("%d sends", len(got))
		}
		if m := got[0]; m.Topic != "site7/dt/pump/t" || string(m.Payload) != "21.5" || m.Retain || m.Lane != "telemetry" || m.Seq != 1 || m.Count != 1 {
			t.Errorf("got %+v", m)
		}
		if m := got[1]; m.Topic != "site7/dt/pump/state" || string(m.Payload) != "on" || !m.Retain {
			t.Errorf("got %+v", m)
		}
	})
}

func TestCloudEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatCloudEvents})
		m := message("pump/7", "dt/pump/t", `{"t":21.5}`)
		m.Props = &spool.Props{ContentType: "application/json"}
		bad := message("pump/7", "dt/pump/t", "x")
		bad.Received = -1 // a time that RFC 3339 cannot say
		r.src.add("telemetry", m, bad, message("pump/7", "dt/pump/t", "last"))
		r.start()
		r.settled(time.Second)
		got := r.up.Arrived()
		if len(got) != 2 || got[0].Topic != "gw/"+gateway+"/msg/pump%2F7" {
			t.Fatalf("got %d sends, the first to %q", len(got), got[0].Topic)
		}
		var event struct {
			ID, Subject string
			Data        map[string]float64
		}
		if err := json.Unmarshal(got[0].Payload, &event); err != nil {
			t.Fatal(err)
		}
		if event.ID != wire.ID(gateway, epoch, "telemetry", 1) || event.Subject != "dt/pump/t" || event.Data["t"] != 21.5 {
			t.Errorf("got %s", got[0].Payload)
		}
		if reason := r.src.lane("telemetry").parked[2]; !strings.Contains(reason, "1970") {
			t.Errorf("the event that cannot be is parked with reason %q", reason)
		}
	})
}

func TestBatchesGrowWithTheBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{})
		r.src.lane("telemetry").maxRun = 3 // the spool gives small runs: they are merged
		r.src.add("telemetry", numbered("pump", 1, 50_000)...)
		r.start()
		r.settled(time.Minute)
		r.complete("telemetry", 50_000)
		most := 0
		for _, m := range r.up.Arrived() {
			most = max(most, m.Count)
			if b, err := wire.DecodeBatch(m.Payload); err != nil || b.Epoch != epoch || b.Replayed {
				t.Fatalf("batch %+v: %v", b, err)
			}
			if m.Count > 4096 {
				t.Errorf("a batch has %d records", m.Count)
			}
		}
		if most < 1000 {
			t.Errorf("the largest batch has %d records", most)
		}
	})
}

// TestIdleLaneSendsAtOnce: a message on an idle lane does not wait for others; those that follow at once do.
func TestIdleLaneSendsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{})
		r.start()
		synctest.Wait()
		r.src.add("telemetry", numbered("pump", 1, 1)...)
		synctest.Wait() // no time passes
		if n := len(r.up.Arrived()); n != 1 {
			t.Fatalf("%d sends at once", n)
		}
		for i := 2; i <= 100; i++ {
			r.src.add("telemetry", numbered("pump", i, i)...)
			elapse(100 * time.Microsecond)
		}
		r.settled(20 * time.Millisecond)
		if n := len(r.up.Arrived()); n > 4 {
			t.Errorf("100 messages within 10 ms went up in %d batches", n)
		}
		r.complete("telemetry", 100)
	})
}

func TestSystemLaneGoesToItsOwnTopics(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough, bridge.FormatCloudEvents} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				prefix := ""
				if format == bridge.FormatPassthrough {
					prefix = "site7/"
				}
				r := newRig(t, bridge.Config{Format: format, TopicPrefix: prefix})
				gap := spool.Record{Topic: []byte(wire.GapTopic(gateway)), Payload: []byte(`{"lane":"bulk"}`)}
				ours, theirs := gap, gap
				ours.Props, theirs.Props = &spool.Props{Upstream: "cloud"}, &spool.Props{Upstream: "other"}
				theirs.Payload = []byte("not for us")
				r.src.add(spool.SystemLane, gap, theirs, ours)
				r.start()
				r.settled(time.Second)
				got := r.up.Arrived()
				if len(got) != 2 {
					t.Fatalf("%d sends, want 2", len(got))
				}
				for _, m := range got {
					if m.Topic != "gw/"+gateway+"/evt/gap" || string(m.Payload) != `{"lane":"bulk"}` || m.Retain {
						t.Errorf("got %+v", m)
					}
				}
				if n := r.src.outcomes(spool.SystemLane)[spool.Delivered]; n != 3 {
					t.Errorf("%d of 3 count as delivered", n)
				}
			})
		})
	}
}

// TestReplayForAnotherUpstreamIsPassedOver: it is not sent, and not counted as if it had been.
func TestReplayForAnotherUpstreamIsPassedOver(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough, bridge.FormatCloudEvents} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: format})
				theirs, ours := message("pump", "dt/pump", "1"), message("pump", "dt/pump", "2")
				theirs.Props, ours.Props = &spool.Props{Upstream: "other"}, &spool.Props{Upstream: "cloud"}
				r.src.add("telemetry", message("pump", "dt/pump", "0"), theirs, ours, message("pump", "dt/pump", "3"))
				r.start()
				r.settled(time.Second)
				got := 0
				for _, m := range r.up.Arrived() {
					got += m.Count
				}
				if got != 3 {
					t.Errorf("%d messages arrived, want 3", got)
				}
				o := r.src.outcomes("telemetry")
				if o[spool.Delivered] != 3 || o[spool.Elsewhere] != 1 {
					t.Errorf("outcomes %v", o)
				}
			})
		})
	}
}

func TestExpiredMessagesAreNotSent(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: format})
				var rs []spool.Record
				for i := range 1000 {
					m := message("pump", "dt/pump", fmt.Sprint(i))
					m.Received = time.Now().UnixMilli()
					switch i % 3 {
					case 1:
						m.Props = &spool.Props{Expiry: 60}
					case 2:
						m.Props = &spool.Props{Expiry: 7200}
					}
					rs = append(rs, m)
				}
				r.src.add("telemetry", rs...)
				elapse(time.Hour) // the link is not up yet
				r.start()
				r.settled(time.Second)
				got := r.src.outcomes("telemetry")
				if got[spool.Expired] != 333 || got[spool.Delivered] != 667 {
					t.Errorf("outcomes %v", got)
				}
				if n := len(r.arrivals()["telemetry"]); n != 667 {
					t.Errorf("%d arrived", n)
				}
				s := r.b.Status()
				if s.ExpiredMessages != 333 || s.AckedMessages != 667 || s.SentMessages != 667 || s.ParkedMessages != 0 {
					t.Errorf("status %+v", s)
				}
			})
		})
	}
}

var errNever = errors.New("the upstream does not like it")

func TestRefusedMessagesAreParked(t *testing.T) {
	refuse := func(m bridge.Message) bool { return m.Seq <= 700 && m.Seq+uint64(m.Count) > 700 } // holds record 700
	for name, step := range map[string]bridgetest.Step{
		"when sent":  {SendErr: bridge.Permanent(errNever)},
		"when acked": {AckErr: bridge.Permanent(errNever), Delay: 50 * time.Millisecond},
	} {
		for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough, bridge.FormatCloudEvents} {
			t.Run(name+" "+format, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, bridge.Config{Format: format})
					r.up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
						if refuse(m) {
							return step
						}
						return bridgetest.Step{Delay: 10 * time.Millisecond}
					}
					took := map[uint64]int{} // by sequence: how often the upstream acknowledged it
					var refused []bridge.Sent
					r.b.OnSent(func(s *bridge.Sent) {
						if s.Lane != "telemetry" || s.Err == nil && s.Ended.Sub(s.At) < 10*time.Millisecond {
							t.Errorf("told %+v", s)
						}
						if s.Err != nil {
							refused = append(refused, *s)
							return
						}
						for i := range s.Records {
							took[s.First+uint64(i)]++
						}
					})
					r.src.add("telemetry", numbered("pump", 1, 2000)...)
					r.start()
					r.settled(time.Minute)
					if len(took) != 1999 || took[700] != 0 {
						t.Errorf("told that %d were acknowledged, the refused one %d times", len(took), took[700])
					}
					if last := len(refused) - 1; name == "when acked" && (last < 0 || refused[last].First != 700 || refused[last].Records != 1 || !errors.Is(refused[last].Err, errNever)) {
						t.Errorf("told of refusals %+v", refused)
					}
					l := r.src.lane("telemetry")
					if got := r.src.outcomes("telemetry"); got[spool.Parked] != 1 || got[spool.Delivered] != 1999 {
						t.Errorf("outcomes %v", got)
					}
					if !strings.Contains(l.parked[700], errNever.Error()) {
						t.Errorf("parked %v", l.parked)
					}
					if !bytes.Equal(l.kept[700], l.records[699].raw) {
						t.Errorf("parked record is %q, want %q", l.kept[700], l.records[699].raw)
					}
					if n := len(r.up.Dials()); n != 1 {
						t.Errorf("%d dials: a message that is refused is no reason to reconnect", n)
					}
					if s := r.b.Status(); s.ParkedMessages != 1 {
						t.Errorf("status %+v", s)
					}
					seen := map[uint64]bool{}
					for _, m := range r.up.Arrived() {
						for _, u := range units(t, m) {
							seen[u.seq] = true
						}
					}
					if len(seen) != 1999 || seen[700] {
						t.Errorf("%d different records arrived, the refused one among them: %v", len(seen), seen[700])
					}
				})
			})
		}
	}
}

// TestSwallowedAckEndsInAResend: an upstream that takes and does not ack gets the same ids again, in
// the same order, on a new session.
func TestSwallowedAckEndsInAResend(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: format, Window: 20})
				r.up.OnSend = func(dial, n int, _ bridge.Message) bridgetest.Step {
					return bridgetest.Step{NoAck: dial == 1 && n > 3}
				}
				r.src.add("telemetry", numbered("pump", 1, 10_000)...)
				r.start()
				elapse(29 * time.Second)
				if n := len(r.up.Dials()); n != 1 {
					t.Fatalf("%d dials within the ack time-out", n)
				}
				r.settled(3 * time.Minute)
				r.complete("telemetry", 10_000)
				if n := len(r.up.Dials()); n != 2 {
					t.Errorf("%d dials, want 2", n)
				}
				if s := r.log.String(); !strings.Contains(s, "reason=stalled") {
					t.Errorf("log does not tell why:\n%s", s)
				}
				again := 0
				for _, m := range r.up.Arrived() {
					if format == bridge.FormatBatch {
						if b, err := wire.DecodeBatch(m.Payload); err != nil || b.Replayed {
							again++
						}
					}
				}
				if format == bridge.FormatBatch && again == 0 {
					t.Errorf("no batch says that it is sent again")
				}
			})
		})
	}
}

// TestOneLostAckDoesNotHideBehindOthers: other lanes' acks keep coming, and still the one that does not
// come is noticed.
func TestOneLostAckDoesNotHideBehindOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnSend = func(dial, _ int, m bridge.Message) bridgetest.Step {
			return bridgetest.Step{NoAck: dial == 1 && m.Lane == "alarm"}
		}
		r.src.add("alarm", numbered("smoke", 1, 1)...)
		r.start()
		for i := 1; i <= 600; i++ {
			r.src.add("telemetry", numbered("pump", i, i)...)
			elapse(time.Second)
			if i == 60 && r.src.cursor("alarm") == 0 {
				t.Fatalf("an alarm is not acked after a minute, and nobody minds")
			}
		}
		r.settled(time.Second)
		if n := len(r.up.Dials()); n != 2 {
			t.Errorf("%d dials, want 2", n)
		}
		r.complete("alarm", 1)
		r.complete("telemetry", 600)
	})
}

func TestAckErrorEndsInAResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnSend = func(dial, n int, _ bridge.Message) bridgetest.Step {
			if dial <= 3 && n == 100*dial {
				return bridgetest.Step{AckErr: errors.New("try again later")}
			}
			return bridgetest.Step{}
		}
		r.src.add("telemetry", numbered("pump", 1, 1000)...)
		r.start()
		r.settled(time.Minute)
		r.complete("telemetry", 1000)
		if n := len(r.up.Dials()); n != 4 {
			t.Errorf("%d dials, want 4", n)
		}
	})
}

// TestSlowLinkIsNotTakenForDead: 1 KiB/s, messages that need minutes each. And an alarm does not wait
// behind the backlog.
func TestSlowLinkIsNotTakenForDead(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: format, Window: 1000})
				r.up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
					return bridgetest.Step{Take: time.Duration(len(m.Payload)) * time.Second / 1024, Delay: 500 * time.Millisecond}
				}
				random := rand.NewChaCha8([32]byte{})
				noise := func(n int) string {
					b := make([]byte, n)
					_, _ = random.Read(b)
					return string(b)
				}
				for range 2000 {
					r.src.add("bulk", message("cam", "dt/cam", noise(300)))
				}
				r.src.add("telemetry", message("cam", "dt/cam/image", noise(200<<10)))
				r.start()
				elapse(20 * time.Minute)
				if n := len(r.up.Dials()); n != 1 {
					t.Fatalf("%d dials in 20 minutes: the link was slow, not dead\n%s", n, r.log)
				}
				before := time.Now()
				r.src.add("alarm", message("smoke", "alarm/smoke", "fire"))
				for r.src.cursor("alarm") == 0 {
					elapse(100 * time.Millisecond)
				}
				if wait := time.Since(before); wait > 5*time.Second {
					t.Errorf("an alarm was acked after %v", wait)
				}
			})
		})
	}
}

// TestAlarmWaitsAtMostForTheWindow: what had not been sent when the alarm came goes after it.
func TestAlarmWaitsAtMostForTheWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 64
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough, Window: window})
		r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step {
			return bridgetest.Step{Take: time.Millisecond, Delay: 5 * time.Millisecond}
		}
		r.src.add("telemetry", numbered("pump", 1, 20_000)...)
		r.src.add("bulk", numbered("cam", 1, 20_000)...)
		r.start()
		for i := 1; i <= 50; i++ {
			elapse(137 * time.Millisecond)
			before := len(r.up.Arrived())
			r.src.add("alarm", numbered("smoke", i, i)...)
			for r.src.cursor("alarm") < i {
				elapse(time.Millisecond)
			}
			at := 0
			for k, m := range r.up.Arrived() {
				if m.Lane == "alarm" {
					at = k
				}
			}
			if waited := at - before; waited > window {
				t.Errorf("alarm %d went behind %d other messages", i, waited)
			}
		}
	})
}

// TestFloodOfAlarmsLeavesTheOthersTheirShare.
func TestFloodOfAlarmsLeavesTheOthersTheirShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough, Window: 64})
		r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step {
			return bridgetest.Step{Take: time.Millisecond / 10, Delay: time.Millisecond}
		}
		pad := strings.Repeat("x", 300)
		for _, lane := range []string{"alarm", "telemetry", "bulk"} {
			var rs []spool.Record
			for range 60_000 {
				rs = append(rs, message(lane, "dt/"+lane, pad))
			}
			r.src.add(lane, rs...)
		}
		r.start()
		elapse(3 * time.Second) // 30,000 sends
		total := r.src.cursor("alarm") + r.src.cursor("telemetry") + r.src.cursor("bulk")
		for lane, share := range map[string]float64{"alarm": .5, "telemetry": .4, "bulk": .1} {
			if got := float64(r.src.cursor(lane)) / float64(total); got < share-.03 || got > share+.03 {
				t.Errorf("%s got %.3f of the link, want %.2f", lane, got, share)
			}
		}
		if total < 25_000 {
			t.Errorf("only %d sends", total)
		}
	})
}

func TestStopWaitsForOpenAcks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough, Window: 100})
		r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step { return bridgetest.Step{Delay: 3 * time.Second} }
		r.src.add("telemetry", numbered("pump", 1, 1000)...)
		r.start()
		elapse(time.Second)
		sent := r.b.Status().Sends
		before := time.Now()
		r.stop()
		if d := time.Since(before); d > 3*time.Second {
			t.Errorf("stop took %v", d)
		}
		if n := r.src.cursor("telemetry"); n != int(sent) || n == 0 || n > 100 {
			t.Errorf("%d sent before the stop, %d resolved", sent, n)
		}
		if r.up.Goodbyes() != 1 {
			t.Errorf("no goodbye")
		}
		if s := r.b.Status(); s.State != bridge.StateStopped || s.Connected || s.InFlight != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

func TestStopGivesUpOnAcksThatDoNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step { return bridgetest.Step{NoAck: true} }
		r.src.add("telemetry", numbered("pump", 1, 10)...)
		r.start()
		elapse(time.Second)
		before := time.Now()
		r.stop()
		if d := time.Since(before); d != 5*time.Second {
			t.Errorf("stop took %v, the drain time-out is 5 s", d)
		}
		if r.up.Goodbyes() != 0 {
			t.Errorf("a goodbye to an upstream that does not listen")
		}
		if n := r.src.cursor("telemetry"); n != 0 {
			t.Errorf("%d resolved without an ack", n)
		}
	})
}

func TestStopWhileTheUpstreamIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{})
		r.up.OnDial = func(int) error { return errors.New("no route to host") }
		r.start()
		elapse(time.Minute)
		before := time.Now()
		r.stop()
		if d := time.Since(before); d != 0 {
			t.Errorf("stop took %v", d)
		}
		if n := r.logged(`"upstream not reachable"`); n != 1 {
			t.Errorf("told %d times:\n%s", n, r.log)
		}
		if s := r.b.Status(); s.LastError != "no route to host" || s.Attempts < 3 {
			t.Errorf("status %+v", s)
		}
	})
}

// TestKickedLinkIsNotHammered: the link comes up and is kicked at once, again and again.
func TestKickedLinkIsNotHammered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnSend = func(_, n int, _ bridge.Message) bridgetest.Step {
			if n == 2 {
				return bridgetest.Step{Lose: true, End: bridge.ErrPeerClosed}
			}
			return bridgetest.Step{}
		}
		r.src.add("telemetry", numbered("pump", 1, 100_000)...)
		r.start()
		elapse(10 * time.Minute)
		// With pauses of 15 s on average it is about 45; without backing off thousands.
		if n := len(r.up.Dials()); n > 90 {
			t.Errorf("%d dials in 10 minutes", n)
		}
		got := r.arrivals()["telemetry"]
		if len(got) == 0 || len(got) != int(got[len(got)-1].seq) {
			t.Errorf("%d arrived", len(got))
		}
	})
}

// TestMessageThatKillsTheLinkIsParked: the upstream ends the connection whenever it gets one of the messages.
func TestMessageThatKillsTheLinkIsParked(t *testing.T) {
	for _, format := range []string{bridge.FormatBatch, bridge.FormatPassthrough} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: format})
				r.up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
					for _, u := range units(t, m) {
						if u.lane == "telemetry" && u.seq == 777 {
							return bridgetest.Step{Lose: true, End: bridge.ErrPeerClosed}
						}
					}
					// Acks are slow, so those of the messages just before it are lost, too.
					return bridgetest.Step{Delay: 20 * time.Millisecond}
				}
				r.src.add("telemetry", numbered("pump", 1, 2000)...)
				r.src.add("bulk", numbered("cam", 1, 2000)...)
				r.start()
				r.settled(time.Hour)
				if got := r.src.outcomes("telemetry"); got[spool.Parked] != 1 || got[spool.Delivered] != 1999 {
					t.Errorf("outcomes %v", got)
				}
				if got := r.src.outcomes("bulk"); got[spool.Delivered] != 2000 {
					t.Errorf("outcomes of another lane %v", got)
				}
				l := r.src.lane("telemetry")
				if !strings.Contains(l.parked[777], "ended the connection") || !bytes.Equal(l.kept[777], l.records[776].raw) {
					t.Errorf("parked %v", l.parked)
				}
				if n := r.logged(`"message parked`); n != 1 {
					t.Errorf("told %d times", n)
				}
			})
		})
	}
}

// TestBrokenLinkParksNothing: the same, but it is the link that breaks, or time-outs that end it.
func TestBrokenLinkParksNothing(t *testing.T) {
	for _, end := range []error{errors.New("network is unreachable"), bridge.ErrStalled} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
			r.up.OnSend = func(dial, _ int, _ bridge.Message) bridgetest.Step {
				if dial <= 50 {
					return bridgetest.Step{Lose: true, End: end}
				}
				return bridgetest.Step{}
			}
			r.src.add("telemetry", numbered("pump", 1, 10)...)
			r.start()
			r.settled(2 * time.Hour)
			if got := r.src.outcomes("telemetry"); got[spool.Delivered] != 10 {
				t.Errorf("%v: outcomes %v", end, got)
			}
		})
	}
}

// TestLinkThatCarriesAndIsKickedParksNothing: the upstream ends each connection before the slow ack of an
// alarm can come, but it does take other messages: no reason to blame the alarm.
func TestLinkThatCarriesAndIsKickedParksNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnDial = func(dial int) error {
			if dial <= 60 {
				time.AfterFunc(500*time.Millisecond, func() { r.up.End(bridge.ErrPeerClosed) })
			}
			return nil
		}
		r.up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
			if m.Lane == "alarm" {
				return bridgetest.Step{Delay: time.Second}
			}
			return bridgetest.Step{Delay: 10 * time.Millisecond}
		}
		r.src.add("alarm", numbered("smoke", 1, 1)...)
		r.start()
		for i := 1; len(r.up.Dials()) < 70 && i < 100_000; i++ {
			r.src.add("telemetry", numbered("pump", i, i)...)
			elapse(100 * time.Millisecond)
			if len(r.up.Dials()) > 60 && r.src.cursor("alarm") > 0 {
				break
			}
		}
		if got := r.src.outcomes("alarm"); got[spool.Delivered] != 1 {
			t.Errorf("outcomes of the alarm %v", got)
		}
	})
}

// TestBatchDoesNotSpanAHole: records that a rule takes while a lane collects for a batch leave a hole.
func TestBatchDoesNotSpanAHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{})
		r.start()
		r.src.add("telemetry", numbered("pump", 1, 1)...)
		synctest.Wait() // sent: the lane collects from now on
		r.src.add("telemetry", numbered("pump", 2, 10)...)
		synctest.Wait() // staged
		r.src.evict("telemetry", 10)
		r.src.addEvicted("telemetry", 20, numbered("pump", 11, 30)...)
		r.settled(time.Second)
		var got []string
		for _, m := range r.up.Arrived() {
			got = append(got, fmt.Sprintf("%d+%d", m.Seq, m.Count))
		}
		if want := "[1+1 2+9 21+10]"; fmt.Sprint(got) != want {
			t.Errorf("sends %v, want %s", got, want)
		}
		r.arrivals() // compares payloads with sequences
	})
}

func TestUnreadableRecordIsParkedNotFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{})
		r.src.add("telemetry", numbered("pump", 1, 3)...)
		l := r.src.lane("telemetry")
		l.maxRun = 1
		l.records[1].raw[0] = 0xff
		r.start()
		r.settled(time.Second)
		if got := r.src.outcomes("telemetry"); got[spool.Parked] != 1 && got[spool.Parked] != 2 {
			t.Errorf("outcomes %v", got)
		}
	})
}

func TestSpoolErrorEndsRun(t *testing.T) {
	broken := errors.New("input/output error")
	for name, set := range map[string]func(*laneFake){
		"read": func(l *laneFake) { l.nextErr = broken },
		"park": func(l *laneFake) { l.parkErr = broken },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
				r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step {
					return bridgetest.Step{SendErr: bridge.Permanent(errNever)}
				}
				r.src.add("telemetry", numbered("pump", 1, 1)...)
				set(r.src.lane("telemetry"))
				err := r.b.Run(t.Context())
				if !errors.Is(err, broken) || !strings.Contains(err.Error(), "telemetry") {
					t.Errorf("Run returned %v", err)
				}
				if r.up.Open() != 0 {
					t.Errorf("session left open")
				}
			})
		})
	}
}

func TestEvictionWhileInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough, Window: 100})
		r.up.OnSend = func(int, int, bridge.Message) bridgetest.Step { return bridgetest.Step{Delay: time.Second} }
		r.src.add("telemetry", numbered("pump", 1, 500)...)
		r.start()
		elapse(500 * time.Millisecond)
		r.src.evict("telemetry", 40) // a rule took what is just being sent
		r.settled(time.Minute)
		got := r.src.outcomes("telemetry")
		if got[spool.Evicted] != 40 || got[spool.Delivered] != 460 {
			t.Errorf("outcomes %v", got)
		}
	})
}

// TestRandomFaults: whatever the upstream and the link do, no message is lost, first arrivals are in
// order, and no cursor passes what was not acked.
func TestRandomFaults(t *testing.T) {
	runs := 60
	if testing.Short() {
		runs = 15
	}
	seed := rand.Uint64()
	for i := range runs {
		seed := seed + uint64(i)
		format := []string{bridge.FormatBatch, bridge.FormatPassthrough, bridge.FormatCloudEvents}[i%3]
		t.Run(fmt.Sprintf("%s seed=%d", format, seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomFaults(t, format, seed) })
		})
	}
}

func randomFaults(t *testing.T, format string, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, bridge.Config{Format: format, Window: 1 + random.IntN(50), Tuning: bridge.Tuning{
		AckTimeout: time.Second, BackoffMax: 2 * time.Second, BatchBytes: 500 + random.IntN(10_000), Kicks: 1 << 30,
	}})
	perSend := 1 + random.IntN(200) // one fault in so many sends
	r.up.OnDial = func(int) error {
		if random.IntN(4) == 0 {
			return errors.New("no route to host")
		}
		return nil
	}
	dark := 0 // the session in which nothing arrives any more: on a stream, what is lost takes all that follows with it
	r.up.OnSend = func(dial, _ int, _ bridge.Message) bridgetest.Step {
		step := bridgetest.Step{Delay: time.Duration(random.IntN(30)) * time.Millisecond, Twice: random.IntN(5) == 0}
		if dial > 40 { // in the end the link is good
			return step
		}
		if dial == dark {
			return bridgetest.Step{Lose: true}
		}
		switch random.IntN(perSend * 6) {
		case 0:
			step.Lose, dark = true, dial
		case 1:
			step.NoAck = true
		case 2:
			step.Lose, step.End = true, bridge.ErrPeerClosed
		case 3:
			step.End = bridge.ErrPeerClosed
		case 4:
			step.End, step.NoAck = errors.New("connection reset"), true
		case 5:
			step.AckErr = errors.New("try again")
		}
		return step
	}
	total := 0
	for _, l := range r.src.lanes[1:] {
		l.maxRun = random.IntN(40)
		n := 50 + random.IntN(500)
		total += n
		r.src.add(l.name, numbered(l.name, 1, n/2)...)
		t.Cleanup(func() {
			got := r.src.outcomes(l.name)
			if got[spool.Delivered] != n {
				t.Errorf("lane %s: outcomes %v of %d", l.name, got, n)
			}
			r.complete(l.name, n)
		})
		go func() {
			for i := n/2 + 1; i <= n; i++ {
				elapse(time.Duration(i%7) * time.Millisecond)
				r.src.add(l.name, numbered(l.name, i, i)...)
			}
		}()
	}
	// No cursor beyond what was acked: looked at all the time.
	r.start()
	check := func() {
		acked := map[string]map[uint64]bool{}
		for _, m := range r.up.Arrived() {
			if acked[m.Lane] == nil {
				acked[m.Lane] = map[uint64]bool{}
			}
			for s := m.Seq; s < m.Seq+uint64(m.Count); s++ {
				acked[m.Lane][s] = acked[m.Lane][s] || r.up.Acked(m.Token)
			}
		}
		for _, l := range r.src.lanes {
			for s := uint64(1); s <= uint64(r.src.cursor(l.name)); s++ {
				if !acked[l.name][s] {
					t.Fatalf("lane %s: the cursor is past %d, which was not acked", l.name, s)
				}
			}
		}
	}
	for range 20 {
		elapse(300 * time.Millisecond)
		synctest.Wait()
		check()
	}
	elapse(10 * time.Second) // all are added
	r.settled(time.Hour)
	check()
	r.stop()
}

// TestSilentlyDroppedMessageIsSentAgain: the upstream takes all but one message, and says nothing. The
// others are not held up by more than the ack time-out, and nothing is lost.
func TestSilentlyDroppedMessageIsSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnSend = func(dial, n int, _ bridge.Message) bridgetest.Step {
			return bridgetest.Step{Lose: dial <= 2 && n == 50}
		}
		r.src.add("telemetry", numbered("pump", 1, 1000)...)
		r.start()
		r.settled(3 * time.Minute)
		seen := map[uint64]bool{}
		for _, m := range r.up.Arrived() {
			seen[m.Seq] = true
		}
		if len(seen) != 1000 || len(r.up.Dials()) != 3 {
			t.Errorf("%d of 1000 arrived, %d dials", len(seen), len(r.up.Dials()))
		}
	})
}

func TestLogTellsStatesNotAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, bridge.Config{Format: bridge.FormatPassthrough})
		r.up.OnDial = func(n int) error {
			switch {
			case n == 1 || n > 30:
				return nil
			case n > 20:
				return fmt.Errorf("%w: bad user name or password", bridge.ErrRefused)
			}
			return errors.New("connection refused")
		}
		r.start()
		elapse(time.Minute)
		r.up.End(fmt.Errorf("%w: EOF", bridge.ErrPeerClosed))
		elapse(time.Hour)
		for msg, want := range map[string]int{
			`"upstream connected"`:     2,
			`"upstream lost"`:          1,
			`"upstream not reachable"`: 2, // for each of the two reasons
		} {
			if n := r.logged(msg); n != want {
				t.Errorf("%s is told %d times, want %d:\n%s", msg, n, want, r.log)
			}
		}
		if s := r.b.Status(); !s.Connected || !strings.Contains(s.LastError, "bad user name") {
			t.Errorf("status %+v", s)
		}
	})
}

func TestMetricsBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, up, reg := newSource(t.Errorf, "alarm", "telemetry"), bridgetest.NewUpstream(), prometheus.NewRegistry()
		cfg := bridge.Config{Name: "cloud", URL: "mqtt://broker.example.com", Format: bridge.FormatPassthrough}
		up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
			if m.Seq == 5 {
				return bridgetest.Step{SendErr: bridge.Permanent(errNever)}
			}
			return bridgetest.Step{Twice: m.Seq == 6}
		}
		rs := numbered("pump", 1, 100)
		rs[49].Received, rs[49].Props = 0, &spool.Props{Expiry: 1}
		src.add("telemetry", rs...)
		log := slog.New(slog.DiscardHandler)
		b, err := bridge.NewFrom(cfg, gateway, epoch, src, up, log, reg)
		if err != nil {
			t.Fatal(err)
		}
		// A second bridge shares the registry; a second of the same name does not.
		other := cfg
		other.Name = "lab"
		if _, err := bridge.NewFrom(other, gateway, epoch, newSource(t.Errorf), up, log, reg); err != nil {
			t.Errorf("second upstream: %v", err)
		}
		if _, err := bridge.NewFrom(cfg, gateway, epoch, newSource(t.Errorf), up, log, reg); err == nil {
			t.Errorf("the same upstream twice in one registry")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		synctest.Wait()
		for name, want := range map[string]float64{
			"holdfast_bridge_sends_total":          98,
			"holdfast_bridge_acked_messages_total": 98,
			"holdfast_bridge_stray_acks_total":     1,
			"holdfast_bridge_link_up":              1,
			"holdfast_bridge_in_flight_sends":      0,
			"holdfast_bridge_attempts_total":       1,
		} {
			if got := gather(t, reg, name, "cloud"); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		if got := gather(t, reg, "holdfast_bridge_ended_messages_total", "cloud"); got != 2 {
			t.Errorf("expired and parked are %v, want 2", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := bridge.NewFrom(cfg, gateway, epoch, newSource(t.Errorf), up, log, reg); err != nil {
			t.Errorf("after a reload: %v", err)
		}
	})
}

// gather sums a metric of one upstream over its other labels.
func gather(t *testing.T, reg *prometheus.Registry, name, upstream string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetName() == "upstream" && l.GetValue() == upstream {
					sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				}
			}
		}
	}
	return sum
}

func TestConfigTellsAllThatIsWrong(t *testing.T) {
	good := bridge.Config{Name: "cloud", URL: "mqtts://broker.example.com:8883", Lanes: []string{"alarm"}, Window: 256}
	if err := good.Validate(); err != nil {
		t.Errorf("good configuration: %v", err)
	}
	bad := bridge.Config{
		URL: "mqtt://user:secret@broker.example.com/path", Format: "xml", TopicPrefix: "a/#", PasswordFile: "p",
		TLS: bridge.TLS{Cert: "c"}, Lanes: []string{"a", "a"}, Window: 1 << 20,
	}
	err := bad.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"name:", "url: holds a user", "tls: is set", "tls: needs both", "format:", "topic_prefix: only", "topic_prefix:", "password_file:", "lanes:", "window:"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %q in:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the password:\n%v", err)
	}
	for _, u := range []string{"", "broker.example.com", "http://broker", "mqtt://", "mqtt://h:port", "mqtt://a b"} {
		c := good
		c.URL = u
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "url:") {
			t.Errorf("url %q: %v", u, err)
		}
	}
}
