package testkit_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo answers every byte with itself until its peer closes.
func echo(t *testing.T) string {
	t.Helper()
	return serve(t, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

func serve(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String()
}

// ask writes b and reads as many bytes back; it fails if they differ or do not come within d.
func ask(c net.Conn, b []byte, d time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return errors.New("other bytes came back")
	}
	return nil
}

func mustAsk(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if err := ask(c, b, 5*time.Second); err != nil {
		t.Fatalf("ask: %v", err)
	}
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func TestProxyPassesAndCounts(t *testing.T) {
	p := testkit.StartProxy(t, echo(t))
	c := testkit.Dial(t, p.Addr())
	big := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MiB
	done := make(chan error, 1)
	go func() { _, err := c.Write(big); done <- err }()
	got := make([]byte, len(big))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, big) {
		t.Fatalf("echo through the proxy: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want := testkit.Traffic{Up: int64(len(big)), Down: int64(len(big)), Connections: 1}
	testkit.EventuallyNil(t, 5*time.Second, "the bytes are counted", func() error { // after they were handed on
		if got := p.Traffic(); got != want {
			return fmt.Errorf("traffic %+v, want %+v", got, want)
		}
		return nil
	})
}

func TestProxyHandsOnHalfClose(t *testing.T) {
	p := testkit.StartProxy(t, serve(t, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		_, _ = c.Write(append([]byte("got "), b...))
	}))
	c := testkit.Dial(t, p.Addr())
	if _, err := c.Write([]byte("all")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "got all" {
		t.Fatalf("got %q, %v", b, err)
	}
	testkit.Eventually(t, 5*time.Second, "the proxy lets go of the connection", func() bool { return p.Open() == 0 })
}

func TestProxyStallHoldsAndThenDelivers(t *testing.T) {
	for _, f := range []testkit.Faults{{StallUp: true}, {StallDown: true}, {StallUp: true, StallDown: true}} {
		p := testkit.StartProxy(t, echo(t))
		c := testkit.Dial(t, p.Addr())
		mustAsk(t, c, []byte("before"))
		p.Set(f)
		if err := ask(c, []byte("during"), 50*time.Millisecond); !isTimeout(err) {
			t.Fatalf("%+v: got %v, want a time-out", f, err)
		}
		p.Set(testkit.Faults{})
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 6)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "during" {
			t.Fatalf("%+v: after the stall: %q, %v", f, got, err)
		}
	}
}

func TestProxyHalfOpenSwallowsBytesAndCloses(t *testing.T) {
	closed := make(chan struct{}, 1)
	p := testkit.StartProxy(t, serve(t, func(c net.Conn) {
		_, _ = io.Copy(c, c)
		closed <- struct{}{}
	}))
	c := testkit.Dial(t, p.Addr())
	mustAsk(t, c, []byte("before"))
	p.Set(testkit.Faults{BlackholeUp: true, BlackholeDown: true})
	if err := ask(c, []byte("lost"), 50*time.Millisecond); !isTimeout(err) {
		t.Fatalf("got %v, want a time-out", err)
	}
	c.Close()
	select {
	case <-closed:
		t.Fatal("the server heard of a close through a half-open link")
	case <-time.After(50 * time.Millisecond):
	}
	p.Set(testkit.Faults{})
	<-closed // bytes are missing: the link must not live on
	mustAsk(t, testkit.Dial(t, p.Addr()), []byte("a new one works"))
}

func TestProxyResetAndRefuse(t *testing.T) {
	p := testkit.StartProxy(t, echo(t))
	c := testkit.Dial(t, p.Addr())
	mustAsk(t, c, []byte("before"))
	p.Reset()
	if err := ask(c, []byte("after"), 5*time.Second); !isReset(err) {
		t.Errorf("after Reset: %v, want a reset", err)
	}
	p.Set(testkit.Faults{Refuse: true})
	refused, err := net.Dial("tcp", p.Addr()) // the reset may come first
	if err == nil {
		err = ask(refused, []byte("x"), 5*time.Second)
		refused.Close()
	}
	if !isReset(err) {
		t.Errorf("while refusing: %v, want a reset", err)
	}
	p.Set(testkit.Faults{})
	mustAsk(t, testkit.Dial(t, p.Addr()), []byte("x"))
}

func TestProxyCutAfterBytes(t *testing.T) {
	var mu sync.Mutex
	var got []byte
	end := make(chan struct{})
	p := testkit.StartProxy(t, serve(t, func(c net.Conn) {
		defer close(end)
		b, _ := io.ReadAll(c)
		mu.Lock()
		defer mu.Unlock()
		got = b
	}))
	c := testkit.Dial(t, p.Addr())
	p.CutAfter(1000)
	if _, err := c.Write(make([]byte, 3000)); err != nil {
		t.Fatal(err)
	}
	<-end
	mu.Lock()
	defer mu.Unlock()
	// A reset may overtake bytes that the server has not read; more than was let through can never arrive.
	if len(got) > 1000 || p.Traffic().Up != 1000 {
		t.Errorf("server got %d bytes, proxy passed %d, want 1000", len(got), p.Traffic().Up)
	}
}

func TestProxySwallowsOnlyAcks(t *testing.T) {
	puback := []byte{0x40, 2, 0, 1}
	pubrec := []byte{0x50, 2, 0, 2}
	publish := append([]byte{0x30, 8, 0, 1, 't'}, "hello"...)
	// A publish whose payload looks like an ack, and a frame in two writes, must pass untouched.
	lookalike := append([]byte{0x30, 7, 0, 1, 't'}, puback...)
	pingresp := []byte{0xd0, 0}
	var conn net.Conn
	accepted := make(chan struct{})
	p := testkit.StartProxy(t, serve(t, func(c net.Conn) {
		conn = c
		close(accepted)
		_, _ = io.Copy(io.Discard, c)
	}))
	c := testkit.Dial(t, p.Addr())
	<-accepted
	send := func(b []byte) {
		t.Helper()
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want []byte) {
		t.Helper()
		got := make([]byte, len(want))
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("got % x, %v, want % x", got, err, want)
		}
	}
	send(slices.Concat(puback, publish[:4]))
	expect(slices.Concat(puback, publish[:4]))
	p.Set(testkit.Faults{SwallowAcks: true}) // in the middle of a frame
	send(slices.Concat(publish[4:], puback[:1]))
	expect(publish[4:])
	send(slices.Concat(puback[1:], lookalike, pubrec, pingresp))
	expect(slices.Concat(lookalike, pingresp))
	if n := p.Traffic().Swallowed; n != 2 {
		t.Errorf("%d acknowledgements swallowed, want 2", n)
	}
}

func TestProxyLatencyDelaysWithoutLimitingTheRate(t *testing.T) {
	p := testkit.StartProxy(t, echo(t))
	p.Set(testkit.Faults{Latency: 60 * time.Millisecond})
	c := testkit.Dial(t, p.Addr())
	begin := time.Now()
	mustAsk(t, c, []byte("x"))
	if d := time.Since(begin); d < 120*time.Millisecond {
		t.Errorf("round trip took %v, want at least twice 60 ms", d)
	}
	begin = time.Now()
	for range 50 {
		if _, err := c.Write([]byte("0123456789")); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(0, func() {}) // yields, so that the writes are separate chunks
	}
	if _, err := io.ReadFull(c, make([]byte, 500)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("50 pipelined writes took %v: delayed one after the other", d)
	}
}

func TestProxyLimitsBandwidth(t *testing.T) {
	p := testkit.StartProxy(t, serve(t, func(c net.Conn) {
		n, _ := io.CopyN(io.Discard, c, 2000)
		_, _ = c.Write([]byte{byte(n / 1000)})
	}))
	p.Set(testkit.Faults{BytesPerSecond: 10_000})
	c := testkit.Dial(t, p.Addr())
	begin := time.Now()
	if _, err := c.Write(make([]byte, 2000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < 190*time.Millisecond {
		t.Errorf("2,000 bytes at 10,000 a second took %v", d)
	}
}

func TestProxyFlapsTheSameWayForASeed(t *testing.T) {
	run := func(seed uint64) []string {
		p := testkit.StartProxy(t, echo(t))
		var mu sync.Mutex
		var said []string
		enough := make(chan struct{})
		stop := p.Flap(seed, testkit.Faults{}, 2*time.Millisecond, 2*time.Millisecond, func(_ string, args ...any) {
			mu.Lock()
			defer mu.Unlock()
			if said = append(said, args[0].(string)); len(said) == 12 {
				close(enough)
			}
		})
		<-enough
		stop()
		mustAsk(t, testkit.Dial(t, p.Addr()), []byte("whole again"))
		mu.Lock()
		defer mu.Unlock()
		return said[:12]
	}
	a, b, other := run(1), run(1), run(2)
	if !slices.Equal(a, b) {
		t.Errorf("one seed, two ways:\n%v\n%v", a, b)
	}
	if slices.Equal(a, other) {
		t.Errorf("two seeds, one way: %v", a)
	}
}
