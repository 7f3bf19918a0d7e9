package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/gateway"
	"holdfast/internal/config"
	"holdfast/internal/diskcheck"
	"holdfast/internal/proof"
	"holdfast/spool"
)

var verifyCommand = command{
	name: "verify", args: "[--minutes N] [--dir DIR | --config FILE] [--seed SEED] [--json]",
	summary: "See whether this disk and this gateway keep the promises, here",
	help: `On the file system of --dir (or of data_dir of --config, or of the current folder), in a temporary folder that is removed at
the end, also after Ctrl-C. No gateway that runs, and nothing of its data, is touched; but the disk is loaded meanwhile, so
devices of a gateway that works on it get their acknowledgements later. It takes 1 GB at most, and --minutes in all.

1. The disk: how long an fsync takes, how fast it writes, and whether that can be true.
2. A real gateway on it, with simulated devices: messages a second, and how long an acknowledgement takes.
3. The gateway is killed (kill -9) over and over while devices publish and its link to the cloud comes and goes. At the end every
   message that a device was told is safe has to have arrived, in order, and the ledger and the store have to be whole.

The verdict is about this disk: "holds", "suspicious" or "does not hold", with the reasons. Exit code 1 if it does not hold. Software
alone cannot prove that a disk survives a power cut: kill -9 is none, and a disk that lies well is believed.
docs/reliability.md says how to cut the power.`,
	run: runVerify,
}

const (
	verifyGateway  = "verify"
	verifyFolder   = "holdfast-verify-"
	verifyMinSpace = 256 << 20
	verifyMaxSeq   = 256 << 20 // the most that the long write takes
	verifyMaxBurst = 500_000   // messages of the fast fleet: so many fit the space
	verifyMaxSteps = 2_000_000 // messages of the fleet that is in the crashes: so many are remembered
)

func runVerify(ctx context.Context, p *program, args []string) (err error) {
	fset := p.flags()
	minutes := fset.Float64("minutes", 10, "take `N` minutes in all, 1 at least")
	dir := fset.String("dir", "", "any `DIR`ectory on the file system to look at")
	file := fset.String("config", "", "configuration `FILE`: the file system of its data_dir")
	seed := fset.Uint64("seed", 0, "`SEED` of the faults and the devices' values (none: another each time)")
	asJSON := fset.Bool("json", false, "print the report as JSON; what happens goes to stderr")
	if _, err := p.parse(fset, args, 0, 0); err != nil {
		return err
	}
	switch {
	case *dir != "" && *file != "":
		return usagef("--dir and --config exclude each other")
	case !(*minutes >= 1) || *minutes > 24*60:
		return usagef("--minutes has to be from 1 to 1440")
	}
	if *file != "" {
		cfg, _, err := load(*file)
		if err != nil {
			return err
		}
		*dir = cfg.Gateway.DataDir
	}
	if *dir == "" {
		*dir = "."
	}
	if *seed == 0 {
		*seed = rand.Uint64N(1_000_000) + 1
	}
	v := &verification{p: p, out: p.stdout, total: time.Duration(*minutes * float64(time.Minute)), where: *dir, seed: *seed, asJSON: *asJSON}
	if *asJSON {
		v.out = p.stderr
	}
	return v.main(ctx)
}

// verification is one run of holdfast verify.
type verification struct {
	p      *program
	out    io.Writer // for people
	total  time.Duration
	where  string
	seed   uint64
	asJSON bool

	began   time.Time
	dir     string // the temporary folder
	exe     string // the program; "": this one
	cloud   *demoCloud
	line    *uplink
	gateway *child
	address string // of the gateway, for devices
	api     string
	inbox   *proof.Cloud                  // what arrived
	figured map[string]*firmwaresim.Fleet // of the figures, whose messages have to be there at the end, too; by the prefix of their ids

	report verifyReport
}

