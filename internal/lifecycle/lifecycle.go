// Package lifecycle runs the parts of a program: started in order, stopped in reverse, each joined
// before what it stands on is stopped.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrEnded says that a part ended although nobody asked it to.
var ErrEnded = errors.New("ended by itself")

// ErrStuck says that a part did not end within its grace. Its goroutines are still there, so
// nothing that they may use can be closed.
var ErrStuck = errors.New("did not end in time")

// Part is one piece of a program.
type Part struct {
	Name string
	// Run works until its context ends, joins what it started, and returns nil if it was asked to stop.
	Run func(ctx context.Context) error
	// Grace is how long Run may take to end once its context did.
	Grace time.Duration
}

// Run starts parts in order, waits for ctx or for the first part to end, and stops them in reverse:
// none loses what it stands on while it still works. A part's context keeps the values of ctx but
// ends only when it is that part's turn. After a part is stuck the ones below it are still asked to
// stop, each with its own grace.
func Run(ctx context.Context, parts ...Part) error {
	ended := make(chan struct{}, len(parts))
	stops := make([]func() error, 0, len(parts))
	for _, p := range parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		done := make(chan error, 1) // buffered: a stuck part can still end
		go func() {
			err := p.Run(pctx)
			if pctx.Err() == nil { // nobody asked it to
				err = errors.Join(ErrEnded, err)
			}
			done <- err
			ended <- struct{}{}
		}()
		stops = append(stops, func() error {
			cancel()
			grace := time.NewTimer(p.Grace)
			defer grace.Stop()
			select {
			case err := <-done:
				return prefix(p.Name, err) // nil stays nil
			case <-grace.C:
			}
			select {
			case err := <-done: // in the very moment
				return prefix(p.Name, err)
			default:
				return prefix(p.Name, ErrStuck)
			}
		})
	}
	select {
	case <-ctx.Done():
	case <-ended:
	}
	var errs []error
	for _, stop := range slices.Backward(stops) {
		errs = append(errs, stop())
	}
	return errors.Join(errs...)
}

// groupSlack is what a group needs to notice that one of its parts is stuck.
const groupSlack = 250 * time.Millisecond

// Group makes one part of several that stop side by side: as long as the slowest, not the sum.
func Group(name string, parts ...Part) Part {
	var grace time.Duration
	for _, p := range parts {
		grace = max(grace, p.Grace)
	}
	return Part{Name: name, Grace: grace + groupSlack, Run: func(ctx context.Context) error {
		if len(parts) == 0 {
			<-ctx.Done()
			return nil
		}
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		results := make(chan error, len(parts))
		for _, p := range parts {
			go func() {
				err := Run(inner, p)
				if err != nil {
					cancel() // one that fails takes the others down: the group ends as one
				}
				results <- err
			}()
		}
		var errs []error
		for range parts {
			errs = append(errs, <-results)
		}
		return errors.Join(errs...)
	}}
}

func prefix(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}
