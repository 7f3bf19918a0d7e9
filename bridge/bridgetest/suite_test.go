package bridgetest_test

import (
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestUpstreamPassesTheSuite: the upstream that tests rely on keeps the contract itself.
func TestUpstreamPassesTheSuite(t *testing.T) {
	bridgetest.Suite(t, func(*testing.T) bridgetest.Subject {
		u := bridgetest.NewUpstream()
		impossible := bridge.Message{Topic: "impossible"}
		var hold bool
		return bridgetest.Subject{
			Upstream: u,
			Arrived:  u.Arrived,
			HoldAcks: func() { hold = true; script(u, &hold) },
			Cut:      func() { u.End(bridge.ErrPeerClosed) },
			Refuse: func() {
				u.OnDial = func(int) error { return fmt.Errorf("%w: not today", bridge.ErrRefused) }
			},
			Impossible: func() []bridge.Message { script(u, &hold); return []bridge.Message{impossible} }(),
		}
	})
}

func script(u *bridgetest.Upstream, hold *bool) {
	u.OnSend = func(_, _ int, m bridge.Message) bridgetest.Step {
		if m.Topic == "impossible" {
			return bridgetest.Step{SendErr: bridge.Permanent(errors.New("no"))}
		}
		return bridgetest.Step{NoAck: *hold}
	}
}
