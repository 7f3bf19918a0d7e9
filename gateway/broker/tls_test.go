package broker_test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// revoke gives a list of the certificates with these names, in DER.
func (a *authority) revoke(next time.Time, names ...string) []byte {
	a.t.Helper()
	tpl := &x509.RevocationList{Number: big.NewInt(time.Now().UnixNano()), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: next}
	for _, n := range names {
		tpl.RevokedCertificateEntries = append(tpl.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(a.serials[n]), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tpl, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

func asPEM(ders ...[]byte) (all []byte) {
	for _, der := range ders {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return all
}

// put replaces a file as a whole.
func put(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	put(t, to, data)
}

func logTo(b *testkit.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

// site is a TLS listener with files that change.
type site struct {
	*rig
	ca    *authority
	files broker.TLS
	lines *testkit.Buffer
}

// newSite starts a broker with a CA for devices. change may add to the files.
func newSite(t *testing.T, change func(s *site)) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{ca: newAuthority(t, "ca"), lines: &testkit.Buffer{}}
	s.files = broker.TLS{
		Cert: filepath.Join(dir, "gateway.crt"), Key: filepath.Join(dir, "gateway.key"), ClientCA: filepath.Join(dir, "ca.crt"),
	}
	s.serverCert("gateway", time.Now().Add(time.Hour))
	copyFile(t, s.ca.file, s.files.ClientCA)
	s.rig = newRig(t, func(r *rig) {
		s.rig = r
		if change != nil {
			change(s)
		}
		r.log = logTo(s.lines)
		r.cfg.Listeners = []broker.Listener{{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: s.files}}
	})
	return s
}

func (s *site) serverCert(name string, end time.Time) {
	s.ca.t.Helper()
	cert, key := s.ca.issueUntil(name, end)
	copyFile(s.ca.t, cert, s.files.Cert)
	copyFile(s.ca.t, key, s.files.Key)
}

func (s *site) crl(names ...string) {
	s.ca.t.Helper()
	put(s.ca.t, s.files.CRL, asPEM(s.ca.revoke(time.Now().Add(time.Hour), names...)))
}

// over TLS, as a client that trusts the site's CA.
func (s *site) dialTLS(c *tls.Config) *tls.Conn { return tls.Client(testkit.Dial(s.t, s.addr()), c) }

// enter connects and gives the peer.
func (s *site) enter(v mqtt.Version, id string, c *tls.Config) (*peer, *tls.Conn) {
	s.t.Helper()
	nc := s.dialTLS(c)
	p := s.over(nc, v)
	p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: id, CleanStart: true}))
	if a := p.connack(); a.Reason != mqtt.Success {
		s.t.Fatalf("CONNACK %v", a.Reason)
	}
	return p, nc
}

// refused demands that the handshake fails.
func (s *site) refused(c *tls.Config) {
	s.t.Helper()
	nc := s.dialTLS(c)
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(patience))
	_, _ = nc.Write(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V5, ClientID: "refused", CleanStart: true}))
	if n, err := nc.Read(make([]byte, 100)); err == nil {
		s.t.Errorf("let in: %d bytes", n)
	}
}

func subject(nc *tls.Conn) string { return nc.ConnectionState().PeerCertificates[0].Subject.CommonName }

func TestReloadTLSKeepsConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	p, nc := s.enter(mqtt.V5, "dev", s.ca.client("dev"))
	if got := subject(nc); got != "gateway" {
		t.Errorf("certificate of %q", got)
	}
	s.serverCert("gateway-2", time.Now().Add(2*time.Hour))
	if err := s.b.ReloadTLS(); err != nil {
		t.Fatal(err)
	}
	p.publishDone(1, 1, "t", "x")
	if _, nc := s.enter(mqtt.V311, "new", s.ca.client("new")); subject(nc) != "gateway-2" {
		t.Errorf("certificate of %q", subject(nc))
	}
	// What is wrong changes nothing, and the error names the file.
	good, err := os.ReadFile(s.files.Key)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ path, data, want string }{
		{s.files.Key, "-----BEGIN nothing", s.files.Key},
		{s.files.ClientCA, "nothing", s.files.ClientCA},
	} {
		before, err := os.ReadFile(x.path)
		if err != nil {
			t.Fatal(err)
		}
		put(t, x.path, []byte(x.data))
		if err := s.b.ReloadTLS(); err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), `listener "tls"`) {
			t.Errorf("ReloadTLS: %v", err)
		}
		if _, nc := s.enter(mqtt.V5, "new", s.ca.client("new")); subject(nc) != "gateway-2" {
			t.Errorf("certificate of %q", subject(nc))
		}
		put(t, x.path, before)
	}
	put(t, s.files.Key, good)
	p.publishDone(1, 2, "t", "x")
}

