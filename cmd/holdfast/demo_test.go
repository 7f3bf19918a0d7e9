package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// demoRun is a holdfast demo with a temporary folder of its own.
type demoRun struct {
	cmd            *exec.Cmd
	tmp            string
	stdout, stderr bytes.Buffer
}

func newDemoRun(t *testing.T, exe string, args ...string) *demoRun {
	t.Helper()
	r := &demoRun{cmd: exec.CommandContext(t.Context(), exe, append([]string{"demo"}, args...)...), tmp: t.TempDir()}
	r.cmd.Env = append(os.Environ(), "TMPDIR="+r.tmp)
	r.cmd.Stderr = &r.stderr
	r.cmd.Cancel = func() error { return r.cmd.Process.Signal(syscall.SIGTERM) }
	r.cmd.WaitDelay = 30 * time.Second
	return r
}

// left is what the demo left in its temporary folder.
func (r *demoRun) left(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(r.tmp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestDemo(t *testing.T) {
	exe, err := exec.LookPath("holdfast") // this test binary, by the name that makes it the program: see TestMain
	if err != nil {
		t.Fatal(err)
	}
	t.Run("loses nothing", func(t *testing.T) { losesNothing(t, exe) })
	t.Run("keeps", func(t *testing.T) { keeps(t, exe) })
	t.Run("cleans up after Ctrl-C", func(t *testing.T) { cleansUp(t, exe) })
}

func losesNothing(t *testing.T, exe string) {
	r := newDemoRun(t, exe, "--duration", "3s", "--json")
	r.cmd.Stdout = &r.stdout
	err := r.cmd.Run()
	story := r.stderr.String()
	t.Log(story)
	if err != nil {
		t.Fatal(err)
	}
	var l ledger
	if err := json.Unmarshal(r.stdout.Bytes(), &l); err != nil {
		t.Fatalf("%v in %s", err, &r.stdout)
	}
	if !l.balanced() || l.Lost != 0 {
		t.Errorf("%+v", l)
	}
	// 20 devices, 100 messages a second, 3 s; some are QoS 0.
	if l.Published < 4000 || l.Acknowledged < l.Published*8/10 || l.Arrived < l.Acknowledged || l.Arrived > l.Published {
		t.Errorf("%+v", l)
	}
	if l.Removed == 0 {
		t.Error("the broken uplink made no duplicates: it did not break")
	}
	if c := l.Commands; c.Sent != 16 || c.Executed != 15 || c.Succeeded != 15 || c.OtherEnds != 1 || c.ExecutedTwice != 0 || c.Lost != 0 {
		t.Errorf("%+v", c)
	}
	if l.UplinkBytes == 0 || float64(l.UplinkBytes) > 0.5*float64(l.PlainBytes) {
		t.Errorf("%d bytes on the uplink, a plain bridge needs %d", l.UplinkBytes, l.PlainBytes)
	}
	at := 0
	for _, step := range []string{
		"upstream:", "gateway:", "devices:", "COMMAND: 12 commands for 4 devices that are asleep: QUEUED", "BROKEN:", "CUT:",
		"COMMAND: 4 more", "AWAKE:", "KILL -9:", "is ready", "AWAKE:", "MENDED:", "the backlog has arrived", "set SUCCEEDED, update SUCCEEDED, reboot SUCCEEDED", "The ledger", "lost", "Commands",
		"executed twice", "has arrived.", "Every command has reached its end",
	} {
		i := strings.Index(story[at:], step)
		if i < 0 {
			t.Fatalf("the story does not tell %q, or not in its place", step)
		}
		at += i
	}
	if pids := regexp.MustCompile(`process (\d+)`).FindAllStringSubmatch(story, -1); len(pids) != 3 || pids[0][1] != pids[1][1] || pids[1][1] == pids[2][1] {
		t.Errorf("not one process killed and another started: %q", pids)
	}
	if left := r.left(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// Ctrl-C during --keep ends everything in order, and keeps the data.
func keeps(t *testing.T, exe string) {
	r := newDemoRun(t, exe, "--duration", "2s", "--devices", "3", "--keep")
	out, err := r.cmd.StdoutPipe()
	if err == nil {
		err = r.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var told bytes.Buffer
	for buf := make([]byte, 4096); !strings.Contains(told.String(), "status --config"); {
		n, err := out.Read(buf)
		told.Write(buf[:n])
		if err != nil {
			t.Fatalf("ended with %v after\n%s%s", err, &told, &r.stderr)
		}
	}
	if m := regexp.MustCompile(`mosquitto_pub -h 127\.0\.0\.1 -p (\d+)`).FindStringSubmatch(told.String()); m == nil || !strings.Contains(told.String(), "for devices on 127.0.0.1:"+m[1]) {
		t.Errorf("nobody is told where to publish:\n%s", &told)
	}
	file := regexp.MustCompile(`status --config (\S+)`).FindStringSubmatch(told.String())[1]
	status, err := exec.CommandContext(t.Context(), exe, "status", "--config", file).CombinedOutput()
	if err != nil || !strings.Contains(string(status), "balanced") {
		t.Errorf("the gateway that is kept: %v\n%s", err, status)
	}
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if _, err := told.ReadFrom(out); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("ended with %v: %s", err, &r.stderr)
	}
	if left := r.left(t); len(left) != 1 || !strings.Contains(r.stderr.String(), left[0]) {
		t.Errorf("kept are %q, told is %s", left, &r.stderr)
	}
}

func cleansUp(t *testing.T, exe string) {
	r := newDemoRun(t, exe, "--duration", "30s")
	out, err := r.cmd.StdoutPipe()
	if err == nil {
		err = r.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var told bytes.Buffer
	for buf := make([]byte, 4096); !strings.Contains(told.String(), "devices:"); {
		n, err := out.Read(buf)
		told.Write(buf[:n])
		if err != nil {
			t.Fatalf("ended with %v after\n%s%s", err, &told, &r.stderr)
		}
	}
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := r.cmd.Wait(); err == nil || r.cmd.ProcessState.ExitCode() != exitFailed {
		t.Errorf("ended with %v: %s", err, &r.stderr)
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %v to end", took)
	}
	if left := r.left(t); len(left) > 0 || !strings.Contains(r.stderr.String(), "interrupted") {
		t.Errorf("left behind: %q; told: %s", left, &r.stderr)
	}
}

// A gateway that does not start, or not again, is told with its log, and nothing is left running.
func TestDemoTellsOfAGatewayThatEndsAtOnce(t *testing.T) {
	exe, err := exec.LookPath("holdfast")
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "gateway.log")
	c, err := startChild(t.Context(), exe, []string{"run", "--config", "/there/is/none.yaml"}, log)
	if err == nil || !strings.Contains(err.Error(), log) || !strings.Contains(err.Error(), "exit status 2") {
		t.Errorf("%v, %v", c, err)
	}
	if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), "none.yaml") {
		t.Errorf("the log is %s, %v", b, err)
	}
}

func TestDemoSaysWhenTheLedgerIsWrong(t *testing.T) {
	good := ledger{Published: 10, Acknowledged: 9, Arrived: 10, Removed: 2}
	for _, c := range []struct {
		spoil func(*ledger)
		ok    bool
	}{
		{func(*ledger) {}, true},
		{func(l *ledger) { l.Lost = 1 }, false},
		{func(l *ledger) { l.OutOfOrder = 1 }, false},
		{func(l *ledger) { l.Unknown = 1 }, false},
		{func(l *ledger) { l.Missing = 1 }, false},
	} {
		l := good
		c.spoil(&l)
		var out bytes.Buffer
		(&demo{out: &out, dir: "/the/folder"}).printLedger(&l)
		if l.balanced() != c.ok || strings.Contains(out.String(), "THIS IS WRONG") == c.ok || strings.Contains(out.String(), "/the/folder") == c.ok {
			t.Errorf("%+v: %s", l, &out)
		}
	}
}

func TestDemoUsage(t *testing.T) {
	for _, args := range [][]string{{"x"}, {"--devices", "0"}, {"--rate", "0"}, {"--rate", "NaN"}, {"--duration", "1s"}, {"--duration", "x"}} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"demo"}, args...), &stdout, &stderr); code != exitUsage {
			t.Errorf("%q: ended with %d: %s", args, code, &stderr)
		}
	}
}
