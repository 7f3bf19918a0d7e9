package kv

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/atomicfs"
)

// A start never refuses because of damage. Pebble alone does, or loses what lies behind the damage without a word, so its
// files are looked at before it opens them: the log and the manifest wholly, of tables what is needed to find their rows, and
// every block of those that hold other rows than chunks, which are few. A file that is damaged is set aside as it is, and one
// with all of it that can be read takes its place. Every step leaves a store that can be looked at again, so a repair
// that is cut short is begun anew.
//
// A block of chunks that is damaged stays: who reads it passes over it, and announces what is missing.

// Damage is what was found damaged in one file of the store, and set aside.
type Damage struct {
	At   time.Time `json:"at"`
	File string    `json:"file"` // its name in the store
	What string    `json:"what"` // a sentence: what is wrong with it
	// LostBytes is how much of the file could not be read; what that was is not known.
	LostBytes int64 `json:"lost_bytes"`
	Kept      int   `json:"kept"` // rows, or commits of a log, that could
	// From and To are the first and the last key that the file held, if that is known. What was lost lies between.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	// SetAside is where the damaged file is now; "": there was nothing to keep.
	SetAside string `json:"set_aside,omitempty"`
}

// String tells of it in one line.
func (d Damage) String() string {
	s := fmt.Sprintf("file %s: %s; %d bytes cannot be read, %d rows or commits can", d.File, d.What, d.LostBytes, d.Kept)
	if d.From != "" {
		s += fmt.Sprintf("; it held %s to %s", d.From, d.To)
	}
	if d.SetAside != "" {
		s += "; set aside as " + d.SetAside
	}
	return s
}

// suspectsName is the file, in the store's folder, that names tables of which something could not be read while the store was open. The
// next start reads them wholly.
const suspectsName = "suspects"

// Damage tells what was found damaged when the store was opened.
func (s *Store) Damage() []Damage { return slices.Clone(s.damage) }

// mender looks at a store that is not open, and makes it one that Pebble opens.
type mender struct {
	s     *Store
	fs    vfs.FS
	dir   string
	opts  *pebble.Options
	aside string // the folder for what is damaged; made when there is something
	made  bool
	found []Damage

	names    []string
	tables   map[uint64]string // by number
	logs     []uint64          // in order
	suspects map[string]bool
	nextFile uint64
}

// openWhole opens Pebble, after a look at its files.
func (s *Store) openWhole(dir string) (*pebble.DB, error) {
	// One of our own: by MaxOpenFiles it would never hold fewer than 64.
	tables := pebble.NewFileCache(1, s.opt.MaxTables)
	defer tables.Unref() // the store holds it
	o := s.pebbleOptions(dir, tables)
	o.EnsureDefaults()
	m := &mender{s: s, fs: o.FS, dir: dir, opts: o}
	db, err := m.open()
	if errors.Is(err, errLookCopy) {
		return s.openCopy(dir)
	}
	s.damage = m.found
	if m.made {
		err = errors.Join(err, m.report())
	}
	level := slog.LevelError
	if s.opt.Look {
		level = slog.LevelDebug // the tool tells of it
	}
	for i := range m.found {
		d := &m.found[i]
		s.m.damaged.Inc()
		s.opt.Log.Log(context.Background(), level, "store was damaged: what can be read is kept, the rest is set aside", "file", d.File, "what", d.What,
			"lost_bytes", d.LostBytes, "kept", d.Kept, "from", d.From, "to", d.To, "set_aside", d.SetAside)
	}
	return db, err
}

