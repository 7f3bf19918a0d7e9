package httpapi

import (
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// handler answers a call, or says why not.
type handler func(s *Server, c *call) error

// serve makes row's handler of http: it counts, logs, lets in who may, and survives what goes wrong.
func (s *Server) serve(row *route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		c := &call{w: &recorder{ResponseWriter: w, code: http.StatusOK}, r: r, row: row, object: objectOf(r)}
		c.w.hold = row.changes() // until it is in the audit log
		defer func() {
			if p := recover(); p != nil {
				s.panicked(c, p)
			}
			s.audited(c)
			c.w.release()
			s.finish(c, time.Since(began))
			if c.aborted {
				panic(http.ErrAbortHandler) // half an answer is out: the caller has to see that it is not whole
			}
		}()
		h := c.w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		err := s.admit(c)
		if err == nil {
			err = c.readQuery()
		}
		if err == nil {
			r.Body = http.MaxBytesReader(c.w, r.Body, row.maxBody())
			err = row.h(s, c)
		}
		if err != nil {
			s.refuse(c, err)
		}
	})
}

// objectOf is what the path names: "pump-7/c1".
func objectOf(r *http.Request) string {
	var parts []string
	for _, name := range []string{"id", "credential", "lane", "name"} {
		if v := r.PathValue(name); v != "" {
			parts = append(parts, v)
		}
	}
	return strings.Join(parts, "/")
}

func (s *Server) panicked(c *call, p any) {
	id := newID()
	s.log.Error("request panicked: please report this", "id", id, "route", c.row.name(), "panic", p, "stack", string(debug.Stack()))
	if c.w.hold {
		c.w.drop()
	}
	if c.w.wrote {
		c.aborted = true
		return
	}
	reply(c.w, http.StatusInternalServerError, Error{ErrorBody{
		codeInternal, "this is a defect of Holdfast, not your fault; the log of the gateway says more about failure " + id,
	}})
}

func (s *Server) finish(c *call, took time.Duration) {
	s.m.requests.WithLabelValues(c.row.path, strconv.Itoa(c.w.code)).Inc()
	if !c.row.stream && !c.row.bulk {
		s.m.seconds.WithLabelValues(c.row.path).Observe(took.Seconds())
	}
	switch {
	case c.row.bulk && c.role != 0 && c.w.code < http.StatusBadRequest:
		s.log.Info("handed out through the api", "who", c.who, "what", c.row.id, "object", c.object, "status", c.w.code, "whole", !c.aborted,
			"took_ms", took.Milliseconds(), "address", c.r.RemoteAddr)
	case c.row.changes() && c.role != 0:
		s.log.Info("changed through the api", "who", c.who, "what", c.row.id, "object", c.object, "status", c.w.code, "address", c.r.RemoteAddr)
	}
	if s.log.Enabled(c.r.Context(), slog.LevelDebug) {
		s.log.Debug("request", "method", c.r.Method, "path", c.r.URL.Path, "status", c.w.code, "took_ms", took.Milliseconds(),
			"who", c.who, "address", c.r.RemoteAddr)
	}
}

