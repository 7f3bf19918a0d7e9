package mqtttest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/mqtt"
)

const mosquitto = "/usr/sbin/mosquitto"

// Mosquitto starts Debian's mosquitto on a free loopback port with these lines added to its
// configuration, and gives its address. It ends with the test. Where it is not installed
// the test is skipped.
func Mosquitto(t testing.TB, lines ...string) (addr string) {
	t.Helper()
	if _, err := os.Stat(mosquitto); err != nil {
		t.Skipf("needs Debian's mosquitto: %v (apt-get install mosquitto)", err)
	}
	// mosquitto cannot choose a port itself: take one that was free a moment ago.
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr = l.Addr().String()
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	config := fmt.Sprintf("listener %d 127.0.0.1\nallow_anonymous true\nuser root\n", port)
	for _, line := range lines {
		config += line + "\n"
	}
	path := filepath.Join(t.TempDir(), "mosquitto.conf")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), mosquitto, "-c", path)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		c, err := mqtt.Dial(ctx, mqtt.ClientOptions{Address: addr, Connect: mqtt.Connect{ClientID: "probe", CleanStart: true}})
		if err == nil {
			_ = c.Disconnect(mqtt.Success)
			return addr
		}
		select {
		case <-ctx.Done():
			t.Fatalf("mosquitto does not answer: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
