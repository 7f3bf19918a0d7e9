package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// FormatVersion is the version of everything below the key prefixes. A store written by a newer
// holdfast is refused, never treated as damaged; an older one is upgraded when it is opened.
// 2: chunks and the broker's rows tell their time by the service clock.
// Written to disk: never renumber, never reuse.
const FormatVersion = 2

var formatKey = []byte{PrefixMeta, 'f', 'o', 'r', 'm', 'a', 't'}

// ErrVersion is returned by Open for a store that a newer holdfast has written.
var ErrVersion = fmt.Errorf("store was written by a newer holdfast (this one reads format %d): install that version or point gateway.data_dir elsewhere", FormatVersion)

func (s *Store) checkFormat() error {
	v, found, err := s.Get(formatKey)
	if err != nil {
		return err
	}
	found = found && len(v) == 4 // another length is damage: no version had one
	switch {
	case found && binary.BigEndian.Uint32(v) > FormatVersion:
		return ErrVersion
	case found && binary.BigEndian.Uint32(v) == FormatVersion, s.opt.Look:
		return nil
	case found:
		// Whatever is written from now on may be of this version, and an older holdfast must not take it for damage. What is there is
		// read as it is, and goes as it ages.
		s.opt.Log.Info("store upgraded: an older holdfast refuses it from now on", "from", binary.BigEndian.Uint32(v), "to", FormatVersion)
	}
	return s.db.Set(formatKey, binary.BigEndian.AppendUint32(nil, FormatVersion), pebble.Sync)
}

const (
	memTableMax = 8 << 20
	memTableMin = 1 << 20
)

// pebbleOptions are for a queue on a small box. Rows leave in the order in which they came, so
// caches, filters and compactions have nothing to win, and memory is the scarce thing.
// On a small file system memtables are smaller, and with them the logs.
func (s *Store) pebbleOptions(dir string, tables *pebble.FileCache) *pebble.Options {
	log := pebbleLogger{s}
	o := &pebble.Options{
		FS: &diskFS{FS: s.opt.FS, s: s, dir: dir},
		// Named, not newest by default: 20 and later detect damage in the middle of the log, which
		// older ones skip in silence with all that follows it.
		FormatMajorVersion:          pebble.FormatNewest,
		CacheSize:                   1 << 20,
		MemTableSize:                s.guard.memTable(),
		MemTableStopWritesThreshold: 3,
		FileCache:                   tables,
		MaxManifestFileSize:         int64(s.guard.memTable() / 2),
		// One table a lane and flush, moved down as it is: chunks are never rewritten.
		L0CompactionThreshold:     2,
		L0CompactionFileThreshold: 4000,
		L0StopWritesThreshold:     64,
		FlushSplitBytes:           1 << 40,
		// They would open every table of a backlog after each start, to plan compactions that a queue does not need.
		DisableTableStats: true,
		CompactionConcurrencyRange: func() (lower, upper int) {
			return 1, 1
		},
		Logger:        log,
		EventListener: s.events(log, dir),
	}
	o.TargetFileSizes[0] = 16 << 20
	o.Experimental.SpanPolicyFunc = cutTables
	// Chunks are compressed before they come here, so that the log shrinks as well.
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionNone })
	return o
}

// cutTables ends a table where a lane's chunks end, or what is parked of it: tables of different lanes never overlap, so
// none is rewritten for another's sake, and a lane's oldest tables can be dropped whole.
func cutTables(start []byte) (pebble.SpanPolicy, []byte, error) {
	for _, prefix := range []byte{PrefixData, PrefixParked} {
		switch {
		case len(start) == 0 || start[0] < prefix:
			return pebble.SpanPolicy{}, []byte{prefix}, nil
		case start[0] > prefix:
			continue
		case len(start) == 1:
			return pebble.SpanPolicy{}, []byte{prefix, 0}, nil
		case start[1] == math.MaxUint8:
			return pebble.SpanPolicy{}, []byte{prefix + 1}, nil
		default:
			return pebble.SpanPolicy{}, []byte{prefix, start[1] + 1}, nil
		}
	}
	return pebble.SpanPolicy{}, nil, nil
}

func (s *Store) events(log pebbleLogger, dir string) *pebble.EventListener {
	l := s.opt.Log
	e := &pebble.EventListener{
		WALCreated: func(i pebble.WALCreateInfo) {
			if i.Err == nil {
				s.memtable.Add(1) // a new log goes with each new memtable
			}
		},
		ManifestCreated: func(i pebble.ManifestCreateInfo) {
			if i.Err == nil {
				s.manifest.made(uint64(i.FileNum))
			}
		},
		FlushEnd: func(i pebble.FlushInfo) {
			if i.Err == nil && !i.Ingest {
				s.flushed.Add(uint64(i.Input))
			}
		},
		BackgroundError: func(err error) {
			if errors.Is(err, pebble.ErrCancelledCompaction) { // a flush, by an excise: it is done again
				return
			}
			s.m.backgroundErrors.Inc()
			if pebble.IsCorruptionError(err) && s.suspects.stuck() {
				s.fail(fmt.Errorf("a table is damaged and cannot be compacted: %w: start again, the start sets aside what is damaged", err))
				return
			}
			if now := time.Now().Unix(); s.toldStall.Swap(now) != now { // it is tried again at once
				l.Warn("store background work stalls", "err", err)
			}
		},
		DataCorruption: func(i pebble.DataCorruptionInfo) {
			s.m.corruptions.Inc()
			if !s.opt.Look && s.suspects.note(s.opt.FS, dir, i.Path) {
				l.Error("store data damaged", "file", i.Path, "err", firstLine(i.Details))
			}
		},
		TableDeleted: func(pebble.TableDeleteInfo) { s.guard.poke() },
		DiskSlow: func(i pebble.DiskSlowInfo) {
			l.Warn("disk is slow", "file", i.Path, "waited_ms", i.Duration.Milliseconds())
		},
		LowDiskSpace: func(i pebble.LowDiskSpaceInfo) {
			if s.guard == nil { // it tells of that itself
				l.Warn("disk space is low", "free_bytes", i.AvailBytes, "total_bytes", i.TotalBytes)
			}
		},
		WriteStallBegin: func(i pebble.WriteStallBeginInfo) {
			s.m.stalls.Inc()
			s.stalled.Store(time.Now().UnixNano())
			l.Debug("store stalls writes", "reason", i.Reason)
		},
		WriteStallEnd: func() { s.stalled.Store(0) },
	}
	e.EnsureDefaults(log) // after our own: it fills only what is missing
	return e
}

// pebbleLogger turns Pebble's own words into slog's. Infof is left out: it is about single tables.
type pebbleLogger struct{ s *Store }

func (l pebbleLogger) Infof(string, ...any) {}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.s.opt.Log.Warn("store reports an error", "err", fmt.Sprintf(format, args...))
}

// Fatalf is how Pebble reports a log that cannot be written or synced. If it returned, the
// commit would count as done, so it never does: the process ends by the Fatal hook.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	l.s.fail(fmt.Errorf(format, args...))
	select {}
}
