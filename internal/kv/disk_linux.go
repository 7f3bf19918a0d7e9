package kv

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// allocate gives the file n bytes of blocks. errors.ErrUnsupported where the file system cannot.
func allocate(f *os.File, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, n)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return errors.ErrUnsupported
		}
		return err
	}
}

// allocated gives the bytes of the blocks that a file has.
func allocated(fi os.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}

// fewFiles is how many files the store wants to be able to make.
const fewFiles = 64

func usage(dir string) (Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return Usage{}, os.NewSyscallError("statfs", err)
	}
	return Usage{
		Free: st.Bavail * uint64(st.Bsize), Total: st.Blocks * uint64(st.Bsize), //nolint:unconvert // their types differ between systems
		NoFiles: st.Files > 0 && st.Ffree < fewFiles,
	}, nil
}
