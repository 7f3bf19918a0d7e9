package cloud

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"holdfast/bridge/wire"
)

// Publisher is the MQTT client that a Client sends with: Publish returns when the broker has acknowledged the message
// (QoS 1, not retained), or with an error when nobody knows. mqttup.Client is one.
type Publisher interface {
	Publish(ctx context.Context, topic string, payload []byte) error
}

// PublishFunc is a Publisher that is a function.
type PublishFunc func(ctx context.Context, topic string, payload []byte) error

// Publish calls f.
func (f PublishFunc) Publish(ctx context.Context, topic string, payload []byte) error {
	return f(ctx, topic, payload)
}

// ClientConfig of a Client. Publisher has to be there.
type ClientConfig struct {
	Publisher Publisher
	// Retry is the pause after which a request that nobody answered is published again, under the same id; it doubles
	// each time, up to an hour. 0: 5 s.
	Retry time.Duration
	// Late is how long a command is followed after an end that its device did not give (TIMED_OUT, EXPIRED, …): an
	// outcome that still comes replaces it. 0: not at all.
	Late time.Duration
	// OnDevice is told of each device that comes or goes, OnCommand of each event of a command; repeats are left out.
	// nil: nobody is told. They are called by Handle.
	OnDevice  func(e wire.DeviceEvent)
	OnCommand func(e wire.CommandEvent)
}

// Client sends commands to devices through gateways and follows them. Give it what arrives on Filters by Handle. All
// methods may be called by many goroutines.
type Client struct {
	cfg ClientConfig

	mu        sync.Mutex
	followers map[commandKey][]*Command
	seen      recent // events for OnDevice and OnCommand
}

type commandKey struct{ gateway, device, id string }

const longestRetry = time.Hour

// NewClient makes a client.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Retry <= 0 {
		cfg.Retry = 5 * time.Second
	}
	return &Client{cfg: cfg, followers: make(map[commandKey][]*Command), seen: recent{most: 1 << 14}}
}

// Filters are what to subscribe to for a gateway's events, with QoS 1; "" stands for all gateways. Telemetry has topics
// of its own, see Receiver.
func Filters(gateway string) []string {
	return []string{wire.CommandEventFilter(gateway, "", ""), wire.DeviceEventFilter(gateway, "")}
}

// Handle takes what arrived. It says whether topic is that of an event of a command or a device; everything else is for
// a Receiver. It does not block, except as OnDevice and OnCommand do, and keeps nothing of payload. An error
// (wire.ErrFormat): nothing was done.
func (c *Client) Handle(topic string, payload []byte) (handled bool, err error) {
	switch t := wire.ParseTopic(topic); t.Kind {
	case wire.KindCommandEvent:
		e, err := commandEvent(topic, t, payload)
		if err != nil {
			return true, err
		}
		print := fingerprint(topic, payload)
		c.mu.Lock()
		followers := slices.Clone(c.followers[commandKey{e.Gateway, e.Device, e.ID}])
		fresh := c.cfg.OnCommand != nil && c.seen.add(print)
		c.mu.Unlock()
		if fresh {
			c.cfg.OnCommand(*e)
		}
		for _, f := range followers {
			f.take(e, print)
		}
		return true, nil

	case wire.KindDeviceEvent:
		e, err := deviceEvent(topic, t, payload)
		if err != nil {
			return true, err
		}
		c.mu.Lock()
		fresh := c.cfg.OnDevice != nil && c.seen.add(fingerprint(topic, payload))
		c.mu.Unlock()
		if fresh {
			c.cfg.OnDevice(*e)
		}
		return true, nil

	default:
		return false, nil
	}
}

