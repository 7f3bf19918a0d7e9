package gateway_test

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/gateway"
	"holdfast/gateway/broker"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/spool"
)

// lanes is a spool that only notes what it is given.
type lanes struct {
	names []string
	err   error
	lane  spool.Lane
	rec   spool.Record
	shed  bool
	ops   []kv.Op
	token uint64
}

func (l *lanes) Lane(name string) (spool.Lane, bool) {
	for i, n := range l.names {
		if n == name {
			return spool.Lane(i), true
		}
	}
	return 0, false
}

func (l *lanes) Append(lane spool.Lane, r *spool.Record, ops []kv.Op, _ kv.Done, token uint64, shed bool) error {
	l.lane, l.rec, l.ops, l.token, l.shed = lane, *r, ops, token, shed
	return l.err
}

type done func(token, seq uint64, err error)

func (d done) Done(token, seq uint64, err error) { d(token, seq, err) }

func message(topic string, qos byte) *broker.Message {
	return &broker.Message{QoS: qos, Record: spool.Record{Device: []byte("d"), Topic: []byte(topic), Payload: []byte("x"), Flags: spool.FlagRetain}}
}

func TestIntakeFindsTheLane(t *testing.T) {
	sp := &lanes{names: []string{"alarm", "telemetry"}}
	in, err := gateway.NewIntake(sp, []config.Route{{Match: "alarm/#", Lane: "alarm"}, {Match: "local/#", Lane: "none"}})
	if err != nil {
		t.Fatal(err)
	}
	for topic, want := range map[string]spool.Lane{"alarm/x": 0, "dt/x": 1, "local/x": spool.LaneNone} {
		before := time.Now().UnixMilli()
		ops := []kv.Op{{Key: []byte("k")}}
		if err := in.Publish(message(topic, 1), ops, nil, 7); err != nil {
			t.Fatal(err)
		}
		if sp.lane != want {
			t.Errorf("%s goes to lane %d, want %d", topic, sp.lane, want)
		}
		if r := sp.rec; r.Received < before || r.Received > time.Now().UnixMilli() || r.Flags&spool.FlagRetain == 0 {
			t.Errorf("record = %+v", r)
		}
		if len(sp.ops) != 1 || sp.token != 7 || sp.shed {
			t.Errorf("handed in with ops %v, token %d, shed %v", sp.ops, sp.token, sp.shed)
		}
	}
}

func TestIntakeShedsQoS0First(t *testing.T) {
	sp := &lanes{names: []string{"telemetry"}}
	in, err := gateway.NewIntake(sp, nil)
	if err != nil {
		t.Fatal(err)
	}
	for qos, want := range map[byte]bool{0: true, 1: false, 2: false} {
		if err := in.Publish(message("a", qos), nil, nil, 0); err != nil || sp.shed != want {
			t.Errorf("QoS %d: shed %v, %v", qos, sp.shed, err)
		}
	}
}

// What the broker tells an MQTT 5 client depends on which error it is.
func TestIntakeErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		err   error
		quota bool
	}{
		"full":      {fmt.Errorf("append to lane: %w", spool.ErrFull), true},
		"busy":      {spool.ErrBusy, true},
		"too large": {spool.ErrTooLarge, false},
		"closed":    {kv.ErrClosed, false},
		"disk":      {errors.New("input/output error"), false},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := gateway.NewIntake(&lanes{names: []string{"telemetry"}, err: tc.err}, nil)
			if err != nil {
				t.Fatal(err)
			}
			err = in.Publish(message("a", 1), nil, nil, 0)
			if err == nil || errors.Is(err, broker.ErrQuota) != tc.quota {
				t.Errorf("Publish = %v, want quota %v", err, tc.quota)
			}
			if tc.quota && !errors.Is(err, spool.ErrFull) && !errors.Is(err, spool.ErrBusy) {
				t.Errorf("Publish = %v: the cause is lost", err)
			}
		})
	}
}

