package main

import (
	crand "crypto/rand"
	"fmt"
	"math/rand/v2"
)

const payloadBytes = 256

// telemetry makes n messages as devices send them: JSON of exactly 256 bytes whose values differ from one to the next.
func telemetry(n int) [][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	all := make([][]byte, n)
	at := int64(1_764_000_000_000)
	for i := range all {
		at += rng.Int64N(1000)
		b := fmt.Appendf(nil, `{"device":"pump-%04d","ts":%d,"seq":%d,"flow_l_min":%.3f,"pressure_bar":%.4f,"temp_c":%.2f,"rpm":%d,"vib_mm_s":[%.3f,%.3f,%.3f],"current_a":%.3f,"state":"running","fw":"2.4.1","site":"north-3"`,
			i%100, at, i, 40+rng.NormFloat64()*3, 6+rng.NormFloat64()*0.2, 61+rng.NormFloat64(), 1480+rng.IntN(20),
			1+rng.Float64(), 1+rng.Float64(), 1+rng.Float64(), 12+rng.NormFloat64())
		b = append(b, `,"note":"`...)
		for len(b) < payloadBytes-2 {
			b = append(b, "pump room 3, line B "[len(b)%20])
		}
		b = append(b[:payloadBytes-2], `"}`...)
		all[i] = b
	}
	return all
}

// noise makes n messages that nothing can compress.
func noise(n int) [][]byte {
	all := make([][]byte, n)
	buf := make([]byte, n*payloadBytes)
	_, _ = crand.Read(buf) // never fails
	for i := range all {
		all[i] = buf[i*payloadBytes:][:payloadBytes]
	}
	return all
}
