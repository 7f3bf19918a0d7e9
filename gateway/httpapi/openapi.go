package httpapi

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/internal/audit"
)

// document is the API's description in OpenAPI 3.1, made of the table and of the Go types, so that it cannot say anything else.
type document struct {
	json []byte
	etag string
}

type object = map[string]any

func describe(table []route) *document {
	g := &describer{schemas: object{}, types: map[string]reflect.Type{}}
	paths := object{}
	for i := range table {
		row := &table[i]
		methods, _ := paths[row.path].(object)
		if methods == nil {
			methods = object{}
			paths[row.path] = methods
		}
		methods[strings.ToLower(row.method)] = g.operation(row)
	}
	b, err := json.MarshalIndent(object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Holdfast", "version": "1",
			"description": "An IoT edge gateway: its devices, their commands, what is spooled for the cloud. Every error has a code that stays and a message for people.",
		},
		"security": []object{{"bearer": []string{}}, {"session": []string{}}},
		"paths":    paths,
		"components": object{
			"schemas": g.schemas,
			"securitySchemes": object{
				"bearer": object{
					"type": "http", "scheme": "bearer",
					"description": "A token: DATA_DIR/admin.token, or one that holdfast token add makes. Each role may what the one before it may: viewer, operator, admin.",
				},
				"session": object{
					"type": "apiKey", "in": "cookie", "name": sessionCookie,
					"description": "Of a browser that signed in. Whatever changes something has to come with the header " + csrfHeader + " then.",
				},
			},
		},
	}, "", " ")
	if err != nil {
		panic("describe the api: " + err.Error()) // the table is wrong
	}
	sum := sha256.Sum256(b)
	return &document{json: append(b, '\n'), etag: `"` + hex.EncodeToString(sum[:16]) + `"`}
}

type describer struct {
	schemas object                  // components
	types   map[string]reflect.Type // of the components
}

var inBraces = regexp.MustCompile(`\{([a-z]+)\}`)

func (g *describer) operation(row *route) object {
	params := []object{}
	for _, m := range inBraces.FindAllStringSubmatch(row.path, -1) {
		params = append(params, object{"name": m[1], "in": "path", "required": true, "schema": object{"type": "string"}})
	}
	for _, p := range row.query {
		params = append(params, object{"name": p.name, "in": "query", "description": p.text, "schema": p.schema})
	}
	responses := object{}
	for _, a := range row.answers {
		r := object{"description": a.text}
		if a.body != nil {
			mime, schema := typeJSON, g.schema(a.body, false)
			if a.mime != "" {
				mime = a.mime
				if a.body.Kind() != reflect.String {
					each := "The data of each event is a "
					if row.bulk {
						each = "Each line is an "
					}
					schema = object{"type": "string", "description": each + a.body.Name() + ".", "x-data": schema}
				}
			}
			r["content"] = object{mime: object{"schema": schema}}
		}
		responses[strconv.Itoa(a.status)] = r
	}
	for status, codes := range byStatus(row.failures()) {
		responses[strconv.Itoa(status)] = object{
			"description": http.StatusText(status) + ": " + strings.Join(codes, ", "),
			"content": object{typeJSON: object{"schema": object{"allOf": []object{
				g.schema(is[Error](), false),
				{"properties": object{"error": object{"properties": object{"code": object{"enum": codes}}}}},
			}}}},
		}
	}
	op := object{"operationId": row.id, "summary": row.summary, "responses": responses}
	if len(params) > 0 {
		op["parameters"] = params
	}
	if row.method == http.MethodPost && row.id == "send_command" {
		op["parameters"] = append(params, object{
			"name": "Idempotency-Key", "in": "header", "schema": object{"type": "string"}, "description": "The id of the command, if the body has none.",
		})
	}
	if row.resumes {
		op["parameters"] = append(params, object{
			"name": "Last-Event-ID", "in": "header", "schema": object{"type": "string"}, "description": "The id of the last event that was seen.",
		})
	}
	if row.body != nil {
		schema := g.schema(row.body, true)
		content := object{typeJSON: object{"schema": schema}}
		if row.form {
			content = object{typeForm: object{"schema": schema}}
		}
		if row.cbor {
			content[typeCBOR] = object{"schema": schema}
		}
		op["requestBody"] = object{"required": !row.optional, "content": content}
	}
	switch {
	case row.who == 0:
		op["security"] = []object{}
	case row.loopback:
		op["security"] = []object{{"bearer": []string{}}, {"session": []string{}}, {}}
		op["x-role"] = row.who.String()
	default:
		op["x-role"] = row.who.String()
	}
	return op
}

