package broker_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

// rows counts the rows of sessions and subscriptions that are on disk.
func (r *rig) rows() (n int) {
	r.t.Helper()
	if err := r.store.Flush(); err != nil {
		r.t.Fatal(err)
	}
	for _, prefix := range []byte{kv.PrefixSession, kv.PrefixQoS2, kv.PrefixWill} {
		if err := r.store.Scan([]byte{prefix}, func(_, _ []byte) error { n++; return nil }); err != nil {
			r.t.Fatal(err)
		}
	}
	return n
}

func TestEndTellsTheClient(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		if r.b.End("dev", mqtt.AdministrativeAction, "disabled", false) {
			t.Error("ended somebody who is not there")
		}
		p := r.client(v, "dev", keep)
		other := r.client(v, "other")
		if !r.b.End("dev", mqtt.AdministrativeAction, "device was disabled", false) {
			t.Error("did not end the connection")
		}
		if v == mqtt.V5 {
			d, err := mqtt.ParseDisconnect(p.frame(mqtt.TypeDisconnect), v, mqtt.FromServer)
			if err != nil || d.Reason != mqtt.AdministrativeAction || d.ReasonString != "device was disabled" {
				t.Errorf("DISCONNECT %+v, %v", d, err)
			}
		}
		p.closed(0)
		other.silent()
		r.counted(1, "connections_ended_total", "ordered")
		if _, a := r.connect(v, "dev", keep); !a.SessionPresent {
			t.Error("the session is gone, and nobody wanted that")
		}
	})
}

// The text does not make the DISCONNECT larger than the client takes.
func TestEndKeepsToTheMaximumPacketSize(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V5, "dev", func(k *mqtt.Connect) { k.MaximumPacketSize = 20 })
	r.b.End("dev", mqtt.AdministrativeAction, strings.Repeat("long ", 10), false)
	p.closed(mqtt.AdministrativeAction)
}

func TestEndForgetsTheSession(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, online := range []bool{true, false} {
			t.Run(fmt.Sprintf("online=%v", online), func(t *testing.T) {
				r := newRig(t, nil)
				p := r.client(v, "dev", keep)
				p.subscribe(1, filter("t", 1))
				p.publish(2, 7, "x", "")
				p.success(mqtt.TypePubrec, 7)
				if n := r.rows(); n != 3 {
					t.Fatalf("%d rows, want session, subscription, packet id", n)
				}
				if !online {
					p.nc.Close()
					eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
					r.client(v, "other").publishDone(1, 1, "t", "waits")
				}
				if got := r.b.End("dev", mqtt.AdministrativeAction, "", true); got != online {
					t.Errorf("End says %v", got)
				}
				eventually(t, "end of the session", func() bool { return r.rows() == 0 && r.b.Stats().Subscriptions == 0 })
				_, a := r.connect(v, "dev", keep)
				if a.SessionPresent {
					t.Error("session present")
				}
				r.stop()
				r.start()
				if _, a := r.connect(v, "dev", keep); !a.SessionPresent {
					t.Error("the new session is not kept")
				}
			})
		}
	})
}

// The old connection may take its time to go: who comes meanwhile finds nothing.
func TestForgetDoesNotWaitForTheOldConnection(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		stuck, free := make(chan struct{}), make(chan struct{})
		r := newRig(t, func(r *rig) {
			r.auth.publish = func(_, topic string) bool {
				if topic == "stuck" {
					close(stuck)
					<-free
				}
				return true
			}
		})
		p := r.client(v, "dev", keep)
		p.subscribe(1, filter("t", 1))
		p.publish(1, 1, "stuck", "")
		<-stuck
		r.b.End("dev", mqtt.AdministrativeAction, "", true)
		q, a := r.connect(v, "dev", keep)
		if a.SessionPresent {
			t.Error("session present")
		}
		q.subscribe(1, filter("new", 1))
		close(free)
		eventually(t, "end of the old one", func() bool { return r.b.Stats().Connections == 1 })
		x := r.client(v, "other")
		x.publishDone(1, 1, "t", "")
		x.publishDone(1, 2, "new", "new")
		if m := q.message(); string(m.Payload) != "new" {
			t.Errorf("got %s", m.Topic)
		}
	})
}

