package mqttup_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/testkit"
)

// mosquitto starts Debian's broker with lines of configuration behind its listener and returns its address.
func mosquitto(tb testing.TB, config string) string {
	tb.Helper()
	const program = "/usr/sbin/mosquitto"
	if _, err := os.Stat(program); err != nil {
		tb.Skip("needs the mosquitto broker at " + program + " (apt-get install mosquitto)")
	}
	addr := testkit.FreeAddr(tb)
	_, port, _ := net.SplitHostPort(addr)
	dir := tb.TempDir()
	file := filepath.Join(dir, "mosquitto.conf")
	text := "listener " + port + " 127.0.0.1\nallow_anonymous true\nlog_type error\nuser root\n" + config
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(program, "-c", file)
	cmd.Stderr = tb.Output()
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	testkit.Eventually(tb, 10*time.Second, "mosquitto listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return addr
}
