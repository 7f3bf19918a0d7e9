package config_test

import (
	"flag"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"holdfast/gateway"
	"holdfast/internal/config"
	"holdfast/internal/mdoc"
	"holdfast/internal/testkit"
)

var update = flag.Bool("update", false, "write docs/configuration.md and docs/man/gateway.yaml.5")

// docs/configuration.md and gateway.yaml(5) are made of configs/gateway.yaml and of the code, so that nothing is said twice. What a key means stands in the comment
// above it, or in a line "#   key  meaning" of the comment above its section. Type and default are those of the types, what is allowed is asked of
// the checks, and what a reload takes of a gateway.
func TestTheConfigurationPage(t *testing.T) {
	d := reference(t)
	testkit.Golden(t, "../../docs/configuration.md", []byte(page(d)), *update, "make docs")
	testkit.Golden(t, "../../docs/man/gateway.yaml.5", []byte(manual(d)), *update, "make docs")
}

// What the comments say of defaults and bounds is what the code does.
func TestTheExampleTellsWhatIsAllowed(t *testing.T) {
	ref := reference(t)
	if len(ref.entries) < 60 {
		t.Fatalf("only %d keys: the walk over the types is broken", len(ref.entries))
	}
	for _, e := range ref.entries {
		if len(e.meaning) == 0 {
			t.Errorf("configs/gateway.yaml does not say what %s means: write a comment above it", e.Path)
		}
		if e.Section {
			continue
		}
		said := e.saidDefault
		if i := strings.IndexAny(said, ",;"); i >= 0 {
			said = said[:i]
		}
		switch {
		case e.required && said != "":
			t.Errorf("configs/gateway.yaml says the default of %s is %s, but it has to be there", e.Path, said)
		case e.required || e.Path == "gateway.id" || e.Path == "spool.lanes[].share": // of the machine, and of the other lanes
		case said == "":
			t.Errorf("configs/gateway.yaml does not say the default of %s", e.Path)
		case e.List && e.Default != "":
		case e.Default == "" && said != "none" && !strings.HasPrefix(said, "none ") && said != "0" && said != "all":
			t.Errorf("configs/gateway.yaml says the default of %s is %s, it has none", e.Path, said)
		case e.Default != "" && strings.Trim(said, `"`) != e.Default:
			t.Errorf("configs/gateway.yaml says the default of %s is %s, it is %s", e.Path, said, e.Default)
		}
		if hours(e.saidBounds) != hours(e.bounds) {
			t.Errorf("configs/gateway.yaml says %s is %q, it is %q", e.Path, e.saidBounds, e.bounds)
		}
		for _, word := range e.words {
			if !regexp.MustCompile(`(^|[^a-z_])` + word + `($|[^a-z_])`).MatchString(e.comment) {
				t.Errorf("configs/gateway.yaml does not say what %s is for %s", word, e.Path)
			}
		}
	}
}

// hours writes days as hours.
func hours(s string) string {
	return regexp.MustCompile(`\d+d\b`).ReplaceAllStringFunc(s, func(days string) string {
		d, err := config.ParseDuration(days)
		if err != nil {
			return days
		}
		return config.FormatDuration(d)
	})
}

// entry is a key as the page tells of it.
type entry struct {
	config.Key
	meaning     []block
	saidDefault string
	saidBounds  string   // 1 to 16, At least 1MiB
	bounds      string   // the same, of the checks
	words       []string // the values that there are
	form        string   // of what is neither within bounds nor one of some words
	required    bool
	reload      bool
	comment     string
}

// name is the path without the brackets of a list at its end.
func (e *entry) name() string { return strings.TrimSuffix(e.Path, "[]") }

func (e *entry) allowed() string {
	switch {
	case len(e.words) > 0:
		return strings.Join(e.words, ", ")
	case strings.HasPrefix(e.saidBounds, "At"):
		return "0, or a" + e.saidBounds[1:]
	case e.saidBounds != "":
		return e.saidBounds
	}
	return e.form
}

func (e *entry) defaultText() string {
	switch {
	case e.Section:
		return ""
	case e.required:
		return "has to be given"
	case e.List && e.Default != "":
		return "see below"
	}
	return strings.Trim(e.saidDefault, `"`)
}

func (e *entry) taken() string {
	switch {
	case e.Section:
		return ""
	case e.reload:
		return "reload"
	}
	return "restart"
}

// doc is all that there is to say.
type doc struct {
	head    []block // about the file
	entries []*entry
}

