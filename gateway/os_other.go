//go:build !unix

package gateway

import (
	"errors"
	"os"
)

var errLocked = errors.New("locked by another process")

// lock leaves it to the store, which locks its own folder on every system.
func lock(*os.File) error { return nil }

// openToOthers is not known here: modes say nothing.
func openToOthers(os.FileInfo) bool { return false }
