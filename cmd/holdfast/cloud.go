package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/bridge/cloud"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
)

var cloudTailCommand = command{
	name: "cloud tail", args: "--url URL [--gateway ID] [--lane NAME] [--topic FILTER] [--json] [--state FILE]",
	summary: "Show what gateways send to an upstream broker",
	help: `It subscribes at the upstream broker, reads every format, drops what was sent twice, and says what is missing:
a HOLE is a message that was passed over, a GAP is the gateway's word that some will not come.

With --state, what has been seen is kept in FILE, and the broker keeps what comes while nobody looks: the next
tail with that FILE goes on where this one ended.

Passthrough messages come on topics of their own: name those with --subscribe. They have no ids, so
nothing can be told about repeats.`,
	run: cloudTail,
}

func cloudTail(ctx context.Context, p *program, args []string) error {
	fs := p.flags()
	var t tail
	o := &t.options
	brokerFlags(fs, o)
	fs.StringVar(&t.gateway, "gateway", "", "only this gateway, `ID`")
	fs.StringVar(&t.lane, "lane", "", "only this lane, `NAME`")
	fs.StringVar(&t.topic, "topic", "", "only messages that devices published to topics that match `FILTER`")
	fs.Func("subscribe", "subscribe to `FILTER` instead of gw/+/#; may be repeated", func(s string) error {
		if !mqtt.ValidFilter(s) {
			return errors.New("not a topic filter")
		}
		t.filters = append(t.filters, s)
		return nil
	})
	fs.Uint64Var(&t.count, "count", 0, "end after `N` messages; with --state, at the end of the publish that holds the Nth")
	fs.StringVar(&t.state, "state", "", "keep what has been seen in `FILE`")
	asJSON := fs.Bool("json", false, "print JSON, one object a line, payloads whole")
	if _, err := p.parse(fs, args, 0, 0); err != nil {
		return err
	}
	if err := checkBroker(*o); err != nil {
		return err
	}
	if t.topic != "" && !mqtt.ValidFilter(t.topic) {
		return usagef("--topic %q is not a topic filter", t.topic)
	}
	t.out = bufio.NewWriter(p.stdout)
	t.print = textLines(t.out)
	if *asJSON {
		t.print = jsonLines(t.out)
	}
	log := slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ctx, stop := onSignals(ctx, log)
	defer stop()
	return t.run(ctx, p.stderr, log)
}

// tail is one run of holdfast cloud tail.
type tail struct {
	options              mqttup.Options
	gateway, lane, topic string
	filters              []string
	count                uint64 // 0: without end
	state                string
	print                func(line) error
	out                  *bufio.Writer // of print; flushed once a publish

	shown uint64
}

// line is what is printed: a delivery, or a publish that could not be read.
type line struct {
	cloud.Delivery
	topic string // of the publish
	size  int
	err   error
}

func (t *tail) run(ctx context.Context, stderr io.Writer, log *slog.Logger) error {
	receiver := cloud.New(cloud.Config{MaxRaw: t.options.MaxPayload})
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	who := fmt.Sprint(host, os.Getpid(), time.Now().UnixNano())
	if t.state != "" {
		file, err := filepath.Abs(t.state)
		if err != nil {
			return err
		}
		if err := receiver.Load(t.state); err != nil {
			return err
		}
		if err := receiver.Save(t.state); err != nil { // now rather than after the first message
			return err
		}
		// The broker keeps messages for this id: it must be the same the next time.
		who, t.options.Persistent = host+file, true
	}
	id := sha256.Sum256([]byte(who))
	t.options.ClientID = "holdfast-tail-" + hex.EncodeToString(id[:4])
	t.options.Log = log
	if len(t.filters) == 0 {
		t.filters = []string{wire.Filter(t.gateway)}
	}

	var ended error // why, if it was not ctx; only the handler touches it
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = mqttup.Subscribe(ctx, t.options, t.filters, func(topic string, payload []byte) {
		if ctx.Err() != nil {
			return
		}
		err := t.receive(receiver, topic, payload)
		if flushErr := t.out.Flush(); flushErr != nil {
			err = flushErr
		}
		if err == nil && t.state != "" { // shown, then written down, then acknowledged
			err = receiver.Save(t.state)
		}
		if err != nil || t.count > 0 && t.shown >= t.count {
			ended = err
			cancel()
		}
	})
	switch {
	case errors.Is(ended, syscall.EPIPE):
		return nil // | head
	case ended != nil:
		err = ended
	}
	s := receiver.Stats()
	fmt.Fprintf(stderr, "%d messages in %d publishes, %d duplicates removed, %d gaps announced, %d missing\n",
		s.Messages, s.Publishes, s.Duplicates, s.Gaps, s.Missing)
	return err
}

