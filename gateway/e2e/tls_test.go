package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// authority is a folder that `holdfast cert` has made.
type authority struct {
	t   *testing.T
	bin string
	dir string
}

func newAuthority(t *testing.T, bin string) *authority {
	t.Helper()
	a := &authority{t, bin, filepath.Join(t.TempDir(), "pki")}
	a.cert("init", "--name", "Ward 3", "--host", "127.0.0.1")
	return a
}

// cert runs `holdfast cert`.
func (a *authority) cert(args ...string) {
	a.t.Helper()
	args = append([]string{"cert"}, append(args, "--dir", a.dir)...)
	if out, errs, code := holdfast(a.t, a.bin, args...); code != 0 {
		a.t.Fatalf("holdfast %v: exit code %d: %s%s", args, code, out, errs)
	}
}

func (a *authority) path(elem ...string) string {
	return filepath.Join(append([]string{a.dir}, elem...)...)
}

// listener is what the gateway's configuration says of it.
func (a *authority) listener(addr string) string {
	return fmt.Sprintf("{ name: tls, protocol: mqtts, address: %q, tls: { cert: %q, key: %q, client_ca: %q, require_client_cert: true, crl: %q } }",
		addr, a.path("server.crt"), a.path("server.key"), a.path("ca.crt"), a.path("crl.pem"))
}

// shows has a device connect over TLS with a certificate; id "": with none.
func (a *authority) shows(id string) func(*device) {
	a.t.Helper()
	c := a.client(id)
	return func(d *device) { d.tls, d.from = c, "" }
}

