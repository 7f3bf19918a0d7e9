package gateway

import (
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/internal/clock"
	"holdfast/internal/kv"
	"holdfast/spool"
)

// journal commits what happens to devices and commands: the rows, and what the cloud is told of them, in one
// batch of the spool's system lane. It implements devices.Journal.
type journal struct {
	spool   *spool.Spool
	lane    spool.Lane
	gateway string
	clock   *clock.Clock
	// watch is shown each event when it is on disk, on the goroutine that completes commits; nil: nobody looks.
	watch func(e devices.Event)
}

// Commit implements devices.Journal.
func (j *journal) Commit(ops []kv.Op, events []devices.Event, done func(error)) error {
	now := j.clock.Read()
	var records []spool.Record
	for i := range events {
		if e := &events[i]; e.Upstream {
			records = append(records, j.record(e, now))
		}
	}
	return j.spool.AppendAll(j.lane, records, ops, &journalDone{j, events, done}, 0)
}

// journalDone tells who waits, and then shows events to watchers: who is told of a step and looks finds it.
type journalDone struct {
	j      *journal
	events []devices.Event
	done   func(error)
}

// Done implements kv.Done.
func (d *journalDone) Done(_, _ uint64, err error) {
	if d.done != nil {
		d.done(err)
	}
	if err == nil && d.j.watch != nil {
		for i := range d.events {
			d.j.watch(d.events[i])
		}
	}
}

// record makes an event's record: a message of the gateway itself.
func (j *journal) record(e *devices.Event, now clock.Moment) spool.Record {
	clockState := wire.ClockSynced
	if now.Unsynced {
		clockState = wire.ClockUnsynced
	}
	at := wire.Time{Time: time.UnixMilli(now.Wall)}
	var device, topic string
	var payload []byte
	switch {
	case e.Command != nil:
		c := e.Command
		device = c.Device
		topic = wire.CommandEventTopic(j.gateway, c.Device, c.ID, c.State.String())
		ev := wire.CommandEvent{
			Gateway: j.gateway, Device: c.Device, ID: c.ID, Name: c.Name, State: c.State.String(), Final: c.Ended(), At: at, ClockState: clockState,
			Attempts: c.Attempts, Reason: c.Reason, Late: c.Late, Repeat: e.Repeat, Source: c.Source,
		}
		if e.Previous != 0 {
			ev.Previous = e.Previous.String()
		}
		if p := c.Progress; p != nil {
			ev.Progress = &wire.EventProgress{Text: p.Text}
			if p.Percent >= 0 {
				ev.Progress.Percent = &p.Percent
			}
		}
		if len(c.Result) > 0 {
			ev.SetResult(c.Result, c.ResultType)
		}
		payload = ev.Encode()
	case e.Refusal != nil:
		r := e.Refusal
		device = r.Device
		topic = wire.CommandEventTopic(j.gateway, r.Device, r.ID, wire.StateRefused)
		ev := wire.CommandEvent{
			Gateway: j.gateway, Device: r.Device, ID: r.ID, State: wire.StateRefused, At: at,
			// Where another command of this id goes on, its followers must not take this for the end of it.
			Final: r.Code != devices.CodeEnded && r.Code != devices.CodeConflict, ClockState: clockState,
			Code: r.Code, Reason: r.Reason,
		}
		payload = ev.Encode()
	default:
		p := &e.Device.Presence
		device = e.Device.Device
		topic = wire.DeviceEventTopic(j.gateway, device, p.Connected)
		ev := wire.DeviceEvent{
			Gateway: j.gateway, Device: device, State: wire.StateOffline, At: at, ClockState: clockState,
			Address: p.Address, Protocol: p.Protocol, Reason: p.Reason,
		}
		if p.Connected {
			ev.State, ev.Reason = wire.StateOnline, ""
		}
		payload = ev.Encode()
	}
	r := spool.Record{
		Received: now.Wall, Uptime: now.Uptime(), Device: []byte(device), Topic: []byte(topic), Flags: spool.FlagQoS1, Payload: payload,
		Props: &spool.Props{ContentType: "application/json", Upstream: e.To},
	}
	if now.Unsynced {
		r.Flags |= spool.FlagClockUnsynced
	}
	return r
}
