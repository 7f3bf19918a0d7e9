package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"holdfast/bridge/cloud"
	firmwaresim "holdfast/firmware-sim"
)

var demoCommand = command{
	name: "demo", args: "[--devices N] [--rate R] [--duration D] [--keep] [--json]",
	summary: "See it work: devices, commands, a cut, a crash, then the ledger",
	help: `Runs everything on this machine, on loopback ports that are free: an upstream broker and simulated devices in
this process, a real gateway in a process of its own. The cloud sends commands to devices that are asleep. It
cuts the gateway's uplink, kills the gateway with SIGKILL, starts it again, wakes the devices, mends the uplink,
and then holds what the devices were promised against what arrived, and what the cloud knows of its commands
against what the devices did. Exit code 1 if a single acknowledged message is lost or out of order, or a
command is lost or executed twice, or has another end than its device says.

What it writes goes to a temporary folder, which is removed unless something failed or --keep was said.`,
	run: runDemo,
}

func runDemo(ctx context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	d := demo{out: p.stdout}
	fs.IntVar(&d.devices, "devices", 20, "simulated devices, `N`")
	fs.Float64Var(&d.rate, "rate", 100, "messages a second of each device, `R`")
	fs.DurationVar(&d.duration, "duration", 16*time.Second, "how long the devices publish, `D`")
	fs.Uint64Var(&d.seed, "seed", 1, "`SEED` of the devices' values")
	fs.BoolVar(&d.keep, "keep", false, "leave gateway and upstream running at the end, to try by hand")
	asJSON := fs.Bool("json", false, "print the ledger as JSON; the story goes to stderr")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	switch {
	case d.devices < 1 || d.devices > 1000:
		return usagef("--devices has to be from 1 to 1000")
	case !(d.rate > 0) || d.rate > 1000:
		return usagef("--rate has to be above 0 and at most 1000")
	case d.duration < 2*time.Second || d.duration > time.Hour:
		return usagef("--duration has to be from 2s to 1h")
	}
	if *asJSON {
		d.out = p.stderr
	}
	if d.exe, err = os.Executable(); err != nil {
		return err
	}
	ctx, stop := onSignals(ctx, slog.New(slog.DiscardHandler))
	defer stop()
	if d.dir, err = os.MkdirTemp("", "holdfast-demo-"); err != nil {
		return err
	}
	l, err := d.run(ctx)
	switch interrupted := ctx.Err() != nil; {
	case err != nil && !interrupted, d.keep:
		fmt.Fprintf(p.stderr, "data and logs are kept in %s\n", d.dir)
	default:
		err = errors.Join(err, os.RemoveAll(d.dir))
	}
	if l != nil && *asJSON {
		err = errors.Join(err, p.printJSON(l))
	}
	return err
}

// demo is one run of holdfast demo.
type demo struct {
	out      io.Writer // for people
	devices  int
	rate     float64
	duration time.Duration
	seed     uint64
	keep     bool
	exe, dir string

	began   time.Time
	cloud   *demoCloud
	line    *uplink
	gateway *child
	address string // of the gateway, for devices

	sleepers *firmwaresim.Fleet
	orders   *orders

	receiver  *cloud.Receiver
	arrivals  *firmwaresim.Arrivals
	plain     atomic.Uint64 // bytes that a plain bridge would have needed for what arrived
	strangers atomic.Uint64 // arrived, but not from our devices
}

// ledger is how it ended, in messages.
type ledger struct {
	Published    uint64  `json:"published"`
	Acknowledged uint64  `json:"acknowledged"`
	Arrived      uint64  `json:"arrived"`       // each once
	Removed      uint64  `json:"removed_by_id"` // sent again by the gateway
	Repeated     uint64  `json:"repeated"`      // sent again by a device that was not acknowledged, and stored twice
	Lost         uint64  `json:"lost"`          // acknowledged, not arrived
	OutOfOrder   uint64  `json:"out_of_order"`
	Unknown      uint64  `json:"unknown"` // arrived, never sent
	Missing      uint64  `json:"missing"` // sequences that the receiver did not see
	Rate         float64 `json:"acknowledged_per_second"`
	UplinkBytes  uint64  `json:"uplink_bytes"`       // both ways, all included
	PlainBytes   uint64  `json:"plain_bridge_bytes"` // what a plain MQTT bridge needs for what arrived

	Commands commandLedger `json:"commands"`
}

func (l *ledger) balanced() bool { return l.delivered() && l.Commands.balanced() }

// delivered says that all is well with the messages.
func (l *ledger) delivered() bool {
	return l.Lost == 0 && l.OutOfOrder == 0 && l.Unknown == 0 && l.Missing == 0
}

