package proof

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
)

// FleetConfig says which devices there are. Broker is needed.
type FleetConfig struct {
	Broker  string  // mqtt://host:port of the gateway
	Devices int     // 0: 20; half of them speak MQTT 3.1.1, half MQTT 5
	Rate    float64 // messages a second of each device; 0: 100
	Seed    uint64
	Calm    bool                      // else links break by themselves and devices crash now and then
	Buffer  int                       // messages in a device's flash; 0: 20,000
	Drain   time.Duration             // how long Finish waits for acknowledgements; 0: 30 s
	Change  func(*firmwaresim.Config) // has the last word on each half; nil: nobody has
}

// Fleet is simulated devices of both protocol versions that publish until Finish and send again what was not acknowledged.
type Fleet struct {
	halves map[string]*firmwaresim.Fleet // by the prefix of their device ids; see Add
	own    []*firmwaresim.Fleet          // those that StartFleet has started
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	err    error // under mu
}

// StartFleet starts the devices. They end with ctx, or with Finish.
func StartFleet(ctx context.Context, c FleetConfig) (*Fleet, error) {
	if c.Devices == 0 {
		c.Devices = 20
	}
	if c.Rate == 0 {
		c.Rate = 100
	}
	if c.Buffer == 0 {
		c.Buffer = 20_000
	}
	if c.Drain == 0 {
		c.Drain = 30 * time.Second
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &Fleet{halves: map[string]*firmwaresim.Fleet{}, cancel: cancel}
	for prefix, version := range map[string]mqtt.Version{"three": mqtt.V311, "five": mqtt.V5} {
		half := firmwaresim.Config{
			Broker: c.Broker, Version: version, Prefix: prefix, Devices: (c.Devices + 1) / 2, Rate: c.Rate, Seed: c.Seed,
			Window: 32, Buffer: c.Buffer, Drain: c.Drain, MinBackoff: 20 * time.Millisecond, MaxBackoff: 300 * time.Millisecond,
		}
		if !c.Calm {
			half.Flaky, half.Crash = 0.2, 0.1
		}
		if c.Change != nil {
			c.Change(&half)
		}
		fleet, err := firmwaresim.New(half, nil)
		if err != nil {
			cancel()
			return nil, err
		}
		f.halves[prefix] = fleet
		f.own = append(f.own, fleet)
	}
	for prefix, half := range f.halves {
		f.wg.Go(func() {
			if _, err := half.Run(ctx); err != nil {
				f.mu.Lock()
				defer f.mu.Unlock()
				f.err = errors.Join(f.err, fmt.Errorf("devices %s-…: %w", prefix, err))
			}
		})
	}
	return f, nil
}

// Finish ends sampling and waits until everything in the devices' flash is acknowledged. An error says what is not. Twice does
// no harm.
func (f *Fleet) Finish() error {
	f.cancel()
	f.wg.Wait()
	f.mu.Lock()
	err := f.err
	f.mu.Unlock()
	for prefix, half := range f.halves {
		if s := half.Snapshot(); s.InFlash+s.InFlight > 0 || s.Abandoned > 0 {
			err = errors.Join(err, fmt.Errorf("devices %s-… did not get rid of their messages: %+v, errors %v", prefix, s, half.Errors()))
		}
	}
	return err
}

// Abort ends the devices at once. After Finish, and twice, it does nothing.
func (f *Fleet) Abort() {
	for _, half := range f.own {
		half.Abort()
	}
	f.cancel()
	f.wg.Wait()
}

// Add has Check look at other simulated devices, too, whose ids begin with prefix and a dash. Whoever started them ends them.
func (f *Fleet) Add(prefix string, fleet *firmwaresim.Fleet) { f.halves[prefix] = fleet }

// Floor is how many messages were acknowledged so far. A gateway that starts after the call must have accepted as many.
func (f *Fleet) Floor() (n uint64) {
	for _, half := range f.halves {
		n += half.Snapshot().Acknowledged
	}
	return n
}

// Refused is how many messages were refused with a reason: MQTT 5 devices drop them then.
func (f *Fleet) Refused() (n uint64) {
	for _, half := range f.halves {
		n += half.Snapshot().Refused
	}
	return n
}

// String tells what the devices went through.
func (f *Fleet) String() string {
	var s []string
	for _, prefix := range slices.Sorted(maps.Keys(f.halves)) {
		x := f.halves[prefix].Snapshot()
		s = append(s, fmt.Sprintf("%s: %d published, %d sent again, %d links broken, %d crashes", prefix, x.Published, x.Resent, x.Breaks, x.Crashes))
	}
	return strings.Join(s, "; ")
}
