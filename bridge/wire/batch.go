package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Version is the newest version of the batch format that this package reads, and the one it writes.
const Version = 1

// A batch is a CBOR map with small unsigned keys, in ascending order:
//
//	0 version    1                1 gateway  text       2 epoch  text
//	3 lane       text             4 first    uint       5 count  uint
//	6 sent       int, Unix ms     7 flags    uint, left out when 0
//	8 raw size   uint             9 body     bytes: one zstd frame with a checksum
//	10 correction int, ms, left out when not known
//	11 behind    uint, left out when 0
//
// The correction is for the records with FlagClockUnsynced, and theirs alone: added to their receive times it makes them right.
// The gateway has learned the time since, and the records travel as they were stored.
//
// The body holds count records back to back (a CBOR sequence, RFC 8742), as they lie in the spool.
// Readers skip keys and flags that they do not know; what they must not skip gets a new version.
// Read by other programs: never renumber, never reuse.
const (
	keyVersion = iota
	keyGateway
	keyEpoch
	keyLane
	keyFirst
	keyCount
	keySent
	keyFlags
	keyRawSize
	keyBody
	keyCorrection
	keyBehind

	batchReplayed = 1 << 0 // header flag
)

// BatchHeader says whose records a batch holds.
type BatchHeader struct {
	Gateway string
	Epoch   string
	Lane    string
	First   uint64 // sequence of the first record; the others follow without a hole
	Count   int
	Sent    int64 // Unix ms, when the batch was made
	// Replayed: these records were sent before, or may have been, or come from a backlog that newer ones went ahead
	// of. A receiver that was told so looks closer; one that was not must still look, for a gateway that lost power
	// does not know.
	Replayed bool
	// Corrected: the gateway knows by now what its clock was wrong by when it received the messages with FlagClockUnsynced.
	// Decoders have added Correction (ms) to their Received, and taken the flag away.
	Corrected  bool
	Correction int64
	// Behind, if not 0: these records went ahead of a backlog. The lane's sequences from Behind up to First that have not
	// come are still to come; those below Behind have all been sent.
	Behind uint64
}

// BatchEncoder makes batches. It holds about 700 KiB. One goroutine at a time may use it.
type BatchEncoder struct {
	zstd *zstd.Encoder
}

// NewBatchEncoder makes an encoder that is meant to be kept.
func NewBatchEncoder() *BatchEncoder { return newBatchEncoder(zstd.SpeedFastest) }

// newBatchEncoder is NewBatchEncoder with a choice; BenchmarkBatch measures what each costs.
func newBatchEncoder(level zstd.EncoderLevel) *BatchEncoder {
	z, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(level),
		zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(batchWindow),
		zstd.WithSingleSegment(true), // the frame tells its size, and a reader needs no window
		zstd.WithLowerEncoderMem(true),
		zstd.WithAllLitEntropyCompression(true), // one message alone has hardly a repetition, but few different characters
		zstd.WithEncoderCRC(true))
	if err != nil {
		panic(err) // the options above contradict each other
	}
	return &BatchEncoder{zstd: z}
}

// batchWindow is how far back a repetition is found. Batches are meant to be no larger.
const batchWindow = 128 << 10

// Append appends the batch of records, which are h.Count records back to back, to dst.
func (e *BatchEncoder) Append(dst []byte, h BatchHeader, records []byte) []byte {
	pairs := uint64(9)
	if h.Replayed {
		pairs++
	}
	if h.Corrected {
		pairs++
	}
	if h.Behind != 0 {
		pairs++
	}
	dst = appendHead(dst, cborMap, pairs)
	dst = append(dst, keyVersion, Version, keyGateway)
	dst = appendText(dst, h.Gateway)
	dst = append(dst, keyEpoch)
	dst = appendText(dst, h.Epoch)
	dst = append(dst, keyLane)
	dst = appendText(dst, h.Lane)
	dst = append(dst, keyFirst)
	dst = appendHead(dst, cborUint, h.First)
	dst = append(dst, keyCount)
	dst = appendHead(dst, cborUint, uint64(h.Count))
	dst = append(dst, keySent)
	dst = appendInt(dst, h.Sent)
	if h.Replayed {
		dst = append(dst, keyFlags, batchReplayed)
	}
	dst = append(dst, keyRawSize)
	dst = appendHead(dst, cborUint, uint64(len(records)))
	dst = append(dst, keyBody)

	// The body's length stands before it and is known after it: compress behind room for the
	// longest head, then move down.
	start := len(dst)
	dst = append(dst, make([]byte, maxHead)...)
	dst = e.zstd.EncodeAll(records, dst)
	body := dst[start+maxHead:]
	dst = appendHead(dst[:start], cborBytes, uint64(len(body)))
	dst = append(dst, body...) // moves down within the same array: append copies like memmove
	if h.Corrected {
		dst = appendInt(append(dst, keyCorrection), h.Correction)
	}
	if h.Behind != 0 {
		dst = appendHead(append(dst, keyBehind), cborUint, h.Behind)
	}
	return dst
}