// verifyReport is how it ended.
type verifyReport struct {
	Dir     string            `json:"dir"` // what was asked for
	Seed    uint64            `json:"seed"`
	Took    float64           `json:"took_s"`
	Disk    diskcheck.Report  `json:"disk"`
	Gateway gatewayFigures    `json:"gateway"`
	Crashes crashFigures      `json:"crashes"`
	Verdict diskcheck.Verdict `json:"verdict"`
	Reasons []string          `json:"reasons"`
}

// gatewayFigures are what a gateway makes of the disk.
type gatewayFigures struct {
	PerSecond   float64             `json:"acknowledged_per_second"`
	QuietAck    firmwaresim.Latency `json:"ack_latency_quiet"` // 10 devices, 5 messages a second each
	LoadedAck   firmwaresim.Latency `json:"ack_latency_loaded"`
	UplinkBytes int64               `json:"uplink_bytes"`
}

// crashFigures are how the crashes ended, in messages of all fleets.
type crashFigures struct {
	Kills        int      `json:"kills"`
	LinkFaults   int      `json:"link_faults"`
	SlowestStart float64  `json:"slowest_start_s"`
	Problems     []string `json:"problems"` // of the store, and if it could not be asked
	proof.Verdict
}

func (c *crashFigures) whole() bool { return c.OK() && len(c.Problems) == 0 }

func (v *verification) main(ctx context.Context) (err error) {
	v.began = time.Now()
	if v.exe == "" {
		if v.exe, err = os.Executable(); err != nil {
			return err
		}
	}
	ctx, stop := onSignals(ctx, slog.New(slog.DiscardHandler))
	defer stop()
	parent, err := existing(v.where)
	if err != nil {
		return err
	}
	if free := diskFree(parent); free >= 0 && free < verifyMinSpace {
		return fmt.Errorf("%s has %s free, and %s are needed", parent, bytesText(free), bytesText(int64(verifyMinSpace)))
	}
	if v.dir, err = os.MkdirTemp(parent, verifyFolder); err != nil {
		return fmt.Errorf("make a folder to work in: %w: run this as a user that may write to %s, or choose another place with --dir", err, parent)
	}
	kept := false
	defer func() {
		if !kept {
			err = errors.Join(err, os.RemoveAll(v.dir))
		}
	}()
	v.report.Dir, v.report.Seed = parent, v.seed
	err = v.run(ctx)
	v.report.Took = time.Since(v.began).Seconds()
	switch {
	case ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		kept = true
		return fmt.Errorf("%w\ndata and logs are kept in %s", err, v.dir)
	}
	v.judge()
	if v.asJSON {
		err = v.p.printJSON(&v.report)
	}
	v.print()
	if err == nil && v.report.Verdict == diskcheck.DoesNotHold {
		if !v.report.Crashes.whole() {
			kept = true
			fmt.Fprintf(v.p.stderr, "data and logs are kept in %s\n", v.dir)
		}
		err = errReported
	}
	return err
}

// existing gives the folder, or the nearest one above it that is there.
func existing(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for {
		fi, err := os.Stat(dir)
		switch {
		case err == nil && fi.IsDir():
			return dir, nil
		case err == nil:
			return "", usagef("%s is a file, not a folder", dir)
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		}
		dir = filepath.Dir(dir)
	}
}

func (v *verification) say(format string, args ...any) {
	fmt.Fprintf(v.out, "%5.1f s  %s\n", time.Since(v.began).Seconds(), fmt.Sprintf(format, args...))
}

