package devices_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/devices"
	"holdfast/internal/kv"
)

const password = "correct horse battery"

func withPassword(id string) devices.NewDevice {
	return devices.NewDevice{ID: id, Credential: &devices.NewCredential{Kind: devices.CredentialPassword, Password: password}}
}

// certificate is one that TLS has verified. Its Raw is what a fingerprint is taken of.
func certificate(cn string, dns []string, uris ...string) *x509.Certificate {
	c := &x509.Certificate{Subject: pkix.Name{CommonName: cn}, DNSNames: dns, Raw: []byte(fmt.Sprint(cn, dns, uris))}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		c.URIs = append(c.URIs, u)
	}
	return c
}

func pinOf(c *x509.Certificate) *devices.NewCredential {
	sum := sha256.Sum256(c.Raw)
	var pairs []string
	for _, b := range sum {
		pairs = append(pairs, fmt.Sprintf("%02X", b))
	}
	return &devices.NewCredential{Kind: devices.CredentialCertificate, Fingerprint: strings.Join(pairs, ":"), RetireOthers: -1}
}

func TestSecretsAreStoredAsHashes(t *testing.T) {
	s := newSite(t)
	token := s.add(devices.NewDevice{ID: "a"})
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "hft_"))
	if err != nil || len(raw) != 32 || !strings.HasPrefix(token, "hft_") {
		t.Errorf("token %q: %d bytes, %v", token, len(raw), err)
	}
	if other := s.add(devices.NewDevice{ID: "b"}); other == token {
		t.Error("two devices have the same token")
	}
	if secret := s.add(withPassword("c")); secret != "" {
		t.Errorf("a password comes back as %q", secret)
	}
	n := 0
	err = s.store.Scan([]byte{kv.PrefixDevice}, func(_, row []byte) error {
		for _, secret := range [][]byte{[]byte(token), raw, []byte(password)} {
			if bytes.Contains(row, secret) {
				t.Errorf("row %q has a secret in it", row)
			}
		}
		n++
		return nil
	})
	if err != nil || n != 4 {
		t.Fatal(n, err)
	}
	sum := sha256.Sum256([]byte(token))
	if row, _, _ := s.store.Get([]byte("v\x01a")); !bytes.Contains(row, sum[:]) {
		t.Error("the row has no SHA-256 of the token in it")
	}
	d, err := s.Get("a")
	if err != nil || strings.Contains(fmt.Sprintf("%+v", d), token) {
		t.Error(err, d)
	}
}

