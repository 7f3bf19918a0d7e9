package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/internal/config"
)

var auditListCommand = command{
	name: "audit list", args: "[--since D] [--who NAME] [--act ACT] [--object O] [--limit N] [--json] " + placeArgs,
	summary: "Show who did what to the gateway, the newest first",
	help: `An act is whatever changes something or hands data out: an operation of the API, a start, a stop, a reload, a restore,
and what commands do in the data directory of a gateway that is not running. WHO is the name of a token, or what else did it.

` + placeHelp,
	run: auditList,
}

func auditList(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	where := placeFlagsIn(fs)
	since := fs.String("since", "", "only what was done since `D`: how long ago, or a time")
	who := fs.String("who", "", "only what `NAME` did")
	act := fs.String("act", "", "only this `ACT`")
	object := fs.String("object", "", "only acts on objects that begin with `O`")
	limit := fs.Int("limit", 50, "at most `N`; 0: all")
	asJSON := fs.Bool("json", false, "print JSON, one record a line")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	at, err := timeBefore("since", *since, time.Now())
	switch {
	case err != nil:
		return err
	case *limit < 0:
		return usagef("--limit cannot be negative")
	}
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	rows := [][]string{{"SEQ", "TIME", "WHO", "FROM", "ACT", "OBJECT", "RESULT", "DETAIL"}}
	n := 0
	show := func(e *audit.Entry) error {
		n++
		if *asJSON {
			return p.printJSONLine(e)
		}
		result := e.Result
		if e.Code != "" {
			result += ": " + e.Code
		}
		detail := e.Detail
		if e.Missed > 0 {
			detail = strings.TrimSpace(fmt.Sprintf("%s (%d acts before it could not be written)", detail, e.Missed))
		}
		rows = append(rows, []string{strconv.FormatUint(e.Seq, 10), clockText(e.At), e.Who, e.From, e.Act, e.Object, result, detail})
		return nil
	}
	f := audit.Filter{Who: *who, Act: *act, Object: *object, Since: at}
	for more := true; more; {
		f.Limit = 1000
		if *limit > 0 {
			f.Limit = min(f.Limit, *limit-n)
		}
		page, err := pl.audit(ctx, f)
		if err != nil {
			return err
		}
		for i := range page.Records {
			if err := show(&page.Records[i]); err != nil {
				return err
			}
		}
		if more = page.Next != "" && (*limit == 0 || n < *limit); more {
			if f.Before, err = strconv.ParseUint(page.Next, 10, 64); err != nil {
				return fmt.Errorf("answer of the gateway: next: %w", err)
			}
		}
	}
	if !*asJSON {
		p.table(rows...)
	}
	return nil
}

// audit gives a page of the audit log.
func (pl *place) audit(ctx context.Context, f audit.Filter) (page httpapi.AuditPage, err error) {
	if !pl.online() {
		records, next, err := audit.List(pl.dir, f)
		page.Records = records
		if next > 0 {
			page.Next = strconv.FormatUint(next, 10)
		}
		return page, err
	}
	q := url.Values{"limit": {strconv.Itoa(f.Limit)}}
	for name, v := range map[string]string{"who": f.Who, "act": f.Act, "object": f.Object} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if !f.Since.IsZero() {
		q.Set("since", f.Since.UTC().Format(time.RFC3339))
	}
	if f.Before > 0 {
		q.Set("before", strconv.FormatUint(f.Before, 10))
	}
	err = pl.client.call(ctx, http.MethodGet, "/api/v1/audit?"+q.Encode(), nil, &page)
	return page, err
}

var auditVerifyCommand = command{
	name: "audit verify", args: "[--noted SEQ:HASH]... [--json] " + placeArgs,
	summary: "Tell whether the audit log is as it was written",
	help: `Every record holds the hash of the one before it: one that was changed, removed or swapped is found and named. That the
end is missing shows by what the gateway knows of it, if it runs or, stopped, in its store. Against somebody who may
write everything on the machine only a note elsewhere helps: keep what this prints as "last record", and give it later with
--noted.

Run it on the gateway's machine, as a user who may read its data directory. Exit code 1 if something is wrong.

` + placeHelp,
	run: auditVerify,
}

func auditVerify(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	where := placeFlagsIn(fs)
	noted := headsFlag(fs, "noted", "a record that was noted before, `SEQ:HASH`")
	asJSON := fs.Bool("json", false, "print JSON")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	known := *noted
	dir := pl.dir
	if pl.online() {
		if dir == "" {
			dir = pl.status.DataDir
		}
		page, err := pl.audit(ctx, audit.Filter{Limit: 1}) // before the files are read: it has to be in them
		if err != nil {
			return err
		}
		known = append(known, page.Head)
	} else {
		head, err := gateway.AuditHead(dir, logger(p.stderr, config.Log{Level: "error", Format: "text"}))
		switch {
		case err == nil:
			known = append(known, head)
		case errors.As(err, new(*gateway.InUseError)):
			fmt.Fprintln(p.stderr, "the gateway runs: leave --data-dir out to have the end of the log held against what it knows, too")
		default:
			fmt.Fprintf(p.stderr, "whether the end is missing is not known: %v\n", err)
		}
	}
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("data directory of the gateway: %w: run this on its machine, or name the directory with --data-dir", err)
	}
	r, err := audit.Verify(dir, known...)
	if err != nil {
		return err
	}
	if *asJSON {
		if err := p.printJSON(r); err != nil {
			return err
		}
	} else {
		for _, problem := range r.Problems {
			fmt.Fprintln(p.stdout, problem)
		}
		if r.Torn && !pl.online() {
			fmt.Fprintln(p.stdout, "the last line has no end: a crash leaves that, and the next start removes it and notes it")
		}
		fmt.Fprintf(p.stdout, "%s in %s, %s\n", count(r.Records, "record"), count(len(r.Files), "file"), count(len(r.Problems), "problem"))
		if r.Head.Seq > 0 {
			fmt.Fprintf(p.stdout, "last record: %s\n", r.Head)
		}
	}
	if len(r.Problems) > 0 {
		return errReported
	}
	return nil
}

// headsFlag declares a flag for records of an audit log; it may be given more than once.
func headsFlag(fs *flag.FlagSet, name, usage string) *[]audit.Head {
	var heads []audit.Head
	fs.Func(name, usage, func(s string) error {
		h, err := audit.ParseHead(s)
		heads = append(heads, h)
		return err
	})
	return &heads
}
