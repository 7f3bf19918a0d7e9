package clock

import (
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// systemBoot asks the kernel which boot this is and how long ago it was, the time asleep included.
//
//go:noinline
func systemBoot() (id string, since time.Duration) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0
	}
	return bootID(), time.Duration(ts.Nano())
}

// kernelSynced asks the kernel whether something (NTP, PTP, a GPS receiver) keeps its clock right.
//
//go:noinline
func kernelSynced() bool {
	var t unix.Timex // Modes 0: only look
	state, err := unix.Adjtimex(&t)
	const timeError = 5 // TIME_ERROR: adjtimex(2)
	return err == nil && state != timeError && t.Status&unix.STA_UNSYNC == 0
}
