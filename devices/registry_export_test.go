package devices

import "runtime"

// DeviceKey is the key of a device's row.
func DeviceKey(id string) []byte { return deviceKey(id) }

// SetMaxDevices lowers how many devices may be registered.
func SetMaxDevices(r *Registry, n int) { r.maxDevices = n }

// Recount returns the counts as they are stored and as the rows are.
func Recount(r *Registry) (stored, counted Tally, err error) {
	row, found, err := r.store.Get(countsKey)
	var c counts
	if err == nil && found {
		c, err = decodeCounts(row)
	}
	if err != nil {
		return stored, counted, err
	}
	stored = Tally(c)
	c = counts{}
	err = r.scan("", func(d *device) bool {
		c = c.plus(1, tally(d))
		return true
	})
	return stored, Tally(c), err
}

// Tally is the counts of devices.
type Tally counts

// HoldHashes takes the room in which passwords are hashed until the function returned is called.
func HoldHashes(r *Registry) (release func()) {
	for range cap(r.slots) {
		r.slots <- struct{}{}
	}
	return func() {
		for range cap(r.slots) {
			<-r.slots
		}
	}
}

// Throttled is how many addresses, and pairs of address and device, are remembered for their failures.
func Throttled(r *Registry) (peers, pairs int) {
	r.guard.mu.Lock()
	defer r.guard.mu.Unlock()
	return len(r.guard.peers.items), len(r.guard.pairs.items)
}

// PatternMatches says whether a role with this one pattern may publish to topic.
func PatternMatches(pattern, topic, own string) bool {
	s := compileRules([]string{pattern})
	return s.allowsTopic([]byte(topic), own)
}

// PatternCovers says whether a role with this one pattern may subscribe to filter.
func PatternCovers(pattern, filter, own string) bool {
	s := compileRules([]string{pattern})
	return s.allowsFilter(filter, own)
}

// Flapping is of how many devices it is remembered what was told of them.
func Flapping(r *Registry) (n int) {
	for i := range r.conns {
		s := &r.conns[i]
		s.mu.Lock()
		n += len(s.told)
		s.mu.Unlock()
	}
	return n
}

// DecodeDeviceRow returns the device of a row and the row written again.
func DecodeDeviceRow(row []byte) (d Device, again []byte, err error) {
	x, err := decodeDevice("id", row)
	if err != nil {
		return Device{}, nil, err
	}
	return x.show(Presence{}), x.encode(), nil
}

// DecodePresenceRow does the same for a presence.
func DecodePresenceRow(row []byte) (p Presence, again []byte, err error) {
	if p, err = decodePresence(row); err != nil {
		return p, nil, err
	}
	return p, encodePresence(&p), nil
}

// DecodeCountsRow does the same for counts.
func DecodeCountsRow(row []byte) (t Tally, again []byte, err error) {
	c, err := decodeCounts(row)
	return Tally(c), c.encode(), err
}

// SetCache bounds how many devices are kept that nobody uses. Before the first.
func SetCache(r *Registry, n int) { r.entries.cache.max = n }

// Held is how many devices are in memory after what nobody holds was collected.
func Held(r *Registry) (n int) {
	runtime.GC()
	r.entries.each(func(*entry) { n++ })
	return n
}

// KnownIDs is of how many ids there is a trace in memory.
func KnownIDs(r *Registry) (n int) {
	for i := range r.entries.shards {
		s := &r.entries.shards[i]
		s.mu.Lock()
		n += len(s.table)
		s.mu.Unlock()
	}
	return n
}

// BoundTold sets how much is told upstream of all devices: at once, and a second.
func (r *Registry) BoundTold(most, rate float64) {
	r.lateMu.Lock()
	defer r.lateMu.Unlock()
	r.most, r.rate = most, rate
	r.all.level = most
}
