// Package gateway puts the parts together: devices publish to the broker, the intake hands their
// messages to the spool, bridges drain the spool upstream. It is the one package that knows them all.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/internal/clock"
	"holdfast/internal/config"
	"holdfast/internal/kv"
	"holdfast/internal/lifecycle"
	"holdfast/internal/logs"
	"holdfast/internal/mqtt"
	"holdfast/spool"
)

// An orderly stop takes at most 10 s: the parts' times below, one after the other.
const (
	brokerShutdown = 3 * time.Second // for what is handed in to commit and be acknowledged
	bridgeDrain    = 2 * time.Second // for open acks; the rest stays spooled
	bridgeGoodbye  = 2 * time.Second // for the death message and DISCONNECT to an upstream that may hang
	httpShutdown   = 500 * time.Millisecond
	partSlack      = 250 * time.Millisecond
)

// ErrStore says that the store failed: nothing is acknowledged any more, and only another start, which
// reads what the disk really has, can go on.
var ErrStore = errors.New("store failed")

// Options of a gateway.
type Options struct {
	Config  *config.Config
	Version string
	Log     *slog.Logger
	Memory  int64 // bytes that the process may use; 0: unknown
	// Logs is what Log was made with, so that its level can change; nil: it stays as it is.
	Logs *logs.Switch
	// File is the configuration file and Load reads it, or the default configuration without one, again. nil: it cannot be read again.
	File string
	Load func() (*config.Config, config.Problems, error)

	storeOptions func(*kv.Options) // for tests; nil: none
}

// Gateway is one whole gateway. Make it with New, then call Run once, or Close.
type Gateway struct {
	cfg     *config.Config
	version string
	log     *slog.Logger
	started time.Time

	dir      *dataDir
	store    *kv.Store
	spool    *spool.Spool
	journal  *journal
	devices  *devices.Registry
	commands *devices.Queue
	downlink *downlink
	broker   *broker.Broker
	addrs    []net.Addr // of the listeners, in the order of the configuration
	intake   *Intake
	uplinks  *uplinks
	tokens   *tokens
	audit    *auditing
	events   *httpapi.Events
	http     *httpapi.Server // nil: none
	registry *prometheus.Registry
	clock    *clock.Clock
	alarms   alarms
	past     history
	traces   *traces
	memory   int64
	share    resources

	storeOptions func(*kv.Options)

	backing sync.Mutex // held while there is a backup in data_dir

	load      func() (*config.Config, config.Problems, error) // the file again; nil: there is none
	file      string
	logs      *logs.Switch
	reloading sync.Mutex // one Reload at a time; guards what of cfg it changes once the gateway runs

	fatal chan error // cap 1: the store failed
	state atomic.Int32
}

// States, for Ready.
const (
	starting int32 = iota
	running
	stopping
)

// New opens the store and the spool, which is recovery and the same after a clean stop and after a
// crash, and binds every address, so that what is taken already is told before anything runs. It logs
// one line a part. On an error everything is given back.
func New(ctx context.Context, o Options) (*Gateway, error) {
	cfg, err := o.Config.Absolute() // a copy: a reload changes it
	if err != nil {
		return nil, err
	}
	g := &Gateway{
		cfg: cfg, version: o.Version, log: o.Log, started: time.Now(),
		registry: prometheus.NewRegistry(),
		memory:   o.Memory,
		file:     o.File, load: o.Load, logs: o.Logs,
		storeOptions: o.storeOptions,
		fatal:        make(chan error, 1),
	}
	// A store that fails while it is opened never comes back from its write: then the process ends
	// with that goroutine in it.
	if g.logs == nil {
		level, _ := logs.ParseLevel(o.Config.Log.Level)
		g.logs = logs.New(level)
	}
	g.logs.OnEnd(func(device string) { g.log.Info("debug log of a device ended", "device", device) })
	opened := make(chan error, 1)
	go func() { opened <- g.open(ctx) }()
	select {
	case err := <-opened:
		if err != nil {
			return nil, errors.Join(err, g.Close())
		}
		return g, nil
	case err := <-g.fatal:
		return nil, fmt.Errorf("%w: %w", ErrStore, err)
	}
}

func (g *Gateway) open(ctx context.Context) error {
	if err := g.registry.Register(collectors.NewGoCollector()); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	if err := g.registry.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	g.log.Info("gateway starts", "gateway", g.cfg.Gateway.ID, "version", g.version, "pid", os.Getpid())
	for _, step := range []func(context.Context) error{g.divide, g.openStore, g.openDevices, g.openBroker, g.openTraces, g.openBridges, g.openHTTP, g.recordStart} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	newMetrics(g.registry, g)
	return nil
}

