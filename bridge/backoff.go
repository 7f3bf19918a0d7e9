package bridge

import (
	"math/rand/v2"
	"time"
)

// backoff is the pause between two attempts to connect: a random time up to a ceiling (full jitter:
// ten thousand gateways whose upstream comes back do not return in step), which doubles from pause to pause.
type backoff struct {
	min, max time.Duration
	attempt  int // pauses since the link was last healthy
	attempts int // attempts since then: with several addresses more than one between two pauses
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

// well tells whether a link that made progress for so long clears the record: only a stretch at least
// as long as the pause that it cost does. So a link that comes up and is kicked again at once backs off like one that never came up.
func (b *backoff) well(healthy time.Duration) bool { return healthy >= max(b.ceiling(), time.Second) }

// next tells how long to pause after another attempt that ended, whose link made progress for so long.
func (b *backoff) next(healthy time.Duration) time.Duration {
	if b.attempt > 0 && b.well(healthy) {
		b.attempt, b.attempts = 0, 0
	}
	b.attempt++
	b.attempts++
	return time.Duration(b.rand(int64(b.ceiling()))) + 1
}

// again counts an attempt that is followed by another one at once.
func (b *backoff) again() { b.attempts++ }
