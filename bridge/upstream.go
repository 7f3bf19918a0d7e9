package bridge

import (
	"context"
	"errors"
)

// Message is one send: a device's message, or a batch of them.
type Message struct {
	// Token comes back with the ack. No two sends of a Bridge have the same.
	Token uint64
	Topic string
	// Payload may be read until the send is acked or the session has ended, and is never written to.
	Payload []byte
	Retain  bool
	// Urgent: it is of a lane that no budget holds up.
	Urgent bool
	// Lane, Seq and Count name the records: Count of them from sequence Seq. An upstream that drops
	// duplicates by itself gets the first one's wire.ID in its own field for that.
	Lane  string
	Seq   uint64
	Count int
}

// Acks takes the acks of a session: once for each token, in any order, from any goroutine. It does not block.
//
// err is nil when the upstream has the message for good. A permanent error (see [Permanent]) means
// that it will never take this message; the bridge parks it and goes on. Any other error ends the
// session: all that is unacked is sent again, in order.
//
// A send of which nobody knows how it ended is simply not acked: the bridge ends the session after
// AckTimeout without progress, and sends it again with the same id.
type Acks func(token uint64, err error)

// Upstream is where messages go.
type Upstream interface {
	// Dial opens a session, made of one connection that is never reopened behind the bridge's back.
	// It returns when the upstream is known to take messages, or else an error: every error of Dial is
	// transient. acks is not called after the session's Close has returned.
	Dial(ctx context.Context, acks Acks) (Session, error)
}

// Session is one connection's life.
type Session interface {
	// Send hands in m. Messages leave in the order of the calls, which come from one goroutine.
	// It does not wait for the upstream: what it holds is bounded by the bridge's window. The one error that
	// does not end the session is a permanent one: this message can never be sent (a topic the
	// protocol does not allow, more bytes than the upstream takes).
	Send(m Message) error
	// Progress is a number that changes while bytes of what was sent move towards the upstream. It
	// lets a slow link live that needs longer for one message than the bridge waits for an ack.
	Progress() uint64
	// Done is closed when the session has ended, for whatever reason.
	Done() <-chan struct{}
	// Err is why the session ended; asked after Done only.
	Err() error
	// Close ends the session and joins its goroutines. Until ctx ends it may say goodbye in
	// order; if ctx has ended already it cuts at once.
	Close(ctx context.Context)
}

// Errors by which a session or a dial tells how it ended. Adapters wrap them.
var (
	// ErrRefused: the upstream answered and does not want us: bad credentials, a client id in use.
	ErrRefused = errors.New("refused by the upstream")
	// ErrPeerClosed: the other side ended the connection.
	ErrPeerClosed = errors.New("connection closed by the upstream")
	// ErrStalled: nothing moved any more.
	ErrStalled = errors.New("no progress")
)

// permanent marks an error that will be the same at every attempt.
type permanent struct{ err error }

func (p permanent) Error() string { return p.err.Error() }
func (p permanent) Unwrap() error { return p.err }

// Permanent marks err: this message will never be taken, whatever is tried.
func Permanent(err error) error { return permanent{err} }

// IsPermanent tells whether err was marked by Permanent.
func IsPermanent(err error) bool { return errors.As(err, new(permanent)) }
