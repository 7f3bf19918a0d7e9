// Package mdoc writes manual pages: text that was written for a terminal or a comment, as mdoc(7) has it. The pages under docs/man are made
// with it by tests.
package mdoc

import (
	"fmt"
	"regexp"
	"strings"
)

// date stands in every page. It is not the clock's, so that pages change when what they say does.
const date = "November 26, 2026"

// Page is a manual page that grows from its top.
type Page struct{ b strings.Builder }

// New begins a page: its name, its section, and what it is in a few words.
func New(name string, section int, what string) *Page {
	p := &Page{}
	p.Linef(`.\" Made by "make docs" from the code. Change it there.`)
	p.Linef(".Dd %s", date)
	p.Linef(".Dt %s %d", strings.ToUpper(name), section)
	p.Linef(".Os Holdfast")
	p.Section("NAME")
	p.Linef(".Nm %s", name)
	p.Linef(".Nd %s", Escape(what))
	return p
}

// Linef writes a line as it is.
func (p *Page) Linef(format string, args ...any) { fmt.Fprintf(&p.b, format+"\n", args...) }

// Section begins one.
func (p *Page) Section(name string) { p.Linef(".Sh %s", name) }

// String gives the page.
func (p *Page) String() string { return p.b.String() }

const width = 76

// Text writes a paragraph without what parts it from the one before: a line a sentence, as mdoc wants it.
func (p *Page) Text(s string) {
	for _, sentence := range sentences(s) {
		line := ""
		for _, word := range strings.Fields(sentence) {
			if word = Escape(word); line != "" && len(line)+1+len(word) > width {
				p.Linef("%s", line)
				line = ""
			}
			if line == "" {
				line = guard(word)
			} else {
				line += " " + word
			}
		}
		p.Linef("%s", line)
	}
}

// Literal writes lines as they are, indented.
func (p *Page) Literal(s string) {
	p.Linef(".Bd -literal -offset indent")
	for line := range strings.SplitSeq(strings.Trim(s, "\n"), "\n") {
		p.Linef("%s", guard(Escape(line)))
	}
	p.Linef(".Ed")
}

// sentences parts a text where mdoc begins a new line.
func sentences(s string) []string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.Split(regexp.MustCompile(`([^. ][.?!][)"']?) ([^a-z0-9])`).ReplaceAllString(s, "$1\n$2"), "\n")
}

var minus = regexp.MustCompile(`(^|[^A-Za-z0-9])(-+)`)

// Escape has roff take every sign for itself.
func Escape(s string) string {
	s = strings.ReplaceAll(s, `\`, `\e`)
	s = minus.ReplaceAllStringFunc(s, func(m string) string { return strings.ReplaceAll(m, "-", `\-`) })
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '~':
			b.WriteString(`\(ti`)
		case r == '^':
			b.WriteString(`\(ha`)
		case r < 0x7f:
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\[u%04X]`, r)
		}
	}
	return b.String()
}

// guard keeps a line from being taken for a request.
func guard(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}

// Word is one argument of a macro, whatever it looks like.
func Word(s string) string {
	s = Escape(s)
	if strings.ContainsAny(s, " \"") {
		return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
	}
	if len(s) < 4 || strings.ContainsAny(s[:1], ".,:;()[]?!|") {
		return `\&` + s
	}
	return s
}
