package devices

import (
	"encoding/binary"
	"fmt"
	"unique"

	"holdfast/internal/kv"
)

// Keys of commands. seq is 8 bytes, big-endian: key order is the order in which they were submitted.
//
//	'c' 0                    where format 1 kept the clock: see internal/clock
//	'c' 1 seq                what a command carries, commandBody; written once
//	'c' 2 seq                a command that has no end yet, commandRow; written at each step
//	'c' 3 seq                the same of one that has ended
//	'c' 4 id                 seq: which command has that id
//	'c' 5 len device seq     nothing: the commands of a device
//
// Values but those of 4 and 5 are rows, see rowV1.
// Written to disk: never renumber, never reuse.
const (
	commandKindBody   = 1
	commandKindOpen   = 2
	commandKindEnded  = 3
	commandKindID     = 4
	commandKindDevice = 5
)

// clockLimit is a time, ms, beyond which no row has one.
const clockLimit = 1000 * 366 * 86400000

const commandSeqKeyLen = 10

func commandKey(kind byte, seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kv.PrefixCommand, kind}, seq)
}

func commandIDKey(id string) []byte { return append([]byte{kv.PrefixCommand, commandKindID}, id...) }

func commandDevicePrefix(device string) []byte {
	return append([]byte{kv.PrefixCommand, commandKindDevice, byte(len(device))}, device...)
}

func commandDeviceKey(device string, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(commandDevicePrefix(device), seq)
}

// commandSeq returns the sequence at a key's end.
func commandSeq(key []byte) (uint64, bool) {
	if len(key) < commandSeqKeyLen {
		return 0, false
	}
	return binary.BigEndian.Uint64(key[len(key)-8:]), true
}

// commandBody is what a command carries.
type commandBody struct {
	Payload []byte `cbor:"1,keyasint,omitempty"`
}

// commandRow is a command without its payload. Times are ms: wall in Unix time, t on the service clock.
type commandRow struct {
	Device       string `cbor:"1,keyasint"`
	ID           string `cbor:"2,keyasint"`
	Name         string `cbor:"3,keyasint"`
	Hash         []byte `cbor:"4,keyasint"` // of what was asked for, see requestHash
	ContentType  string `cbor:"5,keyasint,omitempty"`
	SupersedeKey string `cbor:"6,keyasint,omitempty"`
	Source       string `cbor:"7,keyasint,omitempty"`
	Upstream     string `cbor:"8,keyasint,omitempty"`
	Feedback     uint8  `cbor:"9,keyasint,omitempty"` // index in feedbackLevels
	OneWay       bool   `cbor:"10,keyasint,omitempty"`
	Urgent       bool   `cbor:"11,keyasint,omitempty"`
	Created      int64  `cbor:"12,keyasint"` // wall
	CreatedT     int64  `cbor:"13,keyasint"`
	TTL          int64  `cbor:"14,keyasint"`
	Delay        int64  `cbor:"15,keyasint,omitempty"` // from CreatedT, before which it is not sent
	Execution    int64  `cbor:"16,keyasint"`
	MaxAttempts  int32  `cbor:"17,keyasint"`

	State      State           `cbor:"20,keyasint"`
	Late       bool            `cbor:"21,keyasint,omitempty"`
	Attempts   int32           `cbor:"22,keyasint,omitempty"`
	Reason     string          `cbor:"23,keyasint,omitempty"`
	Updated    int64           `cbor:"24,keyasint"` // wall
	UpdatedT   int64           `cbor:"25,keyasint"`
	SentT      int64           `cbor:"26,keyasint,omitempty"`
	DeliveredT int64           `cbor:"27,keyasint,omitempty"`
	PacketID   uint16          `cbor:"28,keyasint,omitempty"`
	Progress   *commandPercent `cbor:"29,keyasint,omitempty"`
	Result     []byte          `cbor:"30,keyasint,omitempty"`
	ResultType string          `cbor:"31,keyasint,omitempty"`
	Steps      []commandStep   `cbor:"32,keyasint,omitempty"`
}

// commandPercent is a stored Progress.
type commandPercent struct {
	_       struct{} `cbor:",toarray"`
	Percent int8
	Text    string
}

// commandStep is a stored Step.
type commandStep struct {
	_      struct{} `cbor:",toarray"`
	State  State
	At     int64 // wall
	Reason string
}

// feedbackLevels by the number under which they are stored.
// Written to disk: never renumber, never reuse.
var feedbackLevels = [...]Feedback{0: FeedbackFull, 1: FeedbackNone, 2: FeedbackNegative, 3: FeedbackPositive}