func reference(t *testing.T) doc {
	t.Helper()
	head, comments := commentsOf(t, example(t))
	d := doc{head: blocks(head, "")}
	takes := reloads(t)
	for _, k := range config.Keys() {
		e := &entry{Key: k, comment: strings.Join(comments[k.Path], "\n"), reload: takes[k.Path]}
		e.meaning = blocks(comments[k.Path], k.Path)
		e.ask(t)
		for i := range e.meaning {
			e.meaning[i].text = e.strip(e.meaning[i].text)
		}
		e.meaning = slices.DeleteFunc(e.meaning, func(b block) bool { return b.term == "" && b.text == "" })
		d.entries = append(d.entries, e)
	}
	return d
}

var (
	defaultSentence = regexp.MustCompile(`(?:^| )Default: ("[^"]*"|.+?)\.(?: |$)`)
	boundsSentence  = regexp.MustCompile(`(?:^| )(\d+[a-zA-Z]* to \d+[a-zA-Z]*|At least \d+[a-zA-Z]+)\.(?: |$)`)
)

// strip takes default and bounds out of a comment: they have places of their own.
func (e *entry) strip(text string) string {
	take := func(re *regexp.Regexp, into *string) {
		m := re.FindStringSubmatchIndex(text)
		if m == nil {
			return
		}
		*into = text[m[2]:m[3]]
		text = strings.TrimSpace(text[:m[0]] + " " + text[m[1]:])
	}
	take(defaultSentence, &e.saidDefault)
	take(boundsSentence, &e.saidBounds)
	return text
}

// ask finds out what the checks say to values that are wrong.
func (e *entry) ask(t *testing.T) {
	t.Helper()
	problem := func(path, file string) string {
		_, _, err := config.Parse("g.yaml", []byte(file))
		var ps config.Problems
		if !asProblems(err, &ps) {
			return ""
		}
		for _, p := range ps {
			if p.Key == path {
				return p.Text
			}
		}
		return ""
	}
	at := strings.ReplaceAll(e.Path, "[]", "[0]")
	tries := map[string][]string{
		"text": {`"?"`}, "list of texts": {`"?"`}, "whole number": {"2000000000", "-1"}, "size": {"1B"}, "duration": {"1us", "36500d"},
	}[e.Type]
	for _, value := range tries {
		said := problem(at, fileWith(e.Path, value))
		if m := regexp.MustCompile(`(?:one of|spool\.lanes has) ([^:;]*)$`).FindStringSubmatch(said); m != nil {
			if !strings.HasPrefix(said, "there is no lane") {
				e.words = strings.Split(m[1], ", ")
			}
		} else if m := regexp.MustCompile(`(?:has to be|is outside of) (\d+\w* to \d+[a-zA-Z]*)(?:[:;]|$)`).FindStringSubmatch(said); m != nil {
			e.bounds = m[1]
		} else if m := regexp.MustCompile(`(?:is less than|has to be at least) (\d+[a-zA-Z]+)`).FindStringSubmatch(said); m != nil {
			e.bounds = "At least " + m[1] // 0 is no limit
		} else if m := regexp.MustCompile(`has to be (1 to \d+ letters.*)$`).FindStringSubmatch(said); m != nil {
			e.form = m[1]
		} else if strings.Contains(said, "has to be host:port") {
			e.form = "host:port"
		}
	}
	if e.Type == "true or false" {
		e.words = nil
	}
	if i := strings.LastIndexByte(e.Path, '.'); i >= 0 && strings.HasSuffix(e.Path[:i], "[]") {
		said := problem(at, fileWith(e.Path[:i], "{}"))
		// A window is checked by the bridge, which tells what is wrong with "" and 0 in place of what is missing.
		e.required = strings.HasPrefix(said, "is missing") || said != "" && strings.HasPrefix(e.Path, "upstreams[].budget.windows[].")
	}
}

func asProblems(err error, ps *config.Problems) bool {
	p, ok := err.(config.Problems) //nolint:errorlint // Parse gives nothing else
	*ps = p
	return ok
}

// fileWith is a file with nothing but a value at a path.
func fileWith(path, value string) string {
	parts := strings.Split(path, ".")
	for i := len(parts) - 1; i >= 0; i-- {
		key, isList := strings.CutSuffix(parts[i], "[]")
		if isList {
			value = "[" + value + "]"
		}
		value = "{ " + key + ": " + value + " }"
	}
	return value
}

