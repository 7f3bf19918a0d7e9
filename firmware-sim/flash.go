package firmwaresim

// sample is a message of a device. Its payload is made anew each time it is sent.
type sample struct {
	n      uint64
	ts     int64 // Unix ms
	stream uint8
	sent   bool // at least once
}

// flash is a device's queue of samples that are not in flight: a ring that grows.
type flash struct {
	ring []sample // its length is 0 or a power of two
	head int
	n    int
}

func (f *flash) grow() {
	if f.n < len(f.ring) {
		return
	}
	bigger := make([]sample, max(4, 2*len(f.ring)))
	for i := range f.n {
		bigger[i] = f.ring[(f.head+i)&(len(f.ring)-1)]
	}
	f.ring, f.head = bigger, 0
}

func (f *flash) pushBack(s sample) {
	f.grow()
	f.ring[(f.head+f.n)&(len(f.ring)-1)] = s
	f.n++
}

func (f *flash) pushFront(s sample) {
	f.grow()
	f.head = (f.head - 1) & (len(f.ring) - 1)
	f.ring[f.head] = s
	f.n++
}

func (f *flash) popFront() sample {
	s := f.ring[f.head]
	f.head = (f.head + 1) & (len(f.ring) - 1)
	f.n--
	return s
}
