package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/devices"
	"holdfast/internal/pki"
	"holdfast/internal/testkit"
)

func sameText(t *testing.T, what, got, want string) {
	t.Helper()
	if diff := cmp.Diff(strings.TrimLeft(want, "\n"), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestADeviceIsAddedAndItsTokenShownOnce(t *testing.T) {
	f := newFakeGateway(t)
	got := f.ask(t, "device", "add", "pump-7", "--name", "Pump 7", "--label", "hall=3", "--label", "line=a=b", "--role", "pump")
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("exit %d, %s", got.code, got.stderr)
	}
	sameText(t, "stdout", got.stdout, `
device pump-7 is registered, role pump

token   secret-of-pump-7

It is shown this once. The device gives it as its MQTT password:
  mosquitto_pub -h GATEWAY -i pump-7 -u pump-7 -P 'secret-of-pump-7' -q 1 -t dt/demo/pump-7/temp -m 21.5
`)
	d := f.devices["pump-7"]
	if d.Name != "Pump 7" || d.Labels["hall"] != "3" || d.Labels["line"] != "a=b" || !d.Enabled {
		t.Errorf("registered %+v", d)
	}
	got = f.ask(t, "device", "add", "pump-7")
	if got.code != 1 || !strings.Contains(got.stderr, "exists already: look at it with holdfast device show pump-7, or give it a new token with holdfast device rotate pump-7") {
		t.Errorf("again: exit %d, %s", got.code, got.stderr)
	}
	got = f.ask(t, "device", "add", "j", "--json", "--disabled")
	var made struct {
		Device devices.Device
		Secret string
	}
	if err := json.Unmarshal([]byte(got.stdout), &made); err != nil || made.Secret != "secret-of-j" || made.Device.Enabled {
		t.Errorf("%s: %+v, %v", got.stdout, made, err)
	}
}

func TestWhatADeviceShowsInsteadOfAToken(t *testing.T) {
	f := newFakeGateway(t)
	dir := t.TempDir()
	a := pki.At(filepath.Join(dir, "pki"), nil)
	if err := a.Init(pki.InitOptions{Site: "s"}); err != nil {
		t.Fatal(err)
	}
	e, err := a.Device("cert", 1, false)
	if err != nil {
		t.Fatal(err)
	}
	cert, key := a.DeviceFiles("cert")
	password := filepath.Join(dir, "pw")
	two := filepath.Join(dir, "two")
	if err := errors.Join(os.WriteFile(password, []byte("correct horse battery\n"), 0o600), os.WriteFile(two, []byte("a\nb\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"cert", "--certificate", cert}, {"pw", "--password-file", password}, {"none", "--no-credential"}} {
		got := f.ask(t, append([]string{"device", "add"}, args...)...)
		if got.code != 0 || strings.Contains(got.stdout, "secret") {
			t.Errorf("%v: exit %d, %s%s", args, got.code, got.stdout, got.stderr)
		}
	}
	if c := f.devices["cert"].Credentials; len(c) != 1 || c[0].Kind != "certificate" || c[0].Fingerprint != e.Fingerprint {
		t.Errorf("certificate: %+v, want fingerprint %s", c, e.Fingerprint)
	}
	if c := f.devices["pw"].Credentials; len(c) != 1 || c[0].Kind != "password" {
		t.Errorf("password: %+v", c)
	}
	if c := f.devices["none"].Credentials; len(c) != 0 {
		t.Errorf("none: %+v", c)
	}
	for _, tc := range []struct {
		code int
		want string
		args []string
	}{
		{2, "exclude each other", []string{"--no-credential", "--password-file", password}},
		{1, "only line", []string{"--password-file", two}},
		{1, "holds no certificate", []string{"--certificate", key}},
		{1, "no such file", []string{"--certificate", filepath.Join(dir, "nowhere")}},
		{2, "is not KEY=VALUE", []string{"--label", "x"}},
	} {
		if got := f.ask(t, append([]string{"device", "add", "x"}, tc.args...)...); got.code != tc.code || !strings.Contains(got.stderr, tc.want) {
			t.Errorf("%v: exit %d, %s", tc.args, got.code, got.stderr)
		}
	}
	if f.devices["x"] != nil {
		t.Error("registered all the same")
	}
}

func TestTheListOfDevices(t *testing.T) {
	f := newFakeGateway(t)
	if got := f.ask(t, "device", "list"); got.code != 0 || got.stdout != "no device (holdfast device add registers one)\n" {
		t.Errorf("empty: %+v", got)
	}
	f.addDevice("a", func(d *devices.Device) {
		connected(d)
		d.Name = "Pump"
		d.Credentials = []devices.Credential{{Kind: "token"}, {Kind: "certificate"}, {Kind: "token"}, {Kind: "password", Expires: fakeBegin}}
	})
	f.addDevice("b", func(d *devices.Device) {
		d.Presence = devices.Presence{LastSeen: time.Now().Add(-3*time.Hour - time.Minute), Address: "10.0.0.8:1"}
	})
	f.addDevice("c", func(d *devices.Device) { d.Enabled = false })
	f.addDevice("d", func(d *devices.Device) { d.Anonymous, d.Role = true, "anonymous" })
	got := f.ask(t, "device", "list")
	sameText(t, "list", got.stdout, `
ID  NAME  ROLE       STATE      LAST SEEN  ADDRESS         CREDENTIALS
a   Pump  device     connected  now        10.0.0.7:50001  certificate, 2 tokens
b   -     device     offline    3h ago     10.0.0.8:1      none
c   -     device     disabled   never      -               none
d   -     anonymous  offline    never      -               anonymous
`)
	ids := func(args ...string) (ids []string) {
		t.Helper()
		got := f.ask(t, append([]string{"device", "list", "--json"}, args...)...)
		if got.code != 0 {
			t.Fatalf("%v: %s", args, got.stderr)
		}
		for line := range strings.Lines(got.stdout) {
			var d devices.Device
			if err := json.Unmarshal([]byte(line), &d); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, d.ID)
		}
		return ids
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{nil, "abcd"},
		{[]string{"--connected"}, "a"},
		{[]string{"--offline"}, "bcd"},
		{[]string{"--disabled"}, "c"},
		{[]string{"--role", "anonymous"}, "d"},
		{[]string{"--search", "Pump"}, "a"},
		{[]string{"--limit", "2"}, "ab"},
	} {
		if got := strings.Join(ids(tc.args...), ""); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.args, got, tc.want)
		}
	}
	if got := f.ask(t, "device", "list", "--limit", "2"); !strings.Contains(got.stderr, "there are more than 2") {
		t.Errorf("limit: %s", got.stderr)
	}
	if got := f.ask(t, "device", "list", "--connected", "--offline"); got.code != 2 {
		t.Errorf("both: %+v", got)
	}
	// More than a page.
	for i := range pageSize + 3 {
		f.addDevice(fmt.Sprintf("x%04d", i), nil)
	}
	if n := len(ids()); n != pageSize+7 {
		t.Errorf("%d devices, want %d", n, pageSize+7)
	}
}

