package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"holdfast/gateway/httpapi"
)

var completionCommand = command{
	name: "completion", args: "bash|zsh|fish",
	summary: "Print what makes a shell complete holdfast's commands", words: []string{"bash|zsh|fish"},
	help: `bash:  holdfast completion bash > ~/.local/share/bash-completion/completions/holdfast
zsh:   holdfast completion zsh > a folder of $fpath, as _holdfast
fish:  holdfast completion fish > ~/.config/fish/completions/holdfast.fish

Or for this shell only: source <(holdfast completion bash). Commands, flags and words are completed, and, where a gateway
answers within 300 ms, its devices, commands, lanes and tokens.`,
	run: func(_ context.Context, p *program, args []string) error {
		words, err := p.parse(p.flags(), args, 1, 1)
		if err != nil {
			return err
		}
		script, ok := map[string]string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[words[0]]
		if !ok {
			return usagef("there is completion for bash, zsh and fish")
		}
		fmt.Fprint(p.stdout, script)
		return nil
	},
}

// The scripts ask the program itself at each completion: holdfast __complete WORD..., the last word being the one that is
// completed, perhaps empty. It answers with a candidate a line, "word<TAB>what it is", and a last line ":files" or ":dirs" if
// names of files fit as well.
const (
	bashCompletion = `# Completion of holdfast for bash.
_holdfast() {
	local cur line files=
	COMPREPLY=()
	cur=${COMP_LINE:0:COMP_POINT}
	local words
	read -ra words <<<"$cur"
	[[ $cur == *[[:space:]] ]] && words+=('')
	((${#words[@]} > 1)) || return 0
	cur=${words[-1]}
	while IFS= read -r line; do
		case $line in
		:*) files=${line#:} ;;
		*) COMPREPLY+=("${line%%$'\t'*}") ;;
		esac
	done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
	case $files in
	files) while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$cur") ;;
	dirs) while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -d -- "$cur") ;;
	esac
	# A word with a colon in it is several words to readline.
	if [[ $cur == *:* && $COMP_WORDBREAKS == *:* ]]; then
		local i prefix=${cur%"${cur##*:}"}
		for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]=${COMPREPLY[i]#"$prefix"}; done
	fi
	[[ -n $files ]] && compopt -o filenames 2>/dev/null
	return 0
}
complete -F _holdfast holdfast
`
	zshCompletion = `#compdef holdfast
# Completion of holdfast for zsh.
_holdfast() {
	local line files=
	local -a plain
	while IFS= read -r line; do
		case $line in
		:*) files=${line#:} ;;
		*) plain+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}") ;;
		esac
	done < <("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)
	(( ${#plain} )) && _describe 'holdfast' plain
	case $files in
	files) _files ;;
	dirs) _files -/ ;;
	esac
}
if [ "$funcstack[1]" = "_holdfast" ]; then
	_holdfast "$@"
else
	compdef _holdfast holdfast
fi
`
	fishCompletion = `# Completion of holdfast for fish.
function __holdfast_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l current (commandline -ct)
    for line in ($words[1] __complete $words[2..-1] 2>/dev/null)
        switch $line
            case ':files'
                __fish_complete_path $current
            case ':dirs'
                __fish_complete_directories $current
            case '*'
                echo $line
        end
    end
end
complete -c holdfast -f -a '(__holdfast_complete)'
`
)

const completeWord = "__complete"

// complete gives the candidates for the last word.
func complete(ctx context.Context, words []string) []string {
	if len(words) == 0 {
		return nil
	}
	before, cur := words[:len(words)-1], words[len(words)-1]
	var out []string
	add := func(word, what string) {
		if strings.HasPrefix(word, cur) {
			out = append(out, word+"\t"+what)
		}
	}
	if len(before) > 0 && before[0] == "help" {
		before = before[1:]
	}
	c, rest, ok := find(before)
	if !ok {
		said := map[string]bool{}
		for _, c := range commands() {
			parts := strings.Fields(c.name)
			if len(before) >= len(parts) || !slices.Equal(parts[:len(before)], before) || said[parts[len(before)]] {
				continue
			}
			said[parts[len(before)]] = true
			what := c.summary
			if group := under(parts[0]); len(before) == 0 && len(group) > 1 {
				what = groupWords(group)
			}
			add(parts[len(before)], what)
		}
		if len(words) == 1 {
			add("help", "Tell more about a command")
		}
		return out
	}

	fs := flagsOf(c)
	positional, value := placeOf(fs, rest)
	switch {
	case value != nil: // of a flag
		return append(out, kindCandidates(ctx, flagKind(value), cur, fs, rest)...)
	case strings.HasPrefix(cur, "--") && strings.Contains(cur, "="):
		name, v, _ := strings.Cut(strings.TrimLeft(cur, "-"), "=")
		f := fs.Lookup(name)
		if f == nil {
			return nil
		}
		for _, line := range kindCandidates(ctx, flagKind(f), v, fs, rest) {
			if !strings.HasPrefix(line, ":") {
				out = append(out, "--"+name+"="+line)
			}
		}
		return out
	case strings.HasPrefix(cur, "-"):
		fs.VisitAll(func(f *flag.Flag) {
			_, usage := flag.UnquoteUsage(f)
			add("--"+f.Name, usage)
		})
		add("--help", "Tell how it is called")
		return out
	case positional < len(c.words):
		return append(out, kindCandidates(ctx, c.words[positional], cur, fs, rest)...)
	case c.args == "FILE" || c.args == "[FILE]": // config check, config print
		return append(out, ":files")
	}
	return out
}

