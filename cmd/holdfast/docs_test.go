package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/testkit"
)

// The examples of docs/devices.md are run in their order, against a gateway that is configured as the page says.
func TestTheExamplesOfTheDevicesPage(t *testing.T) {
	if testkit.Race {
		t.Skip("what it starts runs under the race detector in TestScripts")
	}
	for _, tool := range []string{"mosquitto_pub", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s here", tool)
		}
	}
	page, err := os.ReadFile("../../docs/devices.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(page)
	for _, port := range []string{"1883", "8883"} {
		text = strings.ReplaceAll(text, port, portOf(t))
	}
	api := "127.0.0.1:" + portOf(t)
	blocks := func(kind string) (found []string) {
		for _, m := range regexp.MustCompile("(?ms)^```"+kind+"\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
			found = append(found, m[1])
		}
		return found
	}
	scripts, configs, tables := blocks("sh"), blocks("yaml"), blocks("csv")
	if len(scripts) < 8 || len(configs) != 2 || len(tables) != 1 {
		t.Fatalf("the page has %d scripts, %d configurations, %d tables", len(scripts), len(configs), len(tables))
	}
	dir := t.TempDir()
	gateway := fmt.Sprintf("gateway: { id: ward-3-east, data_dir: holdfast-data }\nhttp: { address: %q }\n", api) + strings.Join(configs, "")
	real := filepath.Join(holdfastOnPath(t), "holdfast")
	wrapper := fmt.Sprintf("#!/bin/sh\ncase $1 in device|command|token|status) exec %s \"$@\" --config gateway.yaml;; esac\nexec %s \"$@\"\n", real, real)
	for name, data := range map[string]string{"gateway.yaml": gateway, "beds.csv": tables[0]} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "holdfast"), []byte(wrapper), 0o700); err != nil { //nolint:gosec // it has to run
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	shell := func(script string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "sh", "-ec", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
		return cmd
	}
	run := func(script string) {
		t.Helper()
		if out, err := shell(script).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s\n%s", err, script, out)
		}
	}
	// The authority comes first: the gateway's configuration names its files.
	for _, s := range scripts {
		if strings.HasPrefix(s, "holdfast cert init") {
			run(s)
		}
	}
	gw := shell("exec holdfast run --config gateway.yaml")
	var log bytes.Buffer
	gw.Stderr = &log
	if err := gw.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := gw.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := gw.Wait(); err != nil || t.Failed() {
			t.Errorf("the gateway ended with %v:\n%s", err, log.String())
		}
	}()
	testkit.Eventually(t, 20*time.Second, "the gateway is ready", func() bool {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+api+"/readyz", nil)
		if err != nil {
			return false
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	rest := ""
	for _, s := range scripts {
		if !strings.HasPrefix(s, "holdfast cert init") {
			rest += s
		}
	}
	run(rest)
	if b, err := os.ReadFile(filepath.Join(dir, "secrets.csv")); err != nil || strings.Count(string(b), "\n") != 3 {
		t.Errorf("secrets of the import: %q, %v", b, err)
	}
}

// The commands of docs/quickstart.md are run in their order: those of its first terminal in one shell, those of the others beside
// it. sudo and systemctl are stand-ins; the gateway, the cloud's broker and the clients are real.
func TestTheCommandsOfTheQuickStart(t *testing.T) {
	if testkit.Race {
		t.Skip("what it starts runs under the race detector in TestScripts")
	}
	for _, tool := range []string{"bash", "mosquitto", "mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s here", tool)
		}
	}
	page, err := os.ReadFile("../../docs/quickstart.md")
	if err != nil {
		t.Fatal(err)
	}
	dir, bin := t.TempDir(), t.TempDir()
	conf, cloud := filepath.Join(dir, "etc", "gateway.yaml"), portOf(t)
	text := strings.NewReplacer("/etc/holdfast/gateway.yaml", conf, "/var/lib/holdfast", filepath.Join(dir, "data"),
		"18830", cloud, "1883", portOf(t), "8080", portOf(t)).Replace(string(page))
	if err := os.Mkdir(filepath.Dir(conf), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, script := range map[string]string{
		"holdfast": "exec " + filepath.Join(holdfastOnPath(t), "holdfast") + ` "$@"`,
		"sudo":     `exec "$@"`,
		"systemctl": `case $1 in
reload) kill -HUP "$(cat pid)" ;;
restart)
	holdfast run --config ` + conf + ` >gateway.log 2>&1 &
	echo $! >pid
	until holdfast status --config ` + conf + ` >/dev/null 2>&1; do sleep 0.1; done ;;
esac`,
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil { //nolint:gosec // it has to run
			t.Fatal(err)
		}
	}
	// What a reader sees before going on.
	until := func(condition string) string { return "until " + condition + "; do sleep 0.1; done\n" }
	probe := "{ mosquitto_pub -p " + cloud + " -t gw/shed-1/probe -m x 2>&1 && grep -q probe terminal-%d; }"
	seen := map[string]string{
		"CLOUD=$!":         until("mosquitto_pub -p " + cloud + " -t x -n 2>/dev/null"),
		"cloud tail":       until(fmt.Sprintf(probe, 1)),
		"mosquitto_sub -h": until(fmt.Sprintf(probe, 2)),
		"reload holdfast":  until("grep -q ' 21.5$' terminal-1 && grep -q data/telemetry terminal-2"),
		"kill -CONT":       until("grep -q ' 23.0$' terminal-1"),
		"command list":     until("grep -q ': DELIVERED' terminal-1"),
	}
	script := "trap 'set +e; exec 2>/dev/null; kill -CONT $CLOUD; kill $CLOUD $TERMINALS $(cat pid); wait; while kill -0 $(cat pid); do sleep 0.1; done' EXIT\n"
	terminals := 0
	for _, block := range regexp.MustCompile("(?ms)^```(sh|bash)\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		command := block[2]
		if block[1] == "bash" {
			terminals++
			script += fmt.Sprintf("exec %s >terminal-%d 2>&1 & TERMINALS=\"$TERMINALS $!\"\n", strings.TrimSpace(command), terminals)
		} else {
			script += command
		}
		for what, condition := range seen {
			if strings.Contains(command, what) && (block[1] == "bash" || what != "mosquitto_sub -h") {
				script += condition
				delete(seen, what)
			}
		}
	}
	if len(seen) != 0 || terminals != 2 {
		t.Fatalf("the page has %d terminals, and no command for %q", terminals, seen)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-ec", script)
	cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(syscall.SIGTERM) }, 10*time.Second // so that it ends what it started
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tail, err := os.ReadFile(filepath.Join(dir, "terminal-1"))
	if err != nil {
		t.Fatal(err)
	}
	var temperatures []string
	for _, m := range regexp.MustCompile(`(?m)dt/shed/pump-7/temp +([0-9.]+)$`).FindAllStringSubmatch(string(tail), -1) {
		temperatures = append(temperatures, m[1])
	}
	if got := strings.Join(temperatures, " "); got != "21.5 22.0 22.5 23.0" {
		t.Errorf("the second terminal shows %q:\n%s", got, tail)
	}
	for what, pattern := range map[string]string{
		"the first message waits": `(?m)^\(none\) +telemetry +1 +0 +0 +0 +0 +1$`,
		"three wait":              `(?m)^cloud +telemetry +4 +1 +0 +0 +0 +3$`,
		"the device's command":    `(?m)^cmd/pump-7/req/[^/]+/start \{"speed":3\}$`,
		"its end":                 `(?m) pump-7 +start +DELIVERED `,
	} {
		if !regexp.MustCompile(pattern).Match(out) {
			t.Errorf("%s: nothing matches %s in\n%s", what, pattern, out)
		}
	}
}

func portOf(t *testing.T) string {
	t.Helper()
	address := testkit.FreeAddr(t)
	return address[strings.LastIndexByte(address, ':')+1:]
}
