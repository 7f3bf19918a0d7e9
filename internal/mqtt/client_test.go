package mqtt_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// servers runs a test against the scripted server and against mosquitto, in both versions.
func servers(t *testing.T, fn func(t *testing.T, addr string, v mqtt.Version)) {
	for _, server := range []string{"mqtttest", "mosquitto"} {
		t.Run("server="+server, func(t *testing.T) {
			versions(t, func(t *testing.T, v mqtt.Version) {
				if server == "mqtttest" {
					fn(t, mqtttest.New(t, mqtttest.Script{}).Addr, v)
					return
				}
				fn(t, testkit.StartMosquitto(t, "max_inflight_messages 0").Addr, v)
			})
		})
	}
}

func dial(t *testing.T, addr string, v mqtt.Version, o mqtt.ClientOptions) *mqtt.Client {
	t.Helper()
	o.Address, o.Connect.Version = addr, v
	if o.Connect.ClientID == "" {
		o.Connect.ClientID = "client"
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Abort()
		<-c.Done()
	})
	return c
}

// wait gives the next value, or fails the test.
func wait[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case x := <-from:
		return x
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: nothing came in 10 s", what)
		panic("unreachable")
	}
}

func TestClientPublishes(t *testing.T) {
	servers(t, func(t *testing.T, addr string, v mqtt.Version) {
		const n = 500
		acks := make(chan mqtt.Ack, 3*n)
		c := dial(t, addr, v, mqtt.ClientOptions{
			Connect: mqtt.Connect{CleanStart: true},
			OnAck:   func(_ *mqtt.Client, a *mqtt.Ack) { acks <- mqtt.Ack{Type: a.Type, ID: a.ID, Reason: a.Reason} },
		})
		for _, qos := range []byte{0, 1, 2} {
			for id := range uint16(n) {
				p := mqtt.Publish{QoS: qos, Topic: []byte("dt/a"), Payload: []byte("x")}
				if qos > 0 {
					p.ID = id + 1
				}
				if err := c.Queue(&p); err != nil {
					t.Fatal(err)
				}
			}
			c.Flush()
			last := map[byte]mqtt.Type{1: mqtt.TypePuback, 2: mqtt.TypePubcomp}[qos]
			for next := uint16(1); qos > 0 && next <= n; {
				a := wait(t, acks, "ack")
				if a.Reason.Failed() {
					t.Fatalf("%+v", a)
				}
				if a.Type == last {
					if a.ID != next {
						t.Fatalf("QoS %d: %v of %d, want %d", qos, a.Type, a.ID, next)
					}
					next++
				}
			}
		}
		if err := c.Disconnect(mqtt.Success); err != nil {
			t.Fatal(err)
		}
		if err := c.Publish(&mqtt.Publish{Topic: []byte("a")}); !errors.Is(err, mqtt.ErrClosed) {
			t.Errorf("publish after disconnect: %v", err)
		}
	})
}

