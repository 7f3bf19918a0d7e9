package clock

import "time"

// source is a Source whose two clocks of the process are read together.
type source struct {
	read   func() (wallMS int64, elapsed time.Duration)
	boot   func() (id string, since time.Duration)
	synced func() bool
}

// reader fills in the system's clocks.
func (s Source) reader() source {
	begin := time.Now()
	r := source{boot: s.Boot, synced: s.Synced}
	switch {
	case s.Now == nil && s.Elapsed == nil:
		r.read = func() (int64, time.Duration) { // one reading holds both
			now := time.Now()
			return now.UnixMilli(), now.Sub(begin)
		}
	case s.Elapsed == nil:
		r.read = func() (int64, time.Duration) { return s.Now().UnixMilli(), time.Since(begin) }
	case s.Now == nil:
		r.read = func() (int64, time.Duration) { return time.Now().UnixMilli(), s.Elapsed() }
	default:
		r.read = func() (int64, time.Duration) { return s.Now().UnixMilli(), s.Elapsed() }
	}
	if r.boot == nil {
		r.boot = systemBoot
	}
	if r.synced == nil {
		r.synced = kernelSynced
	}
	return r
}
