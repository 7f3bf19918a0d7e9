package bridge

import "sync/atomic"

// Meter counts the bytes that go out to one upstream, on all its connections, as the network is given them: the framing of
// MQTT and of TLS is in it, that of TCP and IP is not. A nil one counts nothing.
type Meter struct{ n atomic.Uint64 }

// Add counts n bytes.
func (m *Meter) Add(n int) {
	if m != nil {
		m.n.Add(uint64(n))
	}
}

// Total is what was counted so far.
func (m *Meter) Total() uint64 {
	if m == nil {
		return 0
	}
	return m.n.Load()
}

// Metered is an Upstream that counts what it sends. Meter is called before the first Dial.
type Metered interface{ Meter(m *Meter) }
