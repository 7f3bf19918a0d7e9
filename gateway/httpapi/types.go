package httpapi

import (
	"time"

	"holdfast/devices"
)

// Command is a command as the API shows it.
type Command struct {
	devices.Command
	TTL              string `json:"ttl"`               // "24h0m0s"
	ExecutionTimeout string `json:"execution_timeout"` // "5m0s"
	// Payload if it is text, else PayloadBase64; both only where one command is asked for. So with the result.
	Payload       *string `json:"payload,omitempty"`
	PayloadBase64 string  `json:"payload_base64,omitempty"`
	Result        *string `json:"result,omitempty"`
	ResultBase64  string  `json:"result_base64,omitempty"`
	ResultType    string  `json:"result_content_type,omitempty"`
}

// CommandPage answers GET /commands and GET /devices/{id}/commands, the newest first. Next is what to give as ?before= for the following page; "": none.
type CommandPage struct {
	Commands []Command `json:"commands"`
	Next     string    `json:"next,omitempty"`
}

// DevicePage answers GET /devices, by id. Next is what to give as ?after=.
type DevicePage struct {
	Devices []devices.Device `json:"devices"`
	Next    string           `json:"next,omitempty"`
}

// NewDevice is the body of POST /devices. Without credential the device gets a token.
type NewDevice struct {
	ID         string            `json:"id"`
	Name       string            `json:"name,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Role       string            `json:"role,omitempty"`
	Enabled    *bool             `json:"enabled,omitempty"` // default true
	Credential *NewCredential    `json:"credential,omitempty"`
}

// NewCredential is the body of POST /devices/{id}/credentials.
type NewCredential struct {
	Kind         string `json:"kind,omitempty"` // token (default), password, certificate; in NewDevice also none
	Password     string `json:"password,omitempty"`
	Fingerprint  string `json:"fingerprint,omitempty"`
	Lifetime     string `json:"lifetime,omitempty"`      // "720h"; default: it does not expire
	RetireOthers string `json:"retire_others,omitempty"` // the others expire after this overlap, "24h"; "0s": at once; default: they stay
}

// DevicePatch is the body of PATCH /devices/{id}; what is absent stays.
type DevicePatch struct {
	Name    *string           `json:"name,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Enabled *bool             `json:"enabled,omitempty"`
	Role    *string           `json:"role,omitempty"`
}

// DeviceMade answers POST /devices. Secret is shown this once.
type DeviceMade struct {
	Device devices.Device `json:"device"`
	Secret string         `json:"secret,omitempty"`
}

// CredentialMade answers POST /devices/{id}/credentials.
type CredentialMade struct {
	Credential devices.Credential `json:"credential"`
	Secret     string             `json:"secret,omitempty"`
}

// Event is one server-sent event: its JSON is the data field, ID the id field, Kind the event field.
type Event struct {
	ID      string    `json:"id"`   // {start}-{n}; n counts 1, 2, 3 … since the start
	Kind    string    `json:"kind"` // command, device, upstream, refusal, reset (some events are no longer there)
	At      time.Time `json:"at"`
	Command *Command  `json:"command,omitempty"`
	Device  *Presence `json:"device,omitempty"`
	// Previous is the state a command comes from.
	Previous string          `json:"previous,omitempty"`
	Refusal  *RefusalEvent   `json:"refusal,omitempty"`
	Upstream *UpstreamChange `json:"upstream,omitempty"`
}

// Presence tells that a device came or went.
type Presence struct {
	ID string `json:"id"`
	devices.Presence
}

// RefusalEvent tells of a command that was not taken.
type RefusalEvent struct {
	ID     string `json:"id,omitempty"`
	Device string `json:"device,omitempty"`
	Code   string `json:"code"`
	Reason string `json:"reason"`
}

// UpstreamChange tells that a link came up or went down.
type UpstreamChange struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	Error     string `json:"error,omitempty"`
}
