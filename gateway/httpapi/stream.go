package httpapi

import (
	"errors"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"holdfast/devices"
)

// Bounds of streams and of long polls.
const (
	maxStreams    = 32
	maxWaiters    = 32
	maxWait       = 60 * time.Second
	heartbeat     = 15 * time.Second
	streamWrite   = 10 * time.Second // for a reader to take a batch
	streamBatch   = 64               // events
	streamRetryMS = "2000"           // how long a reader waits before it comes back
)

// events is GET /events.
func (s *Server) events(c *call) error {
	f := filter{device: c.query.Get("device"), command: c.query.Get("command")}
	if v := c.query.Get("kinds"); v != "" {
		f.kinds = strings.Split(v, ",")
		for _, k := range f.kinds {
			if !slices.Contains(kinds, k) {
				return failf(codeBadQuery, "query: there are no events of kind %.64q, but of %s", k, strings.Join(kinds, ", "))
			}
		}
	}
	seen := c.r.Header.Get("Last-Event-ID")
	if seen == "" {
		seen = c.query.Get("last_event_id")
	}
	if !take(s.streams) {
		return failf(codeTooManyStreams, "%d streams are open already: end one, or try again later", maxStreams)
	}
	defer give(s.streams)
	s.m.streams.Inc()
	defer s.m.streams.Dec()

	h := c.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no") // to a proxy: pass it on as it comes
	c.w.WriteHeader(http.StatusOK)
	if c.r.Method == http.MethodHead {
		return nil
	}
	hub := s.p.Events
	pos, whole := hub.now(), true
	if seen != "" {
		pos, whole = hub.from(seen)
	}
	// An id without data is no event, but is what a reader comes back with: so one that loses its link before its first event, or
	// while nothing happens that it wants to know, misses nothing.
	buf := []byte("retry: " + streamRetryMS + "\nid: " + hub.id(pos) + "\n\n")
	if !whole {
		buf = appendFrame(buf, &Event{ID: hub.id(pos), Kind: KindReset, At: time.Now()})
	}
	rc := http.NewResponseController(c.w)
	_ = rc.SetReadDeadline(time.Time{})                                     // else the server's ends the request; not every writer has one
	defer func() { _ = rc.SetWriteDeadline(time.Now().Add(time.Second)) }() // for the end of the answer
	send := func() bool {
		_ = rc.SetWriteDeadline(time.Now().Add(streamWrite))
		_, err := c.w.Write(buf)
		if err == nil {
			err = rc.Flush()
		}
		if errors.Is(err, os.ErrDeadlineExceeded) { // else it went away
			s.m.streamsCut.Inc()
			s.log.Debug("event stream cut: its reader takes nothing", "who", c.who, "address", c.r.RemoteAddr, "err", err)
		}
		buf = buf[:0]
		return err == nil
	}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	var batch []*happening
	for send() {
		for len(buf) == 0 {
			var wake <-chan struct{}
			var lost bool
			clear(batch)
			batch, wake, lost = hub.after(batch[:0], pos, streamBatch)
			if lost {
				s.m.streamsCut.Inc()
				s.log.Debug("event stream cut: its reader is too slow", "who", c.who, "address", c.r.RemoteAddr)
				return nil
			}
			for _, e := range batch {
				pos = e.n
				if f.takes(e) {
					buf = append(buf, e.lines()...)
				}
			}
			if wake == nil {
				wake = alreadyAwake // there was a batch: look at the others, and go on
			}
			select {
			case <-s.stopping:
				return nil
			case <-c.r.Context().Done():
				return nil
			case <-beat.C:
				if !s.still(c) {
					return nil // the token was removed, or has expired; or the session has ended
				}
				buf = append(buf, ": still here\nid: "+hub.id(pos)+"\n\n"...)
			case <-wake:
			}
		}
	}
	return nil
}

var alreadyAwake = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

var kinds = []string{KindCommand, KindDevice, KindUpstream, KindRefusal}

// take takes one of the places that sem has; give gives it back.
func take(sem chan struct{}) bool {
	select {
	case sem <- struct{}{}:
		return true
	default:
		return false
	}
}

func give(sem chan struct{}) { <-sem }

// awaitEnd waits until the command id has ended, at most for wait, and gives it as it is then. pos is a position in the
// events from before id was looked at.
func (s *Server) awaitEnd(c *call, id string, pos uint64, wait time.Duration) (devices.Command, error) {
	wait = min(wait, maxWait)
	if wait <= 0 || !take(s.waiters) { // too many wait: this one gets what is known now, and may ask again
		return s.p.Commands.Get(id)
	}
	defer give(s.waiters)
	_ = http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(wait + writeTimeout)) // else the answer comes too late
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var batch []*happening
	for {
		cmd, err := s.p.Commands.Get(id)
		if err != nil || cmd.Ended() {
			return cmd, err
		}
		for changed := false; !changed; {
			var wake <-chan struct{}
			var lost bool
			clear(batch)
			if batch, wake, lost = s.p.Events.after(batch[:0], pos, streamBatch); lost {
				pos = s.p.Events.now()
				break
			}
			for _, e := range batch {
				pos = e.n
				changed = changed || e.command != nil && e.command.ID == id
			}
			if wake == nil {
				continue
			}
			select {
			case <-wake:
			case <-timer.C:
				return cmd, nil
			case <-s.stopping:
				return cmd, nil
			case <-c.r.Context().Done():
				return cmd, nil
			}
		}
	}
}
