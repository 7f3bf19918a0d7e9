package httpapi_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

// endless are the operations whose answer ends when somebody ends it: tests of the table ask for their head.
var endless = map[string]bool{"watch_events": true, "watch_messages": true}

// needs says who may what: the least role for each operation.
var needs = map[string]string{
	"get_health": "", "get_ready": "", "sign_in": "", "sign_out": "",
	"get_metrics": "viewer", "get_openapi": "viewer", "get_status": "viewer", "list_devices": "viewer", "get_device": "viewer",
	"list_device_commands": "viewer", "list_commands": "viewer", "get_command": "viewer", "list_lanes": "viewer", "list_messages": "viewer",
	"list_upstreams": "viewer", "list_alarms": "viewer", "get_history": "viewer", "watch_events": "viewer", "watch_messages": "viewer", "list_parked": "viewer",
	"change_device": "operator", "send_command": "operator", "cancel_command": "operator", "purge_lane": "operator", "replay_parked": "operator", "export_lane": "operator",
	"add_device": "admin", "remove_device": "admin", "add_credential": "admin", "remove_credential": "admin",
	"list_tokens": "admin", "add_token": "admin", "remove_token": "admin", "make_backup": "admin", "list_audit": "admin", "reload": "admin", "diff_file": "admin", "diff_config": "admin", "set_log": "admin",
	"get_log": "viewer", "get_debug": "viewer", "debug_device": "operator",
}

// TestWhoMayWhat calls each row as each role: with a bearer token, and from a browser that is signed in.
func TestWhoMayWhat(t *testing.T) {
	rank := map[string]int{"": 0, "viewer": 1, "operator": 2, "admin": 3}
	for id, w := range rows {
		need, ok := needs[id]
		if !ok {
			t.Errorf("nobody said who may %s", id)
		}
		for _, by := range []string{"token", "session"} {
			for who, r := range rank {
				t.Run(id+"/"+by+"/"+who, func(t *testing.T) {
					rig := newRig(t)
					if w.ready != nil {
						w.ready(rig)
					}
					options := []option{from(remote), host("gw.example.com")}
					switch {
					case who == "":
						options = append(options, nobody)
					case by == "token":
						options = append(options, as(who))
					default:
						in := rig.signIn(who)
						options = append(options, nobody, in.cookie, in.csrf)
					}
					w := w
					if endless[id] { // one that ends
						w.method = http.MethodHead
					}
					a := w.call(rig, options...)
					want := "" // it is let in
					switch {
					case r >= rank[need]:
					case who == "":
						want = "unauthorized"
					default:
						want = "forbidden"
					}
					if a.code() != want || want == "" && a.status >= 300 {
						t.Errorf("as %q: %d %s, want %q", who, a.status, a.body, want)
					}
					if want != "" && !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer") {
						t.Errorf("WWW-Authenticate = %q", a.header.Get("WWW-Authenticate"))
					}
				})
			}
		}
	}
}

func TestAnOperatorChangesOnlyWhetherADeviceMayCome(t *testing.T) {
	for b, want := range map[string]int{
		`{"enabled":false}`:               200,
		`{"name":"x"}`:                    403,
		`{"labels":{}}`:                   403,
		`{"role":"device"}`:               403,
		`{"enabled":true,"role":"other"}`: 403,
	} {
		r := newRig(t)
		a := r.ask("PATCH", "/api/v1/devices/pump", as("operator"), body(b))
		if a.status != want || want == 403 && !strings.Contains(a.message(), "admin") {
			t.Errorf("%s = %d %s", b, a.status, a.body)
		}
	}
}

func TestRefusalsNameTheWayOut(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		a    *answered
		want []string
	}{
		{r.ask("GET", "/api/v1/status", nobody), []string{"admin.token", "holdfast token add"}},
		{r.ask("GET", "/api/v1/status", as("old")), []string{"expired", "holdfast token add"}},
		{r.ask("GET", "/api/v1/status", header("Authorization", "Basic YTpi")), []string{"Bearer"}},
		{r.ask("GET", "/api/v1/tokens", as("viewer")), []string{"the-viewer", "admin"}},
		{r.ask("GET", "/metrics", nobody, from(remote)), []string{"holdfast token add"}},
		{r.ask("GET", "/nothing", nobody), []string{"openapi.json"}},
	} {
		for _, w := range tc.want {
			if !strings.Contains(tc.a.message(), w) {
				t.Errorf("%q does not say %q", tc.a.message(), w)
			}
		}
	}
}

// TestMetricsWithoutAToken is about what a browser on this machine could be made to ask, and a proxy to hand on.
func TestMetricsWithoutAToken(t *testing.T) {
	for name, tc := range map[string]struct {
		options []option
		want    int
	}{
		"here":                     {nil, 200},
		"here by name":             {[]option{host("LocalHost:8080")}, 200},
		"here on IPv6":             {[]option{from("[::1]:1"), host("[::1]:8080")}, 200},
		"mapped address":           {[]option{from("[::ffff:127.0.0.1]:1")}, 200},
		"other machine":            {[]option{from(remote)}, 401},
		"by a page's own name":     {[]option{host("evil.example.com")}, 403},
		"looks like the address":   {[]option{host("127.0.0.1.evil.example.com")}, 403},
		"no name":                  {[]option{host("")}, 403},
		"handed on by a proxy":     {[]option{header("X-Forwarded-For", "192.0.2.7")}, 401},
		"handed on by a proxy, 2":  {[]option{header("Forwarded", "for=192.0.2.7")}, 401},
		"a token, from anywhere":   {[]option{as("viewer"), from(remote), host("gw.example.com")}, 200},
		"a wrong token, from here": {[]option{as("old")}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			if a := newRig(t).ask("GET", "/metrics", append([]option{nobody}, tc.options...)...); a.status != tc.want {
				t.Errorf("%d, want %d: %s", a.status, tc.want, a.body)
			}
		})
	}
	// Nothing else is shown to this machine without a token.
	if a := newRig(t).ask("GET", "/api/v1/status", nobody); a.status != 401 {
		t.Errorf("status without a token: %d", a.status)
	}
}

