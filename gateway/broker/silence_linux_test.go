package broker_test

import (
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/mqtt"
)

// TestPeersThatVanish has clients of which nothing is ever heard again, neither FIN nor RST: their network is gone. None has a
// keep alive but the one whose will the other is owed. All of it comes back, sockets and goroutines, within some SilenceTimeouts.
func TestPeersThatVanish(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network of its own")
	}
	// A namespace for this goroutine's thread, which ends with it. Sockets stay in the one they were made in.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs a network namespace: %v", err)
	}
	loopback := func(state string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "ip", "link", "set", "lo", state).CombinedOutput(); err != nil {
			t.Skipf("needs ip: %v: %s", err, out)
		}
	}
	loopback("up")
	r := newRig(t, func(r *rig) { r.cfg.SilenceTimeout = 4 * time.Second })
	idle, owed := r.client(mqtt.V311, "idle"), r.client(mqtt.V311, "owed", func(k *mqtt.Connect) { k.CleanStart = false })
	owed.subscribe(1, mqtt.Subscription{Filter: "t", QoS: 1})
	dies := r.client(mqtt.V5, "dies", func(k *mqtt.Connect) {
		k.KeepAlive, k.Will = 1, &mqtt.Will{Topic: "t", Payload: []byte("it has died"), QoS: 1}
	})
	for _, p := range []*peer{idle, owed, dies} {
		defer p.nc.Close()
	}
	loopback("down")
	begin := time.Now()
	for deadline := begin.Add(20 * time.Second); r.b.Stats().Connections > 0; <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are still there after 20 s", r.b.Stats().Connections)
		}
	}
	t.Logf("gone after %v", time.Since(begin).Round(10*time.Millisecond))
	r.counted(3, "connections_ended_total", "timeout")
	if r.b.Stats().Sessions != 1 {
		t.Errorf("%d sessions; only the one that outlives its connection is to stay", r.b.Stats().Sessions)
	}
}
