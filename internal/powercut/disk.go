package powercut

import (
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Disk is a file tree in memory. All methods may be called from many goroutines.
type Disk struct {
	mu     sync.Mutex // guards what follows, and everything that hangs on it
	root   *inode
	nodes  map[uint64]*inode // all that the kernel or a folder knows
	last   uint64            // highest inode number
	clock  uint64            // number of the last write or change of a name
	names  []change          // not synced, in order
	faults Faults
	calls  int    // that faults could have hit, since they were set
	life   uint64 // counts cuts: what began in an earlier life is void

	capacity int64 // bytes; what all files take may not grow beyond
	foreign  int64 // taken by others
	used     int64

	stats Stats
}

// Stats counts what was done to a disk.
type Stats struct {
	Writes, Bytes uint64
	Syncs         uint64 // fsync and fdatasync of files
	FolderSyncs   uint64
	Failed        uint64 // by faults
}

// inode is a file or a folder.
type inode struct {
	number uint64
	mode   uint32 // with the type bits
	uid    uint32
	gid    uint32
	mtime  time.Time

	entries map[string]*inode // folder: as programs see it
	synced  map[string]*inode // folder: as the platter has it

	data    []byte  // file: as programs see it
	platter []byte  // file: as the platter has it
	pending []write // file: what makes data out of platter, in order; see lose
	taken   int64   // bytes of the capacity

	links   int    // entries of folders as programs see them
	held    int    // entries of folders as the platter has them, and changes that are not synced
	opens   int    // by programs
	lookups uint64 // of the kernel
}

func (n *inode) dir() bool { return n.entries != nil }

// write is one that was not synced: data at off, or with data nil a new length.
type write struct {
	at   uint64 // Disk.clock
	off  int64
	data []byte
	size int64
}

// change of names that happens as one: create, link and remove have one part, a rename has two.
type change struct {
	at    uint64 // Disk.clock
	parts []part
}

// part puts node under a name, or nothing.
type part struct {
	dir  *inode
	name string
	node *inode // nil: the name is gone
}

// Unlimited is the capacity of a new disk.
const Unlimited = math.MaxInt64 / 4

const block = 4096

// New makes an empty disk.
func New() *Disk {
	d := &Disk{nodes: map[uint64]*inode{}, capacity: Unlimited}
	d.root = d.node(syscall.S_IFDIR | 0o755)
	d.root.links, d.root.held = 1, 1
	return d
}

func (d *Disk) node(mode uint32) *inode {
	d.last++
	n := &inode{number: d.last, mode: mode, mtime: time.Now()}
	if mode&syscall.S_IFMT == syscall.S_IFDIR {
		n.entries, n.synced = map[string]*inode{}, map[string]*inode{}
	}
	d.nodes[n.number] = n
	return n
}

// tick numbers what happens.
func (d *Disk) tick() uint64 {
	d.clock++
	return d.clock
}

// apply makes a change visible to programs.
func (d *Disk) apply(parts ...part) {
	for _, p := range parts {
		if old := p.dir.entries[p.name]; old != nil {
			old.links--
			delete(p.dir.entries, p.name)
		}
		if p.node != nil {
			p.dir.entries[p.name] = p.node
			p.node.links++
			p.node.held++
		}
		p.dir.mtime = time.Now()
		p.dir.held++
	}
	d.names = append(d.names, change{d.tick(), parts})
}

// commit puts a change onto the platter and lets go of it.
func (d *Disk) commit(c change) {
	for _, p := range c.parts {
		old := p.dir.synced[p.name]
		if p.node != nil {
			p.dir.synced[p.name] = p.node // held already
		} else {
			delete(p.dir.synced, p.name)
		}
		p.dir.held--
		d.forget(p.dir)
		if old != nil {
			old.held--
			d.forget(old)
		}
	}
}

// forget frees what nobody can reach any more.
func (d *Disk) forget(n *inode) {
	if n.links == 0 && n.opens == 0 { // to programs its room is free at once
		d.used -= n.taken
		n.taken = 0
	}
	if n.links == 0 && n.opens == 0 && n.held <= 0 {
		n.data, n.platter, n.pending = nil, nil, nil
		if n.lookups == 0 {
			delete(d.nodes, n.number)
		}
	}
}

// syncNames puts the changes of one folder onto the platter, up to a moment. A change that moved something between two folders
// takes along what happened before to the names that it touches.
func (d *Disk) syncNames(dir *inode, until uint64) {
	type entry struct {
		dir  *inode
		name string
	}
	due := make([]bool, len(d.names))
	touched := map[entry]bool{}
	for i := len(d.names) - 1; i >= 0; i-- {
		c := &d.names[i]
		if c.at > until {
			continue
		}
		for _, p := range c.parts {
			due[i] = due[i] || p.dir == dir || touched[entry{p.dir, p.name}]
		}
		if due[i] {
			for _, p := range c.parts {
				touched[entry{p.dir, p.name}] = true
			}
		}
	}
	left := d.names[:0]
	for i, c := range d.names {
		if due[i] {
			d.commit(c)
		} else {
			left = append(left, c)
		}
	}
	clear(d.names[len(left):])
	d.names = left
}

// syncFile puts a file's writes onto the platter, up to a moment.
func (n *inode) syncFile(until uint64) {
	k := 0
	for k < len(n.pending) && n.pending[k].at <= until {
		n.platter = n.pending[k].on(n.platter)
		k++
	}
	left := copy(n.pending, n.pending[k:])
	clear(n.pending[left:])
	n.pending = n.pending[:left]
}

// lose forgets what a failed fsync should have put onto the platter: programs go on seeing it, and no later fsync writes it. The
// length counts as lost with it.
func (n *inode) lose(until uint64) {
	n.pending = slices.DeleteFunc(n.pending, func(w write) bool { return w.at <= until })
}

// on does a write to b.
func (w *write) on(b []byte) []byte {
	if w.data == nil {
		return resize(b, w.size)
	}
	if end := w.off + int64(len(w.data)); end > int64(len(b)) {
		b = resize(b, end)
	}
	copy(b[w.off:], w.data)
	return b
}

// resize cuts b off, or fills it up with zeros.
func resize(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return b[:size:size] // with its capacity, or what lies beyond would come back when it grows
	}
	if size <= int64(cap(b)) {
		old := len(b)
		b = b[:size]
		clear(b[old:])
		return b
	}
	grown := make([]byte, size, size+size/2)
	copy(grown, b)
	return grown
}

