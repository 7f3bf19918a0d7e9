package clock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/fxamacker/cbor/v2"

	"holdfast/internal/kv"
)

// Rows: a version byte, 1, and a CBOR map with small unsigned keys, of which unknown ones are skipped.
//
//	'm' "clock"         clockRow
//	'm' "boot/" number  bootRow; number has 4 bytes, big-endian
//	'c' 0               clockRow, where format 1 kept it
//
// Written to disk: never renumber, never reuse.
const rowV1 = 1

var (
	keyClock    = append([]byte{kv.PrefixMeta}, "clock"...)
	keyOldClock = []byte{kv.PrefixCommand, 0}
	prefixBoot  = append([]byte{kv.PrefixMeta}, "boot/"...)
)

// ErrVersion is returned by Open for a clock that a newer holdfast has written.
var ErrVersion = errors.New("the clock's row was written by a newer holdfast")

var errDamaged = errors.New("damaged")

// clockRow is what is stored of the clock. Times are ms, of the service clock where nothing else is said.
type clockRow struct {
	T        int64  `cbor:"1,keyasint"`
	Wall     int64  `cbor:"2,keyasint,omitempty"` // Unix ms, for people
	Boot     string `cbor:"3,keyasint,omitempty"`
	Since    int64  `cbor:"4,keyasint,omitempty"` // since that boot
	Synced   bool   `cbor:"5,keyasint,omitempty"`
	Anchor   pair   `cbor:"6,keyasint"`
	Gaps     []gap  `cbor:"7,keyasint,omitempty"`
	First    int64  `cbor:"8,keyasint,omitempty"`
	Believed pair   `cbor:"9,keyasint"`
}

// bootRow is what is known of one boot of the machine.
type bootRow struct {
	ID     string `cbor:"1,keyasint,omitempty"` // "": the system does not tell
	T      int64  `cbor:"2,keyasint"`           // when it was first seen
	Booted int64  `cbor:"3,keyasint,omitempty"` // when it was, Unix ms, if Known
	Known  bool   `cbor:"4,keyasint,omitempty"` // the wall clock was known to be right during it
}

var (
	encoder = func() cbor.UserBufferEncMode {
		m, err := cbor.EncOptions{Sort: cbor.SortCoreDeterministic}.UserBufferEncMode()
		if err != nil {
			panic(err) // the options contradict each other
		}
		return m
	}()
	decoder = func() cbor.DecMode {
		m, err := cbor.DecOptions{
			DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
			MaxNestedLevels: 8, MaxArrayElements: 4096, MaxMapPairs: 256,
		}.DecMode()
		if err != nil {
			panic(err) // the options contradict each other
		}
		return m
	}()
)

func encode(v any) []byte {
	var b bytes.Buffer
	b.WriteByte(rowV1)
	if err := encoder.MarshalToBuffer(v, &b); err != nil {
		panic(fmt.Sprintf("clock: encode %T: %v", v, err)) // the types of rows hold nothing that CBOR cannot
	}
	return b.Bytes()
}

func decode(b []byte, v any) error {
	switch {
	case len(b) == 0 || b[0] == 0:
		return fmt.Errorf("%w: it has no version", errDamaged)
	case b[0] > rowV1:
		return ErrVersion
	}
	if err := decoder.Unmarshal(b[1:], v); err != nil {
		return fmt.Errorf("%w: %v", errDamaged, err)
	}
	return nil
}

func parseClockRow(b []byte) (*clockRow, error) {
	r := new(clockRow)
	if err := decode(b, r); err != nil {
		return nil, err
	}
	ok := r.T > 0 && r.First >= 0 && len(r.Gaps) <= maxGaps+1
	at := int64(0)
	for _, g := range r.Gaps {
		ok = ok && g.At >= at && g.Len >= 0 && g.Len <= limit
		at = g.At
	}
	for _, ms := range [...]int64{r.T, r.Wall, r.Since, r.Anchor.T, r.Anchor.Wall, r.First, r.Believed.T, r.Believed.Wall, at} {
		ok = ok && ms >= -limit && ms <= limit
	}
	if !ok {
		return nil, fmt.Errorf("%w: its times cannot be", errDamaged)
	}
	return r, nil
}

