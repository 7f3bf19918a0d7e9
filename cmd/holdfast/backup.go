package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/config"
)

var backupCommand = command{
	name: "backup", args: "DIR|FILE.tar|- [--rate SIZE] [--json] " + placeArgs,
	summary: "Back up all that a gateway has stored, while it runs", words: []string{"dir"},
	help: `Messages, accounts, devices with their credentials, commands and API tokens as they are at one moment, in a folder that can
be started as a data directory, or in one tar archive of it; - is stdout. What was acknowledged before the command began is in
it. Not in it: the configuration and the files it names, and admin.token, so that a backup lets nobody into the gateway.

On the file system of the data directory a folder is made of hard links: at once, and without space of its own at first. It
then holds what the gateway gives back, until it is removed; and it goes with that disk. Elsewhere everything is copied, at --rate
at most. Nothing is overwritten. Until it is whole and on disk its name ends in .partial; after an error or Ctrl-C that is removed.

To restore: stop the gateway, move its data directory away, copy the folder (or unpack the archive) to that place for the gateway's
user, start it. The first start begins a new epoch: messages of the backup keep their ids, new ones get ids that the lost disk has
not used. docs/operations.md tells more.

` + placeHelp,
	run: runBackup,
}

// defaultBackupRate leaves a disk to the gateway's devices.
const defaultBackupRate = 32 << 20

// backedUp is what came of a backup.
type backedUp struct {
	httpapi.Backup
	Path string `json:"path"`
	// How: linked to the data directory's tables, copied, archive.
	How string `json:"how"`
}

func runBackup(ctx context.Context, p *program, args []string) error {
	fset := p.flags()
	where := placeFlagsIn(fset)
	rate := sizeFlag(fset, "rate", defaultBackupRate, "copy no faster than `SIZE` a second")
	asJSON := fset.Bool("json", false, "print what was backed up as JSON")
	words, err := p.parse(fset, args, 1, 1)
	if err != nil {
		return err
	}
	b := &backup{p: p, rate: *rate, target: words[0], stdout: words[0] == "-"}
	switch {
	case *rate <= 0:
		return usagef("--rate has to be above 0")
	case b.stdout && *asJSON:
		return usagef("--json and an archive on stdout exclude each other")
	case b.stdout && isTerminal(p.stdout):
		return usagef("an archive does not belong on a terminal: name a folder or a file, or pipe it")
	}
	b.archive = b.stdout || strings.HasSuffix(b.target, ".tar")
	if !b.stdout {
		if b.target, err = filepath.Abs(b.target); err != nil {
			return err
		}
		for _, path := range []string{b.target, b.partial()} {
			if err := absent(path); err != nil {
				return err
			}
		}
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	pl, err := where.find(ctx)
	if err != nil {
		return err
	}
	done, err := b.run(ctx, pl)
	switch {
	case err != nil && ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		return err
	case *asJSON:
		return p.printJSON(done)
	}
	b.tell(done)
	return nil
}

// absent refuses a path where something is.
func absent(path string) error {
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent := filepath.Dir(path)
		if fi, err := os.Stat(parent); err != nil || !fi.IsDir() {
			return usagef("there is no folder %s: make it first", parent)
		}
		return nil
	case err != nil:
		return err
	case strings.HasSuffix(path, ".partial"):
		return usagef("%s is what a backup has left that did not come to its end: remove it", path)
	}
	return usagef("%s is there already, and nothing is overwritten: choose another name", path)
}

// backup is one run of holdfast backup.
type backup struct {
	p       *program
	rate    int64
	target  string
	stdout  bool // target is stdout
	archive bool // else a folder
}

func (b *backup) partial() string { return b.target + ".partial" }

func (b *backup) run(ctx context.Context, pl *place) (*backedUp, error) {
	if pl.online() {
		return b.online(ctx, pl)
	}
	return b.offline(ctx, pl)
}

// online has a gateway make the backup. Where the result can be moved out of its data directory nothing is copied.
func (b *backup) online(ctx context.Context, pl *place) (*backedUp, error) {
	if !b.archive && sameDisk(pl.status.DataDir, filepath.Dir(b.target)) {
		var kept httpapi.BackupKept
		if err := pl.client.call(ctx, http.MethodPost, "/api/v1/backup", httpapi.NewBackup{Keep: true}, &kept); err != nil {
			return nil, err
		}
		if b.move(kept.Path, kept.ID) == nil {
			return &backedUp{kept.Backup, b.target, "linked"}, nil
		}
		// It is another's, or not the same machine. The next backup removes what is there.
	}
	body, err := pl.client.stream(ctx, http.MethodPost, "/api/v1/backup", httpapi.NewBackup{Rate: b.rate})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return b.take(ctx, body)
}

