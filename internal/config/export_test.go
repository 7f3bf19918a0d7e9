package config

import (
	"reflect"
	"slices"
	"strings"
	"time"
)

// Seams for the tests.

func Covers(a, b string) bool { return covers(a, b) }

// Key is one that a file can have.
type Key struct {
	Path    string // with [] for the entries of a list
	Type    string
	Default string // as a file has it; "": nothing
	List    bool   // of sections
	Section bool
}

// Keys lists every key that a file can have, in the order of the types.
func Keys() []Key {
	c, _ := decode("keys", nil)
	var keys []Key
	var walk func(v reflect.Value, path string)
	walk = func(v reflect.Value, path string) {
		for _, f := range fieldsOf(v.Type()) {
			fv, k := v.Field(f.index), Key{Path: join(path, f.key)}
			in := fv
			if f.typ.Kind() == reflect.Slice {
				k.Path += "[]"
				k.List = f.typ.Elem().Kind() == reflect.Struct
				in = reflect.Zero(f.typ.Elem())
				if def, ok := entries()[f.typ.Elem()]; ok {
					in = def
				}
			}
			k.Section = !k.List && in.Kind() == reflect.Struct
			k.Type = kind(f.typ)
			switch {
			case k.List && fv.Len() > 0:
				k.Default = oneBelowTheOther(fv)
			case !k.Section && !fv.IsZero() && !(fv.Kind() == reflect.Slice && fv.Len() == 0) || fv.Kind() == reflect.Bool:
				k.Default = strings.Trim(oneLine(fv), `"`)
			}
			keys = append(keys, k)
			if in.Kind() == reflect.Struct {
				walk(in, k.Path)
			}
		}
	}
	walk(reflect.ValueOf(c).Elem(), "")
	return keys
}

// oneBelowTheOther writes the entries of a list as a file may have them, without the keys that are as they would be anyway.
func oneBelowTheOther(list reflect.Value) string {
	lines := make([]string, list.Len())
	for i := range lines {
		v := list.Index(i)
		n := node(v)
		def, ok := entries()[v.Type()]
		if !ok {
			def = reflect.Zero(v.Type())
		}
		kept := n.Content[:0]
		for i := 0; i < len(n.Content); i += 2 {
			at := slices.IndexFunc(fieldsOf(v.Type()), func(f field) bool { return f.key == n.Content[i].Value })
			if f := fieldsOf(v.Type())[at]; !reflect.DeepEqual(v.Field(f.index).Interface(), def.Field(f.index).Interface()) {
				kept = append(kept, n.Content[i], n.Content[i+1])
			}
		}
		n.Content = kept
		lines[i] = "- " + nodeLine(n)
	}
	return strings.Join(lines, "\n")
}

func kind(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t.Kind() == reflect.Int64:
		return "size"
	case t.Kind() == reflect.Int:
		return "whole number"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Struct:
		return "section"
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		return "list of sections"
	case t.Kind() == reflect.Slice:
		return "list of texts"
	default:
		return "text"
	}
}

// Changed gives c with another value at the key, or at that of the first entry where lists are on the way. Text is what a text becomes.
func Changed(c *Config, path, text string) *Config {
	n := *c
	change(reflect.ValueOf(&n).Elem(), strings.Split(path, "."), text)
	return &n
}

func change(v reflect.Value, path []string, text string) {
	if len(path) > 0 {
		key, isList := strings.CutSuffix(path[0], "[]")
		for _, f := range fieldsOf(v.Type()) {
			if f.key != key {
				continue
			}
			fv := v.Field(f.index)
			if isList && (len(path) > 1 || fv.Type().Elem().Kind() == reflect.Struct) {
				list := reflect.MakeSlice(fv.Type(), fv.Len(), fv.Len())
				reflect.Copy(list, fv)
				fv.Set(list)
				if len(path) > 1 {
					fv = fv.Index(0)
				}
			}
			change(fv, path[1:], text)
			return
		}
		panic("no key " + key)
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int:
		v.SetInt(v.Int() + 1)
	case reflect.Int64:
		v.SetInt(v.Int() + 1<<40) // a size, or twenty minutes
	case reflect.String:
		v.SetString(text)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.String {
			v.Set(reflect.ValueOf([]string{text}))
			return
		}
		e := reflect.New(v.Type().Elem()).Elem()
		e.Set(v.Index(0))
		if at := nameOf(e.Type()); at >= 0 {
			e.Field(at).SetString(text)
		}
		v.Set(reflect.Append(v, e))
	default:
		panic("a section has no value")
	}
}
