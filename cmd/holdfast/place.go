package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"time"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/internal/config"
	"holdfast/spool"
)

const (
	placeArgs = "[--config FILE | --address HOST:PORT | --data-dir DIR] [--token-file FILE]"
	placeHelp = `A gateway that runs is asked over HTTP: at --address, or at http.address of --config, or at 127.0.0.1:8080; the token is
read from --token-file, or the environment's HOLDFAST_TOKEN, or DATA_DIR/admin.token. If nobody answers there, or with
--data-dir, the work is done in the data directory of the gateway, which then must not be running.`
)

// placeFlags are the flags of commands that work on a spool whether its gateway runs or not.
type placeFlags struct {
	api *apiFlags
	dir string
}

func placeFlagsIn(fs *flag.FlagSet) *placeFlags {
	f := &placeFlags{api: apiFlagsIn(fs)}
	fs.StringVar(&f.dir, "data-dir", "", "data `DIR`ectory of a gateway that is not running")
	return f
}

// place is a gateway that runs, or the data directory of one that does not.
type place struct {
	client *apiClient     // nil: it does not run
	status httpapi.Status // if it runs
	dir    string         // if it does not
	id     string         // of the gateway, by its configuration
	asked  string         // where nobody answered, before dir was looked at; "": nowhere
}

// find finds out which it is.
func (f *placeFlags) find(ctx context.Context) (*place, error) {
	if f.dir != "" {
		if *f.api != (apiFlags{}) {
			return nil, usagef("--data-dir excludes --config, --address and --token-file")
		}
		cfg, err := config.Default()
		if err != nil {
			return nil, err
		}
		return &place{dir: f.dir, id: cfg.Gateway.ID}, nil
	}
	pl := &place{}
	if f.api.address == "" {
		cfg, _, err := load(f.api.config)
		if err != nil {
			return nil, err
		}
		pl.dir, pl.id = cfg.Gateway.DataDir, cfg.Gateway.ID
		if cfg.HTTP.Address == "" {
			return pl, nil
		}
		pl.asked = cfg.HTTP.Address
	}
	c, err := f.api.client()
	if err != nil {
		return nil, err
	}
	var gone unreachableError
	err = c.call(ctx, http.MethodGet, "/api/v1/status", nil, &pl.status)
	switch {
	case err == nil:
		pl.client = c
		return pl, nil
	case pl.dir != "" && errors.As(err, &gone) && gone.nobody:
		return pl, nil
	default:
		return nil, err
	}
}

// online says whether it is a gateway that runs.
func (pl *place) online() bool { return pl.client != nil }

// explain says more of a data directory that cannot be had.
func (pl *place) explain(err error) error {
	var inUse *gateway.InUseError
	switch {
	case errors.As(err, &inUse) && pl.asked != "":
		return fmt.Errorf("%s is in use by process %d, but nobody answers at %s: say where its API is with --config or --address", pl.dir, inUse.PID, pl.asked)
	case errors.As(err, &inUse):
		return fmt.Errorf("%s is in use by process %d: leave --data-dir out to ask that gateway, or stop it first", pl.dir, inUse.PID)
	case err != nil && pl.asked != "":
		return fmt.Errorf("nobody answers at %s, and %w", pl.asked, err)
	}
	return err
}

// spool opens the spool in the data directory.
func (pl *place) spool(p *program) (*spool.Spool, func() error, error) {
	sp, closeAll, err := gateway.OpenSpool(pl.dir, logger(p.stderr, config.Log{Level: "warn", Format: "text"}))
	return sp, closeAll, pl.explain(err)
}

// spoolToChange opens it for a command that changes what is in it.
func (pl *place) spoolToChange(p *program) (*spool.Spool, func() error, error) {
	sp, closeAll, err := gateway.OpenSpoolToChange(pl.dir, pl.id, logger(p.stderr, config.Log{Level: "warn", Format: "text"}))
	return sp, closeAll, pl.explain(err)
}

// note has an act on the data directory, which the command has open, in its audit log.
func (pl *place) note(act, object, detail string) error {
	l, err := audit.Open(pl.dir, audit.Options{})
	if err != nil {
		return fmt.Errorf("it was done, but is not in the audit log: %w", err)
	}
	_, err = l.Append(audit.Entry{Who: gateway.CommandLine(), Act: act, Object: object, Result: audit.Done, Detail: detail})
	if err = errors.Join(err, l.Close()); err != nil {
		return fmt.Errorf("it was done, but is not in the audit log: %w", err)
	}
	return nil
}

// sizeFlag declares a flag that is written as sizes are in the configuration: 64KiB, 32MiB.
func sizeFlag(fs *flag.FlagSet, name string, def int64, usage string) *int64 {
	v := sizeValue(def)
	fs.Var(&v, name, usage)
	return (*int64)(&v)
}

type sizeValue int64

// String is for flag: the default, as it is shown.
func (v *sizeValue) String() string {
	if v == nil || *v == 0 {
		return ""
	}
	return config.FormatSize(int64(*v))
}

// Set is for flag.
func (v *sizeValue) Set(s string) error {
	n, err := config.ParseSize(s)
	if err == nil {
		*v = sizeValue(n)
	}
	return err
}

// timeBefore reads a moment in the past: a time, or how long ago.
func timeBefore(flagName, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if d, err := config.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	return time.Time{}, usagef("--%s %q is neither a time such as 2026-03-01T06:00:00Z nor how long ago, such as 2h or 7d", flagName, s)
}