// Files that change are loaded without a word from anybody: renamed over, written key after
// certificate, and by a link that is swapped, as Kubernetes does it.
func TestCertificateFilesAreWatched(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var version func(name string)
	s := newSite(t, func(s *site) {
		version = func(name string) {
			at := filepath.Join(dir, name)
			if err := os.Mkdir(at, 0o700); err != nil {
				t.Fatal(err)
			}
			cert, key := s.ca.issue(name)
			copyFile(t, cert, filepath.Join(at, "tls.crt"))
			copyFile(t, key, filepath.Join(at, "tls.key"))
			if err := os.Symlink(name, filepath.Join(dir, "..new")); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")); err != nil {
				t.Fatal(err)
			}
		}
		version("v1")
		for _, f := range []string{"tls.crt", "tls.key"} {
			if err := os.Symlink(filepath.Join("..data", f), filepath.Join(dir, f)); err != nil {
				t.Fatal(err)
			}
		}
		s.files.Cert, s.files.Key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	})
	n := 0
	serves := func(name string) {
		t.Helper()
		eventually(t, name, func() bool {
			n++
			_, nc := s.enter(mqtt.V5, fmt.Sprint("dev", n), s.ca.client(""))
			defer nc.Close()
			return subject(nc) == name
		})
	}
	serves("v1")
	version("v2")
	serves("v2")
	cert, key := s.ca.issue("v3")
	copyFile(t, cert, s.files.Cert) // the links are gone now
	eventually(t, "a complaint", func() bool { return s.lines.Count("certificates not loaded") == 1 })
	serves("v2")
	copyFile(t, key, s.files.Key)
	serves("v3")
	if err := os.Remove(s.files.Cert); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a complaint", func() bool { return s.lines.Count("certificates not loaded") == 2 })
	serves("v3")
	if got := s.lines.Count("certificates not loaded"); got != 2 {
		t.Errorf("%d complaints about two states", got)
	}
	if got := s.lines.Count("certificates loaded"); got != 3 {
		t.Errorf("loaded %d times, want 3", got)
	}
}

// Whose certificate is revoked is ended within a second, does not come back, and not with a ticket either.
func TestRevokedClientsAreEnded(t *testing.T) {
	t.Parallel()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		eachVersion(t, func(t *testing.T, v mqtt.Version) {
			s := newSite(t, func(s *site) {
				s.files.RequireClientCert = true
				s.files.CRL = filepath.Join(t.TempDir(), "ca.crl")
				s.crl()
			})
			with := func(name string) *tls.Config {
				c := s.ca.client(name)
				c.MinVersion, c.MaxVersion = version, version
				c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
				return c
			}
			bad, good := with("bad"), with("good")
			p, _ := s.enter(v, "bad", bad)
			q, _ := s.enter(v, "good", good)
			s.crl("bad")
			begin := time.Now()
			if err := s.b.ReloadTLS(); err != nil {
				t.Fatal(err)
			}
			p.closed(mqtt.NotAuthorized)
			if d := time.Since(begin); d > 3*time.Second {
				t.Errorf("ended after %v", d)
			}
			q.silent()
			s.refused(bad)
			bad.ClientSessionCache = nil
			s.refused(bad)
			_, nc := s.enter(v, "good2", good)
			if !nc.ConnectionState().DidResume {
				t.Error("a good client does not resume: the test does not show that the bad one might")
			}
			s.crl() // let in again
			eventually(t, "new list", func() bool { return s.lines.Count("revoked=0") == 2 })
			s.enter(v, "bad", bad)
		})
	}
}

