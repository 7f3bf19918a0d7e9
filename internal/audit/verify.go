package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Problem is something that is not as it was written.
type Problem struct {
	File string `json:"file"`
	Line int    `json:"line,omitempty"` // from 1; 0: it is about the whole log
	Seq  uint64 `json:"seq,omitempty"`  // that the line gives itself; 0: it cannot be read
	Text string `json:"problem"`
}

// String is FILE:LINE: what is wrong.
func (p Problem) String() string {
	if p.Line == 0 {
		return fmt.Sprintf("%s: %s", p.File, p.Text)
	}
	if p.Seq == 0 {
		return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text)
	}
	return fmt.Sprintf("%s:%d: record %d %s", p.File, p.Line, p.Seq, p.Text)
}

// Report is what Verify found.
type Report struct {
	Files    []string  `json:"files"`
	Records  int       `json:"records"`
	First    uint64    `json:"first"` // number of the first record
	Head     Head      `json:"head"`  // the last one
	Problems []Problem `json:"problems"`
	// Torn: the last line has no end. A crash leaves that, and the next start mends it; while the gateway runs it is being written.
	Torn bool `json:"torn,omitempty"`
}

// place is a line of the log.
type place struct {
	file string
	line int
	seq  uint64
	hash Hash
	prev Hash
	good bool // its hash is that of what it says
}

func (p *place) problem(format string, args ...any) Problem {
	return Problem{p.file, p.line, p.seq, fmt.Sprintf(format, args...)}
}

// Verify reads the whole log in dir and names each line that was changed, removed or swapped. known are records that were noted
// elsewhere, or that must still be there for another reason.
func Verify(dir string, known ...Head) (Report, error) {
	r := Report{Files: []string{}, Problems: []Problem{}}
	files, err := filesOf(dir)
	if err != nil {
		return r, fmt.Errorf("read audit log: %w", err)
	}
	v := verifier{r: &r, bySeq: map[uint64]int{}}
	for i, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return r, fmt.Errorf("read audit log: %w", err)
		}
		r.Files = append(r.Files, filepath.Base(f))
		v.read(filepath.Base(f), b, i == len(files)-1)
	}
	v.chain()
	for _, k := range known {
		v.holds(k)
	}
	return r, nil
}

type verifier struct {
	r      *Report
	lines  []place
	bySeq  map[uint64]int // the first line with that number
	oldest uint64         // the number from which on all is kept, as the log itself says
}

// read takes the lines of a file.
func (v *verifier) read(name string, b []byte, last bool) {
	for n := 1; len(b) > 0; n++ {
		text, rest, ended := bytes.Cut(b, []byte{'\n'})
		b = rest
		p := place{file: name, line: n}
		if !ended {
			if v.r.Torn = last; !last {
				v.r.Problems = append(v.r.Problems, p.problem("%v", errTorn))
			}
			return
		}
		l, h, err := decode(text)
		p.seq, p.hash, p.prev, p.good = l.Seq, h, l.Prev, err == nil
		switch {
		case errors.Is(err, errChanged):
			v.r.Problems = append(v.r.Problems, p.problem("%v", err))
		case err != nil:
			p.seq = 0
			v.r.Problems = append(v.r.Problems, p.problem("%v", err))
			continue
		}
		if l.Act == rotated {
			if at, ok := strings.CutPrefix(l.Detail, oldestText); ok {
				if n, err := strconv.ParseUint(at, 10, 64); err == nil {
					v.oldest = n
				}
			}
		}
		v.lines = append(v.lines, p)
		if _, twice := v.bySeq[p.seq]; !twice {
			v.bySeq[p.seq] = len(v.lines) - 1
		}
	}
}

