package main

import (
	"context"
	"fmt"

	"holdfast/gateway"
	"holdfast/internal/config"
)

var configCheckCommand = command{
	name: "config check", args: "FILE",
	summary: "Tell everything that is wrong with a configuration",
	help: `Every problem is told at once, as FILE:LINE:COLUMN: KEY: what is wrong and what is allowed.
The certificates, keys and password files that it names are looked at as well.
What starts with "warning:" works, but should be known. Exit code 2 if there is an error.

configs/gateway.yaml in the sources has every key with its default.`,
	run: configCheck,
}

func configCheck(_ context.Context, p *program, args []string) error {
	files, err := p.parse(p.flags(), args, 1, 1)
	if err != nil {
		return err
	}
	c, warnings, err := config.Load(files[0])
	if err != nil {
		return unreadable(err)
	}
	if warnings = append(warnings, gateway.DiskWarnings(c)...); len(warnings) > 0 {
		fmt.Fprintln(p.stderr, warnings.Error())
	}
	fmt.Fprintf(p.stdout, "%s: ok: gateway %s, %s, %s\n", files[0], c.Gateway.ID,
		count(len(c.Listeners), "listener"), count(len(c.Upstreams), "upstream"))
	return nil
}

var configPrintCommand = command{
	name: "config print", args: "[FILE]",
	summary: "Show the configuration in effect, defaults included",
	help: `What is printed is a configuration itself. Without FILE it is the one of a gateway that is
run without a file: a good start for one of your own.`,
	run: configPrint,
}

func configPrint(_ context.Context, p *program, args []string) error {
	files, err := p.parse(p.flags(), args, 0, 1)
	if err != nil {
		return err
	}
	c, warnings, err := load(files...)
	if err != nil {
		return err
	}
	if len(warnings) > 0 {
		fmt.Fprintln(p.stderr, warnings.Error())
	}
	return config.Print(p.stdout, c)
}

// load reads a configuration file, or gives the default without one.
func load(file ...string) (*config.Config, config.Problems, error) {
	if len(file) == 0 || file[0] == "" {
		c, err := config.Default()
		return c, nil, err
	}
	c, warnings, err := config.Load(file[0])
	return c, warnings, unreadable(err)
}

// unreadable makes a file that is not there what it is: wrong usage.
func unreadable(err error) error {
	if problems, ok := err.(config.Problems); ok || err == nil { //nolint:errorlint // Load wraps none
		if ok {
			return problems
		}
		return nil
	}
	return usageError{err.Error()}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
