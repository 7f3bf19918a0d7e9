package mqttup_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"holdfast/bridge/bridgetest"
	"holdfast/bridge/mqttup"
)

// names is a name server that says what a test wants.
type names struct {
	mu     sync.Mutex
	addrs  []string      // of broker.test; none: there is no such name
	broken bool          // SERVFAIL
	hangs  chan struct{} // not nil: it takes questions and does not answer until this is closed
	asked  int
	wg     sync.WaitGroup
}

func (s *names) set(change func(s *names)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// resolver asks s, over a pipe: a connection that is none of packets, so questions and answers have their length before them.
func (s *names) resolver(t *testing.T) *net.Resolver {
	t.Cleanup(s.wg.Wait)
	return &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		near, far := net.Pipe()
		s.wg.Go(func() {
			defer far.Close()
			for s.answer(far) == nil {
			}
		})
		return near, nil
	}}
}

func (s *names) answer(c net.Conn) error {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return err
	}
	q := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, q); err != nil {
		return err
	}
	var m dnsmessage.Message
	if err := m.Unpack(q); err != nil {
		return err
	}
	s.mu.Lock()
	s.asked++
	hangs, broken, addrs := s.hangs, s.broken, s.addrs
	s.mu.Unlock()
	if hangs != nil {
		<-hangs
		return io.ErrUnexpectedEOF
	}
	m.Header.Response, m.Header.Authoritative = true, true
	m.Additionals = nil
	name := m.Questions[0].Name
	switch {
	case broken:
		m.Header.RCode = dnsmessage.RCodeServerFailure
	case len(addrs) == 0 || name.String() != "broker.test.":
		m.Header.RCode = dnsmessage.RCodeNameError
	case m.Questions[0].Type == dnsmessage.TypeA:
		for _, a := range addrs {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: 1},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()},
			})
		}
	}
	b, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

// TestNamesThatFailAndRecover dials by name while the name server changes its mind.
func TestNamesThatFailAndRecover(t *testing.T) {
	b := bridgetest.StartBroker(t, nil)
	_, port, err := net.SplitHostPort(b.Addr())
	if err != nil {
		t.Fatal(err)
	}
	s := &names{}
	o := mqttup.Options{URL: "mqtt://broker.test.:" + port, ClientID: "gw", Resolver: s.resolver(t)}
	up := upstream(t, o)
	dial := func(timeout time.Duration) (took time.Duration, err error) {
		t.Helper()
		began := time.Now()
		sess, err := up.Dial(within(t, timeout), func(uint64, error) {})
		if err == nil {
			sess.Close(within(t, time.Second))
		}
		return time.Since(began), err
	}
	const dead = "127.0.0.2" // nobody listens there, at this port
	for _, step := range []struct {
		name  string
		state func(s *names)
		want  string // "": it connects
	}{
		{"no such name", func(s *names) { s.addrs = nil }, "no such host"},
		{"the server is broken", func(s *names) { s.broken = true }, "server misbehaving"},
		{"there it is", func(s *names) { s.broken, s.addrs = false, []string{"127.0.0.1"} }, ""},
		{"another address, which is dead", func(s *names) { s.addrs = []string{dead} }, "refused"},
		{"it has moved back", func(s *names) { s.addrs = []string{"127.0.0.1"} }, ""},
		{"two, the first is dead", func(s *names) { s.addrs = []string{dead, "127.0.0.1"} }, ""},
		{"three, two of them dead", func(s *names) { s.addrs = []string{dead, "127.0.0.3", "127.0.0.1"} }, ""},
		{"gone again", func(s *names) { s.addrs = nil }, "no such host"},
	} {
		s.set(step.state)
		_, err := dial(20 * time.Second)
		switch {
		case step.want == "" && err != nil:
			t.Errorf("%s: %v", step.name, err)
		case step.want != "" && (err == nil || !strings.Contains(err.Error(), step.want)):
			t.Errorf("%s: %v, want %q", step.name, err, step.want)
		}
	}
	hang := make(chan struct{})
	s.set(func(s *names) { s.hangs = hang })
	if took, err := dial(500 * time.Millisecond); err == nil || took > 5*time.Second || !errors.Is(err, context.DeadlineExceeded) && !strings.Contains(err.Error(), "timeout") {
		t.Errorf("a name server that hangs: after %v %v", took, err)
	}
	close(hang)
	s.set(func(s *names) { s.hangs, s.addrs = nil, []string{"127.0.0.1"} })
	if _, err := dial(20 * time.Second); err != nil {
		t.Errorf("and answers again: %v", err)
	}
}

// TestDialerOfOnesOwn: where one is given it opens the connections, and time-outs hold.
func TestDialerOfOnesOwn(t *testing.T) {
	b := bridgetest.StartBroker(t, nil)
	var mu sync.Mutex
	var asked []string
	o := mqttup.Options{URL: "mqtt://far.example:1883", ClientID: "gw", Dialer: func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		asked = append(asked, network+" "+address)
		first := len(asked) == 1
		mu.Unlock()
		if first { // it hangs
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		return (&net.Dialer{}).DialContext(ctx, network, b.Addr())
	}}
	up := upstream(t, o)
	if _, err := up.Dial(within(t, 200*time.Millisecond), func(uint64, error) {}); err == nil {
		t.Error("connected through a dialer that hangs")
	}
	sess, err := up.Dial(within(t, 10*time.Second), func(uint64, error) {})
	if err != nil {
		t.Fatal(err)
	}
	sess.Close(within(t, time.Second))
	if len(asked) != 2 || asked[1] != "tcp far.example:1883" {
		t.Errorf("asked for %v", asked)
	}
}
