package gateway

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/gateway/httpapi"
	"holdfast/internal/lifecycle"
)

// uplink is the link to one upstream: the bridge that drains the spool into it and, if commands come from there, what takes them.
type uplink struct {
	cfg    bridge.Config
	bridge *bridge.Bridge
	orders *orders // nil: no commands

	// Of one that runs.
	stop context.CancelFunc // nil: it does not
	done chan error         // cap 1: what Run returned
}

// uplinks runs the links to the upstreams, which may change meanwhile.
type uplinks struct {
	make func(*mqttup.Upstream, bridge.Config) (*uplink, error)

	mu     sync.Mutex      // guards what follows; held for as long as a change takes by changing alone
	links  []*uplink       // in the order of the configuration
	ctx    context.Context //nolint:containedctx // of Run, for links that come later; nil: it has not begun
	closed bool            // Run has ended, or was never to begin

	changing sync.Mutex    // one change at a time; taken before mu
	ended    chan struct{} // cap 1: a link has ended by itself
}

var errStopping = errors.New("the gateway stops")

// all gives the links, in the order of the configuration.
func (u *uplinks) all() []*uplink {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.links)
}

// Run runs the links until ctx ends, and stops them side by side. It ends early if one of them does.
func (u *uplinks) Run(ctx context.Context) error {
	u.mu.Lock()
	u.ctx = ctx
	for _, l := range u.links {
		u.start(l)
	}
	u.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-u.ended:
	}
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	u.changing.Lock() // a change that is under way sees closed, or is through
	defer u.changing.Unlock()
	return stopAll(u.all())
}

// start runs l. The caller holds mu.
func (u *uplinks) start(l *uplink) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(u.ctx)) // stopAll ends it
	l.stop, l.done = cancel, make(chan error, 1)
	parts := []lifecycle.Part{{Name: "bridge to " + l.cfg.Name, Run: l.bridge.Run, Grace: bridgeDrain + bridgeGoodbye + partSlack}}
	if l.orders != nil {
		parts = append(parts, lifecycle.Part{Name: "commands from " + l.cfg.Name, Run: l.orders.Run, Grace: bridgeGoodbye + partSlack})
	}
	go func() {
		err := lifecycle.Group(l.cfg.Name, parts...).Run(ctx)
		l.done <- err
		if ctx.Err() == nil { // nobody asked it to
			select {
			case u.ended <- struct{}{}:
			default:
			}
		}
	}()
}

