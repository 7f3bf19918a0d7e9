package broker_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// authority makes certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string

	serial  int64
	serials map[string]int64 // of the last certificate, by name
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), serial: 1, serials: map[string]int64{}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a.key = key
	a.file = a.write(name+".pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue gives the files of a certificate and its key, valid for an hour.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	return a.issueUntil(name, time.Now().Add(time.Hour))
}

func (a *authority) issueUntil(name string, end time.Time) (cert, key string) {
	a.t.Helper()
	a.serial++
	a.serials[name] = a.serial
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: name}, NotAfter: end,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	kb, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.write(name+".crt", "CERTIFICATE", der), a.write(name+".key", "EC PRIVATE KEY", kb)
}

func (a *authority) client(name string) *tls.Config {
	a.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	c := &tls.Config{RootCAs: pool, ServerName: "127.0.0.1"}
	if name != "" {
		pair, err := tls.LoadX509KeyPair(a.issue(name))
		if err != nil {
			a.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

func (r *rig) over(nc net.Conn, v mqtt.Version) *peer {
	r.t.Cleanup(func() { nc.Close() })
	return &peer{t: r.t, v: v, nc: nc}
}

// hello connects on a connection that is there, publishes and says goodbye.
func (p *peer) hello(id string) {
	p.t.Helper()
	p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: p.v, ClientID: id, CleanStart: true}))
	if a := p.connack(); a.Reason != mqtt.Success {
		p.t.Fatalf("CONNACK %v", a.Reason)
	}
	for i := range 50 {
		p.publish(1, uint16(i+1), "t", strings.Repeat("x", i*100))
	}
	for i := range 50 {
		p.success(mqtt.TypePuback, uint16(i+1))
	}
	p.silent()
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	stranger := newAuthority(t, "stranger")
	cert, key := ca.issue("gateway")
	var last broker.ConnectInfo
	start := func(t *testing.T, require bool) *rig {
		return newRig(t, func(r *rig) {
			shorten(r)
			r.cfg.Listeners = []broker.Listener{{
				Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0",
				TLS: broker.TLS{Cert: cert, Key: key, ClientCA: ca.file, RequireClientCert: require},
			}}
			r.auth.connect = func(c *broker.ConnectInfo) error { last = *c; return nil }
		})
	}
	dial := func(r *rig, c *tls.Config) *peer {
		r.t.Helper()
		return r.over(tls.Client(testkit.Dial(r.t, r.addr()), c), mqtt.V5)
	}
	t.Run("without a client certificate", func(t *testing.T) {
		r := start(t, false)
		dial(r, ca.client("")).hello("dev")
		if last.TLS == nil || len(last.TLS.PeerCertificates) != 0 {
			t.Errorf("TLS state %+v", last.TLS)
		}
	})
	t.Run("with one", func(t *testing.T) {
		r := start(t, true)
		dial(r, ca.client("device-7")).hello("dev")
		if last.TLS == nil || len(last.TLS.VerifiedChains) == 0 || last.TLS.PeerCertificates[0].Subject.CommonName != "device-7" {
			t.Errorf("TLS state %+v", last.TLS)
		}
	})
	for _, x := range []struct {
		name string
		conf func() *tls.Config
	}{
		{"none where one is required", func() *tls.Config { return ca.client("") }},
		{"of a stranger", func() *tls.Config { c := stranger.client("dev"); c.RootCAs = ca.client("").RootCAs; return c }},
		{"TLS 1.1", func() *tls.Config {
			c := ca.client("dev")
			c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
			return c
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			r := start(t, true)
			p := dial(r, x.conf())
			_, _ = p.nc.Write(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V5, ClientID: "dev"}))
			if f, err := p.next(patience); !errors.Is(err, io.EOF) {
				t.Errorf("% x, %v", f, err)
			}
			if r.b.Stats().Sessions != 0 {
				t.Error("it got in")
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		r := start(t, false)
		begin := time.Now()
		r.dial(mqtt.V5).closed(0)
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("closed after %v", d)
		}
	})
	t.Run("half a handshake", func(t *testing.T) {
		r := start(t, false)
		p := r.dial(mqtt.V5)
		p.send([]byte{0x16, 3, 1, 1, 0, 1, 0, 0})
		p.closed(0)
	})
	t.Run("plain MQTT", func(t *testing.T) {
		r := start(t, false)
		p := r.dial(mqtt.V311)
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V311, ClientID: "dev", CleanStart: true}))
		if _, err := io.Copy(io.Discard, p.nc); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
			t.Error(err)
		}
	})
	t.Run("stop while a peer is silent", func(t *testing.T) {
		r := newRig(t, func(r *rig) {
			r.cfg.Listeners = []broker.Listener{{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: broker.TLS{Cert: cert, Key: key}}}
		})
		r.dial(mqtt.V5)
		eventually(t, "connection", func() bool { return r.b.Stats().Connections == 1 })
		begin := time.Now()
		r.stop()
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("took %v", d)
		}
	})
}

