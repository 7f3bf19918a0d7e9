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