// open mends what is damaged and opens Pebble; what is still in the way is mended by reading all.
func (m *mender) open() (*pebble.DB, error) {
	if err := m.look(false); err != nil {
		return nil, err
	}
	if m.s.looksOnly() && len(m.found) > 0 {
		return nil, errLookCopy
	}
	db, err := m.pebble()
	if err == nil {
		return db, m.forgetSuspects()
	}
	// What the disk does not give back was found before; one that refuses something now is not over that.
	if !isDamage(err) || errors.Is(err, syscall.EIO) {
		return nil, err
	}
	if m.s.looksOnly() {
		return nil, errLookCopy
	}
	if err := m.look(true); err != nil {
		return nil, err
	}
	db, second := m.pebble()
	if second == nil {
		return db, m.forgetSuspects()
	}
	if !isDamage(second) || errors.Is(second, syscall.EIO) {
		return nil, second
	}
	// Nobody foresaw this. The store goes aside whole, for somebody to look at, and the gateway begins anew.
	if err := m.setAsideAll(fmt.Errorf("%w; after a repair: %w", err, second)); err != nil {
		return nil, err
	}
	return m.pebble()
}

// pebble opens it as it is. It has places where it panics over what it reads.
func (m *mender) pebble() (db *pebble.DB, err error) {
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("%w: %v", errPanicked, r)
		}
	}()
	o := *m.opts
	return pebble.Open(m.dir, &o)
}

var errPanicked = errors.New("opening it panicked")

// isDamage says whether an error at opening is about what the files hold, and not about getting at them.
func isDamage(err error) bool {
	for _, other := range [...]error{
		fs.ErrPermission, syscall.EROFS, syscall.EMFILE, syscall.ENFILE, syscall.ENOSPC, syscall.EDQUOT, syscall.EAGAIN,
		syscall.ENOMEM, ErrVersion,
	} {
		if errors.Is(err, other) {
			return false
		}
	}
	return !strings.Contains(err.Error(), "lock held") // by this process
}

// look lists the files, and mends each that is damaged. With all, it trusts no manifest.
func (m *mender) look(all bool) error {
	m.tables, m.logs, m.suspects, m.nextFile = map[uint64]string{}, nil, map[string]bool{}, 1
	names, err := m.fs.List(m.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	slices.Sort(names)
	m.names = names
	for _, name := range names {
		stem, ext, _ := strings.Cut(name, ".")
		n, err := strconv.ParseUint(strings.TrimPrefix(strings.TrimPrefix(stem, "MANIFEST-"), "OPTIONS-"), 10, 64)
		if err != nil || strings.HasPrefix(name, "marker.") {
			continue
		}
		m.nextFile = max(m.nextFile, n+1)
		switch {
		case ext == "sst":
			m.tables[n] = name
		case ext == "log":
			m.logs = append(m.logs, n)
		}
	}
	slices.Sort(m.logs)
	if len(m.tables) == 0 && len(m.logs) == 0 && !slices.ContainsFunc(names, isManifest) {
		return nil // nothing was ever stored
	}
	if err := m.format(); err != nil {
		return err
	}
	if err := m.options(); err != nil {
		return err
	}
	if b, _, err := readTolerant(m.fs, m.path(suspectsName)); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			m.suspects[line] = true
		}
	}
	base, err := m.manifest(all)
	if err != nil {
		return err
	}
	return m.mendLogs(base)
}

func manifestNumber(name string) uint64 {
	n, _ := strconv.ParseUint(strings.TrimPrefix(name, "MANIFEST-"), 10, 64) // 0: it is none
	return n
}

func isManifest(name string) bool { return strings.HasPrefix(name, "MANIFEST-") }

func (m *mender) path(name string) string { return m.fs.PathJoin(m.dir, name) }

// format looks at the marker that says in which format the files are. The marker's name is all of it.
func (m *mender) format() error {
	mk, value, err := atomicfs.LocateMarker(m.fs, m.dir, "format-version")
	if err == nil {
		n, bad := strconv.ParseUint(value, 10, 64)
		err = bad
		if bad == nil && n > uint64(pebble.FormatNewest) {
			return errors.Join(ErrVersion, mk.Close())
		}
		if bad == nil && n >= uint64(pebble.FormatMinSupported) {
			return mk.Close()
		}
		_ = mk.Close()
	}
	return m.remark("format-version", pebble.FormatNewest.String(), "the marker of the files' format is missing or none", err)
}

