package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/spool"
)

func withLanes(f *fakeGateway) {
	f.lanes = []spool.LaneStat{
		{Name: "system"},
		{
			Name: "telemetry", Accepted: spool.Count{Messages: 1000, Bytes: 100_000}, Kept: spool.Count{Messages: 400, Bytes: 40_000}, // 601 to 1000
			Parked: spool.Count{Messages: 7, Bytes: 2048},
		},
	}
}

// TestPurgeSaysWhatWillGo: before it asks, by looking at few messages.
func TestPurgeSaysWhatWillGo(t *testing.T) {
	at := func(seq int) string { return fakeBegin.Add(time.Duration(seq) * time.Second).Format(time.RFC3339) }
	for _, c := range []struct {
		args []string
		says string
		asks purging
	}{
		{[]string{"--all"}, "lane telemetry: 400 messages of 400 will go, 39.1 KiB; sequences 601 to 1000, received " + at(601) + " to " + at(1000), purging{All: true}},
		{[]string{"--up-to", "650"}, "lane telemetry: 50 messages of 400 will go, about 4.9 KiB; sequences 601 to 650, received " + at(601) + " to " + at(650), purging{UpTo: 650}},
		{[]string{"--older-than", at(701)}, "lane telemetry: 100 messages of 400 will go, about 9.8 KiB; sequences 601 to 700", purging{OlderThan: at(701)}},
		{[]string{"--older-than", at(701), "--up-to", "602"}, "2 messages of 400 will go", purging{OlderThan: at(701), UpTo: 602}},
		{[]string{"--older-than", at(100_000)}, "400 messages of 400 will go, 39.1 KiB", purging{OlderThan: at(100_000)}},
		{[]string{"--older-than", at(601)}, "has nothing of that: it keeps 400 messages", purging{}},
		{[]string{"--up-to", "600"}, "has nothing of that", purging{}},
		{[]string{"--parked"}, "lane telemetry: 7 messages parked, 2.0 KiB; all will go", purging{Parked: true}},
		{[]string{"--parked", "--upstream", "cloud"}, "7 messages parked, 2.0 KiB; those that cloud refused will go", purging{Parked: true, Upstream: "cloud"}},
	} {
		f := newFakeGateway(t)
		withLanes(f)
		got := f.ask(t, append([]string{"spool", "purge", "telemetry", "--yes"}, c.args...)...)
		if got.code != 0 || !strings.Contains(got.stderr, c.says) {
			t.Errorf("%v: %+v", c.args, got)
		}
		if diff := cmp.Diff(c.asks, f.purged); diff != "" {
			t.Errorf("%v: %s", c.args, diff)
		}
		if c.asks != (purging{}) != strings.Contains(got.stdout, "removed from telemetry: 3 messages, 300 B") {
			t.Errorf("%v: %q", c.args, got.stdout)
		}
		if n := f.called("GET /api/v1/lanes/telemetry/messages"); n > 15 {
			t.Errorf("%v: %d looks", c.args, n)
		}
	}
}

func TestPurgeDoesNothingUnasked(t *testing.T) {
	f := newFakeGateway(t)
	withLanes(f)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"telemetry", "--all"}, "say --yes if that is meant"}, // stdin is no terminal here
		{[]string{"telemetry", "--yes"}, "say which messages are to go"},
		{[]string{"telemetry", "--yes", "--all", "--up-to", "3"}, "say which messages are to go"},
		{[]string{"telemetry", "--yes", "--parked", "--all"}, "--parked goes with --upstream and nothing else"},
		{[]string{"telemetry", "--yes", "--all", "--upstream", "cloud"}, "--upstream goes with --parked"},
		{[]string{"telemetry", "--yes", "--up-to", "0"}, "before the first message"},
		{[]string{"telemetry", "--yes", "--older-than", "soon"}, "neither a time"},
		{[]string{"telemetri", "--yes", "--all"}, `there is no lane "telemetri" here; there are system, telemetry`},
		{[]string{"--yes", "--all"}, "something is missing"},
	} {
		if got := f.ask(t, append([]string{"spool", "purge"}, c.args...)...); got.code != exitUsage || !strings.Contains(got.stderr, c.says) {
			t.Errorf("%v: %+v", c.args, got)
		}
	}
	if f.called("POST") > 0 {
		t.Error("something was purged")
	}
	got := f.ask(t, "spool", "purge", "telemetry", "--all", "--yes", "--json")
	var done purged
	if err := json.Unmarshal([]byte(got.stdout), &done); err != nil || done.Purged.Messages != 3 {
		t.Errorf("%+v, %v", got, err)
	}
}

