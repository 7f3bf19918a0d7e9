package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"holdfast/gateway"
	"holdfast/internal/config"
)

var runCommand = command{
	name: "run", args: "[--config FILE]",
	summary: "Run the gateway",
	help: `Without a file the gateway works for this machine only: MQTT on 127.0.0.1:1883, any client id is
a device, everything is kept in ./holdfast-data. holdfast config print shows that configuration.

It logs one line for each part and then "ready". SIGTERM or SIGINT (Ctrl-C) stop it in order
within 10 s, a second one at once: that is no harm, every start is a recovery.
Log lines go to stderr: text on a terminal, JSON otherwise, unless the configuration says.

GOGC and GOMEMLIMIT in the environment are heeded; without them Holdfast keeps itself small.`,
	run: runGateway,
}

func runGateway(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	file := fs.String("config", "", "configuration `FILE`")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	cfg, warnings, err := load(*file)
	if err != nil {
		return err
	}
	log := logger(p.stderr, cfg.Log)
	for _, w := range warnings {
		log.Warn("configuration", "key", w.Key, "line", w.Line, "warning", w.Text)
	}
	tuneMemory(log)
	ctx, stop := onSignals(ctx, log)
	defer stop()
	go trimMemory(ctx)

	g, err := gateway.New(ctx, gateway.Options{Config: cfg, Version: thisVersion().Version, Log: log})
	if err != nil {
		log.Error("gateway cannot start", "err", err)
		return errReported
	}
	if *file == "" {
		sayHow(log, g)
	}
	if err := g.Run(ctx); err != nil {
		log.Error("gateway failed", "err", err)
		return errReported
	}
	log.Info("gateway stopped")
	return nil
}

// sayHow tells a newcomer what to do next.
func sayHow(log *slog.Logger, g *gateway.Gateway) {
	for _, a := range g.Addrs() {
		host, port, err := net.SplitHostPort(a.String())
		if err != nil {
			continue
		}
		log.Info("no configuration file: this machine only, any client id is a device",
			"publish", fmt.Sprintf("mosquitto_pub -h %s -p %s -q 1 -i my-device -t dt/demo/my-device/temp -m 21.5", host, port),
			"look", "holdfast status")
	}
}

// logger makes the program's logger.
func logger(w io.Writer, c config.Log) *slog.Logger {
	opts := &slog.HandlerOptions{Level: map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}[c.Level]}
	text := c.Format == "text"
	if f, ok := w.(*os.File); ok && c.Format == "auto" {
		text = term.IsTerminal(int(f.Fd()))
	}
	if text {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// onSignals gives a context that ends with the first SIGTERM or SIGINT; the second has its usual
// effect. A log that nobody reads any more (SIGPIPE) is no reason to stop.
func onSignals(parent context.Context, log *slog.Logger) (context.Context, func()) {
	ctx, cancel := context.WithCancel(parent)
	got := make(chan os.Signal, 4)
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(got, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-got:
				if s == syscall.SIGHUP {
					log.Warn("SIGHUP: this version does not read its configuration again; restart it, no message is lost by that")
					continue
				}
				log.Info("asked to stop", "signal", s.String())
				signal.Reset(syscall.SIGTERM, syscall.SIGINT)
				cancel()
			}
		}
	}()
	return ctx, func() {
		signal.Stop(got)
		cancel()
		<-done
	}
}
