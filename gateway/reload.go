package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/internal/config"
	"holdfast/internal/logs"
	"holdfast/spool"
)

// What a reload takes: devices.roles, devices.anonymous, the limits of lanes, routes, upstreams and log.level. The files of listeners'
// certificates are read again, too. Everything else stays as it is until a restart, and what stands on that waits with it: routes and
// upstreams that name a lane which is not there yet.

// ReloadReport says what a reload has done, or would do.
type ReloadReport struct {
	Changed []config.Change // taken
	Restart []config.Change // have to wait for a restart
}

// reloadPlan is a reload that was checked, and not yet made.
type reloadPlan struct {
	ReloadReport
	next     *config.Config // what the gateway works with afterwards
	routes   *routes[spool.Lane]
	links    *change
	level    slog.Level
	detached map[string][]string // upstream -> lanes that it leaves
}

// Reload takes what of a configuration may change while the gateway runs. Connections that are still allowed stay; an upstream that is
// different is connected anew, and so are all of them if a lane's share or order is. What is wrong leaves everything as it was and is told in
// the error.
func (g *Gateway) Reload(cfg *config.Config) (ReloadReport, error) {
	g.reloading.Lock()
	defer g.reloading.Unlock()
	p, err := g.planReload(cfg)
	if err != nil {
		return ReloadReport{}, err
	}
	if err := g.makeReload(p); err != nil {
		return ReloadReport{}, err
	}
	return p.ReloadReport, nil
}

// planReload holds cfg against what the gateway works with, and checks all that can be checked before anything is taken. The caller holds
// reloading.
func (g *Gateway) planReload(cfg *config.Config) (*reloadPlan, error) {
	cfg, err := cfg.Absolute()
	if err != nil {
		return nil, err
	}
	if err := devices.CheckRoles(cfg.Devices.Roles); err != nil {
		return nil, fmt.Errorf("devices.roles: %w", err)
	}
	// The new configuration was held to this with its own listeners; those that are open stay until a restart.
	if cfg.Devices.Anonymous && !cfg.Devices.AllowAnonymousOnNetwork {
		for i := range g.cfg.Listeners {
			if l := &g.cfg.Listeners[i]; !config.Loopback(l.Address) {
				return nil, fmt.Errorf("devices.anonymous would let everybody in by listener %s, which is still open at %s: restart to have the new listeners, "+
					"or set devices.allow_anonymous_on_network to true if the network itself keeps strangers out", l.Name, l.Address)
			}
		}
	}
	p := &reloadPlan{detached: map[string][]string{}}
	next := *g.cfg
	next.Devices.Roles, next.Devices.Anonymous = cfg.Devices.Roles, cfg.Devices.Anonymous
	next.Devices.AllowAnonymousOnNetwork = cfg.Devices.AllowAnonymousOnNetwork
	next.Log.Level = cfg.Log.Level
	var ok bool
	if p.level, ok = logs.ParseLevel(cfg.Log.Level); !ok {
		return nil, fmt.Errorf("log.level is %q: it may be debug, info, warn or error", cfg.Log.Level)
	}
	again := false // every link has to begin anew
	next.Spool.Lanes = slices.Clone(g.cfg.Spool.Lanes)
	for i, was := range next.Spool.Lanes {
		at := slices.IndexFunc(cfg.Spool.Lanes, func(l spool.LaneConfig) bool { return l.Name == was.Name })
		if at < 0 {
			continue // it is there until a restart
		}
		is := cfg.Spool.Lanes[at]
		next.Spool.Lanes[i] = is
		again = again || is.Share != was.Share || is.Drain != was.Drain || is.BackfillShare != was.BackfillShare || is.Urgent != was.Urgent
	}
	there := func(lane string) bool {
		return lane == config.LaneNone || slices.ContainsFunc(next.Spool.Lanes, func(l spool.LaneConfig) bool { return l.Name == lane })
	}
	if !slices.ContainsFunc(cfg.Routes, func(r config.Route) bool { return !there(r.Lane) }) {
		next.Routes = cfg.Routes
	}
	if p.routes, err = compileRoutes(g.spool, next.Routes); err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	next.Upstreams = []bridge.Config{}
	for _, u := range cfg.Upstreams {
		if slices.ContainsFunc(u.Lanes, func(l string) bool { return !there(l) }) {
			at := slices.IndexFunc(g.cfg.Upstreams, func(old bridge.Config) bool { return old.Name == u.Name })
			if at < 0 {
				continue
			}
			u = g.cfg.Upstreams[at]
		}
		next.Upstreams = append(next.Upstreams, u)
	}
	var restarted []string
	for _, u := range next.Upstreams {
		if again {
			restarted = append(restarted, u.Name)
		}
	}
	if p.links, err = g.uplinks.plan(next.Upstreams, restarted, g.newUpstream); err != nil {
		return nil, err
	}
	for _, was := range g.cfg.Upstreams {
		at := slices.IndexFunc(next.Upstreams, func(u bridge.Config) bool { return u.Name == was.Name })
		if at < 0 {
			p.detached[was.Name] = nil
			continue
		}
		is := next.Upstreams[at]
		for _, l := range next.Spool.Lanes {
			if takes(&was, l.Name) && !takes(&is, l.Name) {
				p.detached[was.Name] = append(p.detached[was.Name], l.Name)
			}
		}
	}
	p.next = &next
	p.Changed, p.Restart = config.Diff(g.cfg, &next), config.Diff(&next, cfg)
	return p, nil
}