// stream is a websocket as a net.Conn for tests: each Write is one message.
type stream struct {
	*websocket.Conn
	rest []byte
}

func (s *stream) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		_, b, err := s.ReadMessage()
		if err != nil {
			return 0, err
		}
		s.rest = b
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *stream) Write(p []byte) (int, error) {
	return len(p), s.WriteMessage(websocket.BinaryMessage, p)
}

func (s *stream) SetDeadline(t time.Time) error { return s.SetReadDeadline(t) }

func TestWebsocket(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	cert, key := ca.issue("gateway")
	start := func(t *testing.T, protocol string) *rig {
		return newRig(t, func(r *rig) {
			shorten(r)
			l := broker.Listener{Name: "web", Protocol: protocol, Address: "127.0.0.1:0"}
			if protocol == "wss" {
				l.TLS = broker.TLS{Cert: cert, Key: key}
			}
			r.cfg.Listeners = []broker.Listener{l}
		})
	}
	dial := func(r *rig, protocol, sub string, header http.Header) (*websocket.Conn, *http.Response, error) {
		d := websocket.Dialer{Subprotocols: []string{sub}, TLSClientConfig: ca.client(""), HandshakeTimeout: patience}
		return d.DialContext(t.Context(), protocol+"://"+r.addr()+"/mqtt", header)
	}
	open := func(r *rig, protocol string) (*peer, *stream) {
		r.t.Helper()
		ws, resp, err := dial(r, protocol, "mqtt", nil)
		if err != nil {
			r.t.Fatal(err)
		}
		resp.Body.Close()
		if ws.Subprotocol() != "mqtt" {
			r.t.Errorf("subprotocol %q", ws.Subprotocol())
		}
		s := &stream{Conn: ws}
		return r.over(s, mqtt.V5), s
	}
	for _, protocol := range []string{"ws", "wss"} {
		t.Run(protocol, func(t *testing.T) {
			r := start(t, protocol)
			p, s := open(r, protocol)
			p.hello("dev")
			// A control frame in between, and packets that do not end where messages do.
			pong := make(chan struct{}, 1)
			s.SetPongHandler(func(string) error { pong <- struct{}{}; return nil })
			if err := s.WriteControl(websocket.PingMessage, nil, time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			b := mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{QoS: 1, ID: 9, Topic: []byte("t"), Payload: []byte("pieces")})
			b = mqtt.AppendPingreq(b)
			p.send(b[:3])
			p.send(b[3:10])
			p.send(b[10:])
			seen := map[mqtt.Type]bool{}
			for range 2 {
				f, err := p.next(patience)
				if err != nil {
					t.Fatal(err)
				}
				seen[mqtt.Type(f[0]>>4)] = true
			}
			if !seen[mqtt.TypePuback] || !seen[mqtt.TypePingresp] || len(pong) != 1 {
				t.Errorf("%v, %d pongs", seen, len(pong))
			}
			p.send(mqtt.AppendDisconnect(nil, mqtt.V5, mqtt.Success, ""))
			if _, err := p.next(patience); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
		})
	}
	t.Run("keep alive", func(t *testing.T) {
		r := start(t, "ws")
		p, _ := open(r, "ws")
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V5, ClientID: "dev", CleanStart: true, KeepAlive: 1}))
		p.connack()
		p.closed(mqtt.KeepAliveTimeout)
	})
	t.Run("text", func(t *testing.T) {
		r := start(t, "ws")
		_, s := open(r, "ws")
		if err := s.WriteMessage(websocket.TextMessage, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		_ = s.SetReadDeadline(time.Now().Add(patience))
		if _, _, err := s.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseUnsupportedData) {
			t.Error(err)
		}
	})
	t.Run("message too long", func(t *testing.T) {
		r := start(t, "ws")
		_, s := open(r, "ws")
		go func() { _ = s.WriteMessage(websocket.BinaryMessage, make([]byte, 3<<20)) }()
		_ = s.SetReadDeadline(time.Now().Add(patience))
		if _, _, err := s.ReadMessage(); err == nil {
			t.Error("was taken")
		}
		eventually(t, "end of the connection", func() bool { return r.b.Stats().Connections == 0 })
	})
	for name, header := range map[string]http.Header{
		"no subprotocol":  nil,
		"of another page": {"Origin": {"https://evil.example"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, "ws")
			sub := "mqtt"
			if header == nil {
				sub = "chat"
			}
			_, resp, err := dial(r, "ws", sub, header)
			if err == nil {
				t.Fatal("was let in")
			}
			if resp == nil || resp.StatusCode < 400 {
				t.Errorf("%v %v", resp, err)
			}
			if resp != nil {
				resp.Body.Close()
			}
			eventually(t, "end of the connection", func() bool { return r.b.Stats().Connections == 0 })
		})
	}
	t.Run("endless request", func(t *testing.T) {
		r := start(t, "ws")
		p := r.dial(mqtt.V5)
		_, _ = p.nc.Write([]byte("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 1<<20)))
		if _, err := p.next(patience); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
	t.Run("silent", func(t *testing.T) {
		r := start(t, "ws")
		r.dial(mqtt.V5).closed(0)
	})
}

func TestListenErrors(t *testing.T) {
	r := newRig(t, nil)
	for _, x := range []struct {
		name string
		l    broker.Listener
		want string
	}{
		{"in use", broker.Listener{Name: "lan", Protocol: "mqtt", Address: r.addr()}, "address already in use"},
		{"no certificate", broker.Listener{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: broker.TLS{Cert: "/none", Key: "/none"}}, "/none"},
	} {
		t.Run(x.name, func(t *testing.T) {
			free := broker.Listener{Name: "free", Protocol: "mqtt", Address: "127.0.0.1:0"}
			b, err := broker.New(broker.Config{Listeners: []broker.Listener{free, x.l}}, r.store, r.in, r.auth, nil, quiet, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Listen(); err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), x.l.Name) {
				t.Errorf("Listen: %v", err)
			}
			if n := len(b.Addrs()); n != 0 {
				t.Errorf("%d listeners are left", n)
			}
		})
	}
	for _, x := range []struct {
		l    broker.Listener
		want string
	}{
		{broker.Listener{Protocol: "mqtt", Address: ":1"}, "has no name"},
		{broker.Listener{Name: "a", Protocol: "amqp", Address: ":1"}, "must be mqtt, mqtts, ws or wss"},
		{broker.Listener{Name: "a", Protocol: "mqtt", Address: "here"}, "host:port"},
		{broker.Listener{Name: "a", Protocol: "wss", Address: ":1"}, "tls.cert"},
		{broker.Listener{Name: "a", Protocol: "ws", Address: ":1", TLS: broker.TLS{Cert: "x"}}, "did you mean wss"},
		{broker.Listener{Name: "a", Protocol: "wss", Address: ":1", TLS: broker.TLS{Cert: "x", Key: "y", RequireClientCert: true}}, "client_ca"},
	} {
		if _, err := broker.New(broker.Config{Listeners: []broker.Listener{x.l}}, r.store, r.in, r.auth, nil, quiet, nil); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v: %v", x.l, err)
		}
	}
}
