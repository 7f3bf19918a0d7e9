package broker

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hungUp says whether the peer has closed its side of the connection, or all of it. What it sent before may still lie there.
func hungUp(nc net.Conn) (gone bool) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}

// silentPeers has the kernel end connections whose peer is gone without a word: a client without keep alive would else stay
// for good, and one that is owed data for a quarter of an hour. Probes begin after silence, so that they wake no radio
// before its keep alive would.
func silentPeers(silence time.Duration) func(network, address string, rc syscall.RawConn) error {
	return func(_, _ string, rc syscall.RawConn) error {
		var err error
		e := rc.Control(func(fd uintptr) {
			seconds := max(int(silence/time.Second), 4)
			for _, o := range []struct{ level, name, value int }{
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds},
				{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds / 4},
				{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
				{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, seconds * 1000},
			} {
				if err == nil {
					err = unix.SetsockoptInt(int(fd), o.level, o.name, o.value)
				}
			}
		})
		if e != nil {
			return e
		}
		return err
	}
}
