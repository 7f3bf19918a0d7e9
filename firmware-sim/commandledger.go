package firmwaresim

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// CommandRecord is what a device knows of one command.
type CommandRecord struct {
	Device string `json:"device"`
	ID     string `json:"id"`
	Name   string `json:"name"`
	N      uint64 `json:"n,omitempty"` // member n of its payload, if that is a JSON object which has one
	// Received is how often it came, Executed how often it was begun, Resumed how often a restart had it
	// begun again because it may be done twice (Query).
	Received int `json:"received"`
	Executed int `json:"executed"`
	Resumed  int `json:"resumed,omitempty"`
	// Open: it waits or runs. Else Outcome is succeeded, failed or rejected, and empty if the device ignores it.
	Open    bool   `json:"open,omitempty"`
	Outcome string `json:"outcome,omitempty"`
	// Acknowledged: the server has taken over the outcome.
	Acknowledged bool `json:"acknowledged"`
}

// CommandLedger holds all commands that devices have received, at the moment when Fleet.CommandLedger made it.
type CommandLedger struct {
	records []CommandRecord // by device, of one device in the order of their first arrival
	places  map[commandKey]int
}

type commandKey struct{ device, id string }

// CommandLedger gives the ledger as it stands. While the fleet runs, more may have happened when it returns.
func (f *Fleet) CommandLedger() *CommandLedger {
	var all []CommandRecord
	for _, d := range f.devices {
		d.mu.Lock()
		if m := d.commands; m != nil {
			for i := range m.orders {
				o := &m.orders[i]
				all = append(all, CommandRecord{
					Device: d.id, ID: o.id, Name: o.name, N: o.n,
					Received: int(o.received), Executed: int(o.executed), Resumed: int(o.resumed),
					Open: o.state != orderEnded, Outcome: o.outcome, Acknowledged: o.told,
				})
			}
		}
		d.mu.Unlock()
	}
	return NewCommandLedger(all)
}

// NewCommandLedger makes a ledger of records, those of a device in the order of their first arrival. Several of
// one command, which a device had forgotten when it came again, become one.
func NewCommandLedger(records []CommandRecord) *CommandLedger {
	l := &CommandLedger{places: make(map[commandKey]int, len(records))}
	for _, r := range records {
		key := commandKey{r.Device, r.ID}
		i, again := l.places[key]
		if !again {
			l.places[key] = len(l.records)
			l.records = append(l.records, r)
			continue
		}
		one := &l.records[i]
		one.Received += r.Received
		one.Executed += r.Executed
		one.Resumed += r.Resumed
		one.Open = one.Open || r.Open
		one.Acknowledged = one.Acknowledged || r.Acknowledged
		if one.Outcome == "" {
			one.Outcome = r.Outcome
		}
	}
	return l
}

// Records are all commands. Do not change them.
func (l *CommandLedger) Records() []CommandRecord { return l.records }

// Get finds a command.
func (l *CommandLedger) Get(device, id string) (CommandRecord, bool) {
	i, ok := l.places[commandKey{device, id}]
	if !ok {
		return CommandRecord{}, false
	}
	return l.records[i], true
}

// MarshalJSON writes the records.
func (l *CommandLedger) MarshalJSON() ([]byte, error) {
	if l.records == nil {
		return []byte("[]"), nil
	}
	return json.Marshal(l.records)
}

// CommandView is a command as somebody else sees it: the cloud by its events, or whoever asks the API.
type CommandView struct {
	Device, ID string
	State      string // QUEUED, SENT, …
	OneWay     bool   // DELIVERED is its end
}

// CommandVerdict is the outcome of CommandLedger.Verify, in commands.
type CommandVerdict struct {
	Received      uint64 `json:"received"` // by devices, each once
	Repeats       uint64 `json:"repeats"`  // further arrivals
	Executed      uint64 `json:"executed"`
	ExecutedTwice uint64 `json:"executed_twice"`
	OutOfOrder    uint64 `json:"out_of_order"` // came first after one of its device with a greater n
	Lost          uint64 `json:"lost"`         // others see it delivered, and the device never had it
	Disagreed     uint64 `json:"disagreed"`    // others see another end than the device
	Unknown       uint64 `json:"unknown"`      // the device has it, and nobody has sent it
	Open          uint64 `json:"open"`         // others see no end yet
	// Examples name some of what is wrong.
	Examples []string `json:"examples,omitempty"`
}

