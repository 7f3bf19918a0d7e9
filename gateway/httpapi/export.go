package httpapi

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"holdfast/bridge/wire"
	"holdfast/spool"
)

const maxExports = 4 // at once

// ExportedMessage is a message in an export: one line of JSON. AppendExported writes it.
type ExportedMessage struct {
	Seq        uint64    `json:"seq"`
	Lane       string    `json:"lane"`
	ID         string    `json:"id,omitempty"` // {gateway}/{epoch}/{lane}/{seq}; "": the gateway's id is not known
	Epoch      string    `json:"epoch"`
	Device     string    `json:"device"`
	Topic      string    `json:"topic"`
	Received   time.Time `json:"received"`
	ClockState string    `json:"clockstate"` // synced, unsynced
	QoS        int       `json:"qos"`
	Retain     bool      `json:"retain,omitempty"`
	Dup        bool      `json:"dup,omitempty"`
	Will       bool      `json:"will,omitempty"`

	ContentType    string      `json:"content_type,omitempty"`
	ResponseTopic  string      `json:"response_topic,omitempty"`
	Correlation    []byte      `json:"correlation_base64,omitempty"`
	UserProperties [][2]string `json:"user_properties,omitempty"`
	Expiry         uint32      `json:"expiry_s,omitempty"` // seconds after received

	ParkedBy string    `json:"parked_by,omitempty"` // the upstream that refused it
	ParkedAt time.Time `json:"parked_at,omitzero"`
	Reason   string    `json:"reason,omitempty"`

	// One of these three: PayloadJSON if it is a JSON object or array without line breaks, Payload if it is other text.
	PayloadJSON   json.RawMessage `json:"payload_json,omitempty"`
	Payload       *string         `json:"payload,omitempty"`
	PayloadBase64 *string         `json:"payload_base64,omitempty"`
}

// Exporting is what an exported message has beside its record.
type Exporting struct {
	Gateway, Epoch, Lane string // Gateway "": not known
	Seq                  uint64
	Parked               *spool.ParkedMessage // nil: it is not
}

// AppendExported appends r as a line of JSON. It keeps nothing of r.
func AppendExported(dst []byte, e *Exporting, r *spool.Record) []byte {
	dst = strconv.AppendUint(append(dst, `{"seq":`...), e.Seq, 10)
	dst = appendText(append(dst, `,"lane":`...), e.Lane)
	if e.Gateway != "" {
		dst = appendText(append(dst, `,"id":`...), wire.ID(e.Gateway, e.Epoch, e.Lane, e.Seq))
	}
	dst = appendText(append(dst, `,"epoch":`...), e.Epoch)
	dst = appendText(append(dst, `,"device":`...), r.Device)
	dst = appendText(append(dst, `,"topic":`...), r.Topic)
	dst = time.UnixMilli(r.Received).UTC().AppendFormat(append(dst, `,"received":"`...), "2006-01-02T15:04:05.000Z07:00")
	state := wire.ClockSynced
	if r.Flags&spool.FlagClockUnsynced != 0 {
		state = wire.ClockUnsynced
	}
	dst = append(append(append(dst, `","clockstate":"`...), state...), `","qos":`...)
	switch {
	case r.Flags&spool.FlagQoS2 != 0:
		dst = append(dst, '2')
	case r.Flags&spool.FlagQoS1 != 0:
		dst = append(dst, '1')
	default:
		dst = append(dst, '0')
	}
	for _, f := range [...]struct {
		flag spool.Flags
		text string
	}{{spool.FlagRetain, `,"retain":true`}, {spool.FlagDup, `,"dup":true`}, {spool.FlagWill, `,"will":true`}} {
		if r.Flags&f.flag != 0 {
			dst = append(dst, f.text...)
		}
	}
	if r.Props != nil {
		dst = appendProps(dst, r.Props)
	}
	if p := e.Parked; p != nil {
		dst = appendText(append(dst, `,"parked_by":`...), p.Upstream)
		dst = time.UnixMilli(p.AtMS).UTC().AppendFormat(append(dst, `,"parked_at":"`...), "2006-01-02T15:04:05.000Z07:00")
		dst = appendText(append(dst, `","reason":`...), p.Reason)
	}
	switch {
	case isDocument(r.Payload):
		dst = append(append(dst, `,"payload_json":`...), r.Payload...)
	case isText(r.Payload):
		dst = appendText(append(dst, `,"payload":`...), r.Payload)
	default:
		dst = base64.StdEncoding.AppendEncode(append(dst, `,"payload_base64":"`...), r.Payload)
		dst = append(dst, '"')
	}
	return append(dst, '}', '\n')
}

