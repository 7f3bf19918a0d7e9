package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
)

var commandSendCommand = command{
	name: "command send", args: "DEVICE NAME [--payload P | --payload-file FILE] [--wait] [flags]",
	summary: "Send a command to a device, and with --wait see what becomes of it",
	help: `The command is on the gateway's disk when this returns, and goes to the device as soon as it is there. NAME is what
the device is to do: one level of its topic cmd/DEVICE/req/ID/NAME. --payload-file - is stdin.

With --wait every state is told as it comes, and the exit code is 0 only if the device said that it succeeded, or, for
--one-way, acknowledged it. Ctrl-C and --timeout end the waiting, not the command.

The same --id with the same command is the same command: it is not sent a second time.

` + apiHelp,
	words: []string{"device"},
	run:   commandSend,
}

func commandSend(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	submit := submitFlagsIn(fs)
	wait := fs.Bool("wait", false, "follow it to its end")
	timeout := durationFlag(fs, "timeout", 0, "wait `D` at most (none: for ever)")
	asJSON := fs.Bool("json", false, "print JSON; with --wait one event a line")
	words, err := p.parse(fs, args, 2, 2)
	if err != nil {
		return err
	}
	device := words[0]
	if *timeout > 0 && !*wait {
		return usagef("--timeout is for --wait; how long the command itself may wait is --ttl")
	}
	s, err := submit.request(words[1])
	if err != nil {
		return err
	}
	body, err := wire.EncodeSubmit(&s)
	if err != nil {
		return usageError{err.Error()}
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	sent := &sentCommand{program: p, client: c, id: s.ID, device: device, json: *asJSON, body: body, tty: isTerminal(p.stdout)}
	if !*wait {
		cmd, err := sent.submit(ctx)
		if err != nil {
			return err
		}
		if *asJSON {
			return p.printJSON(cmd)
		}
		fmt.Fprintf(p.stdout, "command %s for %s is %s\n", cmd.ID, cmd.Device, cmd.State)
		sent.sayIfOffline(ctx)
		fmt.Fprintf(p.stdout, "see what becomes of it: holdfast command show %s\n", cmd.ID)
		return nil
	}
	return sent.wait(ctx, *timeout)
}

// momentOf reads a time, or a duration from now.
func momentOf(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	if d, err := config.ParseDuration(s); err == nil {
		return now.Add(d), nil
	}
	return time.Time{}, usagef("--not-before %q is neither a time such as 2026-03-01T06:00:00Z nor a duration such as 2h", s)
}

func commandPath(id string) string { return "/api/v1/commands/" + url.PathEscape(id) }

// sentCommand is one command that is sent and, perhaps, followed.
type sentCommand struct {
	*program
	client     *apiClient
	id, device string
	json       bool
	body       []byte

	tty   bool            // a person reads it
	seen  httpapi.Command // the newest that is known of it
	shown bool            // a line of progress stands on the terminal
}

// submitTries is how often a submit is sent whose answer is lost.
const submitTries = 3

// submit hands the command in. An answer that is lost is asked for again: by its id it is the same command.
func (s *sentCommand) submit(ctx context.Context) (cmd httpapi.Command, err error) {
	for try := 1; ; try++ {
		err = s.client.call(ctx, http.MethodPost, devicePath(s.device, "commands"), rawJSON(s.body), &cmd)
		var gone unreachableError
		if err == nil || !errors.As(err, &gone) || try == submitTries || ctx.Err() != nil {
			break
		}
		select {
		case <-time.After(followDelay):
		case <-ctx.Done():
		}
	}
	err = withDevices(err)
	err = hint(err, devices.CodeDisabled, "holdfast device enable %s lets it in again", s.device)
	return cmd, hint(err, devices.CodeConflict, "holdfast command show %s shows the other one", s.id)
}

// rawJSON is sent as it is.
type rawJSON []byte

// MarshalJSON implements json.Marshaler.
func (r rawJSON) MarshalJSON() ([]byte, error) { return r, nil }

// sayIfOffline tells why nothing happens yet. That it cannot be told is no error: the command is on its way.
func (s *sentCommand) sayIfOffline(ctx context.Context) {
	var d devices.Device
	if s.client.call(ctx, http.MethodGet, devicePath(s.device), nil, &d) != nil || d.Presence.Connected || s.json {
		return
	}
	fmt.Fprintf(s.stdout, "device %s is offline (last seen: %s): the command waits until it is back\n", s.device, seen(&d.Presence, time.Now()))
}

var errEnded = errors.New("the command has ended")

// wait submits the command and follows it to its end.
func (s *sentCommand) wait(ctx context.Context, timeout time.Duration) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	outer := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	// The events first: what happens between the two would be missed.
	query := url.Values{"kinds": {httpapi.KindCommand}, "command": {s.id}}
	submitted := false
	streams := 0
	var refusal error // of the submit
	step := func() error {
		if submitted {
			return s.lookAgain(ctx)
		}
		submitted = true
		cmd, err := s.submit(ctx)
		if err != nil {
			refusal = err
			return err
		}
		if !s.json {
			fmt.Fprintf(s.stdout, "command %s for %s\n", cmd.ID, cmd.Device)
		}
		s.told(&cmd, httpapi.Event{Kind: httpapi.KindCommand, At: cmd.Updated, Command: &cmd})
		s.sayIfOffline(ctx)
		if cmd.Ended() {
			return errEnded
		}
		return nil
	}
	// The submit is made from the stream's own goroutine: what comes meanwhile waits in the connection.
	var failed error
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	err := s.client.follow(inner, query,
		func() {
			if streams++; failed == nil {
				if failed = step(); failed != nil {
					cancel()
				}
			}
		},
		func(err error) {
			if failed != nil {
				return
			}
			if !submitted {
				failed = step() // without events then
			} else if failed = s.lookAgain(ctx); failed == nil && streams > 0 {
				s.line("the gateway is out of sight: %v", err)
			}
			if failed != nil {
				cancel()
			}
		},
		func(ev httpapi.Event) error {
			switch {
			case ev.Kind == httpapi.KindReset:
				return s.lookAgain(ctx)
			case ev.Command != nil && ev.Command.ID == s.id:
				s.told(ev.Command, ev)
				if ev.Command.Ended() {
					return errEnded
				}
			}
			return nil
		})
	if failed != nil {
		err = failed
	}
	if err != nil && !errors.Is(err, errEnded) && refusal == nil && ctx.Err() == nil {
		err = s.poll(ctx, step, submitted) // a gateway that does not tell events
	}
	s.endLine()
	switch {
	case errors.Is(err, errEnded):
		return s.end(outer)
	case refusal != nil && ctx.Err() == nil:
		return refusal
	case outer.Err() != nil:
		fmt.Fprintf(s.stderr, "interrupted; the command goes on: holdfast command show %s, or holdfast command cancel %s\n", s.id, s.id)
		return errReported
	case ctx.Err() != nil:
		fmt.Fprintf(s.stderr, "no end within %s; the command goes on: holdfast command show %s, or holdfast command cancel %s\n", config.FormatDuration(timeout), s.id, s.id)
		return errReported
	}
	return err
}

