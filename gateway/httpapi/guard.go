package httpapi

import (
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// guard lets a request through to h if the caller may, and counts it.
func (s *Server) guard(route string, who access, h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &recorder{ResponseWriter: w, code: http.StatusOK}
		defer func() { s.m.requests.WithLabelValues(route, strconv.Itoa(rec.code)).Inc() }()
		hd := rec.Header()
		hd.Set("Cache-Control", "no-store")
		hd.Set("X-Content-Type-Options", "nosniff")
		hd.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		r.Body = http.MaxBytesReader(rec, r.Body, maxBody)
		if who == viewer && !mayView(rec, r) {
			return
		}
		h(rec, r)
	})
}

// mayView answers those who may not look. A web page in a browser on this machine is a peer on
// loopback too: by a name of its own that it lets resolve to 127.0.0.1 it could read what it likes
// (DNS rebinding), so the name that was asked for has to be this machine's.
func mayView(w http.ResponseWriter, r *http.Request) bool {
	switch {
	case !loopbackPeer(r):
		fail(w, http.StatusForbidden, "forbidden",
			"only this machine may look at this: ask from the gateway itself, or through a tunnel such as ssh -L 8080:"+loopbackHint(r))
	case !loopbackName(r.Host):
		fail(w, http.StatusForbidden, "host_not_allowed", "ask for it as localhost or 127.0.0.1")
	default:
		return true
	}
	return false
}

func loopbackHint(r *http.Request) string {
	port := "8080"
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if _, p, err := net.SplitHostPort(a.String()); err == nil {
			port = p
		}
	}
	return "127.0.0.1:" + port
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

// recorder notes the status that was answered.
type recorder struct {
	http.ResponseWriter
	code  int
	wrote bool
}

func (r *recorder) WriteHeader(code int) {
	if !r.wrote {
		r.code, r.wrote = code, true
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(b []byte) (int, error) {
	r.wrote = true
	return r.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// reply answers with v as JSON. A peer that is gone is no error of ours.
func reply(w http.ResponseWriter, code int, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		fail(w, http.StatusInternalServerError, "internal", err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n'))
}

// Error is how every refusal looks: {"error":{"code","message"}}.
type Error struct {
	Error ErrorBody `json:"error"`
}

// ErrorBody is the inside of an Error.
type ErrorBody struct {
	Code    string `json:"code"`    // for programs: stays
	Message string `json:"message"` // for people: may change
}

func fail(w http.ResponseWriter, status int, code, message string) {
	reply(w, status, Error{ErrorBody{code, message}})
}
