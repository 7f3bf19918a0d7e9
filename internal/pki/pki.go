// Package pki is a small certificate authority for a site that has none: one folder with the authority,
// the gateway's certificate, one certificate for each device, and the list of those that are revoked.
//
// # The folder
//
//	ca.crt             certificates of the authority, the newest first; several while one replaces another
//	ca.key             key of the newest
//	server.crt .key    the gateway's
//	devices/ID.crt .key
//	crl.pem            revoked certificates, one list for each certificate in ca.crt, in that order
//	index.jsonl        everything that was ever issued, and what was revoked, one JSON object a line
//	retired/           what a rotation replaced; the keys of older authorities sign their lists still
//	before-TIME/       what a forced Init replaced
//
// The folder has mode 0700, keys 0600. Files are replaced as a whole and synced. Something is in the index
// before its files are there, so that nothing is issued that could not be revoked.
//
// Keys are ECDSA P-256: small in a device's flash, quick on its processor, and known to every TLS library
// of the last ten years.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// How long things are valid.
const (
	CALifetime     = 3653 * 24 * time.Hour // ten years: as long as most sites keep their devices
	ServerLifetime = 397 * 24 * time.Hour  // a year and a month: the yearly renewal may be late; the most that clients take everywhere
	DeviceDays     = 365
	MaxDeviceDays  = 3650

	// CRLLifetime is the server's: the yearly renewal of that one renews the list as well. A list that is
	// overdue helps nobody: the folder is at hand, and what is revoked is written at once.
	CRLLifetime = ServerLifetime

	// backdate lets in what has a clock that is late.
	backdate = 24 * time.Hour
	// kept is how long a revoked certificate stays in the list after its end (RFC 5280 §3.3 wants it in one
	// list after that).
	kept = 31 * 24 * time.Hour
)

// Kinds of an Entry.
const (
	KindCA     = "ca"
	KindServer = "server"
	KindDevice = "device"
)

// DeviceURI begins the URI that names a device in its certificate.
const DeviceURI = "urn:holdfast:device:"

// Errors.
var (
	ErrNoCA    = errors.New("no certificate authority there")
	ErrExists  = errors.New("exists already")
	ErrName    = errors.New("not a name that can stand in a certificate")
	ErrUnknown = errors.New("nothing of that name was issued")
	ErrInUse   = errors.New("certificates of the old authority are still in use")
)

// Authority is the folder of a certificate authority. One goroutine at a time uses it; between processes a lock
// on the folder keeps order.
type Authority struct {
	dir string
	now func() time.Time
}

// At gives the authority in dir, which may not be there yet. now is nil for time.Now.
func At(dir string, now func() time.Time) *Authority {
	if now == nil {
		now = time.Now
	}
	return &Authority{dir: dir, now: now}
}

// Dir is its folder.
func (a *Authority) Dir() string { return a.dir }

// Path gives the path of a file in the folder: Path("devices", "pump-7.crt").
func (a *Authority) Path(elem ...string) string {
	return filepath.Join(append([]string{a.dir}, elem...)...)
}

// DeviceFiles gives the paths of a device's certificate and key.
func (a *Authority) DeviceFiles(id string) (cert, key string) {
	return a.Path("devices", id+".crt"), a.Path("devices", id+".key")
}

// InitOptions of Init.
type InitOptions struct {
	Site  string   // stands in the authority's name; at most 40 characters
	Hosts []string // names and IP addresses under which devices reach the gateway
	Force bool     // replaces an authority that is there: all it issued is worth nothing then
}

// Init makes an authority, a certificate for the gateway, and an empty list of revoked ones. ErrExists if there is one.
func (a *Authority) Init(o InitOptions) error {
	if err := checkSite(o.Site); err != nil {
		return err
	}
	if err := checkHosts(o.Hosts); err != nil {
		return err
	}
	if err := a.makeDir(); err != nil {
		return err
	}
	unlock, err := a.lock()
	if err != nil {
		return err
	}
	defer unlock()
	for _, name := range []string{"ca.key", "ca.crt", "server.key"} {
		if _, err := os.Stat(a.Path(name)); err == nil {
			if !o.Force {
				return fmt.Errorf("%s %w", a.Path(name), ErrExists)
			}
			if err := a.setAside(); err != nil {
				return err
			}
		}
	}
	ca, err := a.newCA(o.Site)
	if err != nil {
		return err
	}
	if err := a.writeCAs([]*issuer{ca}); err != nil {
		return err
	}
	if err := a.writeCRLs([]*issuer{ca}); err != nil {
		return err
	}
	_, err = a.issueServer(ca, o.Hosts)
	return err
}

