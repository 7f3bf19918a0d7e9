package bridge_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/spool"
)

// sent notes what was handed to an upstream, and when.
type sent struct {
	mu   sync.Mutex
	list []sentMessage
}

type sentMessage struct {
	at   time.Time
	lane string
	size int
}

func (s *sent) note(m bridge.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, sentMessage{time.Now(), m.Lane, bridge.OnWire(len(m.Topic) + len(m.Payload))})
}

// most is the largest number of bytes within any stretch of d.
func (s *sent) most(d time.Duration) (most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum, from := 0, 0
	for _, m := range s.list {
		sum += m.size
		for m.at.Sub(s.list[from].at) >= d {
			sum -= s.list[from].size
			from++
		}
		most = max(most, sum)
	}
	return most
}

func (s *sent) count(lane string, since time.Time) (messages, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.list {
		if m.lane == lane && !m.at.Before(since) {
			messages++
			size += m.size
		}
	}
	return messages, size
}

// budgeted is a rig whose upstream notes what is sent to it.
func budgeted(t *testing.T, cfg bridge.Config) (*rig, *sent) {
	r, s := newRig(t, cfg, "telemetry", "bulk", "urgent"), &sent{}
	r.up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
		s.note(m)
		return bridgetest.Step{Delay: 20 * time.Millisecond}
	}
	return r, s
}

func TestBytesPerSecond(t *testing.T) {
	const rate = 8 << 10
	for _, format := range []string{bridge.FormatPassthrough, bridge.FormatBatch} {
		t.Run(format, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, s := budgeted(t, bridge.Config{Format: format, Budget: bridge.Budget{BytesPerSecond: rate}})
				rng := rand.New(rand.NewPCG(1, 2))
				var rs []spool.Record
				for range 10_000 {
					rs = append(rs, message("pump", "dt/pump", noise(rng, 100)))
				}
				r.src.add("telemetry", rs...)
				r.start()
				elapse(5 * time.Second) // batches find their size
				began := time.Now()
				elapse(time.Minute)
				_, size := s.count("telemetry", began)
				if want := rate * 60; size < want*97/100 || size > want*102/100 {
					t.Errorf("%d bytes in a minute, want %d", size, want)
				}
				// What a pause has saved up and what the second brings.
				if most := s.most(time.Second); most > rate*3/2+rate/2 {
					t.Errorf("%d bytes in one second of %d", most, rate)
				}
				if most := s.most(100 * time.Millisecond); most > rate {
					t.Errorf("a burst of %d bytes, more than a second's worth", most)
				}
			})
		})
	}
}

// noise is a text that does not compress.
func noise(rng *rand.Rand, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return string(b)
}

// TestLargeMessageIsPaidAfterwards: one that is more than a second's worth goes, and what comes behind it waits.
func TestLargeMessageIsPaidAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := budgeted(t, bridge.Config{Format: bridge.FormatPassthrough, Budget: bridge.Budget{BytesPerSecond: 1 << 10}})
		r.src.add("telemetry", message("cam", "dt/cam", strings.Repeat("x", 60<<10)), message("cam", "dt/cam", "after it"))
		r.start()
		elapse(50 * time.Second)
		if n, _ := s.count("telemetry", time.Time{}); n != 1 {
			t.Errorf("%d messages after 50 s", n)
		}
		elapse(12 * time.Second)
		if n, _ := s.count("telemetry", time.Time{}); n != 2 {
			t.Errorf("%d messages after a minute", n)
		}
	})
}

