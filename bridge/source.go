package bridge

import "holdfast/spool"

// Source is what a bridge drains: a spool's consumer.
type Source interface {
	// Ready has a token after each change that may have made something readable.
	Ready() <-chan struct{}
	// Readers are the lanes', the system lane's first, then by priority. The reader of a lane's backlog follows that of its
	// newest messages.
	Readers() []Reader
	Close()
}

// Reader is one lane's reader; see spool.Reader.
type Reader interface {
	Lane() string
	// Urgent: no budget holds the lane up.
	Urgent() bool
	Share() int
	Backfill() int
	Next(maxBytes int) (spool.Run, error)
	Rewind()
	Resolve(end spool.Position, o spool.Outcome)
	Park(end spool.Position, record []byte, reason string) error
}