// poll asks now and then.
func (s *sentCommand) poll(ctx context.Context, step func() error, submitted bool) error {
	if !submitted {
		if err := step(); err != nil {
			return err
		}
	}
	for {
		err := s.lookAgain(ctx)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// lookAgain asks how the command is and tells what was missed. A gateway that does not answer is no error: it comes back.
func (s *sentCommand) lookAgain(ctx context.Context) error {
	var cmd httpapi.Command
	err := s.client.call(ctx, http.MethodGet, commandPath(s.id), nil, &cmd)
	var gone unreachableError
	var refusal *apiError
	switch {
	case errors.As(err, &gone) || ctx.Err() != nil, errors.As(err, &refusal) && refusal.status >= 500:
		return nil
	case err != nil:
		return err
	}
	for _, h := range cmd.History {
		step := cmd
		step.State, step.Updated, step.Reason, step.History = h.State, h.At, h.Reason, nil
		if h.State != cmd.State {
			step.Progress, step.Result, step.ResultBase64, step.Late = nil, nil, "", false
		}
		s.told(&step, httpapi.Event{Kind: httpapi.KindCommand, At: h.At, Command: &step})
	}
	s.told(&cmd, httpapi.Event{Kind: httpapi.KindCommand, At: cmd.Updated, Command: &cmd})
	if cmd.Ended() {
		return errEnded
	}
	return nil
}

// told shows what is news.
func (s *sentCommand) told(cmd *httpapi.Command, ev httpapi.Event) {
	old := &s.seen
	step := old.ID == "" || cmd.Updated.After(old.Updated) || cmd.Updated.Equal(old.Updated) && cmd.State != old.State && cmd.State > old.State
	if step && cmd.State == old.State && cmd.Attempts == old.Attempts {
		step = false // the same, told with another time
	}
	progress := cmd.Progress != nil && (step || cmd.State == old.State) && (old.Progress == nil || *cmd.Progress != *old.Progress)
	if !step && !progress {
		return
	}
	s.seen = *cmd
	if s.json {
		_ = s.printJSONLine(ev) // a reader that is gone ends the program by SIGPIPE
		return
	}
	if step {
		s.line("%s", stateLine(cmd))
	}
	if progress {
		s.progressLine(cmd)
	}
}

// stateLine tells one state of a command.
func stateLine(c *httpapi.Command) string {
	text := fmt.Sprintf("%s  %s", c.Updated.Local().Format("15:04:05.000"), c.State)
	if c.Attempts > 1 && c.State == devices.Sent {
		text += fmt.Sprintf(", attempt %d", c.Attempts)
	}
	if c.Late {
		text += ", late"
	}
	if c.Reason != "" {
		text += ": " + shown(c.Reason, 200)
	}
	return text
}

func progressText(p *devices.Progress) string {
	switch {
	case p.Percent < 0:
		return shown(p.Text, 60)
	case p.Text == "":
		return fmt.Sprintf("%d %%", p.Percent)
	}
	return fmt.Sprintf("%d %%, %s", p.Percent, shown(p.Text, 60))
}

func (s *sentCommand) progressLine(c *httpapi.Command) {
	text := "              " + progressText(c.Progress)
	if !s.tty {
		s.line("%s", text)
		return
	}
	fmt.Fprint(s.stdout, "\r\x1b[K"+text) // each over the one before
	s.shown = true
}

func (s *sentCommand) line(format string, args ...any) {
	if s.json {
		return
	}
	s.endLine()
	fmt.Fprintf(s.stdout, format+"\n", args...)
}

func (s *sentCommand) endLine() {
	if s.shown {
		fmt.Fprintln(s.stdout)
		s.shown = false
	}
}

// end tells the outcome; its result is no part of the events.
func (s *sentCommand) end(ctx context.Context) error {
	var cmd httpapi.Command
	if err := s.client.call(ctx, http.MethodGet, commandPath(s.id), nil, &cmd); err != nil {
		cmd = s.seen
		s.line("what the device answered cannot be shown: %v", err)
	}
	if s.json {
		if err := s.printJSONLine(httpapi.Event{Kind: "end", At: cmd.Updated, Command: &cmd}); err != nil {
			return err
		}
	} else {
		s.printResult(&cmd)
	}
	if cmd.State == devices.Succeeded || cmd.State == devices.Delivered && cmd.OneWay {
		return nil
	}
	return errReported
}

func (p *program) printResult(c *httpapi.Command) {
	switch {
	case c.Result != nil && *c.Result != "":
		fmt.Fprintf(p.stdout, "result: %s\n", shown(*c.Result, 64<<10))
	case c.ResultBase64 != "":
		n := base64.StdEncoding.DecodedLen(len(c.ResultBase64))
		fmt.Fprintf(p.stdout, "result: %d bytes that are no text, in base64: %s\n", n-strings.Count(c.ResultBase64, "="), c.ResultBase64)
	}
}

var commandListCommand = command{
	name: "command list", args: "[--device ID] [--state STATES] [--limit N] [--json] " + apiArgs,
	summary: "List commands, the newest first",
	help: `States are QUEUED, SENT, DELIVERED, IN_PROGRESS and the ends SUCCEEDED, FAILED, REJECTED, EXPIRED, TIMED_OUT,
CANCELED, SUPERSEDED, DEAD_LETTERED.

` + apiHelp,
	run: commandList,
}

func commandList(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	device := fs.String("device", "", "those of one `DEVICE`")
	states := fs.String("state", "", "those in one of these `STATES`, separated by commas")
	limit := fs.Int("limit", 100, "`N` at most")
	asJSON := fs.Bool("json", false, "print JSON, one command a line")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	if *limit < 1 {
		return usagef("--limit has to be at least 1")
	}
	q := url.Values{}
	if *device != "" {
		q.Set("device", *device)
	}
	if *states != "" {
		list := strings.Split(strings.ToUpper(*states), ",")
		for i, name := range list {
			list[i] = strings.TrimSpace(name)
			var st devices.State
			if err := st.UnmarshalText([]byte(list[i])); err != nil {
				return usagef("--state: there is no state %q", name)
			}
		}
		q.Set("state", strings.Join(list, ","))
	}
	c, err := api.client()
	if err != nil {
		return err
	}
	rows := [][]string{{"ID", "DEVICE", "NAME", "STATE", "ATTEMPTS", "CHANGED", "REASON"}}
	now := time.Now()
	for n := 0; ; {
		q.Set("limit", strconv.Itoa(min(pageSize, *limit-n)))
		var page httpapi.CommandPage
		if err := c.call(ctx, http.MethodGet, "/api/v1/commands?"+q.Encode(), nil, &page); err != nil {
			return err
		}
		for i := range page.Commands {
			cmd := &page.Commands[i]
			if *asJSON {
				if err := p.printJSONLine(cmd); err != nil {
					return err
				}
				continue
			}
			state := cmd.State.String()
			if cmd.Late {
				state += " late"
			}
			rows = append(rows, []string{
				cmd.ID, cmd.Device, cmd.Name, state, strconv.Itoa(cmd.Attempts), shortAge(now.Sub(cmd.Updated)) + " ago", shown(cmd.Reason, 60),
			})
		}
		if n += len(page.Commands); page.Next == "" || n >= *limit || len(page.Commands) == 0 {
			if !*asJSON && len(rows) > 1 {
				p.table(rows...)
			} else if !*asJSON {
				fmt.Fprintln(p.stdout, "no command")
			}
			if page.Next != "" {
				fmt.Fprintf(p.stderr, "there are more than %d: --limit shows more\n", *limit)
			}
			return nil
		}
		q.Set("before", page.Next)
	}
}

var commandShowCommand = command{
	name: "command show", args: "ID [--json] " + apiArgs,
	summary: "Show a command, what it went through, and its result", words: []string{"command"},
	help: apiHelp, run: commandShow,
}

func commandShow(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	var cmd httpapi.Command
	if err := c.call(ctx, http.MethodGet, commandPath(ids[0]), nil, &cmd); err != nil {
		return withCommands(err)
	}
	if *asJSON {
		return p.printJSON(cmd)
	}
	p.printCommand(&cmd)
	return nil
}

func withCommands(err error) error {
	return hint(err, devices.CodeUnknown, "holdfast command list shows the newest")
}

func (p *program) printCommand(c *httpapi.Command) {
	line := func(key, format string, args ...any) {
		fmt.Fprintf(p.stdout, "%-9s %s\n", key, fmt.Sprintf(format, args...))
	}
	line("command", "%s", c.ID)
	line("device", "%s", c.Device)
	line("name", "%s", c.Name)
	state := c.State.String()
	if c.Late {
		state += ", late"
	}
	if c.Reason != "" {
		state += ": " + shown(c.Reason, 200)
	}
	line("state", "%s", state)
	line("attempts", "%d of %d", c.Attempts, c.MaxAttempts)
	var marks []string
	for _, m := range []struct {
		on   bool
		text string
	}{{c.OneWay, "one-way"}, {c.Urgent, "urgent"}, {c.SupersedeKey != "", "supersedes " + c.SupersedeKey}} {
		if m.on {
			marks = append(marks, m.text)
		}
	}
	if len(marks) > 0 {
		line("is", "%s", strings.Join(marks, ", "))
	}
	if c.Source != "" {
		line("from", "%s", shown(c.Source, 100))
	}
	if !c.NotBefore.IsZero() {
		line("not before", "%s", clockText(c.NotBefore))
	}
	if !c.Ended() && (c.State == devices.Queued || c.State == devices.Sent) {
		line("expires", "%s", clockText(c.Expires))
	}
	switch {
	case c.Payload != nil && *c.Payload != "":
		line("payload", "%s", shown(*c.Payload, 1000))
	case c.PayloadBase64 != "":
		line("payload", "base64 %s", shown(c.PayloadBase64, 1000))
	}
	if c.Progress != nil {
		line("progress", "%s", progressText(c.Progress))
	}
	if len(c.History) > 0 {
		fmt.Fprintln(p.stdout)
		rows := [][]string{{"STATE", "AT", "REASON"}}
		for _, h := range c.History {
			rows = append(rows, []string{h.State.String(), h.At.Local().Format("2006-01-02 15:04:05.000"), shown(h.Reason, 100)})
		}
		p.table(rows...)
	}
	p.printResult(c)
}

var commandCancelCommand = command{
	name: "command cancel", args: "ID [--reason TEXT] [--json] " + apiArgs,
	summary: "Call a command off", words: []string{"command"},
	help: `While it is QUEUED the device never gets it. Later it ends here, but the device may have it and may do it: what it
answers then is kept and marked late.

` + apiHelp,
	run: commandCancel,
}

func commandCancel(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	reason := fs.String("reason", "", "why, `TEXT`")
	asJSON := fs.Bool("json", false, "print JSON")
	c, ids, err := api.asks(p, fs, args, 1, 1)
	if err != nil {
		return err
	}
	var body any
	if *reason != "" {
		body = httpapi.CancelRequest{Reason: *reason}
	}
	var cmd httpapi.Command
	if err := c.call(ctx, http.MethodDelete, commandPath(ids[0]), body, &cmd); err != nil {
		return withCommands(err)
	}
	if *asJSON {
		return p.printJSON(cmd)
	}
	fmt.Fprintf(p.stdout, "command %s is %s\n", cmd.ID, cmd.State)
	if cmd.Attempts > 0 {
		fmt.Fprintf(p.stdout, "it had been sent: the device may do it all the same\n")
	}
	return nil
}

var commandWatchCommand = command{
	name: "command watch", args: "[--device ID] [--command ID] [--json] " + apiArgs,
	summary: "Show what happens to commands, as it happens",
	help: `Until Ctrl-C. A gateway that goes away is waited for; what happened meanwhile is shown if the gateway still has it.

` + apiHelp,
	run: commandWatch,
}

func commandWatch(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	api := apiFlagsIn(fs)
	device := fs.String("device", "", "only commands of this `DEVICE`")
	id := fs.String("command", "", "only this command, `ID`")
	asJSON := fs.Bool("json", false, "print JSON, one event a line")
	c, _, err := api.asks(p, fs, args, 0, 0)
	if err != nil {
		return err
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	q := url.Values{"kinds": {httpapi.KindCommand + "," + httpapi.KindRefusal}}
	if *device != "" {
		q.Set("device", *device)
	}
	if *id != "" {
		q.Set("command", *id)
	}
	streams, away := 0, false
	var first error
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	err = c.follow(inner, q,
		func() {
			streams++
			if away {
				fmt.Fprintln(p.stderr, "the gateway is back")
			}
			away = false
		},
		func(err error) {
			if streams == 0 { // never there: that is not worth waiting for
				first = err
				cancel()
			} else if !away {
				away = true
				fmt.Fprintf(p.stderr, "%v; waiting for it\n", err)
			}
		},
		func(ev httpapi.Event) error {
			if *asJSON {
				return p.printJSONLine(ev)
			}
			if line := watchLine(&ev); line != "" {
				_, err := fmt.Fprintln(p.stdout, line)
				return err
			}
			return nil
		})
	switch {
	case first != nil:
		return first
	case ctx.Err() != nil:
		return nil // as it was asked to
	}
	return err
}

func watchLine(ev *httpapi.Event) string {
	at := ev.At.Local().Format("15:04:05.000")
	switch {
	case ev.Kind == httpapi.KindReset:
		return at + "  some events are missing here"
	case ev.Refusal != nil:
		return fmt.Sprintf("%s  %s  %s  REFUSED %s: %s", at, orDash(ev.Refusal.Device), orDash(ev.Refusal.ID), ev.Refusal.Code, shown(ev.Refusal.Reason, 200))
	case ev.Command == nil:
		return ""
	}
	c := ev.Command
	text := fmt.Sprintf("%s  %s  %s  %s  %s", at, c.Device, c.ID, c.Name, c.State)
	if c.Attempts > 1 && c.State == devices.Sent {
		text += fmt.Sprintf(", attempt %d", c.Attempts)
	}
	if c.Late {
		text += ", late"
	}
	if c.Progress != nil && c.State == devices.InProgress {
		text += " " + progressText(c.Progress)
	}
	if c.Reason != "" {
		text += ": " + shown(c.Reason, 200)
	}
	return text
}

// isTerminal says whether a person reads what is written to w.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && terminal(f)
}