// say tells one step of the story.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%5.1f s  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (_ *ledger, err error) {
	d.began = time.Now()
	d.receiver, d.arrivals = cloud.New(cloud.Config{}), firmwaresim.NewArrivals()
	d.orders = newOrders()
	logFile, err := os.Create(filepath.Join(d.dir, "upstream.log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	if d.cloud, err = newDemoCloud(filepath.Join(d.dir, "upstream"), slog.New(slog.NewTextHandler(logFile, nil))); err != nil {
		return nil, err
	}
	d.cloud.step = d.orders.note
	// Everything below is stopped by what stands above it, the upstream last of all.
	cloudCtx, stopCloud := context.WithCancel(context.WithoutCancel(ctx))
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- d.cloud.run(cloudCtx, sync.OnceFunc(func() { close(up) }), d.arrive) }()
	defer func() {
		stopCloud()
		err = errors.Join(err, <-ended)
	}()
	if err := d.wait(ctx, "the receiver to subscribe", up); err != nil {
		return nil, err
	}
	d.say("upstream: a broker on %s, and a cloud that notes what arrives there and sends commands", d.cloud.address)
	if d.line, err = newUplink(ctx, d.cloud.address); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.line.Close()) }()
	if err := d.configure(ctx); err != nil {
		return nil, err
	}
	if err := d.start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.gateway.stop()) }()
	d.say("gateway: process %d, for devices on %s, data in %s", d.gateway.cmd.Process.Pid, d.address, filepath.Join(d.dir, "gateway"))

	l, err := d.story(ctx)
	if err != nil {
		return l, err
	}
	d.printLedger(l)
	if !l.balanced() {
		return l, errors.New("the ledger does not balance")
	}
	if d.keep {
		d.printKept()
		select {
		case <-ctx.Done():
		case <-d.gateway.ended:
			return l, fmt.Errorf("the gateway ended by itself (%v); its log is %s", d.gateway.cmd.ProcessState, d.logFile())
		}
	}
	return l, nil
}

// arrive notes what the receiver makes of a publish.
func (d *demo) arrive(topic string, payload []byte) error {
	deliveries, err := d.receiver.Receive(topic, payload)
	for _, v := range deliveries {
		if v.Kind != cloud.Message {
			continue
		}
		if d.arrivals.AddPayload(v.Message.Payload) != nil {
			d.strangers.Add(1)
			continue
		}
		d.plain.Add(plainBytes(len(v.Message.Topic), len(v.Message.Payload)))
	}
	return err
}

// plainBytes is what a plain MQTT bridge needs for a message with QoS 1: the PUBLISH (MQTT 3.1.1 §3.3) and its PUBACK.
func plainBytes(topic, payload int) uint64 {
	remaining := 2 + topic + 2 + payload
	n := 1 + remaining + 4
	for more := remaining; ; more >>= 7 {
		n++
		if more < 128 {
			return uint64(n)
		}
	}
}

// configure writes the gateway's configuration.
func (d *demo) configure(ctx context.Context) error {
	var err error
	if d.address, err = freePort(ctx); err != nil {
		return err
	}
	httpAddress, err := freePort(ctx)
	if err != nil {
		return err
	}
	text := fmt.Sprintf(`# Made by holdfast demo.
gateway: { id: %s, data_dir: %q }
listeners:
  - { name: devices, protocol: mqtt, address: %q }
devices: { anonymous: true }
upstreams:
  - { name: cloud, url: "mqtt://%s" }
http: { address: %q }
log: { level: info, format: text }
`, demoGateway, filepath.Join(d.dir, "gateway"), d.address, d.line.ln.Addr(), httpAddress)
	return os.WriteFile(d.configFile(), []byte(text), 0o600)
}

func (d *demo) configFile() string { return filepath.Join(d.dir, "gateway.yaml") }
func (d *demo) logFile() string    { return filepath.Join(d.dir, "gateway.log") }

func (d *demo) start(ctx context.Context) error {
	c, err := startChild(ctx, d.exe, []string{"run", "--config", d.configFile()}, d.logFile())
	if err == nil {
		d.gateway = c
	}
	return err
}

// drain is how long devices go on at the end until everything is acknowledged.
const drain = 15 * time.Second

