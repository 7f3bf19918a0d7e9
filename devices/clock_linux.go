package devices

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// systemBoot asks the kernel which boot this is and how long ago it was, the time asleep included.
func systemBoot() (id string, since time.Duration) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", 0
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0
	}
	return strings.TrimSpace(string(b)), time.Duration(ts.Nano())
}

// systemClockSynced asks the kernel whether something (NTP, PTP, a GPS receiver) keeps its clock right.
func systemClockSynced() bool {
	var t unix.Timex // Modes 0: only look
	state, err := unix.Adjtimex(&t)
	const timeError = 5 // TIME_ERROR: adjtimex(2)
	return err == nil && state != timeError && t.Status&unix.STA_UNSYNC == 0
}
