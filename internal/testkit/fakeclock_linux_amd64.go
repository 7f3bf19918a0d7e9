package testkit

import (
	"bytes"
	"debug/elf"
	"debug/gosym"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// NewFakeClock makes a wall clock that shows the machine's time, for which the kernel vouches.
func NewFakeClock(t T) *FakeClock {
	c := &FakeClock{
		t: t, synced: true,
		SyncedFunc: "holdfast/internal/clock.kernelSynced", BootFunc: "holdfast/internal/clock.systemBoot",
	}
	t.Cleanup(func() {
		if c.live != nil {
			_ = c.live.mem.Close()
		}
	})
	return c
}

// fakedProcess is a child whose vDSO was written over.
type fakedProcess struct {
	pid          int
	mem          *os.File // its memory, and nobody else's: a process that gets the number later has another
	offset, flag uint64   // addresses
}

// clockGettime is what stands in the place of __vdso_clock_gettime: the system call, and for the wall clock the offset is
// added. The offset (8 bytes, seconds) and the flag (8 bytes) follow it.
//
//	mov eax, 228; syscall; test edi, edi; jne end; mov rcx, [rip+offset]; add [rsi], rcx; end: ret
var clockGettime = []byte{
	0xb8, 0xe4, 0, 0, 0, 0x0f, 0x05, 0x85, 0xff, 0x75, 0x0a, 0x48, 0x8b, 0x0d, 0, 0, 0, 0, 0x48, 0x01, 0x0e, 0xc3,
	0xcc, 0xcc, // to 24
}

// start starts cmd, and sets its clock before its first instruction.
func (c *FakeClock) start(cmd *exec.Cmd) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr.Ptrace = true
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
		return fmt.Errorf("wait for the stopped child: %w", err)
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	if c.live != nil {
		_ = c.live.mem.Close() // of the life before
	}
	p := &fakedProcess{pid: pid, mem: mem}
	c.live = p
	err = errors.Join(p.patch(cmd.Path, c), p.set(c.offset, c.synced), syscall.PtraceDetach(pid))
	if err != nil {
		_ = cmd.Process.Kill()
		return fmt.Errorf("fake the clock of %s: %w", cmd.Path, err)
	}
	return nil
}

// patch writes over the vDSO and the program's functions.
func (p *fakedProcess) patch(path string, c *FakeClock) error {
	base, image, err := p.vdso()
	if err != nil {
		return err
	}
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return fmt.Errorf("vDSO: %w", err)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("vDSO: %w", err)
	}
	entry := uint64(0)
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" && s.Size >= 64 {
			entry = base + s.Value
		}
	}
	if entry == 0 || entry%8 != 0 {
		return fmt.Errorf("vDSO: no room in __vdso_clock_gettime at %#x", entry)
	}
	code := bytes.Clone(clockGettime)
	p.offset, p.flag = entry+uint64(len(code)), entry+uint64(len(code))+8
	binary.LittleEndian.PutUint32(code[14:], uint32(len(code)-18)) // from the end of that instruction
	if err := p.write(entry, append(code, make([]byte, 16)...)); err != nil {
		return err
	}
	synced, boot, err := functions(path, c.SyncedFunc, c.BootFunc)
	if err != nil {
		return err
	}
	// mov rax, flag; movzx eax, byte [rax]; ret
	if err := p.write(synced, append(binary.LittleEndian.AppendUint64([]byte{0x48, 0xb8}, p.flag), 0x0f, 0xb6, 0x00, 0xc3)); err != nil {
		return err
	}
	if c.reboot {
		// xor eax, eax; xor ebx, ebx; xor ecx, ecx; ret: "", 0
		return p.write(boot, []byte{0x31, 0xc0, 0x31, 0xdb, 0x31, 0xc9, 0xc3})
	}
	return nil
}

// vdso finds the child's and reads it.
func (p *fakedProcess) vdso() (base uint64, image []byte, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.pid))
	if err != nil {
		return 0, nil, err
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.Contains(line, "[vdso]") {
			continue
		}
		from, to, _ := strings.Cut(strings.Fields(line)[0], "-")
		lo, err := strconv.ParseUint(from, 16, 64)
		if err != nil {
			return 0, nil, err
		}
		hi, err := strconv.ParseUint(to, 16, 64)
		if err != nil {
			return 0, nil, err
		}
		image = make([]byte, hi-lo)
		_, err = p.mem.ReadAt(image, int64(lo))
		return lo, image, err
	}
	return 0, nil, errors.New("the child has no vDSO")
}

// functions finds two functions of a static Go program. Its table of functions is there even if its symbols were stripped.
func functions(path, first, second string) (a, b uint64, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = f.Close() }()
	text, lines := f.Section(".text"), f.Section(".gopclntab")
	if f.Type != elf.ET_EXEC || text == nil || lines == nil {
		return 0, 0, fmt.Errorf("%s is no static Go program", path)
	}
	data, err := lines.Data()
	if err != nil {
		return 0, 0, err
	}
	table, err := gosym.NewTable(nil, gosym.NewLineTable(data, text.Addr))
	if err != nil {
		return 0, 0, err
	}
	x, y := table.LookupFunc(first), table.LookupFunc(second)
	if x == nil || y == nil {
		return 0, 0, fmt.Errorf("%s has no %s or %s", path, first, second)
	}
	return x.Entry, y.Entry, nil
}

// set may be called while the child runs: the kernel copies eight bytes at once.
func (p *fakedProcess) set(offset time.Duration, synced bool) error {
	flag := uint64(0)
	if synced {
		flag = 1
	}
	return errors.Join(
		p.write(p.flag, binary.LittleEndian.AppendUint64(nil, flag)),
		p.write(p.offset, binary.LittleEndian.AppendUint64(nil, uint64(int64(offset/time.Second)))),
	)
}

// write goes through the page protections, as a debugger does.
func (p *fakedProcess) write(at uint64, b []byte) error {
	_, err := p.mem.WriteAt(b, int64(at))
	return err
}
