package bridge

import (
	"math/rand/v2"
	"time"
)

// backoff is the pause between two attempts to connect: a random time up to a ceiling (full jitter:
// ten thousand gateways whose upstream comes back do not return in step), which doubles from attempt to attempt.
type backoff struct {
	min, max time.Duration
	attempt  int // attempts since the link was last healthy
	rand     func(n int64) int64
}

func newBackoff(lo, hi time.Duration) *backoff {
	return &backoff{min: lo, max: hi, rand: rand.Int64N}
}

// ceiling is the longest that the next pause may be.
func (b *backoff) ceiling() time.Duration {
	c := b.min
	for range b.attempt - 1 {
		if c *= 2; c >= b.max {
			return b.max
		}
	}
	return c
}

// next tells how long to pause after another attempt that ended. healthy is how long the link made progress:
// only a stretch at least as long as the pause that it cost clears the record. So a link that
// comes up and is kicked again at once backs off like one that never came up.
func (b *backoff) next(healthy time.Duration) time.Duration {
	if b.attempt > 0 && healthy >= max(b.ceiling(), time.Second) {
		b.attempt = 0
	}
	b.attempt++
	return time.Duration(b.rand(int64(b.ceiling()))) + 1
}
