package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/spool"
)

var spoolParkedCommand = command{
	name: "spool parked", args: "[--lane LANE] [--upstream NAME] [--limit N] [--json] " + placeArgs,
	summary: "Show the messages that an upstream refused for good",
	help: `With the reason and the sequence, which holdfast spool replay takes. Whole payloads: holdfast spool export --parked.

` + placeHelp,
	run: spoolParked,
}

// parkedRow is a parked message as it is listed, here and by GET /parked.
type parkedRow struct {
	Lane     string    `json:"lane"`
	Upstream string    `json:"upstream"`
	ParkedAt time.Time `json:"parked_at"`
	Reason   string    `json:"reason"`
	Seq      uint64    `json:"seq"`
	Device   string    `json:"device"`
	Topic    string    `json:"topic"`
	Size     int       `json:"size"`
	// Unreadable: nothing but size is known of the message itself, and it cannot be replayed.
	Unreadable bool `json:"unreadable,omitempty"`
}

// parkedGroup is what an upstream has parked in a lane.
type parkedGroup struct{ lane, upstream string }

func spoolParked(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	where := placeFlagsIn(fs)
	lane := fs.String("lane", "", "only those of this `LANE`")
	upstream := fs.String("upstream", "", "only those that the upstream `NAME` refused")
	limit := fs.Int("limit", 100, "at most `N` messages")
	asJSON := fs.Bool("json", false, "print JSON, one message a line")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	if *limit < 1 {
		return usagef("--limit has to be at least 1")
	}
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	rows := [][]string{{"LANE", "SEQ", "UPSTREAM", "PARKED", "DEVICE", "TOPIC", "SIZE", "REASON"}}
	n := 0
	err = pl.parked(ctx, p, *lane, *upstream, func(m *parkedRow) error {
		if n++; n > *limit {
			return errEnough
		}
		if *asJSON {
			return p.printJSONLine(m)
		}
		rows = append(rows, []string{
			m.Lane, fmt.Sprint(m.Seq), m.Upstream, m.ParkedAt.UTC().Format("2006-01-02T15:04:05Z"), shown(m.Device, 32), shown(m.Topic, 48),
			bytesText(int64(m.Size)), shown(m.Reason, 80),
		})
		return nil
	})
	more := errors.Is(err, errEnough)
	if err != nil && !more {
		return err
	}
	switch {
	case *asJSON:
	case n == 0:
		fmt.Fprintln(p.stdout, "nothing is parked")
	default:
		p.table(rows...)
	}
	if more {
		fmt.Fprintf(p.stderr, "there are more: --limit shows %d\n", *limit)
	}
	return nil
}

var errEnough = errors.New("enough")

// parked calls fn for each parked message of a lane and an upstream ("": of all).
func (pl *place) parked(ctx context.Context, p *program, lane, upstream string, fn func(*parkedRow) error) (err error) {
	if !pl.online() {
		sp, closeAll, err := pl.spool(p)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, closeAll()) }()
		return parkedIn(sp, lane, upstream, fn)
	}
	for after := ""; ; {
		q := url.Values{"limit": {"1000"}}
		for name, v := range map[string]string{"lane": lane, "upstream": upstream, "after": after} {
			if v != "" {
				q.Set(name, v)
			}
		}
		var page struct {
			Messages []parkedRow `json:"messages"`
			Next     string      `json:"next"`
		}
		if err := pl.client.call(ctx, http.MethodGet, "/api/v1/parked?"+q.Encode(), nil, &page); err != nil {
			return err
		}
		for i := range page.Messages {
			if err := fn(&page.Messages[i]); err != nil {
				return err
			}
		}
		if after = page.Next; after == "" {
			return nil
		}
	}
}

func parkedIn(sp *spool.Spool, lane, upstream string, fn func(*parkedRow) error) error {
	if lane != "" && !slices.ContainsFunc(sp.Lanes(), func(l spool.LaneStat) bool { return l.Name == lane }) {
		return noLane(lane, sp.Lanes())
	}
	return sp.Parked(func(m spool.ParkedMessage) error {
		if lane != "" && m.Lane != lane || upstream != "" && m.Upstream != upstream {
			return nil
		}
		row := parkedRow{Lane: m.Lane, Upstream: m.Upstream, ParkedAt: time.UnixMilli(m.AtMS).UTC(), Reason: m.Reason, Seq: m.Seq, Size: len(m.Record)}
		var r spool.Record
		if _, err := spool.ParseRecord(m.Record, &r); err != nil {
			row.Unreadable = true
		} else {
			row.Device, row.Topic, row.Size = string(r.Device), string(r.Topic), len(r.Payload)
		}
		return fn(&row)
	})
}

var spoolReplayCommand = command{
	name: "spool replay", args: "(--all | --seq SEQ[,SEQ...]) [--lane LANE] [--upstream NAME] [--json] " + placeArgs,
	summary: "Send messages again that an upstream refused for good",
	help: `When what was wrong is mended: holdfast spool parked says what there is and why. Each goes back into its lane as a new message at
its end, for the upstream that refused it alone, and leaves the list; if it is refused again it is parked again. --all takes all that
are parked, of --lane and --upstream if they are given. With --seq the lane has to be said, and the upstream if more than one has refused.

` + placeHelp,
	run: spoolReplay,
}

