package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
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

var configDiffCommand = command{
	name: "config diff", args: "[FILE] [--json] " + apiArgs, words: []string{"file"},
	summary: "Show what a reload would change in the gateway that runs",
	help: `FILE is held against what the gateway works with now; without FILE its own file, as it is now. Nothing is changed. What
would be taken at once is told apart from what has to wait for a restart.

A file that is wrong is told as by holdfast config check, with exit code 2; so is one that this gateway could not take. The files
that FILE names are looked at by the reload. SIGHUP (systemctl reload holdfast) and POST /api/v1/reload do it.

` + apiHelp,
	run: configDiff,
}

func configDiff(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, files, err := api.asks(p, fs, args, 0, 1)
	if err != nil {
		return err
	}
	var r httpapi.Reload
	if len(files) == 0 {
		err = c.call(ctx, http.MethodGet, "/api/v1/config/diff", nil, &r)
	} else {
		var body httpapi.ConfigFile
		if body, err = configFile(files[0]); err == nil {
			err = c.call(ctx, http.MethodPost, "/api/v1/config/diff", body, &r)
		}
	}
	var refused *apiError
	switch {
	case errors.As(err, &refused) && refused.code == "config_wrong":
		fmt.Fprintln(p.stderr, strings.TrimPrefix(refused.message, httpapi.ErrConfig.Error()+": "))
		return errWrongConfig
	case err != nil:
		return err
	case *asJSON:
		return p.printJSON(r)
	}
	for _, w := range r.Warnings {
		fmt.Fprintln(p.stderr, w)
	}
	show := func(title string, changes []httpapi.ConfigChange) {
		if len(changes) == 0 {
			return
		}
		fmt.Fprintln(p.stdout, title)
		for _, d := range changes {
			fmt.Fprintf(p.stdout, "  %s\n", d.Key)
			if d.From != "" {
				fmt.Fprintf(p.stdout, "    - %s\n", d.From)
			}
			if d.To != "" {
				fmt.Fprintf(p.stdout, "    + %s\n", d.To)
			}
		}
	}
	show("a reload takes:", r.Changed)
	show("has to wait for a restart:", r.Restart)
	if len(r.Changed)+len(r.Restart) == 0 {
		fmt.Fprintln(p.stdout, "nothing is different")
	}
	return nil
}

// configFile reads a file for the gateway to look at.
func configFile(name string) (httpapi.ConfigFile, error) {
	path, err := filepath.Abs(name)
	if err != nil {
		return httpapi.ConfigFile{}, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return httpapi.ConfigFile{}, usageError{err.Error()}
	}
	return httpapi.ConfigFile{Name: path, Text: string(text)}, nil
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
