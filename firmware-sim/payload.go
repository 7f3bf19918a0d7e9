package firmwaresim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// Payload is the part of a payload by which arrivals are checked.
type Payload struct {
	Device string
	Stream string
	N      uint64 // 1, 2, 3 … for each device and stream
	TS     int64  // time of the sample, Unix ms
}

// ParsePayload reads a payload of a simulated device. JSON that was encoded anew on its way
// is fine too.
func ParsePayload(b []byte) (Payload, error) {
	if device, stream, n, ts, ok := scanPayload(b); ok {
		return Payload{Device: string(device), Stream: string(stream), N: n, TS: ts}, nil
	}
	var p struct {
		Device *string `json:"device"`
		Stream *string `json:"stream"`
		N      *uint64 `json:"n"`
		TS     int64   `json:"ts"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return Payload{}, fmt.Errorf("payload is not of a simulated device: %w", err)
	}
	if p.Device == nil || p.Stream == nil || p.N == nil || *p.N == 0 {
		return Payload{}, fmt.Errorf("payload is not of a simulated device: device, stream or n is missing")
	}
	return Payload{Device: *p.Device, Stream: *p.Stream, N: *p.N, TS: p.TS}, nil
}

// The pieces of a payload, as appendPayload writes and scanPayload reads them.
const (
	keyDevice = `{"device":"`
	keyStream = `","stream":"`
	keyN      = `","n":`
	keyTS     = `,"ts":`
)

// scanPayload reads a payload that lies as appendPayload wrote it, without allocating.
func scanPayload(b []byte) (device, stream []byte, n uint64, ts int64, ok bool) {
	rest, ok := bytes.CutPrefix(b, []byte(keyDevice))
	if !ok {
		return
	}
	if device, rest, ok = bytes.Cut(rest, []byte(keyStream)); !ok {
		return
	}
	if stream, rest, ok = bytes.Cut(rest, []byte(keyN)); !ok {
		return
	}
	if bytes.ContainsAny(device, `"\`) || bytes.ContainsAny(stream, `"\`) {
		return nil, nil, 0, 0, false
	}
	if n, rest, ok = number(rest); !ok || n == 0 {
		return nil, nil, 0, 0, false
	}
	if rest, ok = bytes.CutPrefix(rest, []byte(keyTS)); !ok {
		return
	}
	t, rest, ok := number(rest)
	ok = ok && t < 1<<63 && len(rest) > 0 && (rest[0] == ',' || rest[0] == ' ' || rest[0] == '}') && b[len(b)-1] == '}'
	return device, stream, n, int64(t), ok
}

// number reads a number of at most 19 digits, which fits.
func number(b []byte) (x uint64, rest []byte, ok bool) {
	i := 0
	for ; i < len(b) && i < 19 && b[i]-'0' <= 9; i++ {
		x = x*10 + uint64(b[i]-'0')
	}
	return x, b[i:], i > 0
}

// appendPayload appends the payload of sample n of a stream. It depends on nothing but its
// arguments (of src the seed), so that a resend, also after a crash, has the same bytes and
// flash needs to keep no payloads. With size > 0 it has exactly that many bytes.
func appendPayload(dst []byte, device string, src *source, p *profile, stream int, n uint64, ts int64, size int) []byte {
	start := len(dst)
	dst = append(dst, keyDevice...)
	dst = append(dst, device...)
	dst = append(dst, keyStream...)
	dst = append(dst, p.streams[stream].name...)
	dst = append(dst, keyN...)
	dst = strconv.AppendUint(dst, n, 10)
	dst = append(dst, keyTS...)
	dst = strconv.AppendInt(dst, ts, 10)
	head := len(dst)
	src.ts, src.random = ts, random(src.seed^n*0x9e3779b97f4a7c15^uint64(stream)<<56)
	dst = p.streams[stream].values(dst, src)
	if size > 0 {
		if len(dst)-start >= size {
			dst = dst[:head] // too small for the values
		}
		dst = p.fill(dst, size-(len(dst)-start)-1, &src.random)
	}
	return append(dst, '}')
}

// fill appends exactly room bytes: a waveform of three-digit samples as a further member,
// then blanks.
func (p *profile) fill(dst []byte, room int, r *random) []byte {
	frame := len(`,"":[]`) + len(p.waveform)
	if count := (room - frame + 1) / 4; count > 0 {
		dst = append(dst, `,"`...)
		dst = append(dst, p.waveform...)
		dst = append(dst, `":[`...)
		phase := r.next()
		var noise uint64
		for i := range count {
			if i&7 == 0 {
				noise = r.next()
			}
			x := uint64(waveform[(phase+uint64(i)*8)%uint64(len(waveform))]) + noise&31
			noise >>= 8
			dst = append(dst, digits[x*4:x*4+4]...)
		}
		dst[len(dst)-1] = ']'
		room -= frame + 4*count - 1
	}
	for range room {
		dst = append(dst, ' ')
	}
	return dst
}

// digits holds the numbers 000 to 999, each followed by a comma.
var digits = func() (s []byte) {
	for i := range 1000 {
		s = fmt.Appendf(s, "%03d,", i)
	}
	return s
}()

// appendFixed appends x, in units of 1/10^decimals, as a decimal number.
func appendFixed(dst []byte, x int64, decimals int) []byte {
	if x < 0 {
		dst, x = append(dst, '-'), -x
	}
	scale := int64(1)
	for range decimals {
		scale *= 10
	}
	dst = strconv.AppendInt(dst, x/scale, 10)
	if decimals > 0 {
		dst = append(dst, '.')
		for rest := x % scale; scale > 1; {
			scale /= 10
			dst = append(dst, byte('0'+rest/scale))
			rest %= scale
		}
	}
	return dst
}