// OK says that nothing is executed twice, out of order, lost, unknown or seen differently. What is open is not
// wrong yet.
func (v CommandVerdict) OK() bool {
	return v.ExecutedTwice+v.OutOfOrder+v.Lost+v.Disagreed+v.Unknown == 0
}

// Verify checks what the devices did, and holds it against what others see of each command. Without views only
// the first is done. Commands whose payload has no n, such as urgent ones, which may overtake, have no order.
func (l *CommandLedger) Verify(views []CommandView) CommandVerdict {
	var v CommandVerdict
	wrong := func(count *uint64, device, id, format string, args ...any) {
		*count++
		if len(v.Examples) < maxExamples {
			v.Examples = append(v.Examples, device+" "+id+": "+fmt.Sprintf(format, args...))
		}
	}
	highest := make(map[string]uint64)
	for i := range l.records {
		r := &l.records[i]
		v.Received++
		v.Repeats += uint64(r.Received - 1)
		if r.Executed > 0 {
			v.Executed++
		}
		if r.Executed > 1 {
			wrong(&v.ExecutedTwice, r.Device, r.ID, "%s was executed %d times", r.Name, r.Executed)
		}
		if r.N == 0 {
			continue
		}
		if r.N <= highest[r.Device] {
			wrong(&v.OutOfOrder, r.Device, r.ID, "n=%d came first after n=%d", r.N, highest[r.Device])
		}
		highest[r.Device] = max(highest[r.Device], r.N)
	}
	if views == nil {
		return v
	}
	seen := make(map[commandKey]bool, len(views))
	for _, view := range views {
		seen[commandKey{view.Device, view.ID}] = true
		r, has := l.Get(view.Device, view.ID)
		if !view.ended() {
			v.Open++
		}
		// Only a device leads to these states. From the others it may have got the command all the same: an
		// acknowledgement can be lost.
		outcome := slices.Contains([]string{"SUCCEEDED", "FAILED", "REJECTED"}, view.State)
		reached := outcome || slices.Contains([]string{"DELIVERED", "IN_PROGRESS", "TIMED_OUT"}, view.State)
		switch {
		case !has && reached:
			wrong(&v.Lost, view.Device, view.ID, "%s, but the device never had it", view.State)
		case outcome && !strings.EqualFold(view.State, r.Outcome):
			wrong(&v.Disagreed, view.Device, view.ID, "%s, but the device says %q", view.State, cmp.Or(r.Outcome, "nothing"))
		case !outcome && r.Acknowledged && !view.OneWay:
			wrong(&v.Disagreed, view.Device, view.ID, "%s, but the device was acknowledged that it %s", view.State, r.Outcome)
		}
	}
	for i := range l.records {
		if r := &l.records[i]; !seen[commandKey{r.Device, r.ID}] {
			wrong(&v.Unknown, r.Device, r.ID, "nobody has sent it")
		}
	}
	return v
}

func (v CommandView) ended() bool {
	switch v.State {
	case "", "QUEUED", "SENT", "IN_PROGRESS":
		return false
	case "DELIVERED":
		return v.OneWay
	}
	return true
}

// String is the verdict in one paragraph.
func (v CommandVerdict) String() string {
	s := fmt.Sprintf("received %d, repeats %d, executed %d, executed twice %d, out of order %d, lost %d, disagreed %d, unknown %d, open %d",
		v.Received, v.Repeats, v.Executed, v.ExecutedTwice, v.OutOfOrder, v.Lost, v.Disagreed, v.Unknown, v.Open)
	for _, e := range v.Examples {
		s += "\n  " + e
	}
	return s
}
