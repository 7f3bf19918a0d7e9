package mqttup_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/mqttup"
	"holdfast/internal/testkit"
)

// TestMeterShowsWhatTheWireCarried, against what a proxy has counted: by all connections, TLS or not.
func TestMeterShowsWhatTheWireCarried(t *testing.T) {
	b := bridgetest.StartBroker(t, nil)
	proxy := testkit.StartProxy(t, b.Addr())
	o := options(b)
	o.URL = "mqtt://" + proxy.Addr()
	up := upstream(t, o)
	var meter bridge.Meter
	up.Meter(&meter)
	for range 2 {
		var a acks
		s, err := up.Dial(within(t, 20*time.Second), a.put)
		if err != nil {
			t.Fatal(err)
		}
		for i := 1; i <= 500; i++ {
			if err := s.Send(message(i, strings.Repeat("x", i))); err != nil {
				t.Fatal(err)
			}
		}
		testkit.Eventually(t, 10*time.Second, "all acks", func() bool { return len(a.got()) == 500 })
		s.Close(within(t, 5*time.Second))
	}
	testkit.Eventually(t, 10*time.Second, "the proxy has handed on what was written", func() bool { return uint64(proxy.Traffic().Up) == meter.Total() })
}

// TestProbeSaysNothing: a probe connects and leaves, and the broker sees no client.
func TestProbeSaysNothing(t *testing.T) {
	b := bridgetest.StartBroker(t, nil)
	o := options(b)
	o.URL, o.URLs = "", []string{b.URL(), "mqtt://" + testkit.FreeAddr(t)}
	up := upstream(t, o)
	if err := up.Probe(within(t, 5*time.Second), 0); err != nil {
		t.Errorf("one that answers: %v", err)
	}
	if err := up.Probe(within(t, 5*time.Second), 1); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("one that is not there: %v", err)
	}
	up.Use(1)
	if _, err := up.Dial(within(t, 5*time.Second), func(uint64, error) {}); err == nil {
		t.Error("dialled the first address, told to use the second")
	}
	up.Use(0)
	s, err := up.Dial(within(t, 5*time.Second), func(uint64, error) {})
	if err != nil {
		t.Fatal(err)
	}
	s.Close(within(t, 5*time.Second))
	if n := len(b.Connects()); n != 1 {
		t.Errorf("%d CONNECTs came, want the dial's", n)
	}
}

// TestCommandsFollowTheData: the client is where Prefer says, tries the others while that one is down, and goes there when it is back.
func TestCommandsFollowTheData(t *testing.T) {
	brokers := []*bridgetest.Broker{bridgetest.StartBroker(t, nil), bridgetest.StartBroker(t, nil)}
	var mu sync.Mutex
	prefer := ""
	var states []string
	set := func(url string) {
		mu.Lock()
		defer mu.Unlock()
		prefer = url
	}
	o := mqttup.Options{
		URLs: []string{brokers[0].URL(), brokers[1].URL()}, ClientID: "gw-cmd", Log: testkit.Logger(t),
		Prefer: func() string {
			mu.Lock()
			defer mu.Unlock()
			return prefer
		},
		OnState: func(up bool, err error) {
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, context.Canceled) {
				return
			}
			states = append(states, map[bool]string{true: "up", false: "down"}[up])
		},
	}
	got := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- mqttup.TakeCommands(ctx, o, "gw/x/cmd/+/+", func(m mqttup.Incoming) {
			got <- string(m.Payload)
			m.Ack()
		})
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	at := func(i int) {
		t.Helper()
		testkit.Eventually(t, 20*time.Second, "commands come from the broker", func() bool {
			brokers[i].Deliver(bridgetest.PublishFrame("gw/x/cmd/pump/submit", []byte{'0' + byte(i)}, 1, 7))
			select {
			case p := <-got:
				return p == string('0'+rune(i))
			case <-time.After(50 * time.Millisecond):
				return false
			}
		})
	}
	at(0)
	set(brokers[1].URL())
	at(1)
	if brokers[0].Disconnects() != 1 {
		t.Error("left without a DISCONNECT")
	}
	brokers[1].Stop() // it is preferred, and down
	at(0)
	set("") // it does not matter where
	at(0)
	if n := len(brokers[0].Connects()); n > 3 {
		t.Errorf("%d connections to the first", n)
	}
}
