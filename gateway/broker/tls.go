package broker

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/mqtt"
)

// vault holds the certificates of one TLS listener. What handshakes use is replaced as a whole.
type vault struct {
	listener *Listener
	today    func() time.Time // by which certificates end; other times here are only compared with each other
	now      atomic.Pointer[material]

	mu    sync.Mutex // makes loads one after the other; guards what follows
	seen  prints     // of the files when they were last loaded, or could not be
	fresh prints     // as they were at the last look, if that differed from seen
	wrong string     // why they could not be loaded; "": they were
	again time.Time  // when to try once more
	told  map[ending]time.Duration
}

// material is what a listener's files hold. It does not change once it is made.
type material struct {
	config  *tls.Config
	cas     []*x509.Certificate        // client CAs
	roots   *x509.CertPool             // nil: client certificates are not asked for
	revoked map[string]map[string]bool // public key of an issuer -> serials
	subject string                     // of the leaf
	ends    []ending
	lists   int
}

// ending is a file and when the first thing in it ends.
type ending struct {
	file string // as the key in the configuration: cert, client_ca, crl
	path string
	at   time.Time // zero: never
}

// newVault loads the files of l.
func newVault(l *Listener, today func() time.Time) (*vault, error) {
	v := &vault{listener: l, today: today, told: map[ending]time.Duration{}}
	v.seen = l.TLS.look()
	m, err := l.TLS.load()
	if err != nil {
		return nil, err
	}
	v.use(m)
	return v, nil
}

// use has handshakes use m.
func (v *vault) use(m *material) {
	// After a resumption, too, in which nothing else looks at the CRL; and with what is newest then.
	m.config.Time = v.today
	m.config.VerifyConnection = func(s tls.ConnectionState) error {
		_, err := v.now.Load().verify(s.PeerCertificates, s.VerifiedChains, v.today())
		return err
	}
	v.now.Store(m)
}

// config is for tls.Server. Tickets are made with its keys, so that resumption outlives a reload.
func (v *vault) config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return v.now.Load().config, nil },
	}
}

// Certificate is a file that a TLS listener uses, and when the first thing in it ends.
type Certificate struct {
	Listener string
	File     string // path
	Key      string // what it is for, as in the configuration: cert, client_ca, crl
	Subject  string // of the listener's own certificate
	NotAfter time.Time
}

// Certificates are those that new handshakes use. Of what never ends there is none.
func (b *Broker) Certificates() (all []Certificate) {
	for _, s := range b.sockets {
		if s.vault == nil {
			continue
		}
		m := s.vault.now.Load()
		for _, e := range m.ends {
			if e.at.IsZero() {
				continue
			}
			c := Certificate{Listener: s.Name, File: e.path, Key: e.file, NotAfter: e.at}
			if e.file == "cert" {
				c.Subject = m.subject
			}
			all = append(all, c)
		}
	}
	return all
}

// load reads the files. The errors name the file and the way out.
func (t *TLS) load() (*material, error) {
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("load certificate %q and key %q: %w: give a PEM chain, the leaf first, and the key that belongs to it", t.Cert, t.Key, err)
	}
	m := &material{
		config:  &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		subject: name(pair.Leaf),
	}
	chain := []*x509.Certificate{pair.Leaf}
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("load certificate %q: chain: %w: remove what is no certificate", t.Cert, err)
		}
		chain = append(chain, c)
	}
	m.ends = append(m.ends, ending{"cert", t.Cert, firstEnd(chain)})
	if t.ClientCA == "" {
		return m, nil
	}
	if m.cas, err = loadCertificates(t.ClientCA); err != nil {
		return nil, fmt.Errorf("load client CA %q: %w: give the certificates in PEM that devices' certificates are signed with", t.ClientCA, err)
	}
	m.ends = append(m.ends, ending{"client_ca", t.ClientCA, firstEnd(m.cas)})
	m.roots = x509.NewCertPool()
	for _, c := range m.cas {
		m.roots.AddCert(c)
	}
	m.config.ClientCAs = m.roots
	m.config.ClientAuth = tls.VerifyClientCertIfGiven
	if t.RequireClientCert {
		m.config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	if t.CRL == "" {
		return m, nil
	}
	if err := m.loadCRL(t.CRL); err != nil {
		return nil, fmt.Errorf("load CRL %q: %w", t.CRL, err)
	}
	return m, nil
}

