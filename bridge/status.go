package bridge

import "time"

// State is what a bridge is doing about its link.
type State string

// The states.
const (
	StateConnecting State = "connecting"
	StateConnected  State = "connected"
	StateWaiting    State = "waiting" // for the next attempt
	StateStopped    State = "stopped" // not started, or Run has returned
)

// Status is what an operator asks about an upstream.
type Status struct {
	Name      string    `json:"name"`
	URL       string    `json:"url"` // in use, or tried last
	Format    string    `json:"format"`
	State     State     `json:"state"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"`                // of being connected, or of not being it
	RetryAt   time.Time `json:"retry_at,omitzero"`    // next attempt
	Attempts  int       `json:"attempts"`             // since the link was last healthy
	LastError string    `json:"last_error,omitempty"` // why the last link or attempt ended; stays after a reconnect
	LastAck   time.Time `json:"last_ack,omitzero"`
	InFlight  int       `json:"in_flight"` // sends without an outcome
	// Budget is nil if the upstream has none.
	Budget *BudgetStatus `json:"budget,omitempty"`

	Sends           uint64 `json:"sends"` // since the process started, repeats included
	SentMessages    uint64 `json:"sent_messages"`
	SentBytes       uint64 `json:"sent_bytes"` // topics and payloads
	WireBytes       uint64 `json:"wire_bytes"` // what the network was given: MQTT, TLS, keep-alives, on all connections
	AckedMessages   uint64 `json:"acked_messages"`
	ExpiredMessages uint64 `json:"expired_messages"`
	ParkedMessages  uint64 `json:"parked_messages"`
}

// Status may be called at any time, from any goroutine.
func (b *Bridge) Status() Status {
	b.mu.Lock()
	s := b.status
	b.mu.Unlock()
	s.InFlight = int(b.counts.inFlight.Load())
	s.Sends = b.counts.sends.Load()
	s.SentMessages = b.counts.messages.Load()
	s.SentBytes = b.counts.bytes.Load()
	s.WireBytes = b.meter.Total()
	s.AckedMessages = b.counts.acked.Load()
	s.ExpiredMessages = b.counts.expired.Load()
	s.ParkedMessages = b.counts.parked.Load()
	if ms := b.counts.lastAckMS.Load(); ms != 0 {
		s.LastAck = time.UnixMilli(ms)
	}
	return s
}

// settledAfter is how long a link has to be up before others follow it.
const settledAfter = 10 * time.Second

// Settled is the address where the link is up and has been for a while; "" if there is none.
func (b *Bridge) Settled() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.status.State != StateConnected || time.Since(b.status.Since) < settledAfter {
		return ""
	}
	return b.status.URL
}