// story is what happens while devices publish. Its moments are shares of the duration.
func (d *demo) story(ctx context.Context) (*ledger, error) {
	fleet, err := firmwaresim.New(firmwaresim.Config{
		Broker: "mqtt://" + d.address, Devices: d.devices, Rate: d.rate, Size: 256, Seed: d.seed,
		Window: 64, Buffer: 10_000, Drain: drain, MaxBackoff: time.Second,
	}, nil)
	if err != nil {
		return nil, err
	}
	if d.sleepers, err = d.newSleepers(); err != nil {
		return nil, err
	}
	fleetCtx, stopFleets := context.WithCancel(ctx)
	defer stopFleets()
	var report, sleepersReport firmwaresim.Report
	done := make(chan error, 2) // nobody waits if the story breaks off: a fleet without a gateway takes its time
	go func() {
		var err error
		report, err = fleet.Run(fleetCtx)
		done <- err
	}()
	go func() {
		var err error
		sleepersReport, err = d.sleepers.Run(fleetCtx)
		done <- err
	}()
	d.say("devices: %d of them publish %.0f messages a second, each kept by its device until it is acknowledged", d.devices, d.rate*float64(d.devices))
	began := time.Now()
	at := func(share float64) error { return d.until(ctx, began.Add(time.Duration(share*float64(d.duration)))) }

	if err := d.commandSleepers(ctx); err != nil {
		return nil, err
	}

	if err := at(0.25); err != nil {
		return nil, err
	}
	d.line.set(lineMute)
	d.say("BROKEN: the uplink still takes what the gateway sends, but the upstream's acks get lost")

	if err := at(0.28); err != nil {
		return nil, err
	}
	d.line.set(lineDown)
	d.say("CUT: now the uplink is gone. So far %s", d.counts(fleet))

	if err := at(0.32); err != nil {
		return nil, err
	}
	if err := d.commandIntoTheCut(ctx); err != nil {
		return nil, err
	}

	if err := at(0.41); err != nil {
		return nil, err
	}
	d.wake(d.sleepers.DeviceIDs()[:sleeperCount/2])

	if err := at(0.45); err != nil {
		return nil, err
	}
	d.say("devices do not notice: %s, so %d wait on the gateway's disk", d.counts(fleet), d.waiting(fleet))
	pid := d.gateway.cmd.Process.Pid
	d.gateway.kill()
	killed := time.Now()
	d.say("KILL -9: gateway process %d is gone, in the middle of its work", pid)
	if err := d.start(ctx); err != nil {
		return nil, err
	}
	d.say("gateway: process %d is ready %d ms after the kill; devices reconnect and send what was not acknowledged",
		d.gateway.cmd.Process.Pid, time.Since(killed).Milliseconds())

	if err := at(0.55); err != nil {
		return nil, err
	}
	d.wake(d.sleepers.DeviceIDs()[sleeperCount/2:])

	if err := at(0.65); err != nil {
		return nil, err
	}
	d.say("still no uplink: %s, so %d wait", d.counts(fleet), d.waiting(fleet))
	d.line.set(lineUp)
	d.say("MENDED: the uplink is back; the gateway finds out with its next attempt to connect")
	mended, goal := time.Now(), fleet.Snapshot().Acknowledged
	if err := d.poll(ctx, 30*time.Second, "the backlog to arrive", func() bool { return d.receiver.Stats().Messages >= goal }); err != nil {
		return nil, err
	}
	d.say("the backlog has arrived, %.1f s after the uplink came back", time.Since(mended).Seconds())
	if err := d.finishCommands(ctx); err != nil {
		return nil, err
	}

	if err := at(1); err != nil {
		return nil, err
	}
	stopFleets()
	for range cap(done) {
		if err := <-done; err != nil {
			return nil, err
		}
	}
	if n := report.Unacknowledged + uint64(sleepersReport.Answers); n > 0 {
		return nil, fmt.Errorf("%d messages were not acknowledged within %v; the gateway's log is %s", n, drain, d.logFile())
	}
	d.say("devices have stopped, and all they sent is acknowledged")
	return d.settle(ctx, fleet, report.Rate)
}

// settle waits until what was acknowledged has arrived, and makes the ledger of it.
func (d *demo) settle(ctx context.Context, fleet *firmwaresim.Fleet, rate float64) (*ledger, error) {
	// What was not acknowledged may still arrive: QoS 0. Wait until nothing comes any more.
	last, since := d.receiver.Stats(), time.Now()
	err := d.poll(ctx, 20*time.Second, "the last messages to arrive", func() bool {
		if s := d.receiver.Stats(); s != last {
			last, since = s, time.Now()
		}
		return time.Since(since) > 500*time.Millisecond && fleet.Ledger().Verify(d.arrivals).Lost == 0
	})
	if ctx.Err() != nil {
		return nil, err
	}
	v := fleet.Ledger().Verify(d.arrivals) // lost messages show here, whatever poll says
	for _, e := range v.Examples {
		d.say("%s", e)
	}
	s := d.receiver.Stats()
	return &ledger{
		Published: v.Published, Acknowledged: v.Acknowledged, Arrived: v.Arrived,
		Removed: s.Duplicates, Repeated: v.Duplicates,
		Lost: v.Lost, OutOfOrder: v.OutOfOrder, Unknown: v.Unknown + d.strangers.Load(), Missing: s.Missing,
		Rate: rate, UplinkBytes: uint64(d.line.bytes.Load()), PlainBytes: d.plain.Load(),
		Commands: d.settleCommands(),
	}, nil
}

