// Package archtest holds the module to its import arrows: who may import whom, and which third-party library
// stays inside which adapter. depguard says the same while linting; this says it in every `go test`.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// arrows lists, for each package, what of ours its code (not its tests) may import.
// "*" is anything except testkit.
var arrows = map[string][]string{
	"cmd/holdfast":           {"*"},
	"cmd/firmware-sim":       {"*"},
	"gateway":                {"*"},
	"gateway/broker":         {"internal/clock", "internal/kv", "internal/mqtt", "spool"}, // spool for the record type
	"gateway/httpapi":        {"bridge", "bridge/wire", "devices", "internal/audit", "spool"},
	"gateway/e2e":            {},
	"bridge":                 {"bridge/wire", "spool"},
	"bridge/wire":            {},
	"bridge/cloud":           {"bridge/wire"},
	"bridge/cloud/example":   {"bridge/cloud", "bridge/mqttup", "bridge/wire"},
	"bridge/mqttup":          {"bridge", "bridge/wire"},
	"bridge/bridgetest":      {"bridge", "bridge/wire"},
	"spool":                  {"internal/clock", "internal/kv"},
	"devices":                {"internal/clock", "internal/kv"},
	"firmware-sim":           {"bridge/cloud", "bridge/mqttup", "bridge/wire", "internal/mqtt"},
	"internal/archtest":      {},
	"internal/audit":         {},
	"internal/bench":         {"*", "internal/testkit"},
	"internal/clock":         {"internal/kv"},
	"internal/config":        {"bridge", "devices", "gateway/broker", "internal/mqtt", "spool"}, // the packages' Config types; mqtt to check filters
	"internal/diskcheck":     {},
	"internal/kv":            {},
	"internal/lifecycle":     {},
	"internal/logs":          {},
	"internal/mdoc":          {}, // of tests that write manual pages: linked into no program
	"internal/mqtt":          {},
	"internal/pki":           {},
	"internal/mqtt/mqtttest": {"internal/mqtt"}, // a test's mosquitto and scripted peers: linked into no program
	"internal/powercut":      {},
	"internal/proof":         {"bridge/cloud", "bridge/wire", "firmware-sim", "internal/mqtt"}, // stands outside the gateway, as the devices and the cloud do
	"internal/top":           {"gateway/httpapi"},
	"internal/tracing":       {},
	"internal/testkit":       {"internal/mqtt", "internal/proof"},
}

// adapters lists which packages may import a third-party library; everything below the path counts.
var adapters = map[string][]string{
	"github.com/mochi-mqtt/server/v2":       {"gateway/broker", "internal/bench"}, // bench: plain mochi is a baseline
	"github.com/mochi-mqtt/server/v2/hooks": {},                                   // its storage hooks acknowledge before they store
	"github.com/cockroachdb/pebble/v2":      {"internal/kv", "spool", "devices"},
	"github.com/eclipse/paho.mqtt.golang":   {"bridge/mqttup"},
	"github.com/fxamacker/cbor/v2":          {"bridge/wire", "devices", "internal/clock"},
	"github.com/coreos/go-systemd/v22":      {"gateway"},
	"charm.land":                            {"internal/top"},
	"github.com/charmbracelet":              {"internal/top"},
	"go.opentelemetry.io":                   {"internal/tracing", "internal/testkit"},
	"github.com/hanwen/go-fuse/v2":          {"internal/powercut"}, // and nobody but tests imports that
}

// absent may not be linked into any program of ours.
var absent = []string{
	"github.com/cockroachdb/pebble", // the first major, beside /v2
	"testing",                       // in a shipped binary
	"github.com/hanwen/go-fuse/v2/fuse",
	"holdfast/internal/powercut",
}

type pkg struct {
	ImportPath string
	Name       string
	Imports    []string
	Deps       []string
}

func load(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Name,Imports,Deps", "holdfast/...")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		all = append(all, p)
	}
}

func under(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestImportsFollowTheArrows(t *testing.T) {
	for _, p := range load(t) {
		from := strings.TrimPrefix(p.ImportPath, "holdfast/")
		allowed, known := arrows[from]
		if !known {
			t.Errorf("package %s is not in the table of arrows: say there what it may import", from)
			continue
		}
		for _, imp := range p.Imports {
			if to, ours := strings.CutPrefix(imp, "holdfast/"); ours {
				if !slices.Contains(allowed, to) && (!slices.Contains(allowed, "*") || to == "internal/testkit") {
					t.Errorf("%s imports %s: allowed are %v", from, to, allowed)
				}
				continue
			}
			for lib, users := range adapters {
				if under(imp, lib) && !slices.Contains(users, from) {
					t.Errorf("%s imports %s: only %v may", from, imp, users)
				}
			}
		}
	}
}

func TestProgramsLinkNothingForeign(t *testing.T) {
	for _, p := range load(t) {
		if p.Name != "main" || !strings.HasPrefix(p.ImportPath, "holdfast/cmd/") {
			continue
		}
		for _, lib := range absent {
			if slices.Contains(p.Deps, lib) {
				t.Errorf("%s links %s", p.ImportPath, lib)
			}
		}
	}
}
