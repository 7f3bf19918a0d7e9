package broker_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
)

func withWill(change ...func(*mqtt.Will)) func(*mqtt.Connect) {
	return func(k *mqtt.Connect) {
		k.Will = &mqtt.Will{Topic: "will/" + k.ClientID, Payload: []byte("gone"), QoS: 1}
		for _, f := range change {
			f(k.Will)
		}
	}
}

func delayed(s uint32) func(*mqtt.Will) { return func(w *mqtt.Will) { w.Delay = s } }

const flagWill = 1 << 5

// wills gives the wills that were stored, as topic=payload.
func (r *rig) wills() (w []string) {
	for _, m := range r.in.messages() {
		if m.flags&flagWill != 0 {
			w = append(w, m.topic+"="+m.payload)
		}
	}
	return w
}

// fence waits until everything that was handed in before is committed.
func (r *rig) fence() {
	r.t.Helper()
	if err := r.store.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

func TestWillIsPublishedWhenTheConnectionBreaks(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, x := range []struct {
			how  string
			do   func(p *peer)
			want bool
		}{
			{"closed", func(p *peer) { p.nc.Close() }, true},
			{"protocol error", func(p *peer) { p.send([]byte{0xC0, 1, 0}) }, true},
			{"DISCONNECT", func(p *peer) { p.send(mqtt.AppendDisconnect(nil, v, mqtt.Success, "")) }, false},
			{"DISCONNECT 0x04", func(p *peer) { p.send(mqtt.AppendDisconnect(nil, v, mqtt.DisconnectWithWill, "")) }, v == mqtt.V5},
			{"keep alive", func(*peer) {}, true},
		} {
			t.Run(x.how, func(t *testing.T) {
				r := newRig(t, nil)
				s := r.client(v, "sub")
				s.subscribe(1, filter("will/+", 2))
				p := r.client(v, "dev", withWill(), func(k *mqtt.Connect) {
					if x.how == "keep alive" {
						k.KeepAlive = 1
					}
				})
				x.do(p)
				eventually(t, "end", func() bool { return r.b.Stats().Connections == 1 })
				r.fence()
				got := r.wills()
				if !x.want {
					if len(got) > 0 {
						t.Errorf("published %v", got)
					}
					s.silent()
					return
				}
				if join(got) != "will/dev=gone" {
					t.Fatalf("published %v", got)
				}
				m := s.message()
				if string(m.Topic) != "will/dev" || string(m.Payload) != "gone" || m.QoS != 1 || m.Retain {
					t.Errorf("delivered %+v", m)
				}
				if d := r.in.messages()[0].device; d != "dev" {
					t.Errorf("device %q", d)
				}
			})
		}
	})
}

func TestWillWithEverything(t *testing.T) {
	r := newRig(t, nil)
	r.client(mqtt.V5, "dev", withWill(func(w *mqtt.Will) {
		w.Retain, w.QoS = true, 2
		w.UTF8, w.HasExpiry, w.Expiry = true, true, 60
		w.ContentType, w.ResponseTopic, w.Correlation = []byte("text/plain"), []byte("re/ply"), []byte{0, 1}
		w.Props = mqtt.AppendUserProperty(nil, "k", "v")
	})).nc.Close()
	eventually(t, "will", func() bool { return r.b.Stats().Retained == 1 })
	want := "{ContentType:text/plain ResponseTopic:re/ply Correlation:[0 1] User:[[k v]] UTF8:true Expiry:60 Upstream:}"
	if m := r.in.messages()[0]; m.props != want || m.flags != flagWill|1<<1|1<<2 {
		t.Errorf("record %+v", m)
	}
	r.restart()
	s := r.client(mqtt.V5, "sub")
	s.subscribe(1, filter("will/#", 2))
	if m := s.message(); !m.Retain || m.QoS != 2 || string(m.ContentType) != "text/plain" || m.Expiry == 0 {
		t.Errorf("retained %+v", m)
	}
}

// An empty will clears what is retained; mochi refuses a client that has one.
func TestEmptyWill(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		r.client(v, "pub").publishDone(1, 1, "will/dev", "x", retain)
		eventually(t, "retained", func() bool { return r.b.Stats().Retained == 1 })
		r.client(v, "dev", withWill(func(w *mqtt.Will) { w.Retain, w.Payload = true, nil })).nc.Close()
		eventually(t, "cleared", func() bool { return r.b.Stats().Retained == 0 })
	})
}

func TestWillOfARefusedTopic(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		var denied atomic.Bool
		denied.Store(true)
		r := newRig(t, func(r *rig) {
			r.auth.publish = func(_, topic string) bool { return !denied.Load() || !strings.HasPrefix(topic, "will") }
		})
		if _, a := r.connect(v, "dev", withWill()); a.Reason != mqtt.NotAuthorized {
			t.Errorf("told %v", a.Reason)
		}
		denied.Store(false)
		p := r.client(v, "dev", withWill())
		denied.Store(true) // the right is withdrawn while the device is connected
		p.nc.Close()
		eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
		r.fence()
		if w := r.wills(); len(w) > 0 {
			t.Errorf("published %v", w)
		}
	})
}

