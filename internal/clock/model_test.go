package clock_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// TestModel has a machine whose clock is right when it is vouched for, and else shows anything. It is switched off
// and on, stopped and started, and after each step: t never goes back, nothing ages faster than the world nor slower than the gateway
// runs, and what is known of the time is right.
func TestModel(t *testing.T) {
	s := newStore(t)
	rapid.Check(t, func(rt *rapid.T) {
		if err := empty(s); err != nil {
			t.Fatal(err)
		}
		const slack = 50 // ms: each start is one
		m := newMachine()
		m.wall = m.wall.Truncate(time.Millisecond)
		world := m.wall // what time it really is
		ran := time.Duration(0)
		open := func() *clock.Clock {
			if err := s.Flush(); err != nil {
				rt.Fatal(err)
			}
			c, err := clock.Open(s, clock.Config{Source: m.source()})
			if err != nil {
				rt.Fatal(err)
			}
			return c
		}
		c := open()
		type instant struct {
			now    clock.Moment
			boot   uint32
			world  time.Time
			ran    time.Duration
			vouch  bool // the clock was right, and looked at
			latest int  // reboots until then
		}
		var instants []instant
		looked := false // since the wall clock was set, or the gateway began
		last := int64(0)
		reboots := 0
		note := func() {
			now := c.Read()
			if len(instants) < 200 {
				instants = append(instants, instant{now, c.Boot(), world, ran, m.synced && looked, reboots})
			}
		}
		pass := func(d time.Duration) { m.advance(d); world = world.Add(d); ran += d }
		duration := func(rt *rapid.T) time.Duration {
			return time.Duration(rapid.SampledFrom([]int64{1, 40, 999, 5_000, 61_000, 3_600_000, 86_400_000}).Draw(rt, "ms")) * time.Millisecond
		}
		rt.Repeat(map[string]func(*rapid.T){
			"pass": func(rt *rapid.T) { pass(duration(rt)) },
			"note": func(*rapid.T) { note() },
			"look": func(*rapid.T) { c.Look(); looked = true },
			"sync": func(*rapid.T) { m.set(world, true); c.Read(); looked = false },
			"jump": func(rt *rapid.T) {
				if m.synced {
					m.synced = false // first it says so
					c.Look()
				}
				looked = false
				m.set(m.wall.Add(duration(rt)*time.Duration(rapid.SampledFrom([]int{-1, 1}).Draw(rt, "sign"))), false)
			},
			"restart": func(rt *rapid.T) { pass(duration(rt)); c, looked = open(), false; c.Saw(last) },
			"reboot": func(rt *rapid.T) {
				off := duration(rt)
				m.reboot(off)
				world = world.Add(off)
				switch rapid.IntRange(0, 2).Draw(rt, "clock") {
				case 0:
					m.set(time.Unix(0, 0), false)
				case 1:
					m.set(m.wall, false)
				default:
					m.set(world, true)
				}
				reboots++
				c, looked = open(), false
				c.Saw(last)
			},
			"": func(rt *rapid.T) {
				now := c.Read()
				if now.T < last {
					rt.Fatalf("t went back from %d to %d", last, now.T)
				}
				last = now.T
				for i, at := range instants {
					age, really := c.Between(at.now.T, now.T), world.Sub(at.world).Milliseconds()
					if age > really+slack*int64(reboots+1) {
						rt.Fatalf("instant %d aged by %d ms, really by %d", i, age, really)
					}
					if reboots == at.latest && age < really-2100 {
						rt.Fatalf("instant %d aged by %d ms, really by %d, and the machine was never off", i, age, really)
					}
					if at.vouch && looked && m.synced && age < really-2100-slack*int64(reboots+1) {
						rt.Fatalf("instant %d aged by %d ms, really by %d, and the clock was right then and is now", i, age, really)
					}
					if due := c.Due(at.now.T, age); due > now.T {
						rt.Fatalf("instant %d is %d ms old at %d, and will be at %d", i, age, now.T, due)
					}
					if ms, known := c.Correction(at.boot, at.now.Booted); known {
						if d := at.now.Wall + ms - at.world.UnixMilli(); d > 10 || d < -10 {
							rt.Fatalf("instant %d was put right, and is %d ms wrong", i, d)
						}
					}
				}
				if looked && m.synced {
					if d := c.Time().Sub(world); d > time.Second || d < -time.Second {
						rt.Fatalf("believed is %v off", d)
					}
				}
			},
		})
	})
}

// empty removes all rows.
func empty(s *kv.Store) error {
	var ops []kv.Op
	err := s.Scan([]byte{kv.PrefixMeta}, func(k, _ []byte) error {
		ops = append(ops, kv.Op{Key: bytes.Clone(k), Delete: true})
		return nil
	})
	return errors.Join(err, s.ApplyWait(ops))
}

func FuzzClockRow(f *testing.F) {
	row, err := hex.DecodeString(oldRow)
	if err != nil {
		f.Fatal(err)
	}
	for _, b := range [][]byte{row, []byte("\x01\xa1\x01\x05")} {
		f.Add(b, "b", int64(7_200_000), int64(1_900_000_000_000), true)
		f.Add(b, "other", int64(0), int64(0), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, boot string, sinceMS, wallMS int64, synced bool) {
		const limit = 1 << 45
		if sinceMS < 0 || sinceMS > limit || wallMS < -limit || wallMS > limit {
			return
		}
		again, err := clock.ClockRowAgain(b)
		if err != nil {
			return
		}
		twice, err := clock.ClockRowAgain(again)
		if err != nil || !bytes.Equal(again, twice) {
			t.Fatalf("%x became %x, then %x, %v", b, again, twice, err)
		}
		c, err := clock.GoOn(b, clock.Source{
			Now:     func() time.Time { return time.UnixMilli(wallMS) },
			Elapsed: func() time.Duration { return 0 },
			Boot:    func() (string, time.Duration) { return boot, time.Duration(sinceMS) * time.Millisecond },
			Synced:  func() bool { return synced },
		})
		if err != nil || c.Read().T <= 0 {
			t.Fatalf("%x goes on at %d, %v", b, c.Read().T, err)
		}
		if _, err := clock.ClockRowAgain(c.Row()); err != nil {
			t.Fatalf("%x: what it would store cannot be read: %v", b, err)
		}
	})
}

func FuzzBootRow(f *testing.F) {
	f.Add([]byte("\x01\xa2\x01\x61\x62\x02\x05"))
	f.Add([]byte("\x01\xa4\x01\x61\x62\x02\x05\x03\x1b\x00\x00\x01\x9a\xb6\x97\xe4\x18\x04\xf5"))
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := clock.BootRowAgain(b)
		if err != nil {
			return
		}
		twice, err := clock.BootRowAgain(again)
		if err != nil || !bytes.Equal(again, twice) {
			t.Fatalf("%x became %x, then %x, %v", b, again, twice, err)
		}
	})
}
