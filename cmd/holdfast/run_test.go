package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

// Without a place to tell it to, SIGHUP is what it is everywhere: the terminal is gone.
func TestHangUpEndsWhatHasNoConfiguration(t *testing.T) {
	if signal.Ignored(syscall.SIGHUP) {
		t.Skip("whoever started this wants it to outlive the terminal, as nohup does")
	}
	log := slog.New(slog.DiscardHandler)
	ctx, stop := onSignals(t.Context(), log)
	defer stop()
	hangUp(t)
	<-ctx.Done()

	hangups := make(chan struct{}, 1)
	ctx2, stop2 := onSignalsAnd(context.WithoutCancel(t.Context()), log, hangups)
	defer stop2()
	hangUp(t)
	<-hangups
	if ctx2.Err() != nil {
		t.Error("SIGHUP stops a gateway")
	}
}

func hangUp(t *testing.T) {
	t.Helper()
	p, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = p.Signal(syscall.SIGHUP)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// chatty prints a stack trace with %+v, as the store's errors do.
type chatty struct{}

func (chatty) Error() string { return "no room" }

func (chatty) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "no room\nstack trace:\n  main.go:1")
}

func TestErrorsInLogsAreOneLine(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		slog.New(handler(&out, format)).With("first", chatty{}).Warn("w", "err", chatty{})
		if got := out.String(); strings.Count(got, "no room") != 2 || strings.Contains(got, "stack") {
			t.Errorf("%s: %s", format, got)
		}
		var none *os.PathError
		slog.New(handler(&out, format)).Warn("w", "err", none) // a mistake, but no reason to end
	}
}