// A retained message that stays local takes a row: on a full disk it is refused, and one that deletes is not.
func TestIntakeKeepsNothingOnAFullDisk(t *testing.T) {
	in, err := gateway.NewIntake(&lanes{names: []string{"telemetry"}}, []config.Route{{Match: "local/#", Lane: config.LaneNone}})
	if err != nil {
		t.Fatal(err)
	}
	level := kv.LevelHigh
	in.SetLevel(func() kv.Level { return level })
	kept := message("local/a", 1)
	kept.Retain = true
	if err := in.Publish(kept, nil, nil, 0); err != nil {
		t.Errorf("while it is nearly full: %v", err)
	}
	level = kv.LevelFull
	if err := in.Publish(kept, nil, nil, 0); !errors.Is(err, broker.ErrQuota) || !errors.Is(err, kv.ErrDiskFull) {
		t.Errorf("Publish = %v", err)
	}
	kept.Record.Payload = nil
	if err := in.Publish(kept, nil, nil, 0); err != nil {
		t.Errorf("one that deletes: %v", err)
	}
	if err := in.Publish(message("local/a", 1), nil, nil, 0); err != nil {
		t.Errorf("one that is not kept: %v", err)
	}
}

func TestDiskWarnings(t *testing.T) {
	c := &config.Config{Gateway: config.Gateway{DataDir: t.TempDir() + "/not/there/yet"}}
	c.Spool.Lanes = []spool.LaneConfig{{Name: "a", MaxBytes: 1 << 20}}
	if got := gateway.DiskWarnings(c); len(got) > 0 {
		t.Errorf("a small lane: %v", got)
	}
	c.Spool.Lanes[0].MaxBytes = 1 << 60
	c.Spool.DiskReserve = 1 << 60
	got := gateway.DiskWarnings(c)
	if len(got) != 2 || !got[0].Warning || got[0].Key != "spool.disk_reserve" || got[1].Key != "spool.lanes" || !strings.Contains(got[1].Text, "when_full") {
		t.Errorf("too much of everything: %v", got)
	}
}

func TestIntakeNeedsItsLanes(t *testing.T) {
	for name, tc := range map[string]struct {
		lanes []string
		table []config.Route
		want  string
	}{
		"route to no lane":     {[]string{"telemetry"}, []config.Route{{Match: "a", Lane: "b"}}, `route "a": lane "b"`},
		"no lane for the rest": {[]string{"b"}, []config.Route{{Match: "a", Lane: "b"}}, `lane "telemetry"`},
		"no filter":            {[]string{"telemetry"}, []config.Route{{Match: "a#", Lane: "telemetry"}}, "no topic filter"},
	} {
		if _, err := gateway.NewIntake(&lanes{names: tc.lanes}, tc.table); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	if _, err := gateway.NewIntake(&lanes{names: []string{"b"}}, []config.Route{{Match: "#", Lane: "b"}}); err != nil {
		t.Errorf("everything routed: %v", err)
	}
}

func TestReservedTopics(t *testing.T) {
	for topic, want := range map[string]bool{
		"dt/a": true, "cmd/d/res/1/succeeded": true, "cmd": true, "cmd/d": true, "cmdx/d/req": true, "gwx": true, "g": true, "c": true,
		"cmd/d/req": false, "cmd/d/req/1/reboot": false, "cmd//req": false, "gw": false, "gw/g/state": false, "gw/": false,
		"$SYS/x": false, "$": false, "": false, "cmd/d/request": true, "cmd/req": true, "/cmd/d/req": true,
	} {
		if got := !gateway.Reserved([]byte(topic)); got != want {
			t.Errorf("devices may publish to %q: %v, want %v", topic, got, want)
		}
	}
	topic := []byte("cmd/d/res/1/succeeded")
	if n := testing.AllocsPerRun(100, func() { gateway.Reserved(topic) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkIntake is the way from the broker to a commit of the real store, without the broker. Its
// allocations per message are the claim; the rate is the disk's.
func BenchmarkIntake(b *testing.B) {
	store, err := kv.Open(b.TempDir(), kv.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	sp, err := spool.Open(store, spool.Config{Lanes: []spool.LaneConfig{
		{Name: "telemetry", Share: 100, MaxBytes: 64 << 20, WhenFull: spool.DropOldest},
	}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer sp.Close()
	in, err := gateway.NewIntake(sp, []config.Route{{Match: "alarm/#", Lane: "none"}, {Match: "local/#", Lane: "none"}})
	if err != nil {
		b.Fatal(err)
	}
	const inFlight = 1024
	var wg sync.WaitGroup
	room := make(chan struct{}, inFlight)
	end := done(func(_, _ uint64, err error) {
		if err != nil {
			b.Error(err)
		}
		<-room
		wg.Done()
	})
	m := message("dt/icu/bed-12/heart_rate", 1)
	m.Record.Payload = make([]byte, 256)
	b.ReportAllocs()
	for b.Loop() {
		room <- struct{}{}
		wg.Add(1)
		if err := in.Publish(m, nil, end, 0); err != nil {
			b.Fatal(err)
		}
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
}