func appendProps(dst []byte, p *spool.Props) []byte {
	text := func(name, v string) {
		if v != "" {
			dst = appendText(append(append(append(dst, `,"`...), name...), `":`...), v)
		}
	}
	text("content_type", p.ContentType)
	text("response_topic", p.ResponseTopic)
	if len(p.Correlation) > 0 {
		dst = base64.StdEncoding.AppendEncode(append(dst, `,"correlation_base64":"`...), p.Correlation)
		dst = append(dst, '"')
	}
	if len(p.User) > 0 {
		dst = append(dst, `,"user_properties":[`...)
		for i, u := range p.User {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendText(append(dst, '['), u[0])
			dst = append(appendText(append(dst, ','), u[1]), ']')
		}
		dst = append(dst, ']')
	}
	if p.Expiry > 0 {
		dst = strconv.AppendUint(append(dst, `,"expiry_s":`...), uint64(p.Expiry), 10)
	}
	return dst
}

// appendText appends s as a JSON string.
func appendText[T string | []byte](dst []byte, s T) []byte {
	dst = append(dst, '"')
	from := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			// U+2028 and U+2029 end a line for some readers.
			if r, n := utf8.DecodeRuneInString(string(s[i:min(len(s), i+utf8.UTFMax)])); (r != utf8.RuneError || n > 1) && r != 0x2028 && r != 0x2029 {
				i += n
				continue
			}
		}
		dst = append(dst, s[from:i]...)
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
			i++
		case c == '\n':
			dst = append(dst, '\\', 'n')
			i++
		case c == '\t':
			dst = append(dst, '\\', 't')
			i++
		case c == '\r':
			dst = append(dst, '\\', 'r')
			i++
		case c < ' ':
			dst = fmt.Appendf(dst, `\u%04x`, c)
			i++
		default:
			r, n := utf8.DecodeRuneInString(string(s[i:min(len(s), i+utf8.UTFMax)]))
			dst = fmt.Appendf(dst, `\u%04x`, r)
			i += n
		}
		from = i
	}
	return append(append(dst, s[from:]...), '"')
}

// isDocument tells whether b can stand in a line of JSON as it is, and is more than a number or a word.
func isDocument(b []byte) bool {
	return len(b) > 1 && (b[0] == '{' || b[0] == '[') && bytes.IndexByte(b, '\n') < 0 && bytes.IndexByte(b, '\r') < 0 && utf8.Valid(b) && json.Valid(b)
}

// ExportEnd is the last line of an export over the API: {"end":{…}}. Without it the export is not whole.
type ExportEnd struct {
	Messages uint64         `json:"messages"`
	Bytes    uint64         `json:"payload_bytes"`
	Damaged  []spool.Damage `json:"damaged"`
}

