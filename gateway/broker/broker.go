package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// Broker is an MQTT broker. New restores the sessions, Listen binds, Run serves.
type Broker struct {
	cfg      Config
	store    *kv.Store
	clock    *clock.Clock
	intake   Intake
	auth     Authorizer
	watcher  Watcher // nil: none
	log      *slog.Logger
	m        *metrics
	server   *mochi.Server // the index of subscriptions; see doc.go
	subs     subscriptions
	taps     taps
	retained retained
	fan      *fanout
	sockets  []*socket
	notices  noticeLimit

	queuedBytes atomic.Int64 // of the messages in queues and flights of all sessions
	flyingBytes atomic.Int64 // of those in flights
	noRoomUntil time.Time    // when pushOut looks again; only the fan-out touches it
	noRoomFor   int          // and for how short queues it found none; as noRoomUntil
	writing     atomic.Int64 // bytes that peers are to take
	reading     atomic.Int64 // bytes of read buffers
	relief      sync.Mutex   // held by whoever looks for slow peers

	stop   chan struct{}  // closed when Run begins to stop
	wg     sync.WaitGroup // accept loops, connections, flushes, timers that fired
	places *places        // of TLS handshakes that compute

	connMu     sync.Mutex // guards what follows
	conns      map[*conn]struct{}
	byAddr     map[netip.Addr]int
	byListener map[*Listener]int
	connecting map[string][]*conn // in CONNECT, by client id
	stopping   bool               // nothing new begins

	roomMu   sync.Mutex   // makes makeRoom one after the other; before session.life
	sessMu   sync.RWMutex // guards sessions
	sessions map[string]*session

	touchMu  sync.Mutex // guards what follows
	touched  []*conn    // with answers in out that nobody writes yet
	spare    []*conn
	backstop *time.Timer
}

// New makes a broker and restores its sessions, retained messages and wills from store. It
// binds nothing and starts nothing. Call it before store has traffic. watcher may be nil.
func New(cfg Config, store *kv.Store, intake Intake, auth Authorizer, watcher Watcher, log *slog.Logger, metrics prometheus.Registerer) (*Broker, error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	b := &Broker{
		cfg: cfg, store: store, intake: intake, auth: auth, watcher: watcher, log: log,
		fan:        newFanout(cfg.MaxFanoutBytes),
		stop:       make(chan struct{}),
		conns:      map[*conn]struct{}{},
		byAddr:     map[netip.Addr]int{},
		byListener: map[*Listener]int{},
		connecting: map[string][]*conn{},
		places:     newPlaces(),
		sessions:   map[string]*session{},
	}
	b.retained = retained{most: cfg.MaxRetained, mostBytes: cfg.MaxRetainedBytes, pending: map[string]int{}}
	b.m = newMetrics(b, metrics)
	b.backstop = time.AfterFunc(time.Hour, b.flushTouched)
	b.backstop.Stop()

	capabilities := mochi.NewDefaultServerCapabilities()
	capabilities.MaximumClientWritesPending = 0 // it sends no messages: no queue for them
	capabilities.MaximumInflight = 1
	capabilities.TopicAliasMaximum = 0
	b.server = mochi.New(&mochi.Options{
		Capabilities: capabilities,
		Logger:       slog.New(slog.DiscardHandler), // it logs whole packets
	})
	if err := b.server.AddHook(&hook{}, nil); err != nil {
		return nil, fmt.Errorf("broker: %w", err)
	}
	if b.clock = cfg.Clock; b.clock == nil {
		var err error
		if b.clock, err = clock.Open(store, clock.Config{Log: log}); err != nil {
			return nil, fmt.Errorf("broker: %w", err)
		}
	}
	if err := b.restore(); err != nil {
		return nil, fmt.Errorf("broker: restore sessions: %w", err)
	}
	store.OnGroup(b.flushTouched)
	return b, nil
}

// Listen binds every listener. After an error none is bound.
func (b *Broker) Listen() error {
	for i := range b.cfg.Listeners {
		s, err := b.cfg.Listeners[i].bind(b.cfg.SilenceTimeout, b.clock.Time)
		if err != nil {
			b.closeSockets()
			return err
		}
		b.sockets = append(b.sockets, s)
		if s.vault != nil {
			b.tellLoaded(s.vault)
		}
	}
	return nil
}

// Addrs gives the addresses that Listen bound, in the order of the configuration.
func (b *Broker) Addrs() []net.Addr {
	addrs := make([]net.Addr, len(b.sockets))
	for i, s := range b.sockets {
		addrs[i] = s.ln.Addr()
	}
	return addrs
}

func (b *Broker) closeSockets() {
	for _, s := range b.sockets {
		s.ln.Close()
	}
	b.sockets = nil
}

// Close frees what Listen bound. It is for a broker whose Run was never called.
func (b *Broker) Close() error {
	b.closeSockets()
	return nil
}

const purgeEvery = time.Minute

// Run serves until ctx ends. Then it takes no connections and no publishes any more, waits for
// what is handed in to commit and be acknowledged, disconnects (MQTT 5: 0x8B), and joins what
// it started. Wills are not published: a gateway that stops is no death of its devices.
func (b *Broker) Run(ctx context.Context) error {
	var workers sync.WaitGroup
	workers.Go(func() { b.fan.run(newDeliverer(b).guarded) })
	b.startTimers()
	secure := false
	for _, s := range b.sockets {
		b.wg.Add(1)
		go b.accept(s)
		secure = secure || s.vault != nil
	}
	if secure {
		workers.Go(b.watchTLS)
	}
	purge := time.NewTicker(purgeEvery)
	defer purge.Stop()
	for run := true; run; {
		select {
		case <-ctx.Done():
			run = false
		case <-purge.C:
			b.fan.push(task{purge: true})
		}
	}

	b.connMu.Lock()
	b.stopping = true
	close(b.stop)
	conns := slices.Collect(maps.Keys(b.conns))
	b.connMu.Unlock()
	for _, s := range b.sockets {
		s.ln.Close()
	}
	for _, c := range conns {
		c.halt()
	}
	err := b.join(conns)
	b.fan.close()
	workers.Wait()
	b.stopTimers()
	b.backstop.Stop()
	return err
}

