package broker

import (
	"net"
	"time"
)

// LookEvery sets how often the files of TLS listeners are looked at. Call it before anything runs.
func LookEvery(d time.Duration) { lookEvery = d }

// WrapListeners has f stand between the sockets and the broker. Call it between Listen and Run.
func WrapListeners(b *Broker, f func(net.Listener) net.Listener) {
	for _, s := range b.sockets {
		s.ln = f(s.ln)
	}
}

// SetLastID sets the packet id that was given last to a delivery for a client.
func SetLastID(b *Broker, client string, id uint16) {
	s := b.lookup(client)
	s.mu.Lock()
	s.lastID = id
	s.mu.Unlock()
}

// StaleID gives the row of a QoS 2 packet id as another incarnation of the session left it.
func StaleID(client string, id uint16) (key, value []byte) {
	return appendQoS2Key(nil, client, 12345, id), rowV1
}