// receive prints what is in a publish. With --state it does not stop in the middle of one: what
// came after that would be written down as seen, and never shown.
func (t *tail) receive(receiver *cloud.Receiver, topic string, payload []byte) error {
	deliveries, err := receiver.Receive(topic, payload)
	if err != nil {
		return t.print(line{topic: topic, size: len(payload), err: err})
	}
	for _, d := range deliveries {
		if !t.wanted(d) {
			continue
		}
		if err := t.print(line{Delivery: d, topic: topic, size: len(payload)}); err != nil {
			return err
		}
		if d.Kind == cloud.Message {
			t.shown++
		}
		if t.count > 0 && t.shown == t.count && t.state == "" {
			break
		}
	}
	return nil
}

func (t *tail) wanted(d cloud.Delivery) bool {
	if t.gateway != "" && d.Gateway != t.gateway {
		return false
	}
	if t.lane != "" && d.Lane != t.lane {
		return false
	}
	if t.topic != "" {
		return (d.Kind == cloud.Message || d.Kind == cloud.Duplicate) && mqtt.Match(t.topic, d.Message.Topic)
	}
	return true
}

// textLines prints for people: time, gateway, device, lane, sequence, topic, payload.
func textLines(w io.Writer) func(line) error {
	width := [3]int{10, 8, 9} // of gateway, device and lane: as wide as what came so far
	return func(l line) error {
		at := time.Now()
		names := [3]string{l.Gateway, l.Message.Device, l.Lane}
		switch {
		case l.Message.Received != 0:
			at = time.UnixMilli(l.Message.Received)
		case l.Command != nil:
			at, names[1] = l.Command.At.Local(), l.Command.Device
		case l.Device != nil:
			at, names[1] = l.Device.At.Local(), l.Device.Device
		}
		for i, s := range names {
			if names[i] = shown(s, 40); s == "" {
				names[i] = "-"
			}
			width[i] = max(width[i], utf8.RuneCountInString(names[i]))
		}
		_, err := fmt.Fprintf(w, "%s  %-*s  %-*s  %-*s  %s\n", at.Format("2006-01-02 15:04:05.000"),
			width[0], names[0], width[1], names[1], width[2], names[2], told(l))
		return err
	}
}

