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
	out, err := s.openStream(c)
	if err != nil || out == nil {
		return err
	}
	defer out.close()
	hub := s.p.Events
	pos, whole := hub.now(), true
	if seen != "" {
		pos, whole = hub.from(seen)
	}
	// An id without data is no event, but is what a reader comes back with: so one that loses its link before its first event, or
	// while nothing happens that it wants to know, misses nothing.
	out.buf = append(out.buf, "id: "+hub.id(pos)+"\n\n"...)
	if !whole {
		out.buf = appendFrame(out.buf, &Event{ID: hub.id(pos), Kind: KindReset, At: time.Now()})
	}
	var batch []*happening
	for out.send() {
		for len(out.buf) == 0 {
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
					out.buf = append(out.buf, e.lines()...)
				}
			}
			if wake == nil {
				wake = alreadyAwake // there was a batch: look at the others, and go on
			}
			switch out.wait(wake) {
			case streamEnds:
				return nil
			case streamWakes:
			case streamBeats:
				out.buf = append(out.buf, ": still here\nid: "+hub.id(pos)+"\n\n"...)
			}
		}
	}
	return nil
}

// stream is an answer of server-sent events that is under way.
type stream struct {
	s    *Server
	c    *call
	rc   *http.ResponseController
	beat *time.Ticker
	buf  []byte // goes out with send
}

// openStream begins one, which has to be closed. nil without an error: nothing more was asked for. What comes first goes out with the
// first send.
func (s *Server) openStream(c *call) (*stream, error) {
	if !take(s.streams) {
		return nil, failf(codeTooManyStreams, "%d streams are open already: end one, or try again later", maxStreams)
	}
	s.m.streams.Inc()
	out := &stream{s: s, c: c, rc: http.NewResponseController(c.w), beat: time.NewTicker(heartbeat)}
	h := c.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no") // to a proxy: pass it on as it comes
	c.w.WriteHeader(http.StatusOK)
	if c.r.Method == http.MethodHead {
		out.close()
		return nil, nil
	}
	out.buf = append(out.buf, "retry: "+streamRetryMS+"\n"...)
	_ = out.rc.SetReadDeadline(time.Time{}) // else the server's ends the request; not every writer has one
	return out, nil
}

func (out *stream) close() {
	out.beat.Stop()
	_ = out.rc.SetWriteDeadline(time.Now().Add(time.Second)) // for the end of the answer
	out.s.m.streams.Dec()
	give(out.s.streams)
}

// send sends buf. false: the reader takes nothing, or went away.
func (out *stream) send() bool {
	_ = out.rc.SetWriteDeadline(time.Now().Add(streamWrite))
	_, err := out.c.w.Write(out.buf)
	if err == nil {
		err = out.rc.Flush()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // else it went away
		out.s.m.streamsCut.Inc()
		out.s.log.Debug("event stream cut: its reader takes nothing", "who", out.c.who, "address", out.c.r.RemoteAddr, "err", err)
	}
	out.buf = out.buf[:0]
	return err == nil
}

// rest lets time pass between two sends. false: the stream ends.
func (out *stream) rest(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-out.s.stopping:
		return false
	case <-out.c.r.Context().Done():
		return false
	case <-t.C:
		return true
	}
}

// woken is why a stream goes on, or does not.
type woken uint8

const (
	streamEnds  woken = iota // its reader is gone or may read no more, or the server stops
	streamBeats              // a sign of life is due
	streamWakes              // what it waited for is there
)

// wait waits for wake.
func (out *stream) wait(wake <-chan struct{}) woken {
	select {
	case <-out.s.stopping:
	case <-out.c.r.Context().Done():
	case <-out.beat.C:
		if out.s.still(out.c) { // else the token was removed, or has expired; or the session has ended
			return streamBeats
		}
	case <-wake:
		return streamWakes
	}
	return streamEnds
}

var alreadyAwake = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

var kinds = []string{KindCommand, KindDevice, KindUpstream, KindRefusal, KindAlarm}

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
