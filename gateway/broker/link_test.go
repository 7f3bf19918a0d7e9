package broker_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
	acked                 func() // called before it is written down

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
	if w.acked != nil {
		w.acked()
	}
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

// nth waits for the nth of a kind.
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

// What Subscribed sends comes after the SUBACK, whether that waits for a commit or not, and after
// the CONNACK for a subscription that the session brings along.
func TestSubackComesBeforeTheFirstCommand(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		n := uint64(0)
		r, w := watched(t, func(_ *rig, w *watcher) {
			w.subscribed = func(l *broker.Link) {
				if !l.Covers("cmd/dev/req/1/go") {
					t.Error("Subscribed, but not covered")
				}
				n++
				if _, err := l.Send(cmd("1", "go"), n, 0); err != nil {
					t.Error(err)
				}
			}
		})
		take := func(p *peer) {
			t.Helper()
			m := p.message()
			p.pub(mqtt.TypePuback, m.ID)
			w.nth(t, "acked", int(n))
		}
		p := r.client(v, "dev")
		p.subscribe(1, filter("other", 1), filter(reqs, 1))
		take(p)
		p.subscribe(2, filter(reqs, 2)) // once more
		take(p)
		p = r.client(v, "dev", keep) // it had no session that could go on
		if w.count("subscribed") != 2 {
			t.Error("a new session has no subscriptions")
		}
		p.subscribe(1, filter(reqs, 1))
		take(p)
		p = r.client(v, "dev", keep) // takes over
		take(p)
		if l := w.nth(t, "connected", 3).link; !l.Info().SessionPresent {
			t.Error("the session goes on, and the link does not say so")
		}
		r.restart()
		p = r.client(v, "dev", keep)
		take(p)
		if got, want := w.count("subscribed"), 5; got != want {
			t.Errorf("subscribed %d times, want %d", got, want)
		}
	})
}

// As long as the SUBACK waits for what came before it, no command may be sent.
func TestNotCoveredBeforeTheSuback(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		h := &held{}
		r, w := watched(t, func(r *rig, _ *watcher) { r.in.deliver = h.deliver })
		p := r.client(v, "dev")
		l := w.nth(t, "connected", 1).link
		p.publish(1, 1, "t", "x")
		p.send(mqtt.AppendSubscribe(nil, v, &mqtt.Subscribe{ID: 2, Filters: []mqtt.Subscription{filter(reqs, 1)}}))
		eventually(t, "the subscription", func() bool { return r.b.Stats().Subscriptions == 1 && h.len() == 1 })
		if l.Covers("cmd/dev/req/1/go") || w.count("subscribed") != 0 {
			t.Error("subscribed before the SUBACK is on its way")
		}
		h.release(nil, true)
		p.success(mqtt.TypePuback, 1)
		p.frame(mqtt.TypeSuback)
		w.nth(t, "subscribed", 1)
		if !l.Covers("cmd/dev/req/1/go") {
			t.Error("not covered after the SUBACK")
		}
	})
}

func TestWhatCoversACommand(t *testing.T) {
	const topic = "cmd/dev/req/1/go"
	for _, x := range []struct {
		filter     string
		qos        byte
		subscribed bool
		covers     bool
	}{
		{"cmd/dev/req/#", 1, true, true},
		{"cmd/dev/req/#", 2, true, true},
		{"cmd/+/+/+/go", 1, true, true},
		{"#", 1, true, true},
		{"+/dev/#", 1, true, true},
		{"cmd/dev/req/2/go", 1, true, false}, // another command's
		{"cmd/dev/req/#", 0, false, false},
		{"$share/all/cmd/dev/req/#", 1, false, false},
		{"cmd/dev/req", 1, false, false},
		{"cmd/dev/res/#", 1, false, false},
		{"cmd", 1, false, false},
		{"dt/#", 1, false, false},
		{"+", 1, false, false},
	} {
		t.Run(fmt.Sprintf("%s qos=%d", strings.ReplaceAll(x.filter, "/", "."), x.qos), func(t *testing.T) {
			eachVersion(t, func(t *testing.T, v mqtt.Version) {
				r, w := watched(t, nil)
				p := r.client(v, "dev")
				p.subscribe(1, filter(x.filter, x.qos))
				p.silent()
				l := w.nth(t, "connected", 1).link
				if got := w.count("subscribed") == 1; got != x.subscribed {
					t.Errorf("told of the subscription: %v", got)
				}
				if got := l.Covers(topic); got != x.covers {
					t.Errorf("covers: %v", got)
				}
			})
		})
	}
}