// run does what there is to do in the time there is: a quarter for the disk, some for the figures, the rest for the crashes.
func (v *verification) run(ctx context.Context) (err error) {
	disk := min(v.total/4, time.Minute)
	figures := min(v.total/6, 30*time.Second)
	finish := min(v.total/5, 30*time.Second) // for what is still to be acknowledged and to arrive
	v.say("disk: measuring in %s (seed %d)", v.dir, v.seed)
	work := filepath.Join(v.dir, "disk")
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	maxBytes := int64(verifyMaxSeq)
	if free := diskFree(v.dir); free > 0 {
		maxBytes = min(maxBytes, free/4)
	}
	v.report.Disk, err = diskcheck.Measure(ctx, diskcheck.Options{Dir: work, Budget: disk, MaxBytes: maxBytes, Step: func(what string) { v.say("disk: %s", what) }})
	if err != nil {
		return fmt.Errorf("measure the disk: %w", err)
	}
	v.report.Disk.Facts.Dir = v.report.Dir

	stop, err := v.build(ctx)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	if err := v.figures(ctx, figures); err != nil {
		return err
	}
	if err := v.crash(ctx, v.began.Add(v.total-finish), finish); err != nil {
		return err
	}
	return v.look()
}

// build makes the cloud, the line to it and the gateway. stop ends them.
func (v *verification) build(ctx context.Context) (stop func() error, err error) {
	var stops []func() error
	stop = func() (err error) {
		for i := range stops {
			err = errors.Join(err, stops[len(stops)-1-i]())
		}
		return err
	}
	v.inbox, v.figured = proof.NewCloud(), map[string]*firmwaresim.Fleet{}
	logFile, err := os.Create(filepath.Join(v.dir, "upstream.log"))
	if err != nil {
		return stop, err
	}
	stops = append(stops, logFile.Close)
	if v.cloud, err = newDemoCloud("", slog.New(slog.NewTextHandler(logFile, nil))); err != nil {
		return stop, err
	}
	cloudCtx, stopCloud := context.WithCancel(context.WithoutCancel(ctx))
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- v.cloud.run(cloudCtx, sync.OnceFunc(func() { close(up) }), v.arrive) }()
	stops = append(stops, func() error {
		stopCloud()
		return <-ended
	})
	select {
	case <-up:
	case err := <-ended:
		ended <- nil
		return stop, fmt.Errorf("the simulated cloud ended at once: %w", err)
	case <-ctx.Done():
		return stop, ctx.Err()
	}
	if v.line, err = newUplink(ctx, v.cloud.address); err != nil {
		return stop, err
	}
	stops = append(stops, v.line.Close)
	if v.address, err = freePort(ctx); err != nil {
		return stop, err
	}
	if v.api, err = freePort(ctx); err != nil {
		return stop, err
	}
	text := fmt.Sprintf(`# Made by holdfast verify.
gateway: { id: %s, data_dir: %q }
listeners:
  - { name: devices, protocol: mqtt, address: %q }
devices: { anonymous: true }
upstreams:
  - { name: cloud, url: "mqtt://%s", commands: false }
http: { address: %q }
log: { level: info, format: text }
`, verifyGateway, v.dataDir(), v.address, v.line.ln.Addr(), v.api)
	if err := os.WriteFile(v.configFile(), []byte(text), 0o600); err != nil {
		return stop, err
	}
	if _, err := v.start(ctx); err != nil {
		return stop, err
	}
	stops = append(stops, func() error { return v.gateway.stop() })
	return stop, nil
}

func (v *verification) dataDir() string    { return filepath.Join(v.dir, "gateway") }
func (v *verification) configFile() string { return filepath.Join(v.dir, "gateway.yaml") }
func (v *verification) logFile() string    { return filepath.Join(v.dir, "gateway.log") }

func (v *verification) start(ctx context.Context) (took time.Duration, err error) {
	begin := time.Now()
	c, err := startChild(ctx, v.exe, []string{"run", "--config", v.configFile()}, v.logFile())
	if err == nil {
		v.gateway = c
	}
	return time.Since(begin), err
}

// arrive notes a publish. The checker remembers what is wrong with it.
func (v *verification) arrive(topic string, payload []byte) error {
	v.inbox.Take(topic, payload)
	return nil
}

