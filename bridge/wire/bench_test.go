package wire_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"

	"holdfast/bridge/wire"
)

// telemetry makes n messages of vital signs as bedside monitors send them, 256 bytes of JSON
// each: readings that wander, a counter, a time, next to names that repeat.
func telemetry(seed uint64, n int) []wire.Message {
	const devices = 20
	r := rand.New(rand.NewPCG(seed, 1))
	var hr, spo2, resp, temp, sys [devices]float64
	for d := range devices {
		hr[d], spo2[d], resp[d], temp[d], sys[d] = 60+40*r.Float64(), 94+5*r.Float64(), 12+8*r.Float64(), 36.2+r.Float64(), 105+40*r.Float64()
	}
	messages := make([]wire.Message, n)
	at := int64(1764000000000)
	for i := range messages {
		d := r.IntN(devices)
		hr[d] += r.NormFloat64()
		spo2[d] = min(100, spo2[d]+0.2*r.NormFloat64())
		resp[d] += 0.3 * r.NormFloat64()
		temp[d] += 0.02 * r.NormFloat64()
		sys[d] += r.NormFloat64()
		at += int64(r.IntN(20))
		name := fmt.Sprintf("bed-%02d", d+1)
		p := fmt.Appendf(nil, `{"device":%q,"seq":%d,"ts":%d,"hr":%.1f,"spo2":%.1f,"resp":%.1f,"temp":%.2f,"nibp":{"sys":%.0f,"dia":%.0f},`+
			`"pleth":[%d,%d,%d,%d,%d,%d],"battery":%d,"rssi":%d,"leads":"ok","alarm":null,"fw":"4.2.1","unit":"bpm,%%,1/min,C,mmHg","pad":"`,
			name, 1000+i/devices, at-int64(r.IntN(400)), hr[d], spo2[d], resp[d], temp[d], sys[d], sys[d]*0.65,
			r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256), 40+d, -50-r.IntN(30))
		for len(p) < 254 {
			p = append(p, '-')
		}
		messages[i] = wire.Message{
			Received: at, Device: name, Topic: "dt/icu/" + name + "/vitals", Flags: wire.FlagQoS1, Payload: append(p, `"}`...),
		}
	}
	return messages
}

// records encodes messages as they lie in the spool.
func records(tb testing.TB, messages []wire.Message) []byte {
	tb.Helper()
	var b []byte
	for _, m := range messages {
		elems := []any{m.Received, m.Device, m.Topic, m.Flags, m.Payload}
		if m.Props != nil {
			elems = append(elems, m.Props)
		}
		r, err := cbor.Marshal(elems)
		if err != nil {
			tb.Fatal(err)
		}
		b = append(b, r...)
	}
	return b
}

// mosquittoBytes is what a mosquitto bridge sends for m with QoS 1: fixed header, topic, packet id, payload.
func mosquittoBytes(m wire.Message) int {
	remaining := 2 + len(m.Topic) + 2 + len(m.Payload)
	n := 2 + remaining
	for ; remaining > 127; remaining >>= 7 {
		n++
	}
	return n
}

var header = wire.BatchHeader{
	Gateway: "ward-3-east", Epoch: "0190163d-8694-739b-aea5-966c26f8ad91", Lane: "telemetry", First: 100001, Sent: 1764000000999,
}

// BenchmarkBatch is the choice of the batch's size and of zstd's level: what a message costs on the wire
// (with topic and MQTT header, beside a mosquitto bridge's) and in time.
func BenchmarkBatch(b *testing.B) {
	for _, size := range []int{0, 4, 16, 64, 128} {
		for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression} {
			b.Run(fmt.Sprintf("size=%dKiB/level=%v", size, level), func(b *testing.B) {
				messages := telemetry(1, max(1, size<<10/302))
				raw := records(b, messages)
				h := header
				h.Count = len(messages)
				enc := wire.NewBatchEncoderLevel(level)
				plain := 0
				for _, m := range messages {
					plain += mosquittoBytes(m)
				}
				var dst []byte
				b.ReportAllocs()
				b.SetBytes(int64(len(raw)))
				for b.Loop() {
					dst = enc.Append(dst[:0], h, raw)
				}
				sent := len(dst) + 2 + len(wire.DataTopic(h.Gateway, h.Lane)) + 2 + 4
				b.ReportMetric(float64(sent)/float64(len(messages)), "wire-B/msg")
				b.ReportMetric(float64(sent)/float64(plain), "x-mosquitto")
				b.ReportMetric(float64(len(messages))*float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
			})
		}
	}
}

func BenchmarkDecodeBatch(b *testing.B) {
	messages := telemetry(1, 400)
	h := header
	h.Count = len(messages)
	batch := wire.NewBatchEncoder().Append(nil, h, records(b, messages))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.DecodeBatch(batch); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(messages))*float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
}

func BenchmarkAppendCloudEvent(b *testing.B) {
	m := telemetry(1, 1)[0]
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if dst, err = wire.AppendCloudEvent(dst[:0], header.Gateway, header.Epoch, header.Lane, 100001, m, false, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(len(dst)), "wire-B/msg")
}

func BenchmarkDecodeCloudEvent(b *testing.B) {
	ev, err := wire.AppendCloudEvent(nil, header.Gateway, header.Epoch, header.Lane, 100001, telemetry(1, 1)[0], false, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := wire.DecodeCloudEvent(ev); err != nil {
			b.Fatal(err)
		}
	}
}