func TestUnsubscribingEndsTheCover(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, nil)
		p := r.client(v, "dev")
		p.subscribe(1, filter(reqs, 1), filter("cmd/#", 1))
		l := w.nth(t, "subscribed", 1).link
		unsubscribe := func(f string) {
			t.Helper()
			p.send(mqtt.AppendUnsubscribe(nil, v, &mqtt.Unsubscribe{ID: 2, Filters: []string{f}}))
			p.frame(mqtt.TypeUnsuback)
		}
		unsubscribe("cmd/#")
		if !l.Covers("cmd/dev/req/1/go") {
			t.Error("the other subscription covers it")
		}
		unsubscribe(reqs)
		if l.Covers("cmd/dev/req/1/go") {
			t.Error("covered without a subscription")
		}
		p.subscribe(3, filter(reqs, 1))
		p.subscribe(4, filter(reqs, 0)) // in its place
		if l.Covers("cmd/dev/req/1/go") {
			t.Error("covered with QoS 0")
		}
	})
}

// A client that takes one message at a time gets one, be it a command or another, commands first,
// and the commands in their order.
func TestCommandsCountAgainstTheReceiveMaximum(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, func(r *rig, _ *watcher) {
			if v == mqtt.V311 {
				r.cfg.MaxInflight = 1
			}
		})
		p := r.client(v, "dev", func(k *mqtt.Connect) { k.ReceiveMaximum = 1 })
		p.subscribe(1, filter(reqs, 1), filter("t", 1), filter("qos0", 0))
		l := w.nth(t, "subscribed", 1).link
		x := r.client(v, "other")
		for i := range 3 {
			x.publishDone(1, uint16(i+1), "t", fmt.Sprint("t", i))
		}
		first := p.message()
		for i := range 5 {
			mustSend(t, l, cmd(fmt.Sprint(i), "go"), uint64(i), 0)
		}
		x.publishDone(1, 9, "elsewhere", "") // a group of commits, after which what may go has gone
		p.silent()
		p.pub(mqtt.TypePuback, first.ID)
		got := string(first.Payload)
		for range 7 {
			m := p.message()
			p.silent()
			got += " " + string(m.Payload)
			p.pub(mqtt.TypePuback, m.ID)
		}
		if want := "t0 0 1 2 3 4 t1 t2"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		for i := range 5 {
			if h := w.nth(t, "acked", i+1); h.token != uint64(i) {
				t.Errorf("acked %d, want %d", h.token, i)
			}
		}
		p.silent()
		if n := w.count("acked"); n != 5 {
			t.Errorf("%d acked: those of the session are not the watcher's", n)
		}
	})
}

// QoS 0 does not count, and commands that wait do not hold it up.
func TestWaitingCommandsLetQoS0Pass(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, func(r *rig, _ *watcher) { r.cfg.MaxInflight = 1 })
		p := r.client(v, "dev")
		p.subscribe(1, filter(reqs, 1), filter("t", 0))
		l := w.nth(t, "subscribed", 1).link
		mustSend(t, l, cmd("1", "go"), 1, 0)
		mustSend(t, l, cmd("2", "go"), 2, 0)
		id := p.message().ID
		r.client(v, "other").publishDone(1, 1, "t", "passes")
		if m := p.message(); string(m.Payload) != "passes" {
			t.Errorf("got %s", m.Payload)
		}
		p.pub(mqtt.TypePuback, id)
		if m := p.message(); string(m.Payload) != "2" {
			t.Errorf("got %s", m.Payload)
		}
	})
}

