package e2e_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// attack is what one hostile client does on a connection of its own. The connection is closed when it returns.
type attack struct {
	name string
	run  func(conn net.Conn, rng *rand.Rand)
	// ends: the gateway must close the connection by itself within this time.
	ends time.Duration
}

func connectFrame(v mqtt.Version, id string) []byte {
	return mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: id, CleanStart: true, KeepAlive: 60})
}

// send writes what it can: the gateway may have had enough.
func send(conn net.Conn, frames ...[]byte) {
	for _, f := range frames {
		if _, err := conn.Write(f); err != nil {
			return
		}
	}
}

var attacks = []attack{
	{name: "says nothing", ends: 15 * time.Second, run: func(net.Conn, *rand.Rand) {}},
	{name: "half a CONNECT", ends: 15 * time.Second, run: func(c net.Conn, _ *rand.Rand) { send(c, connectFrame(mqtt.V5, "half")[:7]) }},
	{name: "dribbles a CONNECT", ends: 15 * time.Second, run: func(c net.Conn, _ *rand.Rand) {
		for _, b := range connectFrame(mqtt.V311, "dribble-dribble-dribble-dribble") {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
			<-time.After(time.Second)
		}
	}},
	{name: "random bytes", ends: 15 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		b := make([]byte, 4096)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		b[0] = 0xf7 // no packet begins like this
		send(c, b)
	}},
	{name: "claims 256 MB before it is known", ends: 15 * time.Second, run: func(c net.Conn, _ *rand.Rand) {
		send(c, []byte{0x10, 0xff, 0xff, 0xff, 0x7f}, make([]byte, 1000))
	}},
	{name: "claims 256 MB once connected", ends: 5 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V5, id(rng)), []byte{0x30, 0xff, 0xff, 0xff, 0x7f})
	}},
	{name: "SUBSCRIBE cut before its options", ends: 5 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V5, id(rng)), []byte{0x82, 6, 0, 1, 0, 0, 1, 'a'})
	}},
	{name: "wildcard in a topic", ends: 5 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V311, id(rng)), []byte{0x32, 6, 0, 2, 'a', '#', 0, 1})
	}},
	{name: "packet id 0", ends: 5 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V5, id(rng)), []byte{0x32, 6, 0, 1, 'a', 0, 0, 0})
	}},
	{name: "second CONNECT", ends: 5 * time.Second, run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V311, id(rng)), connectFrame(mqtt.V311, id(rng)))
	}},
	{name: "pretends to be the gateway", run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V5, id(rng)), mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 1, ID: 1, Topic: []byte("gw/" + gatewayID + "/evt/gap"), Payload: []byte("{}")}))
		<-time.After(100 * time.Millisecond)
	}},
	{name: "subscribes to all and never reads", run: func(c net.Conn, rng *rand.Rand) {
		send(c, connectFrame(mqtt.V311, id(rng)), mqtt.AppendSubscribe(nil, mqtt.V311, &mqtt.Subscribe{ID: 1, Filters: []mqtt.Subscription{{Filter: "#", QoS: 1}}}))
		<-time.After(3 * time.Second)
	}},
	{name: "publishes and never reads acks", run: func(c net.Conn, rng *rand.Rand) {
		frames := connectFrame(mqtt.V5, id(rng))
		for i := range 20_000 {
			frames = mqtt.AppendPublish(frames, mqtt.V5, &mqtt.Publish{QoS: 1, ID: uint16(i%100 + 1), Topic: []byte("hostile/flood"), Payload: make([]byte, 64)})
		}
		_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second)) // a gateway that stops reading is right to
		send(c, frames)
	}},
	{name: "takes its own id over, again and again", run: func(c net.Conn, _ *rand.Rand) {
		send(c, connectFrame(mqtt.V311, "storm"))
		<-time.After(5 * time.Millisecond)
	}},
	{name: "mutated packets", run: func(c net.Conn, rng *rand.Rand) {
		frame := mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 2, ID: 7, Topic: []byte("a/b"), Payload: []byte("payload"), ContentType: []byte("text/plain"), HasExpiry: true, Expiry: 9})
		frame = mqtt.AppendSubscribe(frame, mqtt.V5, &mqtt.Subscribe{ID: 3, SubscriptionID: 9, Filters: []mqtt.Subscription{{Filter: "$share/g/a/+", QoS: 2}}})
		frame[rng.IntN(len(frame))] ^= byte(1 << rng.IntN(8))
		send(c, connectFrame(mqtt.V5, id(rng)), frame[:1+rng.IntN(len(frame))])
		<-time.After(20 * time.Millisecond)
	}},
}

func id(rng *rand.Rand) string {
	return string(rune('a'+rng.IntN(26))) + string(rune('a'+rng.IntN(26))) + "-hostile"
}

// TestHostileClientsHurtNobodyElse lets every kind of bad client at the gateway, many at once, while a device does its work.
func TestHostileClientsHurtNobodyElse(t *testing.T) {
	path := bin(t)
	_, seed := seeded(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML)

	// The device that must not notice: one message after the other, each acknowledged.
	device := newDevice(t, g.Addr, "good", mqtt.V5)
	stop := make(chan struct{})
	var worst time.Duration
	var published int
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			begin := time.Now()
			if err := device.publish(t.Context(), "dt/good", []byte("still here"), 1); err != nil {
				t.Errorf("the good device: %v", err)
				return
			}
			worst = max(worst, time.Since(begin))
			published++
		}
	})

	var bad sync.WaitGroup
	var late atomic.Int64
	for n, a := range attacks {
		for worker := range 8 {
			rng := rand.New(rand.NewPCG(seed, uint64(n*1000+worker)))
			bad.Go(func() {
				for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
					if !strike(t, g.Addr, a, rng) {
						late.Add(1)
						return
					}
				}
			})
		}
	}
	bad.Wait()
	close(stop)
	wg.Wait()
	device.close()

	select {
	case <-g.Exited():
		t.Fatal("the gateway ended")
	default:
	}
	if rss := g.RSS(); rss > 300<<20 {
		t.Errorf("the gateway holds %d MiB after the attacks", rss>>20)
	}
	if worst > 5*time.Second {
		t.Errorf("the good device once waited %v for its acknowledgement", worst)
	}
	t.Logf("%d messages of the good device acknowledged, worst wait %v, gateway at %d MiB", published, worst.Round(time.Millisecond), g.RSS()>>20)
	balanced(t, g)
	if code := g.Stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}
}

// strike runs a once. It returns false if the gateway kept a connection open that it had to close.
func strike(t *testing.T, addr string, a attack, rng *rand.Rand) bool {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return true // the gateway limits how many come from one address
	}
	defer conn.Close()
	a.run(conn, rng)
	if a.ends == 0 {
		return true
	}
	_ = conn.SetReadDeadline(time.Now().Add(a.ends))
	_, err = io.Copy(io.Discard, conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("%s: connection still open after %v", a.name, a.ends)
		return false
	}
	return true
}
