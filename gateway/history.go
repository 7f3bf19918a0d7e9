package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"holdfast/gateway/httpapi"
)

// The dashboard's charts show an hour.
const (
	historyFor   = time.Hour
	historyEvery = 10 * time.Second
	historyKeep  = time.Minute // from one write of the file to the next
	historyFile  = "history.json"
)

// history is the last hour, in memory and, a minute behind at most, in a file. The file is a convenience: it is not synced, and one that
// cannot be read counts as none.
type history struct {
	mu     sync.Mutex // guards what follows
	points []httpapi.HistoryPoint
}

// sample is what the gateway's counters say at one moment.
type sample struct {
	at                  time.Time     // wall clock
	elapsed             time.Duration // since the start
	accepted, delivered uint64
	bounds              []float64 // of acks
	acks                []uint64
}

// point is what was done from a to b.
func (b *sample) point(a *sample) httpapi.HistoryPoint {
	seconds := max((b.elapsed - a.elapsed).Seconds(), 1e-3)
	rate := func(before, now uint64) float64 {
		if now < before { // an upstream, or its lane, is gone
			return 0
		}
		return float64(now-before) / seconds
	}
	p := httpapi.HistoryPoint{At: b.at.UTC().Truncate(time.Millisecond), Accepted: rate(a.accepted, b.accepted), Delivered: rate(a.delivered, b.delivered)}
	acks := slices.Clone(b.acks)
	for i := range a.acks {
		acks[i] -= a.acks[i]
	}
	p.AckP50, p.AckP99 = quantile(b.bounds, acks, 0.5), quantile(b.bounds, acks, 0.99)
	return p
}

// quantile says below which value the part q lies of what was counted between bounds, the last count being above all of them; within two
// bounds it is taken to lie evenly. 0: nothing was counted.
func quantile(bounds []float64, counts []uint64, q float64) float64 {
	total := uint64(0)
	for _, n := range counts {
		total += n
	}
	rank, low := q*float64(total), 0.0
	for i, high := range bounds {
		if n := float64(counts[i]); n > 0 && rank <= n {
			return low + (high-low)*rank/n
		}
		rank -= float64(counts[i])
		low = high
	}
	if total == 0 {
		return 0
	}
	return low // above the last bound: that much at least
}

// add takes a point, and lets go of those that are no longer of the last hour. Points from before the clock was set are none of it, either.
func (h *history) add(p httpapi.HistoryPoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.points = lastHour(append(h.points, p), p.At)
}

func lastHour(points []httpapi.HistoryPoint, now time.Time) []httpapi.HistoryPoint {
	return slices.DeleteFunc(points, func(p httpapi.HistoryPoint) bool { return p.At.After(now) || now.Sub(p.At) > historyFor })
}

// after gives the points after since.
func (h *history) after(since time.Time) []httpapi.HistoryPoint {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.IndexFunc(h.points, func(p httpapi.HistoryPoint) bool { return p.At.After(since) })
	if i < 0 {
		return nil
	}
	return slices.Clone(h.points[i:])
}

// load reads what an earlier start has kept of the hour before now.
func (h *history) load(file string, now time.Time) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var points []httpapi.HistoryPoint
	if err == nil {
		err = json.Unmarshal(b, &points)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.points = lastHour(points, now)
	return nil
}

// keep writes the file anew.
func (h *history) keep(file string) error {
	b, err := json.Marshal(h.after(time.Time{}))
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// History implements httpapi.Source.
func (g *Gateway) History(since time.Time) httpapi.History {
	return httpapi.History{EveryS: int(historyEvery / time.Second), Points: g.past.after(since)}
}

func (g *Gateway) sample() *sample {
	s := &sample{at: g.clock.Time(), elapsed: time.Since(g.started)}
	for _, l := range g.spool.Lanes() {
		s.accepted += l.Accepted.Messages
	}
	for _, a := range g.spool.Accounts() {
		s.delivered += a.Delivered.Messages
	}
	s.bounds, s.acks = g.broker.AckSeconds()
	return s
}

// keepHistory takes a sample every ten seconds.
func (g *Gateway) keepHistory(ctx context.Context) error {
	log := g.log.With("part", "history")
	file := filepath.Join(g.dir.path, historyFile)
	if err := g.past.load(file, g.clock.Time()); err != nil {
		log.Info("the charts begin anew", "err", err)
	}
	keep := func() {
		if err := g.past.keep(file); err != nil {
			log.Debug("history is not kept", "err", err) // the disk may be full: other lines say so
		}
	}
	tick := time.NewTicker(historyEvery)
	defer tick.Stop()
	last, kept := g.sample(), time.Now()
	for {
		select {
		case <-ctx.Done():
			keep()
			return nil
		case <-tick.C:
		}
		now := g.sample()
		g.past.add(now.point(last))
		last = now
		if time.Since(kept) >= historyKeep {
			keep()
			kept = time.Now()
		}
	}
}