func parseBootRow(b []byte) (r bootRow, err error) {
	if err := decode(b, &r); err != nil {
		return r, err
	}
	if r.T < 0 || r.T > limit || r.Booted < -limit || r.Booted > limit {
		return r, fmt.Errorf("%w: its times cannot be", errDamaged)
	}
	return r, nil
}

func bootKey(number uint32) []byte {
	return binary.BigEndian.AppendUint32(slices.Clone(prefixBoot), number)
}

// load reads the rows, has the clock go on from them, and returns what is to be written.
func (c *Clock) load() ([]kv.Op, error) {
	_, c.elapsed0 = c.src.read()
	c.bootID, c.boot0 = c.src.boot()
	c.ask(nil)
	if c.store == nil {
		c.goOn(nil)
		c.boot, c.boots = 1, map[uint32]bootRow{1: {ID: c.bootID, T: c.now().T}}
		return nil, nil
	}
	key := keyClock
	value, found, err := c.store.Get(key)
	if err == nil && !found {
		key = keyOldClock
		value, found, err = c.store.Get(key)
	}
	if err != nil {
		return nil, err
	}
	var row *clockRow
	if found {
		if row, err = parseClockRow(value); errors.Is(err, ErrVersion) {
			return nil, err // all would expire by a clock that is not its own
		} else if err != nil {
			c.log.Error("the clock is lost: how long messages and commands have waited while the gateway was off does not count", "err", err)
		}
	}
	c.goOn(row)
	ops, err := c.loadBoots()
	if err != nil {
		return nil, err
	}
	if found && &key[0] == &keyOldClock[0] {
		ops = append(ops, kv.Op{Key: keyOldClock, Delete: true})
	}
	return append(ops, c.row(), c.bootOp()), nil
}

// loadBoots reads what is known of boots, and finds the number of this one.
func (c *Clock) loadBoots() (drop []kv.Op, err error) {
	c.boots = map[uint32]bootRow{}
	last := uint32(0)
	err = c.store.Scan(prefixBoot, func(key, value []byte) error {
		if len(key) != len(prefixBoot)+4 {
			return nil
		}
		number := binary.BigEndian.Uint32(key[len(prefixBoot):])
		last = max(last, number) // also of one that cannot be read: numbers are not given twice
		r, err := parseBootRow(value)
		if err != nil {
			c.log.Error("a boot's row cannot be read: messages of that time keep the time that the clock showed", "boot", number, "err", err)
			return nil
		}
		c.boots[number] = r
		return nil
	})
	if err != nil {
		return nil, err
	}
	if b, ok := c.boots[last]; ok && c.bootID != "" && b.ID == c.bootID {
		c.boot = last
		return nil, nil
	}
	c.boot = last + 1
	c.boots[c.boot] = bootRow{ID: c.bootID, T: c.now().T}
	for number := range c.boots {
		if c.boot-number >= maxBoots {
			delete(c.boots, number)
			drop = append(drop, kv.Op{Key: bootKey(number), Delete: true})
		}
	}
	return drop, nil
}

// row is what to store now. The caller holds mu.
func (c *Clock) row() kv.Op {
	m := c.now()
	gaps := slices.Clone(*c.gaps.Load())
	gaps = slices.DeleteFunc(gaps, func(g gap) bool { return !g.Open && m.T-g.At > keep })
	for len(gaps) > maxGaps {
		gaps[0].Len += gaps[1].Len // at the older one: rather too long than too short
		gaps[0].Open = gaps[0].Open || gaps[1].Open
		gaps = slices.Delete(gaps, 1, 2)
	}
	c.gaps.Store(&gaps)
	c.written = m.T
	_, since := c.src.boot()
	return kv.Op{Key: keyClock, Value: encode(&clockRow{
		T: m.T, Wall: m.Wall, Boot: c.bootID, Since: since.Milliseconds(), Synced: c.synced, Anchor: c.anchor, Gaps: gaps,
		First: c.first, Believed: c.believed,
	})}
}

func (c *Clock) bootOp() kv.Op {
	b := c.boots[c.boot]
	return kv.Op{Key: bootKey(c.boot), Value: encode(&b)}
}
