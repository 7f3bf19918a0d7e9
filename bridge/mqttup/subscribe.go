package mqttup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
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
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return err
	}
	if len(filters) == 0 {
		return errors.New("no filters to subscribe to")
	}
	filters = slices.Compact(slices.Sorted(slices.Values(filters)))
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	const shortest, longest = 250 * time.Millisecond, 15 * time.Second
	pause := shortest
	for first := true; ; first = false {
		began := time.Now()
		up, err := subscribeOnce(ctx, o, filters, handler)
		if ctx.Err() != nil {
			return nil
		}
		var refused *filterError
		if errors.As(err, &refused) || first && !up && errors.Is(err, bridge.ErrRefused) {
			return err
		}
		log.Warn("subscriber lost its connection", "err", err, "was_up", up)
		if up && time.Since(began) > pause {
			pause = shortest
		}
		select {
		case <-time.After(rand.N(pause) + 1):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, longest)
	}
}

// filterError is a subscription that the broker refused.
type filterError struct{ filter string }

func (e *filterError) Error() string { return fmt.Sprintf("the broker refuses filter %q", e.filter) }

// subscribeOnce lives as long as one connection. up: the subscription was made.
func subscribeOnce(ctx context.Context, o Options, filters []string, handler func(string, []byte)) (up bool, err error) {
	dialCtx, cancel := context.WithTimeout(ctx, o.ConnectTimeout)
	defer cancel()
	g := guard{maxPublish: o.MaxPayload + maxTopic + 8, filters: len(filters)}
	pc, c, lost, err := client(dialCtx, o, g, nil, func(po *paho.ClientOptions) {
		po.SetOrderMatters(true)
		// The default handler spares paho the search for a route.
		po.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { handler(m.Topic(), m.Payload()) })
	})
	if err != nil {
		return false, err
	}
	defer func() {
		_ = c.fail(errClosed)
		<-lost
		<-c.flushed
	}()
	qos := make(map[string]byte, len(filters))
	for _, f := range filters {
		qos[f] = 1
	}
	t := pc.SubscribeMultiple(qos, nil)
	select {
	case <-t.Done():
	case <-c.over:
	case <-dialCtx.Done():
		_ = c.fail(fmt.Errorf("subscribe: %w", context.Cause(dialCtx)))
	}
	if err := c.reason(); err != nil {
		return false, err
	}
	if err := t.Error(); err != nil {
		return false, err
	}
	st, ok := t.(*paho.SubscribeToken)
	if !ok {
		return false, errors.New("paho gave another token than for a subscription")
	}
	for f, code := range st.Result() {
		if code > 2 {
			return false, &filterError{f}
		}
	}
	if o.OnUp != nil {
		o.OnUp()
	}
	select {
	case <-c.over:
		return true, c.reason()
	case <-ctx.Done():
		_, _ = c.Write(disconnect)
		_ = c.Close() // all that was written before still goes
		<-c.flushed
		return true, nil
	}
}
