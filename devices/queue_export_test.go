package devices

import (
	"context"
	"time"

	"holdfast/internal/clock"
)

// Seams for the queue's tests.

// Tick does what Run does in one turn.
func (q *Queue) Tick(ctx context.Context) time.Duration { return q.tick(ctx) }

// DevicesInMemory counts the devices that the queue holds in memory, and CommandsInMemory the commands.
func (q *Queue) DevicesInMemory() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.devices)
}

func (q *Queue) CommandsInMemory() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.ids)
}

// TimersInMemory counts the commands that wait for a time.
func (q *Queue) TimersInMemory() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.timers)
}

var ParseProgress = parseProgress

const CommandTimerLook = queueLookGap * time.Millisecond

// CommandRowAgain decodes a row of a command, makes of it what memory holds, and a row of that again.
func CommandRowAgain(clk *clock.Clock, b []byte) (again []byte, err error) {
	r, err := parseCommandRow(b)
	if err != nil {
		return nil, err
	}
	p, s := r.load(1, &queueDevice{name: r.Device})
	q := &Queue{clock: clk}
	q.command(p, s)
	return encodeRow(p.row(s)), nil
}

// CommandRowState reads a command's state alone, and by decoding all of its row.
func CommandRowState(b []byte) (alone, whole State, err error) {
	r, err := parseCommandRow(b)
	if err != nil {
		return commandRowState(b), 0, err
	}
	return commandRowState(b), r.State, nil
}

// BodyRow decodes what a command carries.
func BodyRow(b []byte) ([]byte, error) {
	var body commandBody
	err := decodeRow(b, &body)
	return body.Payload, err
}