// divide looks at what the process may use, and tells if it is little.
func (g *Gateway) divide(context.Context) (err error) {
	files := fileLimit()
	g.share, err = share(files, g.memory, 2*len(g.cfg.Listeners)+4*len(g.cfg.Upstreams))
	if err != nil {
		return err
	}
	wanted := 0
	for i := range g.cfg.Listeners {
		if n := g.cfg.Listeners[i].MaxConnections; n == 0 {
			wanted = mostConnections
		} else {
			wanted += n
		}
	}
	level := slog.LevelDebug
	if g.share.scarce != "" && g.share.connections < min(wanted, mostConnections) {
		level = slog.LevelWarn
		if g.share.scarce == "memory" || g.share.connections >= manyConnections {
			level = slog.LevelInfo // a small box, or enough for nearly all; whoever has more devices sees the metric
		}
	}
	g.log.Log(context.Background(), level, "connections are limited", "connections", g.share.connections, "by", g.share.scarce,
		"open_files", files, "memory_bytes", g.memory)
	return nil
}

func (g *Gateway) openStore(context.Context) (err error) {
	if g.dir, err = openDataDir(g.cfg.Gateway.DataDir, true); err != nil {
		return err
	}
	for _, w := range DiskWarnings(g.cfg) {
		g.log.Warn("configuration", "key", w.Key, "warning", w.Text)
	}
	begin := time.Now()
	durability := kv.Fsync
	if g.cfg.Spool.Durability == config.Interval {
		durability = kv.Interval
	}
	opts := kv.Options{
		Durability:   durability,
		SyncInterval: g.cfg.Spool.SyncInterval,
		Log:          g.log.With("part", "store"),
		Metrics:      g.registry,
		Fatal:        g.storeFailed,
		MaxTables:    g.share.tables,
		Guard:        &kv.Guard{Reserve: g.cfg.Spool.DiskReserve, Ballast: g.dir.ballast()},
	}
	if g.storeOptions != nil {
		g.storeOptions(&opts)
	}
	g.dir.sweepBackup(g.log)
	restored, err := g.dir.restored(g.log)
	if err != nil {
		return err
	}
	g.store, err = kv.Open(g.dir.store(), opts)
	if err != nil {
		return err
	}
	g.log.Info("store open", "data_dir", g.dir.path, "durability", g.cfg.Spool.Durability, "size_bytes", g.store.DiskBytes(),
		"took_ms", time.Since(begin).Milliseconds())

	if g.clock, err = clock.Open(g.store, clock.Config{Log: g.log.With("part", "clock")}); err != nil {
		return err
	}
	if restored != nil {
		if err := forgetReceived(g.store); err != nil {
			return err
		}
	}
	begin = time.Now()
	upstreams := map[string][]string{}
	for _, u := range g.cfg.Upstreams {
		upstreams[u.Name] = u.Lanes
	}
	sc := spool.Config{
		Gateway:   g.cfg.Gateway.ID,
		GapTopic:  wire.GapTopic(g.cfg.Gateway.ID),
		Lanes:     g.cfg.Spool.Lanes,
		Upstreams: upstreams,
		Clock:     g.clock,
		Log:       g.log.With("part", "spool"),
		Metrics:   g.registry,
	}
	if restored != nil {
		sc.Restored = restored.ID
	}
	g.spool, err = spool.Open(g.store, sc)
	if err != nil {
		return err
	}
	g.audit, err = openAudit(g.store, g.dir.path, restored != nil, audit.Options{Now: g.clock.Time, Log: g.log.With("part", "audit")})
	if err != nil {
		return err
	}
	if restored != nil {
		g.record(audit.Entry{Who: CommandLine(), Act: audit.Restore, Object: restored.ID, Result: audit.Done, Detail: "from a backup of " + restored.Time.UTC().Format(time.RFC3339)})
		if err := g.announceRestore(restored); err != nil {
			return err
		}
	}
	var kept spool.Count
	for _, l := range g.spool.Lanes() {
		kept.Messages += l.Kept.Messages
		kept.Bytes += l.Kept.Bytes
	}
	g.log.Info("spool open", "epoch", g.spool.Epoch(), "lanes", len(g.cfg.Spool.Lanes), "kept_messages", kept.Messages,
		"kept_bytes", kept.Bytes, "took_ms", time.Since(begin).Milliseconds())
	return nil
}

