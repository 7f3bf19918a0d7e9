package devices

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/kv"
)

// RegistryConfig of a Registry.
type RegistryConfig struct {
	Journal   Journal
	Roles     []Role // besides the built-in ones, or instead of one of the same name
	Anonymous bool   // whoever is not registered may connect under any client id
	Log       *slog.Logger
	Metrics   prometheus.Registerer // nil: none
	Now       func() time.Time      // nil: time.Now
	// Kick is called, from any goroutine, when a device may no longer be connected (disabled, removed, its credentials
	// gone): it ends the device's connections at once. forget: the broker's session of it is to go, too. It may
	// wait as Journal.Commit may, and must not change the registry.
	Kick func(device, reason string, forget bool)
}

// Registry of devices. All methods may be called from many goroutines. Those that change something return when that is
// on stable storage; if their context ends before, it may still happen.
type Registry struct {
	store   *kv.Store
	journal Journal
	log     *slog.Logger
	now     func() time.Time
	kick    func(device, reason string, forget bool)
	m       *registryMetrics
	started time.Time // by the wall clock, and
	opened  time.Time // the same moment by the monotonic one

	key   [32]byte      // of this process: remembered passwords, and the salt of hashes that fit nobody
	slots chan struct{} // see argonSlots
	guard *throttle

	policyMu sync.Mutex // one SetPolicy at a time
	policy   atomic.Pointer[policy]
	entries  entries

	// order makes the changes of one device one after the other. A lock is held while rows are handed in, which may
	// take as long as the store is behind; none of the locks that completions take is held then.
	seed  maphash.Seed
	order [256]sync.Mutex

	countMu    sync.Mutex // held over the hand-in of rows that change a count, after an order lock
	head       counts     // handed in last; under countMu
	maxDevices int
	counts     atomic.Pointer[counts]

	presences
	fullOnce     sync.Once // of the warning that no more anonymous devices are registered
	unreadableMu sync.Mutex
	unreadables  map[string]struct{} // keys that were logged
}

// counts of device rows.
type counts struct{ registered, disabled, anonymous, passwords int }

// tally is what one device adds to the counts; nil adds nothing.
func tally(d *device) (c counts) {
	if d == nil {
		return c
	}
	c.registered = 1
	if !d.enabled {
		c.disabled = 1
	}
	if d.anonymous {
		c.anonymous = 1
	}
	if d.has(kindPassword) {
		c.passwords = 1
	}
	return c
}

// plus never gives less than nothing: a device whose row was damaged could not say what it had added.
func (c counts) plus(sign int, d counts) counts {
	return counts{
		max(c.registered+sign*d.registered, 0), max(c.disabled+sign*d.disabled, 0),
		max(c.anonymous+sign*d.anonymous, 0), max(c.passwords+sign*d.passwords, 0),
	}
}

// cachedDevices bounds how many devices that are not connected are kept in memory.
const cachedDevices = 20_000

// OpenRegistry opens the registry in store. It takes the same time for no device and for 100,000: rows are read when
// they are needed.
func OpenRegistry(store *kv.Store, cfg RegistryConfig) (*Registry, error) {
	p, err := newPolicy(cfg.Roles, cfg.Anonymous)
	if err != nil {
		return nil, fmt.Errorf("open device registry: %w", err)
	}
	r := &Registry{
		store: store, journal: cfg.Journal, log: cfg.Log, now: cfg.Now, kick: cfg.Kick,
		slots: make(chan struct{}, argonSlots()), guard: newThrottle(), seed: maphash.MakeSeed(), maxDevices: maxDevices, unreadables: map[string]struct{}{},
	}
	if r.now == nil {
		r.now = time.Now
	}
	if r.kick == nil {
		r.kick = func(string, string, bool) {}
	}
	rand.Read(r.key[:])
	r.started, r.opened = r.wall(), time.Now()
	r.policy.Store(p)
	r.entries.init(cachedDevices)
	r.presences.init()
	if r.head, err = r.readCounts(); err != nil {
		return nil, fmt.Errorf("open device registry: %w", err)
	}
	c := r.head
	r.counts.Store(&c)
	r.m = newRegistryMetrics(r, cfg.Metrics)
	return r, nil
}

