//go:build unix

package gateway

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

var errLocked = errors.New("locked by another process")

// lock takes the whole file for this process, without waiting.
func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errLocked
	}
	return err
}

// openToOthers says whether anybody but its owner may do something with a file.
func openToOthers(fi os.FileInfo) bool { return fi.Mode().Perm()&0o077 != 0 }

// diskFree gives the bytes that this user can still write on the file system of path, 0 if unknown.
func diskFree(path string) uint64 {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0
	}
	return uint64(st.Bavail) * uint64(st.Bsize) //nolint:unconvert // their types differ between systems
}

// fileLimit is how many descriptors this process may have: the runtime has raised the soft limit to the hard one. 0: unknown.
func fileLimit() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0
	}
	return int(min(uint64(l.Cur), 1<<30)) //nolint:unconvert // their types differ between systems
}
