package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// maxSecretBytes bounds certificates, keys and password files.
const maxSecretBytes = 1 << 20

// checkFiles looks at the files that a configuration names: there, readable, and what they should
// be. It never repeats the path of a password or key: people paste the secret itself there.
func (d *decoder) checkFiles(c *Config) {
	for i := range c.Listeners {
		l := &c.Listeners[i]
		path := fmt.Sprintf("listeners[%d].tls", i)
		d.keyPair(path, l.TLS.Cert, l.TLS.Key)
		d.authorities(path+".client_ca", l.TLS.ClientCA)
		d.revocations(path+".crl", l.TLS.CRL, l.TLS.ClientCA)
	}
	for i := range c.Upstreams {
		u := &c.Upstreams[i]
		path := fmt.Sprintf("upstreams[%d]", i)
		d.keyPair(path+".tls", u.TLS.Cert, u.TLS.Key)
		d.authorities(path+".tls.ca", u.TLS.CA)
		if u.PasswordFile == "" {
			continue
		}
		data, ok := d.secret(path+".password_file", u.PasswordFile)
		switch {
		case !ok:
		case strings.TrimRight(string(data), "\r\n") == "":
			d.problem(path+".password_file", "the file is empty: write the password into it")
		case strings.ContainsAny(strings.TrimRight(string(data), "\r\n"), "\r\n"):
			d.problem(path+".password_file", "the file has more than one line: write only the password into it")
		}
	}
	if fi, err := os.Stat(c.Gateway.DataDir); err == nil && !fi.IsDir() {
		d.problem("gateway.data_dir", "%sis a file, has to be a folder", show("", c.Gateway.DataDir))
	}
}

// read gives a file's bytes or reports why not; named tells whether its path may be repeated.
func (d *decoder) read(path, file string, named bool) ([]byte, bool) {
	what := "the file"
	if named && len(file) <= 256 {
		what = fmt.Sprintf("file %q", file)
	}
	fi, err := os.Stat(file)
	if err == nil && !fi.Mode().IsRegular() {
		d.problem(path, "%s is not a regular file", what)
		return nil, false
	}
	if err == nil && fi.Size() > maxSecretBytes {
		d.problem(path, "%s is larger than %s", what, formatSize(maxSecretBytes))
		return nil, false
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(file)
	}
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		hint := ""
		if !named {
			hint = "; write the path of a file, not what is in it"
		}
		d.problem(path, "%s cannot be read: %v (a relative path starts at the folder of this configuration%s)", what, err, hint)
		return nil, false
	}
	return data, true
}

// secret reads a file that only Holdfast should be able to read.
func (d *decoder) secret(path, file string) ([]byte, bool) {
	data, ok := d.read(path, file, false)
	if !ok {
		return nil, false
	}
	if fi, err := os.Stat(file); err == nil && fi.Mode().Perm()&0o007 != 0 {
		d.warn(path, "every user of this machine can use the file (mode %04o): chmod 600 it", fi.Mode().Perm())
	}
	return data, true
}

func (d *decoder) keyPair(path, certFile, keyFile string) {
	if certFile == "" || keyFile == "" {
		return
	}
	cert, ok := d.read(path+".cert", certFile, true)
	key, ok2 := d.secret(path+".key", keyFile)
	if !ok || !ok2 {
		return
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		d.problem(path+".cert", "certificate and key do not work together, files %q and %q: %s", certFile, keyFile, strings.TrimPrefix(err.Error(), "tls: "))
		return
	}
	if pair.Leaf == nil {
		return
	}
	switch now := time.Now(); {
	case now.After(pair.Leaf.NotAfter):
		d.warn(path+".cert", "the certificate ended on %s: peers that check will refuse it", pair.Leaf.NotAfter.Format(time.DateOnly))
	case now.Before(pair.Leaf.NotBefore):
		d.warn(path+".cert", "the certificate begins on %s, or this machine's clock is wrong", pair.Leaf.NotBefore.Format(time.DateOnly))
	case pair.Leaf.NotAfter.Sub(now) < 14*24*time.Hour:
		d.warn(path+".cert", "the certificate ends soon, on %s", pair.Leaf.NotAfter.Format(time.DateOnly))
	}
}

func (d *decoder) authorities(path, file string) {
	if file == "" {
		return
	}
	if data, ok := d.read(path, file, true); ok && !x509.NewCertPool().AppendCertsFromPEM(data) {
		d.problem(path, "file %q holds no certificate (PEM)", file)
	}
}

// revocations checks that a file holds lists of revoked certificates, and that the authorities made them. There are
// several while one authority replaces another.
func (d *decoder) revocations(path, file, caFile string) {
	if file == "" {
		return
	}
	data, ok := d.read(path, file, true)
	if !ok {
		return
	}
	ders := pemBlocks(data, "X509 CRL")
	if len(ders) == 0 {
		ders = [][]byte{data}
	}
	var authorities []*x509.Certificate
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return // told at client_ca
	}
	for _, der := range pemBlocks(ca, "CERTIFICATE") {
		if cert, err := x509.ParseCertificate(der); err == nil {
			authorities = append(authorities, cert)
		}
	}
	for _, der := range ders {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			d.problem(path, "file %q holds no list of revoked certificates (CRL, PEM or DER)", file)
			return
		}
		if !slices.ContainsFunc(authorities, func(c *x509.Certificate) bool { return list.CheckSignatureFrom(c) == nil }) {
			d.problem(path, "none of the certificates in client_ca has signed the list in file %q", file)
			return
		}
		if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
			d.warn(path, "the list was to be renewed by %s: what was revoked since is not in it; for one of holdfast cert: holdfast cert rotate crl",
				list.NextUpdate.Format(time.DateOnly))
		}
	}
}

// pemBlocks gives what the blocks of a kind hold.
func pemBlocks(data []byte, kind string) (ders [][]byte) {
	for len(data) > 0 {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type == kind {
			ders = append(ders, block.Bytes)
		}
	}
	return ders
}