// readCounts reads the row of counts. Where there is none that can be read it counts the devices: the row says nothing
// that they do not say.
func (r *Registry) readCounts() (c counts, err error) {
	row, found, err := r.store.Get(countsKey)
	if err != nil {
		return c, err
	}
	if found {
		if c, err = decodeCounts(row); err == nil {
			return c, nil
		}
		r.log.Warn("counts of devices unreadable, counting again", "err", err)
	}
	c = counts{}
	err = r.store.Scan(deviceKey(""), func(key, row []byte) error {
		d, err := decodeDevice(string(key[2:]), row)
		if err != nil {
			d = &device{enabled: true} // it is there, and that is all it says
		}
		c = c.plus(1, tally(d))
		return nil
	})
	return c, err
}

// wall is the time that is stored and shown.
func (r *Registry) wall() time.Time { return time.UnixMilli(r.now().UnixMilli()).UTC() }

func (r *Registry) hashID(id string) uint64 { return maphash.String(r.seed, id) }

// lock takes the order lock of a device.
func (r *Registry) lock(id string) *sync.Mutex {
	mu := &r.order[r.hashID(id)%uint64(len(r.order))]
	mu.Lock()
	return mu
}

// load returns the entry of a client id, read. Errors are the store's.
func (r *Registry) load(id string) (*entry, error) {
	e := r.entries.get(id)
	if err := e.load(r); err != nil {
		return nil, fmt.Errorf("read device %q: %w", id, err)
	}
	return e, nil
}

// device returns a registered device from entry e, or says why there is none.
func (r *Registry) device(id string) (*device, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	e, err := r.load(id)
	if err != nil {
		return nil, err
	}
	d, err := e.durable()
	switch {
	case err != nil:
		return nil, fmt.Errorf("device %q: %w", id, err)
	case d == nil:
		return nil, fmt.Errorf("device %q: %w", id, ErrUnknownDevice)
	}
	r.entries.cache.touch(e)
	return d, nil
}

// change has fn make the next version of a device out of what is there (nil: nothing) and returns when that is
// durable. fn may return what it was given, for no change, or nil, to remove the device. It must be quick: the
// device's order lock is held. what completes "… device "pump-1": error".
func (r *Registry) change(ctx context.Context, id, what string, fn func(old *device, now time.Time) (*device, error)) (*device, error) {
	next, err := r.changeDevice(ctx, id, fn)
	if err != nil {
		return nil, fmt.Errorf("%s device %q: %w", what, id, err)
	}
	return next, nil
}

func (r *Registry) changeDevice(ctx context.Context, id string, fn func(old *device, now time.Time) (*device, error)) (*device, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	old, next, err := r.handIn(id, fn, func(err error) { ended <- err })
	if err != nil {
		return nil, err
	}
	select {
	case err := <-ended:
		if err == nil {
			r.follow(id, old, next)
		}
		return next, err
	case <-ctx.Done():
		go func() {
			if <-ended == nil {
				r.follow(id, old, next)
			}
		}()
		return nil, fmt.Errorf("not known whether it is stored: %w", ctx.Err())
	}
}

// handIn is change up to the moment when the rows are handed in; done is called as a Journal does. Some of what is
// the device's goes with it when it goes.
func (r *Registry) handIn(id string, fn func(old *device, now time.Time) (*device, error), done func(error)) (old, next *device, err error) {
	defer r.lock(id).Unlock()
	e, err := r.load(id)
	if err != nil {
		return nil, nil, err
	}
	old, bad := e.latest()
	if errors.Is(bad, ErrVersion) {
		return nil, nil, bad
	}
	if bad != nil {
		old = &device{id: id, enabled: true} // counted so; see readCounts
	}
	next, err = fn(old, r.wall())
	switch {
	case bad != nil && (err != nil || next != nil):
		return nil, nil, fmt.Errorf("%w; the way out is to remove the device and add it again", bad)
	case err != nil:
		return nil, nil, err
	}
	var (
		ops    []kv.Op
		events []Event
	)
	switch {
	case next == old:
		// nothing to write, but what was handed in before has to be durable, too
	case next != nil:
		ops = append(ops, kv.Op{Key: deviceKey(id), Value: next.encode()})
	case next == nil:
		for _, key := range [][]byte{deviceKey(id), presenceKey(id), connectedKey(id)} {
			ops = append(ops, kv.Op{Key: key, Delete: true})
		}
		events = r.forget(id)
	}
	err = r.commitDevice(e, old, next, ops, events, done)
	if err == nil && next != nil {
		r.entries.cache.touch(e)
	}
	return old, next, err
}

