package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/gateway/httpapi"
)

func TestAddressesThatPeopleWrite(t *testing.T) {
	for address, want := range map[string]struct {
		base  string
		local bool
	}{
		"127.0.0.1:8080":               {"http://127.0.0.1:8080", true},
		"localhost:8080":               {"http://localhost:8080", true},
		"0.0.0.0:8080":                 {"http://127.0.0.1:8080", true},
		":8080":                        {"http://127.0.0.1:8080", true},
		"[::]:8080":                    {"http://127.0.0.1:8080", true},
		"[::1]:8080":                   {"http://[::1]:8080", true},
		"gw.example:8080":              {"http://gw.example:8080", false},
		"http://127.0.0.1:8080":        {"http://127.0.0.1:8080", true},
		"https://gw.example":           {"https://gw.example", false},
		"https://gw.example/":          {"https://gw.example", false},
		"https://gw.example:8443":      {"https://gw.example:8443", false},
		"https://gw.example/plant/one": {"https://gw.example/plant/one", false},
	} {
		base, local, err := apiBase(address)
		if err != nil || base != want.base || local != want.local {
			t.Errorf("%s: %s, local %v, %v; want %+v", address, base, local, err, want)
		}
	}
	for _, address := range []string{"127.0.0.1", "ftp://h:1", "http://u:p@h", "https://h/?a=b", "a b"} {
		var usage usageError
		if _, _, err := apiBase(address); !errors.As(err, &usage) {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// Where the token comes from, and that it is not shown to strangers.
func TestWhichTokenIsShown(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write := func(file, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("holdfast-data/admin.token", "of-the-default\n")
	write("gwdata/admin.token", "of-the-config\n")
	write("own", "of-the-file")
	write("bad", "two\nlines")
	write("g.yaml", "gateway: { id: g, data_dir: gwdata }\n")
	write("empty.yaml", "gateway: { id: g, data_dir: nowhere }\n")
	for name, tc := range map[string]struct {
		flags apiFlags
		env   string
		token string
		err   string
	}{
		"nothing said":          {apiFlags{}, "", "of-the-default", ""},
		"config":                {apiFlags{config: "g.yaml"}, "", "of-the-config", ""},
		"environment first":     {apiFlags{config: "g.yaml"}, "of-the-env", "of-the-env", ""},
		"file before all":       {apiFlags{config: "g.yaml", tokenFile: "own"}, "of-the-env", "of-the-file", ""},
		"address here":          {apiFlags{address: "127.0.0.1:9999"}, "", "of-the-default", ""},
		"address elsewhere":     {apiFlags{address: "gw.example:8080"}, "", "", ""},
		"elsewhere, but meant":  {apiFlags{address: "gw.example:8080"}, "of-the-env", "of-the-env", ""},
		"none there":            {apiFlags{config: "empty.yaml"}, "", "", ""},
		"file is not there":     {apiFlags{tokenFile: "none"}, "", "", "none cannot be read: no such file"},
		"file is no token":      {apiFlags{tokenFile: "bad"}, "", "", "bad does not hold a token"},
		"environment is no one": {apiFlags{}, "a b", "", "HOLDFAST_TOKEN holds is not a token"},
		"both":                  {apiFlags{config: "g.yaml", address: "h:1"}, "", "", "exclude each other"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(tokenVariable, tc.env)
			c, err := tc.flags.client()
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error = %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil || c.token != tc.token {
				t.Errorf("token %q, %v; want %q", c.token, err, tc.token)
			}
		})
	}
}

func TestErrorsNameTheWayOut(t *testing.T) {
	f := newFakeGateway(t)
	t.Chdir(t.TempDir())
	wrong := filepath.Join(t.TempDir(), "wrong")
	if err := os.WriteFile(wrong, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := runIt(t.Context(), "device", "list", "--address", f.address())
	for _, want := range []string{"a token is needed", "no token was shown (holdfast-data/admin.token cannot be read: no such file", "run this as the gateway's user, or pass --token-file or HOLDFAST_TOKEN"} {
		if got.code != 1 || !strings.Contains(got.stderr, want) {
			t.Errorf("without a token: exit %d, %s\nwant %s", got.code, got.stderr, want)
		}
	}
	got = runIt(t.Context(), "device", "list", "--address", f.address(), "--token-file", wrong)
	if want := "the token of " + wrong + " was shown: the gateway does not know it"; got.code != 1 || !strings.Contains(got.stderr, want) {
		t.Errorf("with a wrong one: exit %d, %s", got.code, got.stderr)
	}
	f.spoil = func(w http.ResponseWriter, _ *http.Request) bool {
		fakeFail(w, http.StatusForbidden, "forbidden", "this needs the role admin, the token has viewer")
		return true
	}
	got = f.ask(t, "device", "remove", "d")
	if got.code != 1 || !strings.Contains(got.stderr, "this needs the role admin") || !strings.Contains(got.stderr, "pass one of a higher role with --token-file") {
		t.Errorf("forbidden: exit %d, %s", got.code, got.stderr)
	}
	f.spoil = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusTeapot)
		return true
	}
	if got = f.ask(t, "status"); got.code != 1 || !strings.Contains(got.stderr, "418 I'm a teapot: is that a holdfast?") {
		t.Errorf("something else: exit %d, %s", got.code, got.stderr)
	}
	f.Server.Close()
	if got = f.ask(t, "device", "list"); got.code != 1 || !strings.Contains(got.stderr, "no gateway answers at "+f.address()+": start one with holdfast run, or say where it is") {
		t.Errorf("nobody: exit %d, %s", got.code, got.stderr)
	}
}

// A token is for whom it is meant, not for whom that one names.
func TestRedirectsAreNotFollowed(t *testing.T) {
	f := newFakeGateway(t)
	other := newFakeGateway(t)
	f.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusFound)
		return true
	}
	got := f.ask(t, "device", "list")
	if got.code != 1 || !strings.Contains(got.stderr, "sends on to") || other.called("") != 0 {
		t.Errorf("exit %d, %s; the other was asked %d times", got.code, got.stderr, other.called(""))
	}
}

func TestAStreamThatEndsIsTakenUpAgainWhereItWas(t *testing.T) {
	f := newFakeGateway(t)
	api := apiFlags{address: f.address(), tokenFile: f.tokenFile(t)}
	c, err := api.client()
	if err != nil {
		t.Fatal(err)
	}
	say := func(n int) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.tell(httpapi.Event{Kind: httpapi.KindRefusal, At: fakeBegin.Add(time.Duration(n) * time.Second)})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var got []int
	opened, lost := 0, 0
	err = c.follow(ctx, nil,
		func() {
			if opened++; opened == 1 {
				say(1)
			}
		},
		func(error) {
			lost++
			say(3) // while nobody listens
		},
		func(ev httpapi.Event) error {
			got = append(got, int(ev.At.Sub(fakeBegin)/time.Second))
			switch len(got) {
			case 1:
				say(2)
			case 2:
				f.cutStreams()
			case 3:
				return errEnded
			}
			return nil
		})
	if !errors.Is(err, errEnded) || len(got) != 3 || got[0] != 1 || got[1] != 2 || got[2] != 3 || opened != 2 || lost != 1 {
		t.Errorf("events %v, opened %d, lost %d, %v", got, opened, lost, err)
	}
}
