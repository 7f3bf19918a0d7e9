package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// What people and other programs write by hand is read here: a map of text keys, in JSON or CBOR. Nothing is
// guessed, since a key that is not understood may be the one that keeps a command from doing harm.

const (
	// maxDepth is how deep arrays and maps may lie in each other, the outermost included.
	maxDepth = 16
	maxKeys  = 64
)

// field is one member of the map: its key and its value as it lies there.
type field struct {
	name string
	raw  []byte
	cbor bool
}

// fieldMode differs from decMode in what others' encoders may write: lengths that are not told in advance, large payloads.
var fieldMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, MaxNestedLevels: maxDepth}.DecMode()
	if err != nil {
		panic(err) // the options above contradict each other
	}
	return m
}()

// readFields takes the map apart. With an error about a key the others are returned all the same.
func readFields(b []byte, known []string) ([]field, error) {
	if len(b) > MaxSubmit {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrTooLarge, len(b), MaxSubmit)
	}
	var list []field
	var err error
	switch first, text := firstByte(b); {
	case first == '{' && text:
		list, err = jsonFields(b)
	case len(b) > 0 && (b[0]>>5 == 5 || bytes.HasPrefix(b, []byte{0xd9, 0xd9, 0xf7})): // the tag says: this is CBOR (RFC 8949 §3.4.6)
		list, err = cborFields(b)
	case len(b) == 0:
		err = errors.New("it is empty: send a JSON object or a CBOR map")
	case bytes.HasPrefix(b, []byte("\xef\xbb\xbf")):
		err = errors.New("it begins with a byte order mark: leave that out")
	default:
		err = fmt.Errorf("it begins with 0x%02x: send a JSON object or a CBOR map", first)
	}
	if err != nil {
		return list, err
	}
	for _, f := range list {
		if !slices.Contains(known, f.name) {
			return list, fmt.Errorf("there is no key %.80q; there are %s", f.name, strings.Join(known, ", "))
		}
	}
	return list, nil
}

// firstByte is the first that is not space (RFC 8259 §2). text: JSON could begin so.
func firstByte(b []byte) (c byte, text bool) {
	i := space(b, 0)
	if i == len(b) {
		return 0, false
	}
	return b[i], true
}

func space(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\t' || b[i] == '\n' || b[i] == '\r') {
		i++
	}
	return i
}

// jsonDepth is how deep objects and arrays lie in each other. b need not be valid.
func jsonDepth(b []byte) int {
	depth, deepest := 0, 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '{', '[':
			depth++
			deepest = max(deepest, depth)
		case '}', ']':
			depth--
		case '"':
			i = closing(b, i)
		}
	}
	return deepest
}

// closing is where the string that begins at i ends: its last quote, or the end of b.
func closing(b []byte, i int) int {
	for i++; i < len(b) && b[i] != '"'; i++ {
		if b[i] == '\\' {
			i++
		}
	}
	return i
}

func jsonFields(b []byte) ([]field, error) {
	if !utf8.Valid(b) {
		return nil, errors.New("it is not UTF-8: send other bytes as payload_base64, or the whole as CBOR")
	}
	if jsonDepth(b) > maxDepth {
		return nil, fmt.Errorf("arrays and objects lie more than %d deep in each other: send such a payload as text", maxDepth)
	}
	var whole json.RawMessage
	if err := json.Unmarshal(b, &whole); err != nil {
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			return nil, fmt.Errorf("not JSON at byte %d: %w", syntax.Offset, err)
		}
		return nil, err
	}
	// From here b is known to be one valid object.
	var list []field
	for i := space(b, 0) + 1; ; i++ {
		if i = space(b, i); b[i] == '}' {
			return list, nil
		}
		end := closing(b, i) + 1
		name, err := unquote(b[i:end])
		if err != nil {
			return list, err
		}
		start := space(b, space(b, end)+1) // behind the colon
		i = valueEnd(b, start)
		if list, err = addField(list, field{name: name, raw: bytes.TrimRight(b[start:i], " \t\r\n")}); err != nil {
			return list, err
		}
		if b[i] == '}' {
			return list, nil
		}
	}
}

// valueEnd is where the value that begins at i ends: at the comma behind it, or at the brace of its object.
func valueEnd(b []byte, i int) int {
	for depth := 0; ; i++ {
		switch b[i] {
		case '"':
			i = closing(b, i)
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i
			}
			depth--
		case ',':
			if depth == 0 {
				return i
			}
		}
	}
}

