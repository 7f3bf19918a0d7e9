package testkit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Command says which program to run and when it is ready.
type Command struct {
	Name  string // in messages and logs; default: Path
	Path  string
	Args  []string
	Env   []string // added to the environment
	Dir   string
	Ready string        // what its standard error says when it is ready; default "msg=ready" or "msg":"ready"
	Grace time.Duration // most time to become ready, and to stop when asked; default 20 s
	Clock *FakeClock    // its wall clock; nil: the machine's
}

// Process is a program under test in a process group of its own, so that it can be killed with all it
// started. Methods are for one goroutine, except Logs, PID and Exited.
type Process struct {
	t   T
	c   Command
	log logTail

	mu  sync.Mutex
	run *run // the latest
}

// run is one life of a Process.
type run struct {
	cmd    *exec.Cmd
	ready  chan struct{} // closed when the ready line was seen
	exited chan struct{} // closed when the program is gone and its output was read
	err    error         // of Wait; read after exited
	took   time.Duration // from start to ready; read after ready
}

// Start runs c and waits until it is ready. With t it is killed; if t failed, the end of its log is shown.
func Start(t T, c Command) *Process {
	t.Helper()
	if c.Name == "" {
		c.Name = c.Path
	}
	if c.Grace == 0 {
		c.Grace = 20 * time.Second
	}
	p := &Process{t: t, c: c}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("end of the log of %s:\n%s", p.c.Name, p.log.tail(16<<10))
		}
	})
	p.Restart()
	return p
}

// Restart starts the program again after Kill or Stop, and waits until it is ready. It returns how long that took.
func (p *Process) Restart() time.Duration {
	p.t.Helper()
	r, err := p.launch()
	if err != nil {
		p.t.Fatalf("start %s: %v", p.c.Name, err)
	}
	p.mu.Lock()
	p.run = r
	p.mu.Unlock()
	timer := time.NewTimer(p.c.Grace)
	defer timer.Stop()
	select {
	case <-r.ready:
		return r.took
	case <-r.exited:
		p.t.Fatalf("%s ended before it was ready: %v\n%s", p.c.Name, r.err, p.log.tail(4<<10))
	case <-timer.C:
		p.t.Fatalf("%s was not ready within %v\n%s", p.c.Name, p.c.Grace, p.log.tail(4<<10))
	}
	return 0
}

func (p *Process) launch() (*run, error) {
	// The program outlives the call; Kill in Cleanup ends it.
	cmd := exec.CommandContext(context.WithoutCancel(context.Background()), p.c.Path, p.c.Args...)
	cmd.Dir = p.c.Dir
	cmd.Env = append(os.Environ(), p.c.Env...)
	// A group of its own, and gone with the test should that be killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = &p.log
	r := &run{cmd: cmd, ready: make(chan struct{}), exited: make(chan struct{})}
	begin := time.Now()
	start := cmd.Start
	if p.c.Clock != nil {
		start = func() error { return p.c.Clock.start(cmd) }
	}
	if err := start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(r.exited)
		p.watch(stderr, r, begin)
		r.err = cmd.Wait()
	}()
	return r, nil
}

// watch copies the program's standard error into the log until it ends, and looks for the ready line.
func (p *Process) watch(stderr io.Reader, r *run, begin time.Time) {
	seen := false
	for lines := bufio.NewReader(stderr); ; {
		line, err := lines.ReadString('\n')
		_, _ = p.log.Write([]byte(line)) // cannot fail
		if !seen && p.isReady(line) {
			seen = true
			r.took = time.Since(begin)
			close(r.ready)
		}
		if err != nil {
			return
		}
	}
}

func (p *Process) isReady(line string) bool {
	if p.c.Ready != "" {
		return strings.Contains(line, p.c.Ready)
	}
	return strings.Contains(line, "msg=ready") || strings.Contains(line, `"msg":"ready"`)
}

func (p *Process) current() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run
}

// Kill sends SIGKILL to the whole group and waits until it is gone. Nothing happens if it is gone already.
func (p *Process) Kill() {
	if r := p.current(); r != nil {
		p.SendKill()
		<-r.exited
	}
}

// SendKill is Kill without waiting: for a program that hangs in the kernel until the test lets go of it.
func (p *Process) SendKill() {
	r := p.current()
	select {
	case <-r.exited: // its number may be another's by now: of a machine's 32,768 they come round within minutes
	default:
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL) // an error means that it is gone
	}
}

// Stop asks with SIGTERM and returns the exit code. It fails the test if the program does not end in time.
func (p *Process) Stop() int {
	p.t.Helper()
	r := p.current()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatalf("stop %s: %v", p.c.Name, err)
	}
	timer := time.NewTimer(p.c.Grace)
	defer timer.Stop()
	select {
	case <-r.exited:
	case <-timer.C:
		p.t.Fatalf("%s did not end within %v of SIGTERM", p.c.Name, p.c.Grace)
	}
	return r.cmd.ProcessState.ExitCode()
}

// Signal sends sig to the group: SIGSTOP and SIGCONT freeze and thaw it.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	select {
	case <-p.Exited():
		p.t.Fatalf("signal %s: it is gone", p.c.Name)
	default:
	}
	if err := syscall.Kill(-p.PID(), sig); err != nil {
		p.t.Fatalf("signal %s: %v", p.c.Name, err)
	}
}

// Exited is closed when the program's present life is over.
func (p *Process) Exited() <-chan struct{} { return p.current().exited }

// ExitCode is that of the present life, once it is over; -1 if a signal ended it.
func (p *Process) ExitCode() int { return p.current().cmd.ProcessState.ExitCode() }

// PID of the present life.
func (p *Process) PID() int { return p.current().cmd.Process.Pid }

// Logs returns the end of what the program wrote, over all its lives (at most 1 MiB).
func (p *Process) Logs() string { return p.log.tail(1 << 20) }

// RSS is the memory that the program holds, in bytes, as the kernel counts it; 0 if it is gone.
func (p *Process) RSS() int64 { return p.status("VmRSS:") * 1024 }

// PeakRSS is the most that it ever held.
func (p *Process) PeakRSS() int64 { return p.status("VmHWM:") * 1024 }

// CPU is the processor time it has used.
func (p *Process) CPU() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the name before may hold spaces
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * (time.Second / 100) // USER_HZ is 100 on every Linux
}

func (p *Process) status(field string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n
		}
	}
	return 0
}

// logTail keeps the end of what is written to it.
type logTail struct {
	mu  sync.Mutex
	buf []byte
}

func (l *logTail) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, b...)
	if len(l.buf) > 2<<20 {
		l.buf = append([]byte(nil), l.buf[len(l.buf)-1<<20:]...)
	}
	return len(b), nil
}

func (l *logTail) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.buf
	if len(b) > n {
		b = b[len(b)-n:]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return string(b)
}
