package devices_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/devices"
)

// bubble runs fn in a synctest bubble, on a site of its own.
func bubble(t *testing.T, fn func(t *testing.T, s *site), options ...siteOption) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, options...)
		fn(t, s)
		s.store.Close()
	})
}

// took is how long fn took.
func took(fn func()) time.Duration {
	start := time.Now()
	fn()
	return time.Since(start)
}

func TestFailuresOfAnAddressAreAnsweredLater(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		home, other := address(1), address(2)
		good := s.add(devices.NewDevice{ID: "good"})
		fail := func(n int, from netip.Addr) time.Duration {
			return took(func() {
				_, err := s.loginFrom(from, fmt.Sprint("nobody-", n), "hft_wrong")
				wantErr(t, "wrong token", err, devices.ErrCredentials)
			})
		}
		ms := time.Millisecond
		for n, want := range []time.Duration{0, 0, 100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 5000 * ms, 5000 * ms} {
			if got := fail(n, home); got != want {
				t.Errorf("failure %d was answered after %v, want %v", n+1, got, want)
			}
			if d := took(func() {
				if _, err := s.loginFrom(home, "good", good); err != nil {
					t.Error(err)
				}
			}); d != 0 {
				t.Errorf("right credentials were answered after %v", d)
			}
		}
		if d := fail(100, other); d != 0 {
			t.Errorf("another address waits %v", d)
		}
		// What is no device id counts as well.
		if d := took(func() { s.loginFrom(home, "a/b", "") }); d != 5*time.Second {
			t.Errorf("a bad id is answered after %v", d)
		}
		time.Sleep(15*time.Minute - 6*time.Second) //nolint:forbidigo // the bubble's clock; the answer took 5 s
		if d := fail(101, home); d != 5*time.Second {
			t.Errorf("forgotten before 15 minutes: %v", d)
		}
		time.Sleep(15*time.Minute + time.Second) //nolint:forbidigo // the bubble's clock
		if d := fail(102, home); d != 0 {
			t.Errorf("not forgotten after 15 minutes: %v", d)
		}
	})
}

func TestAtMostSixteenFailuresOfAnAddressWait(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		home := address(1)
		good := s.add(devices.NewDevice{ID: "good"})
		for n := range 9 {
			s.loginFrom(home, fmt.Sprint("nobody-", n), "hft_wrong")
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		atOnce, late := 0, 0
		for n := range 50 {
			wg.Go(func() {
				var err error
				d := took(func() { _, err = s.loginFrom(home, fmt.Sprint("someone-", n), "hft_wrong") })
				mu.Lock()
				defer mu.Unlock()
				switch {
				case d == 0 && errors.Is(err, devices.ErrTooOften):
					atOnce++
				case d == 5*time.Second && errors.Is(err, devices.ErrCredentials):
					late++
				default:
					t.Errorf("answered %v after %v", err, d)
				}
			})
		}
		synctest.Wait()
		if _, err := s.loginFrom(home, "good", good); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if atOnce != 34 || late != 16 {
			t.Errorf("%d were answered at once, %d waited", atOnce, late)
		}
		// Their places are free again.
		if d := took(func() { s.loginFrom(home, "x", "hft_wrong") }); d != 5*time.Second {
			t.Errorf("answered after %v", d)
		}
	})
}

// Whoever guesses passwords, under another name each time, does not have argon2 computed at will: it is the dearest
// thing that a stranger can ask for.
func TestGuessesOfOneAddressDoNotTakeTheProcessors(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		home := address(1)
		s.add(withPassword("known"))
		s.add(withPassword("late"))
		if _, err := s.loginFrom(home, "known", password); err != nil {
			t.Fatal(err)
		}
		for n := range 9 {
			s.loginFrom(home, fmt.Sprint("nobody-", n), "hft_wrong")
		}
		var wg sync.WaitGroup
		if n := s.hashes(func() {
			for n := range 200 {
				wg.Go(func() { s.loginFrom(home, fmt.Sprint("someone-", n), "a wrong password") })
			}
			synctest.Wait()
		}); n < 16 || n > 16+2 { // two are computed at once
			t.Errorf("%v passwords of 200 were hashed, want the 16 whose answers wait", n)
		}
		if _, err := s.loginFrom(home, "known", password); err != nil {
			t.Errorf("a password that was right before: %v", err)
		}
		if _, err := s.loginFrom(home, "late", password); !errors.Is(err, devices.ErrTooOften) {
			t.Errorf("another right password: %v, want that it is too many attempts", err)
		}
		if _, err := s.loginFrom(address(2), "late", password); err != nil {
			t.Errorf("from another address: %v", err)
		}
		wg.Wait()
	})
}

func TestAWaitEndsWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		for n := range 9 {
			s.loginFrom(address(1), fmt.Sprint("nobody-", n), "hft_wrong")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 70*time.Millisecond)
		defer cancel()
		d := took(func() {
			_, err := s.Authenticate(ctx, &devices.Attempt{Device: "x", Password: []byte("hft_wrong"), Address: address(1)})
			wantErr(t, "login", err, devices.ErrCredentials)
		})
		if d != 70*time.Millisecond {
			t.Errorf("ended after %v", d)
		}
	})
}

