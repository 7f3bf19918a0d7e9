package devices

import (
	"hash/maphash"
	"iter"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"
)

// device is a registered device at one moment. It does not change.
type device struct {
	id, name           string
	labels             map[string]string
	enabled, anonymous bool
	role               string
	created, updated   time.Time
	credentials        []*credential
}

// copy is a new version to be changed.
func (d *device) copy() *device {
	n := *d
	n.labels = maps.Clone(d.labels)
	n.credentials = slices.Clone(d.credentials)
	return &n
}

// valid gives the credentials of a kind that have not expired. d may be nil: it has none.
func (d *device) valid(kind uint64, now time.Time) iter.Seq[*credential] {
	return func(yield func(*credential) bool) {
		if d == nil {
			return
		}
		for _, c := range d.credentials {
			if c.kind == kind && !c.expired(now) && !yield(c) {
				return
			}
		}
	}
}

func (d *device) has(kind uint64) bool {
	return d != nil && slices.ContainsFunc(d.credentials, func(c *credential) bool { return c.kind == kind })
}

func (d *device) credential(id string) *credential {
	if i := slices.IndexFunc(d.credentials, func(c *credential) bool { return c.id == id }); i >= 0 {
		return d.credentials[i]
	}
	return nil
}

// salt of the device's passwords; nil: it has none. See newCredential.
func (d *device) salt() []byte {
	if d != nil {
		for _, c := range d.credentials {
			if c.kind == kindPassword && c.cost == defaultCost {
				return c.salt
			}
		}
	}
	return nil
}

func (d *device) show(p Presence) Device {
	s := Device{
		ID: d.id, Name: d.name, Labels: maps.Clone(d.labels), Enabled: d.enabled, Role: d.role, Anonymous: d.anonymous,
		Created: d.created, Updated: d.updated, Credentials: make([]Credential, 0, len(d.credentials)), Presence: p,
	}
	for _, c := range d.credentials {
		s.Credentials = append(s.Credentials, c.show())
	}
	return s
}

// entry is one client id, as long as anybody holds it: there is never a second one of the same id, so what changes
// shows at once on live connections, and a row that is being read cannot replace a newer one.
type entry struct {
	id  string
	own string // id if it is a device id, else "": what {device} stands for

	role atomic.Pointer[compiledRole] // what the client may do now; nil: nothing. Written under mu

	cached atomic.Bool // written under entryCache.mu
	used   atomic.Bool // since the cache's hand came by

	mu      sync.Mutex
	loaded  bool
	bad     error     // the row is there and cannot be used
	current *device   // durable; nil: not registered
	head    *device   // handed in last; current, if pending is 0
	pending int       // hand-ins that are not durable yet
	gone    *Presence // what its presence row says, or will; nil: read it. Only while it is not connected
}

// latest is what was handed in last: what a change has to start from.
func (e *entry) latest() (*device, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.head, e.bad
}

// durable is what is on stable storage.
func (e *entry) durable() (*device, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.current, e.bad
}

// settled is durable for who has read the row: d, if nobody has read it before. nil: it is not on stable storage yet.
func (e *entry) settled(d *device) *device {
	if e == nil {
		return d
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.loaded {
		return d
	}
	return e.current
}

// begin notes that d is handed in.
func (e *entry) begin(d *device) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.head = d
	e.pending++
}

// refuse takes begin back: nothing was handed in, and old is what was last. The device's order lock is held since.
func (e *entry) refuse(old *device) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.head = old
	e.pending--
}

// end takes d as durable, if it is.
func (e *entry) end(d *device, p *atomic.Pointer[policy], err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pending--
	if err != nil {
		if e.pending == 0 { // the store has failed, and nothing more will be written
			e.head = e.current
		}
		return
	}
	e.current, e.bad = d, nil
	e.role.Store(p.Load().role(d)) // the policy is read under mu: refresh comes before or after
}

// load reads the row of an entry that is new. Its own errors are the store's.
func (e *entry) load(r *Registry) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.loaded {
		return nil
	}
	// Under mu: whoever is to complete a write of this entry has loaded it before.
	if e.own != "" {
		row, found, err := r.store.Get(deviceKey(e.id))
		if err != nil {
			return err
		}
		if found {
			e.current, e.bad = decodeDevice(e.id, row)
		}
		if e.bad != nil {
			r.unreadable(deviceKey(e.id), e.bad)
		}
	}
	e.head, e.loaded = e.current, true
	if e.bad == nil {
		e.role.Store(r.policy.Load().role(e.current))
	}
	return nil
}

// refresh follows a change of policy.
func (e *entry) refresh(p *policy) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.bad == nil && e.loaded {
		e.role.Store(p.role(e.current))
	}
}

const entryShards = 64

// entries finds the entry of an id: in a table that keeps none alive, so that it is as large as what is in use, and
// in a cache that keeps alive what was used of late.
type entries struct {
	seed   maphash.Seed
	shards *[entryShards]entryShard // apart from the cache: see forgotten
	cache  entryCache
}

type entryShard struct {
	mu    sync.Mutex
	table map[string]weak.Pointer[entry]
}

func (t *entries) init(cached int) {
	t.seed = maphash.MakeSeed()
	t.shards = new([entryShards]entryShard)
	for i := range t.shards {
		t.shards[i].table = map[string]weak.Pointer[entry]{}
	}
	t.cache.max = cached
}

func (t *entries) shard(id string) *entryShard {
	return &t.shards[maphash.String(t.seed, id)%entryShards]
}

// find returns the entry of id if somebody holds it.
func (t *entries) find(id string) *entry {
	s := t.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.table[id].Value()
}

// get returns the entry of id.
func (t *entries) get(id string) *entry {
	s := t.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.table[id].Value(); e != nil {
		return e
	}
	e := &entry{id: id}
	if CheckID(id) == nil {
		e.own = id
	}
	s.table[id] = weak.Make(e)
	runtime.AddCleanup(e, forgetEntry, forgotten{s, id})
	return e
}

// forgotten is an entry that nobody holds any more. It holds nothing that leads back to one: what it points into is kept alive as a
// whole until the entry is gone, and the cache in it would keep the entry.
type forgotten struct {
	shard *entryShard
	id    string
}

func forgetEntry(f forgotten) {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	if f.shard.table[f.id].Value() == nil { // else another one took its place
		delete(f.shard.table, f.id)
	}
}

// each calls fn for every entry that somebody holds, and holds no lock while it does.
func (t *entries) each(fn func(*entry)) {
	var held []*entry
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		for _, p := range s.table {
			if e := p.Value(); e != nil {
				held = append(held, e)
			}
		}
		s.mu.Unlock()
		for _, e := range held {
			fn(e)
		}
		clear(held)
		held = held[:0]
	}
}

// entryCache keeps the last entries that were used alive: a clock whose hand takes the first one that was not used
// since it came by.
type entryCache struct {
	mu   sync.Mutex
	max  int
	ring []*entry
	hand int
}

func (c *entryCache) touch(e *entry) {
	if e.cached.Load() {
		if !e.used.Load() {
			e.used.Store(true)
		}
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case e.cached.Load():
		return
	case len(c.ring) < c.max:
		c.ring = append(c.ring, e)
	default:
		for c.ring[c.hand].used.Swap(false) {
			c.hand = (c.hand + 1) % len(c.ring)
		}
		c.ring[c.hand].cached.Store(false)
		c.ring[c.hand] = e
		c.hand = (c.hand + 1) % len(c.ring)
	}
	e.cached.Store(true)
}