// Connections that begin after End find nothing of the session, and keep what they make, however
// close they follow.
func TestForgetRacesWithReconnect(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		x := r.client(v, "other")
		for i := range 100 {
			p := r.client(v, "dev", keep)
			p.subscribe(1, filter("t", 1))
			if i%2 == 1 {
				p.nc.Close()
			}
			var racing sync.WaitGroup
			if i%3 > 0 {
				racing.Go(func() { // some come before End, some after
					nc, err := testDialer.DialContext(t.Context(), "tcp", r.addr())
					if err != nil {
						t.Error(err)
						return
					}
					k := mqtt.Connect{Version: v, ClientID: "dev"}
					keep(&k)
					_, _ = nc.Write(mqtt.AppendConnect(nil, &k))
					_, _ = nc.Read(make([]byte, 1)) // until it is in, or out
					nc.Close()
				})
			}
			r.b.End("dev", mqtt.AdministrativeAction, "", true)
			racing.Wait()
			q, a := r.connect(v, "dev", keep)
			if a.SessionPresent && i%3 == 0 {
				t.Fatal("session present")
			}
			q.subscribe(1, filter("now/"+fmt.Sprint(i), 1))
			x.publishDone(1, 1, "t", "")
			x.publishDone(1, 1, "now/"+fmt.Sprint(i), "new")
			if m := q.message(); string(m.Payload) != "new" {
				t.Fatalf("got %s of a subscription that was forgotten", m.Topic)
			}
			q.pub(mqtt.TypePuback, 1)
			r.b.End("dev", mqtt.AdministrativeAction, "", true)
			q.closed(mqtt.AdministrativeAction)
		}
		eventually(t, "no rows", func() bool { return r.rows() == 0 })
	})
}

// A client that is just being let in is ended, too: at any moment of its CONNECT.
func TestEndDuringConnect(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		asked, answer := make(chan struct{}), make(chan struct{})
		var canceled atomic.Bool
		r, w := watched(t, func(r *rig, _ *watcher) {
			r.auth.await = func(ctx context.Context, _ *broker.ConnectInfo) error {
				asked <- struct{}{}
				select {
				case <-answer:
				case <-ctx.Done():
					canceled.Store(true)
				}
				return nil // it had been let in
			}
		})
		p := r.dial(v)
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
		<-asked
		if !r.b.End("dev", mqtt.AdministrativeAction, "disabled", true) {
			t.Error("End did not find it")
		}
		p.closed(0)
		r.stop()
		if !canceled.Load() || len(w.all()) != 0 {
			t.Errorf("canceled %v, %+v", canceled.Load(), w.all())
		}
		r.start()
		close(answer)
		r.auth.await = nil
		for range 200 { // at a random moment
			p := r.dial(v)
			p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
			eventually(t, "end", func() bool { return r.b.End("dev", mqtt.AdministrativeAction, "", false) })
			for {
				if _, err := p.next(patience); err != nil {
					break
				}
			}
		}
		eventually(t, "end of all", func() bool { return r.b.Stats().Connections == 0 })
		r.stop()
		if a, b := w.count("connected"), w.count("disconnected"); a != b {
			t.Errorf("%d connected, %d disconnected", a, b)
		}
	})
}

// A late answer of the Authorizer does not keep the broker from stopping, nor longer than CONNECT may take.
func TestAuthorizerMayBlock(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		began := make(chan struct{}, 1)
		start := func(change func(r *rig)) *rig {
			return newRig(t, func(r *rig) {
				change(r)
				r.auth.await = func(ctx context.Context, _ *broker.ConnectInfo) error {
					began <- struct{}{}
					<-ctx.Done()
					return ctx.Err()
				}
			})
		}
		r := start(shorten)
		p := r.dial(v)
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
		if a := p.connack(); a.Reason == mqtt.Success {
			t.Error("let in")
		}
		<-began
		r = start(func(*rig) {})
		r.dial(v).send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
		<-began
		begin := time.Now()
		r.stop()
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("stopped after %v", d)
		}
	})
}

