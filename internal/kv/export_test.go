package kv

import "time"

// SetFullWait sets how long a log waits for space.
func (o *Options) SetFullWait(d time.Duration) { o.fullWait = d }