func loadCertificates(path string) (all []*x509.Certificate, err error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return all, nil
}

// loadCRL takes every list in the file. One that no client CA has signed is not believed, and
// then nothing of the file is. One whose next update is overdue still counts.
func (m *material) loadCRL(path string) error {
	lists, err := readCRLs(path)
	if err != nil {
		return fmt.Errorf("%w: give lists in PEM or DER", err)
	}
	m.revoked = map[string]map[string]bool{}
	m.lists = len(lists)
	end := ending{file: "crl", path: path}
	for _, l := range lists {
		i := slices.IndexFunc(m.cas, func(ca *x509.Certificate) bool {
			return bytes.Equal(ca.RawSubject, l.RawIssuer) && l.CheckSignatureFrom(ca) == nil
		})
		if i < 0 {
			return fmt.Errorf("list of %q is not signed by a certificate of client_ca that may sign lists (key usage cRLSign): "+
				"add its issuer to client_ca, or have it signed again", l.Issuer.String())
		}
		issuer := string(m.cas[i].RawSubjectPublicKeyInfo)
		if m.revoked[issuer] == nil {
			m.revoked[issuer] = make(map[string]bool, len(l.RevokedCertificateEntries))
		}
		for j := range l.RevokedCertificateEntries {
			e := &l.RevokedCertificateEntries[j]
			if e.ReasonCode != 8 { // removeFromCRL
				m.revoked[issuer][string(e.SerialNumber.Bytes())] = true
			}
		}
		if !l.NextUpdate.IsZero() && (end.at.IsZero() || l.NextUpdate.Before(end.at)) {
			end.at = l.NextUpdate
		}
	}
	m.ends = append(m.ends, end)
	return nil
}

func readCRLs(path string) (lists []*x509.RevocationList, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var ders [][]byte
	if bytes.Contains(data, []byte("-----BEGIN ")) {
		for {
			var b *pem.Block
			if b, data = pem.Decode(data); b == nil {
				break
			}
			if b.Type == "X509 CRL" {
				ders = append(ders, b.Bytes)
			}
		}
	} else {
		for len(data) > 0 {
			var one asn1.RawValue
			if data, err = asn1.Unmarshal(data, &one); err != nil {
				return nil, err
			}
			ders = append(ders, one.FullBytes)
		}
	}
	if len(ders) == 0 {
		return nil, errors.New("no revocation list in it")
	}
	for _, der := range ders {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, err
		}
		lists = append(lists, l)
	}
	return lists, nil
}

// revokedSerials counts what the lists revoke.
func (m *material) revokedSerials() (n int) {
	for _, serials := range m.revoked {
		n += len(serials)
	}
	return n
}

var errRevoked = errors.New("client certificate is revoked")

