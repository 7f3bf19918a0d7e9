package httpapi_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

// whileExporting asks for an export while n others are under way.
func (r *rig) whileExporting(n int) (a *answered) {
	entered, leave := make(chan struct{}), make(chan struct{})
	r.lanes.entered = func() { entered <- struct{}{}; <-leave }
	ended := make(chan struct{})
	for range n {
		go func() {
			r.ask("GET", "/api/v1/lanes/alarm/export")
			ended <- struct{}{}
		}()
	}
	for range n {
		<-entered
	}
	a = r.ask("GET", "/api/v1/lanes/alarm/export")
	close(leave)
	for range n {
		<-ended
	}
	return a
}

func exported(t *testing.T, b []byte) (ms []httpapi.ExportedMessage, end *httpapi.ExportEnd) {
	t.Helper()
	for line := range bytes.Lines(b) {
		var e struct{ End *httpapi.ExportEnd }
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if end != nil {
			t.Errorf("something follows the end: %s", line)
		}
		if end = e.End; end != nil {
			continue
		}
		var m httpapi.ExportedMessage
		dec := json.NewDecoder(bytes.NewReader(line))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&m); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		ms = append(ms, m)
	}
	return ms, end
}

func TestExportSaysEverythingOfAMessage(t *testing.T) {
	r := newRig(t)
	r.lanes.records = []spool.Record{
		{
			Received: 1_700_000_000_123, Device: []byte("pump"), Topic: []byte("dt/\"x\"\u2028é"), Payload: []byte(`{"a":[1, 2]}`), Flags: spool.FlagQoS2 | spool.FlagRetain | spool.FlagClockUnsynced,
			Props: &spool.Props{ContentType: "application/json", ResponseTopic: "r", Correlation: []byte{1}, User: [][2]string{{"k", "v"}, {"k", "w"}}, Expiry: 60},
		},
		{Device: []byte("pump"), Topic: []byte("t"), Payload: []byte("21.5\n\x7f"), Flags: spool.FlagWill},
		{Device: []byte("pump"), Topic: []byte("t"), Payload: []byte("{\"broken\":\n1}"), Flags: spool.FlagDup},
		{Device: []byte("pump"), Topic: []byte("t")},
		{Device: []byte("other"), Topic: []byte("t"), Payload: []byte("x")},
	}
	r.lanes.damaged = []spool.Damage{{Lane: "alarm", First: 1, Last: 2, Cause: "chunk: damaged"}}
	a := r.ask("GET", "/api/v1/lanes/alarm/export?device=pump", as("operator"))
	ms, end := exported(t, a.body)
	if len(ms) != 4 || end == nil || end.Messages != 4 || len(end.Damaged) != 1 {
		t.Fatalf("%d messages, end %+v", len(ms), end)
	}
	if m := ms[0]; m.Seq != 3 || m.ID != "gw/e1/alarm/3" || m.Topic != "dt/\"x\"\u2028é" || string(m.PayloadJSON) != `{"a":[1, 2]}` || m.QoS != 2 || !m.Retain ||
		m.ClockState != "unsynced" || m.Received.UnixMilli() != 1_700_000_000_123 || m.Expiry != 60 || len(m.UserProperties) != 2 || m.UserProperties[1][1] != "w" ||
		!bytes.Equal(m.Correlation, []byte{1}) {
		t.Errorf("%+v", m)
	}
	if m := ms[1]; m.PayloadBase64 == nil || *m.PayloadBase64 != "MjEuNQp/" || !m.Will {
		t.Errorf("%+v", m)
	}
	if m := ms[2]; m.Payload == nil || *m.Payload != "{\"broken\":\n1}" || !m.Dup {
		t.Errorf("JSON with a line break: %+v", m)
	}
	if m := ms[3]; m.Payload == nil || *m.Payload != "" {
		t.Errorf("empty payload: %+v", m)
	}
	if strings.Contains(string(a.body), "\u2028") {
		t.Error("a line separator stands in a line")
	}

	ms, end = exported(t, r.ask("GET", "/api/v1/lanes/alarm/export?from=4&to=5").body)
	if len(ms) != 2 || ms[0].Seq != 4 || end.Messages != 2 {
		t.Errorf("from 4 to 5: %+v", ms)
	}
	withParked(r)
	ms, end = exported(t, r.ask("GET", "/api/v1/lanes/alarm/export?parked=true&from=4&to=5").body)
	if len(ms) != 1 || ms[0].Seq != 5 || ms[0].ParkedBy != "cloud" || ms[0].Reason != "topic is not allowed" || !ms[0].ParkedAt.Equal(then) || len(end.Damaged) != 0 {
		t.Errorf("parked: %+v", ms)
	}
	if got := r.ask("GET", "/api/v1/lanes/alarm/export", as("viewer")); got.code() != "forbidden" {
		t.Errorf("a viewer gets %d %s", got.status, got.code())
	}
	for _, q := range []string{"from=x", "since=yesterday", "parked=1", "bytes_per_second=-1", "to=9223372036854775808"} {
		if got := r.ask("GET", "/api/v1/lanes/alarm/export?"+q); got.code() != "bad_query" {
			t.Errorf("%s: %d %s", q, got.status, got.code())
		}
	}
	if !strings.Contains(r.log.String(), "handed out through the api") || !strings.Contains(r.log.String(), "what=export_lane") {
		t.Error("the log does not tell of the export")
	}
}