func TestPacketIDsOfCommands(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, nil)
		p := r.client(v, "dev", keep)
		p.subscribe(1, filter(reqs, 1), filter("t", 1))
		l := w.nth(t, "subscribed", 1).link
		x := r.client(v, "other")
		x.publishDone(1, 1, "t", "t")
		taken := p.message().ID
		if id := mustSend(t, l, cmd("1", "go"), 1, 700); id != 700 {
			t.Errorf("sent as %d, want 700", id)
		}
		if id := mustSend(t, l, cmd("2", "go"), 2, 700); id == 700 || id == taken || id == 0 {
			t.Errorf("sent as %d", id)
		}
		if id := mustSend(t, l, cmd("3", "go"), 3, taken); id == taken || id == 0 {
			t.Errorf("sent as %d, which the session has", id)
		}
		// The session's own ids keep clear of them as well.
		broker.SetLastID(r.b, "dev", 699)
		x.publishDone(1, 2, "t", "t")
		again := cmd("1", "go")
		again.Dup, again.QoS, again.ID = true, 0, 4711
		for i, want := range []string{"1", "2", "3", "t"} {
			m := p.message()
			if string(m.Payload) != want || i > 0 && m.ID == 700 {
				t.Errorf("got %s as %d, want %s", m.Payload, m.ID, want)
			}
		}
		// The next connection: the same id if it is free, DUP as it is given; the session repeats its own.
		p = r.client(v, "dev", keep)
		l = w.nth(t, "subscribed", 2).link
		if m := p.message(); m.ID != taken || !m.Dup {
			t.Errorf("%+v, want what was sent as %d", m, taken)
		}
		p.message()
		if id := mustSend(t, l, again, 4, 700); id != 700 {
			t.Errorf("sent again as %d, want 700", id)
		}
		if m := p.message(); m.ID != 700 || !m.Dup || m.QoS != 1 {
			t.Errorf("got %+v", m)
		}
	})
}

// The device's packet ids are its own: its PUBLISH under a command's id is no answer to it.
func TestPublishUnderTheIDOfACommand(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, qos := range []byte{1, 2} {
			r, w := watched(t, nil)
			p := r.client(v, "dev")
			p.subscribe(42, filter(reqs, 1))
			l := w.nth(t, "subscribed", 1).link
			mustSend(t, l, cmd("1", "go"), 1, 42)
			if id := p.message().ID; id != 42 {
				t.Fatalf("sent as %d", id)
			}
			p.publishDone(qos, 42, "cmd/dev/res/1/succeeded", "done")
			p.subscribe(42, filter("t", 0))
			p.silent()
			if w.count("acked") != 0 {
				t.Error("acked by a PUBLISH")
			}
			p.pub(mqtt.TypePuback, 42)
			w.nth(t, "acked", 1)
			p.pub(mqtt.TypePuback, 42) // twice
			p.silent()
			if w.count("acked") != 1 {
				t.Error("acked twice")
			}
			if v == mqtt.V5 {
				mustSend(t, l, cmd("2", "go"), 2, 0)
				m := p.message()
				p.send(mqtt.AppendAck(nil, mqtt.TypePuback, m.ID, v, mqtt.UnspecifiedError))
				if h := w.nth(t, "acked", 2); h.token != 2 || h.reason != mqtt.UnspecifiedError {
					t.Errorf("%+v", h)
				}
			}
		}
	})
}

// A command belongs to its connection: the session repeats nothing, and a PUBACK counts where the
// command was sent, or nowhere.
func TestCommandsEndWithTheirConnection(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, func(r *rig, _ *watcher) { r.cfg.MaxInflight = 2 })
		p := r.client(v, "dev", keep)
		p.subscribe(1, filter(reqs, 1), filter("t", 1))
		l := w.nth(t, "subscribed", 1).link
		var ids []uint16
		for i := range 4 { // two are sent, two wait
			ids = append(ids, mustSend(t, l, cmd(fmt.Sprint(i), "go"), uint64(i), 0))
		}
		p.message()
		p.message()
		q := r.client(v, "dev", keep)
		if _, err := l.Send(cmd("5", "go"), 5, 0); !errors.Is(err, broker.ErrLinkGone) {
			t.Errorf("Send on what was taken over: %v", err)
		}
		if l.Covers("cmd/dev/req/1/go") {
			t.Error("covered on what was taken over")
		}
		if h := w.nth(t, "disconnected", 1); h.link != l || !strings.Contains(h.cause, "took the session over") {
			t.Errorf("%+v", h)
		}
		_, _ = p.nc.Write(mqtt.AppendAck(nil, mqtt.TypePuback, ids[0], v, mqtt.Success))
		q.pub(mqtt.TypePuback, ids[0])
		q.pub(mqtt.TypePuback, ids[1])
		q.silent()
		x := r.client(v, "other")
		x.publishDone(1, 1, "t", "next")
		if m := q.message(); string(m.Payload) != "next" {
			t.Errorf("got %s: a command was repeated", m.Payload)
		}
		if n := w.count("acked"); n != 0 {
			t.Errorf("%d acked", n)
		}
		// All of the receive maximum is there again.
		now := w.nth(t, "connected", 2).link
		mustSend(t, now, cmd("6", "go"), 6, 0)
		if m := q.message(); string(m.Payload) != "6" {
			t.Errorf("got %s", m.Payload)
		}
	})
}

