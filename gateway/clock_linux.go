package gateway

import "golang.org/x/sys/unix"

// clockSynced asks the kernel whether something (NTP, PTP, a GPS receiver) keeps its clock right.
func clockSynced() bool {
	var t unix.Timex // Modes 0: only look
	state, err := unix.Adjtimex(&t)
	const timeError = 5 // TIME_ERROR: adjtimex(2)
	return err == nil && state != timeError && t.Status&unix.STA_UNSYNC == 0
}
