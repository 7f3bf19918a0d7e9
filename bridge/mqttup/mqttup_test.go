package mqttup_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const stateTopic = "gw/ward-3-east/state"

func options(b *bridgetest.Broker) mqttup.Options {
	return mqttup.Options{
		URL: b.URL(), ClientID: mqttup.ClientID("ward-3-east", "cloud"), Gateway: "ward-3-east", Epoch: "e1", Version: "1.2.3",
	}
}

func upstream(t *testing.T, o mqttup.Options) *mqttup.Upstream {
	t.Helper()
	u, err := mqttup.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// acks counts.
type acks struct {
	mu    sync.Mutex
	order []uint64
}

func (a *acks) put(token uint64, _ error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.order = append(a.order, token)
}

func (a *acks) got() []uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.order)
}

func message(n int, payload string) bridge.Message {
	return bridge.Message{Token: uint64(n), Topic: "dt/pump", Payload: []byte(payload)}
}

// session dials and closes with the test.
func session(t *testing.T, o mqttup.Options, a *acks) bridge.Session {
	t.Helper()
	s, err := upstream(t, o).Dial(within(t, 20*time.Second), a.put)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Close(ctx)
	})
	return s
}

func ended(t *testing.T, s bridge.Session, within time.Duration) error {
	t.Helper()
	select {
	case <-s.Done():
		return s.Err()
	case <-time.After(within):
		t.Fatalf("the session has not ended within %v", within)
		return nil
	}
}

func TestPassesTheSuite(t *testing.T) {
	t.Parallel()
	bridgetest.Suite(t, func(t *testing.T) bridgetest.Subject {
		b := bridgetest.StartBroker(t, nil)
		return bridgetest.Subject{
			Upstream: upstream(t, options(b)),
			Arrived:  b.Messages,
			HoldAcks: func() {
				b.Script(func(b *bridgetest.Broker) {
					b.OnPublish = func(int, int, bridgetest.Published) bridgetest.Answer { return bridgetest.Answer{NoAck: true} }
				})
			},
			Cut: func() { b.Cut(true) },
			Refuse: func() {
				b.Script(func(b *bridgetest.Broker) { b.OnConnect = func(int, bridgetest.Connect) int { return 5 } })
			},
			Impossible: []bridge.Message{
				{Topic: ""},
				{Topic: "a/+/b"},
				{Topic: "a/#"},
				{Topic: "a\x00b"},
				{Topic: "a\xff"},
				{Topic: strings.Repeat("x", 65536)},
				{Topic: "a", Payload: make([]byte, 16<<20+1)},
			},
		}
	})
}

func TestBirthDeathAndWill(t *testing.T) {
	b := bridgetest.StartBroker(t, nil)
	var a acks
	s := session(t, options(b), &a)
	c := b.Connects()[0]
	will, err := wire.DecodeState([]byte(c.WillPayload))
	if err != nil || c.WillTopic != stateTopic || !c.WillRetain || c.WillQoS != 1 || will.State != wire.StateOffline {
		t.Errorf("will %+v: %v", c, err)
	}
	if !c.Clean || c.ClientID != "holdfast-ward-3-east-cloud" || c.KeepAlive != 30 || c.Username != "" || c.Password != "" {
		t.Errorf("CONNECT %+v", c)
	}
	if err := s.Send(message(1, "x")); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "the ack comes", func() bool { return len(a.got()) == 1 })
	s.Close(within(t, 5*time.Second))
	testkit.Eventually(t, 10*time.Second, "DISCONNECT comes", func() bool { return b.Disconnects() == 1 })
	var states []string
	for _, p := range b.Published() {
		if p.Topic == stateTopic {
			st, err := wire.DecodeState(p.Payload)
			if err != nil || !p.Retain || p.QoS != 1 || st.Epoch != "e1" || st.Version != "1.2.3" || time.Since(time.UnixMilli(st.TS)) > time.Minute {
				t.Errorf("state %+v retain %v: %v", st, p.Retain, err)
			}
			states = append(states, st.State)
		}
	}
	if want := []string{"online", "offline"}; !slices.Equal(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}

	// A session that is cut says nothing: the broker publishes the will.
	s = session(t, options(b), &a)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Close(ctx)
	if n := len(b.Published()); n != 4 {
		t.Errorf("%d publishes, want one birth more", n)
	}
	if b.Disconnects() != 1 {
		t.Errorf("a cut session sent DISCONNECT")
	}
}