// The forms of a CRL, and which are not believed.
func TestRevocationLists(t *testing.T) {
	t.Parallel()
	ca, second, stranger := newAuthority(t, "ca"), newAuthority(t, "second"), newAuthority(t, "stranger")
	cert, key := ca.issue("gateway")
	bad, other := ca.client("bad"), second.client("other")
	other.RootCAs = bad.RootCAs
	bundle := filepath.Join(t.TempDir(), "cas.pem")
	one, _ := os.ReadFile(ca.file)
	two, _ := os.ReadFile(second.file)
	put(t, bundle, append(one, two...))
	soon, past := time.Now().Add(time.Hour), time.Now().Add(-time.Minute)
	for _, x := range []struct {
		name         string
		data         []byte
		refusesBad   bool
		refusesOther bool
		err, warning string
	}{
		{name: "PEM", data: asPEM(ca.revoke(soon, "bad")), refusesBad: true},
		{name: "DER", data: ca.revoke(soon, "bad"), refusesBad: true},
		{name: "two in PEM", data: asPEM(ca.revoke(soon, "bad"), second.revoke(soon, "other")), refusesBad: true, refusesOther: true},
		{name: "two in DER", data: append(ca.revoke(soon), second.revoke(soon, "other")...), refusesOther: true},
		{name: "the same serial of another CA", data: asPEM(second.revoke(soon, "other")), refusesOther: true},
		{name: "overdue", data: asPEM(ca.revoke(past, "bad")), refusesBad: true, warning: "revocation list is overdue"},
		{name: "of a stranger", data: asPEM(stranger.revoke(soon)), err: "not signed by a certificate of client_ca"},
		{name: "one of a stranger", data: asPEM(ca.revoke(soon, "bad"), stranger.revoke(soon)), err: "not signed by a certificate of client_ca"},
		{name: "empty", data: nil, err: "no revocation list"},
		{name: "no list", data: one, err: "no revocation list"},
		{name: "cut short", data: ca.revoke(soon, "bad")[:100], err: "PEM or DER"},
		{name: "missing", err: "no such file"},
	} {
		t.Run(x.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "list.crl")
			if x.name != "missing" {
				put(t, path, x.data)
			}
			files := broker.TLS{Cert: cert, Key: key, ClientCA: bundle, CRL: path, RequireClientCert: true}
			if x.err != "" {
				r := newRig(t, nil)
				cfg := broker.Config{Listeners: []broker.Listener{{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: files}}}
				b, err := broker.New(cfg, r.store, r.in, r.auth, nil, quiet, nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := b.Listen(); err == nil || !strings.Contains(err.Error(), x.err) || !strings.Contains(err.Error(), path) {
					t.Errorf("Listen: %v", err)
				}
				return
			}
			s := &site{ca: ca, lines: &testkit.Buffer{}}
			s.rig = newRig(t, func(r *rig) {
				r.log = logTo(s.lines)
				r.cfg.Listeners = []broker.Listener{{Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: files}}
			})
			for _, y := range []struct {
				id      string
				conf    *tls.Config
				refused bool
			}{{"bad", bad, x.refusesBad}, {"other", other, x.refusesOther}} {
				if y.refused {
					s.refused(y.conf)
				} else {
					s.enter(mqtt.V5, y.id, y.conf)
				}
			}
			if x.warning != "" && s.lines.Count(x.warning) != 1 {
				t.Errorf("warned %d times", s.lines.Count(x.warning))
			}
		})
	}
	l := broker.Listener{Name: "a", Protocol: "mqtts", Address: ":1", TLS: broker.TLS{Cert: "x", Key: "y", CRL: "z"}}
	if err := l.Validate(); err == nil || !strings.Contains(err.Error(), "tls.crl needs tls.client_ca") {
		t.Errorf("a CRL without a CA: %v", err)
	}
}

// A CA that is taken away takes its devices with it; those of the others, and those without a
// certificate, stay.
func TestClientCAIsReplaced(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	second := newAuthority(t, "second")
	old, _ := s.enter(mqtt.V5, "old", s.ca.client("old"))
	none, _ := s.enter(mqtt.V5, "none", s.ca.client(""))
	one, _ := os.ReadFile(s.ca.file)
	two, _ := os.ReadFile(second.file)
	put(t, s.files.ClientCA, append(two, one...))
	if err := s.b.ReloadTLS(); err != nil {
		t.Fatal(err)
	}
	old.silent()
	conf := second.client("young")
	conf.RootCAs = s.ca.client("").RootCAs
	young, _ := s.enter(mqtt.V5, "young", conf)
	put(t, s.files.ClientCA, two)
	if err := s.b.ReloadTLS(); err != nil {
		t.Fatal(err)
	}
	old.closed(mqtt.NotAuthorized)
	young.silent()
	none.silent()
	conf = s.ca.client("old")
	pair := conf.Certificates[0] // shown although the gateway does not name its CA any more
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	s.refused(conf)
}

