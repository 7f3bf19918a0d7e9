package main

import (
	"errors"

	"holdfast/internal/testkit"
)

// figures in the order of the list that set their goals; docs/benchmarks.md keeps the numbers.
var figures = []figure{
	{1, "Taking in: 256 B, QoS 1, each PUBACK after fsync", measureIntake},
	{2, "The spool alone", measureStore},
	{3, "Draining a backlog", measureDrain},
	{4, "Bytes on the upstream wire", measureWire},
	{5, "Memory at rest", measureIdle},
	{6, "Start with a full spool", measureStart},
	{7, "Commands: devices that come back all at once", measureReturn},
	{8, "Commands: from the request to the device", measureWay},
	{9, "Commands: submitting", measureSubmit},
	{10, "A registry with many devices", measureRegistry},
	{11, "Live first: how old the newest message is after an outage", measureLive},
	{12, "A link of 50 kbit/s", measureLink},
	{13, "Lists of the API", measureLists},
	{14, "Taking in while browsers look on", measureViewers},
	{15, "Taking in, compared with another build", measureAgainst},
}

// storeFolder is where a gateway keeps its store below its data folder.
const storeFolder = "store"

// pendingMessages asks a gateway how many messages still wait for its upstream.
func pendingMessages(g *testkit.Gateway) (uint64, error) {
	status, err := g.Status()
	if err != nil {
		return 0, err
	}
	if len(status.Ledger.Accounts) == 0 {
		return 0, errors.New("the status tells of no account")
	}
	n := uint64(0)
	for _, a := range status.Ledger.Accounts {
		n += a.Pending.Messages
	}
	return n, nil
}
