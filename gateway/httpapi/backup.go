package httpapi

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"holdfast/internal/audit"
)

// defaultRate is how fast a long answer is read from the disk, bytes a second: devices' messages go before it.
const defaultRate = 32 << 20

// backup is POST /backup.
func (s *Server) backup(c *call) error {
	var o NewBackup
	b, _, err := c.body(true, typeJSON)
	if err != nil {
		return err
	}
	if len(b) > 0 {
		if err := decodeStrict(b, &o); err != nil {
			return err
		}
	}
	if o.Rate < 0 {
		return failf(codeBadBody, "bytes_per_second: it cannot be negative")
	}
	bak, err := s.p.Backups.Backup()
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if err := bak.Close(keep); err != nil {
			s.log.Warn("backup's working copy stays until the next start, and holds space", "file", bak.Dir, "err", err)
		}
	}()
	c.object = bak.Info.ID
	if o.Keep {
		keep = true
		return c.reply(http.StatusCreated, BackupKept{Backup: bak.Info, Path: bak.Dir})
	}
	out, err := s.bulk(c, "application/x-tar", o.Rate)
	if err != nil {
		return err
	}
	defer out.end()
	if err := WriteBackup(out, bak); err != nil {
		out.abort(err)
	}
	return nil
}

// WriteBackup writes bak as a tar archive: backup.json, then the files that it lists.
func WriteBackup(w io.Writer, bak *BackupCopy) error {
	t := tar.NewWriter(w)
	buf := make([]byte, 128<<10)
	for i := -1; i < len(bak.Info.Files); i++ {
		name, size := "backup.json", int64(-1)
		if i >= 0 {
			name, size = bak.Info.Files[i].Name, bak.Info.Files[i].Size
		}
		if err := addFile(t, bak, name, size, buf); err != nil {
			return fmt.Errorf("send %s: %w", name, err)
		}
	}
	return t.Close()
}

// addFile adds a file; size -1: as large as it is.
func addFile(t *tar.Writer, bak *BackupCopy, name string, size int64, buf []byte) error {
	f, err := os.Open(filepath.Join(bak.Dir, filepath.FromSlash(name)))
	if err != nil {
		return err
	}
	defer f.Close()
	if size < 0 {
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		size = fi.Size()
	}
	if err := t.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o600, ModTime: bak.Info.Time, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{t}, f, buf)
	return err
}

// bulk is an answer that may be long. It ends when the server stops, goes no faster than it may, and a reader that takes nothing
// is cut off.
type bulk struct {
	s       *Server
	c       *call
	rc      *http.ResponseController
	rate    int64
	began   time.Time
	written int64 // bytes, and those that were read only to be passed over
}

// bulk begins one, once it is in the audit log.
func (s *Server) bulk(c *call, mime string, rate int64) (*bulk, error) {
	if err := s.note(c, audit.Begun); err != nil {
		return nil, err
	}
	c.w.release()
	if rate == 0 {
		rate = defaultRate
	}
	c.w.Header().Set("Content-Type", mime)
	c.w.WriteHeader(http.StatusOK)
	b := &bulk{s: s, c: c, rc: http.NewResponseController(c.w), rate: rate, began: time.Now()}
	_ = b.rc.SetReadDeadline(time.Time{}) // else the server's ends the request; not every writer has one
	return b, nil
}

var errStops = errors.New("gateway stops")

// pace waits until as much may have been written as was, or the answer has to end.
func (b *bulk) pace() error {
	ctx := b.c.r.Context()
	due := b.began.Add(time.Duration(float64(b.written) / float64(b.rate) * float64(time.Second)))
	if wait := time.Until(due); wait > 5*time.Millisecond {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		case <-b.s.stopping:
		}
	} else if wait < -time.Second {
		b.began = b.began.Add(-wait - time.Second) // a reader that was slow must not be followed by a burst
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-b.s.stopping:
		return errStops
	default:
		return nil
	}
}

// Write implements io.Writer.
func (b *bulk) Write(p []byte) (int, error) {
	if err := b.pace(); err != nil {
		return 0, err
	}
	_ = b.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	n, err := b.c.w.Write(p)
	b.written += int64(n)
	return n, err
}

// end gives the end of the answer time to get out.
func (b *bulk) end() { _ = b.rc.SetWriteDeadline(time.Now().Add(writeTimeout)) }

// abort ends the answer so that the caller sees that it is not whole.
func (b *bulk) abort(err error) {
	b.c.aborted = true
	b.s.log.Warn("answer cut off", "route", b.c.row.name(), "who", b.c.who, "sent_bytes", b.written, "err", err)
}
