package httpapi_test

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.uber.org/goleak"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Where requests come from.
const local, remote = "127.0.0.1:40000", "192.0.2.7:40000"

// rig is an API on fakes, with two devices: pump, and off, which is disabled.
type rig struct {
	t        *testing.T
	api      *httpapi.Server
	source   *source
	tokens   *tokens
	registry *registry
	queue    *queue
	lanes    *lanes
	messages messages
	backups  backups
	audit    auditLog
	control  control
	hub      *httpapi.Events
	log      *testkit.Buffer
	metrics  *prometheus.Registry
	ledger   *[]string // what check saw, for the test of the description; nil: nobody asks
}

func newRig(t *testing.T) *rig { return newRigWith(t, 0) }

func newRigWith(t *testing.T, events int) *rig {
	t.Helper()
	r := &rig{
		t: t, source: &source{}, tokens: newTokens(), lanes: &lanes{}, hub: httpapi.NewEvents(events), log: &testkit.Buffer{},
		metrics: prometheus.NewRegistry(),
		registry: &registry{known: map[string]devices.Device{
			"pump": {ID: "pump", Role: "device", Enabled: true, Created: then, Updated: then, Credentials: []devices.Credential{{ID: "k1", Kind: "token", Created: then}}},
			"off":  {ID: "off", Role: "device", Created: then, Updated: then},
		}},
	}
	r.source.status = httpapi.Status{Version: "1", Gateway: "gw", StartedAt: then, Store: httpapi.Store{Level: "ok"}, Ledger: httpapi.NewLedger([]spool.Account{{
		Lane: "telemetry", Accepted: spool.Count{Messages: 3, Bytes: 30}, Pending: spool.Count{Messages: 3, Bytes: 30},
	}})}
	r.queue = &queue{reg: r.registry, hub: r.hub}
	out := io.MultiWriter(r.log, t.Output())
	r.api = httpapi.New(httpapi.Config{Address: "127.0.0.1:0", Gateway: "gw"}, httpapi.Parts{
		Source: r.source, Devices: r.registry, Commands: r.queue, Lanes: r.lanes, Messages: &r.messages, Tokens: r.tokens, Events: r.hub, Gatherer: r.metrics, Backups: &r.backups, Audit: &r.audit, Control: &r.control,
		Log: slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelInfo})), Metrics: r.metrics,
	})
	return r
}

// option changes a request.
type option func(*http.Request)

// as shows the token of a role; the default is admin's.
func as(token string) option {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

func nobody(r *http.Request) { r.Header.Del("Authorization") }

func header(k, v string) option { return func(r *http.Request) { r.Header.Set(k, v) } }

func host(h string) option { return func(r *http.Request) { r.Host = h } }

func from(peer string) option { return func(r *http.Request) { r.RemoteAddr = peer } }

// body is a body in JSON; header after it says otherwise.
func body(s string) option {
	return func(r *http.Request) {
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(s)), int64(len(s))
		r.Header.Set("Content-Type", "application/json")
	}
}

func form(s string) option {
	return func(r *http.Request) {
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(s)), int64(len(s))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
}

func html(r *http.Request) { r.Header.Set("Accept", "text/html,application/xhtml+xml,*/*;q=0.8") }

// signedIn is a browser's session: what to show of it.
type signedIn struct {
	cookie, csrf option
	set          *http.Cookie
	httpapi.SignedIn
}

func (r *rig) signIn(token string, options ...option) (in signedIn) {
	r.t.Helper()
	a := r.ask("POST", "/signin", append([]option{nobody, form("token=" + token)}, options...)...)
	set, err := http.ParseSetCookie(a.header.Get("Set-Cookie"))
	if err == nil {
		err = json.Unmarshal(a.body, &in.SignedIn)
	}
	if a.status != 200 || err != nil {
		r.t.Fatalf("sign in as %s = %d %s %v: %v", token, a.status, a.body, a.header, err)
	}
	in.set = set
	in.cookie = func(req *http.Request) { req.AddCookie(&http.Cookie{Name: set.Name, Value: set.Value}) }
	in.csrf = header("X-Holdfast-CSRF", in.CSRF)
	return in
}

// answered is an answer that was read.
type answered struct {
	status int
	header http.Header
	body   []byte
}

// code is the error's code, "" for none.
func (a *answered) code() string {
	var e httpapi.Error
	_ = json.Unmarshal(a.body, &e)
	return e.Error.Code
}

func (a *answered) message() string {
	var e httpapi.Error
	_ = json.Unmarshal(a.body, &e)
	return e.Error.Message
}

// ask sends a request as an admin on this machine, if no option says otherwise, and holds the answer against the API's
// description.
func (r *rig) ask(method, target string, options ...option) *answered {
	r.t.Helper()
	req := httptest.NewRequestWithContext(r.t.Context(), method, "http://127.0.0.1:8080"+target, nil)
	req.RemoteAddr = local
	as("admin")(req)
	for _, o := range options {
		o(req)
	}
	w := httptest.NewRecorder()
	r.api.Handler().ServeHTTP(w, req)
	a := &answered{w.Code, w.Result().Header, w.Body.Bytes()}
	if a.status >= 400 && a.message() == "" {
		r.t.Errorf("%s %s = %d without an error in JSON: %s", method, target, a.status, a.body)
	}
	r.check(method, req.URL.EscapedPath(), a)
	return a
}

