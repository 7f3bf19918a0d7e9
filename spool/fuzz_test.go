package spool

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func FuzzRecord(f *testing.F) {
	f.Add(AppendRecord(nil, &Record{Received: 1, Device: []byte("d"), Topic: []byte("t"), Payload: []byte("p")}))
	f.Add(AppendRecord(nil, &Record{Received: -1 << 62, Flags: 1 << 63, Props: &Props{
		ContentType: "a/b", ResponseTopic: "r", Correlation: []byte{1}, User: [][2]string{{"k", "v"}, {"", ""}}, UTF8: true, Expiry: 1 << 31, Upstream: "u",
	}}))
	f.Add([]byte("\x86\x00\x60\x60\x00\x40\xa1\x18\x63\x9f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Record
		n, err := ParseRecord(b, &r)
		if err != nil {
			return
		}
		if n > len(b) || recordLen(b) != n {
			t.Fatalf("parsed %d bytes of %d, recordLen %d", n, len(b), recordLen(b))
		}
		again := AppendRecord(nil, &r)
		var r2 Record
		if _, err := ParseRecord(again, &r2); err != nil {
			t.Fatalf("%x -> %x: %v", b, again, err)
		}
		if r.Props != nil && r2.Props != nil && len(r.Props.User) == 0 {
			r.Props.User, r2.Props.User = nil, nil
		}
		if diff := cmp.Diff(r, r2); diff != "" {
			t.Fatal(diff)
		}
		if !bytes.Equal(again, AppendRecord(nil, &r2)) {
			t.Fatal("encoding is not stable")
		}
	})
}

// FuzzRecordIsCBOR holds the hand-written encoder against an independent decoder.
func FuzzRecordIsCBOR(f *testing.F) {
	f.Add(int64(1), []byte("d"), []byte("t"), uint64(3), []byte("p"), "ct", "k", uint32(0))
	f.Fuzz(func(t *testing.T, recv int64, device, topic []byte, flags uint64, payload []byte, ct, key string, expiry uint32) {
		r := Record{Received: recv, Device: device, Topic: topic, Flags: Flags(flags), Payload: payload}
		if ct != "" || expiry != 0 {
			r.Props = &Props{ContentType: ct, User: [][2]string{{key, ct}}, Expiry: expiry}
		}
		b := AppendRecord(nil, &r)
		mode, err := cbor.DecOptions{UTF8: cbor.UTF8DecodeInvalid, IndefLength: cbor.IndefLengthForbidden}.DecMode()
		if err != nil {
			t.Fatal(err)
		}
		var got []any
		if err := mode.Unmarshal(b, &got); err != nil {
			t.Fatalf("%x: %v", b, err)
		}
		want := 5
		if r.Props != nil {
			want = 6
		}
		if len(got) != want || got[1] != string(device) || got[2] != string(topic) || got[3] != flags || !bytes.Equal(got[4].([]byte), payload) {
			t.Fatalf("%+v came out as %v", r, got)
		}
		if r.Props != nil && ct != "" && got[5].(map[any]any)[uint64(1)] != ct {
			t.Fatalf("properties %v", got[5])
		}
	})
}

func FuzzChunk(f *testing.F) {
	raw := bytes.Repeat(AppendRecord(nil, &Record{Received: 1, Device: []byte("dev"), Topic: []byte("topic"), Payload: []byte("payload")}), 50)
	m := chunkMeta{Lane: 1, First: Position{7, 100}, Count: 50, RawLen: len(raw), Oldest: 1, Newest: 1}
	f.Add(appendChunk(nil, &m, raw, true))
	m.Count, m.RawLen = 1, len(raw)/50
	f.Add(appendChunk(nil, &m, raw[:len(raw)/50], true))
	m.Boot, m.Booted, m.Service = 3, -5, 1<<40
	f.Add(appendChunk(nil, &m, raw[:len(raw)/50], true))
	f.Add(v1Chunk(&m, raw[:len(raw)/50]))
	f.Add([]byte(chunkMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= chunkTrailer { // else the checksum would turn everything away
			sum := len(b) - chunkTrailer
			b = binary.BigEndian.AppendUint32(b[:sum:sum], crc32.Checksum(b[:sum], castagnoli))
		}
		m, raw, err := decodeChunk(nil, b)
		if err != nil {
			return
		}
		again := appendChunk(nil, &m, raw, true)
		m2, raw2, err := decodeChunk(nil, again)
		if err != nil || m2 != m || !bytes.Equal(raw, raw2) {
			t.Fatalf("%+v came back as %+v, %v", m, m2, err)
		}
	})
}

