package broker_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
)

// happening is one call of a Watcher.
type happening struct {
	what   string // connected, subscribed, acked, disconnected
	link   *broker.Link
	token  uint64
	reason mqtt.Reason
	cause  string
}

// watcher writes down what it is told. The functions, where set, are called after that.
type watcher struct {
	connected, subscribed func(l *broker.Link)

	mu   sync.Mutex
	list []happening
}

func (w *watcher) add(h happening) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = append(w.list, h)
}

func (w *watcher) Connected(l *broker.Link) {
	w.add(happening{what: "connected", link: l})
	if w.connected != nil {
		w.connected(l)
	}
}

func (w *watcher) Subscribed(l *broker.Link) {
	w.add(happening{what: "subscribed", link: l})
	if w.subscribed != nil {
		w.subscribed(l)
	}
}

func (w *watcher) Acked(l *broker.Link, token uint64, reason mqtt.Reason) {
	w.add(happening{what: "acked", link: l, token: token, reason: reason})
}

func (w *watcher) Disconnected(l *broker.Link, cause string) {
	w.add(happening{what: "disconnected", link: l, cause: cause})
}

// all gives what happened so far.
func (w *watcher) all() []happening {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]happening{}, w.list...)
}

// last gives the newest of a kind, and waits for the nth.
func (w *watcher) nth(t testing.TB, what string, n int) happening {
	t.Helper()
	var found happening
	eventually(t, fmt.Sprintf("%s number %d", what, n), func() bool {
		seen := 0
		for _, h := range w.all() {
			if h.what == what {
				if seen++; seen == n {
					found = h
					return true
				}
			}
		}
		return false
	})
	return found
}

func (w *watcher) count(what string) (n int) {
	for _, h := range w.all() {
		if h.what == what {
			n++
		}
	}
	return n
}

// watched starts a broker with a watcher.
func watched(t testing.TB, change func(r *rig, w *watcher)) (*rig, *watcher) {
	t.Helper()
	w := &watcher{}
	return newRig(t, func(r *rig) {
		r.watch = w
		if change != nil {
			change(r, w)
		}
	}), w
}

func cmd(id, name string) *mqtt.Publish {
	return &mqtt.Publish{Topic: []byte("cmd/dev/req/" + id + "/" + name), Payload: []byte(id)}
}

func mustSend(t testing.TB, l *broker.Link, p *mqtt.Publish, token uint64, hint uint16) uint16 {
	t.Helper()
	id, err := l.Send(p, token, hint)
	if err != nil {
		t.Fatalf("Send: %v", err)
	}
	return id
}

const reqs = "cmd/dev/req/#"

func TestCommandsGoToTheDevice(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, nil)
		p := r.client(v, "dev", func(k *mqtt.Connect) { k.Will = &mqtt.Will{Topic: "dt/dev/gone"} })
		l := w.nth(t, "connected", 1).link
		if l.Client() != "dev" || l.Covers("cmd/dev/req/1/reboot") {
			t.Errorf("client %q, covers %v", l.Client(), l.Covers("cmd/dev/req/1/reboot"))
		}
		want := broker.LinkInfo{
			Client: "dev", Remote: p.nc.LocalAddr().String(), Listener: "lan", Protocol: "MQTT " + v.String(), Version: v, Will: "dt/dev/gone",
		}
		if l.Info() != want {
			t.Errorf("info %+v, want %+v", l.Info(), want)
		}
		p.subscribe(1, filter(reqs, 1))
		if got := w.nth(t, "subscribed", 1).link; got != l || !l.Covers("cmd/dev/req/1/reboot") {
			t.Error("the subscription does not show")
		}
		id := mustSend(t, l, cmd("1", "reboot"), 71, 0)
		m := p.message()
		if m.ID != id || m.QoS != 1 || m.Dup || string(m.Topic) != "cmd/dev/req/1/reboot" || string(m.Payload) != "1" {
			t.Errorf("got %+v under %d", m, id)
		}
		p.pub(mqtt.TypePuback, id)
		if got := w.nth(t, "acked", 1); got.link != l || got.token != 71 || got.reason != mqtt.Success {
			t.Errorf("acked %+v", got)
		}
		p.send(mqtt.AppendDisconnect(nil, v, mqtt.Success, ""))
		if got := w.nth(t, "disconnected", 1); got.link != l || got.cause != "client disconnected" {
			t.Errorf("disconnected %+v", got)
		}
		if _, err := l.Send(cmd("2", "reboot"), 72, 0); !errors.Is(err, broker.ErrLinkGone) {
			t.Errorf("Send on a connection that has ended: %v", err)
		}
	})
}