// commandEvent reads an event that says of itself what its topic says.
func commandEvent(topic string, t wire.Topic, payload []byte) (*wire.CommandEvent, error) {
	e, err := wire.DecodeCommandEvent(payload)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", topic, err)
	}
	if e.Gateway != t.Gateway || e.State != t.State || t.Name != "" && e.Device != t.Name || t.ID != "" && e.ID != t.ID {
		return nil, fmt.Errorf("%s: event of gateway %q, device %q, command %q, state %q: %w", topic, e.Gateway, e.Device, e.ID, e.State, wire.ErrFormat)
	}
	return &e, nil
}

func deviceEvent(topic string, t wire.Topic, payload []byte) (*wire.DeviceEvent, error) {
	e, err := wire.DecodeDeviceEvent(payload)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", topic, err)
	}
	if e.Gateway != t.Gateway || e.State != t.State || e.Device != t.Name {
		return nil, fmt.Errorf("%s: event of gateway %q, device %q, state %q: %w", topic, e.Gateway, e.Device, e.State, wire.ErrFormat)
	}
	return &e, nil
}

// RefusedError is a request that a gateway did not take.
type RefusedError struct{ Event wire.CommandEvent }

// Error implements error.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("refused by gateway %s (%s): %s", e.Event.Gateway, e.Event.Code, e.Event.Reason)
}

// ErrUnanswered says that a request was published and that ctx ended before the gateway answered: it waits at the
// broker, or its answer is under way. The same request with the same id does no harm.
var ErrUnanswered = errors.New("the gateway has not answered")

// Submit sends a command and returns it, followed, when the gateway has told its first state; call its Close when it is
// not followed any more. Without an id it gets a UUIDv7, so that repeats on the way are the same command. Until the
// gateway answers the request is repeated, each time after a longer pause. A command whose feedback is not full is not
// waited for: there may be no state to tell.
//
// Errors: *RefusedError; ErrUnanswered, and then the command is returned as well and may be followed.
func (c *Client) Submit(ctx context.Context, gateway, device string, s wire.Submit) (*Command, error) {
	if s.ID == "" {
		id, err := uuid.NewV7()
		if err != nil {
			return nil, fmt.Errorf("submit: %w", err)
		}
		s.ID = id.String()
	}
	body, err := wire.EncodeSubmit(&s)
	if err != nil {
		return nil, err
	}
	f := c.follow(&Command{Gateway: gateway, Device: device, ID: s.ID, oneWay: s.OneWay, submitted: true})
	answered := f.first
	if s.Feedback != "" && s.Feedback != "full" {
		answered = nil
	}
	published, err := c.ask(ctx, wire.CommandTopic(gateway, device, wire.ActionSubmit), body, answered)
	if err == nil {
		err = f.refused()
	}
	if err != nil && !(published && errors.Is(err, ErrUnanswered)) {
		f.Close()
		return nil, fmt.Errorf("submit %s to device %s: %w", s.Name, device, err)
	}
	if err != nil {
		err = fmt.Errorf("submit %s to device %s: %w", s.Name, device, err)
	}
	return f, err
}

// Cancel calls a command off and returns its state after that: CANCELED, or the end that it had reached before.
// *RefusedError: there is no such command, or it had ended. ErrUnanswered as from Submit.
func (c *Client) Cancel(ctx context.Context, gateway, device, id, reason string) (wire.CommandEvent, error) {
	body, err := wire.EncodeCancel(&wire.Cancel{ID: id, Reason: reason})
	if err != nil {
		return wire.CommandEvent{}, err
	}
	f := c.follow(&Command{Gateway: gateway, Device: device, ID: id, canceled: true})
	defer f.Close()
	if _, err := c.ask(ctx, wire.CommandTopic(gateway, device, wire.ActionCancel), body, f.over); err != nil {
		return wire.CommandEvent{}, fmt.Errorf("cancel %s of device %s: %w", id, device, err)
	}
	if err := f.refused(); err != nil {
		return wire.CommandEvent{}, fmt.Errorf("cancel %s of device %s: %w", id, device, err)
	}
	return f.Last(), nil
}

