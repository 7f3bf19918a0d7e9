//go:build unix

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// sameDisk says whether two paths that are there lie on one file system, so that one can be moved beside the other.
func sameDisk(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev
}

// diskFree gives the bytes that this user can write on the file system of path, -1 if that is not known.
func diskFree(path string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return -1
	}
	return int64(st.Bavail) * int64(st.Bsize) //nolint:unconvert // their types differ between systems
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
