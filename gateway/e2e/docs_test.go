package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"holdfast/internal/testkit"
)

// TestEveryMetricIsExplained holds docs/operations.md against what a gateway with an upstream and a TLS listener really exports.
func TestEveryMetricIsExplained(t *testing.T) {
	path := bin(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+"upstreams:\n"+upstreamYAML("cloud", testkit.FreeAddr(t), "batch", ""))
	addTLS(t, path, g)
	scrape(t, g) // so that the count of requests is there
	exported := scrape(t, g)
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, name := range regexp.MustCompile("`(holdfast_[a-z0-9_]+)[`{]").FindAllStringSubmatch(string(doc), -1) {
		explained[name[1]] = true
		if !exported[name[1]] {
			t.Errorf("docs/operations.md tells of %s, which there is not", name[1])
		}
	}
	for name := range exported {
		if !explained[name] {
			t.Errorf("docs/operations.md does not tell of %s", name)
		}
	}
}

// addTLS gives g a TLS listener, with certificates of its own making, and starts it again.
func addTLS(t *testing.T, path string, g *testkit.Gateway) {
	t.Helper()
	pki := filepath.Join(t.TempDir(), "pki")
	if out, err := exec.CommandContext(t.Context(), path, "cert", "init", "--dir", pki, "--host", "127.0.0.1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(g.File)
	if err != nil {
		t.Fatal(err)
	}
	tls := fmt.Sprintf("listeners:\n  - { name: tls, protocol: mqtts, address: %q, tls: { cert: %q, key: %q } }\n",
		testkit.FreeAddr(t), filepath.Join(pki, "server.crt"), filepath.Join(pki, "server.key"))
	if err := os.WriteFile(g.File, bytes.Replace(text, []byte("listeners:\n"), []byte(tls), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	g.Stop()
	g.Restart()
}

// scrape returns the names of the gateway's own metrics.
func scrape(t *testing.T, g *testkit.Gateway) map[string]bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+g.HTTP+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for line := range strings.Lines(string(body)) {
		if rest, ok := strings.CutPrefix(line, "# HELP holdfast_"); ok {
			names["holdfast_"+strings.Fields(rest)[0]] = true
		}
	}
	return names
}