func TestDialTellsWhy(t *testing.T) {
	t.Parallel()
	refusing := func(code int) func(*bridgetest.Broker) {
		return func(b *bridgetest.Broker) { b.OnConnect = func(int, bridgetest.Connect) int { return code } }
	}
	for _, c := range []struct {
		name   string
		script func(*bridgetest.Broker)
		is     error
		text   string
	}{
		{"protocol", refusing(1), bridge.ErrRefused, "MQTT 3.1.1"},
		{"client id", refusing(2), bridge.ErrRefused, "client id"},
		{"unavailable", refusing(3), bridge.ErrRefused, "unavailable"},
		{"credentials", refusing(4), bridge.ErrRefused, "bad user name or password"},
		{"not authorized", refusing(5), bridge.ErrRefused, "not authorized"},
		{"closed at CONNECT", refusing(-1), bridge.ErrPeerClosed, ""},
		{"kicked after CONNACK", func(b *bridgetest.Broker) {
			b.AfterConnack = func(int) bridgetest.Answer { return bridgetest.Answer{Reset: true} }
		}, bridge.ErrPeerClosed, ""},
		{"kicked at the birth message", func(b *bridgetest.Broker) {
			b.OnPublish = func(int, int, bridgetest.Published) bridgetest.Answer {
				return bridgetest.Answer{NoAck: true, Close: true}
			}
		}, bridge.ErrPeerClosed, "birth message to " + stateTopic},
		{"birth message never acked", func(b *bridgetest.Broker) {
			b.OnPublish = func(int, int, bridgetest.Published) bridgetest.Answer { return bridgetest.Answer{NoAck: true} }
		}, context.DeadlineExceeded, "birth message to " + stateTopic},
		{"silent", func(b *bridgetest.Broker) { b.Freeze() }, context.DeadlineExceeded, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := bridgetest.StartBroker(t, c.script)
			_, err := upstream(t, options(b)).Dial(within(t, time.Second), new(acks).put)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v … %s", err, c.is, c.text)
			}
			t.Log(err)
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		o := mqttup.Options{URL: "mqtt://" + testkit.FreeAddr(t), ClientID: "c"}
		var texts []string
		for range 2 {
			_, err := upstream(t, o).Dial(within(t, time.Second), new(acks).put)
			if err == nil {
				t.Fatal("no error")
			}
			texts = append(texts, err.Error())
		}
		if texts[0] != texts[1] || !strings.Contains(texts[0], "connection refused") {
			t.Errorf("the same trouble is told in different words: %q", texts)
		}
	})
}

func TestPasswordIsReadAtEachDial(t *testing.T) {
	b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
		b.OnConnect = func(_ int, c bridgetest.Connect) int {
			if c.Username != "ward" || c.Password != "second" {
				return 4
			}
			return 0
		}
	})
	o := options(b)
	o.Username, o.PasswordFile = "ward", filepath.Join(t.TempDir(), "password")
	u := upstream(t, o)
	dial := func() error {
		s, err := u.Dial(within(t, 10*time.Second), new(acks).put)
		if err == nil {
			s.Close(t.Context())
		}
		return err
	}
	if err := dial(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the file: %v", err)
	}
	for _, c := range []struct {
		content string
		is      error
	}{{"first", bridge.ErrRefused}, {"second\n", nil}, {"third", bridge.ErrRefused}, {"second", nil}} {
		if err := os.WriteFile(o.PasswordFile, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		err := dial()
		if !errors.Is(err, c.is) {
			t.Errorf("with %q: %v", c.content, err)
		}
		if err != nil && strings.Contains(err.Error(), strings.TrimSpace(c.content)) {
			t.Errorf("the error shows the password: %v", err)
		}
	}
	if err := os.WriteFile(o.PasswordFile, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("with an empty file: %v", err)
	}
}

func TestAcksTwiceAndOutOfOrder(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
		b.OnPublish = func(_, k int, _ bridgetest.Published) bridgetest.Answer {
			return bridgetest.Answer{Twice: k%3 == 0, Late: k%4 != 0}
		}
	})
	var a acks
	o := options(b)
	o.Gateway = ""
	s := session(t, o, &a)
	const n = 4000
	for i := 1; i <= n; i++ {
		if err := s.Send(message(i, "x")); err != nil {
			t.Fatal(err)
		}
	}
	testkit.Eventually(t, 10*time.Second, "all acks", func() bool { return len(a.got()) >= n })
	s.Close(t.Context())
	got := a.got()
	if slices.Sort(got); len(got) != n || len(slices.Compact(got)) != n {
		t.Errorf("%d acks of %d messages, %d different ones", len(got), n, len(slices.Compact(got)))
	}
}