// fleet makes devices for a figure.
func (v *verification) fleet(prefix string, devices int, rate float64) (*firmwaresim.Fleet, error) {
	f, err := firmwaresim.New(firmwaresim.Config{
		Broker: "mqtt://" + v.address, Devices: devices, Prefix: prefix, Rate: rate, Size: 256, Seed: v.seed,
		Window: 64, Buffer: 10_000, Drain: drain, MaxBackoff: time.Second,
	}, nil)
	if err == nil {
		v.figured[prefix] = f
	}
	return f, err
}

// figures lets a quiet fleet and then a fast one publish for a while.
func (v *verification) figures(ctx context.Context, d time.Duration) error {
	v.say("gateway: 10 devices publish 5 messages a second each")
	quiet, err := v.fleet("quiet", 10, 5)
	if err != nil {
		return err
	}
	report, err := v.publish(ctx, quiet, d/3, func() bool { return false })
	if err != nil {
		return err
	}
	v.report.Gateway.QuietAck = report.Latency
	v.say("gateway: 50 devices publish as fast as it acknowledges")
	fast, err := v.fleet("fast", 50, 0)
	if err != nil {
		return err
	}
	report, err = v.publish(ctx, fast, d*2/3, func() bool { return fast.Snapshot().Acknowledged > verifyMaxBurst })
	if err != nil {
		return err
	}
	v.report.Gateway.PerSecond, v.report.Gateway.LoadedAck = report.Rate, report.Latency
	return nil
}

// publish runs a fleet for a while, or until it is enough.
func (v *verification) publish(ctx context.Context, f *firmwaresim.Fleet, d time.Duration, enough func() bool) (report firmwaresim.Report, err error) {
	fleetCtx, stopFleet := context.WithTimeout(ctx, d)
	defer stopFleet()
	done := make(chan error, 1)
	go func() {
		var err error
		report, err = f.Run(fleetCtx)
		done <- err
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err == nil {
				err = ctx.Err()
			}
			if err == nil && report.Unacknowledged > 0 {
				err = fmt.Errorf("%d messages were not acknowledged within %v; the gateway's log is %s", report.Unacknowledged, drain, v.logFile())
			}
			return report, err
		case <-v.gateway.ended:
			stopFleet()
			return report, errors.Join(v.endedByItself(), <-done)
		case <-tick.C:
			if enough() {
				stopFleet()
			}
		}
	}
}

func (v *verification) endedByItself() error {
	return fmt.Errorf("the gateway ended by itself (%v); its log is %s", v.gateway.cmd.ProcessState, v.logFile())
}

// crash kills the gateway and breaks its link until it is time to finish, while devices publish.
func (v *verification) crash(ctx context.Context, until time.Time, finish time.Duration) error {
	const devices = 20
	c := &v.report.Crashes
	left := max(time.Until(until), time.Second)
	// As much as this gateway took, but no more than can be remembered; half of it, because a crash takes time.
	rate := min(1000, v.report.Gateway.PerSecond/2, verifyMaxSteps/left.Seconds())
	f, err := proof.StartFleet(ctx, proof.FleetConfig{
		Broker: "mqtt://" + v.address, Devices: devices, Rate: max(rate, devices) / devices, Seed: v.seed, Calm: true, Buffer: 10_000, Drain: drain,
		Change: func(c *firmwaresim.Config) { c.Size, c.MaxBackoff = 256, time.Second },
	})
	if err != nil {
		return err
	}
	defer f.Abort()
	for prefix, figured := range v.figured {
		f.Add(prefix, figured)
	}
	v.say("crashes: 20 devices publish %.0f messages a second; the gateway is killed and its link broken for %.0f s", max(rate, devices), left.Seconds())
	random := rand.New(rand.NewPCG(v.seed, 1)) //nolint:gosec // to be replayed
	told := time.Now()
	for first := true; first || time.Now().Before(until); first = false {
		if err := v.pause(ctx, time.Duration(200+random.IntN(1000))*time.Millisecond); err != nil {
			return err
		}
		if state := lineState(random.IntN(3)); !first && random.IntN(2) == 0 {
			v.line.set(state)
			if state != lineUp {
				c.LinkFaults++
			}
			continue
		}
		v.gateway.kill()
		c.Kills++
		took, err := v.start(ctx)
		if err != nil {
			return err
		}
		c.SlowestStart = max(c.SlowestStart, took.Seconds())
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			v.say("crashes: %s, %d messages acknowledged, %d arrived", count(c.Kills, "kill"), f.Floor(), v.inbox.Receiver().Stats().Messages)
		}
	}
	v.line.set(lineUp)
	err = f.Finish()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		c.Problems = append(c.Problems, fmt.Sprintf("after the last crash: %v", err))
	}
	v.say("crashes: %s, %s; waiting for the last messages to arrive", count(c.Kills, "kill"), count(c.LinkFaults, "broken link"))
	// No rule takes a message here, so no gap has a reason.
	c.Verdict, err = proof.Settle(ctx, max(finish, 15*time.Second), f, v.inbox, func() (*proof.Books, error) { return v.books(ctx) }, proof.Options{Reasons: []string{}})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		c.Problems = append(c.Problems, err.Error())
	}
	for _, d := range v.inbox.Others() {
		c.Problems = append(c.Problems, fmt.Sprintf("a message of %q on %s arrived, and no device here sends such", d.Message.Device, d.Message.Topic))
	}
	v.report.Gateway.UplinkBytes = v.line.bytes.Load()
	return nil
}

