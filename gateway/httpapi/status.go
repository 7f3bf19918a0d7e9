package httpapi

import (
	"time"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/spool"
)

// Status is GET /api/v1/status: one look at the whole gateway.
type Status struct {
	Version   string           `json:"version"`
	Gateway   string           `json:"gateway"`
	Epoch     string           `json:"epoch"` // of the spool; part of every message id
	DataDir   string           `json:"data_dir"`
	PID       int              `json:"pid"`
	StartedAt time.Time        `json:"started_at"`
	UptimeS   int64            `json:"uptime_s"`
	Ready     bool             `json:"ready"`
	NotReady  string           `json:"not_ready,omitempty"` // why
	ClockSync bool             `json:"clock_synced"`
	Clock     Clock            `json:"clock"`
	Store     Store            `json:"store"`
	Broker    Broker           `json:"broker"`
	Lanes     []spool.LaneStat `json:"lanes"`
	Upstreams []Upstream       `json:"upstreams"`
	Ledger    Ledger           `json:"ledger"`

	Devices      devices.Counts      `json:"devices"`
	Commands     devices.QueueCounts `json:"commands"`
	Certificates []Certificate       `json:"certificates"` // that listeners show; the first to expire first
	Alarms       []Alarm             `json:"alarms"`       // the critical ones first
}

// Severities of alarms.
const (
	Warning  = "warning"  // it may get worse
	Critical = "critical" // somebody has to act now, or something is lost already
)

// AlarmNames are all that there may be.
var AlarmNames = []string{
	"certificate_expiring", "clock_unsynced", "commands_unavailable", "disk_full", "disk_nearly_full", "lane_nearly_full", "ledger_unbalanced",
	"messages_lost", "messages_parked", "store_damaged", "upstream_down",
}

// Alarm is something that a person should look at, as long as it is so.
type Alarm struct {
	Name     string    `json:"name"`             // one of AlarmNames
	Object   string    `json:"object,omitempty"` // the upstream, lane or listener that it is about
	Severity string    `json:"severity" enum:"warning,critical"`
	Since    time.Time `json:"since"` // it was noticed
	Text     string    `json:"text"`  // what it is, and what to do
}

// AlarmChange tells that an alarm began or ended.
type AlarmChange struct {
	Alarm
	Active bool `json:"active"`
}

// HistoryPoint is what was done in the seconds before At.
type HistoryPoint struct {
	At        time.Time `json:"at"`
	Accepted  float64   `json:"accepted"`  // messages stored, a second
	Delivered float64   `json:"delivered"` // messages that upstreams acknowledged, a second
	// Of the acknowledgements to devices, a half and 99 % took no longer than this, in seconds; absent: none was given.
	AckP50 float64 `json:"ack_p50_s,omitempty"`
	AckP99 float64 `json:"ack_p99_s,omitempty"`
}

// History answers GET /history: the last hour, also that before a restart, the oldest first.
type History struct {
	EveryS int            `json:"every_s"` // seconds from point to point while the gateway runs
	Points []HistoryPoint `json:"points"`
}

// AlarmList answers GET /alarms.
type AlarmList struct {
	Alarms []Alarm `json:"alarms"`
}

// Clock is the machine's wall clock.
type Clock struct {
	State   string    `json:"state"`   // synced: the kernel says that something keeps it right; unsynced
	Since   time.Time `json:"since"`   // by the clock as it is now
	Wall    time.Time `json:"wall"`    // what it shows
	Doubt   bool      `json:"doubt"`   // it jumped although it was synchronised, and is not believed for ten minutes
	Settled bool      `json:"settled"` // false: it was set a moment ago, and what follows from that is to come
	Boot    uint32    `json:"boot"`    // number of this boot of the machine in the gateway's store
}

