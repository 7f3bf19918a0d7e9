package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"golang.org/x/term"

	"holdfast/gateway/httpapi"
	"holdfast/internal/top"
)

var topCommand = command{
	name: "top", args: "[--interval TIME] " + apiArgs,
	summary: "Watch a running gateway in the terminal: lanes, upstreams, rates, alarms",
	help: `Keys: q (or Esc, Ctrl-C) quits, p pauses. It fits any window; what does not fit is left out, the least important first. If the
gateway goes away it says so, keeps the last figures, and asks again. NO_COLOR in the environment is heeded.

` + apiHelp,
	run: showTop,
}

func showTop(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	every := fs.Duration("interval", time.Second, "`TIME` from one look to the next")
	c, _, err := api.asks(p, fs, args, 0, 0)
	if err != nil {
		return err
	}
	out, ok := p.stdout.(*os.File)
	if !ok || !term.IsTerminal(int(out.Fd())) || !term.IsTerminal(int(os.Stdin.Fd())) || os.Getenv("TERM") == "dumb" {
		return usagef("this is no terminal that can be drawn on: holdfast status shows the same once, and with --json for programs")
	}
	if *every < 100*time.Millisecond {
		return usagef("--interval has to be 100ms or more")
	}
	ctx, stop := onSignals(ctx, slog.New(slog.DiscardHandler))
	defer stop()
	return top.Run(ctx, top.Options{Every: *every, In: os.Stdin, Out: out, Look: func(ctx context.Context) (*httpapi.Status, error) {
		b, err := c.raw(ctx, http.MethodGet, "/api/v1/status", nil)
		if err != nil {
			return nil, err
		}
		var st httpapi.Status
		if err := json.Unmarshal(b, &st); err != nil {
			return nil, fmt.Errorf("answer of %s is not that of a holdfast: %w", c.base, err)
		}
		return &st, nil
	}})
}
