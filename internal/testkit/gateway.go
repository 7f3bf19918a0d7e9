package testkit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"holdfast/internal/proof"
)

// Gateway is the real binary with a configuration of its own on loopback ports that stay the same over its
// lives.
type Gateway struct {
	*Process
	Addr string // MQTT, host:port
	HTTP string // host:port
	Dir  string // data_dir
	File string // configuration
	id   string
}

// StartGateway runs `bin run` with one anonymous MQTT listener, an HTTP address, a data folder and whatever
// YAML is given on top: top-level keys other than gateway, listeners and http, and devices if that
// lets anonymous devices in, too.
func StartGateway(t T, bin, id, yaml string) *Gateway {
	t.Helper()
	devices := "{ anonymous: true }"
	if strings.Contains("\n"+yaml, "\ndevices:") {
		devices = ""
	}
	return StartGatewayWith(t, bin, id, GatewayConfig{Devices: devices, YAML: yaml})
}

// GatewayConfig is what of a gateway's configuration a test chooses. One MQTT listener, called test, and an HTTP address are there anyway.
type GatewayConfig struct {
	Dir       string   // data_dir; "": a temporary folder
	Listeners []string // more of them, each a YAML mapping in braces
	Limit     int      // max_connections of the listener test; 0: none
	Devices   string   // what stands under devices, a YAML mapping in braces; "": nothing, so that nobody comes in without credentials
	YAML      string   // other top-level keys

	Clock    *FakeClock    // its wall clock; nil: the machine's
	Patience time.Duration // most time for a start and for a stop; 0: as Command says
	Before   string        // shell commands that the process does before it becomes the gateway, such as ulimit; "": none
}

// StartGatewayWith runs `bin run` with the given configuration.
func StartGatewayWith(t T, bin, id string, c GatewayConfig) *Gateway {
	t.Helper()
	g := &Gateway{Addr: FreeAddr(t), HTTP: FreeAddr(t), Dir: c.Dir, id: id}
	if g.Dir == "" {
		g.Dir = t.TempDir()
	}
	g.File = filepath.Join(t.TempDir(), "gateway.yaml")
	if err := g.Configure(c); err != nil {
		t.Fatalf("write the gateway's configuration: %v", err)
	}
	run := Command{Name: "holdfast", Path: bin, Args: []string{"run", "--config", g.File}, Clock: c.Clock, Grace: c.Patience}
	if c.Before != "" {
		run.Path, run.Args = "/bin/sh", append([]string{"-ec", c.Before + "\nexec \"$0\" \"$@\"", bin}, run.Args...)
	}
	g.Process = Start(t, run)
	return g
}

// Configure writes another configuration, with the same addresses and folder, for the next start or SIGHUP.
func (g *Gateway) Configure(c GatewayConfig) error {
	var b strings.Builder
	fmt.Fprintf(&b, "gateway: { id: %s, data_dir: %q }\nhttp: { address: %q }\nlisteners:\n", g.id, g.Dir, g.HTTP)
	for _, l := range append([]string{fmt.Sprintf("{ name: test, protocol: mqtt, address: %q, max_connections: %d }", g.Addr, c.Limit)}, c.Listeners...) {
		fmt.Fprintf(&b, "  - %s\n", l)
	}
	if c.Devices != "" {
		fmt.Fprintf(&b, "devices: %s\n", c.Devices)
	}
	b.WriteString(c.YAML)
	b.WriteByte('\n')
	return os.WriteFile(g.File, []byte(b.String()), 0o600)
}

// Reload sends SIGHUP and waits until the log says what came of it; taken is false if the old configuration stays.
func (g *Gateway) Reload() (taken bool) {
	g.t.Helper()
	const yes, no = "configuration read again", "the old one stays"
	before, refused := strings.Count(g.Logs(), yes), strings.Count(g.Logs(), no)
	g.Signal(syscall.SIGHUP)
	Eventually(g.t, 10*time.Second, "the gateway has read its configuration again", func() bool {
		log := g.Logs()
		taken = strings.Count(log, yes) > before
		return taken || strings.Count(log, no) > refused
	})
	return taken
}

