//go:build !(linux && amd64)

package testkit

import (
	"errors"
	"os/exec"
	"time"
)

// NewFakeClock skips the test: see FakeClock.
func NewFakeClock(t T) *FakeClock {
	t.Skipf("the wall clock of one process can be set on Linux on amd64 only")
	return nil
}

type fakedProcess struct{}

func (*fakedProcess) set(time.Duration, bool) error { return errors.ErrUnsupported }

func (*FakeClock) start(*exec.Cmd) error { return errors.ErrUnsupported }
