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
