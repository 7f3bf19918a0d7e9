package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

// When something is an alarm.
const (
	alarmEvery       = 5 * time.Second
	upstreamDownFor  = time.Minute     // links come and go
	clockUnsyncedFor = 2 * time.Minute // after a boot it takes a moment
	certificateSoon  = 30 * 24 * time.Hour
	certificateNow   = 3 * 24 * time.Hour
	laneNearlyFull   = 0.9 // of max_bytes
)

// alarms remembers since when each alarm is there.
type alarms struct {
	mu     sync.Mutex                 // held from a look at the gateway until update has taken it: an older look must not end what a newer one found
	active map[alarmKey]httpapi.Alarm // under mu
	dumb   bool                       // under mu; what the store does not let be read was told
}

type alarmKey struct{ name, object string }

// update takes the alarms that there are at now, tells those that are new or gone, and gives all, the critical ones first. mu is held.
func (a *alarms) update(found []httpapi.Alarm, now time.Time, tell func(httpapi.AlarmChange)) []httpapi.Alarm {
	next := make(map[alarmKey]httpapi.Alarm, len(found))
	for _, f := range found {
		k := alarmKey{f.Name, f.Object}
		old, known := a.active[k]
		if f.Since = old.Since; !known {
			f.Since = now.UTC()
		}
		if f.Severity != old.Severity { // new, or worse, or better
			tell(httpapi.AlarmChange{Alarm: f, Active: true})
		}
		next[k] = f
	}
	for k, old := range a.active {
		if _, still := next[k]; !still {
			tell(httpapi.AlarmChange{Alarm: old})
		}
	}
	a.active = next
	return slices.SortedFunc(maps.Values(next), func(a, b httpapi.Alarm) int { // "critical" < "warning"
		return cmp.Or(strings.Compare(a.Severity, b.Severity), strings.Compare(a.Name, b.Name), strings.Compare(a.Object, b.Object))
	})
}

// count gives how many alarms are there, by name.
func (a *alarms) count() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := map[string]int{}
	for k := range a.active {
		n[k.name]++
	}
	return n
}

