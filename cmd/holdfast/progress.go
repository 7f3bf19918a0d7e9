package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"
)

var errInterrupted = errors.New("interrupted")

// interruptible gives a context that ends with SIGINT or SIGTERM; the second has its usual effect.
func interruptible(ctx context.Context) (context.Context, func()) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// progress shows how far a longer work is: a bar that is drawn again and again on a terminal, a line now and then elsewhere.
type progress struct {
	w     io.Writer
	tty   bool
	width func() int // columns of the terminal
	now   func() time.Time
	every time.Duration
	total int64        // of what done counts; 0: not known
	done  func() int64 // safe for any goroutine
	// label, if there is one, says what is done instead of how many succeeded and failed; safe for any goroutine.
	label func(took time.Duration) string

	began time.Time
	ended chan struct{}
	wg    sync.WaitGroup

	mu     sync.Mutex
	ok     int  // under mu
	failed int  // under mu
	drawn  bool // under mu; a bar stands on the line
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, now: time.Now, every: 5 * time.Second, ended: make(chan struct{})}
	if f, ok := w.(*os.File); ok && terminal(f) {
		p.tty, p.every = true, 100*time.Millisecond
		p.width = func() int {
			n, _, err := term.GetSize(int(f.Fd()))
			if err != nil || n <= 0 {
				return 80
			}
			return n
		}
	}
	return p
}

func (p *progress) start() {
	p.began = p.now()
	p.wg.Go(func() {
		t := time.NewTicker(p.every)
		defer t.Stop()
		for {
			select {
			case <-p.ended:
				return
			case <-t.C:
				p.draw()
			}
		}
	})
}

func (p *progress) stop() {
	close(p.ended)
	p.wg.Wait()
}

func (p *progress) count(failed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if failed {
		p.failed++
	} else {
		p.ok++
	}
}

// say prints a line above the bar.
func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
	fmt.Fprintf(p.w, format+"\n", args...)
}

// clear takes the bar away.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wipe()
}

func (p *progress) wipe() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

func (p *progress) draw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := p.text()
	if !p.tty {
		fmt.Fprintln(p.w, text)
		return
	}
	fmt.Fprint(p.w, "\r"+p.bar(text, p.width()-1)+"\x1b[K") // the last column would break the line
	p.drawn = true
}

func (p *progress) share() float64 {
	if p.total <= 0 || p.done == nil {
		return -1
	}
	return min(1, float64(p.done())/float64(p.total))
}

func (p *progress) text() string {
	text := fmt.Sprintf("%d done", p.ok)
	if p.failed > 0 {
		text += fmt.Sprintf(", %d failed", p.failed)
	}
	took := p.now().Sub(p.began)
	if p.label != nil {
		text = p.label(took)
	} else if s := took.Seconds(); s >= 1 {
		text += fmt.Sprintf(", %.0f/s", float64(p.ok+p.failed)/s)
	}
	share := p.share()
	if share < 0 {
		return text
	}
	text = fmt.Sprintf("%3.0f %%  %s", 100*share, text)
	if share > 0.01 && took >= time.Second {
		text += fmt.Sprintf(", %s left", shortAge(time.Duration(float64(took)*(1-share)/share)))
	}
	return text
}

// bar puts a bar before text if width has room for both.
func (p *progress) bar(text string, width int) string {
	share := p.share()
	if room := width - len(text) - 3; share >= 0 && room >= 10 {
		room = min(room, 40)
		full := int(share * float64(room))
		return "[" + strings.Repeat("#", full) + strings.Repeat(".", room-full) + "] " + text
	}
	if len(text) > width {
		return text[:max(0, width)]
	}
	return text
}

func terminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }
