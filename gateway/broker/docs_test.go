package broker_test

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// Each test that docs/mqtt.md names exists, and each test here is named there.
func TestDocsNameTheTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/mqtt.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllSubmatch(text, -1) {
		named[string(m[1])] = true
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{"TestMain": true, "TestDocsNameTheTests": true}
	for _, f := range files {
		src, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9]+)\(`).FindAllSubmatch(src, -1) {
			name := string(m[1])
			if !named[name] && !there[name] {
				t.Errorf("docs/mqtt.md does not name %s", name)
			}
			there[name] = true
		}
	}
	for name := range named {
		if !there[name] {
			t.Errorf("docs/mqtt.md names %s, which is not there", name)
		}
	}
}
