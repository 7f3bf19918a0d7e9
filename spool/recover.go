package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"holdfast/internal/kv"
)

// What Open does when the store has lost something: kv has set damaged files aside by then, and told what of. Rows that are gone are
// put together again from the chunks, and from the mark that each commit left beside the log. Two things must not
// happen: that messages are missing without a word, and that their sequences are given to others.

// markState is what each commit notes beside the log: the epoch, and each lane's name, end and begin.
//
//	| version 1 | epoch length | epoch | lanes | for each: number | name length | name | next seq | next bytes | head seq | head bytes |
//	                                            cursors | for each: upstream length | upstream | row length | cursorRow |
//
// All numbers are varints. Written to disk: never renumber, never reuse.
type markState struct {
	epoch string
	lanes []markLane
}

type markLane struct {
	number     byte
	name       string
	next, head Position
	cursors    map[string]cursorRow // by upstream
}

// Mark implements kv.Participant.
func (s *Spool) Mark(dst []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	dst = append(dst, rowV1)
	dst = append(binary.AppendUvarint(dst, uint64(len(s.epoch))), s.epoch...)
	dst = binary.AppendUvarint(dst, uint64(len(s.lanes)))
	for _, l := range s.lanes {
		dst = binary.AppendUvarint(dst, uint64(l.number))
		dst = append(binary.AppendUvarint(dst, uint64(len(l.name))), l.name...)
		for _, n := range [...]uint64{l.durable.Seq, l.durable.Bytes, l.safeHead.Seq, l.safeHead.Bytes} {
			dst = binary.AppendUvarint(dst, n)
		}
		dst = binary.AppendUvarint(dst, uint64(len(l.cursors)))
		for _, c := range l.cursors {
			dst = append(binary.AppendUvarint(dst, uint64(len(c.upstream))), c.upstream...)
			dst = append(binary.AppendUvarint(dst, uint64(len(c.committed))), c.committed...)
		}
	}
	return dst
}

func parseMarkState(b []byte) (m markState, err error) {
	if len(b) == 0 || b[0] != rowV1 {
		return m, fmt.Errorf("mark: %w: no version", ErrCorrupt)
	}
	b = b[1:]
	number := func() (n uint64) {
		if err == nil {
			b, err = parseNumbers(b, "mark", &n)
		}
		return n
	}
	text := func() []byte {
		n := number()
		if err == nil && n > uint64(len(b)) {
			err = fmt.Errorf("mark: %w: too short", ErrCorrupt)
		}
		if err != nil {
			return nil
		}
		t := b[:n]
		b = b[n:]
		return t
	}
	m.epoch = string(text())
	for range min(number(), 256) {
		l := markLane{number: byte(number()), name: string(text()), cursors: map[string]cursorRow{}}
		l.next = Position{number(), number()}
		l.head = Position{number(), number()}
		for range min(number(), 1024) {
			upstream, row := string(text()), cursorRow{}
			if raw := text(); len(raw) > 0 && row.parse(raw) == nil {
				l.cursors[upstream] = row
			}
		}
		m.lanes = append(m.lanes, l)
	}
	return m, err
}

// lane returns what the mark has of a lane, nil if nothing.
func (m *markState) lane(number byte) *markLane {
	for i := range m.lanes {
		if m.lanes[i].number == number {
			return &m.lanes[i]
		}
	}
	return nil
}

// readMark is part of Open. A mark of another spool says nothing here.
func (s *Spool) readMark() {
	s.damaged = len(s.store.Damage()) > 0
	b := s.store.Marked()
	if b == nil {
		s.markLost = s.store.MarkLost() || s.damaged
		return
	}
	m, err := parseMarkState(b)
	if err != nil {
		s.markLost, s.damaged = true, true
		return
	}
	s.marked = &m
}

// openEpoch reads the spool's id, or makes one. If the row is lost, the mark has it.
func (s *Spool) openEpoch() error {
	v, found, err := s.store.Get(keyEpoch)
	if err != nil {
		return err
	}
	if _, bad := uuid.Parse(string(v)); found && bad == nil {
		s.epoch = string(v)
		if s.marked != nil && s.marked.epoch != s.epoch {
			s.marked = nil
		}
		return nil
	}
	if s.marked != nil {
		s.damaged = true
		s.epoch = s.marked.epoch
		s.cfg.Log.Warn("row of the epoch was lost, the mark beside the log has it", "epoch", s.epoch)
	} else {
		id, err := uuid.NewV7()
		if err != nil {
			return fmt.Errorf("make epoch: %w", err)
		}
		s.epoch = id.String()
		if found || s.damaged {
			s.cfg.Log.Error("row of the epoch is lost: messages get new ids", "epoch", s.epoch)
		}
	}
	return s.store.ApplyWait([]kv.Op{{Key: keyEpoch, Value: []byte(s.epoch)}})
}

