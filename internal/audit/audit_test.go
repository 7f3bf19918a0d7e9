package audit_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/internal/audit"
)

func open(t *testing.T, dir string, o audit.Options) *audit.Log {
	t.Helper()
	l, err := audit.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func appendN(t *testing.T, l *audit.Log, n int) (last audit.Head) {
	t.Helper()
	for i := range n {
		h, err := l.Append(audit.Entry{Who: "ops", Role: "admin", From: "192.0.2.7:4000", Act: "remove_device", Object: fmt.Sprintf("pump-%d", i), Result: audit.Done, Status: 204})
		if err != nil {
			t.Fatal(err)
		}
		last = h
	}
	return last
}

// written gives a log of five records and its lines.
func written(t *testing.T) (dir string, lines [][]byte) {
	t.Helper()
	dir = t.TempDir()
	l := open(t, dir, audit.Options{})
	appendN(t, l, 5)
	return dir, slices.Collect(bytes.Lines(read(t, dir)))
}

func read(t *testing.T, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, dir string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "audit.log"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, dir string, known ...audit.Head) (audit.Report, []string) {
	t.Helper()
	r, err := audit.Verify(dir, known...)
	if err != nil {
		t.Fatal(err)
	}
	var problems []string
	for _, p := range r.Problems {
		problems = append(problems, p.String())
	}
	return r, problems
}

// rehash makes the hash of a line fit what it says, as somebody would who knows how.
func rehash(line []byte) []byte {
	at := bytes.LastIndex(line, []byte(`,"hash":"`))
	h := sha256.Sum256(line[:at])
	return fmt.Appendf(slices.Clone(line[:at]), `,"hash":"%s"}`+"\n", hex.EncodeToString(h[:]))
}

func TestTamperingIsFoundAndNamed(t *testing.T) {
	replaced := func(l []byte) []byte { return bytes.Replace(l, []byte("pump-2"), []byte("pump-9"), 1) }
	for name, c := range map[string]struct {
		change func(l [][]byte) [][]byte
		want   []string
	}{
		"nothing": {func(l [][]byte) [][]byte { return l }, nil},
		"a line is changed": {
			func(l [][]byte) [][]byte { l[2] = replaced(l[2]); return l },
			[]string{"audit.log:3: record 3 was changed: its hash is not that of what it says"},
		},
		"a line is changed and its hash made anew": {
			func(l [][]byte) [][]byte { l[2] = rehash(replaced(l[2])); return l },
			[]string{"audit.log:4: record 4 does not fit record 3: one of the two was replaced"},
		},
		"a line is removed": {
			func(l [][]byte) [][]byte { return slices.Delete(l, 2, 3) },
			[]string{"audit.log:3: record 4 does not follow: record 3 is missing before it"},
		},
		"the first lines are removed": {
			func(l [][]byte) [][]byte { return l[2:] },
			[]string{"audit.log:1: record 3 does not follow: records 1 to 2 are missing before it"},
		},
		"two lines are swapped": {
			func(l [][]byte) [][]byte { l[1], l[2] = l[2], l[1]; return l },
			[]string{
				"audit.log:2: record 3 is out of its place: record 2 should stand here",
				"audit.log:3: record 2 is out of its place: it stands behind record 3",
			},
		},
		"a line is there twice": {
			func(l [][]byte) [][]byte { return slices.Insert(l, 3, l[2]) },
			[]string{"audit.log:4: record 3 is there twice: first in line 3 of audit.log"},
		},
		"a line is something else": {
			func(l [][]byte) [][]byte { l[2] = []byte("hello\n"); return l },
			[]string{
				"audit.log:3: is no record of an audit log",
				"audit.log:4: record 4 does not follow: record 3 is missing before it",
			},
		},
		"a newer version": {
			func(l [][]byte) [][]byte {
				l[4] = rehash(bytes.Replace(l[4], []byte(`"v":1`), []byte(`"v":2`), 1))
				return l
			},
			[]string{"audit.log:5: was written by a newer holdfast: use that one"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, lines := written(t)
			write(t, dir, bytes.Join(c.change(lines), nil))
			_, got := verify(t, dir)
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// A chain alone does not tell that its end is missing, or that all of it was made anew; a record that was noted does.
func TestNotedRecordsHaveToBeThere(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, audit.Options{})
	third := appendN(t, l, 3)
	last := appendN(t, l, 2)
	if _, got := verify(t, dir, third, last); got != nil {
		t.Errorf("a whole log: %q", got)
	}
	whole := read(t, dir)
	write(t, dir, bytes.Join(slices.Collect(bytes.Lines(whole))[:3], nil))
	if _, got := verify(t, dir); got != nil {
		t.Errorf("without knowing: %q", got)
	}
	_, got := verify(t, dir, third, last)
	if d := cmp.Diff([]string{"audit.log: the log ends too early: records 4 to 5 are missing at its end"}, got); d != "" {
		t.Error(d)
	}

	anew := t.TempDir()
	appendN(t, open(t, anew, audit.Options{Now: func() time.Time { return time.Unix(1, 0) }}), 5)
	if _, got := verify(t, anew, last); len(got) != 1 || !strings.Contains(got[0], "record 5 is not the one that was noted") {
		t.Errorf("made anew: %q", got)
	}
	if h, err := audit.ParseHead(last.String()); err != nil || h != last {
		t.Errorf("ParseHead(%q) = %v, %v", last, h, err)
	}
}

// Whatever a crash leaves of the last lines, the next start goes on after the last whole one, and says so.
func TestTornLastLineIsHealedAndNoted(t *testing.T) {
	_, lines := written(t)
	for name, left := range map[string][]byte{
		"half a line":              lines[4][:len(lines[4])/2],
		"a line without its end":   lines[4][:len(lines[4])-1],
		"zeros":                    make([]byte, 300),
		"zeros and then a line":    append(make([]byte, len(lines[3])-1), lines[4]...),
		"zeros, an end and a line": append(append(make([]byte, 50), '\n'), lines[4]...),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			kept := bytes.Join(lines[:3], nil)
			write(t, dir, append(slices.Clone(kept), left...))
			l := open(t, dir, audit.Options{})
			appendN(t, l, 1)
			got := read(t, dir)
			if !bytes.HasPrefix(got, kept) {
				t.Error("what was whole is not there any more")
			}
			r, problems := verify(t, dir)
			if problems != nil || r.Records != 5 || r.Torn {
				t.Errorf("%+v", r)
			}
			page, _, err := audit.List(dir, audit.Filter{Act: "audit_healed"})
			if err != nil || len(page) != 1 || page[0].Seq != 4 || !strings.Contains(page[0].Detail, fmt.Sprintf("%d bytes", len(left))) {
				t.Errorf("%v %+v", err, page)
			}
		})
	}
}

// What somebody has changed is no crash: it stays for Verify to name, and the chain goes on behind it.
func TestDamageIsNotHealedAway(t *testing.T) {
	dir, lines := written(t)
	lines[4] = bytes.Replace(lines[4], []byte("pump-4"), []byte("pump-0"), 1)
	write(t, dir, bytes.Join(lines, nil))
	appendN(t, open(t, dir, audit.Options{}), 2)
	r, got := verify(t, dir)
	if len(got) != 1 || !strings.HasPrefix(got[0], "audit.log:5: record 5 was changed") || r.Records != 7 {
		t.Errorf("%d records, %q", r.Records, got)
	}
}

func TestMissingEndIsNotedAtTheNextStart(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, audit.Options{})
	last := appendN(t, l, 5)
	l.Close()
	lines := slices.Collect(bytes.Lines(read(t, dir)))
	write(t, dir, bytes.Join(lines[:3], nil))
	again := open(t, dir, audit.Options{Known: last})
	if h := appendN(t, again, 1); h.Seq != 7 {
		t.Errorf("next number is %d: those that were used are not used again", h.Seq)
	}
	_, got := verify(t, dir)
	if d := cmp.Diff([]string{"audit.log:4: record 6 does not follow: records 4 to 5 are missing before it"}, got); d != "" {
		t.Error(d)
	}
	page, _, err := audit.List(dir, audit.Filter{Act: "audit_missing"})
	if err != nil || len(page) != 1 {
		t.Errorf("%v %+v", err, page)
	}
}

func TestChainGoesOnFromFileToFile(t *testing.T) {
	dir := t.TempDir()
	o := audit.Options{MaxBytes: 1500, Keep: 3}
	l := open(t, dir, o)
	appendN(t, l, 10)
	l.Close()
	appendN(t, open(t, dir, o), 20)
	r, got := verify(t, dir)
	if got != nil || len(r.Files) != 4 || r.First == 1 {
		t.Errorf("%q: %+v", got, r)
	}
	seen := uint64(0)
	before := uint64(0)
	for {
		page, next, err := audit.List(dir, audit.Filter{Before: before, Limit: 3})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			if seen != 0 && e.Seq != seen-1 {
				t.Fatalf("record %d after %d", e.Seq, seen)
			}
			seen = e.Seq
		}
		if next == 0 {
			break
		}
		before = next
	}
	if seen != r.First {
		t.Errorf("pages end at %d, the log begins at %d", seen, r.First)
	}
	// A file that goes missing is missed, also the oldest.
	if err := os.Remove(filepath.Join(dir, r.Files[0])); err != nil {
		t.Fatal(err)
	}
	if _, got := verify(t, dir); len(got) != 1 || !strings.Contains(got[0], "missing before it") {
		t.Errorf("without the oldest file: %q", got)
	}
}

