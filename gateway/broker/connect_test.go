package broker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

func TestConnackTellsWhatIsOffered(t *testing.T) {
	r := newRig(t, func(r *rig) { r.cfg.MaxKeepAlive = 100 * time.Second })
	_, a := r.connect(mqtt.V5, "", func(k *mqtt.Connect) { k.SessionExpiry = 0xFFFFFFFF; k.KeepAlive = 600 })
	if a.ReceiveMaximum != 256 || a.MaximumPacketSize != 256<<10 || a.TopicAliasMaximum != 32 {
		t.Errorf("limits: %+v", a)
	}
	if !a.HasSessionExpiry || a.SessionExpiry != 7*24*3600 {
		t.Errorf("session expiry: %+v", a)
	}
	if !a.HasKeepAlive || a.KeepAlive != 100 {
		t.Errorf("keep alive: %+v", a)
	}
	if len(a.AssignedClientID) < 10 {
		t.Errorf("assigned client id %q", a.AssignedClientID)
	}
	if a.NoRetain || a.NoShared || a.NoWildcard || a.NoSubscriptionIDs || a.HasMaximumQoS {
		t.Errorf("less is offered than is there: %+v", a)
	}
	_, a = r.connect(mqtt.V5, "x", func(k *mqtt.Connect) { k.SessionExpiry = 60; k.KeepAlive = 30 })
	if a.HasSessionExpiry || a.HasKeepAlive || a.AssignedClientID != "" {
		t.Errorf("what was asked for is granted, and told again: %+v", a)
	}
	_, a = r.connect(mqtt.V311, "")
	if a.Reason != mqtt.Success || a.SessionPresent {
		t.Errorf("3.1.1: %+v", a)
	}
}

func TestRefusedConnect(t *testing.T) {
	for _, x := range []struct {
		err  error
		v5   mqtt.Reason
		v311 byte
	}{
		{broker.ErrBadCredentials, mqtt.BadUsernameOrPassword, 4},
		{broker.ErrNotAuthorized, mqtt.NotAuthorized, 5},
		{broker.ErrBadClientID, mqtt.ClientIDNotValid, 2},
		{broker.ErrUnavailable, mqtt.ServerUnavailable, 3},
		{broker.ErrTooOften, mqtt.ConnectionRateExceeded, 3},
		{errors.New("anything"), mqtt.NotAuthorized, 5},
	} {
		t.Run(x.err.Error(), func(t *testing.T) {
			eachVersion(t, func(t *testing.T, v mqtt.Version) {
				r := newRig(t, func(r *rig) {
					r.auth.connect = func(*broker.ConnectInfo) error { return fmt.Errorf("no: %w", x.err) }
				})
				p := r.dial(v)
				p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
				p.publish(1, 1, "t", "x") // sent along, and not taken
				f := p.frame(mqtt.TypeConnack)
				if v == mqtt.V5 && f[3] != byte(x.v5) || v == mqtt.V311 && f[3] != x.v311 {
					t.Errorf("CONNACK % x", f)
				}
				p.closed(0)
				eventually(t, "end of the connection", func() bool { return r.b.Stats().Connections == 0 })
				if s := r.b.Stats(); s.Sessions != 0 || len(r.in.messages()) != 0 {
					t.Errorf("left behind: %+v, %v", s, r.in.messages())
				}
			})
		})
	}
}

func TestAuthorizerSeesTheConnect(t *testing.T) {
	var got broker.ConnectInfo
	r := newRig(t, func(r *rig) {
		r.auth.connect = func(c *broker.ConnectInfo) error { got = *c; return nil }
	})
	p := r.client(mqtt.V5, "dev", func(k *mqtt.Connect) {
		k.HasUsername, k.Username = true, "user"
		k.HasPassword, k.Password = true, []byte("pass")
	})
	if got.ClientID != "dev" || got.Username != "user" || string(got.Password) != "pass" || got.Listener != "lan" ||
		got.TLS != nil || got.Remote.String() != p.nc.LocalAddr().String() {
		t.Errorf("%+v", got)
	}
}

