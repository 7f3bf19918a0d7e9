package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/devices"
	"holdfast/internal/audit"
	"holdfast/spool"
)

// Parts is what the API stands on. All of them are needed, except for Metrics.
type Parts struct {
	Source   Source
	Devices  Devices
	Commands Commands
	Lanes    Lanes
	Messages Messages
	Tokens   Tokens
	Events   *Events
	Backups  Backups
	Audit    Audit
	Control  Control
	Gatherer prometheus.Gatherer // what /metrics shows
	Log      *slog.Logger
	Metrics  prometheus.Registerer // takes the API's own metrics; nil: none
}

// Source tells how the gateway is. *gateway.Gateway is one.
type Source interface {
	// Ready is nil if the spool is open and every listener accepts.
	Ready() error
	Status() Status
	// History gives the points after since.
	History(since time.Time) History
}

// Devices keeps the devices; *devices.Registry is one. Errors are those of that package; any other one of a method that
// changes something means that it could not be stored.
type Devices interface {
	Add(ctx context.Context, d devices.NewDevice) (dev devices.Device, secret string, err error)
	Get(id string) (devices.Device, error)
	List(f devices.DeviceFilter) (page []devices.Device, next string, err error)
	Patch(ctx context.Context, id string, p devices.DevicePatch) (devices.Device, error)
	Remove(ctx context.Context, id string) error
	AddCredential(ctx context.Context, id string, c devices.NewCredential) (made devices.Credential, secret string, err error)
	RemoveCredential(ctx context.Context, id, credential string) error
}

// Commands keeps the commands; *devices.Queue is one. What it refuses is a *devices.Refusal.
type Commands interface {
	SubmitWait(ctx context.Context, r *devices.Request) (c devices.Command, repeat bool, err error)
	CancelWait(ctx context.Context, id, reason string) (devices.Command, error)
	Get(id string) (devices.Command, error)
	List(f devices.CommandFilter) (page []devices.Command, next uint64, err error)
}

// Lanes shows what is spooled, drops it, and replays what was parked; *spool.Spool is one.
type Lanes interface {
	Lanes() []spool.LaneStat
	// EpochOf tells the epoch in a message's id.
	EpochOf(lane string, seq uint64) (epoch string, first, end uint64)
	// Peek calls fn for up to limit messages of lane from sequence from on, and ends with fn's error. r is valid during
	// the call. spool.ErrNoLane.
	Peek(lane string, from uint64, limit int, fn func(seq uint64, r *spool.Record) error) error
	// Purge drops messages received before olderThan (zero: of any age) with a sequence up to upTo (0: all), from the oldest
	// on until the first that is to stay. spool.ErrNoLane.
	Purge(lane string, olderThan time.Time, upTo uint64) (spool.Count, error)
	// PurgeParked drops what upstream ("": any) has refused for good.
	PurgeParked(lane, upstream string) (spool.Count, error)
	// ParkedFrom calls fn for the messages that upstreams refused for good, from sequence seq of lane on, lane by lane and by
	// sequence, and ends with fn's error. spool.ErrNoLane.
	ParkedFrom(lane string, seq uint64, fn func(spool.ParkedMessage) error) error
	// Replay puts parked messages back into their lane for the upstream and returns how many. seqs nil: all. spool.ErrNoLane,
	// ErrNotWaiting, ErrFull; ErrRecord and ErrTooLarge about those that stay parked.
	Replay(lane, upstream string, seqs []uint64) (n int, err error)
	// Walk is Peek without a limit, which passes over what is damaged and tells it to damaged. spool.ErrNoLane.
	Walk(lane string, sel spool.Selection, fn func(seq uint64, r *spool.Record) error, damaged func(spool.Damage)) error
}

// Messages shows what devices publish.
type Messages interface {
	// Watch calls see for each message to a topic that filter matches, once it is on disk, until end is called. see must not wait for
	// anything, and may keep what it gets, which nobody changes. ErrFilter.
	Watch(filter string, see func(*Arrival)) (end func(), err error)
}

// ErrFilter is about a topic filter that is none. Texts that wrap it say why.
var ErrFilter = errors.New("wrong topic filter")