func withParked(f *fakeGateway) {
	withLanes(f)
	for i, up := range []string{"cloud", "lab", "cloud", "lab", "cloud"} {
		f.parked = append(f.parked, parkedRow{
			Lane: "telemetry", Upstream: up, ParkedAt: fakeBegin, Reason: "it is\ntoo large", Seq: uint64(i/2 + 3), Device: "pump", Topic: "dt/x", Size: 2048,
		})
	}
	f.parked = append(f.parked, parkedRow{Lane: "bulk", Upstream: "cloud", Seq: 9})
}

func TestParkedAreListed(t *testing.T) {
	f := newFakeGateway(t)
	got := f.ask(t, "spool", "parked")
	if got.code != 0 || got.stdout != "nothing is parked\n" {
		t.Errorf("%+v", got)
	}
	withParked(f)
	got = f.ask(t, "spool", "parked")
	if got.code != 0 || strings.Count(got.stdout, "\n") != 7 || !strings.Contains(got.stdout, "2.0 KiB") || strings.Contains(got.stdout, "it is\ntoo") {
		t.Errorf("%+v", got)
	}
	got = f.ask(t, "spool", "parked", "--upstream", "cloud", "--lane", "telemetry", "--limit", "2", "--json")
	if got.code != 0 || strings.Count(got.stdout, "\n") != 2 || !strings.Contains(got.stderr, "there are more") {
		t.Errorf("%+v", got)
	}
}

func TestReplayAsksForWhatWasChosen(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
		asks []replaying
	}{
		{[]string{"--all", "--upstream", "cloud"}, 0, "1 message of lane bulk on their way to cloud again\n1 message of lane telemetry on their way to cloud again\n", []replaying{
			{Lane: "bulk", Upstream: "cloud"}, {Lane: "telemetry", Upstream: "cloud"},
		}},
		{[]string{"--all", "--lane", "telemetry", "--upstream", "lab"}, 1, "some stay parked: message 4: not a record", []replaying{{Lane: "telemetry", Upstream: "lab"}}},
		{[]string{"--seq", "3,4", "--seq", "5", "--lane", "telemetry", "--upstream", "cloud"}, 0, "", []replaying{{Lane: "telemetry", Upstream: "cloud", Seqs: []uint64{3, 4, 5}}}},
		{[]string{"--seq", "3", "--lane", "telemetry"}, 2, "choose with --upstream", nil},
		{[]string{"--seq", "77", "--lane", "telemetry"}, 1, "no message with such a sequence", nil},
		{[]string{"--seq", "3"}, 2, "name it with --lane", nil},
		{[]string{"--seq", "x", "--lane", "telemetry"}, 2, "write sequences as 17", nil},
		{nil, 2, "say which", nil},
		{[]string{"--all", "--seq", "3"}, 2, "say which", nil},
		{[]string{"--all", "--lane", "alarm"}, 0, "nothing is parked\n", nil},
	} {
		f := newFakeGateway(t)
		withParked(f)
		got := f.ask(t, append([]string{"spool", "replay"}, c.args...)...)
		if got.code != c.code || !strings.Contains(got.stdout+got.stderr, c.says) {
			t.Errorf("%v: %+v", c.args, got)
		}
		if diff := cmp.Diff(c.asks, f.replayed); diff != "" {
			t.Errorf("%v: %s", c.args, diff)
		}
	}
}

func TestLanesAreCompleted(t *testing.T) {
	f := newFakeGateway(t)
	withLanes(f)
	for _, words := range [][]string{{"spool", "purge"}, {"spool", "export", "--lane"}} {
		line := append(words, "--address", f.address(), "--token-file", f.tokenFile(t), "tel")
		if words[1] == "export" {
			line = []string{"spool", "export", "--address", f.address(), "--token-file", f.tokenFile(t), "--lane", "tel"}
		}
		if got := complete(t.Context(), line); len(got) != 1 || got[0] != "telemetry\t400 messages" {
			t.Errorf("%v: %q", words, got)
		}
	}
}