// Batch is a decoded batch: message i has sequence First+i.
type Batch struct {
	BatchHeader
	RawSize  int // bytes of the records before compression
	Messages []Message
}

// DefaultMaxRaw is the most that DecodeBatch lets a batch grow to. Gateways send batches of
// at most 128 KiB, or one message of any size they accept.
const DefaultMaxRaw = 4 << 20

// DecodeBatch is DecodeBatchLimit with DefaultMaxRaw.
func DecodeBatch(b []byte) (*Batch, error) { return DecodeBatchLimit(b, DefaultMaxRaw) }

// DecodeBatchLimit decodes a batch whose records have at most maxRaw bytes. The messages do not
// share memory with b. Many goroutines may call it at once.
//
// The claims of a batch are not trusted: memory for the records is at most the smaller of maxRaw
// and 128 KiB for every 4 bytes of the body, which is the most that zstd can stand for; memory for
// the messages grows with the records found. Size and count must be exactly as claimed.
// Errors: ErrVersion, ErrFormat.
func DecodeBatchLimit(b []byte, maxRaw int) (*Batch, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return nil, fmt.Errorf("batch: %w", err)
	}
	batch := &Batch{
		BatchHeader: BatchHeader{
			Gateway: h.Gateway, Epoch: h.Epoch, Lane: h.Lane, First: h.First, Count: int(h.Count),
			Sent: h.Sent, Replayed: h.Flags&batchReplayed != 0, Behind: h.Behind,
		},
		RawSize: int(h.RawSize),
	}
	if h.Correction != nil {
		batch.Corrected, batch.Correction = true, *h.Correction
	}
	raw, err := decompress(h.Body, h.RawSize, maxRaw)
	if err != nil {
		return nil, fmt.Errorf("batch %s/%s/%s/%d: %w", h.Gateway, h.Epoch, h.Lane, h.First, err)
	}
	batch.Messages = make([]Message, 0, min(h.Count, 1024))
	for len(raw) > 0 && uint64(len(batch.Messages)) < h.Count {
		var m Message
		if m, raw, err = DecodeMessage(raw); err != nil {
			return nil, fmt.Errorf("batch %s/%s/%s/%d: message %d of %d: %w",
				h.Gateway, h.Epoch, h.Lane, h.First, len(batch.Messages)+1, h.Count, err)
		}
		if batch.Corrected {
			m.Correct(batch.Correction)
		}
		batch.Messages = append(batch.Messages, m)
	}
	if uint64(len(batch.Messages)) != h.Count || len(raw) > 0 {
		return nil, fmt.Errorf("batch %s/%s/%s/%d: %w: %d messages claimed, %d found, %d bytes left",
			h.Gateway, h.Epoch, h.Lane, h.First, ErrFormat, h.Count, len(batch.Messages), len(raw))
	}
	return batch, nil
}

// header is a batch as its bytes say it.
type header struct {
	Version uint64 `cbor:"0,keyasint"`
	Gateway string `cbor:"1,keyasint"`
	Epoch   string `cbor:"2,keyasint"`
	Lane    string `cbor:"3,keyasint"`
	First   uint64 `cbor:"4,keyasint"`
	Count   uint64 `cbor:"5,keyasint"`
	Sent    int64  `cbor:"6,keyasint"`
	Flags   uint64 `cbor:"7,keyasint"`
	RawSize uint64 `cbor:"8,keyasint"`
	Body    []byte `cbor:"9,keyasint"`

	Correction *int64 `cbor:"10,keyasint"`
	Behind     uint64 `cbor:"11,keyasint"`
}