// commitDevice hands in ops, which turn old into next, and with them the counts if they change. The device's order
// lock is held.
func (r *Registry) commitDevice(e *entry, old, next *device, ops []kv.Op, events []Event, done func(error)) error {
	before, after := tally(old), tally(next)
	was := counts{}
	var now *counts
	if before != after {
		r.countMu.Lock()
		defer r.countMu.Unlock()
		was = r.head
		sum := was.plus(-1, before).plus(1, after)
		switch {
		case sum.registered > r.maxDevices && sum.registered > was.registered:
			return fmt.Errorf("%w: %d are registered, which is the limit: remove some", ErrTooManyDevices, was.registered)
		case sum.anonymous > maxAnonymous && sum.anonymous > was.anonymous:
			return fmt.Errorf("%w: %d registered themselves, which is the limit", ErrTooManyDevices, was.anonymous)
		}
		now, r.head = &sum, sum
		ops = append(ops, kv.Op{Key: countsKey, Value: sum.encode()})
	}
	e.begin(next)
	err := r.journal.Commit(ops, events, func(err error) {
		if err == nil && now != nil {
			r.counts.Store(now)
		}
		e.end(next, &r.policy, err)
		done(err)
	})
	if err != nil {
		e.refuse(old)
		if now != nil {
			r.head = was
		}
	}
	return err
}

// follow ends the connection of a device that may no longer be connected after it was changed from old to next.
func (r *Registry) follow(id string, old, next *device) {
	switch {
	case next == nil:
		r.log.Info("device removed", "device", id)
		r.kick(id, "the device was removed", true)
	case old != nil && old.enabled && !next.enabled:
		r.log.Info("device disabled", "device", id)
		r.kick(id, "the device was disabled", false)
	default:
		r.judgeConnection(id)
	}
}

// Add registers a device. secret is the generated token, shown this once; "" if none was made. A device that
// registered itself (Device.Anonymous) is taken over, and from then on needs its credential.
func (r *Registry) Add(ctx context.Context, d NewDevice) (dev Device, secret string, err error) {
	made, secret, err := r.add(ctx, d)
	if err != nil {
		return Device{}, "", err
	}
	return made.show(r.presence(made.id)), secret, nil
}

func (r *Registry) add(ctx context.Context, d NewDevice) (made *device, secret string, err error) {
	if d.Role == "" {
		d.Role = DefaultRole
	}
	err = CheckID(d.ID)
	for _, check := range []func() error{
		func() error { return checkName(d.Name) },
		func() error { return checkLabels(d.Labels) },
		func() error { return r.policy.Load().check(d.Role) },
		func() error {
			if d.NoCredential && d.Credential != nil {
				return fmt.Errorf("%w: a credential, and none", ErrInvalid)
			}
			return nil
		},
	} {
		if err == nil {
			err = check()
		}
	}
	if err != nil {
		return nil, "", fmt.Errorf("add device %q: %w", d.ID, err)
	}
	var c *credential
	if !d.NoCredential {
		want := NewCredential{Kind: CredentialToken}
		if d.Credential != nil {
			want = *d.Credential
		}
		if c, secret, err = r.newCredential(ctx, d.ID, want, nil); err != nil {
			return nil, "", fmt.Errorf("add device %q: %w", d.ID, err)
		}
	}
	made, err = r.change(ctx, d.ID, "add", func(old *device, now time.Time) (*device, error) {
		if old != nil && !old.anonymous {
			return nil, ErrDeviceExists
		}
		n := &device{
			id: strings.Clone(d.ID), name: d.Name, labels: maps.Clone(d.Labels), enabled: !d.Disabled, role: d.Role,
			created: now, updated: now,
		}
		if c != nil {
			n.credentials = []*credential{c}
		}
		return n, nil
	})
	return made, secret, err
}

// Get returns a device. ErrUnknownDevice.
func (r *Registry) Get(id string) (Device, error) {
	d, err := r.device(id)
	if err != nil {
		return Device{}, err
	}
	return d.show(r.presence(id)), nil
}

