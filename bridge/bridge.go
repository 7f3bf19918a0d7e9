package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/bridge/wire"
	"holdfast/spool"
)

// Bridge drains one spool to one upstream. Make it with New, then call Run once.
type Bridge struct {
	cfg     Config
	gateway string
	// epochOf tells the epoch of a message, and the sequences around it that have the same; see spool.Spool.EpochOf.
	epochOf  func(lane string, seq uint64) (epoch string, first, end uint64)
	source   Source
	upstream Upstream
	log      *slog.Logger
	metrics  *metrics

	inbox  inbox
	counts counts
	meter  *Meter
	onLink func(up bool, reason string)
	onSent func(*Sent) // nil: nobody wants to know

	mu     sync.Mutex
	status Status // guarded by mu; the counters in it are filled in by Status

	// Only Run touches what follows.
	start     time.Time
	lanes     []*lane // a lane that drains live_first is two here
	ranks     int     // how many lanes there are
	laneCount []laneCounters
	window    *window
	turns     *schedule
	pace      *pace
	backoff   *backoff
	suspicion suspicion
	budget    *budget // nil: none
	route     route
	shown     BudgetStatus
	shownAt   time.Duration
	batch     *wire.BatchEncoder
	scratch   []byte
	record    spool.Record // parsed into again and again

	topics, deviceTopics, systemTopics topics
	acks                               []ack
	lastAck                            time.Duration     // when the last ack of this session came
	newestAcked                        uint64            // order number of the newest send that was acked
	quiet                              map[string]string // by address: the error that was logged last and has not changed
}

// counts are read by Status while Run works.
type counts struct {
	sends, messages, bytes, acked, expired, parked atomic.Uint64
	inFlight, lastAckMS                            atomic.Int64
}

// New makes a bridge from a spool to an upstream: it checks cfg, takes a consumer of the
// spool and starts nothing. gateway is the gateway's id. metrics may be nil.
func New(cfg Config, gateway string, sp *spool.Spool, up Upstream, log *slog.Logger, metrics prometheus.Registerer) (*Bridge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("upstream %q: %w", cfg.Name, err)
	}
	c, err := sp.Consumer(cfg.Name, cfg.Lanes)
	if err != nil {
		return nil, fmt.Errorf("upstream %q: %w", cfg.Name, err)
	}
	if cfg.Tuning.Now == nil {
		cfg.Tuning.Now = sp.Time
	}
	b, err := NewFrom(cfg, gateway, sp.Epoch(), consumer{c}, up, log, metrics)
	if err != nil {
		c.Close()
		return nil, err
	}
	b.epochOf = sp.EpochOf
	return b, nil
}

// OnLink has fn told each time that the link has come up, and each time that it was lost, with why. Call it before Run. fn must
// not block.
func (b *Bridge) OnLink(fn func(up bool, reason string)) { b.onLink = fn }

// Sent is a send that has ended.
type Sent struct {
	Lane      string
	First     uint64 // sequence of its first message
	Records   int
	At, Ended time.Time
	Err       error // nil: the upstream has acknowledged it; else it refuses it for good
}

// OnSent has fn told of each send that was acknowledged, or refused for good. Call it before Run. fn must not block, nor keep what it gets.
func (b *Bridge) OnSent(fn func(*Sent)) { b.onSent = fn }

func (b *Bridge) tellSent(i int, f *flight, now time.Duration, err error) {
	if b.onSent == nil {
		return
	}
	b.onSent(&Sent{
		Lane: b.lanes[i].name, First: f.end.Seq - uint64(f.records), Records: f.records, At: b.start.Add(f.sent), Ended: b.start.Add(now), Err: err,
	})
}

// consumer makes a Source of a spool's consumer.
type consumer struct{ *spool.Consumer }

func (c consumer) Readers() []Reader {
	lanes := c.Lanes()
	rs := make([]Reader, len(lanes))
	for i, l := range lanes {
		rs[i] = l
	}
	return rs
}

