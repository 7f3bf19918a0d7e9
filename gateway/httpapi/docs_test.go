package httpapi_test

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"holdfast/gateway/httpapi"
	"holdfast/spool"
)

func apiDoc(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestDocumentedErrorsAreTheErrors holds the table in docs/api.md against the codes that there are.
func TestDocumentedErrorsAreTheErrors(t *testing.T) {
	documented := map[string]int{}
	for _, line := range regexp.MustCompile(`(?m)^\| (\d{3}) \| ([^|]+) \|`).FindAllStringSubmatch(apiDoc(t), -1) {
		status, err := strconv.Atoi(line[1])
		if err != nil {
			t.Fatal(err)
		}
		for _, code := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(line[2], -1) {
			documented[code[1]] = status
		}
	}
	for code, status := range httpapi.Statuses() {
		if documented[code] != status {
			t.Errorf("docs/api.md says %d of %s, which is %d", documented[code], code, status)
		}
		delete(documented, code)
	}
	for code := range documented {
		t.Errorf("docs/api.md tells of %s, which there is not", code)
	}
}

// TestDocumentedExamplesWork runs every example of docs/api.md, in order, against one API.
func TestDocumentedExamplesWork(t *testing.T) {
	for _, program := range []string{"bash", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("no %s on this machine", program)
		}
	}
	r := newRig(t)
	r.queue.obedient = true
	r.lanes.records = []spool.Record{{Device: []byte("pump"), Topic: []byte("t"), Payload: []byte("x")}}
	address, _ := r.listen()
	// A refusal fails the example; a stream is watched for a second.
	const prelude = `set -euo pipefail
curl() {
	if [ "$1" = -N ]; then
		command curl --fail-with-body -sS --max-time 1 "$@" || [ $? = 28 ]
	else
		command curl --fail-with-body -sS --max-time 10 "$@"
	fi
}
`
	examples := regexp.MustCompile("(?s)\n```sh\n(.*?)\n```").FindAllStringSubmatch(apiDoc(t), -1)
	if len(examples) < 6 {
		t.Fatalf("%d examples", len(examples))
	}
	for _, e := range examples {
		cmd := exec.CommandContext(t.Context(), "bash", "-c", prelude+e[1])
		cmd.Dir = t.TempDir() // some write files
		cmd.Env = append(os.Environ(), "HOLDFAST=http://"+address, "TOKEN=admin", "no_proxy=*", "NO_PROXY=*")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s\n%s", err, e[1], out)
		}
		if strings.Contains(e[1], "wait=30s") && !strings.Contains(string(out), `"state": "SUCCEEDED"`) {
			t.Errorf("the command was not waited for:\n%s", out)
		}
	}
}
