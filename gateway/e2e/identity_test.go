package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// site is a certificate authority made with `holdfast cert`.
type site struct {
	t    *testing.T
	path string
	dir  string
}

func makeSite(t *testing.T, path string) *site {
	t.Helper()
	s := &site{t, path, filepath.Join(t.TempDir(), "pki")}
	s.cert("init", "--name", "site", "--host", "localhost")
	return s
}

func (s *site) cert(args ...string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	args = append([]string{"cert"}, append(args, "--dir", s.dir)...)
	if out, err := exec.CommandContext(ctx, s.path, args...).CombinedOutput(); err != nil {
		s.t.Fatalf("holdfast %v: %v\n%s", args, err, out)
	}
}

// client is the TLS of a device with the site's certificate.
func (s *site) client(device string) *tls.Config {
	s.t.Helper()
	ca, err := os.ReadFile(filepath.Join(s.dir, "ca.crt"))
	if err != nil {
		s.t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(s.dir, "devices", device+".crt"), filepath.Join(s.dir, "devices", device+".key"))
	if err != nil {
		s.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "localhost", MinVersion: tls.VersionTLS12}
}

// TestCertificatesChangeUnderLiveConnections revokes one of two connected devices and renews the gateway's certificate: the
// revoked one is cut and stays out, the other keeps its connection through both.
func TestCertificatesChangeUnderLiveConnections(t *testing.T) {
	t.Parallel()
	path := bin(t)
	s := makeSite(t, path)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"devices: { anonymous: false }\n")
	addr := testkit.FreeAddr(t)
	text, err := os.ReadFile(g.File)
	if err != nil {
		t.Fatal(err)
	}
	secure := fmt.Sprintf(`listeners:
  - name: tls
    protocol: mqtts
    address: %q
    tls: { cert: %q, key: %q, client_ca: %q, crl: %q, require_client_cert: true }
`, addr, filepath.Join(s.dir, "server.crt"), filepath.Join(s.dir, "server.key"), filepath.Join(s.dir, "ca.crt"), filepath.Join(s.dir, "crl.pem"))
	if err := os.WriteFile(g.File, bytes.Replace(text, []byte("listeners:\n"), []byte(secure), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	g.Stop()
	g.Restart()
	connect := func(id, certificate string) (*device, error) {
		d := &device{waiting: map[uint16]chan *mqtt.Ack{}}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var err error
		d.client, err = mqtt.Dial(ctx, mqtt.ClientOptions{
			Address: addr, TLS: s.client(certificate), OnAck: d.onAck,
			Connect: mqtt.Connect{Version: mqtt.V5, ClientID: id, CleanStart: true, KeepAlive: 60},
		})
		if err != nil {
			return nil, err
		}
		t.Cleanup(d.close)
		return d, nil
	}
	for _, id := range []string{"good", "bad"} {
		s.cert("device", id)
		if _, err := g.Call(http.MethodPost, "/api/v1/devices", map[string]any{"id": id, "credential": map[string]any{"kind": "none"}}, http.StatusCreated); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := connect("good", "bad"); err == nil {
		t.Fatal("a device is let in with another's certificate")
	}
	good, err := connect("good", "good")
	if err != nil {
		t.Fatal(err)
	}
	bad, err := connect("bad", "bad")
	if err != nil {
		t.Fatal(err)
	}
	s.cert("revoke", "bad") // the list's file changes, and nobody tells the gateway
	select {
	case <-bad.client.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the revoked device is still connected")
	}
	if _, err := connect("bad", "bad"); err == nil {
		t.Error("the revoked device is let in again")
	}
	s.cert("rotate", "server")
	g.Signal(syscall.SIGHUP)
	testkit.Eventually(t, 10*time.Second, "the configuration is read again", func() bool { return strings.Contains(g.Logs(), "configuration read again") })
	// A key that does not belong to its certificate: the one before stays in force.
	if err := os.WriteFile(filepath.Join(s.dir, "server.key"), []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.Signal(syscall.SIGHUP)
	testkit.Eventually(t, 10*time.Second, "the broken key is refused", func() bool { return strings.Contains(g.Logs(), "the old one stays") })
	if err := good.publish(t.Context(), "dt/x", []byte("still here"), 1); err != nil {
		t.Errorf("the healthy device: %v", err)
	}
	if _, err := connect("good", "good"); err != nil {
		t.Errorf("after a key that is none: %v", err)
	}
}

// TestAFlappingDeviceHurtsNobody has one device come and go a hundred times a second.
func TestAFlappingDeviceHurtsNobody(t *testing.T) {
	t.Parallel()
	path := bin(t)
	up := testkit.StartMosquitto(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	var mu sync.Mutex
	var told []string
	watch, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
		Address: up.Addr, Connect: mqtt.Connect{Version: mqtt.V311, ClientID: "watch", CleanStart: true, KeepAlive: 60},
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, string(p.Topic))
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { watch.Abort(); <-watch.Done() })
	if _, err := watch.Subscribe(t.Context(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.DeviceEventFilter(gatewayID, "flappy"), QoS: 1}}}); err != nil {
		t.Fatal(err)
	}
	calm := newDevice(t, g.Addr, "calm", mqtt.V5)
	before := g.RSS()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	flaps := 0
	var worst time.Duration
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); <-tick.C {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		c, err := mqtt.Dial(ctx, mqtt.ClientOptions{Address: g.Addr, Connect: mqtt.Connect{Version: mqtt.V311, ClientID: "flappy", KeepAlive: 60}})
		cancel()
		if err == nil {
			flaps++
			c.Abort()
		}
		begin := time.Now()
		if err := calm.publish(t.Context(), "dt/x", []byte("1"), 1); err != nil {
			t.Fatal(err)
		}
		worst = max(worst, time.Since(begin))
	}
	testkit.EventuallyNil(t, 10*time.Second, "the device is off-line", func() error {
		b, err := g.Call(http.MethodGet, "/api/v1/devices/flappy", nil, http.StatusOK)
		if err == nil && bytes.Contains(b, []byte(`"connected": true`)) {
			return fmt.Errorf("%s", b)
		}
		return err
	})
	grown := (g.RSS() - before) >> 20
	mu.Lock()
	defer mu.Unlock()
	t.Logf("%d flaps, %d events upstream, memory grew by %d MiB, the other device waited %v at most", flaps, len(told), grown, worst)
	switch {
	case flaps < 100:
		t.Errorf("only %d flaps: the test has shown nothing", flaps)
	case len(told) == 0 || len(told) > 13:
		t.Errorf("%d events upstream: %v", len(told), told)
	case worst > 2*time.Second:
		t.Errorf("the other device waited %v", worst)
	case grown > 48:
		t.Errorf("memory grew by %d MiB", grown)
	}
}