// admit lets the caller in or says why not. Whoever has a token may come from anywhere, under any name of this machine: no web
// page can make a browser send one. A browser sends the cookie of a session by itself, so changes need more than that (checkCSRF).
// Only what is shown without either is bound to this machine.
func (s *Server) admit(c *call) error {
	if c.row.who == 0 {
		return nil
	}
	token, shown := bearer(c.r)
	ss, role, signedIn := (*session)(nil), Role(0), false
	if !shown {
		ss, role, signedIn = s.sessions.find(c.r)
	}
	switch {
	case shown:
	case signedIn:
		c.who, c.role, c.session = ss.who, role, ss
		if err := s.allow(c); err != nil || !c.row.changes() {
			return err
		}
		return ss.checkCSRF(c.r.Header.Get(csrfHeader))
	case c.row.loopback && !loopbackPeer(c.r):
		return failf(codeUnauthorized, "without a token only this machine may look at this: make one with holdfast token add NAME --role viewer, and send it as Authorization: Bearer TOKEN")
	case c.row.loopback && !loopbackName(c.r.Host):
		return failf(codeHost, "ask for it as localhost or 127.0.0.1, or send a token as Authorization: Bearer TOKEN")
	case c.row.loopback:
		return nil
	case len(c.r.CookiesNamed(sessionCookie)) > 0:
		return failf(codeUnauthorized, "your session has ended: sign in again at /signin")
	default:
		return failf(codeUnauthorized, "a token is needed, as Authorization: Bearer TOKEN: on the gateway itself holdfast commands read DATA_DIR/admin.token; elsewhere, make one with holdfast token add NAME --role %s", c.row.who)
	}
	name, role, ok := s.p.Tokens.Check(token)
	if !ok {
		return s.wrongToken(c)
	}
	c.who, c.role, c.token = name, role, token
	return s.allow(c)
}

// allow lets in whose role is enough.
func (s *Server) allow(c *call) error {
	if c.role < c.row.who {
		c.w.Header().Set("WWW-Authenticate", `Bearer error="insufficient_scope"`)
		return failf(codeForbidden, "this needs a token with role %s; %q is %s: make one with holdfast token add NAME --role %s", c.row.who, c.who, c.role, c.row.who)
	}
	return nil
}

// still tells whether who was let in for an answer that does not end may still have it. To look on is to use a session.
func (s *Server) still(c *call) bool {
	role, ok := Role(0), false
	if c.session != nil {
		role, ok = s.sessions.use(c.session)
	} else {
		_, role, ok = s.p.Tokens.Check(c.token)
	}
	return ok && role >= c.row.who
}

// wrongToken counts attempts by address. A token has 256 random bits: nobody finds one by trying, at any speed. What
// the delay does is tell a program with an old token to slow down. So it holds for wrong tokens only: behind a proxy
// everybody has the same address, and one of them must not lock the others out.
func (s *Server) wrongToken(c *call) error {
	s.m.wrongTokens.Inc()
	wait, first := s.wrong.attempt(peer(c.r), time.Now())
	if first {
		s.log.Warn("many wrong tokens from one address", "address", peer(c.r))
		s.auditWrongTokens(c)
	}
	if wait > 0 {
		f := failf(codeTooManyAttempts, "too many wrong tokens from %s: wait %v, and look whether yours was removed or has expired", peer(c.r), wait)
		f.retry = int(wait.Seconds())
		return f
	}
	c.w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	return failf(codeUnauthorized, "token is not known, or has expired: on the gateway itself holdfast commands read DATA_DIR/admin.token; elsewhere, make one with holdfast token add NAME --role %s", max(c.row.who, Viewer))
}

// bearer gives the token of a request (RFC 6750 §2.1).
func bearer(r *http.Request) (token string, ok bool) {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return "", false
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return "", false
	}
	return strings.TrimSpace(token), true
}

// peer is whose attempts are counted together: an IPv4 address, or a network of IPv6, of which one machine has as many
// addresses as it likes.
func peer(r *http.Request) netip.Prefix {
	a, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	addr, bits := a.Addr().Unmap().WithZone(""), 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // bits fit
	return p
}

// loopbackPeer tells whether a program on this machine asks, for itself: one that hands on what
// others ask says so.
func loopbackPeer(r *http.Request) bool {
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Real-Ip"} {
		if r.Header.Get(h) != "" {
			return false
		}
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().Unmap().IsLoopback()
}

// loopbackName tells whether the name that was asked for is this machine's. A web page in a browser on this machine is
// a peer on loopback too: by a name of its own that it lets resolve to 127.0.0.1 it could read what it likes (DNS
// rebinding).
func loopbackName(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	if strings.EqualFold(name, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.Unmap().IsLoopback()
}
