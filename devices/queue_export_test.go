package devices

import (
	"context"
	"time"
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
