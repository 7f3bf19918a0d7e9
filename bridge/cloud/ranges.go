package cloud

import "slices"

// Range is a stretch of sequences, both ends inclusive.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// Count is how many sequences r has.
func (r Range) Count() uint64 { return r.Last - r.First + 1 }

// ranges is a set of sequences: in order, no two of them touch.
type ranges []Range

// from is the index of the first range that ends at seq or later.
func (s ranges) from(seq uint64) int {
	i, _ := slices.BinarySearchFunc(s, seq, func(r Range, seq uint64) int {
		if r.Last < seq {
			return -1
		}
		return 1
	})
	return i
}

func (s ranges) has(seq uint64) bool {
	i := s.from(seq)
	return i < len(s) && s[i].First <= seq
}

// add puts r into the set.
func (s ranges) add(r Range) ranges {
	if n := len(s); n > 0 && s[n-1].Last+1 == r.First { // the usual one: the next sequence
		s[n-1].Last = r.Last
		return s
	}
	i := s.from(r.First)
	if i > 0 && s[i-1].Last+1 == r.First {
		i-- // touches the one before
	}
	j := i
	for j < len(s) && (s[j].First <= r.Last || s[j].First == r.Last+1) {
		r.First, r.Last = min(r.First, s[j].First), max(r.Last, s[j].Last)
		j++
	}
	return slices.Replace(s, i, j, r)
}

// without appends to dst what of r is not in the set.
func (s ranges) without(dst []Range, r Range) []Range {
	next := r.First
	for _, have := range s[s.from(r.First):] {
		if have.First > r.Last {
			break
		}
		if have.First > next {
			dst = append(dst, Range{next, have.First - 1})
		}
		if have.Last >= r.Last {
			return dst
		}
		next = have.Last + 1
	}
	return append(dst, Range{next, r.Last})
}

// cut removes everything up to and with seq.
func (s ranges) cut(seq uint64) ranges {
	i := s.from(seq)
	if i < len(s) && s[i].First <= seq {
		if s[i].Last == seq {
			i++
		} else {
			s[i].First = seq + 1
		}
	}
	return slices.Delete(s, 0, i)
}

// valid says whether s is as add leaves it.
func (s ranges) valid() bool {
	for i, r := range s {
		if r.First == 0 || r.Last < r.First || i > 0 && (r.First <= s[i-1].Last || r.First == s[i-1].Last+1) {
			return false
		}
	}
	return true
}
