package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"holdfast/gateway/httpapi"
)

var tokenAddCommand = command{
	name: "token add", args: "NAME --role viewer|operator|admin [--lifetime D] [--json] " + apiArgs,
	summary: "Let somebody use the HTTP API, and make the token for it",
	help: `A viewer looks. An operator also sends and cancels commands, and enables and disables devices. An admin does
everything. NAME says whose token it is: it stands in the log beside what is done with it.

` + apiHelp,
	run: tokenAdd,
}

func tokenAdd(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	var role httpapi.Role
	fs.Func("role", "what the bearer may do, `viewer|operator|admin`", func(s string) error { return role.UnmarshalText([]byte(s)) })
	lifetime := durationFlag(fs, "lifetime", 0, "it expires after `D` (none: never)")
	asJSON := fs.Bool("json", false, "print JSON")
	names, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	if role == 0 {
		return usagef("--role is missing: viewer, operator or admin")
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	body := httpapi.NewToken{Name: names[0], Role: role}
	if *lifetime > 0 {
		body.Lifetime = lifetime.String()
	}
	var made httpapi.TokenMade
	if err := c.call(ctx, http.MethodPost, "/api/v1/tokens", body, &made); err != nil {
		return err
	}
	if *asJSON {
		return p.printJSON(made)
	}
	fmt.Fprintf(p.stdout, "token %s is valid, role %s, expires %s\n\n%s\n\n", made.Token.Name, made.Token.Role, expiryText(made.Token.Expires), made.Secret)
	fmt.Fprintf(p.stdout, "It is shown this once. Keep it in a file (chmod 600) for --token-file, or in %s; programs send it as\n  Authorization: Bearer TOKEN\n", tokenVariable)
	return nil
}

func expiryText(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return clockText(t)
}

var tokenListCommand = command{
	name: "token list", args: "[--json] " + apiArgs,
	summary: "List who may use the HTTP API",
	help:    apiHelp, run: tokenList,
}

func tokenList(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON, one token a line")
	c, _, err := api.asks(p, fs, args, 0, 0)
	if err != nil {
		return err
	}
	var l httpapi.TokenList
	if err := c.call(ctx, http.MethodGet, "/api/v1/tokens", nil, &l); err != nil {
		return err
	}
	rows := [][]string{{"NAME", "ROLE", "MADE", "EXPIRES"}}
	for _, t := range l.Tokens {
		if *asJSON {
			if err := p.printJSONLine(t); err != nil {
				return err
			}
			continue
		}
		rows = append(rows, []string{t.Name, t.Role.String(), clockText(t.Created), expiryText(t.Expires)})
	}
	if !*asJSON {
		p.table(rows...)
	}
	return nil
}

var tokenRemoveCommand = command{
	name: "token remove", args: "NAME [--json] " + apiArgs, words: []string{"token"},
	summary: "Revoke a token of the HTTP API, at once",
	help:    apiHelp, run: tokenRemove,
}

func tokenRemove(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, names, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	if err := c.call(ctx, http.MethodDelete, "/api/v1/tokens/"+url.PathEscape(names[0]), nil, nil); err != nil {
		return hint(err, "unknown_token", "holdfast token list shows them all")
	}
	if *asJSON {
		return p.printJSON(map[string]string{"removed": names[0]})
	}
	fmt.Fprintf(p.stdout, "token %s is worth nothing any more\n", names[0])
	return nil
}
