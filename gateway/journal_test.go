package gateway_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/devices"
	"holdfast/gateway"
	"holdfast/internal/testkit"
)

// call asks the API of a gateway as its administrator.
func call(t *testing.T, g *gateway.Gateway, dir, method, path, body string) (status int, answer string) {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(dir, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+g.HTTPAddr().String()+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// Whoever is told of a step looks at the command and must see that step: one that waits for the end looks once only.
func TestEventsDoNotRunAheadOfTheCommand(t *testing.T) {
	dir := t.TempDir()
	g, err := gateway.New(t.Context(), gateway.Options{Config: configuration(t, dir), Version: "test", Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	type step struct{ told, shown string }
	steps := make(chan step, 16)
	gateway.Watch(g, func(e devices.Event, get func(string) (devices.Command, error)) {
		if e.Command == nil {
			return
		}
		s := step{told: e.Command.State.String()}
		if c, err := get(e.Command.ID); err != nil {
			s.shown = err.Error()
		} else {
			s.shown = c.State.String()
		}
		steps <- s
	})
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	testkit.EventuallyNil(t, 10*time.Second, "the gateway to be ready", g.Ready)
	if status, body := call(t, g, dir, "POST", "/api/v1/devices", `{"id":"pump-1"}`); status != 201 {
		t.Fatalf("%d: %s", status, body)
	}
	if status, body := call(t, g, dir, "POST", "/api/v1/devices/pump-1/commands", `{"id":"c1","name":"stop"}`); status != 201 {
		t.Fatalf("%d: %s", status, body)
	}
	if status, body := call(t, g, dir, "DELETE", "/api/v1/commands/c1", ""); status != 200 {
		t.Fatalf("%d: %s", status, body)
	}
	for _, want := range []string{"QUEUED", "CANCELED"} {
		if s := <-steps; s.told != want || s.shown != want {
			t.Errorf("told %s, and the command is %s", s.told, s.shown)
		}
	}
}
