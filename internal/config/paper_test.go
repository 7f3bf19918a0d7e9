package config_test

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"holdfast/internal/config"
)

var update = flag.Bool("update", false, "write docs/configuration.md anew")

const paperFile = "../../docs/configuration.md"

// TestThePaperIsOfTheKeys makes docs/configuration.md of the types that a file is read into, and of what configs/gateway.yaml says of each
// key. A key that is not explained there is an error, and so is a paper that is not what this makes: make docs.
func TestThePaperIsOfTheKeys(t *testing.T) {
	paper := makePaper(t)
	if *update {
		if err := os.WriteFile(paperFile, []byte(paper), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	there, err := os.ReadFile(paperFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(there) != paper {
		t.Error("docs/configuration.md is not what the keys and configs/gateway.yaml say: make docs")
	}
}

func makePaper(t *testing.T) string {
	t.Helper()
	var doc yaml.Node
	if err := yaml.Unmarshal(example(t), &doc); err != nil {
		t.Fatal(err)
	}
	comments, values := map[string]string{}, map[string]string{}
	var walk func(n *yaml.Node, path string)
	walk = func(n *yaml.Node, path string) {
		switch n.Kind { //nolint:exhaustive // an alias is nowhere in it
		case yaml.DocumentNode:
			walk(n.Content[0], "")
		case yaml.SequenceNode:
			for _, e := range n.Content {
				walk(e, path+"[]")
			}
		case yaml.ScalarNode:
			if values[path] == "" {
				values[path] = n.Value
			}
		case yaml.MappingNode:
			if n.HeadComment != "" && comments[path] == "" {
				comments[path] = n.HeadComment
			}
			for i := 0; i < len(n.Content); i += 2 {
				key := n.Content[i].Value
				if path != "" {
					key = path + "." + key
				}
				if c := n.Content[i].HeadComment; c != "" && comments[key] == "" {
					comments[key] = c
				}
				walk(n.Content[i+1], key)
			}
		}
	}
	walk(&doc, "")

	var b strings.Builder
	b.WriteString(`# Configuration

Every key of the configuration file. This page is made of what reads the file and of [configs/gateway.yaml](../configs/gateway.yaml), by ` + "`make docs`" + `; do not edit it. Which keys a reload
takes and which wait for a restart: [operations.md](operations.md#changing-it-while-it-runs), or ` + "`holdfast config diff`" + `.

Sizes carry a unit (B, KiB, MiB, GiB, TiB), durations too (us, ms, s, m, h, d). Secrets are paths of files; relative paths start at the folder of the configuration. A key that is not known, written
twice or of the wrong type is an error. Any key may be left out. ` + "`[]`" + ` stands for each entry of a list.
`)
	listing := false                    // of keys that the section above explains
	explains := func(key string) bool { // the nearest section above has a line that begins with the key, or names it
		name := key[strings.LastIndex(key, ".")+1:]
		for above := key; strings.Contains(above, "."); {
			above = above[:strings.LastIndex(above, ".")]
			for _, at := range []string{above, strings.TrimSuffix(above, "[]"), above + ".url"} { // url explains urls
				if regexp.MustCompile(`\b` + regexp.QuoteMeta(strings.TrimSuffix(name, "[]")) + `\b`).MatchString(comments[at]) {
					return true
				}
			}
		}
		return false
	}
	for _, k := range config.KeyTypes() {
		texts := []string{comments[k.Path]} // of a list, and of its first entry
		if list, ok := strings.CutSuffix(k.Path, "[]"); ok {
			texts = []string{comments[list], comments[k.Path]}
		}
		kind, _, _ := strings.Cut(k.Type, " such as") // the value that follows is one
		if v := values[k.Path]; v != "" {
			kind += ", such as `" + v + "`"
		}
		text := strings.TrimSpace(strings.Join(texts, "\n\n"))
		switch {
		case text == "" && k.Type == "":
			if !strings.Contains(k.Path, ".") {
				fmt.Fprintf(&b, "\n## %s\n", k.Path)
			}
			continue
		case text == "":
			if !explains(k.Path) {
				t.Errorf("configs/gateway.yaml does not explain %s", k.Path)
			}
			if !listing {
				b.WriteString("\n")
			}
			fmt.Fprintf(&b, "- `%s`: %s\n", k.Path, kind)
			listing = true
			continue
		}
		listing = false
		if !strings.Contains(k.Path, ".") {
			fmt.Fprintf(&b, "\n## %s\n", k.Path)
		} else {
			fmt.Fprintf(&b, "\n### %s\n", k.Path)
		}
		if kind != "" {
			fmt.Fprintf(&b, "\n%s.\n", strings.ToUpper(kind[:1])+kind[1:])
		}
		b.WriteString("\n" + markdown(text))
	}
	return b.String()
}

// markdown makes paragraphs of a comment, and of its lists, which are set in, blocks.
func markdown(comment string) string {
	var b strings.Builder
	var paragraph []string
	block := false
	flush := func() {
		if len(paragraph) > 0 {
			b.WriteString(strings.NewReplacer("<", `\<`, "*", `\*`, "_", `\_`).Replace(strings.Join(paragraph, "\n")) + "\n")
			paragraph = nil
		}
	}
	end := func() {
		if block {
			b.WriteString("```\n")
			block = false
		}
	}
	for line := range strings.SplitSeq(comment, "\n") {
		line = strings.TrimPrefix(line, "#")
		switch {
		case strings.HasPrefix(line, "   "):
			flush()
			if !block {
				b.WriteString("```text\n")
				block = true
			}
			b.WriteString(strings.TrimPrefix(line, "   ") + "\n")
		case strings.TrimSpace(line) == "":
			flush()
			end()
			b.WriteString("\n")
		default:
			end()
			paragraph = append(paragraph, strings.TrimSpace(line))
		}
	}
	flush()
	end()
	return b.String()
}
