package gateway_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/kv"
)

// tokenSite is a store and a folder with tokens, whose clock the test holds.
type tokenSite struct {
	httpapi.Tokens
	t   *testing.T
	fs  *vfs.MemFS
	dir string
	now time.Time

	store *kv.Store
}

func newTokenSite(t *testing.T) *tokenSite {
	t.Helper()
	s := &tokenSite{t: t, fs: vfs.NewMem(), dir: t.TempDir(), now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	s.open()
	t.Cleanup(func() { s.store.Close() })
	return s
}

func (s *tokenSite) open() {
	s.t.Helper()
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.t.Fatal(err)
		}
	}
	var err error
	if s.store, err = kv.Open("store", kv.Options{FS: s.fs, Log: slog.New(slog.DiscardHandler)}); err != nil {
		s.t.Fatal(err)
	}
	if s.Tokens, err = gateway.OpenTokens(s.store, s.dir, func() time.Time { return s.now }); err != nil {
		s.t.Fatal(err)
	}
}

func (s *tokenSite) admin() string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "admin.token"))
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (s *tokenSite) want(secret, name string, role httpapi.Role) {
	s.t.Helper()
	if n, r, ok := s.Check(secret); n != name || r != role || ok != (role != 0) {
		s.t.Errorf("Check = %q, %v, %v; want %q, %v", n, r, ok, name, role)
	}
}

func TestAdminToken(t *testing.T) {
	s := newTokenSite(t)
	path := filepath.Join(s.dir, "admin.token")
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	first := s.admin()
	s.want(first, "admin.token", httpapi.Admin)
	s.want(first+"x", "", 0)
	s.want("", "", 0)
	s.open()
	if again := s.admin(); again != first {
		t.Error("another start made another token")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// What a start that was cut short left is not written into: others may have it open.
	if err := os.WriteFile(path+".new", []byte("x"), 0o666); err != nil {
		t.Fatal(err)
	}
	s.open()
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode of the second %v, %v", fi.Mode(), err)
	}
	s.want(first, "", 0)
	s.want(s.admin(), "admin.token", httpapi.Admin)

	for what, spoil := range map[string]func() error{
		"can be read by other users": func() error { return os.Chmod(path, 0o640) },
		"holds no token":             func() error { return errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, []byte("short"), 0o600)) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, err := gateway.OpenTokens(s.store, s.dir, time.Now); err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("opened with %v, want that it %s, and the way out", err, what)
		}
		if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, []byte(first), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTokens(t *testing.T) {
	s := newTokenSite(t)
	_, viewer, err := s.Add("ci", httpapi.Viewer, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	_, operator, err := s.Add("ward", httpapi.Operator, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{"ci": httpapi.ErrTokenExists, "admin.token": httpapi.ErrTokenExists} {
		if _, _, err := s.Add(name, httpapi.Admin, 0); !errors.Is(err, want) {
			t.Errorf("a second %s: %v", name, err)
		}
	}
	s.open()
	s.want(viewer, "ci", httpapi.Viewer)
	s.want(operator, "ward", httpapi.Operator)
	if l := s.List(); len(l) != 2 || l[0].Name != "ci" || !l[0].Expires.Equal(s.now.Add(time.Hour)) {
		t.Errorf("List = %+v", l)
	}
	s.now = s.now.Add(time.Hour + time.Second)
	s.want(viewer, "", 0)
	s.want(operator, "ward", httpapi.Operator)
	if err := s.Remove("ward"); err != nil {
		t.Fatal(err)
	}
	s.want(operator, "", 0)
	s.open()
	s.want(operator, "", 0)
	if err := s.Remove("ward"); !errors.Is(err, httpapi.ErrNoToken) {
		t.Errorf("removed twice: %v", err)
	}
	// The secret is nowhere in the store.
	err = s.store.Scan([]byte{kv.PrefixToken}, func(_, v []byte) error {
		if strings.Contains(string(v), viewer[4:]) {
			return errors.New("a secret is stored")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTokensAreBounded(t *testing.T) {
	s := newTokenSite(t)
	for n := range gateway.MaxTokens {
		if _, _, err := s.Add(fmt.Sprint("t", n), httpapi.Viewer, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := s.Add("one-more", httpapi.Viewer, 0); !errors.Is(err, httpapi.ErrTooManyTokens) {
		t.Errorf("one more: %v", err)
	}
}
