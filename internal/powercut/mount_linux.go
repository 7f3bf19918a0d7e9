package powercut

import (
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Mount is a disk in the file tree. It lives until Unmount.
type Mount struct {
	Dir string

	fs     *fileSystem
	server *fuse.Server
	serve  sync.WaitGroup
}

// MountAt shows a disk under an empty folder. After a Cut it is what switches the power on again. It wants /dev/fuse, and rights
// to mount; Available says whether they are there.
func MountAt(dir string, d *Disk) (*Mount, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	d.mu.Lock()
	m := &Mount{Dir: dir, fs: &fileSystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), d: d, life: d.life, released: make(chan struct{})}}
	d.mu.Unlock()
	var err error
	m.server, err = newServer(m.fs, dir, &fuse.MountOptions{
		FsName: "powercut", Name: "powercut", DirectMountStrict: true, MaxWrite: 1 << 20, DisableXAttrs: true,
		DisableReadDirPlus: true, DisableSplice: true, Logger: log.New(io.Discard, "", 0),
	})
	if err != nil {
		return nil, fmt.Errorf("mount at %s: %w", dir, err)
	}
	m.serve.Go(m.server.Serve)
	if err := m.server.WaitMount(); err != nil {
		return nil, errors.Join(fmt.Errorf("mount at %s: %w", dir, err), m.Unmount())
	}
	return m, nil
}

// Available says why disks cannot be mounted here; nil: they can.
var Available = sync.OnceValue(func() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("no FUSE here: %w", err)
	}
	f.Close()
	dir, err := os.MkdirTemp("", "powercut-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	server, err := newServer(fuse.NewDefaultRawFileSystem(), dir, &fuse.MountOptions{DirectMountStrict: true, Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		return fmt.Errorf("no right to mount here: %w", err)
	}
	var serve sync.WaitGroup
	serve.Go(server.Serve)
	_ = server.WaitMount()
	err = server.Unmount()
	serve.Wait()
	return err
})

// newServer mounts, and keeps the descriptor from programs that are started: go-fuse does not when it mounts by itself, and one that
// had it would keep a disk alive, and whoever uses it hanging, after the process that answers for it is gone.
func newServer(f fuse.RawFileSystem, dir string, o *fuse.MountOptions) (*fuse.Server, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	server, err := fuse.NewServer(f, dir, o)
	if err != nil {
		return nil, err
	}
	open, err := os.ReadDir("/proc/self/fd")
	for _, e := range open {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); to == "/dev/fuse" {
			if fd, err := strconv.Atoi(e.Name()); err == nil {
				syscall.CloseOnExec(fd)
			}
		}
	}
	return server, err
}

// Release lets calls that hang since a Cut fail, so that a program which was killed meanwhile can end.
func (m *Mount) Release() { m.fs.release.Do(func() { close(m.fs.released) }) }

// Unmount takes the disk out of the file tree, once no program uses it any more. What is on it stays. Twice does no harm.
func (m *Mount) Unmount() error {
	m.Release()
	// A program that another one has just started still holds what that one had open, until it is its own.
	var err error
	for deadline := time.Now().Add(busyFor); ; {
		if err = m.server.Unmount(); !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			break
		}
	}
	if errors.Is(err, syscall.EBUSY) {
		err = errors.Join(fmt.Errorf("unmount %s: %w", m.Dir, err), syscall.Unmount(m.Dir, syscall.MNT_DETACH))
	}
	m.serve.Wait()
	return err
}

// busyFor is how long Unmount tries. The server pauses between its own tries.
const busyFor = 30 * time.Second

// fileSystem answers the kernel for one life of a disk.
type fileSystem struct {
	fuse.RawFileSystem
	d        *Disk
	life     uint64
	released chan struct{} // closed by Release
	release  sync.Once
}

// enter locks the disk for a call. While the power is off it hangs, and once it was off the call has failed.
func (f *fileSystem) enter() bool {
	f.d.mu.Lock()
	if f.d.life == f.life {
		return true
	}
	f.d.mu.Unlock()
	<-f.released
	return false
}

