package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/wire"
	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/tracing"
	"holdfast/spool"
)

// traceEnd bounds how long a stop waits for the collector.
const traceEnd = time.Second

// traces tells a collector the way of some messages. nil: of none, and nothing is done for it.
type traces struct {
	t     *tracing.Tracer
	id    func(lane string, seq uint64) string
	lanes map[spool.Lane]string
	free  sync.Pool // of *arriving
}

func (g *Gateway) openTraces(context.Context) error {
	c := g.cfg.Traces
	if c.Endpoint == "" {
		return nil
	}
	t, err := tracing.New(tracing.Config{Endpoint: c.Endpoint, Every: uint64(c.Every), Gateway: g.cfg.Gateway.ID, Version: g.version, Log: g.log.With("part", "traces")})
	if err != nil {
		return err
	}
	g.traces = &traces{t: t, id: func(lane string, seq uint64) string {
		epoch, _, _ := g.spool.EpochOf(lane, seq)
		return wire.ID(g.cfg.Gateway.ID, epoch, lane, seq)
	}, lanes: map[spool.Lane]string{}}
	for _, l := range g.spool.Lanes() {
		if number, ok := g.spool.Lane(l.Name); ok {
			g.traces.lanes[number] = l.Name
		}
	}
	g.intake.traces = g.traces
	g.log.Info("traces open", "endpoint", c.Endpoint, "every", c.Every)
	return nil
}

func (x *traces) close() error {
	if x == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), traceEnd)
	defer cancel()
	if err := x.t.Close(ctx); err != nil {
		return fmt.Errorf("traces: %w", err)
	}
	return nil
}

// arriving is a message on its way to the disk. Whether it is told is known when it is there and has its sequence, so each is noted; the
// buffers are used again.
type arriving struct {
	x                     *traces
	lane                  spool.Lane
	done                  kv.Done
	device, topic, parent []byte
	size                  int
	received              time.Time
}

// begin makes what is to be handed in with m instead of done. If m is not taken it is given back with drop.
func (x *traces) begin(m *broker.Message, lane spool.Lane, done kv.Done) *arriving {
	a, _ := x.free.Get().(*arriving)
	if a == nil {
		a = &arriving{x: x}
	}
	a.lane, a.done, a.size, a.received = lane, done, len(m.Record.Payload), time.Now()
	a.device, a.topic, a.parent = append(a.device[:0], m.Record.Device...), append(a.topic[:0], m.Record.Topic...), a.parent[:0]
	if m.Record.Props != nil {
		for _, p := range m.Record.Props.User {
			if strings.EqualFold(p[0], "traceparent") {
				a.parent = append(a.parent[:0], p[1]...)
			}
		}
	}
	return a
}

func (a *arriving) drop() {
	a.done = nil
	a.x.free.Put(a)
}

// Done implements kv.Done.
func (a *arriving) Done(token, seq uint64, err error) {
	stored := time.Now()
	a.done.Done(token, seq, err)
	if err == nil && a.x.t.First(seq) == seq {
		lane := a.x.lanes[a.lane]
		a.x.t.Arrived(&tracing.Arrival{
			Message: tracing.Message{ID: a.x.id(lane, seq), Lane: lane, Seq: seq, Topic: string(a.topic)},
			Device:  string(a.device), Size: a.size, Received: a.received, Stored: stored, Answered: time.Now(), Parent: string(a.parent),
		})
	}
	a.drop()
}

// sent tells of a send of messages that upstream has acknowledged, or refused.
func (x *traces) sent(upstream string, s *bridge.Sent) {
	if s.Lane == spool.SystemLane {
		return
	}
	for seq := x.t.First(s.First); seq < s.First+uint64(s.Records); seq += x.t.Every() {
		x.t.Delivered(&tracing.Delivery{
			Message:  tracing.Message{ID: x.id(s.Lane, seq), Lane: s.Lane, Seq: seq},
			Upstream: upstream, Records: s.Records, Sent: s.At, Ended: s.Ended, Err: s.Err,
		})
	}
}
