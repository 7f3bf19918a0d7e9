package gateway_test

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/bridge"
	"holdfast/gateway"
	"holdfast/gateway/httpapi"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

func TestQuantile(t *testing.T) {
	bounds := []float64{1, 2, 4}
	for _, c := range []struct {
		counts  []uint64
		q, want float64
	}{
		{[]uint64{0, 0, 0, 0}, 0.5, 0},
		{[]uint64{10, 0, 0, 0}, 0.5, 0.5},
		{[]uint64{0, 10, 0, 0}, 0.5, 1.5},
		{[]uint64{5, 0, 5, 0}, 0.5, 1},
		{[]uint64{5, 0, 5, 0}, 0.99, 3.96},
		{[]uint64{0, 0, 0, 3}, 0.5, 4},
	} {
		if got := gateway.Quantile(bounds, c.counts, c.q); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%v at %v: %v, want %v", c.counts, c.q, got, c.want)
		}
	}
}

func TestAPointIsWhatHappenedBetweenTwoSamples(t *testing.T) {
	got := gateway.Rate(2*time.Second, [2]uint64{100, 50}, [2]uint64{120, 40}, []float64{1, 2}, [2][]uint64{{7, 7, 0}, {7, 11, 0}})
	want := httpapi.HistoryPoint{At: time.UnixMilli(0).UTC(), Accepted: 10, Delivered: 0, AckP50: 1.5, AckP99: 1.99}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestHistoryHoldsAnHour(t *testing.T) {
	var h gateway.Past
	at := func(s int) httpapi.HistoryPoint {
		return httpapi.HistoryPoint{At: alarmNow.Add(time.Duration(s) * time.Second)}
	}
	h.Add(at(9999)) // from before the clock was put right
	for s := range 4000 {
		h.Add(at(s))
	}
	all := h.After(time.Time{})
	if len(all) != 3601 || !all[0].At.Equal(at(399).At) || !all[3600].At.Equal(at(3999).At) {
		t.Errorf("%d points, %v to %v", len(all), all[0].At, all[len(all)-1].At)
	}
	if got := h.After(at(3997).At); len(got) != 2 {
		t.Errorf("%d after the last but two", len(got))
	}
	if got := h.After(at(3999).At); got != nil {
		t.Errorf("after the last: %v", got)
	}
}

// TestHistoryOutlivesARestart: a start takes what the file has, a stop writes it; a damaged file is no reason for anything.
func TestHistoryOutlivesARestart(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "history.json")
	now := time.Now().UTC().Truncate(time.Millisecond)
	points := []httpapi.HistoryPoint{{At: now.Add(-time.Minute), Accepted: 2.5, AckP99: 0.01}, {At: now.Add(-50 * time.Second), Delivered: 1}}
	old := httpapi.HistoryPoint{At: now.Add(-2 * time.Hour), Accepted: 7}
	b, err := json.Marshal(append([]httpapi.HistoryPoint{old}, points...))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r := start(t, configuration(t, dir))
		var h httpapi.History
		resp := r.get(t.Context(), "/api/v1/history")
		err := json.NewDecoder(resp.Body).Decode(&h)
		resp.Body.Close()
		if d := cmp.Diff(points, h.Points); err != nil || h.EveryS != 10 || d != "" {
			t.Errorf("every %d s: %v %s", h.EveryS, err, d)
		}
		r.end()
		if b, err = os.ReadFile(file); err != nil || json.Unmarshal(b, &h.Points) != nil || !slices.Equal(h.Points, points) {
			t.Errorf("the file has %s, %v", b, err)
		}
	}
	if err := os.WriteFile(file, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	r := start(t, configuration(t, dir))
	if h := r.History(time.Time{}); len(h.Points) != 0 {
		t.Errorf("half a file gives %v", h.Points)
	}
}

// TestASampleCountsWhatHappens: messages taken in and delivered, and each acknowledgement of a device that waits for it.
func TestASampleCountsWhatHappens(t *testing.T) {
	c := configuration(t, t.TempDir())
	c.Upstreams = []bridge.Config{{Name: "cloud", URL: "mqtt://" + startUpstream(t), Format: bridge.FormatBatch, Lanes: []string{"telemetry"}}}
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	before, _, _ := gateway.SampleOf(g.Gateway)
	for i := range 7 {
		if r := d.publish(t, "dt/x", fmt.Sprint(i)); r != mqtt.Success {
			t.Fatalf("reason %v", r)
		}
	}
	testkit.EventuallyNil(t, 15*time.Second, "seven to be counted", func() error {
		accepted, delivered, acks := gateway.SampleOf(g.Gateway)
		if accepted-before < 7 || delivered < 7 || acks != 7 {
			return fmt.Errorf("%d accepted, %d delivered, %d acknowledgements measured", accepted-before, delivered, acks)
		}
		return nil
	})
}