// Known says whether commands may be submitted for a device, and if not, ErrUnknownDevice, ErrBadID or ErrDisabled. A
// device whose registration is on its way to the disk is known: what is handed in now comes after it.
func (r *Registry) Known(id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	e, err := r.load(id)
	if err != nil {
		return err
	}
	d, err := e.latest()
	switch {
	case err != nil:
		return fmt.Errorf("device %q: %w", id, err)
	case d == nil:
		return fmt.Errorf("device %q: %w", id, ErrUnknownDevice)
	}
	r.entries.cache.touch(e)
	if !d.enabled {
		return fmt.Errorf("device %q: %w", id, ErrDisabled)
	}
	return nil
}

// DeviceFilter chooses devices.
type DeviceFilter struct {
	After     string // only ids after this one
	Limit     int    // at most; 0: 100, and never more than 1000
	Search    string // in id, name or a label's value, case-insensitive
	Role      string
	Connected *bool
	Enabled   *bool
	Label     string // key or key=value
}

// List returns devices by id. next is what to give as After for the following page; "": that was the last. Devices whose
// rows cannot be read are left out.
func (r *Registry) List(f DeviceFilter) (page []Device, next string, err error) {
	if f.Limit <= 0 {
		f.Limit = 100
	}
	f.Limit = min(f.Limit, 1000)
	f.Search = strings.ToLower(f.Search)
	page = []Device{}
	add := func(d *device) (full bool) {
		connected := r.connected(d.id)
		if !f.chooses(d, connected) {
			return false
		}
		if len(page) == f.Limit {
			next = page[len(page)-1].ID
			return true
		}
		page = append(page, d.show(r.presence(d.id)))
		return false
	}
	if f.Connected != nil && *f.Connected {
		// Few of many, perhaps: memory knows them.
		for _, id := range r.connectedAfter(f.After) {
			d, err := r.device(id)
			switch {
			case errors.Is(err, ErrUnknownDevice) || errors.Is(err, ErrBadID) || errors.Is(err, ErrVersion) || errors.Is(err, errDamaged):
				continue
			case err != nil:
				return nil, "", fmt.Errorf("list devices: %w", err)
			}
			if add(d) {
				break
			}
		}
		return page, next, nil
	}
	err = r.scan(f.After, func(d *device) bool {
		d = r.entries.find(d.id).settled(d) // a row can be read a moment before it is safe
		return d == nil || !add(d)
	})
	if err != nil {
		return nil, "", fmt.Errorf("list devices: %w", err)
	}
	return page, next, nil
}

// scan calls fn for the devices after an id, until it says no.
func (r *Registry) scan(after string, fn func(*device) bool) (err error) {
	start := deviceKey(after)
	it, err := r.store.Iter(append(start, 0), kv.PrefixEnd(deviceKey("")))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for it.First(); it.Valid(); it.Next() {
		row, err := it.ValueAndErr()
		if err != nil {
			return err
		}
		d, err := decodeDevice(string(it.Key()[2:]), row)
		if err != nil {
			r.unreadable(it.Key(), err)
			continue
		}
		if !fn(d) {
			return nil
		}
	}
	return nil
}

func (f *DeviceFilter) chooses(d *device, connected bool) bool {
	if f.Role != "" && d.role != f.Role || f.Enabled != nil && d.enabled != *f.Enabled || f.Connected != nil && connected != *f.Connected {
		return false
	}
	if f.Label != "" {
		key, want, exact := strings.Cut(f.Label, "=")
		if value, there := d.labels[key]; !there || exact && value != want {
			return false
		}
	}
	if f.Search == "" || strings.Contains(strings.ToLower(d.id), f.Search) || strings.Contains(strings.ToLower(d.name), f.Search) {
		return true
	}
	for _, value := range d.labels {
		if strings.Contains(strings.ToLower(value), f.Search) {
			return true
		}
	}
	return false
}