// v1Chunk is a plain chunk of version 1.
func v1Chunk(m *chunkMeta, raw []byte) []byte {
	b := appendChunk(nil, m, raw, false)
	b = append(b[:chunkHeaderV1:chunkHeaderV1], raw...)
	b[4] = chunkV1
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func TestChunkIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var raw []byte
		n := rapid.IntRange(1, 50).Draw(t, "records")
		for i := range n {
			raw = AppendRecord(raw, &Record{Received: int64(i), Payload: rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "payload")})
		}
		m := chunkMeta{
			Lane: rapid.Byte().Draw(t, "lane"), Count: n, RawLen: len(raw),
			First:  Position{rapid.Uint64Range(1, 1<<63).Draw(t, "seq"), rapid.Uint64().Draw(t, "bytes")},
			Oldest: rapid.Int64().Draw(t, "oldest"), Newest: rapid.Int64().Draw(t, "newest"),
			Boot: rapid.Uint32().Draw(t, "boot"), Booted: rapid.Int64().Draw(t, "booted"), Service: rapid.Int64().Draw(t, "service"),
		}
		got, back, err := decodeChunk(nil, appendChunk(nil, &m, raw, rapid.Bool().Draw(t, "compress")))
		if err != nil || got != m || !bytes.Equal(back, raw) {
			t.Fatalf("%+v came back as %+v, %v", m, got, err)
		}
		m.Boot, m.Booted, m.Service = 0, 0, 0
		got, back, err = decodeChunk(nil, v1Chunk(&m, raw))
		if err != nil || got != m || !bytes.Equal(back, raw) {
			t.Fatalf("version 1: %+v came back as %+v, %v", m, got, err)
		}
	})
}

func FuzzRows(f *testing.F) {
	f.Add((&laneRow{Next: Position{1, 2}, Head: Position{3, 4}}).append(nil))
	f.Add((&cursorRow{Start: Position{1, 2}, Delivered: Count{1 << 60, 1}}).append(nil))
	f.Add((&cursorRow{Pos: Position{5, 50}, Islands: []island{{Position{7, 70}, Position{9, 90}}, {Position{300, 90}, Position{400, 4000}}}}).append(nil))
	f.Add((&parkedRow{AtMS: 5, Reason: "why", Record: []byte{1}}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l, l2 laneRow
		if l.parse(b) == nil {
			if err := l2.parse(l.append(nil)); err != nil || l != l2 {
				t.Fatalf("lane row %+v came back as %+v, %v", l, l2, err)
			}
		}
		var c, c2 cursorRow
		if c.parse(b) == nil {
			if err := c2.parse(c.append(nil)); err != nil || !cmp.Equal(c, c2, cmp.AllowUnexported(island{})) {
				t.Fatalf("cursor row %+v came back as %+v, %v", c, c2, err)
			}
		}
		var p, p2 parkedRow
		if p.parse(b) == nil {
			if err := p2.parse(p.append(nil)); err != nil || !cmp.Equal(p, p2) {
				t.Fatalf("parked row %+v came back as %+v, %v", p, p2, err)
			}
		}
	})
}

// TestEveryFlippedBitIsSeen flips each bit of a chunk.
func TestEveryFlippedBitIsSeen(t *testing.T) {
	raw := bytes.Repeat(AppendRecord(nil, &Record{Received: 1, Device: []byte("dev"), Topic: []byte("topic"), Payload: []byte("payload")}), 30)
	m := chunkMeta{Lane: 1, First: Position{7, 100}, Count: 30, RawLen: len(raw), Oldest: 1, Newest: 1}
	b := appendChunk(nil, &m, raw, true)
	if b[5] != encMinLZ {
		t.Error("a repetitive chunk was not compressed")
	}
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			if _, _, err := decodeChunk(nil, b); err == nil {
				t.Fatalf("bit %d of byte %d flipped, and the chunk was taken", bit, i)
			}
			b[i] ^= 1 << bit
		}
	}
}
