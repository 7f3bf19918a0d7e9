package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/powercut"
	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

// trial is a gateway among devices, with an upstream behind a link, that goes through a schedule of faults. Everything that harnesses
// break they break by one, and proof.Check judges.
type trial struct {
	t      *testing.T
	report *proof.Report
	form   form
	bin    string
	seed   uint64

	disk   *powercut.Disk // nil: the data lies in a folder of the machine's own disk
	mount  *powercut.Mount
	g      *testkit.Gateway
	clock  *testkit.FakeClock // nil: the machine's
	up     *upstream
	second *testkit.Proxy // another way to the same upstream; nil: there is one
	fleet  *proof.Fleet
	force  *troops       // nil: no commands
	hq     *headquarters // with force
	calm   func()        // ends a link that comes and goes
	hurt   bool          // damaged: what was accepted may be gone from the books, and the verdict in the end has to find it announced
	copies int           // of its data, made so far
	why    []string      // reasons for which gaps may be announced, by what was done
}

// form is how the gateway of a trial is set up. More of them: add to forms.
type form struct {
	name      string
	yaml      string   // top-level keys, upstreams aside
	format    string   // of the upstream; "": batch
	upstream  string   // more of its keys
	twoWays   bool     // it has two URLs
	size      int      // bytes of a payload; 0: as the values need
	reasons   []string // for which its rules may take messages
	liveFirst []string // lanes that are not drained in order
}

var forms = []form{
	{name: "as it comes"},
	{name: "each message by itself", format: "cloudevents"},
	{name: "large messages", size: 5000},
	{name: "two ways upstream", twoWays: true},
	{name: "paced", upstream: ", budget: { bytes_per_second: 32KiB }"},
	{
		name: "newest first", liveFirst: []string{"alarm", "telemetry", "bulk"},
		yaml: "spool: { lanes: [{ name: alarm, share: 50, max_bytes: 256MiB, max_age: 720h, when_full: reject, drain: live_first }, " +
			"{ name: telemetry, share: 40, max_bytes: 1GiB, max_age: 168h, when_full: drop_oldest, drain: live_first }, " +
			"{ name: bulk, share: 10, max_bytes: 1GiB, max_age: 72h, when_full: drop_oldest, drain: live_first }] }\n",
	},
	{
		name: "small lanes", reasons: []string{"max_bytes"}, size: 500,
		yaml: "spool: { lanes: [{ name: alarm, share: 50, max_bytes: 1MiB, max_age: 720h, when_full: drop_oldest }, " +
			"{ name: telemetry, share: 40, max_bytes: 1MiB, max_age: 168h, when_full: drop_oldest }, { name: bulk, share: 10, max_bytes: 1MiB, max_age: 72h, when_full: drop_oldest }] }\n",
	},
}

// links are what a way upstream may be like during a step, by name. More of them: add here and to linkChoices.
var links = map[string]testkit.Faults{
	"up":         {Latency: 10 * time.Millisecond}, // so that something is always in flight
	"away":       {Refuse: true},
	"stalled":    {StallUp: true, StallDown: true},
	"half open":  {BlackholeUp: true, BlackholeDown: true},
	"taking all": {SwallowAcks: true},
	"slow":       {BytesPerSecond: 20 << 10, Latency: 100 * time.Millisecond},
}

var linkChoices = []proof.Choice{
	{Name: "up", Weight: 6},
	{Name: "away", Weight: 3},
	{Name: "coming and going", Weight: 3},
	{Name: "reset", Weight: 1},
	{Name: "stalled", Weight: 1},
	{Name: "half open", Weight: 1},
	{Name: "taking all", Weight: 2},
	{Name: "slow", Weight: 1},
}

// load is what there is to do.
type load struct {
	devices  int
	rate     float64
	commands bool // a cloud sends commands, to devices of their own
	clock    bool // the gateway's wall clock is ours, where that can be
}

// patience is the most time for whatever takes a moment: machines that run this for hours stand still now and then.
const patience = 5 * time.Minute

