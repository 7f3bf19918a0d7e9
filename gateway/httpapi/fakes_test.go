package httpapi_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/audit"
	"holdfast/spool"
)

var (
	then    = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	errDisk = errors.New("disk is gone")
)

// source is a gateway that is ready, or that is not.
type source struct {
	err    error
	panics bool
	status httpapi.Status
}

func (s *source) Ready() error {
	if s.panics {
		panic("no")
	}
	return s.err
}

func (s *source) Status() httpapi.Status { return s.status }

func (s *source) History(since time.Time) httpapi.History {
	h := httpapi.History{EveryS: 10}
	if since.Before(then) {
		h.Points = []httpapi.HistoryPoint{{At: then, Accepted: 2.5, Delivered: 1, AckP50: .001, AckP99: .01}}
	}
	return h
}

// tokens has one token for each role, whose secret is the role's name, and those that are added.
type tokens struct {
	mu     sync.Mutex
	known  map[string]httpapi.Token
	err    error
	panics atomic.Bool
}

func newTokens() *tokens {
	t := &tokens{known: map[string]httpapi.Token{}}
	for _, r := range []httpapi.Role{httpapi.Viewer, httpapi.Operator, httpapi.Admin} {
		t.known[r.String()] = httpapi.Token{Name: "the-" + r.String(), Role: r, Created: then}
	}
	return t
}

func (t *tokens) Check(token string) (string, httpapi.Role, bool) {
	if t.panics.Load() {
		panic("no")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.known[token]
	return k.Name, k.Role, ok
}

func (t *tokens) List() []httpapi.Token {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Values(t.known), func(a, b httpapi.Token) int { return cmp.Compare(a.Name, b.Name) })
}

func (t *tokens) Add(name string, role httpapi.Role, lifetime time.Duration) (httpapi.Token, string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	secret := "secret-of-" + name
	switch _, there := t.known[secret]; {
	case t.err != nil:
		return httpapi.Token{}, "", t.err
	case there:
		return httpapi.Token{}, "", fmt.Errorf("%s: %w", name, httpapi.ErrTokenExists)
	case len(t.known) >= 50:
		return httpapi.Token{}, "", fmt.Errorf("there are 50: %w", httpapi.ErrTooManyTokens)
	}
	k := httpapi.Token{Name: name, Role: role, Created: then}
	if lifetime > 0 {
		k.Expires = then.Add(lifetime)
	}
	t.known[secret] = k
	return k, secret, nil
}

func (t *tokens) Remove(name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	for secret, k := range t.known {
		if k.Name == name {
			delete(t.known, secret)
			return nil
		}
	}
	return fmt.Errorf("%s: %w", name, httpapi.ErrNoToken)
}

// registry is a registry in memory.
type registry struct {
	mu     sync.Mutex
	known  map[string]devices.Device
	asked  devices.DeviceFilter // the last
	cred   devices.NewCredential
	added  devices.NewDevice
	err    error // of whatever changes something
	panics bool
}

func (r *registry) look(id string) (devices.Device, error) {
	d, ok := r.known[id]
	switch {
	case strings.ContainsAny(id, "+#"):
		return d, fmt.Errorf("%q: %w", id, devices.ErrBadID)
	case !ok:
		return d, fmt.Errorf("%q: %w", id, devices.ErrUnknownDevice)
	}
	return d, nil
}

func (r *registry) Add(_ context.Context, d devices.NewDevice) (devices.Device, string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.added = d
	_, err := r.look(d.ID)
	switch {
	case r.err != nil:
		return devices.Device{}, "", r.err
	case errors.Is(err, devices.ErrBadID):
		return devices.Device{}, "", err
	case err == nil:
		return devices.Device{}, "", fmt.Errorf("%q: %w", d.ID, devices.ErrDeviceExists)
	case len(r.known) >= 50:
		return devices.Device{}, "", devices.ErrTooManyDevices
	}
	dev := devices.Device{ID: d.ID, Name: d.Name, Labels: d.Labels, Role: cmp.Or(d.Role, devices.DefaultRole), Enabled: !d.Disabled, Created: then, Updated: then}
	secret := ""
	if !d.NoCredential {
		dev.Credentials = []devices.Credential{{ID: "k1", Kind: devices.CredentialToken, Created: then}}
		secret = "s3cret"
	}
	r.known[d.ID] = dev
	return dev, secret, nil
}

func (r *registry) Get(id string) (devices.Device, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.panics {
		panic("no")
	}
	return r.look(id)
}

func (r *registry) List(f devices.DeviceFilter) (page []devices.Device, next string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = f
	for _, id := range slices.Sorted(maps.Keys(r.known)) {
		if id <= f.After {
			continue
		}
		if len(page) == f.Limit {
			return page, page[len(page)-1].ID, nil
		}
		page = append(page, r.known[id])
	}
	return page, "", nil
}

