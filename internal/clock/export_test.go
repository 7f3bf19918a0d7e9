package clock

import "bytes"

// KeyClock and BootKey are where rows lie.
var (
	KeyClock = keyClock
	BootKey  = bootKey
)

// MaxBoots is how many boots are remembered.
const MaxBoots = maxBoots

// ClockRowAgain decodes a row of the clock and encodes it again; BootRowAgain does the same for a boot's.
func ClockRowAgain(b []byte) ([]byte, error) {
	r, err := parseClockRow(b)
	if err != nil {
		return nil, err
	}
	return encode(r), nil
}

func BootRowAgain(b []byte) ([]byte, error) {
	r, err := parseBootRow(b)
	if err != nil {
		return nil, err
	}
	return encode(&r), nil
}

// GoOn is the clock that goes on from a row in a machine that src shows.
func GoOn(b []byte, src Source) (*Clock, error) {
	r, err := parseClockRow(b)
	if err != nil {
		return nil, err
	}
	c := &Clock{src: src.reader(), log: discard, boot: 1, boots: map[uint32]bootRow{1: {}}}
	_, c.elapsed0 = c.src.read()
	c.bootID, c.boot0 = c.src.boot()
	c.ask(nil)
	c.goOn(r)
	return c, nil
}

// Row is what c would store.
func (c *Clock) Row() []byte { return bytes.Clone(c.row().Value) }
