package devices

import (
	"crypto/sha256"
	"fmt"
	"time"

	"holdfast/internal/kv"
)

// The registry's rows, see rowV1. Members that are zero are left out. Times are Unix ms.
//
//	counts     'v' 0       -> 1 registered, 2 disabled, 3 anonymous, 4 with a password; of devices
//	device     'v' 1 | id  -> 1 name, 2 labels (map), 3 flags (1 disabled, 2 anonymous), 4 role, 5 created, 6 updated,
//	                          7 credentials: array of
//	                            1 id, 2 kind (1 token, 2 password, 3 certificate), 3 created, 4 expires (0: never),
//	                            5 secret (32 bytes: SHA-256 of a token, argon2id of a password, SHA-256 of a certificate's DER),
//	                            of a password also 6 salt, 7 passes, 8 memory in KiB, 9 threads
//	presence   'v' 2 | id  -> 1 connected, 2 since, 3 last seen, 4 address, 5 protocol, 6 listener, 7 TLS, 8 topic of the will, 9 reason,
//	                          10 last message
//	connected  'v' 3 | id  -> nothing after the version byte
//
// A row "connected" is there as long as its device is: after a crash those that are left name the devices that the
// crash disconnected, and nobody has to look at the others. The counts are those of the device rows, written in the
// same batch, so that no start has to count.
//
// Written to disk: never renumber, never reuse.
const (
	rowCounts    = 0
	rowDevice    = 1
	rowPresence  = 2
	rowConnected = 3

	flagDisabled  = 1
	flagAnonymous = 2

	kindToken       = 1
	kindPassword    = 2
	kindCertificate = 3
)

var (
	countsKey    = []byte{kv.PrefixDevice, rowCounts}
	connectedRow = []byte{rowV1}
)

func deviceKey(id string) []byte    { return append([]byte{kv.PrefixDevice, rowDevice}, id...) }
func presenceKey(id string) []byte  { return append([]byte{kv.PrefixDevice, rowPresence}, id...) }
func connectedKey(id string) []byte { return append([]byte{kv.PrefixDevice, rowConnected}, id...) }

type countsCBOR struct {
	Registered int `cbor:"1,keyasint,omitempty"`
	Disabled   int `cbor:"2,keyasint,omitempty"`
	Anonymous  int `cbor:"3,keyasint,omitempty"`
	Passwords  int `cbor:"4,keyasint,omitempty"`
}

type deviceCBOR struct {
	Name        string            `cbor:"1,keyasint,omitempty"`
	Labels      map[string]string `cbor:"2,keyasint,omitempty"`
	Flags       uint64            `cbor:"3,keyasint,omitempty"`
	Role        string            `cbor:"4,keyasint,omitempty"`
	Created     int64             `cbor:"5,keyasint,omitempty"`
	Updated     int64             `cbor:"6,keyasint,omitempty"`
	Credentials []credentialCBOR  `cbor:"7,keyasint,omitempty"`
}

type credentialCBOR struct {
	ID      string `cbor:"1,keyasint,omitempty"`
	Kind    uint64 `cbor:"2,keyasint,omitempty"`
	Created int64  `cbor:"3,keyasint,omitempty"`
	Expires int64  `cbor:"4,keyasint,omitempty"`
	Secret  []byte `cbor:"5,keyasint,omitempty"`
	Salt    []byte `cbor:"6,keyasint,omitempty"`
	Passes  uint32 `cbor:"7,keyasint,omitempty"`
	Memory  uint32 `cbor:"8,keyasint,omitempty"`
	Threads uint8  `cbor:"9,keyasint,omitempty"`
}

type presenceCBOR struct {
	Connected bool   `cbor:"1,keyasint,omitempty"`
	Since     int64  `cbor:"2,keyasint,omitempty"`
	LastSeen  int64  `cbor:"3,keyasint,omitempty"`
	Address   string `cbor:"4,keyasint,omitempty"`
	Protocol  string `cbor:"5,keyasint,omitempty"`
	Listener  string `cbor:"6,keyasint,omitempty"`
	TLS       bool   `cbor:"7,keyasint,omitempty"`
	Will      string `cbor:"8,keyasint,omitempty"`
	Reason    string `cbor:"9,keyasint,omitempty"`

	LastMessage int64 `cbor:"10,keyasint,omitempty"`
}

