package testkit

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Mosquitto is Debian's broker on a free loopback port, with its configuration and data in a temporary folder.
type Mosquitto struct {
	*Process
	Addr string // host:port
	Dir  string // persistence goes here
}

// URL of the listener, as configurations write it.
func (m *Mosquitto) URL() string { return "mqtt://" + m.Addr }

// StartMosquitto runs mosquitto with one anonymous listener and the given lines added to its configuration
// (a line that starts with "listener" opens another one). It skips t where mosquitto is not installed.
func StartMosquitto(t T, lines ...string) *Mosquitto {
	t.Helper()
	path := mosquittoPath()
	if path == "" {
		t.Skipf("mosquitto is not installed (Debian: apt-get install mosquitto; .ci/run does)")
	}
	dir := t.TempDir()
	addr := FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	conf := strings.Join(append([]string{
		"per_listener_settings false",
		"allow_anonymous true",
		"log_dest stderr",
		"log_type error", "log_type warning", "log_type notice", "log_type information",
		"persistence_location " + dir + "/",
		"max_queued_messages 0", // no limit, where its default of 1,000 would drop
	}, lines...), "\n")
	if os.Getuid() == 0 {
		conf += "\nuser root" // else it gives up its rights and cannot write into the folder
	}
	// The listener comes last: lines after it would belong to it.
	conf += fmt.Sprintf("\nlistener %s 127.0.0.1\n", port)
	file := filepath.Join(dir, "mosquitto.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatalf("write mosquitto's configuration: %v", err)
	}
	p := Start(t, Command{Name: "mosquitto", Path: path, Args: []string{"-c", file}, Ready: " running"})
	return &Mosquitto{Process: p, Addr: addr, Dir: dir}
}

func mosquittoPath() string {
	if p, err := exec.LookPath("mosquitto"); err == nil {
		return p
	}
	const debian = "/usr/sbin/mosquitto" // not on every user's path
	if _, err := os.Stat(debian); err == nil {
		return debian
	}
	return ""
}
