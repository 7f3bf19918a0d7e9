//go:build !linux

package kv

import (
	"errors"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func allocate(*os.File, int64) error { return errors.ErrUnsupported }

func allocated(fi os.FileInfo) int64 { return fi.Size() }

func usage(dir string) (Usage, error) {
	u, err := vfs.Default.GetDiskUsage(dir)
	return Usage{Free: u.AvailBytes, Total: u.TotalBytes}, err
}
