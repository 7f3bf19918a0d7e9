package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

var spoolExportCommand = command{
	name: "spool export", args: "[--lane LANE] [--from SEQ] [--to SEQ] [--since TIME] [--device DEVICE] [--parked] [--output FILE] [--rate SIZE] " + placeArgs,
	summary: "Write the messages that a gateway holds as lines of JSON",
	help: `Each line is one message with its id, lane, sequence, device, topic, time and payload: payload_json if that is a JSON object or
array, payload if it is other text, else payload_base64. Without --lane those of all lanes but the gateway's own, system. It takes
nothing out. --since is a time, or how long ago: 2026-03-01T06:00:00Z, 2h, 7d. --parked: those that an upstream refused for good.

Messages go to stdout or to the file of --output, which must not be there; until it is whole its name ends in .partial. What was
written, and that it is whole, is said on stderr at the end. Messages that are damaged are passed over, told with their sequences, and
make the exit code 1. From a gateway that runs they come at --rate at most. Payloads may be patients' data: the role is operator.

` + placeHelp,
	run: spoolExport,
}

func spoolExport(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	where := placeFlagsIn(fs)
	x := &spoolExporter{p: p}
	fs.StringVar(&x.lane, "lane", "", "only this `LANE`")
	fs.Uint64Var(&x.sel.From, "from", 0, "from this sequence on, `SEQ`")
	fs.Uint64Var(&x.sel.To, "to", 0, "up to this sequence, `SEQ`")
	since := fs.String("since", "", "only what was received (with --parked: parked) since `TIME`")
	fs.StringVar(&x.device, "device", "", "only messages of this `DEVICE`")
	fs.BoolVar(&x.parked, "parked", false, "parked messages instead of those that wait")
	output := fs.String("output", "-", "write to this `FILE`; - is stdout")
	rate := sizeFlag(fs, "rate", defaultBackupRate, "take no more than `SIZE` a second from a gateway that runs")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	at, err := timeBefore("since", *since, time.Now())
	switch {
	case err != nil:
		return err
	case (isSet(fs, "from") || isSet(fs, "to")) && x.lane == "":
		return usagef("--from and --to count in one lane: name it with --lane")
	case x.sel.To > 0 && x.sel.To < x.sel.From, isSet(fs, "to") && x.sel.To == 0:
		return usagef("--to is before the first message")
	case *rate <= 0:
		return usagef("--rate has to be above 0")
	}
	if !at.IsZero() {
		x.sel.SinceMS = at.UnixMilli()
	}
	x.rate = *rate
	ctx, stop := interruptible(ctx)
	defer stop()
	return x.export(ctx, where, *output)
}

// spoolExporter is one run of holdfast spool export.
type spoolExporter struct {
	p      *program
	lane   string // "": all
	sel    spool.Selection
	device string
	parked bool
	rate   int64

	out      *bufio.Writer
	messages atomic.Int64
	bytes    atomic.Int64 // written
	passed   atomic.Int64 // sequences looked at
	damaged  []spool.Damage
}

