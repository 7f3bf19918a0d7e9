package powercut

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// Loss tells what a cut took.
type Loss struct {
	Writes, LostWrites uint64 // not synced; of those: gone, or torn
	Torn               uint64 // some sectors of it are there, others not
	Names, LostNames   uint64 // changes of names, not synced; of those: gone
	Sector             int
}

// String tells it in a line.
func (l Loss) String() string {
	return fmt.Sprintf("%d of %d unsynced writes gone (%d torn, sectors of %d), %d of %d unsynced names", l.LostWrites, l.Writes, l.Torn, l.Sector, l.LostNames, l.Names)
}

// The ways in which what was not synced survives.
const (
	nothing   = iota
	first     // all up to some moment, the last one torn
	scattered // any sector of any write, any name
	all
)

// Cut takes the power away: from this moment on no call succeeds, and what was not synced survives as the seed says. A program that
// has the disk mounted hangs in its next call: kill it, call Unmount, and Mount what survived.
func (d *Disk) Cut(seed uint64) Loss {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.life++
	rng := source(seed)
	loss := Loss{Sector: []int{512, block}[rng.IntN(2)]}
	noise := rng.IntN(4) == 0 // else what was never written reads as zeros
	d.cutNames(rng, &loss)
	// In the order of their numbers: a seed has to do the same each time.
	reached := map[*inode]bool{}
	var walk func(n *inode)
	walk = func(n *inode) {
		if reached[n] {
			return
		}
		reached[n] = true
		for _, e := range n.synced {
			walk(e)
		}
	}
	walk(d.root)
	nodes := make([]*inode, 0, len(reached))
	for n := range reached {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *inode) int { return int(a.number) - int(b.number) })
	clear(d.nodes)
	d.used = 0
	for _, n := range nodes {
		n.links, n.held, n.opens, n.lookups, n.taken = 0, 0, 0, 0, 0
		d.nodes[n.number] = n
	}
	d.root.links, d.root.held = 1, 1
	for _, n := range nodes {
		if n.dir() {
			n.entries = make(map[string]*inode, len(n.synced))
			for name, e := range n.synced {
				n.entries[name] = e
				e.links++
				e.held++
			}
			continue
		}
		n.cut(rng, &loss, noise)
		n.data = slices.Clone(n.platter)
		n.taken = (int64(len(n.data)) + block - 1) / block * block
		d.used += n.taken
	}
	return loss
}

// cutNames decides which changes of names happened.
func (d *Disk) cutNames(rng *rand.Rand, loss *Loss) {
	type entry struct {
		dir  *inode
		name string
	}
	way := rng.IntN(4)
	keep := rng.IntN(len(d.names) + 1)
	gone := map[entry]bool{} // what happens to them later has not happened either
	for i, c := range d.names {
		loss.Names++
		happened := way == all || way == first && i < keep || way == scattered && rng.IntN(2) == 0
		for _, p := range c.parts {
			happened = happened && !gone[entry{p.dir, p.name}]
		}
		if happened {
			for _, p := range c.parts {
				if p.node != nil {
					p.dir.synced[p.name] = p.node
				} else {
					delete(p.dir.synced, p.name)
				}
			}
			continue
		}
		loss.LostNames++
		for _, p := range c.parts {
			gone[entry{p.dir, p.name}] = true
		}
	}
	d.names = nil
}

// cut decides what of a file is on the platter.
func (n *inode) cut(rng *rand.Rand, loss *Loss, noise bool) {
	if len(n.pending) == 0 {
		return
	}
	sector := int64(loss.Sector)
	way := rng.IntN(4)
	// The length is as it was at one moment, up to which truncations have happened, too. A sector is as it was at that moment, or at one of its own.
	moment := len(n.pending)
	switch way {
	case nothing:
		moment = 0
	case first, scattered:
		moment = rng.IntN(len(n.pending) + 1)
	}
	size := int64(len(n.platter))
	for _, w := range n.pending[:moment] {
		size = w.after(size)
	}
	torn := int64(0) // way first: so many sectors of the write at the moment are there, too
	if way == first && moment < len(n.pending) {
		if w := &n.pending[moment]; w.data != nil {
			torn = rng.Int64N(w.sectors(sector) + 1)
			size = max(size, min(w.off+int64(len(w.data)), (w.off/sector+torn)*sector))
		}
	}
	old := int64(len(n.platter))
	b := n.platter
	written := map[int64]bool{} // sectors
	history := map[int64]int{}  // way scattered: how many of its writes a sector has, drawn when it is met first
	met := map[int64]int{}
	if way == scattered {
		for _, w := range n.pending {
			for s := range w.sectors(sector) {
				history[w.off/sector+s]++
			}
		}
		for _, s := range slices.Sorted(maps.Keys(history)) {
			history[s] = rng.IntN(history[s] + 1)
		}
	}
	for i := range n.pending {
		w := &n.pending[i]
		loss.Writes++
		if w.data == nil {
			if i < moment {
				b = resize(b, w.size)
				old = min(old, w.size)
			} else {
				loss.LostWrites++
			}
			continue
		}
		survived := int64(0)
		for s := range w.sectors(sector) {
			at := w.off/sector + s
			there := i < moment || i == moment && s < torn
			if way == scattered {
				met[at]++
				there = met[at] <= history[at]
			}
			if !there {
				continue
			}
			survived++
			written[at] = true
			from, to := max(at*sector, w.off), min((at+1)*sector, w.off+int64(len(w.data)))
			if to > int64(len(b)) {
				b = resize(b, to)
			}
			copy(b[from:to], w.data[from-w.off:])
		}
		if survived < w.sectors(sector) {
			loss.LostWrites++
			if survived > 0 {
				loss.Torn++
			}
		}
	}
	b = resize(b, size)
	if noise {
		for at := (old + sector - 1) / sector; at*sector < size; at++ {
			if !written[at] {
				for i := at * sector; i < min((at+1)*sector, size); i++ {
					b[i] = byte(rng.Uint32())
				}
			}
		}
	}
	n.platter, n.pending = b, nil
}

// after is a file's length after a write.
func (w *write) after(size int64) int64 {
	if w.data == nil {
		return w.size
	}
	return max(size, w.off+int64(len(w.data)))
}

// sectors is how many a write touches.
func (w *write) sectors(size int64) int64 {
	return (w.off+int64(len(w.data))+size-1)/size - w.off/size
}