// Bytes that are no acceptable CONNECT, and what they are answered with.
func TestWrongConnects(t *testing.T) {
	good := func(v mqtt.Version, id string, clean bool) []byte {
		return mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: id, CleanStart: clean})
	}
	change := func(b []byte, at int, to byte) []byte {
		b = append([]byte{}, b...)
		b[at] = to
		return b
	}
	for _, x := range []struct {
		name string
		send []byte
		want string // what comes before the end, in hex
	}{
		{"protocol name", change(good(mqtt.V311, "a", true), 4, 'X'), ""},
		{"level 6", change(good(mqtt.V5, "a", true), 8, 6), "20 03 00 84 00"},
		{"level 3", change(good(mqtt.V311, "a", true), 8, 3), "20 02 00 01"},
		{"reserved flag, 3.1.1", change(good(mqtt.V311, "a", true), 9, 3), ""},
		{"reserved flag, 5", change(good(mqtt.V5, "a", true), 9, 3), "20 03 00 81 00"},
		{"will QoS without will", change(good(mqtt.V5, "a", true), 9, 2|8), "20 03 00 81 00"},
		{"empty id without clean session", good(mqtt.V311, "", false), "20 02 00 02"},
		{"U+0000 in the id", good(mqtt.V5, "a\x00", true), "20 03 00 81 00"},
		{"UTF-8 in the id", good(mqtt.V5, "a\xff", true), "20 03 00 81 00"},
		{"long id", good(mqtt.V5, strings.Repeat("x", 257), true), "20 03 00 85 00"},
		{"long id, 3.1.1", good(mqtt.V311, strings.Repeat("x", 257), true), "20 02 00 02"},
		{"authentication method", mqtt.AppendConnect(nil, &mqtt.Connect{Version: mqtt.V5, ClientID: "a", HasAuth: true, AuthMethod: "x"}), "20 03 00 8c 00"},
		{"first is PUBLISH", mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{Topic: []byte("t")}), ""},
		{"first is PINGREQ", mqtt.AppendPingreq(nil), ""},
		{"fixed header flags", change(good(mqtt.V5, "a", true), 0, 0x11), ""},
		{"HTTP", []byte("GET / HTTP/1.1\r\n\r\n"), ""},
		{"TLS", []byte{0x16, 3, 1, 2, 0, 1, 0, 1}, ""},
		{"reserved type", []byte{0, 0}, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			r := newRig(t, nil)
			p := r.dial(mqtt.V5)
			p.send(x.send)
			var got []byte
			for {
				f, err := p.next(patience)
				if err != nil {
					break
				}
				got = append(got, f...)
			}
			if s := fmt.Sprintf("% x", got); s != x.want {
				t.Errorf("answered %s, want %s", s, x.want)
			}
			eventually(t, "end of the connection", func() bool { return r.b.Stats().Connections == 0 })
		})
	}
}

func TestSecondConnectIsAProtocolError(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev")
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{Version: v, ClientID: "dev", CleanStart: true}))
		p.closed(mqtt.ProtocolError)
	})
}

func TestSessionPresent(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		present := func(want bool, change ...func(*mqtt.Connect)) *peer {
			t.Helper()
			p, a := r.connect(v, "dev", change...)
			if a.SessionPresent != want {
				t.Errorf("session present %v, want %v", a.SessionPresent, want)
			}
			return p
		}
		clean := func(k *mqtt.Connect) { k.CleanStart = true }
		present(false, keep)                                           // new
		present(true, keep)                                            // takeover
		present(true, keep).nc.Close()                                 //
		present(true, keep).send(mqtt.AppendDisconnect(nil, v, 0, "")) // DISCONNECT keeps it
		r.restart()
		present(true, keep)
		if v == mqtt.V5 { // in 3.1.1 clean sessions are never kept
			present(false, keep, clean)
			present(true, keep)
		}
		present(false) // ends with its connection
		// The connection of a session that ends with it is taken over: there is none to resume.
		present(false, keep)
		present(false, clean).nc.Close()
		eventually(t, "end of the session", func() bool { return r.b.Stats().Sessions == 0 })
		present(false, keep)
		present(true, keep)
		r.restart()
		present(true, keep)
	})
}

