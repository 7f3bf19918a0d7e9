package httpapi_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestWrongTokensWaitLongerEachTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		wrong := func() *answered { return r.ask("GET", "/api/v1/status", as("wrong"), from(remote)) }
		for range 4 {
			if a := wrong(); a.status != 401 {
				t.Fatalf("one of the first: %d", a.status)
			}
		}
		for _, want := range []string{"1", "2", "4", "8", "16", "32", "60", "60"} {
			if a := wrong(); a.status != 401 {
				t.Errorf("after the wait: %d", a.status)
			}
			a := wrong()
			if a.status != 429 || a.header.Get("Retry-After") != want {
				t.Errorf("%d, Retry-After %q, want %s", a.status, a.header.Get("Retry-After"), want)
			}
			d, err := time.ParseDuration(want + "s")
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(d) //nolint:forbidigo // in a bubble
		}
		time.Sleep(11 * time.Minute) //nolint:forbidigo // in a bubble
		for range 4 {
			if a := wrong(); a.status != 401 {
				t.Errorf("after a long silence: %d", a.status)
			}
		}
		if a := wrong(); a.status != 401 {
			t.Errorf("the fifth: %d", a.status)
		}
	})
}

// TestAttemptsOfManyAddressesAreForgotten: memory is bounded, and an IPv6 network is one peer.
func TestAttemptsOfManyAddressesAreForgotten(t *testing.T) {
	r := newRig(t)
	ask := func(peer string) int { return r.ask("GET", "/api/v1/status", as("wrong"), from(peer)).status }
	for i := range 6 {
		want := 401
		if i == 5 {
			want = 429
		}
		if got := ask(fmt.Sprintf("[2001:db8::%x]:1", i)); got != want {
			t.Errorf("address %d of a network: %d, want %d", i, got, want)
		}
	}
	for i := range 1024 {
		ask(fmt.Sprintf("10.0.%d.%d:1", i/256, i%256))
	}
	if got := ask("[2001:db8::1]:1"); got != 401 {
		t.Errorf("1,024 addresses later: %d", got)
	}
}
