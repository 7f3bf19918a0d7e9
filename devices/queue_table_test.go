package devices_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"holdfast/devices"
)

// tableCase is a command in some state, with what is needed to do something to it.
type tableCase struct {
	*queueRig
	l     *fakeLink // its device's connection; nil: none
	token uint64    // of its last delivery
	req   devices.Request
}

const (
	tableTTL  = time.Hour
	tableExec = 10 * time.Minute
	tableAck  = 30 * time.Second
)

// tableStates bring a fresh command into each state.
var tableStates = map[string]func(c *tableCase){
	"QUEUED":         func(c *tableCase) { c.take() },
	"QUEUED again":   func(c *tableCase) { c.take(); c.connect(); c.gone() },
	"SENT":           func(c *tableCase) { c.take(); c.connect() },
	"DELIVERED":      func(c *tableCase) { c.take(); c.connect(); c.ack(c.l) },
	"IN_PROGRESS":    func(c *tableCase) { c.take(); c.connect(); c.ack(c.l); c.says(devices.AnswerAccepted) },
	"SUCCEEDED":      func(c *tableCase) { c.take(); c.connect(); c.ack(c.l); c.says(devices.AnswerSucceeded) },
	"FAILED":         func(c *tableCase) { c.take(); c.connect(); c.ack(c.l); c.says(devices.AnswerFailed) },
	"REJECTED":       func(c *tableCase) { c.take(); c.connect(); c.ack(c.l); c.says(devices.AnswerRejected) },
	"EXPIRED unsent": func(c *tableCase) { c.take(); c.pass(tableTTL) },
	"EXPIRED":        func(c *tableCase) { c.take(); c.connect(); c.gone(); c.pass(tableTTL) },
	"TIMED_OUT":      func(c *tableCase) { c.take(); c.connect(); c.ack(c.l); c.pass(tableExec) },
	"CANCELED unsent": func(c *tableCase) {
		c.take()
		c.cancel()
	},
	"CANCELED":          func(c *tableCase) { c.take(); c.connect(); c.cancel() },
	"SUPERSEDED unsent": func(c *tableCase) { c.take(); c.supersede() },
	"SUPERSEDED":        func(c *tableCase) { c.take(); c.connect(); c.supersede() },
	"DEAD_LETTERED": func(c *tableCase) {
		c.req.MaxAttempts = 1
		c.take()
		c.connect()
		c.gone()
	},
	"one-way SENT":      func(c *tableCase) { c.req.OneWay = true; c.take(); c.connect() },
	"one-way DELIVERED": func(c *tableCase) { c.req.OneWay = true; c.take(); c.connect(); c.ack(c.l) },
}

func (c *tableCase) take() { c.submit(c.req) }

func (c *tableCase) connect() {
	c.l = c.link("dev")
	if ds := c.l.deliveries(); len(ds) > 0 {
		c.token = ds[len(ds)-1].Token
	}
}

func (c *tableCase) gone() {
	if c.l == nil {
		return
	}
	c.Gone("dev", c.l)
	c.flush()
	c.l = nil
}

func (c *tableCase) says(kind devices.AnswerKind) { c.mustAnswer("dev", "a", kind, "") }

func (c *tableCase) cancel() error {
	_, err := c.CancelWait(c.t.Context(), "a", "")
	return err
}

func (c *tableCase) supersede() { c.submit(devices.Request{ID: "newer", SupersedeKey: "k"}) }

// tableInputs do something to it.
var tableInputs = map[string]func(c *tableCase) error{
	"ready": func(c *tableCase) error { c.connect(); return nil },
	"gone":  func(c *tableCase) error { c.gone(); return nil },
	"ack": func(c *tableCase) error {
		l := c.l
		if l == nil {
			l = &fakeLink{device: "dev"}
		}
		c.Acked("dev", l, c.token, "")
		c.flush()
		return nil
	},
	"stale ack": func(c *tableCase) error {
		c.Acked("dev", &fakeLink{device: "dev"}, c.token, "")
		if c.l != nil {
			c.Acked("dev", c.l, c.token+1000, "")
		}
		c.flush()
		return nil
	},
	"nack": func(c *tableCase) error {
		if c.l != nil {
			c.Acked("dev", c.l, c.token, "no")
			c.flush()
		}
		return nil
	},
	"accepted":  func(c *tableCase) error { return c.answer("dev", "a", devices.AnswerAccepted, "") },
	"progress":  func(c *tableCase) error { return c.answer("dev", "a", devices.AnswerProgress, "1") },
	"succeeded": func(c *tableCase) error { return c.answer("dev", "a", devices.AnswerSucceeded, "") },
	"failed":    func(c *tableCase) error { return c.answer("dev", "a", devices.AnswerFailed, "") },
	"rejected":  func(c *tableCase) error { return c.answer("dev", "a", devices.AnswerRejected, "") },
	"cancel":    (*tableCase).cancel,
	"supersede": func(c *tableCase) error { c.supersede(); return nil },
	"ack late":  func(c *tableCase) error { c.pass(tableAck); return nil },
	"exec late": func(c *tableCase) error { c.pass(tableExec); return nil },
	"ttl over":  func(c *tableCase) error { c.pass(tableTTL); return nil },
	"restart":   func(c *tableCase) error { c.reopen(); c.tick(); return nil },
	"crash":     func(c *tableCase) error { c.crash(); c.tick(); return nil },
	"repeat": func(c *tableCase) error {
		got, repeat, err := c.trySubmit(c.req)
		if err == nil && (!repeat || got.State != c.state("a")) {
			c.t.Errorf("repeat %v of %s", repeat, got.State)
		}
		return err
	},
	"conflict": func(c *tableCase) error {
		req := c.req
		req.Payload = []byte("other")
		_, _, err := c.trySubmit(req)
		return err
	},
	"removed": func(c *tableCase) error { c.Remove("dev"); c.flush(); return nil },
}