func (d *demo) counts(fleet *firmwaresim.Fleet) string {
	return fmt.Sprintf("%d acknowledged, %d arrived upstream", fleet.Snapshot().Acknowledged, d.receiver.Stats().Messages)
}

func (d *demo) waiting(fleet *firmwaresim.Fleet) uint64 {
	acked, arrived := fleet.Snapshot().Acknowledged, d.receiver.Stats().Messages
	return acked - min(acked, arrived)
}

func (d *demo) printLedger(l *ledger) {
	fmt.Fprintln(d.out, "\nThe ledger")
	w := tabwriter.NewWriter(d.out, 0, 0, 3, ' ', 0)
	row := func(what string, n any, note string, args ...any) {
		fmt.Fprintf(w, "  %s\t%12v\t%s\n", what, n, fmt.Sprintf(note, args...))
	}
	row("published by the devices", l.Published, "")
	row("acknowledged by the gateway", l.Acknowledged, "each when it was on disk; the rest is QoS 0, which is never acknowledged")
	row("arrived upstream", l.Arrived, "in the order in which each device sent them")
	row("duplicates removed", l.Removed+l.Repeated, "%d sent again by the gateway, known by their id; %d by devices that the crash left without an ack", l.Removed, l.Repeated)
	row("lost", l.Lost, "acknowledged, but not arrived")
	if l.OutOfOrder+l.Unknown+l.Missing > 0 {
		row("out of order, unknown, missing", l.OutOfOrder+l.Unknown+l.Missing, "%d, %d, %d", l.OutOfOrder, l.Unknown, l.Missing)
	}
	row("messages/s", fmt.Sprintf("%.0f", l.Rate), "acknowledged, the crash included")
	row("bytes on the uplink", bytesText(l.UplinkBytes), "both ways, what was sent again included; a plain MQTT bridge needs %s: %.0f %% saved",
		bytesText(l.PlainBytes), 100*(1-float64(l.UplinkBytes)/float64(max(l.PlainBytes, 1))))
	_ = w.Flush()
	l.Commands.print(d.out)
	fmt.Fprintln(d.out)
	if l.balanced() {
		fmt.Fprintln(d.out, "Every message that a device was told is safe has arrived.")
		fmt.Fprintln(d.out, "Every command has reached its end, and the cloud knows it as the device does.")
	}
	if !l.delivered() {
		fmt.Fprintf(d.out, "THIS IS WRONG: messages that were promised are missing or out of order. Logs: %s\n", d.dir)
	}
	if !l.Commands.balanced() {
		fmt.Fprintf(d.out, "THIS IS WRONG: commands are lost, executed twice, or not what their devices say. Logs: %s\n", d.dir)
	}
}

func (d *demo) printKept() {
	host, port, _ := net.SplitHostPort(d.address)
	fmt.Fprintf(d.out, `
It keeps running until Ctrl-C. Watch the upstream in a second terminal, publish in a third:
  %[1]s cloud tail --url mqtt://%[2]s
  mosquitto_pub -h %[3]s -p %[4]s -q 1 -i my-device -t dt/demo/my-device/hello -m '{"hello":"world"}'
and look at the gateway:
  %[1]s status --config %[5]s
`, shellName(d.exe), d.cloud.address, host, port, d.configFile())
}

// shellName is how somebody calls this program: by its name if that finds it.
func shellName(exe string) string {
	for dir := range strings.SplitSeq(os.Getenv("PATH"), string(os.PathListSeparator)) {
		if filepath.Join(dir, filepath.Base(exe)) == exe {
			return filepath.Base(exe)
		}
	}
	return exe
}

// until waits for a moment of the story. The gateway must not end meanwhile.
func (d *demo) until(ctx context.Context, moment time.Time) error {
	t := time.NewTimer(time.Until(moment))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return errors.New("interrupted")
	case <-d.gateway.ended:
		return fmt.Errorf("the gateway ended by itself (%v); its log is %s", d.gateway.cmd.ProcessState, d.logFile())
	}
}

func (d *demo) poll(ctx context.Context, limit time.Duration, what string, done func() bool) error {
	for deadline := time.Now().Add(limit); !done(); {
		if err := d.until(ctx, time.Now().Add(20*time.Millisecond)); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v for %s; the gateway's log is %s", limit, what, d.logFile())
		}
	}
	return nil
}

func (d *demo) wait(ctx context.Context, what string, ready <-chan struct{}) error {
	t := time.NewTimer(20 * time.Second)
	defer t.Stop()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return errors.New("interrupted")
	case <-t.C:
		return fmt.Errorf("waited 20 s for %s", what)
	}
}