// reloads asks a gateway for each key whether a reload takes another value of it.
func reloads(t *testing.T) map[string]bool {
	t.Helper()
	dir := t.TempDir()
	base, _, err := config.Parse(dir+"/g.yaml", []byte(`
gateway: { id: g, data_dir: data }
listeners: [{ name: lan, protocol: mqtt, address: "127.0.0.1:0" }]
devices: { roles: [{ name: r, publish: ["a"], subscribe: ["b"] }] }
upstreams:
  - { name: u, url: "mqtts://127.0.0.1:1", username: u, lanes: [telemetry], budget: { bytes_per_second: 1KiB, windows: [{ cron: "0 1 * * *", for: 1h }] } }
http: { address: "" }
`))
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(t.Context(), gateway.Options{Config: base, Version: "test", Log: testkit.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	other := map[string]string{
		"upstreams[].url": "mqtts://127.0.0.1:2", "upstreams[].urls[]": "mqtts://127.0.0.1:2", "upstreams[].format": "passthrough",
		"upstreams[].lanes[]": "alarm", "routes[].match": "x/#", "routes[].lane": "bulk", "log.level": "debug",
		"upstreams[].budget.windows[].cron": "0 2 * * *", "devices.roles[].publish[]": "c", "devices.roles[].subscribe[]": "c",
		"spool.lanes[].when_full": "drop_oldest", "spool.lanes[].drain": "live_first",
	}
	takes := map[string]bool{}
	for _, k := range config.Keys() {
		if k.Section {
			continue
		}
		text := other[k.Path]
		if text == "" {
			text = "other"
		}
		next := config.Changed(base, k.Path, text)
		switch k.Path {
		case "upstreams[].urls[]":
			next.Upstreams[0].URL = ""
		case "upstreams[].tls.cert", "upstreams[].tls.key": // neither goes without the other
			next.Upstreams[0].TLS.Cert, next.Upstreams[0].TLS.Key = "other", "other"
		case "upstreams[].topic_prefix":
			next.Upstreams[0].Format = "passthrough"
		case "upstreams[].budget.windows[].for":
			next.Upstreams[0].Budget.Windows[0].For = base.Upstreams[0].Budget.Windows[0].For * 2
		}
		r, err := g.PlanReload(next)
		switch {
		case err != nil:
			t.Errorf("what a reload does about %s: %v", k.Path, err)
		case len(r.Changed)+len(r.Restart) == 0:
			t.Errorf("the gateway sees no difference in %s", k.Path)
		}
		takes[k.Path] = len(r.Restart) == 0
	}
	return takes
}

// commentsOf gives the comment at the top, and those of keys, by path, without their marks.
func commentsOf(t *testing.T, file []byte) (head []string, comments map[string][]string) {
	t.Helper()
	var root yaml.Node
	if err := yaml.Unmarshal(file, &root); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(file), "\n")
	comment := func(line int) (string, bool) { // numbered from 1
		s, ok := strings.CutPrefix(strings.TrimLeft(lines[line-1], " -"), "#")
		return strings.TrimPrefix(s, " "), ok
	}
	above := func(line int) (c []string) {
		for line--; line > 0; line-- {
			s, ok := comment(line)
			if !ok {
				break
			}
			c = append(c, s)
		}
		slices.Reverse(c)
		return c
	}
	for i := 1; ; i++ {
		s, ok := comment(i)
		if !ok {
			break
		}
		head = append(head, s)
	}
	comments = map[string][]string{}
	note := func(path string, c []string) {
		if len(c) == 0 {
			return
		}
		if comments[path] != nil && !slices.Equal(comments[path], c) {
			t.Errorf("configs/gateway.yaml says twice what %s means", path)
		}
		comments[path] = c
	}
	known := map[string]bool{}
	for _, k := range config.Keys() {
		known[k.Path] = true
	}
	proper := func(path string) string { // with the brackets of a list
		if known[path+"[]"] {
			return path + "[]"
		}
		return path
	}
	var walk func(n *yaml.Node, path string)
	walk = func(n *yaml.Node, path string) {
		switch n.Kind { //nolint:exhaustive // scalars are the ends; the example has no alias
		case yaml.DocumentNode, yaml.SequenceNode:
			for _, e := range n.Content {
				walk(e, path)
			}
		case yaml.MappingNode:
			for i := 0; i < len(n.Content); i += 2 {
				key := n.Content[i]
				sub := key.Value
				if path != "" {
					sub = path + "." + sub
				}
				sub = proper(sub)
				if before := lines[key.Line-1][:key.Column-1]; strings.Trim(before, " -") == "" {
					note(sub, above(key.Line))
				}
				walk(n.Content[i+1], sub)
			}
		}
	}
	walk(&root, "")
	for i := range lines { // url excludes urls, which stands there as a comment
		if s, ok := comment(i + 1); ok && strings.HasPrefix(s, "urls: [") {
			note("upstreams[].urls[]", above(i+1))
		}
	}
	// Rows about keys of a section that have no comment of their own.
	for _, k := range config.Keys() {
		dot := strings.LastIndexByte(k.Path, '.')
		if dot < 0 || comments[k.Path] != nil {
			continue
		}
		_, of := rows(comments[k.Path[:dot]], k.Path[:dot])
		if text := of[k.Path]; text != "" {
			comments[k.Path] = []string{text}
		}
	}
	return head, comments
}

// block is a paragraph, or what is said about a term.
type block struct {
	term string // "": a paragraph
	text string
}

var row = regexp.MustCompile(`^ {2,}(\S+(?: \S+)*?)(?: {2,}(\S.*))?$`)

// rows takes those lines out of a comment that tell of keys below a path.
func rows(comment []string, path string) (rest []string, of map[string]string) {
	known := map[string]bool{}
	for _, k := range config.Keys() {
		known[k.Path] = true
	}
	of = map[string]string{}
	key, indent := "", 0
	for _, line := range comment {
		if key != "" && strings.TrimSpace(line) != "" && len(line)-len(strings.TrimLeft(line, " ")) > indent {
			of[key] += " " + strings.TrimSpace(line)
			continue
		}
		key = ""
		if m := row.FindStringSubmatch(line); m != nil && m[2] != "" && path != "" {
			for _, k := range []string{path + "." + m[1], path + "." + m[1] + "[]"} {
				if known[k] {
					key, indent = k, len(line)-len(strings.TrimLeft(line, " "))
					of[k] = m[2]
				}
			}
		}
		if key == "" {
			rest = append(rest, line)
		}
	}
	return rest, of
}

// blocks reads a comment: paragraphs, lines that begin with "- ", and indented rows "term  text".
func blocks(comment []string, path string) (bs []block) {
	comment, _ = rows(comment, path)
	open, indent := false, 0 // whether the next line goes on with the last block
	for _, line := range comment {
		here := len(line) - len(strings.TrimLeft(line, " "))
		text := strings.TrimSpace(line)
		m := row.FindStringSubmatch(line)
		switch {
		case text == "":
			open = false
		case strings.HasPrefix(line, "- "):
			bs, open, indent = append(bs, block{"-", text[2:]}), true, 0
		case open && here > indent && bs[len(bs)-1].term != "":
			bs[len(bs)-1].text += " " + text
		case m != nil:
			bs, open, indent = append(bs, block{m[1], m[2]}), true, here
		case open && here == indent && bs[len(bs)-1].term == "":
			bs[len(bs)-1].text += " " + text
		default:
			bs, open, indent = append(bs, block{"", text}), true, here
		}
	}
	return bs
}

// manual writes docs/man/gateway.yaml.5.
func manual(d doc) string {
	p := mdoc.New("gateway.yaml", 5, "configuration of the Holdfast gateway")
	p.Section("DESCRIPTION")
	p.Text("The gateway has one configuration file, in YAML. configs/gateway.yaml in the sources is an example with every key in it.")
	items(p, d.head[1:])
	p.Linef(".Pp")
	p.Text(takenBy)
	p.Linef(".Bl -tag -width Ds")
	for _, e := range d.entries {
		p.Linef(".It Ic %s", mdoc.Word(e.name()))
		open := false
		for i, m := range e.meaning {
			if m.term == "" {
				if i > 0 {
					p.Linef(".Pp")
				}
				p.Text(m.text)
				open = true
			}
		}
		items(p, e.meaning)
		if e.Section {
			continue
		}
		facts := strings.ToUpper(e.Type[:1]) + e.Type[1:]
		if a := e.allowed(); a != "" {
			facts += ": " + a
		}
		facts += ". "
		switch def := e.defaultText(); {
		case e.required:
			facts += "It has to be given"
		case e.List && e.Default != "":
			facts += "Default: as below"
		default:
			facts += "Default: " + def
		}
		if open {
			p.Linef(".Pp")
		}
		p.Text(facts + ". Taken by a " + e.taken() + ".")
		if e.List && e.Default != "" {
			p.Literal(e.Default)
		}
	}
	p.Linef(".El")
	p.Section("FILES")
	p.Linef(".Bl -tag -width Ds\n.It Pa /etc/holdfast/gateway.yaml")
	p.Text("What the systemd unit names.")
	p.Linef(".El")
	p.Section("SEE ALSO")
	p.Linef(".Xr holdfast 1 ,\n.Xr holdfast-config 1 ,\n.Xr holdfast-run 1")
	return p.String()
}

// items writes those blocks that have a term.
func items(p *mdoc.Page, bs []block) {
	bs = slices.DeleteFunc(slices.Clone(bs), func(b block) bool { return b.term == "" })
	for i, b := range bs {
		switch {
		case i == 0 || (b.term == "-") != (bs[i-1].term == "-"):
			if i > 0 {
				p.Linef(".El")
			}
			if b.term == "-" {
				p.Linef(".Bl -bullet")
			} else {
				p.Linef(".Bl -tag -width Ds")
			}
		}
		if b.term == "-" {
			p.Linef(".It")
		} else {
			p.Linef(".It %s", mdoc.Word(b.term))
		}
		if b.text != "" {
			p.Text(b.text)
		}
	}
	if len(bs) > 0 {
		p.Linef(".El")
	}
}

const takenBy = `A changed value is taken by a reload (SIGHUP or POST /api/v1/reload) or only by a restart; "holdfast config diff" tells beforehand. ` +
	`[] stands for each entry of a list.`

// page writes docs/configuration.md.
func page(d doc) string {
	var b strings.Builder
	b.WriteString("<!-- Made by `make docs` from configs/gateway.yaml and the code. Change it there. -->\n\n# Configuration\n\n")
	write := func(bs []block) {
		last := ""
		for i, x := range bs {
			switch {
			case x.term == "":
				if i > 0 {
					b.WriteString("\n")
				}
				b.WriteString(markdown(x.text) + "\n")
			default:
				if i > 0 && last == "" {
					b.WriteString("\n")
				}
				b.WriteString("- ")
				if x.term != "-" {
					b.WriteString("`" + x.term + "`")
					if x.text != "" {
						b.WriteString(": ")
					}
				}
				b.WriteString(markdown(x.text) + "\n")
			}
			last = x.term
		}
	}
	b.WriteString("The gateway has one configuration file. [configs/gateway.yaml](../configs/gateway.yaml) is an example with every key in it.\n\n")
	write(d.head[1:])
	b.WriteString("\n" + markdown(takenBy) + "\n")
	for i, e := range d.entries {
		top, _, below := strings.Cut(e.name(), ".")
		if !below {
			fmt.Fprintf(&b, "\n## %s\n\n", strings.TrimSuffix(top, "[]"))
			write(e.meaning)
			b.WriteString("\n| key | type | default | allowed | taken by |\n| --- | --- | --- | --- | --- |\n")
			for _, s := range d.entries[i:] {
				if s != e && !strings.HasPrefix(s.Path, e.Path+".") {
					break
				}
				if !s.Section {
					fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", s.name(), s.Type, cell(s, s.defaultText()), cell(s, s.allowed()), s.taken())
				}
			}
			b.WriteString(defaults(e))
			continue
		}
		fmt.Fprintf(&b, "\n### %s\n\n", e.name())
		write(e.meaning)
		b.WriteString(defaults(e))
	}
	return b.String()
}

func defaults(e *entry) string {
	if !e.List || e.Default == "" {
		return ""
	}
	return "\nDefault:\n\n```yaml\n" + strings.TrimSuffix(e.name()[strings.LastIndexByte(e.name(), '.')+1:], "[]") + ":\n  " + strings.ReplaceAll(e.Default, "\n", "\n  ") + "\n```\n"
}

// cell writes values as code, and sentences as such.
func cell(e *entry, s string) string {
	switch {
	case s == "", s == "see below", s == "has to be given", strings.HasPrefix(s, "none"):
		return s
	case len(e.words) > 0 && strings.Contains(s, ", "):
		return "`" + strings.Join(e.words, "`, `") + "`"
	case !strings.Contains(s, " "):
		return "`" + s + "`"
	}
	return s
}

var (
	quotedCommand = regexp.MustCompile(`"(holdfast [^"]*|TZ=[^"]*)"`)
	literal       = regexp.MustCompile(`(^|[ (])((?:gw|cmd|data_dir)/[^ ,;)]*[^ ,;).:]|\$\.\.\.|[a-z]+_[a-z_]+)`)
)

// markdown has commands and names stand as code, and no sign mean anything.
func markdown(s string) string {
	s = quotedCommand.ReplaceAllString(s, "`$1`")
	parts := strings.Split(s, "`")
	for i := 0; i < len(parts); i += 2 {
		parts[i] = literal.ReplaceAllString(parts[i], "$1`$2`")
		parts[i] = strings.NewReplacer("<", "&lt;", "*", `\*`).Replace(parts[i])
	}
	return strings.Join(parts, "`")
}
