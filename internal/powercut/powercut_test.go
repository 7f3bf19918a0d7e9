package powercut_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/powercut"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a disk in the file tree of a test.
type rig struct {
	t *testing.T
	*powercut.Disk
	m *powercut.Mount
}

func mount(t *testing.T) *rig {
	t.Helper()
	if err := powercut.Available(); err != nil {
		t.Skip(err)
	}
	r := &rig{t: t, Disk: powercut.New()}
	m, err := powercut.MountAt(t.TempDir(), r.Disk)
	if err != nil {
		t.Fatal(err)
	}
	r.m = m
	t.Cleanup(func() { r.must(r.m.Unmount()) })
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// cycle cuts the power and switches it on again.
func (r *rig) cycle(seed uint64) powercut.Loss {
	r.t.Helper()
	loss := r.Cut(seed)
	r.again()
	return loss
}

// again mounts anew.
func (r *rig) again() {
	r.t.Helper()
	r.must(r.m.Unmount())
	m, err := powercut.MountAt(r.m.Dir, r.Disk)
	r.must(err)
	r.m = m
}

func (r *rig) path(name string) string { return filepath.Join(r.m.Dir, name) }

// write appends to a file; sync: the file and its folder are synced.
func (r *rig) write(name string, data []byte, sync bool) {
	r.t.Helper()
	f, err := os.OpenFile(r.path(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	r.must(err)
	defer f.Close()
	_, err = f.Write(data)
	r.must(err)
	if sync {
		r.must(f.Sync())
		r.sync(filepath.Dir(name))
	}
}

func (r *rig) sync(folder string) {
	r.t.Helper()
	f, err := os.Open(r.path(folder))
	r.must(err)
	defer f.Close()
	r.must(f.Sync())
}

// read returns nil if there is no such file.
func (r *rig) read(name string) []byte {
	r.t.Helper()
	b, err := os.ReadFile(r.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	r.must(err)
	return append([]byte{}, b...)
}

func block(c byte) []byte { return bytes.Repeat([]byte{c}, 4096) }

// TestSyncedSurvives writes with and without fsync, and cuts the power. What was synced is there each time; what was not is missing
// often, whole or in parts, and sometimes there.
func TestSyncedSurvives(t *testing.T) {
	var gone, whole, part, noise int
	for seed := range uint64(120) {
		r := mount(t)
		r.write("safe", block('s'), true)
		r.write("unsafe", block('s'), true)
		r.write("unsafe", append(block('u'), block('u')...), false)
		r.cycle(seed)
		if got := r.read("safe"); !bytes.Equal(got, block('s')) {
			t.Fatalf("seed %d: what was synced is gone: %d bytes", seed, len(got))
		}
		got := r.read("unsafe")
		if len(got) < 4096 || !bytes.Equal(got[:4096], block('s')) {
			t.Fatalf("seed %d: %d bytes", seed, len(got))
		}
		switch rest := got[4096:]; {
		case len(rest) == 0:
			gone++
		case bytes.Equal(rest, append(block('u'), block('u')...)):
			whole++
		case len(bytes.Trim(rest, "u\x00")) == 0:
			part++
		default:
			noise++
		}
	}
	if gone < 10 || whole < 10 || part < 10 || noise == 0 {
		t.Errorf("gone %d, whole %d, in parts %d, with noise %d times", gone, whole, part, noise)
	}
}

// TestNamesNeedTheirFolder creates, renames and removes without fsync of the folder: each may or may not have happened, and fsync
// of the file does not help.
func TestNamesNeedTheirFolder(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(100) {
		r := mount(t)
		r.write("old", []byte("old"), true)
		r.write("dead", []byte("dead"), true)
		f, err := os.Create(r.path("new"))
		r.must(err)
		_, err = f.WriteString("new")
		r.must(err)
		r.must(f.Sync())
		r.must(f.Close())
		r.must(os.Rename(r.path("old"), r.path("renamed")))
		r.must(os.Remove(r.path("dead")))
		r.must(os.Mkdir(r.path("folder"), 0o700))
		r.write("folder/inside", []byte("inside"), true) // the folder itself is not synced into its parent
		r.cycle(seed)
		if got := r.read("new"); got != nil {
			seen["created"]++
			if string(got) != "new" {
				t.Fatalf("seed %d: synced into the file was %q", seed, got)
			}
		}
		switch before, after := r.read("old"), r.read("renamed"); {
		case string(before) == "old" && after == nil:
		case before == nil && string(after) == "old":
			seen["renamed"]++
		default:
			t.Fatalf("seed %d: a rename left %q and %q", seed, before, after)
		}
		if r.read("dead") == nil {
			seen["removed"]++
		}
		if got := r.read("folder/inside"); got != nil {
			seen["folder"]++
		}
	}
	for _, what := range []string{"created", "renamed", "removed", "folder"} {
		if n := seen[what]; n < 20 || n > 80 {
			t.Errorf("%s in %d of 100 cuts", what, n)
		}
	}
}

func TestSyncedNamesSurvive(t *testing.T) {
	for seed := range uint64(40) {
		r := mount(t)
		r.write("a", []byte("a"), true)
		r.write("b", []byte("b"), true)
		r.write("tmp", []byte("new a"), true)
		r.must(os.Rename(r.path("tmp"), r.path("a")))
		r.must(os.Remove(r.path("b")))
		r.must(os.Link(r.path("a"), r.path("c")))
		r.sync(".")
		r.cycle(seed)
		if a, b, tmp, c := r.read("a"), r.read("b"), r.read("tmp"), r.read("c"); string(a) != "new a" || b != nil || tmp != nil || string(c) != "new a" {
			t.Fatalf("seed %d: a %q, b %q, tmp %q, c %q", seed, a, b, tmp, c)
		}
	}
}

// TestSeedDecides does the same to two disks: the same seed leaves the same.
func TestSeedDecides(t *testing.T) {
	left := func(seed uint64) (all string) {
		r := mount(t)
		for i := range 20 {
			name := fmt.Sprint("file", i)
			r.write(name, block(byte('a'+i)), i%2 == 0)
			r.write(name, block(byte('A'+i)), false)
			r.must(os.Truncate(r.path(name), 6000))
			r.write(name, block('z'), false)
		}
		loss := r.cycle(seed)
		all = loss.String()
		for _, f := range r.Files("") {
			all += fmt.Sprintf("\n%s %x", f.Path, r.read(f.Path))
		}
		return all
	}
	if again := left(1); left(1) != again {
		t.Error("the same seed left something else")
	}
	if left(1) == left(2) {
		t.Error("another seed left the same")
	}
}

// TestOverwriting goes back over what was synced: each sector is one of those that it ever was, and no other.
func TestOverwriting(t *testing.T) {
	old, torn := 0, 0
	for seed := range uint64(60) {
		r := mount(t)
		r.write("file", bytes.Repeat([]byte{'0'}, 16<<10), true)
		f, err := os.OpenFile(r.path("file"), os.O_WRONLY, 0)
		r.must(err)
		for _, c := range []byte("123") {
			_, err := f.WriteAt(bytes.Repeat([]byte{c}, 8<<10), 2048)
			r.must(err)
		}
		r.must(f.Close())
		loss := r.cycle(seed)
		got := r.read("file")
		if len(got) != 16<<10 {
			t.Fatalf("seed %d: %d bytes", seed, len(got))
		}
		kinds := map[byte]bool{}
		for at := 0; at < len(got); at += 512 {
			c := got[at]
			kinds[c] = true
			if c < '0' || c > '3' || !bytes.Equal(got[at:at+512], bytes.Repeat([]byte{c}, 512)) {
				t.Fatalf("seed %d (%v): at %d is %q", seed, loss, at, got[at:at+512])
			}
		}
		if len(kinds) > 2 {
			torn++
		}
		if kinds['0'] && len(kinds) == 1 {
			old++
		}
	}
	if old == 0 || torn == 0 {
		t.Errorf("nothing of it in %d cuts, in pieces in %d", old, torn)
	}
}

// TestFailedSyncLoses: what a failed fsync should have synced is lost, whatever the next one says.
func TestFailedSyncLoses(t *testing.T) {
	for seed := range uint64(20) {
		r := mount(t)
		r.write("file", []byte("first"), true)
		f, err := os.OpenFile(r.path("file"), os.O_WRONLY|os.O_APPEND, 0)
		r.must(err)
		_, err = f.WriteString("second")
		r.must(err)
		r.SetFaults(powercut.Faults{SyncErr: syscall.EIO, Times: 1})
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("fsync on a broken disk: %v", err)
		}
		r.must(f.Sync())
		r.must(f.Close())
		if got := r.read("file"); string(got) != "firstsecond" {
			t.Fatalf("before the cut: %q", got)
		}
		r.cycle(seed)
		if got := r.read("file"); string(got) != "first" {
			t.Fatalf("seed %d: after a failed fsync there is %q", seed, got)
		}
	}
}

func TestFaults(t *testing.T) {
	r := mount(t)
	f, err := os.Create(r.path("file"))
	r.must(err)
	defer f.Close()
	r.SetFaults(powercut.Faults{WriteErr: syscall.EIO, After: 2})
	for range 2 {
		_, err = f.Write(block('x'))
		r.must(err)
	}
	if _, err := f.Write(block('x')); !errors.Is(err, syscall.EIO) {
		t.Errorf("third write: %v", err)
	}
	if err := os.Rename(r.path("file"), r.path("other")); !errors.Is(err, syscall.EIO) {
		t.Errorf("rename: %v", err)
	}
	r.SetFaults(powercut.Faults{SyncTakes: 50 * time.Millisecond})
	begin := time.Now()
	r.must(f.Sync())
	if took := time.Since(begin); took < 50*time.Millisecond {
		t.Errorf("a slow fsync took %v", took)
	}
}

// TestFull fills a disk, and empties it again.
func TestFull(t *testing.T) {
	r := mount(t)
	r.SetCapacity(1 << 20)
	var st syscall.Statfs_t
	r.must(syscall.Statfs(r.m.Dir, &st))
	if st.Bavail*uint64(st.Bsize) != 1<<20 {
		t.Errorf("%d free blocks of %d", st.Bavail, st.Bsize)
	}
	f, err := os.Create(r.path("file"))
	r.must(err)
	defer f.Close()
	n, err := f.Write(make([]byte, 2<<20))
	if !errors.Is(err, syscall.ENOSPC) || n != 1<<20 {
		t.Errorf("wrote %d bytes: %v", n, err)
	}
	if err := os.WriteFile(r.path("another"), []byte("x"), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("another file: %v", err)
	}
	r.must(f.Truncate(0))
	r.must(syscall.Fallocate(int(f.Fd()), 1, 0, 512<<10)) // keep size
	if used := r.Used(); used != 512<<10 {
		t.Errorf("%d bytes are taken, 512 KiB are set aside", used)
	}
	r.Fill(4096)
	if err := os.WriteFile(r.path("large"), make([]byte, 8192), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("with one block left: %v", err)
	}
	r.must(os.Remove(r.path("large")))
	_, err = f.WriteAt(make([]byte, 512<<10), 0) // what was set aside is there
	r.must(err)
	r.Fill(-1)
	r.must(os.WriteFile(r.path("large"), make([]byte, 8192), 0o600))
	r.must(os.Remove(r.path("large")))
	r.must(f.Close())
	r.must(os.Remove(r.path("file")))
	for deadline := time.Now().Add(10 * time.Second); r.Used() != 0; <-time.After(time.Millisecond) { // the kernel lets go of a closed file when it likes
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are taken by nothing", r.Used())
		}
	}
}

// TestLie is a disk that says yes and does nothing: fsync saves nothing.
func TestLie(t *testing.T) {
	lost := 0
	for seed := range uint64(20) {
		r := mount(t)
		r.SetFaults(powercut.Faults{Lie: true})
		r.write("file", []byte("synced"), true)
		r.cycle(seed)
		if string(r.read("file")) != "synced" {
			lost++
		}
	}
	if lost < 5 {
		t.Errorf("lost in %d of 20 cuts", lost)
	}
}

func TestDamageAndCopy(t *testing.T) {
	r := mount(t)
	r.must(os.Mkdir(r.path("data"), 0o755))
	r.write("data/file", []byte("abcdef"), true)
	r.must(r.Copy("data", "copy"))
	r.must(r.Damage("data/file", func(b []byte) []byte {
		b[2] ^= 1
		return b
	}))
	if got := r.read("data/file"); string(got) != "abbdef" {
		t.Errorf("damaged: %q", got)
	}
	if got := r.read("copy/file"); string(got) != "abcdef" {
		t.Errorf("the copy: %q", got)
	}
	r.again()
	r.Drop("copy")
	if got := r.read("copy/file"); got != nil {
		t.Errorf("the copy is gone: %q", got)
	}
	if err := r.Damage("nothing", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// TestUnlinkedFileIsUsable: a file that is open lives on without a name.
func TestUnlinkedFileIsUsable(t *testing.T) {
	r := mount(t)
	f, err := os.Create(r.path("file"))
	r.must(err)
	r.must(os.Remove(r.path("file")))
	_, err = f.WriteString("still here")
	r.must(err)
	b := make([]byte, 10)
	_, err = f.ReadAt(b, 0)
	r.must(err)
	if string(b) != "still here" {
		t.Errorf("%q", b)
	}
	r.must(f.Close())
}

// TestCutHangsThenFails: after the cut a call hangs, and fails when the disk is released.
func TestCutHangsThenFails(t *testing.T) {
	r := mount(t)
	f, err := os.Create(r.path("file"))
	r.must(err)
	r.Cut(1)
	done := make(chan error, 1)
	go func() {
		_, err := f.WriteString("too late")
		done <- err
	}()
	select {
	case err := <-done:
		t.Errorf("a write after the cut ended: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	r.m.Release()
	if err := <-done; !errors.Is(err, syscall.EIO) {
		t.Errorf("a write after the cut: %v", err)
	}
	_ = f.Close()
	r.again()
}

// TestProgramsDoNotKeepTheDisk: who is started while a disk is mounted has no hand on it.
func TestProgramsDoNotKeepTheDisk(t *testing.T) {
	mount(t)
	out, err := exec.CommandContext(t.Context(), "ls", "-l", "/proc/self/fd").CombinedOutput()
	if err != nil || strings.Contains(string(out), "fuse") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestSlowSyncIsNoEarlySync: what is written while an fsync takes its time is not part of it, and a cut meanwhile makes it void.
func TestSlowSyncIsNoEarlySync(t *testing.T) {
	lost := false
	for seed := range uint64(20) {
		r := mount(t)
		f, err := os.Create(r.path("file"))
		r.must(err)
		r.must(f.Sync())
		r.sync(".")
		_, err = f.WriteString("one")
		r.must(err)
		r.SetFaults(powercut.Faults{SyncTakes: 20 * time.Millisecond})
		done := make(chan error, 1)
		go func() { done <- f.Sync() }()
		for r.Stats().Writes < 1 {
			<-time.After(time.Millisecond)
		}
		<-time.After(5 * time.Millisecond) // it has begun
		_, err = f.WriteString("two")
		r.must(err)
		r.must(<-done)
		r.must(f.Close())
		r.cycle(seed)
		got := string(r.read("file"))
		if len(got) < 3 || got[:3] != "one" {
			t.Fatalf("seed %d: %q", seed, got)
		}
		lost = lost || got == "one"
	}
	if !lost {
		t.Error("what was written during an fsync was always safe")
	}
}

func BenchmarkWriteSync(b *testing.B) {
	if err := powercut.Available(); err != nil {
		b.Skip(err)
	}
	m, err := powercut.MountAt(b.TempDir(), powercut.New())
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := m.Unmount(); err != nil {
			b.Error(err)
		}
	}()
	f, err := os.Create(filepath.Join(m.Dir, "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, 4096)
	at := int64(0)
	for b.Loop() {
		if _, err := f.WriteAt(data, at%(8<<20)); err != nil {
			b.Fatal(err)
		}
		at += 4096
		if err := syscall.Fdatasync(int(f.Fd())); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "syncs/s")
}