func TestCommandsThatAreTooLarge(t *testing.T) {
	r, w := watched(t, nil)
	p := r.client(mqtt.V5, "dev", func(k *mqtt.Connect) { k.MaximumPacketSize = 100 })
	p.subscribe(1, filter(reqs, 1))
	l := w.nth(t, "subscribed", 1).link
	big := cmd("1", "go")
	big.Payload = make([]byte, 200)
	if _, err := l.Send(big, 1, 0); !errors.Is(err, broker.ErrTooLarge) || !strings.Contains(err.Error(), "100") {
		t.Errorf("Send: %v", err)
	}
	mustSend(t, l, cmd("2", "go"), 2, 0)
	if m := p.message(); string(m.Payload) != "2" {
		t.Errorf("got %s", m.Payload)
	}
}

// Properties of MQTT 5 arrive, and are left out for 3.1.1.
func TestPropertiesOfCommands(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, nil)
		p := r.client(v, "dev")
		p.subscribeAs(1, uint32(v-mqtt.V311)*7, filter(reqs, 1))
		c := cmd("1", "go")
		c.Retain = true
		c.ContentType, c.ResponseTopic, c.Correlation = []byte("text/plain"), []byte("cmd/dev/res/1"), []byte("1")
		c.HasExpiry, c.Expiry = true, 60
		mustSend(t, w.nth(t, "subscribed", 1).link, c, 1, 0)
		m := p.message()
		if v == mqtt.V311 {
			c.ContentType, c.ResponseTopic, c.Correlation, c.HasExpiry, c.Expiry = nil, nil, nil, false, 0
		}
		if !bytes.Equal(m.ContentType, c.ContentType) || !bytes.Equal(m.ResponseTopic, c.ResponseTopic) ||
			!bytes.Equal(m.Correlation, c.Correlation) || m.HasExpiry != c.HasExpiry || m.Expiry != c.Expiry || m.Retain {
			t.Errorf("got %+v", m)
		}
		if v == mqtt.V5 && !slices.Equal(m.SubscriptionIDs, []uint32{7}) {
			t.Errorf("subscription identifiers %v", m.SubscriptionIDs)
		}
	})
}

// A device that does not read holds up nobody and takes little memory; when it reads again, all is
// there and in order.
func TestCommandsForASlowReader(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, func(r *rig, _ *watcher) { r.cfg.MaxInflight = 1000 })
		p := r.client(v, "dev")
		p.subscribe(1, filter(reqs, 1))
		l := w.nth(t, "subscribed", 1).link
		const n = 200
		payload := make([]byte, 64<<10) // 12 MiB: more than a socket and out take
		for i := range n {
			c := cmd(fmt.Sprint(i), "go")
			c.Payload = payload
			mustSend(t, l, c, uint64(i), 0)
		}
		other := r.client(v, "other")
		other.publishDone(1, 1, "t", "x")
		if sent := r.metric("commands_sent_total"); sent == n {
			t.Error("all were put into the buffer of a client that does not read")
		}
		for i := range n {
			m := p.message()
			if want := fmt.Sprintf("cmd/dev/req/%d/go", i); string(m.Topic) != want {
				t.Fatalf("got %s, want %s", m.Topic, want)
			}
			p.pub(mqtt.TypePuback, m.ID)
		}
		w.nth(t, "acked", n)
	})
}

// One that never reads is ended, and the watcher is told.
func TestCommandsForADeadReader(t *testing.T) {
	r, w := watched(t, func(r *rig, _ *watcher) { r.cfg.WriteTimeout = 200 * time.Millisecond })
	p := r.client(mqtt.V311, "dev")
	p.subscribe(1, filter(reqs, 1))
	l := w.nth(t, "subscribed", 1).link
	for i := range 60 {
		c := cmd(fmt.Sprint(i), "go")
		c.Payload = make([]byte, 250<<10)
		if _, err := l.Send(c, uint64(i), 0); err != nil {
			break
		}
	}
	if h := w.nth(t, "disconnected", 1); h.link != l || !strings.Contains(h.cause, "does not read") {
		t.Errorf("%+v", h)
	}
	if _, err := l.Send(cmd("x", "go"), 99, 0); !errors.Is(err, broker.ErrLinkGone) {
		t.Errorf("Send: %v", err)
	}
}