// replaying is what is asked of POST /parked/replay.
type replaying struct {
	Lane     string   `json:"lane"`
	Upstream string   `json:"upstream"`
	Seqs     []uint64 `json:"seqs,omitempty"` // none: all
}

// replayed is what came of it.
type replayed struct {
	Lane     string `json:"lane"`
	Upstream string `json:"upstream"`
	Replayed int    `json:"replayed"`
	Problem  string `json:"problem,omitempty"` // why some stay parked
}

func spoolReplay(ctx context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	where := placeFlagsIn(fs)
	lane := fs.String("lane", "", "those of this `LANE`")
	upstream := fs.String("upstream", "", "those that the upstream `NAME` refused")
	all := fs.Bool("all", false, "all that are parked")
	seqs := seqFlag(fs, "seq", "those with these sequences, `SEQ` or SEQ,SEQ; may be said again")
	asJSON := fs.Bool("json", false, "print what was replayed as JSON")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	switch {
	case *all == (len(*seqs) > 0):
		return usagef("say which: --seq, or --all")
	case len(*seqs) > 0 && *lane == "":
		return usagef("--seq counts in one lane: name it with --lane")
	}
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	replay := func(r replaying) (done replayed, err error) {
		done = replayed{Lane: r.Lane, Upstream: r.Upstream}
		err = pl.client.call(ctx, http.MethodPost, "/api/v1/parked/replay", r, &done)
		return done, err
	}
	list := func(fn func(*parkedRow) error) error { return pl.parked(ctx, p, *lane, *upstream, fn) }
	if !pl.online() {
		sp, closeAll, openErr := pl.spoolToChange(p)
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, closeAll()) }()
		list = func(fn func(*parkedRow) error) error { return parkedIn(sp, *lane, *upstream, fn) }
		replay = func(r replaying) (replayed, error) { return replayIn(sp, r) }
	}
	groups := map[parkedGroup]int{}
	err = list(func(m *parkedRow) error {
		if len(*seqs) == 0 || slices.Contains(*seqs, m.Seq) {
			groups[parkedGroup{m.Lane, m.Upstream}]++
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case len(groups) == 0 && len(*seqs) > 0:
		return errors.New("no message with such a sequence is parked there: holdfast spool parked lists them")
	case len(groups) > 1 && len(*seqs) > 0:
		return usagef("more than one upstream has refused them: choose with --upstream")
	}
	results, failed := []replayed{}, false
	for _, g := range sortedGroups(groups) {
		done, err := replay(replaying{Lane: g.lane, Upstream: g.upstream, Seqs: *seqs})
		if err != nil {
			return fmt.Errorf("replay to %s in lane %s: %w", g.upstream, g.lane, err)
		}
		if !pl.online() {
			if err := pl.note("replay_parked", g.upstream+"/"+g.lane, fmt.Sprintf("%d messages", done.Replayed)); err != nil {
				return err
			}
		}
		results = append(results, done)
		failed = failed || done.Problem != ""
		if !*asJSON {
			fmt.Fprintf(p.stdout, "%s of lane %s on their way to %s again\n", count(done.Replayed, "message"), g.lane, g.upstream)
		}
		if done.Problem != "" {
			fmt.Fprintf(p.stderr, "some stay parked: %s\n", done.Problem)
		}
	}
	switch {
	case *asJSON:
		err = p.printJSON(results)
	case len(results) == 0:
		fmt.Fprintln(p.stdout, "nothing is parked")
	}
	if err == nil && failed {
		err = errReported
	}
	return err
}

func sortedGroups(groups map[parkedGroup]int) []parkedGroup {
	var list []parkedGroup
	for g := range groups {
		list = append(list, g)
	}
	slices.SortFunc(list, func(a, b parkedGroup) int {
		return strings.Compare(a.lane+"\x00"+a.upstream, b.lane+"\x00"+b.upstream)
	})
	return list
}

// replayer is a spool that can take parked messages back.
type replayer interface {
	Replay(lane, upstream string, seqs []uint64) (int, error)
}

func replayIn(sp *spool.Spool, r replaying) (done replayed, err error) {
	done = replayed{Lane: r.Lane, Upstream: r.Upstream}
	s, ok := any(sp).(replayer)
	if !ok {
		return done, errors.New("this build cannot replay")
	}
	if done.Replayed, err = s.Replay(r.Lane, r.Upstream, r.Seqs); done.Replayed > 0 && err != nil {
		done.Problem, err = err.Error(), nil
	}
	return done, err
}

// seqFlag declares a flag of sequences.
func seqFlag(fs *flag.FlagSet, name, usage string) *[]uint64 {
	var v seqValue
	fs.Var(&v, name, usage)
	return (*[]uint64)(&v)
}

type seqValue []uint64

// String is for flag: there is no default.
func (v *seqValue) String() string { return "" }

// Set is for flag.
func (v *seqValue) Set(s string) error {
	for part := range strings.SplitSeq(s, ",") {
		n, err := strconv.ParseUint(strings.TrimSpace(part), 10, 64)
		if err != nil || n == 0 {
			return errors.New("write sequences as 17 or 17,18")
		}
		*v = append(*v, n)
	}
	return nil
}
