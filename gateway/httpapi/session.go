package httpapi

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// A browser shows its token once and gets a session for it, which ends by itself.
const (
	sessionCookie   = "holdfast_session"
	csrfHeader      = "X-Holdfast-CSRF"
	sessionIdle     = 15 * time.Minute // without a request, and with no stream open
	sessionLongest  = 12 * time.Hour
	sessionsOfToken = 16 // the one that was idle longest gives way
)

// session is a browser that showed a token. It lives in memory: a restart ends it.
type session struct {
	key   [sha256.Size]byte // of the id, which only the browser has: a table that is read somehow opens no door
	csrf  string            // what a page of ours can read and another site's cannot
	token string
	who   string // name of the token when it was shown
	began time.Time
	used  time.Time // under sessions.mu
}

// sessions are the open ones. Many goroutines may call the methods.
//
// A token that is revoked or expires takes its sessions along, because each request asks for it again.
type sessions struct {
	tokens Tokens

	mu   sync.Mutex
	open map[[sha256.Size]byte]*session // under mu; for each token at most sessionsOfToken
}

// random gives 256 random bits as text.
func random() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// begin opens a session for a token that was found good; id is what the browser shows from now on.
func (t *sessions) begin(token, who string) (id string, ss *session) {
	id = random()
	now := time.Now()
	ss = &session{key: sha256.Sum256([]byte(id)), csrf: random(), token: token, who: who, began: now, used: now}
	t.mu.Lock()
	defer t.mu.Unlock()
	var oldest *session
	n := 0
	for _, o := range t.open {
		switch {
		case o.over(now):
			delete(t.open, o.key)
		case o.who == who:
			n++
			if oldest == nil || o.used.Before(oldest.used) {
				oldest = o
			}
		}
	}
	if n >= sessionsOfToken {
		delete(t.open, oldest.key)
	}
	if t.open == nil {
		t.open = map[[sha256.Size]byte]*session{}
	}
	t.open[ss.key] = ss
	return id, ss
}

// over tells whether it has ended by itself. sessions.mu is held.
func (ss *session) over(now time.Time) bool {
	return now.Sub(ss.used) > sessionIdle || now.Sub(ss.began) > sessionLongest
}

// find gives the session that r shows, and notes that it is used.
func (t *sessions) find(r *http.Request) (ss *session, role Role, ok bool) {
	for _, c := range r.CookiesNamed(sessionCookie) { // other ports of this machine can set cookies of this name
		t.mu.Lock()
		ss = t.open[sha256.Sum256([]byte(c.Value))]
		t.mu.Unlock()
		if ss == nil {
			continue
		}
		if role, ok = t.use(ss); ok {
			return ss, role, true
		}
	}
	return nil, 0, false
}

// use notes that a session is used, and tells what it may; ok is false if it has ended.
func (t *sessions) use(ss *session) (role Role, ok bool) {
	now := time.Now()
	t.mu.Lock()
	ok = t.open[ss.key] == ss && !ss.over(now)
	if ok {
		ss.used = now
	}
	t.mu.Unlock()
	if ok {
		_, role, ok = t.tokens.Check(ss.token)
	}
	if !ok {
		t.end(ss)
	}
	return role, ok
}

func (t *sessions) end(ss *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open[ss.key] == ss {
		delete(t.open, ss.key)
	}
}

// checkCSRF wants what only a page of ours can know with each change that is asked for by cookie. SameSite alone does not
// help: for a browser another port of this machine is the same site.
func (ss *session) checkCSRF(shown string) error {
	if subtle.ConstantTimeCompare([]byte(shown), []byte(ss.csrf)) != 1 {
		return failf(codeCSRF, "a change that is asked for with a cookie needs the header %s with the token of the session: reload the page; programs send Authorization: Bearer TOKEN instead", csrfHeader)
	}
	return nil
}

// SignIn is the form of POST /signin.
type SignIn struct {
	Token string `json:"token" doc:"A token of this API."`
	Next  string `json:"next,omitempty" doc:"Where a browser is sent then: a path of this gateway, such as /devices."`
}

// SignOut is the form of POST /signout.
type SignOut struct {
	CSRF string `json:"csrf,omitempty" doc:"The token of the session, from pages that cannot send the header."`
}

// SignedIn answers POST /signin where no page was asked for.
type SignedIn struct {
	Name    string    `json:"name"` // of the token
	Role    Role      `json:"role"`
	CSRF    string    `json:"csrf" doc:"What to send as X-Holdfast-CSRF with each change."`
	Expires time.Time `json:"expires"` // at the latest
	IdleS   int       `json:"idle_s"`  // it ends when it is not used that long
}