func TestHostileFramesEndTheSessionOnly(t *testing.T) {
	suback := append([]byte{0x90, 0xff, 1, 0, 1}, bytes.Repeat([]byte{0}, 253)...)
	for name, raw := range map[string][]byte{
		"PUBLISH":                    bridgetest.PublishFrame("a", []byte("x"), 1, 7),
		"SUBACK with codes":          suback,
		"PUBACK that claims 256 MiB": {0x40, 0xff, 0xff, 0xff, 0x7f, 0},
		"PUBREC":                     {0x50, 2, 0, 1},
		"PUBCOMP":                    {0x70, 2, 0, 1},
		"UNSUBACK":                   {0xb0, 2, 0, 1},
		"PINGRESP with a body":       {0xd0, 1, 0},
		"type 0":                     {0, 0},
		"type 15":                    {0xf0, 0},
		"length of five bytes":       {0x40, 0x80, 0x80, 0x80, 0x80, 1},
		"CONNECT":                    {0x10, 0},
		"empty PUBACK":               {0x40, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
				b.OnPublish = func(_, k int, _ bridgetest.Published) bridgetest.Answer {
					if k == 3 {
						return bridgetest.Answer{Raw: raw}
					}
					return bridgetest.Answer{}
				}
			})
			var a acks
			s := session(t, options(b), &a)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for i := 1; i <= 5; i++ {
				if err := s.Send(message(i, "x")); err != nil {
					break
				}
			}
			if err := ended(t, s, 10*time.Second); !strings.Contains(err.Error(), "from the upstream") {
				t.Errorf("ended with %v", err)
			}
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 {
				t.Errorf("%d bytes were allocated", grown)
			}
			if n := len(a.got()); n > 1 {
				t.Errorf("%d acks, one was given", n)
			}
		})
	}
}

