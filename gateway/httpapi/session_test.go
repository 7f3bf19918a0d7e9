package httpapi_test

import (
	"bufio"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestACookieIsOnlyTheBrowsers(t *testing.T) {
	r := newRig(t)
	in := r.signIn("operator")
	c := in.set
	if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Secure || c.MaxAge != 0 || len(c.Value) != 43 {
		t.Errorf("cookie over plain HTTP: %v", c)
	}
	if c = r.signIn("operator", header("X-Forwarded-Proto", "https")).set; !c.Secure {
		t.Errorf("cookie behind a proxy with TLS: %v", c)
	}
	if in.Name != "the-operator" || in.Role.String() != "operator" || len(in.CSRF) != 43 || in.CSRF == c.Value {
		t.Errorf("signed in: %+v", in.SignedIn)
	}
	for _, secret := range []string{c.Value, in.CSRF} {
		if strings.Contains(r.log.String(), secret) {
			t.Error("a secret of the session is in the log")
		}
	}
}

// TestChangesByCookieNeedTheTokenOfTheSession: another site, or another port of this machine, can make a browser send its
// cookie, but cannot know the rest.
func TestChangesByCookieNeedTheTokenOfTheSession(t *testing.T) {
	r := newRig(t)
	in, other := r.signIn("operator"), r.signIn("operator")
	change := func(options ...option) *answered {
		return r.ask("PATCH", "/api/v1/devices/pump", append([]option{nobody, body(`{"enabled":false}`)}, options...)...)
	}
	for name, options := range map[string][]option{
		"none":             {in.cookie},
		"empty":            {in.cookie, header("X-Holdfast-CSRF", "")},
		"of another":       {in.cookie, other.csrf},
		"without a cookie": {in.csrf},
	} {
		a := change(options...)
		if want := map[bool]string{true: "unauthorized", false: "csrf_token"}[name == "without a cookie"]; a.code() != want {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	if !r.registry.known["pump"].Enabled {
		t.Fatal("it was changed all the same")
	}
	if a := change(in.cookie, in.csrf); a.status != 200 {
		t.Errorf("with both: %d %s", a.status, a.body)
	}
	if a := r.ask("GET", "/api/v1/status", nobody, in.cookie); a.status != 200 {
		t.Errorf("to read needs the cookie only: %d %s", a.status, a.body)
	}
	if a := change(as("operator"), in.cookie); a.status != 200 {
		t.Errorf("a bearer token needs nothing more: %d %s", a.status, a.body)
	}
	if a := r.ask("GET", "/api/v1/status", as("wrong"), in.cookie); a.code() != "unauthorized" {
		t.Errorf("a wrong token beside a good cookie: %d", a.status)
	}
}

func TestSessionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		let := func(in signedIn) bool { return r.ask("GET", "/api/v1/status", nobody, in.cookie).status == 200 }
		wait := func(d time.Duration) { time.Sleep(d) } //nolint:forbidigo // in a bubble

		idle := r.signIn("viewer")
		wait(15 * time.Minute)
		if !let(idle) {
			t.Error("it ended early")
		}
		wait(15*time.Minute + time.Second)
		if let(idle) {
			t.Error("a session that nobody used goes on")
		}
		if a := r.ask("GET", "/api/v1/status", nobody, idle.cookie); !strings.Contains(a.message(), "/signin") {
			t.Errorf("the way out: %s", a.body)
		}

		long := r.signIn("viewer")
		began := time.Now()
		for time.Since(began) < 12*time.Hour {
			if !let(long) {
				t.Fatalf("it ended after %v", time.Since(began))
			}
			wait(10 * time.Minute)
		}
		wait(time.Second)
		if let(long) {
			t.Error("it goes on for ever if only it is used")
		}

		revoked := r.signIn("operator")
		if err := r.tokens.Remove("the-operator"); err != nil {
			t.Fatal(err)
		}
		if let(revoked) {
			t.Error("its token was revoked")
		}

		out := r.signIn("viewer")
		if a := r.ask("POST", "/signout", nobody, out.cookie, form("csrf="+out.CSRF)); a.status != 204 || !strings.Contains(a.header.Get("Set-Cookie"), "Max-Age=0") {
			t.Errorf("signed out: %d %v", a.status, a.header)
		}
		if let(out) {
			t.Error("it was signed out")
		}
		again := r.signIn("viewer")
		if next := r.signIn("viewer", again.cookie); let(again) || !let(next) {
			t.Error("who signs in again goes on in another session, and the old one ends")
		}
	})
}

