package gateway

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"holdfast/devices"
	"holdfast/gateway/broker"
)

// authorizer asks the registry who may do what. Where nobody but Holdfast may publish holds always, whatever a
// role says. It implements broker.Authorizer.
type authorizer struct {
	registry *devices.Registry
}

// Connect implements broker.Authorizer.
func (a authorizer) Connect(ctx context.Context, c *broker.ConnectInfo) (broker.Rights, error) {
	attempt := devices.Attempt{Device: c.ClientID, Username: c.Username, HasUsername: c.HasUsername, Password: c.Password}
	if tcp, ok := c.Remote.(*net.TCPAddr); ok {
		attempt.Address = tcp.AddrPort().Addr().Unmap()
	}
	if c.TLS != nil && len(c.TLS.VerifiedChains) > 0 {
		attempt.Certificate = leaf(c.TLS.VerifiedChains)
	}
	id, err := a.registry.Authenticate(ctx, &attempt)
	switch {
	case err == nil:
		return rights{id}, nil
	case errors.Is(err, devices.ErrTooOften):
		return nil, fmt.Errorf("%w: %w", broker.ErrTooOften, err)
	case errors.Is(err, devices.ErrCredentials):
		return nil, fmt.Errorf("%w: %w", broker.ErrBadCredentials, err)
	case errors.Is(err, devices.ErrBadID):
		return nil, fmt.Errorf("%w: %w", broker.ErrBadClientID, err)
	case errors.Is(err, devices.ErrDisabled):
		return nil, fmt.Errorf("%w: %w", broker.ErrNotAuthorized, err)
	}
	return nil, fmt.Errorf("%w: %w", broker.ErrUnavailable, err)
}

func leaf(chains [][]*x509.Certificate) *x509.Certificate {
	if len(chains[0]) == 0 {
		return nil
	}
	return chains[0][0]
}

// Rights implements broker.Authorizer.
func (a authorizer) Rights(client string) broker.Rights { return rights{a.registry.Identity(client)} }

// rights is what one device may do.
type rights struct{ *devices.Identity }

// Principal says who was let in, so that nobody takes over another's connection or session: the device, once it has shown
// that it is the one. Without credentials it is nobody in particular.
func (r rights) Principal() string {
	if !r.Authenticated() {
		return ""
	}
	return r.Device()
}

// MayPublish implements broker.Rights.
func (r rights) MayPublish(topic []byte) bool {
	return !reserved(topic) && r.Identity.MayPublish(topic)
}

// Limits implements broker.Rights.
func (r rights) Limits() broker.Limits {
	l := r.Identity.Limits()
	return broker.Limits{MessagesPerSecond: l.MessagesPerSecond, BytesPerSecond: l.BytesPerSecond}
}

// reserved says whether only Holdfast itself publishes to topic: as the broker ($…), as the gateway (gw/#), and
// commands (cmd/+/req/#), which it sends after it has stored them.
func reserved(topic []byte) bool {
	switch {
	case len(topic) == 0 || topic[0] == '$':
		return true
	case topic[0] != 'g' && topic[0] != 'c': // nearly all
		return false
	}
	first, rest, more := cutLevel(topic)
	switch string(first) {
	case "gw":
		return true // gw/# is also gw
	case "cmd":
		if !more {
			return false
		}
		_, rest, more = cutLevel(rest)
		if !more {
			return false
		}
		kind, _, _ := cutLevel(rest)
		return bytes.Equal(kind, []byte("req"))
	}
	return false
}