// exportLane is GET /lanes/{lane}/export.
func (s *Server) exportLane(c *call) error {
	lane, device := c.path("lane"), c.query.Get("device")
	var sel spool.Selection
	var err error
	if sel.From, err = c.sequence("from"); err != nil {
		return err
	}
	if sel.To, err = c.sequence("to"); err != nil {
		return err
	}
	if v := c.query.Get("since"); v != "" {
		at, err := time.Parse(time.RFC3339, v)
		if err != nil {
			return failf(codeBadQuery, "query: since has to be a time such as 2026-03-01T06:00:00Z")
		}
		sel.SinceMS = at.UnixMilli()
	}
	parked, err := c.boolean("parked")
	if err != nil {
		return err
	}
	progress, err := c.boolean("progress")
	if err != nil {
		return err
	}
	rate, err := c.sequence("bytes_per_second")
	if err != nil {
		return err
	}
	known := false
	for _, l := range s.p.Lanes.Lanes() {
		known = known || l.Name == lane
	}
	if !known {
		return fmt.Errorf("export lane %q: %w", lane, spool.ErrNoLane)
	}
	if !take(s.exports) {
		return failf(codeTooManyStreams, "%d exports are under way already: wait until one has ended", maxExports)
	}
	defer give(s.exports)
	b, err := s.bulk(c, "application/x-ndjson", int64(min(rate, 1<<40)))
	if err != nil {
		return err
	}
	defer b.end()
	if c.r.Method == http.MethodHead {
		return nil
	}
	x := &export{b: b, w: bufio.NewWriterSize(b, 64<<10), device: device, told: time.Now(), progress: progress != nil && *progress}
	x.e.Gateway, x.e.Lane = s.cfg.Gateway, lane
	if parked != nil && *parked {
		err = s.exportParked(x, sel)
	} else {
		err = s.p.Lanes.Walk(lane, sel, func(seq uint64, r *spool.Record) error {
			if x.e.Seq = seq; seq < x.first || seq >= x.end {
				x.e.Epoch, x.first, x.end = s.p.Lanes.EpochOf(lane, seq)
			}
			return x.message(r)
		}, func(d spool.Damage) { x.Damaged = append(x.Damaged, d) })
	}
	if err == nil {
		err = x.finish()
	}
	if err != nil {
		b.abort(err)
	}
	return nil
}

func (s *Server) exportParked(x *export, sel spool.Selection) error {
	err := s.p.Lanes.ParkedFrom(x.e.Lane, sel.From, func(m spool.ParkedMessage) error {
		if m.Lane != x.e.Lane || sel.To > 0 && m.Seq > sel.To {
			return errExported
		}
		if m.AtMS < sel.SinceMS {
			return nil
		}
		var r spool.Record
		if _, err := spool.ParseRecord(m.Record, &r); err != nil {
			x.Damaged = append(x.Damaged, spool.Damage{Lane: m.Lane, First: m.Seq, Last: m.Seq, Cause: "parked message: " + err.Error()})
			return nil
		}
		x.e.Seq, x.e.Parked = m.Seq, &m
		x.e.Epoch, _, _ = s.p.Lanes.EpochOf(m.Lane, m.Seq)
		return x.message(&r)
	})
	if errors.Is(err, errExported) {
		return nil
	}
	return err
}

// errExported ends a walk that has seen all that was asked for.
var errExported = errors.New("exported")

// export is one under way.
type export struct {
	ExportEnd
	e          Exporting
	first, end uint64 // sequences of e.Epoch
	b          *bulk
	w          *bufio.Writer
	line       []byte
	device     string
	told       time.Time
	progress   bool
	looked     int
}

func (x *export) message(r *spool.Record) error {
	if x.device != "" && string(r.Device) != x.device {
		return x.passed(len(r.Payload) + len(r.Topic))
	}
	x.Messages++
	x.Bytes += uint64(len(r.Payload))
	x.line = AppendExported(x.line[:0], &x.e, r)
	_, err := x.w.Write(x.line)
	return err
}

// passed counts what was read and is not sent, and now and then tells how far that is.
func (x *export) passed(n int) error {
	if x.looked++; x.looked%256 == 0 {
		if err := x.b.pace(); err != nil {
			return err
		}
		if x.progress && time.Since(x.told) > time.Second {
			x.told = time.Now()
			fmt.Fprintf(x.w, `{"at":%d}`+"\n", x.e.Seq)
			if err := x.w.Flush(); err != nil {
				return err
			}
			_ = x.b.rc.Flush() // the next write tells
		}
	}
	x.b.written += int64(n)
	return nil
}

func (x *export) finish() error {
	if x.Damaged == nil {
		x.Damaged = []spool.Damage{}
	}
	line, err := json.Marshal(struct {
		End *ExportEnd `json:"end"`
	}{&x.ExportEnd})
	if err != nil {
		return err
	}
	_, err = x.w.Write(append(line, '\n'))
	return errors.Join(err, x.w.Flush())
}
