package broker_test

import (
	"crypto/tls"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

func TestHandshakesTakeTurns(t *testing.T) {
	got := broker.Turns(false, false, true, false, true)
	if want := []int{2, 4, 0, 1, 3}; !slices.Equal(got, want) {
		t.Errorf("places go to %v, want %v: first who has begun, then who came first", got, want)
	}
}

// TestHandshakesWait has devices come while no handshake may compute, for longer than CONNECT may take: who has waited for the
// gateway is not late, and who has gone meanwhile costs nothing.
func TestHandshakesWait(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	cert, key := ca.issue("gateway")
	r := newRig(t, func(r *rig) {
		r.cfg.ConnectTimeout = 300 * time.Millisecond
		r.cfg.Listeners = append(r.cfg.Listeners, broker.Listener{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: broker.TLS{Cert: cert, Key: key}})
	})
	secure := r.b.Addrs()[1].String()
	connected := r.client(mqtt.V311, "connected")
	release := broker.HoldPlaces(r.b)
	const stay, leave = 20, 5
	in := make(chan error, stay)
	for range stay {
		c := tls.Client(testkit.Dial(t, secure), ca.client(""))
		t.Cleanup(func() { c.Close() })
		go func() { in <- c.HandshakeContext(t.Context()) }()
	}
	var leavers []net.Conn
	var gone sync.WaitGroup
	for range leave {
		nc := testkit.Dial(t, secure)
		leavers = append(leavers, nc)
		gone.Go(func() { _ = tls.Client(nc, ca.client("")).HandshakeContext(t.Context()) })
	}
	eventually(t, "all wait", func() bool { return r.metric("handshakes_waiting") == stay+leave })
	connected.publish(1, 1, "t", "not held up")
	connected.success(mqtt.TypePuback, 1)
	for _, nc := range leavers {
		nc.Close()
	}
	gone.Wait()
	<-time.After(2 * r.cfg.ConnectTimeout)
	release()
	for range stay {
		if err := <-in; err != nil {
			t.Errorf("a device that waited for its handshake: %v", err)
		}
	}
	r.counted(leave, "handshakes_abandoned_total")
}