// takes says whether messages of a lane wait for an upstream.
func takes(u *bridge.Config, lane string) bool {
	return u.Lanes == nil || slices.Contains(u.Lanes, lane)
}

// makeReload makes a planned reload. What can still go wrong comes first, and is taken back. The caller holds reloading.
func (g *Gateway) makeReload(p *reloadPlan) error {
	if err := g.broker.ReloadTLS(); err != nil { // a listener whose files are wrong keeps those it has
		return err
	}
	was := *g.cfg
	between := func() error {
		if err := g.spool.SetLimits(p.next.Spool.Lanes); err != nil {
			return err
		}
		for upstream, lanes := range p.detached {
			if err := g.spool.Detach(upstream, lanes); err != nil {
				return err
			}
		}
		return nil
	}
	undo := func() {
		if err := g.spool.SetLimits(was.Spool.Lanes); err != nil {
			g.log.Error("limits of lanes are not what they were: restart the gateway", "err", err)
		}
	}
	if err := g.uplinks.apply(p.links, g.newUpstream, between, undo); err != nil {
		return err
	}
	for _, name := range p.links.gone {
		g.log.Info("upstream removed", "upstream", name)
	}
	if err := g.devices.SetPolicy(p.next.Devices.Roles, p.next.Devices.Anonymous); err != nil {
		return fmt.Errorf("devices.roles: %w", err) // planReload has checked them
	}
	g.intake.routes.Store(p.routes)
	g.logs.SetLevel(p.level)
	g.cfg.Devices, g.cfg.Spool.Lanes, g.cfg.Routes, g.cfg.Upstreams = p.next.Devices, p.next.Spool.Lanes, p.next.Routes, p.next.Upstreams
	g.cfg.Log.Level = p.next.Log.Level
	g.broker.Recheck()
	return nil
}

// errNoFile is for gateways that were not told where their configuration came from.
var errNoFile = errors.New("this gateway does not know its configuration file: restart it")

// read reads the configuration again.
func (g *Gateway) read() (*config.Config, []string, error) {
	if g.load == nil {
		return nil, nil, errNoFile
	}
	cfg, warnings, err := g.load()
	var texts []string
	for _, w := range warnings {
		texts = append(texts, w.String())
	}
	return cfg, texts, err
}

