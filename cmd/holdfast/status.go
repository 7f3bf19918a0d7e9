package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"holdfast/bridge"
	"holdfast/gateway/httpapi"
)

var statusCommand = command{
	name: "status", args: "[--json] " + apiArgs,
	summary: "Show on one screen what a running gateway is doing",
	help: `The ledger says where every accepted message is: delivered, expired (too old), evicted (no space), parked (the
upstream refused it for good) or still pending.

` + apiHelp,
	run: showStatus,
}

func showStatus(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print what GET /api/v1/status answers")
	c, _, err := api.asks(p, fs, args, 0, 0)
	if err != nil {
		return err
	}
	b, err := c.raw(ctx, http.MethodGet, "/api/v1/status", nil)
	if err != nil {
		return err
	}
	if *asJSON {
		_, err := p.stdout.Write(b)
		return err
	}
	var st httpapi.Status
	if err := json.Unmarshal(b, &st); err != nil {
		return fmt.Errorf("answer of %s is not that of a holdfast: %w", c.base, err)
	}
	p.printStatus(&st, time.Now())
	return nil
}

func (p *program) printStatus(st *httpapi.Status, now time.Time) {
	state := "ready"
	if !st.Ready {
		state = "NOT READY: " + st.NotReady
	}
	fmt.Fprintf(p.stdout, "gateway %s  %s  up %s  holdfast %s  pid %d\n", st.Gateway, state, time.Duration(st.UptimeS)*time.Second, st.Version, st.PID)
	fmt.Fprintf(p.stdout, "data    %s  %s on disk", st.DataDir, bytesText(st.Store.Bytes))
	if st.Store.FreeBytes > 0 {
		fmt.Fprintf(p.stdout, ", %s free", bytesText(st.Store.FreeBytes))
	}
	fmt.Fprintf(p.stdout, "  epoch %s\n", st.Epoch)
	switch st.Store.Level {
	case "high":
		fmt.Fprintf(p.stdout, "disk    NEARLY FULL since %s: QoS 0 is shed, MQTT 3.1.1 publishers are slowed\n", clockText(st.Store.Since))
	case "full":
		fmt.Fprintf(p.stdout, "disk    FULL since %s: lanes refuse messages or drop the oldest; free space, or holdfast spool purge\n", clockText(st.Store.Since))
	}
	if n := len(st.Store.Damage); n > 0 {
		fmt.Fprintf(p.stdout, "damage  %s of the store set aside at the start, in %s: the disk may be failing\n", count(n, "file"), filepath.Join(st.DataDir, "quarantine"))
	}
	if n := st.Store.LostMessages; n > 0 {
		fmt.Fprintf(p.stdout, "damage  %s that were acknowledged are lost; upstreams are told which\n", count(int(n), "message"))
	}
	if !st.ClockSync {
		since := ""
		if d := st.Clock.Wall.Sub(st.Clock.Since); d >= time.Second {
			since = " for " + d.Truncate(time.Second).String()
		}
		fmt.Fprintf(p.stdout, "clock   NOT SYNCHRONISED%s: receive times may be wrong, and say so until they are put right\n", since)
	}
	if st.Clock.Doubt {
		fmt.Fprintln(p.stdout, "clock   JUMPED ALTHOUGH SYNCHRONISED: not believed for ten minutes")
	}

	fmt.Fprintln(p.stdout)
	rows := [][]string{{"LISTENER", "PROTOCOL", "ADDRESS"}}
	for _, l := range st.Broker.Listeners {
		rows = append(rows, []string{l.Name, l.Protocol, l.Address})
	}
	p.table(rows...)
	fmt.Fprintf(p.stdout, "%s, %s, %s, %s\n", count(st.Broker.Connections, "connection"), count(st.Broker.Sessions, "session"),
		count(st.Broker.Subscriptions, "subscription"), count(st.Broker.Retained, "retained message"))

	d, q := &st.Devices, &st.Commands
	fmt.Fprintf(p.stdout, "devices   %d registered, %d connected, %d disabled\n", d.Registered, d.Connected, d.Disabled)
	fmt.Fprintf(p.stdout, "commands  %d queued, %d sent, %d delivered, %d in progress; since the start %d succeeded, %d ended otherwise, %d refused\n",
		q.Queued, q.Sent, q.Delivered, q.InProgress, q.Succeeded, q.Failed, q.Refused)
	for _, c := range st.Certificates {
		if left := c.NotAfter.Sub(now); left < 0 {
			fmt.Fprintf(p.stdout, "CERTIFICATE OF LISTENER %s ENDED on %s: %s (%s)\n", c.Listener, c.NotAfter.Format(time.DateOnly), c.Subject, c.File)
		} else if left < soon {
			fmt.Fprintf(p.stdout, "certificate of listener %s ends in %s, on %s: %s (%s)\n", c.Listener, shortAge(left), c.NotAfter.Format(time.DateOnly), c.Subject, c.File)
		}
	}

	fmt.Fprintln(p.stdout)
	p.printLanes(st.Lanes, true)

	fmt.Fprintln(p.stdout)
	if len(st.Upstreams) == 0 {
		fmt.Fprintln(p.stdout, "no upstream: messages are kept by the limits of their lanes")
	} else {
		rows = [][]string{{"UPSTREAM", "STATE", "FOR", "IN FLIGHT", "ACKED", "URL", "LAST ERROR"}}
		for _, u := range st.Upstreams {
			rows = append(rows, []string{
				u.Name, u.State, ago(u.Since), fmt.Sprint(u.InFlight), fmt.Sprint(u.AckedMessages), u.URL,
				strings.ReplaceAll(u.LastError, "\n", "; "),
			})
		}
		p.table(rows...)
		for _, u := range st.Upstreams {
			if b := u.Budget; b != nil {
				fmt.Fprintf(p.stdout, "budget of %s: %s\n", u.Name, budgetText(b))
			}
			if u.Connected && u.Commands != nil && !*u.Commands {
				fmt.Fprintf(p.stdout, "COMMANDS DO NOT COME DOWN from %s: %s\n", u.Name, cmp.Or(strings.ReplaceAll(u.CommandsError, "\n", "; "), "not connected yet"))
			}
		}
	}

	fmt.Fprintln(p.stdout)
	p.printAccounts(st.Ledger.Accounts, st.Ledger.Balanced)
}

// budgetText says in a line how a budget stands.
func budgetText(b *bridge.BudgetStatus) string {
	var parts []string
	if b.BytesPerSecond > 0 {
		parts = append(parts, bytesText(uint64(b.BytesPerSecond))+" a second")
	}
	if b.BytesPerDay > 0 {
		parts = append(parts, fmt.Sprintf("%s of %s today", bytesText(b.DayBytes), bytesText(uint64(b.BytesPerDay))))
	}
	until := b.HeldUntil.Local().Format("2006-01-02 15:04 MST")
	switch b.Held {
	case bridge.HeldByDay:
		parts = append(parts, "USED UP: only urgent lanes flow until "+until)
	case bridge.HeldByWindow:
		parts = append(parts, "no window is open: only urgent lanes flow until "+until)
	case "":
		if len(parts) == 0 {
			parts = append(parts, "a window is open")
		}
	}
	return strings.Join(parts, ", ")
}
