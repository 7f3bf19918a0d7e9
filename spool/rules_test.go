package spool_test

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/internal/kv"
	"holdfast/spool"
)

// A smaller lane drops what is too much, and is told to reject instead.
func TestLimitsChangeWhileMessagesCome(t *testing.T) {
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, kv.InMemory(), cfg)
	r.put("bulk", 0, 500)
	before := r.account("cloud", "bulk")

	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() { // a flood must not mind
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := r.Append(r.lane("alarm"), rec(i), nil, nil, 0, false); err != nil {
				t.Error(err)
				return
			}
		}
	})
	small := spool.LaneConfig{Name: "bulk", Share: 30, MaxBytes: 32 << 10, WhenFull: spool.DropOldest}
	for range 50 {
		if err := r.SetLimits([]spool.LaneConfig{cfg.Lanes[0], small}); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	eventually(t, "the lane is as small as it may be", func() bool {
		a := r.account("cloud", "bulk")
		return a.Pending.Bytes < 32<<10 && a.Evicted.Messages == 500-a.Pending.Messages
	})
	if a := r.account("cloud", "bulk"); a.Accepted != before.Accepted {
		t.Errorf("accepted was %v, is %v", before.Accepted, a.Accepted)
	}
	if st := r.Lanes()[2]; st.MaxBytes != 32<<10 {
		t.Errorf("shown as %+v", st)
	}

	r.put("bulk", 0, 1) // an empty lane takes one message whatever its limit is, and this one may have dropped all it had
	small.WhenFull, small.MaxBytes = spool.Reject, 1
	if err := r.SetLimits([]spool.LaneConfig{small}); err != nil {
		t.Fatal(err)
	}
	if err := r.Append(r.lane("bulk"), rec(1), nil, nil, 0, false); !errors.Is(err, spool.ErrFull) {
		t.Errorf("Append = %v, want ErrFull", err)
	}
	small.MaxBytes = 0
	if err := r.SetLimits([]spool.LaneConfig{small}); err != nil {
		t.Fatal(err)
	}
	r.put("bulk", 0, 1)

	// All or none.
	err := r.SetLimits([]spool.LaneConfig{{Name: "bulk", MaxBytes: 1, WhenFull: spool.Reject}, {Name: "nothing"}})
	if !errors.Is(err, spool.ErrNoLane) {
		t.Errorf("SetLimits = %v, want ErrNoLane", err)
	}
	r.put("bulk", 0, 1)
	r.verify()
}

func TestMaxAgeChanges(t *testing.T) {
	h := newHeld()
	cfg := lanes("telemetry")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := openHeld(t, kv.Options{FS: kv.InMemory()}, h, cfg)
	r.putNow("telemetry", 0, 5)
	h.advance(time.Hour)
	r.putNow("telemetry", 5, 8)
	if err := r.SetLimits([]spool.LaneConfig{{Name: "telemetry", Share: 10, MaxAge: time.Minute, WhenFull: spool.DropOldest}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old ones are gone", func() bool { return r.account("cloud", "telemetry").Expired.Messages == 5 })
}

// The order of a lane changes between two consumers, and what the one has delivered beyond the backlog the other does not deliver again.
func TestDrainChangesBetweenConsumers(t *testing.T) {
	cfg := lanes("telemetry")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, kv.InMemory(), cfg)
	r.put("telemetry", 0, 600)
	live := cfg.Lanes[0]
	live.Drain = spool.LiveFirst

	_, c := r.reader("cloud", "telemetry")
	if err := r.SetLimits([]spool.LaneConfig{live}); err == nil {
		t.Fatal("drain changes under a reader")
	}
	c.Close()
	if err := r.SetLimits([]spool.LaneConfig{live}); err != nil {
		t.Fatal(err)
	}
	newest, backlog, c := r.parts("cloud", "telemetry")
	if newest == nil || backlog == nil {
		t.Fatal("no two readers")
	}
	r.put("telemetry", 600, 610)
	got, end := readOn(t, newest, 1<<20)
	if len(got) == 0 || slices.Contains(got, 1) {
		t.Fatalf("the newest are %v", got)
	}
	newest.Resolve(end, spool.Delivered)
	c.Close()
	if err := r.SetLimits([]spool.LaneConfig{cfg.Lanes[0]}); err != nil {
		t.Fatal(err)
	}
	rd, _ := r.reader("cloud", "telemetry")
	rest, end := readOn(t, rd, 1<<20)
	rd.Resolve(end, spool.Delivered)
	all := append(rest, got...)
	slices.Sort(all)
	if len(all) != 610 || len(slices.Compact(all)) != 610 {
		t.Errorf("delivered %d, then %d; want each of 610 once", len(got), len(rest))
	}
	if a := r.account("cloud", "telemetry"); a.Pending.Messages != 0 {
		t.Errorf("pending %+v", a)
	}
}

// What waited for an upstream that is taken out of the configuration is no longer kept for it; what was dropped meanwhile counts as evicted when it
// comes back, and is told.
func TestDetachedUpstreamComesBack(t *testing.T) {
	cfg := lanes("telemetry")
	cfg.Upstreams = map[string][]string{"cloud": nil, "lab": nil}
	r := open(t, kv.InMemory(), cfg)
	r.put("telemetry", 0, 10)
	rd, c := r.reader("cloud", "telemetry")
	_, end := read(t, rd, 1<<20)
	rd.Resolve(end, spool.Delivered)
	if got := r.account("lab", "telemetry").Pending.Messages; got != 10 {
		t.Fatalf("%d wait for lab", got)
	}

	labs, err := r.Consumer("lab", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Detach("lab", nil); err == nil {
		t.Fatal("detached under its consumer")
	}
	labs.Close()
	if err := r.Detach("lab", nil); err != nil {
		t.Fatal(err)
	}
	for _, a := range r.Accounts() {
		if a.Upstream == "lab" {
			t.Errorf("lab has an account: %+v", a)
		}
	}
	for _, l := range r.Lanes() {
		if l.Name == "telemetry" && l.Kept.Messages != 0 {
			t.Errorf("%d are kept for nobody", l.Kept.Messages)
		}
	}
	r.put("telemetry", 10, 13)
	if got, _ := read(t, rd, 1<<20); len(got) != 3 {
		t.Errorf("cloud gets %v", got)
	}
	c.Close()

	labs, err = r.Consumer("lab", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer labs.Close()
	a := r.account("lab", "telemetry")
	if a.Evicted.Messages != 10 || a.Pending.Messages != 3 || a.Accepted.Messages != 13 {
		t.Errorf("%+v", a)
	}
	if lost := announced(t, r, labs); !slices.Equal(lost[1], []string{"detached"}) || len(lost) != 10 {
		t.Errorf("announced %v", lost)
	}
	r.verify()
}

func TestDetachFromOneLane(t *testing.T) {
	cfg := lanes("alarm", "bulk")
	cfg.Upstreams = map[string][]string{"cloud": nil}
	r := open(t, kv.InMemory(), cfg)
	r.put("alarm", 0, 3)
	r.put("bulk", 0, 3)
	if err := r.Detach("cloud", []string{"bulk"}); err != nil {
		t.Fatal(err)
	}
	c, err := r.Consumer("cloud", []string{"alarm"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var names []string
	for _, rd := range c.Lanes() {
		names = append(names, rd.Lane())
	}
	if want := []string{"system", "alarm"}; !slices.Equal(names, want) {
		t.Errorf("reads %v, want %v", names, want)
	}
	if a := r.account("", "bulk"); a.Pending.Messages != 3 {
		t.Errorf("nobody's: %+v", a) // retention has it now
	}
}
