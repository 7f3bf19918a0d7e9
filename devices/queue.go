package devices

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/kv"
)

// QueueConfig of a Queue. Zero values mean the default named at each field.
type QueueConfig struct {
	Journal Journal
	// Known says whether a device may get commands; see Registry.Known.
	Known      func(device string) error
	Window     int           // commands of one device that are under way at once; 1. One urgent one more is.
	AckTimeout time.Duration // from SENT to the device's PUBACK; 30 s
	MaxPending int           // of all devices together; 200,000
	History    time.Duration // how long a command is kept after its end; 7 days
	MaxHistory int           // and how many; 100,000
	Log        *slog.Logger
	Metrics    prometheus.Registerer // nil: none
	Clock      ClockSource
}

// ClockSource is where time comes from; nil functions are the system's.
type ClockSource struct {
	Now func() time.Time // wall clock with Go's monotonic reading
	// Boot gives the id of this boot of the machine and the time since it, which counts while the machine sleeps.
	Boot func() (id string, since time.Duration)
	// Synced says whether the wall clock is known to be right.
	Synced func() bool
}

// Queue of commands. All methods may be called from many goroutines.
type Queue struct{}

// OpenQueue opens the queue in store. It reads a row for each command that has no end yet.
func OpenQueue(store *kv.Store, cfg QueueConfig) (*Queue, error) { panic("not built") }

// Run puts what a crash left in SENT back to QUEUED, keeps the time-outs, and removes old history, until ctx ends.
func (q *Queue) Run(ctx context.Context) error { panic("not built") }

// Submit takes a command. done is called once, when it is on stable storage, with the command and whether it is a repeat of one that was
// taken before; from another goroutine, and it must not block. A *Refusal as the error: it was not taken, and an event says so if r.Upstream is set; then done is not called.
// A repeat has its state told to r.Upstream again.
func (q *Queue) Submit(r *Request, done func(c Command, repeat bool, err error)) error {
	panic("not built")
}

// SubmitWait is Submit and waits.
func (q *Queue) SubmitWait(ctx context.Context, r *Request) (c Command, repeat bool, err error) {
	panic("not built")
}

// Refuse tells an upstream that what it sent is no command. done is called when that is on stable storage.
func (q *Queue) Refuse(r *Refusal, upstream string, done func(error)) error { panic("not built") }

// Cancel calls a command off: for sure while it is QUEUED, else as far as the device has not finished. upstream is who asks, "" for none.
// done as in Submit.
func (q *Queue) Cancel(id, reason, upstream string, done func(c Command, err error)) error {
	panic("not built")
}

// CancelWait is Cancel and waits.
func (q *Queue) CancelWait(ctx context.Context, id, reason string) (Command, error) {
	panic("not built")
}

// Get returns a command with payload, result and history.
func (q *Queue) Get(id string) (Command, error) { panic("not built") }

// CommandFilter chooses commands.
type CommandFilter struct {
	Device string
	States []State // none: all
	Before uint64  // only those submitted before this cursor; 0: from the newest
	Limit  int     // at most; 0: 100
}

// List returns commands, the newest first, without payload, result and history. next is what to give as Before for the following page; 0: that was the last.
func (q *Queue) List(f CommandFilter) (page []Command, next uint64, err error) { panic("not built") }

// Remove drops all commands of a device that was removed: those without an end are CANCELED.
func (q *Queue) Remove(device string) { panic("not built") }

// Ready says that a device is connected over l and has its session, and perhaps new subscriptions. Called again for each SUBACK.
func (q *Queue) Ready(device string, l Link) { panic("not built") }

// Gone says that l has ended.
func (q *Queue) Gone(device string, l Link) { panic("not built") }

// Acked says that the device acknowledged the delivery token on l. refused is the reason of a PUBACK that says no (MQTT 5), "" else.
func (q *Queue) Acked(device string, l Link, token uint64, refused string) { panic("not built") }

// Answer takes what a device says of a command, together with ops: rows that are committed in the same batch. done as kv.Done's. An error that
// wraps ErrAnswer: the answer is not believed and ops were not taken.
func (q *Queue) Answer(device, id string, kind AnswerKind, payload []byte, contentType string, ops []kv.Op, done kv.Done, token uint64) error {
	panic("not built")
}

// QueueCounts are commands without an end, by state, and totals since the process started.
type QueueCounts struct {
	Queued      int    `json:"queued"`
	Sent        int    `json:"sent"`
	Delivered   int    `json:"delivered"`
	InProgress  int    `json:"in_progress"`
	Submitted   uint64 `json:"submitted"`
	Succeeded   uint64 `json:"succeeded"`
	Failed      uint64 `json:"failed"` // every end that is not a success
	Refused     uint64 `json:"refused"`
	Disbelieved uint64 `json:"disbelieved"` // answers
}

// Counts at this moment. Cheap.
func (q *Queue) Counts() QueueCounts { panic("not built") }
