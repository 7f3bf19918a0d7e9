package gateway_test

import (
	"testing"
	"time"

	"holdfast/gateway"
)

func TestTheKernelIsAskedOnceASecond(t *testing.T) {
	now, synced, asked := time.UnixMilli(1_000_000), false, 0
	read := gateway.Clock(func() time.Time { return now }, func() bool { asked++; return synced })
	for range 10 {
		if ms, unsynced := read(); ms != 1_000_000 || !unsynced {
			t.Fatalf("read = %d, %v", ms, unsynced)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times in one moment", asked)
	}
	synced = true
	now = now.Add(999 * time.Millisecond)
	if _, unsynced := read(); !unsynced || asked != 1 {
		t.Errorf("after 999 ms: unsynced %v, asked %d times", unsynced, asked)
	}
	now = now.Add(time.Millisecond)
	if _, unsynced := read(); unsynced || asked != 2 {
		t.Errorf("after 1 s: unsynced %v, asked %d times", unsynced, asked)
	}
	synced = false
	now = now.Add(-time.Hour) // the clock was set back: that is when the answer changes
	if _, unsynced := read(); !unsynced || asked != 3 {
		t.Errorf("after a step back: unsynced %v, asked %d times", unsynced, asked)
	}
}

func BenchmarkClock(b *testing.B) {
	read := gateway.SystemClock()
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
}
