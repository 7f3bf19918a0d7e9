package bridge_test

import (
	"fmt"
	"sync"

	"holdfast/bridge"
	"holdfast/spool"
)

// source is a spool in memory that watches how it is used: cursors only move forward, and only
// over what was read.
type source struct {
	ready chan struct{}
	lanes []*laneFake
	fail  func(format string, args ...any)
	// onResolve is told of each record that counts as delivered; nil: nobody is. Set before the source is used.
	onResolve func(lane string, number int)

	mu     sync.Mutex
	closed bool
}

type laneFake struct {
	s     *source
	name  string
	share int

	// guarded by s.mu
	records  []rec // all that ever were in the lane; the sequence of records[i] is i+1
	read     int
	cursor   int
	outcomes []spool.Outcome // of records[:cursor]
	parked   map[uint64]string
	kept     map[uint64][]byte // the records that were parked
	maxRun   int               // records in a run at most; 0: no limit
	nextErr  error
	parkErr  error
}

type rec struct {
	raw []byte
	pos spool.Position
}

func newSource(fail func(string, ...any), lanes ...string) *source {
	s := &source{ready: make(chan struct{}, 1), fail: fail}
	shares := map[string]int{"alarm": 50, "telemetry": 40, "bulk": 10}
	for _, name := range append([]string{spool.SystemLane}, lanes...) {
		s.lanes = append(s.lanes, &laneFake{s: s, name: name, share: shares[name], parked: map[uint64]string{}, kept: map[uint64][]byte{}})
	}
	return s
}

func (s *source) lane(name string) *laneFake {
	for _, l := range s.lanes {
		if l.name == name {
			return l
		}
	}
	panic("no lane " + name)
}

// add commits records to a lane.
func (s *source) add(lane string, rs ...spool.Record) { s.addEvicted(lane, 0, rs...) }

// addEvicted adds records of which all up to the one at to are gone before anybody has read them.
func (s *source) addEvicted(lane string, to int, rs ...spool.Record) {
	l := s.lane(lane)
	s.mu.Lock()
	for i := range rs {
		pos := spool.Position{Seq: 1}
		if n := len(l.records); n > 0 {
			last := l.records[n-1]
			pos = spool.Position{Seq: last.pos.Seq + 1, Bytes: last.pos.Bytes + uint64(len(last.raw))}
		}
		l.records = append(l.records, rec{spool.AppendRecord(nil, &rs[i]), pos})
	}
	l.evictLocked(to)
	s.mu.Unlock()
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *source) Ready() <-chan struct{} { return s.ready }

func (s *source) Readers() []bridge.Reader {
	var rs []bridge.Reader
	for _, l := range s.lanes {
		rs = append(rs, l)
	}
	return rs
}

func (s *source) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

// cursor is how many records of the lane have an outcome.
func (s *source) cursor(lane string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lane(lane).cursor
}

// outcomes is how many records of the lane ended as what.
func (s *source) outcomes(lane string) map[spool.Outcome]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := map[spool.Outcome]int{}
	for _, o := range s.lane(lane).outcomes {
		n[o]++
	}
	return n
}

func (l *laneFake) Lane() string { return l.name }
func (l *laneFake) Share() int   { return l.share }
func (*laneFake) Backfill() int  { return 0 }
func (l *laneFake) Urgent() bool { return l.name == "urgent" || l.name == spool.SystemLane }

func (l *laneFake) Next(maxBytes int) (spool.Run, error) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.nextErr != nil {
		return spool.Run{}, l.nextErr
	}
	l.read = max(l.read, l.cursor)
	if maxBytes <= 0 {
		l.s.fail("Next(%d)", maxBytes)
	}
	var run spool.Run
	for l.read < len(l.records) && (l.maxRun == 0 || run.Count < l.maxRun) {
		r := l.records[l.read]
		if run.Count > 0 && len(run.Raw)+len(r.raw) > maxBytes {
			break
		}
		if run.Count == 0 {
			run.Pos = r.pos
		}
		run.Raw = append(run.Raw, r.raw...)
		run.Count++
		l.read++
	}
	return run, nil
}

func (l *laneFake) Rewind() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.read = l.cursor
}

func (l *laneFake) Resolve(end spool.Position, o spool.Outcome) {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.resolve(end, o)
}

func (l *laneFake) resolve(end spool.Position, o spool.Outcome) {
	to := int(end.Seq) - 1
	if to <= l.cursor {
		return // evicted meanwhile
	}
	if to > l.read {
		l.s.fail("lane %s resolved up to %d, read only up to %d", l.name, to, l.read)
		return
	}
	if last := l.records[to-1]; end.Bytes != last.pos.Bytes+uint64(len(last.raw)) {
		l.s.fail("lane %s resolved up to %+v, which is not the end of record %d", l.name, end, to)
	}
	for l.cursor < to {
		l.cursor++
		l.outcomes = append(l.outcomes, o)
		if l.s.onResolve != nil && o == spool.Delivered {
			l.s.onResolve(l.name, l.cursor)
		}
	}
}

func (l *laneFake) Park(end spool.Position, record []byte, reason string) error {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.parkErr != nil {
		return l.parkErr
	}
	l.resolve(end, spool.Parked)
	l.parked[end.Seq-1] = reason
	l.kept[end.Seq-1] = record
	return nil
}

// evict drops the oldest records of a lane up to to, as a rule would.
func (s *source) evict(lane string, to int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lane(lane).evictLocked(to)
}

func (l *laneFake) evictLocked(to int) {
	for l.cursor < to {
		l.cursor++
		l.outcomes = append(l.outcomes, spool.Evicted)
	}
}

// message makes a record as a device would.
func message(device, topic, payload string) spool.Record {
	return spool.Record{Received: 1_700_000_000_000, Device: []byte(device), Topic: []byte(topic), Flags: spool.FlagQoS1, Payload: []byte(payload)}
}

func numbered(device string, from, to int) []spool.Record {
	var rs []spool.Record
	for i := from; i <= to; i++ {
		rs = append(rs, message(device, "dt/"+device, fmt.Sprintf("%s-%06d", device, i)))
	}
	return rs
}
