package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
)

// demoGateway is the id of the demo's gateway.
const demoGateway = "demo"

// The devices of the demo that take commands, and sleep until the story wakes them up.
const (
	sleeperPrefix = "sleeper"
	sleeperCount  = 4
)

// newSleepers makes them. A command of ordinary length takes a hundredth of the story, so that the long one which they get is
// under way when the gateway is killed.
func (d *demo) newSleepers() (*firmwaresim.Fleet, error) {
	return firmwaresim.New(firmwaresim.Config{
		Broker: "mqtt://" + d.address, Devices: sleeperCount, Prefix: sleeperPrefix, NoSamples: true, Seed: d.seed, Drain: drain, MaxBackoff: time.Second,
		Commands: true, Execution: firmwaresim.Execution{Duration: d.duration / 100},
	}, nil)
}

// orders are the commands of the demo as the cloud knows them. Many goroutines may use it.
type orders struct {
	mu   sync.Mutex
	list []*order          // as they were sent; under mu
	byID map[string]*order // under mu
}

// order is one command. Guarded by orders.mu.
type order struct {
	device, id, name string
	want             string // the state that is its end
	sent             time.Time
	state            string // as far as the gateway has told; "": nothing yet
	final            bool   // nothing more is to come
	reason           string
	took             time.Duration // until the cloud knew its end
}

func newOrders() *orders { return &orders{byID: make(map[string]*order)} }

// add notes that a command is being sent.
func (o *orders) add(device, id, name, want string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	x := &order{device: device, id: id, name: name, want: want, sent: time.Now()}
	o.list = append(o.list, x)
	o.byID[id] = x
}

func outcome(state string) bool {
	return state == "SUCCEEDED" || state == "FAILED" || state == "REJECTED"
}

// note takes a step that the gateway tells. Steps come at least once: after a lost link older ones come again, and must
// not undo an end. The device's word stands above any other end.
func (o *orders) note(e *wire.CommandEvent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	x := o.byID[e.ID]
	if x == nil || x.device != e.Device {
		return
	}
	over := e.Final || outcome(e.State) || e.State == wire.StateRefused
	if x.final && !over || outcome(x.state) {
		return
	}
	x.state, x.final, x.reason = e.State, over, e.Reason
	if over {
		x.took = time.Since(x.sent)
	}
}

// count says for how many commands holds is true, of one device or, with "", of all.
func (o *orders) count(device string, holds func(*order) bool) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.list {
		if (device == "" || x.device == device) && holds(x) {
			n++
		}
	}
	return n
}

func queued(x *order) bool  { return x.state == "QUEUED" }
func unended(x *order) bool { return !x.final }

// tell gives the commands of a device and where they are: "set SUCCEEDED, echo QUEUED".
func (o *orders) tell(device string) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var list []string
	for _, x := range o.list {
		if x.device == device {
			list = append(list, x.name+" "+cmp.Or(x.state, "not heard of"))
		}
	}
	return strings.Join(list, ", ")
}

// command has the cloud send commands of these names to each device; wants gives the ends to be expected.
func (d *demo) command(ctx context.Context, devices []string, names, wants []string) error {
	for i, name := range names {
		for _, device := range devices {
			n := 1 + d.orders.count(device, func(*order) bool { return true })
			s := wire.Submit{ID: fmt.Sprintf("%s-%d", device, n), Name: name, Payload: fmt.Appendf(nil, `{"n":%d}`, n), ContentType: "application/json"}
			d.orders.add(device, s.ID, name, wants[i])
			if err := d.cloud.submit(ctx, demoGateway, device, &s); err != nil {
				return fmt.Errorf("send command %s: %w", s.ID, err)
			}
		}
	}
	return nil
}

// commandSleepers puts the devices to sleep and sends them their first commands.
func (d *demo) commandSleepers(ctx context.Context) error {
	asleep := d.sleepers.DeviceIDs()
	if err := d.poll(ctx, 10*time.Second, "devices to subscribe to their commands", func() bool { return d.sleepers.Snapshot().Subscribed == len(asleep) }); err != nil {
		return err
	}
	d.sleepers.Sleep()
	d.say("devices: %d more take commands. They have subscribed, and gone to sleep", len(asleep))
	if err := d.command(ctx, asleep, []string{"set", "update", "reboot"}, []string{"SUCCEEDED", "SUCCEEDED", "SUCCEEDED"}); err != nil {
		return err
	}
	sent := d.orders.count("", func(*order) bool { return true })
	if err := d.poll(ctx, 10*time.Second, "the gateway to tell that it has the commands", func() bool { return d.orders.count("", queued) == sent }); err != nil {
		return err
	}
	d.say("COMMAND: %d commands for %d devices that are asleep: %s", sent, len(asleep), d.orders.states())
	return nil
}

// commandIntoTheCut sends what the gateway cannot get now.
func (d *demo) commandIntoTheCut(ctx context.Context) error {
	asleep := d.sleepers.DeviceIDs()
	last := len(asleep) - 1
	if err := d.command(ctx, asleep[:last], []string{"echo"}, []string{"SUCCEEDED"}); err != nil {
		return err
	}
	if err := d.command(ctx, asleep[last:], []string{"reject"}, []string{"REJECTED"}); err != nil {
		return err
	}
	d.say("COMMAND: %d more from the cloud, which wait at the upstream's broker for the gateway", len(asleep))
	return nil
}

