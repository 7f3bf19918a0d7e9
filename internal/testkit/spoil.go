package testkit

import (
	"fmt"
	"math/rand/v2"
)

// Spoil damages b, the bytes of a file, at one place as disks and power cuts do: a bit, zeros, noise, an end cut off, or a byte near the end,
// where many formats keep what matters most. It returns what is left, which may share memory with b, and says what it did.
func Spoil(b []byte, rnd *rand.Rand) (left []byte, what string) {
	if len(b) == 0 {
		return b, "nothing"
	}
	at := rnd.IntN(len(b))
	n := min(1+rnd.IntN(8192), len(b)-at)
	switch rnd.IntN(5) {
	case 0:
		b[at] ^= 1 << rnd.IntN(8)
		return b, fmt.Sprintf("bit at %d", at)
	case 1:
		clear(b[at : at+n])
		return b, fmt.Sprintf("%d zeros at %d", n, at)
	case 2:
		for i := range n {
			b[at+i] = byte(rnd.Uint32())
		}
		return b, fmt.Sprintf("%d bytes of noise at %d", n, at)
	case 3:
		return b[:at], fmt.Sprintf("cut to %d", at)
	default:
		at = len(b) - 1 - rnd.IntN(min(len(b), 200))
		b[at] ^= byte(1 + rnd.IntN(255))
		return b, fmt.Sprintf("byte at %d", at)
	}
}