// pause waits. The gateway must not end meanwhile.
func (v *verification) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-v.gateway.ended:
		return v.endedByItself()
	}
}

// books asks the gateway for its books.
func (v *verification) books(ctx context.Context) (*proof.Books, error) {
	c := &apiClient{base: "http://" + v.api}
	if err := c.findToken("", v.dataDir()); err != nil {
		return nil, err
	}
	c.http.Transport = &http.Transport{DisableKeepAlives: true}
	var b proof.Books
	return &b, c.call(ctx, http.MethodGet, "/api/v1/status", nil, &b)
}

// look holds the store against itself, after the gateway has stopped.
func (v *verification) look() error {
	c := &v.report.Crashes
	if err := v.gateway.stop(); err != nil {
		return err
	}
	sp, closeAll, err := gateway.OpenSpool(v.dataDir(), logger(io.Discard, config.Log{Level: "error", Format: "text"}))
	if err != nil {
		return err
	}
	var found spool.Report
	found, err = sp.Verify(nil)
	for _, p := range found.Problems {
		c.Problems = append(c.Problems, fmt.Sprintf("the store: %s", p))
	}
	return errors.Join(err, closeAll())
}

// judge makes the verdict of everything.
func (v *verification) judge() {
	r := &v.report
	r.Verdict, r.Reasons = r.Disk.Verdict, r.Disk.Reasons
	if r.Crashes.Problems == nil {
		r.Crashes.Problems = []string{}
	}
	if r.Crashes.whole() {
		return
	}
	c := &r.Crashes
	reason := fmt.Sprintf("after %s, %d acknowledged messages are lost, %d out of order, %d unexplained: please report this", count(c.Kills, "kill"), c.Lost, c.OutOfOrder, c.Unexplained)
	more := append([]string{reason}, c.Problems...)
	if r.Disk.Verdict == diskcheck.Holds {
		r.Verdict, r.Reasons = diskcheck.DoesNotHold, more
		return
	}
	r.Verdict, r.Reasons = diskcheck.DoesNotHold, append(more, r.Reasons...)
}

