package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Bounds of a file. A real one has a few kilobytes; anchors and aliases can make a small file name
// the same nodes again and again, so what is visited is bounded, not only what is read.
const (
	maxFileBytes = 1 << 20
	maxNodes     = 100_000
	maxEntries   = 4096 // of one list
	maxProblems  = 200  // told; more help nobody
	maxValue     = 4096 // bytes of one scalar
)

type place struct{ line, column int }

// decoder walks YAML nodes along Go types with yaml tags. The library's own decoder stops at the
// first wrong key of a mapping, knows no columns, and echoes values.
//
// The types stand for: string, bool, int a plain number, int64 a size in bytes, time.Duration a
// duration, a struct a mapping, a slice a list.
type decoder struct {
	file     string
	problems Problems
	places   map[string]place // by path of key: where its value stands
	nodes    int
	spent    bool                           // maxNodes or maxProblems reached; told once
	elements map[reflect.Type]reflect.Value // what an entry of a list holds before it is read
	homes    map[string][]string            // key -> the sections that have it
}

func newDecoder(file string) *decoder {
	d := &decoder{
		file:     file,
		places:   map[string]place{},
		elements: map[reflect.Type]reflect.Value{},
		homes:    map[string][]string{},
	}
	d.learn(reflect.TypeFor[Config](), "")
	return d
}

// learn notes which section each key belongs to, for the hint at a key in the wrong place.
func (d *decoder) learn(t reflect.Type, path string) {
	for _, f := range fieldsOf(t) {
		d.homes[f.key] = append(d.homes[f.key], path)
		ft, sub := f.typ, join(path, f.key)
		if ft.Kind() == reflect.Slice {
			ft, sub = ft.Elem(), sub+"[]"
		}
		if ft.Kind() == reflect.Struct {
			d.learn(ft, sub)
		}
	}
}

func (d *decoder) add(p Problem) {
	if d.spent {
		return
	}
	p.File = d.file
	d.problems = append(d.problems, p)
	if len(d.problems) >= maxProblems {
		d.spent = true
		d.problems = append(d.problems, Problem{
			File: d.file, Line: p.Line, Column: p.Column,
			Text: fmt.Sprintf("%d problems are enough: the rest is not shown", maxProblems),
		})
	}
}

func (d *decoder) errorAt(n *yaml.Node, path, format string, args ...any) {
	d.add(Problem{Line: n.Line, Column: n.Column, Key: path, Text: fmt.Sprintf(format, args...)})
}

// enter counts a node and tells whether there may be more.
func (d *decoder) enter(n *yaml.Node) bool {
	if d.spent {
		return false
	}
	if d.nodes++; d.nodes > maxNodes {
		d.add(Problem{Line: n.Line, Column: n.Column, Text: "the file is too large once its aliases are followed"})
		d.spent = true
		return false
	}
	return true
}

// value decodes n into v, which holds the default, and reports what does not fit.
func (d *decoder) value(n *yaml.Node, path string, v reflect.Value) {
	at := n
	for hops := 0; n.Kind == yaml.AliasNode; hops++ {
		if n.Alias == nil || hops > 8 {
			d.errorAt(at, path, "the alias leads nowhere")
			return
		}
		n = n.Alias
	}
	if !d.enter(at) {
		return
	}
	d.places[path] = place{at.Line, at.Column}
	if n.Style&yaml.TaggedStyle != 0 {
		d.errorAt(at, path, "YAML tags are not supported here: write the value alone")
		return
	}
	null := n.Kind == yaml.ScalarNode && n.Tag == "!!null"
	switch v.Kind() {
	case reflect.Struct:
		switch {
		case null: // a section whose keys are all commented out
		case n.Kind != yaml.MappingNode:
			d.errorAt(at, path, "is %s, has to be a section with the keys %s", kindName(n), keyList(v.Type()))
		default:
			d.mapping(n, path, v)
		}
	case reflect.Slice:
		switch {
		case null:
		case n.Kind != yaml.SequenceNode:
			d.errorAt(at, path, "is %s, has to be a list: one entry a line, each after a dash", kindName(n))
		default:
			d.list(n, path, v)
		}
	default:
		switch {
		case n.Kind != yaml.ScalarNode:
			d.errorAt(at, path, "is %s, has to be %s", kindName(n), typeName(v.Type()))
		case null:
			d.errorAt(at, path, "has no value: write %s, or remove the key for its default", typeName(v.Type()))
		case len(n.Value) > maxValue:
			d.errorAt(at, path, "is %d bytes long, at most %d are taken", len(n.Value), maxValue)
		default:
			d.scalar(n, at, path, v)
		}
	}
}

func (d *decoder) mapping(n *yaml.Node, path string, v reflect.Value) {
	fields := fieldsOf(v.Type())
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		if !d.enter(key) {
			return
		}
		if key.Kind != yaml.ScalarNode {
			d.errorAt(key, path, "a key has to be a plain word, not %s", kindName(key))
			continue
		}
		if key.Tag == "!!merge" {
			d.errorAt(key, path, "merge keys (<<) are not supported: write the keys out")
			continue
		}
		name := key.Value
		if line, ok := seen[name]; ok {
			d.errorAt(key, join(path, showKey(name)), "is given twice, first on line %d: remove one", line)
			continue
		}
		seen[name] = key.Line
		at := slices.IndexFunc(fields, func(f field) bool { return f.key == name })
		if at < 0 {
			d.errorAt(key, join(path, showKey(name)), "unknown key%s", d.hint(name, path, v.Type()))
			continue
		}
		d.value(val, join(path, name), v.Field(fields[at].index))
	}
}

