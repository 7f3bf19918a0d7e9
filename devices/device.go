package devices

import (
	"crypto/x509"
	"net/netip"
	"time"
)

// Device is one registered device, as it is shown. Secrets are not part of it.
type Device struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Enabled     bool              `json:"enabled"`
	Role        string            `json:"role"`
	Anonymous   bool              `json:"anonymous,omitempty"` // it came by itself, under devices.anonymous, and has no credentials
	Created     time.Time         `json:"created"`
	Updated     time.Time         `json:"updated"`
	Credentials []Credential      `json:"credentials"`
	Presence    Presence          `json:"presence"`
}

// Kinds of a Credential.
//
// A Credential of another kind comes from a newer holdfast and lets nobody in.
const (
	CredentialToken       = "token"       // made here: 256 random bits, stored as SHA-256
	CredentialPassword    = "password"    // chosen by a person: stored as argon2id
	CredentialCertificate = "certificate" // pins a client certificate by its fingerprint
)

// Credential is one way in. A device has several while they are rotated.
type Credential struct {
	ID          string    `json:"id"` // made here
	Kind        string    `json:"kind"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires,omitzero"`      // zero: never
	Fingerprint string    `json:"fingerprint,omitempty"` // certificate: SHA-256 of the DER bytes, hex
}

// NewCredential asks for one. Kind token, or "", needs nothing else; the others need Secret or Fingerprint.
type NewCredential struct {
	Kind        string
	Password    string // password: at least 12 characters
	Fingerprint string // certificate: 64 hex digits, colons allowed
	// Lifetime is how long it is valid; 0: for ever.
	Lifetime time.Duration
	// RetireOthers lets the device's other credentials expire after this overlap; 0: at once; negative: they stay.
	RetireOthers time.Duration
}

// NewDevice asks for a device. Without Credential it gets a token.
type NewDevice struct {
	ID         string
	Name       string
	Labels     map[string]string
	Role       string // "": DefaultRole
	Disabled   bool
	Credential *NewCredential
	// NoCredential registers it with none: it may connect with a client certificate that names it.
	NoCredential bool
}

// DevicePatch changes what is not nil.
type DevicePatch struct {
	Name    *string
	Labels  map[string]string // replaces all; nil: unchanged
	Enabled *bool
	Role    *string
}

// Presence is whether a device is there.
type Presence struct {
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"`     // of being connected or not
	LastSeen  time.Time `json:"last_seen,omitzero"` // when a packet of it came last; zero: never
	Address   string    `json:"address,omitempty"`  // of its connection, or of the last one
	Protocol  string    `json:"protocol,omitempty"` // "MQTT 3.1.1", "MQTT 5"
	Listener  string    `json:"listener,omitempty"`
	TLS       bool      `json:"tls,omitempty"`
	Will      string    `json:"will,omitempty"`   // the topic of its will
	Reason    string    `json:"reason,omitempty"` // why it is not connected
	// LastMessage is when a message of it was taken last, on this connection or a former one; zero: never. What came on a connection
	// that a crash of the gateway has ended is forgotten.
	LastMessage time.Time `json:"last_message,omitzero"`
}

// PresenceChange is told upstream when a device comes or goes.
type PresenceChange struct {
	Device   string
	Presence Presence
}

// Connection describes how a device connected.
type Connection struct {
	Address  string // host:port
	Protocol string
	Listener string
	TLS      bool
	Will     string
	// Alive says whether the connection has not ended. It has at the latest when a newer one of the device is Connected.
	// nil: it has not.
	Alive func() bool
	// LastMessage is when a message that came on the connection was taken last; zero: never. nil: it is not known.
	LastMessage func() time.Time
	// Identity is what Authenticate returned for this connection: it says which credential let it in, so that the
	// connection ends with the credential. nil: not known, and then it ends with the device only.
	Identity *Identity
}

// Attempt is what a client shows to be let in.
type Attempt struct {
	Device      string // the client id: who it says it is
	Username    string
	HasUsername bool
	Password    []byte            // valid during the call
	Certificate *x509.Certificate // the verified leaf; nil: none
	Address     netip.Addr
}

// Limits of one device; 0: no limit.
type Limits struct {
	ConnectsPerMinute int   `yaml:"connects_per_minute"`
	MessagesPerSecond int   `yaml:"messages_per_second"`
	BytesPerSecond    int64 `yaml:"bytes_per_second"`
}

// Role says what its devices may do. In the patterns, which are MQTT topic filters, a level that is
// {device} stands for the device's own id.
type Role struct {
	Name      string   `yaml:"name"`
	Publish   []string `yaml:"publish"`
	Subscribe []string `yaml:"subscribe"`
	Limits    Limits   `yaml:"limits"`
}

// Names of the roles that are always there; a configured role of the same name replaces one.
const (
	DefaultRole   = "device"
	AnonymousRole = "anonymous"
	MonitorRole   = "monitor" // sees everything, says nothing
)
