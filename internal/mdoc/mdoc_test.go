package mdoc_test

import (
	"strings"
	"testing"

	"holdfast/internal/mdoc"
)

func TestTextIsTakenForText(t *testing.T) {
	p := mdoc.New("x", 1, "nothing")
	head := p.String()
	p.Text(`See --all, a-b and - or C:\temp. ` + "'quoted' words … and\n.dots come next. 1 is a number. e.g. this is one sentence.")
	want := `See \-\-all, a-b and \- or C:\etemp.
\&'quoted' words \[u2026] and .dots come next. 1 is a number. e.g. this is
one sentence.
`
	if got := strings.TrimPrefix(p.String(), head); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for in, want := range map[string]string{"Ar": `\&Ar`, "-config": `\-config`, "DIR|-": `DIR|\-`, "device ID": `"device ID"`, "[x]yz": `\&[x]yz`} {
		if got := mdoc.Word(in); got != want {
			t.Errorf("Word(%q) = %q, want %q", in, got, want)
		}
	}
}
