package broker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// The broker's rows. Integers are big-endian. Written to disk: never renumber, never reuse.
//
//	session       's' 1 | client id                            -> 1 | mqtt version (1) | expiry s (4) | era (8) | disconnected, Unix ms (8; 0: connected) | principal
//	subscription  's' 2 | len (2) | client id | filter         -> 1 | options as in SUBSCRIBE (1) | identifier (4; 0: none)
//	packet id     'q' | len (2) | client id | era (8) | id (2) -> 1
//	retained      'r' | topic                                  -> 1 | received, Unix ms (8) | len (2) | client id | PUBLISH, MQTT 5
//	will          'w' | client id                              -> 1 | due, Unix ms (8) | len (2) | client id | PUBLISH, MQTT 5
//
// The era tells the incarnations of a session apart: packet ids of another era than the
// session row's are left over from one that was cleared, and are removed at start.
const (
	rowVersion      = 1
	keySession      = 1
	keySubscription = 2
)

var rowV1 = []byte{rowVersion}

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
	version      mqtt.Version
	expiry       uint32
	era          uint64
	disconnected int64
	who          string
}

func sessionKey(id string) []byte {
	return append([]byte{kv.PrefixSession, keySession}, id...)
}

func (r *sessionRow) encode() []byte {
	b := append(make([]byte, 0, 22+len(r.who)), rowVersion, byte(r.version))
	b = binary.BigEndian.AppendUint32(b, r.expiry)
	b = binary.BigEndian.AppendUint64(b, r.era)
	b = binary.BigEndian.AppendUint64(b, uint64(r.disconnected))
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
	r.who = string(b[22:])
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
	return binary.BigEndian.AppendUint32([]byte{rowVersion, options}, s.identifier)
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

// encodeMessage makes the value of a retained message's or a will's row.
func encodeMessage(ms int64, m *message) []byte {
	p := m.pub
	p.QoS, p.Retain, p.ID = m.qos, m.retain, 1
	b := make([]byte, 0, 16+len(m.device)+mqtt.PublishSize(mqtt.V5, &p))
	b = append(b, rowVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(ms))
	return mqtt.AppendPublish(appendIDPart(b, m.device), mqtt.V5, &p)
}

func decodeMessage(b []byte) (ms int64, m *message, err error) {
	if err := checkVersion(b, 11); err != nil {
		return 0, nil, err
	}
	ms = int64(binary.BigEndian.Uint64(b[1:]))
	device, frame, err := cutIDPart(b[9:])
	if err != nil {
		return 0, nil, err
	}
	var p mqtt.Publish
	if err := mqtt.ParsePublish(frame, mqtt.V5, &p); err != nil {
		return 0, nil, err
	}
	m = newMessage(device, p.Topic, &p, p.Retain)
	m.at = time.UnixMilli(ms)
	return ms, m, nil
}