// MQTT 5.0 §3.1.2.5, MQTT-3.1.3-9, MQTT-3.1.4-3: what becomes of a will when the client comes back.
func TestWillAtTakeover(t *testing.T) {
	for _, x := range []struct {
		name   string
		first  func(*mqtt.Connect)
		delay  uint32
		second func(*mqtt.Connect)
		want   bool
	}{
		{"no delay", keep, 0, keep, true},
		{"delay, session goes on", keep, 60, keep, false},
		{"delay, clean start", keep, 60, func(k *mqtt.Connect) { k.CleanStart = true }, true},
		{"delay longer than the session", func(*mqtt.Connect) {}, 60, keep, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			r := newRig(t, nil)
			r.client(mqtt.V5, "dev", x.first, withWill(delayed(x.delay)))
			p := r.client(mqtt.V5, "dev", x.second)
			p.publishDone(1, 1, "fence", "")
			if got := len(r.wills()) == 1; got != x.want {
				t.Errorf("published %v, want %v", got, x.want)
			}
			if x.want && r.in.messages()[0].topic != "will/dev" {
				t.Error("published after what came on the new connection")
			}
		})
	}
	t.Run("3.1.1", func(t *testing.T) {
		r := newRig(t, nil)
		r.client(mqtt.V311, "dev", keep, withWill())
		p := r.client(mqtt.V311, "dev", keep)
		p.publishDone(1, 1, "fence", "")
		if len(r.wills()) != 1 {
			t.Errorf("published %v", r.wills())
		}
	})
}

func TestDelayedWill(t *testing.T) {
	t.Parallel()
	start := func(t *testing.T, delay, expiry uint32) *rig {
		r := newRig(t, nil)
		p := r.client(mqtt.V5, "dev", keep, withWill(delayed(delay)), func(k *mqtt.Connect) { k.SessionExpiry = expiry })
		p.nc.Close()
		eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
		r.fence()
		if w := r.wills(); len(w) > 0 {
			t.Fatalf("published at once: %v", w)
		}
		return r
	}
	published := func(t *testing.T, r *rig) {
		t.Helper()
		eventually(t, "will", func() bool { return join(r.wills()) == "will/dev=gone" })
	}
	t.Run("after its delay", func(t *testing.T) {
		t.Parallel()
		r := start(t, 1, 60)
		published(t, r)
		r.restart() // and only once
		r.fence()
		if w := r.wills(); len(w) != 1 {
			t.Errorf("published %v", w)
		}
	})
	t.Run("the session ends first", func(t *testing.T) {
		t.Parallel()
		r := start(t, 60, 1)
		published(t, r)
		eventually(t, "end of the session", func() bool { return r.b.Stats().Sessions == 0 })
	})
	t.Run("the client is back in time", func(t *testing.T) {
		t.Parallel()
		r := start(t, 1, 60)
		p := r.client(mqtt.V5, "dev", keep)
		if f, err := p.next(1500 * time.Millisecond); err == nil {
			t.Fatalf("% x", f)
		}
		r.fence()
		if w := r.wills(); len(w) > 0 {
			t.Errorf("published %v", w)
		}
		p.send(mqtt.AppendDisconnect(nil, mqtt.V5, mqtt.Success, ""))
		r.restart()
		r.fence()
		if w := r.wills(); len(w) > 0 {
			t.Errorf("published after a restart: %v", w)
		}
	})
	t.Run("a clean start ends the session", func(t *testing.T) {
		t.Parallel()
		r := start(t, 2, 60)
		p := r.client(mqtt.V5, "dev")
		p.publishDone(1, 1, "fence", "")
		published(t, r)
		r.restart() // and only once
		begin := time.Now()
		eventually(t, "time", func() bool { return time.Since(begin) > 2100*time.Millisecond })
		r.fence()
		if w := r.wills(); len(w) != 1 {
			t.Errorf("published %v", w)
		}
	})
	t.Run("across a restart", func(t *testing.T) {
		t.Parallel()
		r := start(t, 2, 60)
		r.stop()
		if w := r.wills(); len(w) > 0 {
			t.Fatalf("published by the stop: %v", w)
		}
		r.start()
		published(t, r)
	})
	t.Run("due while the gateway is off", func(t *testing.T) {
		t.Parallel()
		r := start(t, 1, 60)
		r.stop()
		begin := time.Now()
		eventually(t, "time", func() bool { return time.Since(begin) > 1100*time.Millisecond })
		r.start()
		published(t, r)
	})
}

func TestWillThatIsRefusedIsCounted(t *testing.T) {
	r := newRig(t, func(r *rig) { r.in.refuse = func(*broker.Message) error { return errors.New("no") } })
	r.client(mqtt.V311, "dev", withWill()).nc.Close()
	r.counted(1, "publish_refused_total", "error")
}
