package spool_test

import (
	"fmt"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"pgregory.net/rapid"

	"holdfast/spool"
)

// TestModel drives a spool and plain slices with the same operations: two upstreams, one lane,
// restarts in between. What a reader returns is the model's next messages, and the accounts are the
// model's counts.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fs := vfs.NewMem()
		cfg := lanes("lane")
		cfg.TailBytes = int64(rapid.SampledFrom([]int{1, 2000, 1 << 20}).Draw(rt, "tail"))
		type upstream struct {
			reader                    *spool.Reader
			consumer                  *spool.Consumer
			sent                      []spool.Position // ends of runs that were read and not resolved
			read, resolved, delivered int              // messages
			parked                    int
		}
		ups := map[string]*upstream{"a": {}, "b": {}}
		var r *rig
		start := func() {
			c := cfg
			c.Upstreams = map[string][]string{"a": nil, "b": nil}
			r = open(t, fs, c)
			for name, u := range ups {
				u.reader, u.consumer = r.reader(name, "lane")
				u.sent, u.read = nil, u.resolved
			}
		}
		stop := func() {
			for _, u := range ups {
				u.consumer.Close()
			}
			if err := r.store.Flush(); err != nil {
				rt.Fatal(err)
			}
			r.close()
		}
		start()
		written := 0
		pick := func(rt *rapid.T) *upstream { return ups[rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "upstream")] }
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				n := rapid.IntRange(1, 60).Draw(rt, "n")
				r.put("lane", written, written+n)
				written += n
			},
			"read": func(rt *rapid.T) {
				u := pick(rt)
				run, err := u.reader.Next(rapid.IntRange(1, 20_000).Draw(rt, "max"))
				if err != nil {
					rt.Fatal(err)
				}
				if run.Count == 0 {
					if u.read != written {
						rt.Fatalf("nothing to read after %d of %d messages", u.read, written)
					}
					return
				}
				for i, n := range numbers(t, run.Raw, run.Count) {
					if n != u.read+i || run.Pos.Seq != uint64(u.read+1) {
						rt.Fatalf("read %d at sequence %d, want %d", n, run.Pos.Seq+uint64(i), u.read+i)
					}
				}
				u.read += run.Count
				u.sent = append(u.sent, run.End())
			},
			"resolve": func(rt *rapid.T) {
				u := pick(rt)
				if len(u.sent) == 0 {
					return
				}
				k := rapid.IntRange(0, len(u.sent)-1).Draw(rt, "sends")
				end := u.sent[k]
				u.sent = u.sent[k+1:]
				if rapid.Bool().Draw(rt, "park") {
					u.parked += int(end.Seq) - 1 - u.resolved
					if err := u.reader.Park(end, []byte("record"), "no"); err != nil {
						rt.Fatal(err)
					}
				} else {
					u.delivered += int(end.Seq) - 1 - u.resolved
					u.reader.Resolve(end, spool.Delivered)
				}
				u.resolved = int(end.Seq) - 1
			},
			"rewind": func(rt *rapid.T) {
				u := pick(rt)
				u.reader.Rewind()
				u.sent, u.read = nil, u.resolved
			},
			"restart": func(*rapid.T) {
				stop()
				start()
			},
			"": func(rt *rapid.T) {
				for name, u := range ups {
					a := r.account(name, "lane")
					got := fmt.Sprint(a.Accepted.Messages, a.Delivered.Messages, a.Parked.Messages, a.Pending.Messages, a.Expired.Messages+a.Evicted.Messages)
					want := fmt.Sprint(written, u.delivered, u.parked, written-u.resolved, 0)
					if got != want {
						rt.Fatalf("upstream %s: accounts %s, want %s", name, got, want)
					}
				}
			},
		})
		r.verify()
		stop()
	})
}
