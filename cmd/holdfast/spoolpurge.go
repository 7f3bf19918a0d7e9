package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

var spoolPurgeCommand = command{
	name: "spool purge", args: "LANE (--all | --older-than AGE | --up-to SEQ | --parked) [--upstream NAME] [--yes] [--json] " + placeArgs,
	summary: "Drop messages of a lane that are no longer wanted, and give their space back", words: []string{"lane"},
	help: `From the oldest on: all of them, those received longer ago than AGE (72h, 7d; or before a time such as 2026-03-01T06:00:00Z), or
those up to a sequence; with both --older-than and --up-to what both allow. They were acknowledged and will not be sent: they
count as evicted, and the cloud is told which are missing (reason "purged"). What was sent already is not touched.

--parked drops something else: the copies of messages that an upstream has refused for good, which holdfast spool replay could send
again. They stay counted as parked.

It says first what will go, and asks; where nobody can be asked it wants --yes. It works on a full disk, and is what empties one.
holdfast spool export --lane LANE keeps a copy.

` + placeHelp,
	run: spoolPurge,
}

// purging is what is asked of POST /lanes/{lane}/purge.
type purging struct {
	OlderThan string `json:"older_than,omitempty"` // RFC 3339
	UpTo      uint64 `json:"up_to,omitempty"`
	All       bool   `json:"all,omitempty"`
	Parked    bool   `json:"parked,omitempty"`
	Upstream  string `json:"upstream,omitempty"`
}

// purged is what it answers, and what is printed.
type purged struct {
	Lane   string      `json:"lane"`
	Purged spool.Count `json:"purged"`
}

func spoolPurge(ctx context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	where := placeFlagsIn(fs)
	var ask purging
	fs.BoolVar(&ask.All, "all", false, "every message of the lane")
	older := fs.String("older-than", "", "those received longer ago than `AGE`, or before a time")
	fs.Uint64Var(&ask.UpTo, "up-to", 0, "those up to this sequence, `SEQ`")
	fs.BoolVar(&ask.Parked, "parked", false, "what an upstream has refused for good, not what waits")
	fs.StringVar(&ask.Upstream, "upstream", "", "with --parked: only what this upstream refused, `NAME`")
	yes := fs.Bool("yes", false, "do not ask")
	asJSON := fs.Bool("json", false, "print what was removed as JSON")
	words, err := p.parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	before, err := timeBefore("older-than", *older, time.Now())
	switch {
	case err != nil:
		return err
	case ask.Parked && (ask.All || *older != "" || isSet(fs, "up-to")):
		return usagef("--parked goes with --upstream and nothing else: all that is parked of the lane goes")
	case !ask.Parked && ask.Upstream != "":
		return usagef("--upstream goes with --parked: what waits in a lane waits for all of its upstreams")
	case !ask.Parked && ask.All == (*older != "" || isSet(fs, "up-to")):
		return usagef("say which messages are to go: --older-than, --up-to or both; or --all, or --parked, and nothing else")
	case isSet(fs, "up-to") && ask.UpTo == 0:
		return usagef("--up-to 0 is before the first message")
	}
	if !before.IsZero() {
		ask.OlderThan = before.UTC().Format(time.RFC3339Nano)
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	var l purgeLane = &onlineLane{client: pl.client, lanes: pl.status.Lanes}
	if !pl.online() {
		sp, closeAll, openErr := pl.spoolToChange(p)
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, closeAll()) }()
		l = &offlineLane{sp}
	}
	lane := words[0]
	var plan purgePlan
	if ask.Parked {
		plan, err = planParked(l, lane, ask)
	} else {
		plan, err = planPurge(ctx, l, lane, before, ask)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(p.stderr, plan.text)
	switch {
	case plan.nothing:
	case *yes:
	case !isTerminal(os.Stdin):
		return usagef("nobody can be asked here: say --yes if that is meant")
	default:
		fmt.Fprint(p.stderr, "They will not be sent. Remove them? [y/N] ")
		answer, _ := bufio.NewReader(os.Stdin).ReadString('\n') // an end is a no
		if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
			return errors.New("nothing was removed")
		}
	}
	gone := purged{Lane: lane}
	if !plan.nothing {
		if gone.Purged, err = l.purge(ctx, lane, before, ask); err != nil {
			return err
		}
		if !pl.online() {
			what := "messages"
			if ask.Parked {
				what = "parked messages"
			}
			if err := pl.note("purge_lane", lane, fmt.Sprintf("%d %s", gone.Purged.Messages, what)); err != nil {
				return err
			}
		}
	}
	if *asJSON {
		return p.printJSON(gone)
	}
	if !plan.nothing {
		told := "the cloud is told"
		if ask.Parked {
			told = "it was told when they were parked"
		}
		fmt.Fprintf(p.stdout, "removed from %s: %s, %s; %s\n", lane, count(int(gone.Purged.Messages), "message"), bytesText(gone.Purged.Bytes), told)
	}
	return nil
}

// purgeLane is a spool that messages are removed from.
type purgeLane interface {
	stats() []spool.LaneStat
	// at gives the first message from seq on; ok is false if there is none, or it cannot be read.
	at(ctx context.Context, lane string, seq uint64) (found uint64, received time.Time, ok bool)
	purge(ctx context.Context, lane string, before time.Time, ask purging) (spool.Count, error)
}