// TestEveryStateAndInput is the state machine: what becomes of a command in each state at each input. "." is: nothing changes;
// "!" is: nothing changes and whoever asked is told so; "late X": X, marked late.
func TestEveryStateAndInput(t *testing.T) {
	const table = `
state             | ready | gone   | ack       | stale ack | nack     | accepted    | progress    | succeeded      | failed      | rejected      | cancel   | supersede  | ack late | exec late | ttl over  | restart | crash  | repeat | conflict | removed
QUEUED            | SENT  | .      | .         | .         | .        | !           | !           | !              | !           | !             | CANCELED | SUPERSEDED | .        | .         | EXPIRED   | .       | .      | .      | !        | CANCELED
QUEUED again      | SENT  | .      | .         | .         | .        | IN_PROGRESS | IN_PROGRESS | SUCCEEDED      | FAILED      | REJECTED      | CANCELED | SUPERSEDED | .        | .         | EXPIRED   | .       | .      | .      | !        | CANCELED
SENT              | SENT  | QUEUED | DELIVERED | .         | REJECTED | IN_PROGRESS | IN_PROGRESS | SUCCEEDED      | FAILED      | REJECTED      | CANCELED | SUPERSEDED | QUEUED   | QUEUED    | EXPIRED   | QUEUED  | QUEUED | .      | !        | CANCELED
DELIVERED         | .     | .      | .         | .         | .        | IN_PROGRESS | IN_PROGRESS | SUCCEEDED      | FAILED      | REJECTED      | CANCELED | .          | .        | TIMED_OUT | TIMED_OUT | .       | .      | .      | !        | CANCELED
IN_PROGRESS       | .     | .      | .         | .         | .        | .           | .           | SUCCEEDED      | FAILED      | REJECTED      | CANCELED | .          | .        | TIMED_OUT | TIMED_OUT | .       | .      | .      | !        | CANCELED
SUCCEEDED         | .     | .      | .         | .         | .        | !           | !           | .              | !           | !             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
FAILED            | .     | .      | .         | .         | .        | !           | !           | !              | .           | !             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
REJECTED          | .     | .      | .         | .         | .        | !           | !           | !              | !           | .             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
EXPIRED unsent    | .     | .      | .         | .         | .        | !           | !           | !              | !           | !             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
EXPIRED           | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
TIMED_OUT         | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
CANCELED unsent   | .     | .      | .         | .         | .        | !           | !           | !              | !           | !             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
CANCELED          | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
SUPERSEDED unsent | .     | .      | .         | .         | .        | !           | !           | !              | !           | !             | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
SUPERSEDED        | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
DEAD_LETTERED     | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
one-way SENT      | SENT  | QUEUED | DELIVERED | .         | REJECTED | DELIVERED   | DELIVERED   | late SUCCEEDED | late FAILED | late REJECTED | CANCELED | SUPERSEDED | QUEUED   | QUEUED    | EXPIRED   | QUEUED  | QUEUED | .      | !        | CANCELED
one-way DELIVERED | .     | .      | .         | .         | .        | !           | !           | late SUCCEEDED | late FAILED | late REJECTED | !        | .          | .        | .         | .         | .       | .      | .      | !        | .
`
	lines := strings.Split(strings.TrimSpace(table), "\n")
	cells := func(line string) []string {
		cells := strings.Split(line, "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		return cells
	}
	inputs := cells(lines[0])[1:]
	if len(inputs) != len(tableInputs) || len(lines)-1 != len(tableStates) {
		t.Fatalf("the table has %d inputs and %d states, want %d and %d", len(inputs), len(lines)-1, len(tableInputs), len(tableStates))
	}
	for _, line := range lines[1:] {
		row := cells(line)
		name := row[0]
		for i, want := range row[1:] {
			t.Run(name+"/"+inputs[i], func(t *testing.T) {
				c := &tableCase{queueRig: newQueueRig(t, devices.QueueConfig{AckTimeout: tableAck})}
				c.req = devices.Request{ID: "a", TTL: tableTTL, ExecutionTimeout: tableExec, SupersedeKey: "k", Upstream: "cloud"}
				tableStates[name](c)
				before := c.get("a")
				if from := strings.TrimPrefix(strings.Fields(name)[0], "one-way"); from != "" && before.State.String() != from {
					t.Fatalf("it is %s", before.State)
				}
				told := c.told("a")
				err := tableInputs[inputs[i]](c)
				after := c.get("a")
				got := after.State.String()
				if after.Late {
					got = "late " + got
				}
				switch want {
				case ".", "!":
					if got != before.State.String() || after.Attempts != before.Attempts {
						t.Errorf("became %s", got)
					}
					if (err != nil) != (want == "!") {
						t.Errorf("error %v", err)
					}
					if now := c.told("a"); inputs[i] != "repeat" && inputs[i] != "restart" && inputs[i] != "crash" && now != told && before.State != devices.InProgress {
						t.Errorf("told %s, before %s", now, told)
					}
				default:
					if got != want || err != nil {
						t.Errorf("became %s (%s), want %s; error %v", got, after.Reason, want, err)
					}
				}
				var r *devices.Refusal
				if err != nil && !errors.Is(err, devices.ErrAnswer) && !errors.As(err, &r) {
					t.Errorf("error %v", err)
				}
				if c.reopen(); c.get("a").State != after.State {
					t.Errorf("after a restart it is %s, was %s", c.get("a").State, after.State)
				}
			})
		}
	}
}