// openDevices opens what knows the devices and their commands. Neither reads what it does not need: a start takes the same time
// with a hundred thousand devices.
func (g *Gateway) openDevices(context.Context) (err error) {
	log := g.log.With("part", "devices")
	lane, ok := g.spool.Lane(spool.SystemLane)
	if !ok {
		return fmt.Errorf("lane %q: %w", spool.SystemLane, spool.ErrNoLane)
	}
	g.events = httpapi.NewEvents(0)
	g.journal = &journal{spool: g.spool, lane: lane, gateway: g.cfg.Gateway.ID, clock: g.clock, watch: g.events.Publish}
	g.devices, err = devices.OpenRegistry(g.store, devices.RegistryConfig{
		Journal: g.journal, Roles: g.cfg.Devices.Roles, Anonymous: g.cfg.Devices.Anonymous, Log: log, Metrics: g.registry, Kick: g.kick, Now: g.clock.Time,
	})
	if err != nil {
		return err
	}
	c := g.cfg.Devices.Commands
	g.commands, err = devices.OpenQueue(g.store, devices.QueueConfig{
		Journal: g.journal, Known: g.devices.Known, Window: c.Window, AckTimeout: c.AckTimeout, MaxPending: c.MaxPending, History: c.History,
		Log: log, Metrics: g.registry,
		Clock: g.clock,
		Room: func() error {
			if g.store.Level() == kv.LevelFull {
				return fmt.Errorf("the gateway's disk is full (%w): free space there, then send it again", kv.ErrDiskFull)
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	n, q := g.devices.Counts(), g.commands.Counts()
	log.Info("devices open", "registered", n.Registered, "commands", q.Queued+q.Sent+q.Delivered+q.InProgress)
	if !g.cfg.Devices.Anonymous && n.Registered == 0 {
		log.Warn("no device is registered and devices.anonymous is false: nobody can connect yet; register one with holdfast device add ID")
	}
	return nil
}

// kick ends the connection of a device that may no longer have one.
func (g *Gateway) kick(device, reason string, forget bool) {
	g.broker.End(device, mqtt.AdministrativeAction, reason, forget)
	if forget {
		g.commands.Remove(device)
	}
}

func (g *Gateway) openBroker(context.Context) error {
	log := g.log.With("part", "broker")
	in, err := newIntake(g.spool, g.cfg.Routes, g.clock)
	if err != nil {
		return err
	}
	g.intake = in
	g.downlink = newDownlink(g.devices, g.commands)
	in.answers = g.downlink.answer
	in.level = g.store.Level
	cfg := broker.Config{
		Clock: g.clock, Listeners: g.cfg.Listeners, ShutdownTimeout: brokerShutdown, MaxConnections: g.share.connections,
		Slow: func() bool { return g.store.Level() >= kv.LevelHigh }, Traced: g.logs.Watches,
	}
	bounds(&cfg, g.memory)
	if g.broker, err = broker.New(cfg, g.store, in, authorizer{g.devices}, g.downlink, log, g.registry); err != nil {
		return err
	}
	if err := g.broker.Listen(); err != nil {
		return err
	}
	g.addrs = g.broker.Addrs()
	for i, a := range g.addrs {
		l := g.cfg.Listeners[i]
		g.log.Info("listener open", "listener", l.Name, "protocol", l.Protocol, "address", a.String())
	}
	return nil
}

func (g *Gateway) openBridges(context.Context) error {
	g.uplinks = &uplinks{make: g.newUplink, ended: make(chan struct{}, 1)}
	if err := g.uplinks.open(g.cfg.Upstreams, g.newUpstream); err != nil {
		return err
	}
	if len(g.cfg.Upstreams) == 0 {
		g.log.Info("no upstream configured: messages are kept by the limits of their lanes")
	}
	return nil
}

func (g *Gateway) openHTTP(ctx context.Context) (err error) {
	if g.cfg.HTTP.Address == "" {
		return nil
	}
	if g.tokens, err = openTokens(g.store, g.dir.path, g.clock.Time); err != nil {
		return err
	}
	cfg := httpapi.Config{Address: g.cfg.HTTP.Address, Gateway: g.cfg.Gateway.ID, MaxConnections: g.share.http}
	g.http = httpapi.New(cfg, httpapi.Parts{
		Source: g, Devices: g.devices, Commands: g.commands, Lanes: g.spool, Messages: arrivals{g.broker}, Tokens: g.tokens, Events: g.events, Backups: g, Audit: g.audit, Control: g,
		Gatherer: g.registry, Log: g.log.With("part", "http"), Metrics: g.registry,
	})
	if err := g.http.Listen(ctx); err != nil {
		return err
	}
	g.log.Info("http open", "address", g.http.Addr().String(), "admin_token", filepath.Join(g.dir.path, adminFile))
	return nil
}

// storeFailed is the store's Fatal: it must not wait for anything.
func (g *Gateway) storeFailed(err error) {
	select {
	case g.fatal <- err:
	default:
	}
}

// Run works until ctx ends, and then stops in order: first the broker, so that what devices have
// handed in is committed and acknowledged, then the bridges, which wait a moment for open acks, then
// HTTP, then the store. It returns nil if it was asked to stop and all went well. If the store fails it
// returns at once and stops nothing: every further step could acknowledge what is not on disk.
func (g *Gateway) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- g.run(ctx) }()
	select {
	case err := <-done:
		return err
	case err := <-g.fatal:
		g.state.Store(stopping)
		return fmt.Errorf("%w: %w", ErrStore, err)
	}
}

func (g *Gateway) run(ctx context.Context) error {
	var parts []lifecycle.Part // the last one up is the first one down
	if g.http != nil {
		parts = append(parts, lifecycle.Part{Name: "http", Run: g.http.Run, Grace: httpShutdown + partSlack})
	}
	parts = append(parts, lifecycle.Part{Name: "clock", Run: g.clock.Run, Grace: partSlack})
	parts = append(parts,
		lifecycle.Part{Name: "bridges", Run: g.uplinks.Run, Grace: bridgeDrain + bridgeGoodbye + 3*partSlack},
		lifecycle.Part{Name: "devices", Run: g.devices.Run, Grace: partSlack},
		lifecycle.Part{Name: "commands", Run: g.commands.Run, Grace: partSlack},
		lifecycle.Part{Name: "alarms", Run: g.watchAlarms, Grace: time.Second},
		lifecycle.Part{Name: "history", Run: g.keepHistory, Grace: time.Second},
		lifecycle.Part{Name: "broker", Run: g.broker.Run, Grace: brokerShutdown + partSlack},
		lifecycle.Part{Name: "gateway", Run: g.beReady, Grace: partSlack},
	)
	err := lifecycle.Run(ctx, parts...)
	if errors.Is(err, lifecycle.ErrStuck) {
		return err // somebody still holds the store: leave it to crash recovery
	}
	g.recordStop(ctx, err)
	return errors.Join(err, g.Close())
}

// beReady is up while everything else is.
func (g *Gateway) beReady(ctx context.Context) error {
	g.state.Store(running)
	var addresses []string
	for _, a := range g.addrs {
		addresses = append(addresses, a.String())
	}
	// Whoever started the gateway waits for this line, so it is written whatever log.level says: a
	// handler asked directly does not look at the level.
	ready := slog.NewRecord(time.Now(), slog.LevelInfo, "ready", 0)
	ready.Add("listeners", addresses, "took_ms", time.Since(g.started).Milliseconds())
	if err := g.log.Handler().Handle(ctx, ready); err != nil {
		return fmt.Errorf("log ready: %w", err)
	}
	g.notify(daemon.SdNotifyReady)
	g.beAlive(ctx)
	g.state.Store(stopping)
	g.notify(daemon.SdNotifyStopping)
	g.log.Info("gateway stops")
	return nil
}

// Close gives back what New took, for a gateway that is not run. Twice is no harm.
func (g *Gateway) Close() error {
	var err error
	g.logs.Close()
	if g.http != nil {
		err = errors.Join(err, g.http.Close())
	}
	if g.broker != nil {
		err = errors.Join(err, g.broker.Close())
	}
	if g.uplinks != nil {
		err = errors.Join(err, g.uplinks.Close())
	}
	err = errors.Join(err, g.traces.close())
	if g.spool != nil {
		err = errors.Join(err, g.spool.Close())
	}
	if g.audit != nil {
		err = errors.Join(err, g.audit.Close())
	}
	if g.store != nil {
		err = errors.Join(err, g.store.Close())
	}
	if g.dir != nil {
		err = errors.Join(err, g.dir.Close())
	}
	return err
}

// Addrs gives the addresses of the listeners, in the order of the configuration.
func (g *Gateway) Addrs() []net.Addr { return g.addrs }

// HTTPAddr gives the address of the API, nil without one.
func (g *Gateway) HTTPAddr() net.Addr {
	if g.http == nil {
		return nil
	}
	return g.http.Addr()
}

// Ready implements httpapi.Source.
func (g *Gateway) Ready() error {
	switch g.state.Load() {
	case running:
		return nil
	case stopping:
		return errors.New("gateway is stopping")
	default:
		return errors.New("gateway is starting")
	}
}

// Status implements httpapi.Source.
func (g *Gateway) Status() httpapi.Status {
	g.alarms.mu.Lock()
	defer g.alarms.mu.Unlock()
	st, err := g.look()
	parked, parkedErr := g.parked()
	if err = errors.Join(err, parkedErr); err != nil && !g.alarms.dumb {
		g.log.Warn("the status is not whole: the store cannot be read", "err", err)
	}
	g.alarms.dumb = err != nil
	st.Alarms = g.alarms.update(alarmsOf(&st, parked, time.Now()), st.Clock.Wall, g.tellAlarm)
	return st
}

// look is Status without alarms. An error is about what could not be read for it.
func (g *Gateway) look() (httpapi.Status, error) {
	now := g.clock.State()
	accounts := g.spool.Accounts()
	dateErr := g.spool.Date(accounts)
	st := httpapi.Status{
		Version:   g.version,
		Gateway:   g.cfg.Gateway.ID,
		Epoch:     g.spool.Epoch(),
		DataDir:   g.dir.path,
		PID:       os.Getpid(),
		StartedAt: g.started,
		UptimeS:   int64(time.Since(g.started).Seconds()),
		ClockSync: now.Synced,
		Clock: httpapi.Clock{
			State: wire.ClockUnsynced, Since: now.Since.UTC(), Wall: now.Wall.UTC(), Doubt: now.Doubt, Settled: now.Settled, Boot: now.Boot,
		},
		Store:     g.storeStatus(),
		Broker:    httpapi.Broker{Listeners: []httpapi.Listener{}},
		Lanes:     g.spool.Lanes(),
		Upstreams: []httpapi.Upstream{},
		Ledger:    httpapi.NewLedger(accounts),
		Devices:   g.devices.Counts(),
		Commands:  g.commands.Counts(),
	}
	if now.Synced {
		st.Clock.State = wire.ClockSynced
	}
	if err := g.Ready(); err != nil {
		st.NotReady = err.Error()
	} else {
		st.Ready = true
	}
	for _, c := range g.broker.Certificates() {
		st.Certificates = append(st.Certificates, httpapi.Certificate{Listener: c.Listener, File: c.File, Subject: c.Subject, NotAfter: c.NotAfter})
	}
	b := g.broker.Stats()
	st.Broker.Connections, st.Broker.Sessions, st.Broker.Subscriptions = b.Connections, b.Sessions, b.Subscriptions
	st.Broker.Retained, st.Broker.RetainedBytes = b.Retained, b.RetainedBytes
	for i, a := range g.addrs {
		l := g.cfg.Listeners[i]
		st.Broker.Listeners = append(st.Broker.Listeners, httpapi.Listener{Name: l.Name, Protocol: l.Protocol, Address: a.String()})
	}
	for _, l := range g.uplinks.all() {
		s := l.bridge.Status()
		u := httpapi.Upstream{
			Name: s.Name, URL: s.URL, Format: s.Format, State: string(s.State), Connected: s.Connected, Since: s.Since,
			RetryAt: s.RetryAt, Attempts: s.Attempts, LastError: s.LastError, LastAck: s.LastAck, InFlight: s.InFlight,
			Sends: s.Sends, SentMessages: s.SentMessages, SentBytes: s.SentBytes, AckedMessages: s.AckedMessages,
			ExpiredMessages: s.ExpiredMessages, ParkedMessages: s.ParkedMessages,
			WireBytes: s.WireBytes, Budget: s.Budget,
		}
		if o := l.orders; o != nil {
			up, err := o.ready()
			u.Commands, u.CommandsError = &up, err
		}
		st.Upstreams = append(st.Upstreams, u)
	}
	return st, dateErr
}

func (g *Gateway) storeStatus() httpapi.Store {
	d := g.store.Disk()
	var damage []httpapi.Damage
	for _, d := range g.store.Damage() {
		damage = append(damage, httpapi.Damage(d))
	}
	return httpapi.Store{
		Damage: damage, LostMessages: g.spool.Recovered(),
		Bytes: g.store.DiskBytes(), FreeBytes: d.Free, ReserveBytes: d.Reserve, BallastBytes: d.Ballast, Level: d.Level.String(), Since: d.Since,
	}
}