type purgePlan struct {
	text    string
	nothing bool // is to go
}

// planParked says what will go with --parked.
func planParked(l purgeLane, lane string, ask purging) (purgePlan, error) {
	lanes := l.stats()
	i := slices.IndexFunc(lanes, func(s spool.LaneStat) bool { return s.Name == lane })
	if i < 0 {
		return purgePlan{}, noLane(lane, lanes)
	}
	parked := lanes[i].Parked
	if parked.Messages == 0 {
		return purgePlan{text: fmt.Sprintf("lane %s has nothing parked", lane), nothing: true}, nil
	}
	text := fmt.Sprintf("lane %s: %s parked, %s", lane, count(int(parked.Messages), "message"), bytesText(parked.Bytes))
	if ask.Upstream != "" {
		text += fmt.Sprintf("; those that %s refused will go, and cannot be replayed then", ask.Upstream)
	} else {
		text += "; all will go, and cannot be replayed then"
	}
	return purgePlan{text: text}, nil
}

// planPurge says what will go. It looks at a few dozen messages, however many there are: those of a lane lie in the order in
// which they were received.
func planPurge(ctx context.Context, l purgeLane, lane string, before time.Time, ask purging) (plan purgePlan, err error) {
	lanes := l.stats()
	i := slices.IndexFunc(lanes, func(s spool.LaneStat) bool { return s.Name == lane })
	if i < 0 {
		return plan, noLane(lane, lanes)
	}
	stat := &lanes[i]
	last := stat.Accepted.Messages
	first := last - stat.Kept.Messages + 1
	end := last + 1
	if ask.UpTo > 0 {
		end = min(end, ask.UpTo+1)
	}
	sure := true
	if !before.IsZero() {
		lo, hi := first, end // the first that stays is in between
		for lo < hi {
			mid := lo + (hi-lo)/2
			seq, received, ok := l.at(ctx, lane, mid)
			switch {
			case ctx.Err() != nil:
				return plan, ctx.Err()
			case !ok || seq >= hi:
				sure = sure && ok
				hi = mid
			case received.Before(before):
				lo = seq + 1
			default:
				hi = mid
			}
		}
		end = lo
	}
	if first >= end {
		return purgePlan{text: fmt.Sprintf("lane %s has nothing of that: it keeps %s", lane, count(int(stat.Kept.Messages), "message")), nothing: true}, nil
	}
	n := end - first
	about := "about "
	size := stat.Kept.Bytes
	if n < stat.Kept.Messages {
		size = uint64(float64(size) * float64(n) / float64(stat.Kept.Messages))
	} else {
		about = ""
	}
	text := fmt.Sprintf("lane %s: %s of %d will go, %s%s", lane, count(int(n), "message"), stat.Kept.Messages, about, bytesText(size))
	if !sure {
		text = fmt.Sprintf("lane %s: some of its %d messages cannot be read, so how many will go is not known; %s or more", lane, stat.Kept.Messages, count(int(n), "message"))
	}
	text += fmt.Sprintf("; sequences %d to %d", first, end-1)
	_, from, ok1 := l.at(ctx, lane, first)
	_, to, ok2 := l.at(ctx, lane, end-1)
	if ok1 && ok2 {
		text += fmt.Sprintf(", received %s to %s", from.UTC().Format(time.RFC3339), to.UTC().Format(time.RFC3339))
	}
	return purgePlan{text: text}, nil
}

// onlineLane asks a gateway.
type onlineLane struct {
	client *apiClient
	lanes  []spool.LaneStat
}

func (o *onlineLane) stats() []spool.LaneStat { return o.lanes }

func (o *onlineLane) at(ctx context.Context, lane string, seq uint64) (uint64, time.Time, bool) {
	var page httpapi.MessagePage
	q := url.Values{"limit": {"1"}, "after": {strconv.FormatUint(seq-1, 10)}}
	err := o.client.call(ctx, http.MethodGet, "/api/v1/lanes/"+url.PathEscape(lane)+"/messages?"+q.Encode(), nil, &page)
	if err != nil || len(page.Messages) == 0 {
		return 0, time.Time{}, false
	}
	return page.Messages[0].Seq, page.Messages[0].Received, true
}

func (o *onlineLane) purge(ctx context.Context, lane string, _ time.Time, ask purging) (spool.Count, error) {
	var gone purged
	err := o.client.call(ctx, http.MethodPost, "/api/v1/lanes/"+url.PathEscape(lane)+"/purge", ask, &gone)
	return gone.Purged, err
}

// offlineLane works on a data directory.
type offlineLane struct{ sp *spool.Spool }

func (o *offlineLane) stats() []spool.LaneStat { return o.sp.Lanes() }

func (o *offlineLane) at(_ context.Context, lane string, seq uint64) (found uint64, received time.Time, ok bool) {
	err := o.sp.Peek(lane, seq, 1, func(s uint64, r *spool.Record) error {
		found, received, ok = s, time.UnixMilli(r.Received), true
		return nil
	})
	return found, received, ok && err == nil
}

func (o *offlineLane) purge(_ context.Context, lane string, before time.Time, ask purging) (spool.Count, error) {
	if ask.Parked {
		return o.sp.PurgeParked(lane, ask.Upstream)
	}
	return o.sp.Purge(lane, before, ask.UpTo)
}
