package main

import (
	"context"
	"flag"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/devices"
	"holdfast/gateway/httpapi"
	"holdfast/internal/testkit"
)

// Every command tells its flags without doing anything.
func TestFlagsAreToldWithoutRunning(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, c := range commands() {
		fs := flagsOf(c)
		if fs.Name() != c.name {
			t.Errorf("%s has the flags of %q", c.name, fs.Name())
		}
		fs.VisitAll(func(f *flag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s says nothing", c.name, f.Name)
			}
		})
	}
	if left, err := os.ReadDir("."); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if flagsOf(deviceRotateCommand).Lookup("overlap").DefValue != "24h" {
		t.Error("the default of --overlap is not told")
	}
}

func candidates(lines []string) string {
	words := make([]string, len(lines))
	for i, l := range lines {
		words[i], _, _ = strings.Cut(l, "\t")
	}
	return strings.Join(words, " ")
}

func TestCompletion(t *testing.T) {
	f := newFakeGateway(t)
	f.addDevice("pump-1", connected)
	f.addDevice("pump-2", nil)
	f.addDevice("valve", nil)
	f.commands = []*httpapi.Command{{Command: devices.Command{ID: "c1", Name: "open", Device: "valve", State: devices.Queued}}}
	f.tokens = []httpapi.Token{{Name: "grafana", Role: httpapi.Viewer}}
	gw := []string{"--address", f.address(), "--token-file", f.tokenFile(t)}
	at := func(words ...string) []string {
		return append(append(words[:len(words)-1:len(words)-1], gw...), words[len(words)-1])
	}
	for _, tc := range []struct {
		words []string
		want  string
	}{
		{[]string{"com"}, "command completion"},
		{[]string{"device", ""}, "add list show enable disable remove rotate import"},
		{[]string{"device", "r"}, "remove rotate"},
		{[]string{"help", "cert", "r"}, "rotate revoke"},
		{[]string{"device", "rotate", "--o"}, "--overlap"},
		{[]string{"device", "import", "--existing", ""}, "skip fail update"},
		{[]string{"device", "import", "--existing=s"}, "--existing=skip"},
		{[]string{"device", "import", ""}, ":files"},
		{[]string{"device", "import", "--secrets", ""}, ":files"},
		{[]string{"config", "check", ""}, ":files"},
		{[]string{"cert", "list", "--dir", ""}, ":dirs"},
		{[]string{"cert", "rotate", "d"}, "device"},
		{[]string{"completion", ""}, "bash zsh fish"},
		{[]string{"token", "add", "x", "--role", "o"}, "operator"},
		{[]string{"command", "list", "--state", "QU"}, "QUEUED"},
		{[]string{"nonsense", ""}, ""},
		{[]string{"version", ""}, ""},
		{at("device", "show", ""), "pump-1 pump-2 valve"},
		{at("device", "show", "pump"), "pump-1 pump-2"},
		{at("device", "show", "pump-1", ""), ""},
		{at("command", "send", "v"), "valve"},
		{at("command", "send", "--urgent", "v"), "valve"},
		{at("command", "send", "--ttl", "v"), ""},
		{at("command", "show", ""), "c1"},
		{[]string{"command", "watch", gw[0], gw[1], gw[2], gw[3], "--device", "p"}, "pump-1 pump-2"},
		{[]string{"command", "watch", gw[0], gw[1], gw[2], gw[3], "--command", ""}, "c1"},
		{at("token", "remove", ""), "grafana"},
	} {
		if got := candidates(complete(t.Context(), tc.words)); got != tc.want {
			t.Errorf("%q: %s, want %s", tc.words, got, tc.want)
		}
	}
	if got := complete(t.Context(), []string{"device", "sh"}); len(got) != 1 || got[0] != "show\tShow all that is known about a device" {
		t.Errorf("with what it is: %q", got)
	}
	// A gateway that does not answer in time costs no more than that time.
	hold := make(chan struct{})
	f.spoil = func(http.ResponseWriter, *http.Request) bool { <-hold; return true }
	defer close(hold)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if got := complete(ctx, at("device", "show", "")); len(got) != 0 || ctx.Err() != nil {
		t.Errorf("a gateway that hangs: %q, %v", got, ctx.Err())
	}
}

