package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"holdfast/gateway/httpapi"
)

var statusCommand = command{
	name: "status", args: "[--config FILE | --address HOST:PORT] [--json]",
	summary: "Show on one screen what a running gateway is doing",
	help: `It asks the gateway on this machine over HTTP: at --address, or at http.address of --config, or
at 127.0.0.1:8080. The ledger says where every accepted message is: delivered, expired (too old),
evicted (no space), parked (the upstream refused it for good) or still pending.`,
	run: showStatus,
}

func showStatus(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	file := fs.String("config", "", "configuration `FILE` of the gateway")
	address := fs.String("address", "", "`HOST:PORT` of its HTTP API")
	asJSON := fs.Bool("json", false, "print what GET /api/v1/status answers")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	switch {
	case *address != "" && *file != "":
		return usagef("--config and --address exclude each other")
	case *address == "":
		cfg, _, err := load(*file)
		if err != nil {
			return err
		}
		if cfg.HTTP.Address == "" {
			return fmt.Errorf("%s has no http.address: there is nobody to ask", *file)
		}
		*address = cfg.HTTP.Address
	}
	b, err := fetchStatus(ctx, *address)
	if err != nil {
		return err
	}
	if *asJSON {
		_, err := p.stdout.Write(b)
		return err
	}
	var st httpapi.Status
	if err := json.Unmarshal(b, &st); err != nil {
		return fmt.Errorf("answer of %s is not that of a holdfast: %w", *address, err)
	}
	p.printStatus(&st)
	return nil
}

func fetchStatus(ctx context.Context, address string) ([]byte, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, usagef("--address %q is not HOST:PORT", address)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // it listens everywhere, here too
	}
	address = net.JoinHostPort(host, port)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/api/v1/status", nil)
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no gateway answers at %s: start one with holdfast run, or say where it is with --address or --config", address)
	case err != nil:
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	if resp.StatusCode != http.StatusOK {
		var e httpapi.Error
		if json.Unmarshal(b, &e) == nil && e.Error.Message != "" {
			return nil, fmt.Errorf("%s answers: %s", address, e.Error.Message)
		}
		return nil, fmt.Errorf("%s answers %s: is that a holdfast?", address, resp.Status)
	}
	return b, nil
}

func (p *program) printStatus(st *httpapi.Status) {
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
	if !st.ClockSync {
		fmt.Fprintln(p.stdout, "clock   NOT SYNCHRONISED: receive times may be wrong, and messages say so")
	}

	fmt.Fprintln(p.stdout)
	rows := [][]string{{"LISTENER", "PROTOCOL", "ADDRESS"}}
	for _, l := range st.Broker.Listeners {
		rows = append(rows, []string{l.Name, l.Protocol, l.Address})
	}
	p.table(rows...)
	fmt.Fprintf(p.stdout, "%s, %s, %s, %s\n", count(st.Broker.Connections, "connection"), count(st.Broker.Sessions, "session"),
		count(st.Broker.Subscriptions, "subscription"), count(st.Broker.Retained, "retained message"))

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
	}

	fmt.Fprintln(p.stdout)
	p.printAccounts(st.Ledger.Accounts, st.Ledger.Balanced)
}