// ask publishes until answered is closed. nil: once is enough.
func (c *Client) ask(ctx context.Context, topic string, body []byte, answered <-chan struct{}) (published bool, err error) {
	for pause := c.cfg.Retry; ; pause = min(2*pause, longestRetry) {
		if err := c.cfg.Publisher.Publish(ctx, topic, body); err != nil {
			select {
			case <-answered: // it had arrived all the same
				return true, nil
			default:
			}
			if published && ctx.Err() != nil {
				return true, fmt.Errorf("%w: %w", ErrUnanswered, context.Cause(ctx))
			}
			return published, err
		}
		published = true
		if answered == nil {
			return true, nil
		}
		again := time.NewTimer(pause)
		select {
		case <-answered:
			again.Stop()
			return true, nil
		case <-ctx.Done():
			again.Stop()
			return true, fmt.Errorf("%w: %w", ErrUnanswered, context.Cause(ctx))
		case <-again.C:
		}
	}
}

// Follow follows a command that somebody submitted. Only what arrives from now on is seen.
func (c *Client) Follow(gateway, device, id string) *Command {
	return c.follow(&Command{Gateway: gateway, Device: device, ID: id})
}

// follow completes f and has Handle find it.
func (c *Client) follow(f *Command) *Command {
	f.client, f.first, f.over, f.ring, f.seen = c, make(chan struct{}), make(chan struct{}), make(chan struct{}, 1), recent{most: 1 << 10}
	key := commandKey{f.Gateway, f.Device, f.ID}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.followers[key] = append(c.followers[key], f)
	return f
}

// Command is a command that is followed. Its methods may be called by many goroutines, but each event is given to one
// of those that range over Events.
type Command struct {
	Gateway, Device, ID string

	client    *Client
	oneWay    bool          // DELIVERED is its end
	submitted bool          // by us: a refusal before any state is its end
	canceled  bool          // by us: what is refused is that
	first     chan struct{} // closed by the first event
	over      chan struct{} // closed by the first end
	ring      chan struct{} // something is new

	mu     sync.Mutex
	seen   recent
	queue  []wire.CommandEvent // not yet given to Events
	last   wire.CommandEvent
	ended  bool // last is an end
	closed bool
}

// maxQueue bounds the events that nobody has read; the oldest go first.
const maxQueue = 1024

// Close ends following. Twice does no harm.
func (f *Command) Close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.wake()
	c, key := f.client, commandKey{f.Gateway, f.Device, f.ID}
	c.mu.Lock()
	defer c.mu.Unlock()
	if left := slices.DeleteFunc(c.followers[key], func(o *Command) bool { return o == f }); len(left) > 0 {
		c.followers[key] = left
	} else {
		delete(c.followers, key)
	}
}

// Last is the newest event; State is "" if none has come.
func (f *Command) Last() wire.CommandEvent {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

// Outcome says whether a state is an end that the device gave: it stands for ever.
func Outcome(state string) bool {
	return state == "SUCCEEDED" || state == "FAILED" || state == "REJECTED"
}

// Ended says whether an event is the end of its command; a late outcome may replace one that is no Outcome. oneWay: DELIVERED
// is what was asked for.
func Ended(e *wire.CommandEvent, oneWay bool) bool {
	switch e.State {
	case "SUCCEEDED", "FAILED", "REJECTED", "EXPIRED", "TIMED_OUT", "CANCELED", "SUPERSEDED", "DEAD_LETTERED":
		return true
	case "DELIVERED":
		return oneWay || e.Final
	}
	return e.Final
}

// take notes an event. Gateways deliver at least once, so after a lost connection some come again, the older ones after
// newer ones.
func (f *Command) take(e *wire.CommandEvent, print uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.seen.add(print) || f.closed {
		return
	}
	end := Ended(e, f.oneWay)
	switch {
	case e.State == wire.StateRefused:
		// A refusal speaks of a request. The command itself goes on if there is one.
		end = f.canceled || f.submitted && f.last.State == ""
	case Outcome(f.last.State) && f.ended:
		return // the first outcome stands
	case f.ended && !Outcome(e.State):
		return // only a late outcome may follow an end
	case e.Repeat && f.last.State == e.State && f.last.Attempts == e.Attempts && sameProgress(f.last.Progress, e.Progress):
		return // told already
	}
	if e.State != wire.StateRefused || end {
		f.last = *e
	}
	if len(f.queue) == maxQueue {
		f.queue = slices.Delete(f.queue, 0, 1)
	}
	f.queue = append(f.queue, *e)
	select {
	case <-f.first:
	default:
		close(f.first)
	}
	if end && !f.ended {
		f.ended = true
		close(f.over)
	}
	f.wake()
}

func sameProgress(a, b *wire.EventProgress) bool {
	if a == nil || b == nil {
		return a == b
	}
	if a.Percent == nil || b.Percent == nil {
		return a.Text == b.Text && a.Percent == b.Percent
	}
	return a.Text == b.Text && *a.Percent == *b.Percent
}

func (f *Command) wake() {
	select {
	case f.ring <- struct{}{}:
	default:
	}
}

// refused is the refusal that the command ended with, if it did.
func (f *Command) refused() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended && f.last.State == wire.StateRefused {
		return &RefusedError{f.last}
	}
	return nil
}

