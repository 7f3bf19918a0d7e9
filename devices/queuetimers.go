package devices

// queueTimers is a heap of commands by their due time. A command knows its place in it.
type queueTimers []*queuedCommand

// set adds p or moves it to another time. It says whether p is the next one now.
func (h *queueTimers) set(p *queuedCommand, due int64) bool {
	switch {
	case p.timer < 0:
		p.due = due
		p.timer = int32(len(*h))
		*h = append(*h, p)
		h.up(int(p.timer))
	case p.due == due:
		return false
	default:
		p.due = due
		h.fix(int(p.timer))
	}
	return p.timer == 0
}

func (h *queueTimers) remove(p *queuedCommand) {
	i := int(p.timer)
	if i < 0 {
		return
	}
	last := len(*h) - 1
	h.swap(i, last)
	(*h)[last] = nil
	*h = (*h)[:last]
	p.timer = -1
	if i < last {
		h.fix(i)
	}
}

// next returns the one that is due first; nil: there is none.
func (h queueTimers) next() *queuedCommand {
	if len(h) == 0 {
		return nil
	}
	return h[0]
}

func (h queueTimers) swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].timer, h[j].timer = int32(i), int32(j)
}

func (h queueTimers) fix(i int) {
	if !h.down(i) {
		h.up(i)
	}
}

func (h queueTimers) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if h[parent].due <= h[i].due {
			return
		}
		h.swap(i, parent)
		i = parent
	}
}

func (h queueTimers) down(i int) (moved bool) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return moved
		}
		if child+1 < len(h) && h[child+1].due < h[child].due {
			child++
		}
		if h[i].due <= h[child].due {
			return moved
		}
		h.swap(i, child)
		i, moved = child, true
	}
}