func (x *spoolExporter) export(ctx context.Context, where *placeFlags, output string) (err error) {
	var file *os.File
	sink := x.p.stdout
	partial := output + ".partial"
	if output != "-" {
		for _, path := range []string{output, partial} {
			if err := absent(path); err != nil {
				return err
			}
		}
	}
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	if output != "-" {
		if file, err = os.OpenFile(partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return err
		}
		defer file.Close()
		sink = file
	}
	x.out = bufio.NewWriterSize(sink, 256<<10)
	began := time.Now()
	bar := newProgress(x.p.stderr)
	if output == "-" && isTerminal(x.p.stdout) {
		bar.every = time.Hour // the messages are on the screen
	}
	bar.done = x.passed.Load
	bar.label = func(took time.Duration) string {
		return fmt.Sprintf("%s, %s%s", count(int(x.messages.Load()), "message"), bytesText(x.bytes.Load()), perSecond(x.bytes.Load(), took))
	}
	err = x.from(ctx, pl, bar)
	err = errors.Join(err, x.out.Flush())
	took := time.Since(began)
	if file != nil {
		if err == nil {
			err = errors.Join(file.Sync(), file.Close())
		}
		if err == nil {
			err = os.Rename(partial, output)
		}
	}
	for _, d := range x.damaged {
		fmt.Fprintf(x.p.stderr, "damaged: %s/%d to %d: %s\n", d.Lane, d.First, d.Last, d.Cause)
	}
	wrote := fmt.Sprintf("%s, %s in %s%s", count(int(x.messages.Load()), "message"), bytesText(x.bytes.Load()), took.Round(10*time.Millisecond), perSecond(x.bytes.Load(), took))
	if err != nil {
		if ctx.Err() != nil {
			err = errInterrupted
		}
		if x.messages.Load() == 0 {
			if file != nil {
				err = errors.Join(err, os.Remove(partial))
			}
			return err
		}
		kept := ""
		if file != nil {
			kept = " in " + partial
		}
		return fmt.Errorf("NOT WHOLE: %w; %s are written%s", err, wrote, kept)
	}
	fmt.Fprintf(x.p.stderr, "whole: %s\n", wrote)
	if len(x.damaged) > 0 {
		fmt.Fprintf(x.p.stderr, "holdfast spool export: %s damaged\n", count(int(damagedMessages(x.damaged)), "message"))
		return errReported
	}
	return nil
}

func damagedMessages(ds []spool.Damage) (n uint64) {
	for _, d := range ds {
		n += d.Last - d.First + 1
	}
	return n
}

// from writes what a place has.
func (x *spoolExporter) from(ctx context.Context, pl *place, bar *progress) error {
	lanes := pl.status.Lanes
	walk := func(lane string) error { return x.online(ctx, pl, lane) }
	if !pl.online() {
		sp, closeAll, err := pl.spool(x.p)
		if err != nil {
			return err
		}
		defer func() { _ = closeAll() }() // nothing was changed
		lanes = sp.Lanes()
		walk = func(lane string) error { return x.offline(ctx, sp, lane) }
	}
	var chosen []string
	for _, l := range lanes {
		if l.Name != x.lane && (x.lane != "" || l.Name == spool.SystemLane && !x.parked) {
			continue
		}
		chosen = append(chosen, l.Name)
		last := l.Accepted.Messages
		first := max(last-l.Kept.Messages+1, x.sel.From)
		if x.sel.To > 0 {
			last = min(last, x.sel.To)
		}
		if first <= last && !x.parked {
			bar.total += int64(last - first + 1)
		}
	}
	if len(chosen) == 0 {
		return noLane(x.lane, lanes)
	}
	bar.start()
	defer bar.clear()
	defer bar.stop()
	for _, lane := range chosen {
		if err := walk(lane); err != nil {
			return err
		}
	}
	return nil
}

func noLane(lane string, lanes []spool.LaneStat) error {
	var names []string
	for _, l := range lanes {
		names = append(names, l.Name)
	}
	return usagef("there is no lane %q here; there are %s", lane, strings.Join(names, ", "))
}

func (x *spoolExporter) offline(ctx context.Context, sp *spool.Spool, lane string) error {
	e := httpapi.Exporting{Gateway: sp.Gateway(), Lane: lane}
	var line []byte
	var first, end, last uint64
	write := func(r *spool.Record) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if last > 0 {
			x.passed.Add(int64(e.Seq - last))
		}
		last = e.Seq
		if x.device != "" && string(r.Device) != x.device {
			return nil
		}
		if e.Seq < first || e.Seq >= end {
			e.Epoch, first, end = sp.EpochOf(lane, e.Seq)
		}
		line = httpapi.AppendExported(line[:0], &e, r)
		return x.write(line)
	}
	if !x.parked {
		return sp.Walk(lane, x.sel, func(seq uint64, r *spool.Record) error {
			e.Seq = seq
			return write(r)
		}, func(d spool.Damage) { x.damaged = append(x.damaged, d) })
	}
	return sp.Parked(func(m spool.ParkedMessage) error {
		if m.Lane != lane || m.Seq < x.sel.From || x.sel.To > 0 && m.Seq > x.sel.To || m.AtMS < x.sel.SinceMS {
			return nil
		}
		var r spool.Record
		if _, err := spool.ParseRecord(m.Record, &r); err != nil {
			x.damaged = append(x.damaged, spool.Damage{Lane: lane, First: m.Seq, Last: m.Seq, Cause: "parked message: " + err.Error()})
			return nil
		}
		e.Seq, e.Parked = m.Seq, &m
		return write(&r)
	})
}

