package spool

import (
	"time"

	"holdfast/internal/clock"
)

// Times is what is known of the time of a run's records beside what each says itself. The zero value knows nothing.
type Times struct {
	clock   *clock.Clock
	boot    uint32 // 0: not known
	booted  int64
	service int64 // added to a record's Received: the service clock at that moment
}

// times is what a chunk's header says of its records.
func (s *Spool) times(m *chunkMeta) Times {
	return Times{clock: s.clock, boot: m.Boot, booted: m.Booted, service: s.service(m) - m.Newest}
}

// service is the service clock at the newest record of a chunk. A chunk of before there was one is as old as the
// clock's knowledge: rather too young than too old.
func (s *Spool) service(m *chunkMeta) int64 {
	if m.Service == 0 {
		return s.clock.First()
	}
	return m.Service
}

// Time is the wall time as far as the gateway believes it; see clock.Clock.Time.
func (s *Spool) Time() time.Time { return s.clock.Time() }

// sameTime is the difference, ms, up to which two runs' times on the service clock are the same: one is as good as the other
// where a second counts.
const sameTime = 500

// Same says whether t may stand for o, too.
func (t Times) Same(o Times) bool {
	d := t.service - o.service
	return t.clock == o.clock && t.boot == o.boot && t.booted == o.booted && d <= sameTime && d >= -sameTime
}

// Age is for how many ms a record that was received at received has been here, whatever the wall clock did meanwhile. wallMS is that
// now, Unix ms: where nothing else is known it has to do.
func (t Times) Age(received, wallMS int64) int64 {
	if t.clock == nil {
		return wallMS - received
	}
	return t.clock.Between(received+t.service, t.clock.Read().T)
}

// Correction is what has to be added to the receive time of a record with FlagClockUnsynced so that it is right. known is
// false as long as nobody vouches for a clock of the boot in which it was received.
func (t Times) Correction() (ms int64, known bool) {
	if t.clock == nil || t.boot == 0 {
		return 0, false
	}
	return t.clock.Correction(t.boot, t.booted)
}

// correct puts the receive time of r right, if it was wrong and that is known.
func (t Times) correct(r *Record) {
	if r.Flags&FlagClockUnsynced == 0 {
		return
	}
	if ms, known := t.Correction(); known {
		r.Received += ms
		r.Flags &^= FlagClockUnsynced
	}
}

// wall is a receive time of a chunk as it is known to have been by now.
func (s *Spool) wall(m *chunkMeta, ms int64) int64 {
	if d, known := s.times(m).Correction(); known {
		return ms + d
	}
	return ms
}

// sawTimes tells the clock how late it was when each lane's last chunk was written, should its own row be older, or lost.
func (s *Spool) sawTimes() error {
	for _, l := range s.lanes {
		it, err := s.store.Iter(dataBounds(l.number))
		if err != nil {
			return err
		}
		if it.Last() {
			if v, err := it.ValueAndErr(); err == nil { // else it is the reader's to report
				if m, err := parseChunkMeta(v); err == nil {
					s.clock.Saw(m.Service)
				}
			}
		}
		_ = it.Close() // likewise
	}
	return nil
}
