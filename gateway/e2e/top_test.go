//go:build unix

package e2e_test

import (
	"bytes"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"

	"holdfast/internal/testkit"
)

// TestTopInATerminal has `holdfast top` draw on a terminal: it sees the gateway, fits another window, says that the gateway is away, and
// quits on q.
func TestTopInATerminal(t *testing.T) {
	t.Parallel()
	g := startGated(t, testkit.GatewayConfig{})
	cmd := exec.CommandContext(t.Context(), g.bin, "top", "--config", g.File, "--interval", "100ms")
	cmd.Env = append(cmd.Environ(), "TERM=xterm-256color")
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 100})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var mu sync.Mutex
	var seen bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 4096)
		for {
			n, err := f.Read(b)
			mu.Lock()
			seen.Write(b[:n])
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	want := func(text string) {
		t.Helper()
		testkit.Eventually(t, 20*time.Second, "the terminal shows "+text, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return bytes.Contains(seen.Bytes(), []byte(text))
		})
	}
	want("ledger balances")
	want("no upstream")
	if err := pty.Setsize(f, &pty.Winsize{Rows: 10, Cols: 40}); err != nil {
		t.Fatal(err)
	}
	want("…") // something does not fit
	g.Kill()
	want("AWAY for")
	if _, err := f.Write([]byte("q")); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("q: %v", err)
	}
	<-read
	want("\x1b[?1049l") // the screen that was there before

	stdout, stderr, code := holdfast(t, g.bin, "top", "--config", g.File)
	if code != 2 || !bytes.Contains([]byte(stderr), []byte("holdfast status")) {
		t.Errorf("without a terminal: %d %q %q", code, stdout, stderr)
	}
}
