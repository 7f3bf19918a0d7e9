package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/pki"
)

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// clock is what the authority takes for the time.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func newAuthority(t *testing.T) (*pki.Authority, *clock) {
	t.Helper()
	c := &clock{begin}
	a := pki.At(filepath.Join(t.TempDir(), "pki"), c.Now)
	if err := a.Init(pki.InitOptions{Site: "Ward 3", Hosts: []string{"gw.example", "10.0.0.5"}}); err != nil {
		t.Fatal(err)
	}
	return a, c
}

func device(t *testing.T, a *pki.Authority, id string) pki.Entry {
	t.Helper()
	e, err := a.Device(id, pki.DeviceDays, false)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func certificate(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(read(t, file))
	if block == nil {
		t.Fatalf("%s is not PEM", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// lists gives the lists of revoked certificates, each checked against one of the authority's certificates.
func lists(t *testing.T, a *pki.Authority) []*x509.RevocationList {
	t.Helper()
	var cas []*x509.Certificate
	for rest := read(t, a.Path("ca.crt")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		cas = append(cas, c)
	}
	var out []*x509.RevocationList
	for rest := read(t, a.Path("crl.pem")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		l, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if len(out) >= len(cas) || l.CheckSignatureFrom(cas[len(out)]) != nil {
			t.Fatalf("list %d is not signed by certificate %d of ca.crt", len(out), len(out))
		}
		out = append(out, l)
	}
	if len(out) != len(cas) {
		t.Fatalf("%d lists for %d authorities", len(out), len(cas))
	}
	return out
}

func revoked(t *testing.T, a *pki.Authority) (serials []string) {
	t.Helper()
	for _, l := range lists(t, a) {
		for _, e := range l.RevokedCertificateEntries {
			serials = append(serials, fmt.Sprintf("%032x", e.SerialNumber))
		}
	}
	return serials
}

// handshake connects a device with what the folder holds to a gateway with what the folder holds.
func handshake(t *testing.T, a *pki.Authority, certFile, keyFile, host string, now time.Time) error {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(read(t, a.Path("ca.crt"))) {
		t.Fatal("ca.crt holds no certificate")
	}
	load := func(cert, key string) tls.Certificate {
		p, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	clock := func() time.Time { return now }
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	far, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	server := tls.Server(near, &tls.Config{
		Certificates: []tls.Certificate{load(a.Path("server.crt"), a.Path("server.key"))},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool, Time: clock, MinVersion: tls.VersionTLS12,
	})
	client := tls.Client(far, &tls.Config{
		Certificates: []tls.Certificate{load(certFile, keyFile)}, RootCAs: pool, ServerName: host, Time: clock,
		MaxVersion: tls.VersionTLS12, // a client's certificate is refused within the handshake
	})
	var wg sync.WaitGroup
	var serverErr error
	wg.Go(func() {
		serverErr = server.Handshake()
		near.Close()
	})
	err = client.Handshake()
	far.Close()
	wg.Wait()
	return errors.Join(err, serverErr)
}

func TestADeviceAndTheGatewayKnowEachOther(t *testing.T) {
	a, _ := newAuthority(t)
	device(t, a, "pump-7")
	cert, key := a.DeviceFiles("pump-7")
	for _, host := range []string{"gw.example", "10.0.0.5"} {
		if err := handshake(t, a, cert, key, host, begin); err != nil {
			t.Errorf("by the name %s: %v", host, err)
		}
	}
	if err := handshake(t, a, cert, key, "other.example", begin); err == nil {
		t.Error("the gateway is taken for another")
	}
	if err := handshake(t, a, a.Path("server.crt"), a.Path("server.key"), "gw.example", begin); err == nil {
		t.Error("the gateway's certificate is good for a device")
	}
	// A device's clock may be a day late.
	if err := handshake(t, a, cert, key, "gw.example", begin.Add(-23*time.Hour)); err != nil {
		t.Errorf("with a clock that is 23 h late: %v", err)
	}
	if err := handshake(t, a, cert, key, "gw.example", begin.Add(366*24*time.Hour)); err == nil {
		t.Error("the certificate outlives its year")
	}
	c := certificate(t, cert)
	if c.Subject.CommonName != "pump-7" || len(c.URIs) != 1 || c.URIs[0].String() != pki.DeviceURI+"pump-7" || c.IsCA {
		t.Errorf("subject %v, uris %v", c.Subject, c.URIs)
	}
	ca := certificate(t, a.Path("ca.crt"))
	if !ca.IsCA || !ca.MaxPathLenZero || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("authority: %v, path length zero %v, usage %b", ca.IsCA, ca.MaxPathLenZero, ca.KeyUsage)
	}
	if years := ca.NotAfter.Sub(begin) / (365 * 24 * time.Hour); years != 10 {
		t.Errorf("the authority is valid for %d years", years)
	}
}

func TestKeysAreForTheirOwnerAlone(t *testing.T) {
	a, _ := newAuthority(t)
	device(t, a, "d")
	if _, err := a.RotateCA(""); err != nil {
		t.Fatal(err)
	}
	if _, err := a.RotateDevice("d", 1, false); err != nil {
		t.Fatal(err)
	}
	if err := a.Bundle("d", a.Path("bundle.pem")); err != nil {
		t.Fatal(err)
	}
	keys := 0
	err := filepath.WalkDir(a.Dir(), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		switch {
		case e.IsDir() && fi.Mode().Perm() != 0o700:
			t.Errorf("folder %s has mode %04o", path, fi.Mode().Perm())
		case strings.HasPrefix(e.Name(), ".new-"):
			t.Errorf("%s was left", path)
		case !e.IsDir() && strings.Contains(string(read(t, path)), "PRIVATE KEY"):
			keys++
			if fi.Mode().Perm() != 0o600 {
				t.Errorf("key %s has mode %04o", path, fi.Mode().Perm())
			}
		}
		return nil
	})
	if err != nil || keys != 6 { // ca, server, d, retired ca and d, bundle
		t.Errorf("%d keys, %v", keys, err)
	}
}

func TestAFolderOfOthersIsNotClosed(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "x"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	err := pki.At(dir, nil).Init(pki.InitOptions{Site: "s"})
	if err == nil || !strings.Contains(err.Error(), "mode 0755) and not empty: chmod 700 it") {
		t.Errorf("error = %v", err)
	}
}

func TestNothingIsOverwrittenUnasked(t *testing.T) {
	a, c := newAuthority(t)
	device(t, a, "d")
	before := map[string]string{}
	for _, f := range []string{"ca.key", "server.key", "devices/d.key"} {
		before[f] = string(read(t, a.Path(f)))
	}
	if err := a.Init(pki.InitOptions{Site: "x"}); !errors.Is(err, pki.ErrExists) {
		t.Errorf("init again: %v", err)
	}
	if _, err := a.Device("d", 1, false); !errors.Is(err, pki.ErrExists) {
		t.Errorf("device again: %v", err)
	}
	for f, want := range before {
		if string(read(t, a.Path(f))) != want {
			t.Errorf("%s is another", f)
		}
	}
	// Forced, what was there can still be had back.
	old, _ := a.List()
	if _, err := a.Device("d", 1, true); err != nil {
		t.Fatal(err)
	}
	if got := string(read(t, a.Path("retired", "device-d-"+old[2].Serial+".key"))); got != before["devices/d.key"] {
		t.Error("the device's key before is gone")
	}
	c.now = c.now.Add(time.Minute)
	if err := a.Init(pki.InitOptions{Site: "x", Force: true}); err != nil {
		t.Fatal(err)
	}
	aside, _ := filepath.Glob(a.Path("before-*", "ca.key"))
	if len(aside) != 1 || string(read(t, aside[0])) != before["ca.key"] {
		t.Errorf("the authority's key before is gone: %v", aside)
	}
	if list, err := a.List(); err != nil || len(list) != 2 {
		t.Errorf("the new authority has issued %v, %v", list, err)
	}
}

func TestBadNames(t *testing.T) {
	a, _ := newAuthority(t)
	for _, id := range []string{"", "a/b", "..", ".a", "-a", "a b", "_a", "@a", "ü", "a+", "#", "$x", "a\n", strings.Repeat("x", 65), "a\x00"} {
		if _, err := a.Device(id, 1, false); !errors.Is(err, pki.ErrName) {
			t.Errorf("device %q: %v", id, err)
		}
		if _, err := a.RotateDevice(id, 1, false); !errors.Is(err, pki.ErrName) {
			t.Errorf("rotate %q: %v", id, err)
		}
	}
	for _, id := range []string{"a", "pump-7", "A_b.c:d@e", "00:11:22:33:44:55", strings.Repeat("x", 64)} {
		device(t, a, id)
	}
	for _, days := range []int{0, -1, 3651} {
		if _, err := a.Device("z", days, false); err == nil {
			t.Errorf("%d days are taken", days)
		}
	}
	for _, host := range []string{"", "a b", "mqtts://h", "h:8883", ".x", "x.", "a..b", "*"} {
		if err := pki.At(t.TempDir(), nil).Init(pki.InitOptions{Site: "s", Hosts: []string{host}}); !errors.Is(err, pki.ErrName) {
			t.Errorf("host %q: %v", host, err)
		}
	}
	for _, site := range []string{"", "ü", "a\nb", strings.Repeat("x", 41)} {
		if err := pki.At(t.TempDir(), nil).Init(pki.InitOptions{Site: site}); !errors.Is(err, pki.ErrName) {
			t.Errorf("site %q: %v", site, err)
		}
	}
	if _, err := pki.At(t.TempDir(), nil).Device("d", 1, false); !errors.Is(err, pki.ErrNoCA) {
		t.Errorf("without an authority: %v", err)
	}
}

func TestARevokedCertificateIsInTheList(t *testing.T) {
	a, c := newAuthority(t)
	first, other := device(t, a, "d"), device(t, a, "other")
	second, err := a.RotateDevice("d", 30, false)
	if err != nil {
		t.Fatal(err)
	}
	if got := revoked(t, a); len(got) != 0 {
		t.Fatalf("revoked by nobody: %v", got)
	}
	number := lists(t, a)[0].Number

	got, err := a.Revoke("d") // both of the device
	if err != nil || len(got) != 2 {
		t.Fatalf("revoke = %v, %v", got, err)
	}
	if got := revoked(t, a); !slices.Equal(got, []string{first.Serial, second.Serial}) {
		t.Errorf("revoked %v, want %s and %s", got, first.Serial, second.Serial)
	}
	l := lists(t, a)[0]
	if l.Number.Cmp(number) <= 0 {
		t.Errorf("number %v after %v", l.Number, number)
	}
	if l.NextUpdate.Sub(begin) != pki.CRLLifetime {
		t.Errorf("next update %v", l.NextUpdate)
	}
	if got, err := a.Revoke("d"); err != nil || len(got) != 0 {
		t.Errorf("again: %v, %v", got, err)
	}
	if got, err := a.Revoke(strings.ToUpper(other.Serial)); err != nil || len(got) != 1 || got[0].Name != "other" {
		t.Errorf("by serial: %v, %v", got, err)
	}
	for _, what := range []string{"nobody", "server", "Ward 3", ""} {
		if _, err := a.Revoke(what); !errors.Is(err, pki.ErrUnknown) {
			t.Errorf("revoke %q: %v", what, err)
		}
	}
	// A new authority object on the same folder knows the same.
	entries, err := pki.At(a.Dir(), nil).List()
	if err != nil || len(entries) != 5 || entries[2].State(begin) != pki.StateRevoked || entries[4].State(begin) != pki.StateRevoked {
		t.Errorf("%+v, %v", entries, err)
	}
	// What ended long ago leaves the list.
	c.now = begin.Add((pki.DeviceDays + 40) * 24 * time.Hour)
	if err := a.RenewCRL(); err != nil {
		t.Fatal(err)
	}
	if got := revoked(t, a); len(got) != 0 {
		t.Errorf("a year later: %v", got)
	}
}

// Who loses the index, or puts an older one in its place, must not let in again whom it had revoked.
func TestWhatIsRevokedStaysSoWithoutTheIndex(t *testing.T) {
	a, _ := newAuthority(t)
	first, other := device(t, a, "first"), device(t, a, "other")
	if _, err := a.Revoke("first"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(a.Path("index.jsonl")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.RenewCRL(); err != nil {
			t.Fatal(err)
		}
		if got := revoked(t, a); !slices.Equal(got, []string{first.Serial}) {
			t.Fatalf("revoked %v, want %s", got, first.Serial)
		}
	}
	third := device(t, a, "third")
	if _, err := a.Revoke("third"); err != nil {
		t.Fatal(err)
	}
	got := revoked(t, a)
	if want := []string{first.Serial, third.Serial}; len(got) != 2 || !slices.Contains(got, want[0]) || !slices.Contains(got, want[1]) {
		t.Errorf("revoked %v, want %v and not %s", got, want, other.Serial)
	}
	// A list of somebody else is not believed.
	foreign, _ := newAuthority(t)
	device(t, foreign, "stranger")
	if _, err := foreign.Revoke("stranger"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.Path("crl.pem"), read(t, foreign.Path("crl.pem")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.RenewCRL(); err != nil {
		t.Fatal(err)
	}
	if got := revoked(t, a); !slices.Equal(got, []string{third.Serial}) {
		t.Errorf("with a foreign list: revoked %v, want what the index says, %s", got, third.Serial)
	}
}

func TestTheNumberOfTheListGrowsEvenIfTheListIsLost(t *testing.T) {
	a, _ := newAuthority(t)
	before := lists(t, a)[0].Number
	if err := errors.Join(a.RenewCRL(), a.RenewCRL()); err != nil {
		t.Fatal(err)
	}
	after := lists(t, a)[0].Number
	if after.Cmp(before) <= 0 {
		t.Errorf("number %v after %v within one second", after, before)
	}
	if err := errors.Join(os.Remove(a.Path("crl.pem")), a.RenewCRL()); err != nil {
		t.Fatal(err)
	}
	if before.Int64() != begin.Unix() {
		t.Errorf("the first number is %v, want one that grows with the time", before)
	}
}

func TestRotateKeepsTheOldOneValid(t *testing.T) {
	a, _ := newAuthority(t)
	first := device(t, a, "d")
	_, key := a.DeviceFiles("d")
	before := string(read(t, key))
	second, err := a.RotateDevice("d", 30, false)
	if err != nil {
		t.Fatal(err)
	}
	if string(read(t, key)) == before || second.Serial == first.Serial {
		t.Error("the key is the same")
	}
	old := a.Path("retired", "device-d-"+first.Serial)
	if err := handshake(t, a, old+".crt", old+".key", "gw.example", begin); err != nil {
		t.Errorf("the old one: %v", err)
	}
	if got := revoked(t, a); len(got) != 0 {
		t.Errorf("revoked %v", got)
	}
	if _, err := a.RotateDevice("d", 30, true); err != nil {
		t.Fatal(err)
	}
	if got := revoked(t, a); !slices.Equal(got, []string{first.Serial, second.Serial}) {
		t.Errorf("with revoke: %v", got)
	}
	if _, err := a.RotateDevice("nobody", 30, false); !errors.Is(err, pki.ErrUnknown) {
		t.Errorf("a device without certificate: %v", err)
	}

	// The gateway's keeps its names.
	names := certificate(t, a.Path("server.crt"))
	if _, err := a.RotateServer(nil, false); err != nil {
		t.Fatal(err)
	}
	got := certificate(t, a.Path("server.crt"))
	if !slices.Equal(got.DNSNames, names.DNSNames) || len(got.IPAddresses) != 1 || got.SerialNumber.Cmp(names.SerialNumber) == 0 {
		t.Errorf("server: %v %v", got.DNSNames, got.IPAddresses)
	}
	if _, err := a.RotateServer([]string{"new.example"}, false); err != nil {
		t.Fatal(err)
	}
	if got := certificate(t, a.Path("server.crt")); !slices.Equal(got.DNSNames, []string{"new.example"}) || len(got.IPAddresses) != 0 {
		t.Errorf("server: %v %v", got.DNSNames, got.IPAddresses)
	}
}

func TestANewAuthorityBesideTheOld(t *testing.T) {
	a, c := newAuthority(t)
	device(t, a, "old")
	if _, err := a.RotateCA(""); err != nil {
		t.Fatal(err)
	}
	device(t, a, "new")
	try := func(id string) error {
		cert, key := a.DeviceFiles(id)
		return handshake(t, a, cert, key, "gw.example", begin)
	}
	if err := errors.Join(try("old"), try("new")); err != nil {
		t.Errorf("in between: %v", err)
	}
	// What the old authority issued can still be revoked, by a list of the old authority.
	device(t, a, "gone")
	gone, err := a.Revoke("gone")
	if err != nil {
		t.Fatal(err)
	}
	old, err := a.Revoke("old")
	if err != nil {
		t.Fatal(err)
	}
	ls := lists(t, a)
	if len(ls) != 2 || len(ls[0].RevokedCertificateEntries) != 1 || len(ls[1].RevokedCertificateEntries) != 1 ||
		!slices.Equal(revoked(t, a), []string{gone[0].Serial, old[0].Serial}) {
		t.Errorf("lists hold %v", revoked(t, a))
	}

	// The old one goes when nothing stands on it any more.
	_, err = a.DropOldCAs(false)
	var inUse *pki.InUseError
	if !errors.As(err, &inUse) || !slices.Equal(inUse.Names, []string{"server"}) {
		t.Fatalf("drop: %v", err)
	}
	if _, err := a.RotateServer(nil, false); err != nil {
		t.Fatal(err)
	}
	if n, err := a.DropOldCAs(false); err != nil || n != 1 {
		t.Fatalf("drop: %d, %v", n, err)
	}
	if err := try("new"); err != nil {
		t.Errorf("a device of the new authority: %v", err)
	}
	if try("old") == nil {
		t.Error("a device of the old authority is let in")
	}
	if len(lists(t, a)) != 1 {
		t.Error("a list of the old authority is left")
	}
	// Authorities that have ended go by themselves at the next rotation; a certificate never outlives its authority.
	c.now = begin.Add(pki.CALifetime - 10*24*time.Hour)
	if e := device(t, a, "late"); !e.NotAfter.Equal(certificate(t, a.Path("ca.crt")).NotAfter) {
		t.Errorf("valid to %v", e.NotAfter)
	}
	c.now = begin.Add(pki.CALifetime + time.Hour)
	if _, err := a.Device("later", 1, false); err == nil || !strings.Contains(err.Error(), "rotate ca") {
		t.Errorf("with an authority that ended: %v", err)
	}
	if _, err := a.RotateCA("Ward 4"); err != nil {
		t.Fatal(err)
	}
	if got := lists(t, a); len(got) != 1 {
		t.Errorf("%d authorities", len(got))
	}
}

// A crash between the two files of a rotation leaves the old authority in force.
func TestACrashWhileTheAuthorityIsRotated(t *testing.T) {
	a, _ := newAuthority(t)
	crt := read(t, a.Path("ca.crt"))
	if _, err := a.RotateCA(""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.Path("ca.crt"), crt, 0o600); err != nil { // as before; ca.key is the new one
		t.Fatal(err)
	}
	e, err := a.Device("d", 1, false)
	if err != nil || e.Issuer != fmt.Sprintf("%x", certificate(t, a.Path("ca.crt")).SubjectKeyId) {
		t.Errorf("%+v, %v", e, err)
	}
	if err := os.RemoveAll(a.Path("retired")); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Device("e", 1, false); err == nil || !strings.Contains(err.Error(), "the key of certificate 1") {
		t.Errorf("without the key: %v", err)
	}
}

func TestATornLineOfTheIndexIsLeftOut(t *testing.T) {
	a, _ := newAuthority(t)
	index := read(t, a.Path("index.jsonl"))
	if err := os.WriteFile(a.Path("index.jsonl"), append(index, `{"kind":"device","na`...), 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err := a.List(); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	device(t, a, "d")
	if list, err := a.List(); err != nil || len(list) != 3 || list[2].Name != "d" {
		t.Errorf("%v, %v", list, err)
	}
	if err := os.WriteFile(a.Path("index.jsonl"), []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.List(); err == nil || !strings.Contains(err.Error(), "index.jsonl:1") {
		t.Errorf("a whole line that is wrong: %v", err)
	}
}

func TestManyAtOnceLoseNothing(t *testing.T) {
	a, _ := newAuthority(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := pki.At(a.Dir(), nil).Device(fmt.Sprintf("d%d", i), 1, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	list, err := a.List()
	serials := map[string]bool{}
	for _, e := range list {
		serials[e.Serial] = true
	}
	if err != nil || len(list) != 10 || len(serials) != 10 {
		t.Errorf("%d entries, %d serials, %v", len(list), len(serials), err)
	}
}

// What others say of it: openssl reads and verifies everything.
func TestOpenSSLAgrees(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("no openssl here")
	}
	a := pki.At(filepath.Join(t.TempDir(), "pki"), nil)
	if err := a.Init(pki.InitOptions{Site: "Ward 3"}); err != nil {
		t.Fatal(err)
	}
	device(t, a, "good")
	device(t, a, "bad")
	if _, err := a.RotateCA(""); err != nil {
		t.Fatal(err)
	}
	device(t, a, "newer")
	if _, err := a.Revoke("bad"); err != nil {
		t.Fatal(err)
	}
	verify := func(file, purpose string) string {
		cmd := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-crl_check", "-purpose", purpose,
			"-CAfile", a.Path("ca.crt"), "-CRLfile", a.Path("crl.pem"), file)
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	for name, want := range map[string]string{"good": ": OK", "newer": ": OK", "bad": "certificate revoked"} {
		file, _ := a.DeviceFiles(name)
		if got := verify(file, "sslclient"); !strings.Contains(got, want) {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := verify(a.Path("server.crt"), "sslserver"); !strings.Contains(got, ": OK") {
		t.Errorf("server: %s", got)
	}
}
