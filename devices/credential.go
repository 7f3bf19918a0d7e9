package devices

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/url"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// tokenPrefix begins every token that is made here. Scanners of repositories and logs find it, and it keeps tokens
// and passwords apart: see Registry.check.
const tokenPrefix = "hft_"

// expiredKept is how long an expired credential is still shown.
const expiredKept = 24 * time.Hour

// credential is a Credential with its secret. It does not change, so versions of a device share it.
type credential struct {
	id               string
	kind             uint64
	created, expires time.Time
	secret           []byte    // SHA-256 of a token or certificate; argon2id of a password
	salt             []byte    // of a password
	cost             argonCost // of a password
	// remembered is a keyed hash of the password that was right: a device that comes back does not pay for argon2
	// again. The key lives as long as the process.
	remembered atomic.Pointer[[sha256.Size]byte]
}

// argonCost is what argon2id was told, stored with each hash so that defaultCost can be raised.
type argonCost struct {
	passes  uint32
	memory  uint32 // KiB
	threads uint8
}

// defaultCost of new passwords: OWASP's second choice for argon2id, because memory is what a small box has least of.
var defaultCost = argonCost{passes: 2, memory: 19 << 10, threads: 1}

// sane says whether a stored cost may be computed: a damaged row must not take the gateway's memory.
func (c argonCost) sane() bool {
	return c.passes >= 1 && c.passes <= 64 && c.memory >= 8 && c.memory <= 1<<20 && c.threads >= 1 && c.threads <= 16
}

func (c *credential) expired(now time.Time) bool {
	return !c.expires.IsZero() && !now.Before(c.expires)
}

// until is c with another expiry.
func (c *credential) until(expires time.Time) *credential {
	n := &credential{id: c.id, kind: c.kind, created: c.created, expires: expires, secret: c.secret, salt: c.salt, cost: c.cost}
	n.remembered.Store(c.remembered.Load())
	return n
}

func (c *credential) show() Credential {
	s := Credential{ID: c.id, Created: c.created, Expires: c.expires}
	switch c.kind {
	case kindToken:
		s.Kind = CredentialToken
	case kindPassword:
		s.Kind = CredentialPassword
	case kindCertificate:
		s.Kind, s.Fingerprint = CredentialCertificate, hex.EncodeToString(c.secret)
	default:
		s.Kind = fmt.Sprintf("unknown (%d)", c.kind)
	}
	return s
}

// argonSlots bounds how many passwords are hashed at once: each takes 19 MiB and a core, and whoever is connected needs one, too.
func argonSlots() int { return min(max(runtime.GOMAXPROCS(0)/2, 1), 2) }

// hash computes argon2id when there is room for it, unless crowded says then that it is not worth it. nil: it is.
func (r *Registry) hash(ctx context.Context, password, salt []byte, cost argonCost, crowded func() error) ([]byte, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another password's hash: %w", ctx.Err())
	}
	if crowded != nil {
		if err := crowded(); err != nil {
			return nil, err
		}
	}
	r.m.hashes.Inc()
	return argon2.IDKey(password, salt, cost.passes, cost.memory, cost.threads, sha256.Size), nil
}

// newCredential makes what n asks for. salt is the one of the device's passwords, nil if it has none.
//
// The passwords of one device share their salt: so one computation of argon2 tries a password against all of them,
// and a wrong one costs the same for every device (see check). A salt is there to make equal passwords of different
// devices look different, and that it still does.
func (r *Registry) newCredential(ctx context.Context, id string, n NewCredential, salt []byte) (c *credential, secret string, err error) {
	if n.Lifetime < 0 {
		return nil, "", fmt.Errorf("%w: a lifetime of %v: leave it out for a credential that does not expire", ErrInvalid, n.Lifetime)
	}
	if n.Kind != CredentialPassword && n.Password != "" {
		return nil, "", fmt.Errorf("%w: a password goes with kind %q only", ErrInvalid, CredentialPassword)
	}
	if n.Kind != CredentialCertificate && n.Fingerprint != "" {
		return nil, "", fmt.Errorf("%w: a fingerprint goes with kind %q only", ErrInvalid, CredentialCertificate)
	}
	c = &credential{id: newCredentialID()}
	switch n.Kind {
	case CredentialToken, "":
		c.kind = kindToken
		var b [32]byte
		rand.Read(b[:])
		secret = tokenPrefix + base64.RawURLEncoding.EncodeToString(b[:])
		sum := sha256.Sum256([]byte(secret))
		c.secret = sum[:]
	case CredentialPassword:
		c.kind = kindPassword
		switch n := n.Password; {
		case utf8.RuneCountInString(n) < MinPassword:
			return nil, "", fmt.Errorf("%w: a password of %d characters, it needs at least %d; or let a token be made", ErrInvalid, utf8.RuneCountInString(n), MinPassword)
		case len(n) > MaxPassword:
			return nil, "", fmt.Errorf("%w: a password of %d bytes, at most %d are allowed", ErrInvalid, len(n), MaxPassword)
		case strings.HasPrefix(n, tokenPrefix):
			return nil, "", fmt.Errorf("%w: a password may not begin with %s: it would be taken for a token", ErrInvalid, tokenPrefix)
		case strings.EqualFold(n, id):
			return nil, "", fmt.Errorf("%w: the password is the device's id", ErrInvalid)
		}
		c.cost, c.salt = defaultCost, salt
		if c.salt == nil {
			c.salt = make([]byte, 16)
			rand.Read(c.salt)
		}
		if c.secret, err = r.hash(ctx, []byte(n.Password), c.salt, c.cost, nil); err != nil {
			return nil, "", err
		}
	case CredentialCertificate:
		c.kind = kindCertificate
		c.secret, err = hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(n.Fingerprint), ":", ""))
		if err != nil || len(c.secret) != sha256.Size {
			return nil, "", fmt.Errorf("%w: %q is no fingerprint: it has 64 hex digits, as `openssl x509 -noout -fingerprint -sha256` shows them", ErrInvalid, n.Fingerprint)
		}
	default:
		return nil, "", fmt.Errorf("%w: credential kind %q: there are %s, %s and %s", ErrInvalid, n.Kind, CredentialToken, CredentialPassword, CredentialCertificate)
	}
	// The clock is read last: hashing may have waited.
	c.created = r.wall()
	if n.Lifetime > 0 {
		c.expires = c.created.Add(n.Lifetime)
	}
	return c, secret, nil
}

