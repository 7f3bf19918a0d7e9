package kv

// turns are of those who wait for room in the open group: first come, first served, or a few busy writers would take all the
// room each time, as whoever runs is faster than whoever has to be woken. Those who are to be served first have a line of their
// own, and three of four turns. All of it is under Store.mu.
type turns struct {
	first, rest []*turn
	called      int // who has been called and has not come yet
}

// turn is one who waits.
type turn struct {
	first bool
	come  chan struct{} // closed when it is called
}

// none says whether nobody would be overtaken.
func (q *turns) none(first bool) bool {
	if first {
		return len(q.first) == 0
	}
	return len(q.first)+len(q.rest)+q.called == 0
}

// wait puts t into its line: behind, or before all others if it was called and has found no room.
func (q *turns) wait(t *turn, again bool) {
	line := &q.rest
	if t.first {
		line = &q.first
	}
	t.come = make(chan struct{})
	if again {
		*line = append([]*turn{t}, *line...)
		return
	}
	*line = append(*line, t)
}

// call calls the next n.
func (q *turns) call(n int) {
	for i := range n {
		line := &q.first
		if len(q.first) == 0 || i%4 == 3 && len(q.rest) > 0 {
			line = &q.rest
		}
		if len(*line) == 0 {
			return
		}
		t := (*line)[0]
		(*line)[0] = nil
		if *line = (*line)[1:]; len(*line) == 0 {
			*line = nil
		}
		q.called++
		close(t.come)
	}
}

// waiting is how many have not come yet, called or not.
func (q *turns) waiting() int { return len(q.first) + len(q.rest) + q.called }

// all is how many wait and are not called.
func (q *turns) all() int { return len(q.first) + len(q.rest) }