// into asks, wants the status, and decodes the answer.
func (r *rig) into(v any, want int, method, target string, options ...option) {
	r.t.Helper()
	a := r.ask(method, target, options...)
	if a.status != want {
		r.t.Fatalf("%s %s = %d, want %d: %s", method, target, a.status, want, a.body)
	}
	if err := json.Unmarshal(a.body, v); err != nil {
		r.t.Fatalf("%s %s: %v: %s", method, target, err, a.body)
	}
}

// description is the API's description as a client reads it, with schemas that take nothing which they do not name.
type description struct {
	paths    map[string]map[string]operation
	patterns map[string]*regexp.Regexp
	compiler *jsonschema.Compiler
}

type operation struct {
	ID        string               `json:"operationId"`
	Role      string               `json:"x-role"`
	Responses map[string]*response `json:"responses"`
	Body      *struct {
		Content map[string]any `json:"content"`
	} `json:"requestBody"`
}

type response struct {
	Content map[string]struct {
		Schema struct {
			AllOf []struct {
				Properties struct {
					Error struct {
						Properties struct {
							Code struct {
								Enum []string `json:"enum"`
							} `json:"code"`
						} `json:"properties"`
					} `json:"error"`
				} `json:"properties"`
			} `json:"allOf"`
		} `json:"schema"`
	} `json:"content"`
}

// codes lists the codes of errors that a response may have.
func (r *response) codes() (codes []string) {
	for _, s := range r.Content["application/json"].Schema.AllOf {
		codes = append(codes, s.Properties.Error.Properties.Code.Enum...)
	}
	return codes
}

var describe = sync.OnceValues(func() (*description, error) {
	reg := prometheus.NewRegistry()
	api := httpapi.New(httpapi.Config{}, httpapi.Parts{Tokens: newTokens(), Gatherer: reg, Log: slog.New(slog.DiscardHandler)})
	req := httptest.NewRequest("GET", "/api/v1/openapi.json", nil)
	as("viewer")(req)
	w := httptest.NewRecorder()
	api.Handler().ServeHTTP(w, req)
	raw, err := jsonschema.UnmarshalJSON(bytes.NewReader(w.Body.Bytes()))
	if err != nil {
		return nil, err
	}
	components := raw.(map[string]any)["components"].(map[string]any)["schemas"].(map[string]any)
	for _, c := range components {
		c.(map[string]any)["additionalProperties"] = false
	}
	d := &description{patterns: map[string]*regexp.Regexp{}, compiler: jsonschema.NewCompiler()}
	d.compiler.AssertFormat()
	if err := d.compiler.AddResource("mem://api", raw); err != nil {
		return nil, err
	}
	var doc struct {
		Paths map[string]map[string]operation `json:"paths"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil {
		return nil, err
	}
	d.paths = doc.Paths
	for path := range d.paths {
		d.patterns[path] = regexp.MustCompile("^" + regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(path, "[^/]+") + "$")
	}
	return d, nil
})

func described(t *testing.T) *description {
	t.Helper()
	d, err := describe()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

var describeMu sync.Mutex // compiling schemas

// schema compiles what a JSON pointer in the description points to.
func (d *description) schema(pointer ...string) (*jsonschema.Schema, error) {
	describeMu.Lock()
	defer describeMu.Unlock()
	at := "mem://api#"
	for _, p := range pointer {
		at += "/" + strings.NewReplacer("~", "~0", "/", "~1", "{", "%7B", "}", "%7D").Replace(p)
	}
	return d.compiler.Compile(at)
}

// check holds an answer against the description: the path is in it, the status is, and the body is what it says.
func (r *rig) check(method, path string, a *answered) {
	r.t.Helper()
	d := described(r.t)
	for pattern, re := range d.patterns {
		op, ok := d.paths[pattern][strings.ToLower(method)]
		if !ok || !re.MatchString(path) {
			continue
		}
		status := http.StatusText(a.status)
		resp := op.Responses[itoa(a.status)]
		if resp == nil {
			r.t.Errorf("%s: %d %s is not described: %s", op.ID, a.status, status, a.body)
			return
		}
		if r.ledger != nil {
			*r.ledger = append(*r.ledger, op.ID+" "+itoa(a.status)+" "+a.code())
		}
		if len(resp.Content) == 0 {
			if len(a.body) > 0 {
				r.t.Errorf("%s: %d has a body: %s", op.ID, a.status, a.body)
			}
			return
		}
		kind, _, _ := strings.Cut(a.header.Get("Content-Type"), ";")
		if _, ok := resp.Content[kind]; !ok {
			r.t.Errorf("%s: %d is of type %q, which is not described", op.ID, a.status, kind)
			return
		}
		if kind != "application/json" {
			return
		}
		schema, err := d.schema("paths", pattern, strings.ToLower(method), "responses", itoa(a.status), "content", kind, "schema")
		if err != nil {
			r.t.Errorf("%s: schema of %d: %v", op.ID, a.status, err)
			return
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(a.body))
		if err == nil {
			err = schema.Validate(v)
		}
		if err != nil {
			r.t.Errorf("%s: %d is not what is described: %v\n%s", op.ID, a.status, err, a.body)
		}
		return
	}
}