func TestClientReceives(t *testing.T) {
	addr := testkit.StartMosquitto(t).Addr
	versions(t, func(t *testing.T, v mqtt.Version) {
		type message struct {
			topic, payload string
			qos            byte
			ids            string
		}
		got := make(chan message, 10)
		c := dial(t, addr, v, mqtt.ClientOptions{
			Connect: mqtt.Connect{CleanStart: true, ClientID: "sub"},
			OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
				got <- message{string(p.Topic), string(p.Payload), p.QoS, fmt.Sprint(p.SubscriptionIDs)}
			},
		})
		ack, err := c.Subscribe(t.Context(), &mqtt.Subscribe{SubscriptionID: 7, Filters: []mqtt.Subscription{{Filter: "a/+", QoS: 2}, {Filter: "b/#", QoS: 1}}})
		if err != nil || !slices.Equal(ack.Reasons, []mqtt.Reason{mqtt.GrantedQoS2, mqtt.GrantedQoS1}) {
			t.Fatal(ack, err)
		}
		pub := dial(t, addr, v, mqtt.ClientOptions{Connect: mqtt.Connect{CleanStart: true, ClientID: "pub"}})
		ids := "[]"
		if v == mqtt.V5 {
			ids = "[7]"
		}
		large := strings.Repeat("long", 50_000)
		for i, want := range []message{{"a/0", "x", 0, ids}, {"a/1", large, 1, ids}, {"a/2", "z", 2, ids}, {"b", "y", 1, ids}} {
			p := mqtt.Publish{Topic: []byte(want.topic), Payload: []byte(want.payload), QoS: want.qos}
			if want.qos > 0 {
				p.ID = uint16(i + 1)
			}
			if err := pub.Publish(&p); err != nil {
				t.Fatal(err)
			}
			if m := wait(t, got, "message"); m != want {
				t.Errorf("got %.80v, want %.80v", m, want)
			}
		}
		if _, err := c.Unsubscribe(t.Context(), &mqtt.Unsubscribe{Filters: []string{"b/#"}}); err != nil {
			t.Fatal(err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestClientTakesQoS2Once: a repeat of a QoS 2 message is acknowledged, not delivered, also
// on the session's next connection.
func TestClientTakesQoS2Once(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		frames := make(chan string, 10)
		s := mqtttest.New(t, mqtttest.Script{Frame: func(_ string, f []byte) bool { frames <- string(f); return true }})
		var delivered atomic.Int32
		o := mqtt.ClientOptions{
			OnMessage: func(*mqtt.Client, *mqtt.Publish) { delivered.Add(1) },
			Received:  map[uint16]bool{},
		}
		message := mqtt.AppendPublish(nil, v, &mqtt.Publish{QoS: 2, ID: 9, Topic: []byte("a")})
		c := dial(t, s.Addr, v, o)
		s.Send("client", message)
		if f := wait(t, frames, "PUBREC"); f != "\x50\x02\x00\x09" {
			t.Fatalf("% x", f)
		}
		c.Abort()
		<-c.Done()
		_ = dial(t, s.Addr, v, o)
		s.Send("client", mqtt.AppendPublish(nil, v, &mqtt.Publish{QoS: 2, ID: 9, Dup: true, Topic: []byte("a")}))
		if f := wait(t, frames, "PUBREC"); f != "\x50\x02\x00\x09" {
			t.Fatalf("% x", f)
		}
		s.Send("client", mqtt.AppendAck(nil, mqtt.TypePubrel, 9, v, 0))
		if f := wait(t, frames, "PUBCOMP"); f != "\x70\x02\x00\x09" {
			t.Fatalf("% x", f)
		}
		if n := delivered.Load(); n != 1 {
			t.Errorf("delivered %d times", n)
		}
		s.Send("client", message) // the identifier is free again: a new message
		wait(t, frames, "PUBREC")
		if n := delivered.Load(); n != 2 {
			t.Errorf("delivered %d times after PUBREL", n)
		}
	})
}

func TestClientIsRefused(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		s := mqtttest.New(t, mqtttest.Script{Connect: func(*mqtt.Connect) mqtt.Connack {
			return mqtt.Connack{Reason: mqtt.NotAuthorized, ReasonString: "who are you"}
		}})
		_, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{Address: s.Addr, Connect: mqtt.Connect{Version: v, CleanStart: true}})
		var refused *mqtt.Refused
		if !errors.As(err, &refused) || refused.Reason != mqtt.NotAuthorized {
			t.Fatalf("error %v", err)
		}
		if v == mqtt.V5 && !strings.Contains(err.Error(), `"who are you"`) {
			t.Errorf("error %v lacks the server's words", err)
		}
	})
}

func TestClientIsDisconnected(t *testing.T) {
	closed := make(chan error, 1)
	s := mqtttest.New(t, mqtttest.Script{})
	c := dial(t, s.Addr, mqtt.V5, mqtt.ClientOptions{OnClose: func(_ *mqtt.Client, err error) { closed <- err }})
	s.Send("client", mqtt.AppendDisconnect(nil, mqtt.V5, mqtt.SessionTakenOver, "another one came"))
	var refused *mqtt.Refused
	if err := wait(t, closed, "OnClose"); !errors.As(err, &refused) || refused.Reason != mqtt.SessionTakenOver || refused.Text != "another one came" {
		t.Fatalf("error %v", err)
	}
	<-c.Done()
	if _, err := c.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "a"}}}); !errors.As(err, &refused) {
		t.Errorf("subscribe after the end: %v", err)
	}
}