// Append returns after the sync, and one sync serves many.
func TestAppendWaitsForTheDisk(t *testing.T) {
	dir := t.TempDir()
	var syncs atomic.Int64
	block := make(chan struct{})
	l := open(t, dir, audit.Options{}.WithSync(func(f *os.File) error {
		syncs.Add(1)
		<-block
		return f.Sync()
	}))
	const n = 20
	var wg sync.WaitGroup
	done := make(chan error, n)
	for range n {
		wg.Go(func() {
			_, err := l.Append(audit.Entry{Who: "ops", Act: "purge_lane", Result: audit.Done})
			done <- err
		})
	}
	deadline := time.Now().Add(5 * time.Second)
	for l.Head().Seq < n && time.Now().Before(deadline) {
		select {
		case err := <-done:
			t.Fatalf("answered before the sync: %v", err)
		default:
		}
	}
	close(block)
	wg.Wait()
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if got := syncs.Load(); got > 3 {
		t.Errorf("%d syncs for %d records that waited together", got, n)
	}
	if r, got := verify(t, dir); got != nil || r.Records != n {
		t.Errorf("%d records, %q", r.Records, got)
	}
}

// A record that could not be written is counted in the next one.
func TestFailuresAreCounted(t *testing.T) {
	dir := t.TempDir()
	fail := false
	l := open(t, dir, audit.Options{}.WithSync(func(f *os.File) error {
		if fail {
			return errors.New("no")
		}
		return f.Sync()
	}))
	appendN(t, l, 2)
	fail = true
	for range 3 {
		if _, err := l.Append(audit.Entry{Who: "ops", Act: "purge_lane", Result: audit.Done}); err == nil {
			t.Fatal("no error although the disk refuses")
		}
	}
	fail = false
	appendN(t, l, 1)
	page, _, err := audit.List(dir, audit.Filter{Limit: 1})
	if err != nil || len(page) != 1 || page[0].Missed != 3 {
		t.Errorf("%v %+v", err, page)
	}
	if _, got := verify(t, dir); got != nil {
		t.Errorf("%q", got)
	}
}