func TestExpiredClientCertificateEndsItsConnection(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		s := newSite(t, nil)
		conf := s.ca.client("")
		end := time.Now().Add(2 * time.Second).Truncate(time.Second)
		pair, err := tls.LoadX509KeyPair(s.ca.issueUntil("short", end))
		if err != nil {
			t.Fatal(err)
		}
		conf.Certificates = []tls.Certificate{pair}
		p, _ := s.enter(v, "short", conf)
		other, _ := s.enter(v, "other", s.ca.client("other"))
		p.closed(mqtt.NotAuthorized)
		if d := time.Since(end); d < 0 || d > time.Second {
			t.Errorf("ended %v after its certificate", d)
		}
		other.silent()
	})
}

func TestCertificateExpiryIsToldInTime(t *testing.T) {
	t.Parallel()
	end := time.Now().Add(20 * 24 * time.Hour).Truncate(time.Second)
	next := time.Now().Add(5 * 24 * time.Hour).Truncate(time.Second)
	s := newSite(t, func(s *site) {
		s.files.CRL = filepath.Join(t.TempDir(), "ca.crl")
		s.serverCert("gateway", end)
		put(t, s.files.CRL, asPEM(s.ca.revoke(next)))
	})
	if got := s.certificateEnds(); got["cert"] != end.Unix() || got["crl"] != next.Unix() || got["client_ca"] != s.ca.cert.NotAfter.Unix() {
		t.Errorf("metric %v", got)
	}
	for range 3 {
		if err := s.b.ReloadTLS(); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]int{"file=cert ": 1, "file=crl ": 1, "file=client_ca ": 1} {
		if n := s.lines.Count(file); n != want {
			t.Errorf("warned %d times of %s, want %d", n, file, want)
		}
	}
	s.serverCert("gateway", time.Now().Add(400*24*time.Hour))
	eventually(t, "new certificate", func() bool { return s.certificateEnds()["cert"] > end.Unix() })
	s.serverCert("gateway", time.Now().Add(12*time.Hour))
	eventually(t, "warning", func() bool { return s.lines.Count("file=cert ") == 2 })
	s.serverCert("gateway", time.Now().Add(-time.Minute))
	eventually(t, "warning", func() bool { return s.lines.Count("certificate has expired") == 1 })
}

// certificateEnds gives the metric by file.
func (s *site) certificateEnds() map[string]int64 {
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	got := map[string]int64{}
	for _, f := range families {
		if f.GetName() != "holdfast_broker_certificate_expiry_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[1].GetValue() == "tls" {
				got[m.GetLabel()[0].GetValue()] = int64(m.GetGauge().GetValue())
			}
		}
	}
	return got
}

// Peers that stop in the middle of a handshake hold no place of those that compute.
func TestStalledHandshakesHoldUpNobody(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	for range 50 {
		nc := testkit.Dial(t, s.addr())
		stalled := tls.Client(&mouthless{nc, t.Context().Done()}, s.ca.client(""))
		go func() { _ = stalled.Handshake() }() // sends its hello and never hears
	}
	eventually(t, "connections", func() bool { return s.b.Stats().Connections == 50 })
	begin := time.Now()
	for i := range 5 {
		p, _ := s.enter(mqtt.V5, fmt.Sprint(i), s.ca.client("dev"))
		p.silent()
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	s.stop()
}

// mouthless is a connection on which nothing is ever heard.
type mouthless struct {
	net.Conn
	end <-chan struct{}
}

func (m *mouthless) Read([]byte) (int, error) {
	<-m.end
	return 0, io.EOF
}

// A certificate is checked with what is newest when the handshake ends, and a reload finds every
// connection: none slips in between.
func TestReloadWhileClientsConnect(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(s *site) {
		s.files.RequireClientCert = true
		s.files.CRL = filepath.Join(t.TempDir(), "ca.crl")
		s.crl()
	})
	conf := s.ca.client("bad")
	var clients sync.WaitGroup
	for i := range 40 {
		clients.Go(func() {
			nc, err := testDialer.DialContext(t.Context(), "tcp", s.addr())
			if err != nil {
				t.Error(err)
				return
			}
			tc := tls.Client(nc, conf)
			defer tc.Close()
			_ = tc.SetDeadline(time.Now().Add(patience))
			_, _ = tc.Write(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V5, ClientID: fmt.Sprint(i), CleanStart: true}))
			if _, err := io.Copy(io.Discard, tc); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a revoked client stays")
			}
		})
	}
	eventually(t, "some are in", func() bool { return s.b.Stats().Sessions > 5 })
	s.crl("bad")
	if err := s.b.ReloadTLS(); err != nil {
		t.Fatal(err)
	}
	clients.Wait()
}