// startTrial starts everything. powered: the data lies on a disk whose power can be cut; the test is skipped where that cannot be.
func startTrial(t *testing.T, r *proof.Report, fm form, seed uint64, powered bool, l load) *trial {
	t.Helper()
	x := &trial{t: t, report: r, form: fm, bin: bin(t), seed: seed, calm: func() {}, why: append([]string{}, fm.reasons...)}
	c := testkit.GatewayConfig{Devices: "{ anonymous: true }", Patience: patience}
	if powered {
		if err := powercut.Available(); err != nil {
			t.Skip(err)
		}
		x.disk = powercut.New()
		x.disk.SetCapacity(4 << 30)
		m, err := powercut.MountAt(t.TempDir(), x.disk)
		if err != nil {
			t.Fatal(err)
		}
		x.mount = m
		// After the gateway has ended, which its own Cleanup sees to.
		t.Cleanup(func() {
			if err := x.mount.Unmount(); err != nil {
				t.Error(err)
			}
		})
		c.Dir = filepath.Join(m.Dir, "data")
	}
	if l.clock && testkit.FakeClocks {
		x.clock = testkit.NewFakeClock(t)
		c.Clock = x.clock
	}
	x.up = startUpstream(t)
	x.up.link.Set(links["up"])
	urls := fmt.Sprintf("%q", "mqtt://"+x.up.link.Addr())
	if fm.twoWays {
		x.second = testkit.StartProxy(t, x.up.broker.Addr)
		x.second.Set(links["up"])
		urls += fmt.Sprintf(", %q", "mqtt://"+x.second.Addr())
	}
	format := fm.format
	if format == "" {
		format = "batch"
	}
	c.YAML = logYAML + fm.yaml + fmt.Sprintf("upstreams:\n  - { name: cloud, urls: [%s], format: %s, commands: %v%s }\n", urls, format, l.commands, fm.upstream)
	if l.commands {
		c.Devices = "{ anonymous: true, commands: { ack_timeout: 1s } }"
	}
	x.g = testkit.StartGatewayWith(t, x.bin, gatewayID, c)
	var err error
	x.fleet, err = proof.StartFleet(t.Context(), proof.FleetConfig{
		Broker: "mqtt://" + x.g.Addr, Seed: seed, Devices: l.devices, Rate: l.rate, Drain: patience,
		Change: func(c *firmwaresim.Config) {
			c.MaxBackoff = 80 * time.Millisecond // they are back soon: a life is short
			c.Size = fm.size
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.fleet.Abort)
	if l.commands {
		x.force = startTroops(t, x.g.Addr, seed)
		for prefix, fleet := range x.force.fleets {
			x.fleet.Add(prefix, fleet)
		}
		x.hq = openHeadquarters(t, x.g, x.up.broker.Addr, seed)
		x.hq.noHours = x.clock != nil
		x.g.AwaitCommands(t)
		for _, device := range x.force.devices() {
			known(t, x.g, device)
			x.hq.command(device)
		}
	}
	return x
}

// errorf notes that something is wrong, in the report too.
func (x *trial) errorf(format string, args ...any) {
	x.t.Helper()
	x.report.Failed("%s: %s", x.t.Name(), fmt.Sprintf(format, args...))
	x.t.Errorf(format, args...)
}

// step does one step of a schedule.
func (x *trial) step(s proof.Step) {
	x.t.Helper()
	x.setLink(s)
	rng := rand.New(rand.NewPCG(s.Seed, 0))
	f, ok := faults[s.Fault]
	if !ok {
		x.t.Fatalf("there is no fault %q", s.Fault)
	}
	if f.before != nil {
		f.before(x, rng)
	}
	<-time.After(s.Life)
	floor := x.fleet.Floor()
	x.report.Fault(s.Fault)
	again := f.strike(x, s, rng)
	if !again {
		x.look(s, floor)
		return
	}
	x.verifyCopy()
	if f.stopped != nil {
		f.stopped(x, rng)
	}
	<-time.After(s.Gone)
	x.report.Cycle(x.g.Restart())
	x.look(s, floor)
}

// look asks a gateway that has gone through something for its books: they add up, and hold whatever devices were told before.
func (x *trial) look(s proof.Step, floor uint64) {
	x.t.Helper()
	var books *proof.Books
	testkit.EventuallyNil(x.t, patience, "after "+s.Fault+" the gateway shows its books", func() (err error) {
		books, err = x.g.Books()
		return err
	})
	for _, err := range books.Balance() {
		x.errorf("after %s: %v", s.Fault, err)
	}
	if n := books.Accepted("cloud"); n < floor && !x.hurt {
		x.errorf("after %s: the books say that %d messages were accepted, devices were told of %d", s.Fault, n, floor)
	}
}

// setLink makes the way upstream what a step wants.
func (x *trial) setLink(s proof.Step) {
	x.calm()
	x.calm = func() {}
	x.report.Fault("link " + s.Link)
	if x.second != nil {
		other := links["up"]
		if s.Seed%2 == 0 {
			other = links["away"]
		}
		x.second.Set(other)
		if other.Refuse {
			x.second.Reset()
		}
	}
	switch s.Link {
	case "coming and going":
		x.calm = x.up.link.Flap(s.Seed, links["up"], 150*time.Millisecond, 150*time.Millisecond, func(string, ...any) {})
	case "reset":
		x.up.link.Set(links["up"])
		x.up.link.Reset()
	default:
		f, ok := links[s.Link]
		if !ok {
			x.t.Fatalf("there is no link %q", s.Link)
		}
		x.up.link.Set(f)
		if f.Refuse {
			x.up.link.Reset()
		}
	}
}

// fault is what a step does to a gateway. More of them: add to faults, and to the choices of a harness.
type fault struct {
	before  func(x *trial, rng *rand.Rand)                           // while it works; nil: nothing
	strike  func(x *trial, s proof.Step, rng *rand.Rand) (gone bool) // gone: it is not running any more, and is started again
	stopped func(x *trial, rng *rand.Rand)                           // before it is; nil: nothing
}

var faults = map[string]fault{
	"kill -9":   {strike: (*trial).kill},
	"power cut": {strike: (*trial).cut},
	"stop": {strike: func(x *trial, _ proof.Step, _ *rand.Rand) bool {
		begin := time.Now()
		if code := x.g.Stop(); code != 0 {
			x.errorf("exit code %d after SIGTERM", code)
		}
		if took := time.Since(begin); took > 10*time.Second {
			x.errorf("an orderly stop took %v", took)
		}
		return true
	}},
	"freeze": {strike: func(x *trial, s proof.Step, _ *rand.Rand) bool {
		x.g.Signal(syscall.SIGSTOP)
		<-time.After(s.Gone)
		x.g.Signal(syscall.SIGCONT)
		return false
	}},
	// fsync takes its time, and then the power goes, while much waits for it.
	"slow disk and power cut": {
		before: func(x *trial, rng *rand.Rand) {
			x.disk.SetFaults(powercut.Faults{SyncTakes: time.Duration(1+rng.IntN(30)) * time.Millisecond})
		},
		strike: func(x *trial, s proof.Step, rng *rand.Rand) bool {
			defer x.disk.SetFaults(powercut.Faults{})
			return x.cut(s, rng)
		},
	},
	// The gateway has to end by itself, and to acknowledge nothing that it could not sync.
	"fsync fails": {
		strike: func(x *trial, _ proof.Step, rng *rand.Rand) bool {
			return x.broken(powercut.Faults{SyncErr: syscall.EIO, After: rng.IntN(20)})
		},
	},
	"fsync fails and power cut": {
		strike: func(x *trial, s proof.Step, rng *rand.Rand) bool {
			x.broken(powercut.Faults{SyncErr: syscall.EIO, After: rng.IntN(20)})
			return x.cut(s, rng)
		},
	},
	// Somebody sets the wall clock, or what sets it is wrong.
	"clock jumps": {
		strike: func(x *trial, _ proof.Step, rng *rand.Rand) bool {
			x.setClock(rng)
			return false
		},
	},
	// A box without a battery for its clock comes up in another year.
	"boot with another clock": {
		strike: (*trial).kill,
		stopped: func(x *trial, rng *rand.Rand) {
			if x.clock != nil {
				x.clock.Reboots()
			}
			x.setClock(rng)
		},
	},
	// A disk, or a program, that forgets fsync: no part of any harness but the test of the checker.
	"lying disk and power cut": {
		before: func(x *trial, _ *rand.Rand) { x.disk.SetFaults(powercut.Faults{Lie: true}) },
		strike: func(x *trial, s proof.Step, rng *rand.Rand) bool {
			defer x.disk.SetFaults(powercut.Faults{})
			return x.cut(s, rng)
		},
	},
	// Others fill the disk for a while. The gateway takes nothing that it cannot keep, and goes on when there is room again, by
	// itself or started again.
	"disk full": {strike: (*trial).full},
	// Bytes change, or are gone, in any file of the store. Messages may be lost by that, and then they are announced.
	"damage": {strike: (*trial).kill, stopped: (*trial).damage},
	"write fails": {
		strike: func(x *trial, _ proof.Step, rng *rand.Rand) bool {
			return x.broken(powercut.Faults{WriteErr: syscall.EIO, After: rng.IntN(50)})
		},
	},
}

func (x *trial) kill(proof.Step, *rand.Rand) bool {
	x.g.Kill()
	return true
}

// cut takes the power from the gateway's disk, kills the gateway, and switches the disk on again.
func (x *trial) cut(_ proof.Step, rng *rand.Rand) bool {
	x.t.Helper()
	loss := x.disk.Cut(rng.Uint64())
	x.g.SendKill()
	x.mount.Release() // what hangs in the disk can end
	<-x.g.Exited()
	x.remount()
	if loss.LostWrites > 0 {
		x.report.Fault("power cut that took unsynced writes")
	}
	if loss.Torn > 0 {
		x.report.Fault("power cut that tore a write")
	}
	if loss.LostNames > 0 {
		x.report.Fault("power cut that took unsynced names")
	}
	return true
}

// setClock has the gateway's wall clock show something else. The kernel vouches for it, or not yet, if it is right; a wrong one for
// which it vouched would mean that years have passed, and what has a time to live or to be kept would end, as it should.
func (x *trial) setClock(rng *rand.Rand) {
	x.t.Helper()
	if x.clock == nil {
		return
	}
	now, synced := time.Now(), rng.IntN(2) == 0
	walls := []struct {
		name string
		wall time.Time
	}{
		{"right", now},
		{"1970", time.Unix(int64(rng.IntN(1000)), 0)},
		{"years behind", now.Add(-time.Duration(1+rng.IntN(9)) * year)},
		{"years ahead", now.Add(time.Duration(1+rng.IntN(40)) * year)},
		{"off by a day at most", now.Add(time.Duration(rng.IntN(48*3600)-24*3600) * time.Second)},
	}
	w := walls[rng.IntN(len(walls))]
	x.clock.At(w.wall, synced && w.wall.Equal(now))
	x.report.Fault("clock: " + w.name)
}

// full leaves hardly any room for a while.
func (x *trial) full(s proof.Step, rng *rand.Rand) (gone bool) {
	x.why = append(x.why, "disk_full")
	x.t.Helper()
	x.disk.Fill(int64(rng.IntN(2 << 20)))
	full := time.NewTimer(s.Life)
	defer full.Stop()
	select {
	case <-full.C:
	case <-x.g.Exited():
	}
	if rng.IntN(3) == 0 {
		// It goes down in the middle of it, and has to come up again on a full disk.
		x.g.Kill()
		x.report.Fault("start on a full disk")
		x.report.Cycle(x.g.Restart())
	}
	x.disk.Fill(-1)
	select {
	case <-x.g.Exited():
		return true
	default:
	}
	before := x.fleet.Floor()
	testkit.EventuallyNil(x.t, 30*time.Second, "the gateway takes messages again when there is room", func() error {
		select {
		case <-x.g.Exited():
			gone = true
			return nil
		default:
		}
		if x.fleet.Floor() == before {
			return fmt.Errorf("none since: %v", x.fleet)
		}
		return nil
	})
	return gone
}

// damage changes one file of a stopped gateway's store.
func (x *trial) damage(rng *rand.Rand) {
	x.t.Helper()
	files := x.disk.Files("data/store")
	if len(files) == 0 {
		return
	}
	file := files[rng.IntN(len(files))]
	how := "nothing"
	err := x.disk.Damage(file.Path, func(b []byte) []byte {
		if len(b) == 0 {
			return b
		}
		at := rng.IntN(len(b))
		switch rng.IntN(4) {
		case 0, 1:
			how = "a bit flipped"
			b[at] ^= 1 << rng.IntN(8)
		case 2:
			how = "a stretch zeroed"
			clear(b[at:min(len(b), at+1+rng.IntN(8<<10))])
		case 3:
			how = "its end cut off"
			b = b[:at]
		}
		return b
	})
	if err != nil {
		x.t.Fatal(err)
	}
	x.why = append(x.why, "damaged")
	x.hurt = true
	x.report.Fault("damage: " + how)
	x.t.Logf("damage to %s (%d bytes): %s", file.Path, file.Size, how)
	x.remount() // lengths have changed behind the kernel's back
}

// remount takes the disk of a stopped gateway out of the file tree and puts it back.
func (x *trial) remount() {
	x.t.Helper()
	// The kernel may still be closing what the killed gateway had open.
	testkit.EventuallyNil(x.t, 10*time.Second, "the disk can be taken out", x.mount.Unmount)
	m, err := powercut.MountAt(x.mount.Dir, x.disk)
	if err != nil {
		x.t.Fatal(err)
	}
	x.mount = m
}

// broken breaks the disk and waits until the gateway has ended.
func (x *trial) broken(f powercut.Faults) bool {
	x.t.Helper()
	x.disk.SetFaults(f)
	defer x.disk.SetFaults(powercut.Faults{})
	select {
	case <-x.g.Exited():
		if code := x.g.ExitCode(); code == 0 {
			x.errorf("exit code 0 on a broken disk")
		}
	case <-time.After(20 * time.Second):
		x.errorf("the gateway runs on for 20 s on a disk that fails: %+v", f)
		x.g.Kill()
	}
	return true
}

// verifyCopy has `holdfast spool verify` read a copy of the stopped gateway's data: the next start recovers by itself.
func (x *trial) verifyCopy() {
	x.t.Helper()
	var dir string
	if x.disk != nil {
		x.copies++ // another name each time: the kernel remembers what it saw under the last one
		name := fmt.Sprint("copy-", x.copies)
		if err := x.disk.Copy("data", name); err != nil {
			x.t.Fatal(err)
		}
		defer x.disk.Drop(name)
		dir = filepath.Join(x.mount.Dir, name)
	} else {
		dir = filepath.Join(x.t.TempDir(), "copy")
		defer os.RemoveAll(dir)
		if err := os.CopyFS(dir, os.DirFS(x.g.Dir)); err != nil {
			x.t.Fatal(err)
		}
	}
	x.verify(dir)
}

func (x *trial) verify(dir string) {
	x.t.Helper()
	if x.hurt {
		return // it may well find what was damaged
	}
	ctx, cancel := context.WithTimeout(x.t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, x.bin, "spool", "verify", "--data-dir", dir).CombinedOutput()
	if err != nil {
		x.errorf("holdfast spool verify: %v\n%s", err, out)
	}
}

// finish lets everything arrive, and judges.
func (x *trial) finish() {
	x.t.Helper()
	x.calm()
	x.up.link.Set(testkit.Faults{})
	x.up.link.Reset() // what hangs in there would be given up after 30 s
	if x.second != nil {
		x.second.Set(testkit.Faults{})
	}
	if x.hq != nil {
		x.hq.stop()
		x.hq.awaitEnds(x.g)
		x.force.finish(x.t) // outcomes that come late
	}
	if err := x.fleet.Finish(); err != nil {
		x.errorf("%v", err)
	}
	drained(x.t, x.g, "cloud", patience)
	within := 15 * time.Second
	if x.t.Failed() {
		within = time.Second // what is lost will not come
	}
	v, err := proof.Settle(x.t.Context(), within, x.fleet, x.up.inbox, x.g.Books, proof.Options{Reasons: x.why, LiveFirst: x.form.liveFirst})
	if err != nil {
		x.errorf("%v", err)
	}
	x.report.Verdict(v)
	if x.hq != nil {
		sum, orders := reconcile(x.t, x.g, x.hq, x.force)
		x.report.Commands(orders)
		x.t.Log(sum)
	}
	if !v.OK() {
		x.t.Errorf("promise broken: %v", &v)
	}
	x.t.Logf("%s: %v; %v", x.form.name, x.fleet, &v)
	if code := x.g.Stop(); code != 0 {
		x.errorf("exit code %d after SIGTERM", code)
	}
	x.verify(x.g.Dir)
}

// told writes a report into the test's output, and into the file that variable names, if it does.
func told(t *testing.T, r *proof.Report, variable string) {
	t.Helper()
	t.Logf("\n%v", r)
	if err := r.WriteJSON(os.Getenv(variable)); err != nil {
		t.Error(err)
	}
	if !t.Failed() && !r.OK() {
		t.Error("promise broken: see the report")
	}
}

// choices are those that a variable names, each as often, separated by semicolons; else the usual ones.
func choices(variable string, usual []proof.Choice) []proof.Choice {
	names := os.Getenv(variable)
	if names == "" {
		return usual
	}
	var all []proof.Choice
	for name := range strings.SplitSeq(names, ";") {
		all = append(all, proof.Choice{Name: strings.TrimSpace(name), Weight: 1})
	}
	return all
}

// schedule tells a schedule, for a log.
func schedule(steps []proof.Step) string {
	var b strings.Builder
	for i, s := range steps {
		fmt.Fprintf(&b, "\n%3d: %v", i+1, s)
	}
	return b.String()
}
