package bridge_test

import (
	"testing"
	"time"

	"holdfast/bridge"
)

const second = time.Second

func TestBackoffDoublesUpToItsCeiling(t *testing.T) {
	b := bridge.NewBackoff(second/2, 30*second, 1)
	for i, want := range []time.Duration{second / 2, second, 2 * second, 4 * second, 8 * second, 16 * second, 30 * second, 30 * second, 30 * second} {
		if got := b.Next(0); got != want {
			t.Errorf("pause %d is %v, want %v", i, got, want)
		}
	}
}

func TestBackoffJitterIsFull(t *testing.T) {
	b := bridge.NewRandomBackoff(second, second)
	var below, above int
	for range 1000 {
		switch d := b.Next(0); {
		case d <= 0 || d > second:
			t.Fatalf("pause %v", d)
		case d < second/10:
			below++
		case d > second*9/10:
			above++
		}
	}
	if below < 50 || above < 50 {
		t.Errorf("of 1000 pauses %d were in the lowest tenth and %d in the highest: not the full range", below, above)
	}
}

// TestKickedLinkBacksOffLikeOneThatNeverCameUp: only a stretch of progress as long as the pause it
// cost clears the record.
func TestKickedLinkBacksOffLikeOneThatNeverCameUp(t *testing.T) {
	never, kicked := bridge.NewBackoff(second/2, 30*second, 1), bridge.NewBackoff(second/2, 30*second, 1)
	for i := range 10 {
		if a, b := never.Next(0), kicked.Next(300*time.Millisecond); a != b {
			t.Errorf("pause %d: %v for the link that never came up, %v for the kicked one", i, a, b)
		}
	}
	if got := kicked.Next(29 * second); got != 30*second {
		t.Errorf("pause after 29 s of progress that cost 30 s is %v", got)
	}
	if got := kicked.Next(30 * second); got != second/2 {
		t.Errorf("pause after 30 s of progress is %v", got)
	}
}

func TestFirstLossOfAGoodLinkIsRetriedSoon(t *testing.T) {
	b := bridge.NewBackoff(second/2, 30*second, 1)
	if got := b.Next(time.Hour); got != second/2 {
		t.Errorf("first pause is %v", got)
	}
	if got := b.Next(time.Hour); got != second/2 {
		t.Errorf("pause after another good hour is %v", got)
	}
}
