package gateway_test

import (
	"fmt"
	"strings"
	"testing"

	"holdfast/gateway"
	"holdfast/internal/mqtt"
)

func TestTheFirstRouteThatMatchesWins(t *testing.T) {
	match, err := gateway.Matcher("a/b", "a/+", "a/#", "+/x/#", "$SYS/#", "/", "deep/+/+/end", "#")
	if err != nil {
		t.Fatal(err)
	}
	for topic, want := range map[string]int{
		"a/b": 0, "a/c": 1, "a/": 1, "a": 2, "a/b/c": 2, "a/x/y": 2, "b/x": 3, "b/x/y/z": 3, "b/y": 7,
		"$SYS": 4, "$SYS/a/b": 4, "$other/x": -1, "$other": -1, "/": 5, "//": 7, "deep/1/2/end": 6, "deep/1/2/end/x": 7, "b": 7,
	} {
		if got := match([]byte(topic)); got != want {
			t.Errorf("%q matches route %d, want %d", topic, got, want)
		}
	}
}

func TestAnEarlierRouteWinsOverAMoreExactOne(t *testing.T) {
	match, err := gateway.Matcher("+/b", "a/b", "a/#")
	if err != nil {
		t.Fatal(err)
	}
	if got := match([]byte("a/b")); got != 0 {
		t.Errorf("a/b matches route %d, want 0", got)
	}
}

func TestRoutesThatAreNoFilters(t *testing.T) {
	for _, f := range []string{"", "a#", "#/a", "a/b+", "$share/g/a", "a\x00"} {
		if _, err := gateway.Matcher("ok", f); err == nil {
			t.Errorf("filter %q was taken", f)
		}
	}
}

func TestMatchingAllocatesNothing(t *testing.T) {
	match, err := gateway.Matcher("alarm/#", "local/#", "dt/+/+/waveform")
	if err != nil {
		t.Fatal(err)
	}
	topic := []byte("dt/icu/bed-12/waveform")
	if n := testing.AllocsPerRun(100, func() { match(topic) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The tree gives what going through the filters one by one with the broker's own matcher gives.
func FuzzRoutes(f *testing.F) {
	f.Add("a/b\na/+\n#", "a/b")
	f.Add("+/+\n/#\n$SYS/+", "$SYS/x")
	f.Add("a/#\n+\n+/#", "a")
	f.Add("+//+\n//\n/", "//")
	f.Fuzz(func(t *testing.T, list, topic string) {
		if !mqtt.ValidTopic(topic) {
			return
		}
		filters := strings.Split(list, "\n")
		match, err := gateway.Matcher(filters...)
		want := -1
		for i, filter := range filters {
			if !mqtt.ValidFilter(filter) || strings.HasPrefix(filter, "$share/") {
				if err == nil {
					t.Fatalf("filter %q was taken", filter)
				}
				return
			}
			if want < 0 && mqtt.Match(filter, topic) {
				want = i
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := match([]byte(topic)); got != want {
			t.Errorf("%q matches route %d of %q, want %d", topic, got, filters, want)
		}
	})
}

func BenchmarkRoute(b *testing.B) {
	topic := []byte("dt/icu/bed-12/heart_rate")
	for _, n := range []int{2, 20, 200} {
		filters := []string{"alarm/#", "local/#"}
		for i := len(filters); i < n; i++ {
			filters = append(filters, fmt.Sprintf("dt/+/bed-%d/waveform/#", i))
		}
		match, err := gateway.Matcher(filters...)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				match(topic)
			}
		})
	}
}