// offline makes it in the data directory, and moves or copies it from there.
func (b *backup) offline(ctx context.Context, pl *place) (done *backedUp, err error) {
	tmp := filepath.Join(pl.dir, "backup.tmp") // a start of the gateway removes what a crash leaves
	if err := os.RemoveAll(tmp); err != nil {
		return nil, err
	}
	info, err := gateway.Backup(pl.dir, tmp, thisVersion().Version, logger(b.p.stderr, config.Log{Level: "warn", Format: "text"}))
	if err != nil {
		return nil, pl.explain(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if !b.archive && b.move(tmp, info.ID) == nil {
		return &backedUp{info, b.target, "linked"}, nil
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := httpapi.WriteBackup(&slowed{ctx: ctx, w: w, rate: b.rate, began: time.Now()}, &httpapi.BackupCopy{Info: info, Dir: tmp})
		sent <- w.CloseWithError(err)
	}()
	done, err = b.take(ctx, r)
	_ = r.Close() // always nil
	if sendErr := <-sent; err == nil {
		err = sendErr
	}
	return done, err
}

// slowed keeps a writer to a rate.
type slowed struct {
	ctx     context.Context //nolint:containedctx // of the one copy that it is made for
	w       io.Writer
	rate    int64
	began   time.Time
	written int64
}

func (s *slowed) Write(b []byte) (int, error) {
	due := s.began.Add(time.Duration(float64(s.written) / float64(s.rate) * float64(time.Second)))
	if wait := time.Until(due); wait > 5*time.Millisecond {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	n, err := s.w.Write(b)
	s.written += int64(n)
	return n, err
}

// move makes the backup in dir, if it is the one with that id, the target.
func (b *backup) move(dir, id string) error {
	raw, err := os.ReadFile(filepath.Join(dir, backupDescription))
	if err != nil {
		return err
	}
	var info httpapi.Backup
	if err := json.Unmarshal(raw, &info); err != nil || info.ID != id {
		return errors.New("that is another one")
	}
	if err := os.Rename(dir, b.target); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(b.target))
}

const (
	backupDescription = "backup.json"
	maxDescription    = 16 << 20
	syncEvery         = 8 << 20 // so that a copy never leaves a gateway on the same disk much to wait for
)

// take reads an archive into the target, and sees that it is whole.
func (b *backup) take(ctx context.Context, r io.Reader) (_ *backedUp, err error) {
	how, sink := "archive", io.Writer(io.Discard)
	var file *os.File
	switch {
	case b.stdout:
		sink = b.p.stdout
	case b.archive:
		if file, err = os.OpenFile(b.partial(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return nil, err
		}
		sink = &syncing{f: file}
	default:
		how = "copied"
		if err = os.Mkdir(b.partial(), 0o700); err != nil {
			return nil, err
		}
	}
	if !b.stdout {
		defer func() {
			if err != nil {
				err = errors.Join(err, os.RemoveAll(b.partial()))
			}
		}()
	}
	if file != nil {
		defer file.Close()
	}
	info, err := b.unpack(ctx, io.TeeReader(r, sink))
	if err != nil || b.stdout {
		return &backedUp{info, b.target, how}, err
	}
	if file != nil {
		err = errors.Join(file.Sync(), file.Close())
	} else {
		err = errors.Join(syncFolder(filepath.Join(b.partial(), "store")), syncFolder(b.partial()))
	}
	if err == nil {
		if err = absent(b.target); err == nil { // somebody else may have been here
			err = os.Rename(b.partial(), b.target)
		}
	}
	if err == nil {
		err = syncFolder(filepath.Dir(b.target))
	}
	return &backedUp{info, b.target, how}, err
}

// unpack reads an archive to its end: into the target's folder, or only to see that it is whole.
func (b *backup) unpack(ctx context.Context, r io.Reader) (info httpapi.Backup, err error) {
	t := tar.NewReader(r)
	cut := func(err error) error {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends too early")
		}
		return fmt.Errorf("backup is not whole: %w", err)
	}
	h, err := t.Next()
	if err != nil {
		return info, cut(err)
	}
	raw, err := io.ReadAll(io.LimitReader(t, maxDescription))
	if err != nil {
		return info, cut(err)
	}
	if h.Name != backupDescription || json.Unmarshal(raw, &info) != nil || info.ID == "" {
		return info, errors.New("what came is not the backup of a holdfast")
	}
	if info.Version > 1 {
		return info, fmt.Errorf("backup is of version %d, made by a newer holdfast (%s): use that one", info.Version, info.Holdfast)
	}
	if !b.stdout {
		if free := diskFree(filepath.Dir(b.target)); free >= 0 && free < info.Bytes+info.Bytes/64+8<<20 {
			return info, fmt.Errorf("%s has %s free, and the backup takes %s", filepath.Dir(b.target), bytesText(free), bytesText(info.Bytes))
		}
	}
	if !b.archive {
		if err := os.Mkdir(filepath.Join(b.partial(), "store"), 0o700); err != nil {
			return info, err
		}
		if err := b.write(backupDescription, strings.NewReader(string(raw))); err != nil {
			return info, err
		}
	}
	var done atomic.Int64
	bar := newProgress(b.p.stderr)
	bar.total, bar.done = info.Bytes, done.Load
	bar.label = func(took time.Duration) string {
		return fmt.Sprintf("%s of %s%s", bytesText(done.Load()), bytesText(info.Bytes), perSecond(done.Load(), took))
	}
	bar.start()
	defer bar.clear()
	defer bar.stop()
	for _, want := range info.Files {
		h, err := t.Next()
		if err != nil {
			return info, cut(err)
		}
		folder, name := filepath.Split(filepath.FromSlash(want.Name))
		if h.Name != want.Name || h.Size != want.Size || filepath.Clean(folder) != "store" || name == "" || h.Typeflag != tar.TypeReg {
			return info, fmt.Errorf("backup is not whole: it has %q where %q of %d bytes should be", h.Name, want.Name, want.Size)
		}
		if err := b.write(want.Name, &counted{ctx: ctx, r: t, n: &done}); err != nil {
			return info, cut(err)
		}
	}
	if _, err := t.Next(); !errors.Is(err, io.EOF) {
		return info, fmt.Errorf("backup is not whole: something follows its last file, or its end is missing (%v)", err)
	}
	_, err = io.Copy(io.Discard, r) // the rest of the last block, for the file
	return info, err
}

func perSecond(n int64, took time.Duration) string {
	if took < time.Second {
		return ""
	}
	return fmt.Sprintf(", %s/s", bytesText(int64(float64(n)/took.Seconds())))
}

// counted counts what is read, until it is interrupted.
type counted struct {
	ctx context.Context //nolint:containedctx // of the one copy that it is made for
	r   io.Reader
	n   *atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// write makes a file in the folder, or reads what would be in it.
func (b *backup) write(name string, r io.Reader) error {
	if b.archive {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	f, err := os.OpenFile(filepath.Join(b.partial(), filepath.FromSlash(name)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(&syncing{f: f}, r)
	return errors.Join(err, f.Sync(), f.Close())
}

// syncing writes to a file and has it on disk in steps.
type syncing struct {
	f *os.File
	n int
}

func (s *syncing) Write(b []byte) (int, error) {
	n, err := s.f.Write(b)
	if s.n += n; err == nil && s.n >= syncEvery {
		s.n = 0
		err = s.f.Sync()
	}
	return n, err
}

// tell says what was backed up, to people.
func (b *backup) tell(d *backedUp) {
	out := *b.p
	if b.stdout {
		out.stdout = b.p.stderr
		d.Path = "stdout"
	}
	of := ""
	if d.Gateway != "" {
		of = " of gateway " + d.Gateway
	}
	fmt.Fprintf(out.stdout, "backup%s: %s, %s, %s\n\n", of, count(len(d.Files), "file"), bytesText(d.Bytes), d.Path)
	rows := [][]string{{"LANE", "ACCEPTED", "KEPT", "SIZE"}}
	for _, l := range d.Lanes {
		rows = append(rows, []string{l.Name, fmt.Sprint(l.Next - 1), fmt.Sprint(l.Kept.Messages), bytesText(l.Kept.Bytes)})
	}
	out.table(rows...)
	if d.How == "linked" {
		fmt.Fprintln(out.stdout, "\nIts tables are hard links: it holds their space until it is removed, and is lost with this disk.")
	} else {
		fmt.Fprintln(out.stdout)
	}
	fmt.Fprintln(out.stdout, "Not in it: the configuration, the files that it names, admin.token.")
}
