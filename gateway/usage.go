package gateway

import (
	"encoding/binary"
	"fmt"

	"holdfast/bridge"
	"holdfast/internal/kv"
)

// usageV1 is the first byte of a usage row: what was sent to an upstream on a day.
//
//	'b' upstream -> | version 1 | day since 1970-01-01 UTC (uvarint) | bytes (uvarint) |
//
// Written to disk: never renumber, never reuse.
const usageV1 = 1

// usage keeps what was sent to an upstream today, so that a restart does not give it another budget.
type usage struct {
	store    *kv.Store
	upstream string
}

var _ bridge.UsageStore = usage{}

func (u usage) key() []byte { return append([]byte{kv.PrefixUsage}, u.upstream...) }

// Load implements bridge.UsageStore.
func (u usage) Load() (bridge.Usage, error) {
	b, found, err := u.store.Get(u.key())
	if err != nil || !found {
		return bridge.Usage{}, err
	}
	return parseUsage(b)
}

func parseUsage(b []byte) (bridge.Usage, error) {
	if len(b) == 0 || b[0] != usageV1 {
		return bridge.Usage{}, fmt.Errorf("usage row: version %.1x is not known", b)
	}
	day, n := binary.Uvarint(b[1:])
	if n <= 0 || day > 1<<40 {
		return bridge.Usage{}, fmt.Errorf("usage row %x: no day", b)
	}
	sent, m := binary.Uvarint(b[1+n:])
	if m <= 0 {
		return bridge.Usage{}, fmt.Errorf("usage row %x: no bytes", b)
	}
	return bridge.Usage{Day: int64(day), Bytes: sent}, nil
}

// Save implements bridge.UsageStore: the row goes along with the next commit.
func (u usage) Save(v bridge.Usage) error {
	b := binary.AppendUvarint([]byte{usageV1}, uint64(v.Day))
	return u.store.Apply([]kv.Op{{Key: u.key(), Value: binary.AppendUvarint(b, v.Bytes)}}, nil, 0)
}
