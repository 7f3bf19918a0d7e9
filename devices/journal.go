package devices

import "holdfast/internal/kv"

// Journal makes rows durable, together with what the cloud is told of them. gateway implements it on the
// spool.
type Journal interface {
	// Commit hands in ops and, in the same batch, those of events that are for the cloud. done is called
	// once, with nil when all is on stable storage, from one goroutine and in the order of the calls; it
	// must be quick, must not block and must not call Commit. Events are shown to watchers after done has
	// returned, so that what they look at then is not older than what they were told. An error means that
	// nothing was taken and done will not be called. Commit may wait while the store is behind. It keeps
	// nothing of ops; what Events point to must not change any more.
	Commit(ops []kv.Op, events []Event, done func(error)) error
}

// Event is something that happened to a command or a device: one of the pointers is set.
type Event struct {
	Command  *Command        // its new state
	Previous State           // of the command; 0: it is new. The same as the new one: it tells progress
	Repeat   bool            // of the command: nothing has changed, it is told again to who submitted it again
	Device   *PresenceChange // a device came or went
	Refusal  *Refusal        // a command was not taken
	// Upstream says that the cloud is told; To names the one upstream that is, "" all.
	Upstream bool
	To       string
}