func TestADeviceThatFailsOnIsNotLookedAt(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d"})
		neighbour := s.add(devices.NewDevice{ID: "n"})
		home := address(1)
		try := func(secret string, want error) {
			t.Helper()
			_, err := s.loginFrom(home, "d", secret)
			wantErr(t, "login", err, want)
		}
		for range 9 {
			try("hft_wrong", devices.ErrCredentials)
		}
		try(secret, nil) // clears
		for range 10 {
			try("hft_wrong", devices.ErrCredentials)
		}
		// The tenth was answered after 5 s, the lock held 1 s of them.
		for lock := 2 * time.Second; ; lock *= 2 {
			// The lock begins with the failure; its answer comes 5 s later.
			start := time.Now()
			ctx, cancel := context.WithCancel(t.Context())
			cancel() // the answer is not waited for
			_, err := s.Authenticate(ctx, &devices.Attempt{Device: "d", Password: []byte("hft_wrong"), Address: home})
			wantErr(t, "after the lock", err, devices.ErrCredentials)
			lock = min(lock, 5*time.Minute)
			try(secret, devices.ErrTooOften)
			time.Sleep(lock - time.Millisecond) //nolint:forbidigo // the bubble's clock
			try(secret, devices.ErrTooOften)
			if _, err := s.loginFrom(home, "n", neighbour); err != nil {
				t.Errorf("the neighbour: %v", err)
			}
			if _, err := s.loginFrom(address(2), "d", secret); err != nil {
				t.Errorf("the device from another address: %v", err)
			}
			time.Sleep(time.Millisecond) //nolint:forbidigo // the bubble's clock
			if d := time.Since(start); d != lock {
				t.Fatalf("locked for %v, want %v", d, lock)
			}
			if lock == 5*time.Minute {
				break
			}
		}
		try(secret, nil)
		try("hft_wrong", devices.ErrCredentials) // it begins anew
		try(secret, nil)
	})
}

func TestAnIPv6NetworkIsOneAddress(t *testing.T) {
	bubble(t, func(t *testing.T, s *site) {
		fail := func(addr string) time.Duration {
			return took(func() { s.loginFrom(netip.MustParseAddr(addr), "x"+addr[len(addr)-1:], "hft_wrong") })
		}
		fail("2001:db8:1:2::1")
		fail("2001:db8:1:2:ffff::2")
		if d := fail("2001:db8:1:2:1::3"); d == 0 {
			t.Error("another address of the same network starts anew")
		}
		if d := fail("2001:db8:1:3::1"); d != 0 {
			t.Error("another network waits")
		}
		fail("192.0.2.1")
		fail("::ffff:192.0.2.1")
		if d := fail("192.0.2.1"); d == 0 {
			t.Error("an address starts anew when it is written another way")
		}
	})
}

func TestWhatFailuresAreRememberedIsBounded(t *testing.T) {
	s := newSite(t)
	for n := range 12_000 {
		if _, err := s.loginFrom(address(n), "d", "hft_wrong"); !errors.Is(err, devices.ErrCredentials) {
			t.Fatal(err)
		}
	}
	if peers, pairs := devices.Throttled(s.Registry); peers != 10_000 || pairs != 10_000 {
		t.Errorf("%d addresses and %d pairs are remembered", peers, pairs)
	}
}

func TestConnectsPerMinute(t *testing.T) {
	role := devices.Role{Name: devices.DefaultRole, Limits: devices.Limits{ConnectsPerMinute: 30, MessagesPerSecond: 7}}
	bubble(t, func(t *testing.T, s *site) {
		secret := s.add(devices.NewDevice{ID: "d"})
		other := s.add(devices.NewDevice{ID: "other"})
		tries := func(n int) (in int) {
			for range n {
				_, err := s.loginFrom(address(1), "d", secret)
				switch {
				case err == nil:
					in++
				default:
					wantErr(t, "login", err, devices.ErrTooOften)
				}
			}
			return in
		}
		if n := tries(100); n != 30 {
			t.Errorf("%d of 100 were let in at once", n)
		}
		if _, err := s.loginFrom(address(1), "other", other); err != nil {
			t.Errorf("another device: %v", err)
		}
		time.Sleep(10 * time.Second) //nolint:forbidigo // the bubble's clock
		if n := tries(100); n != 5 {
			t.Errorf("%d were let in after 10 s", n)
		}
		time.Sleep(time.Hour) //nolint:forbidigo // the bubble's clock
		if n := tries(100); n != 30 {
			t.Errorf("%d were let in after an hour", n)
		}
		// Failing does not use it up: nobody else can.
		time.Sleep(time.Hour) //nolint:forbidigo // the bubble's clock
		for range 5 {
			s.login("d", "hft_wrong")
		}
		if n := tries(100); n != 30 {
			t.Errorf("%d were let in after failures", n)
		}
		if l := s.Identity("d").Limits(); l != role.Limits {
			t.Errorf("limits %+v", l)
		}
	}, withRoles(role))
}
