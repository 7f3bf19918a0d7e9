package spool

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Count is a number of messages and their record bytes.
type Count struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

func (c *Count) add(from, to Position) {
	c.Messages += to.Seq - from.Seq
	c.Bytes += to.Bytes - from.Bytes
}

func (c *Count) sub(n Count) {
	c.Messages -= n.Messages
	c.Bytes -= n.Bytes
}

// Account is one upstream's ledger in one lane:
// Accepted = Delivered + Expired + Evicted + Parked + Pending, in messages and in bytes.
type Account struct {
	Upstream  string `json:"upstream"` // "": no upstream waits for this lane
	Lane      string `json:"lane"`
	Accepted  Count  `json:"accepted"` // stored since the upstream was first configured
	Delivered Count  `json:"delivered"`
	Expired   Count  `json:"expired"`
	Evicted   Count  `json:"evicted"`
	Parked    Count  `json:"parked"`
	Pending   Count  `json:"pending"`
	// Cursor is the oldest sequence that is pending, or the next to come.
	Cursor uint64 `json:"cursor"`
	// Backlog is what of Pending lies behind newer messages that were delivered first (drain: live_first), between
	// Islands stretches of them.
	Backlog Count `json:"backlog"`
	Islands int   `json:"islands"`
	// Oldest is when the message at Cursor was received, by the gateway's clock as it is now; zero: nothing is pending. Only Date sets it.
	Oldest time.Time `json:"oldest,omitzero"`
}

// Balanced says whether every accepted message is in exactly one account. Pending is what lies
// ahead of the cursor and on no island; the other accounts are counted one by one as messages end.
func (a *Account) Balanced() bool {
	return a.Accepted.Messages == a.Delivered.Messages+a.Expired.Messages+a.Evicted.Messages+a.Parked.Messages+a.Pending.Messages &&
		a.Accepted.Bytes == a.Delivered.Bytes+a.Expired.Bytes+a.Evicted.Bytes+a.Parked.Bytes+a.Pending.Bytes
}

// Accounts returns the ledger: each upstream in each of its lanes, and lanes for which no upstream
// waits. All figures are of one moment.
func (s *Spool) Accounts() []Account {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Account
	for _, l := range s.lanes {
		for _, c := range l.cursors {
			if c.active {
				a := Account{
					Upstream: c.upstream, Lane: l.name, Cursor: c.row.Pos.Seq,
					Delivered: c.row.Delivered, Expired: c.row.Expired, Evicted: c.row.Evicted, Parked: c.row.Parked,
				}
				a.Accepted.add(c.row.Start, l.durable)
				a.Pending.add(c.row.Pos, l.durable)
				if a.Islands = len(c.row.Islands); a.Islands > 0 {
					a.Pending.sub(c.row.apart())
				}
				a.Backlog = c.backlog()
				all = append(all, a)
			}
		}
		if !l.waiting() && l.durable.Seq > 1 {
			// Nobody waits. What earlier upstreams took is theirs; retention accounts for what it dropped.
			a := Account{Lane: l.name, Cursor: l.head.Seq, Expired: l.expired, Evicted: l.evicted}
			a.Pending.add(l.head, l.durable)
			a.Accepted = Count{
				a.Pending.Messages + a.Expired.Messages + a.Evicted.Messages,
				a.Pending.Bytes + a.Expired.Bytes + a.Evicted.Bytes,
			}
			all = append(all, a)
		}
	}
	return all
}

// LaneStat is what a lane holds and has refused.
type LaneStat struct {
	Name     string `json:"name"`
	Accepted Count  `json:"accepted"` // stored, since the spool was created
	Kept     Count  `json:"kept"`     // still there: some upstream, or retention, has not let go
	MaxBytes int64  `json:"max_bytes"`
	Refused  uint64 `json:"refused"`      // since the start: the lane was full
	Shed     uint64 `json:"shed"`         // since the start: QoS 0 while the store was behind, or the disk nearly full
	NoDisk   uint64 `json:"refused_disk"` // since the start: the disk was full
	TailMem  int64  `json:"tail_bytes"`
	Parked   Count  `json:"parked"` // copies that can be replayed, and the disk that they take
}

// Lanes returns the lanes in the order in which they were configured, the system lane first.
func (s *Spool) Lanes() []LaneStat {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]LaneStat, 0, len(s.lanes))
	for _, l := range s.lanes {
		st := LaneStat{
			Name: l.name, MaxBytes: l.rules.Load().MaxBytes,
			Refused: l.refused.Load(), Shed: l.shed.Load(), NoDisk: l.refusedDisk.Load(), TailMem: l.tailBytes,
			Parked: l.parked,
		}
		st.Accepted.add(Position{Seq: 1}, l.durable)
		st.Kept.add(l.head, l.durable)
		all = append(all, st)
	}
	return all
}

