package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/proof"
	"holdfast/internal/testkit"
)

// memoryGroup makes a control group with a memory limit, and returns it with what puts a shell into it.
func memoryGroup(t *testing.T, limit int64) (dir, before string) {
	t.Helper()
	dir = filepath.Join("/sys/fs/cgroup/memory", fmt.Sprintf("holdfast-%d-%d", os.Getpid(), time.Now().UnixNano()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("needs root and control groups of version 1: %v", err)
	}
	t.Cleanup(func() {
		testkit.EventuallyNil(t, 5*time.Second, "the control group is empty", func() error { return os.Remove(dir) })
	})
	if err := os.WriteFile(filepath.Join(dir, "memory.limit_in_bytes"), strconv.AppendInt(nil, limit, 10), 0o600); err != nil {
		t.Skipf("needs the memory controller: %v", err)
	}
	return dir, fmt.Sprintf("echo $$ > %s/cgroup.procs", dir)
}

// groupStat reads a value of memory.stat, or a file of its own.
func groupStat(t *testing.T, dir, name string) int64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		b, err = os.ReadFile(filepath.Join(dir, "memory.stat"))
	}
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 1 || len(f) == 2 && f[0] == name {
			n, _ := strconv.ParseInt(f[len(f)-1], 10, 64)
			return n
		}
	}
	return -1
}

// TestBacklogInLittleMemory fills a backlog many times as large as the memory that the gateway may have, page cache included, starts again
// and drains it. The kernel kills nobody, the start takes no longer, and the drain is no slower than reading from the disk, not from
// the page cache, makes it.
// E2E_BACKLOG_GB=5 is the long form, which measures it both with and without the limit.
func TestBacklogInLittleMemory(t *testing.T) {
	t.Parallel()
	path := bin(t)
	gb := 0.2
	long := false
	if v, err := strconv.ParseFloat(os.Getenv("E2E_BACKLOG_GB"), 64); err == nil && v > 0 {
		gb, long = v, true
	}
	limit := int64(128 * mib)
	if !long {
		limit = 64 * mib
	}
	dir, before := memoryGroup(t, limit)
	limited := fillAndDrain(t, path, before, int64(gb*1e9), func(s string) {
		t.Logf("%s: in the group now %d MiB, at most %d, of it resident %d; %d tries met the limit", s, groupStat(t, dir, "memory.usage_in_bytes")/mib,
			groupStat(t, dir, "memory.max_usage_in_bytes")/mib, groupStat(t, dir, "total_rss")/mib, groupStat(t, dir, "memory.failcnt"))
	})
	if !long {
		return
	}
	free := fillAndDrain(t, path, "", int64(gb*1e9), func(string) {})
	t.Logf("drain with %d MiB: %.0f MB/s; without a limit: %.0f MB/s; ratio %.2f", limit/mib, limited, free, limited/free)
	if limited < 0.5*free {
		t.Errorf("the drain is slower by the limit: %.0f MB/s, not %.0f", limited, free)
	}
}

// fillAndDrain returns how many MB of records a second were drained.
func fillAndDrain(t *testing.T, path, before string, size int64, tell func(string)) float64 {
	t.Helper()
	away := testkit.FreeAddr(t)
	g := testkit.StartGatewayWith(t, path, gatewayID, testkit.GatewayConfig{
		Devices: "{ anonymous: true }", Before: before, YAML: logYAML + "upstreams:\n" + upstreamYAML("cloud", away, "batch", ""),
	})
	const devices, payloadSize, window = 16, 2000, 64
	// Digits compress to a half, as telemetry does, and no two messages are the same.
	digits := make([]byte, 4*mib)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range digits {
		digits[i] = byte('0' + rng.IntN(10))
	}
	var left atomic.Int64
	left.Store(size / payloadSize)
	begin := time.Now()
	many(devices, devices, func(i int) {
		open := make(chan struct{}, window)
		topic := fmt.Appendf(nil, "dt/fill/%d", i)
		c, err := mqtt.Dial(t.Context(), mqtt.ClientOptions{
			Address: g.Addr, Connect: mqtt.Connect{Version: mqtt.V311, ClientID: fmt.Sprint("fill-", i), CleanStart: true},
			WriteTimeout: time.Minute, OnAck: func(*mqtt.Client, *mqtt.Ack) { <-open },
		})
		if err != nil {
			t.Error(err)
			return
		}
		id := uint16(0)
		rng := rand.New(rand.NewPCG(2, uint64(i)))
		for left.Add(-1) >= 0 {
			select {
			case open <- struct{}{}:
			case <-c.Done():
				t.Errorf("while it is filled: %v", c.Err())
				return
			}
			id = id%60_000 + 1
			off := rng.IntN(len(digits) - payloadSize)
			if err := c.Publish(&mqtt.Publish{QoS: 1, ID: id, Topic: topic, Payload: digits[off : off+payloadSize]}); err != nil {
				t.Errorf("while it is filled: %v", err)
				return
			}
		}
		for range window { // all is acknowledged
			select {
			case open <- struct{}{}:
			case <-c.Done():
				t.Errorf("while it is filled: %v", c.Err())
				return
			}
		}
		_ = c.Disconnect(mqtt.Success)
	})
	filled := time.Since(begin)
	st := balanced(t, g)
	var pending proof.Count
	for _, a := range st.Ledger.Accounts {
		pending.Messages += a.Pending.Messages
		pending.Bytes += a.Pending.Bytes
	}
	t.Logf("%d messages, %.2f GB, in %v: %.0f MB/s; it held %d MiB", pending.Messages, float64(pending.Bytes)/1e9, filled.Round(time.Millisecond),
		float64(pending.Bytes)/1e6/filled.Seconds(), g.PeakRSS()/mib)
	tell("filled")
	g.Kill()
	took := g.Restart()
	t.Logf("ready again %v after a kill", took.Round(time.Millisecond))
	if took > 2*time.Second {
		t.Errorf("the start took %v", took)
	}
	_, port, _ := strings.Cut(away, ":")
	up := testkit.StartMosquitto(t, "listener "+port+" 127.0.0.1")
	testkit.Eventually(t, time.Minute, "the link is up", func() bool { s, err := g.Status(); return err == nil && s.Upstreams[0].Connected })
	begin = time.Now()
	drained(t, g, "cloud", 10*time.Minute)
	drain := time.Since(begin)
	rate := float64(pending.Bytes) / 1e6 / drain.Seconds()
	t.Logf("drained in %v: %.0f MB/s; it held %d MiB", drain.Round(time.Millisecond), rate, g.PeakRSS()/mib)
	tell("drained")
	balanced(t, g)
	if code := g.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	up.Kill()
	return rate
}