func TestWrongTokensAreSlowedAndRightOnesAreNot(t *testing.T) {
	r := newRig(t)
	for range 20 {
		r.ask("GET", "/api/v1/status", as("wrong"), from(remote))
	}
	if a := r.ask("GET", "/api/v1/status", as("wrong"), from(remote)); a.status != 429 || a.header.Get("Retry-After") == "" {
		t.Errorf("wrong again: %d", a.status)
	}
	if a := r.ask("GET", "/api/v1/status", as("viewer"), from(remote)); a.status != 200 {
		t.Errorf("right, from the same address: %d", a.status)
	}
	if a := r.ask("GET", "/api/v1/status", as("wrong"), from("198.51.100.1:1")); a.status != 401 {
		t.Errorf("wrong, from another address: %d", a.status)
	}
	if n := strings.Count(r.log.String(), "many wrong tokens"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	if strings.Contains(r.log.String(), "=wrong") {
		t.Error("a token is in the log")
	}
}

func TestMethodsAndPaths(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		method, target, allow string
		want                  int
		code                  string
	}{
		{"GET", "/nothing", "", 404, "not_found"},
		{"POST", "/api/v1/nothing", "", 404, "not_found"},
		{"GET", "/api/v1/devices/", "", 404, "not_found"},
		{"POST", "/api/v1/status", "GET, HEAD", 405, "method_not_allowed"},
		{"PUT", "/api/v1/devices/pump", "DELETE, GET, HEAD, PATCH", 405, "method_not_allowed"},
		{"OPTIONS", "/api/v1/tokens/x", "DELETE", 405, "method_not_allowed"},
	} {
		a := r.ask(tc.method, tc.target)
		if a.status != tc.want || a.code() != tc.code || a.header.Get("Allow") != tc.allow {
			t.Errorf("%s %s = %d %s, Allow %q", tc.method, tc.target, a.status, a.code(), a.header.Get("Allow"))
		}
		if ct := a.header.Get("Content-Type"); ct != "application/json" {
			t.Errorf("%s %s: content type %q", tc.method, tc.target, ct)
		}
	}
}

func TestBadBodies(t *testing.T) {
	// Of each row that takes one: what is sent, the code, and what the message has to say.
	deep := strings.Repeat(`{"a":`, 40) + "1" + strings.Repeat("}", 40)
	for _, target := range []string{
		"POST /api/v1/devices", "PATCH /api/v1/devices/pump", "POST /api/v1/devices/pump/credentials", "POST /api/v1/devices/pump/commands",
		"DELETE /api/v1/commands/c1", "POST /api/v1/tokens",
	} {
		method, path, _ := strings.Cut(target, " ")
		for b, say := range map[string]string{
			" ":               "",
			"null":            "",
			"[]":              "",
			`"x"`:             "",
			`{"knd":"token"}`: `knd`,
			`{"knd":`:         "",
			`{} {}`:           "",
			`{"name":1e999}`:  "",
			deep:              "",
			"{\"\xff\":1}":    "",
			`{"id":"a","id":"b","name":"n","reason":"r","reason":"s","enabled":true,"enabled":true,"kind":"x","kind":"y"}`: "",
		} {
			a := newRig(t).ask(method, path, body(b))
			if a.code() != "bad_body" || !strings.Contains(a.message(), say) {
				t.Errorf("%s: %.40q = %d %s", target, b, a.status, a.body)
			}
		}
	}
	for _, tc := range []struct{ target, body, code, say string }{
		{"POST /api/v1/devices", `{"name":"x"}`, "bad_body", "id is missing"},
		{"POST /api/v1/devices", `{"id":"x","id":"y"}`, "bad_body", `"id" stands there twice`},
		{"POST /api/v1/devices", `{"id":"x","labels":{"a":"b","a":"c"}}`, "bad_body", `labels: "a" stands there twice`},
		{"POST /api/v1/devices", `{"id":"x","labels":{"a":{"b":{"c":1}}}}`, "bad_body", "labels.a: is an object"},
		{"POST /api/v1/devices", "{\"id\":\"\xff\"}", "bad_body", "UTF-8"},
		{"POST /api/v1/devices", `{"ID":"x"}`, "bad_body", `"ID"`},
		{"POST /api/v1/devices", `{"id":7}`, "bad_body", "id: is a number, but a text is wanted"},
		{"POST /api/v1/devices", `{"id":"x","enabled":"yes"}`, "bad_body", "enabled: is a text, but true or false is wanted"},
		{"POST /api/v1/devices", `{"id":"x","labels":[]}`, "bad_body", "labels: is an array, but an object is wanted"},
		{"POST /api/v1/devices", `{"id":"x","labels":{"a":null}}`, "bad_body", "labels.a: is null"},
		{"POST /api/v1/devices", `{"id":"x","credential":{"kin":"token"}}`, "bad_body", `credential: there is no field "kin"`},
		{"POST /api/v1/devices", `{"id":"x","credential":{"kind":"none","lifetime":"1h"}}`, "invalid_device", "none"},
		{"POST /api/v1/devices", `{"id":"x","credential":{"retire_others":"1h"}}`, "invalid_device", "retire_others"},
		{"POST /api/v1/devices/pump/credentials", `{"lifetime":"-1h"}`, "invalid_device", "720h"},
		{"POST /api/v1/devices/pump/credentials", `{"lifetime":"30d"}`, "invalid_device", "720h"},
		{"POST /api/v1/devices/pump/credentials", `{"retire_others":"soon"}`, "invalid_device", "24h"},
		{"POST /api/v1/devices/pump/credentials", `{"password":"a long one of twelve"}`, "invalid_device", "password"},
		{"POST /api/v1/devices/pump/credentials", `{"kind":"password","fingerprint":"ab"}`, "invalid_device", "fingerprint"},
		{"PATCH /api/v1/devices/pump", `{}`, "bad_body", "enabled"},
		{"POST /api/v1/devices/pump/commands", `{"payload":"x"}`, "bad_body", "name"},
		{"POST /api/v1/devices/pump/commands", `{"name":"n","payload":1,"payload_base64":"AA=="}`, "bad_body", "payload_base64"},
		{"POST /api/v1/devices/pump/commands", "\xa1\x64name\x61n", "bad_body", "Content-Type"},
		{"POST /api/v1/tokens", `{"name":"x"}`, "bad_body", "role is missing"},
		{"POST /api/v1/tokens", `{"name":"x","role":"root"}`, "bad_body", "viewer, operator or admin"},
		{"POST /api/v1/tokens", `{"name":"","role":"viewer"}`, "invalid_token", "1 to 64"},
		{"POST /api/v1/tokens", `{"name":"a/b","role":"viewer"}`, "invalid_token", "1 to 64"},
		{"POST /api/v1/tokens", `{"name":"x","role":"viewer","lifetime":"0s"}`, "invalid_token", "720h"},
	} {
		method, path, _ := strings.Cut(tc.target, " ")
		a := newRig(t).ask(method, path, body(tc.body))
		if a.code() != tc.code || !strings.Contains(a.message(), tc.say) {
			t.Errorf("%s: %s = %d %s, want %s: %s", tc.target, tc.body, a.status, a.body, tc.code, tc.say)
		}
	}
	// CBOR for JSON, JSON for CBOR, and CBOR where it is not taken.
	r := newRig(t)
	if a := r.ask("POST", "/api/v1/devices/pump/commands", body(`{"name":"n"}`), header("Content-Type", "application/cbor")); a.code() != "bad_body" {
		t.Errorf("JSON as CBOR = %d %s", a.status, a.body)
	}
	if a := r.ask("POST", "/api/v1/devices", body("\xa1\x62id\x61x"), header("Content-Type", "application/cbor")); a.code() != "unsupported_media_type" {
		t.Errorf("a device in CBOR = %d %s", a.status, a.body)
	}
	if a := r.ask("DELETE", "/api/v1/commands/c1", body(`{"reason":"r"}`), func(r *http.Request) { r.Header.Del("Content-Type") }); a.code() != "unsupported_media_type" {
		t.Errorf("a body of no type = %d %s", a.status, a.body)
	}
}

