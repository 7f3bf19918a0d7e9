package bridge

import (
	"bytes"
	"fmt"
	"time"
	"unsafe"

	"holdfast/bridge/wire"
	"holdfast/spool"
)

// lane is one lane's way from its reader to the window, or that of its backlog: what was read and not yet cut waits in
// the stage. Only Run's goroutine uses it.
type lane struct {
	Reader
	name    string
	index   int  // in every table
	rank    int  // 0 is the first in priority
	backlog bool // newer messages of the lane go ahead
	urgent  bool // no budget holds it up
	format  string

	// The stage: count records in raw, the first at pos. In the batch format the buffer is reused, else sent
	// payloads are slices of it and it is made anew.
	pos   spool.Position
	raw   []byte
	buf   []byte
	count int
	times spool.Times // of the stage
	since uint64      // the newest's: where the backlog begins that they go ahead of; 0: there is none
	held  spool.Run   // was read, but does not follow the stage without a hole, or has other times
	dry   bool        // nothing to read until the source says so
	left  bool        // the stage is what a cut left over: it has waited long enough

	sentUpTo uint64 // sequences below were sent before
	singleTo uint64 // sequences below are sent one by one
	lastSend time.Duration
	lastAck  time.Duration // of this lane
	linger   time.Duration // how long after lastSend it collects for a batch
	ratio    float64       // bytes of records for a byte sent, in the batch format
	topic    string        // of batches

	epoch                string // of the sequences from epochFirst to before epochEnd
	epochFirst, epochEnd uint64
}

// inEpoch makes epoch that of the stage's first record, and says how many records from there on have the same.
func (b *Bridge) inEpoch(l *lane) uint64 {
	if l.pos.Seq < l.epochFirst || l.pos.Seq >= l.epochEnd {
		l.epoch, l.epochFirst, l.epochEnd = b.epochOf(l.name, l.pos.Seq)
	}
	return l.epochEnd - l.pos.Seq
}

func (l *lane) end() spool.Position {
	return spool.Position{Seq: l.pos.Seq + uint64(l.count), Bytes: l.pos.Bytes + uint64(len(l.raw))}
}

// fill reads until the stage has want bytes or the lane nothing more.
func (l *lane) fill(want int) error {
	for l.count == 0 || l.format == FormatBatch && len(l.raw) < want {
		run := l.held
		if run.Count == 0 {
			if l.dry {
				return nil
			}
			var err error
			if run, err = l.Next(max(want-len(l.raw), 1)); err != nil {
				return fmt.Errorf("read lane %s: %w", l.name, err)
			}
			if run.Count == 0 {
				l.dry = true
				return nil
			}
		}
		if l.count > 0 && (run.Pos != l.end() || !l.times.Same(run.Times)) {
			l.held = run
			return nil
		}
		l.held = spool.Run{}
		if l.count == 0 {
			l.pos, l.times, l.left = run.Pos, run.Times, false
		}
		l.since = run.Behind
		l.count += run.Count
		if l.format != FormatBatch {
			l.raw = bytes.Clone(run.Raw)
			continue
		}
		// Move what is left to the front of the buffer rather than let the buffer grow.
		if need := len(l.raw) + len(run.Raw); need > cap(l.raw) && need <= cap(l.buf) {
			l.raw = append(l.buf[:0], l.raw...)
		}
		l.raw = append(l.raw, run.Raw...)
		if cap(l.raw) > cap(l.buf) {
			l.buf = l.raw[:0]
		}
	}
	return nil
}

// rewind goes back to the cursor.
func (l *lane) rewind() {
	l.Rewind()
	l.raw, l.count, l.held, l.dry = nil, 0, spool.Run{}, false
}

// piece is what is cut from a stage: a send, or records that end without one.
type piece struct {
	flight  flight
	send    bool
	outcome spool.Outcome // if there is no send
	message Message
}

// maxKept is the largest stage whose buffer is kept.
const maxKept = 1 << 20

// verdict on one record.
type verdict int

const (
	toSend  verdict = iota
	tooOld          // its message expiry interval is over
	notOurs         // a word to another upstream, or a replay for it
)

func (b *Bridge) judge(l *lane, r *spool.Record, nowMS int64) verdict {
	if r.Props == nil {
		return toSend
	}
	if r.Props.Expiry > 0 && l.times.Age(r.Received, nowMS) >= int64(r.Props.Expiry)*1000 {
		return tooOld
	}
	if r.Props.Upstream != "" && r.Props.Upstream != b.cfg.Name {
		return notOurs
	}
	return toSend
}