// room takes so many bytes more of the capacity for n.
func (d *Disk) room(n *inode, size int64) syscall.Errno {
	more := (size+block-1)/block*block - n.taken
	if more <= 0 {
		return 0
	}
	if d.used+d.foreign+more > d.capacity {
		return syscall.ENOSPC
	}
	d.used += more
	n.taken += more
	return 0
}

// write writes to a file. A disk that fills up takes what fits.
func (d *Disk) write(n *inode, off int64, data []byte) (int, syscall.Errno) {
	if e := d.fail(callWrite); e != 0 {
		return 0, e
	}
	if e := d.room(n, off+int64(len(data))); e != 0 {
		fits := n.taken + (d.capacity-d.used-d.foreign)/block*block - off
		if fits <= 0 {
			d.stats.Failed++
			return 0, e
		}
		data = data[:min(fits, int64(len(data)))]
		_ = d.room(n, off+int64(len(data)))
	}
	if len(data) == 0 {
		return 0, 0
	}
	w := write{at: d.tick(), off: off, data: slices.Clone(data)}
	n.pending = append(n.pending, w)
	n.data = w.on(n.data)
	n.mtime = time.Now()
	d.stats.Writes++
	d.stats.Bytes += uint64(len(data))
	return len(data), 0
}

// truncate gives a file another length.
func (d *Disk) truncate(n *inode, size int64) syscall.Errno {
	if e := d.fail(callWrite); e != 0 {
		return e
	}
	if size > int64(len(n.data)) {
		if e := d.room(n, size); e != 0 {
			return e
		}
	} else if need := (size + block - 1) / block * block; need < n.taken {
		d.used -= n.taken - need
		n.taken = need
	}
	w := write{at: d.tick(), size: size}
	n.pending = append(n.pending, w)
	n.data = w.on(n.data)
	n.mtime = time.Now()
	return 0
}

// create makes a file or folder.
func (d *Disk) create(dir *inode, name string, mode uint32) (*inode, syscall.Errno) {
	switch {
	case dir.entries[name] != nil:
		return nil, syscall.EEXIST
	case dir != d.root && dir.links == 0:
		return nil, syscall.ENOENT
	}
	if e := d.fail(callWrite); e != 0 {
		return nil, e
	}
	if d.used+d.foreign+block > d.capacity {
		return nil, syscall.ENOSPC
	}
	n := d.node(mode)
	d.apply(part{dir, name, n})
	return n, 0
}

func (d *Disk) link(n, dir *inode, name string) syscall.Errno {
	switch {
	case n.dir():
		return syscall.EPERM
	case dir.entries[name] != nil:
		return syscall.EEXIST
	}
	if e := d.fail(callWrite); e != 0 {
		return e
	}
	d.apply(part{dir, name, n})
	return 0
}

func (d *Disk) remove(dir *inode, name string, folder bool) syscall.Errno {
	n := dir.entries[name]
	switch {
	case n == nil:
		return syscall.ENOENT
	case folder && !n.dir():
		return syscall.ENOTDIR
	case !folder && n.dir():
		return syscall.EISDIR
	case folder && len(n.entries) > 0:
		return syscall.ENOTEMPTY
	}
	if e := d.fail(callWrite); e != 0 {
		return e
	}
	d.apply(part{dir, name, nil})
	d.forget(n)
	return 0
}