// laneNumbers reads the lanes' numbers, and gives the rows that are to be written for those that were lost. Those whose rows are lost come from the mark; numbers of which there are only
// chunks go to the configured lanes that have none, in their order, which is how they were given.
func (s *Spool) laneNumbers() (numbers map[string]byte, rows []kv.Op, err error) {
	numbers = map[string]byte{}
	err = s.store.Scan(prefixLaneNum, func(k, v []byte) error {
		if name := string(k[len(prefixLaneNum):]); len(v) == 1 {
			numbers[name] = v[0]
		} else {
			s.damaged = true
			s.cfg.Log.Error("row of a lane's number is damaged", "lane", name)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	had := maps.Clone(numbers)
	if s.marked != nil {
		for _, l := range s.marked.lanes {
			if _, ok := numbers[l.name]; !ok && l.name != "" && !slices.Contains(slices.Collect(maps.Values(numbers)), l.number) {
				s.damaged = true
				s.cfg.Log.Warn("row of a lane's number was lost, the mark beside the log has it", "lane", l.name)
				numbers[l.name] = l.number
			}
		}
	}
	if s.damaged {
		if _, ok := numbers[SystemLane]; !ok {
			numbers[SystemLane] = systemNumber
		}
		if err := s.nameOrphans(numbers); err != nil {
			return nil, nil, err
		}
	}
	for name, number := range numbers {
		if _, ok := had[name]; !ok {
			rows = append(rows, kv.Op{Key: append(slices.Clone(prefixLaneNum), name...), Value: []byte{number}})
		}
	}
	return numbers, rows, nil
}

// nameOrphans gives a name to each number under which there are chunks, and which no lane has.
func (s *Spool) nameOrphans(numbers map[string]byte) error {
	taken := slices.Collect(maps.Values(numbers))
	var without []string
	for _, c := range s.cfg.Lanes {
		if _, ok := numbers[c.Name]; !ok {
			without = append(without, c.Name)
		}
	}
	it, err := s.store.Iter([]byte{kv.PrefixData}, kv.PrefixEnd([]byte{kv.PrefixData}))
	if err != nil {
		return err
	}
	defer it.Close()
	for n := 0; n < 256; n++ {
		if !it.SeekGE([]byte{kv.PrefixData, byte(n)}) {
			if err := it.Error(); err == nil {
				break
			} else if !kv.IsDamage(err) {
				return err
			}
			continue // its first block is damaged; a lane that has a name is found all the same
		}
		n = int(it.Key()[1])
		if slices.Contains(taken, byte(n)) {
			continue
		}
		name := fmt.Sprintf("lane-%d", n)
		if len(without) > 0 {
			name, without = without[0], without[1:]
		}
		s.cfg.Log.Warn("row of a lane's number was lost", "number", n, "lane", name)
		numbers[name] = byte(n)
	}
	return nil
}

// newNumber is one that no lane has.
func newNumber(numbers map[string]byte) byte {
	taken := slices.Collect(maps.Values(numbers))
	for n := range 256 {
		if !slices.Contains(taken, byte(n)) {
			return byte(n)
		}
	}
	panic("spool: more lanes than numbers") // openLanes has refused before
}

// recoverLane brings a lane's row up to what the mark and the chunks say, if something was lost. found is whether the row was there.
func (s *Spool) recoverLane(l *lane, row *laneRow, found bool) error {
	was := row.Next
	l.rowHead = row.Head
	if s.marked != nil {
		if m := s.marked.lane(l.number); m != nil {
			if m.next.Seq > row.Next.Seq {
				s.damaged = true
				row.Next = m.next
			}
			if m.head.Seq > row.Head.Seq {
				row.Head = m.head
			}
		}
	}
	if !s.damaged && found {
		return nil
	}
	it, err := s.store.Iter(dataBounds(l.number))
	if err != nil {
		return err
	}
	defer it.Close()
	if ok := it.Last(); ok {
		if m, ok := metaAt(it.ValueAndErr()); ok && m.End().Seq > row.Next.Seq {
			row.Next = m.End()
		}
	}
	if err := it.Error(); err != nil && !kv.IsDamage(err) {
		return err
	}
	if !found && row.Head.Seq <= 1 {
		if ok := it.First(); ok {
			if m, ok := metaAt(it.ValueAndErr()); ok {
				row.Head = m.First
			}
		} else if it.Error() == nil {
			row.Head = row.Next
		}
		if row.Head.Seq > 1 {
			// How what was before has ended is lost; what no upstream was there for counts as evicted.
			row.Evicted.add(Position{Seq: 1}, row.Head)
		}
	}
	prefix := keyCursor(l.number, "")
	err = s.store.Scan(prefix, func(_, v []byte) error {
		var c cursorRow
		if c.parse(v) != nil {
			return nil // openCursors tells of it
		}
		ends := []Position{c.Pos}
		if n := len(c.Islands); n > 0 {
			ends = append(ends, c.Islands[n-1].to)
		}
		for _, p := range ends {
			if p.Seq > row.Next.Seq {
				row.Next = p
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if row.Head.Seq > row.Next.Seq {
		row.Next = row.Head
	}
	if row.Next != was {
		l.dirty = true
		s.recovered += row.Next.Seq - was.Seq
		s.cfg.Log.Error("end of the log was lost: messages that were acknowledged are missing", "lane", l.name,
			"first", was.Seq, "last", row.Next.Seq-1, "found", found)
	}
	if !found {
		l.dirty = true
	}
	return nil
}

func metaAt(v []byte, err error) (chunkMeta, bool) {
	if err != nil {
		return chunkMeta{}, false
	}
	m, err := parseChunkMeta(v)
	return m, err == nil
}

// recoverCursors takes the places of upstreams from the mark, where it is further on than the lane's rows: or they are lost. Nothing goes
// back while the gateway works, so further is where more has had its end.
func (s *Spool) recoverCursors(l *lane) {
	var m *markLane
	if s.marked != nil {
		m = s.marked.lane(l.number)
	}
	if m != nil {
		for _, upstream := range slices.Sorted(maps.Keys(m.cursors)) {
			row := m.cursors[upstream]
			c := l.cursor(upstream)
			if c == nil {
				c = &cursor{upstream: upstream, active: s.cfg.Upstreams == nil}
				l.cursors = append(l.cursors, c)
			} else if c.row.through() >= row.through() {
				continue
			}
			s.cfg.Log.Warn("place of an upstream was lost, the mark beside the log has it", "lane", l.name, "upstream", upstream, "sequence", row.Pos.Seq)
			c.row, c.dirty = row, true
		}
	}
	for _, c := range l.cursors {
		// Before the head everything has had its end. Who is not that far, and was when the lane's row was written, has lost that.
		if c.row.Pos.Seq >= l.rowHead.Seq && c.row.Pos.Seq < l.head.Seq {
			s.cfg.Log.Warn("place of an upstream was lost: what had its end counts as delivered", "lane", l.name, "upstream", c.upstream,
				"first", c.row.Pos.Seq, "last", l.head.Seq-1)
			c.resolve(l.head, loss{outcome: Delivered})
		}
		c.restart()
	}
}

// through is how many messages have had their end.
func (r *cursorRow) through() uint64 {
	return r.Delivered.Messages + r.Expired.Messages + r.Evicted.Messages + r.Parked.Messages
}

// epochAfterDamage begins a new epoch if sequences may be given twice: the end of a log was lost, or may have been, and no mark says how far
// it went.
func (s *Spool) epochAfterDamage() error {
	if !s.markLost {
		return nil
	}
	stored := false
	for _, l := range s.lanes {
		stored = stored || l.next.Seq > 1
	}
	if !stored {
		return nil
	}
	s.cfg.Log.Warn("mark of what was committed is lost, too: messages from now on are of a new epoch, so that no id is given twice")
	return s.beginEpoch("damage " + time.Now().UTC().Format(time.RFC3339Nano))
}

// unreadable says whether a row's error is about the row, and not about a newer version of it.
func unreadable(err error) bool { return errors.Is(err, ErrCorrupt) }

// Recovered says how many messages that were acknowledged the store had lost when it was opened, as far as the mark beside the log
// told: readers announce them.
func (s *Spool) Recovered() uint64 { return s.recovered }