// A clean start has no subscriptions, also where deliveries to the old session were going on.
func TestCleanStartHasNoSubscriptions(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		s := r.client(v, "dev", keep)
		s.subscribe(1, filter("t", 0))
		p := r.client(v, "pub")
		p.publishDone(1, 1, "t", "x")
		s.take(1)
		s = r.client(v, "dev")
		p.publishDone(1, 1, "t", "y")
		s.subscribe(1, filter("mark", 0))
		p.publishDone(1, 1, "mark", "mark")
		if got := s.take(1); got[0] != "mark" {
			t.Errorf("got %v", got)
		}
	})
}

func TestDisconnectMayShortenTheSession(t *testing.T) {
	r := newRig(t, nil)
	p := r.client(mqtt.V5, "dev", keep)
	p.send(mqtt.AppendDisconnectPacket(nil, mqtt.V5, &mqtt.Disconnect{HasSessionExpiry: true}))
	p.closed(0)
	eventually(t, "end of the session", func() bool { return r.b.Stats().Sessions == 0 })
	p = r.client(mqtt.V5, "dev")
	p.send(mqtt.AppendDisconnectPacket(nil, mqtt.V5, &mqtt.Disconnect{HasSessionExpiry: true, SessionExpiry: 5}))
	p.closed(mqtt.ProtocolError) // 0 in CONNECT stays 0
}

func TestSessionExpires(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.SessionExpiryMax = 2 * time.Second })
		s := r.client(v, "dev", keep)
		s.subscribe(1, mqtt.Subscription{Filter: "t"})
		s.nc.Close()
		p := r.client(v, "pub")
		r.counted(1, "sessions_expired_total")
		if st := r.b.Stats(); st.Sessions != 1 || st.Subscriptions != 0 {
			t.Fatalf("left behind: %+v", st)
		}
		// A new session of that id gets nothing that the old one had subscribed to.
		s, a := r.connect(v, "dev", keep)
		if a.SessionPresent {
			t.Error("session present")
		}
		p.publishDone(1, 1, "t", "x")
		s.silent()
	})
}

func TestSessionExpiryGoesOnAcrossARestart(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) { r.cfg.SessionExpiryMax = time.Second })
	r.client(mqtt.V311, "dev", keep).nc.Close()
	eventually(t, "end of the connection", func() bool { return r.b.Stats().Connections == 0 })
	r.restart()
	eventually(t, "expiry", func() bool { return r.b.Stats().Sessions == 0 })
	r.restart()
	if n := r.b.Stats().Sessions; n != 0 {
		t.Errorf("%d sessions came back", n)
	}
}

// The new connection never waits for the old one, which may be half open for minutes.
func TestTakeoverIsInstantWithADeadPeer(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		old := r.client(v, "dev", keep)
		old.subscribe(1, mqtt.Subscription{Filter: "big", QoS: 0})
		p := r.client(v, "pub")
		// Fill the buffers of the connection that is not read any more.
		for i := range 100 {
			p.publishDone(1, uint16(i+1), "big", strings.Repeat("x", 100_000))
		}
		begin := time.Now()
		r.client(v, "dev", keep)
		if d := time.Since(begin); d > 3*time.Second { // less than what a write to it may take
			t.Errorf("took %v", d)
		}
	})
}

func TestTakeoverTellsTheOldConnection(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		old := r.client(v, "dev")
		r.client(v, "dev").silent()
		old.closed(mqtt.SessionTakenOver)
	})
}

// Many connections with one id: all but one end, and that one works.
func TestTakeoverStorm(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 50 {
					c, err := mqtt.Dial(context.Background(), mqtt.ClientOptions{Address: r.addr(), Connect: mqtt.Connect{Version: v, ClientID: "dev"}})
					if err != nil {
						continue // taken over before its CONNACK
					}
					_, _ = c.Subscribe(context.Background(), &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: fmt.Sprint(rand.IntN(5))}}})
					if rand.IntN(2) == 0 {
						c.Abort()
					} else {
						_ = c.Disconnect(mqtt.Success)
					}
				}
			})
		}
		wg.Wait()
		p := r.client(v, "dev")
		p.subscribe(1, mqtt.Subscription{Filter: "mine", QoS: 1})
		p.publish(1, 1, "mine", "x")
		seen := map[mqtt.Type]bool{}
		for range 2 {
			f, err := p.next(patience)
			if err != nil {
				t.Fatal(err)
			}
			seen[mqtt.Type(f[0]>>4)] = true
		}
		if !seen[mqtt.TypePuback] || !seen[mqtt.TypePublish] {
			t.Errorf("got %v", seen)
		}
		eventually(t, "end of the others", func() bool { return r.b.Stats().Connections == 1 })
		if s := r.b.Stats(); s.Sessions != 1 || s.Subscriptions != 1 {
			t.Errorf("left behind: %+v", s)
		}
	})
}

