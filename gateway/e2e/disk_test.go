package e2e_test

import (
	"bytes"
	"context"
	be "encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// smallDisk mounts an ext4 of so many MiB and returns a folder on it. It skips the test where that is not possible.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	image, dir := filepath.Join(t.TempDir(), "disk.img"), t.TempDir()
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(size<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Skipf("no small file system here: %v: %v: %s", command, err, out)
		}
	}
	t.Cleanup(func() {
		testkit.Eventually(t, 10*time.Second, "the small file system is unmounted", func() bool { return syscall.Unmount(dir, 0) == nil })
	})
	return dir
}

// fillDisk is another process that leaves no byte free. It returns its file.
func fillDisk(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "other")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4 << 10, 1} {
		for block := make([]byte, size); ; {
			if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Sync(); err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	return name
}

// blob is a message of 32 KiB that says its number and does not compress.
func blob(n uint64) []byte {
	b := make([]byte, 32<<10)
	var seed [32]byte
	be.BigEndian.PutUint64(seed[:], n)
	_, _ = rand.NewChaCha8(seed).Read(b)
	be.BigEndian.PutUint64(b, n)
	return b
}

// blobs publishes until it is refused, or limit is reached, and returns the number that comes next and why it ended.
func (d *device) blobs(ctx context.Context, from, limit uint64) (next uint64, err error) {
	for next = from; next < limit && err == nil; {
		if err = d.publish(ctx, "dt/app/blob", blob(next), 1); err == nil {
			next++
		}
	}
	return next, err
}

// arrived says which numbers have arrived, in order and whole.
func (u *upstream) arrived(t *testing.T) map[uint64]bool {
	t.Helper()
	all, last := map[uint64]bool{}, uint64(0)
	for _, m := range u.inbox.Others() {
		p := m.Message.Payload
		if len(p) < 8 {
			continue
		}
		n := be.BigEndian.Uint64(p)
		if !bytes.Equal(p, blob(n)) {
			t.Errorf("message %d arrived changed", n)
		}
		if n < last {
			t.Errorf("message %d arrived after %d", n, last)
		}
		last, all[n] = n, true
	}
	return all
}

// allArrive waits until the numbers from first to next-1 have arrived: the upstream has them before its subscriber has.
func (u *upstream) allArrive(t *testing.T, first, next uint64) {
	t.Helper()
	testkit.EventuallyNil(t, 10*time.Second, "what was acknowledged arrives", func() error {
		if count := len(u.inbox.Others()); count < int(next-first) {
			return fmt.Errorf("%d of %d messages are there", count, next-first)
		}
		arrived := u.arrived(t)
		for n := first; n < next; n++ {
			if !arrived[n] {
				return fmt.Errorf("message %d of %d is missing", n, next-1)
			}
		}
		return nil
	})
}

// level waits until the gateway says how full its disk is.
func level(t *testing.T, g *testkit.Gateway, want string) {
	t.Helper()
	testkit.EventuallyNil(t, 20*time.Second, "the disk is "+want, func() error {
		s, err := g.Status()
		if err == nil && s.Store.Level != want {
			err = fmt.Errorf("it is %s: %+v", s.Store.Level, s.Store)
		}
		return err
	})
}

// folderSize adds up what a folder's files have of the disk.
func folderSize(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil && syscall.Stat(path, &st) == nil { // files go meanwhile
			n += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestFullDisk fills a disk of 64 MiB while the upstream is away, crashes on it, lets somebody else take what is left, purges
// a little, and has the upstream back: nothing acknowledged is lost, everything drains without help, and it takes in again.
func TestFullDisk(t *testing.T) {
	path := bin(t)
	disk := smallDisk(t, 64)
	up := startUpstream(t)
	away := func() {
		up.link.Set(testkit.Faults{Refuse: true})
		up.link.Reset()
	}
	away()
	yaml := logYAML + "spool: { lanes: [{ name: telemetry, max_bytes: 1GiB, when_full: reject }] }\nroutes: []\n" +
		"upstreams:\n" + upstreamYAML("cloud", up.link.Addr(), "batch", "")
	g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{Devices: "{ anonymous: true }", YAML: yaml, Dir: filepath.Join(disk, "data")})

	d := newDevice(t, g.Addr, "d5", mqtt.V5)
	acked, err := d.blobs(t.Context(), 1, 1<<16)
	if err == nil || !strings.Contains(err.Error(), mqtt.QuotaExceeded.String()) {
		t.Fatalf("a full disk ends with %v after %d messages", err, acked)
	}
	if acked < 500 {
		t.Errorf("only %d messages of 32 KiB fit on 64 MiB", acked-1)
	}
	level(t, g, "full")
	refused(t, g)
	// Commands' rows and the API's go on.
	if _, err := g.Call("POST", "/api/v1/tokens", map[string]any{"name": "x", "role": "viewer"}, 201); err != nil {
		t.Errorf("a row of the gateway's own: %v", err)
	}

	g.Kill()
	other := fillDisk(t, disk)
	took := g.Restart()
	level(t, g, "full")
	refused(t, g)
	s := balanced(t, g)
	if n := s.Accepted("cloud"); n < acked-1 {
		t.Fatalf("%d messages after a crash, %d were acknowledged", n, acked-1)
	}
	g.Kill()
	took = max(took, g.Restart())

	b, err := g.Call("POST", "/api/v1/lanes/telemetry/purge", map[string]any{"up_to": 10}, 200)
	if err != nil || !strings.Contains(string(b), `"messages": 10`) {
		t.Fatalf("purge: %v %s", err, b)
	}
	up.link.Set(testkit.Faults{})
	drained(t, g, "cloud", 30*time.Second)
	s = balanced(t, g)
	up.allArrive(t, 11, acked)
	// Somebody else still has what there was: what drained is free again.
	level(t, g, "ok")
	testkit.EventuallyNil(t, 10*time.Second, "an empty store is small", func() error {
		if n := folderSize(t, g.Dir); n > 20<<20 {
			return fmt.Errorf("it takes %d MiB", n>>20)
		}
		return nil
	})
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	d = newDevice(t, g.Addr, "d5", mqtt.V5)
	if next, err := d.blobs(t.Context(), acked, acked+20); err != nil {
		t.Errorf("message %d after it has drained: %v", next, err)
	}
	drained(t, g, "cloud", 30*time.Second)
	if code := g.Stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}
	verifyStore(t, path, g.Dir)
	t.Logf("%d messages until it was full, slowest start %v, accounts %+v", acked-1, took.Round(time.Millisecond), s.Ledger.Accounts)
}

// refused publishes once with each version: MQTT 5 is told, 3.1.1 has its connection ended without an acknowledgement.
func refused(t *testing.T, g *testkit.Gateway) {
	t.Helper()
	if _, err := newDevice(t, g.Addr, "r5", mqtt.V5).blobs(t.Context(), 1<<32, 1<<32+1); err == nil || !strings.Contains(err.Error(), mqtt.QuotaExceeded.String()) {
		t.Errorf("MQTT 5: %v", err)
	}
	if _, err := newDevice(t, g.Addr, "r3", mqtt.V311).blobs(t.Context(), 1<<32, 1<<32+1); err == nil || !strings.Contains(err.Error(), "connection lost") {
		t.Errorf("MQTT 3.1.1: %v", err)
	}
}

// TestDiskFilledBySomebodyElse has another process take every byte, again and again, from a gateway that drops its oldest
// and keeps receiving: it never ends, and it takes in again when there is room.
func TestDiskFilledBySomebodyElse(t *testing.T) {
	path := bin(t)
	disk := smallDisk(t, 64)
	up := startUpstream(t)
	g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
		Devices: "{ anonymous: true }", Dir: filepath.Join(disk, "data"),
		YAML: logYAML + "upstreams:\n" + upstreamYAML("cloud", up.link.Addr(), "batch", ""),
	})
	next := uint64(1)
	var err error
	for round := range 3 {
		d := newDevice(t, g.Addr, "d", mqtt.V5)
		if next, err = d.blobs(t.Context(), next, next+100); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		other := fillDisk(t, disk)
		level(t, g, "full")
		testkit.Eventually(t, 20*time.Second, "messages are refused", func() bool {
			next, err = d.blobs(t.Context(), next, next+1)
			return err != nil
		})
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
		level(t, g, "ok")
	}
	drained(t, g, "cloud", 30*time.Second)
	up.allArrive(t, 1, next)
	balanced(t, g)
	if code := g.Stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}

	// With no byte left, and nothing to give up, it says so and ends.
	other := fillDisk(t, disk)
	if err := os.Remove(filepath.Join(g.Dir, "reserve")); err != nil {
		t.Fatal(err)
	}
	fillDisk(t, filepath.Join(disk, "lost+found"))
	out, code := runToEnd(t, path, g.File)
	if code != 1 || !strings.Contains(out, "no space left on device") || !strings.Contains(out, "free some space") || strings.Contains(out, "goroutine ") {
		t.Errorf("a start without any space: exit code %d\n%s", code, out)
	}
	if err := errors.Join(os.Remove(other), os.Remove(filepath.Join(disk, "lost+found", "other"))); err != nil {
		t.Fatal(err)
	}
	g.Restart()
	level(t, g, "ok")
}

