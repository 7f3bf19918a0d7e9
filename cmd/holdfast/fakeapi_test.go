package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/testkit"
	"holdfast/spool"
)

const fakeToken = "fake-admin-token"

// fakeBegin is when everything in a fakeGateway happens; commands change a second after each other.
var fakeBegin = time.Date(2026, 3, 1, 6, 0, 0, 0, time.UTC)

// fakeGateway answers as the HTTP API of a gateway does, as far as the command line asks. Tests say what happens to commands.
type fakeGateway struct {
	*httptest.Server
	t testing.TB

	// submitted is called, in a goroutine of its own, for each command that is new.
	submitted func(id string)
	// spoil may answer a request itself: true if it did.
	spoil func(w http.ResponseWriter, r *http.Request) bool

	mu       sync.Mutex
	devices  map[string]*devices.Device
	commands []*httpapi.Command // the oldest first
	tokens   []httpapi.Token
	events   []httpapi.Event // ID fake-N, N from 1
	news     chan struct{}   // closed when there is another event
	streams  int             // open ones
	cut      chan struct{}   // closed to end the open streams
	calls    []string
	lanes    []spool.LaneStat
	parked   []parkedRow
	purged   purging     // what was asked for last
	replayed []replaying // what was asked for
}

// messages has one message a second since fakeBegin, 1 to what the lane has accepted, of which it keeps the last.
func (f *fakeGateway) messages(w http.ResponseWriter, lane string, q url.Values) {
	after, _ := strconv.ParseUint(q.Get("after"), 10, 64)
	page := httpapi.MessagePage{Messages: []httpapi.Message{}}
	for _, l := range f.lanes {
		seq := max(after+1, l.Accepted.Messages-l.Kept.Messages+1)
		if l.Name == lane && seq <= l.Accepted.Messages {
			page.Messages = append(page.Messages, httpapi.Message{Seq: seq, Received: fakeBegin.Add(time.Duration(seq) * time.Second)})
		}
	}
	fakeReply(w, http.StatusOK, page)
}

// listParked gives them two a page.
func (f *fakeGateway) listParked(w http.ResponseWriter, q url.Values) {
	from, _ := strconv.Atoi(q.Get("after"))
	page := struct {
		Messages []parkedRow `json:"messages"`
		Next     string      `json:"next,omitempty"`
	}{Messages: []parkedRow{}}
	for i := from; i < len(f.parked); i++ {
		m := f.parked[i]
		if q.Get("lane") != "" && m.Lane != q.Get("lane") || q.Get("upstream") != "" && m.Upstream != q.Get("upstream") {
			continue
		}
		if len(page.Messages) == 2 {
			page.Next = strconv.Itoa(i)
			break
		}
		page.Messages = append(page.Messages, m)
	}
	fakeReply(w, http.StatusOK, page)
}

func newFakeGateway(t testing.TB) *fakeGateway {
	f := &fakeGateway{t: t, devices: map[string]*devices.Device{}, news: make(chan struct{}), cut: make(chan struct{})}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(func() {
		f.cutStreams()
		f.Server.Close()
	})
	return f
}

func (f *fakeGateway) address() string { return strings.TrimPrefix(f.URL, "http://") }

