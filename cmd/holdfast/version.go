package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker (Makefile): what git says.
var (
	version string
	commit  string
	date    string // of the commit, RFC 3339
)

var versionCommand = command{
	name: "version", args: "[--json]",
	summary: "Tell which version this is",
	run:     printVersion,
}

type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Date    string `json:"date,omitempty"` // of the commit
	Go      string `json:"go"`
	System  string `json:"system"`
}

func thisVersion() versionInfo {
	v := versionInfo{Version: version, Commit: commit, Date: date, Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" && info.Main.Version != "(devel)" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v.Commit = s.Value[:min(12, len(s.Value))]
			}
		}
	}
	if v.Version == "" {
		v.Version = "dev"
	}
	return v
}

func printVersion(_ context.Context, p *program, args []string) error {
	fs := p.flags()
	asJSON := fs.Bool("json", false, "print JSON")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	v := thisVersion()
	if *asJSON {
		return p.printJSON(v)
	}
	from := ""
	if v.Commit != "" {
		from = "commit " + v.Commit
		if v.Date != "" {
			from += " of " + v.Date
		}
		from += ", "
	}
	fmt.Fprintf(p.stdout, "holdfast %s (%s%s, %s)\n", v.Version, from, v.Go, v.System)
	return nil
}