// TestAnAnswerThatIsNotWholeIsCutOff: the caller of a broken export or backup sees that it is broken.
func TestAnAnswerThatIsNotWholeIsCutOff(t *testing.T) {
	r := newRig(t)
	r.lanes.records = []spool.Record{{Device: []byte("pump"), Topic: []byte("t"), Payload: []byte("x")}}
	r.lanes.err = errors.New("disk is gone")
	r.backups.broken = true
	address, _ := r.listen()
	for _, c := range []struct{ method, path string }{{"GET", "/api/v1/lanes/alarm/export"}, {"POST", "/api/v1/backup"}} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+address+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer admin")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Logf("%s: %v", c.path, err) // nothing was out yet: as good
			continue
		}
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("%s: the answer ends as if it were whole", c.path)
		}
	}
	if len(r.backups.closed) != 1 || r.backups.closed[0] {
		t.Errorf("the backup was closed %v", r.backups.closed)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestBackupIsATarOfTheFolder(t *testing.T) {
	r := newRig(t)
	a := r.ask("POST", "/api/v1/backup")
	var names []string
	for tr := tar.NewReader(bytes.NewReader(a.body)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if diff := cmp.Diff([]string{"backup.json", "store/000001.log"}, names); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(r.backups.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the working copy stays: %v", err)
	}
	var kept httpapi.BackupKept
	r.into(&kept, http.StatusCreated, "POST", "/api/v1/backup", body(`{"keep":true}`))
	if kept.ID != "b1" || kept.Path != r.backups.dir || !r.backups.closed[1] {
		t.Errorf("%+v", kept)
	}
	if got := r.ask("POST", "/api/v1/backup", as("operator")); got.code() != "forbidden" {
		t.Errorf("an operator gets %d %s", got.status, got.code())
	}
	if got := r.ask("POST", "/api/v1/backup", body(`{"bytes_per_second":-1}`)); got.code() != "bad_body" {
		t.Errorf("negative rate: %d %s", got.status, got.code())
	}
}

// TestBulkKeepsItsRate: 3 MiB at 16 MiB a second take their time, however fast the reader is.
func TestBulkKeepsItsRate(t *testing.T) {
	r := newRig(t)
	for range 24 {
		r.lanes.records = append(r.lanes.records, spool.Record{Device: []byte("pump"), Topic: []byte("t"), Payload: bytes.Repeat([]byte("x"), 128<<10)})
	}
	begin := time.Now()
	_, end := exported(t, r.ask("GET", "/api/v1/lanes/alarm/export?bytes_per_second=16777216").body)
	if took := time.Since(begin); end.Messages != 24 || took < 150*time.Millisecond {
		t.Errorf("%d messages in %v", end.Messages, took)
	}
}