// Status is what of a gateway's status the tests look at.
type Status struct {
	proof.Books
	Ready bool `json:"ready"`
	Store struct {
		Bytes   uint64 `json:"bytes"`
		Free    uint64 `json:"free_bytes"`
		Reserve int64  `json:"reserve_bytes"`
		Level   string `json:"level"`
	} `json:"store"`
	Commands struct {
		Queued      int    `json:"queued"`
		Sent        int    `json:"sent"`
		Delivered   int    `json:"delivered"`
		InProgress  int    `json:"in_progress"`
		Submitted   uint64 `json:"submitted"`
		Refused     uint64 `json:"refused"`
		Disbelieved uint64 `json:"disbelieved"`
	} `json:"commands"`
	Devices struct {
		Registered int `json:"registered"`
		Connected  int `json:"connected"`
		Disabled   int `json:"disabled"`
	} `json:"devices"`
	Certificates []struct {
		Listener string    `json:"listener"`
		File     string    `json:"file"`
		Subject  string    `json:"subject"`
		NotAfter time.Time `json:"not_after"`
	} `json:"certificates"`
	Upstreams []struct {
		Name      string `json:"name"`
		Connected bool   `json:"connected"`
		LastError string `json:"last_error"`
		InFlight  int    `json:"in_flight"`
		Acked     uint64 `json:"acked_messages"`
		Commands  bool   `json:"commands"` // they come down from it now
	} `json:"upstreams"`
}

// AwaitCommands waits until commands come down from every upstream.
func (g *Gateway) AwaitCommands(t T) {
	t.Helper()
	EventuallyNil(t, 20*time.Second, "commands come down", func() error {
		s, err := g.Status()
		if err != nil {
			return err
		}
		for _, u := range s.Upstreams {
			if !u.Commands {
				return fmt.Errorf("not from %s", u.Name)
			}
		}
		return nil
	})
}

// Books asks the gateway for its ledger.
func (g *Gateway) Books() (*proof.Books, error) {
	s, err := g.Status()
	return &s.Books, err
}

// Status asks the gateway how it is.
func (g *Gateway) Status() (*Status, error) {
	var s Status
	return &s, g.Get("/api/v1/status", &s)
}

// Get reads a path of the HTTP API into a value.
func (g *Gateway) Get(path string, into any) error {
	b, err := g.fetch(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("GET %s: %w in %.200s", path, err, b)
	}
	return nil
}

// Metric sums the samples of one metric whose labels contain all the given label="value" pairs.
func (g *Gateway) Metric(name string, labels ...string) (float64, error) {
	b, err := g.fetch("/metrics")
	if err != nil {
		return 0, err
	}
	sum, found := 0.0, false
lines:
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(rest, l) {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(strings.TrimSpace(rest), ' ')+1:]), 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("no metric %s with %v", name, labels)
	}
	return sum, nil
}

func (g *Gateway) fetch(path string) ([]byte, error) {
	return g.Call(http.MethodGet, path, nil, http.StatusOK)
}

// Token is the administrator's, as the gateway has made it at its first start.
func (g *Gateway) Token() (string, error) {
	b, err := os.ReadFile(filepath.Join(g.Dir, "admin.token"))
	return strings.TrimSpace(string(b)), err
}

// Call sends one request to the HTTP API as the administrator, and returns the body of the answer. Another status than one
// of those that are wanted is an error. body nil: none; else it is sent as JSON.
func (g *Gateway) Call(method, path string, body any, want ...int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+g.HTTP+path, content)
	if err != nil {
		return nil, err
	}
	token, err := g.Token()
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // nothing left behind
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(want, resp.StatusCode) {
		return nil, fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, b)
	}
	return b, nil
}