// parseCommandRow decodes and checks the row of a command.
func parseCommandRow(b []byte) (*commandRow, error) {
	r := new(commandRow)
	if err := decodeRow(b, r); err != nil {
		return nil, err
	}
	bad := ""
	switch {
	case r.Device == "" || len(r.Device) > 255:
		bad = "device"
	case !validCommandID(r.ID):
		bad = "id"
	case checkCommandName(r.Name) != "":
		bad = "name"
	case len(r.Hash) != len(commandHash{}):
		bad = "hash"
	case int(r.Feedback) >= len(feedbackLevels):
		bad = "feedback"
	case r.State == 0 || int(r.State) >= len(stateNames):
		bad = "state"
	case r.Attempts < 0 || r.MaxAttempts < 1:
		bad = "attempts"
	case r.Progress != nil && (r.Progress.Percent < -1 || r.Progress.Percent > 100):
		bad = "progress"
	}
	for _, ms := range [...]int64{r.Created, r.CreatedT, r.TTL, r.Delay, r.Execution, r.Updated, r.UpdatedT, r.SentT, r.DeliveredT} {
		if ms < -clockLimit || ms > clockLimit {
			bad = "time"
		}
	}
	for _, s := range r.Steps {
		if s.At < -clockLimit || s.At > clockLimit {
			bad = "time of a step"
		}
	}
	if bad != "" {
		return nil, fmt.Errorf("%w: its %s cannot be", errDamaged, bad)
	}
	return r, nil
}

// commandRowState reads no more of a row than the command's state, which costs a tenth of decoding it; 0: decode it. It
// wants what encodeRow writes: keys in their order, lengths ahead, nothing nested before the state.
func commandRowState(b []byte) State {
	if len(b) < 2 || b[0] != rowV1 || b[1]>>5 != 5 {
		return 0
	}
	_, b, ok := cborHead(b[1:])
	for ok && len(b) > 0 {
		key, kind := uint64(0), b[0]>>5
		key, b, ok = cborHead(b)
		if !ok || kind != 0 || key > 20 || len(b) == 0 {
			return 0
		}
		kind = b[0] >> 5
		n := uint64(0)
		if n, b, ok = cborHead(b); !ok {
			return 0
		}
		switch {
		case key == 20 && kind == 0 && n < uint64(len(stateNames)):
			return State(n)
		case key == 20 || kind == 4 || kind == 5:
			return 0
		case kind == 2 || kind == 3: // bytes, text
			if n > uint64(len(b)) {
				return 0
			}
			b = b[n:]
		}
	}
	return 0
}

// cborHead reads the head of a data item (RFC 8949 §3): its number, or how long it is, and what follows.
func cborHead(b []byte) (n uint64, rest []byte, ok bool) {
	low := b[0] & 31
	if low < 24 {
		return uint64(low), b[1:], true
	}
	size := 1 << (low - 24) // 1, 2, 4, 8
	if low > 27 || len(b) <= size {
		return 0, nil, false
	}
	for _, c := range b[1 : 1+size] {
		n = n<<8 | uint64(c)
	}
	return n, b[1+size:], true
}

// row is how p with the state s is stored.
func (p *queuedCommand) row(s *commandState) *commandRow {
	o := p.opts.Value()
	r := &commandRow{
		Device: p.dev.name, ID: p.id, Name: o.name, Hash: p.hash[:],
		ContentType: o.contentType, SupersedeKey: o.supersedeKey, Source: o.source, Upstream: o.upstream,
		Feedback: o.feedback, OneWay: o.oneWay, Urgent: o.urgent,
		Created: p.created, CreatedT: p.createdT, TTL: o.ttl, Delay: p.delay, Execution: o.execution, MaxAttempts: o.maxAttempts,
		State: s.state, Late: s.late, Attempts: s.attempts, Reason: s.reason, Updated: s.updated, UpdatedT: s.updatedT,
		SentT: s.sentT, DeliveredT: s.deliveredT, PacketID: s.packetID, Steps: s.steps,
	}
	if s.progress != nil {
		r.Progress = &commandPercent{Percent: int8(s.progress.Percent), Text: s.progress.Text}
	}
	if s.result != nil {
		r.Result, r.ResultType = s.result.payload, s.result.contentType
	}
	return r
}

// load makes of a row what memory holds of a command of d.
func (r *commandRow) load(seq uint64, d *queueDevice) (*queuedCommand, *commandState) {
	p := &queuedCommand{
		seq: seq, id: r.ID, dev: d, created: r.Created, createdT: r.CreatedT, delay: r.Delay,
		oneWay: r.OneWay, urgent: r.Urgent, timer: -1,
		opts: unique.Make(commandOptions{
			name: r.Name, contentType: r.ContentType, supersedeKey: r.SupersedeKey, source: r.Source, upstream: r.Upstream,
			feedback: r.Feedback, oneWay: r.OneWay, urgent: r.Urgent, ttl: r.TTL, execution: r.Execution, maxAttempts: r.MaxAttempts,
		}),
	}
	copy(p.hash[:], r.Hash)
	s := &commandState{
		state: r.State, late: r.Late, attempts: r.Attempts, reason: r.Reason, updated: r.Updated, updatedT: r.UpdatedT,
		sentT: r.SentT, deliveredT: r.DeliveredT, packetID: r.PacketID, steps: r.Steps,
	}
	if r.Progress != nil {
		s.progress = &Progress{Percent: int(r.Progress.Percent), Text: r.Progress.Text}
	}
	if len(r.Result) > 0 {
		s.result = &commandResult{payload: r.Result, contentType: r.ResultType}
	}
	p.packetID.Store(uint32(r.PacketID))
	p.work, p.shown = s, s
	return p, s
}
