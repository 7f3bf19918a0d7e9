package httpapi_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

func itoa(n int) string { return strconv.Itoa(n) }

// row is how the test calls a row of the API: what does what is asked, and what fails in each way that only this row has.
type row struct {
	method, target string
	body           string
	form           string // instead of body
	ready          func(r *rig)
	// ok has each status of success but the usual one, fails each code.
	ok    map[string]func(r *rig) *answered
	fails map[string]func(r *rig) *answered
}

func (w *row) call(r *rig, options ...option) *answered {
	if w.body != "" {
		options = append([]option{body(w.body)}, options...)
	}
	if w.form != "" {
		options = append([]option{form(w.form)}, options...)
	}
	return r.ask(w.method, w.target, options...)
}

// get, post and so on make a call of them.
func calls(method, target string, options ...option) func(*rig) *answered {
	return func(r *rig) *answered { return r.ask(method, target, options...) }
}

func submits(err string, options ...option) func(*rig) *answered {
	return func(r *rig) *answered {
		r.queue.err = refusal(err)
		return r.ask("POST", "/api/v1/devices/pump/commands", append([]option{body(`{"name":"n"}`)}, options...)...)
	}
}

func withCommand(r *rig) {
	r.t.Helper()
	r.ask("POST", "/api/v1/devices/pump/commands", body(`{"id":"c1","name":"flush","payload":{"s":1},"ttl":"1h"}`))
}

