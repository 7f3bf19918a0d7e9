package main

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var updateMan = flag.Bool("update", false, "write docs/man anew")

const manDir = "../../docs/man"

// TestManPagesAreOfTheCommandLine makes docs/man of what the commands declare: a page for each first word, and one for all. A page that is
// not what this makes is an error: make docs.
func TestManPagesAreOfTheCommandLine(t *testing.T) {
	pages := makeManPages()
	names, err := filepath.Glob(manDir + "/*.1")
	if err != nil {
		t.Fatal(err)
	}
	if *updateMan {
		if err := os.MkdirAll(manDir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if err := os.Remove(n); err != nil {
				t.Fatal(err)
			}
		}
		for name, page := range pages {
			if err := os.WriteFile(filepath.Join(manDir, name), page, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	for _, n := range names {
		if pages[filepath.Base(n)] == nil {
			t.Errorf("%s is of no command: make docs", n)
		}
	}
	for name, page := range pages {
		if there, err := os.ReadFile(filepath.Join(manDir, name)); err != nil || !bytes.Equal(there, page) {
			t.Errorf("docs/man/%s is not what the commands declare (%v): make docs", name, err)
		}
	}
}

// TestManPagesAreRoff has groff read them, where there is one.
func TestManPagesAreRoff(t *testing.T) {
	groff, err := exec.LookPath("groff")
	if err != nil {
		t.Skip("no groff")
	}
	for name, page := range makeManPages() {
		cmd := exec.CommandContext(t.Context(), groff, "-man", "-Tutf8", "-ww", "-z")
		cmd.Stdin = bytes.NewReader(page)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

func makeManPages() map[string][]byte {
	groups := map[string][]command{}
	for _, c := range commands() {
		first, _, _ := strings.Cut(c.name, " ")
		groups[first] = append(groups[first], c)
	}
	pages := map[string][]byte{}
	for first, cs := range groups {
		pages["holdfast-"+first+".1"] = manPage(first, cs)
	}
	var b bytes.Buffer
	manHead(&b, "holdfast", "IoT edge gateway")
	b.WriteString(".SH SYNOPSIS\n.B holdfast\n.I command\n[\\fIarguments\\fR]\n.SH DESCRIPTION\n")
	b.WriteString(roff("Devices publish to its MQTT broker; every message is on disk before it is acknowledged, and leaves the disk when the upstream has acknowledged it. " +
		"Commands from the cloud wait in a durable queue and go down when their device is there.\n"))
	b.WriteString(".SH COMMANDS\n")
	for _, c := range commands() {
		first, _, _ := strings.Cut(c.name, " ")
		fmt.Fprintf(&b, ".TP\n.B %s\n%s.\nSee\n.BR holdfast\\-%s (1).\n", roff("holdfast "+c.name), roff(c.summary), roff(first))
	}
	manTail(&b, slices.Sorted(maps.Keys(groups)))
	pages["holdfast.1"] = b.Bytes()
	return pages
}

func manHead(b *bytes.Buffer, name, summary string) {
	fmt.Fprintf(b, ".\\\" Made of the command line by make docs: do not edit.\n.TH %s 1 \"\" Holdfast\n.SH NAME\n%s \\- %s\n", strings.ToUpper(roff(name)), roff(name), roff(summary))
}

func manTail(b *bytes.Buffer, others []string) {
	b.WriteString(".SH EXIT STATUS\n.TP\n.B 0\ndone\n.TP\n.B 1\nfailed\n.TP\n.B 2\nwrong usage or configuration: trying again changes nothing\n")
	b.WriteString(".SH FILES\n.TP\n.I /etc/holdfast/gateway.yaml\nthe configuration of the Debian package's gateway\n.TP\n.I /var/lib/holdfast\nits data; admin.token in it is what the commands show that ask the gateway\n")
	b.WriteString(".SH ENVIRONMENT\n.TP\n.B HOLDFAST_TOKEN\nthe token to show, instead of that of the data folder\n.SH SEE ALSO\n")
	for i, o := range others {
		end := ","
		if i == len(others)-1 {
			end = ""
		}
		fmt.Fprintf(b, ".BR holdfast\\-%s (1)%s\n", roff(o), end)
	}
	b.WriteString(".PP\nThe papers in /usr/share/doc/holdfast/docs, above all operations.md and configuration.md.\n")
}

func manPage(first string, cs []command) []byte {
	var b bytes.Buffer
	summary := cs[0].summary
	if len(cs) > 1 {
		var words []string
		for _, c := range cs {
			_, second, _ := strings.Cut(c.name, " ")
			words = append(words, second)
		}
		summary = strings.Join(words, ", ")
	}
	manHead(&b, "holdfast-"+first, summary)
	b.WriteString(".SH SYNOPSIS\n.nf\n")
	for _, c := range cs {
		fmt.Fprintf(&b, "%s\n", roff("holdfast "+usageLine(c)))
	}
	b.WriteString(".fi\n.SH DESCRIPTION\n")
	for i, c := range cs {
		if len(cs) > 1 {
			fmt.Fprintf(&b, ".SS \"%s\"\n", roff("holdfast "+c.name))
		}
		fmt.Fprintf(&b, "%s.\n", roff(c.summary))
		if help := strings.TrimSpace(c.help); help != "" {
			fmt.Fprintf(&b, ".PP\n.nf\n%s\n.fi\n", roff(help))
		}
		flagsOf(cs[i]).VisitAll(func(f *flag.Flag) {
			value, text := flag.UnquoteUsage(f)
			fmt.Fprintf(&b, ".TP\n.B %s", roff("--"+f.Name))
			if value != "" {
				fmt.Fprintf(&b, " %s", roff(value))
			}
			fmt.Fprintf(&b, "\n%s", roff(text))
			if d := f.DefValue; d != "" && d != "false" && d != "0" && d != "0s" {
				fmt.Fprintf(&b, " (default %s)", roff(d))
			}
			b.WriteString("\n")
		})
	}
	manTail(&b, []string{first})
	page := bytes.Replace(b.Bytes(), fmt.Appendf(nil, ".SH SEE ALSO\n.BR holdfast\\-%s (1)\n", roff(first)), []byte(".SH SEE ALSO\n.BR holdfast (1)\n"), 1)
	return page
}

// roff writes text so that nothing in it is a request.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "^", `\(ha`, "~", `\(ti`, "`", `\(ga`).Replace(s)
	var b strings.Builder
	for _, r := range s {
		if r > 126 {
			fmt.Fprintf(&b, `\[u%04X]`, r)
		} else {
			b.WriteRune(r)
		}
	}
	lines := strings.Split(b.String(), "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			lines[i] = `\&` + l
		}
	}
	return strings.Join(lines, "\n")
}