// maxCorrection is far more than any clock is wrong by, ms.
const maxCorrection = 1 << 53

// minRecord is the size of the smallest record: an array head and five elements of one byte each.
const minRecord = 6

func decodeHeader(b []byte) (*header, error) {
	var h header
	err := decMode.Unmarshal(b, &h)
	if err != nil {
		// A later version may use a key for another type.
		h.Version = 0
		var v struct {
			Version uint64 `cbor:"0,keyasint"`
		}
		if decMode.Unmarshal(b, &v) == nil {
			h.Version = v.Version
		}
	}
	switch {
	case h.Version > Version:
		return nil, fmt.Errorf("version %d: %w", h.Version, ErrVersion)
	case err != nil:
		return nil, fmt.Errorf("%w: %v", ErrFormat, err)
	case h.Version == 0:
		return nil, fmt.Errorf("%w: no version", ErrFormat)
	case h.Gateway == "" || h.Epoch == "" || h.Lane == "":
		return nil, fmt.Errorf("%w: gateway, epoch or lane is missing", ErrFormat)
	case h.First == 0 || h.Count == 0 || h.First > math.MaxUint64-h.Count:
		return nil, fmt.Errorf("%w: %d messages from sequence %d", ErrFormat, h.Count, h.First)
	case h.Correction != nil && (*h.Correction > maxCorrection || *h.Correction < -maxCorrection):
		return nil, fmt.Errorf("%w: a clock that was wrong by %d ms", ErrFormat, *h.Correction)
	case h.Behind > h.First:
		return nil, fmt.Errorf("%w: a backlog from %d on is not behind sequence %d", ErrFormat, h.Behind, h.First)
	case h.Count > h.RawSize/minRecord:
		return nil, fmt.Errorf("%w: %d messages in %d bytes", ErrFormat, h.Count, h.RawSize)
	}
	return &h, nil
}

// decoders are shared: DecodeAll may be called from many goroutines.
var decoders = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options above contradict each other
	}
	return d
})

func decompress(body []byte, rawSize uint64, maxRaw int) ([]byte, error) {
	if rawSize > uint64(maxRaw) {
		return nil, fmt.Errorf("%w: %d bytes of records, the limit is %d", ErrFormat, rawSize, maxRaw)
	}
	// A zstd block stands for at most 128 KiB and takes at least 4 bytes (RFC 8878 §3.1.1.2).
	if rawSize > uint64(len(body)/4+1)*(128<<10) {
		return nil, fmt.Errorf("%w: %d bytes cannot hold %d bytes of records", ErrFormat, len(body), rawSize)
	}
	raw, err := decoders().DecodeAll(body, make([]byte, 0, rawSize))
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		return nil, fmt.Errorf("%w: more than the %d bytes of records it claims", ErrFormat, rawSize)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: body: %v", ErrFormat, err)
	}
	if uint64(len(raw)) != rawSize {
		return nil, fmt.Errorf("%w: %d bytes of records claimed, %d found", ErrFormat, rawSize, len(raw))
	}
	return raw, nil
}

// CBOR major types, in place (RFC 8949 §3.1).
const (
	cborUint  = 0 << 5
	cborNeg   = 1 << 5
	cborBytes = 2 << 5
	cborText  = 3 << 5
	cborMap   = 5 << 5

	maxHead = 9
)

// appendHead writes a type with its argument in the shortest form.
func appendHead(dst []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(dst, major|byte(n))
	case n <= math.MaxUint8:
		return append(dst, major|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, major|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(dst, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(dst, major|27), n)
}

func appendText(dst []byte, s string) []byte {
	return append(appendHead(dst, cborText, uint64(len(s))), s...)
}

func appendInt(dst []byte, n int64) []byte {
	if n < 0 {
		return appendHead(dst, cborNeg, uint64(-1-n))
	}
	return appendHead(dst, cborUint, uint64(n))
}