// ReloadFile reads the configuration again and takes it, see Reload. It tells in the log what came of it.
func (g *Gateway) ReloadFile() (httpapi.Reload, error) {
	if g.state.Load() == running { // before, READY would be told too early
		g.notify(daemon.SdNotifyReloading)
		defer g.notify(daemon.SdNotifyReady)
	}
	cfg, warnings, err := g.read()
	var problems config.Problems
	switch {
	case errors.As(err, &problems):
		for _, p := range problems {
			g.log.Error("configuration is wrong, the old one stays", "file", p.File, "key", p.Key, "line", p.Line, "problem", p.Text)
		}
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	case err != nil:
		g.log.Error("configuration cannot be read, the old one stays", "err", err)
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	for _, w := range warnings {
		g.log.Warn("configuration", "warning", w)
	}
	r, err := g.Reload(cfg)
	if err != nil {
		g.log.Error("configuration not taken, the old one stays", "err", err)
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	if len(r.Restart) > 0 {
		g.log.Warn("configuration has changes that need a restart", "keys", keys(r.Restart))
	}
	g.log.Info("configuration read again", "file", g.file, "changed", keys(r.Changed))
	return g.shown(r, warnings), nil
}

// Hangup is ReloadFile for a signal: it is noted in the audit log as well.
func (g *Gateway) Hangup(signal string) {
	r, err := g.ReloadFile()
	e := audit.Entry{Who: signal, Act: audit.Reload, Object: g.file, Result: audit.Done, Detail: r.Summary()}
	if err != nil {
		e.Result, e.Detail = audit.Refused, err.Error()
	}
	g.record(e)
}

// ConfigDiff implements httpapi.Control: what ReloadFile would do now.
func (g *Gateway) ConfigDiff() (httpapi.Reload, error) {
	cfg, warnings, err := g.read()
	if err != nil {
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	r, err := g.PlanReload(cfg)
	if err != nil {
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	return g.shown(r, warnings), nil
}

// DiffText implements httpapi.Control: what a reload with this file would do. The files that it names are not looked at.
func (g *Gateway) DiffText(name string, text []byte) (httpapi.Reload, error) {
	cfg, warnings, err := config.Parse(name, text)
	if err != nil {
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	r, err := g.PlanReload(cfg)
	if err != nil {
		return httpapi.Reload{}, fmt.Errorf("%w: %w", httpapi.ErrConfig, err)
	}
	var texts []string
	for _, w := range warnings {
		texts = append(texts, w.String())
	}
	shown := g.shown(r, texts)
	shown.File = name
	return shown, nil
}

// PlanReload tells what Reload would do.
func (g *Gateway) PlanReload(cfg *config.Config) (ReloadReport, error) {
	g.reloading.Lock()
	defer g.reloading.Unlock()
	p, err := g.planReload(cfg)
	if err != nil {
		return ReloadReport{}, err
	}
	return p.ReloadReport, nil
}

// LogLevel implements httpapi.Control.
func (g *Gateway) LogLevel() string { return logs.LevelName(g.logs.Level()) }

// SetLogLevel implements httpapi.Control. It holds until a reload, or a restart, takes the file's.
func (g *Gateway) SetLogLevel(name string) error {
	level, ok := logs.ParseLevel(name)
	if !ok {
		return fmt.Errorf("%q is no level: it is debug, info, warn or error", name)
	}
	g.reloading.Lock()
	defer g.reloading.Unlock()
	was := g.LogLevel()
	if level > slog.LevelInfo {
		g.log.Info("log level changes", "from", was, "to", name) // the last line of it
	}
	g.logs.SetLevel(level)
	g.cfg.Log.Level = name
	if level <= slog.LevelInfo {
		g.log.Info("log level changed", "from", was, "to", name)
	}
	return nil
}

// DebugDevice implements httpapi.Control.
func (g *Gateway) DebugDevice(id string, d time.Duration) (until time.Time, err error) {
	if until, err = g.logs.Watch(id, d); err != nil {
		return until, fmt.Errorf("%w: %w", httpapi.ErrDebug, err)
	}
	if d > 0 {
		g.log.Info("debug log of a device begins", "device", id, "until", until)
	} else {
		g.log.Info("debug log of a device ended", "device", id)
	}
	return until, nil
}

// DebugUntil implements httpapi.Control.
func (g *Gateway) DebugUntil(id string) time.Time { return g.logs.Until(id) }

func keys(changes []config.Change) []string {
	all := make([]string, len(changes))
	for i, c := range changes {
		all[i] = c.Key
	}
	return all
}

func (g *Gateway) shown(r ReloadReport, warnings []string) httpapi.Reload {
	show := func(changes []config.Change) []httpapi.ConfigChange {
		all := make([]httpapi.ConfigChange, len(changes))
		for i, c := range changes {
			all[i] = httpapi.ConfigChange(c)
		}
		return all
	}
	if warnings == nil {
		warnings = []string{}
	}
	return httpapi.Reload{File: g.file, Changed: show(r.Changed), Restart: show(r.Restart), Warnings: warnings}
}
