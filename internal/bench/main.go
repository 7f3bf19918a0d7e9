// Command bench measures what docs/benchmarks.md claims, each figure beside what it is compared with, in rounds that take
// turns so that a slow minute of the machine hits both. `make bench` runs it; it prints Markdown.
//
// The gateway and everything it is compared with run as processes of their own; the load comes from this one.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }

// config of a run.
type config struct {
	bin      string        // the gateway
	self     string        // this program, for the baselines
	dir      string        // temporary data
	seconds  time.Duration // of one round
	rounds   int
	backlog  int           // messages of the drain
	spoolGB  float64       // spooled for the start
	idle     int           // idle connections
	devices  int           // that come back at once
	commands int           // submitted over the upstream topic
	registry int           // devices registered
	link     time.Duration // on the slow link
	against  string        // another build; "": none
	log      io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(args) > 0 && args[0] == "serve" {
		return exit(stderr, serveBaseline(ctx, args[1:], stderr))
	}
	if len(args) > 0 && args[0] == "fill" {
		return exit(stderr, fillSpool(ctx, args[1:], stderr))
	}
	if len(args) > 0 && args[0] == "link" {
		return exit(stderr, nearEnd(ctx, args[1:], stdout, stderr))
	}
	if len(args) > 0 && args[0] == "sink" {
		return exit(stderr, serveSink(ctx, args[1:], stderr))
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	c := config{log: stderr}
	flags.StringVar(&c.bin, "bin", envOr("HOLDFAST_BIN", "bin/holdfast"), "the gateway's binary")
	flags.StringVar(&c.against, "against", os.Getenv("BENCH_AGAINST"), "another build of the gateway to compare with (figure 15)")
	flags.DurationVar(&c.seconds, "time", 2*time.Second, "length of one round")
	flags.IntVar(&c.rounds, "rounds", 3, "rounds of each figure")
	flags.IntVar(&c.backlog, "backlog", 1_000_000, "messages to drain")
	flags.IntVar(&c.idle, "idle", 5000, "idle connections")
	flags.IntVar(&c.devices, "devices", 10_000, "devices that come back at once")
	flags.IntVar(&c.commands, "commands", 100_000, "commands submitted over the upstream topic")
	flags.DurationVar(&c.link, "link", 30*time.Second, "time on the slow link")
	flags.IntVar(&c.registry, "registry", 100_000, "devices registered")
	flags.Float64Var(&c.spoolGB, "spool-gb", envFloat("BENCH_SPOOL_GB", 10), "gigabytes spooled before the start is timed")
	only := flags.String("only", "", "figures to measure, by number, comma-separated (default: all)")
	write := flags.String("write", "", "also write the results into this file, from its line \"## Results\" on")
	smoke := flags.Bool("smoke", false, "one short round of everything: shows that it works, measures nothing")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if *write != "" && *only != "" {
		fmt.Fprintln(stderr, "bench: -write replaces the results of all figures: leave -only out, or copy what it prints")
		return 2
	}
	if *smoke {
		c.seconds, c.rounds, c.backlog, c.idle, c.spoolGB = 500*time.Millisecond, 1, 20_000, 200, 0.05
		c.devices, c.commands, c.registry, c.link = 200, 2000, 1000, 5*time.Second
	}
	var err error
	if c.self, err = os.Executable(); err != nil {
		return exit(stderr, err)
	}
	if c.dir, err = os.MkdirTemp("", "holdfast-bench-"); err != nil {
		return exit(stderr, err)
	}
	defer os.RemoveAll(c.dir)
	// The load generator shares the cores with what it measures: keep its collector out of the way.
	debug.SetGCPercent(400)

	var results bytes.Buffer
	out := io.MultiWriter(stdout, &results)
	header(ctx, out, c, args)
	failed := 0
	for _, f := range figures {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), fmt.Sprint(f.number)) {
			continue
		}
		if ctx.Err() != nil {
			break
		}
		begin := time.Now()
		fmt.Fprintf(stderr, "figure %d: %s\n", f.number, f.title)
		s := section{title: fmt.Sprintf("%d. %s", f.number, f.title)}
		if err := f.measure(ctx, c, &s); err != nil {
			fmt.Fprintf(stderr, "figure %d: %v\n", f.number, err)
			s.notes = append(s.notes, "Not measured to the end: "+err.Error())
			failed++
		}
		s.write(out)
		fmt.Fprintf(stderr, "figure %d took %v\n", f.number, time.Since(begin).Round(time.Second))
	}
	if *write != "" {
		if err := writeResults(*write, results.String()); err != nil {
			return exit(stderr, err)
		}
	}
	if failed > 0 {
		return 1
	}
	return 0
}

// writeResults replaces everything in a file after its line "## Results".
func writeResults(file, results string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	const mark = "\n## Results\n"
	head, _, ok := strings.Cut(string(old), mark)
	if !ok {
		return fmt.Errorf("%s has no line \"## Results\" to write below", file)
	}
	return os.WriteFile(file, []byte(head+mark+"\n"+results), 0o644)
}

// figure is one of the figures to reach.
type figure struct {
	number  int
	title   string
	measure func(ctx context.Context, c config, s *section) error
}

func exit(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	return 0
}

func header(ctx context.Context, w io.Writer, c config, args []string) {
	version := "unknown"
	if out, err := exec.CommandContext(ctx, c.bin, "version").Output(); err == nil {
		version = strings.TrimSpace(strings.SplitN(string(out), "\n", 2)[0])
	}
	fmt.Fprintf(w, "Measured %s with `make bench", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	if len(args) > 0 {
		fmt.Fprintf(w, " BENCH_ARGS=%q", strings.Join(args, " "))
	}
	fmt.Fprintf(w, "`: %s, %s, %s/%s, %d cores shared by the load, what is measured and what it is compared with.\n",
		version, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	fmt.Fprintf(w, "%d rounds of %v each, taking turns; ratios are the median of the ratios of each round.\n", c.rounds, c.seconds)
}

func envOr(name, other string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return other
}

func envFloat(name string, other float64) float64 {
	var v float64
	if _, err := fmt.Sscan(os.Getenv(name), &v); err != nil {
		return other
	}
	return v
}
