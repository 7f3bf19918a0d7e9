package broker_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
)

// seen is what a tap saw.
type seen struct {
	mu  sync.Mutex
	all []broker.Passed
}

func (s *seen) see(p *broker.Passed) {
	s.mu.Lock()
	s.all = append(s.all, *p)
	s.mu.Unlock()
}

// texts gives topic=payload of each.
func (s *seen) texts() (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.all {
		all = append(all, p.Topic+"="+string(p.Payload))
	}
	return all
}

func TestTapSeesWhatIsOnDisk(t *testing.T) {
	t.Parallel()
	eachVersion(t, func(t *testing.T, v mqtt.Version) {
		r := newRig(t, nil)
		p := r.client(v, "dev")
		p.publishDone(1, 1, "a/b", "before") // the connection remembers that nobody listens
		var all, some seen
		endAll, err := r.b.Tap("#", all.see)
		if err != nil {
			t.Fatal(err)
		}
		endSome, err := r.b.Tap("a/+", some.see)
		if err != nil {
			t.Fatal(err)
		}
		p.publishDone(1, 2, "a/b", "one")
		p.publishDone(2, 3, "a/b/c", "two", retain)
		p.publish(0, 0, "a/d", "three")
		want := []string{"a/b=one", "a/b/c=two", "a/d=three"}
		eventually(t, "all are seen", func() bool { return len(all.texts()) == len(want) })
		if got := all.texts(); !slices.Equal(got, want) {
			t.Errorf("seen %q, want %q", got, want)
		}
		if got, want := some.texts(), []string{"a/b=one", "a/d=three"}; !slices.Equal(got, want) {
			t.Errorf("a/+ saw %q, want %q", got, want)
		}
		m := all.all[1]
		if m.Device != "dev" || m.QoS != 2 || !m.Retain || m.Received.IsZero() {
			t.Errorf("seen as %+v", m)
		}
		// Each ends for itself, and twice is no harm; a connection that closes without a word leaves its will.
		endSome()
		endSome()
		r.client(v, "dying", withWill()).nc.Close()
		eventually(t, "the will is seen", func() bool { return slices.Contains(all.texts(), "will/dying=gone") })
		endAll()
		p.publishDone(1, 4, "a/b", "after")
		r.stop()
		if n := len(all.texts()); n != 4 || len(some.texts()) != 2 {
			t.Errorf("%d and %d seen after the end", n, len(some.texts()))
		}
	})
}

func TestTapSeesNothingThatIsNotCommitted(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(r *rig) {
		r.in.refuse = func(m *broker.Message) error {
			if string(m.Record.Topic) == "no" {
				return fmt.Errorf("%w: enough", broker.ErrQuota)
			}
			return nil
		}
		r.auth.publish = func(_, topic string) bool { return topic != "forbidden" }
	})
	var all seen
	if _, err := r.b.Tap("#", all.see); err != nil {
		t.Fatal(err)
	}
	p := r.client(mqtt.V5, "dev")
	for i, topic := range []string{"no", "forbidden"} {
		p.publish(1, uint16(i+1), topic, "x")
		if reason := p.ack(mqtt.TypePuback, uint16(i+1)); !reason.Failed() {
			t.Fatalf("%s: %v", topic, reason)
		}
	}
	p.publishDone(1, 3, "yes", "x")
	eventually(t, "the third is seen", func() bool { return len(all.texts()) > 0 })
	if got := all.texts(); !slices.Equal(got, []string{"yes=x"}) {
		t.Errorf("seen %q", got)
	}
}

func TestTapNeedsAFilter(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	for _, f := range []string{"", "a/#/b", "a+", "a\x00b"} {
		if _, err := r.b.Tap(f, func(*broker.Passed) {}); !errors.Is(err, broker.ErrFilter) {
			t.Errorf("%q: %v", f, err)
		}
	}
}
