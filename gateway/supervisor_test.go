package gateway_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"holdfast/gateway"
	"holdfast/internal/config"
	"holdfast/internal/testkit"
)

// manager is a service manager's socket.
type manager struct {
	t *testing.T
	c *net.UnixConn
}

// startManager makes one, which wants to hear of the watchdog within limit.
func startManager(t *testing.T, limit time.Duration) *manager {
	t.Helper()
	name := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(limit.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	return &manager{t, c}
}

// next reads what it is told within d; "": nothing.
func (m *manager) next(d time.Duration) string {
	m.t.Helper()
	_ = m.c.SetReadDeadline(time.Now().Add(d))
	b := make([]byte, 1024)
	n, _ := m.c.Read(b)
	return string(b[:n])
}

// want waits until it is told state, past the watchdog's.
func (m *manager) want(state string) {
	m.t.Helper()
	for {
		switch got := m.next(10 * time.Second); got {
		case state:
			return
		case "WATCHDOG=1":
		default:
			m.t.Fatalf("told %q, want %q", got, state)
		}
	}
}

func TestServiceManagerIsTold(t *testing.T) {
	m := startManager(t, 300*time.Millisecond)
	c := configuration(t, t.TempDir())
	g, err := gateway.New(t.Context(), gateway.Options{
		Config: c, Version: "test", Log: testkit.Logger(t), Load: func() (*config.Config, config.Problems, error) { return c, nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := m.next(10 * time.Millisecond); got != "" {
		t.Errorf("told %q before it runs", got)
	}
	if _, err := g.ReloadFile(); err != nil { // READY after that would be told too early
		t.Error(err)
	}
	if got := m.next(10 * time.Millisecond); got != "" {
		t.Errorf("told %q of a reload before it runs", got)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	m.want("READY=1")
	for range 3 {
		if got := m.next(5 * time.Second); got != "WATCHDOG=1" {
			t.Errorf("told %q", got)
		}
	}
	if _, err := g.ReloadFile(); err != nil {
		t.Error(err)
	}
	m.want("RELOADING=1")
	m.want("READY=1")
	stop()
	m.want("STOPPING=1")
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestWatchdogHearsNothingOfAGatewayThatHangs: its process runs, but the disk does not come back from a sync.
func TestWatchdogHearsNothingOfAGatewayThatHangs(t *testing.T) {
	m := startManager(t, 150*time.Millisecond)
	c := configuration(t, t.TempDir())
	c.Devices.Anonymous = true
	var hang atomic.Bool
	release := make(chan struct{})
	fs := errorfs.Wrap(vfs.Default, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if hang.Load() && (op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData) && strings.HasSuffix(op.Path, ".log") {
			<-release
		}
		return nil
	}))
	g, err := gateway.New(t.Context(), gateway.WithFS(gateway.Options{Config: c, Version: "test", Log: testkit.Logger(t)}, fs))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	m.want("READY=1")
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	hang.Store(true)
	published := make(chan struct{})
	go func() {
		defer close(published)
		d.publish(t, "dt/x", "y")
	}()
	testkit.Eventually(t, 10*time.Second, "the watchdog hears nothing", func() bool { return m.next(time.Second) == "" })
	hang.Store(false)
	close(release)
	<-published
	if got := m.next(10 * time.Second); got != "WATCHDOG=1" {
		t.Errorf("told %q when the disk is back", got)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
