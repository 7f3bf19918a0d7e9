package mqttup

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// notSent is how many bytes the kernel takes beyond what it has put on the wire. Enough for any
// link to stay busy; without a bound it takes megabytes, and writing says nothing about progress.
const notSent = 128 << 10

// setSocketOptions bounds how long bytes may stay unacknowledged on the wire, and how many wait for it.
func setSocketOptions(c syscall.RawConn, stall time.Duration) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(stall.Milliseconds())); err == nil {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent)
		}
	}); cerr != nil {
		return cerr
	}
	return err
}

// unsentBytes is how many bytes the kernel holds that the peer's has not acknowledged.
func unsentBytes(c syscall.RawConn) uint64 {
	var n int
	var err error
	if cerr := c.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil || err != nil || n < 0 {
		return 0
	}
	return uint64(n)
}