func TestADeviceIsShownSwitchedRotatedRemoved(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("a", func(d *devices.Device) {
		connected(d)
		d.Presence.Since = time.Now().Add(-2*time.Minute - time.Second)
		d.Presence.TLS = true
		d.Labels = map[string]string{"hall": "3"}
		d.Credentials = []devices.Credential{{ID: "c1", Kind: "token", Created: fakeBegin}}
	})
	at := clockText(fakeBegin)
	sameText(t, "show", f.ask(t, "device", "show", "a").stdout, `
device      a
label       hall=3
role        device
state       connected
registered  `+at+`
presence    connected for 2m from 10.0.0.7:50001, MQTT 5, listener lan, TLS

CREDENTIAL  KIND   MADE                 EXPIRES  FINGERPRINT
c1          token  `+at+`  never
`)
	if got := f.ask(t, "device", "disable", "a"); got.code != 0 || f.devices["a"].Enabled || !strings.Contains(got.stdout, "device a is disabled") {
		t.Errorf("disable: %+v", got)
	}
	if got := f.ask(t, "device", "enable", "a"); got.code != 0 || !f.devices["a"].Enabled {
		t.Errorf("enable: %+v", got)
	}
	got := f.ask(t, "device", "rotate", "a", "--overlap", "2d", "--lifetime", "30d")
	if got.code != 0 || !strings.Contains(got.stdout, "token   new-secret-of-a") || !strings.Contains(got.stdout, "Its other credentials expire on ") {
		t.Errorf("rotate: %+v", got)
	}
	if got := f.ask(t, "device", "rotate", "a", "--overlap", "0"); !strings.Contains(got.stdout, "worth nothing any more") {
		t.Errorf("rotate at once: %+v", got)
	}
	if got := f.ask(t, "device", "rotate", "a", "--overlap", "2x"); got.code != 2 || !strings.Contains(got.stderr, "write a duration with its unit") {
		t.Errorf("rotate: %+v", got)
	}
	if got := f.ask(t, "device", "remove", "a", "--json"); got.code != 0 || f.devices["a"] != nil || !strings.Contains(got.stdout, `"removed": "a"`) {
		t.Errorf("remove: %+v", got)
	}
	for _, cmd := range []string{"show", "enable", "disable", "remove", "rotate"} {
		if got := f.ask(t, "device", cmd, "a"); got.code != 1 || !strings.Contains(got.stderr, "holdfast device list shows them all") {
			t.Errorf("%s of nobody: %+v", cmd, got)
		}
	}
	if got := f.ask(t, "device", "show", "a/b"); got.code != 1 || f.called("GET /api/v1/devices/a%2Fb") != 1 {
		t.Errorf("an id with a slash: %+v", got)
	}
}

