package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"golang.org/x/term"

	"holdfast/gateway"
	"holdfast/internal/config"
	"holdfast/internal/logs"
)

var runCommand = command{
	name: "run", args: "[--config FILE]",
	summary: "Run the gateway",
	help: `Without a file the gateway works for this machine only: MQTT on 127.0.0.1:1883, any client id is
a device, everything is kept in ./holdfast-data. holdfast config print shows that configuration.

It logs one line for each part and then "ready". SIGTERM or SIGINT (Ctrl-C) stop it in order
within 10 s, a second one at once: that is no harm, every start is a recovery. SIGHUP reads the
configuration and the files that it names again; if something is wrong with them, the old ones stay.
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
	level, _ := logs.ParseLevel(cfg.Log.Level)
	levels := logs.New(level)
	log := slog.New(levels.Handler(handler(p.stderr, cfg.Log.Format)))
	for _, w := range warnings {
		log.Warn("configuration", "key", w.Key, "line", w.Line, "warning", w.Text)
	}
	// A panic, and the SIGABRT of a watchdog, would end in exit code 2, which says that the configuration is wrong and keeps supervisors
	// from another start. This way both end in a signal, and show every goroutine.
	debug.SetTraceback("crash")
	memory := tuneMemory(log)
	hangups := make(chan struct{}, 1)
	ctx, stop := onSignalsAnd(ctx, log, hangups)
	defer stop()
	go trimMemory(ctx)

	g, err := gateway.New(ctx, gateway.Options{
		Config: cfg, Version: thisVersion().Version, Log: log, Memory: memory,
		Logs: levels, File: *file, Load: func() (*config.Config, config.Problems, error) { return load(*file) },
	})
	if err != nil {
		log.Error("gateway cannot start", "err", err)
		return errReported
	}
	if *file == "" {
		sayHow(log, g)
	}
	var reloads sync.WaitGroup
	ended := make(chan struct{})
	reloads.Go(func() {
		for {
			select {
			case <-ended:
				return
			case <-hangups:
				g.Hangup("signal hangup")
			}
		}
	})
	err = g.Run(ctx)
	close(ended)
	reloads.Wait()
	if err != nil {
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
			"look", "holdfast status", "command", "holdfast command send my-device hello --wait")
	}
}

// logger makes a logger of a command.
func logger(w io.Writer, c config.Log) *slog.Logger {
	level, _ := logs.ParseLevel(c.Level)
	return slog.New(logs.New(level).Handler(handler(w, c.Format)))
}

// handler writes log lines of every level.
func handler(w io.Writer, format string) slog.Handler {
	opts := &slog.HandlerOptions{Level: slog.LevelDebug}
	text := format == "text"
	if f, ok := w.(*os.File); ok && format == "auto" {
		text = term.IsTerminal(int(f.Fd()))
	}
	if text {
		opts.ReplaceAttr = plainErrors
		return slog.NewTextHandler(w, opts)
	}
	return slog.NewJSONHandler(w, opts)
}

// plainErrors has errors written by their text alone: with %+v, which the text handler takes, those of the store print stack traces.
func plainErrors(_ []string, a slog.Attr) slog.Attr {
	if err, ok := a.Value.Any().(error); ok {
		a.Value = slog.AnyValue(plainError{err}) // not its text: calling Error on a nil pointer is left to fmt, which survives it
	}
	return a
}

// plainError hides that an error can format itself.
type plainError struct{ error }

// onSignals gives a context that ends with the first SIGTERM or SIGINT, or when the terminal is closed (SIGHUP); the second
// has its usual effect. A log that nobody reads any more (SIGPIPE) is no reason to stop.
func onSignals(parent context.Context, log *slog.Logger) (context.Context, func()) {
	return onSignalsAnd(parent, log, nil)
}

// onSignalsAnd is onSignals, but SIGHUP is told to hangups, which holds one of them. nil: it ends the context.
func onSignalsAnd(parent context.Context, log *slog.Logger, hangups chan<- struct{}) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	got := make(chan os.Signal, 4)
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(got, syscall.SIGTERM, syscall.SIGINT)
	if hangups != nil || !signal.Ignored(syscall.SIGHUP) { // nohup means it
		signal.Notify(got, syscall.SIGHUP)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-got:
				if s == syscall.SIGHUP && hangups != nil {
					select {
					case hangups <- struct{}{}:
					default: // one waits already: it will read what is there then
					}
					continue
				}
				log.Info("asked to stop", "signal", s.String())
				signal.Reset(syscall.SIGTERM, syscall.SIGINT)
				cancel(errors.New("signal " + s.String())) // who stopped it, for the audit log
			}
		}
	}()
	return ctx, func() {
		signal.Stop(got)
		cancel(nil)
		<-done
	}
}
