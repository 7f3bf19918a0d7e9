package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
)

var cloudSendCommand = command{
	name: "cloud send", args: "--url URL --gateway ID DEVICE NAME [--payload P|--payload-file F] [--wait] [--json]",
	summary: "Send a command to a device, as a program in the cloud does",
	help: `It publishes the command at the upstream broker. A gateway that is offline gets it when it is back, a device that is
offline when it is back: the command waits at the broker, then at the gateway, for its time to live.

Without --wait it ends when the gateway has stored the command, which is then QUEUED. With --wait it shows each state with the
gateway's time and ends with the command: exit code 0 if it SUCCEEDED (--one-way: was DELIVERED), 1 for every other end and for a
refusal.

Sent again with the same --id it is the same command, so a repeat does no harm.

  holdfast cloud send --url URL --gateway ID DEVICE --cancel COMMAND-ID

calls a command off.`,
	run: cloudSend,
}

// brokerFlags declares how to reach an upstream broker.
func brokerFlags(fs *flag.FlagSet, o *mqttup.Options) {
	fs.StringVar(&o.URL, "url", "", "the broker, `URL` mqtt://host[:1883] or mqtts://host[:8883]")
	fs.StringVar(&o.Username, "username", "", "user `NAME` at the broker")
	fs.StringVar(&o.PasswordFile, "password-file", "", "`FILE` with the password")
	fs.StringVar(&o.TLS.CA, "ca", "", "who signed the broker's certificate, `FILE` (none: the system's authorities)")
	fs.StringVar(&o.TLS.Cert, "cert", "", "client certificate, `FILE`")
	fs.StringVar(&o.TLS.Key, "key", "", "its key, `FILE`")
}

// checkBroker says what is wrong with brokerFlags.
func checkBroker(o mqttup.Options) error {
	o.ClientID = "holdfast" // a command that runs knows a better one
	if o.URL == "" {
		return usagef("--url is missing: which broker? For example mqtts://broker.example.com:8883")
	}
	if _, err := mqttup.New(o); err != nil {
		return usageError{err.Error()}
	}
	return nil
}

// cloudSending is one run of holdfast cloud send.
type cloudSending struct {
	options         mqttup.Options
	gateway, device string
	submit          wire.Submit
	cancel, reason  string
	wait            bool
	timeout         time.Duration

	print  func(wire.CommandEvent) error
	stderr io.Writer

	published atomic.Bool // the broker has the request
}

// readCloudSend reads flags and arguments.
func readCloudSend(p *program, args []string) (*cloudSending, error) {
	fs := p.flags()
	s := &cloudSending{stderr: &lockedWriter{w: p.stderr}}
	brokerFlags(fs, &s.options)
	fs.StringVar(&s.gateway, "gateway", "", "the gateway's `ID`")
	submit := submitFlagsIn(fs)
	fs.StringVar(&s.cancel, "cancel", "", "call off the command `ID`")
	fs.StringVar(&s.reason, "reason", "", "why, `TEXT`; with --cancel")
	fs.BoolVar(&s.wait, "wait", false, "follow it to its end")
	noWait := fs.Bool("no-wait", false, "end when the gateway has stored it; so it is without --wait")
	timeout := durationFlag(fs, "timeout", 0, "stop waiting after `D` (none: never)")
	asJSON := fs.Bool("json", false, "print JSON, one object a line, as cloud tail --json does")
	names, err := p.parse(fs, args, 1, 2)
	if err != nil {
		return nil, err
	}
	s.device, s.timeout = names[0], *timeout
	if err := checkBroker(s.options); err != nil {
		return nil, err
	}
	switch {
	case s.gateway == "":
		return nil, usagef("--gateway is missing: which gateway is the device at?")
	case s.cancel != "" && len(names) == 2:
		return nil, usagef("%q is too much: --cancel says which command", names[1])
	case s.cancel == "" && len(names) == 1:
		return nil, usagef("something is missing: what is the device to do?")
	case s.wait && *noWait:
		return nil, usagef("--wait and --no-wait exclude each other")
	}
	if s.cancel == "" {
		if s.submit, err = submit.request(names[1]); err != nil {
			return nil, err
		}
		if f := s.submit.Feedback; s.wait && f != "" && f != "full" {
			return nil, usagef("--wait needs --feedback full: the gateway would not tell every end")
		}
	}
	if *asJSON {
		lines := jsonLines(p.stdout)
		s.print = func(e wire.CommandEvent) error {
			return lines(line{Delivery: cloud.Delivery{Kind: cloud.CommandEvent, Gateway: e.Gateway, Command: &e}})
		}
	} else {
		s.print = eventLines(p.stdout)
	}
	return s, nil
}

func cloudSend(ctx context.Context, p *program, args []string) error {
	s, err := readCloudSend(p, args)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(s.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ctx, stop := onSignals(ctx, log)
	defer stop()
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("not waited longer than %v", s.timeout))
		defer cancel()
	}
	return s.run(ctx, log)
}