// rows is by operation.
var rows = map[string]row{
	"get_health": {method: "GET", target: "/healthz"},
	"get_ready": {method: "GET", target: "/readyz", fails: map[string]func(*rig) *answered{
		"not_ready": func(r *rig) *answered {
			r.source.err = fmt.Errorf("listeners are not bound yet")
			return r.ask("GET", "/readyz")
		},
		"internal": func(r *rig) *answered {
			r.source.panics = true
			return r.ask("GET", "/readyz")
		},
	}},
	"get_metrics": {method: "GET", target: "/metrics", fails: map[string]func(*rig) *answered{
		"host_not_allowed": calls("GET", "/metrics", nobody, host("evil.example.com")),
	}},
	"sign_in": {
		method: "POST", target: "/signin", form: "token=viewer&next=/x",
		ok: map[string]func(*rig) *answered{"303": calls("POST", "/signin", form("token=viewer&next=/x"), html)},
		fails: map[string]func(*rig) *answered{
			"unauthorized": calls("POST", "/signin", form("token=wrong")),
			"too_many_attempts": func(r *rig) *answered {
				for range 5 {
					r.ask("POST", "/signin", form("token=wrong"))
				}
				return r.ask("POST", "/signin", form("token=wrong"))
			},
			"csrf_token":     calls("POST", "/signin", form("token=viewer"), header("Sec-Fetch-Site", "cross-site")),
			"bad_body":       calls("POST", "/signin", form("token=viewer&role=admin")),
			"body_too_large": calls("POST", "/signin", form("token="+strings.Repeat("x", 64<<10))),
		},
	},
	"sign_out": {
		method: "POST", target: "/signout",
		ok: map[string]func(*rig) *answered{"303": calls("POST", "/signout", html)},
		fails: map[string]func(*rig) *answered{
			"audit_unavailable": func(r *rig) *answered {
				in := r.signIn("operator")
				r.audit.err = errDisk
				return r.ask("POST", "/signout", nobody, in.cookie, form("csrf="+in.CSRF))
			},
			"csrf_token":             func(r *rig) *answered { return r.ask("POST", "/signout", nobody, r.signIn("viewer").cookie) },
			"bad_body":               calls("POST", "/signout", form("csrf=%zz")),
			"body_too_large":         calls("POST", "/signout", form("csrf="+strings.Repeat("x", 64<<10))),
			"unsupported_media_type": calls("POST", "/signout", body(`{}`)),
			"internal": func(r *rig) *answered {
				in := r.signIn("viewer")
				r.tokens.panics.Store(true)
				return r.ask("POST", "/signout", nobody, in.cookie, in.csrf)
			},
		},
	},
	"get_openapi": {method: "GET", target: "/api/v1/openapi.json", ok: map[string]func(*rig) *answered{
		"304": func(r *rig) *answered {
			tag := r.ask("GET", "/api/v1/openapi.json").header.Get("ETag")
			return r.ask("GET", "/api/v1/openapi.json", header("If-None-Match", `"x", `+tag))
		},
	}},
	"get_history":  {method: "GET", target: "/api/v1/history?since=2026-05-04T03:02:01Z"},
	"list_alarms":  {method: "GET", target: "/api/v1/alarms"},
	"get_status":   {method: "GET", target: "/api/v1/status"},
	"list_devices": {method: "GET", target: "/api/v1/devices"},
	"add_device": {
		method: "POST", target: "/api/v1/devices", body: `{"id":"new"}`,
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("POST", "/api/v1/devices", body(`{"id":"a#"}`)),
			"device_exists":  calls("POST", "/api/v1/devices", body(`{"id":"pump"}`)),
			"too_many_devices": func(r *rig) *answered {
				for i := range 50 {
					r.registry.known[itoa(i)] = devices.Device{}
				}
				return r.ask("POST", "/api/v1/devices", body(`{"id":"new"}`))
			},
		},
	},
	"get_device": {
		method: "GET", target: "/api/v1/devices/pump",
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("GET", "/api/v1/devices/a%23"),
			"unknown_device": calls("GET", "/api/v1/devices/x"),
		},
	},
	"change_device": {
		method: "PATCH", target: "/api/v1/devices/pump", body: `{"enabled":false}`,
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("PATCH", "/api/v1/devices/pump", body(`{"role":"nobody"}`)),
			"unknown_device": calls("PATCH", "/api/v1/devices/x", body(`{"enabled":true}`)),
		},
	},
	"remove_device": {
		method: "DELETE", target: "/api/v1/devices/pump",
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("DELETE", "/api/v1/devices/a%23"),
			"unknown_device": calls("DELETE", "/api/v1/devices/x"),
		},
	},
	"add_credential": {
		method: "POST", target: "/api/v1/devices/pump/credentials", body: `{"kind":"token","lifetime":"720h","retire_others":"24h"}`,
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("POST", "/api/v1/devices/pump/credentials", body(`{"kind":"smile"}`)),
			"unknown_device": calls("POST", "/api/v1/devices/x/credentials", body(`{}`)),
		},
	},
	"remove_credential": {
		method: "DELETE", target: "/api/v1/devices/pump/credentials/k1",
		fails: map[string]func(*rig) *answered{
			"invalid_device":     calls("DELETE", "/api/v1/devices/a%23/credentials/k1"),
			"unknown_device":     calls("DELETE", "/api/v1/devices/x/credentials/k1"),
			"unknown_credential": calls("DELETE", "/api/v1/devices/pump/credentials/k9"),
		},
	},
	"list_device_commands": {
		method: "GET", target: "/api/v1/devices/pump/commands", ready: withCommand,
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("GET", "/api/v1/devices/a%23/commands"),
			"unknown_device": calls("GET", "/api/v1/devices/x/commands"),
		},
	},
	"send_command": {
		method: "POST", target: "/api/v1/devices/pump/commands", body: `{"name":"flush"}`,
		ok: map[string]func(*rig) *answered{"200": func(r *rig) *answered {
			withCommand(r)
			return r.ask("POST", "/api/v1/devices/pump/commands", body(`{"id":"c1","name":"flush","payload":{"s":1},"ttl":"1h"}`))
		}},
		fails: map[string]func(*rig) *answered{
			"unknown_device":    calls("POST", "/api/v1/devices/x/commands", body(`{"name":"n"}`)),
			"device_disabled":   calls("POST", "/api/v1/devices/off/commands", body(`{"name":"n"}`)),
			"invalid_command":   calls("POST", "/api/v1/devices/pump/commands", body(`{"name":"a/b"}`)),
			"payload_too_large": calls("POST", "/api/v1/devices/pump/commands", body(`{"name":"n","payload":"`+strings.Repeat("x", 64<<10+1)+`"}`)),
			"queue_full":        submits("queue_full"),
			"expired":           calls("POST", "/api/v1/devices/pump/commands", body(`{"name":"n","ttl":"0s"}`)),
			"unavailable":       submits("unavailable"),
			"conflict": func(r *rig) *answered {
				withCommand(r)
				return r.ask("POST", "/api/v1/devices/pump/commands", body(`{"id":"c1","name":"other"}`))
			},
		},
	},
	"list_commands": {method: "GET", target: "/api/v1/commands?device=pump&state=QUEUED,SENT&limit=5", ready: withCommand},
	"get_command": {
		method: "GET", target: "/api/v1/commands/c1", ready: withCommand,
		fails: map[string]func(*rig) *answered{"unknown_command": calls("GET", "/api/v1/commands/c9")},
	},
	"cancel_command": {
		method: "DELETE", target: "/api/v1/commands/c1", body: `{"reason":"not needed"}`, ready: withCommand,
		fails: map[string]func(*rig) *answered{
			"unknown_command": calls("DELETE", "/api/v1/commands/c9"),
			"invalid_command": calls("DELETE", "/api/v1/commands/c1", body(`{"reason":"`+strings.Repeat("x", 513)+`"}`)),
			"already_ended": func(r *rig) *answered {
				withCommand(r)
				r.queue.move("c1", devices.Succeeded)
				return r.ask("DELETE", "/api/v1/commands/c1")
			},
		},
	},
	"list_lanes": {method: "GET", target: "/api/v1/lanes"},
	"list_messages": {
		method: "GET", target: "/api/v1/lanes/alarm/messages",
		ready: func(r *rig) {
			r.lanes.records = []spool.Record{{Received: 1, Device: []byte("pump"), Topic: []byte("t"), Payload: []byte{0xff}, Flags: spool.FlagQoS1}}
		},
		fails: map[string]func(*rig) *answered{"unknown_lane": calls("GET", "/api/v1/lanes/x/messages")},
	},
	"purge_lane": {
		method: "POST", target: "/api/v1/lanes/alarm/purge", body: `{"older_than":"72h","up_to":18446744073709551615}`,
		fails: map[string]func(*rig) *answered{"unknown_lane": calls("POST", "/api/v1/lanes/x/purge", body(`{"all":true}`))},
	},
	"list_parked": {
		method: "GET", target: "/api/v1/parked?upstream=cloud", ready: withParked,
		fails: map[string]func(*rig) *answered{"unknown_lane": calls("GET", "/api/v1/parked?lane=x")},
	},
	"replay_parked": {
		method: "POST", target: "/api/v1/parked/replay", body: `{"lane":"alarm","upstream":"cloud"}`, ready: withParked,
		fails: map[string]func(*rig) *answered{
			"unknown_lane":     calls("POST", "/api/v1/parked/replay", body(`{"lane":"x","upstream":"cloud"}`)),
			"unknown_upstream": calls("POST", "/api/v1/parked/replay", body(`{"lane":"alarm","upstream":"x"}`)),
			"lane_full": func(r *rig) *answered {
				r.lanes.err = spool.ErrFull
				return r.ask("POST", "/api/v1/parked/replay", body(`{"lane":"alarm","upstream":"cloud"}`))
			},
		},
	},
	"export_lane": {
		method: "GET", target: "/api/v1/lanes/alarm/export",
		fails: map[string]func(*rig) *answered{
			"unknown_lane":     calls("GET", "/api/v1/lanes/x/export"),
			"too_many_streams": func(r *rig) *answered { return r.whileExporting(4) },
		},
	},
	"make_backup": {
		method: "POST", target: "/api/v1/backup", body: `{"bytes_per_second":1000000}`,
		ok: map[string]func(*rig) *answered{"201": calls("POST", "/api/v1/backup", body(`{"keep":true}`))},
		fails: map[string]func(*rig) *answered{"backup_runs": func(r *rig) *answered {
			r.backups.err = httpapi.ErrBackupRuns
			return r.ask("POST", "/api/v1/backup")
		}},
	},
	"list_upstreams": {method: "GET", target: "/api/v1/upstreams"},
	"watch_messages": {method: "GET", target: "/api/v1/messages/live"}, // as watch_events
	"watch_events":   {method: "GET", target: "/api/v1/events"},        // a stream: its own tests call it, and the test below its failures
	"reload": {
		method: "POST", target: "/api/v1/reload",
		fails: map[string]func(*rig) *answered{"config_wrong": func(r *rig) *answered {
			r.control.err = fmt.Errorf("%w: g.yaml:1:2: what is that?", httpapi.ErrConfig)
			return r.ask("POST", "/api/v1/reload")
		}},
	},
	"diff_file": {
		method: "GET", target: "/api/v1/config/diff",
		fails: map[string]func(*rig) *answered{"config_wrong": func(r *rig) *answered {
			r.control.err = httpapi.ErrConfig
			return r.ask("GET", "/api/v1/config/diff")
		}},
	},
	"diff_config": {
		method: "POST", target: "/api/v1/config/diff", body: `{"name":"/g.yaml","text":"log: { level: debug }"}`,
		fails: map[string]func(*rig) *answered{
			"config_wrong":   calls("POST", "/api/v1/config/diff", body(`{"name":"/g.yaml","text":"nonsense"}`)),
			"body_too_large": calls("POST", "/api/v1/config/diff", body(strings.Repeat(" ", 2<<20+1))),
		},
	},
	"get_log": {method: "GET", target: "/api/v1/log"},
	"set_log": {method: "PUT", target: "/api/v1/log", body: `{"level":"debug"}`},
	"get_debug": {
		method: "GET", target: "/api/v1/devices/pump/debug", ready: func(r *rig) { r.ask("PUT", "/api/v1/devices/pump/debug", body(`{"for":"10m"}`)) },
		fails: map[string]func(*rig) *answered{"invalid_device": calls("GET", "/api/v1/devices/a%23/debug")},
	},
	"debug_device": {
		method: "PUT", target: "/api/v1/devices/pump/debug", body: `{"for":"10m"}`,
		fails: map[string]func(*rig) *answered{
			"invalid_device": calls("PUT", "/api/v1/devices/a%23/debug", body(`{"for":"10m"}`)),
			"cannot_debug":   calls("PUT", "/api/v1/devices/pump/debug", body(`{"for":"48h"}`)),
		},
	},
	"list_audit": {
		method: "GET", target: "/api/v1/audit?who=admin&limit=1&since=2020-01-01T00:00:00Z",
		ready: func(r *rig) {
			r.ask("DELETE", "/api/v1/devices/pump")
			r.ask("DELETE", "/api/v1/devices/off")
		},
	},
	"list_tokens": {method: "GET", target: "/api/v1/tokens"},
	"add_token": {
		method: "POST", target: "/api/v1/tokens", body: `{"name":"ci","role":"operator","lifetime":"1h"}`,
		fails: map[string]func(*rig) *answered{
			"invalid_token": calls("POST", "/api/v1/tokens", body(`{"name":"a b","role":"viewer"}`)),
			"too_many_tokens": func(r *rig) *answered {
				for i := range 50 {
					r.tokens.known[itoa(i)] = httpapi.Token{}
				}
				return r.ask("POST", "/api/v1/tokens", body(`{"name":"ci","role":"viewer"}`))
			},
			"token_exists": func(r *rig) *answered {
				r.ask("POST", "/api/v1/tokens", body(`{"name":"ci","role":"viewer"}`))
				return r.ask("POST", "/api/v1/tokens", body(`{"name":"ci","role":"viewer"}`))
			},
		},
	},
	"remove_token": {
		method: "DELETE", target: "/api/v1/tokens/the-viewer",
		fails: map[string]func(*rig) *answered{
			"unknown_token": calls("DELETE", "/api/v1/tokens/x"),
		},
	},
}

