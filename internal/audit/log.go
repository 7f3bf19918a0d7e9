package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	file       = "audit.log"
	fullPrefix = "audit-"
	fullSuffix = ".log"

	defaultMaxBytes = 4 << 20
	defaultKeep     = 8
)

// Options of a log. The zero value is good.
type Options struct {
	MaxBytes int64 // of a file, after which the next one begins; 0: 4 MiB
	Keep     int   // full files that stay; 0: 8
	Now      func() time.Time
	Log      *slog.Logger // nil: none
	// Known is the last record that is known to have been there; the zero value: nothing is known. If it is missing, that is
	// noted, and numbers go on after it.
	Known Head

	sync func(*os.File) error // for tests
}

// Log is an audit log that takes records. Many goroutines may call it; a process has a data directory's to itself.
type Log struct {
	dir string
	o   Options

	mu     sync.Mutex
	f      *os.File // nil: it has to be opened again
	size   int64
	first  uint64 // of the file
	head   Head
	missed uint64 // acts that could not be written

	// syncing is held by who waits for the disk: those who come meanwhile find that their record is there, too. It is taken
	// before mu.
	syncing sync.Mutex
	synced  uint64 // seq up to which all is on disk
}

// Open opens the log in dir, or begins one. What a crash has left of a line is removed, and that is noted in a record of its own. Other
// damage stays as it is: Verify names it.
func Open(dir string, o Options) (*Log, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.Keep == 0 {
		o.Keep = defaultKeep
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.sync == nil {
		o.sync = (*os.File).Sync
	}
	l := &Log{dir: dir, o: o}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return nil, err
	}
	return l, nil
}

// open finds out where the log ends, and notes what it mends. The caller holds mu.
func (l *Log) open() error {
	files, err := filesOf(l.dir)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	l.head, l.size, l.first = Head{}, 0, 0
	cut := 0
	for i := len(files) - 1; i >= 0 && l.head.Seq == 0; i-- {
		b, err := os.ReadFile(files[i])
		if err != nil {
			return fmt.Errorf("open audit log: %w", err)
		}
		t := tailOf(b)
		if t.bad > 0 {
			l.o.Log.Error("audit log is damaged: holdfast audit verify says more", "file", files[i], "line", t.bad)
		}
		l.head = t.head
		if filepath.Base(files[i]) == file {
			l.size, l.first, cut = int64(t.good), t.first, len(b)-t.good
		}
	}
	f, err := os.OpenFile(filepath.Join(l.dir, file), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	if cut > 0 {
		if err = f.Truncate(l.size); err == nil {
			err = l.o.sync(f)
		}
	}
	if err == nil {
		err = syncDir(l.dir)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("open audit log: %w", err)
	}
	l.f = f
	var notes []Entry
	if cut > 0 {
		l.o.Log.Warn("audit log ended in a line that was cut off; that is removed, nobody was answered for it", "after", l.head.Seq, "size_bytes", cut)
		notes = append(notes, Entry{Act: healed, Detail: fmt.Sprintf("%d bytes that a crash had cut off were removed after record %d", cut, l.head.Seq)})
	}
	if known := l.o.Known; known.Seq > l.head.Seq {
		l.o.Log.Error("records of the audit log are missing", "first", l.head.Seq+1, "last", known.Seq)
		notes = append(notes, Entry{Act: missing, Detail: fmt.Sprintf("records %d to %d are not there any more", l.head.Seq+1, known.Seq)})
		l.head = known
	}
	l.o.Known = Head{}
	for i := range notes {
		notes[i].Who, notes[i].Object, notes[i].Result = itself, file, Done
		if err := l.write(&notes[i]); err != nil {
			return err
		}
	}
	if len(notes) > 0 {
		if err := l.o.sync(l.f); err != nil {
			return fmt.Errorf("open audit log: %w", err)
		}
	}
	return nil
}

// Head is the last record.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Append writes a record of e, gives it its number and time, and returns when it is on disk. After an error it may be there or not;
// the next record says how many are missed.
func (l *Log) Append(e Entry) (Head, error) {
	h, err := l.append(&e)
	if err == nil {
		err = l.flush(h.Seq)
	}
	if err == nil && e.Missed == 0 {
		return h, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.missed++
		return Head{}, fmt.Errorf("write audit log: %w", err)
	}
	l.missed -= min(l.missed, e.Missed) // told now
	return h, nil
}

func (l *Log) append(e *Entry) (Head, error) {
	l.mu.Lock()
	if l.f != nil && l.size >= l.o.MaxBytes {
		l.mu.Unlock()
		l.syncing.Lock()
		defer l.syncing.Unlock()
		l.mu.Lock()
		if l.f != nil && l.size >= l.o.MaxBytes { // nobody else has done it
			if err := l.rotate(); err != nil {
				l.mu.Unlock()
				return Head{}, err
			}
		}
	}
	defer l.mu.Unlock()
	if l.f == nil {
		if err := l.open(); err != nil {
			return Head{}, err
		}
	}
	err := l.write(e)
	return l.head, err
}

// write appends a line. The caller holds mu.
func (l *Log) write(e *Entry) error {
	e.Seq, e.At, e.Missed = l.head.Seq+1, l.o.Now().UTC().Truncate(time.Millisecond), l.missed
	b, h, err := encode(e, l.head.Hash)
	if err != nil {
		return err
	}
	if _, err := l.f.Write(b); err != nil {
		l.reopen() // what there is of it is removed then
		return err
	}
	if l.size == 0 {
		l.first = e.Seq
	}
	l.size += int64(len(b))
	l.head = Head{e.Seq, h}
	return nil
}

// flush returns when everything up to seq is on disk. One sync serves all who wait for it.
func (l *Log) flush(seq uint64) error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if l.synced >= seq {
		return nil
	}
	l.mu.Lock()
	f, to := l.f, l.head.Seq
	l.mu.Unlock()
	if f == nil {
		return errors.New("a write failed meanwhile")
	}
	if err := l.o.sync(f); err != nil {
		// Nobody knows what the disk has: another sync might say that all is well.
		l.mu.Lock()
		defer l.mu.Unlock()
		l.reopen()
		return err
	}
	l.synced = to
	return nil
}