// alarmsOf looks for what a person should know of st, at now. parked is about a message that an upstream refused for good; "": there is none.
// How long a link has been away goes by now, whose monotonic part no jump of the clock changes, the rest by the clock that st believes.
func alarmsOf(st *httpapi.Status, parked string, now time.Time) (all []httpapi.Alarm) {
	add := func(severity, name, object, format string, args ...any) {
		all = append(all, httpapi.Alarm{Name: name, Object: object, Severity: severity, Text: fmt.Sprintf(format, args...)})
	}
	wall := st.Clock.Wall
	if n := len(st.Store.Damage); n > 0 {
		add(httpapi.Critical, "store_damaged", "", "Damaged parts of the store (%d) were set aside at the start, in %s/quarantine: the disk may be failing.", n, st.DataDir)
	}
	if n := st.Store.LostMessages; n > 0 {
		add(httpapi.Critical, "messages_lost", "", "%d acknowledged messages were in a damaged file and are lost; upstreams are told which.", n)
	}
	switch st.Store.Level {
	case "full":
		add(httpapi.Critical, "disk_full", "", "The disk is full: lanes refuse messages or drop the oldest. Free space, or holdfast spool purge.")
	case "high":
		add(httpapi.Warning, "disk_nearly_full", "", "The disk is nearly full: QoS 0 is shed and MQTT 3.1.1 publishers are slowed. Free space, or holdfast spool purge.")
	}
	if !st.ClockSync && (st.Clock.Doubt || wall.Sub(st.Clock.Since) >= clockUnsyncedFor) {
		add(httpapi.Warning, "clock_unsynced", "", "Nothing keeps the clock right: receive times may be wrong until it is set. See to NTP.")
	}
	for i := range st.Upstreams {
		switch u := &st.Upstreams[i]; {
		case !u.Connected && !u.Since.IsZero() && now.Sub(u.Since) >= upstreamDownFor: // zero: it has not begun yet
			why := ""
			if u.LastError != "" {
				why = ": " + strings.ReplaceAll(u.LastError, "\n", "; ")
			}
			add(httpapi.Warning, "upstream_down", u.Name, "Upstream %s is not connected%s. Messages wait on disk.", u.Name, why)
		case u.Connected && u.CommandsError != "":
			add(httpapi.Warning, "commands_unavailable", u.Name, "Commands do not come down from upstream %s: %s.", u.Name, strings.ReplaceAll(u.CommandsError, "\n", "; "))
		}
	}
	for _, c := range st.Certificates {
		switch left := c.NotAfter.Sub(wall); {
		case left <= 0:
			add(httpapi.Critical, "certificate_expiring", c.Listener, "The certificate of listener %s ended on %s: devices that check it cannot connect. Replace %s.", c.Listener, c.NotAfter.Format(time.DateOnly), c.File)
		case left < certificateSoon:
			severity := httpapi.Warning
			if left < certificateNow {
				severity = httpapi.Critical
			}
			add(severity, "certificate_expiring", c.Listener, "The certificate of listener %s ends on %s. Replace %s.", c.Listener, c.NotAfter.Format(time.DateOnly), c.File)
		}
	}
	waits := map[string]bool{} // lanes for which an upstream waits: others are full by design
	for i := range st.Ledger.Accounts {
		if a := &st.Ledger.Accounts[i]; a.Upstream != "" {
			waits[a.Lane] = true
		}
	}
	for _, l := range st.Lanes {
		if waits[l.Name] && l.MaxBytes > 0 && float64(l.Kept.Bytes) >= laneNearlyFull*float64(l.MaxBytes) {
			add(httpapi.Warning, "lane_nearly_full", l.Name, "Lane %s is at %.0f %% of its max_bytes; when it is full it does what its when_full says.", l.Name, 100*float64(l.Kept.Bytes)/float64(l.MaxBytes))
		}
	}
	if parked != "" {
		add(httpapi.Warning, "messages_parked", "", "Messages are parked, such as %s. See why, then holdfast spool replay, or leave them.", parked)
	}
	if !st.Ledger.Balanced {
		add(httpapi.Critical, "ledger_unbalanced", "", "The ledger does not balance, which is a defect of Holdfast: keep the data directory and report it.")
	}
	return all
}

var errFound = errors.New("found")

// parked names a message that an upstream refused for good; "": there is none.
func (g *Gateway) parked() (name string, err error) {
	err = g.spool.ParkedFrom(spool.SystemLane, 0, func(m spool.ParkedMessage) error {
		name = fmt.Sprintf("message %d of lane %s, which upstream %s refused", m.Seq, m.Lane, m.Upstream)
		return errFound
	})
	if errors.Is(err, errFound) {
		err = nil
	}
	return name, err
}

// tellAlarm tells the log and whoever watches.
func (g *Gateway) tellAlarm(c httpapi.AlarmChange) {
	if c.Active {
		g.log.Warn("alarm", "alarm", c.Name, "object", c.Object, "severity", c.Severity, "text", c.Text)
	} else {
		g.log.Info("alarm over", "alarm", c.Name, "object", c.Object)
	}
	g.events.PublishAlarm(c)
}

// watchAlarms looks even if nobody asks, so that the log and the events know. Accounts that do not balance, which cannot be unless
// Holdfast itself is wrong, are logged with their figures, once.
func (g *Gateway) watchAlarms(ctx context.Context) error {
	tick := time.NewTicker(alarmEvery)
	defer tick.Stop()
	told := map[string]bool{}
	for {
		st := g.Status()
		for _, a := range st.Ledger.Accounts {
			key := a.Upstream + "/" + a.Lane
			if a.Balanced() || told[key] {
				continue
			}
			told[key] = true // it will not heal
			g.log.Error("ledger does not balance: please report this", "upstream", a.Upstream, "lane", a.Lane,
				"accepted", a.Accepted, "delivered", a.Delivered, "expired", a.Expired, "evicted", a.Evicted, "parked", a.Parked,
				"pending", a.Pending)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