// told is what a line says after who and when.
func told(l line) string {
	if l.err != nil {
		return fmt.Sprintf("CANNOT READ %d bytes: %s", l.size, shown(l.err.Error(), 300))
	}
	switch l.Kind {
	case cloud.Message, cloud.Duplicate:
		var b strings.Builder
		if l.ID.Seq > 0 {
			fmt.Fprintf(&b, "#%-7d  ", l.ID.Seq)
		}
		b.WriteString(shown(l.Message.Topic, 80))
		if l.Kind == cloud.Duplicate {
			b.WriteString("  DUPLICATE, dropped")
			return b.String()
		}
		b.WriteString("  ")
		b.WriteString(shortPayload(l.Message.Payload))
		if l.Late {
			b.WriteString("  (late)")
		}
		return b.String()
	case cloud.Hole:
		return fmt.Sprintf("HOLE: #%d to #%d, %d messages did not come and no gap was announced so far",
			l.Missing.First, l.Missing.Last, l.Missing.Count())
	case cloud.Gap:
		return fmt.Sprintf("GAP: #%d to #%d, %d messages will not come, reason %s", l.Missing.First, l.Missing.Last, l.Gap.Count, shown(l.Gap.Reason, 40))
	case cloud.State:
		return fmt.Sprintf("%s, version %s, epoch %s", strings.ToUpper(l.State.State), shown(l.State.Version, 40), shown(l.State.Epoch, 40))
	case cloud.CommandEvent:
		e := l.Command
		return strings.TrimRight(fmt.Sprintf("COMMAND %s %s: %s  %s", shown(e.ID, 40), shown(e.Name, 40), shown(e.State, 20), eventDetails(e)), " ")
	case cloud.DeviceEvent:
		e := l.Device
		var parts []string
		for _, s := range []string{e.Protocol, e.Address, e.Reason} {
			if s != "" {
				parts = append(parts, shown(s, 80))
			}
		}
		return strings.TrimRight("DEVICE "+strings.ToUpper(e.State)+"  "+strings.Join(parts, ", "), " ")
	case cloud.Event:
		return shown(l.topic, 80) + "  " + shortPayload(l.Payload)
	}
	return ""
}

func shortPayload(p []byte) string {
	const most = 72
	if len(p) == 0 {
		return "(empty)"
	}
	if !utf8.Valid(p) {
		return fmt.Sprintf("(%d bytes) %x", len(p), p[:min(len(p), most/4)])
	}
	return shown(string(p), most)
}

