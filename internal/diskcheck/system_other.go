//go:build !linux

package diskcheck

import "os"

const direct, dsync = 0, 0

func datasync(f *os.File) error { return f.Sync() }

func unsupported(err error) error { return err }

func aligned(n int) []byte { return make([]byte, n) }

// facts is not known here.
func facts(dir string) (Facts, error) { return Facts{Dir: dir, FreeBytes: -1}, nil }
