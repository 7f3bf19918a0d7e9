// Package logs decides which lines of a log are written, and lets that change while the program runs: the level of all, and for a
// while everything about one device.
package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxDevices = 100            // that are watched at once
	maxTime    = 24 * time.Hour // of one
)

// Errors of Watch. Texts that wrap them name the way out.
var (
	ErrTooMany = errors.New("too many devices are watched")
	ErrTooLong = errors.New("too long")
)

// Switch is what can be changed. Many goroutines may use it.
type Switch struct {
	level slog.LevelVar

	mu      sync.Mutex
	watched map[string]*watch
	ended   func(device string)
	// devices is a copy of watched for those who ask for each line; nil: none is watched.
	devices atomic.Pointer[map[string]struct{}]
}

type watch struct {
	until time.Time
	timer *time.Timer
}

// New makes a switch for lines at level and above.
func New(level slog.Level) *Switch {
	s := &Switch{watched: map[string]*watch{}, ended: func(string) {}}
	s.level.Set(level)
	return s
}

// ParseLevel reads debug, info, warn or error.
func ParseLevel(name string) (slog.Level, bool) {
	l, ok := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}[name]
	return l, ok
}

// LevelName is the name that ParseLevel reads.
func LevelName(l slog.Level) string { return strings.ToLower(l.String()) }

// Level is the one in effect.
func (s *Switch) Level() slog.Level { return s.level.Level() }

// SetLevel changes it.
func (s *Switch) SetLevel(l slog.Level) { s.level.Set(l) }

// OnEnd has fn told when the time of a device that was watched is over. Call it before the first Watch.
func (s *Switch) OnEnd(fn func(device string)) { s.ended = fn }

// Watch has every line about a device written for some time, whatever the level, and returns when that ends. d 0 ends it now.
func (s *Switch) Watch(device string, d time.Duration) (until time.Time, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.watched[device]
	switch {
	case d < 0 || d > maxTime:
		return until, fmt.Errorf("%w: a device is watched for %v at most", ErrTooLong, maxTime)
	case d > 0 && old == nil && len(s.watched) >= maxDevices:
		return until, fmt.Errorf("%w: %d, as many as can be; end one", ErrTooMany, maxDevices)
	}
	if old != nil {
		old.timer.Stop()
		delete(s.watched, device)
	}
	if d > 0 {
		w := &watch{until: time.Now().Add(d)}
		w.timer = time.AfterFunc(d, func() { s.expire(device, w) })
		s.watched[device] = w
		until = w.until
	}
	s.publish()
	return until, nil
}

// Until tells how long a device is watched; zero: it is not.
func (s *Switch) Until(device string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.watched[device]; w != nil {
		return w.until
	}
	return time.Time{}
}

// Close ends every watch, without a word.
func (s *Switch) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.watched {
		w.timer.Stop()
	}
	clear(s.watched)
	s.publish()
}

// expire ends w if it is still the one.
func (s *Switch) expire(device string, w *watch) {
	s.mu.Lock()
	if s.watched[device] != w {
		s.mu.Unlock()
		return
	}
	delete(s.watched, device)
	s.publish()
	s.mu.Unlock()
	s.ended(device)
}

// publish makes what is watched known to those who ask. The caller holds mu.
func (s *Switch) publish() {
	if len(s.watched) == 0 {
		s.devices.Store(nil)
		return
	}
	all := map[string]struct{}{}
	for id := range maps.Keys(s.watched) {
		all[id] = struct{}{}
	}
	s.devices.Store(&all)
}

// Watches tells whether a device is watched. While none is, it costs one load.
func (s *Switch) Watches(device string) bool {
	all := s.devices.Load()
	if all == nil {
		return false
	}
	_, ok := (*all)[device]
	return ok
}

// Handler gives next what is to be written. next itself takes everything from level debug on.
func (s *Switch) Handler(next slog.Handler) slog.Handler { return &handler{s: s, next: next} }

type handler struct {
	s      *Switch
	next   slog.Handler
	device string // that every line is about, by With; "": each says so itself, or none
	nested bool   // in a group: attributes there are not the line's own
}

// deviceKeys are attributes that say which device a line is about.
var deviceKeys = []string{"device", "client"}

// Enabled implements slog.Handler. While a device is watched it does not know yet.
func (h *handler) Enabled(_ context.Context, l slog.Level) bool {
	return l >= h.s.level.Level() || h.s.devices.Load() != nil
}

// Handle implements slog.Handler. While no device is watched Enabled has said all: what is handed in past it is written.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if h.s.devices.Load() != nil && r.Level < h.s.level.Level() && !h.s.Watches(h.about(&r)) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

// about gives the device that a line is about; "": none.
func (h *handler) about(r *slog.Record) (device string) {
	if device = h.device; device != "" || h.nested {
		return device
	}
	r.Attrs(func(a slog.Attr) bool {
		device = deviceIn(a)
		return device == ""
	})
	return device
}

func deviceIn(a slog.Attr) string {
	if a.Value.Kind() == slog.KindString && slices.Contains(deviceKeys, a.Key) {
		return a.Value.String()
	}
	return ""
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		if id := deviceIn(a); id != "" && !h.nested {
			n.device = id
		}
	}
	return &n
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	n := *h
	n.next, n.nested = h.next.WithGroup(name), true
	return &n
}
