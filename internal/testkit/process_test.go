package testkit_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/testkit"
)

const ready = "echo starting >&2; echo level=INFO msg=ready >&2; "

// script is a program that says it is ready where body has ready.
func script(t *testing.T, body string) *testkit.Process {
	t.Helper()
	return testkit.Start(t, testkit.Command{Name: "script", Path: "/bin/sh", Args: []string{"-c", body}})
}

func TestProcessKillTakesTheWholeGroup(t *testing.T) {
	p := script(t, ready+"sleep 600 & echo child=$! ; wait")
	var child int
	testkit.Eventually(t, 5*time.Second, "the child's id is in the log", func() bool {
		_, after, ok := strings.Cut(p.Logs(), "child=")
		for _, r := range strings.TrimSpace(after) {
			child = child*10 + int(r-'0')
		}
		return ok
	})
	p.Kill()
	p.Kill() // twice without harm
	testkit.Eventually(t, 5*time.Second, "the child is gone", func() bool {
		return syscall.Kill(child, 0) != nil || zombie(child)
	})
}

func TestProcessRestartKeepsTheLog(t *testing.T) {
	p := script(t, ready+"exec sleep 600")
	first := p.PID()
	p.Kill()
	p.Restart()
	if p.PID() == first {
		t.Error("same process after a restart")
	}
	if n := strings.Count(p.Logs(), "msg=ready"); n != 2 {
		t.Errorf("log tells of %d starts, want 2:\n%s", n, p.Logs())
	}
	if p.RSS() == 0 {
		t.Error("no memory of a running program")
	}
}

func TestProcessStopReturnsTheExitCode(t *testing.T) {
	p := script(t, `trap 'exit 7' TERM; `+ready+`while :; do sleep 0.01; done`)
	if code := p.Stop(); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	<-p.Exited()
}

// fatal is a T that remembers instead of ending the test.
type fatal struct {
	testkit.T
	said string
}

func (f *fatal) Fatalf(format string, _ ...any) {
	f.said = format
	panic(f)
}

func died(f *fatal, run func()) (said string) {
	defer func() {
		if r := recover(); r != nil && r != any(f) {
			panic(r)
		}
		said = f.said
	}()
	run()
	return ""
}

func TestProcessThatEndsEarlyOrHangsIsAFailure(t *testing.T) {
	f := &fatal{T: t}
	said := died(f, func() {
		testkit.Start(f, testkit.Command{Path: "/bin/sh", Args: []string{"-c", "echo no >&2; exit 3"}})
	})
	if !strings.Contains(said, "ended before it was ready") {
		t.Errorf("got %q", said)
	}
	f = &fatal{T: t}
	said = died(f, func() {
		testkit.Start(f, testkit.Command{Path: "/bin/sh", Args: []string{"-c", "exec sleep 600"}, Grace: 50 * time.Millisecond})
	})
	if !strings.Contains(said, "was not ready") {
		t.Errorf("got %q", said)
	}
}

func TestEventuallyGivesUp(t *testing.T) {
	f := &fatal{T: t}
	if said := died(f, func() { testkit.Eventually(f, 20*time.Millisecond, "never", func() bool { return false }) }); said == "" {
		t.Error("a condition that never holds passed")
	}
	n := 0
	testkit.Eventually(t, 5*time.Second, "third time", func() bool { n++; return n == 3 })
}

func TestMosquittoRuns(t *testing.T) {
	m := testkit.StartMosquitto(t)
	c := testkit.Dial(t, m.Addr)
	// CONNECT, MQTT 3.1.1, clean session, client id "t"; CONNACK says yes.
	connect := []byte{0x10, 13, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60, 0, 1, 't'}
	if _, err := c.Write(connect); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(got); err != nil || got[0] != 0x20 || got[3] != 0 {
		t.Fatalf("CONNACK % x, %v", got, err)
	}
	if code := m.Stop(); code != 0 {
		t.Errorf("mosquitto ended with %d", code)
	}
}

// zombie tells that a process is dead and only waits for its parent to notice.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}