// TestHalfOpenLinks: the far side's kernel is there, its program is not.
func TestHalfOpenLinks(t *testing.T) {
	t.Parallel()
	t.Run("idle", func(t *testing.T) {
		b := bridgetest.StartBroker(t, nil)
		o := options(b)
		o.KeepAlive, o.Stall = time.Second, 500*time.Millisecond
		s := session(t, o, new(acks))
		testkit.Eventually(t, 10*time.Second, "an idle link is pinged", func() bool { return b.Pings() >= 2 })
		b.Freeze()
		if err := ended(t, s, 10*time.Second); !errors.Is(err, bridge.ErrStalled) {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("busy", func(t *testing.T) {
		b := bridgetest.StartBroker(t, nil)
		o := options(b)
		o.Stall = 500 * time.Millisecond
		s := session(t, o, new(acks))
		b.Freeze()
		for i := 1; i <= 16; i++ { // more than the kernels' buffers hold
			if err := s.Send(message(i, strings.Repeat("x", 1<<20))); err != nil {
				break
			}
		}
		if err := ended(t, s, 15*time.Second); !errors.Is(err, bridge.ErrStalled) {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestSlowLinkLives: it takes longer than any time-out, and bytes move all the while.
func TestSlowLinkLives(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, nil)
	proxy := testkit.StartProxy(t, b.Addr())
	o := options(b)
	o.URL, o.Stall, o.KeepAlive = "mqtt://"+proxy.Addr(), 400*time.Millisecond, time.Second
	var a acks
	s := session(t, o, &a)
	proxy.Set(testkit.Faults{BytesPerSecond: 2 << 20})
	for i := 1; i <= 6; i++ {
		if err := s.Send(message(i, strings.Repeat("x", 1<<20))); err != nil {
			t.Fatal(err)
		}
	}
	last := s.Progress()
	testkit.Eventually(t, 10*time.Second, "progress is seen", func() bool { return s.Progress() != last })
	defer func() { t.Logf("acks %d, session: %v, %+v", len(a.got()), s.Err(), proxy.Traffic()) }()
	testkit.Eventually(t, 20*time.Second, "all acks", func() bool { return len(a.got()) == 6 })
	if err := s.Err(); err != nil {
		t.Errorf("the session ended: %v", err)
	}
}

// TestPingsAreNoProgress: the far side takes a message, never acknowledges it, and answers pings for ever.
func TestPingsAreNoProgress(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, nil)
	o := options(b)
	o.KeepAlive = time.Second
	s := session(t, o, new(acks))
	b.Script(func(b *bridgetest.Broker) {
		b.OnPublish = func(int, int, bridgetest.Published) bridgetest.Answer { return bridgetest.Answer{NoAck: true} }
	})
	before := s.Progress()
	if err := s.Send(message(1, "x")); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, 10*time.Second, "the message comes", func() bool { return len(b.Messages()) == 1 && s.Progress() != before })
	testkit.Eventually(t, 10*time.Second, "a ping comes", func() bool { return b.Pings() > 0 })
	after, pings := s.Progress(), b.Pings()
	testkit.Eventually(t, 10*time.Second, "pings come", func() bool { return b.Pings() >= pings+2 })
	if p := s.Progress(); p != after {
		t.Errorf("progress went from %d to %d with pings only", after, p)
	}
}

func TestClientID(t *testing.T) {
	seen := map[string]string{}
	for _, c := range []struct{ gateway, upstream, want string }{
		{"ward-3-east", "cloud", "holdfast-ward-3-east-cloud"},
		{"a-b", "c", ""},
		{"a", "b-c", ""},
		{"Zürich", "cloud", ""},
		{"Z_rich", "cloud", ""},
		{strings.Repeat("x", 100), "cloud", ""},
		{strings.Repeat("x", 100), "clouds", ""},
		{"a/b", "c", ""},
		{"a", "", ""},
	} {
		id := mqttup.ClientID(c.gateway, c.upstream)
		if c.want != "" && id != c.want {
			t.Errorf("%q, %q: %q, want %q", c.gateway, c.upstream, id, c.want)
		}
		if other, ok := seen[id]; ok {
			t.Errorf("%q, %q and %s have the id %q", c.gateway, c.upstream, other, id)
		}
		seen[id] = fmt.Sprintf("%q, %q", c.gateway, c.upstream)
		if len(id) > 64 || strings.ContainsFunc(id, func(r rune) bool { return r > 126 || r <= ' ' || strings.ContainsRune("/+#", r) }) {
			t.Errorf("%q is not what every broker takes", id)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for _, o := range []mqttup.Options{
		{ClientID: "c"},
		{URL: "http://h", ClientID: "c"},
		{URL: "mqtt://u:p@h", ClientID: "c"},
		{URL: "mqtt://h"},
		{URL: "mqtt://h", ClientID: "c", Gateway: "g"},
	} {
		if _, err := mqttup.New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		} else if strings.Contains(err.Error(), "u:p") {
			t.Errorf("the error shows the password: %v", err)
		}
	}
}

// FuzzFrames: whatever comes from the network, paho is given only whole frames that it can stand, and
// nothing is allocated by a length that is merely claimed.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{0x20, 2, 0, 0, 0x40, 2, 0, 1, 0xd0, 0})
	f.Add(bridgetest.PublishFrame("a/b", []byte("payload"), 1, 1))
	f.Add([]byte{0x90, 3, 0, 1, 1})
	f.Add([]byte{0x30, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, data []byte) {
		const maxPublish = 300
		near, far := net.Pipe()
		go func() {
			_, _ = far.Write(data)
			_ = far.Close()
		}()
		frames, err := mqttup.ReadFrames(near, 1, maxPublish)
		_ = near.Close()
		_ = far.Close()
		if err == nil {
			t.Fatal("no error at the end of the stream")
		}
		if !bytes.HasPrefix(data, frames) {
			t.Fatalf("%x became %x", data, frames)
		}
		// Take apart what paho was given, without the code under test.
		for rest := frames; len(rest) > 0; {
			first, length, n := rest[0], 0, 1
			for shift := 0; n < len(rest); shift += 7 {
				b := rest[n]
				n++
				length |= int(b&0x7f) << shift
				if b < 0x80 {
					break
				}
			}
			switch ok := map[byte]bool{2: length == 2, 4: length == 2, 9: length == 3, 13: length == 0, 3: length <= maxPublish}; {
			case !ok[first>>4]:
				t.Fatalf("frame 0x%02x of %d bytes was let through", first, length)
			case n+length > len(rest): // cut off by the end of the stream
				return
			}
			rest = rest[n+length:]
		}
	})
}

// authority makes certificates in files.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.issue(name, true)
	return a
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) issue(name string, ca bool) (cert, key string) {
	a.t.Helper()
	must := func(err error) {
		if err != nil {
			a.t.Fatal(err)
		}
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(err)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if ca {
		parent, signer = template, k
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &k.PublicKey, signer)
	must(err)
	if ca {
		a.cert, err = x509.ParseCertificate(der)
		must(err)
		a.key = k
	}
	kd, err := x509.MarshalECPrivateKey(k)
	must(err)
	cert, key = a.file(name+".pem"), a.file(name+".key")
	must(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kd}), 0o600))
	return cert, key
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ours, other := newAuthority(t, "ca"), newAuthority(t, "other")
	serverCert, serverKey := ours.issue("server", false)
	clientCert, clientKey := ours.issue("ward", false)
	strangerCert, strangerKey := other.issue("stranger", false)
	_, port, _ := net.SplitHostPort(testkit.FreeAddr(t))
	testkit.StartMosquitto(t, "listener "+port+" 127.0.0.1", "cafile "+ours.file("ca.pem"), "certfile "+serverCert,
		"keyfile "+serverKey, "require_certificate true")
	for _, c := range []struct {
		name, host string
		tls        mqttup.TLS
		want       string // in the error; "": it works
	}{
		{"mutual", "127.0.0.1", mqttup.TLS{CA: ours.file("ca.pem"), Cert: clientCert, Key: clientKey}, ""},
		{"unknown server", "127.0.0.1", mqttup.TLS{CA: other.file("other.pem"), Cert: clientCert, Key: clientKey}, "unknown authority"},
		{"the system's roots do not know it", "127.0.0.1", mqttup.TLS{Cert: clientCert, Key: clientKey}, "unknown authority"},
		{"another name", "localhost", mqttup.TLS{CA: ours.file("ca.pem"), Cert: clientCert, Key: clientKey}, "localhost"},
		{"no client certificate", "127.0.0.1", mqttup.TLS{CA: ours.file("ca.pem")}, "certificate required"},
		{"a stranger's certificate", "127.0.0.1", mqttup.TLS{CA: ours.file("ca.pem"), Cert: strangerCert, Key: strangerKey}, "unknown certificate authority"},
		{"no ca file", "127.0.0.1", mqttup.TLS{CA: ours.file("none.pem")}, "no such file"},
		{"ca file without certificate", "127.0.0.1", mqttup.TLS{CA: clientKey}, "no certificate in PEM form"},
		{"key of another", "127.0.0.1", mqttup.TLS{CA: ours.file("ca.pem"), Cert: clientCert, Key: strangerKey}, "private key does not match"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := mqttup.Options{URL: "mqtts://" + net.JoinHostPort(c.host, port), ClientID: "c", Gateway: "g", Epoch: "e", TLS: c.tls}
			var a acks
			s, err := upstream(t, o).Dial(within(t, 10*time.Second), a.put)
			if c.want != "" {
				if err == nil {
					s.Close(t.Context())
				}
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want … %s …", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for i := 1; i <= 1000; i++ {
				if err := s.Send(message(i, strings.Repeat("x", 1000))); err != nil {
					t.Fatal(err)
				}
			}
			testkit.Eventually(t, 10*time.Second, "all acks", func() bool { return len(a.got()) == 1000 })
			s.Close(within(t, 5*time.Second))
		})
	}
}