// reopen has the next record look again at what is on disk. The caller holds mu.
func (l *Log) reopen() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

// rotate begins another file. The caller holds syncing and mu.
func (l *Log) rotate() error {
	err := l.o.sync(l.f)
	first := l.first
	if first == 0 { // no line of it can be read
		first = l.head.Seq
	}
	full := filepath.Join(l.dir, fmt.Sprintf("%s%020d%s", fullPrefix, first, fullSuffix))
	if err == nil {
		err = os.Rename(filepath.Join(l.dir, file), full)
	}
	l.reopen()
	if err == nil {
		l.synced = l.head.Seq
		err = l.open()
	}
	if err != nil {
		return err
	}
	files, err := filesOf(l.dir)
	if err != nil {
		return err
	}
	files = files[:len(files)-1] // but the one that was begun
	gone := files[:max(0, len(files)-l.o.Keep)]
	oldest := firstOf(files[len(gone)])
	// Said before it is done: a file that goes for another reason is missing.
	note := Entry{Who: itself, Act: rotated, Object: filepath.Base(full), Result: Done, Detail: oldestText + strconv.FormatUint(oldest, 10)}
	if err := l.write(&note); err != nil {
		return err
	}
	if err := l.o.sync(l.f); err != nil {
		l.reopen()
		return err
	}
	l.synced = l.head.Seq
	for _, f := range gone {
		if err := os.Remove(f); err != nil {
			l.o.Log.Warn("old file of the audit log stays", "file", f, "err", err)
		}
	}
	return nil
}

// oldestText is before the number of the oldest record that stays when a file is begun. Written to disk.
const oldestText = "the oldest record that is kept is "

// Close ends the log. What was appended is on disk already.
func (l *Log) Close() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	f := l.f
	l.f = nil
	return f.Close()
}

// filesOf lists the files of the log in dir, the oldest first.
func filesOf(dir string) (files []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	now := false
	for _, e := range entries {
		if e.Name() == file {
			now = true
		} else if firstOf(e.Name()) > 0 {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	slices.Sort(files) // numbers have the same length
	if now {
		files = append(files, filepath.Join(dir, file))
	}
	return files, nil
}

// firstOf gives the number of the first record in a full file; 0: it is none.
func firstOf(path string) uint64 {
	name := filepath.Base(path)
	n, isOne := strings.CutPrefix(name, fullPrefix)
	n, ends := strings.CutSuffix(n, fullSuffix)
	seq, err := strconv.ParseUint(n, 10, 64)
	if !isOne || !ends || len(n) != 20 || err != nil {
		return 0
	}
	return seq
}

// tail is how a file ends.
type tail struct {
	head  Head   // of the last record
	first uint64 // of the first
	good  int    // bytes without what a crash has left
	bad   int    // the first line that is damaged, from 1; 0: none
}

// tailOf looks at a file's lines. What a crash leaves begins with a line that has no end, or that holds bytes which were never
// written, and nothing behind that was answered for: everything from there on goes. Other lines are somebody's work and stay.
func tailOf(b []byte) (t tail) {
	for n := 1; t.good < len(b); n++ {
		end := bytes.IndexByte(b[t.good:], '\n')
		if end < 0 {
			return t
		}
		text := b[t.good : t.good+end]
		l, h, err := decode(text)
		switch {
		case errors.Is(err, errTorn):
			return t
		case err != nil || t.head.Seq > 0 && (l.Seq != t.head.Seq+1 || l.Prev != t.head.Hash):
			if t.bad == 0 {
				t.bad = n
			}
		}
		if err == nil || errors.Is(err, errChanged) {
			t.head = Head{max(l.Seq, t.head.Seq), h}
			if t.first == 0 {
				t.first = l.Seq
			}
		}
		t.good += end + 1
	}
	return t
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return nil // a folder that may be entered and not read
		}
		return err
	}
	defer d.Close()
	return d.Sync()
}