// NewFrom is New with any source, which the bridge closes when Run returns.
func NewFrom(cfg Config, gateway, epoch string, src Source, up Upstream, log *slog.Logger, registerer prometheus.Registerer) (*Bridge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("upstream %q: %w", cfg.Name, err)
	}
	meter := new(Meter)
	m, err := newMetrics(registerer, cfg.Name, meter)
	if err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	readers := src.Readers()
	b := &Bridge{
		cfg: cfg, gateway: gateway, source: src, upstream: up, log: log, metrics: m, meter: meter,
		epochOf:      func(string, uint64) (string, uint64, uint64) { return epoch, 0, math.MaxUint64 },
		inbox:        inbox{ring: make(chan struct{}, 1)},
		onLink:       func(bool, string) {},
		window:       newWindow(len(readers)),
		pace:         newPace(cfg.Tuning.InFlightBytes),
		backoff:      newBackoff(cfg.Tuning.BackoffMin, cfg.Tuning.BackoffMax),
		suspicion:    suspicion{limit: cfg.Tuning.Kicks},
		route:        newRoute(cfg, up),
		topics:       newTopics(func(t string) string { return cfg.TopicPrefix + t }),
		deviceTopics: newTopics(func(d string) string { return wire.MessageTopic(gateway, d) }),
		systemTopics: newTopics(func(t string) string { return t }),
		status:       Status{Name: cfg.Name, URL: cfg.Addresses()[0], Format: cfg.Format, State: StateStopped},
	}
	metered, ok := up.(Metered)
	if ok {
		metered.Meter(b.meter)
	}
	if !cfg.Budget.zero() {
		if b.budget, err = newBudget(cfg, b.meter, ok, log); err != nil {
			return nil, fmt.Errorf("upstream %q: budget: %w", cfg.Name, err)
		}
	}
	shares, backfill := make([]int, len(readers)), make([]int, len(readers))
	for i, r := range readers {
		l := &lane{
			Reader: r, name: r.Lane(), index: i, rank: b.ranks, urgent: r.Urgent(), format: cfg.Format, ratio: 1,
			topic: wire.DataTopic(gateway, r.Lane()),
		}
		if backfill[i] = r.Backfill(); backfill[i] > 0 {
			l.backlog = true
			l.rank--
		} else {
			b.ranks++
		}
		if shares[i] = r.Share(); l.name == spool.SystemLane {
			l.format = FormatPassthrough // announcements are for anyone to read
			shares[i] = 0                // it goes first and is promised nothing
		}
		b.lanes = append(b.lanes, l)
		b.laneCount = append(b.laneCount, m.lane(l.name))
	}
	for _, l := range b.lanes {
		l.linger = cfg.Tuning.BatchLinger * time.Duration(l.rank) / time.Duration(max(b.ranks-1, 1))
		l.lastSend = -l.linger
	}
	b.turns = newSchedule(shares, backfill)
	if cfg.Format == FormatBatch {
		b.batch = wire.NewBatchEncoder()
	}
	return b, nil
}

// errStopped ends a session because Run was asked to stop.
var errStopped = errors.New("stopped")