// TestUrgentLanePassesTheBudget, and is counted: afterwards the others wait.
func TestUrgentLanePassesTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 1 << 10
		r, s := budgeted(t, bridge.Config{Format: bridge.FormatPassthrough, Budget: bridge.Budget{BytesPerSecond: rate}})
		// The lowest lane: priority has nothing to do with it.
		r.src.add("telemetry", numbered("pump", 1, 5000)...)
		r.start()
		elapse(10 * time.Second)
		began := time.Now()
		for range 100 {
			r.src.add("urgent", message("smoke", "dt/smoke", strings.Repeat("x", 200)))
		}
		elapse(time.Second / 2)
		n, urgent := s.count("urgent", began)
		if n != 100 {
			t.Errorf("%d of 100 urgent messages have gone", n)
		}
		elapse(time.Duration(urgent/rate-2) * time.Second)
		if n, _ := s.count("telemetry", began); n > 5 {
			t.Errorf("%d other messages while the urgent ones are paid for", n)
		}
		elapse(10 * time.Second)
		if n, _ := s.count("telemetry", began); n < 20 {
			t.Errorf("%d other messages once they are", n)
		}
	})
}

// memoryUsage is a UsageStore.
type memoryUsage struct {
	mu    sync.Mutex
	u     bridge.Usage
	saves int
	err   error
}

func (m *memoryUsage) Load() (bridge.Usage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.u, m.err
}

func (m *memoryUsage) Save(u bridge.Usage) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.u = u
	m.saves++
	return m.err
}

func TestBytesPerDay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const day = 100 << 10
		store := &memoryUsage{}
		const ahead = 23 * time.Hour // of the bubble, which begins at midnight
		clock := func() time.Time { return time.Now().Add(ahead) }
		midnight := time.Date(2000, 1, 2, 0, 0, 0, 0, time.UTC)
		run := func(fn func(r *rig, s *sent)) {
			r, s := budgeted(t, bridge.Config{Format: bridge.FormatPassthrough, Budget: bridge.Budget{BytesPerDay: day}, Tuning: bridge.Tuning{Now: clock}})
			r.b.KeepUsage(store)
			r.src.add("telemetry", numbered("pump", 1, 20_000)...)
			r.start()
			fn(r, s)
			r.stop()
		}
		flows := func(r *rig, s *sent, lane string) bool {
			began := time.Now()
			r.src.add(lane, message("x", "dt/x", "one more"))
			elapse(2 * time.Second)
			n, _ := s.count(lane, began)
			return n > 0
		}
		run(func(r *rig, s *sent) {
			elapse(10 * time.Second)
			_, size := s.count("telemetry", time.Time{})
			if size < day || size > day*102/100 {
				t.Errorf("%d bytes on a day of %d", size, day)
			}
			if !flows(r, s, "urgent") || !flows(r, s, spool.SystemLane) || flows(r, s, "telemetry") {
				t.Error("only urgent lanes should flow")
			}
			st := r.b.Status()
			if !st.Connected || st.Budget == nil || st.Budget.Held != bridge.HeldByDay || !st.Budget.HeldUntil.Equal(midnight) || st.Budget.DayBytes < day {
				t.Errorf("status %+v, %+v", st, st.Budget)
			}
			elapse(30 * time.Minute)
			if n := r.logged(`"budget of the day is used up`); n != 1 {
				t.Errorf("told %d times", n)
			}
		})
		run(func(r *rig, s *sent) { // a restart gives no other budget
			if flows(r, s, "telemetry") || !flows(r, s, "urgent") {
				t.Error("after a restart only urgent lanes should flow")
			}
			elapse(midnight.Sub(clock()) - 3*time.Second)
			if flows(r, s, "telemetry") {
				t.Error("flows before midnight")
			}
			elapse(3 * time.Second)
			if n, _ := s.count("telemetry", midnight.Add(-ahead)); n == 0 {
				t.Error("does not flow on the next day")
			}
			if n := r.logged(`"all lanes flow again"`); n != 1 {
				t.Errorf("told %d times:\n%s", n, r.log)
			}
			elapse(time.Minute)
			if _, size := s.count("telemetry", midnight.Add(-ahead)); size < day || size > day*102/100 {
				t.Errorf("%d bytes on the next day", size)
			}
		})
		if store.saves > 60 {
			t.Errorf("saved %d times: at most once a second while something changes", store.saves)
		}
		store.err = errors.New("row is damaged")
		run(func(r *rig, s *sent) { // counted anew rather than not at all or for ever
			if !flows(r, s, "telemetry") || r.logged(`"bytes sent today are not known`) != 1 {
				t.Errorf("with a count that cannot be read:\n%s", r.log)
			}
		})
	})
}

