package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/mdoc"
	"holdfast/internal/testkit"
)

var update = flag.Bool("update", false, "write docs/man")

const manDir = "../../docs/man"

// The manual pages are made of what "holdfast help" prints: one of the program, and one of each command or group of commands.
func TestTheManualPages(t *testing.T) {
	names := []string{"holdfast.1", "gateway.yaml.5"} // the second is of internal/config
	testkit.Golden(t, filepath.Join(manDir, "holdfast.1"), []byte(programPage()), *update, "make docs")
	for _, g := range grouped() {
		name := "holdfast-" + g.word + ".1"
		names = append(names, name)
		testkit.Golden(t, filepath.Join(manDir, name), []byte(groupPage(g)), *update, "make docs")
	}
	there, err := os.ReadDir(manDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range there {
		if !slices.Contains(names, f.Name()) {
			t.Errorf("docs/man/%s is of a command that there is not: remove it", f.Name())
		}
	}
}

// Those who read the pages have no complaint about them.
func TestTheManualPagesAreWellFormed(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join(manDir, "*.[15]"))
	if err != nil || len(pages) < 10 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	reference := regexp.MustCompile(`(?m)^\.(?:It )?Xr (\S+) (\d)`)
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range reference.FindAllStringSubmatch(string(text), -1) {
			if other := filepath.Join(manDir, m[1]+"."+m[2]); !slices.Contains(pages, other) {
				t.Errorf("%s refers to %s, which is not there", page, other)
			}
		}
	}
	for _, tool := range [][]string{{"mandoc", "-T", "lint", "-W", "style"}, {"groff", "-mandoc", "-Tutf8", "-ww", "-z"}} {
		t.Run(tool[0], func(t *testing.T) {
			if _, err := exec.LookPath(tool[0]); err != nil {
				t.Skipf("no %s here", tool[0])
			}
			for _, page := range pages {
				// mandoc ends with an error because it looks for the other pages among those that are installed.
				out, err := exec.CommandContext(t.Context(), tool[0], append(tool[1:], page)...).CombinedOutput()
				var failed *exec.ExitError
				if err != nil && !errors.As(err, &failed) {
					t.Fatal(err)
				}
				for line := range strings.Lines(string(out)) {
					if !strings.Contains(line, "referenced manual not found") {
						t.Errorf("%s: %s", tool[0], line)
					}
				}
			}
		})
	}
}

// Every example can be typed: it names a command, its flags and as many words as it takes.
func TestTheExamplesCanBeTyped(t *testing.T) {
	all := slices.Clone(firstSteps)
	for name, es := range examples {
		for _, e := range es {
			if !strings.Contains(e.line, "holdfast "+name) {
				t.Errorf("the example %q is not of %s", e.line, name)
			}
		}
		all = append(all, es...)
	}
	for _, e := range all {
		words := typed(strings.TrimPrefix(e.line, "source <("))
		c, rest, ok := find(words[1:])
		if !ok {
			t.Errorf("%s: there is no such command", e.line)
			continue
		}
		d := declarationOf(c)
		p := &program{cmd: c}
		if _, err := p.parse(d.fs, rest, d.least, d.most); err != nil {
			t.Errorf("%s: %v", e.line, err)
		}
	}
	for _, g := range grouped() {
		if len(g.commands) > 1 && groups[g.word] == "" {
			t.Errorf("nothing says what the commands of %s are for", g.word)
		}
	}
	known := regexp.MustCompile(`--[a-z-]+`)
	for _, c := range commands() {
		for _, name := range known.FindAllString(c.args, -1) {
			if flagsOf(c).Lookup(name[2:]) == nil {
				t.Errorf("usage of %s: there is no flag %s", c.name, name)
			}
		}
	}
}

// typed parts a line as a shell does, up to a pipe or a redirection.
func typed(line string) (words []string) {
	for _, m := range regexp.MustCompile(`'([^']*)'|([^ ]+)`).FindAllStringSubmatch(line, -1) {
		if m[2] == "|" || m[2] == ">" {
			break
		}
		words = append(words, m[1]+strings.TrimSuffix(m[2], ")"))
	}
	return words
}

type groupOf struct {
	word     string
	commands []command
}