// below has a token whose role is one too small.
var below = map[string]string{"operator": "viewer", "admin": "operator"}

// common fails a row in the ways that many rows have.
var common = map[string]func(r *rig, w *row, op operation) *answered{
	"unauthorized": func(r *rig, w *row, _ operation) *answered { return w.call(r, nobody, from(remote)) },
	"too_many_attempts": func(r *rig, w *row, _ operation) *answered {
		for range 5 {
			if a := w.call(r, as("wrong")); a.code() != "unauthorized" {
				r.t.Errorf("a wrong token: %d %s", a.status, a.code())
			}
		}
		a := w.call(r, as("wrong"))
		if a.header.Get("Retry-After") != "1" {
			r.t.Errorf("Retry-After = %q", a.header.Get("Retry-After"))
		}
		return a
	},
	"forbidden":  func(r *rig, w *row, op operation) *answered { return w.call(r, as(below[op.Role])) },
	"csrf_token": func(r *rig, w *row, _ operation) *answered { return w.call(r, nobody, r.signIn("admin").cookie) },
	"bad_query": func(r *rig, w *row, _ operation) *answered {
		return r.ask(w.method, strings.Split(w.target, "?")[0]+"?nonsense=1")
	},
	"bad_body":               func(r *rig, w *row, _ operation) *answered { return r.ask(w.method, w.target, body(`{"x`)) },
	"unsupported_media_type": func(r *rig, w *row, _ operation) *answered { return w.call(r, header("Content-Type", "text/plain")) },
	"body_too_large": func(r *rig, w *row, _ operation) *answered {
		return r.ask(w.method, w.target, body(strings.Repeat(" ", 256<<10+1)))
	},
	"unavailable": func(r *rig, w *row, _ operation) *answered {
		r.registry.err, r.queue.err, r.tokens.err, r.lanes.err, r.backups.err, r.control.err = errDisk, errDisk, errDisk, errDisk, errDisk, errDisk
		return w.call(r)
	},
	"audit_unavailable": func(r *rig, w *row, _ operation) *answered {
		r.audit.err = errDisk
		return w.call(r)
	},
	"internal": func(r *rig, w *row, _ operation) *answered {
		r.tokens.panics.Store(true)
		return w.call(r)
	},
}