// TestDayOfAWrongClock: whatever the clock says, the link is not locked for good, nor given one budget after the other.
func TestDayOfAWrongClock(t *testing.T) {
	at := func(year int, month time.Month, day int) time.Time {
		return time.Date(year, month, day, 12, 0, 0, 0, time.UTC)
	}
	today := at(2026, 5, 4)
	for _, c := range []struct {
		name    string
		counted time.Time // the day that is used up
		now     time.Time
		synced  bool
		kept    time.Duration // how long it stays used up at most
		anew    bool          // at once
	}{
		{"the same day", today, today, true, 25 * time.Hour, false},
		{"the next day", today, today.AddDate(0, 0, 1), true, 0, true},
		{"the next day, unsynced", today, today.AddDate(0, 0, 1), false, 0, true},
		{"counted in 2099 by a wrong clock", at(2099, 1, 1), today, true, 0, true},
		{"counted in 2099, still not right", at(2099, 1, 1), today, false, 25 * time.Hour, false},
		{"boots in 1970", today, at(1970, 1, 1), false, 25 * time.Hour, false},
		{"set back over midnight", today, today.AddDate(0, 0, -1), true, 25 * time.Hour, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			day := bridge.NewDay(c.counted, c.now, c.synced)
			if day.Turned(0) != c.anew {
				t.Fatalf("a new count: %t", !c.anew)
			}
			if !c.anew && !day.Turned(c.kept) {
				t.Errorf("still the old count after %v", c.kept)
			}
		})
	}
}

func TestWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := budgeted(t, bridge.Config{Format: bridge.FormatPassthrough, Budget: bridge.Budget{
			Windows: []bridge.TimeWindow{{Cron: "0 2,5 * * *", For: 2 * time.Hour}},
		}})
		r.src.add("telemetry", numbered("pump", 1, 10)...)
		r.start()
		elapse(time.Hour)
		r.src.add("urgent", numbered("smoke", 1, 1)...)
		r.src.add(spool.SystemLane, message("", "gw/x/evt/gap", "{}"))
		elapse(time.Second)
		for lane, want := range map[string]int{"telemetry": 0, "urgent": 1, spool.SystemLane: 1} {
			if n, _ := s.count(lane, time.Time{}); n != want {
				t.Errorf("%d of lane %s outside of the window, want %d", n, lane, want)
			}
		}
		opens := time.Date(2000, 1, 1, 2, 0, 0, 0, time.UTC)
		if st := r.b.Status(); !st.Connected || st.Budget.Held != bridge.HeldByWindow || !st.Budget.HeldUntil.Equal(opens) {
			t.Errorf("status %+v, %+v", st, st.Budget)
		}
		elapse(time.Until(opens) - time.Second)
		if n, _ := s.count("telemetry", time.Time{}); n != 0 {
			t.Errorf("%d went before the window opens", n)
		}
		elapse(3 * time.Second)
		if n, _ := s.count("telemetry", time.Time{}); n != 10 {
			t.Errorf("%d of 10 went when it opens", n)
		}
		if st := r.b.Status(); st.Budget.Held != "" || len(r.up.Dials()) != 1 {
			t.Errorf("status %+v, %d dials", st.Budget, len(r.up.Dials()))
		}
		elapse(2 * time.Hour)
		r.src.add("telemetry", numbered("pump", 11, 20)...)
		elapse(time.Minute)
		if n, _ := s.count("telemetry", time.Time{}); n != 10 {
			t.Errorf("%d went, the window is over", n)
		}
		elapse(time.Hour)
		if n, _ := s.count("telemetry", time.Time{}); n != 20 {
			t.Errorf("%d went when it opens again", n)
		}
	})
}