// holdfastOnPath puts this test binary there under the program's name.
func holdfastOnPath(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(exe, filepath.Join(dir, "holdfast")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTheScriptForBash(t *testing.T) {
	if testkit.Race {
		t.Skip("bash asks a hundred times, and each answer starts the program anew: make test does that")
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash here")
	}
	f := newFakeGateway(t)
	f.addDevice("pump-1", nil)
	f.addDevice("pump:2", nil)
	f.addDevice("valve", nil)
	dir := holdfastOnPath(t)
	script := filepath.Join(dir, "completion.bash")
	if got := runIt(t.Context(), "completion", "bash"); got.code != 0 || os.WriteFile(script, []byte(got.stdout), 0o600) != nil {
		t.Fatalf("%+v", got)
	}
	if out, err := exec.CommandContext(t.Context(), bash, "-n", script).CombinedOutput(); err != nil {
		t.Fatalf("bash -n: %v\n%s", err, out)
	}
	if err := errorsOf(os.Mkdir(filepath.Join(dir, "work"), 0o700), os.WriteFile(filepath.Join(dir, "work", "gw.yaml"), nil, 0o600),
		os.Mkdir(filepath.Join(dir, "work", "sub"), 0o700)); err != nil {
		t.Fatal(err)
	}
	gw := " --address " + f.address() + " --token-file " + f.tokenFile(t) + " "
	for line, want := range map[string]string{
		"holdfast dev":                              "device",
		"holdfast device sh":                        "show",
		"holdfast device rotate --over":             "--overlap",
		"holdfast config check ":                    "gw.yaml sub",
		"holdfast cert list --dir ":                 "sub",
		"holdfast device show" + gw:                 "pump-1 pump:2 valve",
		"holdfast device show" + gw + "pump:":       "2",
		"holdfast device import --existing ":        "fail skip update",
		"holdfast command send" + gw + "valve open": "",
	} {
		// As readline does it, in a shell of its own.
		cmd := exec.CommandContext(t.Context(), bash, "--norc", "-c", `source "$1"; cd "$2"
			COMP_LINE=$3 COMP_POINT=${#3} COMP_WORDS=($3) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
			[[ $3 == *' ' ]] && { COMP_WORDS+=(''); ((++COMP_CWORD)); }
			_holdfast holdfast "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
			printf '%s\n' "${COMPREPLY[@]}" | sort`, "bash", script, filepath.Join(dir, "work"), line)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "LC_ALL=C")
		out, err := cmd.Output()
		if got := strings.Join(strings.Fields(string(out)), " "); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", line, got, err, want)
		}
	}
	// It is bound to the program's name, and compgen of the same shell finds it.
	cmd := exec.CommandContext(t.Context(), bash, "--norc", "-c", `source "$1"; complete -p holdfast; compgen -A function _holdfast`, "bash", script)
	if out, err := cmd.Output(); err != nil || string(out) != "complete -F _holdfast holdfast\n_holdfast\n" {
		t.Errorf("%s, %v", out, err)
	}
}

func errorsOf(errs ...error) error {
	if i := slices.IndexFunc(errs, func(e error) bool { return e != nil }); i >= 0 {
		return errs[i]
	}
	return nil
}

func TestTheScriptsForOtherShells(t *testing.T) {
	for _, shell := range []string{"zsh", "fish"} {
		got := runIt(t.Context(), "completion", shell)
		if got.code != 0 || !strings.Contains(got.stdout, "__complete") {
			t.Errorf("%s: %+v", shell, got)
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("no %s here: its script is not checked by it", shell)
			continue
		}
		file := importFile(t, "script", got.stdout)
		if out, err := exec.CommandContext(t.Context(), path, "-n", file).CombinedOutput(); err != nil {
			t.Errorf("%s -n: %v\n%s", shell, err, out)
		}
	}
	if got := runIt(t.Context(), "completion", "tcsh"); got.code != 2 || !strings.Contains(got.stderr, "bash, zsh and fish") {
		t.Errorf("%+v", got)
	}
}
