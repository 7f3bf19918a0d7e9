package mqttup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"holdfast/bridge"
)

// Subscribe calls handler for each message on filters until ctx ends, and then returns nil. It
// reconnects and subscribes again by itself; what the broker sends meanwhile is lost unless
// o.Persistent. It returns an error if the broker refuses the filters, or the first connection.
//
// Messages are taken with QoS 1 and acknowledged when handler has returned. Calls of handler come one after the other,
// and none after Subscribe has returned; a slow handler slows the broker. payload belongs to handler.
func Subscribe(ctx context.Context, o Options, filters []string, handler func(topic string, payload []byte)) error {
	if len(filters) == 0 {
		return errors.New("no filters to subscribe to")
	}
	s, err := newSubscriber(o, filters)
	if err != nil {
		return err
	}
	s.take = func(*conn) func(paho.Message) {
		return func(m paho.Message) { handler(m.Topic(), m.Payload()) }
	}
	s.failed = s.impatient("subscriber lost its connection")
	return s.run(ctx)
}

// subscriber keeps a subscription, one connection after the other. Subscribe, TakeCommands and Client stand on it.
type subscriber struct {
	o       Options
	log     *slog.Logger
	filters []string    // none: it only publishes
	acks    bridge.Acks // of what is published on the connection; nil: nothing is
	manual  bool        // take acknowledges, not paho
	cut     bool        // payloads above o.MaxPayload come cut, see guard
	// take makes what is called for each message of a connection, in order.
	take func(c *conn) func(paho.Message)
	up   func(c *conn) // the subscription is made; nil: nobody wants to know
	down func()        // a connection for which up was called has ended
	// failed is told how each attempt ended. Its error, if it gives one, is the end of run.
	failed            func(err error, up, first bool) error
	shortest, longest time.Duration // pauses

	failures map[string]time.Time // by address: when it failed last; only run's goroutine touches it
	last     string               // address of the last connection; so with this
	anew     bool                 // since up was called last the broker has begun a new session; only run's goroutine touches it
	busy     atomic.Int32         // messages that take has been given and not returned from
}

