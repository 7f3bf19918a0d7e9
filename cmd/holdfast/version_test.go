package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

// TestVersionNamesTheCommit: what the linker sets is told, as text and as JSON. Nobody else runs beside it.
func TestVersionNamesTheCommit(t *testing.T) {
	v, c, d := version, commit, date
	defer func() { version, commit, date = v, c, d }()
	version, commit, date = "1.2.3", "0123456789ab", "2026-05-04T03:02:01Z"
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"version"}, &out, &errs); code != 0 || !strings.HasPrefix(out.String(), "holdfast 1.2.3 (commit 0123456789ab of 2026-05-04T03:02:01Z, go1.") {
		t.Errorf("%d %q %q", code, out.String(), errs.String())
	}
	out.Reset()
	var got versionInfo
	if code := run(t.Context(), []string{"version", "--json"}, &out, &errs); code != 0 || json.Unmarshal(out.Bytes(), &got) != nil ||
		got.Version != "1.2.3" || got.Commit != "0123456789ab" || got.Date != "2026-05-04T03:02:01Z" {
		t.Errorf("%d %q %q", code, out.String(), errs.String())
	}
}