// TestSessionsOfATokenAreBounded: whoever has one token keeps out nobody else's browsers.
func TestSessionsOfATokenAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		admin := r.signIn("admin")
		first := r.signIn("viewer")
		for range 16 {
			time.Sleep(time.Second) //nolint:forbidigo // in a bubble
			r.signIn("viewer")
		}
		if a := r.ask("GET", "/api/v1/status", nobody, first.cookie); a.status != 401 {
			t.Errorf("the oldest of 17: %d", a.status)
		}
		if a := r.ask("GET", "/api/v1/status", nobody, admin.cookie); a.status != 200 {
			t.Errorf("of another token: %d", a.status)
		}
	})
}

func TestABrowserIsSentOn(t *testing.T) {
	r := newRig(t)
	to := func(f string, options ...option) string {
		a := r.ask("POST", "/signin", append([]option{nobody, form(f), html}, options...)...)
		if a.status != http.StatusSeeOther || len(a.body) > 0 {
			t.Errorf("%s = %d %s", f, a.status, a.body)
		}
		return a.header.Get("Location")
	}
	for f, want := range map[string]string{
		"token=viewer": "/",
		"token=viewer&next=/devices?search=a%26page=2": "/devices?search=a&page=2",
		"token=viewer&next=https://evil.example.com/":  "/",
		"token=viewer&next=//evil.example.com":         "/",
		"token=viewer&next=/%5cevil.example.com":       "/",
		"token=viewer&next=/%2f/evil":                  "/",
		"token=viewer&next=devices":                    "/",
		"token=viewer&next=javascript:alert(1)":        "/",
		"token=viewer&next=/%0d%0aSet-Cookie:%20a=b":   "/",
	} {
		if got := to(f); got != want {
			t.Errorf("%s goes on to %q, want %q", f, got, want)
		}
	}
	if got := to("token=wrong&next=/devices"); got != "/signin?error=wrong_token&next=%2Fdevices" {
		t.Errorf("a wrong token goes on to %q", got)
	}
	if got := to(""); got != "/signin?error=wrong_token" {
		t.Errorf("no token: %q, want the same answer", got)
	}
	for range 5 {
		to("token=wrong")
	}
	if got := to("token=wrong"); got != "/signin?error=too_many_attempts&wait=1" {
		t.Errorf("many wrong tokens: %q", got)
	}
	if got := to("token=viewer"); got != "/" {
		t.Errorf("a right token after many wrong ones: %q", got)
	}
}

// TestAnotherSiteSignsNobodyIn: a page elsewhere must not put a browser into a session of its own.
func TestAnotherSiteSignsNobodyIn(t *testing.T) {
	r := newRig(t)
	for _, o := range []option{header("Sec-Fetch-Site", "same-site"), header("Origin", "http://127.0.0.1:9999"), header("Origin", "null")} {
		if a := r.ask("POST", "/signin", form("token=viewer"), o); a.code() != "csrf_token" || a.header.Get("Set-Cookie") != "" {
			t.Errorf("%d %s %v", a.status, a.body, a.header)
		}
	}
	if a := r.ask("POST", "/signin", form("token=viewer"), header("Origin", "http://127.0.0.1:8080")); a.status != 200 {
		t.Errorf("from its own page: %d %s", a.status, a.body)
	}
}

// TestStreamsOfASession: to look on keeps it, and its end ends the stream.
func TestStreamsOfASession(t *testing.T) {
	inBubble(t, 0, func(t *testing.T, l *live) {
		in := l.signIn("viewer")
		resp := l.do("GET", "/api/v1/events", "", nobody, in.cookie)
		s := &stream{l: l, resp: resp, b: bufio.NewReader(resp.Body)}
		defer s.close()
		for began := time.Now(); time.Since(began) < 20*time.Minute; {
			if _, err := s.block(); err != nil {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
		}
		if a := l.ask("GET", "/api/v1/status", nobody, in.cookie); a.status != 200 {
			t.Errorf("its session is over: %d", a.status)
		}
		l.ask("POST", "/signout", nobody, in.cookie, in.csrf)
		began := time.Now()
		for {
			if _, err := s.block(); err != nil {
				break
			}
		}
		if d := time.Since(began); d > 15*time.Second {
			t.Errorf("the stream went on for %v", d)
		}
	})
}