// Arrival is a message that devices published and that is on disk.
type Arrival struct {
	Device, Topic, ContentType string
	Payload                    []byte
	QoS                        byte
	Retain                     bool
	Received                   time.Time
}

// Backups makes copies of all that is stored; *gateway.Gateway does.
type Backups interface {
	// Backup makes one in a folder of its own. ErrBackupRuns.
	Backup() (*BackupCopy, error)
}

// Audit keeps who did what; it is an audit.Log. Many goroutines may call it.
type Audit interface {
	// Record returns when e is on disk.
	Record(e audit.Entry) error
	// List gives records, the newest first; next is Before for the following page, 0: there is none.
	List(f audit.Filter) (page []audit.Entry, next uint64, err error)
	// Head is the last record.
	Head() audit.Head
}

// Control changes how the gateway works; *gateway.Gateway does.
type Control interface {
	// ReloadFile reads the configuration file again and takes what may change. ErrConfig: nothing was changed.
	ReloadFile() (Reload, error)
	// ConfigDiff tells what ReloadFile would do, DiffText what it would do with this text in place of the file; name is its path, from
	// which relative paths go. ErrConfig.
	ConfigDiff() (Reload, error)
	DiffText(name string, text []byte) (Reload, error)
	LogLevel() string
	SetLogLevel(level string) error
	// DebugDevice has every line about a device logged for some time; 0 ends it. ErrDebug.
	DebugDevice(id string, d time.Duration) (until time.Time, err error)
	// DebugUntil tells how long that goes on; zero: it does not.
	DebugUntil(id string) time.Time
}

// Errors of Control. Texts that wrap them say what is wrong.
var (
	ErrConfig = errors.New("the configuration is not taken, nothing was changed")
	ErrDebug  = errors.New("debug log of a device")
)

// BackupCopy is a backup that somebody has to take over.
type BackupCopy struct {
	Info Backup
	Dir  string // holds backup.json and what Info.Files names
	// Close removes it, unless it is to be kept for somebody who moves it. Call it once.
	Close func(keep bool) error
}

// ErrBackupRuns is for a second backup at the same time.
var ErrBackupRuns = errors.New("another backup is being made")

// Tokens keeps who may use the API. Many goroutines may call it.
type Tokens interface {
	// Check tells whose token it is. It is called for each request and has to be cheap; ok is false for one that has expired.
	Check(token string) (name string, role Role, ok bool)
	// List gives them by name.
	List() []Token
	// Add makes one; secret is what the bearer shows, told this once. lifetime 0: it does not expire. name
	// is well formed. ErrTokenExists, ErrTooManyTokens.
	Add(name string, role Role, lifetime time.Duration) (made Token, secret string, err error)
	// Remove revokes one at once. ErrNoToken.
	Remove(name string) error
}

// Errors of Tokens. Texts that wrap them name the way out.
var (
	ErrTokenExists   = errors.New("there is a token of this name already")
	ErrTooManyTokens = errors.New("too many tokens")
	ErrNoToken       = errors.New("no such token")
)

// Token is one bearer token, as it is shown. The secret is not part of it.
type Token struct {
	Name    string    `json:"name"`
	Role    Role      `json:"role"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"` // zero: never
}

// Role is what a token's bearer may do; each may what the one before it may.
type Role uint8

// The roles. The zero value may nothing that is not open to everybody.
const (
	Viewer   Role = 1 // reads
	Operator Role = 2 // sends and cancels commands, enables, disables and debugs devices, purges lanes, replays parked messages
	Admin    Role = 3 // adds and removes devices, credentials and tokens, reads the audit log, reloads
)

var roleNames = [...]string{Viewer: "viewer", Operator: "operator", Admin: "admin"}

// String gives the role's name: "viewer".
func (r Role) String() string {
	if r == 0 || int(r) >= len(roleNames) {
		return "none"
	}
	return roleNames[r]
}

// MarshalText implements encoding.TextMarshaler.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Role) UnmarshalText(b []byte) error {
	for i, name := range roleNames {
		if name != "" && name == string(b) {
			*r = Role(i)
			return nil
		}
	}
	return fmt.Errorf("%q is no role: it is viewer, operator or admin", b)
}
