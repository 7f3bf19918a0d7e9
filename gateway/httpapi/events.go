package httpapi

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"holdfast/devices"
)

// DefaultEvents is how many events are kept for those who come back.
const DefaultEvents = 10_000

// Events hands what happens to whoever watches, and keeps the last of it in memory for those who were away a moment.
//
// There is one ring and no queue per watcher: each has a position in the ring and reads on from there, so a watcher
// that does not keep up costs nothing but its own view, and Publish never waits for one.
type Events struct {
	start string // names this run of the process in ids

	mu    sync.Mutex
	ring  []*happening  // under mu; the event n is at n % len, the numbers from 1 on
	last  uint64        // under mu; the number of the newest, 0: none yet
	wake  chan struct{} // under mu; closed at the next event, if asleep
	sleep bool          // under mu; somebody waits for wake
}

// happening is one event, before and after it is encoded. Only the first watcher that wants it encodes it.
type happening struct {
	n        uint64
	start    string
	at       time.Time
	command  *devices.Command // without what may be large: payload, result, history
	previous devices.State
	device   *devices.PresenceChange
	refusal  *devices.Refusal
	upstream *UpstreamChange
	alarm    *AlarmChange

	once  sync.Once
	frame []byte // under once; the lines of the stream
}

// NewEvents makes a hub that keeps the last capacity events; 0: DefaultEvents.
func NewEvents(capacity int) *Events {
	if capacity <= 0 {
		capacity = DefaultEvents
	}
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return &Events{start: hex.EncodeToString(b[:]), ring: make([]*happening, capacity), wake: make(chan struct{})}
}

// Publish shows e to whoever watches. It neither blocks nor encodes: one small allocation, a fraction of a microsecond.
// Many goroutines may call it; events get their numbers in the order of the calls. It keeps e's Device and Refusal,
// which must not change any more, and a copy of its Command without payload and result.
func (h *Events) Publish(e devices.Event) {
	ev := &happening{previous: e.Previous, device: e.Device, refusal: e.Refusal}
	switch {
	case e.Command != nil:
		c := *e.Command
		c.Payload, c.Result, c.History = nil, nil, nil
		ev.command, ev.at = &c, c.Updated
	case e.Device != nil:
		ev.at = e.Device.Presence.Since
	case e.Refusal != nil:
		ev.at = e.Refusal.At
	default:
		return
	}
	h.add(ev)
}

// PublishUpstream shows that a link came up or went down.
func (h *Events) PublishUpstream(u UpstreamChange) {
	h.add(&happening{upstream: &u})
}

// PublishAlarm shows that an alarm began or ended.
func (h *Events) PublishAlarm(a AlarmChange) {
	h.add(&happening{alarm: &a})
}

func (h *Events) add(ev *happening) {
	if ev.at.IsZero() {
		ev.at = time.Now()
	}
	ev.start = h.start
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last++
	ev.n = h.last
	h.ring[ev.n%uint64(len(h.ring))] = ev
	if h.sleep {
		h.sleep = false
		close(h.wake)
		h.wake = make(chan struct{})
	}
}

// now is the number of the newest event.
func (h *Events) now() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

// from says where a watcher goes on that has seen the event id. ok is false if events were missed: it was before this
// start, or they are no longer there; then pos is before the oldest that is.
func (h *Events) from(id string) (pos uint64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	start, number, cut := strings.Cut(id, "-")
	n, err := strconv.ParseUint(number, 10, 64)
	if !cut || err != nil || start != h.start || n > h.last || n < h.oldest()-1 {
		return h.oldest() - 1, false
	}
	return n, true
}

// oldest is the number of the oldest event that is there, or that will be. mu is held.
func (h *Events) oldest() uint64 {
	if size := uint64(len(h.ring)); h.last > size {
		return h.last - size + 1
	}
	return 1
}

// after appends to dst the events after pos, at most max. lost: some of them are no longer there. If there are none,
// wake is closed when there are.
func (h *Events) after(dst []*happening, pos uint64, most int) (_ []*happening, wake <-chan struct{}, lost bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if pos+1 < h.oldest() {
		return dst, nil, true
	}
	if pos >= h.last {
		h.sleep = true
		return dst, h.wake, false
	}
	for n := pos + 1; n <= h.last && most > 0; n++ {
		dst = append(dst, h.ring[n%uint64(len(h.ring))])
		most--
	}
	return dst, nil, false
}

func (h *Events) id(n uint64) string { return fmt.Sprintf("%s-%d", h.start, n) }

// Kinds of events.
const (
	KindCommand  = "command"
	KindDevice   = "device"
	KindUpstream = "upstream"
	KindRefusal  = "refusal"
	KindAlarm    = "alarm"
	KindReset    = "reset" // events were missed: what is known has to be read again
)

func (e *happening) kind() string {
	switch {
	case e.command != nil:
		return KindCommand
	case e.device != nil:
		return KindDevice
	case e.refusal != nil:
		return KindRefusal
	case e.alarm != nil:
		return KindAlarm
	}
	return KindUpstream
}

// filter chooses events; empty fields choose all.
type filter struct {
	kinds           []string
	device, command string
}

func (f *filter) takes(e *happening) bool {
	if len(f.kinds) > 0 && !slices.Contains(f.kinds, e.kind()) {
		return false
	}
	var device, command string
	switch {
	case e.command != nil:
		device, command = e.command.Device, e.command.ID
	case e.device != nil:
		device = e.device.Device
	case e.refusal != nil:
		device, command = e.refusal.Device, e.refusal.ID
	}
	return (f.device == "" || f.device == device) && (f.command == "" || f.command == command)
}

// lines gives the event as it stands in the stream. Many goroutines may call it; nobody changes what it returns.
func (e *happening) lines() []byte {
	e.once.Do(func() {
		ev := Event{ID: e.start + "-" + strconv.FormatUint(e.n, 10), Kind: e.kind(), At: e.at, Upstream: e.upstream, Alarm: e.alarm}
		if e.command != nil {
			c := NewCommand(e.command, false)
			ev.Command = &c
			if e.previous != 0 {
				ev.Previous = e.previous.String()
			}
		}
		if e.device != nil {
			ev.Device = &Presence{ID: e.device.Device, Presence: e.device.Presence}
		}
		if r := e.refusal; r != nil {
			ev.Refusal = &RefusalEvent{ID: r.ID, Device: r.Device, Code: r.Code, Reason: r.Reason}
		}
		e.frame = appendFrame(nil, &ev)
	})
	return e.frame
}

// appendFrame appends ev as a server-sent event (WHATWG HTML §9.2.6). JSON has no line breaks of its own.
func appendFrame(dst []byte, ev *Event) []byte {
	data, err := json.Marshal(ev)
	if err != nil { // a text that is not UTF-8 is mended, a time before year 0 is not
		data = []byte(`{}`)
	}
	dst = append(append(dst, "id: "...), ev.ID...)
	dst = append(append(dst, "\nevent: "...), ev.Kind...)
	dst = append(append(dst, "\ndata: "...), data...)
	return append(dst, "\n\n"...)
}