// runToEnd runs the gateway, which has to end by itself, within 15 s.
func runToEnd(t *testing.T, path, config string, before ...string) (out string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	args := append(before, path, "run", "--config", config)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	b, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("it does not end: %v\n%s", err, b)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// TestFailedSyncEndsTheGateway has the kernel answer EIO to one fdatasync or fsync under the real binary.
func TestFailedSyncEndsTheGateway(t *testing.T) {
	path := bin(t)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("no strace on this machine")
	}
	for _, inject := range []string{"fdatasync:error=EIO:when=40", "fsync:error=EIO:when=12"} {
		t.Run(inject, func(t *testing.T) {
			up := startUpstream(t)
			yaml := logYAML + "upstreams:\n" + upstreamYAML("cloud", up.link.Addr(), "batch", "")
			g := testkit.StartGateway(t, path, gatewayID, yaml) // makes the store
			up.link.Set(testkit.Faults{Refuse: true})
			up.link.Reset()
			if code := g.Stop(); code != 0 {
				t.Fatalf("exit code %d", code)
			}
			broken := testkit.Start(t, testkit.Command{Name: "holdfast under strace", Path: strace, Args: []string{
				"-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=" + strings.Split(inject, ":")[0], "-e", "inject=" + inject,
				path, "run", "--config", g.File,
			}})
			d := newDevice(t, g.Addr, "d", mqtt.V5)
			acked := uint64(1)
			for acked < 5000 {
				if acked, err = d.blobs(t.Context(), acked, acked+1); err != nil {
					break
				}
			}
			select {
			case <-broken.Exited():
			case <-time.After(15 * time.Second):
				t.Fatalf("the gateway lives on over a failed sync, after %d messages: %v", acked, err)
			}
			if log := broken.Logs(); !strings.Contains(log, "input/output error") || strings.Contains(log, "goroutine ") {
				t.Errorf("it says\n%s", log)
			}
			g.Restart()
			up.link.Set(testkit.Faults{})
			drained(t, g, "cloud", 30*time.Second)
			up.allArrive(t, 1, acked)
			balanced(t, g)
		})
	}
}
