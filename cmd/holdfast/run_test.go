package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/config"
)

type fakeReloader struct {
	got   *config.Config
	later []string
	err   error
}

func (f *fakeReloader) Reload(c *config.Config) ([]string, error) {
	f.got = c
	return f.later, f.err
}

func TestTheConfigurationIsReadAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "g.yaml")
	for name, tc := range map[string]struct {
		text  string
		err   error
		taken bool
		want  []string
	}{
		"right": {"gateway: { id: other }\n", nil, true, []string{
			"level=INFO msg=\"configuration read again\"", "level=WARN msg=\"configuration has changes that need a restart\" keys=\"[spool http]\"",
		}},
		"warned of": {
			"gateway: { id: other }\nspool: { durability: interval }\n", nil, true,
			[]string{"level=WARN msg=configuration key=spool.durability", "read again"},
		},
		"wrong": {
			"gateway: { id: other }\nlog: { levle: x }\nhttp: 1\n", nil, false,
			[]string{"level=ERROR msg=\"configuration is wrong, the old one stays\"", "key=log.levle line=2", "key=http line=3"},
		},
		"not taken": {"gateway: { id: other }\n", errors.New("gateway.id cannot change"), true, []string{"level=ERROR msg=\"configuration not taken, the old one stays\" err=\"gateway.id cannot change\""}},
		"gone":      {"", nil, false, []string{"level=ERROR msg=\"configuration cannot be read, the old one stays\""}},
	} {
		t.Run(name, func(t *testing.T) {
			err := os.Remove(file)
			if tc.text != "" {
				err = os.WriteFile(file, []byte(tc.text), 0o600)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			var out syncBuffer
			g := &fakeReloader{err: tc.err, later: []string{"spool", "http"}}
			reload(slog.New(slog.NewTextHandler(&out, nil)), file, g)
			if (g.got != nil) != tc.taken || tc.taken && g.got.Gateway.ID != "other" {
				t.Errorf("taken: %+v", g.got)
			}
			for _, want := range tc.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("no %s in\n%s", want, out.String())
				}
			}
			if strings.Contains(out.String(), "read again") != (tc.taken && tc.err == nil) {
				t.Errorf("told as done:\n%s", out.String())
			}
		})
	}
}

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