func (f *fileSystem) leave() { f.d.mu.Unlock() }

// The kernel may trust names and attributes: whoever changes them otherwise mounts anew.
const trust = time.Hour

func (n *inode) attr(out *fuse.Attr) {
	out.Ino = n.number
	out.Mode = n.mode
	out.Nlink = uint32(max(n.links, 1))
	out.Uid, out.Gid = n.uid, n.gid
	out.Size = uint64(len(n.data))
	out.Blocks = uint64(max(n.taken, int64(len(n.data)))+511) / 512
	out.Blksize = block
	out.SetTimes(&n.mtime, &n.mtime, &n.mtime)
}

func (n *inode) entry(out *fuse.EntryOut) {
	n.lookups++
	out.NodeId, out.Generation = n.number, 1
	out.SetEntryTimeout(trust)
	out.SetAttrTimeout(trust)
	n.attr(&out.Attr)
}

func (f *fileSystem) node(number uint64) *inode { return f.d.nodes[number] }

func (f *fileSystem) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	dir := f.node(h.NodeId)
	if dir == nil || dir.entries[name] == nil {
		return fuse.ENOENT
	}
	dir.entries[name].entry(out)
	return fuse.OK
}

func (f *fileSystem) Forget(number, lookups uint64) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if n := f.node(number); n != nil && f.d.life == f.life {
		n.lookups -= min(lookups, n.lookups)
		f.d.forget(n)
	}
}

func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.ENOENT
	}
	out.SetTimeout(trust)
	n.attr(&out.Attr)
	return fuse.OK
}

func (f *fileSystem) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.ENOENT
	}
	if size, ok := in.GetSize(); ok {
		if n.dir() {
			return fuse.Status(syscall.EISDIR)
		}
		if e := f.d.truncate(n, int64(size)); e != 0 {
			return fuse.Status(e)
		}
	}
	if mode, ok := in.GetMode(); ok {
		n.mode = n.mode&syscall.S_IFMT | mode
	}
	if uid, ok := in.GetUID(); ok {
		n.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.gid = gid
	}
	if t, ok := in.GetMTime(); ok {
		n.mtime = t
	}
	out.SetTimeout(trust)
	n.attr(&out.Attr)
	return fuse.OK
}

func (f *fileSystem) make(h *fuse.InHeader, name string, mode uint32, out *fuse.EntryOut) (*inode, fuse.Status) {
	dir := f.node(h.NodeId)
	if dir == nil || !dir.dir() {
		return nil, fuse.ENOENT
	}
	n, e := f.d.create(dir, name, mode)
	if e != 0 {
		return nil, fuse.Status(e)
	}
	n.uid, n.gid = h.Uid, h.Gid
	n.entry(out)
	return n, fuse.OK
}

func (f *fileSystem) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	_, s := f.make(&in.InHeader, name, syscall.S_IFDIR|in.Mode&0o7777, out)
	return s
}

func (f *fileSystem) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if in.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fuse.Status(syscall.EPERM)
	}
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	_, s := f.make(&in.InHeader, name, in.Mode, out)
	return s
}

func (f *fileSystem) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n, s := f.make(&in.InHeader, name, syscall.S_IFREG|in.Mode&0o7777, &out.EntryOut)
	if !s.Ok() {
		return s
	}
	n.opens++
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (f *fileSystem) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(h, name, false)
}

func (f *fileSystem) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return f.remove(h, name, true)
}

func (f *fileSystem) remove(h *fuse.InHeader, name string, folder bool) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	dir := f.node(h.NodeId)
	if dir == nil {
		return fuse.ENOENT
	}
	return fuse.Status(f.d.remove(dir, name, folder))
}

