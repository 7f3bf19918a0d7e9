package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/bridge/cloud"
	"holdfast/internal/mqtt"
	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// binary builds the gateway once, or takes the one that make has built.
var binary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("HOLDFAST_BIN"); path != "" {
		return path, nil
	}
	dir, err := os.MkdirTemp("", "holdfast-e2e-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "holdfast")
	out, err := exec.Command("go", "build", "-o", path, "holdfast/cmd/holdfast").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	return path, nil
})

// bin returns the gateway's binary, or skips the test where these are not asked for.
func bin(t *testing.T) string {
	t.Helper()
	if os.Getenv("HOLDFAST_E2E") == "" {
		t.Skip("end-to-end tests run with HOLDFAST_E2E=1: make e2e")
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// cycles is how often something is killed: E2E_CYCLES, or a few.
func cycles() int {
	if n, err := strconv.Atoi(os.Getenv("E2E_CYCLES")); err == nil && n > 0 {
		return n
	}
	return 5
}

// seeded returns a random source for t, and says how to replay it.
func seeded(t *testing.T) (*rand.Rand, uint64) {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("E2E_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	t.Logf("seed %d (replay: make e2e E2E_RUN='%s' E2E_SEED=%d E2E_CYCLES=%d)", seed, t.Name(), seed, cycles())
	return rand.New(rand.NewPCG(seed, 0)), seed
}

// upstreamYAML is the configuration of one upstream.
func upstreamYAML(name, addr, format, more string) string {
	return fmt.Sprintf("  - { name: %s, url: %q, format: %s, commands: false%s }\n", name, "mqtt://"+addr, format, more)
}

const gatewayID = "e2e"

// logYAML makes the gateway tell enough to understand a failure.
const logYAML = "log: { level: info, format: text }\n"

// upstream is a mosquitto behind a proxy, with a subscriber beside the proxy that sees all that arrives.
type upstream struct {
	broker *testkit.Mosquitto
	link   *testkit.Proxy
	inbox  *proof.Cloud
}

func startUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{broker: testkit.StartMosquitto(t), inbox: proof.NewCloud()}
	u.link = testkit.StartProxy(t, u.broker.Addr)
	listen(t, u.inbox, u.broker.Addr)
	return u
}

// listen has a cloud take what arrives at a broker.
func listen(t *testing.T, b *proof.Cloud, addr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: addr,
		Connect: mqtt.Connect{Version: mqtt.V311, ClientID: "inbox", CleanStart: true},
		OnMessage: func(_ *mqtt.Client, p *mqtt.Publish) {
			b.Take(string(p.Topic), p.Payload)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Abort()
		<-c.Done()
	})
	if _, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: "#", QoS: 1}}}); err != nil {
		t.Fatal(err)
	}
}

// messages returns what arrived so far of devices that are not simulated, in order, and fails t if something could not be read.
func messages(t *testing.T, c *proof.Cloud) []cloud.Delivery {
	t.Helper()
	for _, err := range c.Errors() {
		t.Errorf("upstream got something wrong: %v", err)
	}
	return c.Others()
}

// balanced asks the gateway for its ledger and fails t if an account does not add up.
func balanced(t *testing.T, g *testkit.Gateway) *testkit.Status {
	t.Helper()
	s, err := g.Status()
	if err != nil {
		t.Fatalf("ask the gateway for its ledger: %v", err)
	}
	for _, err := range s.Balance() {
		t.Error(err)
	}
	return s
}

// drained waits until no account of an upstream has anything pending.
func drained(t *testing.T, g *testkit.Gateway, upstream string, within time.Duration) {
	t.Helper()
	testkit.EventuallyNil(t, within, "everything has gone to "+upstream, func() error {
		s, err := g.Status()
		if err != nil {
			return err
		}
		if err := s.Pending(upstream); err != nil {
			return fmt.Errorf("%w; upstreams %+v", err, s.Upstreams)
		}
		return nil
	})
}
