//go:build !linux

package devices

import "time"

// systemBoot is not known here: each start counts as a boot.
func systemBoot() (id string, since time.Duration) { return "", 0 }

// systemClockSynced cannot be known here; a desktop's clock is kept by its system.
func systemClockSynced() bool { return true }