func TestClientIDBelongsToItsPrincipal(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		as := func(user string) func(*mqtt.Connect) {
			return func(k *mqtt.Connect) { k.HasUsername, k.Username = true, user }
		}
		for _, x := range []struct {
			first, second string
			taken         bool // the second takes over while the first is there
			inherits      bool // and finds the session
		}{
			{"a", "a", true, true},
			{"a", "b", false, false},
			{"a", "", false, false},
			{"", "", true, true},
			{"", "b", true, false},
		} {
			t.Run(x.first+" then "+x.second, func(t *testing.T) {
				r := newRig(t, func(r *rig) { r.auth.who = func(c *broker.ConnectInfo) string { return c.Username } })
				p := r.client(v, "dev", keep, as(x.first))
				p.subscribe(1, filter("t", 1))
				q, a := r.connect(v, "dev", keep, as(x.second))
				if !x.taken {
					want := mqtt.NotAuthorized
					if a.Reason != want {
						t.Errorf("CONNACK %v, want %v", a.Reason, want)
					}
					q.closed(0)
					p.silent() // the first stays
					p.nc.Close()
					eventually(t, "end", func() bool { return r.b.Stats().Connections == 0 })
					q, a = r.connect(v, "dev", keep, as(x.second))
				}
				if a.Reason != mqtt.Success || a.SessionPresent != x.inherits {
					t.Errorf("CONNACK %+v", a)
				}
				o := r.client(v, "other")
				o.publishDone(1, 1, "t", "secret")
				if x.inherits {
					q.message()
				} else {
					q.silent()
				}
				// The same after a restart.
				r.restart()
				if _, a := r.connect(v, "dev", keep, as(x.first)); a.SessionPresent != (x.first == x.second) {
					t.Errorf("session present: %v", a.SessionPresent)
				}
			})
		}
	})
}

// Rights are those of the connection, and hold for all that the client does, while they are there.
func TestRightsOfTheConnection(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		var denied atomic.Value
		denied.Store("")
		r := newRig(t, func(r *rig) {
			r.auth.publish = func(device, topic string) bool { return topic != device+"/"+denied.Load().(string) }
		})
		p := r.client(v, "dev", withWill(func(w *mqtt.Will) { w.Topic = "dev/no" }))
		p.publishDone(1, 1, "dev/no", "1")
		denied.Store("no")
		p.publish(1, 2, "dev/no", "2")
		if v == mqtt.V5 {
			if reason := p.ack(mqtt.TypePuback, 2); reason != mqtt.NotAuthorized {
				t.Errorf("PUBACK %v", reason)
			}
			p.nc.Close() // its will is refused as well
		} else {
			p.closed(0)
		}
		eventually(t, "end", func() bool { return r.b.Stats().Sessions == 0 })
		r.stop()
		if got := join(r.in.payloads()); got != "1" {
			t.Errorf("stored %q", got)
		}
	})
}