// TestEveryRowIsWhatIsDescribed calls every method of every path in each way that the API's own description tells of,
// and holds each answer against the schema there (ask does). What is described and not called here fails the test.
func TestEveryRowIsWhatIsDescribed(t *testing.T) {
	d := described(t)
	seen := map[string]bool{}
	for path, methods := range d.paths {
		for method, op := range methods {
			w, ok := rows[op.ID]
			if !ok {
				t.Errorf("%s %s (%s) is described, and this test does not call it", method, path, op.ID)
				continue
			}
			seen[op.ID] = true
			for code := range w.fails {
				if !slices.ContainsFunc(slices.Collect(maps.Values(op.Responses)), func(r *response) bool { return slices.Contains(r.codes(), code) }) {
					t.Errorf("%s: %s is not described", op.ID, code)
				}
			}
			if !strings.EqualFold(w.method, method) || !d.patterns[path].MatchString(strings.Split(w.target, "?")[0]) {
				t.Errorf("%s: the test calls %s %s", op.ID, w.method, w.target)
				continue
			}
			if w.body != "" {
				checkBody(t, d, path, method, w.body)
			}
			for status, resp := range op.Responses {
				if status < "400" {
					t.Run(op.ID+"/"+status, func(t *testing.T) {
						if endless[op.ID] {
							return // stream_test.go, live_test.go
						}
						r := newRig(t)
						if w.ready != nil {
							w.ready(r)
						}
						call := w.ok[status]
						if call == nil {
							call = func(r *rig) *answered { return w.call(r) }
						}
						if a := call(r); itoa(a.status) != status {
							t.Errorf("%s = %d %s, want %s", op.ID, a.status, a.body, status)
						}
					})
					continue
				}
				if len(resp.codes()) == 0 {
					t.Errorf("%s: %s is described without codes", op.ID, status)
				}
				for _, code := range resp.codes() {
					t.Run(op.ID+"/"+code, func(t *testing.T) {
						r := newRig(t)
						call := w.fails[code]
						switch {
						case endless[op.ID] && code == "too_many_streams":
							return // stream_test.go, tail_test.go
						case call != nil:
						case common[code] != nil:
							call = func(r *rig) *answered {
								if w.ready != nil {
									w.ready(r)
								}
								return common[code](r, &w, op)
							}
						default:
							t.Fatalf("%s: %s is described, and this test does not call it", op.ID, code)
						}
						if a := call(r); itoa(a.status) != status || a.code() != code {
							t.Errorf("%s = %d %s, want %s %s", op.ID, a.status, a.body, status, code)
						}
					})
				}
			}
		}
	}
	for id := range rows {
		if !seen[id] {
			t.Errorf("the test calls %s, which is not described", id)
		}
	}
}