func (d *Disk) rename(dir *inode, name string, to *inode, as string, flags uint32) syscall.Errno {
	const noReplace = 1
	n, old := dir.entries[name], to.entries[as]
	switch {
	case n == nil:
		return syscall.ENOENT
	case flags&^noReplace != 0:
		return syscall.EINVAL
	case flags&noReplace != 0 && old != nil:
		return syscall.EEXIST
	case old == n:
		return 0
	case old != nil && n.dir() && !old.dir():
		return syscall.ENOTDIR
	case old != nil && !n.dir() && old.dir():
		return syscall.EISDIR
	case old != nil && len(old.entries) > 0:
		return syscall.ENOTEMPTY
	}
	if e := d.fail(callWrite); e != 0 {
		return e
	}
	d.apply(part{dir, name, nil}, part{to, as, n})
	if old != nil {
		d.forget(old)
	}
	return 0
}

// SetCapacity says how many bytes the files may take, those of others included.
func (d *Disk) SetCapacity(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.capacity = bytes
}

// Fill has others take so much that free bytes are left; negative: others take nothing.
func (d *Disk) Fill(free int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.foreign = 0
	if free >= 0 {
		d.foreign = max(0, d.capacity-d.used-free)
	}
}

// Used is how many bytes the files take.
func (d *Disk) Used() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used
}

// Stats counts what was done so far.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// find is the inode at a path, as programs see it; nil: there is none.
func (d *Disk) find(name string) *inode {
	n := d.root
	for step := range strings.SplitSeq(path.Clean("/"+name), "/") {
		if step == "" {
			continue
		}
		if n == nil || !n.dir() {
			return nil
		}
		n = n.entries[step]
	}
	return n
}

// Files are the paths and sizes of all files below a folder ("": all), in the order of their names.
func (d *Disk) Files(below string) []File {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []File
	var walk func(n *inode, at string)
	walk = func(n *inode, at string) {
		if !n.dir() {
			all = append(all, File{at, int64(len(n.data))})
			return
		}
		for name, e := range n.entries {
			walk(e, path.Join(at, name))
		}
	}
	if n := d.find(below); n != nil {
		walk(n, strings.Trim(path.Clean("/"+below), "/"))
	}
	slices.SortFunc(all, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return all
}

// File is one of Files.
type File struct {
	Path string
	Size int64
}

// Damage changes what is in a file: on the platter, and for programs that read it. change may return another length. A program
// that has the file open may keep the old length: damage at rest needs Mount anew.
func (d *Disk) Damage(name string, change func(data []byte) []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.find(name)
	if n == nil || n.dir() {
		return &fs.PathError{Op: "damage", Path: name, Err: fs.ErrNotExist}
	}
	n.data = change(n.data)
	n.platter, n.pending = slices.Clone(n.data), nil
	return nil
}

// Copy copies a folder and all below it to another name, synced; what was there is gone. It is for looking at a copy while the
// original is left as it is.
func (d *Disk) Copy(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	src := d.find(from)
	if src == nil {
		return fmt.Errorf("copy %s: %w", from, fs.ErrNotExist)
	}
	dir, name := d.find(path.Dir("/"+to)), path.Base(to)
	if dir == nil || !dir.dir() {
		return fmt.Errorf("copy to %s: %w", to, fs.ErrNotExist)
	}
	var dup func(n *inode) *inode
	dup = func(n *inode) *inode {
		c := d.node(n.mode)
		c.uid, c.gid, c.mtime = n.uid, n.gid, n.mtime
		c.data, c.platter = slices.Clone(n.data), slices.Clone(n.data)
		for name, e := range n.entries {
			child := dup(e)
			child.links, child.held = 1, 1
			c.entries[name], c.synced[name] = child, child
		}
		return c
	}
	d.drop(dir, name)
	c := dup(src)
	c.links, c.held = 1, 1
	dir.entries[name], dir.synced[name] = c, c
	return nil
}

// Drop removes what is under a path, for good.
func (d *Disk) Drop(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dir := d.find(path.Dir("/" + name)); dir != nil && dir.dir() {
		d.drop(dir, path.Base(name))
	}
}

func (d *Disk) drop(dir *inode, name string) {
	var free func(n *inode)
	free = func(n *inode) {
		for name, e := range n.entries {
			delete(n.entries, name)
			delete(n.synced, name)
			free(e)
		}
		n.links, n.held = 0, 0
		d.forget(n)
	}
	if n := dir.entries[name]; n != nil {
		delete(dir.entries, name)
		delete(dir.synced, name)
		free(n)
	}
}

// ReadFile is what programs see of a file.
func (d *Disk) ReadFile(name string) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.find(name)
	if n == nil || n.dir() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	}
	return slices.Clone(n.data), nil
}

func source(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x637574)) }
