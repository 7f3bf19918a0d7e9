package firmwaresim_test

import (
	"bytes"
	"encoding/json"
	"math"
	"testing"

	firmwaresim "holdfast/firmware-sim"
)

func TestPayloadIsJSONOfTheSizeAskedFor(t *testing.T) {
	for p := range firmwaresim.ProfileCount() {
		for stream := range firmwaresim.Streams(p) {
			for _, size := range []int{0, firmwaresim.MinSize, 129, 130, 131, 132, 256, 257, 1000, 65536} {
				for _, n := range []uint64{1, 2, 99, 100_000, 1_000_000_000_000_000_000} {
					b := firmwaresim.AppendPayload(nil, p, stream, "sim-00001", 42, n, 1767225600000+int64(n%1e6), size)
					if size > 0 && len(b) != size {
						t.Fatalf("profile %d stream %d n %d: %d bytes, want %d", p, stream, n, len(b), size)
					}
					var fields map[string]any
					if err := json.Unmarshal(b, &fields); err != nil {
						t.Fatalf("%s: %v", b, err)
					}
					got, err := firmwaresim.ParsePayload(b)
					if err != nil || got.Device != "sim-00001" || got.N != n || got.TS != 1767225600000+int64(n%1e6) || got.Stream == "" {
						t.Fatalf("%s: %+v, %v", b, got, err)
					}
					again := firmwaresim.AppendPayload([]byte("x"), p, stream, "sim-00001", 42, n, 1767225600000+int64(n%1e6), size)
					if string(again[1:]) != string(b) {
						t.Fatalf("not the same when sent again:\n%s\n%s", b, again[1:])
					}
				}
			}
		}
	}
}

// TestPayloadValuesAreBelievable: what is measured stays within what a patient survives, and
// neighbouring samples are near each other.
func TestPayloadValuesAreBelievable(t *testing.T) {
	last := math.NaN()
	for i := range int64(3600) {
		b := firmwaresim.AppendPayload(nil, 0, 0, "sim-00001", 0xfeedbeef, uint64(i+1), 1767225600000+i*1000, 0)
		var v struct{ HR, SpO2, Temp float64 }
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		if v.HR < 50 || v.HR > 100 || v.SpO2 < 94 || v.SpO2 > 100 || v.Temp < 36 || v.Temp > 38 {
			t.Fatalf("%s", b)
		}
		if math.Abs(v.HR-last) > 6 {
			t.Fatalf("heart rate jumps from %v to %v", last, v.HR)
		}
		last = v.HR
	}
}

func TestParsePayloadTakesReencodedJSON(t *testing.T) {
	for _, s := range []string{
		`{ "n": 7, "stream": "vitals", "device": "d\u002d1", "hr": 70 }`,
		`{"device":"d-1","stream":"vitals","n":7,"hr":70}`,
		`{"device":"d\u002d1","stream":"vitals","n":7,"ts":1}`,
	} {
		if p, err := firmwaresim.ParsePayload([]byte(s)); err != nil || p.Device != "d-1" || p.Stream != "vitals" || p.N != 7 {
			t.Errorf("%s: %+v, %v", s, p, err)
		}
	}
	for _, s := range []string{``, `{}`, `[]`, `{"device":"d","stream":"s"}`, `{"device":"d","stream":"s","n":0,"ts":1}`, `{"device":"d","stream":"s","n":-1}`, `hello`} {
		if p, err := firmwaresim.ParsePayload([]byte(s)); err == nil {
			t.Errorf("%s: %+v, want an error", s, p)
		}
	}
}

// FuzzParsePayload: the quick way and encoding/json agree.
func FuzzParsePayload(f *testing.F) {
	f.Add([]byte(`{"device":"d","stream":"s","n":7,"ts":1,"x":2}`))
	f.Add(firmwaresim.AppendPayload(nil, 0, 0, "sim-00001", 1, 2, 3, 200))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := firmwaresim.ParsePayload(b)
		if err != nil || !json.Valid(b) {
			return
		}
		for _, key := range []string{"device", "stream", "n", "ts"} {
			if bytes.Count(bytes.ToLower(b), []byte(`"`+key+`"`)) != 1 {
				return // a doubled member: either value will do
			}
		}
		var want firmwaresim.Payload
		if json.Unmarshal(b, &want) == nil && want != p {
			t.Fatalf("%s: %+v, json %+v", b, p, want)
		}
	})
}

func BenchmarkPayload(b *testing.B) {
	for _, size := range []int{0, 256} {
		b.Run(map[int]string{0: "size=natural", 256: "size=256"}[size], func(b *testing.B) {
			b.ReportAllocs()
			var buf []byte
			var n uint64
			for b.Loop() {
				n++
				buf = firmwaresim.AppendPayload(buf[:0], 0, 0, "sim-00001", 42, n, 1767225600000, size)
			}
		})
	}
}
