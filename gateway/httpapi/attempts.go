package httpapi

import (
	"net/netip"
	"sync"
	"time"
)

// Wrong tokens from one address: the first are answered at once, then each makes the next wait longer.
const (
	freeAttempts    = 5
	firstDelay      = time.Second
	longestDelay    = time.Minute
	forgetAttempts  = 10 * time.Minute // after the last one
	rememberedPeers = 1024
)

// attempts remembers who showed wrong tokens. The zero value is ready; many goroutines may use it.
type attempts struct {
	mu    sync.Mutex
	peers map[netip.Prefix]*attempter // under mu; at most rememberedPeers
}

type attempter struct {
	count int
	last  time.Time
	until time.Time // wrong tokens are not told apart before this
}

// attempt counts a wrong token of p. wait is how long p has to wait, in whole seconds; 0: not at all yet. first: it is
// the first time that it has to.
func (a *attempts) attempt(p netip.Prefix, now time.Time) (wait time.Duration, first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := a.peers[p]
	if at == nil || now.Sub(at.last) > forgetAttempts {
		if a.peers == nil {
			a.peers = map[netip.Prefix]*attempter{}
		}
		if at == nil && len(a.peers) >= rememberedPeers {
			a.makeRoom(now)
		}
		at = &attempter{}
		a.peers[p] = at
	}
	at.last = now
	if left := at.until.Sub(now); left > 0 {
		return max(left.Round(time.Second), time.Second), false
	}
	at.count++
	if at.count < freeAttempts {
		return 0, false
	}
	delay := longestDelay
	if n := at.count - freeAttempts; n < 6 {
		delay = firstDelay << n
	}
	at.until = now.Add(delay)
	return 0, at.count == freeAttempts
}

// makeRoom forgets those whose time is over, or else the one that was silent longest. mu is held.
func (a *attempts) makeRoom(now time.Time) {
	var oldest netip.Prefix
	var last time.Time
	for p, at := range a.peers {
		if now.Sub(at.last) > forgetAttempts {
			delete(a.peers, p)
			continue
		}
		if last.IsZero() || at.last.Before(last) {
			oldest, last = p, at.last
		}
	}
	if len(a.peers) >= rememberedPeers {
		delete(a.peers, oldest)
	}
}