// Date sets Oldest in each of accounts, which Accounts has returned: that reads a chunk an account.
func (s *Spool) Date(accounts []Account) error {
	for i := range accounts {
		a := &accounts[i]
		if a.Pending.Messages == 0 {
			continue
		}
		// What has gone meanwhile is not found: the next one is as good.
		if err := s.Peek(a.Lane, a.Cursor, 1, func(_ uint64, r *Record) error {
			a.Oldest = time.UnixMilli(r.Received).UTC()
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// collector shows the ledger as metrics, read when they are asked for: the hot path counts once.
type collector struct{ s *Spool }

var (
	descEnded = prometheus.NewDesc("holdfast_spool_ended_messages_total",
		"Messages whose wait for an upstream ended, by outcome. Expired, evicted and parked should not rise.", []string{"upstream", "lane", "outcome"}, nil)
	descPending = prometheus.NewDesc("holdfast_spool_pending_messages",
		"Messages stored that wait for an upstream. A steady rise means that the link is down or too slow.", []string{"upstream", "lane"}, nil)
	descPendingBytes = prometheus.NewDesc("holdfast_spool_pending_bytes",
		"Record bytes that wait for an upstream.", []string{"upstream", "lane"}, nil)
	descBacklog = prometheus.NewDesc("holdfast_spool_backlog_messages",
		"Pending messages behind newer ones that went first (drain: live_first). It falls while the link is up; a rise means that the link is too slow for both.", []string{"upstream", "lane"}, nil)
	descIslands = prometheus.NewDesc("holdfast_spool_islands",
		"Delivered stretches beyond the backlog. At 32 nothing more goes ahead of its turn until the backlog has reached one of them.", []string{"upstream", "lane"}, nil)
	descAccepted = prometheus.NewDesc("holdfast_spool_accepted_messages_total",
		"Messages stored.", []string{"lane"}, nil)
	descKept = prometheus.NewDesc("holdfast_spool_kept_bytes",
		"Record bytes a lane holds. At max_bytes its when_full rule applies.", []string{"lane"}, nil)
	descRefused = prometheus.NewDesc("holdfast_spool_refused_messages_total",
		"Messages not taken and not acknowledged, by reason. A rise means that devices keep their data because the gateway cannot.", []string{"lane", "reason"}, nil)
	descOldest = prometheus.NewDesc("holdfast_spool_oldest_seconds",
		"Age of the oldest message that waits for an upstream; 0: none waits. A rise by a second each second means that nothing gets through.", []string{"upstream", "lane"}, nil)
	descParked = prometheus.NewDesc("holdfast_spool_parked_bytes",
		"Copies of messages that upstreams refused for good, kept for a replay.", []string{"lane"}, nil)
	descParkedGone = prometheus.NewDesc("holdfast_spool_parked_dropped_total",
		"Such copies dropped because there were too many: they can no longer be replayed.", nil, nil)
	descBalanced = prometheus.NewDesc("holdfast_spool_ledger_balanced",
		"1 if every accepted message is in exactly one account. 0 is a defect: keep the data directory and report it.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descEnded, descPending, descPendingBytes, descBacklog, descIslands, descAccepted, descKept, descRefused, descOldest, descParked, descParkedGone, descBalanced} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, t prometheus.ValueType, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, float64(v), labels...)
	}
	balanced := uint64(1)
	accounts := c.s.Accounts()
	dated := c.s.Date(accounts) == nil // else the store tells of it
	now := c.s.clock.Time()
	for _, a := range accounts {
		if !a.Balanced() {
			balanced = 0
		}
		if dated {
			age := 0.0
			if !a.Oldest.IsZero() {
				age = max(now.Sub(a.Oldest).Seconds(), 0)
			}
			ch <- prometheus.MustNewConstMetric(descOldest, prometheus.GaugeValue, age, a.Upstream, a.Lane)
		}
		send(descPending, prometheus.GaugeValue, a.Pending.Messages, a.Upstream, a.Lane)
		send(descPendingBytes, prometheus.GaugeValue, a.Pending.Bytes, a.Upstream, a.Lane)
		send(descBacklog, prometheus.GaugeValue, a.Backlog.Messages, a.Upstream, a.Lane)
		send(descIslands, prometheus.GaugeValue, uint64(a.Islands), a.Upstream, a.Lane)
		send(descEnded, prometheus.CounterValue, a.Delivered.Messages, a.Upstream, a.Lane, "delivered")
		send(descEnded, prometheus.CounterValue, a.Expired.Messages, a.Upstream, a.Lane, "expired")
		send(descEnded, prometheus.CounterValue, a.Evicted.Messages, a.Upstream, a.Lane, "evicted")
		send(descEnded, prometheus.CounterValue, a.Parked.Messages, a.Upstream, a.Lane, "parked")
	}
	send(descBalanced, prometheus.GaugeValue, balanced)
	send(descParkedGone, prometheus.CounterValue, c.s.parkedGone.Load())
	for _, l := range c.s.Lanes() {
		send(descAccepted, prometheus.CounterValue, l.Accepted.Messages, l.Name)
		send(descParked, prometheus.GaugeValue, l.Parked.Bytes, l.Name)
		send(descKept, prometheus.GaugeValue, l.Kept.Bytes, l.Name)
		send(descRefused, prometheus.CounterValue, l.Refused, l.Name, "full")
		send(descRefused, prometheus.CounterValue, l.Shed, l.Name, "busy")
		send(descRefused, prometheus.CounterValue, l.NoDisk, l.Name, "disk")
	}
}