// Patch changes a device. Disabling it ends its connection.
func (r *Registry) Patch(ctx context.Context, id string, p DevicePatch) (Device, error) {
	var err error
	if p.Name != nil {
		err = checkName(*p.Name)
	}
	if err == nil {
		err = checkLabels(p.Labels)
	}
	if err == nil && p.Role != nil {
		err = r.policy.Load().check(*p.Role)
	}
	if err != nil {
		return Device{}, fmt.Errorf("change device %q: %w", id, err)
	}
	d, err := r.change(ctx, id, "change", func(old *device, now time.Time) (*device, error) {
		if old == nil {
			return nil, ErrUnknownDevice
		}
		n := old.copy()
		if p.Name != nil {
			n.name = *p.Name
		}
		if p.Labels != nil {
			n.labels = maps.Clone(p.Labels)
		}
		if p.Enabled != nil {
			n.enabled = *p.Enabled
		}
		if p.Role != nil {
			n.role = *p.Role
		}
		if n.name == old.name && maps.Equal(n.labels, old.labels) && n.enabled == old.enabled && n.role == old.role {
			return old, nil
		}
		n.updated = now
		return n, nil
	})
	if err != nil {
		return Device{}, err
	}
	return d.show(r.presence(id)), nil
}

// Remove forgets a device and ends its connection.
func (r *Registry) Remove(ctx context.Context, id string) error {
	_, err := r.change(ctx, id, "remove", func(old *device, _ time.Time) (*device, error) {
		if old == nil {
			return nil, ErrUnknownDevice
		}
		return nil, nil
	})
	return err
}

// AddCredential adds a credential; see NewCredential. secret as in Add. A device that registered itself
// (Device.Anonymous) is none from then on: it needs the credential, and is given DefaultRole if it had AnonymousRole.
func (r *Registry) AddCredential(ctx context.Context, id string, c NewCredential) (made Credential, secret string, err error) {
	d, err := r.device(id)
	if err != nil {
		return Credential{}, "", fmt.Errorf("add credential: %w", err)
	}
	cred, secret, err := r.newCredential(ctx, id, c, d.salt())
	if err != nil {
		return Credential{}, "", fmt.Errorf("add credential to device %q: %w", id, err)
	}
	_, err = r.change(ctx, id, "add credential to", func(old *device, now time.Time) (*device, error) {
		if old == nil {
			return nil, ErrUnknownDevice
		}
		n := old.copy()
		n.updated = now
		if n.anonymous {
			n.anonymous = false
			if n.role == AnonymousRole {
				n.role = DefaultRole
			}
		}
		if c.RetireOthers >= 0 {
			end := now.Add(c.RetireOthers)
			for i, other := range n.credentials {
				if other.expires.IsZero() || end.Before(other.expires) {
					n.credentials[i] = other.until(end)
				}
			}
		}
		for _, other := range n.credentials {
			if cred.kind == kindCertificate && other.kind == kindCertificate && !other.expired(now) && slices.Equal(cred.secret, other.secret) {
				return nil, fmt.Errorf("%w: the certificate is pinned already, as credential %s", ErrInvalid, other.id)
			}
		}
		n.credentials = append(n.credentials, cred)
		if len(n.credentials) > MaxCredentials {
			n.dropExpired(now) // they are only still there to be seen
		}
		if len(n.credentials) > MaxCredentials {
			return nil, fmt.Errorf("%w: %d credentials are the limit: remove one that is no longer used", ErrInvalid, MaxCredentials)
		}
		return n, nil
	})
	if err != nil {
		return Credential{}, "", err
	}
	return cred.show(), secret, nil
}

// dropExpired removes the credentials that had expired at the time given and says whether there were any. A pin stays
// until there is another one: without any, every certificate that names the device would let it in.
func (d *device) dropExpired(at time.Time) bool {
	had := len(d.credentials)
	pinned := false
	for _, c := range d.credentials {
		pinned = pinned || c.kind == kindCertificate && !c.expired(at)
	}
	kept := make([]*credential, 0, had)
	for _, c := range slices.Backward(d.credentials) {
		if c.expired(at) && (c.kind != kindCertificate || pinned) {
			continue
		}
		pinned = pinned || c.kind == kindCertificate
		kept = append(kept, c)
	}
	slices.Reverse(kept)
	d.credentials = kept
	return len(kept) < had
}