func addField(list []field, f field) ([]field, error) {
	for _, other := range list {
		if other.name == f.name {
			return list, fmt.Errorf("key %.80q stands there twice: give it once", f.name)
		}
	}
	if len(list) == maxKeys {
		return list, fmt.Errorf("more than %d keys", maxKeys)
	}
	return append(list, f), nil
}

// unquote reads a JSON string. Half a surrogate pair, of which encoding/json makes another character, is an error.
func unquote(raw []byte) (string, error) {
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", err
	}
	if strings.Contains(s, "\ufffd") && halfSurrogate(raw) {
		return "", fmt.Errorf("%.80s holds half a surrogate pair, which is no character", raw)
	}
	return s, nil
}

// halfSurrogate looks for a \uD800 to \uDBFF that no \uDC00 to \uDFFF follows, or the other way round. raw is valid JSON.
func halfSurrogate(raw []byte) bool {
	unit := func(i int) uint64 { // of the escape \u and four digits at i; 0: there is none
		if i+6 > len(raw) || raw[i] != '\\' || raw[i+1] != 'u' {
			return 0
		}
		n, _ := strconv.ParseUint(string(raw[i+2:i+6]), 16, 16)
		return n
	}
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		switch u := unit(i) >> 10; {
		case u == 0xD800>>10 && unit(i+6)>>10 == 0xDC00>>10:
			i += 11
		case u == 0xD800>>10, u == 0xDC00>>10:
			return true
		default:
			i++ // what is escaped is no backslash
		}
	}
	return false
}

func cborFields(b []byte) ([]field, error) {
	var m map[string]cbor.RawMessage
	if err := fieldMode.Unmarshal(b, &m); err != nil {
		if dup, ok := errors.AsType[*cbor.DupMapKeyError](err); ok {
			return nil, fmt.Errorf("key %.80q stands there twice: give it once", fmt.Sprint(dup.Key))
		}
		if _, ok := errors.AsType[*cbor.UnmarshalTypeError](err); ok {
			return nil, errors.New("all keys must be text")
		}
		return nil, fmt.Errorf("not CBOR: %s", strings.TrimPrefix(err.Error(), "cbor: "))
	}
	if len(m) > maxKeys {
		return nil, fmt.Errorf("more than %d keys", maxKeys)
	}
	list := make([]field, 0, len(m))
	for name, raw := range m {
		list = append(list, field{name: name, raw: raw, cbor: true})
	}
	slices.SortFunc(list, func(a, b field) int { return strings.Compare(a.name, b.name) }) // the same error each time
	return list, nil
}

// The kinds of values.
const (
	isText   = "text"
	isBytes  = "bytes"
	isNumber = "a number"
	isBool   = "true or false"
	isNull   = "null"
	isTag    = "a tagged value"
	isOther  = "an array or a map"
)

func (f *field) kind() string {
	c := f.raw[0]
	if !f.cbor {
		switch c {
		case '"':
			return isText
		case 't', 'f':
			return isBool
		case 'n':
			return isNull
		case '{', '[':
			return isOther
		}
		return isNumber
	}
	switch c >> 5 { // RFC 8949 §3.1
	case 0, 1:
		return isNumber
	case 2:
		return isBytes
	case 3:
		return isText
	case 6:
		return isTag
	case 7:
		switch c & 31 {
		case 20, 21:
			return isBool
		case 22, 23: // null, undefined
			return isNull
		case 25, 26, 27:
			return isNumber
		}
	}
	return isOther
}

func (f *field) want(what string) error {
	return fmt.Errorf("%q must be %s, but is %s", f.name, what, f.kind())
}

func (f *field) text() (string, error) {
	if f.kind() != isText {
		return "", f.want("text")
	}
	if !f.cbor {
		s, err := unquote(f.raw)
		if err != nil {
			return "", fmt.Errorf("%q: %w", f.name, err)
		}
		return s, nil
	}
	var s string
	if err := fieldMode.Unmarshal(f.raw, &s); err != nil {
		return "", fmt.Errorf("%q: %w", f.name, err)
	}
	return s, nil
}