// Certificate is one that a listener shows.
type Certificate struct {
	Listener string    `json:"listener"`
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"not_after"`
}

// Ledger is where every message that was accepted is now.
type Ledger struct {
	// Balanced: accepted = delivered + expired + evicted + parked + pending in every account, in
	// messages and in bytes. False is a defect of Holdfast: please report it.
	Balanced bool            `json:"balanced"`
	Accounts []spool.Account `json:"accounts"`
}

// NewLedger holds accounts against themselves.
func NewLedger(accounts []spool.Account) Ledger {
	l := Ledger{Balanced: true, Accounts: accounts}
	if l.Accounts == nil {
		l.Accounts = []spool.Account{}
	}
	for i := range accounts {
		l.Balanced = l.Balanced && accounts[i].Balanced()
	}
	return l
}

// Store is what the gateway takes on disk.
type Store struct {
	Bytes     uint64 `json:"bytes"`
	FreeBytes uint64 `json:"free_bytes"` // of the file system; 0: not known
	// ReserveBytes is the reserve in effect, BallastBytes what of it is a file now.
	ReserveBytes int64     `json:"reserve_bytes"`
	BallastBytes int64     `json:"ballast_bytes"`
	Level        string    `json:"level" enum:"ok,high,full"` // how full the disk is
	Since        time.Time `json:"since,omitzero"`            // of the level
	// Damage is what was found damaged when the store was opened, and set aside.
	Damage []Damage `json:"damage,omitempty"`
	// LostMessages is how many acknowledged messages the end of a damaged log had at the start; upstreams are told which.
	LostMessages uint64 `json:"lost_messages"`
}

// Damage is what was damaged in one file of the store.
type Damage struct {
	At        time.Time `json:"at"`
	File      string    `json:"file"` // its name in the store
	What      string    `json:"what"`
	LostBytes int64     `json:"lost_bytes"` // could not be read
	Kept      int       `json:"kept"`       // rows, or commits of a log, that could
	From      string    `json:"from,omitempty"`
	To        string    `json:"to,omitempty"`
	SetAside  string    `json:"set_aside,omitempty"` // where the damaged file is now
}

// Upstream is one link to the cloud. Counters are since the process started.
type Upstream struct {
	Name      string    `json:"name"`
	URL       string    `json:"url"` // in use, or tried last
	Format    string    `json:"format"`
	State     string    `json:"state"` // connecting, connected, waiting, stopped
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"`                // of being connected, or of not being it
	RetryAt   time.Time `json:"retry_at,omitzero"`    // next attempt
	Attempts  int       `json:"attempts"`             // since the link was last healthy
	LastError string    `json:"last_error,omitempty"` // why the last link or attempt ended; stays after a reconnect
	LastAck   time.Time `json:"last_ack,omitzero"`
	InFlight  int       `json:"in_flight"` // sends without an outcome
	// Budget is absent where there is none.
	Budget *bridge.BudgetStatus `json:"budget,omitempty"`
	// Commands says whether commands come down from it now, CommandsError why not; both are absent if it is not to be
	// asked for any.
	Commands      *bool  `json:"commands,omitempty"`
	CommandsError string `json:"commands_error,omitempty"`

	Sends           uint64 `json:"sends"` // repeats included
	SentMessages    uint64 `json:"sent_messages"`
	SentBytes       uint64 `json:"sent_bytes"` // topics and payloads
	WireBytes       uint64 `json:"wire_bytes"` // what the network was given: MQTT, TLS, keep-alives, on all connections
	AckedMessages   uint64 `json:"acked_messages"`
	ExpiredMessages uint64 `json:"expired_messages"`
	ParkedMessages  uint64 `json:"parked_messages"`
}

// Broker is what the devices' side is doing at this moment.
type Broker struct {
	Listeners     []Listener `json:"listeners"`
	Connections   int        `json:"connections"` // open ones, those without a CONNECT included
	Sessions      int        `json:"sessions"`    // of connected and of offline clients
	Subscriptions int        `json:"subscriptions"`
	Retained      int        `json:"retained"` // messages
	RetainedBytes int        `json:"retained_bytes"`
}

// Listener is one address that devices connect to.
type Listener struct {
	Name     string `json:"name"`
	Protocol string `json:"protocol"`
	Address  string `json:"address"`
}