// chain looks whether each record follows the one before it.
func (v *verifier) chain() {
	r := v.r
	r.Records = len(v.lines)
	if len(v.lines) == 0 {
		return
	}
	next := uint64(1)
	if v.oldest > 0 {
		next = v.oldest
	}
	if first := v.lines[0].seq; first < next && v.oldest > 0 {
		next = first // a file that was to go is still there
	}
	r.First = v.lines[0].seq
	for i := range v.lines {
		p := &v.lines[i]
		switch {
		case v.bySeq[p.seq] != i:
			r.Problems = append(r.Problems, p.problem("is there twice: first in line %d of %s", v.lines[v.bySeq[p.seq]].line, v.lines[v.bySeq[p.seq]].file))
			continue
		case p.seq < next:
			r.Problems = append(r.Problems, p.problem("is out of its place: it stands behind record %d", next-1))
		case p.seq > next:
			if from, to, any := v.absent(next, p.seq); any {
				r.Problems = append(r.Problems, p.problem("does not follow: %s missing before it", records(from, to)))
			} else {
				r.Problems = append(r.Problems, p.problem("is out of its place: record %d should stand here", next))
			}
		}
		if before, ok := v.bySeq[p.seq-1]; ok && p.good && v.lines[before].good && v.lines[before].hash != p.prev {
			r.Problems = append(r.Problems, p.problem("does not fit record %d: one of the two was replaced", p.seq-1))
		}
		next = max(next, p.seq+1)
		if p.seq >= r.Head.Seq {
			r.Head = Head{p.seq, p.hash}
		}
	}
}

// absent tells the first stretch of numbers from from up to before to that is nowhere in the log.
func (v *verifier) absent(from, to uint64) (first, last uint64, any bool) {
	for from < to {
		if _, ok := v.bySeq[from]; !ok {
			break
		}
		from++
	}
	if from >= to {
		return 0, 0, false
	}
	last = to - 1
	if to-from < 1<<20 {
		for last = from; last+1 < to; last++ {
			if _, ok := v.bySeq[last+1]; ok {
				break
			}
		}
	}
	return from, last, true
}

func records(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("record %d is", from)
	}
	return fmt.Sprintf("records %d to %d are", from, to)
}

// holds looks for a record that was noted elsewhere.
func (v *verifier) holds(k Head) {
	if k.Seq == 0 {
		return
	}
	i, ok := v.bySeq[k.Seq]
	switch {
	case ok && v.lines[i].hash != k.Hash:
		v.r.Problems = append(v.r.Problems, v.lines[i].problem("is not the one that was noted: the log was made anew"))
	case ok:
	case k.Seq < v.r.First:
		v.r.Problems = append(v.r.Problems, Problem{File: file, Text: fmt.Sprintf("record %d, which was noted, is older than what is kept: it cannot be looked at", k.Seq)})
	default:
		text := fmt.Sprintf("the log ends too early: %s missing at its end", records(v.r.Head.Seq+1, k.Seq))
		v.r.Problems = append(v.r.Problems, Problem{File: file, Text: text})
	}
}

// Filter chooses records.
type Filter struct {
	Before uint64 // only numbers below it; 0: all
	Limit  int    // at most that many; 0: all
	Who    string // "": everybody's
	Act    string // "": any
	Object string // that begin with it; "": any
	Since  time.Time
}

// List gives records of the log in dir, the newest first. next is Before for the following page; 0: there is none. Lines that cannot be read
// are passed over: they are Verify's to name.
func List(dir string, f Filter) (page []Entry, next uint64, err error) {
	files, err := filesOf(dir)
	if err != nil {
		return nil, 0, fmt.Errorf("read audit log: %w", err)
	}
	act := []byte(`"act":"` + f.Act)
	for i := len(files) - 1; i >= 0; i-- {
		if f.Before > 0 && firstOf(files[i]) >= f.Before {
			continue
		}
		b, err := os.ReadFile(files[i])
		if err != nil {
			return nil, 0, fmt.Errorf("read audit log: %w", err)
		}
		b = b[:bytes.LastIndexByte(b, '\n')+1] // the rest is being written
		for len(b) > 0 {
			b = b[:len(b)-1]
			at := bytes.LastIndexByte(b, '\n') + 1
			text := b[at:]
			b = b[:at]
			if f.Act != "" && !bytes.Contains(text, act) { // cheaper than to read it
				continue
			}
			l, _, err := decode(text)
			switch {
			case err != nil && !errors.Is(err, errChanged):
				continue
			case f.Before > 0 && l.Seq >= f.Before, f.Who != "" && l.Who != f.Who, f.Act != "" && l.Act != f.Act, !strings.HasPrefix(l.Object, f.Object):
				continue
			case l.At.Before(f.Since):
				return page, 0, nil
			case f.Limit > 0 && len(page) == f.Limit:
				return page, page[len(page)-1].Seq, nil
			}
			page = append(page, l.Entry)
		}
	}
	return page, 0, nil
}