func (r *registry) Patch(_ context.Context, id string, p devices.DevicePatch) (devices.Device, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, err := r.look(id)
	if err = cmp.Or(r.err, err); err != nil {
		return d, err
	}
	if p.Name != nil {
		d.Name = *p.Name
	}
	if p.Labels != nil {
		d.Labels = p.Labels
	}
	if p.Enabled != nil {
		d.Enabled = *p.Enabled
	}
	if p.Role != nil {
		if *p.Role == "nobody" {
			return d, fmt.Errorf("role %q: %w", *p.Role, devices.ErrInvalid)
		}
		d.Role = *p.Role
	}
	r.known[id] = d
	return d, nil
}

func (r *registry) Remove(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.look(id); cmp.Or(r.err, err) != nil {
		return cmp.Or(r.err, err)
	}
	delete(r.known, id)
	return nil
}

func (r *registry) AddCredential(_ context.Context, id string, c devices.NewCredential) (devices.Credential, string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cred = c
	d, err := r.look(id)
	if err = cmp.Or(r.err, err); err != nil {
		return devices.Credential{}, "", err
	}
	made := devices.Credential{ID: fmt.Sprintf("k%d", len(d.Credentials)+1), Kind: c.Kind, Created: then, Fingerprint: c.Fingerprint}
	if c.Lifetime > 0 {
		made.Expires = then.Add(c.Lifetime)
	}
	d.Credentials = append(d.Credentials, made)
	r.known[id] = d
	return made, "s3cret", nil
}

func (r *registry) RemoveCredential(_ context.Context, id, credential string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, err := r.look(id)
	if err = cmp.Or(r.err, err); err != nil {
		return err
	}
	i := slices.IndexFunc(d.Credentials, func(c devices.Credential) bool { return c.ID == credential })
	if i < 0 {
		return fmt.Errorf("%s of %s: %w", credential, id, devices.ErrNoCredential)
	}
	d.Credentials = slices.Delete(slices.Clone(d.Credentials), i, i+1)
	r.known[id] = d
	return nil
}

// queue is a queue in memory: it moves a command on when a test says so, and tells the hub of each move.
type queue struct {
	mu      sync.Mutex
	reg     *registry
	hub     *httpapi.Events
	list    []devices.Command
	request devices.Request // the last
	asked   devices.CommandFilter
	reason  string
	err     error
	// obedient: devices do what they are told at once.
	obedient bool
}

func refusal(code string) error {
	return fmt.Errorf("submit: %w", &devices.Refusal{Code: code, Reason: "because of " + code, At: then})
}

func (q *queue) SubmitWait(_ context.Context, r *devices.Request) (devices.Command, bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.request = *r
	if q.err != nil {
		return devices.Command{}, false, q.err
	}
	d, err := q.reg.Get(r.Device)
	switch {
	case err != nil:
		return devices.Command{}, false, refusal(devices.CodeUnknownDevice)
	case !d.Enabled:
		return devices.Command{}, false, refusal(devices.CodeDisabled)
	case r.TTL < 0:
		return devices.Command{}, false, refusal(devices.CodeExpired)
	case r.Name == "a/b":
		return devices.Command{}, false, refusal(devices.CodeInvalid)
	case len(r.Payload) > devices.MaxCommandPayload:
		return devices.Command{}, false, refusal(devices.CodeTooLarge)
	}
	pending := 0
	for _, c := range q.list {
		if r.ID != "" && c.ID == r.ID {
			if c.Name != r.Name || !bytes.Equal(c.Payload, r.Payload) {
				return devices.Command{}, false, refusal(devices.CodeConflict)
			}
			return c, true, nil
		}
		if c.Device == r.Device && !c.Ended() {
			pending++
		}
	}
	if pending >= devices.MaxPendingPerDevice {
		return devices.Command{}, false, refusal(devices.CodeQueueFull)
	}
	c := devices.Command{
		ID: cmp.Or(r.ID, fmt.Sprintf("made-%d", len(q.list)+1)), Device: r.Device, Name: r.Name, State: devices.Queued, Created: then, Updated: then,
		TTL: cmp.Or(r.TTL, devices.DefaultTTL), Expires: then.Add(time.Hour), ExecutionTimeout: devices.DefaultExecution,
		MaxAttempts: devices.DefaultMaxAttempts, Feedback: devices.FeedbackFull, Payload: r.Payload, ContentType: r.ContentType, Source: r.Source,
		History: []devices.Step{{State: devices.Queued, At: then}},
	}
	q.list = append(q.list, c)
	q.hub.Publish(devices.Event{Command: &c})
	if q.obedient {
		go q.move(c.ID, devices.Succeeded)
	}
	return c, false, nil
}

