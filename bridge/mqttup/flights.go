package mqttup

import (
	"errors"
	"sync"

	"holdfast/bridge"
)

// Packet ids. paho gives out its own from 1 up and, for a birth, a death and a subscription, never gets
// near firstID.
const (
	firstID = 256
	ids     = 1<<16 - firstID
)

var errNoID = errors.New("more messages in flight than MQTT has packet ids")

// flights are the sends of one connection that wait for a PUBACK. Ids follow each other, so a send is found by
// its distance from the oldest one. Any goroutine may use it.
type flights struct {
	mu         sync.Mutex
	ring       []flight // a power of two long; the send number n is at n modulo its length
	head, tail uint64   // numbers of the oldest that waits, and of the next
}

type flight struct {
	token  uint64
	landed bool
}

// start gives a send its packet id.
func (f *flights) start(token uint64) (id uint16, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.tail - f.head
	if n == ids {
		return 0, errNoID
	}
	if int(n) == len(f.ring) {
		ring := make([]flight, max(64, 2*len(f.ring)))
		for i := f.head; i < f.tail; i++ {
			ring[i&uint64(len(ring)-1)] = f.ring[i&uint64(len(f.ring)-1)]
		}
		f.ring = ring
	}
	f.ring[f.tail&uint64(len(f.ring)-1)] = flight{token: token}
	id = uint16(firstID + f.tail%ids)
	f.tail++
	return id, nil
}

// land ends the send with this id, which is at least firstID, and returns its token. A second time it is
// not known.
func (f *flights) land(id uint16) (token uint64, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	distance := (uint64(id-firstID) + ids - f.head%ids) % ids
	if distance >= f.tail-f.head {
		return 0, false
	}
	s := &f.ring[(f.head+distance)&uint64(len(f.ring)-1)]
	if s.landed {
		return 0, false
	}
	s.landed = true
	token = s.token
	for f.head < f.tail && f.ring[f.head&uint64(len(f.ring)-1)].landed {
		f.head++
	}
	return token, true
}

// appendPublish appends a PUBLISH with QoS 1 (MQTT 3.1.1 §3.3).
func appendPublish(dst []byte, id uint16, m *bridge.Message) []byte {
	first := byte(0x32)
	if m.Retain {
		first |= 1
	}
	dst = appendLength(append(dst, first), 2+len(m.Topic)+2+len(m.Payload))
	dst = append(dst, byte(len(m.Topic)>>8), byte(len(m.Topic)))
	dst = append(dst, m.Topic...)
	dst = append(dst, byte(id>>8), byte(id))
	return append(dst, m.Payload...)
}

// appendLength appends a remaining length (MQTT 3.1.1 §2.2.3).
func appendLength(dst []byte, length int) []byte {
	for ; length > 0x7f; length >>= 7 {
		dst = append(dst, byte(length)|0x80)
	}
	return append(dst, byte(length))
}