func (a *authority) client(id string) *tls.Config {
	a.t.Helper()
	ca, err := os.ReadFile(a.path("ca.crt"))
	if err != nil {
		a.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	c := &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	if id != "" {
		pair, err := tls.LoadX509KeyPair(a.path("devices", id+".crt"), a.path("devices", id+".key"))
		if err != nil {
			a.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

// shown is the certificate that the gateway shows now to who comes new.
func (s *gated) shown(a *authority, id string) *x509.Certificate {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.tls)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	c := tls.Client(conn, a.client(id))
	if err := c.HandshakeContext(ctx); err != nil {
		s.t.Fatalf("handshake as %s: %v", id, err)
	}
	return c.ConnectionState().PeerCertificates[0]
}

// unverified tries to connect a device that has to be turned away before its CONNECT is looked at.
func (s *gated) unverified(why string, c mqtt.Connect, with ...func(*device)) {
	s.t.Helper()
	d, err := s.try(c, with...)
	var refused *mqtt.Refused
	if err == nil {
		d.client.Abort()
	}
	if err == nil || errors.As(err, &refused) {
		s.t.Errorf("%s: %v; want no handshake", why, err)
	}
}

// foreign publishes with mosquitto_pub and its certificate.
func (s *gated) foreign(a *authority, id, topic, payload string) error {
	path, err := exec.LookPath("mosquitto_pub")
	if err != nil {
		s.t.Skipf("mosquitto_pub is not installed (Debian: mosquitto-clients; .ci/run installs it)")
	}
	host, port, err := net.SplitHostPort(s.tls)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 15*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "-h", host, "-p", port, "--cafile", a.path("ca.crt"), "--cert", a.path("devices", id+".crt"),
		"--key", a.path("devices", id+".key"), "-i", id, "-q", "1", "-t", topic, "-m", payload).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// TestTLS is the life of a site that has its certificates from `holdfast cert`: devices come with theirs, one is revoked, the gateway's
// is renewed by a change of the files and by SIGHUP, and files that are broken change nothing. Healthy connections stay all the time.
func TestTLS(t *testing.T) {
	t.Parallel()
	path := bin(t)
	a := newAuthority(t, path)
	addr := testkit.FreeAddr(t)
	s := startGated(t, testkit.GatewayConfig{Listeners: []string{a.listener(addr)}})
	s.tls = addr
	for _, id := range []string{"lost", "well", "renewed", "unknown"} {
		a.cert("device", id)
		if id != "unknown" {
			s.must(nil, "device", "add", id, "--no-credential")
		}
	}
	s.register("watch", map[string]any{"role": "monitor", "credential": map[string]any{"kind": "none"}})
	a.cert("device", "watch")

	// Who may come.
	cert := func(v mqtt.Version, id string) mqtt.Connect { return login(v, id, "") }
	for _, v := range versions {
		s.in(cert(v, "well"), a.shows("well")).close()
		s.out(mqtt.BadUsernameOrPassword, "with another's certificate", cert(v, "lost"), a.shows("well"))
		s.out(mqtt.BadUsernameOrPassword, "whose certificate is good, but who is not registered", cert(v, "unknown"), a.shows("unknown"))
		s.out(mqtt.BadUsernameOrPassword, "without TLS", cert(v, "well"))
		s.unverified("no certificate", cert(v, "well"), a.shows(""))
	}
	other := newAuthority(t, path)
	other.cert("device", "well")
	strange := other.client("well")
	strange.RootCAs = a.client("").RootCAs // it trusts the gateway, the gateway does not trust it
	s.unverified("a certificate of another authority", cert(mqtt.V5, "well"), func(d *device) { d.tls, d.from = strange, "" })

	got := newMailbox()
	watch := s.in(cert(mqtt.V5, "watch"), a.shows("watch"), hears(got))
	watch.subscribe(t, "dt/#")
	well := s.in(cert(mqtt.V311, "well"), a.shows("well"))
	lost, renewed := s.in(cert(mqtt.V5, "lost"), a.shows("lost")), s.in(cert(mqtt.V5, "renewed"), a.shows("renewed"))
	resumes := lost.tls
	n := 0
	healthy := func(after string) {
		t.Helper()
		n++
		topic := fmt.Sprintf("dt/well/%d", n)
		if err := well.publish(t.Context(), topic, []byte("1"), 1); err != nil {
			t.Fatalf("after %s: %v", after, err)
		}
		got.until(t, topic)
	}
	healthy("the start")

	// Revoked, and another's key replaced: the new list is found without being told of.
	before := s.shown(a, "well")
	was := a.shows("renewed")
	begin := time.Now()
	a.cert("revoke", "lost")
	a.cert("rotate", "device", "renewed", "--revoke")
	for _, d := range []*device{lost, renewed} {
		select {
		case <-d.client.Done():
		case <-time.After(time.Until(begin.Add(10 * time.Second))):
			t.Fatal("a certificate was revoked, and its connection is there after 10 s")
		}
		var told *mqtt.Refused
		if !errors.As(d.client.Err(), &told) || told.Reason != mqtt.NotAuthorized || !strings.Contains(told.Text, "revoked") {
			t.Errorf("who has a revoked certificate is told %v", d.client.Err())
		}
	}
	t.Logf("revoked connections ended after %v", time.Since(begin).Round(10*time.Millisecond))
	healthy("a revocation")
	s.unverified("a revoked certificate", cert(mqtt.V5, "lost"), a.shows("lost"))
	s.unverified("a revoked certificate with a session ticket from before", cert(mqtt.V5, "lost"), func(d *device) { d.tls, d.from = resumes, "" })
	s.unverified("a certificate that was replaced", cert(mqtt.V5, "renewed"), was)
	renewed = s.in(cert(mqtt.V5, "renewed"), a.shows("renewed"))

	// Another program's client.
	if err := s.foreign(a, "unknown", "dt/foreign", "1"); err == nil {
		t.Error("mosquitto_pub comes in with a certificate of a device that is not registered")
	}
	s.must(nil, "device", "add", "unknown", "--no-credential")
	if err := s.foreign(a, "unknown", "dt/foreign", "1"); err != nil {
		t.Error(err)
	}
	got.until(t, "dt/foreign")
	if err := s.foreign(a, "lost", "dt/foreign", "2"); err == nil {
		t.Error("mosquitto_pub comes in with a revoked certificate")
	}

	// The gateway's own certificate, by its file alone.
	serial := func(c *x509.Certificate) *big.Int { return c.SerialNumber }
	a.cert("rotate", "server")
	testkit.Eventually(t, 10*time.Second, "the new certificate is shown", func() bool { return serial(s.shown(a, "well")).Cmp(serial(before)) != 0 })
	healthy("a new certificate")
	stays(t, renewed, "a new certificate of the gateway")

	// By SIGHUP it is there at once.
	second := s.shown(a, "well")
	a.cert("rotate", "server")
	if !s.Reload() {
		t.Fatal("SIGHUP is refused")
	}
	third := s.shown(a, "well")
	if serial(third).Cmp(serial(second)) == 0 {
		t.Error("after SIGHUP the old certificate is shown")
	}
	healthy("SIGHUP")
	told := func(c *x509.Certificate) {
		t.Helper()
		if at, err := s.Metric("holdfast_broker_certificate_expiry_seconds", `listener="tls"`, `file="cert"`); err != nil || int64(at) != c.NotAfter.Unix() {
			t.Errorf("the metric says that the certificate ends at %v (%v), it ends at %d", int64(at), err, c.NotAfter.Unix())
		}
		st, err := s.Status()
		if err != nil {
			t.Fatal(err)
		}
		for _, shown := range st.Certificates {
			if shown.File == a.path("server.crt") && shown.Listener == "tls" {
				if !shown.NotAfter.Equal(c.NotAfter) || shown.Subject != c.Subject.String() {
					t.Errorf("status tells of %+v, it is %s to %v", shown, c.Subject, c.NotAfter)
				}
				return
			}
		}
		t.Errorf("status does not tell of the certificate: %+v", st.Certificates)
	}
	told(third)

	// What is broken is not taken, neither by SIGHUP nor by itself, and the log names it.
	for _, file := range []string{"server.crt", "server.key", "ca.crt", "crl.pem"} {
		whole, err := os.ReadFile(a.path(file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(a.path(file), whole[:len(whole)/2], 0o600); err != nil {
			t.Fatal(err)
		}
		read := len(s.Logs())
		if s.Reload() {
			t.Errorf("half of %s is taken", file)
		}
		if file == "crl.pem" {
			testkit.Eventually(t, 10*time.Second, "the log tells of the broken file without SIGHUP", func() bool {
				return strings.Contains(s.Logs(), "certificates not loaded, those from before stay")
			})
		}
		if !strings.Contains(s.Logs()[read:], a.path(file)) {
			t.Errorf("the log does not name %s", file)
		}
		if err := os.WriteFile(a.path(file), whole, 0o600); err != nil {
			t.Fatal(err)
		}
		// What the gateway uses now is what it had: it reads the mended file in a moment only.
		if now := s.shown(a, "well"); serial(now).Cmp(serial(third)) != 0 {
			t.Errorf("half of %s has changed the certificate", file)
		}
		healthy("half of " + file)
	}
	if !s.Reload() {
		t.Fatal("the mended files are refused")
	}
	told(third)
	s.unverified("a revoked certificate, after all that", cert(mqtt.V5, "lost"), a.shows("lost"))
	healthy("all of it")
	if lines := strings.Count(s.Logs(), "certificates not loaded"); lines > 12 {
		t.Errorf("the log tells %d times of broken files", lines)
	}
}

// TestCertificatesThatEndSoon has a gateway whose certificate ends within the month: its log, its status and its metric say so.
func TestCertificatesThatEndSoon(t *testing.T) {
	t.Parallel()
	path := bin(t)
	a := newAuthority(t, path)
	a.cert("device", "brief", "--days", "7") // stands for a server certificate of an authority with short lifetimes
	addr := testkit.FreeAddr(t)
	s := startGated(t, testkit.GatewayConfig{Listeners: []string{fmt.Sprintf("{ name: tls, protocol: mqtts, address: %q, tls: { cert: %q, key: %q } }",
		addr, a.path("devices", "brief.crt"), a.path("devices", "brief.key"))}})
	if log := s.Logs(); !strings.Contains(log, "ends soon") || !strings.Contains(log, a.path("devices", "brief.crt")) {
		t.Error("the log does not say that the certificate ends soon")
	}
	out, _, code := holdfast(t, path, "status", "--config", s.File)
	if code != 0 || !strings.Contains(out, "certificate of listener tls ends in") {
		t.Errorf("exit code %d, holdfast status says:\n%s", code, out)
	}
	at, err := s.Metric("holdfast_broker_certificate_expiry_seconds", `listener="tls"`, `file="cert"`)
	if left := time.Until(time.Unix(int64(at), 0)); err != nil || left < 6*24*time.Hour || left > 7*24*time.Hour {
		t.Errorf("%v left, %v", left, err)
	}
}