// move brings a command to a state.
func (q *queue) move(id string, to devices.State) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range q.list {
		if c := &q.list[i]; c.ID == id {
			was := c.State
			c.State, c.History = to, append(slices.Clone(c.History), devices.Step{State: to, At: then})
			now := *c
			q.hub.Publish(devices.Event{Command: &now, Previous: was})
		}
	}
}

func (q *queue) CancelWait(_ context.Context, id, reason string) (devices.Command, error) {
	q.mu.Lock()
	q.reason = reason
	err := q.err
	i := slices.IndexFunc(q.list, func(c devices.Command) bool { return c.ID == id })
	ended := i >= 0 && q.list[i].Ended()
	q.mu.Unlock()
	switch {
	case err != nil:
		return devices.Command{}, err
	case i < 0:
		return devices.Command{}, refusal(devices.CodeUnknown)
	case ended:
		return devices.Command{}, refusal(devices.CodeEnded)
	}
	q.move(id, devices.Canceled)
	return q.Get(id)
}

func (q *queue) Get(id string) (devices.Command, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range q.list {
		if c.ID == id {
			return c, nil
		}
	}
	return devices.Command{}, refusal(devices.CodeUnknown)
}

func (q *queue) List(f devices.CommandFilter) (page []devices.Command, next uint64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.asked = f
	for i, c := range slices.Backward(q.list) {
		n := uint64(i + 1)
		if f.Before > 0 && n >= f.Before || f.Device != "" && c.Device != f.Device || len(f.States) > 0 && !slices.Contains(f.States, c.State) {
			continue
		}
		if len(page) == f.Limit {
			return page, n + 1, nil
		}
		c.Payload, c.Result, c.History = nil, nil, nil
		page = append(page, c)
	}
	return page, 0, nil
}

// lanes is a spool with one lane, whose first message is number 3.
type lanes struct {
	records []spool.Record
	parked  []spool.ParkedMessage
	damaged []spool.Damage
	err     error
	entered func() // called by Walk; nil: nothing is
	purged  []any  // what was asked for last
}

func (l *lanes) PurgeParked(lane, upstream string) (spool.Count, error) {
	if lane != "alarm" {
		return spool.Count{}, fmt.Errorf("lane %q: %w", lane, spool.ErrNoLane)
	}
	l.purged = []any{"parked", upstream}
	return spool.Count{Messages: 2, Bytes: 50}, l.err
}

func (l *lanes) Purge(lane string, olderThan time.Time, upTo uint64) (spool.Count, error) {
	if lane != "alarm" {
		return spool.Count{}, fmt.Errorf("lane %q: %w", lane, spool.ErrNoLane)
	}
	l.purged = []any{olderThan, upTo}
	return spool.Count{Messages: 2, Bytes: 50}, l.err
}

func (l *lanes) ParkedFrom(lane string, seq uint64, fn func(spool.ParkedMessage) error) error {
	if lane != spool.SystemLane && lane != "alarm" {
		return fmt.Errorf("lane %q: %w", lane, spool.ErrNoLane)
	}
	for _, m := range l.parked {
		if lane == "alarm" && m.Seq < seq {
			continue
		}
		if err := fn(m); err != nil {
			return err
		}
	}
	return l.err
}

func (l *lanes) Replay(lane, upstream string, seqs []uint64) (n int, err error) {
	switch {
	case lane != "alarm":
		return 0, fmt.Errorf("lane %q: %w", lane, spool.ErrNoLane)
	case upstream != "cloud":
		return 0, fmt.Errorf("%w: %q", spool.ErrNotWaiting, upstream)
	}
	l.parked = slices.DeleteFunc(l.parked, func(m spool.ParkedMessage) bool {
		gone := m.Upstream == upstream && (seqs == nil || slices.Contains(seqs, m.Seq))
		if gone {
			n++
		}
		return gone
	})
	return n, l.err
}

func (l *lanes) EpochOf(string, uint64) (epoch string, first, end uint64) {
	return "e1", 0, math.MaxUint64
}

func (l *lanes) Walk(lane string, sel spool.Selection, fn func(uint64, *spool.Record) error, damaged func(spool.Damage)) error {
	if l.entered != nil {
		l.entered()
	}
	for _, d := range l.damaged {
		damaged(d)
	}
	return l.Peek(lane, sel.From, math.MaxInt, func(seq uint64, r *spool.Record) error {
		if sel.To > 0 && seq > sel.To || r.Received < sel.SinceMS {
			return nil
		}
		return fn(seq, r)
	})
}

// messages is what devices publish: a test says it.
type messages struct {
	mu  sync.Mutex
	see map[string]func(*httpapi.Arrival) // by filter
}

func (m *messages) Watch(filter string, see func(*httpapi.Arrival)) (end func(), err error) {
	if strings.HasPrefix(filter, "#/") {
		return nil, fmt.Errorf("%w: # stands last", httpapi.ErrFilter)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.see == nil {
		m.see = map[string]func(*httpapi.Arrival){}
	}
	m.see[filter] = see
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.see, filter)
	}, nil
}