func TestClientEndsWaitersWhenTheConnectionDoes(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{Frame: func(string, []byte) bool { return false }})
	c := dial(t, s.Addr, mqtt.V5, mqtt.ClientOptions{})
	if _, err := c.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "a"}}}); !errors.Is(err, io.EOF) {
		t.Errorf("subscribe: %v, want EOF", err)
	}
	c = dial(t, s.Addr, mqtt.V5, mqtt.ClientOptions{})
	if err := c.Ping(t.Context()); err == nil {
		t.Error("ping without an answer succeeded")
	}
}

func TestClientRefusesLongPackets(t *testing.T) {
	s := mqtttest.New(t, mqtttest.Script{})
	c := dial(t, s.Addr, mqtt.V5, mqtt.ClientOptions{MaxPacket: 1000})
	s.Send("client", []byte("\x30\xff\xff\xff\x7f"))
	<-c.Done()
	var e *mqtt.Error
	if err := c.Err(); !errors.As(err, &e) || e.Reason != mqtt.PacketTooLarge {
		t.Errorf("error %v", err)
	}
}

// TestClientDisconnectSendsAllFirst: what was queued before Disconnect arrives before it.
func TestClientDisconnectSendsAllFirst(t *testing.T) {
	var got atomic.Int32
	s := mqtttest.New(t, mqtttest.Script{Publish: func(string, *mqtt.Publish) mqtttest.Answer { got.Add(1); return mqtttest.Answer{} }})
	c := dial(t, s.Addr, mqtt.V5, mqtt.ClientOptions{})
	const n = 20_000
	for range n {
		if err := c.Queue(&mqtt.Publish{Topic: []byte("a"), Payload: make([]byte, 100)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Disconnect(mqtt.Success); err != nil {
		t.Fatal(err)
	}
	if got.Load() != n {
		t.Errorf("%d of %d messages arrived before the end", got.Load(), n)
	}
}

// pipe gives a dialer to an in-memory server that answers CONNECT and hands every other
// frame to answer, which returns the answer.
func pipe(t *testing.T, v mqtt.Version, answer func(frame []byte) []byte) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			buf, have := make([]byte, 4096), 0
			for {
				n, err := server.Read(buf[have:])
				if err != nil {
					return
				}
				have += n
				for {
					_, _, _, size, ok, err := mqtt.PeekHeader(buf[:have])
					if err != nil {
						t.Error(err)
						return
					}
					if !ok || size > have {
						break
					}
					out := answer(buf[:size])
					if buf[0]>>4 == byte(mqtt.TypeConnect) {
						out = mqtt.AppendConnack(nil, v, &mqtt.Connack{})
					}
					if len(out) > 0 {
						if _, err := server.Write(out); err != nil {
							return
						}
					}
					have = copy(buf, buf[size:have])
				}
			}
		}()
		return client, nil
	}
}

func TestClientKeepsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var silent atomic.Bool
		var pings atomic.Int32
		c, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
			Connect: mqtt.Connect{KeepAlive: 10},
			Dialer: pipe(t, mqtt.V5, func(f []byte) []byte {
				if f[0]>>4 != byte(mqtt.TypePingreq) || silent.Load() {
					return nil
				}
				pings.Add(1)
				return mqtt.AppendPingresp(nil)
			}),
		})
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(10 * time.Minute) // of the bubble's time
		synctest.Wait()
		if n := pings.Load(); c.Err() != nil || n < 60 || n > 130 {
			t.Fatalf("after 10 minutes: %d pings, %v", n, c.Err())
		}
		silent.Store(true)
		start := time.Now()
		<-c.Done()
		if d := time.Since(start); !errors.Is(c.Err(), mqtt.ErrKeepAlive) || d > 25*time.Second {
			t.Errorf("silent server noticed after %v: %v", d, c.Err())
		}
	})
}

