package mqttup_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
)

// far is the other end of a link that carries rate bytes a second and keeps nothing in between. It notes the first byte of each
// packet, and when the packet was complete.
type far struct {
	mu      sync.Mutex
	packets []packetAt
	times   []bytesAt
}

type packetAt struct {
	first byte
	at    time.Duration
	size  int
}

type bytesAt struct {
	at time.Duration
	n  int
}

func (f *far) read(c net.Conn, rate int, began time.Time) {
	var buf []byte
	p := make([]byte, max(rate/50, 1))
	for {
		n, err := c.Read(p)
		if err != nil {
			return
		}
		<-time.After(time.Duration(n) * time.Second / time.Duration(rate))
		buf = append(buf, p[:n]...)
		f.mu.Lock()
		f.times = append(f.times, bytesAt{time.Since(began), n})
		for len(buf) > 1 {
			r := bytes.NewReader(buf[1:])
			length, err := binary.ReadUvarint(r)
			if err != nil || uint64(r.Len()) < length {
				break
			}
			size := len(buf) - r.Len() + int(length)
			f.packets = append(f.packets, packetAt{buf[0], time.Since(began), size})
			buf = buf[size:]
		}
		f.mu.Unlock()
	}
}

func (f *far) find(first byte) (at time.Duration, before int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.packets {
		if p.first == first {
			return p.at, before, true
		}
		before++
	}
	return 0, 0, false
}

// pipe makes a connection over a link of so many bytes a second.
func pipe(t *testing.T, rate int, o mqttup.Options) (mqttup.Conn, *far) {
	t.Helper()
	near, other := net.Pipe()
	f := &far{}
	done := make(chan struct{})
	began := time.Now()
	go func() {
		defer close(done)
		f.read(other, rate, began)
	}()
	if o.Stall == 0 {
		o.Stall = 30 * time.Second
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = 30 * time.Second
	}
	c := mqttup.NewConn(near, o, func(uint64, error) {})
	t.Cleanup(func() {
		c.End()
		_ = other.Close()
		<-done
	})
	return c, f
}

var (
	pingreq = []byte{0xC0, 0}
	puback  = []byte{0x40, 2, 0, 7}
)

// TestPingOvertakesData: at 2 KB/s some 140 KiB wait, more than a minute's worth, when a ping and an acknowledgement are written.
func TestPingOvertakesData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := pipe(t, 2000, mqttup.Options{})
		payload := strings.Repeat("x", 480)
		for i := range 270 {
			p := []byte(payload)
			if i == 0 { // one write of six seconds, while nothing is known of the link
				p = []byte(strings.Repeat(payload, 25))
			}
			if err := c.Publish(&bridge.Message{Token: uint64(i), Topic: "dt/pump", Payload: p}); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(10 * time.Second)
		at := 10 * time.Second
		for _, p := range [][]byte{pingreq, puback} {
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(80 * time.Second)
		for _, first := range []byte{0xC0, 0x40} {
			came, _, ok := f.find(first)
			if waited := came - at; !ok || waited > 3*time.Second {
				t.Errorf("packet 0x%02x came after %v (%t)", first, waited, ok)
			}
		}
		publishes := 0
		for _, p := range f.packets {
			if p.first == 0x32 {
				publishes++
			}
		}
		if publishes != 270 || c.Err() != nil {
			t.Errorf("%d of 270 messages came whole, %v", publishes, c.Err())
		}
	})
}

// TestDisconnectComesLast: it overtakes nothing.
func TestDisconnectComesLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := pipe(t, 100_000, mqttup.Options{})
		for i := range 100 {
			if err := c.Publish(&bridge.Message{Token: uint64(i), Topic: "dt/pump", Payload: make([]byte, 500)}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Write([]byte{0xE0, 0}); err != nil {
			t.Fatal(err)
		}
		<-time.After(5 * time.Second)
		if _, before, ok := f.find(0xE0); !ok || before != 100 {
			t.Errorf("DISCONNECT came after %d of 100 messages (%t)", before, ok)
		}
	})
}

// TestLargePacketIsPaced by the budget, but for no longer than half a keep-alive interval, and not while something urgent waits.
func TestLargePacketIsPaced(t *testing.T) {
	const pace = 8 << 10
	for _, c := range []struct {
		name   string
		size   int
		urgent time.Duration // when an urgent message comes; 0: none
		least  time.Duration // that the packet takes
		most   time.Duration
	}{
		{"four seconds' worth", 4 * pace, 0, 3500 * time.Millisecond, 5 * time.Second},
		{"more than a keep-alive allows", 60 * pace, 0, 12 * time.Second, 16 * time.Second},
		{"something urgent comes", 8 * pace, 2 * time.Second, 2 * time.Second, 3 * time.Second},
		{"small", pace / 4, 0, 0, 100 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn, f := pipe(t, 10<<20, mqttup.Options{Pace: pace})
				if err := conn.Publish(&bridge.Message{Token: 1, Topic: "dt/cam", Payload: make([]byte, c.size)}); err != nil {
					t.Fatal(err)
				}
				if c.urgent > 0 {
					<-time.After(c.urgent)
					if err := conn.Publish(&bridge.Message{Token: 2, Topic: "alarm", Payload: []byte("!"), Urgent: true}); err != nil {
						t.Fatal(err)
					}
				}
				<-time.After(30 * time.Second)
				at, _, ok := f.find(0x32)
				if !ok || at < c.least || at > c.most {
					t.Errorf("it took %v (%t), want %v to %v", at, ok, c.least, c.most)
				}
				if c.urgent == 0 && c.size <= 15*pace {
					f.mu.Lock()
					defer f.mu.Unlock()
					sum, from := 0, 0
					for _, b := range f.times { // no burst
						sum += b.n
						for b.at-f.times[from].at >= time.Second {
							sum -= f.times[from].n
							from++
						}
						if sum > pace*5/4+pace/8 {
							t.Fatalf("%d bytes within a second of %d", sum, pace)
						}
					}
				}
			})
		})
	}
}

func TestWholePackets(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var b []byte
	ends := []int{0}
	for range 300 {
		n := rng.IntN(1 << rng.IntN(16))
		b = append(binary.AppendUvarint(append(b, 0x32), uint64(n)), make([]byte, n)...)
		ends = append(ends, len(b))
	}
	for i := range ends[:len(ends)-1] {
		for _, n := range []int{0, 1, 100, 5000, 1 << 20} {
			got := ends[i] + mqttup.Whole(b[ends[i]:], n)
			want := ends[i+1]
			for _, e := range ends[i+1:] {
				if e-ends[i] <= n {
					want = e
				}
			}
			if got != want {
				t.Fatalf("packets from %d of at most %d bytes end at %d, want %d", ends[i], n, got, want)
			}
		}
	}
	for cut := range 40 { // never beyond the end, whatever stands there
		if n := mqttup.Whole(b[:cut], 10); n > cut || cut > 0 && n == 0 {
			t.Errorf("of %d bytes %d", cut, n)
		}
	}
}