func TestTokens(t *testing.T) {
	f := newFakeGateway(t)
	got := f.ask(t, "token", "add", "grafana", "--role", "viewer")
	if got.code != 0 || !strings.Contains(got.stdout, "token grafana is valid, role viewer, expires never\n\nsecret-of-grafana\n") {
		t.Errorf("add: %+v", got)
	}
	if got := f.ask(t, "token", "add", "x"); got.code != 2 || !strings.Contains(got.stderr, "--role is missing") {
		t.Errorf("without role: %+v", got)
	}
	if got := f.ask(t, "token", "add", "x", "--role", "king"); got.code != 2 || !strings.Contains(got.stderr, "viewer, operator or admin") {
		t.Errorf("wrong role: %+v", got)
	}
	sameText(t, "list", f.ask(t, "token", "list").stdout, `
NAME     ROLE    MADE                 EXPIRES
grafana  viewer  `+clockText(fakeBegin)+`  never
`)
	if got := f.ask(t, "token", "remove", "grafana"); got.code != 0 || len(f.tokens) != 0 {
		t.Errorf("remove: %+v", got)
	}
	if got := f.ask(t, "token", "remove", "grafana"); got.code != 1 || !strings.Contains(got.stderr, "holdfast token list shows them all") {
		t.Errorf("remove again: %+v", got)
	}
}

func importFile(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func sortedLines(s string) []string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	slices.Sort(lines)
	return lines
}