// publish shows a to all who watch, and says how many these are.
func (m *messages) publish(a httpapi.Arrival) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, see := range m.see {
		see(&a)
	}
	return len(m.see)
}

// backups makes a backup of one small file.
// control notes what it is asked for.
type control struct {
	err   error
	level string
	debug map[string]time.Duration
}

var reloaded = httpapi.Reload{
	File:    "/etc/holdfast/gateway.yaml",
	Changed: []httpapi.ConfigChange{{Key: "log.level", From: "info", To: "debug"}},
	Restart: []httpapi.ConfigChange{{Key: "http.address", From: "a", To: "b"}}, Warnings: []string{},
}

func (c *control) ReloadFile() (httpapi.Reload, error) { return reloaded, c.err }

func (c *control) ConfigDiff() (httpapi.Reload, error) { return reloaded, c.err }

func (c *control) DiffText(name string, text []byte) (httpapi.Reload, error) {
	if !bytes.Contains(text, []byte("log:")) {
		return httpapi.Reload{}, fmt.Errorf("%w: %s:1:1: what is that?", httpapi.ErrConfig, name)
	}
	return reloaded, c.err
}

func (c *control) LogLevel() string { return cmp.Or(c.level, "info") }

func (c *control) SetLogLevel(level string) error {
	c.level = level
	return c.err
}

func (c *control) DebugDevice(id string, d time.Duration) (time.Time, error) {
	if d > time.Hour {
		return time.Time{}, fmt.Errorf("%w: too long", httpapi.ErrDebug)
	}
	if c.debug == nil {
		c.debug = map[string]time.Duration{}
	}
	c.debug[id] = d
	return c.DebugUntil(id), c.err
}

func (c *control) DebugUntil(id string) time.Time {
	if d := c.debug[id]; d > 0 {
		return then.Add(d)
	}
	return time.Time{}
}

// auditLog keeps records in memory.
type auditLog struct {
	mu      sync.Mutex
	entries []audit.Entry
	err     error
}

func (a *auditLog) Record(e audit.Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	e.Seq, e.At = uint64(len(a.entries)+1), then
	a.entries = append(a.entries, e)
	return nil
}

func (a *auditLog) List(f audit.Filter) (page []audit.Entry, next uint64, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range slices.Backward(a.entries) {
		switch {
		case f.Before > 0 && e.Seq >= f.Before, f.Who != "" && e.Who != f.Who, f.Act != "" && e.Act != f.Act, !strings.HasPrefix(e.Object, f.Object), e.At.Before(f.Since):
			continue
		case f.Limit > 0 && len(page) == f.Limit:
			return page, page[len(page)-1].Seq, nil
		}
		page = append(page, e)
	}
	return page, 0, nil
}

func (a *auditLog) Head() audit.Head {
	a.mu.Lock()
	defer a.mu.Unlock()
	return audit.Head{Seq: uint64(len(a.entries))}
}

type backups struct {
	err    error
	broken bool // the file is not as large as it should be
	closed []bool
	dir    string
}

func (b *backups) Backup() (*httpapi.BackupCopy, error) {
	if b.err != nil {
		return nil, b.err
	}
	dir, err := os.MkdirTemp("", "backup-")
	if err != nil {
		return nil, err
	}
	b.dir = dir
	info := httpapi.Backup{
		Version: 1, ID: "b1", Gateway: "gw", Epoch: "e1", Time: then, Bytes: 5, Lanes: []httpapi.BackupLane{{Name: "alarm", Next: 4}},
		Files: []httpapi.BackupFile{{Name: "store/000001.log", Size: 5}},
	}
	if b.broken {
		info.Files[0].Size = 7
	}
	j, err := json.Marshal(info)
	if err == nil {
		err = os.Mkdir(filepath.Join(dir, "store"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "backup.json"), j, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "store", "000001.log"), []byte("hello"), 0o600)
	}
	return &httpapi.BackupCopy{Info: info, Dir: dir, Close: func(keep bool) error {
		b.closed = append(b.closed, keep)
		return os.RemoveAll(dir)
	}}, err
}

func (l *lanes) Lanes() []spool.LaneStat { return []spool.LaneStat{{Name: "alarm"}} }

func (l *lanes) Peek(lane string, from uint64, limit int, fn func(uint64, *spool.Record) error) error {
	if lane != "alarm" {
		return fmt.Errorf("lane %q: %w", lane, spool.ErrNoLane)
	}
	for i := range l.records {
		seq := uint64(i + 3)
		if seq < from {
			continue
		}
		if limit == 0 {
			break
		}
		limit--
		if err := fn(seq, &l.records[i]); err != nil {
			return err
		}
	}
	return l.err
}
