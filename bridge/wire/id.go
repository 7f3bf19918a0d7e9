package wire

import (
	"fmt"
	"strconv"
	"strings"
)

// MessageID names one message for ever: a resend carries the same id, a replaced disk has a new
// epoch. Its text form is {gateway}/{epoch}/{lane}/{seq}.
type MessageID struct {
	Gateway string
	Epoch   string // UUIDv7, made when the spool was created
	Lane    string
	Seq     uint64 // 1, 2, 3 … per lane, without holes
}

// String is the id's text form.
func (id MessageID) String() string { return ID(id.Gateway, id.Epoch, id.Lane, id.Seq) }

// ID makes a message id's text form. Neither epoch nor lane contains a slash; the gateway may.
func ID(gateway, epoch, lane string, seq uint64) string {
	return string(AppendID(make([]byte, 0, len(gateway)+len(epoch)+len(lane)+23), gateway, epoch, lane, seq))
}

// AppendID appends what ID returns to dst.
func AppendID(dst []byte, gateway, epoch, lane string, seq uint64) []byte {
	dst = append(dst, gateway...)
	dst = append(dst, '/')
	dst = append(dst, epoch...)
	dst = append(dst, '/')
	dst = append(dst, lane...)
	dst = append(dst, '/')
	return strconv.AppendUint(dst, seq, 10)
}

// ParseID takes a message id apart. It reads from the right, so a gateway id may contain slashes.
func ParseID(id string) (MessageID, error) {
	rest, num, ok := cutLast(id)
	seq, err := strconv.ParseUint(num, 10, 64)
	// One spelling for each id: no sign, no leading zero, no sequence 0.
	if !ok || err != nil || num[0] < '1' || num[0] > '9' {
		return MessageID{}, fmt.Errorf("message id %.200q: %w: must end in /{sequence}", id, ErrFormat)
	}
	rest, lane, ok1 := cutLast(rest)
	gateway, epoch, ok2 := cutLast(rest)
	if !ok1 || !ok2 || gateway == "" || epoch == "" || lane == "" {
		return MessageID{}, fmt.Errorf("message id %.200q: %w: must be {gateway}/{epoch}/{lane}/{sequence}", id, ErrFormat)
	}
	return MessageID{Gateway: gateway, Epoch: epoch, Lane: lane, Seq: seq}, nil
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}
