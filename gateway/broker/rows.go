package broker

import (
	"encoding/binary"
	"errors"
	"fmt"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// The broker's rows. Integers are big-endian. Written to disk: never renumber, never reuse.
//
//	session       's' 1 | client id                            -> 2 | mqtt version (1) | expiry s (4) | era (8) | disconnected, Unix ms (8; 0: connected) | the same by the service clock (8) | principal
//	subscription  's' 2 | len (2) | client id | filter         -> 1 | options as in SUBSCRIBE (1) | identifier (4; 0: none)
//	packet id     'q' | len (2) | client id | era (8) | id (2) -> 1
//	retained      'r' | topic                                  -> 2 | received, by the service clock (8) | len (2) | client id | PUBLISH, MQTT 5
//	will          'w' | client id                              -> 2 | waits since, by the service clock (8) | delay s (4) | len (2) | client id | PUBLISH, MQTT 5
//
// Version 1 of the session has no time by the service clock, that of the others has Unix ms in its place: the retained message's
// when it was received, the will's when it is due. An instant of the wall clock is not believed here: the time of such a row begins anew.
//
// The era tells the incarnations of a session apart: packet ids of another era than the
// session row's are left over from one that was cleared, and are removed at start.
const (
	rowVersion      = 2
	keySession      = 1
	keySubscription = 2
)

var rowV1 = []byte{1}

// errNewer says that a row is left alone, because a newer version of Holdfast wrote it.
var errNewer = errors.New("written by a newer holdfast")

func checkVersion(value []byte, size int) error {
	switch {
	case len(value) > 0 && value[0] > rowVersion:
		return errNewer
	case len(value) < size || value[0] == 0:
		return fmt.Errorf("row of %d bytes is cut short", len(value))
	}
	return nil
}

type sessionRow struct {
	version       mqtt.Version
	expiry        uint32
	era           uint64
	disconnected  int64
	disconnectedT int64 // 0: connected, or not known
	who           string
}

func sessionKey(id string) []byte {
	return append([]byte{kv.PrefixSession, keySession}, id...)
}

func (r *sessionRow) encode() []byte {
	b := append(make([]byte, 0, 30+len(r.who)), rowVersion, byte(r.version))
	b = binary.BigEndian.AppendUint32(b, r.expiry)
	b = binary.BigEndian.AppendUint64(b, r.era)
	b = binary.BigEndian.AppendUint64(b, uint64(r.disconnected))
	b = binary.BigEndian.AppendUint64(b, uint64(r.disconnectedT))
	return append(b, r.who...)
}

func (r *sessionRow) decode(b []byte) error {
	if err := checkVersion(b, 22); err != nil {
		return err
	}
	r.version = mqtt.Version(b[1])
	r.expiry = binary.BigEndian.Uint32(b[2:])
	r.era = binary.BigEndian.Uint64(b[6:])
	r.disconnected = int64(binary.BigEndian.Uint64(b[14:]))
	rest := b[22:]
	if b[0] > 1 {
		if len(rest) < 8 {
			return fmt.Errorf("row of %d bytes is cut short", len(b))
		}
		r.disconnectedT = int64(binary.BigEndian.Uint64(rest))
		rest = rest[8:]
	}
	r.who = string(rest)
	return nil
}

func appendIDPart(b []byte, id string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(id)))
	return append(b, id...)
}

// cutIDPart takes what appendIDPart wrote off the front of b.
func cutIDPart(b []byte) (id string, rest []byte, err error) {
	if len(b) < 2 {
		return "", nil, errors.New("row is cut short")
	}
	n := int(binary.BigEndian.Uint16(b))
	if b = b[2:]; len(b) < n {
		return "", nil, errors.New("row is cut short")
	}
	return string(b[:n]), b[n:], nil
}

func subscriptionKey(id, filter string) []byte {
	return append(appendIDPart([]byte{kv.PrefixSession, keySubscription}, id), filter...)
}

func (s *subscription) encode() []byte {
	options := s.qos | s.retainHandling<<4
	if s.noLocal {
		options |= 4
	}
	if s.retainAsPublished {
		options |= 8
	}
	return binary.BigEndian.AppendUint32([]byte{1, options}, s.identifier)
}

func (s *subscription) decode(b []byte) error {
	if err := checkVersion(b, 6); err != nil {
		return err
	}
	s.qos, s.noLocal, s.retainAsPublished, s.retainHandling = b[1]&3, b[1]&4 != 0, b[1]&8 != 0, b[1]>>4&3
	s.identifier = binary.BigEndian.Uint32(b[2:])
	if s.qos > 2 {
		return errors.New("QoS 3")
	}
	return nil
}

func appendQoS2Key(b []byte, client string, era uint64, id uint16) []byte {
	b = appendIDPart(append(b, kv.PrefixQoS2), client)
	b = binary.BigEndian.AppendUint64(b, era)
	return binary.BigEndian.AppendUint16(b, id)
}

// encodeRetained makes the value of a retained message's row.
func encodeRetained(receivedT int64, m *message) []byte {
	b := make([]byte, 0, 16+len(m.device)+mqtt.PublishSize(mqtt.V5, &m.pub))
	return appendMessage(binary.BigEndian.AppendUint64(append(b, rowVersion), uint64(receivedT)), m)
}

// encodeWill makes the value of the row of a will that waits for its delay, in seconds.
func encodeWill(sinceT int64, delay uint32, m *message) []byte {
	b := make([]byte, 0, 20+len(m.device)+mqtt.PublishSize(mqtt.V5, &m.pub))
	b = binary.BigEndian.AppendUint64(append(b, rowVersion), uint64(sinceT))
	return appendMessage(binary.BigEndian.AppendUint32(b, delay), m)
}

func appendMessage(b []byte, m *message) []byte {
	p := m.pub
	p.QoS, p.Retain, p.ID = m.qos, m.retain, 1
	return mqtt.AppendPublish(appendIDPart(b, m.device), mqtt.V5, &p)
}

// decodeRetained reads a row. known: t is when the message was received; a row of version 1 does not tell.
func decodeRetained(b []byte) (m *message, t int64, known bool, err error) {
	if err := checkVersion(b, 11); err != nil {
		return nil, 0, false, err
	}
	m, err = cutMessage(b[9:])
	return m, int64(binary.BigEndian.Uint64(b[1:])), b[0] > 1, err
}

// decodeWill reads a row. known: the will has waited since t for a delay of so many seconds; a row of version 1 does not tell.
func decodeWill(b []byte) (m *message, t int64, delay uint32, known bool, err error) {
	if err := checkVersion(b, 11); err != nil {
		return nil, 0, 0, false, err
	}
	t = int64(binary.BigEndian.Uint64(b[1:]))
	if b[0] == 1 {
		m, err = cutMessage(b[9:])
		return m, t, 0, false, err
	}
	if len(b) < 15 {
		return nil, 0, 0, false, fmt.Errorf("row of %d bytes is cut short", len(b))
	}
	m, err = cutMessage(b[13:])
	return m, t, binary.BigEndian.Uint32(b[9:]), true, err
}

func cutMessage(b []byte) (*message, error) {
	device, frame, err := cutIDPart(b)
	if err != nil {
		return nil, err
	}
	var p mqtt.Publish
	if err := mqtt.ParsePublish(frame, mqtt.V5, &p); err != nil {
		return nil, err
	}
	return newMessage(device, p.Topic, &p, p.Retain), nil
}
