package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"holdfast/bridge/wire"
	"holdfast/gateway/httpapi"
	"holdfast/internal/kv"
	"holdfast/spool"
)

const (
	// backupFile describes a backup. In a data_dir that was made of one it stays until the first start, which
	// begins a new epoch because of it.
	backupFile = "backup.json"
	// backupTmp is where a backup is made, below data_dir: there hard links are possible. What a crash leaves
	// of it goes with the next start.
	backupTmp = "backup.tmp"

	backupV1 = 1
	// maxBackupFile bounds what is read of a backup.json: 100,000 files have less.
	maxBackupFile = 16 << 20
)

// Backup implements httpapi.Backups.
func (g *Gateway) Backup() (*httpapi.BackupCopy, error) {
	if !g.backing.TryLock() {
		return nil, httpapi.ErrBackupRuns
	}
	dir := filepath.Join(g.dir.path, backupTmp)
	if err := os.RemoveAll(dir); err != nil { // one that was kept and that nobody has moved
		g.backing.Unlock()
		return nil, fmt.Errorf("back up: %w", err)
	}
	begin := time.Now()
	info, err := makeBackup(g.store, g.spool, dir, g.dir.store(), g.cfg.Gateway.ID, g.version)
	if err != nil {
		g.backing.Unlock()
		return nil, err
	}
	g.log.Info("backup made", "backup", info.ID, "size_bytes", info.Bytes, "files", len(info.Files), "took_ms", time.Since(begin).Milliseconds())
	return &httpapi.BackupCopy{Info: info, Dir: dir, Close: func(keep bool) error {
		defer g.backing.Unlock()
		if keep {
			return nil
		}
		return os.RemoveAll(dir)
	}}, nil
}

// Backup copies what a gateway that is not running has in its data directory to dir, which must not be there.
func Backup(path, dir, version string, log *slog.Logger) (info httpapi.Backup, err error) {
	d, store, sp, err := openForTools(path, "", false, log)
	if err != nil {
		return info, err
	}
	defer func() { err = errors.Join(err, sp.Close(), store.Close(), d.Close()) }()
	return makeBackup(store, sp, dir, d.store(), sp.Gateway(), version)
}

// makeBackup copies the store in the folder from to dir, which must not be there, and describes it. After an error there is
// nothing of it left.
func makeBackup(store *kv.Store, sp *spool.Spool, dir, from, gateway, version string) (info httpapi.Backup, err error) {
	if err := roomFor(dir, from); err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	id, err := uuid.NewV7()
	if err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	info = httpapi.Backup{Version: backupV1, ID: id.String(), Gateway: gateway, Epoch: sp.Epoch(), Holdfast: version, Time: time.Now().UTC().Truncate(time.Millisecond)}
	if err := store.Checkpoint(filepath.Join(dir, storeDir)); err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	for _, l := range sp.Lanes() {
		info.Lanes = append(info.Lanes, httpapi.BackupLane{Name: l.Name, Next: l.Accepted.Messages + 1, Kept: l.Kept})
	}
	entries, err := os.ReadDir(filepath.Join(dir, storeDir))
	if err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			return info, fmt.Errorf("back up: %w", err)
		}
		info.Files = append(info.Files, httpapi.BackupFile{Name: storeDir + "/" + e.Name(), Size: fi.Size()})
		info.Bytes += fi.Size()
	}
	b, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	if err := writeSynced(filepath.Join(dir, backupFile), append(b, '\n')); err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	if err := syncDir(dir); err != nil {
		return info, fmt.Errorf("back up: %w", err)
	}
	return info, syncDir(filepath.Dir(dir))
}

// roomFor refuses a backup that would fill the disk: the log and the manifest are copied whatever the file system can.
func roomFor(dir, store string) error {
	need := uint64(8 << 20)
	entries, err := os.ReadDir(store)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".sst") {
			continue
		}
		if fi, err := e.Info(); err == nil { // else it has just gone
			need += uint64(fi.Size())
		}
	}
	if free := diskFree(filepath.Dir(dir)); free != 0 && free < need {
		return fmt.Errorf("the disk of %s has %d MiB free, and %d MiB are needed: remove something, or let the spool drain", filepath.Dir(dir), free>>20, need>>20)
	}
	return nil
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// sweepBackup removes what a backup has left that did not come to its end.
func (d *dataDir) sweepBackup(log *slog.Logger) {
	tmp := filepath.Join(d.path, backupTmp)
	if _, err := os.Lstat(tmp); errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err := os.RemoveAll(tmp); err != nil {
		log.Warn("left-over of a backup stays and holds space", "file", tmp, "err", err)
		return
	}
	log.Info("left-over of a backup removed", "file", tmp)
}