func (f *fileSystem) Rename(_ <-chan struct{}, in *fuse.RenameIn, name, as string) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	dir, to := f.node(in.NodeId), f.node(in.Newdir)
	if dir == nil || to == nil {
		return fuse.ENOENT
	}
	return fuse.Status(f.d.rename(dir, name, to, as, in.Flags))
}

func (f *fileSystem) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n, dir := f.node(in.Oldnodeid), f.node(in.NodeId)
	if n == nil || dir == nil {
		return fuse.ENOENT
	}
	if e := f.d.link(n, dir, name); e != 0 {
		return fuse.Status(e)
	}
	n.entry(out)
	return fuse.OK
}

func (f *fileSystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.ENOENT
	}
	if in.Flags&syscall.O_TRUNC != 0 && len(n.data) > 0 {
		if e := f.d.truncate(n, 0); e != 0 {
			return fuse.Status(e)
		}
	}
	n.opens++
	out.OpenFlags = fuse.FOPEN_DIRECT_IO // what was damaged behind the kernel's back is seen
	return fuse.OK
}

func (f *fileSystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { f.close(in.NodeId) }

func (f *fileSystem) close(number uint64) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if n := f.node(number); n != nil && f.d.life == f.life {
		n.opens--
		f.d.forget(n)
	}
}

func (f *fileSystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if !f.enter() {
		return nil, fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return nil, fuse.ENOENT
	}
	if in.Offset >= uint64(len(n.data)) {
		return fuse.ReadResultData(nil), fuse.OK
	}
	return fuse.ReadResultData(buf[:copy(buf, n.data[in.Offset:])]), fuse.OK
}

func (f *fileSystem) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if !f.enter() {
		return 0, fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return 0, fuse.ENOENT
	}
	written, e := f.d.write(n, int64(in.Offset), data)
	return uint32(written), fuse.Status(e)
}

func (f *fileSystem) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (f *fileSystem) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status { return f.sync(in.NodeId) }

func (f *fileSystem) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return f.sync(in.NodeId)
}

func (f *fileSystem) sync(number uint64) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	n := f.node(number)
	if n == nil {
		f.leave()
		return fuse.ENOENT
	}
	e, void := f.d.sync(n)
	f.leave()
	if void {
		<-f.released
		return fuse.EIO
	}
	return fuse.Status(e)
}

func (f *fileSystem) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const keepSize = 1
	if in.Mode&^keepSize != 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.ENOENT
	}
	end := int64(in.Offset + in.Length)
	if e := f.d.room(n, end); e != 0 {
		return fuse.Status(e)
	}
	if in.Mode&keepSize == 0 && end > int64(len(n.data)) {
		return fuse.Status(f.d.truncate(n, end))
	}
	return fuse.OK
}

func (f *fileSystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil || !n.dir() {
		return fuse.ENOTDIR
	}
	n.opens++
	return fuse.OK
}

func (f *fileSystem) ReleaseDir(in *fuse.ReleaseIn) { f.close(in.NodeId) }

func (f *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	n := f.node(in.NodeId)
	if n == nil {
		return fuse.ENOENT
	}
	// Offsets are inode numbers, so that files which come and go between two calls hide no other.
	names := slices.SortedFunc(maps.Keys(n.entries), func(a, b string) int { return int(n.entries[a].number) - int(n.entries[b].number) })
	for _, name := range names {
		e := n.entries[name]
		if e.number <= in.Offset {
			continue
		}
		if !out.AddDirEntry(fuse.DirEntry{Name: name, Mode: e.mode, Ino: e.number, Off: e.number}) {
			break
		}
	}
	return fuse.OK
}

func (f *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.leave()
	free := uint64(max(0, f.d.capacity-f.d.used-f.d.foreign)) / block
	out.Blocks, out.Bfree, out.Bavail = uint64(f.d.capacity)/block, free, free
	out.Files, out.Ffree = 1<<20, 1<<20-uint64(len(f.d.nodes))
	out.Bsize, out.Frsize, out.NameLen = block, block, 255
	return fuse.OK
}