// tokenFile writes the token into a file.
func (f *fakeGateway) tokenFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(fakeToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// addDevice puts a device there.
func (f *fakeGateway) addDevice(id string, change func(*devices.Device)) {
	d := &devices.Device{ID: id, Enabled: true, Role: "device", Created: fakeBegin, Updated: fakeBegin, Credentials: []devices.Credential{}}
	if change != nil {
		change(d)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.devices[id] = d
}

func connected(d *devices.Device) {
	d.Presence = devices.Presence{Connected: true, Since: fakeBegin, LastSeen: fakeBegin, Address: "10.0.0.7:50001", Protocol: "MQTT 5", Listener: "lan"}
}

// advance moves a command and tells of it.
func (f *fakeGateway) advance(id string, st devices.State, change func(*httpapi.Command)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.command(id)
	if c == nil {
		f.t.Errorf("there is no command %q", id)
		return
	}
	previous := c.State
	if st != previous {
		c.State, c.Updated, c.Reason = st, c.Updated.Add(time.Second), ""
	}
	if st == devices.Sent {
		c.Attempts++
	}
	if change != nil {
		change(c)
	}
	if st != previous {
		c.History = append(c.History, devices.Step{State: st, At: c.Updated, Reason: c.Reason})
	}
	f.tell(httpapi.Event{Kind: httpapi.KindCommand, At: c.Updated, Previous: previous.String(), Command: copyOf(c)})
}

func copyOf(c *httpapi.Command) *httpapi.Command {
	n := *c
	n.Payload, n.PayloadBase64, n.Result, n.ResultBase64, n.History = nil, "", nil, "", nil
	return &n
}

// tell publishes an event. mu is held.
func (f *fakeGateway) tell(ev httpapi.Event) {
	ev.ID = fmt.Sprintf("fake-%d", len(f.events)+1)
	f.events = append(f.events, ev)
	close(f.news)
	f.news = make(chan struct{})
}

func (f *fakeGateway) command(id string) *httpapi.Command {
	for _, c := range f.commands {
		if c.ID == id {
			return c
		}
	}
	return nil
}

// cutStreams ends the streams that are open.
func (f *fakeGateway) cutStreams() {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.cut)
	f.cut = make(chan struct{})
}

func (f *fakeGateway) called(prefix string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.calls {
		if strings.HasPrefix(c, prefix) {
			n++
		}
	}
	return n
}

func fakeFail(w http.ResponseWriter, status int, code, message string) {
	fakeReply(w, status, httpapi.Error{Error: httpapi.ErrorBody{Code: code, Message: message}})
}

func fakeReply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func (f *fakeGateway) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.calls = append(f.calls, r.Method+" "+r.URL.RequestURI())
	f.mu.Unlock()
	if f.spoil != nil && f.spoil(w, r) {
		return
	}
	if r.Header.Get("Authorization") != "Bearer "+fakeToken {
		fakeFail(w, http.StatusUnauthorized, "unauthorized", "a token is needed, as Authorization: Bearer TOKEN")
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		f.t.Error(err)
	}
	if len(body) > 0 && r.Header.Get("Content-Type") != "application/json" {
		f.t.Errorf("%s %s has a body of type %q", r.Method, r.URL.Path, r.Header.Get("Content-Type"))
	}
	path := strings.Split(strings.TrimPrefix(r.URL.EscapedPath(), "/api/v1/"), "/")
	for i := range path {
		path[i], _ = url.PathUnescape(path[i])
	}
	route := r.Method + " " + path[0]
	if len(path) > 1 {
		route += "/*"
	}
	if len(path) > 2 {
		route += "/" + path[2]
	}
	decode := func(v any) bool {
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.DisallowUnknownFields()
		if err := dec.Decode(v); err != nil {
			fakeFail(w, http.StatusBadRequest, "bad_body", "body: "+err.Error())
			return false
		}
		return true
	}
	if route == "GET events" {
		f.serveEvents(w, r)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var d *devices.Device
	if path[0] == "devices" && len(path) > 1 {
		if d = f.devices[path[1]]; d == nil {
			fakeFail(w, http.StatusNotFound, devices.CodeUnknownDevice, fmt.Sprintf("device %q: no such device", path[1]))
			return
		}
	}
	switch route {
	case "GET devices":
		f.listDevices(w, r.URL.Query())
	case "POST devices":
		var n httpapi.NewDevice
		if decode(&n) {
			f.newDevice(w, &n)
		}
	case "GET devices/*":
		fakeReply(w, http.StatusOK, d)
	case "PATCH devices/*":
		var p httpapi.DevicePatch
		if !decode(&p) {
			return
		}
		if p.Enabled != nil {
			d.Enabled = *p.Enabled
		}
		if p.Name != nil {
			d.Name = *p.Name
		}
		if p.Role != nil {
			d.Role = *p.Role
		}
		if p.Labels != nil {
			d.Labels = p.Labels
		}
		fakeReply(w, http.StatusOK, d)
	case "DELETE devices/*":
		delete(f.devices, d.ID)
		w.WriteHeader(http.StatusNoContent)
	case "POST devices/*/credentials":
		var n httpapi.NewCredential
		if decode(&n) {
			d.Credentials = append(d.Credentials, devices.Credential{ID: "c" + strconv.Itoa(len(d.Credentials)+1), Kind: n.Kind, Created: fakeBegin})
			fakeReply(w, http.StatusCreated, httpapi.CredentialMade{Credential: d.Credentials[len(d.Credentials)-1], Secret: "new-secret-of-" + d.ID})
		}
	case "POST devices/*/commands":
		f.newCommand(w, d, body)
	case "GET commands":
		f.listCommands(w, r.URL.Query())
	case "GET commands/*", "DELETE commands/*":
		c := f.command(path[1])
		if c == nil {
			fakeFail(w, http.StatusNotFound, devices.CodeUnknown, fmt.Sprintf("there is no command %q", path[1]))
			return
		}
		if r.Method == http.MethodDelete {
			var b httpapi.CancelRequest
			if len(body) > 0 && !decode(&b) {
				return
			}
			c.State, c.Reason = devices.Canceled, b.Reason
		}
		fakeReply(w, http.StatusOK, c)
	case "GET status":
		fakeReply(w, http.StatusOK, httpapi.Status{Gateway: "fake", Lanes: f.lanes})
	case "GET lanes":
		fakeReply(w, http.StatusOK, httpapi.LaneList{Lanes: f.lanes})
	case "GET lanes/*/messages":
		f.messages(w, path[1], r.URL.Query())
	case "POST lanes/*/purge":
		if decode(&f.purged) {
			fakeReply(w, http.StatusOK, purged{Lane: path[1], Purged: spool.Count{Messages: 3, Bytes: 300}})
		}
	case "GET parked":
		f.listParked(w, r.URL.Query())
	case "POST parked/*":
		var ask replaying
		if decode(&ask) {
			f.replayed = append(f.replayed, ask)
			answer := map[string]any{"replayed": 1}
			if ask.Upstream == "lab" {
				answer["problem"] = "message 4: not a record"
			}
			fakeReply(w, http.StatusOK, answer)
		}
	case "GET tokens":
		fakeReply(w, http.StatusOK, httpapi.TokenList{Tokens: f.tokens})
	case "POST tokens":
		var n httpapi.NewToken
		if decode(&n) {
			f.tokens = append(f.tokens, httpapi.Token{Name: n.Name, Role: n.Role, Created: fakeBegin})
			fakeReply(w, http.StatusCreated, httpapi.TokenMade{Token: f.tokens[len(f.tokens)-1], Secret: "secret-of-" + n.Name})
		}
	case "DELETE tokens/*":
		before := len(f.tokens)
		f.tokens = slices.DeleteFunc(f.tokens, func(t httpapi.Token) bool { return t.Name == path[1] })
		if len(f.tokens) == before {
			fakeFail(w, http.StatusNotFound, "unknown_token", fmt.Sprintf("there is no token %q", path[1]))
			return
		}
		w.WriteHeader(http.StatusNoContent)
	default:
		f.t.Errorf("unexpected request %s %s", r.Method, r.URL)
		fakeFail(w, http.StatusNotFound, "not_found", "there is nothing here")
	}
}

func (f *fakeGateway) newDevice(w http.ResponseWriter, n *httpapi.NewDevice) {
	if strings.ContainsAny(n.ID, "/+# ") {
		fakeFail(w, http.StatusBadRequest, "invalid_device", fmt.Sprintf("not a device id: %q", n.ID))
		return
	}
	if f.devices[n.ID] != nil {
		fakeFail(w, http.StatusConflict, "device_exists", fmt.Sprintf("device %q: device exists already", n.ID))
		return
	}
	d := &devices.Device{
		ID: n.ID, Name: n.Name, Labels: n.Labels, Role: n.Role, Enabled: n.Enabled == nil || *n.Enabled, Created: fakeBegin,
		Updated: fakeBegin, Credentials: []devices.Credential{},
	}
	if d.Role == "" {
		d.Role = devices.DefaultRole
	}
	made := httpapi.DeviceMade{Device: *d}
	kind := devices.CredentialToken
	if n.Credential != nil && n.Credential.Kind != "" {
		kind = n.Credential.Kind
	}
	if kind == devices.CredentialToken {
		made.Secret = "secret-of-" + n.ID
	}
	if kind != "none" {
		d.Credentials = append(d.Credentials, devices.Credential{ID: "c1", Kind: kind, Created: fakeBegin})
		if n.Credential != nil {
			d.Credentials[0].Fingerprint = n.Credential.Fingerprint
		}
	}
	f.devices[n.ID] = d
	made.Device = *d
	fakeReply(w, http.StatusCreated, made)
}

func (f *fakeGateway) listDevices(w http.ResponseWriter, q url.Values) {
	limit, _ := strconv.Atoi(q.Get("limit"))
	page := httpapi.DevicePage{Devices: []devices.Device{}}
	var ids []string
	for id := range f.devices {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		d := f.devices[id]
		if id <= q.Get("after") || !strings.Contains(id+d.Name, q.Get("search")) ||
			q.Get("role") != "" && d.Role != q.Get("role") ||
			q.Get("connected") != "" && q.Get("connected") != strconv.FormatBool(d.Presence.Connected) ||
			q.Get("enabled") != "" && q.Get("enabled") != strconv.FormatBool(d.Enabled) {
			continue
		}
		if len(page.Devices) == limit {
			page.Next = page.Devices[limit-1].ID
			break
		}
		page.Devices = append(page.Devices, *d)
	}
	fakeReply(w, http.StatusOK, page)
}

func (f *fakeGateway) newCommand(w http.ResponseWriter, d *devices.Device, body []byte) {
	s, err := wire.DecodeSubmit(body)
	if err != nil {
		fakeFail(w, http.StatusBadRequest, "bad_body", err.Error())
		return
	}
	if !d.Enabled {
		fakeFail(w, http.StatusConflict, devices.CodeDisabled, fmt.Sprintf("device %q is disabled", d.ID))
		return
	}
	if c := f.command(s.ID); c != nil {
		if c.Name != s.Name {
			fakeFail(w, http.StatusConflict, devices.CodeConflict, fmt.Sprintf("command %q is another one already", s.ID))
			return
		}
		fakeReply(w, http.StatusOK, c)
		return
	}
	text := string(s.Payload)
	c := &httpapi.Command{
		Command: devices.Command{
			ID: s.ID, Device: d.ID, Name: s.Name, State: devices.Queued, Created: fakeBegin, Updated: fakeBegin, Expires: fakeBegin.Add(24 * time.Hour),
			NotBefore: s.NotBefore.Time, MaxAttempts: 10, OneWay: s.OneWay, Urgent: s.Urgent, SupersedeKey: s.SupersedeKey, Feedback: "full",
			Source: "api admin", ContentType: s.ContentType, History: []devices.Step{{State: devices.Queued, At: fakeBegin}},
		},
		TTL: time.Duration(s.TTL).String(), ExecutionTimeout: time.Duration(s.ExecutionTimeout).String(), Payload: &text,
	}
	f.commands = append(f.commands, c)
	f.tell(httpapi.Event{Kind: httpapi.KindCommand, At: c.Updated, Command: copyOf(c)})
	fakeReply(w, http.StatusCreated, c)
	if f.submitted != nil {
		go f.submitted(s.ID)
	}
}

func (f *fakeGateway) listCommands(w http.ResponseWriter, q url.Values) {
	limit, _ := strconv.Atoi(q.Get("limit"))
	before := len(f.commands)
	if b, err := strconv.Atoi(q.Get("before")); err == nil {
		before = b
	}
	page := httpapi.CommandPage{Commands: []httpapi.Command{}}
	for i := before - 1; i >= 0; i-- {
		c := f.commands[i]
		if q.Get("device") != "" && c.Device != q.Get("device") || q.Get("state") != "" && !slices.Contains(strings.Split(q.Get("state"), ","), c.State.String()) {
			continue
		}
		if len(page.Commands) == limit {
			page.Next = strconv.Itoa(i + 1)
			break
		}
		page.Commands = append(page.Commands, *copyOf(c))
	}
	fakeReply(w, http.StatusOK, page)
}

func (f *fakeGateway) serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	rc := http.NewResponseController(w)
	f.mu.Lock()
	next := len(f.events)
	if n, err := strconv.Atoi(strings.TrimPrefix(r.Header.Get("Last-Event-ID"), "fake-")); err == nil {
		next = n
	}
	cut := f.cut
	f.streams++
	f.mu.Unlock()
	_, _ = io.WriteString(w, ": here\n\n")
	_ = rc.Flush()
	q := r.URL.Query()
	for {
		f.mu.Lock()
		events, news := f.events[next:], f.news
		f.mu.Unlock()
		for _, ev := range events {
			next++
			if c := q.Get("command"); c != "" && (ev.Command == nil || ev.Command.ID != c) {
				continue
			}
			data, _ := json.Marshal(ev)
			fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", ev.ID, ev.Kind, data)
		}
		_ = rc.Flush()
		select {
		case <-news:
		case <-cut:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// called runs the program as main does, and gives how it ended and what it wrote.
type ran struct {
	code           int
	stdout, stderr string
}

func runIt(ctx context.Context, args ...string) ran {
	var out, errs testkit.Buffer
	code := run(ctx, args, &out, &errs)
	return ran{code, out.String(), errs.String()}
}

// ask runs a command against f.
func (f *fakeGateway) ask(t *testing.T, args ...string) ran {
	t.Helper()
	return runIt(t.Context(), append(args, "--address", f.address(), "--token-file", f.tokenFile(t))...)
}
