package httpapi_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"holdfast/internal/audit"
)

// Every row that changes something, or hands out much, is in the audit log when its answer goes out; others are not.
func TestEveryActIsNotedBeforeItsAnswer(t *testing.T) {
	d := described(t)
	for path, methods := range d.paths {
		for method, op := range methods {
			w, ok := rows[op.ID]
			if !ok || endless[op.ID] || op.ID == "sign_in" || op.ID == "sign_out" { // those two are TestSessionsAreNoted's
				continue
			}
			r := newRig(t)
			if w.ready != nil {
				w.ready(r)
			}
			r.audit.entries = nil
			if a := w.call(r); a.status >= 400 {
				t.Errorf("%s = %d", op.ID, a.status)
			}
			acts := !strings.EqualFold(method, http.MethodGet) && op.ID != "diff_config" || op.ID == "export_lane"
			switch n := len(r.audit.entries); {
			case acts && n != 1:
				t.Errorf("%s %s: %d records", method, path, n)
			case !acts && n != 0:
				t.Errorf("%s %s is noted: %+v", method, path, r.audit.entries)
			case acts:
				e := r.audit.entries[0]
				if e.Who != "the-admin" || e.Role != "admin" || e.From != local || e.Act != op.ID || e.Result != audit.Done && e.Result != audit.Begun {
					t.Errorf("%+v", e)
				}
			}
		}
	}
}

func TestSessionsAreNoted(t *testing.T) {
	r := newRig(t)
	in := r.signIn("operator")
	r.ask("POST", "/signout", nobody, in.cookie, form("csrf="+in.CSRF))
	r.ask("POST", "/signout", nobody, form("")) // who has no session does nothing
	var acts []string
	for _, e := range r.audit.entries {
		acts = append(acts, e.Who+" "+e.Act)
	}
	if got := strings.Join(acts, ", "); got != "the-operator sign_in, the-operator sign_out" {
		t.Errorf("noted %s", got)
	}
}

func TestWhatIsNotedOfAnAct(t *testing.T) {
	r := newRig(t)
	const secret = "not-for-the-log"
	r.ask("POST", "/api/v1/devices", body(`{"id":"new","role":"device","credential":{"kind":"password","password":"`+secret+`-1"}}`))
	r.ask("PATCH", "/api/v1/devices/new", body(`{"enabled":false,"role":"device","name":"n"}`), as("operator"))
	r.ask("POST", "/api/v1/devices/pump/commands", body(`{"id":"c1","name":"flush","payload":"`+secret+`"}`), as("operator"), from(remote))
	r.ask("POST", "/api/v1/devices/pump/credentials", body(`{"kind":"password","password":"`+secret+`-2"}`))
	r.ask("DELETE", "/api/v1/tokens/x")
	r.ask("DELETE", "/api/v1/devices/pump", nobody)
	want := []audit.Entry{
		{Who: "the-admin", Role: "admin", From: local, Act: "add_device", Object: "new", Result: "done", Status: 201, Detail: "device"},
		{Who: "the-operator", Role: "operator", From: local, Act: "change_device", Object: "new", Result: "refused", Status: 403, Code: "forbidden"},
		{Who: "the-operator", Role: "operator", From: remote, Act: "send_command", Object: "pump/c1", Result: "done", Status: 201, Detail: "flush"},
		{Who: "the-admin", Role: "admin", From: local, Act: "add_credential", Result: "done", Status: 201, Detail: "password"},
		{Who: "the-admin", Role: "admin", From: local, Act: "remove_token", Object: "x", Result: "refused", Status: 404, Code: "unknown_token"},
	}
	got := r.audit.entries
	for i := range got {
		got[i].Seq, got[i].At = 0, want[0].At
		if strings.Contains(got[i].Detail+got[i].Object, secret) {
			t.Errorf("a secret or a payload is in it: %+v", got[i])
		}
	}
	if len(got) == len(want) {
		want[3].Object = got[3].Object // with the credential's id
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Nobody fills the log by trying tokens.
func TestWrongTokensAreNotedOnce(t *testing.T) {
	r := newRig(t)
	for range 20 {
		r.ask("DELETE", "/api/v1/devices/pump", as("wrong"))
	}
	if n := len(r.audit.entries); n != 1 || r.audit.entries[0].Act != "wrong_tokens" {
		t.Errorf("%d records: %+v", n, r.audit.entries)
	}
}

// What was done and could not be noted is not answered as if all were well, and a secret does not go out.
func TestAnActThatIsNotNotedIsNotAnsweredAsDone(t *testing.T) {
	r := newRig(t)
	r.audit.err = errDisk
	a := r.ask("POST", "/api/v1/tokens", body(`{"name":"ci","role":"viewer"}`))
	if a.code() != "audit_unavailable" || strings.Contains(string(a.body), `"secret"`) || !strings.Contains(a.message(), "it was done") {
		t.Errorf("%d %s", a.status, a.body)
	}
	// What was not handed out is not said to be done, and a refusal stays what it is.
	if a := r.ask("GET", "/api/v1/lanes/alarm/export"); a.code() != "audit_unavailable" || !strings.Contains(a.message(), "nothing was handed out") {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := r.ask("DELETE", "/api/v1/devices/x"); a.code() != "unknown_device" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestAuditPages(t *testing.T) {
	r := newRig(t)
	for _, id := range []string{"a", "b", "c"} {
		r.ask("POST", "/api/v1/devices", body(`{"id":"`+id+`"}`))
	}
	var page struct {
		Records []audit.Entry
		Next    string
		Head    audit.Head
	}
	r.into(&page, 200, "GET", "/api/v1/audit?act=add_device&limit=2")
	if len(page.Records) != 2 || page.Records[0].Object != "c" || page.Next != "2" || page.Head.Seq != 3 {
		t.Errorf("%+v", page)
	}
	page.Next = ""
	r.into(&page, 200, "GET", "/api/v1/audit?act=add_device&limit=2&before=2")
	if len(page.Records) != 1 || page.Records[0].Object != "a" || page.Next != "" {
		t.Errorf("%+v", page)
	}
	if a := r.ask("GET", "/api/v1/audit", as("operator")); a.status != http.StatusForbidden {
		t.Errorf("an operator reads it: %d", a.status)
	}
}
