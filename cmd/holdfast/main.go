// Command holdfast is the gateway and everything that an operator does with it. It parses, calls and
// prints; what it does is in the packages.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"holdfast/internal/config"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2 // wrong usage or configuration: trying again changes nothing
)

// command is one thing that the program does.
type command struct {
	name    string // one word or two: "run", "config check"
	args    string // as the usage line shows them
	summary string // one line, without a full stop
	help    string // what else is to know; flags are listed by themselves
	// words says what each argument is, for completion: device, command, token, lane, role, file, dir, shell, or words to
	// choose from, separated by "|".
	words []string
	// run declares its flags in a set, has args parsed by it (see parse), and does it. Nothing happens before parse.
	run func(ctx context.Context, p *program, args []string) error
}

// commands are listed in this order.
func commands() []command {
	return []command{
		runCommand,
		demoCommand,
		verifyCommand,
		configCheckCommand,
		configDiffCommand,
		configPrintCommand,
		statusCommand,
		topCommand,
		healthCommand,
		deviceAddCommand,
		deviceListCommand,
		deviceShowCommand,
		deviceEnableCommand,
		deviceDisableCommand,
		deviceRemoveCommand,
		deviceRotateCommand,
		deviceImportCommand,
		commandSendCommand,
		commandListCommand,
		commandShowCommand,
		commandCancelCommand,
		commandWatchCommand,
		tokenAddCommand,
		tokenListCommand,
		tokenRemoveCommand,
		certInitCommand,
		certDeviceCommand,
		certRotateCommand,
		certRevokeCommand,
		certListCommand,
		cloudTailCommand,
		cloudSendCommand,
		auditListCommand,
		auditVerifyCommand,
		backupCommand,
		spoolStatCommand,
		spoolPeekCommand,
		spoolVerifyCommand,
		spoolExportCommand,
		spoolParkedCommand,
		spoolReplayCommand,
		spoolPurgeCommand,
		completionCommand,
		versionCommand,
	}
}

// program is what a command runs in.
type program struct {
	cmd    command
	stdout io.Writer // data
	stderr io.Writer // everything else

	// declared is where parse leaves the flags of a command whose flags are all that is asked for, see flagsOf; else nil.
	declared *declaration
}

type declaration struct {
	fs          *flag.FlagSet
	least, most int // arguments
}

// flagsOf gives the flags that a command takes, without running it.
func flagsOf(c command) *flag.FlagSet { return declarationOf(c).fs }

func declarationOf(c command) declaration {
	p := &program{cmd: c, stdout: io.Discard, stderr: io.Discard, declared: &declaration{}}
	_ = c.run(context.Background(), p, nil) // parse ends it
	if p.declared.fs == nil {
		panic("holdfast " + c.name + " does something before it parses its flags")
	}
	return *p.declared
}

// Errors that say how to exit.
var (
	errReported = errors.New("reported already") // exit 1, nothing more to say
	errHelped   = errors.New("help was asked for")
	// errWrongConfig: exit 2, nothing more to say.
	errWrongConfig = errors.New("configuration is wrong")
)

// usageError is a call that cannot be meant; its text names what is wrong.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	p := &program{stdout: stdout, stderr: stderr}
	var rest []string
	switch {
	case len(args) == 0:
		printOverview(stderr)
		return exitUsage
	case slices.Contains([]string{"help", "--help", "-help", "-h"}, args[0]):
		return p.help(args[1:])
	case args[0] == completeWord: // of the scripts of holdfast completion, and of no use to anybody else
		for _, c := range complete(ctx, args[1:]) {
			fmt.Fprintln(stdout, c)
		}
		return exitDone
	case args[0] == "--version" || args[0] == "-version":
		args = []string{"version"}
	}
	var ok bool
	if p.cmd, rest, ok = find(args); !ok {
		fmt.Fprintf(stderr, "holdfast: %s\n", unknown(args))
		return exitUsage
	}
	return p.exit(p.cmd.run(ctx, p, rest))
}

// exit reports how a command ended.
func (p *program) exit(err error) int {
	var usage usageError
	var problems config.Problems
	switch {
	case err == nil || errors.Is(err, errHelped):
		return exitDone
	case errors.Is(err, errReported):
		return exitFailed
	case errors.Is(err, errWrongConfig):
		return exitUsage
	case errors.As(err, &usage):
		fmt.Fprintf(p.stderr, "holdfast %s: %s\nusage: holdfast %s\nmore:  holdfast help %s\n", p.cmd.name, usage.text, usageLine(p.cmd), p.cmd.name)
		return exitUsage
	case errors.As(err, &problems):
		fmt.Fprintln(p.stderr, problems.Error())
		return exitUsage
	default:
		fmt.Fprintf(p.stderr, "holdfast %s: %v\n", p.cmd.name, err)
		return exitFailed
	}
}

// find gives the command that args begin with, and what follows its name.
func find(args []string) (command, []string, bool) {
	for n := min(2, len(args)); n > 0; n-- {
		name := strings.Join(args[:n], " ")
		for _, c := range commands() {
			if c.name == name {
				return c, args[n:], true
			}
		}
	}
	return command{}, nil, false
}

// under lists the commands that begin with a word.
func under(word string) []command {
	var cs []command
	for _, c := range commands() {
		if first, _, _ := strings.Cut(c.name, " "); first == word {
			cs = append(cs, c)
		}
	}
	return cs
}