// restored reads the mark that this data directory was made of a backup; nil: it was not.
func (d *dataDir) restored(log *slog.Logger) (*httpapi.Backup, error) {
	path := filepath.Join(d.path, backupFile)
	f, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("mark of a backup: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxBackupFile))
	if err != nil {
		return nil, fmt.Errorf("mark of a backup: %w", err)
	}
	var info httpapi.Backup
	if err := json.Unmarshal(b, &info); err != nil || info.Version < 1 || info.ID == "" {
		// What matters is that there is one: ids must not be used again. Its id has to be the same at the next try.
		sum := sha256.Sum256(b)
		log.Error("mark of a backup is damaged, and counts all the same", "file", path, "err", err)
		return &httpapi.Backup{Version: backupV1, ID: "damaged-" + hex.EncodeToString(sum[:8])}, nil
	}
	if info.Version > backupV1 {
		return nil, fmt.Errorf("%s is of version %d: the backup was made by a newer holdfast (%s): install that one", path, info.Version, info.Holdfast)
	}
	for _, file := range info.Files {
		fi, err := os.Stat(filepath.Join(d.path, filepath.FromSlash(file.Name)))
		switch {
		case err != nil:
			log.Error("backup is not complete: a file is missing", "file", file.Name)
		case fi.Size() != file.Size && !strings.HasSuffix(file.Name, ".log"): // a tool that looked may have read the log in
			log.Error("backup is not complete: a file has another size", "file", file.Name, "size_bytes", fi.Size(), "expected_bytes", file.Size)
		}
	}
	return &info, nil
}

// forgetReceived removes the packet ids of QoS 2 messages that a restored store has as received: since the backup was made
// devices have used them for other messages, which would be acknowledged as repeats and not stored.
func forgetReceived(store *kv.Store) error {
	var ops []kv.Op
	err := store.Scan([]byte{kv.PrefixQoS2}, func(k, _ []byte) error {
		ops = append(ops, kv.Op{Key: slices.Clone(k), Delete: true})
		return nil
	})
	if err != nil {
		return err
	}
	for part := range slices.Chunk(ops, 10_000) {
		if err := store.ApplyWait(part); err != nil {
			return err
		}
	}
	return nil
}

// announceRestore tells the cloud that ids have a new epoch, and then takes the mark away. If it comes to neither, the next start
// does both again, without another epoch.
func (g *Gateway) announceRestore(info *httpapi.Backup) error {
	now := g.clock.Read()
	e := wire.Restored{
		Gateway: g.cfg.Gateway.ID, Epoch: g.spool.Epoch(), PreviousEpoch: info.Epoch, Backup: info.ID, RestoredMS: now.Wall, Lanes: []wire.RestoredLane{},
	}
	if past := g.spool.PastEpochs(); len(past) > 0 {
		e.PreviousEpoch = past[len(past)-1]
	}
	if !info.Time.IsZero() {
		e.BackupMS = info.Time.UnixMilli()
	}
	for _, l := range g.spool.Lanes() {
		_, first, _ := g.spool.EpochOf(l.Name, l.Accepted.Messages+1)
		e.Lanes = append(e.Lanes, wire.RestoredLane{Lane: l.Name, Next: max(first, 1)})
	}
	payload, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("announce restore: %w", err)
	}
	lane, ok := g.spool.Lane(spool.SystemLane)
	if !ok {
		return fmt.Errorf("announce restore: lane %q: %w", spool.SystemLane, spool.ErrNoLane)
	}
	r := spool.Record{
		Received: now.Wall, Uptime: now.Uptime(), Topic: []byte(wire.RestoredTopic(g.cfg.Gateway.ID)), Flags: spool.FlagQoS1, Payload: payload,
		Props: &spool.Props{ContentType: "application/json"},
	}
	if now.Unsynced {
		r.Flags |= spool.FlagClockUnsynced
	}
	done := make(waitDone, 1)
	if err := g.spool.Append(lane, &r, nil, done, 0, false); err != nil {
		return fmt.Errorf("announce restore: %w", err)
	}
	if err := <-done; err != nil {
		return fmt.Errorf("announce restore: %w", err)
	}
	if err := os.Remove(filepath.Join(g.dir.path, backupFile)); err != nil {
		return fmt.Errorf("remove mark of a backup: %w", err)
	}
	if err := syncDir(g.dir.path); err != nil {
		return fmt.Errorf("remove mark of a backup: %w", err)
	}
	g.log.Warn("store is restored from a backup: what was taken since is not here, and new messages get a new epoch",
		"backup", info.ID, "made_at", info.Time, "previous_epoch", e.PreviousEpoch, "epoch", e.Epoch)
	return nil
}

type waitDone chan error

func (w waitDone) Done(_, _ uint64, err error) { w <- err }
