package config_test

import (
	"os"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"holdfast/internal/config"
)

const exampleFile = "../../configs/gateway.yaml"

func example(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestTheExampleLoads(t *testing.T) {
	c, warnings, err := config.Parse(exampleFile, example(t))
	if err != nil {
		t.Fatalf("%v", err)
	}
	if len(warnings) > 0 {
		t.Errorf("the example warns:\n%v", warnings)
	}
	if len(c.Listeners) != 3 || len(c.Upstreams) != 1 || len(c.Routes) != 2 {
		t.Errorf("the example is %+v", c)
	}
}

func TestTheExampleHasEveryKey(t *testing.T) {
	var doc yaml.Node
	if err := yaml.Unmarshal(example(t), &doc); err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	var walk func(n *yaml.Node, path string)
	walk = func(n *yaml.Node, path string) {
		switch n.Kind { //nolint:exhaustive // scalars are the ends; the example has no alias
		case yaml.DocumentNode:
			walk(n.Content[0], "")
		case yaml.SequenceNode:
			have[path+"[]"] = true
			for _, e := range n.Content {
				walk(e, path+"[]")
			}
		case yaml.MappingNode:
			for i := 0; i < len(n.Content); i += 2 {
				key := n.Content[i].Value
				if path != "" {
					key = path + "." + key
				}
				have[key] = true
				walk(n.Content[i+1], key)
			}
		}
	}
	walk(&doc, "")
	keys := config.Keys()
	if len(keys) < 40 {
		t.Fatalf("only %d keys: the walk over the types is broken", len(keys))
	}
	for _, key := range keys {
		k := key.Path
		if k == "upstreams[].urls[]" { // stands there as a comment: url excludes it
			have[k] = strings.Contains(string(example(t)), "# urls: [mqtts://")
		}
		if !have[k] {
			t.Errorf("configs/gateway.yaml lacks %s: write it there with its default, its unit and why", k)
		}
	}
}

// What an empty file means is what people were told. That the example says the same: TestTheExampleTellsWhatIsAllowed.
func TestDefaultsStayWhatTheyAre(t *testing.T) {
	empty, _, err := config.Parse("g.yaml", []byte("gateway: { id: x }\n"))
	if err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	if err := config.Print(&printed, empty); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"sync_interval: 100ms", "disk_reserve: 0", "anonymous: false", "level: info", "format: auto",
		"durability: fsync", "data_dir: \"/var/lib/holdfast\"", "address: \"127.0.0.1:8080\"", "address: \"127.0.0.1:1883\"",
	} {
		if !strings.Contains(printed.String(), want) {
			t.Errorf("an empty file prints no %q:\n%s", want, printed.String())
		}
	}
}
