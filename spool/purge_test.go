package spool_test

import (
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"

	"holdfast/spool"
)

// TestPurgeTakesWhatItIsAskedFor purges a lane of 1000 messages, of which 100 are delivered.
func TestPurgeTakesWhatItIsAskedFor(t *testing.T) {
	at := func(i int) time.Time { return time.UnixMilli(rec(i).Received) }
	for name, tc := range map[string]struct {
		olderThan time.Time
		upTo      uint64
		left      int // the first that stays
	}{
		"all":                     {time.Time{}, 0, 1000},
		"all by number":           {time.Time{}, 1000, 1000},
		"more than there are":     {time.Time{}, math.MaxUint64, 1000},
		"up to a number":          {time.Time{}, 500, 500},
		"one":                     {time.Time{}, 101, 101},
		"what is delivered":       {time.Time{}, 100, 100},
		"by age":                  {at(300), 0, 300},
		"older than all":          {at(0), 0, 100},
		"younger than all":        {at(1000), 0, 1000},
		"by age, at most so many": {at(300), 200, 200},
		"by number, so old":       {at(150), 200, 150},
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem()
			r := open(t, fs, lanes("bulk", "other"))
			rd, c := r.reader("cloud", "bulk")
			r.put("other", 0, 10)
			for i := 0; i < 1000; i += 70 { // chunks of several messages
				r.put("bulk", i, min(i+70, 1000))
			}
			run, err := rd.Next(1) // one message after another, up to number 100
			for ; err == nil && run.Pos.Seq < 100; run, err = rd.Next(1) {
			}
			if err != nil || run.Pos.Seq != 100 {
				t.Fatalf("run at %d, %v", run.Pos.Seq, err)
			}
			rd.Resolve(run.End(), spool.Delivered)

			gone, err := r.Purge("bulk", tc.olderThan, tc.upTo)
			if err != nil {
				t.Fatal(err)
			}
			a := r.account("cloud", "bulk")
			if want := uint64(tc.left - 100); gone.Messages != want || a.Evicted != gone || a.Delivered.Messages != 100 {
				t.Fatalf("purged %+v, want %d messages; account %+v", gone, want, a)
			}
			got, _ := read(t, rd, 1<<20)
			if d := cmp.Diff(seq(tc.left, 1000), got); d != "" {
				t.Fatal(d)
			}
			if n := r.account("cloud", "other").Pending.Messages; n != 10 {
				t.Errorf("the other lane has %d messages left", n)
			}
			if err := r.store.Flush(); err != nil { // the announcement is a message itself
				t.Fatal(err)
			}
			told := gaps(t, r)
			if tc.left == 100 && len(told) > 0 || tc.left > 100 && (len(told) != 1 || !strings.Contains(told[0], `"reason":"purged"`)) {
				t.Errorf("gaps %v", told)
			}
			c.Close()
			r.close()
			r = open(t, fs, lanes("bulk", "other"))
			rd, _ = r.reader("cloud", "bulk")
			if d := cmp.Diff(a, r.account("cloud", "bulk")); d != "" {
				t.Fatalf("after a restart: %s", d)
			}
			got, _ = read(t, rd, 1<<20)
			if d := cmp.Diff(seq(tc.left, 1000), got); d != "" {
				t.Fatal(d)
			}
			r.verify()
		})
	}
}

func TestPurgeOfALaneThatNobodyReads(t *testing.T) {
	r := open(t, vfs.NewMem(), lanes("bulk"))
	r.put("bulk", 0, 100)
	gone, err := r.Purge("bulk", time.Time{}, 40)
	if err != nil || gone.Messages != 40 {
		t.Fatalf("purged %+v, %v", gone, err)
	}
	if a := r.account("", "bulk"); a.Evicted != gone || a.Pending.Messages != 60 {
		t.Errorf("account %+v", a)
	}
	if _, err := r.Purge("none", time.Time{}, 0); !errors.Is(err, spool.ErrNoLane) {
		t.Errorf("purge of a lane that there is not: %v", err)
	}
}

// TestPurgeGivesSpaceBackAtOnce looks at the disk when Purge has returned; what the memtables hold is
// the only thing that may still be there.
func TestPurgeGivesSpaceBackAtOnce(t *testing.T) {
	r, _ := openSmall(t, lanes("bulk"))
	r.reader("cloud", "bulk")
	r.fill("bulk", 20*mib)
	if n := r.store.DiskBytes(); n < 20*mib {
		t.Fatalf("only %d bytes on disk", n)
	}
	if _, err := r.Purge("bulk", time.Time{}, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the disk is small again", func() bool { return r.store.DiskBytes() < 9*mib })
	r.verify()
}

// fill appends n bytes that do not compress.
func (r *rig) fill(lane string, n int) {
	r.t.Helper()
	for i := 0; n > 0; i++ {
		b := noise(i)
		if err := r.Append(r.lane(lane), b, nil, nil, 0, false); err != nil {
			r.t.Fatal(err)
		}
		n -= len(b.Payload)
	}
	if err := r.store.Flush(); err != nil {
		r.t.Fatal(err)
	}
}

// noiseBytes is what records do not compress of, made once.
var noiseBytes = sync.OnceValue(func() []byte {
	b := make([]byte, 4<<20)
	var seed [32]byte
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b
})

const noiseSize = 32 << 10

// noise is a record of 32 KiB that does not compress.
func noise(i int) *spool.Record {
	r := rec(i)
	b := noiseBytes()
	at := i * noiseSize % len(b) // far from the last ones, so that a chunk does not compress
	r.Payload = b[at : at+noiseSize]
	return r
}