func newSubscriber(o Options, filters []string) (*subscriber, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &subscriber{
		o: o, log: o.Log, filters: slices.Compact(slices.Sorted(slices.Values(filters))),
		shortest: 250 * time.Millisecond, longest: 15 * time.Second,
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// impatient gives up on what a person has to mend: who starts a program sees it at once.
func (s *subscriber) impatient(lost string) func(err error, up, first bool) error {
	return func(err error, up, first bool) error {
		var refused *filterError
		if errors.As(err, &refused) || first && !up && errors.Is(err, bridge.ErrRefused) {
			return err
		}
		s.log.Warn(lost, "err", err, "was_up", up) //nolint:sloglint // a constant of each caller
		return nil
	}
}

// run works until ctx ends. Of several addresses it is at the one that o.Prefer names, if that one takes it; else it tries
// them in turn.
func (s *subscriber) run(ctx context.Context) error {
	pause := s.shortest
	s.failures = map[string]time.Time{}
	at, tried := s.preferred(0), 0
	for first := true; ; first = false {
		began := time.Now()
		s.o.URL = s.o.URLs[at]
		up, err := s.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if s.o.OnState != nil {
			s.o.OnState(false, err)
		}
		if errors.Is(err, errElsewhere) {
			at, tried = s.preferred(at), 0
			continue
		}
		if err := s.failed(err, up, first); err != nil {
			return err
		}
		if up && time.Since(began) > pause {
			pause = s.shortest
		}
		wait := pause
		if up {
			at, tried = s.preferred(at), 0
		} else {
			s.failures[s.o.URL] = time.Now()
			at = (at + 1) % len(s.o.URLs)
			if tried++; tried < len(s.o.URLs) {
				wait = s.shortest
			} else {
				at, tried = s.preferred(at), 0
			}
		}
		select {
		case <-time.After(rand.N(wait) + 1):
		case <-ctx.Done():
			return nil
		}
		if tried == 0 {
			pause = min(2*pause, s.longest)
		}
	}
}

// preferred is the index of the address to be at; at if none is better.
func (s *subscriber) preferred(at int) int {
	if s.o.Prefer == nil {
		return at
	}
	if i := slices.Index(s.o.URLs, s.o.Prefer()); i >= 0 {
		return i
	}
	return at
}

// Where a connection is is looked at so often, and an address that has failed is left alone for a while.
const (
	lookElsewhere = time.Second
	leaveAlone    = time.Minute
)

// errElsewhere ends a connection because another address is preferred.
var errElsewhere = errors.New("moving to where the data goes")

// elsewhere tells whether the connection should be at another address.
func (s *subscriber) elsewhere() bool {
	to := s.o.URLs[s.preferred(slices.Index(s.o.URLs, s.o.URL))]
	failed, ever := s.failures[to]
	return to != s.o.URL && (!ever || time.Since(failed) > leaveAlone)
}

// filterError is a subscription that the broker refused.
type filterError struct {
	filter string
	o      *Options
}

func (e *filterError) Error() string {
	who := fmt.Sprintf("client id %q", e.o.ClientID)
	if e.o.Username != "" {
		who = fmt.Sprintf("user %q, client id %q", e.o.Username, e.o.ClientID)
	}
	return fmt.Sprintf("the broker refuses filter %q: permit %s to subscribe to it", e.filter, who)
}

// once lives as long as one connection. up: the subscription was made.
func (s *subscriber) once(ctx context.Context) (up bool, err error) {
	dialCtx, cancel := context.WithTimeout(ctx, s.o.ConnectTimeout)
	defer cancel()
	g := guard{maxPublish: s.o.MaxPayload + maxTopic + 8, filters: len(s.filters)}
	if s.cut {
		g.cutTo = s.o.MaxPayload + 1
	}
	pc, c, lost, err := client(dialCtx, s.o, g, s.acks, func(po *paho.ClientOptions, c *conn) {
		take := s.take(c)
		po.SetOrderMatters(true)
		po.SetAutoAckDisabled(s.manual)
		// The default handler spares paho the search for a route. A persistent session's messages may come before
		// the subscription is made.
		po.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) {
			s.busy.Add(1)
			defer s.busy.Add(-1)
			take(m)
		})
	})
	if err != nil {
		return false, err
	}
	defer func() {
		_ = c.fail(errClosed)
		<-lost
		<-c.flushed
	}()
	s.anew = s.anew && s.last == s.o.URL || !c.resumed
	s.last = s.o.URL
	if err := s.subscribe(ctx, pc, c); err != nil {
		return false, err
	}
	if s.up != nil {
		s.up(c)
	}
	s.anew = false
	if s.down != nil {
		defer s.down()
	}
	if s.o.OnState != nil {
		s.o.OnState(true, nil)
	}
	if s.o.OnUp != nil {
		s.o.OnUp()
	}
	var look <-chan time.Time
	if s.o.Prefer != nil && len(s.o.URLs) > 1 {
		t := time.NewTicker(lookElsewhere)
		defer t.Stop()
		look = t.C
	}
	for {
		select {
		case <-c.over:
			return true, c.reason()
		case <-ctx.Done():
			goodbye(c)
			return true, nil
		case <-look:
			if s.elsewhere() {
				goodbye(c)
				return true, errElsewhere
			}
		}
	}
}

// goodbye ends a connection in order: all that was written before still goes, acknowledgements above all.
func goodbye(c *conn) {
	_, _ = c.Write(disconnect)
	_ = c.Close()
	<-c.flushed
}

// subscribe waits for the answer as long as a connection may take, not counting the time in which messages that come
// before it are being handled: a slow handler is no dead broker.
func (s *subscriber) subscribe(ctx context.Context, pc paho.Client, c *conn) error {
	if len(s.filters) == 0 {
		return nil
	}
	qos := make(map[string]byte, len(s.filters))
	for _, f := range s.filters {
		qos[f] = 1
	}
	t := pc.SubscribeMultiple(qos, nil)
	const looks = 20
	look := time.NewTicker(max(s.o.ConnectTimeout/looks, time.Millisecond))
	defer look.Stop()
	for quiet := 0; ; {
		select {
		case <-t.Done():
		case <-c.over:
		case <-ctx.Done():
			goodbye(c)
		case <-look.C:
			if quiet++; s.busy.Load() > 0 {
				quiet = 0
			}
			if quiet <= looks {
				continue
			}
			_ = c.fail(fmt.Errorf("subscribe: %w", context.DeadlineExceeded))
		}
		break
	}
	if err := c.reason(); err != nil {
		return err
	}
	if err := t.Error(); err != nil {
		return err
	}
	st, ok := t.(*paho.SubscribeToken)
	if !ok {
		return errors.New("paho gave another token than for a subscription")
	}
	for f, code := range st.Result() {
		if code > 2 {
			return &filterError{f, &s.o}
		}
	}
	return nil
}