func TestBodiesHaveTheirOwnLimits(t *testing.T) {
	r := newRig(t)
	text := strings.Repeat("x", 65<<10)
	if a := r.ask("POST", "/api/v1/devices", body(`{"id":"`+text+`"}`)); a.code() != "body_too_large" || !strings.Contains(a.message(), "64 KiB") {
		t.Errorf("a device of 65 KiB = %d %.200s", a.status, a.body)
	}
	if a := r.ask("POST", "/api/v1/devices/pump/commands", body(`{"name":"n","payload":"`+text+`"}`)); a.code() != "payload_too_large" {
		t.Errorf("a command of 65 KiB = %d %.200s", a.status, a.body)
	}
	if a := r.ask("POST", "/api/v1/devices/pump/commands", body(`{"name":"n","payload":"`+strings.Repeat("x", wire.MaxSubmit)+`"}`)); a.code() != "body_too_large" {
		t.Errorf("a command of 256 KiB = %d %.200s", a.status, a.body)
	}
}

func TestBadQueries(t *testing.T) {
	r := newRig(t)
	for target, say := range map[string]string{
		"/api/v1/devices?limit=0":                            "1 to 1000",
		"/api/v1/devices?limit=1001":                         "1 to 1000",
		"/api/v1/devices?limit=x":                            "1 to 1000",
		"/api/v1/devices?connected=yes":                      "true or false",
		"/api/v1/devices?enabled=1":                          "true or false",
		"/api/v1/devices?enable=true":                        "enabled",
		"/api/v1/devices?role=a&role=b":                      "2 times",
		"/api/v1/devices?a;b":                                "semicolon",
		"/api/v1/devices?search=" + strings.Repeat("x", 257): "257 bytes",
		"/api/v1/commands?before=-1":                         "next",
		"/api/v1/commands?state=QUEUED,DONE":                 "SUCCEEDED",
		"/api/v1/commands/c1?wait=soon":                      "30s",
		"/api/v1/commands/c1?wait=-1s":                       "30s",
		"/api/v1/lanes/alarm/messages?after=x":               "next",
		"/api/v1/events?kinds=command,weather":               "upstream",
		"/api/v1/status?x=1":                                 `"x"`,
	} {
		if a := r.ask("GET", target); a.code() != "bad_query" || !strings.Contains(a.message(), say) {
			t.Errorf("%s = %d %s", target, a.status, a.body)
		}
	}
}

