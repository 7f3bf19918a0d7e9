package broker

import "net"

// WrapListeners has f stand between the sockets and the broker. Call it between Listen and Run.
func WrapListeners(b *Broker, f func(net.Listener) net.Listener) {
	for _, s := range b.sockets {
		s.ln = f(s.ln)
	}
}