func TestImportReportsEachBadLineAndGoesOn(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("there", nil)
	file := importFile(t, "d.csv", "\ufeffID,name,labels,role,enabled,password,fingerprint\n"+
		"a,\"Pump, big\",hall=3; line=b,pump,false,,\n"+ // 2
		"b\n"+ // 3
		"c,,hall,,,,\n"+ // 4
		"a,,,,,,\n"+ // 5
		"bad id,,,,,,\n"+ // 6
		",,,,,,\n"+ // 7
		"there,,,,,,\n"+ // 8
		"d,,,,maybe,,\n"+ // 9
		"e,,,,,correct horse battery,\n"+ // 10
		"f,,,,,correct horse battery,aa:bb\n"+ // 11
		"g,\"a\"b,,,,,\n"+ // 12
		"\"h\",\"two\nlines\",,,,,\n"+ // 13, 14
		"i,,,,,,"+strings.Repeat("ab", 32)+"\n") // 15
	secrets := filepath.Join(t.TempDir(), "secrets.csv")
	got := f.ask(t, "device", "import", file, "--secrets", secrets)
	if got.code != 1 || got.stdout != "" {
		t.Errorf("exit %d, stdout %q", got.code, got.stdout)
	}
	errs := strings.ReplaceAll(got.stderr, file, "d.csv")
	errs = regexp.MustCompile(` in [0-9.µm]+s\n`).ReplaceAllString(errs, "\n")
	want := []string{
		`d.csv: 4 registered, 0 updated, 0 skipped, 9 failed`,
		`d.csv:11: f: has a password and a fingerprint: give one of them`,
		`d.csv:12: is not CSV: extraneous or missing " in quoted-field`,
		`d.csv:3: has 1 fields, the first line names 7`,
		`d.csv:4: c: labels: "hall" is not key=value; several are separated by ;`,
		`d.csv:5: a: is on line 2 already`,
		`d.csv:6: bad id: not a device id: "bad id"`,
		`d.csv:7: has no id`,
		`d.csv:8: there: device "there": device exists already`,
		`d.csv:9: d: enabled: "maybe" is neither true nor false`,
	}
	if diff := cmp.Diff(want, sortedLines(errs)); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
	fi, err := os.Stat(secrets)
	b, _ := os.ReadFile(secrets)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("secrets: %v, %v", fi, err)
	}
	if diff := cmp.Diff([]string{"a,secret-of-a", "h,secret-of-h", "id,secret"}, sortedLines(string(b))); diff != "" {
		t.Errorf("secrets (-want +got):\n%s", diff)
	}
	a := f.devices["a"]
	if a == nil || a.Name != "Pump, big" || a.Role != "pump" || a.Enabled || a.Labels["hall"] != "3" || a.Labels["line"] != "b" {
		t.Errorf("a = %+v", a)
	}
	if e, i := f.devices["e"], f.devices["i"]; e.Credentials[0].Kind != "password" || i.Credentials[0].Kind != "certificate" || f.devices["h"].Name != "two\nlines" {
		t.Errorf("e = %+v, i = %+v", e, i)
	}

	// What is there is not written over, and the rest is not begun then.
	calls := f.called("")
	if got := f.ask(t, "device", "import", file, "--secrets", secrets); got.code != 2 || !strings.Contains(got.stderr, "exists already, and may hold the only copy") || f.called("") != calls {
		t.Errorf("secrets again: %+v", got)
	}
}

func TestImportOfJSONLinesAndDevicesThatAreThere(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("old", func(d *devices.Device) { d.Name = "before" })
	text := `{"id":"new","name":"n","labels":{"a":"b"}}

{"id":"old","name":"after"}
{"id":"x","nam":"y"}
{"id":"y"} {"id":"z"}
nonsense
`
	file := importFile(t, "d.jsonl", text)
	for _, tc := range []struct {
		existing, summary, name string
		code                    int
	}{
		{"fail", "1 registered, 0 updated, 0 skipped, 4 failed", "before", 1},
		{"skip", "0 registered, 0 updated, 2 skipped, 3 failed", "before", 1},
		{"update", "0 registered, 2 updated, 0 skipped, 3 failed", "after", 1},
	} {
		got := f.ask(t, "device", "import", file, "--existing", tc.existing)
		if got.code != tc.code || !strings.Contains(got.stderr, tc.summary) || f.devices["old"].Name != tc.name {
			t.Errorf("%s: exit %d, %s; name %s", tc.existing, got.code, got.stderr, f.devices["old"].Name)
		}
		for _, want := range []string{`:4: x: is not a device in JSON: unknown field "nam"`, ":5: y: has something after the device", ":6: is not a device in JSON: invalid character"} {
			if !strings.Contains(got.stderr, want) {
				t.Errorf("%s: no %s in\n%s", tc.existing, want, got.stderr)
			}
		}
		if tc.existing == "fail" && got.stdout != "id,secret\nnew,secret-of-new\n" {
			t.Errorf("stdout %q", got.stdout)
		}
	}
	got := f.ask(t, "device", "import", importFile(t, "x", `{"id":"j"}`), "--format", "jsonl", "--json")
	if got.code != 0 || got.stdout != `{"line":1,"id":"j","result":"registered","secret":"secret-of-j"}`+"\n" {
		t.Errorf("json: %+v", got)
	}
}

