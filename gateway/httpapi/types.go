package httpapi

import (
	"bytes"
	"encoding/base64"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/devices"
	"holdfast/internal/audit"
	"holdfast/spool"
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

// NewCommand shows c; full with its payload and result.
func NewCommand(c *devices.Command, full bool) Command {
	v := Command{Command: *c, TTL: c.TTL.String(), ExecutionTimeout: c.ExecutionTimeout.String()}
	v.Command.Payload, v.Command.Result = nil, nil
	if full {
		v.Payload, v.PayloadBase64 = textOrBase64(c.Payload)
		v.Result, v.ResultBase64 = textOrBase64(c.Result)
		v.ResultType = c.ResultType
	}
	return v
}

// textOrBase64 gives b as text if it is text without control characters, else in base64; neither for nil.
func textOrBase64(b []byte) (text *string, base64Text string) {
	switch {
	case b == nil:
		return nil, ""
	case isText(b):
		s := string(b)
		return &s, ""
	default:
		return nil, base64.StdEncoding.EncodeToString(b)
	}
}

func isText(b []byte) bool {
	return utf8.Valid(b) && !bytes.ContainsFunc(b, func(r rune) bool {
		return unicode.IsControl(r) && r != '\n' && r != '\t' && r != '\r'
	})
}

// CommandPage answers GET /commands and GET /devices/{id}/commands, the newest first. Next is what to give as ?before=
// for the following page; "": none.
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
	ID         string            `json:"id" doc:"The MQTT client id it comes with."`
	Name       string            `json:"name,omitempty" doc:"For people."`
	Labels     map[string]string `json:"labels,omitempty"`
	Role       string            `json:"role,omitempty" doc:"What it may publish and subscribe to; default: device."`
	Enabled    *bool             `json:"enabled,omitempty" doc:"Default: true."`
	Credential *NewCredential    `json:"credential,omitempty"`
}

// NewCredential is the body of POST /devices/{id}/credentials.
type NewCredential struct {
	Kind         string `json:"kind,omitempty" enum:"token,password,certificate,none" doc:"Default: token, which is made here. none is for a new device that comes with a client certificate that names it."`
	Password     string `json:"password,omitempty" doc:"Kind password: at least 12 characters."`
	Fingerprint  string `json:"fingerprint,omitempty" doc:"Kind certificate: SHA-256 of its DER bytes, 64 hex digits, colons allowed."`
	Lifetime     string `json:"lifetime,omitempty" doc:"A duration such as 720h; default: it does not expire."`
	RetireOthers string `json:"retire_others,omitempty" doc:"The others expire after this overlap, such as 24h; 0s: at once; default: they stay. Not for a new device."`
}