// join waits for the connections, and closes those that do not end in time.
func (b *Broker) join(conns []*conn) error {
	done := make(chan struct{})
	go func() {
		b.wg.Wait()
		close(done)
	}()
	// What waits for fan-out in reserve ends with it; conn.drain has a limit of its own.
	for _, limit := range []time.Duration{b.cfg.ShutdownTimeout + closeIn, closeIn} {
		t := time.NewTimer(limit)
		select {
		case <-done:
			t.Stop()
			return nil
		case <-t.C:
		}
		for _, c := range conns {
			c.end(errStopping)
			c.sock.Close()
		}
	}
	return errors.New("broker: connections still wait for the store")
}

func (b *Broker) stopped() bool {
	select {
	case <-b.stop:
		return true
	default:
		return false
	}
}

// enter counts work that a timer began, unless the broker stops. wg.Done ends it.
func (b *Broker) enter() bool {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	if b.stopping {
		return false
	}
	b.wg.Add(1)
	return true
}

// touch has c flushed after the group of commits that is being completed. Who completes
// commits outside of the store's groups is seen to by the backstop.
func (b *Broker) touch(c *conn) {
	b.touchMu.Lock()
	b.touched = append(b.touched, c)
	if len(b.touched) == 1 {
		b.backstop.Reset(time.Millisecond)
	}
	b.touchMu.Unlock()
}

// flushTouched starts a flush for each connection that got answers: one write each, however
// many they are.
func (b *Broker) flushTouched() {
	b.touchMu.Lock()
	list := b.touched
	b.touched, b.spare = b.spare[:0], nil
	if len(list) > 0 {
		b.backstop.Stop()
	}
	b.touchMu.Unlock()
	for i, c := range list {
		c.mu.Lock()
		c.touched = false
		c.startFlushLocked()
		c.mu.Unlock()
		list[i] = nil
	}
	b.touchMu.Lock()
	if b.spare == nil {
		b.spare = list[:0]
	}
	b.touchMu.Unlock()
}

// relieve ends who takes nothing of what is written to him, when that comes to too much in all.
func (b *Broker) relieve() {
	if !b.relief.TryLock() {
		return
	}
	defer b.relief.Unlock()
	var slow []*conn
	b.connMu.Lock()
	for c := range b.conns {
		if from := c.writeFrom.Load(); from > 0 && time.Since(c.opened)-time.Duration(from) > asleep {
			slow = append(slow, c)
		}
	}
	b.connMu.Unlock()
	for _, c := range slow {
		c.end(errSlow)
	}
}

func (b *Broker) connections() int {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	return len(b.conns)
}

func (b *Broker) sessionCount() int {
	b.sessMu.RLock()
	defer b.sessMu.RUnlock()
	return len(b.sessions)
}

// Stats is the broker at one moment.
type Stats struct {
	Connections   int `json:"connections"` // open ones, those without a CONNECT included
	Sessions      int `json:"sessions"`    // of connected and of offline clients
	Subscriptions int `json:"subscriptions"`
	Retained      int `json:"retained"`
	RetainedBytes int `json:"retained_bytes"`
}

// AckSeconds is how long acknowledgements took, of those that are measured: how many took at most as long as each bound, and longer than the
// one before; the last count has no bound.
func (b *Broker) AckSeconds() (bounds []float64, counts []uint64) {
	var m dto.Metric
	if b.m.ackSeconds.Write(&m) != nil {
		return nil, nil // it never fails
	}
	h := m.GetHistogram()
	before := uint64(0)
	for _, k := range h.GetBucket() {
		bounds = append(bounds, k.GetUpperBound())
		counts = append(counts, k.GetCumulativeCount()-before)
		before = k.GetCumulativeCount()
	}
	return bounds, append(counts, h.GetSampleCount()-before)
}

// Stats may be called at any time.
func (b *Broker) Stats() Stats {
	s := Stats{Connections: b.connections(), Sessions: b.sessionCount(), Subscriptions: int(b.subs.count.Load())}
	s.Retained, s.RetainedBytes = b.retained.stats()
	return s
}

func (b *Broker) announce(topic []byte, payload int) bool {
	if b.retained.announce(topic, payload) {
		return true
	}
	b.m.notRetained.Inc()
	return false
}

// takeBack undoes what was done for a message that is not handed in; nil is fine.
func (b *Broker) takeBack(m *message) {
	if m != nil && m.keep {
		b.retained.withdraw(m.topic)
	}
	b.fan.free(m)
}

// noticeLimit lets a few lines a second through, so that a hostile or broken peer can not fill
// the log; the metrics count all.
type noticeLimit struct {
	mu    sync.Mutex // guards what follows
	since time.Time
	n     int
}

const noticesPerSecond = 5

func (l *noticeLimit) allow() bool {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= time.Second {
		l.since, l.n = now, 0
	}
	l.n++
	return l.n <= noticesPerSecond
}

// noticeLevel gives the level at which what happened to a client is logged: Info for the first
// few each second, else Debug. That a device comes and goes is Debug.
func (b *Broker) noticeLevel(err error) slog.Level {
	switch {
	case errors.Is(err, errGoodbye), errors.Is(err, errStopping), errors.Is(err, errEnded), isEOF(err), isReset(err), !b.notices.allow():
		return slog.LevelDebug
	}
	return slog.LevelInfo
}