func TestSubscribe(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, nil)
	up := make(chan struct{}, 10)
	o := mqttup.Options{URL: b.URL(), ClientID: "tail", OnUp: func() { up <- struct{}{} }, Log: testkit.Logger(t)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type got struct{ topic, payload string }
	arrived := make(chan got, 100_000)
	done := make(chan error, 1)
	go func() {
		done <- mqttup.Subscribe(ctx, o, []string{"gw/+/#", "dt/#", "dt/#"}, func(topic string, payload []byte) {
			arrived <- got{topic, string(payload)}
		})
	}()
	for round := range 3 { // each on a new connection
		select {
		case <-up:
		case <-time.After(20 * time.Second):
			t.Fatal("not subscribed")
		}
		const n = 10_000
		var raw []byte
		for i := range n {
			raw = append(raw, bridgetest.PublishFrame("dt/x", fmt.Append(nil, round, " ", i), byte(i%2), uint16(i+1))...)
		}
		b.Deliver(raw)
		for i := range n {
			select {
			case g := <-arrived:
				if want := fmt.Sprint(round, " ", i); g.topic != "dt/x" || g.payload != want {
					t.Fatalf("got %+v, want %q", g, want)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("message %d does not come", i)
			}
		}
		b.Cut(true)
	}
	<-up
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Subscribe returned %v", err)
	}
	for _, c := range b.Connects() {
		if !c.Clean || c.WillTopic != "" {
			t.Errorf("CONNECT %+v", c)
		}
	}
}

