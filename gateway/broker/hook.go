package broker

import (
	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"holdfast/internal/mqtt"
)

// hook is what mochi calls while it handles a SUBSCRIBE.
type hook struct {
	mochi.HookBase
}

func (*hook) ID() string { return "holdfast" }

// Provides says which calls are answered. mochi asks all hooks, and no hook is a no.
func (*hook) Provides(b byte) bool {
	return b == mochi.OnACLCheck || b == mochi.OnSubscribed
}

// OnACLCheck is asked for each filter of a SUBSCRIBE; session.judge has found the answers.
func (*hook) OnACLCheck(cl *mochi.Client, filter string, _ bool) bool {
	w, ok := cl.Net.Conn.(*capture)
	if !ok {
		return false
	}
	_, refused := w.refused[filter]
	return !refused
}

// OnSubscribed comes before the SUBACK is made of codes, so that the reasons can be made exact:
// mochi knows only "not authorized". It has turned all failures into 0x80 for 3.1.1 already.
func (*hook) OnSubscribed(cl *mochi.Client, pk packets.Packet, codes []byte) {
	w, ok := cl.Net.Conn.(*capture)
	if !ok {
		return
	}
	for i := range codes {
		reason, refused := w.refused[pk.Filters[i].Filter]
		if refused && cl.Properties.ProtocolVersion == byte(mqtt.V5) {
			codes[i] = byte(reason)
		}
	}
	w.reasons = codes
}