func TestWhoGetsIn(t *testing.T) {
	own, other := certificate("pump-1", nil), certificate("pump-2", []string{"p2.example"}, "spiffe://site/device/pump-two")
	for _, open := range []bool{false, true} {
		s := newSite(t)
		token := s.add(devices.NewDevice{ID: "pump-1"})
		off := s.add(devices.NewDevice{ID: "off", Disabled: true})
		s.add(withPassword("human"))
		s.add(withPassword("human-off"))
		if _, err := s.Patch(t.Context(), "human-off", devices.DevicePatch{Enabled: ptr(false)}); err != nil {
			t.Fatal(err)
		}
		s.add(devices.NewDevice{ID: "pump-2", NoCredential: true})
		// one that registered itself, while that was allowed
		if err := s.SetPolicy(nil, true); err != nil {
			t.Fatal(err)
		}
		s.Connected("self", devices.Connection{})
		s.flush()
		if err := s.SetPolicy(nil, open); err != nil {
			t.Fatal(err)
		}
		ifOpen := func(else_ error) error {
			if open {
				return nil
			}
			return else_
		}
		for _, c := range []struct {
			what string
			a    devices.Attempt
			want error
			say  string
		}{
			{what: "token", a: devices.Attempt{Device: "pump-1", Password: []byte(token)}},
			{what: "token and user name", a: devices.Attempt{Device: "pump-1", HasUsername: true, Username: "pump-1", Password: []byte(token)}},
			{what: "token and empty user name", a: devices.Attempt{Device: "pump-1", HasUsername: true, Password: []byte(token)}},
			{what: "other user name", a: devices.Attempt{Device: "pump-1", HasUsername: true, Username: "pump-2", Password: []byte(token)}, want: devices.ErrCredentials, say: "pump-2"},
			{what: "token of another", a: devices.Attempt{Device: "off", Password: []byte(token)}, want: devices.ErrCredentials},
			{what: "a bit more than the token", a: devices.Attempt{Device: "pump-1", Password: []byte(token + "A")}, want: devices.ErrCredentials},
			{what: "nothing", a: devices.Attempt{Device: "pump-1"}, want: devices.ErrCredentials},
			{what: "password", a: devices.Attempt{Device: "human", Password: []byte(password)}},
			{what: "wrong password", a: devices.Attempt{Device: "human", Password: []byte("incorrect horse")}, want: devices.ErrCredentials},
			{what: "disabled, right token", a: devices.Attempt{Device: "off", Password: []byte(off)}, want: devices.ErrDisabled},
			{what: "disabled, wrong token", a: devices.Attempt{Device: "off", Password: []byte("hft_no")}, want: devices.ErrCredentials},
			{what: "disabled, right password", a: devices.Attempt{Device: "human-off", Password: []byte(password)}, want: devices.ErrDisabled},
			{what: "disabled, wrong password", a: devices.Attempt{Device: "human-off", Password: []byte("incorrect horse")}, want: devices.ErrCredentials},
			{what: "certificate", a: devices.Attempt{Device: "pump-1", Certificate: own}},
			{what: "certificate and no password", a: devices.Attempt{Device: "pump-2", Certificate: other, Password: []byte{}}},
			{what: "certificate and wrong password", a: devices.Attempt{Device: "pump-1", Certificate: own, Password: []byte("incorrect horse")}, want: devices.ErrCredentials},
			{what: "certificate of another and right password", a: devices.Attempt{Device: "pump-1", Certificate: other, Password: []byte(token)}},
			{what: "certificate of another", a: devices.Attempt{Device: "pump-1", Certificate: other}, want: devices.ErrCredentials, say: `names "pump-2", "p2.example", "spiffe://site/device/pump-two", "pump-two"`},
			{what: "certificate that names nobody", a: devices.Attempt{Device: "pump-1", Certificate: certificate("", nil)}, want: devices.ErrCredentials, say: "names nobody"},
			{what: "disabled, certificate", a: devices.Attempt{Device: "off", Certificate: certificate("off", nil)}, want: devices.ErrDisabled},
			{what: "not registered, certificate", a: devices.Attempt{Device: "new-1", Certificate: certificate("new-1", nil)}, want: ifOpen(devices.ErrCredentials)},
			{what: "not registered, certificate of another", a: devices.Attempt{Device: "new-2", Certificate: own}, want: devices.ErrCredentials},
			{what: "not registered", a: devices.Attempt{Device: "new-3"}, want: ifOpen(devices.ErrCredentials)},
			{what: "not registered, a password", a: devices.Attempt{Device: "new-4", Password: []byte(password)}, want: devices.ErrCredentials},
			{what: "not registered, another user name", a: devices.Attempt{Device: "new-5", HasUsername: true, Username: "x"}, want: devices.ErrCredentials},
			{what: "odd id", a: devices.Attempt{Device: "mosq/ä#"}, want: ifOpen(devices.ErrBadID)},
			{what: "odd id, a password", a: devices.Attempt{Device: "mosq/ä#", Password: []byte(password)}, want: map[bool]error{true: devices.ErrCredentials, false: devices.ErrBadID}[open]},
			{what: "registered itself", a: devices.Attempt{Device: "self"}, want: ifOpen(devices.ErrCredentials)},
			{what: "registered itself, certificate", a: devices.Attempt{Device: "self", Certificate: certificate("self", nil)}, want: ifOpen(devices.ErrCredentials)},
			{what: "registered itself, a password", a: devices.Attempt{Device: "self", Password: []byte(password)}, want: devices.ErrCredentials},
		} {
			c.a.Address = address(int(s.peers.Add(1)))
			i, err := s.Authenticate(t.Context(), &c.a)
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.say) || (i == nil) != (err != nil) {
				t.Errorf("anonymous=%v, %s: %v, want %v %s", open, c.what, err, c.want, c.say)
			}
			if i != nil && i.Device() != c.a.Device {
				t.Errorf("%s: let in as %q", c.what, i.Device())
			}
		}
	}
}

