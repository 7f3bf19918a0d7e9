package config

import (
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Change is a key that two configurations disagree about. Values are as a file has them, on one line; "" where one has none.
type Change struct {
	Key  string // spool.lanes[telemetry].max_bytes
	From string
	To   string
}

// Diff lists what is different in b, in the order of the keys. What has a name is found by it: lanes, listeners, upstreams, roles. Secrets
// are files, so none is shown.
func Diff(a, b *Config) []Change {
	var d differ
	d.value("", reflect.ValueOf(a).Elem(), reflect.ValueOf(b).Elem())
	return d.changes
}

type differ struct{ changes []Change }

func (d *differ) add(key, from, to string) {
	if from != to {
		d.changes = append(d.changes, Change{key, from, to})
	}
}

func (d *differ) value(key string, a, b reflect.Value) {
	switch {
	case reflect.DeepEqual(a.Interface(), b.Interface()):
	case a.Kind() == reflect.Struct:
		for _, f := range fieldsOf(a.Type()) {
			d.value(join(key, f.key), a.Field(f.index), b.Field(f.index))
		}
	case a.Kind() == reflect.Slice && nameOf(a.Type().Elem()) >= 0:
		d.named(key, a, b)
	default:
		d.add(key, oneLine(a), oneLine(b))
	}
}

// named compares lists whose elements have names.
func (d *differ) named(key string, a, b reflect.Value) {
	before, after := names(a), names(b)
	element := func(v reflect.Value, in []string, name string) (reflect.Value, bool) {
		i := slices.Index(in, name)
		if i < 0 {
			return reflect.Value{}, false
		}
		return v.Index(i), true
	}
	all := slices.Clone(before)
	for _, n := range after {
		if !slices.Contains(all, n) {
			all = append(all, n)
		}
	}
	for _, n := range all {
		was, old := element(a, before, n)
		is, now := element(b, after, n)
		at := key + "[" + n + "]"
		switch {
		case old && now:
			d.value(at, was, is)
		case old:
			d.add(at, oneLine(was), "")
		default:
			d.add(at, "", oneLine(is))
		}
	}
	both := func(list, other []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(n string) bool { return !slices.Contains(other, n) })
	}
	if was, is := both(before, after), both(after, before); !slices.Equal(was, is) {
		d.add(key, "order "+strings.Join(was, ", "), "order "+strings.Join(is, ", "))
	}
}

// nameOf gives the index of the field that names an element; -1: there is none.
func nameOf(t reflect.Type) int {
	if t.Kind() != reflect.Struct {
		return -1
	}
	for _, f := range fieldsOf(t) {
		if f.key == "name" {
			return f.index
		}
	}
	return -1
}

func names(v reflect.Value) []string {
	at := nameOf(v.Type().Elem())
	list := make([]string, v.Len())
	for i := range list {
		list[i] = v.Index(i).Field(at).String()
	}
	return list
}

// oneLine writes a value as YAML on one line.
func oneLine(v reflect.Value) string {
	if v.Kind() == reflect.Slice && v.IsNil() {
		return ""
	}
	return nodeLine(node(v))
}

func nodeLine(n *yaml.Node) string {
	flow(n)
	b, err := yaml.Marshal(n)
	if err != nil {
		return err.Error() // the value was read from YAML
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

func flow(n *yaml.Node) {
	if n.Kind == yaml.MappingNode || n.Kind == yaml.SequenceNode {
		n.Style = yaml.FlowStyle
	}
	for _, c := range n.Content {
		flow(c)
	}
}
