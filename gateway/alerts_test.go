package gateway_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"holdfast/bridge"
	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/internal/pki"
	"holdfast/internal/testkit"
)

// query is one of the dashboard's or the alert rules', with the texts in which its labels are named.
type query struct{ where, expr, texts string }

type rule struct {
	Alert       string
	Expr        string
	Labels      map[string]string
	Annotations map[string]string
}

func alertRules(t *testing.T) (rules []rule) {
	t.Helper()
	var file struct{ Groups []struct{ Rules []rule } }
	if err := yaml.Unmarshal(readFile(t, "../configs/alerts.yaml"), &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		rules = append(rules, g.Rules...)
	}
	if len(rules) == 0 {
		t.Fatal("no rules")
	}
	return rules
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func dashboardQueries(t *testing.T) (all []query) {
	t.Helper()
	var d struct {
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID      int
			Type    string
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(readFile(t, "../configs/grafana.json"), &d); err != nil {
		t.Fatal(err)
	}
	for _, v := range d.Templating.List {
		all = append(all, query{where: "variable " + v.Name, expr: v.Definition})
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("panel %q has the id of another", p.Title)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := taken[at]; other != "" || at[0] >= 24 {
					t.Fatalf("panel %q lies on %q, or beyond the edge", p.Title, other)
				}
				taken[at] = p.Title
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			all = append(all, query{"panel " + p.Title, target.Expr, target.LegendFormat})
		}
	}
	return all
}

// TestDashboardAndAlertsAskForWhatThereIs holds configs/grafana.json and configs/alerts.yaml against what a gateway with a TLS
// listener, an upstream and one that is away exports: names, labels and the values of labels that are asked for.
func TestDashboardAndAlertsAskForWhatThereIs(t *testing.T) {
	queries := dashboardQueries(t)
	for _, r := range alertRules(t) {
		texts := ""
		for _, a := range r.Annotations {
			texts += a + "\n"
		}
		queries = append(queries, query{"alert " + r.Alert, r.Expr, texts})
	}
	series := exported(t)
	var (
		selector = regexp.MustCompile(`(holdfast_[a-z0-9_]+)(?:\{([^}]*)\})?`)
		matcher  = regexp.MustCompile(`(\w+)(=~|!=|!~|=)"([^"]*)"`)
		named    = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}`)
	)
	for _, q := range queries {
		labels := []string{"job", "instance"} // Prometheus gives them
		for _, s := range selector.FindAllStringSubmatch(q.expr, -1) {
			found := series[s[1]]
			if found == nil {
				t.Errorf("%s: there is no %s", q.where, s[1])
				continue
			}
			for name := range found {
				labels = append(labels, name)
			}
			for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
				if slices.Contains(labels[:2], m[1]) {
					continue
				}
				if found[m[1]] == nil {
					t.Errorf("%s: %s has no label %s", q.where, s[1], m[1])
				}
				if m[2] == "!=" {
					continue
				}
				for value := range strings.SplitSeq(m[3], "|") {
					if !slices.Contains(found[m[1]], value) {
						t.Errorf("%s: no %s has %s=%q, only %q", q.where, s[1], m[1], value, found[m[1]])
					}
				}
			}
		}
		for _, l := range named.FindAllStringSubmatch(q.texts, -1) {
			if !slices.Contains(labels, l[1]) {
				t.Errorf("%s: names the label %s, and has only %q", q.where, l[1], labels)
			}
		}
	}
}

// exported gives what a gateway exports: by metric and label, the values.
func exported(t *testing.T) map[string]map[string][]string {
	t.Helper()
	ca := pki.At(filepath.Join(t.TempDir(), "pki"), nil)
	if err := ca.Init(pki.InitOptions{Site: "site", Hosts: []string{"127.0.0.1"}}); err != nil {
		t.Fatal(err)
	}
	c := configuration(t, t.TempDir())
	c.Listeners = append(c.Listeners, broker.Listener{
		Name: "tls", Protocol: "mqtts", Address: "127.0.0.1:0", TLS: broker.TLS{Cert: ca.Path("server.crt"), Key: ca.Path("server.key")},
	})
	c.Upstreams = []bridge.Config{
		{Name: "cloud", URL: "mqtt://" + startUpstream(t), Format: bridge.FormatBatch},
		{Name: "away", URL: "mqtt://" + testkit.FreeAddr(t), Format: bridge.FormatBatch},
	}
	g := start(t, c)
	d, err := connect(t, g.Addrs()[0], "dev1")
	if err != nil {
		t.Fatal(err)
	}
	if r := d.publish(t, "dt/x", "hello"); r != mqtt.Success {
		t.Fatalf("reason %v", r)
	}
	line := regexp.MustCompile(`(?m)^(holdfast_[a-z0-9_]+)(?:\{(.*)\})? `)
	label := regexp.MustCompile(`([a-z_]+)="([^"]*)"`)
	all := map[string]map[string][]string{}
	testkit.EventuallyNil(t, 15*time.Second, "one upstream to have a message, and the other to be away", func() error {
		clear(all)
		for _, m := range line.FindAllStringSubmatch(metrics(t, g), -1) {
			if all[m[1]] == nil {
				all[m[1]] = map[string][]string{}
			}
			for _, l := range label.FindAllStringSubmatch(m[2], -1) {
				all[m[1]][l[1]] = append(all[m[1]][l[1]], l[2])
			}
		}
		if all["holdfast_bridge_acked_messages_total"] == nil || all["holdfast_bridge_link_losses_total"] == nil {
			return fmt.Errorf("%d metrics", len(all))
		}
		return nil
	})
	return all
}