func TestWhomACertificateNames(t *testing.T) {
	s := newSite(t)
	for _, id := range []string{"cn", "dns.example", "last", "opaque", "urn-name", "ours", "device:x", "urn:device:y", "host.example"} {
		s.add(devices.NewDevice{ID: id, NoCredential: true})
	}
	for device, c := range map[string]*x509.Certificate{
		"cn":           certificate("cn", nil),
		"dns.example":  certificate("", []string{"a.example", "dns.example"}),
		"last":         certificate("x", nil, "spiffe://site.example/ward/3/last"),
		"opaque":       certificate("x", nil, "device:opaque"),
		"urn-name":     certificate("x", nil, "urn:device:urn-name"),
		"ours":         certificate("x", nil, "urn:holdfast:device:ours"),
		"device:x":     certificate("x", nil, "device:x"),
		"urn:device:y": certificate("x", nil, "urn:device:y"),
	} {
		if _, err := s.Authenticate(t.Context(), &devices.Attempt{Device: device, Certificate: c}); err != nil {
			t.Error(err)
		}
	}
	// A host in a URI is no name, and no path names nobody.
	_, err := s.Authenticate(t.Context(), &devices.Attempt{Device: "host.example", Certificate: certificate("", nil, "spiffe://host.example", "https://host.example/")})
	wantErr(t, "host of a URI", err, devices.ErrCredentials)
}

func TestPinnedCertificates(t *testing.T) {
	s := newSite(t)
	first, second, third := certificate("d", nil), certificate("d", []string{"d"}), certificate("d", []string{"e"})
	try := func(c *x509.Certificate) error {
		_, err := s.Authenticate(t.Context(), &devices.Attempt{Device: "d", Certificate: c, Address: address(int(s.peers.Add(1)))})
		return err
	}
	s.add(devices.NewDevice{ID: "d", Credential: pinOf(first)})
	if err := try(first); err != nil {
		t.Error(err)
	}
	wantErr(t, "certificate that names the device and is not pinned", try(second), devices.ErrCredentials)
	pin, _, err := s.AddCredential(t.Context(), "d", *pinOf(second))
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(second.Raw); pin.Kind != devices.CredentialCertificate || pin.Fingerprint != hex.EncodeToString(sum[:]) {
		t.Errorf("%+v", pin)
	}
	if _, _, err := s.AddCredential(t.Context(), "d", *pinOf(second)); !errors.Is(err, devices.ErrInvalid) {
		t.Errorf("pinned twice: %v", err)
	}
	for _, c := range []*x509.Certificate{first, second} {
		if err := try(c); err != nil {
			t.Error(err)
		}
	}
	wantErr(t, "a third", try(third), devices.ErrCredentials)
	if err := s.RemoveCredential(t.Context(), "d", pin.ID); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "a pin that was removed", try(second), devices.ErrCredentials)
	wantErr(t, "removal of a pin that is gone", s.RemoveCredential(t.Context(), "d", pin.ID), devices.ErrNoCredential)
	wantErr(t, "removal from nobody", s.RemoveCredential(t.Context(), "e", pin.ID), devices.ErrUnknownDevice)
}

// TestRefusalsCostTheSame counts what takes time: argon2 is computed once for everybody who gives what may be a
// password, if there is any device that has one, and never for tokens.
func TestRefusalsCostTheSame(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "token"})
	s.add(devices.NewDevice{ID: "off", Disabled: true})
	s.add(devices.NewDevice{ID: "pinned", Credential: pinOf(certificate("pinned", nil))})
	wrong := func(what, device, secret string, want float64) {
		t.Helper()
		var err error
		if n := s.hashes(func() { _, err = s.login(device, secret) }); n != want {
			t.Errorf("%s: %v hashes, want %v", what, n, want)
		}
		wantErr(t, what, err, devices.ErrCredentials)
	}
	for _, device := range []string{"token", "off", "pinned", "nobody"} {
		wrong("no device has a password", device, "a wrong password", 0)
	}
	s.add(withPassword("one"))
	s.add(withPassword("two"))
	if _, _, err := s.AddCredential(t.Context(), "two", devices.NewCredential{Kind: devices.CredentialPassword, Password: "another good one", RetireOthers: -1}); err != nil {
		t.Fatal(err)
	}
	s.add(withPassword("one-off"))
	if _, err := s.Patch(t.Context(), "one-off", devices.DevicePatch{Enabled: ptr(false)}); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{"token", "off", "pinned", "nobody", "one", "two", "one-off"} {
		wrong("device "+device, device, "a wrong password", 1)
		wrong("device "+device+", as a token", device, "hft_"+strings.Repeat("A", 43), 0)
		wrong("device "+device+", too short", device, "elevenchars", 0)
		wrong("device "+device+", too long", device, strings.Repeat("p", 257), 0)
	}
	for _, secret := range []string{password, "another good one"} {
		if n := s.hashes(func() { s.mustLogin("two", secret) }); n != 1 {
			t.Errorf("right password: %v hashes", n)
		}
	}
}