// DevicePatch is the body of PATCH /devices/{id}; what is absent stays.
type DevicePatch struct {
	Name    *string           `json:"name,omitempty"`
	Labels  map[string]string `json:"labels,omitzero" doc:"Replaces all labels; {} removes them."`
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

// Message is a spooled message, as GET /lanes/{lane}/messages shows it.
type Message struct {
	Seq      uint64    `json:"seq"`
	ID       string    `json:"id"` // the message's id for ever: {gateway}/{epoch}/{lane}/{seq}
	Device   string    `json:"device"`
	Topic    string    `json:"topic"`
	Received time.Time `json:"received"`
	QoS      int       `json:"qos"`
	Retain   bool      `json:"retain,omitempty"`
	Will     bool      `json:"will,omitempty"`
	// Unsynced: the gateway's clock was not synchronised when it was received.
	Unsynced bool `json:"clock_unsynced,omitempty"`
	Content
}

// Content is what a message carries.
type Content struct {
	ContentType string `json:"content_type,omitempty"`
	Size        int    `json:"size"` // of the payload, bytes
	// Payload if it is text, else PayloadBase64; no more than its first 4 KiB, and Truncated says so.
	Payload       *string `json:"payload,omitempty"`
	PayloadBase64 string  `json:"payload_base64,omitempty"`
	// PayloadCBOR is CBOR as people read it (RFC 8949 §8), if the content type says that it is, or if it looks like a map or a list.
	PayloadCBOR string `json:"payload_cbor,omitempty"`
	Truncated   bool   `json:"truncated,omitempty"`
}

// LiveMessage is one that devices have just published and that is on disk: the data of an event message of GET /messages/live.
type LiveMessage struct {
	Device   string    `json:"device"`
	Topic    string    `json:"topic"`
	Received time.Time `json:"received"`
	QoS      int       `json:"qos"`
	Retain   bool      `json:"retain,omitempty"`
	// Missed is how many before this one were not shown, since more came than the stream takes.
	Missed uint64 `json:"missed,omitempty"`
	Content
}

// MessagePage answers GET /lanes/{lane}/messages, the oldest first. Next is what to give as ?after=; "": there are no more now.
type MessagePage struct {
	Messages []Message `json:"messages"`
	Next     string    `json:"next,omitempty"`
}

// Health answers GET /healthz and GET /readyz.
type Health struct {
	Status string `json:"status"` // alive, ready
}

// LaneList answers GET /lanes.
type LaneList struct {
	Lanes []spool.LaneStat `json:"lanes"`
}

// PurgeRequest is the body of POST /lanes/{lane}/purge.
type PurgeRequest struct {
	OlderThan string `json:"older_than,omitempty" doc:"Only messages received longer ago than this, such as 72h, or before this time (RFC 3339)."`
	UpTo      uint64 `json:"up_to,omitempty" doc:"Only messages up to this sequence number."`
	All       bool   `json:"all,omitempty" doc:"Every message of the lane; instead of the others."`
	Parked    bool   `json:"parked,omitempty" doc:"Instead of messages that wait: the copies of those that an upstream refused for good."`
	Upstream  string `json:"upstream,omitempty" doc:"With parked: only what this upstream refused."`
}

// Purged answers POST /lanes/{lane}/purge: what is gone.
type Purged struct {
	Lane   string      `json:"lane"`
	Purged spool.Count `json:"purged"`
}

// UpstreamList answers GET /upstreams.
type UpstreamList struct {
	Upstreams []Upstream `json:"upstreams"`
}

// ParkedMessage is one that an upstream refused for good.
type ParkedMessage struct {
	Lane     string    `json:"lane"`
	Upstream string    `json:"upstream"` // that refused it
	ParkedAt time.Time `json:"parked_at"`
	Reason   string    `json:"reason"`
	// Unreadable: nothing but size is known of the message itself, and it cannot be replayed.
	Unreadable bool `json:"unreadable,omitempty"`
	Message
}

// ParkedPage answers GET /parked. Next is what to give as ?after=.
type ParkedPage struct {
	Messages []ParkedMessage `json:"messages"`
	Next     string          `json:"next,omitempty"`
}

// ReplayRequest is the body of POST /parked/replay.
type ReplayRequest struct {
	Lane     string   `json:"lane"`
	Upstream string   `json:"upstream" doc:"That refused them."`
	Seqs     []uint64 `json:"seqs,omitempty" doc:"Their sequences; default: all that are parked."`
}

// Replayed answers POST /parked/replay.
type Replayed struct {
	Replayed int    `json:"replayed"`
	Problem  string `json:"problem,omitempty"` // why some stay parked
}

// AuditPage answers GET /audit, the newest first. Next is what to give as ?before=.
type AuditPage struct {
	Records []audit.Entry `json:"records"`
	Next    string        `json:"next,omitempty"`
	Head    audit.Head    `json:"head"`
}

// Reload answers POST /reload, and what asks what that would do.
type Reload struct {
	File     string         `json:"file"`     // "": there is none
	Changed  []ConfigChange `json:"changed"`  // taken at once
	Restart  []ConfigChange `json:"restart"`  // wait for a restart
	Warnings []string       `json:"warnings"` // of the file
}

// ConfigChange is a key that is different. Values are as in a file; "" where there is none.
type ConfigChange struct {
	Key  string `json:"key"` // spool.lanes[telemetry].max_bytes
	From string `json:"from"`
	To   string `json:"to"`
}

// Summary is what changed and what waits, in a line.
func (r *Reload) Summary() string {
	keys := func(changes []ConfigChange) string {
		var all []string
		for _, c := range changes {
			all = append(all, c.Key)
		}
		return strings.Join(all, " ")
	}
	s := "changed: " + keys(r.Changed)
	if len(r.Changed) == 0 {
		s = "nothing changed"
	}
	if len(r.Restart) > 0 {
		s += "; after a restart: " + keys(r.Restart)
	}
	return s
}

// ConfigFile is the body of POST /config/diff.
type ConfigFile struct {
	Name string `json:"name" doc:"Its path on the gateway's machine: relative paths in it go from its folder."`
	Text string `json:"text" doc:"YAML, as in the configuration file."`
}

// LogLevel answers GET /log and is the body of PUT /log.
type LogLevel struct {
	Level string `json:"level" enum:"debug,info,warn,error"`
}

// DebugRequest is the body of PUT /devices/{id}/debug.
type DebugRequest struct {
	For string `json:"for" doc:"How long, such as 10m, at most 24h; 0s: it ends now."`
}

// DeviceDebug answers GET and PUT /devices/{id}/debug.
type DeviceDebug struct {
	Device string    `json:"device"`
	Debug  bool      `json:"debug"` // every line about it is logged
	Until  time.Time `json:"until,omitzero"`
}

// TokenList answers GET /tokens, by name.
type TokenList struct {
	Tokens []Token `json:"tokens"`
}

// NewToken is the body of POST /tokens.
type NewToken struct {
	Name     string `json:"name"`
	Role     Role   `json:"role"`
	Lifetime string `json:"lifetime,omitempty" doc:"A duration such as 720h; default: it does not expire."`
}

// TokenMade answers POST /tokens. Secret is what the bearer shows; it is told this once.
type TokenMade struct {
	Token  Token  `json:"token"`
	Secret string `json:"secret"`
}

// CancelRequest is the body of DELETE /commands/{id}, which may be left out.
type CancelRequest struct {
	Reason string `json:"reason,omitempty"`
}

// Event is one server-sent event: its JSON is the data field, ID the id field, Kind the event field.
type Event struct {
	ID      string    `json:"id"`                                                      // {start}-{n}; n counts 1, 2, 3 … since the start
	Kind    string    `json:"kind" enum:"command,device,upstream,refusal,alarm,reset"` // reset: some events are no longer there
	At      time.Time `json:"at"`
	Command *Command  `json:"command,omitempty"`
	Device  *Presence `json:"device,omitempty"`
	// Previous is the state a command comes from.
	Previous string          `json:"previous,omitempty"`
	Refusal  *RefusalEvent   `json:"refusal,omitempty"`
	Upstream *UpstreamChange `json:"upstream,omitempty"`
	Alarm    *AlarmChange    `json:"alarm,omitempty"`
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

// NewBackup is the body of POST /backup, which may be left out.
type NewBackup struct {
	Keep bool  `json:"keep,omitempty" doc:"Leave the backup in the data folder, where path says, for the caller to move away at once; the next backup or start removes it."`
	Rate int64 `json:"bytes_per_second,omitempty" doc:"Send no more than that; default: 32 MiB."`
}

// Backup describes a backup: it is backup.json in it.
type Backup struct {
	Version  int          `json:"version"` // of this description
	ID       string       `json:"id"`
	Gateway  string       `json:"gateway,omitempty"` // "": it was not known
	Epoch    string       `json:"epoch"`
	Holdfast string       `json:"holdfast"` // the version that made it
	Time     time.Time    `json:"time"`
	Bytes    int64        `json:"bytes"` // of the files
	Lanes    []BackupLane `json:"lanes"`
	Files    []BackupFile `json:"files"`
}

// BackupLane is what a backup holds of a lane.
type BackupLane struct {
	Name string      `json:"lane"`
	Next uint64      `json:"next"` // the sequence of the next message, or one that came while the backup was made
	Kept spool.Count `json:"kept"` // messages, about
}

// BackupFile is a file of a backup.
type BackupFile struct {
	Name string `json:"name"` // with /
	Size int64  `json:"size"` // bytes
}

// BackupKept answers POST /backup with keep.
type BackupKept struct {
	Backup
	Path string `json:"path"` // on the gateway's machine
}
