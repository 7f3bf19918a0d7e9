package firmwaresim

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// profile is a kind of device.
type profile struct {
	name     string
	app      string // of the topic
	waveform string // name of the member that fills a payload of fixed size
	streams  []stream
	turns    []uint8 // which stream has its turn; a device goes round
}

// stream is one kind of message of a device.
type stream struct {
	name   string
	qos    byte
	weight int // turns in a round
	values func(dst []byte, s *source) []byte
}

// source makes the values of samples.
type source struct {
	seed uint64 // the device's
	ts   int64  // of the sample
	random
}

// random is a splitmix64 generator: two instructions more than nothing, and seeded by any value.
type random uint64

func (r *random) next() uint64 {
	*r += 0x9e3779b97f4a7c15
	x := uint64(*r)
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// float gives a number in [0, 1).
func (r *random) float() float64 { return float64(r.next()>>11) / (1 << 53) }

// sine is a full turn in 1024 steps, scaled by 1024.
var sine = func() (t [1024]int64) {
	for i := range t {
		t[i] = int64(math.Round(1024 * math.Sin(2*math.Pi*float64(i)/float64(len(t)))))
	}
	return t
}()

// waveform is a pulse wave, from 100 to 899 so that noise of 31 keeps three digits.
var waveform = func() (t [1024]uint16) {
	for i := range t {
		x := 2 * math.Pi * float64(i) / float64(len(t))
		t[i] = uint16(500 + 270*math.Sin(x) + 100*math.Sin(2*x+0.6))
	}
	return t
}()

// around gives a value in fixed-point units that swings about base: the device's own
// offset (up to spread), a slow wave of this period and amplitude, and noise. Neighbouring
// samples are near each other, as measured ones are.
func (s *source) around(base, spread, amplitude, period, noise int64) int64 {
	x := base + int64(s.seed%uint64(2*spread+1)) - spread
	step := (s.ts*1024/(period*1000) + int64(s.seed>>20)) & 1023
	x += amplitude * sine[step] / 1024
	return x + int64(s.next()%uint64(2*noise+1)) - noise
}

func member(dst []byte, name string, x int64, decimals int) []byte {
	dst = append(dst, `,"`...)
	dst = append(dst, name...)
	dst = append(dst, `":`...)
	return appendFixed(dst, x, decimals)
}

var profiles = withTurns([]*profile{
	{name: "vitals", app: "ward", waveform: "pleth", streams: []stream{
		{name: "vitals", qos: 1, weight: 18, values: func(dst []byte, s *source) []byte {
			dst = member(dst, "hr", s.around(74, 12, 6, 300, 2), 0)
			dst = member(dst, "spo2", min(1000, s.around(972, 10, 6, 600, 3)), 1)
			dst = member(dst, "resp", s.around(15, 3, 2, 120, 1), 0)
			dst = member(dst, "temp", s.around(3690, 30, 20, 7200, 3), 2)
			dst = member(dst, "sys", s.around(122, 14, 6, 900, 3), 0)
			return member(dst, "dia", s.around(78, 9, 4, 900, 2), 0)
		}},
		{name: "alarm", qos: 2, weight: 1, values: func(dst []byte, s *source) []byte {
			dst = append(dst, `,"code":"`...)
			dst = append(dst, []string{"spo2_low", "hr_high", "lead_off", "resp_low"}[s.next()%4]...)
			dst = append(dst, `"`...)
			return member(dst, "level", 1+int64(s.next()%3), 0)
		}},
		{name: "status", qos: 0, weight: 1, values: func(dst []byte, s *source) []byte {
			dst = member(dst, "battery", s.around(80, 15, 5, 36000, 0), 0)
			return member(dst, "rssi", s.around(-61, 12, 3, 600, 3), 0)
		}},
	}},
	{name: "vibration", app: "plant", waveform: "accel", streams: []stream{
		{name: "vibration", qos: 1, weight: 17, values: func(dst []byte, s *source) []byte {
			dst = member(dst, "rms", s.around(2310, 600, 250, 180, 60), 3)
			dst = member(dst, "peak", s.around(7900, 1500, 900, 180, 400), 3)
			dst = member(dst, "rpm", s.around(1482, 5, 4, 60, 2), 0)
			return member(dst, "temp", s.around(614, 80, 30, 3600, 3), 1)
		}},
		{name: "bearing", qos: 1, weight: 2, values: func(dst []byte, s *source) []byte {
			dst = member(dst, "bpfo", s.around(310, 80, 40, 3600, 12), 3)
			dst = member(dst, "bpfi", s.around(220, 60, 30, 3600, 10), 3)
			return member(dst, "kurtosis", s.around(312, 20, 15, 3600, 8), 2)
		}},
		{name: "alarm", qos: 2, weight: 1, values: func(dst []byte, s *source) []byte {
			dst = append(dst, `,"code":"rms_high"`...)
			return member(dst, "rms", s.around(7200, 300, 100, 180, 90), 3)
		}},
	}},
	{name: "meter", app: "grid", waveform: "load", streams: []stream{
		{name: "reading", qos: 1, weight: 9, values: func(dst []byte, s *source) []byte {
			// A meter only counts up: with time, at the device's own mean power.
			watts := 250 + int64(s.seed%900)
			dst = member(dst, "kwh", 4_000_000+int64(s.seed>>40%3_000_000)+(s.ts-1_600_000_000_000)/1000*watts/3600/1000, 3)
			dst = member(dst, "w", s.around(watts, 0, watts/4, 5400, 9), 0)
			dst = member(dst, "v", s.around(2312, 20, 14, 1800, 4), 1)
			dst = member(dst, "hz", s.around(50000, 0, 12, 240, 6), 3)
			return member(dst, "pf", min(100, s.around(94, 3, 2, 5400, 1)), 2)
		}},
		{name: "event", qos: 2, weight: 1, values: func(dst []byte, s *source) []byte {
			dst = append(dst, `,"code":"`...)
			dst = append(dst, []string{"cover", "sag", "swell", "tariff"}[s.next()%4]...)
			return append(dst, '"')
		}},
	}},
})

func withTurns(list []*profile) []*profile {
	for _, p := range list {
		p.turns = turns(p.streams)
	}
	return list
}

// turns spreads the streams over a round by their weights.
func turns(streams []stream) (order []uint8) {
	total := 0
	for _, s := range streams {
		total += s.weight
	}
	credit := make([]int, len(streams))
	for range total {
		best := 0
		for i, s := range streams {
			credit[i] += s.weight
			if credit[i] > credit[best] {
				best = i
			}
		}
		credit[best] -= total
		order = append(order, uint8(best))
	}
	return order
}

// Profiles are the names that Config.Profile takes.
func Profiles() []string {
	names := []string{}
	for _, p := range profiles {
		names = append(names, p.name)
	}
	return append(names, "mixed")
}

// profileOf gives the profile of device number i.
func profileOf(name string, i int) (*profile, error) {
	if name == "mixed" {
		return profiles[i%len(profiles)], nil
	}
	for _, p := range profiles {
		if p.name == name {
			return p, nil
		}
	}
	return nil, fmt.Errorf("profile %q: there are %s", name, strings.Join(slices.Sorted(slices.Values(Profiles())), ", "))
}
