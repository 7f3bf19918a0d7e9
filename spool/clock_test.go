package spool_test

import (
	"sync/atomic"
	"time"
)

// atomicTime is a clock that a test sets.
type atomicTime struct{ ms atomic.Int64 }

func (a *atomicTime) set(ms int64)   { a.ms.Store(ms) }
func (a *atomicTime) get() time.Time { return time.UnixMilli(a.ms.Load()) }
