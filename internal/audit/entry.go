package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"
)

// version stands in each line. Written to disk: never reuse.
const version = 1

// Entry is one act. It never holds a payload or a secret.
type Entry struct {
	Seq    uint64    `json:"seq"` // 1, 2, 3 …; Append gives it
	At     time.Time `json:"at"`  // Append gives it
	Who    string    `json:"who" doc:"The name of a token, or what it was that did it: a signal, the command line and its user, the gateway itself."`
	Role   string    `json:"role,omitempty"` // of the token
	From   string    `json:"from,omitempty" doc:"The address that it came from."`
	Act    string    `json:"act" doc:"An operation of this API, or start, stop, reload, restore, audit_healed, audit_missing, audit_rotated, wrong_tokens."`
	Object string    `json:"object,omitempty"` // what it was done to
	Result string    `json:"result" enum:"done,refused,failed,begun"`
	Status int       `json:"status,omitempty"` // of the HTTP answer
	Code   string    `json:"code,omitempty"`   // of a refusal
	Detail string    `json:"detail,omitempty"` // for people
	Missed uint64    `json:"missed,omitempty" doc:"So many acts before this one could not be written."`
}

// Results of an act.
const (
	Done    = "done"
	Refused = "refused" // by a rule: nothing was changed
	Failed  = "failed"  // it is not known whether all of it was done
	Begun   = "begun"   // its answer is long: it is noted before the first byte
)

// Acts that are no operation of the API.
const (
	Start    = "start"
	Stop     = "stop"
	Reload   = "reload"
	Restore  = "restore"
	healed   = "audit_healed"
	missing  = "audit_missing"
	rotated  = "audit_rotated"
	itself   = "gateway"
	maxText  = 512 // of a text in an entry, bytes
	hashSize = sha256.Size
)

// Head is the last record: whoever notes it elsewhere can tell later whether all that was there then still is.
type Head struct {
	Seq  uint64 `json:"seq"`  // 0: there is none
	Hash Hash   `json:"hash"` // of the record's line
}

// String is SEQ:HASH, as ParseHead reads it.
func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.Hash) }

// ParseHead reads what String wrote.
func ParseHead(s string) (h Head, err error) {
	seq, hash, ok := bytes.Cut([]byte(s), []byte(":"))
	if ok {
		_, err = fmt.Sscanf(string(seq), "%d", &h.Seq)
	}
	if ok && err == nil {
		err = h.Hash.UnmarshalText(hash)
	}
	if !ok || err != nil {
		return Head{}, fmt.Errorf("%.100q is no place in an audit log: it is SEQ:HASH, as holdfast audit verify prints it", s)
	}
	return h, nil
}

// Hash is that of a line. The zero value is the one before the first.
type Hash [hashSize]byte

// String gives 64 hex digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hash) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(h)) {
		return fmt.Errorf("%.80q is no hash: it has 64 hex digits", b)
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// line is an Entry as it is written, but for its own hash.
type line struct {
	V int `json:"v"`
	Entry
	Prev Hash `json:"prev"`
}

// What follows the bytes that the hash is made of.
const (
	hashKey = `,"hash":"`
	hashEnd = `"}`
	hashLen = len(hashKey) + 2*hashSize + len(hashEnd)
)

// encode gives the line of e, which follows prev, with its end.
func encode(e *Entry, prev Hash) ([]byte, Hash, error) {
	for _, s := range []*string{&e.Who, &e.Role, &e.From, &e.Act, &e.Object, &e.Result, &e.Code, &e.Detail} {
		*s = short(*s)
	}
	b, err := json.Marshal(line{version, *e, prev})
	if err != nil {
		return nil, Hash{}, err
	}
	b = b[:len(b)-1] // the brace
	h := Hash(sha256.Sum256(b))
	b = append(b, hashKey...)
	b = hex.AppendEncode(b, h[:])
	return append(append(b, hashEnd...), '\n'), h, nil
}

func short(s string) string {
	if len(s) <= maxText {
		return s
	}
	s = s[:maxText]
	for len(s) > 0 && !utf8.ValidString(s[max(0, len(s)-utf8.UTFMax):]) {
		s = s[:len(s)-1]
	}
	return s + "…"
}

// Why a line is none.
var (
	errTorn    = errors.New("is torn: it has no end, or holds bytes that were never written")
	errNoLine  = errors.New("is no record of an audit log")
	errNewer   = errors.New("was written by a newer holdfast: use that one")
	errChanged = errors.New("was changed: its hash is not that of what it says")
)

// decode reads a line without its end. With errChanged it gives what the line says all the same.
func decode(b []byte) (l line, h Hash, err error) {
	at := len(b) - hashLen
	switch {
	case bytes.IndexByte(b, 0) >= 0:
		return l, h, errTorn
	case at < 1 || !bytes.HasPrefix(b[at:], []byte(hashKey)) || !bytes.HasSuffix(b, []byte(hashEnd)):
		return l, h, errNoLine
	case h.UnmarshalText(b[at+len(hashKey):len(b)-len(hashEnd)]) != nil:
		return l, h, errNoLine
	}
	said := append(append(make([]byte, 0, at+1), b[:at]...), '}')
	if err := json.Unmarshal(said, &l); err != nil || l.Seq == 0 {
		return l, h, errNoLine
	}
	switch {
	case l.V > version:
		return l, h, errNewer
	case Hash(sha256.Sum256(b[:at])) != h:
		return l, h, errChanged
	}
	return l, h, nil
}
