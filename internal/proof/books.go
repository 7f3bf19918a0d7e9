package proof

import "fmt"

// Books is what a gateway says of its messages, as `GET /api/v1/status` answers it.
type Books struct {
	Epoch  string `json:"epoch"`
	Ledger struct {
		Balanced bool      `json:"balanced"`
		Accounts []Account `json:"accounts"`
	} `json:"ledger"`
}

// Count is messages and bytes in an account.
type Count struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

// Account is where the messages of one lane are, for one upstream.
type Account struct {
	Upstream  string `json:"upstream"`
	Lane      string `json:"lane"`
	Accepted  Count  `json:"accepted"`
	Delivered Count  `json:"delivered"`
	Expired   Count  `json:"expired"`
	Evicted   Count  `json:"evicted"`
	Parked    Count  `json:"parked"`
	Pending   Count  `json:"pending"`
	Backlog   Count  `json:"backlog"` // of Pending: behind newer ones that went first
	Islands   int    `json:"islands"`
}

// systemLane is where a gateway puts what it has to say itself.
const systemLane = "system"

// Balance returns an error if what was accepted is not what the other columns add up to.
func (a Account) Balance() error {
	for what, of := range map[string]func(Count) uint64{
		"messages": func(c Count) uint64 { return c.Messages },
		"bytes":    func(c Count) uint64 { return c.Bytes },
	} {
		if sum := of(a.Delivered) + of(a.Expired) + of(a.Evicted) + of(a.Parked) + of(a.Pending); sum != of(a.Accepted) {
			return fmt.Errorf("ledger of upstream %q, lane %q: %d %s accepted, %d accounted for: %+v", a.Upstream, a.Lane, of(a.Accepted), what, sum, a)
		}
	}
	return nil
}

// gone is what will not arrive, by a rule or by damage.
func (a Account) gone() uint64 {
	return a.Expired.Messages + a.Evicted.Messages + a.Parked.Messages
}

// Balance returns what does not add up in any account.
func (b *Books) Balance() (wrong []error) {
	for _, a := range b.Ledger.Accounts {
		if err := a.Balance(); err != nil {
			wrong = append(wrong, err)
		}
	}
	if !b.Ledger.Balanced {
		wrong = append(wrong, fmt.Errorf("the gateway says that its ledger is not balanced"))
	}
	return wrong
}

// Accepted is how many messages of devices an upstream's accounts tell of; what the gateway itself has to say does not count.
func (b *Books) Accepted(upstream string) (n uint64) {
	for _, a := range b.Ledger.Accounts {
		if a.Upstream == upstream && a.Lane != systemLane {
			n += a.Accepted.Messages
		}
	}
	return n
}

// Pending is an error that says what still waits for an upstream.
func (b *Books) Pending(upstream string) error {
	for _, a := range b.Ledger.Accounts {
		if a.Upstream == upstream && a.Pending.Messages > 0 {
			return fmt.Errorf("lane %s: %+v", a.Lane, a)
		}
	}
	return nil
}