func TestRecheckWithdrawsSubscriptions(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		for _, how := range []string{"online", "offline", "restored", "by a new connection"} {
			t.Run(how, func(t *testing.T) {
				var mu sync.Mutex
				var denied []string
				r, w := watched(t, func(r *rig, _ *watcher) {
					r.auth.subscribe = func(device, filter string) bool {
						mu.Lock()
						defer mu.Unlock()
						return device != "dev" || !slices.Contains(denied, filter)
					}
				})
				deny := func(filters ...string) {
					mu.Lock()
					denied = filters
					mu.Unlock()
				}
				p := r.client(v, "dev", keep)
				p.subscribe(1, filter("a", 1), filter("b", 1), filter("$share/g/c", 1), filter(reqs, 1))
				l := w.nth(t, "subscribed", 1).link
				x := r.client(v, "other")
				if how != "online" {
					p.nc.Close()
					eventually(t, "end", func() bool { return r.b.Stats().Connections == 1 })
					if how == "offline" {
						x.publishDone(1, 1, "a", "waits, and is not to be seen")
						x.publishDone(1, 2, "b", "waits")
					}
				}
				deny("a", "c", reqs)
				switch how {
				case "restored":
					r.restart()
					x = r.client(v, "other")
					r.b.Recheck()
				case "by a new connection":
				case "offline":
					r.b.Recheck("nobody", "dev")
				default:
					r.b.Recheck()
				}
				if how != "online" {
					var a *mqtt.Connack
					if p, a = r.connect(v, "dev", keep); !a.SessionPresent {
						t.Fatal("the session is gone")
					}
					if how == "offline" {
						if m := p.message(); string(m.Payload) != "waits" {
							t.Errorf("got %s", m.Payload)
						}
					}
				}
				if n := r.b.Stats().Subscriptions; n != 1 {
					t.Errorf("%d subscriptions are left", n)
				}
				r.counted(3, "subscriptions_withdrawn_total")
				if l.Covers("cmd/dev/req/1/go") {
					t.Error("still covered")
				}
				deny() // withdrawn is withdrawn
				for i, topic := range []string{"a", "c", "b"} {
					x.publishDone(1, uint16(i+1), topic, topic)
				}
				if m := p.message(); string(m.Payload) != "b" {
					t.Errorf("got %s", m.Payload)
				}
				r.restart()
				if n := r.b.Stats().Subscriptions; n != 1 {
					t.Errorf("%d subscriptions were on disk", n)
				}
				p = r.client(v, "dev", keep)
				p.send(mqtt.AppendUnsubscribe(nil, v, &mqtt.Unsubscribe{ID: 1, Filters: []string{"a"}}))
				if f := p.frame(mqtt.TypeUnsuback); v == mqtt.V5 && f[len(f)-1] != byte(mqtt.NoSubscriptionExisted) {
					t.Errorf("UNSUBACK % x", f)
				}
			})
		}
	})
}

// A message of a shared subscription goes to a member that may have it.
func TestSharedSubscriptionsHeedRights(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		var denied sync.Map
		r := newRig(t, func(r *rig) {
			r.auth.subscribe = func(device, _ string) bool { _, no := denied.Load(device); return !no }
		})
		p, q := r.client(v, "p"), r.client(v, "q")
		p.subscribe(1, filter("$share/g/t", 1))
		q.subscribe(1, filter("$share/g/t", 1))
		denied.Store("p", nil)
		x := r.client(v, "x")
		for i := range 6 {
			x.publishDone(1, uint16(i+1), "t", fmt.Sprint(i))
		}
		for i := range 6 {
			if m := q.message(); string(m.Payload) != fmt.Sprint(i) {
				t.Errorf("got %s, want %d", m.Payload, i)
			}
		}
		p.silent()
		denied.Store("q", nil)
		x.publishDone(1, 9, "t", "nobody's")
		r.counted(1, "deliveries_dropped_total", "denied")
	})
}

func TestConnectionsOfAListenerAreLimited(t *testing.T) {
	r := newRig(t, func(r *rig) {
		r.cfg.Listeners = []broker.Listener{
			{Name: "few", Protocol: "mqtt", Address: "127.0.0.1:0", MaxConnections: 2},
			{Name: "many", Protocol: "mqtt", Address: "127.0.0.1:0"},
		}
	})
	p := r.client(mqtt.V311, "a")
	r.dial(mqtt.V311)
	r.dial(mqtt.V311).closed(0)
	r.counted(1, "connections_turned_away_total", "listener")
	nc, err := testDialer.DialContext(t.Context(), "tcp", r.b.Addrs()[1].String())
	if err != nil {
		t.Fatal(err)
	}
	other := r.over(nc, mqtt.V311)
	other.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V311, ClientID: "b", CleanStart: true}))
	other.connack()
	p.nc.Close()
	eventually(t, "room", func() bool { return r.b.Stats().Connections == 2 })
	r.client(mqtt.V311, "c").silent()
	cfg := broker.Config{Listeners: []broker.Listener{{Name: "x", Protocol: "mqtt", Address: ":0", MaxConnections: -1}}}
	if _, err := broker.New(cfg, r.store, r.in, r.auth, nil, quiet, nil); err == nil || !strings.Contains(err.Error(), "max_connections") {
		t.Errorf("a negative limit: %v", err)
	}
}
