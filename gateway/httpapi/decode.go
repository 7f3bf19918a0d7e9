package httpapi

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// decodeStrict reads one JSON object into v, a pointer to a struct. encoding/json alone takes doubled names, names in other
// letters, null anywhere and bytes that are not UTF-8, and does not say where an unknown name stands. A text that is nested
// deeper than the type is refused where it becomes so.
func decodeStrict(b []byte, v any) error {
	if len(bytes.TrimSpace(b)) == 0 {
		return failf(codeBadBody, "body is empty: send a JSON object")
	}
	if !utf8.Valid(b) {
		return failf(codeBadBody, "body is not UTF-8")
	}
	w := walker{dec: json.NewDecoder(bytes.NewReader(b))}
	w.dec.UseNumber()
	if err := w.value(reflect.TypeOf(v).Elem()); err != nil {
		return w.failure(err, len(b))
	}
	if _, err := w.dec.Token(); !errors.Is(err, io.EOF) {
		return failf(codeBadBody, "body goes on after its JSON object, at byte %d", w.dec.InputOffset())
	}
	if err := json.Unmarshal(b, v); err != nil {
		return failf(codeBadBody, "body: %v", err) // a value that its type refuses
	}
	return nil
}

// walker holds a JSON text against a Go type.
type walker struct {
	dec  *json.Decoder
	path []string
}

// place is what is wrong with a value; the path to it is told, too.
type place string

func (p place) Error() string { return string(p) }

func (w *walker) failure(err error, size int) error {
	where := strings.Join(w.path, ".")
	var p place
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &p) && where == "":
		return failf(codeBadBody, "body: %s", p)
	case errors.As(err, &p):
		return failf(codeBadBody, "%.200s: %s", where, p)
	case errors.As(err, &syntax):
		return failf(codeBadBody, "body is not JSON: byte %d: %v", syntax.Offset, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return failf(codeBadBody, "body is not JSON: it ends too early, after %d bytes", size)
	}
	return failf(codeBadBody, "body is not JSON: %v", err)
}

var textType = reflect.TypeFor[encoding.TextUnmarshaler]()

func (w *walker) value(t reflect.Type) error {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	tok, err := w.dec.Token()
	if err != nil {
		return err
	}
	want := kindName(t)
	switch tok := tok.(type) {
	case json.Delim:
		switch {
		case tok == '{' && want == "an object":
			return w.object(t)
		case tok == '[' && want == "an array":
			for i := 0; w.dec.More(); i++ {
				if err := w.in(strconv.Itoa(i), t.Elem()); err != nil {
					return err
				}
			}
			_, err := w.dec.Token()
			return err
		case tok == '{':
			return place("is an object, but " + want + " is wanted")
		}
		return place("is an array, but " + want + " is wanted")
	case nil:
		return place("is null: leave it out, or give " + want)
	case string:
		if want != "a text" {
			return place("is a text, but " + want + " is wanted")
		}
	case bool:
		if want != "true or false" {
			return place(fmt.Sprintf("is %t, but %s is wanted", tok, want))
		}
	case json.Number:
		if want != "a number" {
			return place("is a number, but " + want + " is wanted")
		}
	}
	return nil
}

func kindName(t reflect.Type) string {
	if reflect.PointerTo(t).Implements(textType) {
		return "a text"
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Slice:
		return "an array"
	case reflect.String:
		return "a text"
	case reflect.Bool:
		return "true or false"
	default:
		return "a number"
	}
}

func (w *walker) in(name string, t reflect.Type) error {
	w.path = append(w.path, name)
	if err := w.value(t); err != nil {
		return err // with the path to it
	}
	w.path = w.path[:len(w.path)-1]
	return nil
}

func (w *walker) object(t reflect.Type) error {
	var fields []jsonField
	if t.Kind() == reflect.Struct {
		fields = jsonFields(t)
	}
	seen := map[string]bool{}
	for w.dec.More() {
		tok, err := w.dec.Token()
		if err != nil {
			return err
		}
		name := tok.(string) // Token checks that
		if seen[name] {
			return place(fmt.Sprintf("%.64q stands there twice", name))
		}
		seen[name] = true
		var elem reflect.Type
		if t.Kind() == reflect.Map {
			elem = t.Elem()
		} else {
			i := slices.IndexFunc(fields, func(f jsonField) bool { return f.name == name })
			if i < 0 {
				var names []string
				for _, f := range fields {
					names = append(names, f.name)
				}
				return place(fmt.Sprintf("there is no field %.64q here, but %s", name, strings.Join(names, ", ")))
			}
			elem = fields[i].typ
		}
		if err := w.in(name, elem); err != nil {
			return err
		}
	}
	if _, err := w.dec.Token(); err != nil {
		return err
	}
	for _, f := range fields {
		if !f.optional && !seen[f.name] {
			return place(fmt.Sprintf("%s is missing", f.name))
		}
	}
	return nil
}

// jsonField is a field of a struct as JSON knows it.
type jsonField struct {
	name     string
	typ      reflect.Type
	optional bool // it may be absent
	tag      reflect.StructTag
}

// jsonFields lists the fields of a struct type. Those of an embedded struct count as its own; one of the same name
// further out hides them.
func jsonFields(t reflect.Type) []jsonField {
	var own, embedded []jsonField
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" && options == "":
		case f.Anonymous && name == "":
			embedded = append(embedded, jsonFields(f.Type)...)
		case f.IsExported():
			if name == "" {
				name = f.Name
			}
			own = append(own, jsonField{name, f.Type, strings.Contains(options, "omit"), f.Tag})
		}
	}
	for _, f := range embedded {
		if !slices.ContainsFunc(own, func(o jsonField) bool { return o.name == f.name }) {
			own = append(own, f)
		}
	}
	return own
}
