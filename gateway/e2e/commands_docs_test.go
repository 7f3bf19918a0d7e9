package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/internal/testkit"
)

// example takes the n-th fenced code of a language, from 0, out of a section of docs/commands.md.
func example(t *testing.T, section, language string, n int) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "\n"+section+"\n")
	if !ok {
		t.Fatalf("docs/commands.md has no section %q", section)
	}
	rest, _, _ = strings.Cut(rest, "\n#")
	for ; n >= 0; n-- {
		if _, rest, ok = strings.Cut(rest, "\n```"+language+"\n"); !ok {
			t.Fatalf("section %q of docs/commands.md has too little %s", section, language)
		}
	}
	code, _, _ := strings.Cut(rest, "\n```\n")
	return code + "\n"
}

// documented is a mosquitto, a gateway that takes commands from it, and the names that the page lets its reader fill in.
type documented struct {
	t     *testing.T
	dir   string
	cloud *testkit.Mosquitto
	gw    *testkit.Gateway
	bin   string // a folder with holdfast in it
}

func startDocumented(t *testing.T) *documented {
	path := bin(t)
	for _, tool := range []string{"mosquitto_sub", "mosquitto_pub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed (Debian: mosquitto-clients; .ci/run installs it)", tool)
		}
	}
	d := &documented{t: t, dir: t.TempDir(), cloud: testkit.StartMosquitto(t), bin: t.TempDir()}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, filepath.Join(d.bin, "holdfast")); err != nil {
		t.Fatal(err)
	}
	d.gw = testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q, commands: true }\n", d.cloud.URL()))
	return d
}

// setup stands for the block that the reader fills in, and names the same variables.
func (d *documented) setup(device string) string {
	d.t.Helper()
	values := map[string]string{"gateway": gatewayID, "device": device, "device_login": ""}
	for name, addr := range map[string]string{"cloud": d.cloud.Addr, "gateway": d.gw.Addr} {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			d.t.Fatal(err)
		}
		values[name+"_host"], values[name+"_port"] = host, port
	}
	lines := "set -u\nexport PATH=" + d.bin + ":$PATH\n"
	documented := example(d.t, "## Examples", "sh", 0)
	for name, value := range values {
		if !strings.Contains(" "+strings.ReplaceAll(documented, "\n", " "), " "+name+"=") {
			d.t.Errorf("docs/commands.md does not say to fill in %s", name)
		}
		lines += fmt.Sprintf("%s='%s'\n", name, value)
	}
	return lines
}

// start runs a command in a process group of its own until the test ends, or stop is called.
func (d *documented) start(name string, args ...string) (stop func()) {
	d.t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			_ = cmd.Wait()
			d.t.Logf("%s said:\n%s", name, &out)
		}
	}
	d.t.Cleanup(stop)
	return stop
}

// do runs a command to its end.
func (d *documented) do(name string, args ...string) (stdout string, err error) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, &out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	d.t.Logf("%s: %v\n%s%s", name, err, &out, &errs)
	return out.String(), err
}

// file writes an example where it can be run.
func (d *documented) file(name, code string) string {
	d.t.Helper()
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, []byte(code), 0o600); err != nil {
		d.t.Fatal(err)
	}
	return path
}

// python is the distribution's, where its packages are.
func python(t *testing.T) string {
	t.Helper()
	const path = "/usr/bin/python3"
	if err := exec.CommandContext(t.Context(), path, "-c", "import paho.mqtt.client").Run(); err != nil {
		t.Skipf("%s has no paho.mqtt (Debian: python3-paho-mqtt; .ci/run installs it): %v", path, err)
	}
	return path
}

// ordered fails t if text does not hold all parts, one behind the other.
func ordered(t *testing.T, text string, parts ...string) {
	t.Helper()
	rest := text
	for _, p := range parts {
		var ok bool
		if _, rest, ok = strings.Cut(rest, p); !ok {
			t.Fatalf("%q does not come, or not in order, in:\n%s", p, text)
		}
	}
}

func TestDocumentedCommandsInAShell(t *testing.T) {
	t.Parallel()
	d := startDocumented(t)
	setup := d.setup("bed-07")
	d.start("bash", "-c", setup+example(t, "### A device in a shell", "sh", 0))
	cloud := setup + example(t, "### The cloud in a shell", "sh", 0)
	// The device is not registered: it comes by itself, and until it has, commands for it are refused.
	var out string
	testkit.EventuallyNil(t, 60*time.Second, "the device is known", func() error {
		var err error
		if out, err = d.do("bash", "-c", cloud); err == nil && strings.Contains(out, `"unknown_device"`) {
			err = fmt.Errorf("refused: %s", out)
		}
		return err
	})
	ordered(t, out, `"state":"QUEUED"`, `"state":"SENT"`, `"state":"DELIVERED"`, `"state":"SUCCEEDED"`, `"final":true`, `"result":"hello"`)
	// A second one, to the same device; and the events have the fields that the page shows.
	out, err := d.do("bash", "-c", strings.Replace(cloud, `\"echo\"`, `\"dance\"`, 1))
	if err != nil {
		t.Fatal(err)
	}
	ordered(t, out, `"state":"QUEUED"`, `"state":"REJECTED"`, `"final":true`, `it can echo and nothing else`)
	// What has ended cannot be called off.
	cancel := cloud + `mosquitto_sub -h "$cloud_host" -p "$cloud_port" -q 1 -C 1 -W 30 -t "gw/$gateway/evt/cmd/$device/$id/REFUSED" &
refused=$!
sleep 1
` + example(t, "### The cloud in a shell", "sh", 1) + "wait $refused\n"
	if out, err = d.do("bash", "-c", cancel); err != nil {
		t.Fatal(err)
	}
	ordered(t, out, `"state":"SUCCEEDED"`, `"state":"REFUSED"`, `"already_ended"`)
}

