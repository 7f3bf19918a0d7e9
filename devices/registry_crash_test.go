package devices_test

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"holdfast/devices"
)

var (
	registryCrashes   = flag.Int("registry-crashes", 8, "crashes that TestWhatReturnedSurvivesACrash simulates")
	registryCrashSeed = flag.Uint64("registry-crash-seed", 0, "seed of the first crash; 0: by the clock")
)

// TestWhatReturnedSurvivesACrash takes the power away at random moments, with any share of the unsynced bytes
// surviving, and looks at what the next start finds: every device whose Add returned and whose Remove was not called,
// with the token that was shown; none whose Remove returned; and counts that fit.
func TestWhatReturnedSurvivesACrash(t *testing.T) {
	defer goleak.VerifyNone(t)
	seed := *registryCrashSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d; again with -registry-crash-seed", seed)
	var (
		mu      sync.Mutex
		there   = map[string]string{}   // id -> token
		unsure  = map[string]struct{}{} // a call was under way when the power went
		removed = map[string]struct{}{}
	)
	fs := vfs.NewCrashableMem()
	for life := range *registryCrashes {
		rng := rand.New(rand.NewPCG(seed+uint64(life), 1))
		s := newSite(t, onFS(fs))
		checkCounts(t, s)
		for id, token := range there {
			if _, err := s.login(id, token); err != nil {
				t.Errorf("life %d: %v", life, err)
			}
		}
		for id := range removed {
			if _, err := s.Get(id); !errors.Is(err, devices.ErrUnknownDevice) {
				t.Errorf("life %d: a removed device: %v", life, err)
			}
		}
		if n := s.Counts().Registered; n < len(there) || n > len(there)+len(unsure) {
			t.Errorf("life %d: %d devices, %d were promised and of %d nobody knows", life, n, len(there), len(unsure))
		}
		if t.Failed() {
			return
		}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for worker := range 8 {
			pick := rand.New(rand.NewPCG(seed, uint64(life*100+worker)))
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					id := fmt.Sprintf("d-%d-%d-%d", life, worker, n)
					mu.Lock()
					unsure[id] = struct{}{}
					mu.Unlock()
					_, token, err := s.Add(t.Context(), devices.NewDevice{ID: id, Disabled: false})
					if err != nil {
						t.Error(err)
						return
					}
					s.Connected(id, devices.Connection{})
					mu.Lock()
					there[id] = token
					delete(unsure, id)
					gone := pick.IntN(3) == 0
					if gone {
						delete(there, id)
						unsure[id] = struct{}{}
					}
					mu.Unlock()
					if gone {
						if err := s.Remove(t.Context(), id); err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						delete(unsure, id)
						removed[id] = struct{}{}
						mu.Unlock()
					}
				}
			})
		}
		goal := rng.IntN(200)
		for {
			mu.Lock()
			n := len(there)
			if n > goal+150*life {
				break // with mu held: what is known now is what was promised before the power goes
			}
			mu.Unlock()
		}
		left := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		known, open, gone := clone(there), clone(unsure), clone(removed)
		mu.Unlock()
		close(stop)
		wg.Wait()
		s.store.Close()
		there, unsure, removed, fs = known, open, gone, left
	}
}

func clone[V any](m map[string]V) map[string]V {
	c := make(map[string]V, len(m))
	for k, v := range m {
		c[k] = v
	}
	return c
}