// However a connection ends, the watcher is told once, after all else, and why.
func TestDisconnectedIsToldOnce(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, x := range []struct {
			how   string
			cause string
			end   func(r *rig, p *peer, l *broker.Link)
		}{
			{"goodbye", "client disconnected", func(_ *rig, p *peer, _ *broker.Link) {
				p.send(mqtt.AppendDisconnect(nil, v, mqtt.Success, ""))
			}},
			{"lost", "connection was lost", func(_ *rig, p *peer, _ *broker.Link) { p.nc.Close() }},
			{"keep alive", "no packet within 1.5s", func(*rig, *peer, *broker.Link) {}},
			{"protocol", "", func(_ *rig, p *peer, _ *broker.Link) { p.send([]byte{0xff, 0xff, 0xff, 0xff, 0xff}) }},
			{"stop", "gateway is shutting down", func(r *rig, _ *peer, _ *broker.Link) { r.stop() }},
			{"link", "no answer to a command", func(_ *rig, p *peer, l *broker.Link) {
				l.End(mqtt.AdministrativeAction, "no answer to a command")
				p.closed(mqtt.AdministrativeAction)
			}},
			{"panic", "panic: oh no", func(_ *rig, p *peer, _ *broker.Link) { p.publish(1, 1, "panic", "") }},
		} {
			t.Run(x.how, func(t *testing.T) {
				r, w := watched(t, func(r *rig, _ *watcher) {
					r.auth.publish = func(_, topic string) bool {
						if topic == "panic" {
							panic("oh no")
						}
						return true
					}
				})
				p := r.client(v, "dev", keep, func(k *mqtt.Connect) { k.KeepAlive = 1 })
				l := w.nth(t, "connected", 1).link
				x.end(r, p, l)
				h := w.nth(t, "disconnected", 1)
				if h.link != l || x.cause != "" && !strings.EqualFold(h.cause, x.cause) {
					t.Errorf("%+v, want %q", h, x.cause)
				}
				r.stop()
				all := w.all()
				if w.count("disconnected") != 1 || all[len(all)-1].what != "disconnected" {
					t.Errorf("%+v", all)
				}
			})
		}
	})
}

// A refused CONNECT is no connection.
func TestRefusedConnectIsNotWatched(t *testing.T) {
	r, w := watched(t, func(r *rig, _ *watcher) {
		r.auth.connect = func(*broker.ConnectInfo) error { return broker.ErrBadCredentials }
	})
	p, _ := r.connect(mqtt.V5, "dev")
	p.closed(0)
	r.stop()
	if all := w.all(); len(all) != 0 {
		t.Errorf("%+v", all)
	}
}

// A device that comes and goes a hundred times in a second: by takeover, by closing, politely. The
// accounts of connections balance, and a command goes to the connection that it was sent on.
func TestFlappingDevice(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r, w := watched(t, func(_ *rig, w *watcher) {
			w.subscribed = func(l *broker.Link) {
				for i := range 3 {
					if _, err := l.Send(cmd(fmt.Sprint(i), "go"), uint64(i), 0); err != nil && !errors.Is(err, broker.ErrLinkGone) {
						t.Error(err)
					}
				}
			}
		})
		const times = 100
		for i := range times {
			p := r.client(v, "dev", keep)
			if i == 0 {
				p.subscribe(1, filter(reqs, 1))
			}
			for k := range i % 4 { // reads some, answers some
				m := p.message()
				if string(m.Payload) != fmt.Sprint(k) {
					t.Fatalf("got %s, want %d", m.Payload, k)
				}
				p.pub(mqtt.TypePuback, m.ID)
			}
			switch i % 3 {
			case 0:
				p.nc.Close()
			case 1:
				p.send(mqtt.AppendDisconnect(nil, v, mqtt.Success, ""))
			}
		}
		r.stop()
		open := map[*broker.Link]bool{}
		for _, h := range w.all() {
			switch h.what {
			case "connected":
				if open[h.link] {
					t.Fatal("connected twice")
				}
				open[h.link] = true
			case "disconnected":
				if !open[h.link] {
					t.Fatal("disconnected twice, or never connected")
				}
				delete(open, h.link)
			default:
				if !open[h.link] {
					t.Fatalf("%s on a link that is not connected", h.what)
				}
			}
		}
		// One that was taken over before its CONNACK was noticed was never there for the watcher.
		if n := w.count("connected"); len(open) != 0 || n > times || n < times/2 {
			t.Errorf("%d connected, %d left open", w.count("connected"), len(open))
		}
	})
}