// TestARoleLimitsWhatADeviceSends has devices send faster than their role allows: MQTT 5 is told, 3.1.1 is slowed and loses
// nothing.
func TestARoleLimitsWhatADeviceSends(t *testing.T) {
	t.Parallel()
	path := bin(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+`devices:
  anonymous: true
  roles:
    - { name: anonymous, publish: ["dt/#"], subscribe: [], limits: { messages_per_second: 20 } }
`)
	const n = 50
	send := func(id string, v mqtt.Version) (good, refused int, took time.Duration) {
		acks := make(chan mqtt.Reason, n)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
			Address: g.Addr, Connect: mqtt.Connect{Version: v, ClientID: id, CleanStart: true, KeepAlive: 60},
			OnAck: func(_ *mqtt.Client, a *mqtt.Ack) { acks <- a.Reason },
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { c.Abort(); <-c.Done() }()
		begin := time.Now()
		for i := range n {
			if err := c.Publish(&mqtt.Publish{QoS: 1, ID: uint16(i + 1), Topic: []byte("dt/x"), Payload: []byte("1")}); err != nil {
				t.Fatal(err)
			}
		}
		for range n {
			select {
			case r := <-acks:
				switch r {
				case mqtt.Success:
					good++
				case mqtt.QuotaExceeded:
					refused++
				default:
					t.Errorf("reason %v", r)
				}
			case <-ctx.Done():
				t.Fatalf("%s: %d of %d answered", id, good+refused, n)
			}
		}
		return good, refused, time.Since(begin)
	}
	if good, refused, _ := send("five", mqtt.V5); good < 20 || refused == 0 {
		t.Errorf("MQTT 5: %d taken, %d refused", good, refused)
	}
	if good, _, took := send("three", mqtt.V311); good != n || took < time.Second {
		t.Errorf("MQTT 3.1.1: %d taken in %v", good, took)
	}
	// What the role does not name it does not allow.
	d := newDevice(t, g.Addr, "nosy", mqtt.V5)
	if err := d.publish(t.Context(), "other/x", nil, 1); err == nil {
		t.Error("a topic outside of the role is taken")
	}
}
