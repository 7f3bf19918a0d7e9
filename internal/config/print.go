package config

import (
	"bytes"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"
)

// Print writes c as a file that Parse reads back to the same: every key, defaults included, except
// sections that say nothing at all.
func Print(w io.Writer, c *Config) error {
	var buf bytes.Buffer
	enc := yaml.NewEncoder(&buf)
	enc.SetIndent(2)
	if err := enc.Encode(node(reflect.ValueOf(c).Elem())); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	if err := enc.Close(); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	_, err := w.Write(buf.Bytes())
	return err
}

func node(v reflect.Value) *yaml.Node {
	scalar := func(text string, style yaml.Style) *yaml.Node {
		return &yaml.Node{Kind: yaml.ScalarNode, Value: text, Style: style}
	}
	switch {
	case v.Kind() == reflect.Struct:
		n := &yaml.Node{Kind: yaml.MappingNode}
		for _, f := range fieldsOf(v.Type()) {
			fv := v.Field(f.index)
			if f.key == "tls" && fv.IsZero() || f.typ.Kind() == reflect.Slice && fv.IsNil() {
				continue // tls of a plain listener, lanes of an upstream that takes all
			}
			n.Content = append(n.Content, scalar(f.key, 0), node(fv))
		}
		return n
	case v.Kind() == reflect.Slice:
		n := &yaml.Node{Kind: yaml.SequenceNode}
		if v.Len() == 0 {
			n.Style = yaml.FlowStyle
		}
		for i := range v.Len() {
			n.Content = append(n.Content, node(v.Index(i)))
		}
		return n
	case v.Type() == reflect.TypeFor[time.Duration]():
		return scalar(formatDuration(time.Duration(v.Int())), 0)
	case v.Kind() == reflect.Int64:
		return scalar(formatSize(v.Int()), 0)
	case v.Kind() == reflect.Int:
		return scalar(strconv.FormatInt(v.Int(), 10), 0)
	case v.Kind() == reflect.Bool:
		return scalar(strconv.FormatBool(v.Bool()), 0)
	default:
		// Quoted unless it is plainly a word: "on", "1e3", "~" and "a: b" are something else to YAML.
		s := v.String()
		plain := validName(s, 64) && (s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z')
		switch s {
		case "null", "Null", "NULL", "true", "True", "TRUE", "false", "False", "FALSE",
			"y", "Y", "yes", "Yes", "YES", "n", "N", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF":
			plain = false
		}
		if plain {
			return scalar(s, 0)
		}
		return scalar(s, yaml.DoubleQuotedStyle)
	}
}