// cut takes the next piece from a stage that is not empty. A batch has at most maxRaw bytes of records, but
// always at least one record.
func (b *Bridge) cut(l *lane, maxRaw int) piece {
	nowMS := b.wall().UnixMilli()
	maxRecords := 1
	if l.format == FormatBatch && l.pos.Seq >= l.singleTo {
		maxRecords = b.cfg.Tuning.BatchRecords
	}
	if l.count > 0 && b.suspicion.convicts(l.index, l.pos.Seq) {
		return b.convict(l)
	}
	if left := b.inEpoch(l); uint64(maxRecords) > left {
		maxRecords = int(left)
	}
	r := &b.record
	size, n := 0, 0
	unsynced := false // one of them was received when nobody vouched for the clock
	for n < l.count && n < maxRecords {
		k, err := spool.ParseRecord(l.raw[size:], r)
		v := toSend
		if err == nil {
			v = b.judge(l, r, nowMS)
		}
		if err == nil && v == toSend && (n == 0 || size+k <= maxRaw) {
			size += k
			n++
			unsynced = unsynced || r.Flags&spool.FlagClockUnsynced != 0
			continue
		}
		if n > 0 {
			break // this one is for the next piece
		}
		switch {
		case err != nil: // its length is not known, so the rest of the stage goes with it
			b.log.Error("record not readable", "upstream", b.cfg.Name, "lane", l.name, "seq", l.pos.Seq, "err", err)
			raw := bytes.Clone(l.raw)
			f := l.take(len(l.raw), l.count)
			f.record, f.reason = raw, fmt.Sprintf("record not readable: %v", err)
			return piece{flight: f, outcome: spool.Parked}
		case v == tooOld:
			return piece{flight: l.take(k, 1), outcome: spool.Expired}
		case l.name == spool.SystemLane: // its sequences travel to nobody
			return piece{flight: l.take(k, 1), outcome: spool.Delivered}
		default:
			return piece{flight: l.take(k, 1), outcome: spool.Elsewhere}
		}
	}
	first, raw := l.pos.Seq, l.raw[:size:size]
	p := piece{flight: l.take(size, n), send: true}
	p.message = Message{Lane: l.name, Seq: first, Count: n}
	m := &p.message
	var correction int64
	corrected := false
	if unsynced {
		correction, corrected = l.times.Correction()
	}
	replayed := l.backlog || first < l.sentUpTo
	behind := l.since
	if behind != 0 {
		behind = min(max(behind, l.epochFirst), first) // sequences of an earlier epoch do not come in this one
	}
	switch l.format {
	case FormatBatch:
		if n == 1 {
			p.flight.record = bytes.Clone(raw) // the stage will be written over
		}
		b.scratch = b.batch.Append(b.scratch[:0], wire.BatchHeader{
			Gateway: b.gateway, Epoch: l.epoch, Lane: l.name, First: first, Count: n, Sent: nowMS, Replayed: replayed,
			Corrected: corrected, Correction: correction, Behind: behind,
		}, raw)
		m.Topic, m.Payload = l.topic, bytes.Clone(b.scratch)
		l.ratio += (float64(size)/float64(len(m.Payload)) - l.ratio) / 8
	case FormatCloudEvents:
		p.flight.record = raw
		event := wireMessage(r)
		if corrected {
			event.Correct(correction)
		}
		var err error
		b.scratch, err = wire.AppendCloudEvent(b.scratch[:0], b.gateway, l.epoch, l.name, first, event, replayed, behind)
		if err != nil {
			p.flight.reason = err.Error()
			return piece{flight: p.flight, outcome: spool.Parked}
		}
		m.Topic, m.Payload = b.deviceTopics.get(r.Device), bytes.Clone(b.scratch)
	default:
		p.flight.record = raw
		m.Payload, m.Retain = r.Payload, r.Flags&spool.FlagRetain != 0
		if l.name == spool.SystemLane {
			m.Topic = b.systemTopics.get(r.Topic)
			if corrected {
				m.Payload = wire.CorrectEvent(m.Payload, correction)
			}
		} else {
			m.Topic = b.topics.get(r.Topic)
		}
	}
	p.flight.size = len(m.Topic) + len(m.Payload)
	return p
}

// take removes n records of size bytes from the front of the stage.
func (l *lane) take(size, n int) flight {
	l.pos.Seq += uint64(n)
	l.pos.Bytes += uint64(size)
	l.raw, l.count, l.left = l.raw[size:], l.count-n, true
	if l.count == 0 && cap(l.buf) > maxKept {
		l.raw, l.buf = nil, nil // there was one huge record: do not keep its room for ever
	}
	return flight{end: l.pos, records: n}
}

// wireMessage is r for wire's encoders. It shares r's memory.
func wireMessage(r *spool.Record) wire.Message {
	m := wire.Message{
		Received: r.Received, Device: view(r.Device), Topic: view(r.Topic), Flags: wire.Flags(r.Flags), Payload: r.Payload,
	}
	if p := r.Props; p != nil {
		m.Props = &wire.Props{
			ContentType: p.ContentType, ResponseTopic: p.ResponseTopic, Correlation: p.Correlation, User: p.User,
			Expiry: p.Expiry, Upstream: p.Upstream,
		}
		if p.UTF8 {
			m.Props.Format = 1
		}
	}
	return m
}

// view is b as a string without a copy, for as long as b is not written to.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// topics makes topics of what stands in records, and remembers them: devices use few, again and again.
type topics struct {
	make func(string) string
	seen map[string]string
}

const maxTopics = 4096

func newTopics(f func(string) string) topics { return topics{make: f, seen: map[string]string{}} }

func (t *topics) get(b []byte) string {
	if s, ok := t.seen[string(b)]; ok {
		return s
	}
	if len(t.seen) >= maxTopics {
		clear(t.seen)
	}
	key := string(b)
	t.seen[key] = t.make(key)
	return t.seen[key]
}
