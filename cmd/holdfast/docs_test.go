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

func portOf(t *testing.T) string {
	t.Helper()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address[strings.LastIndexByte(address, ':')+1:]
}