func TestWindowIsOpen(t *testing.T) {
	w := func(cron string, d time.Duration) bridge.TimeWindow { return bridge.TimeWindow{Cron: cron, For: d} }
	for _, c := range []struct {
		name    string
		windows []bridge.TimeWindow
		at      string
		open    bool
		until   string
	}{
		{"before", []bridge.TimeWindow{w("0 22 * * *", 8*time.Hour)}, "2026-05-04T21:59:59Z", false, "2026-05-04T22:00:00Z"},
		{"begin", []bridge.TimeWindow{w("0 22 * * *", 8*time.Hour)}, "2026-05-04T22:00:00Z", true, "2026-05-05T06:00:00Z"},
		{"over midnight", []bridge.TimeWindow{w("0 22 * * *", 8*time.Hour)}, "2026-05-05T05:59:59Z", true, "2026-05-05T06:00:00Z"},
		{"end", []bridge.TimeWindow{w("0 22 * * *", 8*time.Hour)}, "2026-05-05T06:00:00Z", false, "2026-05-05T22:00:00Z"},
		{"zone in summer", []bridge.TimeWindow{w("TZ=Europe/Berlin 0 22 * * *", time.Hour)}, "2026-07-01T20:30:00Z", true, "2026-07-01T21:00:00Z"},
		{"zone in winter", []bridge.TimeWindow{w("TZ=Europe/Berlin 0 22 * * *", time.Hour)}, "2026-01-01T20:30:00Z", false, "2026-01-01T21:00:00Z"},
		{"an hour that the clock skips", []bridge.TimeWindow{w("TZ=Europe/Berlin 30 2 * * *", time.Hour)}, "2026-03-29T10:00:00Z", false, "2026-03-30T00:30:00Z"},
		{"THU or the 13th", []bridge.TimeWindow{w("0 0 13 * THU", 24*time.Hour)}, "2026-05-07T12:00:00Z", true, "2026-05-08T00:00:00Z"},
		{"the 13th or THU", []bridge.TimeWindow{w("0 0 13 * THU", 24*time.Hour)}, "2026-05-13T12:00:00Z", true, "2026-05-15T00:00:00Z"},
		{"two", []bridge.TimeWindow{w("0 6 * * *", time.Hour), w("0 18 * * *", time.Hour)}, "2026-05-04T12:00:00Z", false, "2026-05-04T18:00:00Z"},
		{"two that touch", []bridge.TimeWindow{w("0 6 * * *", time.Hour), w("0 7 * * *", time.Hour)}, "2026-05-04T06:30:00Z", true, "2026-05-04T08:00:00Z"},
		{"the first of January, at boot in 1970", []bridge.TimeWindow{w("0 0 1 1 *", time.Hour)}, "1970-01-01T00:00:07Z", true, "1970-01-01T01:00:00Z"},
		{"leap day", []bridge.TimeWindow{w("0 0 29 2 *", time.Hour)}, "2026-05-04T06:30:00Z", false, "2028-02-29T00:00:00Z"},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, c.at)
			if err != nil {
				t.Fatal(err)
			}
			open, until, err := bridge.OpenAt(c.windows, at)
			if err != nil {
				t.Fatal(err)
			}
			if got := until.UTC().Format(time.RFC3339); open != c.open || got != c.until {
				t.Errorf("open %t until %s, want %t until %s", open, got, c.open, c.until)
			}
		})
	}
	// Always open: the answer holds for some time, and finding it does not take for ever.
	open, until, err := bridge.OpenAt([]bridge.TimeWindow{w("* * * * *", time.Hour)}, time.Date(2026, 5, 4, 0, 0, 0, 0, time.UTC))
	if !open || err != nil || until.Before(time.Date(2026, 5, 4, 1, 0, 0, 0, time.UTC)) {
		t.Errorf("open %t until %v, %v", open, until, err)
	}
}