func metrics(t *testing.T, g *running) string {
	t.Helper()
	resp := g.get(t.Context(), "/metrics")
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEveryAlertIsExplainedAndTried: docs/operations.md has a paragraph for each alert that says how urgent it is, and no other;
// configs/alerts_test.yaml has a time at which it is there, beside an instance that has it never.
func TestEveryAlertIsExplainedAndTried(t *testing.T) {
	page := string(readFile(t, "../docs/operations.md"))
	paragraph := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^### (Holdfast\w+)\n\n(.+)`).FindAllStringSubmatch(page, -1) {
		paragraph[m[1]] = m[2]
	}
	var cases struct {
		Tests []struct {
			InputSeries []struct{ Series string } `yaml:"input_series"`
			Promql      []struct {
				Expr string
				Exp  []struct{ Labels string } `yaml:"exp_samples"`
			} `yaml:"promql_expr_test"`
		}
	}
	if err := yaml.Unmarshal(readFile(t, "../configs/alerts_test.yaml"), &cases); err != nil {
		t.Fatal(err)
	}
	tried := map[string]bool{}
	name := regexp.MustCompile(`alertname="(\w+)",alertstate="firing"`)
	for _, c := range cases.Tests {
		good := false
		for _, s := range c.InputSeries {
			good = good || strings.Contains(s.Series, `instance="good"`)
		}
		for _, p := range c.Promql {
			if m := name.FindStringSubmatch(p.Expr); m != nil && good && len(p.Exp) > 0 {
				tried[m[1]] = true
			}
		}
	}
	seen := map[string]bool{}
	for _, r := range alertRules(t) {
		if seen[r.Alert] {
			t.Errorf("%s is there twice", r.Alert)
		}
		seen[r.Alert] = true
		severity := r.Labels["severity"]
		if begins := map[string]string{"critical": "Critical. ", "warning": "Warning. "}[severity]; begins == "" || !strings.HasPrefix(paragraph[r.Alert], begins) {
			t.Errorf("%s is %q, its paragraph begins with %.20q", r.Alert, severity, paragraph[r.Alert])
		}
		if want := "docs/operations.md#" + strings.ToLower(r.Alert); r.Annotations["runbook"] != want {
			t.Errorf("%s: runbook %q, want %q", r.Alert, r.Annotations["runbook"], want)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s has no summary or no description", r.Alert)
		}
		if !tried[r.Alert] {
			t.Errorf("configs/alerts_test.yaml has no case in which %s is there for some instance and not for \"good\"", r.Alert)
		}
	}
	for a := range paragraph {
		if !seen[a] {
			t.Errorf("docs/operations.md explains %s, which there is not", a)
		}
	}
}