// shown makes s safe to show on a terminal, on one line, and short.
func shown(s string, most int) string {
	clean := true
	n := 0
	for _, r := range s {
		n++
		clean = clean && unicode.IsPrint(r)
	}
	if clean && n <= most {
		return s
	}
	var b strings.Builder
	n = 0
	for _, r := range s {
		if n++; n > most {
			b.WriteString("…")
			break
		}
		if !unicode.IsPrint(r) {
			r = '·'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// jsonLine is what --json prints. Every line has kind; the rest depends on it.
type jsonLine struct {
	Kind    string `json:"kind"` // message, duplicate, hole, gap, state, command, device, event, invalid
	Topic   string `json:"topic,omitempty"`
	Gateway string `json:"gateway,omitempty"`

	// message, duplicate
	ID            string  `json:"id,omitempty"`
	Epoch         string  `json:"epoch,omitempty"` // hole and gap too
	Lane          string  `json:"lane,omitempty"`
	Seq           uint64  `json:"seq,omitempty"`
	Device        string  `json:"device,omitempty"`
	Received      string  `json:"received,omitempty"` // by the gateway, RFC 3339
	QoS           *int    `json:"qos,omitempty"`
	Retain        bool    `json:"retain,omitempty"`
	Will          bool    `json:"will,omitempty"`
	ClockUnsynced bool    `json:"clock_unsynced,omitempty"`
	CorrectedMS   int64   `json:"clock_corrected_ms,omitempty"` // what was added to received since
	ContentType   string  `json:"content_type,omitempty"`
	Replayed      bool    `json:"replayed,omitempty"`
	Late          bool    `json:"late,omitempty"`
	Payload       *string `json:"payload,omitempty"`        // if it is text
	PayloadBase64 string  `json:"payload_base64,omitempty"` // if it is not

	// hole, gap
	First     uint64  `json:"first,omitempty"`
	Last      uint64  `json:"last,omitempty"`
	Count     uint64  `json:"count,omitempty"`
	Reason    string  `json:"reason,omitempty"`
	Upstream  string  `json:"upstream,omitempty"`
	Explained *uint64 `json:"explained,omitempty"`

	// state
	State   string `json:"state,omitempty"`
	Version string `json:"version,omitempty"`
	TS      int64  `json:"ts,omitempty"`

	// command, device
	Name         string              `json:"name,omitempty"`
	Previous     string              `json:"previous,omitempty"`
	Final        bool                `json:"final,omitempty"`
	At           *wire.Time          `json:"at,omitempty"`
	ClockState   string              `json:"clockstate,omitempty"`
	Attempts     *int                `json:"attempts,omitempty"`
	Code         string              `json:"code,omitempty"`
	Repeat       bool                `json:"repeat,omitempty"`
	Progress     *wire.EventProgress `json:"progress,omitempty"`
	Result       json.RawMessage     `json:"result,omitempty"`
	ResultBase64 string              `json:"result_base64,omitempty"`
	Source       string              `json:"source,omitempty"`
	Address      string              `json:"address,omitempty"`
	Protocol     string              `json:"protocol,omitempty"`

	// invalid
	Error string `json:"error,omitempty"`
	Bytes int    `json:"bytes,omitempty"`
}

func jsonLines(w io.Writer) func(line) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return func(l line) error {
		j := jsonLine{Topic: l.topic, Gateway: l.Gateway, Epoch: l.Epoch, Lane: l.Lane}
		switch {
		case l.err != nil:
			j.Kind, j.Error, j.Bytes = "invalid", l.err.Error(), l.size
		case l.Kind == cloud.Message || l.Kind == cloud.Duplicate:
			m := &l.Message
			j.Kind, j.Topic = "message", m.Topic
			if l.Kind == cloud.Duplicate {
				j.Kind = "duplicate"
			}
			j.payload(m.Payload)
			if m.Props != nil {
				j.ContentType = m.Props.ContentType
			}
			if l.ID.Seq == 0 {
				break // passthrough
			}
			qos := m.Flags.QoS()
			j.ID, j.Seq, j.Device, j.QoS = l.ID.String(), l.ID.Seq, m.Device, &qos
			j.Received = time.UnixMilli(m.Received).UTC().Format("2006-01-02T15:04:05.000Z07:00")
			j.Retain, j.Will = m.Flags&wire.FlagRetain != 0, m.Flags&wire.FlagWill != 0
			j.CorrectedMS = m.Corrected
			j.ClockUnsynced = m.Flags&wire.FlagClockUnsynced != 0
			j.Replayed, j.Late = l.Replayed, l.Late
		case l.Kind == cloud.Hole:
			j.Kind, j.First, j.Last, j.Count = "hole", l.Missing.First, l.Missing.Last, l.Missing.Count()
		case l.Kind == cloud.Gap:
			j.Kind, j.First, j.Last, j.Count = "gap", l.Gap.First, l.Gap.Last, l.Gap.Count
			j.Reason, j.Upstream, j.Explained = l.Gap.Reason, l.Gap.Upstream, &l.Explained
		case l.Kind == cloud.State:
			j.Kind, j.State, j.Epoch, j.Version, j.TS = "state", l.State.State, l.State.Epoch, l.State.Version, l.State.TS
		case l.Kind == cloud.CommandEvent:
			e := l.Command
			j.Kind, j.ID, j.Device, j.Name, j.State, j.Previous, j.Final = "command", e.ID, e.Device, e.Name, e.State, e.Previous, e.Final
			j.At, j.ClockState, j.Attempts, j.Reason, j.Code, j.Late = &e.At, e.ClockState, &e.Attempts, e.Reason, e.Code, e.Late
			j.Repeat, j.Progress, j.Result, j.ResultBase64 = e.Repeat, e.Progress, e.Result, e.ResultBase64
			j.ContentType, j.Source = e.ContentType, e.Source
		case l.Kind == cloud.DeviceEvent:
			e := l.Device
			j.Kind, j.Device, j.State, j.At, j.ClockState = "device", e.Device, e.State, &e.At, e.ClockState
			j.Address, j.Protocol, j.Reason = e.Address, e.Protocol, e.Reason
		case l.Kind == cloud.Event:
			j.Kind = "event"
			j.payload(l.Payload)
		}
		return enc.Encode(j)
	}
}

func (j *jsonLine) payload(p []byte) {
	if text := string(p); utf8.ValidString(text) {
		j.Payload = &text
	} else {
		j.PayloadBase64 = base64.StdEncoding.EncodeToString(p)
	}
}
