package httpapi_test

import (
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// TestPagesWantASession: whoever has none is sent to sign in, and back.
func TestPagesWantASession(t *testing.T) {
	r := newRig(t)
	for path, to := range map[string]string{
		"/": "/signin", "/devices": "/signin?next=%2Fdevices", "/devices/pump-7": "/signin?next=%2Fdevices%2Fpump-7", "/commands": "/signin?next=%2Fcommands",
		"/messages": "/signin?next=%2Fmessages", "/live": "/signin?next=%2Flive", "/alarms": "/signin?next=%2Falarms", "/parked": "/signin?next=%2Fparked",
	} {
		a := r.ask("GET", path, nobody, html)
		if a.status != http.StatusSeeOther || a.header.Get("Location") != to {
			t.Errorf("%s: %d to %q", path, a.status, a.header.Get("Location"))
		}
	}
	if a := r.ask("GET", "/devices", as("admin"), html); a.status != http.StatusSeeOther {
		t.Errorf("a bearer token is for programs: %d", a.status)
	}
	in := r.signIn("viewer")
	if a := r.ask("GET", "/signin?next=/commands", nobody, in.cookie, html); a.header.Get("Location") != "/commands" {
		t.Errorf("who is signed in goes on: %d %q", a.status, a.header.Get("Location"))
	}
	for _, evil := range []string{"https://example.com/", "//example.com", `/\example.com`, "javascript:alert(1)"} {
		if a := r.ask("GET", "/signin?next="+evil, nobody, in.cookie, html); a.header.Get("Location") != "/" {
			t.Errorf("next=%s leads to %q", evil, a.header.Get("Location"))
		}
	}
}

// TestPagesHoldNothingButAFrame: no script and no style in them, nothing of anybody else's, and no button that the role may not press.
func TestPagesHoldNothingButAFrame(t *testing.T) {
	inline := regexp.MustCompile(`(?i)<script[^>]*>[^<]|<style|\sstyle=|\son[a-z]+=|https?://`)
	r := newRig(t)
	for _, role := range []string{"viewer", "operator", "admin"} {
		in := r.signIn(role)
		for _, path := range []string{"/", "/devices", "/devices/pump-7", "/commands", "/messages", "/live", "/parked", "/alarms"} {
			a := r.ask("GET", path, nobody, in.cookie, html)
			if a.status != 200 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") || a.header.Get("Cache-Control") != "no-store" {
				t.Fatalf("%s as %s: %d %v", path, role, a.status, a.header)
			}
			csp := a.header.Get("Content-Security-Policy")
			for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'self'", "base-uri 'none'"} {
				if !strings.Contains(csp, want) {
					t.Errorf("%s: policy %q", path, csp)
				}
			}
			page := string(a.body)
			if at := inline.FindString(page); at != "" {
				t.Errorf("%s has %q", path, at)
			}
			if !strings.Contains(page, `content="`+in.CSRF+`"`) || strings.Contains(page, in.set.Value) {
				t.Errorf("%s: tokens in the page are not as they should be", path)
			}
			for id, least := range map[string]string{`id="send"`: "operator", `id="enable"`: "operator", `id="rotate"`: "admin", `id="add"`: "admin"} {
				at := "/devices/pump-7"
				if id == `id="add"` {
					at = "/devices"
				}
				want := path == at && (role == "admin" || role == least)
				if has := strings.Contains(page, id); has != want {
					t.Errorf("%s as %s: %s is there: %v", path, role, id, has)
				}
			}
		}
	}
	if a := r.ask("GET", "/devices/%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E", nobody, r.signIn("viewer").cookie, html); strings.Contains(string(a.body), "<script>alert") {
		t.Errorf("a path gets into the page: %s", a.body)
	}
}

// TestFirstLoadIsSmall adds up what a browser fetches for the overview.
func TestFirstLoadIsSmall(t *testing.T) {
	r := newRig(t)
	page := r.ask("GET", "/", nobody, r.signIn("viewer").cookie, html)
	total := len(page.body)
	assets := regexp.MustCompile(`(?:href|src)="(/ui/[^"]+)"`).FindAllStringSubmatch(string(page.body), -1)
	if len(assets) != 5 {
		t.Fatalf("assets %v", assets)
	}
	for _, m := range assets {
		a := r.ask("GET", m[1], nobody, header("Accept-Encoding", "gzip"))
		if a.status != 200 || a.header.Get("Content-Encoding") != "gzip" || !strings.Contains(a.header.Get("Cache-Control"), "immutable") {
			t.Errorf("%s: %d %v", m[1], a.status, a.header)
		}
		total += len(a.body)
		if plain := r.ask("GET", m[1], nobody); plain.header.Get("Content-Encoding") != "" || len(plain.body) <= len(a.body) {
			t.Errorf("%s without gzip: %v", m[1], plain.header)
		}
	}
	if total > 150<<10 {
		t.Errorf("the first load is %d bytes", total)
	}
	if a := r.ask("GET", "/ui/app-000000000000.js", nobody); a.status != 404 {
		t.Errorf("an old asset: %d", a.status)
	}
	t.Logf("first load: %d bytes", total)
}

func TestSignInSaysWhatWasWrong(t *testing.T) {
	r := newRig(t)
	for query, want := range map[string]string{
		"": "", "?error=wrong_token": "not known, or has expired", "?error=too_many_attempts&wait=7": "Try again in 7 s", "?next=/parked": `value="/parked"`,
	} {
		a := r.ask("GET", "/signin"+query, nobody, html)
		if a.status != 200 || !strings.Contains(string(a.body), want) || strings.Contains(string(a.body), "<script") {
			t.Errorf("%q: %d %s", query, a.status, a.body)
		}
	}
}
