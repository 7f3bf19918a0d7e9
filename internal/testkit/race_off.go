//go:build !race

package testkit

// Race says that the race detector is there.
const Race = false