func (d *decoder) list(n *yaml.Node, path string, v reflect.Value) {
	if len(n.Content) > maxEntries {
		d.errorAt(n, path, "has %d entries, at most %d are taken", len(n.Content), maxEntries)
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, e := range n.Content {
		if def, ok := d.elements[v.Type().Elem()]; ok {
			out.Index(i).Set(def)
		}
		d.value(e, path+"["+strconv.Itoa(i)+"]", out.Index(i))
	}
	v.Set(out)
}

func (d *decoder) scalar(n, at *yaml.Node, path string, v reflect.Value) {
	plain := n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		dur, err := parseDuration(n.Value)
		if err != nil {
			d.errorAt(at, path, "%s%v", show(path, n.Value), err)
			return
		}
		v.SetInt(int64(dur))
	case v.Kind() == reflect.Int64:
		size, err := parseSize(n.Value)
		if err != nil {
			d.errorAt(at, path, "%s%v", show(path, n.Value), err)
			return
		}
		v.SetInt(size)
	case v.Kind() == reflect.Int:
		num, err := strconv.ParseInt(n.Value, 10, 32)
		if err != nil || !plain {
			d.errorAt(at, path, "%shas to be a whole number without quotes, unit or sign", show(path, n.Value))
			return
		}
		v.SetInt(num)
	case v.Kind() == reflect.Bool:
		if !plain || n.Value != "true" && n.Value != "false" {
			d.errorAt(at, path, "%shas to be true or false, without quotes", show(path, n.Value))
			return
		}
		v.SetBool(n.Value == "true")
	case v.Kind() == reflect.String:
		if strings.ContainsFunc(n.Value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			d.errorAt(at, path, "has a line break or a control character: write it on one line")
			return
		}
		v.SetString(n.Value)
	default:
		panic("config: " + path + " has a type that no file can hold: " + v.Type().String())
	}
}

// hint leads from an unknown key to the one that was meant.
func (d *decoder) hint(name, path string, t reflect.Type) string {
	var keys []string
	for _, f := range fieldsOf(t) {
		keys = append(keys, f.key)
	}
	if near := Nearest(name, keys); near != "" {
		return fmt.Sprintf(": did you mean %q?", near)
	}
	if homes := d.homes[name]; len(homes) > 0 && len(homes) <= 3 && !slices.Contains(homes, path) {
		for i, h := range homes {
			if h == "" {
				h = "the top of the file"
			}
			homes[i] = h
		}
		return fmt.Sprintf(" here: it belongs to %s", strings.Join(homes, " or "))
	}
	return ": known here are " + strings.Join(keys, ", ")
}

type field struct {
	key   string
	index int
	typ   reflect.Type
}

// fieldsOf lists the fields of a struct that a file can set: those with a yaml tag.
func fieldsOf(t reflect.Type) []field {
	var fs []field
	for i := range t.NumField() {
		f := t.Field(i)
		key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if key != "" && key != "-" {
			fs = append(fs, field{key, i, f.Type})
		}
	}
	return fs
}

func keyList(t reflect.Type) string {
	var keys []string
	for _, f := range fieldsOf(t) {
		keys = append(keys, f.key)
	}
	return strings.Join(keys, ", ")
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	default:
		return "a single value"
	}
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration such as 30s"
	case t.Kind() == reflect.Int64:
		return "a size such as 512MiB"
	case t.Kind() == reflect.Int:
		return "a whole number"
	case t.Kind() == reflect.Bool:
		return "true or false"
	default:
		return "a text"
	}
}

// showKey gives an unknown key back only if it looks like one: a stray line may be anything.
func showKey(key string) string {
	if len(key) > 40 || key == "" {
		return "(key)"
	}
	for _, r := range key {
		if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_' || r == '-') {
			return "(key)"
		}
	}
	return key
}

// secretKeys may hold a secret by purpose or by the commonest of mistakes: the password where the
// path of its file should be, or in the middle of a URL. Their values are never repeated.
var secretKeys = []string{"password_file", "username", "url", "urls", "key"}

// show gives a wrong value back, quoted and followed by a space, or nothing if it had better not be seen.
func show(path, value string) string {
	key, _, _ := strings.Cut(path[strings.LastIndexByte(path, '.')+1:], "[")
	if slices.Contains(secretKeys, key) || len(value) > 64 || value == "" {
		return ""
	}
	return strconv.Quote(value) + " "
}

// Nearest gives the word that is a typing error away from name, or "".
func Nearest(name string, words []string) string {
	best, bestAt := "", max(1, len(name)/3)+1
	for _, w := range words {
		if n := distance(strings.ToLower(name), w); n < bestAt {
			best, bestAt = w, n
		}
	}
	return best
}

// distance is the number of letters to add, drop, change or swap with the next to get from a to b.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	before, row := []int(nil), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}