func TestImportOfFilesThatAreNone(t *testing.T) {
	f := newFakeGateway(t)
	for _, tc := range []struct {
		name, text, want string
		code             int
		args             []string
	}{
		{"d.csv", "", "has no line that names the columns", 1, nil},
		{"d.csv", "name\nx\n", "the column id is missing", 1, nil},
		{"d.csv", "id,colour\nx,red\n", `there is no column "colour", but id, name`, 1, nil},
		{"d.csv", "id,id\nx,y\n", "column id is there twice", 1, nil},
		{"d.txt", "id\n", "say --format csv or --format jsonl", 2, nil},
		{"d.csv", "id\n", "--existing is skip, fail or update", 2, []string{"--existing", "x"}},
		{"d.csv", "id\n", "--format is csv or jsonl", 2, []string{"--format", "xml"}},
	} {
		got := f.ask(t, append([]string{"device", "import", importFile(t, tc.name, tc.text)}, tc.args...)...)
		if got.code != tc.code || !strings.Contains(got.stderr, tc.want) {
			t.Errorf("%q: %+v", tc.text, got)
		}
	}
	if f.called("") != 0 {
		t.Error("something was asked")
	}
}

// A gateway that goes away, or does not let us, is no reason to blame a hundred thousand lines.
func TestImportStopsWhenNothingCanSucceed(t *testing.T) {
	f := newFakeGateway(t)
	var text strings.Builder
	text.WriteString("id\n")
	for i := range 5000 {
		fmt.Fprintf(&text, "d%d\n", i)
	}
	file := importFile(t, "d.csv", text.String())
	f.spoil = func(w http.ResponseWriter, _ *http.Request) bool {
		fakeFail(w, http.StatusForbidden, "forbidden", "this needs the role admin")
		return true
	}
	got := f.ask(t, "device", "import", file)
	if got.code != 1 || f.called("POST") > 3*importWorkers || !strings.Contains(got.stderr, "this needs the role admin") ||
		!strings.Contains(got.stderr, "the rest of the file was not tried: run the same again with --existing skip") {
		t.Errorf("%d calls, %+v", f.called("POST"), got)
	}
	f = newFakeGateway(t)
	if got := f.ask(t, "device", "import", file, "--secrets", filepath.Join(t.TempDir(), "s")); got.code != 0 || len(f.devices) != 5000 {
		t.Errorf("all of it: exit %d, %d devices, %s", got.code, len(f.devices), got.stderr)
	}
}

func TestTheProgressBarFitsTheTerminal(t *testing.T) {
	var out testkit.Buffer
	now := fakeBegin
	p := newProgress(&out)
	p.tty, p.now, p.total, p.began = true, func() time.Time { return now }, 1000, fakeBegin
	p.done = func() int64 { return 250 }
	for range 49 {
		p.count(false)
	}
	p.count(true)
	now = now.Add(10 * time.Second)
	for width, want := range map[int]string{
		120: "[##########..............................]  25 %  49 done, 1 failed, 5/s, 30s left",
		60:  "[##...........]  25 %  49 done, 1 failed, 5/s, 30s left",
		50:  " 25 %  49 done, 1 failed, 5/s, 30s left",
		10:  " 25 %  49",
	} {
		p.width = func() int { return width }
		before := len(out.String())
		p.draw()
		got := strings.TrimSuffix(strings.TrimPrefix(out.String()[before:], "\r"), "\x1b[K")
		if len(got) >= width || width != 60 && got != want {
			t.Errorf("width %d: %q (%d), want %q", width, got, len(got), want)
		}
		if width == 60 && !strings.HasSuffix(got, "]  25 %  49 done, 1 failed, 5/s, 30s left") {
			t.Errorf("width 60: %q", got)
		}
	}
	// A line of text takes the bar away first; without a terminal there is none.
	before := len(out.String())
	p.say("line %d", 3)
	if got := out.String()[before:]; got != "\r\x1b[Kline 3\n" {
		t.Errorf("say: %q", got)
	}
	p.tty, p.total = false, 0
	before = len(out.String())
	p.draw()
	p.say("x")
	if got := out.String()[before:]; got != "49 done, 1 failed, 5/s\nx\n" {
		t.Errorf("plain: %q", got)
	}
}
