package gateway_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/audit"
)

// acts gives what is in the audit log of dir, the oldest first.
func acts(t *testing.T, dir string) (names []string, records []audit.Entry) {
	t.Helper()
	records, _, err := audit.List(dir, audit.Filter{})
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(records)
	for _, e := range records {
		names = append(names, e.Act)
	}
	return names, records
}

// Whoever removes the end of the audit log, or all of it, while the gateway does not run is found out by the next start: the store
// knows the last record.
func TestAStartMissesTheEndOfTheAuditLog(t *testing.T) {
	for _, all := range []bool{false, true} {
		dir := t.TempDir()
		r := start(t, configuration(t, dir))
		r.end()
		path := filepath.Join(dir, "audit.log")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "\n"); n != 2 {
			t.Fatalf("%d records of a start and a stop:\n%s", n, b)
		}
		kept := b[:strings.IndexByte(string(b), '\n')+1]
		if all {
			kept = nil
		}
		if err := os.WriteFile(path, kept, 0o600); err != nil {
			t.Fatal(err)
		}
		r = start(t, configuration(t, dir))
		r.end()
		names, records := acts(t, dir)
		want := []string{"start", "audit_missing", "start", "stop"}
		if all {
			want = want[1:]
		}
		if !slices.Equal(names, want) {
			t.Errorf("%v, want %v", names, want)
		}
		if seq := records[len(records)-1].Seq; seq != 5 {
			t.Errorf("the last number is %d: some were used twice", seq)
		}
	}
}
