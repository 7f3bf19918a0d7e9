package bridge

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	cron "github.com/netresearch/go-cron"
)

// Budget bounds what a bridge sends. What is zero does not bound. The system lane and lanes that are urgent pass all of it, but
// their bytes count.
type Budget struct {
	// BytesPerSecond and BytesPerDay are bytes as the network is given them: topics, payloads, the framing of MQTT and TLS, keep-alives,
	// and what had to be sent again. The day is a UTC day.
	BytesPerSecond int64 `yaml:"bytes_per_second"`
	BytesPerDay    int64 `yaml:"bytes_per_day"`
	// Windows are the times in which messages flow. None: always.
	Windows []TimeWindow `yaml:"windows"`
}

// TimeWindow opens when Cron says, and stays open For so long. Cron has the five fields of a crontab, in UTC or behind
// "TZ=Europe/Berlin " in that zone.
type TimeWindow struct {
	Cron string        `yaml:"cron"`
	For  time.Duration `yaml:"for"`
}

// Least and most that make sense.
const (
	MinBytesPerSecond = 256
	MinBytesPerDay    = 64 << 10
	MinWindow         = time.Minute
	MaxWindow         = 7 * 24 * time.Hour
)

// Validate tells everything that is wrong, one error a line, each beginning with the key.
func (b *Budget) Validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf(key+": "+format, args...))
	}
	if b.BytesPerSecond < 0 || b.BytesPerSecond > 0 && b.BytesPerSecond < MinBytesPerSecond {
		bad("bytes_per_second", "has to be at least %dB, or 0 for no limit: less does not carry a keep-alive and a message", MinBytesPerSecond)
	}
	if b.BytesPerDay < 0 || b.BytesPerDay > 0 && b.BytesPerDay < MinBytesPerDay {
		bad("bytes_per_day", "has to be at least %dKiB, or 0 for no limit: connections and keep-alives alone take that", MinBytesPerDay>>10)
	}
	if b.Windows != nil && len(b.Windows) == 0 {
		bad("windows", "has no entry: nothing would ever be sent; write windows, or remove the key for always")
	}
	for i, w := range b.Windows {
		key := fmt.Sprintf("windows[%d].", i)
		if _, err := parseCron(w.Cron); err != nil {
			bad(key+"cron", "%v", err)
		}
		if w.For < MinWindow || w.For > MaxWindow {
			bad(key+"for", "has to be %.0fm to %.0fh", MinWindow.Minutes(), MaxWindow.Hours())
		}
	}
	return errors.Join(errs...)
}

// crontab reads the five fields that people know, and nothing besides. A day is taken if either its date or its weekday matches,
// where both are given, as crontab(5) has it.
var crontab = cron.MustNewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.DowOrDom)

// parseCron reads a window's cron: UTC where it names no time zone.
func parseCron(spec string) (cron.Schedule, error) {
	const forms = `write five fields, minute hour day month weekday: "0 22 * * *", or "TZ=Europe/Berlin 0 22 * * *"`
	zone, fields := "TZ=UTC", spec
	if strings.HasPrefix(spec, "TZ=") {
		zone, fields, _ = strings.Cut(spec, " ")
		if _, err := time.LoadLocation(strings.TrimPrefix(zone, "TZ=")); err != nil {
			return nil, fmt.Errorf("time zone %.64q is not known to this machine: write another, or install its time zones (tzdata)", strings.TrimPrefix(zone, "TZ="))
		}
	}
	if len(strings.Fields(fields)) != 5 {
		return nil, errors.New("does not have five fields: " + forms)
	}
	s, err := crontab.Parse(zone + " " + strings.ToLower(fields))
	if err != nil {
		return nil, fmt.Errorf("%v: %s", err, forms)
	}
	if s.Next(time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		return nil, errors.New("never comes: there is no such day")
	}
	return s, nil
}

// Usage is what was sent on a day.
type Usage struct {
	Day   int64 // since 1970-01-01, UTC
	Bytes uint64
}

// UsageStore keeps an upstream's Usage across restarts. Save is called at most once a second, and not after
// Run has returned; it need not wait until it is on disk.
type UsageStore interface {
	Load() (Usage, error)
	Save(u Usage) error
}

// Why messages wait although the link is up.
const (
	HeldByDay    = "bytes_per_day" // the day's budget is used up
	HeldByWindow = "window"        // no window is open
)

// BudgetStatus is how a budget stands.
type BudgetStatus struct {
	BytesPerSecond int64     `json:"bytes_per_second,omitempty"` // 0: no limit
	BytesPerDay    int64     `json:"bytes_per_day,omitempty"`    // 0: no limit
	DayBytes       uint64    `json:"day_bytes"`                  // sent today (UTC)
	Held           string    `json:"held,omitempty"`             // why what is not urgent waits now: bytes_per_day, window; "": it does not
	HeldUntil      time.Time `json:"held_until,omitzero"`
}

