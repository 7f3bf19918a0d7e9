package mqttup_test

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"holdfast/bridge/mqttup"
	"holdfast/internal/testkit"
)

// TestFlightsAgainstModel compares the table of packet ids with a map, through many wraps of the ids.
func TestFlightsAgainstModel(t *testing.T) {
	if testkit.Race {
		t.Skip("one goroutine, fifteen million steps: nothing for the race detector, and a minute and a half with it")
	}
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		most := rapid.SampledFrom([]int{1, 3, 100, 5000}).Draw(t, "in flight")
		late := rapid.IntRange(0, 20).Draw(t, "how far acks go astray")
		var f mqttup.Flights
		open := map[uint16]uint64{}
		var order []uint16 // ids in flight, oldest first
		land := func(k int) {
			id := order[k]
			order = slices.Delete(order, k, k+1)
			if token, ok := f.Land(id); !ok || token != open[id] {
				t.Fatalf("id %d landed as %d, %v, want %d", id, token, ok, open[id])
			}
			delete(open, id)
			if _, ok := f.Land(id); ok {
				t.Fatalf("id %d landed twice", id)
			}
		}
		for token := range uint64(150_000) {
			id, err := f.Start(token)
			if err != nil {
				t.Fatal(err)
			}
			if _, taken := open[id]; taken || id < mqttup.FirstID {
				t.Fatalf("id %d was given while in flight, or is paho's", id)
			}
			open[id] = token
			order = append(order, id)
			if token%97 == 0 {
				stray := uint16(mqttup.FirstID + random.IntN(1<<16-mqttup.FirstID))
				if _, taken := open[stray]; !taken {
					if _, ok := f.Land(stray); ok {
						t.Fatalf("id %d, which is not in flight, landed", stray)
					}
				}
			}
			for len(order) >= most {
				land(min(random.IntN(late+1), len(order)-1))
			}
		}
	})
}

// TestFlightsRunOut: one send that is never acknowledged does not let its id be used again.
func TestFlightsRunOut(t *testing.T) {
	var f mqttup.Flights
	first, err := f.Start(1)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; ; n++ {
		id, err := f.Start(2)
		if err != nil {
			if n < 60_000 {
				t.Errorf("no id is free after %d", n)
			}
			break
		}
		if id == first {
			t.Fatalf("id %d was given twice", id)
		}
		f.Land(id)
	}
	if token, ok := f.Land(first); !ok || token != 1 {
		t.Errorf("the first landed as %d, %v", token, ok)
	}
	if _, err := f.Start(3); err != nil {
		t.Errorf("after it landed: %v", err)
	}
}
