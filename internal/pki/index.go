package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

const indexFile = "index.jsonl"

// Entry is one certificate that was issued, as a line of index.jsonl. A later line of the same serial replaces an earlier one.
type Entry struct {
	Kind        string    `json:"kind"` // ca, server, device
	Name        string    `json:"name"` // site, "server", device id
	Serial      string    `json:"serial"`
	Issuer      string    `json:"issuer"`      // key id of the authority that signed it, hex
	Fingerprint string    `json:"fingerprint"` // SHA-256 of the DER bytes, hex
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	RevokedAt   time.Time `json:"revoked_at,omitzero"`
}

// States of an Entry.
const (
	StateValid   = "valid"
	StateExpired = "expired"
	StateRevoked = "revoked"
)

// State says what the certificate is worth at a moment.
func (e *Entry) State(now time.Time) string {
	switch {
	case !e.RevokedAt.IsZero():
		return StateRevoked
	case now.After(e.NotAfter):
		return StateExpired
	}
	return StateValid
}

func entryOf(kind, name string, c *x509.Certificate) Entry {
	sum := sha256.Sum256(c.Raw)
	issuer := hex.EncodeToString(c.AuthorityKeyId)
	if kind == KindCA {
		issuer = keyID(c)
	}
	return Entry{
		Kind: kind, Name: name, Serial: serialText(c.SerialNumber), Issuer: issuer,
		Fingerprint: hex.EncodeToString(sum[:]), NotBefore: c.NotBefore, NotAfter: c.NotAfter,
	}
}

// List gives everything that was issued, in that order. ErrNoCA.
func (a *Authority) List() ([]Entry, error) {
	if _, err := os.Stat(a.Path("ca.crt")); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", a.dir, ErrNoCA)
	}
	return a.readIndex()
}

func (a *Authority) readIndex() ([]Entry, error) {
	data, err := os.ReadFile(a.Path(indexFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var entries []Entry
	at := map[string]int{}
	for n := 1; len(data) > 0; n++ {
		var line []byte
		var whole bool
		line, data, whole = bytes.Cut(data, []byte{'\n'})
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var e Entry
		if err := json.Unmarshal(line, &e); err != nil || e.Serial == "" {
			if !whole {
				break // a crash cut it: what it announced was never issued
			}
			return nil, fmt.Errorf("%s:%d: not an entry of the index", a.Path(indexFile), n)
		}
		if i, ok := at[e.Serial]; ok {
			entries[i] = e
			continue
		}
		at[e.Serial] = len(entries)
		entries = append(entries, e)
	}
	return slices.Clip(entries), nil
}

// appendIndex returns when the entries are on stable storage.
func (a *Authority) appendIndex(entries ...Entry) error {
	if len(entries) == 0 {
		return nil
	}
	file := a.Path(indexFile)
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := cutTornLine(f); err != nil {
		return err
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for i := range entries {
		if err := enc.Encode(&entries[i]); err != nil {
			return err
		}
	}
	if _, err := f.Write(b.Bytes()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return syncDir(a.dir)
}

// cutTornLine removes what a crash left of a line.
func cutTornLine(f *os.File) error {
	fi, err := f.Stat()
	if err != nil || fi.Size() == 0 {
		return err
	}
	data := make([]byte, fi.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return err
	}
	if data[len(data)-1] == '\n' {
		return nil
	}
	return f.Truncate(int64(bytes.LastIndexByte(data, '\n') + 1))
}
