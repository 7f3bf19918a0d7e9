package lifecycle_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"holdfast/internal/lifecycle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// journal notes what happened in which order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) note(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

// part works until it is asked to stop, and then takes its time.
func (j *journal) part(name string, takes, grace time.Duration) lifecycle.Part {
	return lifecycle.Part{Name: name, Grace: grace, Run: func(ctx context.Context) error {
		<-ctx.Done()
		j.note("stop " + name)
		time.Sleep(takes) //nolint:forbidigo // synctest's clock
		j.note("end " + name)
		return nil
	}}
}

func (j *journal) want(t *testing.T, lines ...string) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !slices.Equal(j.lines, lines) {
		t.Errorf("happened %q, want %q", j.lines, lines)
	}
}

func TestPartsStopInReverseEachJoinedBeforeTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		err := lifecycle.Run(ctx, j.part("a", 3*time.Second, time.Hour), j.part("b", 2*time.Second, time.Hour), j.part("c", time.Second, time.Hour))
		if err != nil {
			t.Errorf("Run = %v", err)
		}
		j.want(t, "stop c", "end c", "stop b", "end b", "stop a", "end a")
		if took := time.Since(start); took != time.Minute+6*time.Second {
			t.Errorf("took %s", took)
		}
	})
}

func TestAPartThatEndsStopsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		cause := errors.New("disk on fire")
		err := lifecycle.Run(t.Context(), j.part("below", 0, time.Second),
			lifecycle.Part{Name: "broken", Grace: time.Second, Run: func(context.Context) error { return cause }},
			j.part("above", 0, time.Second))
		if !errors.Is(err, cause) || !errors.Is(err, lifecycle.ErrEnded) {
			t.Errorf("Run = %v", err)
		}
		j.want(t, "stop above", "end above", "stop below", "end below")
	})
}

func TestAPartThatEndsWithoutAnErrorIsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		err := lifecycle.Run(t.Context(), lifecycle.Part{Name: "quiet", Run: func(context.Context) error { return nil }})
		if !errors.Is(err, lifecycle.ErrEnded) || err.Error() != "quiet: ended by itself" {
			t.Errorf("Run = %v", err)
		}
	})
}

func TestAStuckPartIsNamedAndTheRestStillStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		err := lifecycle.Run(ctx, j.part("below", 0, time.Second), j.part("stuck", time.Hour, 5*time.Second))
		if !errors.Is(err, lifecycle.ErrStuck) || err.Error() != "stuck: did not end in time" {
			t.Errorf("Run = %v", err)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %s", took)
		}
		j.want(t, "stop stuck", "stop below", "end below")
		time.Sleep(2 * time.Hour) //nolint:forbidigo // synctest's clock: it may still end, and nothing waits for it
		synctest.Wait()
	})
}

func TestAPartsContextKeepsTheValues(t *testing.T) {
	type key struct{}
	ctx := context.WithValue(t.Context(), key{}, "v")
	var got any
	_ = lifecycle.Run(ctx, lifecycle.Part{Name: "p", Run: func(ctx context.Context) error { got = ctx.Value(key{}); return nil }})
	if got != "v" {
		t.Errorf("value = %v", got)
	}
}

func TestAGroupStopsSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		g := lifecycle.Group("g", j.part("a", 4*time.Second, 5*time.Second), j.part("b", 4*time.Second, 5*time.Second))
		if err := lifecycle.Run(ctx, j.part("below", 0, time.Second), g); err != nil {
			t.Errorf("Run = %v", err)
		}
		if took := time.Since(start); took != 4*time.Second {
			t.Errorf("took %s, want 4s", took)
		}
		if last := j.lines[len(j.lines)-2]; last != "stop below" {
			t.Errorf("happened %q", j.lines)
		}
	})
}

func TestAGroupEndsAsOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		cause := errors.New("no")
		g := lifecycle.Group("g", j.part("a", 0, time.Second), lifecycle.Part{Name: "b", Run: func(context.Context) error { return cause }})
		err := lifecycle.Run(t.Context(), g)
		if !errors.Is(err, cause) || !errors.Is(err, lifecycle.ErrEnded) {
			t.Errorf("Run = %v", err)
		}
		j.want(t, "stop a", "end a")
	})
}

func TestAnEmptyGroupWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := lifecycle.Run(ctx, lifecycle.Group("none")); err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}