// checkBody holds a body that a row takes against the description of what it takes.
func checkBody(t *testing.T, d *description, path, method, body string) {
	t.Helper()
	schema, err := d.schema("paths", path, method, "requestBody", "content", "application/json", "schema")
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(v); err != nil {
		t.Errorf("%s %s takes a body that is not described: %v", method, path, err)
	}
	v.(map[string]any)["nonsense"] = 1
	if schema.Validate(v) == nil {
		t.Errorf("%s %s: a field of no meaning is described as welcome", method, path)
	}
}

func TestTheDescriptionIsWhole(t *testing.T) {
	a := newRig(t).ask("GET", "/api/v1/openapi.json", as("viewer"))
	var doc struct {
		OpenAPI    string
		Components struct{ Schemas map[string]any }
	}
	if err := json.Unmarshal(a.body, &doc); err != nil || doc.OpenAPI != "3.1.0" {
		t.Fatalf("openapi %q, %v", doc.OpenAPI, err)
	}
	d := described(t)
	for name := range doc.Components.Schemas {
		if _, err := d.schema("components", "schemas", name); err != nil {
			t.Errorf("component %s: %v", name, err)
		}
	}
	// Clients are made of it: names stay.
	for _, name := range []string{"Command", "Device", "Event", "NewDevice", "Status", "Submit"} {
		if doc.Components.Schemas[name] == nil {
			t.Errorf("no component %s among %v", name, slices.Sorted(maps.Keys(doc.Components.Schemas)))
		}
	}
	if again := newRig(t).ask("GET", "/api/v1/openapi.json"); again.header.Get("ETag") != a.header.Get("ETag") || a.header.Get("ETag") == "" {
		t.Errorf("ETag %q, then %q", a.header.Get("ETag"), again.header.Get("ETag"))
	}
	for _, code := range []string{"unauthorized", "queue_full"} {
		if httpapi.Statuses()[code] == 0 {
			t.Errorf("no status for %s", code)
		}
	}
}
