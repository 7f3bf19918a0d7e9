package broker

import "net"

// WrapListeners has f stand between the sockets and the broker. Call it between Listen and Run.
func WrapListeners(b *Broker, f func(net.Listener) net.Listener) {
	for _, s := range b.sockets {
		s.ln = f(s.ln)
	}
}

// ReadBuffer gives the sizes of the read and write buffers that open connections hold.
// It is for connections that are known to be silent.
func Buffers(b *Broker) (read, write int) {
	b.connMu.Lock()
	defer b.connMu.Unlock()
	for c := range b.conns {
		read += len(c.buf)
		c.mu.Lock()
		if c.out != nil {
			write += cap(c.out.b)
		}
		c.mu.Unlock()
	}
	return read, write
}