// crossOrigin knows a request that another site's page makes.
var crossOrigin = http.NewCrossOriginProtection()

// wantsPage tells whether a form of a page sent r, so that a page has to follow.
func wantsPage(r *http.Request) bool { return strings.Contains(r.Header.Get("Accept"), "text/html") }

// localPath gives a path of this gateway, or "/".
func localPath(next string) string {
	u, err := url.Parse(next)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || !strings.HasPrefix(u.Path, "/") ||
		strings.HasPrefix(u.Path, "//") || strings.Contains(next, `\`) {
		return "/"
	}
	return u.RequestURI()
}

// secured tells whether what the browser speaks is TLS, to this server or to a proxy before it. Who lies about that gets a
// cookie that his own browser does not send.
func secured(r *http.Request) bool {
	return r.TLS != nil || strings.EqualFold(r.Header.Get("X-Forwarded-Proto"), "https")
}

func setCookie(c *call, value string, age int) {
	http.SetCookie(c.w, &http.Cookie{
		Name: sessionCookie, Value: value, Path: "/", MaxAge: age, HttpOnly: true, Secure: secured(c.r), SameSite: http.SameSiteStrictMode,
	})
}

// signIn is POST /signin.
func (s *Server) signIn(c *call) error {
	form, err := c.form("token", "next")
	if err != nil {
		return err
	}
	if err := crossOrigin.Check(c.r); err != nil { // else a page elsewhere could sign a browser in as somebody else
		return failf(codeCSRF, "sign in from a page of this gateway, not of another site: %v", err)
	}
	token, next := strings.TrimSpace(form.Get("token")), localPath(cmp.Or(form.Get("next"), "/"))
	name, role, ok := s.p.Tokens.Check(token)
	if !ok {
		return s.refuseSignIn(c, s.wrongToken(c), next)
	}
	if old, _, ok := s.sessions.find(c.r); ok { // this browser's: nobody goes on in a session that another began
		s.sessions.end(old)
	}
	c.who, c.role = name, role
	id, ss := s.sessions.begin(token, name)
	setCookie(c, id, 0) // it goes with the browser
	if wantsPage(c.r) {
		return c.redirect(next)
	}
	return c.reply(http.StatusOK, SignedIn{
		Name: name, Role: role, CSRF: ss.csrf, Expires: ss.began.Add(sessionLongest).UTC(), IdleS: int(sessionIdle.Seconds()),
	})
}

// refuseSignIn sends a browser back to its form, which says why: error is wrong_token or too_many_attempts, wait is in seconds.
func (s *Server) refuseSignIn(c *call, err error, next string) error {
	f, ok := asFailure(err)
	if !ok || !wantsPage(c.r) {
		return err
	}
	q := url.Values{"error": {"wrong_token"}}
	if f.code == codeTooManyAttempts {
		q.Set("error", codeTooManyAttempts)
		q.Set("wait", fmt.Sprint(f.retry))
	}
	if next != "/" {
		q.Set("next", next)
	}
	return c.redirect("/signin?" + q.Encode())
}

// signOut is POST /signout. Who has no session is signed out already.
func (s *Server) signOut(c *call) error {
	form, err := c.form("csrf")
	if err != nil {
		return err
	}
	if ss, role, ok := s.sessions.find(c.r); ok {
		if err := ss.checkCSRF(cmp.Or(c.r.Header.Get(csrfHeader), form.Get("csrf"))); err != nil {
			return err
		}
		c.who, c.role = ss.who, role
		s.sessions.end(ss)
	}
	setCookie(c, "", -1)
	if wantsPage(c.r) {
		return c.redirect("/signin")
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

// redirect has a browser ask for a page.
func (c *call) redirect(to string) error {
	c.w.Header().Set("Location", to)
	c.w.WriteHeader(http.StatusSeeOther)
	return nil
}

// form reads a body of a form, in which only the fields may be, each once.
func (c *call) form(fields ...string) (url.Values, error) {
	b, _, err := c.body(true, typeForm)
	if err != nil {
		return nil, err
	}
	form, err := url.ParseQuery(string(b))
	if err != nil {
		return nil, failf(codeBadBody, "body: %v", err)
	}
	for name, values := range form {
		known := false
		for _, f := range fields {
			known = known || f == name
		}
		if !known || len(values) != 1 {
			return nil, failf(codeBadBody, "body: there is one each of %s in this form, and not %.64q", strings.Join(fields, ", "), name)
		}
	}
	return form, nil
}
