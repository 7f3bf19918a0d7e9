package wire_test

import (
	"bytes"
	"errors"
	"runtime"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
)

// drawMessage draws any message a spool can hold.
func drawMessage(t *rapid.T) wire.Message {
	name := rapid.StringMatching(`[ -~äöü€/+#]{1,40}`)
	m := wire.Message{
		Received: rapid.Int64Range(-1<<40, 253402300799999).Draw(t, "received"),
		Device:   name.Draw(t, "device"),
		Topic:    name.Draw(t, "topic"),
		Flags:    wire.Flags(rapid.Uint64Range(0, 1<<6-1).Draw(t, "flags")) &^ (wire.FlagQoS1 | wire.FlagQoS2),
		Payload:  rapid.SliceOfN(rapid.Byte(), 0, 600).Draw(t, "payload"),
	}
	m.Flags |= wire.Flags(rapid.IntRange(0, 2).Draw(t, "qos"))
	if rapid.Bool().Draw(t, "props") {
		p := &wire.Props{
			ContentType:   rapid.SampledFrom([]string{"", "application/json", "text/plain", "application/senml+json; v=1"}).Draw(t, "content type"),
			ResponseTopic: rapid.SampledFrom([]string{"", "a/b", `q"\`}).Draw(t, "response topic"),
			Format:        uint8(rapid.IntRange(0, 1).Draw(t, "format")),
			Expiry:        rapid.Uint32().Draw(t, "expiry"),
		}
		if rapid.Bool().Draw(t, "correlation") {
			p.Correlation = rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "correlation data")
		}
		for range rapid.IntRange(0, 3).Draw(t, "user properties") {
			p.User = append(p.User, [2]string{name.Draw(t, "name"), name.Draw(t, "value")})
		}
		m.Props = p
	}
	return m
}

func TestBatchIsReadBack(t *testing.T) {
	enc := wire.NewBatchEncoder() // one for all: it is reused
	rapid.Check(t, func(t *rapid.T) {
		messages := rapid.SliceOfN(rapid.Custom(drawMessage), 1, 40).Draw(t, "messages")
		h := wire.BatchHeader{
			Gateway: rapid.StringN(1, 20, -1).Draw(t, "gateway"), Epoch: "e", Lane: "bulk",
			First: rapid.Uint64Range(1, 1<<63).Draw(t, "first"), Count: len(messages),
			Sent: rapid.Int64().Draw(t, "sent"), Replayed: rapid.Bool().Draw(t, "replayed"),
		}
		if h.Corrected = rapid.Bool().Draw(t, "corrected"); h.Corrected {
			h.Correction = rapid.Int64Range(-1<<53, 1<<53).Draw(t, "correction")
		}
		h.Behind = rapid.Uint64Range(0, h.First).Draw(t, "behind")
		var raw []byte
		for _, m := range messages {
			raw = append(raw, encodeRecord(t, m)...)
		}
		prefix := []byte("before")
		b := enc.Append(bytes.Clone(prefix), h, raw)
		if !bytes.HasPrefix(b, prefix) {
			t.Fatalf("Append changed what was there: %q", b[:len(prefix)])
		}
		got, err := wire.DecodeBatch(b[len(prefix):])
		if err != nil {
			t.Fatal(err)
		}
		if h.Corrected {
			for i := range messages {
				if m := &messages[i]; m.Flags&wire.FlagClockUnsynced != 0 {
					m.Received, m.Corrected, m.Flags = m.Received+h.Correction, h.Correction, m.Flags&^wire.FlagClockUnsynced
				}
			}
		}
		want := &wire.Batch{BatchHeader: h, RawSize: len(raw), Messages: messages}
		if diff := cmp.Diff(want, got, equateEmpty); diff != "" {
			t.Fatal(diff)
		}
	})
}

var equateEmpty = cmp.Transformer("bytes", func(b []byte) string { return string(b) })

func encodeRecord(tb interface{ Fatal(...any) }, m wire.Message) []byte {
	elems := []any{m.Received, m.Device, m.Topic, m.Flags, m.Payload}
	if m.Props != nil {
		elems = append(elems, m.Props)
	}
	r, err := cbor.Marshal(elems)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// fields is a batch with its keys open, to be spoiled.
func fields(t *testing.T, raw []byte, count int) map[uint64]any {
	t.Helper()
	return map[uint64]any{
		0: 1, 1: header.Gateway, 2: header.Epoch, 3: header.Lane, 4: header.First, 5: count, 6: header.Sent,
		8: len(raw), 9: compress(t, raw),
	}
}

func compress(tb testing.TB, raw []byte) []byte {
	tb.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(raw, nil)
}

func encode(tb testing.TB, v any) []byte {
	tb.Helper()
	mode, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		tb.Fatal(err)
	}
	b, err := mode.Marshal(v)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// The hand-written encoder writes what a CBOR library writes in its deterministic mode.
func TestBatchIsDeterministicCBOR(t *testing.T) {
	for _, replayed := range []bool{false, true} {
		for _, n := range []int{1, 2, 30, 400} {
			messages := telemetry(7, n)
			h := header
			h.Count, h.Replayed = n, replayed
			if replayed {
				h.Behind = 17
			}
			got := wire.NewBatchEncoder().Append(nil, h, records(t, messages))
			var open map[uint64]any
			if err := cbor.Unmarshal(got, &open); err != nil {
				t.Fatal(err)
			}
			if want := encode(t, open); !bytes.Equal(got, want) {
				t.Errorf("%d messages:\ngot  %x\nwant %x", n, got[:min(200, len(got))], want[:min(200, len(want))])
			}
			if _, ok := open[7]; ok != replayed {
				t.Errorf("flags are there: %v, replayed: %v", ok, replayed)
			}
		}
	}
}

func TestDecodeBatchSkipsWhatALaterVersionAdds(t *testing.T) {
	raw := records(t, telemetry(3, 2))
	later, err := cbor.Marshal([]any{int64(5), "d", "t", 1, []byte("p"), map[int]any{1: "text/plain", 99: "new"}, "seventh", map[string]int{"x": 1}})
	if err != nil {
		t.Fatal(err)
	}
	f := fields(t, append(raw, later...), 3)
	f[7] = 1 | 1<<40
	f[20], f[1000] = "new", map[string]any{"a": []int{1, 2}}
	b, err := wire.DecodeBatch(encode(t, f))
	if err != nil {
		t.Fatal(err)
	}
	want := wire.Message{Received: 5, Device: "d", Topic: "t", Flags: wire.FlagQoS1, Payload: []byte("p"), Props: &wire.Props{ContentType: "text/plain"}}
	if diff := cmp.Diff(want, b.Messages[2]); diff != "" || !b.Replayed {
		t.Errorf("replayed %v, message %s", b.Replayed, diff)
	}
}

func TestDecodeBatchTellsANewerVersionFromDamage(t *testing.T) {
	for _, f := range []map[uint64]any{
		{0: 2},
		{0: 2, 1: 17, 9: "another type"},
		{0: uint64(1 << 60), 1: "g"},
	} {
		if _, err := wire.DecodeBatch(encode(t, f)); !errors.Is(err, wire.ErrVersion) {
			t.Errorf("%v: %v", f, err)
		}
	}
}

func TestDecodeBatchRefuses(t *testing.T) {
	raw := records(t, telemetry(3, 2))
	// 4 MiB of the smallest records there can be.
	tiny := bytes.Repeat([]byte{0x85, 0, 0x60, 0x60, 0, 0x40}, 4<<20/6)
	cases := map[string]func(f map[uint64]any){
		"no version":                func(f map[uint64]any) { delete(f, 0) },
		"version 0":                 func(f map[uint64]any) { f[0] = 0 },
		"version is text":           func(f map[uint64]any) { f[0] = "1" },
		"no gateway":                func(f map[uint64]any) { delete(f, 1) },
		"empty gateway":             func(f map[uint64]any) { f[1] = "" },
		"no epoch":                  func(f map[uint64]any) { delete(f, 2) },
		"no lane":                   func(f map[uint64]any) { delete(f, 3) },
		"lane is a number":          func(f map[uint64]any) { f[3] = 3 },
		"no first":                  func(f map[uint64]any) { delete(f, 4) },
		"first is negative":         func(f map[uint64]any) { f[4] = -1 },
		"sequences overflow":        func(f map[uint64]any) { f[4] = uint64(1<<64 - 1) },
		"no count":                  func(f map[uint64]any) { delete(f, 5) },
		"count too small":           func(f map[uint64]any) { f[5] = 1 },
		"count too large":           func(f map[uint64]any) { f[5] = 3 },
		"count beyond the bytes":    func(f map[uint64]any) { f[5] = uint64(1 << 62) },
		"raw size too small":        func(f map[uint64]any) { f[8] = len(raw) - 1 },
		"raw size too large":        func(f map[uint64]any) { f[8] = len(raw) + 1 },
		"raw size beyond the limit": func(f map[uint64]any) { f[8] = wire.DefaultMaxRaw + 1 },
		"raw size of another world": func(f map[uint64]any) { f[8] = uint64(1<<64 - 1) },
		"no body":                   func(f map[uint64]any) { delete(f, 9) },
		"body is text":              func(f map[uint64]any) { f[9] = "x" },
		"body is no zstd":           func(f map[uint64]any) { f[9] = []byte("no zstd at all") },
		"body is cut":               func(f map[uint64]any) { f[9] = compress(t, raw)[:40] },
		"body is two frames":        func(f map[uint64]any) { f[9] = append(compress(t, raw), compress(t, raw)...) },
		"record is cut":             func(f map[uint64]any) { f[8], f[9] = len(raw)-1, compress(t, raw[:len(raw)-1]) },
		"record is a map":           func(f map[uint64]any) { f[5], f[8], f[9] = 1, 7, compress(t, encode(t, map[int]int{1: 1, 2: 2, 3: 3})) },
		"record has 4 elements": func(f map[uint64]any) {
			r := encode(t, []any{1, "d", "t", 0x1000})
			f[5], f[8], f[9] = 1, len(r), compress(t, r)
		},
		"record's payload is text": func(f map[uint64]any) {
			r := encode(t, []any{1, "d", "t", 0, "payload"})
			f[5], f[8], f[9] = 1, len(r), compress(t, r)
		},
		"record's topic is not UTF-8": func(f map[uint64]any) {
			r := []byte("\x85\x00\x61d\x61\xff\x00\x40")
			f[5], f[8], f[9] = 1, len(r), compress(t, r)
		},
		"bomb, size not told": func(f map[uint64]any) { f[9] = compress(t, make([]byte, 64<<20)) },
		"bomb, size told":     func(f map[uint64]any) { f[8], f[9] = 64<<20, compress(t, make([]byte, 64<<20)) },
		"zeros":               func(f map[uint64]any) { f[5], f[8], f[9] = 4<<20/6, 4<<20, compress(t, make([]byte, 4<<20)) },
		"one record too few": func(f map[uint64]any) {
			tiny := append([]byte("\x85\x00\x60\x60\x00\x46......"), tiny...) // room for one more by size
			f[5], f[8], f[9] = len(tiny)/6, len(tiny), compress(t, tiny)
		},
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			f := fields(t, raw, 2)
			spoil(f)
			b := encode(t, f)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			got, err := wire.DecodeBatch(b)
			runtime.ReadMemStats(&after)
			if !errors.Is(err, wire.ErrFormat) {
				t.Fatalf("got %+v, %v", got, err)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > allocLimit(len(b)) {
				t.Errorf("%d bytes made it allocate %d", len(b), n)
			}
		})
	}
	if _, err := wire.DecodeBatch(encode(t, fields(t, raw, 2))); err != nil {
		t.Errorf("the batch that the cases above spoil: %v", err)
	}
}

// allocLimit is what decoding n bytes may allocate: room for the records, as much as zstd can stand for but no more
// than the limit; for decoder tables; and for a copy of the input and error texts.
func allocLimit(n int) uint64 {
	return uint64(min(wire.DefaultMaxRaw, (n/4+1)*(128<<10))) + 2<<20 + 20*uint64(n)
}

func TestDecodeBatchAllocatesByBytesNotByClaims(t *testing.T) {
	// 20 bytes of body claim 4 MiB, in the frame and in the header.
	body := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0x40, 0, 0x01, 0, 0, 1, 2, 3, 4}
	f := fields(t, nil, 10)
	f[8], f[9] = 4<<20, body
	b := encode(t, f)
	_, _ = wire.DecodeBatch(b) // the shared decoder is made once
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := wire.DecodeBatch(b)
	runtime.ReadMemStats(&after)
	if !errors.Is(err, wire.ErrFormat) {
		t.Fatalf("got %v", err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes made it allocate %d", len(b), n)
	}
}

func TestDecodeBatchLimitIsTheCallers(t *testing.T) {
	raw := records(t, telemetry(3, 40))
	b := encode(t, fields(t, raw, 40))
	if _, err := wire.DecodeBatchLimit(b, len(raw)); err != nil {
		t.Error(err)
	}
	if _, err := wire.DecodeBatchLimit(b, len(raw)-1); !errors.Is(err, wire.ErrFormat) {
		t.Errorf("one byte less: %v", err)
	}
}

// Every single changed bit of the body is noticed: by zstd, by its checksum or by the records.
func TestDecodeBatchNoticesAChangedBody(t *testing.T) {
	raw := records(t, telemetry(3, 4))
	h := header
	h.Count = 4
	good := wire.NewBatchEncoder().Append(nil, h, raw)
	want, err := wire.DecodeBatch(good)
	if err != nil {
		t.Fatal(err)
	}
	start := bytes.Index(good, []byte{0x28, 0xb5, 0x2f, 0xfd})
	for bit := 8 * start; bit < 8*len(good); bit++ {
		b := bytes.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		if got, err := wire.DecodeBatch(b); err == nil && !cmp.Equal(want, got) {
			t.Fatalf("bit %d changed the messages unnoticed", bit)
		}
	}
	for n := range good {
		if _, err := wire.DecodeBatch(good[:n]); err == nil {
			t.Fatalf("the first %d of %d bytes are a batch", n, len(good))
		}
	}
}

// The encoder belongs to a gateway that is idle most of the time.
func TestBatchEncoderIsSmall(t *testing.T) {
	if testkit.Race {
		t.Skip("the race detector changes what memory costs")
	}
	raw := records(t, telemetry(1, 400))
	h := header
	h.Count = 400
	dst := make([]byte, 0, 256<<10)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	enc := wire.NewBatchEncoder()
	enc.Append(dst, h, raw)
	used := heap() - before
	t.Logf("an encoder in use holds %d KiB", used>>10)
	if used > 1<<20 {
		t.Errorf("an encoder holds %d bytes", used)
	}
	if n := testing.AllocsPerRun(20, func() { enc.Append(dst, h, raw) }); n > 0 {
		t.Errorf("%v allocations a batch", n)
	}
}

func FuzzDecodeBatch(f *testing.F) {
	h := header
	for _, n := range []int{1, 3} {
		h.Count = n
		f.Add(wire.NewBatchEncoder().Append(nil, h, records(f, telemetry(1, n))))
	}
	f.Add(encode(f, map[uint64]any{0: 2}))
	_, _ = wire.DecodeBatch(encode(f, map[uint64]any{0: 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := wire.DecodeBatch(b)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; err != nil && n > allocLimit(len(b)) {
			t.Fatalf("%d bytes made it allocate %d", len(b), n)
		}
		if err != nil {
			return
		}
		var raw []byte
		for _, m := range got.Messages {
			raw = append(raw, encodeRecord(t, m)...)
		}
		again, err := wire.DecodeBatch(wire.NewBatchEncoder().Append(nil, got.BatchHeader, raw))
		if err != nil {
			t.Fatal(err)
		}
		again.RawSize = got.RawSize // what was skipped is gone
		if diff := cmp.Diff(got, again, equateEmpty); diff != "" {
			t.Fatal(diff)
		}
	})
}