func TestBudgetTellsAllThatIsWrong(t *testing.T) {
	for _, c := range []struct {
		b    bridge.Budget
		want []string
	}{
		{bridge.Budget{}, nil},
		{bridge.Budget{BytesPerSecond: 256, BytesPerDay: 64 << 10, Windows: []bridge.TimeWindow{{Cron: "*/5 1-3 * jan,FEB mon-fri", For: time.Minute}}}, nil},
		{bridge.Budget{BytesPerSecond: 100, BytesPerDay: -1}, []string{"bytes_per_second: has to be at least 256B", "bytes_per_day: has to be at least 64KiB"}},
		{bridge.Budget{Windows: []bridge.TimeWindow{}}, []string{"windows: has no entry"}},
		{bridge.Budget{Windows: []bridge.TimeWindow{{Cron: "0 22 * *", For: time.Hour}, {Cron: "", For: 0}, {Cron: "@daily", For: 8 * 24 * time.Hour}}}, []string{
			"windows[0].cron: does not have five fields", "windows[1].cron: does not have five fields", "windows[1].for: has to be 1m to 168h",
			"windows[2].cron: does not have five fields", "windows[2].for",
		}},
		{bridge.Budget{Windows: []bridge.TimeWindow{{Cron: "0 25 * * *", For: time.Hour}, {Cron: "TZ=Mars/Base 0 2 * * *", For: time.Hour}, {Cron: "0 0 31 2 *", For: time.Hour}}}, []string{
			"windows[0].cron: ", `windows[1].cron: time zone "Mars/Base" is not known`, "windows[2].cron: never comes",
		}},
	} {
		err := c.b.Validate()
		if (err == nil) != (c.want == nil) {
			t.Errorf("%+v: %v", c.b, err)
			continue
		}
		if err == nil {
			continue
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != len(c.want) {
			t.Errorf("%d problems: %v", len(lines), err)
			continue
		}
		for i, want := range c.want {
			if !strings.HasPrefix(lines[i], want) {
				t.Errorf("%q does not begin with %q", lines[i], want)
			}
		}
	}
}

// TestBudgetCountsWhatTheMeterShows: where the upstream counts its bytes, those are what the budget is about.
func TestBudgetCountsWhatTheMeterShows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 4 << 10
		src := newSource(t.Errorf, "telemetry")
		up := &meteredUpstream{Upstream: bridgetest.NewUpstream()}
		cfg := bridge.Config{Name: "cloud", URL: "mqtt://broker.example.com", Format: bridge.FormatPassthrough, Budget: bridge.Budget{BytesPerSecond: rate, BytesPerDay: 1 << 30}}
		b, err := bridge.NewFrom(cfg, gateway, epoch, src, up, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		up.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
			up.meter.Add(2 * (len(m.Topic) + len(m.Payload))) // a layer below that doubles everything
			return bridgetest.Step{Delay: 10 * time.Millisecond}
		}
		src.add("telemetry", numbered("pump", 1, 20_000)...)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		elapse(5 * time.Second)
		before := up.meter.Total()
		elapse(time.Minute)
		n := up.meter.Total() - before
		if n < rate*60*97/100 || n > rate*60*103/100 {
			t.Errorf("%d bytes on the meter in a minute, want %d", n, rate*60)
		}
		if st := b.Status(); st.WireBytes != up.meter.Total() || st.Budget.DayBytes < st.WireBytes*99/100 {
			t.Errorf("status %d, %+v; meter %d", st.WireBytes, st.Budget, up.meter.Total())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

type meteredUpstream struct {
	*bridgetest.Upstream
	meter *bridge.Meter
}

func (u *meteredUpstream) Meter(m *bridge.Meter) { u.meter = m }