func TestKeepAlive(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev", func(k *mqtt.Connect) { k.KeepAlive = 1 })
		var last time.Time                                            // before the last packet was sent
		for begin := time.Now(); time.Since(begin) < 2*time.Second; { // kept alive by what it sends
			last = time.Now()
			p.silent()
			if f, err := p.next(100 * time.Millisecond); err == nil {
				t.Fatalf("got % x", f)
			}
		}
		p.closed(mqtt.KeepAliveTimeout)
		if d := time.Since(last); d < 1500*time.Millisecond || d > 4*time.Second {
			t.Errorf("closed after %v, want 1.5 s", d)
		}
		r.counted(1, "connections_ended_total", "timeout")
	})
}

// Bytes are no packets: half of one keeps nobody alive.
func TestKeepAliveCountsPackets(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	p := r.client(mqtt.V5, "dev", func(k *mqtt.Connect) { k.KeepAlive = 1 })
	begin := time.Now()
	for drip := mqtt.AppendPublish(nil, mqtt.V5, &mqtt.Publish{Topic: []byte("t"), Payload: make([]byte, 99)}); ; drip = drip[1:] {
		if _, err := p.nc.Write(drip[:1]); err != nil {
			break
		}
		if f, err := p.next(100 * time.Millisecond); f != nil || errors.Is(err, io.EOF) {
			break
		}
	}
	if d := time.Since(begin); d < 1300*time.Millisecond || d > 3*time.Second {
		t.Errorf("closed after %v, want 1.5 s", d)
	}
}

func TestKeepAliveOfHoursIsNotMistaken(t *testing.T) {
	r := newRig(t, nil)
	for _, k := range []uint16{0, 43690, 43691, 43692, 65535} {
		p := r.client(mqtt.V311, fmt.Sprint(k), func(c *mqtt.Connect) { c.KeepAlive = k })
		if f, err := p.next(100 * time.Millisecond); err == nil || f != nil || errors.Is(err, context.Canceled) {
			t.Errorf("keep alive %d: % x, %v", k, f, err)
		}
		p.silent()
	}
}

func TestTooManySessions(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) {
			r.cfg.MaxSessions = 2
			r.auth.who = func(c *broker.ConnectInfo) string { return c.ClientID }
		})
		r.client(v, "a", keep)
		r.client(v, "b", keep).nc.Close()
		_, a := r.connect(v, "c")
		if v == mqtt.V5 && a.Reason != mqtt.QuotaExceeded || v == mqtt.V311 && a.Reason.ReturnCode() != 3 {
			t.Errorf("told %v", a.Reason)
		}
		r.client(v, "b", keep).silent()
	})
}

