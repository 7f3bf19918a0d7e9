package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/diskcheck"
	"holdfast/internal/proof"
)

// watcher is an output that does something when it says something.
type watcher struct {
	mu   sync.Mutex
	b    bytes.Buffer
	text string
	do   func()
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b.Write(p)
	if w.do != nil && strings.Contains(w.b.String(), w.text) {
		w.do()
		w.do = nil
	}
	return len(p), nil
}

func (w *watcher) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

func newVerification(t *testing.T, total time.Duration, out *watcher) (*verification, *bytes.Buffer) {
	t.Helper()
	exe, err := exec.LookPath("holdfast") // this test binary, by the name that makes it the program: see TestMain
	if err != nil {
		t.Fatal(err)
	}
	var stdout bytes.Buffer
	p := &program{stdout: &stdout, stderr: out}
	return &verification{p: p, out: out, total: total, where: t.TempDir() + "/not/yet", seed: 7, asJSON: true, exe: exe}, &stdout
}

// TestVerifyInAFewSeconds is the whole of holdfast verify, in less time than it allows on the command line.
func TestVerifyInAFewSeconds(t *testing.T) {
	out := &watcher{}
	v, stdout := newVerification(t, 6*time.Second, out)
	err := v.main(t.Context())
	t.Log(out)
	var r verifyReport
	if jsonErr := json.Unmarshal(stdout.Bytes(), &r); jsonErr != nil {
		t.Fatal(err, jsonErr)
	}
	if c := r.Crashes; c.Kills == 0 || c.Acknowledged == 0 || c.Arrived < c.Acknowledged || !c.whole() || r.Gateway.PerSecond <= 0 || r.Gateway.QuietAck.P50 <= 0 {
		t.Errorf("%+v %+v", r.Gateway, c)
	}
	// What a disk of this machine is called is not this test's business; what follows from it is.
	if failed := errors.Is(err, errReported); failed != (r.Verdict == diskcheck.DoesNotHold) || err != nil && !failed {
		t.Errorf("verdict %s, and it ends with %v", r.Verdict, err)
	}
	if !strings.Contains(out.String(), "VERDICT  "+string(r.Verdict)) || r.Seed != 7 || len(r.Reasons) == 0 {
		t.Errorf("%+v", r)
	}
	left, err := os.ReadDir(r.Dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind in %s: %v, %v", r.Dir, left, err)
	}
}

func TestVerifyCleansUpWhenInterrupted(t *testing.T) {
	for _, when := range []string{"disk: fsync of 4096", "crashes: 20 devices"} {
		ctx, cancel := context.WithCancel(t.Context())
		out := &watcher{text: when, do: cancel}
		v, _ := newVerification(t, 6*time.Second, out)
		if when == "crashes: 20 devices" {
			v.total = 3 * time.Second
		}
		if err := v.main(ctx); !errors.Is(err, errInterrupted) {
			t.Errorf("%s: it ended with %v\n%s", when, err, out)
		}
		left, err := os.ReadDir(v.report.Dir)
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", when, left, err)
		}
		if v.gateway != nil && v.gateway.cmd.Process.Signal(syscall.Signal(0)) == nil {
			t.Errorf("%s: the gateway still runs", when)
		}
		cancel()
	}
}

// TestVerifyTellsWhatItFound: a loss is a verdict whatever the disk is, and a doubt about the disk is none of its own.
func TestVerifyTellsWhatItFound(t *testing.T) {
	disk := func(d diskcheck.Verdict, reason string) diskcheck.Report {
		return diskcheck.Report{Verdict: d, Reasons: []string{reason}, Sync: make([]diskcheck.Timing, 3)}
	}
	for name, c := range map[string]struct {
		disk    diskcheck.Report
		crashes crashFigures
		want    diskcheck.Verdict
		says    string
	}{
		"well":       {disk(diskcheck.Holds, "nothing"), crashFigures{Kills: 3}, diskcheck.Holds, "VERDICT  holds: nothing\n"},
		"doubt":      {disk(diskcheck.Suspicious, "a cache"), crashFigures{}, diskcheck.Suspicious, "VERDICT  suspicious: a cache\n"},
		"memory":     {disk(diskcheck.DoesNotHold, "this is memory"), crashFigures{}, diskcheck.DoesNotHold, "VERDICT  does not hold: this is memory\n"},
		"loss":       {disk(diskcheck.Holds, "nothing"), crashFigures{Kills: 3, Verdict: proof.Verdict{Lost: 2, Examples: []string{"five-1 n=7: lost"}}}, diskcheck.DoesNotHold, "2 acknowledged messages are lost"},
		"both":       {disk(diskcheck.DoesNotHold, "this is memory"), crashFigures{Verdict: proof.Verdict{Lost: 2}}, diskcheck.DoesNotHold, "; this is memory"},
		"the ledger": {disk(diskcheck.Holds, "nothing"), crashFigures{Verdict: proof.Verdict{Unexplained: 1, Examples: []string{"lane telemetry: does not balance"}}}, diskcheck.DoesNotHold, "does not balance"},
		"the store":  {disk(diskcheck.Holds, "nothing"), crashFigures{Problems: []string{"the store: a chunk is damaged"}}, diskcheck.DoesNotHold, "a chunk is damaged"},
	} {
		out := &watcher{}
		v := &verification{out: out, report: verifyReport{Disk: c.disk, Crashes: c.crashes}}
		v.judge()
		v.print()
		if v.report.Verdict != c.want || !strings.Contains(out.String(), c.says) {
			t.Errorf("%s: %s\n%s", name, v.report.Verdict, out)
		}
		for _, e := range c.crashes.Examples {
			if !strings.Contains(out.String(), e) {
				t.Errorf("%s: %q is not told", name, e)
			}
		}
	}
}