func TestListChooses(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, audit.Options{})
	for _, e := range []audit.Entry{
		{Who: "ops", Act: "remove_device", Object: "pump-1", Result: audit.Done},
		{Who: "kim", Act: "purge_lane", Object: "bulk", Result: audit.Refused},
		{Who: "kim", Act: "remove_device", Object: "pump-2", Result: audit.Done, Detail: strings.Repeat("ä", 1000)},
	} {
		if _, err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	for f, want := range map[audit.Filter][]uint64{
		{}:                                   {3, 2, 1},
		{Who: "kim"}:                         {3, 2},
		{Act: "remove_device"}:               {3, 1},
		{Act: "remove_device", Who: "ops"}:   {1},
		{Object: "pump-"}:                    {3, 1},
		{Limit: 2}:                           {3, 2},
		{Before: 3, Limit: 5}:                {2, 1},
		{Since: time.Now().Add(time.Minute)}: nil,
	} {
		page, _, err := audit.List(dir, f)
		var got []uint64
		for _, e := range page {
			got = append(got, e.Seq)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%+v: %v %v, want %v", f, err, got, want)
		}
	}
}

func FuzzLine(f *testing.F) {
	dir := f.TempDir()
	l, err := audit.Open(dir, audit.Options{})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := l.Append(audit.Entry{Who: "ops", Act: "reload", Result: audit.Done}); err != nil {
		f.Fatal(err)
	}
	l.Close()
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`,"hash":"` + strings.Repeat("0", 64) + "\"}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		write(t, dir, b)
		l := open(t, dir, audit.Options{})
		before, err := audit.Verify(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Append(audit.Entry{Who: "ops", Act: "reload", Result: audit.Done}); err != nil {
			t.Fatal(err)
		}
		after, err := audit.Verify(dir)
		if err != nil {
			t.Fatal(err)
		}
		if after.Torn || after.Records != before.Records+1 {
			t.Errorf("%d records before, %d after: %+v", before.Records, after.Records, after)
		}
	})
}