// Run keeps a link to the upstream and drains the spool into it until ctx ends. Then it takes nothing
// new, waits for open acks until DrainTimeout, says goodbye and returns nil. An error means that the spool
// cannot be read.
func (b *Bridge) Run(ctx context.Context) error {
	defer b.metrics.unregister()
	defer b.source.Close()
	defer b.setState(func(s *Status) { s.State, s.RetryAt = StateStopped, time.Time{} })
	b.start = time.Now()
	b.openBudget()
	defer b.closeBudget()
	b.setState(func(s *Status) { s.Since = b.start })
	for ctx.Err() == nil {
		b.setState(func(s *Status) { s.State, s.RetryAt, s.URL = StateConnecting, time.Time{}, b.route.url() })
		b.metrics.attempts.Inc()
		sess, err := b.dial(ctx)
		var healthy time.Duration
		if err == nil {
			healthy, err = b.session(ctx, sess)
			if errors.Is(err, errStopped) {
				return nil
			}
			if errors.Is(err, errMoved) {
				b.route.move()
				continue
			}
			var broken *sourceError
			if errors.As(err, &broken) {
				return fmt.Errorf("upstream %q: %w", b.cfg.Name, broken.err)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		b.pause(ctx, err, sess != nil, healthy)
	}
	return nil
}

// sourceError is an error of the spool, not of the link.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

func (b *Bridge) dial(ctx context.Context) (Session, error) {
	d := b.cfg.Tuning.ConnectTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, d, fmt.Errorf("%w: no answer within %v", ErrStalled, d))
	defer cancel()
	return b.upstream.Dial(ctx, b.inbox.put)
}

// pause waits for the next attempt.
func (b *Bridge) pause(ctx context.Context, err error, dialled bool, healthy time.Duration) {
	b.lookAtBudget(b.now())
	lost := b.route.url()
	well := b.backoff.well(healthy)
	var d time.Duration
	if b.route.lost(well) {
		b.backoff.again()
	} else {
		d = b.backoff.next(healthy)
	}
	attempt := b.backoff.attempts
	b.metrics.losses.WithLabelValues(lossReason(err, dialled)).Inc()
	b.setState(func(s *Status) {
		s.State, s.RetryAt, s.Attempts, s.LastError = StateWaiting, time.Now().Add(d), attempt, err.Error()
	})
	attrs := []any{
		"upstream", b.cfg.Name, "url", redacted(lost), "reason", lossReason(err, dialled), "err", err,
		"attempt", attempt, "retry_in_ms", d.Milliseconds(),
	}
	// An upstream that stays away is told once, and again when the reason changes.
	switch {
	case dialled:
		b.log.Warn("upstream lost", attrs...)
	case !b.told(lost, err):
		b.log.Warn("upstream not reachable", attrs...)
	default:
		b.log.Debug("upstream still not reachable", attrs...)
	}
	b.tell(lost, err, dialled)
	if d == 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// told tells whether an address' error is the one that was logged last.
func (b *Bridge) told(url string, err error) bool { return b.quiet[url] == err.Error() }

// tell notes what was logged of an address. A link that had come up makes all errors new.
func (b *Bridge) tell(url string, err error, dialled bool) {
	if dialled || b.quiet == nil {
		b.quiet = map[string]string{}
	}
	if !dialled {
		b.quiet[url] = err.Error()
	}
}

func redacted(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	return u.Redacted()
}

// session drains the spool into one session until that ends, and takes back all that was not acked. It
// returns how long the link made progress.
func (b *Bridge) session(ctx context.Context, sess Session) (healthy time.Duration, err error) {
	began := time.Now()
	b.setState(func(s *Status) { s.State, s.Connected, s.Since = StateConnected, true, began })
	b.route.arrived(b.now())
	b.metrics.up.Set(1)
	b.log.Info("upstream connected", "upstream", b.cfg.Name, "url", redacted(b.route.url()), "attempt", b.backoff.attempts+1)
	b.onLink(true, "")
	b.pace.restart()
	b.lastAck = 0
	since := b.now()

	err = b.drain(ctx, sess)
	b.route.end()

	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	if !errors.Is(err, errStopped) && !errors.Is(err, errMoved) || b.window.oldest() != 0 {
		cancel() // cut: who does not ack will not hear a goodbye
	}
	sess.Close(closing)
	cancel()
	// Acks that came until now still count; what comes later finds nothing that it names.
	var broken *sourceError
	if ackErr := b.takeAcks(); errors.As(ackErr, &broken) {
		err = ackErr
	}
	b.metrics.up.Set(0)
	b.setState(func(s *Status) { s.Connected, s.Since = false, time.Now() })
	b.onLink(false, err.Error())

	switch {
	case b.window.oldest() == 0:
		healthy = b.now() - since // nothing left undone
	case b.lastAck > since:
		healthy = b.lastAck - since
	}
	if errors.Is(err, ErrPeerClosed) {
		b.kicked(since)
	}
	b.takeBack()
	b.budget.lost()
	return healthy, err
}

// takeBack makes all that is in flight unsent.
func (b *Bridge) takeBack() {
	for i, l := range b.lanes {
		b.window.reset(i)
		l.rewind()
	}
	b.counted()
}

// kicked notes which send an upstream left unacked when it ended the connection, which it had since then. Of a backlog only
// its own acks count: the newest messages beside it are acked in every session, whatever stands at its front.
func (b *Bridge) kicked(since time.Duration) {
	f, lane := b.window.head()
	if f == nil {
		return
	}
	sent := make([]uint64, len(b.lanes))
	for i, l := range b.lanes {
		sent[i] = l.sentUpTo
	}
	alone := b.suspicion.probing()
	acked := b.lastAck > since
	if l := b.lanes[lane]; l.backlog {
		acked = l.lastAck > since
	}
	b.suspicion.kicked(lane, f.end.Seq-uint64(f.records), acked, sent)
	if alone {
		l := b.lanes[lane]
		l.singleTo = max(l.singleTo, f.end.Seq)
	}
}

// probe ends the suspicion when all that was under it is through.
func (b *Bridge) probe() {
	if !b.suspicion.probing() || b.window.sends > 0 {
		return
	}
	for i, l := range b.lanes {
		if l.count > 0 && b.suspicion.suspects(i, l.pos.Seq) {
			return
		}
	}
	b.suspicion.clear()
}

// convict parks the record at the front of a lane's stage.
func (b *Bridge) convict(l *lane) piece {
	kicks := b.suspicion.kicks
	b.suspicion.kicks = 0
	n, err := spool.ParseRecord(l.raw, &b.record)
	if err != nil {
		n = len(l.raw)
	}
	record := append([]byte(nil), l.raw[:n]...)
	b.log.Error("message parked: the upstream ends the connection whenever it gets it", "upstream", b.cfg.Name,
		"lane", l.name, "seq", l.pos.Seq, "size_bytes", n, "times", kicks)
	f := l.take(n, 1)
	f.record = record
	f.reason = fmt.Sprintf("the upstream ended the connection each of the %d times it was sent this message", kicks)
	return piece{flight: f, outcome: spool.Parked}
}

// drain moves records until the session ends or Run is to stop; then it waits for open acks.
func (b *Bridge) drain(ctx context.Context, sess Session) error {
	tick := time.NewTicker(clamp(b.cfg.Tuning.AckTimeout/16, 5*time.Millisecond, time.Second))
	defer tick.Stop()
	linger := time.NewTimer(time.Hour)
	defer linger.Stop()
	var dog watchdog
	stop, leaving := ctx.Done(), errStopped
	var giveUp <-chan time.Time
	for {
		if err := b.takeAcks(); err != nil {
			return err
		}
		var collect time.Duration
		if stop != nil {
			var err error
			if collect, err = b.pump(sess); err != nil {
				return err
			}
		} else if b.window.oldest() == 0 {
			return leaving
		}
		b.counted()
		linger.Stop()
		if collect > 0 {
			linger.Reset(collect)
		}
		select {
		case <-b.inbox.ring:
		case <-b.source.Ready():
			b.wake()
		case <-linger.C:
		case <-tick.C:
			b.metrics.window.Set(float64(b.pace.limit))
			b.route.look(ctx, b.now(), b.cfg.Tuning.ConnectTimeout)
			patience := b.cfg.Tuning.AckTimeout + b.pace.patience(b.window.bytes)
			if dog.stalled(b.now(), b.window.oldest(), b.newestAcked, sess.Progress(), patience) {
				return fmt.Errorf("%w for %v with %d sends unacked", ErrStalled, patience.Round(time.Millisecond), b.window.sends)
			}
		case <-sess.Done():
			if err := sess.Err(); err != nil {
				return err
			}
			return ErrPeerClosed
		case p := <-b.route.probes:
			if b.route.answered(p, b.now()) && stop != nil {
				b.log.Info("upstream moves", "upstream", b.cfg.Name, "from", redacted(b.route.url()), "to", redacted(b.route.urls[p.i]))
				stop, leaving = nil, errMoved
				giveUp = time.After(b.cfg.Tuning.DrainTimeout)
			}
		case <-stop:
			stop = nil
			giveUp = time.After(b.cfg.Tuning.DrainTimeout)
		case <-giveUp:
			b.log.Info("stopped waiting for acks: the rest stays spooled", "upstream", b.cfg.Name, "in_flight", b.window.sends)
			return leaving
		}
	}
}

// wake lets every lane be asked again.
func (b *Bridge) wake() {
	for _, l := range b.lanes {
		l.dry = false
	}
}

// pump sends whatever is ready as long as the window has room. It returns how long until a lane that
// collects for a batch is ready; 0: nobody collects.
func (b *Bridge) pump(sess Session) (collect time.Duration, err error) {
	for {
		select {
		case <-b.source.Ready(): // an alarm may have come
			b.wake()
		default:
		}
		now := b.now()
		want := b.budget.portion(min(b.cfg.Tuning.BatchBytes, max(b.pace.limit/2, 1)))
		b.lookAtBudget(now)
		collect = b.budget.dry()
		for _, l := range b.lanes {
			if err := l.fill(b.rawBytes(l, want)); err != nil {
				return 0, &sourceError{err}
			}
			if left := b.lingers(l, want, now); left > 0 && (collect == 0 || left < collect) {
				collect = left
			}
		}
		b.probe()
		waiting := func(i int) bool {
			return b.lanes[i].count > 0 && b.budget.allows(b.lanes[i].urgent) && b.lingers(b.lanes[i], want, now) == 0
		}
		i := b.turns.pick(waiting, b.fits)
		if i < 0 {
			return collect, nil
		}
		l := b.lanes[i]
		p := b.cut(l, b.rawBytes(l, want))
		if !p.send {
			if err := b.pass(i, p); err != nil {
				return 0, err
			}
			continue
		}
		if err := b.send(sess, i, p, now, waiting); err != nil {
			return 0, err
		}
	}
}

// rawBytes is how many bytes of a lane's records make a send of at most want bytes.
func (b *Bridge) rawBytes(l *lane, want int) int {
	if l.format != FormatBatch {
		return readBytes
	}
	return clamp(int(float64(want)*l.ratio), 1, b.cfg.Tuning.BatchBytes)
}

// readBytes is how much is read at once where records are sent one by one.
const readBytes = 32 << 10

// lingers tells how long a lane still collects for a larger batch. A lane that has not sent for a
// while sends what it has at once.
func (b *Bridge) lingers(l *lane, want int, now time.Duration) time.Duration {
	if l.format != FormatBatch || l.count == 0 || l.left || l.held.Count > 0 || l.count >= b.cfg.Tuning.BatchRecords ||
		len(l.raw) >= b.rawBytes(l, want) {
		return 0
	}
	return max(l.lastSend+l.linger-now, 0)
}

// fits tells whether a lane may send now. One that is owed its share may use the whole window. A backlog that is owed
// nothing leaves a place for the next of the lane's newest messages, and puts half as many bytes before it on the
// link as may be in flight: enough to fill any link whose round trip is under a second.
func (b *Bridge) fits(i int, owed bool) bool {
	if b.suspicion.probing() {
		return b.window.sends == 0
	}
	rank := b.lanes[i].rank
	if owed {
		rank = 0
	}
	sends, bytes := room(b.cfg.Window, rank, b.ranks), room(b.pace.limit, rank, b.ranks)
	if b.lanes[i].backlog && !b.turns.owed(i) {
		sends, bytes = max(sends-max(sends/8, 1), 1), max(bytes/2, 1)
	}
	return b.window.sends < sends && b.window.bytes < bytes
}

func (b *Bridge) pass(i int, p piece) error {
	b.window.pass(i, p.flight, p.outcome)
	b.laneCount[i].passed(p.outcome, p.flight.records)
	switch p.outcome {
	case spool.Expired:
		b.counts.expired.Add(uint64(p.flight.records))
	case spool.Parked:
		b.counts.parked.Add(uint64(p.flight.records))
	case spool.Delivered, spool.Evicted, spool.Elsewhere:
	}
	return b.settle(i)
}

func (b *Bridge) send(sess Session, i int, p piece, now time.Duration, waiting func(int) bool) error {
	l, f := b.lanes[i], p.flight
	f.sent, f.ahead = now, b.window.bytes+f.size
	p.message.Token, p.message.Urgent = b.window.takeOff(i, f), l.urgent
	if err := sess.Send(p.message); err != nil {
		if !IsPermanent(err) {
			return err
		}
		if flight, _ := b.window.find(p.message.Token); flight != nil {
			return b.refused(i, flight, err)
		}
		return nil
	}
	b.budget.charge(f.size)
	l.lastSend = now
	l.sentUpTo = max(l.sentUpTo, f.end.Seq)
	b.turns.sent(i, f.size, waiting)
	c := &b.laneCount[i]
	c.sends.Inc()
	c.sent.Add(float64(f.records))
	c.sentBytes.Add(float64(f.size))
	b.counts.sends.Add(1)
	b.counts.messages.Add(uint64(f.records))
	b.counts.bytes.Add(uint64(f.size))
	return nil
}

// refused deals with a flight that the upstream will never take. A single record is parked. Of a
// batch nobody knows which record it was: the lane goes back, and sends what was in it one by one.
func (b *Bridge) refused(i int, f *flight, err error) error {
	l := b.lanes[i]
	if f.records > 1 {
		l.singleTo = max(l.singleTo, f.end.Seq)
		b.window.reset(i)
		l.rewind()
		return nil
	}
	b.log.Error("message parked: the upstream refuses it", "upstream", b.cfg.Name, "lane", l.name, "seq", f.end.Seq-1, "err", err)
	f.reason = err.Error()
	b.window.land(i, f, spool.Parked)
	b.counts.parked.Add(1)
	b.laneCount[i].parked.Inc()
	return b.settle(i)
}

// takeAcks lands what was acked and moves the cursors. An error ends the session.
func (b *Bridge) takeAcks() error {
	b.acks = b.inbox.take(b.acks)
	if len(b.acks) == 0 {
		return nil
	}
	now := b.now()
	var lost error
	for _, a := range b.acks {
		f, i := b.window.find(a.token)
		switch {
		case f == nil:
			b.metrics.stray.Inc()
		case a.err == nil:
			b.pace.acked(now-f.sent, f.size, f.ahead, f.order, b.window.order, b.window.bytes)
			b.metrics.latency.Observe((now - f.sent).Seconds())
			b.laneCount[i].acked.Add(float64(f.records))
			b.counts.acked.Add(uint64(f.records))
			b.tellSent(i, f, now, nil)
			b.window.land(i, f, spool.Delivered)
			b.lastAck, b.newestAcked = now, max(b.newestAcked, f.order)
			b.lanes[i].lastAck = now
		case IsPermanent(a.err):
			b.lastAck = now
			b.tellSent(i, f, now, a.err)
			if err := b.refused(i, f, a.err); err != nil {
				return err
			}
		case lost == nil:
			lost = fmt.Errorf("send not taken: %w", a.err)
		}
	}
	for i := range b.lanes {
		if err := b.settle(i); err != nil {
			return err
		}
	}
	b.counts.lastAckMS.Store(b.start.Add(b.lastAck).UnixMilli())
	return lost
}

// settle moves a lane's cursor over what has an outcome.
func (b *Bridge) settle(i int) error {
	l := b.lanes[i]
	var failed error
	b.window.settle(i, func(f *flight) {
		switch {
		case failed != nil: // what comes after would end it, too
		case f.outcome == spool.Parked:
			if err := l.Park(f.end, f.record, f.reason); err != nil {
				failed = &sourceError{fmt.Errorf("park in lane %s: %w", l.name, err)}
			}
		default:
			l.Resolve(f.end, f.outcome)
		}
	})
	return failed
}

func (b *Bridge) counted() {
	b.counts.inFlight.Store(int64(b.window.sends))
	b.metrics.inFlight.Set(float64(b.window.sends))
}

func (b *Bridge) setState(f func(*Status)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.status)
}

// now is the bridge's clock, which never goes back; wall is the one that messages carry.
func (b *Bridge) now() time.Duration { return time.Since(b.start) }
func (b *Bridge) wall() time.Time    { return b.cfg.Tuning.Now() }

func clamp[T int | time.Duration](v, lo, hi T) T { return max(min(v, hi), lo) }

// inbox is where acks wait for Run.
type inbox struct {
	mu   sync.Mutex
	acks []ack
	ring chan struct{} // has a token if acks is not empty
}

type ack struct {
	token uint64
	err   error
}

func (in *inbox) put(token uint64, err error) {
	in.mu.Lock()
	in.acks = append(in.acks, ack{token, err})
	first := len(in.acks) == 1
	in.mu.Unlock()
	if first {
		select {
		case in.ring <- struct{}{}:
		default:
		}
	}
}

// take returns what came, and takes the slice of the last time to fill it again.
func (in *inbox) take(used []ack) []ack {
	clear(used)
	in.mu.Lock()
	defer in.mu.Unlock()
	acks := in.acks
	in.acks = used[:0]
	return acks
}

// watchdog tells when a link is dead although nobody said so. It watches the oldest send without an
// ack: its time begins anew while bytes move, unless something sent after it has been acked, because then its own
// bytes have arrived long ago.
type watchdog struct {
	oldest   uint64
	moved    time.Duration // when it became the oldest, or bytes last moved
	progress uint64
}

// stalled is asked now and then. oldest and acked are the order numbers of the oldest send without an ack (0: none)
// and of the newest with one.
func (d *watchdog) stalled(now time.Duration, oldest, acked, progress uint64, patience time.Duration) bool {
	if oldest == 0 || oldest != d.oldest {
		*d = watchdog{oldest, now, progress}
		return false
	}
	if progress != d.progress && acked < oldest {
		d.moved, d.progress = now, progress
	}
	return now-d.moved > patience
}