// TestClientNoticesASilentServerWhilePublishing: what goes out says nothing about whether
// the other side is still there.
func TestClientNoticesASilentServerWhilePublishing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
			Connect: mqtt.Connect{KeepAlive: 10},
			Dialer:  pipe(t, mqtt.V5, func([]byte) []byte { return nil }),
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 60 {
			<-time.After(time.Second) // of the bubble's time
			if c.Publish(&mqtt.Publish{Topic: []byte("a")}) != nil {
				break
			}
		}
		<-c.Done()
		if !errors.Is(c.Err(), mqtt.ErrKeepAlive) {
			t.Error(c.Err())
		}
	})
}

func TestDialGivesUpWithItsContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := mqtt.Dial(ctx, mqtt.ClientOptions{Address: l.Addr().String()}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent server: %v", err)
	}
}

// acker is a server that acknowledges every QoS 1 PUBLISH and costs next to nothing.
func acker(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		in, out, have := make([]byte, 256<<10), make([]byte, 0, 64<<10), 0
		var p mqtt.Publish
		for {
			n, err := conn.Read(in[have:])
			if err != nil {
				return
			}
			have += n
			start := 0
			for {
				_, _, _, size, ok, _ := mqtt.PeekHeader(in[start:have])
				if !ok || start+size > have {
					break
				}
				frame := in[start : start+size]
				if frame[0]>>4 == byte(mqtt.TypePublish) {
					if mqtt.ParsePublish(frame, mqtt.V5, &p) != nil {
						return
					}
					out = mqtt.AppendAck(out, mqtt.TypePuback, p.ID, mqtt.V5, mqtt.Success)
				} else {
					out = mqtt.AppendConnack(out, mqtt.V5, &mqtt.Connack{})
				}
				start += size
			}
			have = copy(in, in[start:have])
			if len(out) > 0 {
				if _, err := conn.Write(out); err != nil {
					return
				}
				out = out[:0]
			}
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l.Addr().String()
}

// window publishes n messages with 100 in flight and gives the heap allocations a message.
func window(t testing.TB, n int) float64 {
	p := mqtt.Publish{QoS: 1, Topic: []byte("dt/ward/bed-1/vitals"), Payload: make([]byte, 256)}
	done := make(chan struct{})
	var mu sync.Mutex
	var sent, acked int
	next := func(c *mqtt.Client) {
		mu.Lock()
		defer mu.Unlock()
		for ; sent < n && sent-acked < 100; sent++ {
			p.ID = uint16(sent%1000) + 1
			_ = c.Queue(&p)
		}
	}
	c, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
		Address: acker(t),
		OnAck: func(*mqtt.Client, *mqtt.Ack) {
			mu.Lock()
			defer mu.Unlock()
			if acked++; acked == n {
				close(done)
			}
		},
		OnBatch: func(c *mqtt.Client) { next(c) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		c.Abort()
		<-c.Done()
	}()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	next(c)
	c.Flush()
	<-done
	runtime.ReadMemStats(&after)
	return float64(after.Mallocs-before.Mallocs) / float64(n)
}

func TestClientAllocatesNothingPerMessage(t *testing.T) {
	if n := window(t, 50_000); n > 0.1 {
		t.Errorf("%.2f allocations a message", n)
	}
}

func BenchmarkClient(b *testing.B) {
	b.Run("qos=1/window=100/size=256", func(b *testing.B) {
		b.ReportMetric(window(b, b.N), "allocs/msg")
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
	})
}

func BenchmarkParsePublish(b *testing.B) {
	for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
		b.Run("size=256/version="+v.String(), func(b *testing.B) {
			frame := mqtt.AppendPublish(nil, v, &mqtt.Publish{QoS: 1, ID: 7, Topic: []byte("dt/ward/bed-1/vitals"), Payload: make([]byte, 256)})
			var p mqtt.Publish
			b.ReportAllocs()
			for b.Loop() {
				if err := mqtt.ParsePublish(frame, v, &p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