// newCredentialID makes an id that its device never had: a live connection is tied to its credential by it.
func newCredentialID() string {
	var b [6]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// check tries what a client gave as its password. dev is nil for a device that is not known. It returns the
// credential that it fits, or nil; the error is ctx's, or crowded's (see hash), which is asked before argon2.
//
// How long a refusal takes must not tell which devices there are. Two things see to that:
//
// A secret in the shape of a token is only tried as a token, for no password begins like one. That is one SHA-256
// and up to ten comparisons in constant time, below what a network shows; and knowing that a device exists does not
// help anybody to guess 256 random bits. A storm of devices with an old token costs no argon2.
//
// Anything else can only be a password and costs argon2, which takes ten milliseconds: everybody sees it. So it is
// computed exactly once whoever the client says it is: a device with passwords, of which all share salt and cost,
// one with tokens only, a disabled one, one that nobody knows. Only where no device at all has a password, which is
// no secret about any of them, nothing is computed. Passwords too short or too long to be right cost nothing, for
// everybody. What still shows is a device whose password was stored with another cost, until it is changed, and that
// a right password, which is remembered, is found without argon2.
func (r *Registry) check(ctx context.Context, dev *device, secret []byte, now time.Time, crowded func() error) (*credential, error) {
	var found *credential
	if len(secret) >= len(tokenPrefix) && string(secret[:len(tokenPrefix)]) == tokenPrefix {
		sum := sha256.Sum256(secret)
		for c := range dev.valid(kindToken, now) {
			if subtle.ConstantTimeCompare(sum[:], c.secret) == 1 {
				found = c
			}
		}
		return found, nil
	}
	if len(secret) < MinPassword || len(secret) > MaxPassword {
		return nil, nil
	}
	for c := range dev.valid(kindPassword, now) {
		if known := c.remembered.Load(); known != nil && hmac.Equal(known[:], r.keyed(c, secret)) {
			return c, nil
		}
	}
	var (
		hashed *credential // whose salt and cost sum was computed with
		sum    []byte
		err    error
	)
	for c := range dev.valid(kindPassword, now) {
		if hashed == nil || c.cost != hashed.cost || !slices.Equal(c.salt, hashed.salt) {
			if sum, err = r.hash(ctx, secret, c.salt, c.cost, crowded); err != nil {
				return nil, err
			}
			hashed = c
		}
		if subtle.ConstantTimeCompare(sum, c.secret) == 1 {
			found = c
		}
	}
	switch {
	case hashed == nil && r.counts.Load().passwords > 0:
		_, err = r.hash(ctx, secret, r.key[:16], defaultCost, crowded)
	case found != nil:
		found.remembered.Store((*[sha256.Size]byte)(r.keyed(found, secret)))
	}
	return found, err
}

// keyed is the hash under which a right password is remembered.
func (r *Registry) keyed(c *credential, password []byte) []byte {
	h := hmac.New(sha256.New, r.key[:])
	h.Write([]byte(c.id)) // of fixed length
	h.Write(password)
	return h.Sum(nil)
}

// fingerprint of a certificate: SHA-256 of its DER bytes.
func fingerprint(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

// certificateNames lists whom a certificate names: CN, DNS names, and URIs whole, by their last path segment, and by
// what follows "device:" in an opaque one (device:pump-1, urn:device:pump-1, urn:holdfast:device:pump-1).
func certificateNames(cert *x509.Certificate) []string {
	var names []string
	add := func(name string) {
		if name != "" && name != "/" && name != "." && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	add(cert.Subject.CommonName)
	for _, name := range cert.DNSNames {
		add(name)
	}
	for _, u := range cert.URIs {
		add(u.String())
		add(uriDevice(u))
	}
	return names
}

func uriDevice(u *url.URL) string {
	if u.Opaque == "" {
		return path.Base(u.Path) // "." of an empty path
	}
	if u.Scheme == "device" {
		return u.Opaque
	}
	for _, prefix := range [...]string{"device:", "holdfast:device:"} {
		if name, ok := strings.CutPrefix(u.Opaque, prefix); ok {
			return name
		}
	}
	return ""
}