func grouped() (gs []groupOf) {
	for _, c := range commands() {
		word, _, _ := strings.Cut(c.name, " ")
		if len(gs) == 0 || gs[len(gs)-1].word != word {
			gs = append(gs, groupOf{word: word})
		}
		gs[len(gs)-1].commands = append(gs[len(gs)-1].commands, c)
	}
	return gs
}

func programPage() string {
	p := mdoc.New("holdfast", 1, "IoT edge gateway")
	p.Section("SYNOPSIS")
	p.Linef(".Nm\n.Ar command\n.Op Ar arguments\n.Nm\n.Cm help\n.Op Ar command")
	p.Section("DESCRIPTION")
	p.Text(overview)
	p.Linef(".Pp\nThe commands are:\n.Bl -tag -width Ds")
	for _, g := range grouped() {
		p.Linef(".It Xr holdfast-%s 1", g.word)
		p.Text(about(g) + ".")
	}
	p.Linef(".El")
	facts(p, commands())
	p.Section("EXAMPLES")
	lines(p, firstSteps)
	p.Section("SEE ALSO")
	var others []string
	for _, g := range grouped() {
		others = append(others, "holdfast-"+g.word)
	}
	seeAlso(p, others)
	return p.String()
}

func groupPage(g groupOf) string {
	what := about(g)
	p := mdoc.New("holdfast-"+g.word, 1, strings.ToLower(what[:1])+what[1:])
	p.Section("SYNOPSIS")
	for _, c := range g.commands {
		p.Linef(".Nm holdfast %s", c.name)
		synopsis(p, c.args)
	}
	p.Section("DESCRIPTION")
	// What several commands say or take alike is told once, at the end.
	said, taken := map[string]int{}, map[string]int{}
	for _, c := range g.commands {
		for _, text := range paragraphs(c.help) {
			said[text]++
		}
		flagsOf(c).VisitAll(func(f *flag.Flag) { taken[f.Name+f.Usage+f.DefValue]++ })
	}
	common := func(f *flag.Flag) bool {
		return len(g.commands) > 1 && taken[f.Name+f.Usage+f.DefValue] == len(g.commands)
	}
	var shared []string
	var es []example
	for _, c := range g.commands {
		if len(g.commands) > 1 {
			p.Linef(".Ss holdfast %s", c.name)
		}
		p.Text(c.summary + ".")
		for _, text := range paragraphs(c.help) {
			switch {
			case said[text] == 1:
				paragraph(p, text)
			case !slices.Contains(shared, text):
				shared = append(shared, text)
			}
		}
		flagList(p, "", c, func(f *flag.Flag) bool { return !common(f) })
		es = append(es, examples[c.name]...)
	}
	if len(g.commands) > 1 {
		all := false
		flagsOf(g.commands[0]).VisitAll(func(f *flag.Flag) { all = all || common(f) })
		if all || len(shared) > 0 {
			p.Linef(".Ss What they have in common")
		}
		for i, text := range shared {
			if i == 0 {
				p.Text(text)
			} else {
				paragraph(p, text)
			}
		}
		intro := "All of them take:"
		if len(shared) > 0 {
			p.Linef(".Pp")
		}
		if all {
			flagList(p, intro, g.commands[0], common)
		}
	}
	facts(p, g.commands)
	if len(es) > 0 {
		p.Section("EXAMPLES")
		lines(p, es)
	}
	p.Section("SEE ALSO")
	seeAlso(p, []string{"holdfast"})
	return p.String()
}

func about(g groupOf) string {
	if len(g.commands) == 1 {
		return g.commands[0].summary
	}
	return groups[g.word]
}

// synopsis writes a usage line with a macro for each part.
func synopsis(p *mdoc.Page, args string) {
	for _, word := range strings.Fields(args) {
		var after []string
		for strings.HasPrefix(word, "[") || strings.HasPrefix(word, "(") {
			if word[0] == '[' {
				p.Linef(".Oo")
			} else {
				p.Linef(".Po")
			}
			word = word[1:]
		}
		word, dots := strings.CutSuffix(word, "...")
		for {
			if strings.HasSuffix(word, "]") && strings.Count(word, "]") > strings.Count(word, "[") {
				after = append(after, ".Oc")
			} else if strings.HasSuffix(word, ")") && strings.Count(word, ")") > strings.Count(word, "(") {
				after = append(after, ".Pc")
			} else {
				break
			}
			word = word[:len(word)-1]
		}
		switch {
		case word == "|":
			p.Linef("|")
		case word == "…":
			p.Linef(`\&...\&`)
		case strings.HasPrefix(word, "--"):
			p.Linef(".Fl %s", mdoc.Word(word[1:]))
		case strings.ToLower(word) == word && word != "flags":
			p.Linef(".Cm %s", mdoc.Word(word))
		default:
			p.Linef(".Ar %s", mdoc.Word(word))
		}
		for _, a := range after {
			p.Linef("%s", a)
		}
		if dots {
			p.Linef(`\&...\&`)
		}
	}
}

