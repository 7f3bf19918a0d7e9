//go:build unix

package pki

import (
	"os"
	"syscall"
)

// lock waits for the folder: two processes that issue at once would lose lines of the index or a list.
func (a *Authority) lock() (unlock func(), err error) {
	f, err := os.OpenFile(a.Path(".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return func() { _ = f.Close() }, nil
}