func (x *spoolExporter) write(line []byte) error {
	x.messages.Add(1)
	x.bytes.Add(int64(len(line)))
	_, err := x.out.Write(line)
	return err
}

func (x *spoolExporter) online(ctx context.Context, pl *place, lane string) error {
	q := url.Values{"bytes_per_second": {strconv.FormatInt(x.rate, 10)}, "progress": {"true"}}
	if x.sel.From > 0 {
		q.Set("from", strconv.FormatUint(x.sel.From, 10))
	}
	if x.sel.To > 0 {
		q.Set("to", strconv.FormatUint(x.sel.To, 10))
	}
	if x.sel.SinceMS > 0 {
		q.Set("since", time.UnixMilli(x.sel.SinceMS).UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	}
	if x.device != "" {
		q.Set("device", x.device)
	}
	if x.parked {
		q.Set("parked", "true")
	}
	body, err := pl.client.stream(ctx, http.MethodGet, "/api/v1/lanes/"+url.PathEscape(lane)+"/export?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewReaderSize(body, 64<<10)
	var long []byte
	var last uint64
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			if len(long)+len(line) > maxExportLine {
				return fmt.Errorf("answer of %s is not that of a holdfast: a line without an end", pl.client.base)
			}
			long = append(long, line...)
			continue
		}
		if len(long) > 0 {
			long = append(long, line...)
			line = long
		}
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the answer of %s ends before its last line", pl.client.base)
		} else if err != nil {
			return err
		}
		long = long[:0]
		switch seq, kind := lineKind(line); kind {
		case lineMessage, lineAt:
			if last > 0 && seq > last {
				x.passed.Add(int64(seq - last))
			}
			last = seq
			if kind == lineMessage {
				if err := x.write(line); err != nil {
					return err
				}
			}
		case lineEnd:
			var e struct{ End httpapi.ExportEnd }
			if err := json.Unmarshal(line, &e); err != nil {
				return fmt.Errorf("answer of %s is not that of a holdfast: %w", pl.client.base, err)
			}
			x.damaged = append(x.damaged, e.End.Damaged...)
			return nil
		case lineOther:
			return fmt.Errorf("answer of %s is not that of a holdfast: %.60q", pl.client.base, line)
		}
	}
}

// maxExportLine is more than a message of the largest size takes, every byte of it escaped.
const maxExportLine = 16 << 20

// exportLine says what a line of an export over the API is.
type exportLine int

const (
	lineOther exportLine = iota
	lineMessage
	lineAt
	lineEnd
)

func lineKind(line []byte) (seq uint64, kind exportLine) {
	rest, ok := bytes.CutPrefix(line, []byte(`{"seq":`))
	kind = lineMessage
	if !ok {
		rest, ok = bytes.CutPrefix(line, []byte(`{"at":`))
		kind = lineAt
	}
	switch {
	case !ok && bytes.HasPrefix(line, []byte(`{"end":`)):
		return 0, lineEnd
	case !ok:
		return 0, lineOther
	}
	n := 0
	for ; n < len(rest) && rest[n] >= '0' && rest[n] <= '9'; n++ {
		seq = seq*10 + uint64(rest[n]-'0')
	}
	if n == 0 || n > 20 {
		return 0, lineOther
	}
	return seq, kind
}