// budget says whether a lane may send now. Only Run's goroutine uses it. A nil one allows everything.
//
// A second's limit is a bucket of tokens, filled by the clock that never goes back, half a second deep. A send is charged with what it will take on the wire
// as far as that is known before; what the meter shows beyond that is charged when it shows.
type budget struct {
	Budget
	log    *slog.Logger
	name   string
	meter  *Meter // nil: nobody feeds one, what is charged counts as sent
	wall   func() time.Time
	synced func() bool
	store  UsageStore // nil: none

	tokens float64
	at     time.Duration // of tokens
	seen   uint64        // of the meter
	lead   int           // charged, and not yet on the meter

	usage   Usage
	begun   time.Duration // when this process began to count usage
	saved   Usage
	savedAt time.Duration

	windows []cron.Schedule
	// The answer about windows holds for wall times from..to.
	open     bool
	from, to time.Time

	held  string
	until time.Time
}

// framing is what a PUBLISH has around topic and payload, which have size bytes (MQTT 3.1.1 §2.2.3, §3.3).
func framing(size int) int {
	n := 6
	for length := size + 4; length > 0x7f; length >>= 7 {
		n++
	}
	return n
}

func newBudget(c Config, meter *Meter, metered bool, log *slog.Logger) (*budget, error) {
	b := &budget{Budget: c.Budget, log: log, name: c.Name, wall: c.Tuning.Now, synced: c.Tuning.Synced}
	if metered {
		b.meter = meter
	}
	for _, w := range c.Budget.Windows {
		s, err := parseCron(w.Cron)
		if err != nil {
			return nil, err
		}
		b.windows = append(b.windows, s)
	}
	b.tokens = b.depth()
	return b, nil
}

// depth is how much may be sent at once after a pause.
func (b *budget) depth() float64 { return float64(b.BytesPerSecond) / 2 }

// start takes what an earlier process sent today.
func (b *budget) start(now time.Duration) {
	b.at, b.begun, b.seen = now, now, b.meter.Total()
	b.usage.Day = dayOf(b.wall())
	if b.store == nil {
		return
	}
	u, err := b.store.Load()
	if err != nil {
		b.log.Error("bytes sent today are not known, they are counted anew", "upstream", b.name, "err", err)
		return
	}
	if u != (Usage{}) {
		b.usage, b.saved = u, u
	}
}

func dayOf(t time.Time) int64 {
	s := t.Unix()
	if s < 0 {
		return 0
	}
	return s / (24 * 60 * 60)
}

// look brings everything up to now. idle: nothing is in flight, so what was charged has been written.
func (b *budget) look(now time.Duration, idle bool) {
	if b.BytesPerSecond > 0 {
		b.tokens = min(b.tokens+float64(b.BytesPerSecond)*(now-b.at).Seconds(), b.depth())
	}
	b.at = now
	if b.meter != nil {
		total := b.meter.Total()
		n := int(total - b.seen)
		b.seen = total
		b.usage.Bytes += uint64(n)
		known := min(n, b.lead)
		b.lead -= known
		b.tokens -= float64(n - known)
	}
	if idle {
		b.tokens = min(b.tokens+float64(b.lead), max(b.depth(), b.tokens))
		b.lead = 0
	}
	b.turnDay(now)
	b.lookAtWindows()
	b.save(now, time.Second)
	b.judge()
}

// turnDay begins a new count when a day has begun. A clock that is wrong must neither lock the link for good nor give it
// a budget again and again:
//   - What a clock says that is not set right is believed only if it is later, as it is on a box that has no other clock.
//   - A clock that was set back over a midnight is still in the day that is counted.
//   - No day has more than 24 hours: after 25 a count ends in any case.
func (b *budget) turnDay(now time.Duration) {
	today := dayOf(b.wall())
	switch back := b.usage.Day - today; {
	case back < 0:
	case back > 1 && b.synced():
	case now-b.begun >= 25*time.Hour:
	default:
		return
	}
	b.usage, b.begun = Usage{Day: today}, now
}

// save keeps the count, if it has changed, at most so often.
func (b *budget) save(now, every time.Duration) {
	if b.store == nil || b.usage == b.saved || now-b.savedAt < every {
		return
	}
	b.savedAt = now
	if err := b.store.Save(b.usage); err != nil {
		b.log.Warn("bytes sent today are not kept", "upstream", b.name, "err", err) // the store says more, and ends the process
		b.store = nil
		return
	}
	b.saved = b.usage
}

func (b *budget) lookAtWindows() {
	if len(b.windows) == 0 {
		b.open = true
		return
	}
	t := b.wall()
	if !t.Before(b.from) && t.Before(b.to) {
		return
	}
	b.from = t
	b.open, b.to = openAt(b.windows, b.Windows, t)
}

