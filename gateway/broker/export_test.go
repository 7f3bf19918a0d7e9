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

// HoldPlaces takes all places in which TLS handshakes compute, until release.
func HoldPlaces(b *Broker) (release func()) {
	n := 0
	for b.places.take(false) == nil {
		n++
	}
	b.places.mu.Lock()
	b.places.fresh.Init() // the ticket that was one too many
	b.places.mu.Unlock()
	return func() {
		for range n {
			b.places.leave()
		}
	}
}

// Turns has handshakes ask for one place in the given order (true: it has computed before) and tells the order in which
// they get it.
func Turns(begun ...bool) (order []int) {
	p := &places{}
	tickets := make([]*ticket, len(begun))
	for i, b := range begun {
		tickets[i] = p.take(b)
	}
	for range begun {
		p.leave()
		for i, t := range tickets {
			if t == nil {
				continue
			}
			select {
			case <-t.turn:
				order, tickets[i] = append(order, i), nil
			default:
			}
		}
	}
	return order
}