func paragraphs(help string) []string {
	if help = strings.Trim(help, "\n"); help == "" {
		return nil
	}
	return strings.Split(help, "\n\n")
}

var (
	numbered = regexp.MustCompile(`(?m)^\d+\. `)
	columns  = regexp.MustCompile(`(?m)^(\S.*?) {2,}(\S.*)$`)
	indented = regexp.MustCompile(`(?m)^ `)
)

func paragraph(p *mdoc.Page, text string) {
	switch {
	case numbered.MatchString(text):
		p.Linef(".Bl -enum")
		for _, item := range numbered.Split(text, -1)[1:] {
			p.Linef(".It")
			p.Text(item)
		}
		p.Linef(".El")
	case columns.MatchString(text):
		p.Linef(".Bl -tag -width Ds")
		for _, m := range columns.FindAllStringSubmatch(text, -1) {
			p.Linef(".It %s", mdoc.Word(m[1]))
			p.Text(m[2])
		}
		p.Linef(".El")
		if rest := strings.TrimSpace(columns.ReplaceAllString(text, "")); rest != "" {
			panic("half a table: " + rest)
		}
	case indented.MatchString(text):
		p.Literal(text)
	default:
		p.Linef(".Pp")
		p.Text(text)
	}
}

func flagList(p *mdoc.Page, intro string, c command, which func(*flag.Flag) bool) {
	any := false
	flagsOf(c).VisitAll(func(f *flag.Flag) {
		if !which(f) {
			return
		}
		if !any {
			if intro != "" {
				p.Text(intro)
			}
			p.Linef(".Bl -tag -width Ds")
			any = true
		}
		name, value, text := flagText(f)
		item := ".It Fl " + mdoc.Word(name[1:])
		if value != "" {
			item += " Ar " + mdoc.Word(value)
		}
		p.Linef("%s", item)
		p.Text(text)
	})
	if any {
		p.Linef(".El")
	}
}

// facts writes what is around the commands.
func facts(p *mdoc.Page, cs []command) {
	concerns := func(f fact) bool {
		return f.of == "" || slices.ContainsFunc(cs, func(c command) bool {
			word, _, _ := strings.Cut(c.name, " ")
			return word == f.of || flagsOf(c).Lookup(strings.TrimPrefix(f.of, "--")) != nil && strings.HasPrefix(f.of, "--")
		})
	}
	for _, s := range []struct {
		name, macro string
		facts       []fact
	}{{"ENVIRONMENT", "Ev", environment}, {"FILES", "Pa", files}, {"EXIT STATUS", "", exitCodes}} {
		first := true
		for _, f := range s.facts {
			if !concerns(f) {
				continue
			}
			if first {
				p.Section(s.name)
				p.Linef(".Bl -tag -width Ds")
				first = false
			}
			p.Linef("%s", strings.Join(strings.Fields(fmt.Sprintf(".It %s %s", s.macro, mdoc.Word(f.name))), " "))
			p.Text(strings.ToUpper(f.text[:1]) + f.text[1:] + ".")
		}
		if !first {
			p.Linef(".El")
		}
	}
}

func lines(p *mdoc.Page, es []example) {
	for i, e := range es {
		if i > 0 {
			p.Linef(".Pp")
		}
		p.Text(strings.ToUpper(e.does[:1]) + e.does[1:] + ":")
		p.Literal(e.line)
	}
}

func seeAlso(p *mdoc.Page, pages []string) {
	slices.Sort(pages)
	for _, name := range pages {
		p.Linef(".Xr %s 1 ,", name)
	}
	p.Linef(".Xr gateway.yaml 5")
}
