package mqttup_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/bridge"
	"holdfast/bridge/bridgetest"
	"holdfast/bridge/mqttup"
	"holdfast/internal/testkit"
)

func passwordFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func connect(t *testing.T, o mqttup.Options, filters []string, handler func(string, []byte)) *mqttup.Client {
	t.Helper()
	o.ClientID, o.Log = "service", testkit.Logger(t)
	ctx, cancel := context.WithCancel(context.Background())
	c, err := mqttup.Connect(ctx, o, filters, handler)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := c.Wait(); err != nil {
			t.Errorf("the client ended with %v", err)
		}
		if err := c.Publish(t.Context(), "t", nil); err == nil {
			t.Error("an ended client publishes")
		}
	})
	return c
}

func TestClientPublishesAcrossLostConnections(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
		b.OnPublish = func(n, k int, _ bridgetest.Published) bridgetest.Answer {
			switch {
			case n <= 2 && k == 3:
				return bridgetest.Answer{NoAck: true, Close: true}
			case n == 1:
				return bridgetest.Answer{NoAck: true}
			}
			return bridgetest.Answer{}
		}
	})
	got := make(chan string, 10)
	c := connect(t, mqttup.Options{URL: b.URL()}, []string{"a/#"}, func(topic string, payload []byte) { got <- topic + " " + string(payload) })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := c.Publish(within(t, 20*time.Second), "t", fmt.Append(nil, i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(b.Connects()); n != 3 {
		t.Errorf("%d connections", n)
	}
	seen := map[string]bool{}
	for _, p := range b.Published() {
		seen[string(p.Payload)] = true
	}
	if len(seen) != 20 {
		t.Errorf("%d of 20 arrived", len(seen))
	}
	b.Deliver(bridgetest.PublishFrame("a/b", []byte("x"), 1, 1))
	if g := <-got; g != "a/b x" {
		t.Errorf("got %q", g)
	}
}

func TestClientPublishEnds(t *testing.T) {
	t.Parallel()
	b := bridgetest.StartBroker(t, func(b *bridgetest.Broker) {
		b.OnPublish = func(int, int, bridgetest.Published) bridgetest.Answer { return bridgetest.Answer{NoAck: true} }
	})
	c := connect(t, mqttup.Options{URL: b.URL(), MaxPayload: 100}, nil, nil)
	if err := c.Publish(within(t, 200*time.Millisecond), "t", nil); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "publish to t") {
		t.Errorf("never acknowledged: %v", err)
	}
	for topic, n := range map[string]int{"": 0, "a/+": 0, "a": 101} {
		if err := c.Publish(t.Context(), topic, make([]byte, n)); err == nil {
			t.Errorf("topic %q with %d bytes is sent", topic, n)
		}
	}
	// What nobody waits for any more is not sent again.
	b.Cut(true)
	b.Script(func(b *bridgetest.Broker) { b.OnPublish = nil })
	if err := c.Publish(within(t, 20*time.Second), "u", nil); err != nil {
		t.Error(err)
	}
	var topics []string
	for _, p := range b.Published() {
		topics = append(topics, p.Topic)
	}
	if !slices.Equal(topics, []string{"t", "u"}) {
		t.Errorf("published %q", topics)
	}
}

func TestConnectTellsWhatItWillNeverGet(t *testing.T) {
	for name, c := range map[string]struct {
		script func(*bridgetest.Broker)
		is     error
		text   string
	}{
		"credentials": {func(b *bridgetest.Broker) { b.OnConnect = func(int, bridgetest.Connect) int { return 5 } }, bridge.ErrRefused, ""},
		"filter": {
			func(b *bridgetest.Broker) {
				b.OnSubscribe = func([]string) ([]byte, []byte) { return []byte{0x80}, nil }
			}, nil, `refuses filter "a"`,
		},
	} {
		b := bridgetest.StartBroker(t, c.script)
		_, err := mqttup.Connect(within(t, 10*time.Second), mqttup.Options{URL: b.URL(), ClientID: "c"}, []string{"a"}, nil)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := mqttup.Connect(within(t, 300*time.Millisecond), mqttup.Options{URL: "mqtt://" + testkit.FreeAddr(t), ClientID: "c"}, nil, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody listens: %v", err)
	}
}