func TestARightPasswordIsRemembered(t *testing.T) {
	s := newSite(t)
	s.add(withPassword("d"))
	login := func() { s.mustLogin("d", password) }
	if n := s.hashes(login); n != 1 {
		t.Errorf("first login: %v hashes", n)
	}
	if n := s.hashes(func() {
		for range 100 {
			login()
		}
	}); n != 0 {
		t.Errorf("later logins: %v hashes", n)
	}
	// A change that leaves the credential alone leaves it remembered; one of the credential does not.
	d, err := s.Patch(t.Context(), "d", devices.DevicePatch{Name: ptr("D")})
	if err != nil {
		t.Fatal(err)
	}
	if n := s.hashes(login); n != 0 {
		t.Errorf("after another name: %v hashes", n)
	}
	if _, _, err := s.AddCredential(t.Context(), "d", devices.NewCredential{RetireOthers: -1}); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveCredential(t.Context(), "d", d.Credentials[0].ID); err != nil {
		t.Fatal(err)
	}
	_, err = s.login("d", password)
	wantErr(t, "a password that was removed", err, devices.ErrCredentials)
	if _, _, err := s.AddCredential(t.Context(), "d", devices.NewCredential{Kind: devices.CredentialPassword, Password: password}); err != nil {
		t.Fatal(err)
	}
	if n := s.hashes(login); n != 1 {
		t.Errorf("the same password set again: %v hashes", n)
	}
	s = s.restart()
	if n := s.hashes(func() { s.mustLogin("d", password) }); n != 1 {
		t.Errorf("after a restart: %v hashes", n)
	}
}

func TestAtMostTwoPasswordsAreHashedAtOnce(t *testing.T) {
	s := newSite(t)
	s.add(withPassword("d"))
	token := s.add(devices.NewDevice{ID: "t"})
	release := devices.HoldHashes(s.Registry)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := s.Authenticate(ctx, &devices.Attempt{Device: "d", Password: []byte(password)})
		ended <- err
	}()
	s.mustLogin("t", token) // tokens do not wait
	select {
	case err := <-ended:
		t.Errorf("a third was hashed: %v", err)
	default:
	}
	cancel()
	wantErr(t, "a login that waited", <-ended, context.Canceled)
	release()
	s.mustLogin("d", password)
}

func TestRotationOverlaps(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	var mu sync.Mutex
	s := newSite(t, withClock(func() time.Time { mu.Lock(); defer mu.Unlock(); return now }))
	step := func(d time.Duration) { mu.Lock(); now = now.Add(d); mu.Unlock() }
	old := s.add(devices.NewDevice{ID: "d"})
	_, stays, err := s.AddCredential(t.Context(), "d", devices.NewCredential{Kind: devices.CredentialToken, RetireOthers: -1, Lifetime: 30 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	_, fresh, err := s.AddCredential(t.Context(), "d", devices.NewCredential{RetireOthers: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	in := func(secret string) bool {
		_, err := s.login("d", secret)
		if err != nil {
			wantErr(t, "login", err, devices.ErrCredentials)
		}
		return err == nil
	}
	if !in(old) || !in(stays) || !in(fresh) {
		t.Error("not all are accepted during the overlap")
	}
	step(30 * time.Minute)
	if !in(old) || in(stays) || !in(fresh) {
		t.Error("the overlap lengthened what ended before")
	}
	step(30 * time.Minute)
	if in(old) || !in(fresh) {
		t.Error("the old one is accepted after the overlap, or the new one is not")
	}
	d, _ := s.Get("d")
	if len(d.Credentials) != 3 || d.Credentials[0].Expires.IsZero() || !d.Credentials[2].Expires.IsZero() {
		t.Errorf("%+v", d.Credentials)
	}
	// At once.
	_, last, err := s.AddCredential(t.Context(), "d", devices.NewCredential{})
	if err != nil {
		t.Fatal(err)
	}
	if in(fresh) || !in(last) {
		t.Error("retired at once, and still accepted")
	}
}

func TestAtMostTenCredentials(t *testing.T) {
	s := newSite(t)
	s.add(devices.NewDevice{ID: "d"})
	for range 9 {
		if _, _, err := s.AddCredential(t.Context(), "d", devices.NewCredential{RetireOthers: -1}); err != nil {
			t.Fatal(err)
		}
	}
	_, _, err := s.AddCredential(t.Context(), "d", devices.NewCredential{RetireOthers: -1})
	wantErr(t, "the eleventh", err, devices.ErrInvalid)
	// Retired ones make room: rotating often is no reason to be refused.
	for range 20 {
		_, secret, err := s.AddCredential(t.Context(), "d", devices.NewCredential{})
		if err != nil {
			t.Fatal(err)
		}
		s.mustLogin("d", secret)
	}
}