// openAt tells whether a window is open at t, and until when that answer holds at least.
func openAt(starts []cron.Schedule, windows []TimeWindow, t time.Time) (open bool, until time.Time) {
	end := t
	for grown := 0; grown < 64; grown++ { // windows that touch are one; enough of them are looked at again later
		before := end
		for i, s := range starts {
			if at := s.Next(end.Add(-windows[i].For)); !at.IsZero() && !at.After(end) {
				end = later(end, at.Add(windows[i].For))
			}
		}
		if end.Equal(before) {
			break
		}
	}
	if end.After(t) {
		return true, end
	}
	for _, s := range starts {
		if at := s.Next(t); !at.IsZero() && (until.IsZero() || at.Before(until)) {
			until = at
		}
	}
	if until.IsZero() {
		until = t.Add(24 * time.Hour)
	}
	return false, until
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// judge says why messages wait, and logs when that changes.
func (b *budget) judge() {
	held, until := "", time.Time{}
	switch {
	case !b.open:
		held, until = HeldByWindow, b.to
	case b.BytesPerDay > 0 && b.usage.Bytes+uint64(b.lead) >= uint64(b.BytesPerDay):
		held, until = HeldByDay, time.Unix((b.usage.Day+1)*24*60*60, 0)
	}
	changed := held != b.held
	was := b.held
	b.held, b.until = held, until.UTC()
	if until.IsZero() {
		b.until = time.Time{}
	}
	if !changed {
		return
	}
	switch held {
	case HeldByDay:
		b.log.Warn("budget of the day is used up, only urgent lanes flow", "upstream", b.name, "day_bytes", b.usage.Bytes,
			"bytes_per_day", b.BytesPerDay, "until", b.until)
	case HeldByWindow:
		b.log.Info("window is closed, only urgent lanes flow", "upstream", b.name, "until", b.until)
	default:
		b.log.Info("all lanes flow again", "upstream", b.name, "held_by", was)
	}
}

// allows tells whether a lane may send now, as of the last look.
func (b *budget) allows(urgent bool) bool {
	return b == nil || urgent || b.held == "" && (b.BytesPerSecond == 0 || b.tokens > 0)
}

// dry is how long until there are tokens again; 0: there are, or it is not for want of them that a lane waits.
func (b *budget) dry() time.Duration {
	if b == nil || b.BytesPerSecond == 0 || b.tokens > 0 || b.held != "" {
		return 0
	}
	return time.Duration((1-b.tokens)/float64(b.BytesPerSecond)*float64(time.Second)) + time.Millisecond
}

// portion is how many of want bytes may go in one send.
func (b *budget) portion(want int) int {
	if b == nil || b.BytesPerSecond == 0 {
		return want
	}
	return max(min(want, int(b.depth())), 1)
}

// charge books a send of size bytes.
func (b *budget) charge(size int) {
	if b == nil {
		return
	}
	size += framing(size)
	b.tokens -= float64(size)
	if b.meter != nil {
		b.lead += size
	} else {
		b.usage.Bytes += uint64(size)
	}
}

// lost forgets what was charged and never written: the connection has ended.
func (b *budget) lost() {
	if b != nil {
		b.lead = 0
	}
}

func (b *budget) status() BudgetStatus {
	return BudgetStatus{
		BytesPerSecond: b.BytesPerSecond, BytesPerDay: b.BytesPerDay, DayBytes: b.usage.Bytes, Held: b.held, HeldUntil: b.until,
	}
}

// zero tells whether nothing is bounded.
func (b *Budget) zero() bool {
	return b.BytesPerSecond == 0 && b.BytesPerDay == 0 && len(b.Windows) == 0
}

// KeepUsage has the bytes of the day kept in store. Call it before Run.
func (b *Bridge) KeepUsage(store UsageStore) {
	if b.budget != nil && b.budget.BytesPerDay > 0 {
		b.budget.store = store
	}
}

// Meter counts what goes out to the upstream, for other connections there to add theirs.
func (b *Bridge) Meter() *Meter { return b.meter }

func (b *Bridge) openBudget() {
	if b.budget != nil {
		b.budget.start(b.now())
		b.lookAtBudget(b.now())
	}
}

func (b *Bridge) closeBudget() {
	if b.budget != nil {
		b.budget.look(b.now(), false)
		b.budget.save(b.now(), 0)
	}
}

// lookAtBudget brings the budget up to now, and what is shown of it.
func (b *Bridge) lookAtBudget(now time.Duration) {
	if b.budget == nil {
		return
	}
	b.budget.look(now, b.window.sends == 0)
	s := b.budget.status()
	if s.Held == b.shown.Held && now-b.shownAt < time.Second/4 {
		return // bytes rise with each send
	}
	b.shown, b.shownAt = s, now
	b.metrics.dayBytes.Set(float64(s.DayBytes))
	b.metrics.heldBy(s.Held)
	b.setState(func(st *Status) { st.Budget = &s })
}
