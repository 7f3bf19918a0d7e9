package spool

import (
	"errors"
	"time"

	"holdfast/internal/kv"
)

// WhenFull says what a full lane does with the next message.
type WhenFull string

// The rules for a full lane.
const (
	DropOldest WhenFull = "drop_oldest"
	Reject     WhenFull = "reject"
)

// SystemLane carries what the gateway itself has to tell: gaps, command states. It is always
// there, is read first, and is not configured.
const SystemLane = "system"

// LaneConfig is one lane's limits.
type LaneConfig struct {
	Name     string        `yaml:"name"`
	Share    int           `yaml:"share"`     // percent of the link that the lane gets at least
	MaxBytes int64         `yaml:"max_bytes"` // record bytes kept; 0: no limit
	MaxAge   time.Duration `yaml:"max_age"`   // 0: no limit
	WhenFull WhenFull      `yaml:"when_full"`
}

// Errors of Append.
var (
	ErrFull     = errors.New("lane is full")
	ErrTooLarge = errors.New("message is larger than a chunk may be")
	ErrNoLane   = errors.New("no such lane")
)

// Lane is a lane's handle, stable while the process runs.
type Lane int

// LaneNone stores no record: the Append's Done comes in its place in the order of commits.
const LaneNone Lane = -1

// Position is a place in a lane: the next sequence to be read and how many record bytes lie before it.
type Position struct {
	Seq   uint64
	Bytes uint64
}

// Outcome is how a message's wait for an upstream ended.
type Outcome int

// The outcomes. What has none yet is pending.
const (
	Delivered Outcome = iota
	Expired
	Evicted
	Parked
)

// Count is a number of messages and their record bytes.
type Count struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

// Account is one upstream's ledger in one lane:
// Accepted = Delivered + Expired + Evicted + Parked + Pending, in messages and in bytes.
type Account struct {
	Upstream  string `json:"upstream"`
	Lane      string `json:"lane"`
	Accepted  Count  `json:"accepted"`
	Delivered Count  `json:"delivered"`
	Expired   Count  `json:"expired"`
	Evicted   Count  `json:"evicted"`
	Parked    Count  `json:"parked"`
	Pending   Count  `json:"pending"`
	OldestMS  int64  `json:"oldest_ms"` // receive time of the oldest pending message, Unix ms; 0: none pending
}

// Run is a stretch of records that follow each other without a hole.
// Raw is valid until the reader's next Next, Rewind or Close.
type Run struct {
	Pos   Position // of the first record
	Count int
	Raw   []byte // the records, back to back; see ParseRecord
}

var _ = kv.Op{}
