//go:build !linux

package clock

import "time"

// systemBoot is not known here: each start counts as a boot.
func systemBoot() (id string, since time.Duration) { return "", 0 }

// kernelSynced cannot be known here; a desktop's clock is kept by its system.
func kernelSynced() bool { return true }
