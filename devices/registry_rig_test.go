package devices_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"holdfast/devices"
	"holdfast/internal/kv"
)

// rows is a Journal on a real store that remembers what was told.
type rows struct {
	store *kv.Store

	mu     sync.Mutex
	events []devices.Event // durable ones, in order
	hold   chan struct{}   // not nil: completions wait until it is closed
}

type rowsDone func(error)

func (d rowsDone) Done(_, _ uint64, err error) { d(err) }

func (j *rows) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	return j.store.Apply(ops, rowsDone(func(err error) {
		j.mu.Lock()
		hold := j.hold
		if err == nil {
			j.events = append(j.events, events...)
		}
		j.mu.Unlock()
		if hold != nil {
			<-hold
		}
		done(err)
	}), 0)
}

// stall makes what is handed in from now on durable but not told, until the function returned is called.
func (j *rows) stall() (release func()) {
	hold := make(chan struct{})
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hold = hold
	return sync.OnceFunc(func() {
		j.mu.Lock()
		j.hold = nil
		j.mu.Unlock()
		close(hold)
	})
}

type kicked struct {
	Device, Reason string
	Forget         bool
}

// site is a registry on a store of its own.
type site struct {
	t       testing.TB
	fs      vfs.FS
	store   *kv.Store
	journal devices.Journal
	rows    *rows
	metrics *prometheus.Registry
	*devices.Registry
	peers atomic.Int64

	mu    sync.Mutex
	kicks []kicked
}

type siteOption func(*site, *devices.RegistryConfig)

func anonymously(_ *site, c *devices.RegistryConfig) { c.Anonymous = true }

func withRoles(roles ...devices.Role) siteOption {
	return func(_ *site, c *devices.RegistryConfig) { c.Roles = roles }
}

func onFS(fs vfs.FS) siteOption { return func(s *site, _ *devices.RegistryConfig) { s.fs = fs } }

func withClock(now func() time.Time) siteOption {
	return func(_ *site, c *devices.RegistryConfig) { c.Now = now }
}

// newSite opens a registry. It is closed with the test.
func newSite(t testing.TB, options ...siteOption) *site {
	t.Helper()
	s := &site{t: t, fs: vfs.NewMem(), metrics: prometheus.NewRegistry()}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	cfg := devices.RegistryConfig{Log: log, Metrics: s.metrics, Kick: func(device, reason string, forget bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.kicks = append(s.kicks, kicked{device, reason, forget})
	}}
	for _, o := range options {
		o(s, &cfg)
	}
	var err error
	if s.store, err = kv.Open("data", kv.Options{FS: s.fs, Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.store.Close() })
	s.rows = &rows{store: s.store}
	if s.journal == nil {
		s.journal = s.rows
	}
	cfg.Journal = s.journal
	if s.Registry, err = devices.OpenRegistry(s.store, cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// restart closes the store and opens it again.
func (s *site) restart(options ...siteOption) *site {
	s.t.Helper()
	if err := s.store.Close(); err != nil {
		s.t.Fatal(err)
	}
	return newSite(s.t, append([]siteOption{onFS(s.fs)}, options...)...)
}

// add registers a device and returns its secret.
func (s *site) add(d devices.NewDevice) string {
	s.t.Helper()
	_, secret, err := s.Add(s.t.Context(), d)
	if err != nil {
		s.t.Fatal(err)
	}
	return secret
}

// login tries to get in with a password, "" for none, from an address where nobody has failed yet.
func (s *site) login(device, password string) (*devices.Identity, error) {
	return s.loginFrom(address(int(s.peers.Add(1))), device, password)
}

func (s *site) loginFrom(addr netip.Addr, device, password string) (*devices.Identity, error) {
	return s.Authenticate(s.t.Context(), &devices.Attempt{Device: device, Password: []byte(password), Address: addr})
}

// address is one of many.
func address(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

// mustLogin gets in.
func (s *site) mustLogin(device, password string) *devices.Identity {
	s.t.Helper()
	i, err := s.login(device, password)
	if err != nil {
		s.t.Fatal(err)
	}
	return i
}

// connect gets in and connects.
func (s *site) connect(device, password string) uint64 {
	s.t.Helper()
	i := s.mustLogin(device, password)
	return s.Connected(device, devices.Connection{Address: "192.0.2.7:4711", Protocol: "MQTT 5", Listener: "lan", Identity: i})
}

// flush waits until all that was handed in is durable and told.
func (s *site) flush() {
	s.t.Helper()
	if err := s.store.Flush(); err != nil {
		s.t.Fatal(err)
	}
}

// told returns the events of devices so far, upstream ones only if asked for, as "device online" or "device offline (reason)".
func (s *site) told(upstreamOnly bool) []string {
	s.flush()
	s.rows.mu.Lock()
	defer s.rows.mu.Unlock()
	texts := []string{}
	for _, e := range s.rows.events {
		switch {
		case upstreamOnly && !e.Upstream:
		case e.Device.Presence.Connected:
			texts = append(texts, e.Device.Device+" online")
		default:
			texts = append(texts, e.Device.Device+" offline ("+e.Device.Presence.Reason+")")
		}
	}
	return texts
}

// kicksOf returns the kicks of a device so far.
func (s *site) kicksOf(device string) []kicked {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.kicks), func(k kicked) bool { return k.Device != device })
}

// counter reads a counter without labels, or the sum over its labels.
func (s *site) counter(name string, labels ...string) float64 {
	s.t.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	sum, found := 0.0, false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			match := true
			for _, l := range m.GetLabel() {
				match = match && (len(labels) == 0 || slices.Contains(labels, l.GetValue()))
			}
			if match {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				found = true
			}
		}
	}
	if !found {
		s.t.Fatalf("there is no metric %s%v", name, labels)
	}
	return sum
}

// hashes is how often argon2 was computed during fn.
func (s *site) hashes(fn func()) float64 {
	s.t.Helper()
	const name = "holdfast_devices_password_hashes_total"
	before := s.counter(name)
	fn()
	return s.counter(name) - before
}

func wantErr(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: error %v, want %v", what, got, want)
	}
}

func ptr[T any](v T) *T { return &v }

// run runs the registry in the background until the function returned is called.
func (s *site) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Errorf("run: %v", err)
		}
	})
}