func (v *verification) print() {
	r := &v.report
	w := tabwriter.NewWriter(v.out, 0, 0, 3, ' ', 0)
	row := func(what string, n any, note string, args ...any) {
		fmt.Fprintf(w, "  %s\t%12v\t%s\n", what, n, fmt.Sprintf(note, args...))
	}
	head := func(text string) {
		_ = w.Flush()
		fmt.Fprintf(v.out, "\n%s\n", text)
	}
	f := &r.Disk.Facts
	about := []string{orUnknown(f.Type)}
	for _, s := range []string{f.Source, f.Model, f.WriteCache} {
		if s != "" {
			about = append(about, s)
		}
	}
	head(fmt.Sprintf("The disk: %s (%s)", r.Dir, strings.Join(about, ", ")))
	ms := func(us float64) string { return fmt.Sprintf("%.2f ms", us/1000) }
	for _, t := range r.Disk.Sync {
		row(fmt.Sprintf("fsync of %s", bytesText(int64(t.Size))), fmt.Sprintf("%.0f/s", t.PerSecond), "p50 %s, p99 %s, at most %s", ms(t.P50), ms(t.P99), ms(t.Max))
	}
	row("fsync in one place", fmt.Sprintf("%.0f/s", r.Disk.Overwrite.PerSecond), "p50 %s, p99 %s", ms(r.Disk.Overwrite.P50), ms(r.Disk.Overwrite.P99))
	if t := r.Disk.Direct; t != nil {
		row("the same without fsync", fmt.Sprintf("%.0f/s", t.PerSecond), "p50 %s: past the kernel, into the disk's cache", ms(t.P50))
	}
	if t := r.Disk.DirectSync; t != nil {
		row("the same with O_DSYNC", fmt.Sprintf("%.0f/s", t.PerSecond), "p50 %s", ms(t.P50))
	}
	row("one long write", bytesText(int64(r.Disk.Sequential))+"/s", "with the fsync at its end; %s/s without", bytesText(int64(r.Disk.Buffered)))
	if r.Disk.DirectSeq > 0 {
		row("the same past the kernel", bytesText(int64(r.Disk.DirectSeq))+"/s", "")
	}
	head("A gateway on it")
	g := &r.Gateway
	row("messages a second", fmt.Sprintf("%.0f", g.PerSecond), "acknowledged after their fsync; devices and cloud share this machine's processors")
	latency := func(l firmwaresim.Latency) string {
		return fmt.Sprintf("p99 %s, p99.9 %s", l.P99.Round(10*time.Microsecond), l.P999.Round(10*time.Microsecond))
	}
	row("until the acknowledgement", g.QuietAck.P50.Round(10*time.Microsecond), "%s: few messages", latency(g.QuietAck))
	row("", g.LoadedAck.P50.Round(10*time.Microsecond), "%s: as many as it takes", latency(g.LoadedAck))
	head("Killed while it works")
	c := &r.Crashes
	row("kill -9", c.Kills, "and %s; ready again after %.2f s at most", count(c.LinkFaults, "broken link"), c.SlowestStart)
	row("acknowledged", c.Acknowledged, "of %d published; the rest is QoS 0", c.Published)
	row("arrived", c.Arrived, "%d sent again by the gateway and removed by their id, %d by devices that a crash left without an ack", c.Removed, c.SentAgain)
	row("lost", c.Lost, "acknowledged, but not arrived")
	row("out of order", c.OutOfOrder, "")
	row("unexplained", c.Unexplained, "sequences missing, messages from nowhere, accounts that do not add up")
	row("problems of the store", len(c.Problems), "")
	_ = w.Flush()
	for _, e := range append(c.Problems[:len(c.Problems):len(c.Problems)], c.Examples...) {
		fmt.Fprintf(v.out, "  %s\n", e)
	}
	fmt.Fprintf(v.out, "\nVERDICT  %s: %s\n", r.Verdict, strings.Join(r.Reasons, "; "))
	for _, n := range r.Disk.Notes {
		fmt.Fprintf(v.out, "note     %s\n", n)
	}
	fmt.Fprintln(v.out, "No program can prove what a power cut leaves: docs/reliability.md says how to pull the plug.")
}

func orUnknown(s string) string {
	if s == "" {
		return "file system not known"
	}
	return s
}