// verify says whether a client's certificates are good now, and until when: whether one of the
// chains that were found before holds, or another does. No certificates are always good: who must
// have one is held to that in the handshake. It is the leaf that counts, and what it stands on.
func (m *material) verify(peer []*x509.Certificate, chains [][]*x509.Certificate, now time.Time) (until time.Time, err error) {
	if len(peer) == 0 || m.roots == nil {
		return time.Time{}, nil
	}
	// A chain that was verified once and ends in a CA that is still there needs no signatures
	// checked again: with thousands of connections that is what takes long.
	usable := chains[:0:0]
	for _, chain := range chains {
		if slices.ContainsFunc(m.cas, chain[len(chain)-1].Equal) {
			usable = append(usable, chain)
		}
	}
	if until, err = m.best(usable, now); err == nil {
		return until, nil
	}
	between := x509.NewCertPool()
	for _, c := range peer[1:] {
		between.AddCert(c)
	}
	found, e := peer[0].Verify(x509.VerifyOptions{
		Roots: m.roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if e != nil {
		return time.Time{}, fmt.Errorf("client certificate is not valid: %w", e)
	}
	return m.best(found, now)
}

// best finds the chain that is good the longest.
func (m *material) best(chains [][]*x509.Certificate, now time.Time) (until time.Time, err error) {
	err = errors.New("client certificate is not signed by client_ca")
	for _, chain := range chains {
		end := firstEnd(chain)
		switch {
		case m.revokes(chain):
			if until.IsZero() {
				err = errRevoked
			}
		case now.After(end):
			if until.IsZero() {
				err = errors.New("client certificate has expired")
			}
		case end.After(until):
			until, err = end, nil
		}
	}
	return until, err
}

func (m *material) revokes(chain []*x509.Certificate) bool {
	for i := range len(chain) - 1 {
		if m.revoked[string(chain[i+1].RawSubjectPublicKeyInfo)][string(chain[i].SerialNumber.Bytes())] {
			return true
		}
	}
	return false
}

func firstEnd(certs []*x509.Certificate) (end time.Time) {
	for _, c := range certs {
		if end.IsZero() || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

func name(c *x509.Certificate) string {
	if s := c.Subject.String(); s != "" {
		return s
	}
	return strings.Join(c.DNSNames, ",")
}

// prints tells whether files are others than before.
type prints [4]os.FileInfo // nil: not there

func (t *TLS) look() (p prints) {
	for i, path := range []string{t.Cert, t.Key, t.ClientCA, t.CRL} {
		if path == "" {
			continue
		}
		if info, err := os.Stat(path); err == nil { // of what a link points to
			p[i] = info
		}
	}
	return p
}

func (p prints) equal(q prints) bool {
	for i := range p {
		a, b := p[i], q[i]
		switch {
		case a == nil && b == nil:
		case a == nil || b == nil, a.Size() != b.Size(), !a.ModTime().Equal(b.ModTime()), !os.SameFile(a, b):
			return false
		}
	}
	return true
}

// ReloadTLS reads the certificates, CAs and CRLs of all listeners again. A listener takes all of its
// files or, after an error, none; the error names the file and the way out. New handshakes use what
// was read; connections whose client certificate is good no longer are ended, the others stay.
func (b *Broker) ReloadTLS() error {
	var err error
	for _, s := range b.sockets {
		if s.vault != nil {
			err = errors.Join(err, b.reload(s.vault))
		}
	}
	return err
}

func (b *Broker) reload(v *vault) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return b.reloadLocked(v)
}

func (b *Broker) reloadLocked(v *vault) error {
	v.seen = v.listener.TLS.look() // before it is read: what changes meanwhile is seen later
	m, err := v.listener.TLS.load()
	if err != nil {
		if v.wrong != err.Error() {
			b.log.Warn("certificates not loaded, those from before stay", "listener", v.listener.Name, "err", err)
		}
		v.wrong, v.again = err.Error(), time.Now().Add(retryAfter)
		return fmt.Errorf("listener %q: %w", v.listener.Name, err)
	}
	v.wrong = ""
	v.use(m)
	for e := range v.told {
		if !slices.Contains(m.ends, e) {
			delete(v.told, e)
		}
	}
	b.tellLoaded(v)
	b.endInvalid(v, true)
	return nil
}

func (b *Broker) tellLoaded(v *vault) {
	m := v.now.Load()
	attrs := []any{"listener", v.listener.Name, "subject", m.subject}
	for _, e := range m.ends {
		if !e.at.IsZero() {
			attrs = append(attrs, e.file+"_not_after", e.at.UTC().Format(time.RFC3339))
		}
	}
	if len(m.cas) > 0 {
		attrs = append(attrs, "client_cas", len(m.cas))
	}
	if m.lists > 0 {
		attrs = append(attrs, "revoked", m.revokedSerials())
	}
	b.log.Info("certificates loaded", attrs...)
	b.setExpiry(v)
	b.warnLocked(v, v.today())
}

func (b *Broker) setExpiry(v *vault) {
	for _, e := range v.now.Load().ends {
		if e.at.IsZero() {
			b.m.certificates.DeleteLabelValues(v.listener.Name, e.file)
			continue
		}
		b.m.certificates.WithLabelValues(v.listener.Name, e.file).Set(float64(e.at.Unix()))
	}
}

// endInvalid ends the connections of a listener whose client certificate is not good any more. all:
// look at the CAs and CRLs, else only at the time.
func (b *Broker) endInvalid(v *vault, all bool) {
	m := v.now.Load()
	if m.roots == nil {
		return
	}
	now := v.today()
	var conns []*conn
	b.connMu.Lock()
	for c := range b.conns {
		if p := c.peer.Load(); p != nil && c.listener == v.listener && (all || now.After(p.until)) {
			conns = append(conns, c)
		}
	}
	b.connMu.Unlock()
	ended := 0
	for _, c := range conns {
		if c.recheckPeer(m, now) != nil {
			ended++
		}
	}
	if ended > 0 {
		b.log.Info("connections ended, their client certificates are not good any more", "listener", v.listener.Name, "connections", ended)
	}
}

// peer is the certificate that a client showed.
type peer struct {
	certs  []*x509.Certificate
	chains [][]*x509.Certificate
	until  time.Time
}

// checkPeer notes the client's certificate after the handshake.
func (c *conn) checkPeer(v *vault, s *tls.ConnectionState) error {
	if len(s.PeerCertificates) == 0 {
		return nil
	}
	c.peer.Store(&peer{certs: s.PeerCertificates, chains: s.VerifiedChains})
	// Only now: a reload before that has not seen the connection, one after it does.
	return c.recheckPeer(v.now.Load(), v.today())
}

func (c *conn) recheckPeer(m *material, now time.Time) error {
	p := c.peer.Load()
	until, err := m.verify(p.certs, p.chains, now)
	if err != nil {
		c.end(&ordered{mqtt.NotAuthorized, err.Error()})
		return err
	}
	if !until.Equal(p.until) {
		c.peer.CompareAndSwap(p, &peer{p.certs, p.chains, until})
	}
	return nil
}

// retryAfter is when files that could not be loaded are tried again although they are the same: it may
// have been for want of descriptors.
const retryAfter = time.Minute

// lookEvery is how often the files are looked at. A change counts when it is seen twice: the key
// may come a moment after its certificate.
var lookEvery = 2 * time.Second

// watchTLS reloads what has changed, ends who has expired, and warns of what will, until the broker stops.
func (b *Broker) watchTLS() {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-t.C:
		}
		for _, s := range b.sockets {
			if s.vault != nil {
				b.lookAt(s.vault)
			}
		}
	}
}

func (b *Broker) lookAt(v *vault) {
	v.mu.Lock()
	defer v.mu.Unlock()
	p := v.listener.TLS.look()
	switch {
	case p.equal(v.seen) && v.wrong != "" && !time.Now().Before(v.again):
		_ = b.reloadLocked(v)
	case p.equal(v.seen):
		v.fresh = p
	case !p.equal(v.fresh):
		v.fresh = p
	default:
		_ = b.reloadLocked(v) // which has told
	}
	b.endInvalid(v, false)
	b.warnLocked(v, v.today())
}

// warnAt are the times before an end at which the log tells of it.
var warnAt = []time.Duration{0, 24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour}

// warnLocked tells of what ends soon, or has: each time once.
func (b *Broker) warnLocked(v *vault, now time.Time) {
	for _, e := range v.now.Load().ends {
		if e.at.IsZero() {
			continue
		}
		left := e.at.Sub(now)
		i := slices.IndexFunc(warnAt, func(d time.Duration) bool { return left <= d })
		if i < 0 {
			continue
		}
		if last, told := v.told[e]; told && last <= warnAt[i] {
			continue
		}
		v.told[e] = warnAt[i]
		what := []any{"listener", v.listener.Name, "file", e.file, "path", e.path, "not_after", e.at.UTC().Format(time.RFC3339)}
		switch {
		case e.file == "crl" && left <= 0:
			b.log.Warn("revocation list is overdue: it still revokes what it lists; put a newer one in its place", what...)
		case left <= 0:
			b.log.Warn("certificate has expired: put a new one in its place", what...)
		default:
			b.log.Warn("certificate or revocation list ends soon: put a new one in its place", append(what, "hours_left", int(left.Hours()))...)
		}
	}
}