// wake ends the sleep of some devices.
func (d *demo) wake(devices []string) {
	d.sleepers.Wake(50*time.Millisecond, devices...)
	d.say("AWAKE: %s; now they get their commands and work on them", strings.Join(devices, ", "))
}

// finishCommands waits until each command has reached its end, and tells how, device by device.
func (d *demo) finishCommands(ctx context.Context) error {
	left := d.sleepers.DeviceIDs()
	err := d.poll(ctx, 30*time.Second, "the commands to reach their end", func() bool {
		left = slices.DeleteFunc(left, func(device string) bool {
			if d.orders.count(device, unended) > 0 {
				return false
			}
			d.say("COMMAND: %s: %s", device, d.orders.tell(device))
			return true
		})
		return len(left) == 0
	})
	if err != nil && ctx.Err() == nil {
		for _, device := range left { // the ledger tells that it is wrong
			d.say("COMMAND: %s: %s", device, d.orders.tell(device))
		}
		return nil
	}
	return err
}

// states sums up: "12 QUEUED", or "QUEUED" if that is all.
func (o *orders) states() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := map[string]int{}
	for _, x := range o.list {
		n[cmp.Or(x.state, "not heard of")]++
	}
	if len(n) == 1 {
		return slices.Collect(maps.Keys(n))[0]
	}
	var list []string
	for _, state := range slices.Sorted(maps.Keys(n)) {
		list = append(list, fmt.Sprintf("%d %s", n[state], state))
	}
	return strings.Join(list, ", ")
}

// commandLedger is how the commands ended.
type commandLedger struct {
	Sent          uint64 `json:"sent"` // by the cloud
	Executed      uint64 `json:"executed"`
	ExecutedTwice uint64 `json:"executed_twice"`
	Repeats       uint64 `json:"repeats"` // came again, and were answered from the device's flash
	Succeeded     uint64 `json:"succeeded"`
	OtherEnds     uint64 `json:"other_ends"`
	Unexpected    uint64 `json:"unexpected_ends"` // of those
	Lost          uint64 `json:"lost"`            // without an end, or delivered according to the gateway and not received
	OutOfOrder    uint64 `json:"out_of_order"`
	Disagreed     uint64 `json:"disagreed"` // the cloud sees another end than the device
	// Slowest is the seconds from the cloud's sending to when it knew the end.
	Slowest float64 `json:"slowest_s"`

	ends map[string]int // other than SUCCEEDED, with their reasons
}

func (l *commandLedger) balanced() bool {
	return l.ExecutedTwice+l.Lost+l.OutOfOrder+l.Disagreed+l.Unexpected == 0
}

// settleCommands holds what the cloud has seen against what the devices did.
func (d *demo) settleCommands() commandLedger {
	l, examples := d.orders.ledger(d.sleepers.CommandLedger())
	for _, e := range examples {
		d.say("%s", e)
	}
	return l
}

func (o *orders) ledger(devices *firmwaresim.CommandLedger) (l commandLedger, examples []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	views := make([]firmwaresim.CommandView, 0, len(o.list))
	l.ends = make(map[string]int)
	for _, x := range o.list {
		views = append(views, firmwaresim.CommandView{Device: x.device, ID: x.id, State: x.state})
		l.Sent++
		switch {
		case !x.final:
			l.Lost++
			examples = append(examples, fmt.Sprintf("%s %s: has no end", x.device, x.id))
		case x.state == "SUCCEEDED":
			l.Succeeded++
		default:
			l.OtherEnds++
			l.ends[x.state]++
		}
		if x.final && x.state != x.want {
			l.Unexpected++
			examples = append(examples, fmt.Sprintf("%s %s: %s, not %s: %s", x.device, x.id, x.state, x.want, x.reason))
		}
		l.Slowest = max(l.Slowest, x.took.Seconds())
	}
	v := devices.Verify(views)
	l.Executed, l.ExecutedTwice, l.Repeats = v.Executed, v.ExecutedTwice, v.Repeats
	l.Lost += v.Lost
	l.OutOfOrder, l.Disagreed = v.OutOfOrder, v.Disagreed+v.Unknown
	return l, append(examples, v.Examples...)
}

// print writes the part of the ledger that is about commands.
func (l *commandLedger) print(out io.Writer) {
	fmt.Fprintln(out, "\nCommands")
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	row := func(what string, n any, note string, args ...any) {
		fmt.Fprintf(w, "  %-27s\t%12v\t%s\n", what, n, fmt.Sprintf(note, args...))
	}
	row("sent by the cloud", l.Sent, "to devices that were asleep, some while the uplink was cut")
	row("executed by the devices", l.Executed, "in the order in which they were sent")
	row("executed twice", l.ExecutedTwice, "%d came again to a device, which knows what it has done", l.Repeats)
	row("SUCCEEDED", l.Succeeded, "the device said so")
	var ends []string
	for _, state := range slices.Sorted(maps.Keys(l.ends)) {
		ends = append(ends, fmt.Sprintf("%d %s", l.ends[state], state))
	}
	row("other ends", l.OtherEnds, "%s", strings.Join(ends, ", "))
	row("lost", l.Lost, "without an end, or never received")
	if l.OutOfOrder+l.Disagreed+l.Unexpected > 0 {
		row("out of order, disagreed, unexpected", l.OutOfOrder+l.Disagreed+l.Unexpected, "%d, %d, %d", l.OutOfOrder, l.Disagreed, l.Unexpected)
	}
	row("slowest", fmt.Sprintf("%.1f s", l.Slowest), "from the cloud's sending until it knew the end; sleep, cut and crash included")
	_ = w.Flush()
}
