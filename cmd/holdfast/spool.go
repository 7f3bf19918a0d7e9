package main

import (
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
	"holdfast/spool"
)

const spoolHelp = `The gateway must not be running: the store has one owner at a time. A running one is asked with
holdfast status. The data directory is --data-dir, or gateway.data_dir of --config, or ./holdfast-data.`

// openSpool opens the spool that the flags name, for looking.
func (p *program) openSpool(dir, file string) (*spool.Spool, func() error, error) {
	switch {
	case dir != "" && file != "":
		return nil, nil, usagef("--config and --data-dir exclude each other")
	case dir == "":
		cfg, _, err := load(file)
		if err != nil {
			return nil, nil, err
		}
		dir = cfg.Gateway.DataDir
	}
	sp, closeAll, err := gateway.OpenSpool(dir, logger(p.stderr, config.Log{Level: "warn", Format: "text"}))
	var inUse *gateway.InUseError
	if errors.As(err, &inUse) {
		return nil, nil, fmt.Errorf("%s is in use by process %d: stop that gateway first, or ask it with holdfast status", dir, inUse.PID)
	}
	return sp, closeAll, err
}

func dirFlags(fs *flag.FlagSet) (dir, file *string) {
	return fs.String("data-dir", "", "data `DIR`ectory of the gateway"), fs.String("config", "", "configuration `FILE` of the gateway")
}

var spoolStatCommand = command{
	name: "spool stat", args: "[--data-dir DIR | --config FILE] [--json]",
	summary: "Show what a stopped gateway has spooled, and its ledger",
	help:    spoolHelp,
	run:     spoolStat,
}

func spoolStat(_ context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	dir, file := dirFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	sp, closeAll, err := p.openSpool(*dir, *file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	ledger := httpapi.NewLedger(sp.Accounts())
	if *asJSON {
		return p.printJSON(struct {
			Epoch  string           `json:"epoch"`
			Lanes  []spool.LaneStat `json:"lanes"`
			Ledger httpapi.Ledger   `json:"ledger"`
		}{sp.Epoch(), sp.Lanes(), ledger})
	}
	fmt.Fprintf(p.stdout, "epoch %s\n\n", sp.Epoch())
	p.printLanes(sp.Lanes(), false)
	fmt.Fprintln(p.stdout)
	p.printAccounts(ledger.Accounts, ledger.Balanced)
	return nil
}

var spoolPeekCommand = command{
	name: "spool peek", args: "LANE [--from SEQ] [--limit N] [--data-dir DIR | --config FILE] [--json]",
	summary: "Show messages that a stopped gateway still holds", words: []string{"lane"},
	help: `Messages of LANE, the oldest first. With --parked in place of LANE: those that an upstream refused
for good, of all lanes, with the reason.

` + spoolHelp,
	run: spoolPeek,
}

// peeked is a message as peek prints it.
type peeked struct {
	Lane     string    `json:"lane"`
	Seq      uint64    `json:"seq"`
	Received time.Time `json:"received"`
	Device   string    `json:"device"`
	Topic    string    `json:"topic"`
	QoS      int       `json:"qos"`
	Retain   bool      `json:"retain,omitempty"`
	Payload  *string   `json:"payload,omitempty"`        // if it is text
	Base64   string    `json:"payload_base64,omitempty"` // if it is not
	Upstream string    `json:"upstream,omitempty"`       // parked: by whom
	Reason   string    `json:"reason,omitempty"`
}

func spoolPeek(_ context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	dir, file := dirFlags(fs)
	from := fs.Uint64("from", 0, "first sequence number, `SEQ`")
	limit := fs.Int("limit", 20, "at most `N` messages")
	parked := fs.Bool("parked", false, "parked messages")
	asJSON := fs.Bool("json", false, "print JSON, one message a line, payloads whole")
	lane, err := p.parse(fs, args, 0, 1)
	if err != nil {
		return err
	}
	switch {
	case *parked == (len(lane) == 1):
		return usagef("name a lane, or say --parked")
	case *limit < 1:
		return usagef("--limit has to be at least 1")
	}
	sp, closeAll, err := p.openSpool(*dir, *file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	show := func(m peeked, r *spool.Record) error {
		m.fill(r)
		if *asJSON {
			return p.printJSONLine(m)
		}
		fmt.Fprintln(p.stdout, m.line())
		return nil
	}
	if *parked {
		n := 0
		return sp.Parked(func(pm spool.ParkedMessage) error {
			if n++; n > *limit || pm.Seq < *from {
				return nil
			}
			var r spool.Record
			if _, err := spool.ParseRecord(pm.Record, &r); err != nil {
				return fmt.Errorf("parked message %d of lane %s: %w", pm.Seq, pm.Lane, err)
			}
			return show(peeked{Lane: pm.Lane, Seq: pm.Seq, Upstream: pm.Upstream, Reason: pm.Reason}, &r)
		})
	}
	err = sp.Peek(lane[0], *from, *limit, func(seq uint64, r *spool.Record) error {
		return show(peeked{Lane: lane[0], Seq: seq}, r)
	})
	if errors.Is(err, spool.ErrNoLane) {
		var names []string
		for _, l := range sp.Lanes() {
			names = append(names, l.Name)
		}
		return usagef("there is no lane %q here; there are %s", lane[0], strings.Join(names, ", "))
	}
	return err
}

func (m *peeked) fill(r *spool.Record) {
	m.Received = time.UnixMilli(r.Received).UTC()
	m.Device, m.Topic = string(r.Device), string(r.Topic)
	switch {
	case r.Flags&spool.FlagQoS2 != 0:
		m.QoS = 2
	case r.Flags&spool.FlagQoS1 != 0:
		m.QoS = 1
	}
	m.Retain = r.Flags&spool.FlagRetain != 0
	if text := string(r.Payload); printable(text) {
		m.Payload = &text
	} else {
		m.Base64 = base64.StdEncoding.EncodeToString(r.Payload)
	}
}

// line is for people: the payload is cut, and nothing in it can steer a terminal.
func (m *peeked) line() string {
	var payload string
	if m.Payload != nil {
		payload = strconv.Quote(cut(*m.Payload, 120))
	} else {
		payload = "base64:" + cut(m.Base64, 80)
	}
	flags := ""
	if m.Retain {
		flags = " retain"
	}
	s := fmt.Sprintf("%s/%d  %s  %q  %q  qos %d%s  %s", m.Lane, m.Seq, m.Received.Format("2006-01-02T15:04:05.000Z"), m.Device, m.Topic, m.QoS, flags, payload)
	if m.Upstream != "" {
		s += fmt.Sprintf("  parked by %s: %s", m.Upstream, strconv.Quote(m.Reason))
	}
	return s
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsPrint(r) && r != '\n' && r != '\t' && r != '\r'
	})
}

