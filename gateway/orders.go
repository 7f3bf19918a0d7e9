package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
)

// orders takes the commands that come down from one upstream. The upstream is acknowledged when a command is
// stored, or when it is stored that it was refused: what comes while the link is down waits there, and what a crash
// here left unacknowledged comes again and is known by its id.
type orders struct {
	gateway  string
	upstream bridge.Config
	data     *bridge.Bridge // the link of the data, which commands follow
	queue    *devices.Queue
	now      func() time.Time // for certificates
	log      *slog.Logger

	mu  sync.Mutex
	up  bool
	err string
}

func newOrders(gateway string, u bridge.Config, data *bridge.Bridge, q *devices.Queue, now func() time.Time, log *slog.Logger) *orders {
	return &orders{gateway: gateway, upstream: u, data: data, queue: q, now: now, log: log}
}

// Run takes commands until ctx ends.
func (o *orders) Run(ctx context.Context) error {
	opts := mqttup.CommandsFromConfig(o.upstream, o.gateway)
	opts.Log, opts.Now = o.log, o.now
	opts.OnState = o.link
	opts.Meter = o.data.Meter()
	opts.Prefer = o.data.Settled
	return mqttup.TakeCommands(ctx, opts, wire.CommandFilter(o.gateway), o.take)
}

// link notes that the subscription has come up or ended.
func (o *orders) link(up bool, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.up, o.err = up, ""
	if err != nil {
		o.err = err.Error()
	}
}

// ready says whether commands come down, and why not.
func (o *orders) ready() (up bool, err string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.up, o.err
}

// take takes one publish. It returns at once; the publish is acknowledged when what follows from it is stored.
func (o *orders) take(m mqttup.Incoming) {
	gateway, device, action, ok := wire.ParseCommandTopic(m.Topic)
	stored := func(err error) {
		if err == nil {
			m.Ack()
		}
	}
	var err error
	switch {
	case !ok || gateway != o.gateway: // a level is empty, or escaped in a wrong way
		err = o.refuse("", "", devices.CodeInvalid,
			fmt.Sprintf("the topic %.100q is none of a command: publish to gw/%s/cmd/DEVICE/submit or …/cancel", m.Topic, o.gateway), stored)
	case action == wire.ActionSubmit:
		err = o.submit(device, m.Payload, m.Retained, stored)
	case action == wire.ActionCancel:
		err = o.cancel(device, m.Payload, stored)
	default:
		err = o.refuse(device, "", devices.CodeInvalid, fmt.Sprintf("there is no action %.40q: publish to …/submit or …/cancel", action), stored)
	}
	if err != nil {
		// The store takes nothing more: the process is about to end, and the upstream will send it again.
		o.log.Warn("command not stored", "device", device, "err", err)
	}
}

func (o *orders) submit(device string, payload []byte, retained bool, stored func(error)) error {
	s, err := wire.DecodeSubmit(payload)
	switch {
	case errors.Is(err, wire.ErrTooLarge):
		return o.refuse(device, s.ID, devices.CodeTooLarge, err.Error(), stored)
	case err != nil:
		return o.refuse(device, s.ID, devices.CodeInvalid, err.Error(), stored)
	case retained && s.ID == "":
		return o.refuse(device, "", devices.CodeInvalid,
			"a retained submit without an id would be a new command at each reconnect: give it an id, or do not retain it", stored)
	}
	r := httpapi.Request(device, &s)
	r.Source, r.Upstream = "upstream "+o.upstream.Name, o.upstream.Name
	return o.queue.Submit(&r, func(_ devices.Command, _ bool, err error) { stored(onlyStore(err)) })
}

func (o *orders) cancel(device string, payload []byte, stored func(error)) error {
	c, err := wire.DecodeCancel(payload)
	if err != nil {
		return o.refuse(device, c.ID, devices.CodeInvalid, err.Error(), stored)
	}
	return o.queue.Cancel(device, c.ID, c.Reason, o.upstream.Name, func(_ devices.Command, err error) { stored(onlyStore(err)) })
}

func (o *orders) refuse(device, id, code, reason string, stored func(error)) error {
	return o.queue.Refuse(&devices.Refusal{ID: id, Device: device, Code: code, Reason: reason}, o.upstream.Name, stored)
}

// onlyStore drops refusals: they are stored and told, which is all that an acknowledgement says.
func onlyStore(err error) error {
	if errors.As(err, new(*devices.Refusal)) {
		return nil
	}
	return err
}
