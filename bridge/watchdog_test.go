package bridge_test

import (
	"testing"
	"time"

	"holdfast/bridge"
)

func TestWatchdog(t *testing.T) {
	const patience = 30 * time.Second
	type look struct {
		at             time.Duration
		oldest, newest uint64 // the oldest send without an ack, the newest with one
		progress       uint64
		dead           bool
	}
	for name, looks := range map[string][]look{
		"nothing in flight": {{0, 0, 0, 0, false}, {100 * second, 0, 0, 0, false}},
		"nothing moves": {
			{1 * second, 1, 0, 5, false}, {20 * second, 1, 0, 5, false}, {31 * second, 1, 0, 5, false}, {32 * second, 1, 0, 5, true},
		},
		"bytes move": {
			{1 * second, 1, 0, 5, false},
			{30 * second, 1, 0, 6, false},
			{60 * second, 1, 0, 7, false},
			{90 * second, 1, 0, 7, false},
			{91 * second, 1, 0, 7, true},
		},
		"acks come in order": {
			{1 * second, 1, 0, 5, false},
			{30 * second, 2, 1, 5, false},
			{59 * second, 3, 2, 5, false},
			{89 * second, 3, 2, 5, false},
			{90 * second, 3, 2, 5, true},
		},
		"overtaken by acks while bytes move": {
			{1 * second, 1, 0, 5, false},
			{10 * second, 1, 0, 6, false},
			{20 * second, 1, 7, 7, false},
			{39 * second, 1, 8, 8, false},
			{41 * second, 1, 9, 9, true},
		},
		"emptied in between": {
			{1 * second, 1, 0, 5, false}, {20 * second, 0, 1, 5, false}, {50 * second, 2, 1, 5, false}, {79 * second, 2, 1, 5, false},
		},
	} {
		var d bridge.Watchdog
		for _, l := range looks {
			if got := d.Stalled(l.at, l.oldest, l.newest, l.progress, patience); got != l.dead {
				t.Errorf("%s: at %v stalled is %v", name, l.at, got)
			}
		}
	}
}
