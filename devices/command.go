package devices

import (
	"errors"
	"time"
)

// State of a command (docs/commands.md draws the moves between them).
// Written to disk: never renumber, never reuse.
type State uint8

// The states.
const (
	Queued       State = 1  // stored; waits for its device
	Sent         State = 2  // a PUBLISH of it is written, or about to be
	Delivered    State = 3  // the device acknowledged that; the end of a one-way command
	InProgress   State = 4  // the device said that it has begun
	Succeeded    State = 5  // the device said so
	Failed       State = 6  // the device said so
	Rejected     State = 7  // the device will not do it
	Expired      State = 8  // its time to live was over before it was delivered
	TimedOut     State = 9  // no outcome came in time; a late one replaces this
	Canceled     State = 10 // called off
	Superseded   State = 11 // a newer one with the same key took its place
	DeadLettered State = 12 // given up: sent MaxAttempts times and never acknowledged
)

var stateNames = [...]string{
	Queued: "QUEUED", Sent: "SENT", Delivered: "DELIVERED", InProgress: "IN_PROGRESS", Succeeded: "SUCCEEDED",
	Failed: "FAILED", Rejected: "REJECTED", Expired: "EXPIRED", TimedOut: "TIMED_OUT", Canceled: "CANCELED",
	Superseded: "SUPERSEDED", DeadLettered: "DEAD_LETTERED",
}

// String gives the state's name as it is written everywhere: "QUEUED", "IN_PROGRESS".
func (s State) String() string {
	if s == 0 || int(s) >= len(stateNames) {
		return "UNKNOWN"
	}
	return stateNames[s]
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) error {
	for i, name := range stateNames {
		if name != "" && name == string(b) {
			*s = State(i)
			return nil
		}
	}
	return errors.New("no such command state")
}

// Outcome says whether the device gave the end of the command itself: one of those stands for ever.
func (s State) Outcome() bool { return s == Succeeded || s == Failed || s == Rejected }

// Feedback says what of a command's way is told upstream. Watchers on the box see everything.
type Feedback string

// The levels.
const (
	FeedbackNone     Feedback = "none"     // nothing, but a refusal
	FeedbackNegative Feedback = "negative" // ends that are not a success
	FeedbackPositive Feedback = "positive" // ends that are a success
	FeedbackFull     Feedback = "full"     // every step; the default
)

// Limits of commands (DESIGN section 6).
const (
	MaxCommandPayload   = 64 << 10
	MaxPendingPerDevice = 256 // commands of one device that have no end yet
	DefaultTTL          = 24 * time.Hour
	MaxTTL              = 30 * 24 * time.Hour
	DefaultExecution    = 5 * time.Minute
	DefaultMaxAttempts  = 10
	MaxAttempts         = 1000
	MaxExecution        = 30 * 24 * time.Hour
	MaxCommandID        = 128 // bytes
	MaxCommandName      = 128
	MaxSupersedeKey     = 128
	MaxContentType      = 128
	MaxResult           = 64 << 10 // of what comes with an outcome; of a larger one only the outcome is kept
	MaxProgressText     = 256
)

// Request asks for a command. Only Device and Name have to be there.
type Request struct {
	ID               string // "": one is made, and a repeat is another command
	Device           string
	Name             string // one topic level
	Payload          []byte
	ContentType      string
	TTL              time.Duration // until it has to be delivered; 0: DefaultTTL
	NotBefore        time.Time     // zero: at once
	ExecutionTimeout time.Duration // from delivered to an outcome; 0: DefaultExecution
	MaxAttempts      int           // 0: DefaultMaxAttempts
	OneWay           bool          // delivered is its end
	Urgent           bool
	SupersedeKey     string
	Feedback         Feedback // "": full
	Source           string   // who asks: "api", "upstream cloud"
	// Upstream is the one that asked; refusals and repeats are answered to it alone. "": none.
	Upstream string
}

// Command is one command at one moment. A value that was handed out does not change any more.
type Command struct {
	ID               string        `json:"id"`
	Device           string        `json:"device"`
	Name             string        `json:"name"`
	State            State         `json:"state"`
	Late             bool          `json:"late,omitempty"`     // the outcome came after the command had ended otherwise
	Attempts         int           `json:"attempts"`           // how often it was sent
	Reason           string        `json:"reason,omitempty"`   // why it is in this state
	Progress         *Progress     `json:"progress,omitempty"` // the last that the device told
	Result           []byte        `json:"-"`                  // what came with the outcome
	ResultType       string        `json:"-"`
	Created          time.Time     `json:"created"` // wall clock
	Updated          time.Time     `json:"updated"` // of the last change of state
	Expires          time.Time     `json:"expires"` // by the wall clock of Updated; the TTL itself does not follow that clock
	NotBefore        time.Time     `json:"not_before,omitzero"`
	TTL              time.Duration `json:"-"`
	ExecutionTimeout time.Duration `json:"-"`
	MaxAttempts      int           `json:"max_attempts"`
	OneWay           bool          `json:"one_way,omitempty"`
	Urgent           bool          `json:"urgent,omitempty"`
	SupersedeKey     string        `json:"supersede_key,omitempty"`
	Feedback         Feedback      `json:"feedback"`
	Source           string        `json:"source,omitempty"`
	Upstream         string        `json:"-"`
	Payload          []byte        `json:"-"`
	ContentType      string        `json:"content_type,omitempty"`
	// History has each change of state so far, the oldest first; of more than 32 the first and the last ones. Only
	// Queue.Get fills it.
	History []Step `json:"history,omitempty"`
}

// Ended says whether nothing more is to happen but, perhaps, a late outcome.
func (c *Command) Ended() bool {
	return c.State >= Succeeded || c.State == Delivered && c.OneWay
}

// Progress is what a device tells of a command that it executes.
type Progress struct {
	Percent int    `json:"percent"` // 0 to 100; -1: not told
	Text    string `json:"text,omitempty"`
}

// Step is one change of state.
type Step struct {
	State  State     `json:"state"`
	At     time.Time `json:"at"`
	Reason string    `json:"reason,omitempty"`
}

// Refusal is a command that was not taken.
type Refusal struct {
	ID, Device string // as far as they are known
	Code       string // one of the codes below
	Reason     string // for people; names the way out
	At         time.Time
}

// Codes of refusals, as they are told upstream and by the API.
const (
	CodeUnknownDevice = "unknown_device"
	CodeDisabled      = "device_disabled"
	CodeInvalid       = "invalid_command"
	CodeTooLarge      = "payload_too_large"
	CodeQueueFull     = "queue_full"
	CodeExpired       = "expired"
	CodeConflict      = "conflict"
	CodeUnknown       = "unknown_command"
	CodeEnded         = "already_ended" // cancel came too late
	CodeUnavailable   = "unavailable"
)

// Error implements error: Submit and Cancel tell a *Refusal where they refuse.
func (r *Refusal) Error() string { return r.Reason }

// AnswerKind is what a device says of a command: the last level of cmd/{device}/res/{id}/…
type AnswerKind string

// The kinds.
const (
	AnswerAccepted  AnswerKind = "accepted"
	AnswerProgress  AnswerKind = "progress"
	AnswerSucceeded AnswerKind = "succeeded"
	AnswerFailed    AnswerKind = "failed"
	AnswerRejected  AnswerKind = "rejected"
)
