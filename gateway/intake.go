package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"

	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/internal/clock"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/spool"
)

// appender is what an Intake needs of a spool.
type appender interface {
	Lane(name string) (spool.Lane, bool)
	Append(lane spool.Lane, r *spool.Record, ops []kv.Op, done kv.Done, token uint64, shed bool) error
}

// Intake takes what devices publish: a lane by the routes, the receive time, and into the spool. It
// implements broker.Intake. Many goroutines may call it at once; it keeps nothing of what it is given
// and allocates nothing. With traces it copies who sent it and the topic, into buffers that are used again.
type Intake struct {
	spool  appender
	routes atomic.Pointer[routes[spool.Lane]] // replaced as a whole
	clock  *clock.Clock
	// answers takes what devices say of their commands; nil: there are none.
	answers func(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) (taken bool, err error)
	level   func() kv.Level // how full the disk is; nil: it does not matter
	traces  *traces         // nil: none
}

func newIntake(sp appender, table []config.Route, c *clock.Clock) (*Intake, error) {
	compiled, err := compileRoutes(sp, table)
	if err != nil {
		return nil, err
	}
	i := &Intake{spool: sp, clock: c}
	i.routes.Store(compiled)
	return i, nil
}

// compileRoutes makes the table of routes; every lane in it has to be there.
func compileRoutes(sp appender, table []config.Route) (*routes[spool.Lane], error) {
	lane := func(name string) (spool.Lane, error) {
		if name == config.LaneNone {
			return spool.LaneNone, nil
		}
		l, ok := sp.Lane(name)
		if !ok {
			return 0, fmt.Errorf("lane %q: %w", name, spool.ErrNoLane)
		}
		return l, nil
	}
	rs := make([]route[spool.Lane], len(table))
	all := false
	for i, r := range table {
		l, err := lane(r.Lane)
		if err != nil {
			return nil, fmt.Errorf("route %q: %w", r.Match, err)
		}
		rs[i] = route[spool.Lane]{r.Match, l}
		all = all || r.Match == "#"
	}
	rest, err := lane(config.DefaultLane)
	if err != nil {
		if !all {
			return nil, fmt.Errorf("messages that no route matches: %w", err)
		}
		rest = spool.LaneNone // only topics that begin with '$' get here, and devices publish none
	}
	return newRoutes(rs, rest)
}

// Publish hands m in, together with ops. What comes after is told to done; an error means that
// nothing was taken. It waits while the store is behind, but not with QoS 0, which is the first to go
// under overload.
func (i *Intake) Publish(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) error {
	now := i.clock.Read()
	m.Record.Received, m.Record.Uptime = now.Wall, now.Uptime()
	if i.answers != nil && bytes.HasPrefix(m.Record.Topic, []byte("cmd/")) { // few
		if taken, err := i.answer(m, ops, done, token); taken {
			return err
		}
	}
	if now.Unsynced {
		m.Record.Flags |= spool.FlagClockUnsynced
	}
	lane := i.routes.Load().match(m.Record.Topic)
	if lane == spool.LaneNone && m.Retain && len(m.Record.Payload) > 0 && i.level != nil && i.level() == kv.LevelFull {
		return errKeep
	}
	var traced *arriving
	if i.traces != nil && lane != spool.LaneNone {
		traced = i.traces.begin(m, lane, done)
		done = traced
	}
	err := i.spool.Append(lane, &m.Record, ops, done, token, m.QoS == 0)
	if err != nil && traced != nil {
		traced.drop()
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, spool.ErrFull):
		return fmt.Errorf("%w: %w", broker.ErrQuota, err)
	case errors.Is(err, spool.ErrBusy):
		return errShed
	}
	return err
}

// answer hands m over if it is a device's answer to a command. One that is not believed is acknowledged all the same,
// with ops: MQTT 3.1.1 has no other word than none, and the device would send it again for ever. The queue has counted
// and logged it.
func (i *Intake) answer(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) (taken bool, err error) {
	taken, err = i.answers(m, ops, done, token)
	if errors.Is(err, devices.ErrAnswer) {
		return true, i.spool.Append(spool.LaneNone, nil, ops, done, token, false)
	}
	return taken, err
}

// errKeep refuses a retained message that is in no lane, but in a row.
var errKeep = fmt.Errorf("keep a retained message: %w: %w", broker.ErrQuota, kv.ErrDiskFull)

// errShed is made once: shedding is for the moments when there is too much to do.
var errShed = fmt.Errorf("%w: %w", broker.ErrQuota, spool.ErrBusy)