func (s *cloudSending) run(ctx context.Context, log *slog.Logger) error {
	id := s.cancel
	if id == "" {
		id = s.submit.ID
	}
	var nonce [6]byte
	_, _ = rand.Read(nonce[:]) // never fails
	s.options.ClientID, s.options.Log = "holdfast-send-"+hex.EncodeToString(nonce[:]), log

	var conn *mqttup.Client
	client := cloud.NewClient(cloud.ClientConfig{Publisher: cloud.PublishFunc(func(ctx context.Context, topic string, payload []byte) error {
		err := conn.Publish(ctx, topic, payload)
		s.published.Store(s.published.Load() || err == nil)
		return err
	})})
	offline := sync.OnceFunc(func() {
		fmt.Fprintf(s.stderr, "gateway %s is offline: the command waits at the broker until it is back\n", s.gateway)
	})
	// The connection outlives ctx: what ends is the waiting.
	connCtx, disconnect := context.WithCancel(context.WithoutCancel(ctx))
	defer disconnect()
	defer context.AfterFunc(ctx, func() {
		if !s.published.Load() {
			disconnect() // also ends an attempt to connect
		}
	})()
	var err error
	conn, err = mqttup.Connect(connCtx, s.options, []string{wire.CommandEventFilter(s.gateway, s.device, id), wire.StateTopic(s.gateway)},
		func(topic string, payload []byte) {
			if topic == wire.StateTopic(s.gateway) {
				if state, err := wire.DecodeState(payload); err == nil && state.State == wire.StateOffline {
					offline()
				}
				return
			}
			if _, err := client.Handle(topic, payload); err != nil {
				log.Warn("event cannot be read", "topic", topic, "err", err)
			}
		})
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("nothing was sent: %w", context.Cause(ctx))
		}
		return err
	}
	defer func() {
		disconnect()
		_ = conn.Wait()
	}()
	slow := time.AfterFunc(3*time.Second, func() {
		if s.published.Load() {
			fmt.Fprintf(s.stderr, "gateway %s has not answered yet: the command waits at the broker\n", s.gateway)
		}
	})
	defer slow.Stop()
	if s.cancel != "" {
		return s.sendCancel(ctx, client)
	}
	return s.sendSubmit(ctx, client, slow)
}

func (s *cloudSending) sendCancel(ctx context.Context, client *cloud.Client) error {
	e, err := client.Cancel(ctx, s.gateway, s.device, s.cancel, s.reason)
	if err != nil {
		return s.explain(err, s.cancel)
	}
	if err := s.print(e); err != nil {
		return err
	}
	if e.State != "CANCELED" {
		return fmt.Errorf("command %s had already ended: %s", s.cancel, e.State)
	}
	return nil
}

func (s *cloudSending) sendSubmit(ctx context.Context, client *cloud.Client, slow *time.Timer) error {
	c, err := client.Submit(ctx, s.gateway, s.device, s.submit)
	if c != nil {
		defer c.Close()
	}
	if err != nil {
		return s.explain(err, s.submit.ID)
	}
	slow.Stop()
	last := c.Last()
	if last.State == "" { // there is none to tell
		fmt.Fprintf(s.stderr, "command %s is at the broker\n", s.submit.ID)
		return nil
	}
	if !s.wait {
		if err := s.print(last); err != nil {
			return err
		}
		if cloud.Ended(&last, s.submit.OneWay) && !s.succeeded(last) {
			return errReported
		}
		return nil
	}
	for e, err := range c.Events(ctx) {
		if err != nil {
			return s.explain(err, c.ID)
		}
		if err := s.print(e); err != nil {
			return err
		}
	}
	if !s.succeeded(c.Last()) {
		return errReported // its reason has been shown
	}
	return nil
}

func (s *cloudSending) succeeded(e wire.CommandEvent) bool {
	return e.State == "SUCCEEDED" || s.submit.OneWay && e.State == "DELIVERED"
}

// explain adds what became of the command if it is not followed to its end.
func (s *cloudSending) explain(err error, id string) error {
	var refused *cloud.RefusedError
	if errors.As(err, &refused) {
		if err := s.print(refused.Event); err != nil {
			return err
		}
		return err
	}
	if !s.published.Load() {
		return err
	}
	if s.cancel != "" {
		return fmt.Errorf("%w\nthe request to cancel it goes on without being watched", err)
	}
	return fmt.Errorf("%w\nthe command goes on without being watched; call it off with: holdfast cloud send … %s --cancel %s", err, s.device, id)
}

// eventLines prints events of one command for people.
func eventLines(w io.Writer) func(wire.CommandEvent) error {
	first := true
	return func(e wire.CommandEvent) error {
		details := eventDetails(&e)
		if first {
			details = strings.TrimSpace("command " + shown(e.ID, 80) + "  " + details)
			first = false
		}
		_, err := fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%s  %-13s  %s", e.At.Local().Format("2006-01-02 15:04:05.000"), shown(e.State, 20), details), " "))
		return err
	}
}

// eventDetails is what an event says besides its state.
func eventDetails(e *wire.CommandEvent) string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	if e.Attempts > 1 {
		add("attempt %d", e.Attempts)
	}
	if p := e.Progress; p != nil && e.State == "IN_PROGRESS" {
		if p.Percent != nil {
			add("%d %%", *p.Percent)
		}
		if p.Text != "" {
			add("%s", shown(p.Text, 80))
		}
	}
	if e.Code != "" {
		add("%s", shown(e.Code, 40))
	}
	if e.Reason != "" {
		add("%s", shown(e.Reason, 200))
	}
	if result, err := e.ResultPayload(); err == nil && len(result) > 0 {
		add("result %s", shortPayload(result))
	}
	if e.Late {
		add("(late)")
	}
	if e.Repeat {
		add("(already known)")
	}
	return strings.Join(parts, "  ")
}

// lockedWriter may be written to by many goroutines.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}
