package httpapi

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"path"
	"strings"
)

// The dashboard: pages that a browser with a session sees. They hold nothing but a frame; one script fills it from the API, so what a page
// may show and do is what the API lets its session. Nothing is asked of anybody else.

//go:embed ui
var uiFiles embed.FS

// pagePolicy lets a page have its own script and style, and speak to its own gateway. Who frames it, or gets a script into it, gets nothing.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// page is one of the dashboard's.
type page struct {
	path, file, title string
	nav               bool // it is in the menu
}

var pages = []page{
	{"/{$}", "overview", "Overview", true},
	{"/devices", "devices", "Devices", true},
	{"/devices/{id}", "device", "Device", false},
	{"/commands", "commands", "Commands", true},
	{"/messages", "messages", "Messages", true},
	{"/live", "live", "Live", true},
	{"/parked", "parked", "Parked", true},
	{"/alarms", "alarms", "Alarms", true},
}

// asset is a file that pages load, under a name that changes with what is in it: so it is kept for ever.
type asset struct {
	mime         string
	body, zipped []byte
}

// dashboard is what pages are made of.
type dashboard struct {
	pages  map[string]*template.Template
	assets map[string]*asset // by the name in the address
	names  map[string]string // in the address, by the file's
}

func newDashboard() *dashboard {
	d := &dashboard{pages: map[string]*template.Template{}, assets: map[string]*asset{}, names: map[string]string{}}
	for name, mime := range map[string]string{
		"app.js": "text/javascript; charset=utf-8", "app.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
		"uplot.js": "text/javascript; charset=utf-8", "uplot.css": "text/css; charset=utf-8",
	} {
		b, err := uiFiles.ReadFile("ui/" + name)
		if err != nil {
			panic(err) // it is embedded
		}
		sum := sha256.Sum256(b)
		ext := path.Ext(name)
		at := strings.TrimSuffix(name, ext) + "-" + hex.EncodeToString(sum[:6]) + ext
		var z bytes.Buffer
		w, _ := gzip.NewWriterLevel(&z, gzip.BestCompression) // the level is one
		_, _ = w.Write(b)                                     // to memory
		_ = w.Close()
		d.assets[at], d.names[name] = &asset{mime, b, z.Bytes()}, "/ui/"+at
	}
	for _, file := range []string{"overview", "devices", "device", "commands", "messages", "live", "parked", "alarms", "signin"} {
		d.pages[file] = template.Must(template.ParseFS(uiFiles, "ui/layout.html", "ui/"+file+".html"))
	}
	return d
}

// view is what a template is given.
type view struct {
	Title, Page, Gateway string
	Who, Role, CSRF      string // "": nobody is signed in
	Operator, Admin      bool
	Nav                  []navItem
	Asset                map[string]string
	ID                   string // of the device that the page is about
	Refused, Wait, Next  string // of the page to sign in
}

type navItem struct {
	Path, Text string
	Here       bool
}

// handleUI adds the pages to a mux.
func (s *Server) handleUI(mux *http.ServeMux) {
	s.ui = newDashboard()
	for i := range pages {
		p := &pages[i]
		mux.Handle("GET "+p.path, s.serve(&route{path: p.path, method: http.MethodGet, h: func(s *Server, c *call) error { return s.showPage(c, p) }}))
	}
	mux.Handle("GET /signin", s.serve(&route{path: "/signin", method: http.MethodGet, query: []param{
		text("error", ""), text("wait", ""), text("next", ""),
	}, h: (*Server).showSignIn}))
	mux.Handle("GET /ui/{name}", s.serve(&route{path: "/ui/{name}", method: http.MethodGet, h: (*Server).showAsset}))
}

func (s *Server) showPage(c *call, p *page) error {
	ss, role, ok := s.sessions.find(c.r)
	if !ok {
		to := "/signin"
		if c.r.URL.Path != "/" {
			to += "?" + url.Values{"next": {c.r.URL.Path}}.Encode()
		}
		return c.redirect(to)
	}
	c.who, c.role = ss.who, role
	v := view{
		Title: p.title, Page: p.file, Who: ss.who, Role: role.String(), CSRF: ss.csrf,
		Operator: role >= Operator, Admin: role >= Admin, ID: c.r.PathValue("id"),
	}
	if v.ID != "" {
		v.Title = v.ID
	}
	for _, n := range pages {
		if n.nav {
			at := strings.TrimSuffix(n.path, "{$}")
			v.Nav = append(v.Nav, navItem{at, n.title, n.path == p.path || p.file == "device" && n.file == "devices"})
		}
	}
	return s.render(c, &v)
}

// showSignIn is the form. A browser that is signed in goes on.
func (s *Server) showSignIn(c *call) error {
	next := localPath(c.r.URL.Query().Get("next"))
	if _, _, ok := s.sessions.find(c.r); ok {
		return c.redirect(next)
	}
	v := view{Title: "Sign in", Page: "signin", Next: next}
	switch c.r.URL.Query().Get("error") {
	case "":
	case codeTooManyAttempts:
		v.Refused, v.Wait = "Too many wrong tokens came from your address.", c.r.URL.Query().Get("wait")
	default:
		v.Refused = "This token is not known, or has expired."
	}
	return s.render(c, &v)
}

func (s *Server) render(c *call, v *view) error {
	v.Gateway, v.Asset = s.cfg.Gateway, s.ui.names
	var b bytes.Buffer
	if err := s.ui.pages[v.Page].ExecuteTemplate(&b, "layout", v); err != nil {
		return fmt.Errorf("make page %s: %w", v.Page, err)
	}
	h := c.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("Referrer-Policy", "same-origin")
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(b.Bytes())
	return nil
}

func (s *Server) showAsset(c *call) error {
	a, ok := s.ui.assets[c.r.PathValue("name")]
	if !ok {
		return failf(codeNotFound, "there is no such file: reload the page")
	}
	h, b := c.w.Header(), a.body
	h.Set("Content-Type", a.mime)
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Set("Vary", "Accept-Encoding")
	if strings.Contains(c.r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		b = a.zipped
	}
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(b)
	return nil
}