func TestDocumentedCommandsInPython(t *testing.T) {
	t.Parallel()
	py := python(t)
	d := startDocumented(t)
	setup := d.setup("bed-08")
	device := d.file("device.py", example(t, "### A device in Python", "python", 0))
	send := d.file("send.py", example(t, "### The cloud in Python", "python", 0))
	host, port, _ := net.SplitHostPort(d.gw.Addr)
	cloudHost, cloudPort, _ := net.SplitHostPort(d.cloud.Addr)
	run := func() func() { return d.start(py, device, host, port, "bed-08", "memory.json") }
	stop := run()
	command := func(name, payload string) (string, error) {
		return d.do(py, send, cloudHost, cloudPort, gatewayID, "bed-08", name, payload)
	}
	var out string
	testkit.EventuallyNil(t, 60*time.Second, "the device is known", func() error {
		var err error
		if out, err = command("setpoint", `{"celsius":21.5}`); err != nil && !strings.Contains(out, "REFUSED") {
			t.Fatalf("%v: %s", err, out)
		}
		return err
	})
	ordered(t, out, "QUEUED", "SENT", "DELIVERED", "IN_PROGRESS", "IN_PROGRESS 50", "SUCCEEDED", `{"celsius": 21.5}`)
	if out, err := command("dance", "{}"); err == nil || !strings.Contains(out, "REJECTED") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := command("setpoint", "7"); err == nil || !strings.Contains(out, "FAILED") {
		t.Errorf("%v: %s", err, out)
	}

	// It is off and comes back: what waited is done.
	stop()
	later := make(chan string, 1)
	go func() {
		out, _ := d.do("bash", "-c", setup+example(t, "### In Go and on the command line", "sh", 0))
		later <- out
	}()
	testkit.EventuallyNil(t, 30*time.Second, "the command waits at the gateway", func() error {
		var page struct {
			Commands []struct{ State string } `json:"commands"`
		}
		if err := d.gw.Get("/api/v1/devices/bed-08/commands", &page); err != nil {
			return err
		}
		if len(page.Commands) == 0 || page.Commands[0].State != "QUEUED" {
			return fmt.Errorf("commands %+v", page.Commands)
		}
		return nil
	})
	run()
	select {
	case out := <-later:
		ordered(t, out, "QUEUED", "SENT", "DELIVERED", "SUCCEEDED", `{"celsius": 21.5}`)
	case <-time.After(60 * time.Second):
		t.Error("the command that waited has no end within a minute")
	}
}

// TestDocumentedGoExample runs the example of bridge/cloud.
func TestDocumentedGoExample(t *testing.T) {
	t.Parallel()
	py := python(t)
	d := startDocumented(t)
	path := filepath.Join(d.dir, "example")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, "holdfast/bridge/cloud/example").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	host, port, _ := net.SplitHostPort(d.gw.Addr)
	d.start(py, d.file("device.py", example(t, "### A device in Python", "python", 0)), host, port, "bed-09", "memory.json")
	testkit.EventuallyNil(t, 60*time.Second, "the example succeeds", func() error {
		out, err := d.do(path, "-url", d.cloud.URL(), "-gateway", gatewayID, "-device", "bed-09", "-name", "setpoint", "-payload", `{"celsius":3}`)
		if err == nil && out != "{\"celsius\": 3}\n" {
			t.Fatalf("it prints %q", out)
		}
		return err
	})
}

// TestEveryStateAndRefusalIsDocumented holds the tables of docs/commands.md to the code.
func TestEveryStateAndRefusalIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := []string{
		wire.StateRefused, devices.CodeUnknownDevice, devices.CodeDisabled, devices.CodeInvalid, devices.CodeTooLarge, devices.CodeQueueFull,
		devices.CodeExpired, devices.CodeConflict, devices.CodeUnknown, devices.CodeEnded, devices.CodeUnavailable, string(devices.FeedbackNone),
		string(devices.FeedbackNegative), string(devices.FeedbackPositive), string(devices.FeedbackFull),
	}
	for s := devices.Queued; s <= devices.DeadLettered; s++ {
		rows = append(rows, s.String())
	}
	for _, row := range rows {
		if !bytes.Contains(b, []byte("\n| `"+row+"` |")) {
			t.Errorf("docs/commands.md has no row for %s", row)
		}
	}
}