var spoolVerifyCommand = command{
	name: "spool verify", args: "[--data-dir DIR | --config FILE] [--json]",
	summary: "Read everything that a stopped gateway holds and check it against the ledger",
	help: `Checksums, sequences and the ledger: every accepted message has to be in exactly one account, and
every pending one has to be readable. Exit code 1 if anything is wrong.

` + spoolHelp,
	run: spoolVerify,
}

// verifySpool reads everything, and shows how far it is.
func (p *program) verifySpool(sp *spool.Spool) (spool.Report, error) {
	bar := newProgress(p.stderr)
	for _, l := range sp.Lanes() {
		bar.total += int64(l.Kept.Messages)
	}
	var read atomic.Int64
	bar.done = read.Load
	bar.label = func(took time.Duration) string {
		text := fmt.Sprintf("%s read", count(int(read.Load()), "message"))
		if s := took.Seconds(); s >= 1 {
			text += fmt.Sprintf(", %.0f/s", float64(read.Load())/s)
		}
		return text
	}
	bar.start()
	defer bar.clear()
	defer bar.stop()
	return sp.Verify(func(n uint64) { read.Store(int64(n)) })
}

func spoolVerify(_ context.Context, p *program, args []string) (err error) {
	fs := p.flags()
	dir, file := dirFlags(fs)
	asJSON := fs.Bool("json", false, "print JSON")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	sp, closeAll, err := p.openSpool(*dir, *file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	report, err := p.verifySpool(sp)
	if err != nil {
		return err
	}
	ledger := httpapi.NewLedger(report.Accounts)
	if *asJSON {
		if err := p.printJSON(report); err != nil {
			return err
		}
	} else {
		rows := [][]string{{"LANE", "MESSAGES", "SIZE", "CHUNKS", "ON DISK"}}
		for _, l := range report.Lanes {
			rows = append(rows, []string{l.Lane, fmt.Sprint(l.Kept.Messages), bytesText(l.Kept.Bytes), fmt.Sprint(l.Chunks), bytesText(l.StoredBytes)})
		}
		p.table(rows...)
		fmt.Fprintln(p.stdout)
		p.printAccounts(ledger.Accounts, ledger.Balanced)
	}
	if len(report.Problems) == 0 && ledger.Balanced {
		if !*asJSON {
			fmt.Fprintln(p.stdout, "verified: everything that is pending can be read")
		}
		return nil
	}
	for _, problem := range report.Problems {
		fmt.Fprintf(p.stderr, "problem: %s\n", problem)
	}
	fmt.Fprintf(p.stderr, "holdfast spool verify: %s found\n", count(len(report.Problems), "problem"))
	return errReported
}