// RemoveCredential revokes one. Who is connected with it is disconnected.
func (r *Registry) RemoveCredential(ctx context.Context, id, credentialID string) error {
	_, err := r.change(ctx, id, "remove credential of", func(old *device, now time.Time) (*device, error) {
		if old == nil {
			return nil, ErrUnknownDevice
		}
		c := old.credential(credentialID)
		if c == nil {
			return nil, fmt.Errorf("%w: %q", ErrNoCredential, credentialID)
		}
		n := old.copy()
		n.credentials = slices.DeleteFunc(n.credentials, func(x *credential) bool { return x == c })
		n.updated = now
		return n, nil
	})
	return err
}

// SetPolicy replaces roles and the anonymous rule while running: configuration was read again. An error means that
// the old ones stay. What live connections may do follows at once; those that may not be here any more are ended.
func (r *Registry) SetPolicy(roles []Role, anonymous bool) error {
	p, err := newPolicy(roles, anonymous)
	if err != nil {
		return fmt.Errorf("set roles of devices: %w", err)
	}
	r.policyMu.Lock()
	defer r.policyMu.Unlock()
	r.policy.Store(p)
	r.entries.each(func(e *entry) { e.refresh(p) })
	for _, id := range r.connectedAfter("") {
		r.judgeConnection(id)
	}
	return nil
}

// Counts of devices.
type Counts struct {
	Registered int `json:"registered"`
	Connected  int `json:"connected"` // clients that cannot be registered (see RegistryConfig.Anonymous) included
	Disabled   int `json:"disabled"`
}

// Counts of devices at this moment. Cheap.
func (r *Registry) Counts() Counts {
	c := r.counts.Load()
	return Counts{Registered: c.registered, Connected: int(r.online.Load()), Disabled: c.disabled}
}

// unreadable notes that a row was met that cannot be used.
func (r *Registry) unreadable(key []byte, err error) {
	r.m.unreadable.Inc()
	r.unreadableMu.Lock()
	_, known := r.unreadables[string(key)]
	if !known && len(r.unreadables) < 1000 {
		r.unreadables[string(key)] = struct{}{}
	}
	r.unreadableMu.Unlock()
	if !known {
		r.log.Warn("device row kept and not used", "key", fmt.Sprintf("%x", key), "err", err)
	}
}

const (
	// tick is how often Run looks for presence that is still to be told, and for connections whose credential expired.
	tick = time.Second
	// sweepEvery is how often expired credentials are looked for; the first time after sweepFirst.
	sweepEvery = 6 * time.Hour
	sweepFirst = 10 * time.Minute
	sweepPage  = 500 // devices read with one iterator
)

// Run does what needs time: it tells of devices that a crash of the gateway has disconnected, forgets expired
// credentials and disconnects who used them.
func (r *Registry) Run(ctx context.Context) error {
	if err := r.tellCrashed(ctx); err != nil {
		return fmt.Errorf("devices: %w", err)
	}
	t := time.NewTicker(tick)
	defer t.Stop()
	sweep := time.Now().Add(sweepFirst)
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		r.tellLate()
		r.endExpired()
		if n%60 == 0 {
			r.forgetTold()
		}
		if time.Now().After(sweep) {
			sweep = time.Now().Add(sweepEvery)
			if err := r.sweep(ctx); err != nil {
				r.log.Warn("expired credentials not removed", "err", err)
			}
		}
	}
}

// sweep removes credentials that expired a day ago. By both clocks: one that jumps ahead must not take credentials
// away for good.
func (r *Registry) sweep(ctx context.Context) error {
	now := r.now()
	if steady := r.started.Add(time.Since(r.opened)); steady.Before(now) {
		now = steady
	}
	before := now.Add(-expiredKept)
	for after, more := "", true; more; {
		var found []string
		more = false
		n := 0
		err := r.scan(after, func(d *device) bool {
			after = d.id
			if d.copy().dropExpired(before) {
				found = append(found, d.id)
			}
			n++
			more = n == sweepPage
			return !more
		})
		if err != nil {
			return err
		}
		for _, id := range found {
			_, err := r.change(ctx, id, "remove expired credentials of", func(old *device, _ time.Time) (*device, error) {
				if old == nil {
					return nil, ErrUnknownDevice
				}
				n := old.copy()
				if !n.dropExpired(before) {
					return old, nil
				}
				return n, nil
			})
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil && !errors.Is(err, ErrUnknownDevice):
				return err
			}
		}
	}
	return nil
}