// stopAll stops links side by side and gives back what they held of the spool. One that never ran is closed.
func stopAll(links []*uplink) error {
	var wg sync.WaitGroup
	errs := make([]error, len(links))
	for i, l := range links {
		wg.Go(func() {
			if l.stop == nil {
				over, cancel := context.WithCancel(context.Background())
				cancel()
				errs[i] = l.bridge.Run(over) // ends at once, and closes what it has
				return
			}
			l.stop()
			errs[i] = <-l.done // each of its parts has its grace
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// open makes the links of a start.
func (u *uplinks) open(cfgs []bridge.Config, up func(bridge.Config) (*mqttup.Upstream, error)) error {
	for _, c := range cfgs {
		far, err := up(c)
		if err != nil {
			return err
		}
		l, err := u.make(far, c)
		if err != nil {
			return err
		}
		u.links = append(u.links, l)
	}
	return nil
}

// change is what becomes of the links.
type change struct {
	next []bridge.Config
	ups  map[string]*mqttup.Upstream // of those that are new or not as they were: the others stay as they are
	gone []string                    // upstreams that are left
}

// plan finds out what has to be done to come to next; again names upstreams that begin anew although nothing about them is
// different. It checks all that can be checked before anything is stopped.
func (u *uplinks) plan(next []bridge.Config, again []string, up func(bridge.Config) (*mqttup.Upstream, error)) (*change, error) {
	c := &change{next: next, ups: map[string]*mqttup.Upstream{}}
	now := u.all()
	for _, l := range now {
		if !slices.ContainsFunc(next, func(n bridge.Config) bool { return n.Name == l.cfg.Name }) {
			c.gone = append(c.gone, l.cfg.Name)
		}
	}
	for _, n := range next {
		if i := slices.IndexFunc(now, func(l *uplink) bool { return l.cfg.Name == n.Name }); i >= 0 && reflect.DeepEqual(now[i].cfg, n) && !slices.Contains(again, n.Name) {
			continue
		}
		if err := n.Validate(); err != nil {
			return nil, fmt.Errorf("upstream %q: %w", n.Name, err)
		}
		far, err := up(n)
		if err != nil {
			return nil, err
		}
		c.ups[n.Name] = far
	}
	return c, nil
}

// apply brings a planned change about: it stops the links that are not as they should be, calls between while nothing of theirs reads the spool,
// and makes and starts the new ones. After an error from between, or if a link cannot be made, it calls undo and puts the old ones back.
func (u *uplinks) apply(c *change, up func(bridge.Config) (*mqttup.Upstream, error), between func() error, undo func()) error {
	u.changing.Lock()
	defer u.changing.Unlock()
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return errStopping
	}
	now := slices.Clone(u.links)
	u.mu.Unlock()
	var old []*uplink
	kept := map[string]*uplink{}
	for _, l := range now {
		if c.ups[l.cfg.Name] != nil || slices.Contains(c.gone, l.cfg.Name) {
			old = append(old, l)
		} else {
			kept[l.cfg.Name] = l
		}
	}
	if err := stopAll(old); err != nil {
		// It holds on to the spool, or the spool cannot be read: nothing that runs beside it would be right.
		select {
		case u.ended <- struct{}{}:
		default:
		}
		return err
	}
	links, err := u.renew(c, kept, between)
	if err == nil {
		u.settle(links)
		return nil
	}
	undo()
	was := &change{ups: map[string]*mqttup.Upstream{}}
	for _, l := range now {
		was.next = append(was.next, l.cfg)
		if kept[l.cfg.Name] == nil {
			far, upErr := up(l.cfg)
			if upErr != nil {
				return errors.Join(err, upErr) // it could be made before
			}
			was.ups[l.cfg.Name] = far
		}
	}
	links, again := u.renew(was, kept, func() error { return nil })
	u.settle(links)
	return errors.Join(err, again)
}

// renew makes the links that are not kept. After an error those are closed again, and the kept ones are what it returns.
func (u *uplinks) renew(c *change, kept map[string]*uplink, between func() error) (links []*uplink, err error) {
	var made []*uplink
	err = between()
	for _, n := range c.next {
		l := kept[n.Name]
		if l == nil && err == nil {
			if l, err = u.make(c.ups[n.Name], n); err == nil {
				made = append(made, l)
			}
		}
		if l != nil {
			links = append(links, l)
		}
	}
	if err != nil {
		err = errors.Join(err, stopAll(made))
		links = slices.DeleteFunc(links, func(l *uplink) bool { return slices.Contains(made, l) })
	}
	return links, err
}

// settle takes links over and starts those that do not run.
func (u *uplinks) settle(links []*uplink) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.links = links
	for _, l := range links {
		if l.stop == nil && u.ctx != nil {
			u.start(l)
		}
	}
}

// Close closes links that were never run. Twice is no harm.
func (u *uplinks) Close() error {
	u.mu.Lock()
	if u.ctx != nil || u.closed {
		u.mu.Unlock()
		return nil
	}
	u.closed = true
	u.mu.Unlock()
	return stopAll(u.all())
}

// newUpstream makes what a link dials.
func (g *Gateway) newUpstream(c bridge.Config) (*mqttup.Upstream, error) {
	up, err := mqttup.FromConfig(c, g.cfg.Gateway.ID, g.spool.Epoch(), g.version, g.clock.Time)
	if err != nil {
		return nil, fmt.Errorf("upstream %q: %w", c.Name, err)
	}
	return up, nil
}

// newUplink makes a link. It starts nothing.
func (g *Gateway) newUplink(up *mqttup.Upstream, c bridge.Config) (*uplink, error) {
	tuned := c
	tuned.Tuning.DrainTimeout = bridgeDrain
	tuned.Tuning.Synced = func() bool { return !g.clock.Read().Unsynced }
	log := g.log.With("part", "bridge") // it names the upstream itself
	b, err := bridge.New(tuned, g.cfg.Gateway.ID, g.spool, up, log, g.registry)
	if err != nil {
		return nil, err
	}
	b.KeepUsage(usage{g.store, c.Name})
	b.OnLink(func(up bool, reason string) {
		g.events.PublishUpstream(httpapi.UpstreamChange{Name: c.Name, Connected: up, Error: reason})
	})
	if g.traces != nil {
		b.OnSent(func(s *bridge.Sent) { g.traces.sent(c.Name, s) })
	}
	l := &uplink{cfg: c, bridge: b}
	if c.Commands {
		l.orders = newOrders(g.cfg.Gateway.ID, tuned, b, g.commands, g.clock.Time, log.With("upstream", c.Name))
	}
	lanes := c.Lanes
	if lanes == nil {
		lanes = []string{"all"}
	}
	g.log.Info("upstream configured", "upstream", c.Name, "urls", c.Addresses(), "format", c.Format, "lanes", lanes)
	return l, nil
}