func (f *field) boolean() (bool, error) {
	if f.kind() != isBool {
		return false, f.want("true or false")
	}
	return f.raw[0] == 't' || f.raw[0] == 0xf5, nil
}

// integer is exact; ok: it is one.
func (f *field) integer() (n int64, ok bool) {
	if !f.cbor {
		n, err := strconv.ParseInt(string(f.raw), 10, 64)
		return n, err == nil
	}
	if f.raw[0]>>5 > 1 {
		return 0, false
	}
	return n, fieldMode.Unmarshal(f.raw, &n) == nil
}

func (f *field) float() (float64, error) {
	var n float64
	var err error
	if f.cbor {
		err = fieldMode.Unmarshal(f.raw, &n)
	} else {
		n, err = strconv.ParseFloat(string(f.raw), 64)
	}
	if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
		return 0, errors.New("not a number that can be used")
	}
	return n, nil
}

func (f *field) count() (int, error) {
	n, ok := f.integer()
	if f.kind() != isNumber || !ok {
		return 0, f.want("a whole number")
	}
	if n < 1 || n > math.MaxInt32 {
		return 0, fmt.Errorf("%q is %d: it must be at least 1; leave it out for the default", f.name, n)
	}
	return int(n), nil
}

func (f *field) duration() (Duration, error) {
	var d Duration
	var err error
	switch f.kind() {
	case isText:
		var s string
		if s, err = f.text(); err != nil {
			return 0, err
		}
		d, err = durationOf(s)
	case isNumber:
		const most = int64(math.MaxInt64 / time.Second)
		if n, ok := f.integer(); ok && n <= most && n >= -most {
			return Duration(n) * Duration(time.Second), nil
		}
		var n float64
		if n, err = f.float(); err == nil {
			d, err = secondsOf(n)
		}
	default:
		return 0, f.want(`a duration, "1h30m" or a number of seconds`)
	}
	if err != nil {
		return 0, fmt.Errorf("%q: %w", f.name, err)
	}
	return d, nil
}

// time reads text, or in CBOR the tags 0 and 1 (RFC 8949 §3.4.1, §3.4.2).
func (f *field) time() (Time, error) {
	const what = `a time in RFC 3339, "2026-01-31T16:00:00Z"`
	inner := *f
	if f.kind() == isTag {
		var tag cbor.RawTag
		if err := fieldMode.Unmarshal(f.raw, &tag); err != nil {
			return Time{}, fmt.Errorf("%q: %w", f.name, err)
		}
		inner.raw = tag.Content
		switch kind := inner.kind(); {
		case tag.Number == 1 && kind == isNumber:
			return inner.epoch()
		case tag.Number != 0 || kind != isText:
			return Time{}, f.want(what)
		}
	}
	if inner.kind() != isText {
		return Time{}, f.want(what)
	}
	s, err := inner.text()
	if err != nil {
		return Time{}, err
	}
	t, err := timeOf(s)
	if err != nil {
		return Time{}, fmt.Errorf("%q: %w", f.name, err)
	}
	return t, nil
}

// epoch reads seconds since 1970.
func (f *field) epoch() (Time, error) {
	n, err := f.float()
	if err != nil || n < 0 || n > maxTime/1000 {
		return Time{}, fmt.Errorf("%q is not within the years 1970 to 9999", f.name)
	}
	whole, part := math.Modf(n)
	return Time{time.Unix(int64(whole), int64(math.Round(part*1e6))*1000).UTC()}, nil // a float64 has microseconds in our times
}

// compound says whether a payload is a value of its own rather than text or bytes.
func (f *field) compound() bool { k := f.kind(); return k != isText && k != isBytes }

func (f *field) mediaType() string {
	if f.cbor {
		return "application/cbor"
	}
	return "application/json"
}

// payload is text or bytes as they are, and the encoding of anything else.
func (f *field) payload() ([]byte, error) {
	switch f.kind() {
	case isText:
		s, err := f.text()
		if err != nil || s == "" {
			return nil, err
		}
		return []byte(s), nil
	case isBytes:
		var b []byte
		if err := fieldMode.Unmarshal(f.raw, &b); err != nil {
			return nil, fmt.Errorf("%q: %w", f.name, err)
		}
		if len(b) == 0 {
			b = nil
		}
		return b, nil
	}
	return bytes.Clone(f.raw), nil
}
