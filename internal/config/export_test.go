package config

import (
	"reflect"
)

// Seams for the tests.

func Covers(a, b string) bool { return covers(a, b) }

// Keys lists every key that a file can have, as paths with [] for the entries of a list.
func Keys() []string {
	var keys []string
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for _, f := range fieldsOf(t) {
			sub, ft := join(path, f.key), f.typ
			if ft.Kind() == reflect.Slice {
				ft, sub = ft.Elem(), sub+"[]"
			}
			keys = append(keys, sub)
			if ft.Kind() == reflect.Struct {
				walk(ft, sub)
			}
		}
	}
	walk(reflect.TypeFor[Config](), "")
	return keys
}

// KeyType is a key and what it takes; Type "": a section.
type KeyType struct{ Path, Type string }

// KeyTypes is Keys with what each takes.
func KeyTypes() []KeyType {
	var keys []KeyType
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for _, f := range fieldsOf(t) {
			sub, ft, list := join(path, f.key), f.typ, ""
			if ft.Kind() == reflect.Slice {
				ft, sub, list = ft.Elem(), sub+"[]", "each "
			}
			if ft.Kind() == reflect.Struct {
				keys = append(keys, KeyType{Path: sub})
				walk(ft, sub)
				continue
			}
			keys = append(keys, KeyType{sub, list + typeName(ft)})
		}
	}
	walk(reflect.TypeFor[Config](), "")
	return keys
}
