package gateway

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/gateway/httpapi"
	"holdfast/internal/kv"
)

// adminFile holds the token that the command line on the same box reads by itself.
const adminFile = "admin.token"

// adminName is who the audit says it was.
const adminName = "admin.token"

// maxTokens bounds what is kept and looked through.
const maxTokens = 1000

// tokens are the bearer tokens of the HTTP API. A token is 256 random bits, so its SHA-256 is stored and nothing slower
// is needed: nobody can try them all. It implements httpapi.Tokens.
//
//	token  't' name -> 1 | JSON tokenRow
type tokens struct {
	store *kv.Store
	now   func() time.Time

	writing sync.Mutex // makes changes one after the other; held while waiting for the store
	mu      sync.RWMutex
	admin   [sha256.Size]byte
	rows    map[string]tokenRow
	byHash  map[[sha256.Size]byte]string
}

type tokenRow struct {
	Hash    []byte       `json:"hash"`
	Role    httpapi.Role `json:"role"`
	Created time.Time    `json:"created"`
	Expires time.Time    `json:"expires,omitzero"`
}

const tokenRowV1 = 1

func tokenKey(name string) []byte { return append([]byte{kv.PrefixToken}, name...) }

// newSecret makes a token.
func newSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return "hfa_" + base64.RawURLEncoding.EncodeToString(b[:])
}

// openTokens reads the tokens, and makes the administrator's if dir has none: the first start does, and whoever removes
// the file has the next start make another one.
func openTokens(store *kv.Store, dir string, now func() time.Time) (t *tokens, err error) {
	t = &tokens{store: store, now: now, rows: map[string]tokenRow{}, byHash: map[[sha256.Size]byte]string{}}
	path := filepath.Join(dir, adminFile)
	secret, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		secret = []byte(newSecret())
		if err := writeSecret(path, secret); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, fmt.Errorf("admin token: %w", err)
	}
	if fi, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("admin token: %w", err)
	} else if openToOthers(fi) {
		return nil, fmt.Errorf("admin token %s can be read by other users (mode %04o): remove the file, and the next start makes a new one; "+
			"or chmod 600 it if nobody has read it", path, fi.Mode().Perm())
	}
	text := strings.TrimSpace(string(secret))
	if len(text) < 32 {
		return nil, fmt.Errorf("admin token %s holds no token: remove the file, and the next start makes a new one", path)
	}
	t.admin = sha256.Sum256([]byte(text))
	err = store.Scan([]byte{kv.PrefixToken}, func(k, v []byte) error {
		var row tokenRow
		if len(v) == 0 || v[0] != tokenRowV1 {
			return nil // a newer version's: it lets nobody in here
		}
		if err := json.Unmarshal(v[1:], &row); err != nil || len(row.Hash) != sha256.Size {
			return nil // damaged: likewise
		}
		t.put(string(k[1:]), row)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// writeSecret makes a file that only its owner can read, whole or not at all.
func writeSecret(path string, secret []byte) error {
	tmp := path + ".new"
	_ = os.Remove(tmp) // of a start that did not come to its end; its mode is not ours to trust
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("make admin token: %w", err)
	}
	_, err = f.Write(append(secret, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("make admin token: %w", err)
	}
	return nil
}

func (t *tokens) put(name string, row tokenRow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows[name] = row
	t.byHash[[sha256.Size]byte(row.Hash)] = name
}

// Check implements httpapi.Tokens. A look-up by hash tells an attacker by its time at most something of hashes.
func (t *tokens) Check(token string) (name string, role httpapi.Role, ok bool) {
	h := sha256.Sum256([]byte(token))
	t.mu.RLock()
	defer t.mu.RUnlock()
	if h == t.admin {
		return adminName, httpapi.Admin, true
	}
	name, ok = t.byHash[h]
	if !ok {
		return "", 0, false
	}
	row := t.rows[name]
	if !row.Expires.IsZero() && t.now().After(row.Expires) {
		return "", 0, false
	}
	return name, row.Role, true
}

// List implements httpapi.Tokens.
func (t *tokens) List() []httpapi.Token {
	t.mu.RLock()
	defer t.mu.RUnlock()
	all := make([]httpapi.Token, 0, len(t.rows))
	for name, row := range t.rows {
		all = append(all, row.shown(name))
	}
	slices.SortFunc(all, func(a, b httpapi.Token) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func (r *tokenRow) shown(name string) httpapi.Token {
	return httpapi.Token{Name: name, Role: r.Role, Created: r.Created, Expires: r.Expires}
}

// Add implements httpapi.Tokens.
func (t *tokens) Add(name string, role httpapi.Role, lifetime time.Duration) (httpapi.Token, string, error) {
	t.writing.Lock()
	defer t.writing.Unlock()
	t.mu.RLock()
	_, exists := t.rows[name]
	n := len(t.rows)
	t.mu.RUnlock()
	switch {
	case exists || name == adminName:
		return httpapi.Token{}, "", fmt.Errorf("token %q: %w", name, httpapi.ErrTokenExists)
	case n >= maxTokens:
		return httpapi.Token{}, "", fmt.Errorf("%w: there are %d, as many as are kept: remove some", httpapi.ErrTooManyTokens, n)
	}
	secret := newSecret()
	h := sha256.Sum256([]byte(secret))
	now := t.now().UTC().Truncate(time.Millisecond)
	row := tokenRow{Hash: h[:], Role: role, Created: now}
	if lifetime > 0 {
		row.Expires = now.Add(lifetime)
	}
	b, err := json.Marshal(row)
	if err != nil {
		return httpapi.Token{}, "", err
	}
	if err := t.store.ApplyWait([]kv.Op{{Key: tokenKey(name), Value: append([]byte{tokenRowV1}, b...)}}); err != nil {
		return httpapi.Token{}, "", err
	}
	t.put(name, row)
	return row.shown(name), secret, nil
}

// Remove implements httpapi.Tokens.
func (t *tokens) Remove(name string) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	t.mu.RLock()
	row, ok := t.rows[name]
	t.mu.RUnlock()
	if !ok {
		return fmt.Errorf("token %q: %w", name, httpapi.ErrNoToken)
	}
	if err := t.store.ApplyWait([]kv.Op{{Key: tokenKey(name), Delete: true}}); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.rows, name)
	delete(t.byHash, [sha256.Size]byte(row.Hash))
	return nil
}
