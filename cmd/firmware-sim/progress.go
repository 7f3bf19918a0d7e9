package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/term"

	firmwaresim "holdfast/firmware-sim"
)

// screen shows one line that changes on a terminal, and now and then a line elsewhere.
type screen struct {
	w        io.Writer
	terminal bool
	every    time.Duration // 0: never

	mu    sync.Mutex
	shown bool // under mu: the last thing written is a line that will change
}

func newScreen(w io.Writer, quiet bool) *screen {
	s := &screen{w: w, every: 5 * time.Second}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		s.terminal, s.every = true, 500*time.Millisecond
	}
	if quiet {
		s.every = 0
	}
	return s
}

// follow shows what line gives, again and again, until stop is called. last is a place where
// line keeps what it needs to see what has changed.
func (s *screen) follow(line func(last *firmwaresim.Snapshot) string) (stop func()) {
	if s.every == 0 {
		return func() {}
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(s.every)
		defer tick.Stop()
		var last firmwaresim.Snapshot
		for {
			select {
			case <-end:
				s.clear()
				return
			case <-tick.C:
				s.show(line(&last))
			}
		}
	}()
	return func() {
		close(end)
		<-ended
	}
}

const clearLine = "\r\x1b[K"

func (s *screen) show(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.terminal {
		fmt.Fprintln(s.w, text)
		return
	}
	fmt.Fprint(s.w, clearLine+text)
	s.shown = true
}

func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shown {
		fmt.Fprint(s.w, clearLine)
		s.shown = false
	}
}

// above makes log lines stand above the line that changes.
func (s *screen) above(h slog.Handler) slog.Handler { return &aboveHandler{Handler: h, screen: s} }

type aboveHandler struct {
	slog.Handler
	screen *screen
}

func (h *aboveHandler) Handle(ctx context.Context, r slog.Record) error {
	h.screen.clear()
	return h.Handler.Handle(ctx, r)
}

func (h *aboveHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &aboveHandler{Handler: h.Handler.WithAttrs(attrs), screen: h.screen}
}

func (h *aboveHandler) WithGroup(name string) slog.Handler {
	return &aboveHandler{Handler: h.Handler.WithGroup(name), screen: h.screen}
}

// progress is the line: what happens now, then the sums.
func progress(fleet *firmwaresim.Fleet, v *verifier, last *firmwaresim.Snapshot) string {
	now := fleet.Snapshot()
	rate := 0.0
	if d := now.Elapsed - last.Elapsed; d > 0 {
		rate = float64(now.Published-last.Published) / d.Seconds()
	}
	*last = now
	text := fmt.Sprintf("%4.0fs  %s msg/s  %d/%d connected  %s in flight  %s acked",
		now.Elapsed.Seconds(), grouped(uint64(rate)), now.Connected, now.Devices, grouped(uint64(now.InFlight)), grouped(now.Acknowledged))
	if now.InFlash > 0 {
		text += "  " + grouped(uint64(now.InFlash)) + " in flash"
	}
	if now.Asleep > 0 {
		text += "  " + grouped(uint64(now.Asleep)) + " asleep"
	}
	if c := now.Commands; c.Received > 0 {
		text += "  " + grouped(c.Received) + " commands, " + grouped(c.Open) + " open"
	}
	if v != nil {
		text += "  " + grouped(v.arrivals.Total()) + " arrived"
	}
	return text
}

// grouped writes 1234567 as 1,234,567.
func grouped(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
