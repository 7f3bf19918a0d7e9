package mqttup

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// notSent is how many bytes the kernel takes at first beyond what it has put on the wire; see speed. Without a
// bound it takes megabytes, and writing says nothing about progress.
const notSent = 16 << 10

// setSocketOptions bounds how many bytes wait for the wire, and how long they may stay unacknowledged on it:
// long enough that our own watch, which knows better words for it, comes first.
func setSocketOptions(c syscall.RawConn, stall time.Duration) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((2*stall + time.Second).Milliseconds())); err == nil {
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

// setUnsent changes how many bytes the kernel takes beyond what it has put on the wire. A socket that is gone is no matter.
func setUnsent(c syscall.RawConn, n int) {
	_ = c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, n) })
}