// TestSessionsOfNobodyMakeRoom has clients without credentials come under ever new ids and leave a session each: those of known
// devices, and of whoever is connected, stay, and others still come in.
func TestSessionsOfNobodyMakeRoom(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		const most = 20
		r := newRig(t, func(r *rig) {
			r.cfg.MaxSessions = most
			r.auth.who = func(c *broker.ConnectInfo) string {
				if strings.HasPrefix(c.ClientID, "known") {
					return c.ClientID
				}
				return ""
			}
		})
		for _, id := range []string{"known-offline", "online"} {
			r.client(v, id, keep).subscribe(1, filter(id, 1))
		}
		online := r.client(v, "online", keep)
		offline := r.client(v, "known-offline", keep)
		offline.nc.Close()
		for i := range 3 * most {
			r.client(v, fmt.Sprint("new-", i), keep).nc.Close()
			if n := r.b.Stats().Sessions; n > most {
				t.Fatalf("%d sessions, more than %d", n, most)
			}
			r.counted(1, "connections_open")
		}
		p := r.client(v, "known-publisher")
		p.publishDone(1, 1, "online", "1")
		p.publishDone(1, 2, "known-offline", "2")
		online.take(1)
		r.client(v, "known-offline", keep).take(1)
		_, a := r.connect(v, fmt.Sprint("new-", 3*most-1), keep)
		if !a.SessionPresent {
			t.Error("the newest session was ended")
		}
		if _, a := r.connect(v, "new-0", keep); a.SessionPresent {
			t.Error("the oldest session is there")
		}
		if r.metric("sessions_evicted_total") < 2*most-3 {
			t.Errorf("%v are counted", r.metric("sessions_evicted_total"))
		}
		r.stop()
		r.start()
		if n := r.b.Stats().Sessions; n > most {
			t.Errorf("%d sessions after a restart", n)
		}
	})
}

// What is handed in when the gateway stops is committed and acknowledged, then clients are told.
func TestShutdown(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		h := &held{}
		r := newRig(t, func(r *rig) { r.in.deliver = h.deliver })
		p := r.client(v, "dev", func(k *mqtt.Connect) {
			k.Will = &mqtt.Will{Topic: "will", Payload: []byte("will")}
		})
		silent := testkit.Dial(t, r.addr()) // never says a word
		p.publish(1, 1, "t", "x")
		eventually(t, "hand-in", func() bool { return h.len() == 1 })
		stopped := make(chan struct{})
		go func() { defer close(stopped); r.stop() }()
		eventually(t, "listener to close", func() bool {
			nc, err := testDialer.DialContext(context.Background(), "tcp", r.addr())
			if err == nil {
				nc.Close()
			}
			return err != nil
		})
		h.release(nil, true)
		p.success(mqtt.TypePuback, 1)
		p.closed(mqtt.ServerShuttingDown)
		begin := time.Now()
		<-stopped
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("took %v", d)
		}
		silent.Close()
		if got := join(r.in.payloads()); got != "x" {
			t.Errorf("stored %q: a stop is no death of a device", got)
		}
	})
}

// A store that does not commit does not keep Run for ever.
func TestShutdownWhileCommitsHang(t *testing.T) {
	h := &held{}
	r := newRig(t, func(r *rig) {
		r.in.deliver = h.deliver
		r.cfg.ShutdownTimeout = 300 * time.Millisecond
	})
	p := r.client(mqtt.V5, "dev")
	p.publish(1, 1, "t", "x")
	eventually(t, "hand-in", func() bool { return h.len() == 1 })
	begin := time.Now()
	r.stop()
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	p.closed(mqtt.ServerShuttingDown) // and no PUBACK
	h.release(nil, true)
}

// What a client sends along with CONNECT is answered after CONNACK, however long that takes.
func TestNothingComesBeforeConnack(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		r.client(v, "dev", keep).subscribe(1, filter("t", 1))
		r.client(v, "pub").publishDone(1, 1, "t", "waits")
		p := r.dial(v)
		k := mqtt.Connect{Version: v, ClientID: "dev"}
		keep(&k) // its row has to be written first
		b := mqtt.AppendConnect(nil, &k)
		b = mqtt.AppendPingreq(b)
		b = mqtt.AppendAck(b, mqtt.TypePubrec, 5, v, 0)
		b = mqtt.AppendAck(b, mqtt.TypePubrel, 6, v, 0)
		b = mqtt.AppendPublish(b, v, &mqtt.Publish{QoS: 1, ID: 7, Topic: []byte("u")})
		p.send(b)
		p.connack()
	})
}

func TestConnectIsSmall(t *testing.T) {
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, func(r *rig) { r.cfg.MaxConnectPacket = 1000 })
		p := r.dial(v)
		p.send(mqtt.AppendConnect(nil, &mqtt.Connect{
			Version: v, ClientID: "dev", CleanStart: true,
			Will: &mqtt.Will{Topic: "t", Payload: make([]byte, 1000)},
		}))
		p.closed(0)
	})
}
