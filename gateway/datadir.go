package gateway

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"holdfast/bridge/wire"
	"holdfast/internal/kv"
	"holdfast/spool"
)

// What lies in data_dir.
const (
	storeDir    = "store"         // the Pebble store
	ballastFile = "reserve"       // blocks of the disk reserve, given up when the disk is full
	lockFile    = "holdfast.lock" // held while a gateway or a tool has the store open; tells its process id
)

// InUseError says that another process has a data directory open.
type InUseError struct {
	Dir string
	PID int // 0: not known
}

// Error names the process and the way out.
func (e *InUseError) Error() string {
	who := "another process"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("data directory %s is in use by %s (%s): stop that one, or give this gateway its own gateway.data_dir",
		e.Dir, who, filepath.Join(e.Dir, lockFile))
}

// dataDir is a locked data directory.
type dataDir struct {
	path string
	lock *os.File
}

// openDataDir makes the folder if create is set, checks that it can be written, and locks it.
func openDataDir(path string, create bool) (*dataDir, error) {
	if create {
		if err := mkdirAll(path); err != nil {
			return nil, dirError(path, err)
		}
	} else if _, err := os.Stat(filepath.Join(path, storeDir)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no gateway has kept anything in %s: name its data_dir with --data-dir, or its file with --config", path)
		}
		return nil, dirError(path, err)
	}
	f, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, dirError(path, err)
	}
	// The lock belongs to the open file: it ends with the process, however that ends, so a file left
	// behind means nothing.
	if err := lock(f); err != nil {
		defer f.Close()
		if !errors.Is(err, errLocked) {
			return nil, dirError(path, err)
		}
		b, _ := io.ReadAll(io.LimitReader(f, 32))
		pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		return nil, &InUseError{Dir: path, PID: pid}
	}
	pid := []byte(strconv.Itoa(os.Getpid()) + "\n")
	if _, err = f.WriteAt(pid, 0); err == nil {
		err = f.Truncate(int64(len(pid)))
	}
	if err != nil && !errors.Is(err, syscall.ENOSPC) { // on a full disk nobody is told the number
		f.Close()
		return nil, dirError(path, err)
	}
	return &dataDir{path: path, lock: f}, nil
}

// store is the path of the store.
func (d *dataDir) store() string { return filepath.Join(d.path, storeDir) }

// ballast is the path of the file that holds a part of the disk reserve.
func (d *dataDir) ballast() string { return filepath.Join(d.path, ballastFile) }

// Close lets others have it. Twice is no harm.
func (d *dataDir) Close() error {
	if d.lock == nil {
		return nil
	}
	f := d.lock
	d.lock = nil
	return f.Close()
}

func dirError(path string, err error) error {
	var pe *fs.PathError
	hint := ""
	if errors.Is(err, fs.ErrPermission) || errors.As(err, &pe) && strings.Contains(pe.Err.Error(), "read-only") {
		hint = fmt.Sprintf(": give it to the user that holdfast runs as (id %d), or set gateway.data_dir to a folder that it can write", os.Getuid())
	}
	return fmt.Errorf("data directory %s: %w%s", path, err, hint)
}

// mkdirAll makes a folder and those above it, and has their names on disk before anything is
// acknowledged that lies in them.
func mkdirAll(path string) error {
	if fi, err := os.Stat(path); err == nil {
		if !fi.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: errors.New("is a file, not a folder")}
		}
		return nil
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := mkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return nil // a folder that may be entered and not read: it is not ours to sync
		}
		return err
	}
	defer d.Close()
	return d.Sync()
}

// OpenSpool opens what a gateway that is not running has left in its data directory, for tools that
// look and change nothing. closeAll gives everything back.
func OpenSpool(path string, log *slog.Logger) (sp *spool.Spool, closeAll func() error, err error) {
	return openSpool(path, "", false, log)
}

// OpenSpoolToChange is OpenSpool for tools that change something. gateway is the id of a gateway that has never had
// the store open in a version that notes it.
func OpenSpoolToChange(path, gateway string, log *slog.Logger) (sp *spool.Spool, closeAll func() error, err error) {
	return openSpool(path, gateway, true, log)
}

func openSpool(path, gateway string, change bool, log *slog.Logger) (*spool.Spool, func() error, error) {
	dir, store, sp, err := openForTools(path, gateway, change, log)
	if err != nil {
		return nil, nil, err
	}
	return sp, func() error { return errors.Join(sp.Close(), store.Close(), dir.Close()) }, nil
}

func openForTools(path, gateway string, change bool, log *slog.Logger) (*dataDir, *kv.Store, *spool.Spool, error) {
	dir, err := openDataDir(path, false)
	if err != nil {
		return nil, nil, nil, err
	}
	cfg := spool.Config{Log: log}
	if change {
		// What is changed is announced, under ids that nothing else has: those of a backup are not ours to go on with.
		restored, err := dir.restored(log)
		if err != nil {
			return nil, nil, nil, errors.Join(err, dir.Close())
		}
		if restored != nil {
			cfg.Restored = restored.ID
		}
	}
	store, err := kv.Open(dir.store(), kv.Options{
		Log: log, Fatal: func(err error) { log.Error("store failed", "err", err) },
		Guard: &kv.Guard{Look: true, Ballast: dir.ballast()}, Look: !change,
	})
	if err != nil {
		return nil, nil, nil, errors.Join(err, dir.Close())
	}
	var sp *spool.Spool
	if cfg.Gateway, err = spool.GatewayOf(store); err == nil {
		if cfg.Gateway == "" {
			cfg.Gateway = gateway
		}
		if cfg.Gateway != "" {
			cfg.GapTopic = wire.GapTopic(cfg.Gateway)
		}
		sp, err = spool.Open(store, cfg)
	}
	if err != nil {
		return nil, nil, nil, errors.Join(err, store.Close(), dir.Close())
	}
	return dir, store, sp, nil
}