// Events gives each event once, in order, from the first that came after Submit or Follow, and ends with the end of the
// command, or ClientConfig.Late after one that a late outcome may replace. An error is the last that it gives: ctx
// ended, or Close was called.
func (f *Command) Events(ctx context.Context) iter.Seq2[wire.CommandEvent, error] {
	return func(yield func(wire.CommandEvent, error) bool) {
		var late <-chan time.Time
		for {
			f.mu.Lock()
			queue, ended, last, closed := f.queue, f.ended, f.last.State, f.closed
			f.queue = nil
			f.mu.Unlock()
			for _, e := range queue {
				if !yield(e, nil) {
					return
				}
			}
			switch {
			case ended && (f.client.cfg.Late <= 0 || Outcome(last) || last == wire.StateRefused || last == "DELIVERED"):
				return
			case ended && late == nil:
				timer := time.NewTimer(f.client.cfg.Late)
				defer timer.Stop()
				late = timer.C
			}
			if closed {
				yield(wire.CommandEvent{}, errors.New("the command is not followed any more"))
				return
			}
			select {
			case <-f.ring:
			case <-late:
				return
			case <-ctx.Done():
				yield(wire.CommandEvent{}, context.Cause(ctx))
				return
			}
		}
	}
}

// Wait reads Events to the end and returns the last: the outcome, or another end. *RefusedError: the gateway did not take the
// command. With another error the event is the newest that came.
func (f *Command) Wait(ctx context.Context) (wire.CommandEvent, error) {
	for _, err := range f.Events(ctx) {
		if err != nil {
			return f.Last(), fmt.Errorf("command %s of device %s: %w", f.ID, f.Device, err)
		}
	}
	return f.Last(), f.refused()
}

// recent remembers the last so many numbers.
type recent struct {
	most int
	set  map[uint64]struct{}
	ring []uint64
	at   int
}

// add says whether n is new.
func (r *recent) add(n uint64) bool {
	if _, known := r.set[n]; known {
		return false
	}
	if r.set == nil {
		r.set = make(map[uint64]struct{})
	}
	if len(r.ring) < r.most {
		r.ring = append(r.ring, n)
	} else {
		delete(r.set, r.ring[r.at])
		r.ring[r.at] = n
		r.at = (r.at + 1) % r.most
	}
	r.set[n] = struct{}{}
	return true
}

var seed = maphash.MakeSeed()

// fingerprint tells events apart; what is sent again is the same to the byte, but for a time that the gateway has put right since.
func fingerprint(topic string, payload []byte) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	_, _ = h.WriteString(topic)
	_ = h.WriteByte(0)
	_, _ = h.Write(wire.UncorrectEvent(payload))
	return h.Sum64()
}
