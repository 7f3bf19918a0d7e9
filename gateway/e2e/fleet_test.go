package e2e_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
)

// fleet is simulated devices of both protocol versions, with flaky links and crashes of their own, that publish until
// finish and resend what was not acknowledged.
type fleet struct {
	halves map[string]*firmwaresim.Fleet // by the prefix of their device ids
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// startFleet starts devices that publish rate messages a second each.
func startFleet(t *testing.T, addr string, seed uint64, devices int, rate float64) *fleet {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	f := &fleet{halves: map[string]*firmwaresim.Fleet{}, cancel: cancel}
	t.Cleanup(func() {
		cancel()
		f.wg.Wait()
	})
	for prefix, version := range map[string]mqtt.Version{"three": mqtt.V311, "five": mqtt.V5} {
		half, err := firmwaresim.New(firmwaresim.Config{
			Broker: "mqtt://" + addr, Version: version, Prefix: prefix, Devices: (devices + 1) / 2, Rate: rate, Seed: seed,
			Window: 32, Buffer: 20_000, Drain: 30 * time.Second,
			Flaky: 0.2, Crash: 0.1, MinBackoff: 20 * time.Millisecond, MaxBackoff: 300 * time.Millisecond,
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		f.halves[prefix] = half
		f.wg.Go(func() {
			if _, err := half.Run(ctx); err != nil {
				t.Errorf("fleet %s: %v", prefix, err)
			}
		})
	}
	return f
}

// finish ends sampling and waits until everything in the devices' flash is acknowledged.
func (f *fleet) finish(t *testing.T) {
	t.Helper()
	f.cancel()
	f.wg.Wait()
	for prefix, half := range f.halves {
		if s := half.Snapshot(); s.InFlash+s.InFlight > 0 || s.Refused > 0 || s.Abandoned > 0 {
			t.Errorf("fleet %s did not get rid of its messages: %+v, errors %v", prefix, s, half.Errors())
		}
	}
}

// verify holds what arrived upstream against what the devices were promised. It fails t if an acknowledged message is
// missing, if one is out of order or was never sent, or if a device's message came twice more often than the device sent
// it again: repeats of the bridge must have been dropped by their id.
func (b *inbox) verify(t *testing.T, f *fleet) firmwaresim.Verdict {
	t.Helper()
	return b.verifyRepeats(t, f, true)
}

// verifyRepeats can allow repeats of the bridge, for a format that carries no id.
func (b *inbox) verifyRepeats(t *testing.T, f *fleet, dropped bool) firmwaresim.Verdict {
	t.Helper()
	return b.verifyWith(t, f, dropped, true)
}

// verifyWith can allow devices' messages to arrive in another order than theirs, where the newest go first.
func (b *inbox) verifyWith(t *testing.T, f *fleet, dropped, ordered bool) firmwaresim.Verdict {
	t.Helper()
	var sum firmwaresim.Verdict
	var resent uint64
	for deadline := time.Now().Add(15 * time.Second); ; {
		verdicts := b.compare(t, f)
		sum, resent = firmwaresim.Verdict{}, 0
		for prefix, v := range verdicts {
			sum.Published += v.Published
			sum.Acknowledged += v.Acknowledged
			sum.Arrived += v.Arrived
			sum.Duplicates += v.Duplicates
			sum.Lost += v.Lost
			sum.OutOfOrder += v.OutOfOrder
			sum.Unknown += v.Unknown
			sum.Examples = append(sum.Examples, v.Examples...)
			resent += f.halves[prefix].Snapshot().Resent
		}
		if sum.Lost == 0 || time.Now().After(deadline) { // mosquitto may still be handing it on
			break
		}
		<-time.After(50 * time.Millisecond)
	}
	if !ordered {
		sum.OutOfOrder = 0
	}
	if !sum.OK() {
		t.Errorf("promise broken: %v", sum)
	}
	if dropped && sum.Duplicates > resent {
		t.Errorf("%d messages came twice, devices sent only %d again", sum.Duplicates, resent)
	}
	if s := b.receiver.Stats(); s.Missing > 0 || s.Gaps > 0 {
		t.Errorf("the receiver misses %d messages and was told of %d gaps; lanes %+v", s.Missing, s.Gaps, b.receiver.Lanes())
	}
	return sum
}

// compare gives the verdict of each half of the fleet.
func (b *inbox) compare(t *testing.T, f *fleet) map[string]firmwaresim.Verdict {
	t.Helper()
	if others := b.messages(t); len(others) > 0 {
		t.Fatalf("arrived on %s, and no device sent it: %.100q", others[0].Topic, others[0].Message.Payload)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for prefix := range b.arrivals {
		if f.halves[prefix] == nil {
			t.Fatalf("messages of devices %s-… arrived, and there are none", prefix)
		}
	}
	verdicts := map[string]firmwaresim.Verdict{}
	for prefix, half := range f.halves {
		arrivals := b.arrivals[prefix]
		if arrivals == nil {
			arrivals = firmwaresim.NewArrivals()
		}
		verdicts[prefix] = half.Ledger().Verify(arrivals)
	}
	return verdicts
}

// String tells what the fleet went through.
func (f *fleet) String() string {
	var s string
	for prefix, half := range f.halves {
		x := half.Snapshot()
		s += fmt.Sprintf("%s: %d published, %d sent again, %d links broken, %d crashes; ", prefix, x.Published, x.Resent, x.Breaks, x.Crashes)
	}
	return s
}