func groupWords(group []command) string {
	var words []string
	for _, c := range group {
		_, second, _ := strings.Cut(c.name, " ")
		words = append(words, second)
	}
	return strings.Join(words, ", ")
}

// placeOf says what comes after args: the how manieth argument, or the value of a flag.
func placeOf(fs *flag.FlagSet, args []string) (positional int, value *flag.Flag) {
	for i := 0; i < len(args); i++ {
		a := args[i]
		if !strings.HasPrefix(a, "-") || a == "-" {
			positional++
			continue
		}
		name, _, given := strings.Cut(strings.TrimLeft(a, "-"), "=")
		f := fs.Lookup(name)
		if f == nil || given || boolean(f) {
			continue
		}
		if i == len(args)-1 {
			return positional, f
		}
		i++
	}
	return positional, nil
}

func boolean(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// flagKind tells what a flag takes by the name that its usage gives the value.
func flagKind(f *flag.Flag) string {
	name, _ := flag.UnquoteUsage(f)
	switch name {
	case "FILE":
		return "file"
	case "DIR":
		return "dir"
	case "DEVICE":
		return "device"
	case "LANE":
		return "lane"
	case "STATES":
		return "QUEUED|SENT|DELIVERED|IN_PROGRESS|SUCCEEDED|FAILED|REJECTED|EXPIRED|TIMED_OUT|CANCELED|SUPERSEDED|DEAD_LETTERED"
	case "ID":
		if f.Name == "command" {
			return "command"
		}
	}
	if strings.Contains(name, "|") {
		return name
	}
	return ""
}

// kindCandidates gives what of a kind begins with cur.
func kindCandidates(ctx context.Context, kind, cur string, fs *flag.FlagSet, args []string) (out []string) {
	add := func(word, what string) {
		if strings.HasPrefix(word, cur) && !strings.ContainsAny(word+what, "\n\t") {
			out = append(out, word+"\t"+what)
		}
	}
	switch kind {
	case "":
	case "file":
		return []string{":files"}
	case "dir":
		return []string{":dirs"}
	case "device", "command", "token", "lane":
		fromGateway(ctx, kind, cur, fs, args, add)
	default:
		for _, w := range strings.Split(kind, "|") {
			add(w, "")
		}
	}
	return out
}

const (
	completionPatience = 300 * time.Millisecond
	maxCandidates      = 200
)

// fromGateway asks the gateway that the line so far means. That none answers is no news: there is nothing to complete then.
func fromGateway(ctx context.Context, kind, cur string, fs *flag.FlagSet, args []string, add func(word, what string)) {
	api := apiFlags{config: valueIn(fs, args, "config"), address: valueIn(fs, args, "address"), tokenFile: valueIn(fs, args, "token-file")}
	c, err := api.client()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, completionPatience)
	defer cancel()
	q := url.Values{"limit": {fmt.Sprint(maxCandidates)}}
	switch kind {
	case "device":
		if cur != "" {
			q.Set("search", cur)
		}
		var page httpapi.DevicePage
		if c.call(ctx, http.MethodGet, "/api/v1/devices?"+q.Encode(), nil, &page) != nil {
			return
		}
		for i := range page.Devices {
			d := &page.Devices[i]
			add(d.ID, strings.TrimSpace(deviceState(d)+" "+shown(d.Name, 40)))
		}
	case "command":
		var page httpapi.CommandPage
		if c.call(ctx, http.MethodGet, "/api/v1/commands?"+q.Encode(), nil, &page) != nil {
			return
		}
		for i := range page.Commands {
			m := &page.Commands[i]
			add(m.ID, fmt.Sprintf("%s for %s, %s", m.Name, m.Device, m.State))
		}
	case "lane":
		var l httpapi.LaneList
		if c.call(ctx, http.MethodGet, "/api/v1/lanes", nil, &l) != nil {
			return
		}
		for i := range l.Lanes {
			add(l.Lanes[i].Name, count(int(l.Lanes[i].Kept.Messages), "message"))
		}
	case "token":
		var l httpapi.TokenList
		if c.call(ctx, http.MethodGet, "/api/v1/tokens", nil, &l) != nil {
			return
		}
		for _, t := range l.Tokens {
			add(t.Name, t.Role.String())
		}
	}
}

// valueIn gives what the line so far says for a flag.
func valueIn(fs *flag.FlagSet, args []string, name string) string {
	if fs.Lookup(name) == nil {
		return ""
	}
	for i, a := range args {
		if v, ok := strings.CutPrefix(strings.TrimLeft(a, "-"), name+"="); ok && strings.HasPrefix(a, "-") {
			return v
		}
		if (a == "--"+name || a == "-"+name) && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}