func unknown(args []string) string {
	var b strings.Builder
	if group := under(args[0]); len(group) > 0 {
		if len(args) > 1 {
			fmt.Fprintf(&b, "there is no command %q", args[0]+" "+args[1])
			var words []string
			for _, c := range group {
				_, second, _ := strings.Cut(c.name, " ")
				words = append(words, second)
			}
			if near := config.Nearest(args[1], words); near != "" {
				fmt.Fprintf(&b, "; did you mean %q?", near)
			}
		} else {
			fmt.Fprintf(&b, "%q needs one more word", args[0])
		}
		b.WriteString("\nthere are:\n")
		list(&b, group)
		return strings.TrimRight(b.String(), "\n")
	}
	fmt.Fprintf(&b, "there is no command %q", args[0])
	var words []string
	for _, c := range commands() {
		first, _, _ := strings.Cut(c.name, " ")
		words = append(words, first)
	}
	if near := config.Nearest(args[0], append(words, "help")); near != "" {
		fmt.Fprintf(&b, "; did you mean %q?", near)
	}
	b.WriteString("\nall commands: holdfast help")
	return b.String()
}

func usageLine(c command) string { return strings.TrimSpace(c.name + " " + c.args) }

func list(w io.Writer, cs []command) {
	width := 0
	for _, c := range cs {
		width = max(width, len(c.name))
	}
	group := ""
	for i, c := range cs {
		first, _, _ := strings.Cut(c.name, " ")
		if i > 0 && first != group && len(under(first))+len(under(group)) > 2 {
			fmt.Fprintln(w)
		}
		group = first
		fmt.Fprintf(w, "  holdfast %-*s  %s\n", width, c.name, c.summary)
	}
}

func printOverview(w io.Writer) {
	fmt.Fprintf(w, "%s\n\n", overview)
	list(w, commands())
	fmt.Fprintln(w, "\nFirst steps:")
	for _, e := range firstSteps {
		fmt.Fprintf(w, "  %-33s %s\n", e.line, e.does)
	}
	for _, part := range []struct {
		title string
		facts []fact
	}{{"Environment", environment}, {"Files", files}} {
		fmt.Fprintf(w, "\n%s:\n", part.title)
		for _, f := range part.facts {
			fmt.Fprintf(w, "  %-33s %s\n", f.name, f.text)
		}
	}
	codes := make([]string, len(exitCodes))
	for i, c := range exitCodes {
		codes[i] = c.name + " " + c.text
	}
	fmt.Fprintf(w, "\nholdfast help COMMAND tells more. Exit codes: %s.\n", strings.Join(codes, ", "))
}

// help prints to stdout what was asked for.
func (p *program) help(args []string) int {
	if len(args) == 0 {
		printOverview(p.stdout)
		return exitDone
	}
	if c, _, ok := find(args); ok {
		p.cmd = c
		return p.exit(c.run(context.Background(), p, []string{"--help"}))
	}
	if group := under(args[0]); len(group) > 0 && len(args) == 1 {
		fmt.Fprintf(p.stdout, "%s.\n\n", groups[args[0]])
		list(p.stdout, group)
		return exitDone
	}
	fmt.Fprintf(p.stderr, "holdfast: %s\n", unknown(args))
	return exitUsage
}

// flags begins a command's flag set.
func (p *program) flags() *flag.FlagSet {
	fs := flag.NewFlagSet(p.cmd.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// parse reads flags and arguments, in any order, and wants between least and most arguments.
func (p *program) parse(fs *flag.FlagSet, args []string, least, most int) ([]string, error) {
	if p.declared != nil {
		*p.declared = declaration{fs, least, most}
		return nil, errHelped
	}
	var positional []string
	for {
		switch err := fs.Parse(args); {
		case errors.Is(err, flag.ErrHelp):
			p.printHelp(fs)
			return nil, errHelped
		case err != nil:
			return nil, usagef("%s", strings.NewReplacer("flag provided but not defined: -", "there is no flag --",
				"flag needs an argument: -", "a value is missing after --", `" for flag -`, `" for --`, `" for -`, `" for --`).Replace(err.Error()))
		}
		left := fs.Args()
		// What follows "--" is no flag, whatever it looks like.
		if at := len(args) - len(left); len(left) == 0 || at > 0 && args[at-1] == "--" {
			positional = append(positional, left...)
			break
		}
		positional, args = append(positional, left[0]), left[1:]
	}
	switch {
	case len(positional) < least:
		return nil, usagef("something is missing")
	case len(positional) > most:
		return nil, usagef("%q is too much", positional[most])
	}
	return positional, nil
}

func (p *program) printHelp(fs *flag.FlagSet) {
	fmt.Fprintf(p.stdout, "usage: holdfast %s\n\n%s.\n", usageLine(p.cmd), p.cmd.summary)
	if help := strings.TrimSpace(p.cmd.help); help != "" {
		fmt.Fprintf(p.stdout, "\n%s\n", help)
	}
	any := false
	fs.VisitAll(func(f *flag.Flag) {
		if !any {
			fmt.Fprintln(p.stdout, "\nFlags:")
			any = true
		}
		name, value, text := flagText(f)
		fmt.Fprintf(p.stdout, "  %-20s %s\n", strings.TrimSpace(name+" "+value), text)
	})
	for i, e := range examples[p.cmd.name] {
		if i == 0 {
			fmt.Fprintln(p.stdout, "\nExamples:")
		}
		fmt.Fprintf(p.stdout, "  %s\n      %s\n", e.line, e.does)
	}
}

// flagText gives what there is to say of a flag: --limit, N, at most N messages (default 20).
func flagText(f *flag.Flag) (name, value, text string) {
	value, text = flag.UnquoteUsage(f)
	if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
		text += fmt.Sprintf(" (default %s)", f.DefValue)
	}
	return "--" + f.Name, value, text
}