func TestDevicesArePagedAndFiltered(t *testing.T) {
	r := newRig(t)
	var first, second httpapi.DevicePage
	r.into(&first, 200, "GET", "/api/v1/devices?limit=1&search=p&role=device&connected=true&enabled=false&label=ward%3D3")
	yes, no := true, false
	want := devices.DeviceFilter{Limit: 1, Search: "p", Role: "device", Connected: &yes, Enabled: &no, Label: "ward=3"}
	if d := cmp.Diff(want, r.registry.asked); d != "" {
		t.Errorf("filter: %s", d)
	}
	r.into(&second, 200, "GET", "/api/v1/devices?limit=1&after="+first.Next)
	if len(first.Devices) != 1 || first.Devices[0].ID != "off" || len(second.Devices) != 1 || second.Devices[0].ID != "pump" || second.Next != "" {
		t.Errorf("pages: %+v, %+v", first, second)
	}
}

func TestADeviceIsAddedAsAsked(t *testing.T) {
	for b, want := range map[string]devices.NewDevice{
		`{"id":"d"}`: {ID: "d"},
		`{"id":"d","name":"n","labels":{"a":"b"},"role":"r","enabled":false,"credential":{"kind":"none"}}`: {
			ID: "d", Name: "n", Labels: map[string]string{"a": "b"}, Role: "r", Disabled: true, NoCredential: true,
		},
		`{"id":"d","enabled":true,"credential":{"lifetime":"1h"}}`: {
			ID: "d", Credential: &devices.NewCredential{Kind: "token", Lifetime: time.Hour, RetireOthers: -1},
		},
		`{"id":"d","credential":{"kind":"certificate","fingerprint":"ab"}}`: {
			ID: "d", Credential: &devices.NewCredential{Kind: "certificate", Fingerprint: "ab", RetireOthers: -1},
		},
	} {
		r := newRig(t)
		var made httpapi.DeviceMade
		r.into(&made, 201, "POST", "/api/v1/devices", body(b))
		if d := cmp.Diff(want, r.registry.added); d != "" {
			t.Errorf("%s: %s", b, d)
		}
		if (made.Secret == "") != want.NoCredential || made.Device.ID != "d" {
			t.Errorf("%s: %+v", b, made)
		}
	}
	r := newRig(t)
	for b, want := range map[string]time.Duration{`{}`: -1, `{"retire_others":"0s"}`: 0, `{"retire_others":"24h"}`: 24 * time.Hour} {
		r.ask("POST", "/api/v1/devices/pump/credentials", body(b))
		if r.registry.cred.RetireOthers != want {
			t.Errorf("%s: others are retired after %v, want %v", b, r.registry.cred.RetireOthers, want)
		}
	}
	// Labels can be taken away, and are not by what does not name them.
	r.ask("PATCH", "/api/v1/devices/pump", body(`{"labels":{"a":"b"}}`))
	r.ask("PATCH", "/api/v1/devices/pump", body(`{"name":"P"}`))
	if d := r.registry.known["pump"]; d.Name != "P" || d.Labels["a"] != "b" {
		t.Errorf("patched: %+v", d)
	}
	b, err := json.Marshal(httpapi.DevicePatch{Labels: map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	r.ask("PATCH", "/api/v1/devices/pump", body(string(b)))
	if d := r.registry.known["pump"]; len(d.Labels) != 0 {
		t.Errorf("labels are still there after %s: %v", b, d.Labels)
	}
}

func TestACommandIsSentAsAsked(t *testing.T) {
	r := newRig(t)
	a := r.ask("POST", "/api/v1/devices/pump/commands", as("operator"), body(`{"id":"c/1","name":"flush","payload":{"s":1},"ttl":"90s","not_before":"2026-05-04T03:02:01Z",
		"execution_timeout":30,"max_attempts":3,"one_way":true,"urgent":true,"supersede_key":"k","feedback":"negative"}`))
	want := devices.Request{
		ID: "c/1", Device: "pump", Name: "flush", Payload: []byte(`{"s":1}`), ContentType: "application/json", TTL: 90 * time.Second, NotBefore: then,
		ExecutionTimeout: 30 * time.Second, MaxAttempts: 3, OneWay: true, Urgent: true, SupersedeKey: "k", Feedback: "negative", Source: "api the-operator",
	}
	if d := cmp.Diff(want, r.queue.request); d != "" {
		t.Error(d)
	}
	if a.status != 201 || a.header.Get("Location") != "/api/v1/commands/c%2F1" {
		t.Errorf("%d, Location %q", a.status, a.header.Get("Location"))
	}
	// Location leads to it, with its payload.
	var c httpapi.Command
	r.into(&c, 200, "GET", a.header.Get("Location"))
	if c.Command.ID != "c/1" || c.Payload == nil || *c.Payload != `{"s":1}` || c.TTL != "1m30s" || len(c.History) != 1 {
		t.Errorf("%+v", c)
	}
	// The same in CBOR, whose payload is no text, with the id in a header.
	cbor := "\xa2\x64name\x65flush\x67payload\x42\xff\x00"
	send := func(key string) *answered {
		return r.ask("POST", "/api/v1/devices/pump/commands", body(cbor), header("Content-Type", "application/cbor"), header("Idempotency-Key", key))
	}
	if a := send("key-1"); a.status != 201 || !strings.Contains(string(a.body), `"payload_base64": "/wA="`) {
		t.Errorf("CBOR = %d %s", a.status, a.body)
	}
	if a := send("key-1"); a.status != 200 {
		t.Errorf("the same again = %d %s", a.status, a.body)
	}
	if a := r.ask("POST", "/api/v1/devices/pump/commands", body(`{"id":"a","name":"n"}`), header("Idempotency-Key", "b")); a.code() != "bad_body" {
		t.Errorf("two ids = %d %s", a.status, a.body)
	}
}

func TestRefusalsOfTheQueueKeepTheirCode(t *testing.T) {
	for code, want := range map[string]int{
		"unknown_device": 404, "device_disabled": 409, "invalid_command": 400, "payload_too_large": 413, "queue_full": 429, "expired": 422,
		"conflict": 409, "unavailable": 503,
	} {
		r := newRig(t)
		a := submits(code)(r)
		if a.status != want || a.code() != code || a.message() != "because of "+code {
			t.Errorf("%s = %d %s", code, a.status, a.body)
		}
		if wait := code == "queue_full" || code == "unavailable"; wait != (a.header.Get("Retry-After") != "") {
			t.Errorf("%s: Retry-After %q", code, a.header.Get("Retry-After"))
		}
	}
}

func TestCommandsArePagedAndFiltered(t *testing.T) {
	r := newRig(t)
	for i := range 5 {
		r.ask("POST", "/api/v1/devices/pump/commands", body(fmt.Sprintf(`{"id":"c%d","name":"n","payload":"secret"}`, i)))
	}
	var ids []string
	for _, list := range []string{"/api/v1/devices/pump/commands?", "/api/v1/commands?device=pump&"} {
		next := ""
		for {
			var page httpapi.CommandPage
			r.into(&page, 200, "GET", list+"limit=2&state=QUEUED,SENT"+next)
			for _, c := range page.Commands {
				ids = append(ids, c.Command.ID)
				if c.Payload != nil {
					t.Error("a list has payloads")
				}
			}
			if page.Next == "" {
				break
			}
			next = "&before=" + page.Next
		}
	}
	if got, want := strings.Join(ids, " "), "c4 c3 c2 c1 c0 c4 c3 c2 c1 c0"; got != want {
		t.Errorf("ids %s, want %s", got, want)
	}
	if d := cmp.Diff([]devices.State{devices.Queued, devices.Sent}, r.queue.asked.States); d != "" {
		t.Error(d)
	}
	var none httpapi.CommandPage
	r.into(&none, 200, "GET", "/api/v1/commands?state=FAILED")
	if none.Commands == nil || len(none.Commands) != 0 {
		t.Errorf("no commands: %+v", none)
	}
}

func TestCancelTellsWhy(t *testing.T) {
	for _, how := range []func(*rig) *answered{
		calls("DELETE", "/api/v1/commands/c1?reason=not+needed"),
		calls("DELETE", "/api/v1/commands/c1", body(`{"reason":"not needed"}`)),
	} {
		r := newRig(t)
		withCommand(r)
		if a := how(r); a.status != 200 || !strings.Contains(string(a.body), "CANCELED") || r.queue.reason != "not needed" {
			t.Errorf("%d %s, reason %q", a.status, a.body, r.queue.reason)
		}
	}
	r := newRig(t)
	withCommand(r)
	if a := r.ask("DELETE", "/api/v1/commands/c1"); a.status != 200 || r.queue.reason != "" {
		t.Errorf("without a reason: %d %s", a.status, a.body)
	}
}

func TestMessagesOfALane(t *testing.T) {
	r := newRig(t)
	rec := func(payload string, flags spool.Flags) spool.Record {
		return spool.Record{Received: then.UnixMilli(), Device: []byte("pump"), Topic: []byte("alarm/x"), Payload: []byte(payload), Flags: flags}
	}
	r.lanes.records = []spool.Record{
		rec("hello", spool.FlagQoS2|spool.FlagRetain), rec("\xff\x00", spool.FlagQoS1|spool.FlagWill), rec(strings.Repeat("ü", 4<<10), 0), rec("", spool.FlagClockUnsynced),
	}
	r.lanes.records[0].Props = &spool.Props{ContentType: "text/plain"}
	var page httpapi.MessagePage
	r.into(&page, 200, "GET", "/api/v1/lanes/alarm/messages?limit=2")
	hello, empty := "hello", ""
	want := []httpapi.Message{
		{Seq: 3, ID: "gw/e1/alarm/3", Device: "pump", Topic: "alarm/x", Received: then, QoS: 2, Retain: true, Content: httpapi.Content{ContentType: "text/plain", Size: 5, Payload: &hello}},
		{Seq: 4, ID: "gw/e1/alarm/4", Device: "pump", Topic: "alarm/x", Received: then, QoS: 1, Will: true, Content: httpapi.Content{Size: 2, PayloadBase64: "/wA="}},
	}
	if d := cmp.Diff(want, page.Messages); d != "" || page.Next != "4" {
		t.Errorf("next %q: %s", page.Next, d)
	}
	r.into(&page, 200, "GET", "/api/v1/lanes/alarm/messages?after="+page.Next)
	if len(page.Messages) != 2 {
		t.Fatalf("second page: %+v", page)
	}
	long, last := page.Messages[0], page.Messages[1]
	if !long.Truncated || long.Size != 8<<10 || *long.Payload != strings.Repeat("ü", 2<<10) {
		t.Errorf("a long one: size %d, truncated %t, %d bytes shown", long.Size, long.Truncated, len(*long.Payload))
	}
	if d := cmp.Diff(&empty, last.Payload); d != "" || !last.Unsynced {
		t.Errorf("an empty one: %+v", last)
	}
	page = httpapi.MessagePage{}
	r.into(&page, 200, "GET", "/api/v1/lanes/alarm/messages?after=6")
	if len(page.Messages) != 0 || page.Next != "" {
		t.Errorf("after the last: %+v", page)
	}
	r.into(&page, 200, "GET", "/api/v1/lanes/alarm/messages?after=18446744073709551615")
	if len(page.Messages) != 0 {
		t.Errorf("after the largest number: %+v", page)
	}

	// However many are asked for, an answer stays small.
	r.lanes.records = nil
	for range 1000 {
		r.lanes.records = append(r.lanes.records, rec(strings.Repeat("\xff", 64<<10), 0))
	}
	got := 0
	for next := ""; ; next = "&after=" + page.Next {
		page = httpapi.MessagePage{}
		r.into(&page, 200, "GET", "/api/v1/lanes/alarm/messages?limit=1000"+next)
		if got += len(page.Messages); len(page.Messages) > 257 {
			t.Fatalf("%d messages of 64 KiB in one answer", len(page.Messages))
		}
		if page.Next == "" {
			break
		}
	}
	if got != 1000 {
		t.Errorf("%d messages in all pages", got)
	}

	r.lanes.records, r.lanes.err = nil, errDisk
	if a := r.ask("GET", "/api/v1/lanes/alarm/messages"); a.code() != "internal" || strings.Contains(a.message(), errDisk.Error()) {
		t.Errorf("damaged: %d %.200s", a.status, a.body)
	}
	if !strings.Contains(r.log.String(), errDisk.Error()) {
		t.Error("the log does not say why")
	}
}

func TestTokensComeAndGo(t *testing.T) {
	r := newRig(t)
	var made httpapi.TokenMade
	r.into(&made, 201, "POST", "/api/v1/tokens", body(`{"name":"ci","role":"operator","lifetime":"1h"}`))
	if made.Token.Name != "ci" || made.Token.Role != httpapi.Operator || !made.Token.Expires.Equal(then.Add(time.Hour)) {
		t.Errorf("%+v", made)
	}
	if a := r.ask("GET", "/api/v1/status", as(made.Secret)); a.status != 200 {
		t.Errorf("with the new token: %d", a.status)
	}
	a := r.ask("GET", "/api/v1/tokens")
	if strings.Contains(string(a.body), made.Secret) {
		t.Error("the list has secrets")
	}
	if a := r.ask("DELETE", "/api/v1/tokens/ci"); a.status != 204 {
		t.Errorf("remove: %d", a.status)
	}
	if a := r.ask("GET", "/api/v1/status", as(made.Secret)); a.status != 401 {
		t.Errorf("with the removed token: %d", a.status)
	}
}

func TestChangesAreLogged(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		do   func(*rig) *answered
		want string
	}{
		{calls("POST", "/api/v1/devices", body(`{"id":"d1"}`)), "who=the-admin what=add_device object=d1 status=201"},
		{calls("POST", "/api/v1/devices/pump/credentials", body(`{}`)), "who=the-admin what=add_credential object=pump/k2 status=201"},
		{calls("DELETE", "/api/v1/devices/pump/credentials/k1"), "who=the-admin what=remove_credential object=pump/k1 status=204"},
		{calls("PATCH", "/api/v1/devices/off", as("operator"), body(`{"enabled":true}`)), "who=the-operator what=change_device object=off status=200"},
		{calls("POST", "/api/v1/devices/pump/commands", body(`{"id":"c1","name":"n"}`)), "what=send_command object=pump/c1 status=201"},
		{calls("DELETE", "/api/v1/commands/c1"), "what=cancel_command object=c1 status=200"},
		{calls("DELETE", "/api/v1/devices/off", as("viewer")), "who=the-viewer what=remove_device object=off status=403"},
		{calls("POST", "/api/v1/tokens", body(`{"name":"ci","role":"viewer"}`)), "what=add_token object=ci status=201"},
		{calls("DELETE", "/api/v1/tokens/ci"), "what=remove_token object=ci status=204"},
	} {
		tc.do(r)
		lines := strings.Split(strings.TrimSpace(r.log.String()), "\n")
		if last := lines[len(lines)-1]; !strings.Contains(last, "level=INFO") || !strings.Contains(last, tc.want) {
			t.Errorf("log: %s\nwant %s", last, tc.want)
		}
	}
	before := r.log.String()
	r.ask("GET", "/api/v1/devices")
	if got := r.log.String(); got != before {
		t.Errorf("a look is logged: %s", got[len(before):])
	}
	for _, secret := range []string{"s3cret", "secret-of-ci", "Bearer"} {
		if strings.Contains(r.log.String(), secret) {
			t.Errorf("the log has %q", secret)
		}
	}
}

func TestAPanicIsAnAnswer(t *testing.T) {
	r := newRig(t)
	r.registry.panics = true
	a := r.ask("GET", "/api/v1/devices/pump")
	_, id, _ := strings.Cut(a.message(), "about failure ")
	if a.code() != "internal" || id == "" || !strings.Contains(r.log.String(), "id="+id) || !strings.Contains(r.log.String(), "stack=") {
		t.Errorf("%d %s, log %s", a.status, a.body, r.log.String())
	}
	if a := r.ask("GET", "/api/v1/devices"); a.status != 200 {
		t.Errorf("after that: %d", a.status)
	}
}

func TestStatusIsReadBack(t *testing.T) {
	r := newRig(t)
	var st httpapi.Status
	r.into(&st, 200, "GET", "/api/v1/status", as("viewer"), from(remote))
	if st.Gateway != "gw" || !st.Ledger.Balanced || len(st.Ledger.Accounts) != 1 || st.Certificates == nil || st.Upstreams == nil {
		t.Errorf("status = %+v", st)
	}
	r.source.status = httpapi.Status{
		Store: httpapi.Store{Level: "high"}, Devices: devices.Counts{Registered: 3}, Commands: devices.QueueCounts{Queued: 2, Submitted: 9},
		Certificates: []httpapi.Certificate{{Listener: "tls", File: "c.pem", Subject: "CN=gw", NotAfter: then}},
		Upstreams:    []httpapi.Upstream{{Name: "cloud"}}, Lanes: []spool.LaneStat{{Name: "alarm"}},
	}
	r.into(&st, 200, "GET", "/api/v1/status")
	if d := cmp.Diff(r.source.status.Certificates, st.Certificates); d != "" || st.Devices.Registered != 3 || st.Commands.Submitted != 9 {
		t.Errorf("status = %+v: %s", st, d)
	}
	var ups httpapi.UpstreamList
	r.into(&ups, 200, "GET", "/api/v1/upstreams")
	if len(ups.Upstreams) != 1 || ups.Upstreams[0].Name != "cloud" {
		t.Errorf("upstreams = %+v", ups)
	}
}

func TestALedgerThatDoesNotBalanceSaysSo(t *testing.T) {
	l := httpapi.NewLedger([]spool.Account{{Accepted: spool.Count{Messages: 3, Bytes: 30}, Pending: spool.Count{Messages: 3, Bytes: 29}}})
	if l.Balanced {
		t.Error("one byte is missing, and the ledger is balanced")
	}
}

func TestMetricsCountRequests(t *testing.T) {
	r := newRig(t)
	r.ask("GET", "/api/v1/status", nobody, from(remote))
	r.ask("GET", "/api/v1/devices/pump", as("wrong"))
	b := string(r.ask("GET", "/metrics", nobody).body)
	for _, want := range []string{
		`holdfast_httpapi_requests_total{code="401",route="/api/v1/status"} 1`,
		`holdfast_httpapi_request_seconds_count{route="/api/v1/status"} 1`,
		`holdfast_httpapi_wrong_tokens_total 1`,
		`holdfast_httpapi_event_streams 0`,
		`holdfast_httpapi_event_streams_cut_total 0`,
	} {
		if !strings.Contains(b, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if strings.Contains(b, "pump") {
		t.Error("a device is in a label")
	}
}

// listen runs the API on a loopback address until the test ends.
func (r *rig) listen() (address string, stop func() error) {
	r.t.Helper()
	if err := r.api.Listen(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	done := make(chan error, 1)
	go func() { done <- r.api.Run(ctx) }()
	stop = func() error {
		cancel()
		select {
		case err := <-done:
			done <- err
			return err
		case <-time.After(10 * time.Second):
			return fmt.Errorf("Run does not end")
		}
	}
	r.t.Cleanup(func() {
		if err := stop(); err != nil {
			r.t.Errorf("Run = %v", err)
		}
	})
	return r.api.Addr().String(), stop
}

// TestHeadIsGetWithoutABody asks a real server, which is what leaves the body out.
func TestHeadIsGetWithoutABody(t *testing.T) {
	r := newRig(t)
	withCommand(r)
	address, _ := r.listen()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	for id, w := range rows {
		if w.method != http.MethodGet || endless[id] {
			continue
		}
		var lengths [2]int64
		for i, method := range []string{http.MethodGet, http.MethodHead} {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://"+address+w.target, nil)
			if err != nil {
				t.Fatal(err)
			}
			as("viewer")(req)
			if needs[id] != "viewer" {
				as("admin")(req)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != 200 || method == http.MethodHead && len(b) != 0 {
				t.Errorf("%s %s = %d with %d bytes, %v", method, w.target, resp.StatusCode, len(b), err)
			}
			lengths[i] = resp.ContentLength
		}
		if lengths[0] != lengths[1] && id != "get_metrics" && id != "export_lane" {
			t.Errorf("%s: Content-Length %d, of HEAD %d", w.target, lengths[0], lengths[1])
		}
	}
	// A stream has headers only, and ends.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, "http://"+address+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	as("viewer")(req)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("HEAD of events: %d %v", resp.StatusCode, resp.Header)
	}
}

func TestRunServesAndStops(t *testing.T) {
	r := newRig(t)
	address, stop := r.listen()
	// A peer that sends nothing does not hold the stop up.
	silent, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if err := stop(); err != nil {
		t.Errorf("Run = %v", err)
	}
}

func TestAnAddressInUseIsNamed(t *testing.T) {
	a := newRig(t)
	address, _ := a.listen()
	reg := prometheus.NewRegistry()
	b := httpapi.New(httpapi.Config{Address: address}, httpapi.Parts{Gatherer: reg, Log: slog.New(slog.DiscardHandler)})
	if err := b.Listen(t.Context()); err == nil || !strings.Contains(err.Error(), "http.address "+address) {
		t.Errorf("Listen = %v", err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("Close = %v", err)
	}
}

func FuzzBody(f *testing.F) {
	f.Add([]byte(`{"id":"d","labels":{"a":"b"},"enabled":true,"credential":{"kind":"none"}}`))
	f.Add([]byte(`{"id":"d","id":"e"}`))
	f.Add([]byte(`{"id":1,"credential":{"kind":null}} x`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v, again httpapi.NewDevice
		if httpapi.DecodeStrict(b, &v) != nil {
			return
		}
		out, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := httpapi.DecodeStrict(out, &again); err != nil {
			t.Fatalf("%s came back as %s: %v", b, out, err)
		}
		if len(v.Labels) == 0 {
			v.Labels = nil // an empty one is left out
		}
		if d := cmp.Diff(v, again); d != "" {
			t.Fatalf("%s: %s", b, d)
		}
	})
}

// BenchmarkStatus is what a request costs without a network.
func BenchmarkStatus(b *testing.B) {
	reg := prometheus.NewRegistry()
	api := httpapi.New(httpapi.Config{}, httpapi.Parts{Source: &source{}, Tokens: newTokens(), Gatherer: reg, Log: slog.New(slog.DiscardHandler)})
	req := httptest.NewRequest("GET", "/api/v1/status", nil)
	as("viewer")(req)
	for b.Loop() {
		api.Handler().ServeHTTP(httptest.NewRecorder(), req)
	}
}

func TestPurgeTakesWhatIsSaid(t *testing.T) {
	r := newRig(t)
	const target = "/api/v1/lanes/alarm/purge"
	var got httpapi.Purged
	for b, want := range map[string][]any{
		`{"all":true}`: {time.Time{}, uint64(0)},
		`{"up_to":7}`:  {time.Time{}, uint64(7)},
		`{"older_than":"2026-05-04T03:02:01Z","up_to":7}`: {then, uint64(7)},
		`{"parked":true}`:                    {"parked", ""},
		`{"parked":true,"upstream":"cloud"}`: {"parked", "cloud"},
	} {
		r.into(&got, 200, "POST", target, body(b))
		if d := cmp.Diff(want, r.lanes.purged); d != "" || got.Lane != "alarm" || got.Purged.Messages != 2 {
			t.Errorf("%s: answer %+v, %s", b, got, d)
		}
	}
	r.into(&got, 200, "POST", target, body(`{"older_than":"72h"}`))
	if age := time.Since(r.lanes.purged[0].(time.Time)) - 72*time.Hour; age < 0 || age > time.Minute {
		t.Errorf("72 hours ago is %v wrong", age)
	}
	r.lanes.purged = nil
	for _, b := range []string{`{}`, `{"all":false}`, `{"all":true,"up_to":7}`, `{"older_than":"-1h"}`, `{"older_than":"yesterday"}`, `{"up_to":-1}`, `{"parked":true,"all":true}`, `{"parked":true,"up_to":7}`, `{"upstream":"cloud"}`, `{"all":true,"upstream":"cloud"}`} {
		if a := r.ask("POST", target, body(b)); a.code() != "bad_body" || r.lanes.purged != nil {
			t.Errorf("%s = %d %s, purged %v", b, a.status, a.body, r.lanes.purged)
		}
	}
	r.lanes.err = errDisk
	if a := r.ask("POST", target, body(`{"all":true}`)); a.code() != "unavailable" {
		t.Errorf("a disk that fails = %d %s", a.status, a.body)
	}
}

func withParked(r *rig) {
	record := func(payload string) []byte {
		return spool.AppendRecord(nil, &spool.Record{Received: then.UnixMilli(), Device: []byte("pump"), Topic: []byte("alarm/x"), Payload: []byte(payload)})
	}
	park := func(upstream string, seq uint64, rec []byte) {
		r.lanes.parked = append(r.lanes.parked, spool.ParkedMessage{
			Lane: "alarm", Upstream: upstream, Seq: seq, AtMS: then.UnixMilli(), Reason: "topic is not allowed", Record: rec,
		})
	}
	park("cloud", 3, record("a"))
	park("lab", 3, record("a"))
	park("cloud", 5, record("b"))
	park("cloud", 6, []byte("garbage"))
}

// TestParkedMessagesAreShownAndReplayed goes through them page by page.
func TestParkedMessagesAreShownAndReplayed(t *testing.T) {
	r := newRig(t)
	withParked(r)
	var got []string
	for next := ""; ; {
		var page httpapi.ParkedPage
		r.into(&page, 200, "GET", "/api/v1/parked?limit=1"+next)
		if len(page.Messages) != 1 {
			t.Fatalf("page %+v", page)
		}
		m := page.Messages[0]
		what := "unreadable"
		if m.Payload != nil {
			what = *m.Payload
		}
		if m.Unreadable != (what == "unreadable") || m.Reason != "topic is not allowed" || !m.ParkedAt.Equal(then) {
			t.Errorf("shown as %+v", m)
		}
		got = append(got, fmt.Sprint(m.Upstream, m.Seq, what))
		if page.Next == "" {
			break
		}
		next = "&after=" + url.QueryEscape(page.Next)
	}
	want := []string{"cloud3a", "lab3a", "cloud5b", "cloud6unreadable"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for target, want := range map[string]int{"?upstream=lab": 1, "?lane=alarm&upstream=cloud": 3, "?lane=system": 0} {
		var page httpapi.ParkedPage
		r.into(&page, 200, "GET", "/api/v1/parked"+target)
		if len(page.Messages) != want || page.Next != "" {
			t.Errorf("%s shows %d, next %q", target, len(page.Messages), page.Next)
		}
	}
	for _, after := range []string{"x", "alarm/x/cloud", "/3/cloud", "alarm/3"} {
		if a := r.ask("GET", "/api/v1/parked?after="+url.QueryEscape(after)); a.code() != "bad_query" {
			t.Errorf("after %q: %s", after, a.body)
		}
	}

	for _, b := range []string{`{}`, `{"lane":"alarm"}`, `{"lane":"alarm","upstream":"cloud","seqs":[]}`, `{"lane":"alarm","upstream":"cloud","seqs":[-1]}`} {
		if a := r.ask("POST", "/api/v1/parked/replay", body(b)); a.code() != "bad_body" {
			t.Errorf("%s: %s", b, a.body)
		}
	}
	var done httpapi.Replayed
	r.into(&done, 200, "POST", "/api/v1/parked/replay", body(`{"lane":"alarm","upstream":"cloud","seqs":[5,9]}`))
	if done.Replayed != 1 || len(r.lanes.parked) != 3 {
		t.Errorf("%+v, %d left", done, len(r.lanes.parked))
	}
	r.lanes.err = fmt.Errorf("message 6 stays parked: %w", spool.ErrRecord)
	r.into(&done, 200, "POST", "/api/v1/parked/replay", body(`{"lane":"alarm","upstream":"cloud"}`))
	if done.Replayed != 2 || done.Problem == "" {
		t.Errorf("%+v", done)
	}
}
