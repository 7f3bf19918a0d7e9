package gateway

import (
	"bytes"
	"context"
	"fmt"

	"holdfast/gateway/broker"
)

// authorizer says who may do what. Until there is a registry of devices the only policy is
// devices.anonymous: everybody, or nobody. Where nobody but Holdfast may publish holds always.
type authorizer struct {
	anonymous bool
}

// Connect implements broker.Authorizer.
func (a authorizer) Connect(context.Context, *broker.ConnectInfo) (broker.Rights, error) {
	if !a.anonymous {
		return nil, fmt.Errorf("devices.anonymous is false, and there is no other way in yet: %w", broker.ErrNotAuthorized)
	}
	return a, nil
}

// Rights implements broker.Authorizer.
func (a authorizer) Rights(string) broker.Rights { return a }

// Limits implements broker.Rights.
func (authorizer) Limits() broker.Limits { return broker.Limits{} }

// MayPublish implements broker.Rights: not as the broker ($…), not as a gateway (gw/#), and no
// commands (cmd/+/req/#), which only Holdfast sends, after it has stored them.
func (a authorizer) MayPublish(topic []byte) bool {
	switch {
	case len(topic) == 0 || topic[0] == '$':
		return false
	case topic[0] != 'g' && topic[0] != 'c': // nearly all
		return true
	}
	first, rest, more := cutLevel(topic)
	switch string(first) {
	case "gw":
		return false // gw/# is also gw
	case "cmd":
		if !more {
			return true
		}
		_, rest, more = cutLevel(rest)
		if !more {
			return true
		}
		kind, _, _ := cutLevel(rest)
		return !bytes.Equal(kind, []byte("req"))
	}
	return true
}

// MaySubscribe implements broker.Rights.
func (a authorizer) MaySubscribe(string) bool { return true }