// remark sets a marker anew.
func (m *mender) remark(marker, value, what string, cause error) error {
	if cause != nil {
		what += ": " + cause.Error()
	}
	m.find(Damage{File: "marker." + marker, What: what})
	if m.s.looksOnly() {
		return nil
	}
	for _, name := range m.names {
		if strings.HasPrefix(name, "marker.") && (strings.HasPrefix(name, "marker."+marker+".") || strings.Count(name, ".") < 3) {
			if err := m.fs.Remove(m.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	mk, _, err := atomicfs.LocateMarker(m.fs, m.dir, marker)
	if err != nil {
		return err
	}
	return errors.Join(mk.Move(value), mk.Close())
}

// options sets aside files of options that Pebble could not read. It needs none.
func (m *mender) options() error {
	for _, name := range m.names {
		if !strings.HasPrefix(name, "OPTIONS-") {
			continue
		}
		b, unread, err := readTolerant(m.fs, m.path(name))
		if err != nil {
			return err
		}
		err = m.opts.CheckCompatibility(m.dir, string(b))
		if err == nil && unread == 0 && len(b) > 0 {
			continue
		}
		d := Damage{File: name, What: "options cannot be read; they are made anew", LostBytes: int64(len(b))}
		if err := m.replace(&d, ""); err != nil {
			return err
		}
	}
	return nil
}

// manifest reads the manifest and looks at the tables that it names. If it cannot be read, or one of the tables, it is written anew.
func (m *mender) manifest(all bool) (*manifest, error) {
	name, cause := m.current()
	base, size := readManifest(nil), 0
	if name != "" {
		b, unread, err := readTolerant(m.fs, m.path(name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			base, size = readManifest(b), len(b)
			base.whole = base.whole && unread == 0
		}
	}
	marked, _, _, err := readMarks(m.fs, m.dir)
	if err != nil {
		return nil, err
	}
	if cause == nil && marked.manifestSize > 0 {
		switch n := manifestNumber(name); {
		case n < marked.manifest:
			cause = fmt.Errorf("the marker names list of tables %d, and there was %d already; the list is made anew from the tables", n, marked.manifest)
		case n == marked.manifest && uint64(size) < marked.manifestSize:
			cause = fmt.Errorf("the list of tables has %d bytes and had %d; it is made anew from the tables", size, marked.manifestSize)
			size = int(marked.manifestSize)
		}
	}
	if cause != nil || !base.whole {
		d := Damage{File: name, LostBytes: int64(size), Kept: len(base.records), What: "the list of tables cannot be read to its end; it is made anew from the tables"}
		for _, r := range base.records {
			d.LostBytes -= int64(len(r))
		}
		if cause != nil {
			d.What = cause.Error()
		}
		if name == "" {
			d.File = "marker.manifest"
		}
		if err := m.setAside(&d, name); err != nil {
			return nil, err
		}
		m.find(d)
		all = true
	}
	if all {
		return base, m.rebuild(base)
	}
	return base, m.mendTables(base)
}

// current finds the manifest that the marker names; if there is none, the newest, and why.
func (m *mender) current() (name string, cause error) {
	mk, value, err := atomicfs.LocateMarker(m.fs, m.dir, "manifest")
	if err == nil {
		_ = mk.Close()
		if slices.Contains(m.names, value) {
			return value, nil
		}
	}
	for _, n := range m.names { // sorted; numbers have six digits at least
		if isManifest(n) && (len(n) > len(name) || n > name) {
			name = n
		}
	}
	return name, errors.New("the marker that names the list of tables is missing or wrong; the list is made anew from the tables")
}

// mendTables looks at the tables of a manifest that is whole, and gives it one more edit if something is wrong with some.
func (m *mender) mendTables(base *manifest) error {
	files := map[uint64][]tableEntry{}
	for _, t := range base.sorted() {
		files[t.file] = append(files[t.file], t)
	}
	var edit []byte
	numbers := slices.Sorted(maps.Keys(files))
	for i, what := range m.lookAtTables(base, numbers, files) {
		n, ts := numbers[i], files[numbers[i]]
		if what == nil {
			continue
		}
		if !isDamage(what) {
			return what
		}
		mended, err := m.mendTable(n, ts, what)
		if err != nil {
			return err
		}
		for i := range ts {
			edit = appendRemoved(edit, &ts[i])
		}
		if ts[0].inOthers {
			edit = appendNumbers(edit, editNoBacking, n)
		}
		for i := range mended {
			edit = appendTable(edit, &mended[i])
		}
	}
	if edit == nil || m.s.looksOnly() {
		return nil
	}
	// The number that comes next goes first.
	edit = append(appendNumbers(nil, editNextFile, m.nextFile+1), edit...)
	return m.writeManifest(append(slices.Clone(base.records), edit))
}

// lookAtTables says of each file what is wrong with it, nil if nothing is to be seen. A large backlog is in thousands: they are looked at side
// by side.
func (m *mender) lookAtTables(base *manifest, numbers []uint64, files map[uint64][]tableEntry) []error {
	problems := make([]error, len(numbers))
	var next atomic.Int64
	var done sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		done.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(numbers); i = int(next.Add(1)) - 1 {
				ts := files[numbers[i]]
				size := ts[0].size
				if ts[0].inOthers {
					size = base.backing[numbers[i]]
				}
				compacted := slices.ContainsFunc(ts, func(t tableEntry) bool { return t.level == 0 || !isChunks(t.lo.UserKey, t.hi.UserKey) })
				problems[i] = m.wrong(numbers[i], size, compacted)
			}
		})
	}
	done.Wait()
	return problems
}

// wrong says what is wrong with a table, nil if nothing is to be seen. size is what it should have, 0: not known. all is whether
// to read all of it.
func (m *mender) wrong(n, size uint64, all bool) error {
	name, ok := m.tables[n]
	if !ok {
		return errors.New("is missing")
	}
	fi, err := m.fs.Stat(m.path(name))
	if err != nil {
		return err
	}
	if size != 0 && uint64(fi.Size()) != size {
		return fmt.Errorf("has %d bytes instead of %d", fi.Size(), size)
	}
	return checkTable(m.fs, m.path(name), m.opts, all || m.suspects[name])
}

// mendTable sets the damaged file n aside, and gives what could be read of its tables.
func (m *mender) mendTable(n uint64, ts []tableEntry, cause error) (mended []tableEntry, err error) {
	d := Damage{File: fmt.Sprintf("%06d.sst", n), What: "table " + firstLine(cause)}
	for _, t := range ts {
		if d.From == "" || bytes.Compare(t.lo.UserKey, []byte(d.From)) < 0 {
			d.From = string(t.lo.UserKey)
		}
		if bytes.Compare(t.hi.UserKey, []byte(d.To)) > 0 {
			d.To = string(t.hi.UserKey)
		}
	}
	d.From, d.To = keyName([]byte(d.From)), keyName([]byte(d.To))
	defer func() {
		if err == nil {
			m.find(d)
		}
	}()
	name, ok := m.tables[n]
	if !ok {
		return nil, nil
	}
	if err := m.setAside(&d, name); err != nil {
		return nil, err
	}
	b, unread, err := readTolerant(m.fs, m.path(name))
	if err != nil {
		return nil, err
	}
	s := findBlocks(m.fs, m.path(name), b, m.opts)
	d.LostBytes = max(s.lostBytes, unread)
	if m.s.looksOnly() {
		return nil, nil
	}
	for _, t := range ts {
		lo, hi := t.lo.UserKey, t.hi.UserKey
		number := m.nextFile
		look, size, err := saveTable(m.fs, m.path(fmt.Sprintf("%06d.sst", number)), b, &s, lo, hi, m.opts)
		if err != nil {
			return nil, fmt.Errorf("save what can be read of table %s: %w", name, err)
		}
		d.LostBytes = max(s.lostBytes, unread)
		if look.rows == 0 {
			continue
		}
		m.nextFile++
		d.Kept += look.rows
		mended = append(mended, tableEntry{level: t.level, number: number, file: number, size: size, lo: look.lo, hi: look.hi, seqs: look.seqs})
	}
	return mended, nil
}

// rebuild makes a manifest of the tables and logs there are, but for those that base, what could be read of the old one, says are gone.
// Which of them Pebble had done with is not known, so rows may be there more than once, and some are older than others. Chunks never
// change: their tables stay, as long as they do not overlap. All others, and the logs, become new tables, in which each row
// is once, as it was last.
func (m *mender) rebuild(base *manifest) error {
	var kept []tableEntry
	var merged []uint64 // tables
	var end []byte
	entries, err := m.usable(base)
	if err != nil {
		return err
	}
	slices.SortStableFunc(entries, func(a, b tableEntry) int { return bytes.Compare(a.lo.UserKey, b.lo.UserKey) })
	lastSeq := base.lastSeq
	for _, t := range entries {
		lastSeq = max(lastSeq, t.seqs[1])
		if isChunks(t.lo.UserKey, t.hi.UserKey) && bytes.Compare(t.lo.UserKey, end) > 0 {
			t.level, end = lowestLevel, t.hi.UserKey
			kept = append(kept, t)
			continue
		}
		name := m.tables[t.file]
		if err := checkTable(m.fs, m.path(name), m.opts, true); err == nil {
			merged = append(merged, t.file)
			continue
		} else if !isDamage(err) {
			return err
		} else if mended, err := m.mendTable(t.file, []tableEntry{t}, err); err != nil {
			return err
		} else if len(mended) > 0 {
			m.tables[mended[0].file] = fmt.Sprintf("%06d.sst", mended[0].file)
			merged = append(merged, mended[0].file)
		}
	}
	for _, t := range base.sorted() {
		if m.tables[t.file] == "" {
			m.find(Damage{File: fmt.Sprintf("%06d.sst", t.file), What: "table is missing", From: keyName(t.lo.UserKey), To: keyName(t.hi.UserKey)})
		}
	}
	logged, err := m.logRows(base)
	if err != nil || m.s.looksOnly() {
		return err
	}
	for i := range logged {
		lastSeq = max(lastSeq, uint64(logged[i].key.SeqNum()))
	}
	lastSeq++
	made, err := m.merge(merged, logged, lastSeq)
	if err != nil {
		return fmt.Errorf("make tables anew: %w", err)
	}
	if kept, err = m.checkOverlaps(kept, made); err != nil {
		return err
	}
	edit := appendNumbers(nil, editComparer, uint64(len(pebble.DefaultComparer.Name)))
	edit = append(edit, pebble.DefaultComparer.Name...)
	edit = appendNumbers(edit, editLogNumber, m.nextFile, editNextFile, m.nextFile+2, editLastSequence, lastSeq)
	m.nextFile++
	for i := range kept {
		edit = appendTable(edit, &kept[i])
	}
	for i := range made {
		edit = appendTable(edit, &made[i])
	}
	m.logs = nil // what they held is in tables
	return m.writeManifest([][]byte{edit})
}

// checkOverlaps reads those of the kept tables wholly that overlap new ones: they will be compacted.
func (m *mender) checkOverlaps(kept, made []tableEntry) (checked []tableEntry, err error) {
	for _, t := range kept {
		overlaps := slices.ContainsFunc(made, func(n tableEntry) bool {
			return bytes.Compare(n.lo.UserKey, t.hi.UserKey) <= 0 && bytes.Compare(t.lo.UserKey, n.hi.UserKey) <= 0
		})
		if overlaps {
			err := checkTable(m.fs, m.path(m.tables[t.file]), m.opts, true)
			if err != nil && !isDamage(err) {
				return nil, err
			}
			if err != nil {
				mended, err := m.mendTable(t.file, []tableEntry{t}, err)
				if err != nil {
					return nil, err
				}
				checked = append(checked, mended...)
				continue
			}
		}
		checked = append(checked, t)
	}
	return checked, nil
}

// usable finds the tables from which rows can be read, in whatever way.
func (m *mender) usable(base *manifest) (ts []tableEntry, err error) {
	for _, n := range slices.Sorted(maps.Keys(m.tables)) {
		if base.gone[n] {
			continue
		}
		name := m.tables[n]
		look, err := boundsOf(m.fs, m.path(name), m.opts)
		chunks := err == nil && isChunks(look.lo.UserKey, look.hi.UserKey)
		if err == nil {
			err = checkTable(m.fs, m.path(name), m.opts, !chunks || m.suspects[name])
		}
		if err != nil {
			if !isDamage(err) {
				return nil, err
			}
			mended, err := m.mendTable(n, []tableEntry{{number: n, file: n}}, err)
			if err != nil {
				return nil, err
			}
			for _, t := range mended {
				m.tables[t.file] = fmt.Sprintf("%06d.sst", t.file)
			}
			ts = append(ts, mended...)
			continue
		}
		fi, err := m.fs.Stat(m.path(name))
		if err != nil {
			return nil, err
		}
		ts = append(ts, tableEntry{number: n, file: n, size: uint64(fi.Size()), lo: look.lo, hi: look.hi, seqs: look.seqs})
	}
	return ts, nil
}

// lowestLevel is the one below which Pebble has none.
const lowestLevel = 6

func appendNumbers(b []byte, ns ...uint64) []byte {
	for _, n := range ns {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

// writeManifest has Pebble read these records from now on.
func (m *mender) writeManifest(records [][]byte) error {
	name := fmt.Sprintf("MANIFEST-%06d", m.nextFile)
	m.nextFile++
	if err := writeRecords(m.fs, m.path(name), 0, slices.Values(records)); err != nil {
		return err
	}
	if err := syncFolder(m.fs, m.dir); err != nil {
		return err
	}
	for _, n := range m.names { // those that are no markers would be in Pebble's way
		if strings.HasPrefix(n, "marker.manifest") && strings.Count(n, ".") < 3 {
			if err := m.fs.Remove(m.path(n)); err != nil {
				return err
			}
		}
	}
	mk, _, err := atomicfs.LocateMarker(m.fs, m.dir, "manifest")
	if err != nil {
		return err
	}
	m.names = append(m.names, name)
	return errors.Join(mk.Move(name), mk.Close())
}

// mendLogs writes the logs anew of which something cannot be read.
func (m *mender) mendLogs(base *manifest) error {
	return m.readLogs(base, func(d *Damage, n uint64, batches []readRecord) error {
		if d == nil {
			return nil
		}
		tmp := ""
		if !m.s.looksOnly() {
			tmp = m.path(fmt.Sprintf("temporary.%06d.dbtmp", m.nextFile))
			m.nextFile++
			payloads := func(yield func([]byte) bool) {
				for _, r := range batches {
					if !yield(r.payload) {
						return
					}
				}
			}
			if err := writeRecords(m.fs, tmp, uint32(n)+1, payloads); err != nil {
				return err
			}
		}
		return m.replace(d, tmp)
	})
}

// logRows gives the rows of all logs, in the order of tables.
func (m *mender) logRows(base *manifest) (rows []logRow, err error) {
	err = m.readLogs(base, func(d *Damage, _ uint64, batches []readRecord) error {
		for _, r := range batches {
			rows = appendRows(rows, r.payload)
		}
		if d == nil {
			return nil
		}
		if err := m.setAside(d, d.File); err != nil {
			return err
		}
		m.find(*d)
		return nil
	})
	slices.SortStableFunc(rows, func(a, b logRow) int { return pebbleCompare(a.key, b.key) })
	return rows, err
}

// readLogs hands the commits of each log that is still needed to fn, and what is damaged of it.
func (m *mender) readLogs(base *manifest, fn func(d *Damage, number uint64, batches []readRecord) error) error {
	for i, n := range m.logs {
		if n < base.minLog {
			continue // it is in tables
		}
		name := fmt.Sprintf("%06d.log", n)
		b, unread, err := readTolerant(m.fs, m.path(name))
		if err != nil {
			return err
		}
		last := i == len(m.logs)-1
		s := scanRecords(b, uint32(n), last)
		batches, bad := s.records[:0:0], int64(0)
		for _, r := range s.records {
			if wholeBatch(r.payload) {
				batches = append(batches, r)
			} else {
				bad += int64(len(r.payload))
			}
		}
		if !last && !s.closed && len(s.holes) == 0 && len(b) > 0 { // it was closed before the next one was made
			s.holes = []span{{s.end, int64(len(b))}}
		}
		var d *Damage
		if len(s.holes) > 0 || bad > 0 {
			d = &Damage{File: name, Kept: len(batches), LostBytes: bad, What: "log cannot be read wholly"}
			for _, h := range s.holes {
				d.LostBytes += h.to - h.from
			}
			d.LostBytes = max(d.LostBytes, unread)
			if len(s.holes) > 0 {
				d.What += fmt.Sprintf(", from byte %d on", s.holes[0].from)
			}
		}
		if err := fn(d, n, batches); err != nil {
			return err
		}
	}
	return nil
}

// replace sets the damaged file aside and puts the file at tmp in its place; "": nothing.
func (m *mender) replace(d *Damage, tmp string) error {
	if err := m.setAside(d, d.File); err != nil {
		return err
	}
	m.find(*d)
	if m.s.looksOnly() {
		return nil
	}
	if tmp == "" {
		if err := m.fs.Remove(m.path(d.File)); err != nil {
			return err
		}
	} else if err := m.fs.Rename(tmp, m.path(d.File)); err != nil {
		return err
	}
	return syncFolder(m.fs, m.dir)
}

// find notes a damage, once.
func (m *mender) find(d Damage) {
	d.At = time.Now().UTC().Truncate(time.Second)
	for i := range m.found {
		if m.found[i].File == d.File {
			m.found[i] = d
			return
		}
	}
	m.found = append(m.found, d)
}

// setAside has the damaged file also in the folder for those, where it stays when its place is taken. A tool that looks has the file where it was.
func (m *mender) setAside(d *Damage, name string) error {
	if m.s.opt.Look || name == "" || !slices.Contains(m.names, name) {
		return nil
	}
	if err := m.makeAside(); err != nil {
		return err
	}
	to := m.fs.PathJoin(m.aside, name)
	if _, err := m.fs.Stat(to); err == nil {
		d.SetAside = to // by an earlier step
		return nil
	}
	err := m.fs.Link(m.path(name), to)
	if err != nil { // the file system has no links, or it is another one
		err = vfs.Copy(m.fs, m.path(name), to)
	}
	switch {
	case isFull(err), errors.Is(err, syscall.EIO):
		_ = m.fs.Remove(to)
		return nil // the copy is for somebody to look at; the gateway has to start
	case err != nil:
		return fmt.Errorf("set damaged file %s aside: %w", name, err)
	}
	d.SetAside = to
	return syncFolder(m.fs, m.aside)
}

func (m *mender) makeAside() error {
	if m.made {
		return nil
	}
	base := m.fs.PathJoin(filepath.Dir(m.dir), "quarantine")
	stamp := time.Now().UTC().Format("20060102T150405Z")
	m.aside = m.fs.PathJoin(base, stamp)
	for i := 2; ; i++ {
		if _, err := m.fs.Stat(m.aside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		m.aside = m.fs.PathJoin(base, fmt.Sprintf("%s-%d", stamp, i))
	}
	if err := m.fs.MkdirAll(m.aside, 0o700); err != nil {
		return fmt.Errorf("make folder for damaged files: %w", err)
	}
	m.made = true
	m.prune(base)
	return syncFolder(m.fs, base)
}

// quarantineMax is how much the folder for damaged files may hold, bytes.
const quarantineMax = 512 << 20

// prune removes the oldest damaged files when there are too many; the reports stay.
func (m *mender) prune(base string) {
	folders, err := m.fs.List(base)
	if err != nil {
		return
	}
	slices.Sort(folders)
	var held int64
	for _, folder := range slices.Backward(folders) {
		files, err := m.fs.List(m.fs.PathJoin(base, folder))
		if err != nil {
			continue
		}
		for _, f := range files {
			path := m.fs.PathJoin(base, folder, f)
			fi, err := m.fs.Stat(path)
			if err != nil || fi.IsDir() || f == reportName {
				continue
			}
			if held += fi.Size(); held > quarantineMax {
				_ = m.fs.Remove(path) // it is tried again next time
			}
		}
	}
}

// reportName is the file, beside the damaged ones, that tells of them.
const reportName = "report.json"

// report writes what was found beside what was set aside. A disk that is full keeps the gateway from nothing.
func (m *mender) report() error {
	b, err := json.MarshalIndent(map[string]any{"damage": m.found}, "", "  ")
	if err != nil {
		return err
	}
	f, err := m.fs.Create(m.fs.PathJoin(m.aside, reportName), vfs.WriteCategoryUnspecified)
	if err == nil {
		_, err = f.Write(append(b, '\n'))
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		err = syncFolder(m.fs, m.aside)
	}
	if err != nil {
		m.s.opt.Log.Warn("report of damage cannot be written", "folder", m.aside, "err", err)
	}
	return nil
}

// setAsideAll moves the whole store away; of a copy nobody needs that.
func (m *mender) setAsideAll(cause error) error {
	d := Damage{File: filepath.Base(m.dir), What: "store cannot be opened even after a repair, a new one is begun: " + firstLine(cause)}
	if m.s.opt.Look {
		m.find(d)
		return m.fs.RemoveAll(m.dir)
	}
	if err := m.makeAside(); err != nil {
		return err
	}
	d.SetAside = m.fs.PathJoin(m.aside, "store")
	m.find(d)
	if err := m.fs.Rename(m.dir, d.SetAside); err != nil {
		return fmt.Errorf("set damaged store aside: %w", err)
	}
	return syncFolder(m.fs, filepath.Dir(m.dir))
}

// damagedMarks tells of marks that could not be read.
func (s *Store) damagedMarks() {
	for _, name := range s.marks.bad {
		d := Damage{At: time.Now().UTC().Truncate(time.Second), File: name, What: "mark of what was committed cannot be read; the other one can", LostBytes: markSize}
		if s.marks.state == nil {
			d.What = "mark of what was committed cannot be read: whether the end of the log is all there is not known"
		}
		s.damage = append(s.damage, d)
		s.m.damaged.Inc()
		s.opt.Log.Warn("store was damaged", "file", d.File, "what", d.What)
	}
}

// forgetSuspects is for when the store is open: they were read.
func (m *mender) forgetSuspects() error {
	if m.s.looksOnly() || len(m.suspects) == 0 {
		return nil
	}
	err := m.fs.Remove(m.path(suspectsName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// firstLine keeps an error of Pebble's short: some carry a stack.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	if len(line) > 300 {
		line = line[:300] + " …"
	}
	return line
}

// keyName shows a key to people: its prefix, then what is readable of it.
func keyName(key []byte) string {
	if len(key) == 0 {
		return ""
	}
	owner, ok := prefixNames[key[0]]
	switch {
	case !ok:
		return fmt.Sprintf("%x", key)
	case key[0] == PrefixData && len(key) == 10:
		return fmt.Sprintf("%s lane %d, message %d", owner, key[1], binary.BigEndian.Uint64(key[2:]))
	}
	return fmt.Sprintf("%s %q", owner, key[1:])
}

var prefixNames = map[byte]string{
	PrefixMeta: "meta", PrefixLane: "lane", PrefixCursor: "cursor", PrefixData: "chunk", PrefixParked: "parked", PrefixQoS2: "qos2",
	PrefixRetained: "retained", PrefixSession: "session", PrefixWill: "will", PrefixDevice: "device", PrefixCommand: "command",
	PrefixToken: "token", PrefixUsage: "usage", PrefixAudit: "audit",
}
