//go:build !linux

package mqttup

import (
	"syscall"
	"time"
)

// Elsewhere keep-alive probes and the bridge's own watch have to do.

func setSocketOptions(syscall.RawConn, time.Duration) error { return nil }
func unsentBytes(syscall.RawConn) uint64                    { return 0 }
func setUnsent(syscall.RawConn, int)                        {}