// makeDir makes the folder. One that holds other things is not closed to others by us.
func (a *Authority) makeDir() error {
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return err
	}
	fi, err := os.Stat(a.dir)
	if err != nil || fi.Mode().Perm()&0o077 == 0 {
		return err
	}
	names, err := os.ReadDir(a.dir)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fmt.Errorf("folder %s is open to other users (mode %04o) and not empty: chmod 700 it, or choose another", a.dir, fi.Mode().Perm())
	}
	return os.Chmod(a.dir, 0o700)
}

// setAside moves what is there into a folder of its own: a key that is gone cannot be had back.
func (a *Authority) setAside() error {
	to := a.Path("before-" + a.now().UTC().Format("20060102T150405.000Z"))
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"ca.crt", "ca.key", "server.crt", "server.key", "crl.pem", indexFile, "devices", "retired"} {
		if err := os.Rename(a.Path(name), filepath.Join(to, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return syncDir(a.dir)
}

// Device issues a certificate for a device that has none. ErrExists, ErrName, ErrNoCA.
func (a *Authority) Device(id string, days int, force bool) (Entry, error) {
	if err := CheckDeviceID(id); err != nil {
		return Entry{}, err
	}
	return a.issueLocked(func(ca *issuer) (Entry, error) {
		cert, key := a.DeviceFiles(id)
		for _, file := range []string{key, cert} {
			if _, err := os.Stat(file); err == nil {
				if !force {
					return Entry{}, fmt.Errorf("%s %w", file, ErrExists)
				}
				if err := a.retire(KindDevice, id); err != nil {
					return Entry{}, err
				}
			}
		}
		return a.issueDevice(ca, id, days)
	})
}

// RotateDevice issues a new certificate for a device that has one. The old one stays valid until its end, or is revoked.
func (a *Authority) RotateDevice(id string, days int, revoke bool) (Entry, error) {
	if err := CheckDeviceID(id); err != nil {
		return Entry{}, err
	}
	return a.rotate(KindDevice, id, revoke, func(ca *issuer) (Entry, error) { return a.issueDevice(ca, id, days) })
}

// RotateServer issues a new certificate for the gateway, for hosts, or those of the one it has. The list of revoked
// certificates is renewed as well.
func (a *Authority) RotateServer(hosts []string, revoke bool) (Entry, error) {
	if len(hosts) == 0 {
		old, err := readCertificates(a.Path("server.crt"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Entry{}, err
		}
		if err == nil {
			hosts = slices.Clone(old[0].DNSNames)
			for _, ip := range old[0].IPAddresses {
				hosts = append(hosts, ip.String())
			}
		}
	}
	if err := checkHosts(hosts); err != nil {
		return Entry{}, err
	}
	return a.rotate(KindServer, serverName, revoke, func(ca *issuer) (Entry, error) { return a.issueServer(ca, hosts) })
}

func (a *Authority) rotate(kind, name string, revoke bool, issue func(*issuer) (Entry, error)) (Entry, error) {
	return a.issueLocked(func(ca *issuer) (Entry, error) {
		before, err := a.readIndex()
		if err != nil {
			return Entry{}, err
		}
		old := slices.DeleteFunc(before, func(e Entry) bool { return e.Kind != kind || e.Name != name })
		if len(old) == 0 {
			return Entry{}, fmt.Errorf("%s %q: %w", kind, name, ErrUnknown)
		}
		if err := a.retire(kind, name); err != nil {
			return Entry{}, err
		}
		made, err := issue(ca)
		if err != nil {
			return Entry{}, err
		}
		if revoke {
			if _, err := a.revoke(old); err != nil {
				return made, err
			}
		}
		if revoke || kind == KindServer {
			cas, err := a.issuers()
			if err != nil {
				return made, err
			}
			return made, a.writeCRLs(cas)
		}
		return made, nil
	})
}

func (a *Authority) issueLocked(issue func(*issuer) (Entry, error)) (Entry, error) {
	cas, unlock, err := a.open()
	if err != nil {
		return Entry{}, err
	}
	defer unlock()
	return issue(cas[0])
}

// open locks the folder and reads the authority's certificates and keys.
func (a *Authority) open() (cas []*issuer, unlock func(), err error) {
	if _, err := os.Stat(a.Path("ca.key")); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s: %w", a.dir, ErrNoCA)
	}
	unlock, err = a.lock()
	if err != nil {
		return nil, nil, err
	}
	if cas, err = a.issuers(); err != nil {
		unlock()
		return nil, nil, err
	}
	return cas, unlock, nil
}

// RotateCA makes a new authority beside the old one. From then on ca.crt holds both: whoever is given it accepts what either
// has issued, and what is issued is issued by the new one.
func (a *Authority) RotateCA(site string) (Entry, error) {
	cas, unlock, err := a.open()
	if err != nil {
		return Entry{}, err
	}
	defer unlock()
	if site == "" {
		site = strings.Join(cas[0].cert.Subject.Organization, " ")
	}
	if err := checkSite(site); err != nil {
		return Entry{}, err
	}
	// The old key first: it has to sign lists until nothing of it is valid any more.
	if err := a.retireCA(cas[0]); err != nil {
		return Entry{}, err
	}
	ca, err := a.newCA(site)
	if err != nil {
		return Entry{}, err
	}
	now := a.now()
	cas = append([]*issuer{ca}, slices.DeleteFunc(cas, func(i *issuer) bool { return now.After(i.cert.NotAfter) })...)
	if err := a.writeCAs(cas); err != nil {
		return Entry{}, err
	}
	if err := a.writeCRLs(cas); err != nil {
		return Entry{}, err
	}
	return ca.entry, nil
}

// DropOldCAs ends the time in which two authorities are trusted: ca.crt holds the newest alone. ErrInUse, with the names, if
// something that an older one issued is still valid, unless force says so.
func (a *Authority) DropOldCAs(force bool) (dropped int, err error) {
	cas, unlock, err := a.open()
	if err != nil {
		return 0, err
	}
	defer unlock()
	entries, err := a.readIndex()
	if err != nil {
		return 0, err
	}
	var inUse []string
	for _, e := range entries {
		newest := e.Issuer == keyID(cas[0].cert)
		replaced := e.Kind != KindCA && slices.ContainsFunc(entries, func(n Entry) bool {
			return n.Kind == e.Kind && n.Name == e.Name && n.Issuer == keyID(cas[0].cert)
		})
		if e.Kind != KindCA && !newest && !replaced && e.State(a.now()) == StateValid {
			inUse = append(inUse, e.Name)
		}
	}
	if len(inUse) > 0 && !force {
		slices.Sort(inUse)
		return 0, &InUseError{slices.Compact(inUse)}
	}
	if err := a.writeCAs(cas[:1]); err != nil {
		return 0, err
	}
	return len(cas) - 1, a.writeCRLs(cas[:1])
}

// InUseError tells what still has no certificate of the newest authority.
type InUseError struct{ Names []string }

// Error names the first few.
func (e *InUseError) Error() string {
	shown := e.Names
	if len(shown) > 5 {
		shown = append(slices.Clone(shown[:5]), "…")
	}
	return fmt.Sprintf("%v, by %d: %s", ErrInUse, len(e.Names), strings.Join(shown, ", "))
}

// Unwrap gives ErrInUse.
func (e *InUseError) Unwrap() error { return ErrInUse }

// RenewCRL writes the list of revoked certificates again.
func (a *Authority) RenewCRL() error {
	cas, unlock, err := a.open()
	if err != nil {
		return err
	}
	defer unlock()
	return a.writeCRLs(cas)
}

// Revoke revokes a certificate by its serial number (hex), or all of a device, and writes the list. It gives those that were
// not revoked before. ErrUnknown.
func (a *Authority) Revoke(what string) ([]Entry, error) {
	cas, unlock, err := a.open()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := a.readIndex()
	if err != nil {
		return nil, err
	}
	serial := strings.ToLower(strings.ReplaceAll(what, ":", ""))
	found := slices.DeleteFunc(entries, func(e Entry) bool {
		return e.Kind == KindCA || e.Serial != serial && (e.Kind != KindDevice || e.Name != what)
	})
	if len(found) == 0 {
		return nil, fmt.Errorf("%q: %w", what, ErrUnknown)
	}
	revoked, err := a.revoke(found)
	if err != nil {
		return nil, err
	}
	return revoked, a.writeCRLs(cas)
}

func (a *Authority) revoke(entries []Entry) (revoked []Entry, err error) {
	now := a.now().UTC().Truncate(time.Second)
	for _, e := range entries {
		if e.RevokedAt.IsZero() && now.Before(e.NotAfter) {
			e.RevokedAt = now
			revoked = append(revoked, e)
		}
	}
	return revoked, a.appendIndex(revoked...)
}

// issuer is one certificate of the authority with its key.
type issuer struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	entry Entry // of a new one
}

func (a *Authority) newCA(site string) (*issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := a.now().UTC().Truncate(time.Second)
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		// Authorities that follow each other have names of their own, or clients that hold both mix them up.
		Subject:               pkix.Name{Organization: []string{site}, CommonName: site + " CA " + serialText(serial)[:8]},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CALifetime),
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	cert, err := create(tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	i := &issuer{cert: cert, key: key, entry: entryOf(KindCA, site, cert)}
	return i, a.appendIndex(i.entry)
}

const serverName = "server"

func (a *Authority) issueServer(ca *issuer, hosts []string) (Entry, error) {
	if len(hosts) == 0 {
		hosts = DefaultHosts()
	}
	tmpl := &x509.Certificate{
		Subject: pkix.Name{Organization: ca.cert.Subject.Organization, CommonName: commonName(hosts[0])},
		// Clients look at the alternative names alone (RFC 9525 §2).
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	return a.issue(ca, KindServer, serverName, tmpl, ServerLifetime, a.Path("server.crt"), a.Path("server.key"))
}

// commonName cuts what is longer than the 64 characters that X.520 has for it.
func commonName(s string) string {
	if len(s) > 64 {
		return s[:64]
	}
	return s
}

func (a *Authority) issueDevice(ca *issuer, id string, days int) (Entry, error) {
	if days < 1 || days > MaxDeviceDays {
		return Entry{}, fmt.Errorf("a certificate is valid for 1 to %d days", MaxDeviceDays)
	}
	if err := os.MkdirAll(a.Path("devices"), 0o700); err != nil {
		return Entry{}, err
	}
	cert, key := a.DeviceFiles(id)
	return a.issue(ca, KindDevice, id, &x509.Certificate{
		Subject:     pkix.Name{Organization: ca.cert.Subject.Organization, CommonName: id},
		URIs:        []*url.URL{{Scheme: "urn", Opaque: strings.TrimPrefix(DeviceURI, "urn:") + id}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, time.Duration(days)*24*time.Hour, cert, key)
}

func (a *Authority) issue(ca *issuer, kind, name string, tmpl *x509.Certificate, lifetime time.Duration, certFile, keyFile string) (Entry, error) {
	now := a.now().UTC().Truncate(time.Second)
	if now.After(ca.cert.NotAfter) {
		return Entry{}, fmt.Errorf("the authority ended on %s: make a new one (rotate ca)", ca.cert.NotAfter.Format(time.DateOnly))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Entry{}, err
	}
	if tmpl.SerialNumber, err = newSerial(); err != nil {
		return Entry{}, err
	}
	tmpl.NotBefore, tmpl.NotAfter = now.Add(-backdate), now.Add(lifetime)
	if tmpl.NotBefore.Before(ca.cert.NotBefore) {
		tmpl.NotBefore = ca.cert.NotBefore
	}
	if tmpl.NotAfter.After(ca.cert.NotAfter) { // longer would be a promise that nobody keeps
		tmpl.NotAfter = ca.cert.NotAfter
	}
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	cert, err := create(tmpl, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return Entry{}, err
	}
	e := entryOf(kind, name, cert)
	if err := a.appendIndex(e); err != nil {
		return Entry{}, err
	}
	if err := writeKey(keyFile, key); err != nil {
		return Entry{}, err
	}
	return e, writeFile(certFile, pemCertificates(cert), 0o644)
}

func create(tmpl, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial gives 128 random bits (RFC 5280 §4.1.2.2 allows 159 and wants more than zero).
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	for {
		if _, err := rand.Read(b); err != nil {
			return nil, err
		}
		if n := new(big.Int).SetBytes(b); n.Sign() > 0 {
			return n, nil
		}
	}
}

func serialText(n *big.Int) string { return fmt.Sprintf("%032x", n) }

func keyID(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }

// writeCRLs writes a list for each of the authority's certificates that is still valid.
func (a *Authority) writeCRLs(cas []*issuer) error {
	entries, err := a.readIndex()
	if err != nil {
		return err
	}
	before := a.readCRLs()
	number := a.nextCRLNumber(before)
	now := a.now().UTC().Truncate(time.Second)
	var out []byte
	for _, ca := range cas {
		list := &x509.RevocationList{Number: number, ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(CRLLifetime)}
		for _, e := range entries {
			if e.RevokedAt.IsZero() || e.Issuer != keyID(ca.cert) || now.After(e.NotAfter.Add(kept)) {
				continue
			}
			n, ok := new(big.Int).SetString(e.Serial, 16)
			if !ok {
				return fmt.Errorf("%s: serial %q is not a number", a.Path(indexFile), e.Serial)
			}
			list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: e.RevokedAt})
		}
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, strays(before, ca.cert, entries)...)
		der, err := x509.CreateRevocationList(rand.Reader, list, ca.cert, ca.key)
		if err != nil {
			return fmt.Errorf("sign the list of revoked certificates: %w", err)
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return writeFile(a.Path("crl.pem"), out, 0o644)
}

// strays are what lists of ca revoke and the index does not know, because it was lost or an older one was put in its place: what
// is revoked stays so. When their certificates end nobody knows any more, so they stay in the list.
func strays(lists []*x509.RevocationList, ca *x509.Certificate, index []Entry) (kept []x509.RevocationListEntry) {
	known := map[string]bool{}
	for _, e := range index {
		known[e.Serial] = true
	}
	for _, l := range lists {
		if l.CheckSignatureFrom(ca) != nil {
			continue
		}
		for _, r := range l.RevokedCertificateEntries {
			if serial := serialText(r.SerialNumber); !known[serial] {
				known[serial] = true
				kept = append(kept, x509.RevocationListEntry{SerialNumber: r.SerialNumber, RevocationTime: r.RevocationTime})
			}
		}
	}
	return kept
}

// readCRLs reads the lists that are there, as far as they can be read.
func (a *Authority) readCRLs() (lists []*x509.RevocationList) {
	data, err := os.ReadFile(a.Path("crl.pem"))
	if err != nil {
		return nil
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return lists
		}
		if l, err := x509.ParseRevocationList(block.Bytes); err == nil {
			lists = append(lists, l)
		}
	}
}

// nextCRLNumber grows even if the list was lost (RFC 5280 §5.2.3): it is never below the time.
func (a *Authority) nextCRLNumber(before []*x509.RevocationList) *big.Int {
	next := big.NewInt(a.now().Unix())
	for _, l := range before {
		if l.Number != nil && l.Number.Cmp(next) >= 0 {
			next = new(big.Int).Add(l.Number, big.NewInt(1))
		}
	}
	return next
}

// issuers reads ca.crt and the keys that belong to it, the newest first.
func (a *Authority) issuers() ([]*issuer, error) {
	certs, err := readCertificates(a.Path("ca.crt"))
	if err != nil {
		return nil, err
	}
	var cas []*issuer
	for i, cert := range certs {
		ca := &issuer{cert: cert}
		for _, file := range []string{a.Path("ca.key"), a.Path("retired", "ca-"+serialText(cert.SerialNumber)+".key")} {
			key, err := readKey(file)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			if err == nil && key.PublicKey.Equal(cert.PublicKey) {
				ca.key = key
			}
		}
		if ca.key == nil {
			return nil, fmt.Errorf("the key of certificate %d in %s is neither in ca.key nor in %s", i+1, a.Path("ca.crt"), a.Path("retired"))
		}
		cas = append(cas, ca)
	}
	return cas, nil
}

// writeCAs puts the newest authority in place. After a crash between the two files ca.crt begins with the one before, whose
// key RotateCA has put into the retired folder: that one is in force still, and nothing is lost.
func (a *Authority) writeCAs(cas []*issuer) error {
	if err := writeKey(a.Path("ca.key"), cas[0].key); err != nil {
		return err
	}
	var certs []*x509.Certificate
	for _, ca := range cas {
		certs = append(certs, ca.cert)
	}
	return writeFile(a.Path("ca.crt"), pemCertificates(certs...), 0o644)
}

func (a *Authority) retireCA(ca *issuer) error {
	if err := os.MkdirAll(a.Path("retired"), 0o700); err != nil {
		return err
	}
	base := a.Path("retired", "ca-"+serialText(ca.cert.SerialNumber))
	if err := writeKey(base+".key", ca.key); err != nil {
		return err
	}
	return writeFile(base+".crt", pemCertificates(ca.cert), 0o644)
}

// retire keeps the files that are replaced: the device may still use them.
func (a *Authority) retire(kind, name string) error {
	certFile, keyFile := a.Path("server.crt"), a.Path("server.key")
	if kind == KindDevice {
		certFile, keyFile = a.DeviceFiles(name)
	}
	certs, err := readCertificates(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // moved to the device, as it should be
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.Path("retired"), 0o700); err != nil {
		return err
	}
	base := a.Path("retired", kind+"-"+name+"-"+serialText(certs[0].SerialNumber))
	for from, to := range map[string]string{certFile: base + ".crt", keyFile: base + ".key"} {
		data, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if from == keyFile {
			mode = 0o600
		}
		if err := writeFile(to, data, mode); err != nil {
			return err
		}
	}
	return nil
}

const idMarks = "-_.:@"

// CheckDeviceID says whether an id can stand in a certificate's common name, in a URI and in a file's name. ErrName.
func CheckDeviceID(id string) error {
	bad := func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune(idMarks, r))
	}
	switch {
	case id == "":
		return fmt.Errorf("the device id is empty: %w", ErrName)
	case len(id) > 64:
		return fmt.Errorf("the device id has %d characters, a certificate's common name takes 64: %w", len(id), ErrName)
	case strings.ContainsFunc(id, bad) || strings.IndexByte(idMarks, id[0]) >= 0:
		return fmt.Errorf("device id %q: letters, digits and - _ . : @ are taken, and it begins with a letter or a digit: %w", id, ErrName)
	}
	return nil
}

func checkSite(site string) error {
	if site == "" || len(site) > 40 || strings.ContainsFunc(site, func(r rune) bool { return r < ' ' || r > '~' }) {
		return fmt.Errorf("site %q: 1 to 40 ASCII characters are taken: %w", site, ErrName)
	}
	return nil
}

func checkHosts(hosts []string) error {
	for _, h := range hosts {
		if net.ParseIP(h) != nil {
			continue
		}
		name := strings.TrimPrefix(h, "*.")
		label := func(r rune) bool {
			return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_' || r == '.')
		}
		if name == "" || len(name) > 253 || strings.ContainsFunc(name, label) || strings.Contains(name, "..") ||
			strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") {
			return fmt.Errorf("host %q is neither a host name nor an IP address (no port, no scheme): %w", h, ErrName)
		}
	}
	return nil
}

// DefaultHosts are the names of this machine that are always true: its host name and those of loopback.
func DefaultHosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if name, err := os.Hostname(); err == nil && name != "localhost" && checkHosts([]string{name}) == nil {
		hosts = append([]string{name}, hosts...)
	}
	return hosts
}
