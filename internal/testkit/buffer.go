package testkit

import (
	"bytes"
	"strings"
	"sync"
)

// Buffer keeps what is written to it, such as a log. Many goroutines may use it.
type Buffer struct {
	mu sync.Mutex
	b  bytes.Buffer // under mu
}

// Write implements io.Writer.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String is all that was written.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Count is how often text was written.
func (b *Buffer) Count(text string) int { return strings.Count(b.String(), text) }
