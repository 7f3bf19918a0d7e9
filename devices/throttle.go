package devices

import (
	"container/list"
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// What failed logins cost. Durations are measured with the monotonic clock: the wall clock may jump.
const (
	freeFailures   = 2 // of one address: a person mistypes
	firstDelay     = 100 * time.Millisecond
	maxDelay       = 5 * time.Second
	failureMemory  = 15 * time.Minute // without a failure
	maxWaiting     = 16               // failed attempts of one address that wait for their answer
	lockFailures   = 10               // of one device from one address, in a row
	firstLock      = time.Second
	maxLock        = 5 * time.Minute
	throttledPeers = 10_000 // addresses, and pairs of address and device, that are remembered
	connectMemory  = 5 * time.Minute
	connectPeers   = 20_000 // devices whose connects are counted
)

// lru is a map that forgets what was not used for longest when it is full, and what was not used for a while. The
// caller locks.
type lru[K comparable, V any] struct {
	max   int
	ttl   time.Duration
	items map[K]*list.Element
	order list.List // of *lruItem; the newest in front
}

type lruItem[K comparable, V any] struct {
	key   K
	used  time.Time
	value V
}

func newLRU[K comparable, V any](limit int, ttl time.Duration) *lru[K, V] {
	return &lru[K, V]{max: limit, ttl: ttl, items: map[K]*list.Element{}}
}

// get returns what is kept under key, nil for nothing, and does not count as a use.
func (l *lru[K, V]) get(key K, now time.Time) *V {
	e := l.items[key]
	if e == nil {
		return nil
	}
	it := e.Value.(*lruItem[K, V])
	if now.Sub(it.used) >= l.ttl {
		l.drop(e)
		return nil
	}
	return &it.value
}

// use returns what is kept under key, making it if there is nothing.
func (l *lru[K, V]) use(key K, now time.Time) *V {
	if v := l.get(key, now); v != nil {
		e := l.items[key]
		e.Value.(*lruItem[K, V]).used = now
		l.order.MoveToFront(e)
		return v
	}
	for oldest := l.order.Back(); oldest != nil; oldest = l.order.Back() {
		if len(l.items) < l.max && now.Sub(oldest.Value.(*lruItem[K, V]).used) < l.ttl {
			break
		}
		l.drop(oldest)
	}
	it := &lruItem[K, V]{key: key, used: now}
	l.items[key] = l.order.PushFront(it)
	return &it.value
}

func (l *lru[K, V]) drop(e *list.Element) {
	delete(l.items, e.Value.(*lruItem[K, V]).key)
	l.order.Remove(e)
}

func (l *lru[K, V]) remove(key K) {
	if e := l.items[key]; e != nil {
		l.drop(e)
	}
}

// throttle slows down who guesses. What is right is never slowed down, for many devices come from one address; but
// one device that fails on and on from one address is not looked at any more for a while.
type throttle struct {
	mu      sync.Mutex
	peers   *lru[netip.Addr, *peer]
	pairs   *lru[pair, pairFailures]
	buckets *lru[string, bucket] // of connects, by device
}

// peer is an address. Those that wait hold it, so it is a pointer. Guarded by throttle.mu.
type peer struct {
	failures int
	waiting  int
}

type pair struct {
	addr   netip.Addr
	device string
}

type pairFailures struct {
	inRow int
	until time.Time // not looked at before
	lock  time.Duration
}

func newThrottle() *throttle {
	return &throttle{
		peers:   newLRU[netip.Addr, *peer](throttledPeers, failureMemory),
		pairs:   newLRU[pair, pairFailures](throttledPeers, failureMemory),
		buckets: newLRU[string, bucket](connectPeers, connectMemory),
	}
}

// source is whom an address stands for: of IPv6 the network, for whoever has one address there has 2^64.
func source(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// locked says how long attempts of device from addr are not looked at.
func (t *throttle) locked(addr netip.Addr, device string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.pairs.items) == 0 {
		return 0
	}
	now := time.Now()
	if f := t.pairs.get(pair{addr, device}, now); f != nil {
		return f.until.Sub(now)
	}
	return 0
}

// crowded is ErrTooOften while as many failures of addr wait as may: what comes then is not worth the gateway's
// processors. Else one address could have argon2 computed all day, under another name each time.
func (t *throttle) crowded(addr netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers.get(addr, time.Now()); p == nil || *p == nil || (*p).waiting < maxWaiting {
		return nil
	}
	return fmt.Errorf("%w: %d failed logins of this address wait for their answer, and no other password from there is tried", ErrTooOften, maxWaiting)
}

// passed notes that device showed from addr what is right.
func (t *throttle) passed(addr netip.Addr, device string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.pairs.items) > 0 {
		t.pairs.remove(pair{addr, device})
	}
}

// failed notes a failure and waits as long as its answer has to. device is "" for what is no device id. lock is set
// when this failure locks the pair for the first time. The error is ErrTooOften: too many wait already.
func (t *throttle) failed(ctx context.Context, addr netip.Addr, device string) (lock bool, err error) {
	p, delay, lock := t.note(addr, device)
	switch {
	case delay == 0:
		return lock, nil
	case p == nil:
		return lock, fmt.Errorf("%w: %d failed logins of this address wait for their answer", ErrTooOften, maxWaiting)
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done(): // who asked is gone, or the gateway stops: the answer is the same
	}
	t.mu.Lock()
	p.waiting--
	t.mu.Unlock()
	return lock, nil
}

// note counts a failure. p is nil if no more may wait.
func (t *throttle) note(addr netip.Addr, device string) (p *peer, delay time.Duration, lock bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if device != "" {
		f := t.pairs.use(pair{addr, device}, now)
		f.inRow++
		if f.inRow >= lockFailures {
			lock = f.lock == 0
			f.lock = min(max(firstLock, 2*f.lock), maxLock)
			f.until = now.Add(f.lock)
		}
	}
	at := t.peers.use(addr, now)
	if *at == nil {
		*at = &peer{}
	}
	p = *at
	p.failures++
	if p.failures <= freeFailures {
		return p, 0, lock
	}
	delay = min(firstDelay<<min(p.failures-freeFailures-1, 10), maxDelay)
	if p.waiting >= maxWaiting {
		return nil, delay, lock
	}
	p.waiting++
	return p, delay, lock
}

// bucket is a token bucket.
type bucket struct {
	level float64
	last  time.Time // zero: it is new, and full
}

// take takes a token if there is one, from a bucket that is filled at rate a second up to most.
func (b *bucket) take(now time.Time, most, rate float64) bool {
	b.level = min(b.level+now.Sub(b.last).Seconds()*rate, most)
	b.last = now
	if b.level < 1 {
		return false
	}
	b.level--
	return true
}

// connect takes a token from device's bucket, which holds perMinute and is filled at that rate. It returns how long
// to wait for the next token if there is none.
func (t *throttle) connect(device string, perMinute int) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, rate := time.Now(), float64(perMinute)/60
	b := t.buckets.use(device, now)
	if b.last.IsZero() {
		b.level = float64(perMinute)
	} else {
		b.level = min(b.level+now.Sub(b.last).Seconds()*rate, float64(perMinute))
	}
	b.last = now
	if b.level < 1 {
		return time.Duration((1 - b.level) / rate * float64(time.Second))
	}
	b.level--
	return 0
}
