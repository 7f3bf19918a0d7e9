package broker

import (
	"context"
	"crypto/tls"
	"net"
)

// ConnectInfo is what an Authorizer judges a CONNECT by.
type ConnectInfo struct {
	ClientID    string // never empty
	Username    string
	HasUsername bool
	Password    []byte               // valid during the call
	TLS         *tls.ConnectionState // nil: no TLS
	Remote      net.Addr
	Listener    string // name
}

// Authorizer says who may come in and what he may do. It is called from many goroutines.
type Authorizer interface {
	// Connect lets a client in by returning its rights. ErrBadCredentials and its like in the
	// error choose what the client is told. It may block, for a failed login that is to be
	// answered late; ctx ends when the broker ends the connection, when the time for CONNECT is
	// over, and when the broker stops. A peer that hangs up meanwhile is not noticed before.
	Connect(ctx context.Context, c *ConnectInfo) (Rights, error)
	// Rights of a client that is not connected: of a session restored at start, of a will that
	// waited. Never nil. It must not wait for commits: the fan-out asks, too.
	Rights(client string) Rights
}

// Rights of one client. They are asked from many goroutines, for each message: they have to be
// quick and to allocate nothing. They may change while the client is connected; Broker.Recheck
// says so.
//
// Rights may also have a method Principal() string, which tells who it is that was let in; without
// one, and where it gives "", it is nobody in particular. While a principal is connected nobody
// else is let in under its client id, and nobody else finds its session.
type Rights interface {
	// MayPublish is asked for every message, for wills at CONNECT and when they are published.
	// topic is valid during the call.
	MayPublish(topic []byte) bool
	// MaySubscribe is asked for each filter of a SUBSCRIBE (of a shared subscription: without
	// $share and name) and, with the topic as the filter, for each delivery.
	MaySubscribe(filter string) bool
	// Limits of what it publishes, asked at CONNECT and by Broker.Recheck.
	Limits() Limits
}

// Limits of what one client publishes. 0: no limit.
type Limits struct {
	MessagesPerSecond int
	BytesPerSecond    int64 // of whole PUBLISH packets
}

// principal tells who r belongs to; "": nobody in particular.
func principal(r Rights) string {
	if p, ok := r.(interface{ Principal() string }); ok {
		return p.Principal()
	}
	return ""
}

// held is what a session keeps of its last connection.
type held struct{ Rights }

// held gives the rights that hold for deliveries to the session.
func (s *session) held() Rights {
	h := s.rights.Load()
	if h == nil { // restored, or rechecked while offline
		h = &held{s.b.auth.Rights(s.id)}
		s.rights.CompareAndSwap(nil, h)
	}
	return h.Rights
}

// authorize asks the Authorizer. told is false where the connection is over and an answer would
// be wasted.
func (c *conn) authorize(info *ConnectInfo) (r Rights, told bool, err error) {
	ctx, cancel := context.WithDeadline(context.Background(), c.due())
	defer cancel()
	c.mu.Lock()
	c.cancel = cancel
	if c.ending || c.halted.Load() {
		cancel()
	}
	c.mu.Unlock()
	r, err = c.b.auth.Connect(ctx, info)
	c.mu.Lock()
	c.cancel = nil
	c.mu.Unlock()
	switch {
	case c.ended.Load():
		return nil, false, errEnded
	case c.halted.Load():
		return nil, false, errStopping
	}
	return r, true, err
}
