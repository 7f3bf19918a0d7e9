//go:build !linux

package powercut

import "errors"

// Mount is a disk in the file tree: on Linux only.
type Mount struct{ Dir string }

// Available says why disks cannot be mounted here.
func Available() error { return errors.New("no FUSE here: disks are mounted on Linux only") }

// MountAt returns an error.
func MountAt(string, *Disk) (*Mount, error) { return nil, Available() }

// Release does nothing.
func (*Mount) Release() {}

// Unmount does nothing.
func (*Mount) Unmount() error { return nil }