// millis and fromMillis keep the zero time.
func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func (c counts) encode() []byte {
	return encodeRow(countsCBOR{c.registered, c.disabled, c.anonymous, c.passwords})
}

func decodeCounts(b []byte) (counts, error) {
	var v countsCBOR
	if err := decodeRow(b, &v); err != nil {
		return counts{}, err
	}
	if min(v.Registered, v.Disabled, v.Anonymous, v.Passwords) < 0 {
		return counts{}, fmt.Errorf("%w: a count is negative", errDamaged)
	}
	return counts{v.Registered, v.Disabled, v.Anonymous, v.Passwords}, nil
}

func (d *device) encode() []byte {
	v := deviceCBOR{Name: d.name, Labels: d.labels, Role: d.role, Created: millis(d.created), Updated: millis(d.updated)}
	if !d.enabled {
		v.Flags |= flagDisabled
	}
	if d.anonymous {
		v.Flags |= flagAnonymous
	}
	for _, c := range d.credentials {
		v.Credentials = append(v.Credentials, credentialCBOR{
			ID: c.id, Kind: c.kind, Created: millis(c.created), Expires: millis(c.expires), Secret: c.secret,
			Salt: c.salt, Passes: c.cost.passes, Memory: c.cost.memory, Threads: c.cost.threads,
		})
	}
	return encodeRow(v)
}

func decodeDevice(id string, b []byte) (*device, error) {
	var v deviceCBOR
	if err := decodeRow(b, &v); err != nil {
		return nil, err
	}
	d := &device{
		id: id, name: v.Name, labels: v.Labels, enabled: v.Flags&flagDisabled == 0, anonymous: v.Flags&flagAnonymous != 0,
		role: v.Role, created: fromMillis(v.Created), updated: fromMillis(v.Updated),
	}
	for i := range v.Credentials {
		c := &v.Credentials[i]
		cost := argonCost{c.Passes, c.Memory, c.Threads}
		switch {
		case c.Kind > kindCertificate: // a newer kind: kept, accepted by nothing here
		case c.Kind == 0 || len(c.Secret) != sha256.Size:
			return nil, fmt.Errorf("%w: credential %q of kind %d has %d bytes", errDamaged, c.ID, c.Kind, len(c.Secret))
		case c.Kind == kindPassword && (len(c.Salt) == 0 || !cost.sane()):
			return nil, fmt.Errorf("%w: credential %q has salt or cost that no holdfast wrote", errDamaged, c.ID)
		}
		d.credentials = append(d.credentials, &credential{
			id: c.ID, kind: c.Kind, created: fromMillis(c.Created), expires: fromMillis(c.Expires), secret: c.Secret,
			salt: c.Salt, cost: cost,
		})
	}
	return d, nil
}

func encodePresence(p *Presence) []byte {
	return encodeRow(presenceCBOR{
		Connected: p.Connected, Since: millis(p.Since), LastSeen: millis(p.LastSeen), Address: p.Address, Protocol: p.Protocol,
		Listener: p.Listener, TLS: p.TLS, Will: p.Will, Reason: p.Reason, LastMessage: millis(p.LastMessage),
	})
}

func decodePresence(b []byte) (Presence, error) {
	var v presenceCBOR
	if err := decodeRow(b, &v); err != nil {
		return Presence{}, err
	}
	return Presence{
		Connected: v.Connected, Since: fromMillis(v.Since), LastSeen: fromMillis(v.LastSeen), Address: v.Address,
		Protocol: v.Protocol, Listener: v.Listener, TLS: v.TLS, Will: v.Will, Reason: v.Reason, LastMessage: fromMillis(v.LastMessage),
	}, nil
}