// TestSubscriberMayTakeItsTime: while the handler is busy nobody reads, so that the answer to a ping does not
// come is no sign of anything.
func TestSubscriberMayTakeItsTime(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, nil)
	up := make(chan struct{}, 10)
	o := mqttup.Options{
		URL: b.URL(), ClientID: "tail", KeepAlive: time.Second, Stall: 200 * time.Millisecond, OnUp: func() { up <- struct{}{} },
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got, hold, done := make(chan string, 10), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- mqttup.Subscribe(ctx, o, []string{"dt/#"}, func(_ string, payload []byte) {
			got <- string(payload)
			<-hold
		})
	}()
	<-up
	for _, p := range []string{"1", "2", "3", "4"} { // more than paho takes in one go
		b.Deliver(bridgetest.PublishFrame("dt/x", []byte(p), 0, 0))
	}
	<-got
	testkit.Eventually(t, 10*time.Second, "pings are sent", func() bool { return b.Pings() >= 1 })
	<-time.After(time.Second)
	close(hold)
	for _, want := range []string{"2", "3", "4"} {
		if p := <-got; p != want {
			t.Errorf("got %s, want %s", p, want)
		}
	}
	cancel()
	if err := <-done; err != nil || len(b.Connects()) != 1 {
		t.Errorf("Subscribe returned %v, %d connections", err, len(b.Connects()))
	}
	testkit.Eventually(t, 10*time.Second, "DISCONNECT comes", func() bool { return b.Disconnects() == 1 })
}

func TestSubscribeTellsWhatItWillNeverGet(t *testing.T) {
	handler := func(string, []byte) {}
	t.Run("a filter", func(t *testing.T) {
		b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
			b.OnSubscribe = func(filters []string) (codes, raw []byte) { // in the order in which paho's map gives them
				for _, f := range filters {
					code := byte(1)
					if f == "b" {
						code = 0x80
					}
					codes = append(codes, code)
				}
				return codes, nil
			}
		})
		err := mqttup.Subscribe(within(t, 10*time.Second), mqttup.Options{URL: b.URL(), ClientID: "t"}, []string{"a", "b"}, handler)
		if err == nil || !strings.Contains(err.Error(), `"b"`) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the first connection", func(t *testing.T) {
		b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) { b.OnConnect = func(int, bridgetest.Connect) int { return 4 } })
		err := mqttup.Subscribe(within(t, 10*time.Second), mqttup.Options{URL: b.URL(), ClientID: "t"}, []string{"a"}, handler)
		if !errors.Is(err, bridge.ErrRefused) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("nothing asked for", func(t *testing.T) {
		if err := mqttup.Subscribe(t.Context(), mqttup.Options{URL: "mqtt://h", ClientID: "t"}, nil, handler); err == nil {
			t.Error("no error")
		}
	})
}

// TestSubscribeOutlivesAHostileBroker: paho alone would panic on a SUBACK with too many codes.
func TestSubscribeOutlivesAHostileBroker(t *testing.T) {
	up := make(chan struct{}, 1)
	tries := 0
	b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
		b.OnSubscribe = func([]string) (codes, raw []byte) {
			switch tries++; tries {
			case 1:
				return nil, append([]byte{0x90, 102, 0, 1}, make([]byte, 100)...)
			case 2:
				return nil, []byte{0x30, 0xff, 0xff, 0xff, 0x7f} // a PUBLISH of 256 MiB
			}
			return []byte{1}, nil
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := mqttup.Options{URL: b.URL(), ClientID: "t", OnUp: func() { up <- struct{}{} }}
	done := make(chan error, 1)
	go func() { done <- mqttup.Subscribe(ctx, o, []string{"a"}, func(string, []byte) {}) }()
	select {
	case <-up:
	case err := <-done:
		t.Fatalf("Subscribe returned %v", err)
	case <-time.After(20 * time.Second):
		t.Fatal("never up")
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Subscribe returned %v", err)
	}
}
