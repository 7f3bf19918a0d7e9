package gateway

import (
	"fmt"

	"holdfast/gateway/broker"
	"holdfast/gateway/httpapi"
)

// arrivals shows the API what devices publish.
type arrivals struct{ b *broker.Broker }

// Watch implements httpapi.Messages.
func (a arrivals) Watch(filter string, see func(*httpapi.Arrival)) (end func(), err error) {
	end, err = a.b.Tap(filter, func(p *broker.Passed) { see((*httpapi.Arrival)(p)) })
	if err != nil {
		return nil, fmt.Errorf("%w: %w", httpapi.ErrFilter, err)
	}
	return end, nil
}