// Commands that are sent while the session is taken over: nothing is lost without an error or an
// end, nothing arrives on the wrong connection.
func TestSendWhileTheConnectionChanges(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		links := make(chan *broker.Link, 100)
		r, _ := watched(t, func(_ *rig, w *watcher) { w.connected = func(l *broker.Link) { links <- l } })
		var senders sync.WaitGroup
		for i := range 50 {
			p := r.client(v, "dev", keep)
			l := <-links
			senders.Go(func() {
				for k := range 100 {
					if _, err := l.Send(cmd(fmt.Sprintf("%d", i), fmt.Sprint(k)), 0, 0); err != nil {
						if !errors.Is(err, broker.ErrLinkGone) {
							t.Error(err)
						}
						return
					}
				}
			})
			for k := range 5 {
				m := p.message()
				if want := fmt.Sprintf("cmd/dev/req/%d/%d", i, k); string(m.Topic) != want {
					t.Fatalf("got %s, want %s", m.Topic, want)
				}
			}
		}
		senders.Wait()
	})
}

// BenchmarkCommands has many devices that each get three commands at once, as when all of them
// come back.
func BenchmarkCommands(b *testing.B) {
	const links = 2000
	w := &watcher{}
	all := make(chan *broker.Link, links)
	w.connected = func(l *broker.Link) { all <- l }
	r := newRig(b, func(r *rig) { r.watch = w })
	var ready []*broker.Link
	for i := range links {
		nc, err := testDialer.DialContext(b.Context(), "tcp", r.addr())
		if err != nil {
			b.Fatal(err)
		}
		defer nc.Close()
		if _, err := nc.Write(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprint(i), CleanStart: true})); err != nil {
			b.Fatal(err)
		}
		ready = append(ready, <-all)
		go answerAll(nc)
	}
	c := cmd("1", "go")
	acks := func() float64 { return float64(w.count("acked")) }
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		w.mu.Lock()
		w.list = w.list[:0]
		w.mu.Unlock()
		for _, l := range ready {
			for k := range 3 {
				if _, err := l.Send(c, uint64(k), 0); err != nil {
					b.Fatal(err)
				}
				n++
			}
		}
		eventually(b, "all acked", func() bool { return acks() == 3*links })
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "commands/s")
}

// answerAll acknowledges each PUBLISH of QoS 1.
func answerAll(nc io.ReadWriter) {
	buf := make([]byte, 0, 8192)
	for {
		for {
			t, _, _, size, ok, err := mqtt.PeekHeader(buf)
			if err != nil || !ok || len(buf) < size {
				break
			}
			if t == mqtt.TypePublish {
				var m mqtt.Publish
				if mqtt.ParseDelivery(buf[:size], mqtt.V311, &m) == nil {
					_, _ = nc.Write(mqtt.AppendAck(nil, mqtt.TypePuback, m.ID, mqtt.V311, mqtt.Success))
				}
			}
			buf = append(buf[:0], buf[size:]...)
		}
		n, err := nc.Read(buf[len(buf):cap(buf)])
		if err != nil {
			return
		}
		buf = buf[:len(buf)+n]
	}
}

// A PUBACK that was read before a takeover is told before the new connection is: told after it, the command would have been
// sent again to a device that had acknowledged it.
func TestAckIsToldBeforeTheTakeover(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		reading, goOn := make(chan struct{}), make(chan struct{})
		r, w := watched(t, func(_ *rig, w *watcher) {
			w.acked = func() { close(reading); <-goOn }
		})
		old := r.client(v, "dev", keep)
		old.subscribe(1, mqtt.Subscription{Filter: "cmd/dev/req/#", QoS: 1})
		l := w.nth(t, "subscribed", 1).link
		id := mustSend(t, l, cmd("a", "x"), 7, 0)
		old.message()
		old.pub(mqtt.TypePuback, id)
		<-reading
		came := make(chan struct{})
		go func() {
			defer close(came)
			r.client(v, "dev", keep)
		}()
		eventually(t, "takeover", func() bool { return !l.Alive() })
		select {
		case <-came:
			t.Error("the new connection did not wait")
		case <-time.After(100 * time.Millisecond):
		}
		close(goOn)
		<-came
		w.nth(t, "connected", 2)
		var order []string
		for _, h := range w.all() {
			if h.what == "acked" || h.what == "connected" {
				order = append(order, h.what)
			}
		}
		if want := []string{"connected", "acked", "connected"}; !slices.Equal(order, want) {
			t.Errorf("told in the order %v, want %v", order, want)
		}
	})
}