// byStatus groups codes by their status.
func byStatus(codes []string) map[int][]string {
	m := map[int][]string{}
	for _, code := range codes {
		status, known := statuses[code]
		if !known {
			panic("describe the api: no status for code " + code) // the table is wrong
		}
		m[status] = append(m[status], code)
	}
	for _, codes := range m {
		slices.Sort(codes)
	}
	return m
}

// special has the schemas of types whose JSON reflection cannot tell.
var special = map[reflect.Type]object{
	is[time.Time]():        {"type": "string", "format": "date-time"},
	is[wire.Time]():        {"type": "string", "format": "date-time"},
	is[wire.Duration]():    {"type": []string{"string", "number"}, "description": `A duration such as "1h30m", or seconds.`},
	is[devices.State]():    {"type": "string", "enum": stateNames()},
	is[json.RawMessage]():  {},
	is[[]byte]():           {"type": "string", "contentEncoding": "base64"},
	is[[][2]string]():      {"type": "array", "items": object{"type": "array", "items": object{"type": "string"}, "minItems": 2, "maxItems": 2}},
	is[audit.Hash]():       {"type": "string", "pattern": "^[0-9a-f]{64}$"},
	is[Role]():             {"type": "string", "enum": []Role{Viewer, Operator, Admin}},
	is[devices.Feedback](): {"type": "string", "enum": []devices.Feedback{devices.FeedbackNone, devices.FeedbackNegative, devices.FeedbackPositive, devices.FeedbackFull}},
}

// renamed has names of components where two packages use the same one.
var renamed = map[reflect.Type]string{is[Presence](): "DevicePresence", is[audit.Entry](): "AuditEntry", is[audit.Head](): "AuditHead"}

// schema describes t. A struct becomes a component, and is referred to.
func (g *describer) schema(t reflect.Type, request bool) object {
	if s, ok := special[t]; ok {
		return maps.Clone(s)
	}
	switch t.Kind() {
	case reflect.Pointer:
		return g.schema(t.Elem(), request)
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Int32:
		return object{"type": "integer"}
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.Uint, reflect.Uint64, reflect.Uint32:
		return object{"type": "integer", "minimum": 0}
	case reflect.Slice:
		return object{"type": "array", "items": g.schema(t.Elem(), request)}
	case reflect.Map:
		if t.Elem().Kind() == reflect.Interface {
			return object{"type": "object"}
		}
		return object{"type": "object", "additionalProperties": g.schema(t.Elem(), request)}
	case reflect.Struct:
		return g.component(t, request)
	default:
		panic(fmt.Sprintf("describe the api: no schema for %v", t)) // a type in the table that JSON should not see
	}
}

func (g *describer) component(t reflect.Type, request bool) object {
	name := t.Name()
	if other, ok := renamed[t]; ok {
		name = other
	}
	ref := object{"$ref": "#/components/schemas/" + name}
	if known, ok := g.types[name]; ok {
		if known != t {
			panic(fmt.Sprintf("describe the api: %v and %v are both called %s", known, t, name))
		}
		return ref
	}
	g.types[name] = t // before its fields: a type may hold itself
	props, required := object{}, []string{}
	for _, f := range jsonFields(t) {
		p := g.schema(f.typ, request)
		if what := f.tag.Get("doc"); what != "" {
			p["description"] = what
		}
		if values := f.tag.Get("enum"); values != "" {
			p["enum"] = strings.Split(values, ",")
		}
		props[f.name] = p
		if !f.optional {
			required = append(required, f.name)
		}
	}
	s := object{"type": "object", "properties": props}
	if len(required) > 0 {
		s["required"] = required
	}
	if request {
		s["additionalProperties"] = false
	}
	if t == is[wire.Submit]() { // its decoder takes these together
		props["payload"] = object{"description": "A text, which is taken as it is, or any other value, whose JSON (or CBOR) is taken. 64 KiB at most."}
		props["payload_base64"] = object{"type": "string", "contentEncoding": "base64", "description": "Instead of payload: any bytes."}
	}
	g.schemas[name] = s
	return ref
}
