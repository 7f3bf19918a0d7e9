package httpapi

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// call is one request on its way through a row of the table.
type call struct {
	w     *recorder
	r     *http.Request
	row   *route
	who   string // name of the token; "": none was needed
	role  Role
	token string
	// session is the browser's; nil: a bearer token was shown, or none.
	session *session
	// object is what the request is about, detail what of it, for the log and the audit log. No payloads, no secrets.
	object, detail string
	code           string // of the refusal; "": none
	noted          bool   // it is in the audit log
	query          url.Values
	// aborted: it went wrong after a part of the answer was out.
	aborted bool
}

// path gives the value of a {name} in the row's path.
func (c *call) path(name string) string { return c.r.PathValue(name) }

func (c *call) reply(status int, v any) error {
	reply(c.w, status, v)
	return nil
}

// reply answers with v as JSON. A peer that is gone is no error of ours.
func reply(w http.ResponseWriter, status int, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		status = http.StatusInternalServerError
		b, _ = json.Marshal(Error{ErrorBody{codeInternal, "answer cannot be written as JSON: " + err.Error()}})
	}
	b = append(b, '\n')
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

// readQuery takes the query string apart and refuses what the row does not know.
func (c *call) readQuery() error {
	q, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return failf(codeBadQuery, "query: %v", err)
	}
	for name, values := range q {
		i := slices.IndexFunc(c.row.query, func(p param) bool { return p.name == name })
		if i < 0 {
			var known []string
			for _, p := range c.row.query {
				known = append(known, p.name)
			}
			if known == nil {
				return failf(codeBadQuery, "query: there is no parameter %.64q here, nor any other", name)
			}
			return failf(codeBadQuery, "query: there is no parameter %.64q here, but %s", name, strings.Join(known, ", "))
		}
		if len(values) != 1 {
			return failf(codeBadQuery, "query: %s is given %d times", name, len(values))
		}
		if p := c.row.query[i]; p.max > 0 && len(values[0]) > p.max {
			return failf(codeBadQuery, "query: %s has %d bytes, the most are %d", name, len(values[0]), p.max)
		}
	}
	c.query = q
	return nil
}

// Bounds of a page.
const (
	defaultLimit = 100
	maxLimit     = 1000
)

func (c *call) limit() (int, error) {
	v := c.query.Get("limit")
	if v == "" {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > maxLimit {
		return 0, failf(codeBadQuery, "query: limit has to be a number from 1 to %d", maxLimit)
	}
	return n, nil
}

// number is for cursors; 0 if it is not there.
func (c *call) number(name string) (uint64, error) {
	v := c.query.Get(name)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return 0, failf(codeBadQuery, "query: %s has to be a number; take it from next of the page before", name)
	}
	return n, nil
}

// sequence is for numbers that people choose; 0 if it is not there.
func (c *call) sequence(name string) (uint64, error) {
	v := c.query.Get(name)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 63)
	if err != nil {
		return 0, failf(codeBadQuery, "query: %s has to be a number from 0 on", name)
	}
	return n, nil
}

func (c *call) boolean(name string) (*bool, error) {
	v := c.query.Get(name)
	if v == "" {
		return nil, nil
	}
	if v != "true" && v != "false" {
		return nil, failf(codeBadQuery, "query: %s has to be true or false", name)
	}
	b := v == "true"
	return &b, nil
}

// duration reads "30s", or a number of seconds.
func (c *call) duration(name string) (time.Duration, error) {
	v := c.query.Get(name)
	if v == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 {
		return 0, failf(codeBadQuery, "query: %s has to be a duration such as 30s", name)
	}
	return d, nil
}

// Media types of bodies.
const (
	typeJSON = "application/json"
	typeCBOR = "application/cbor"
	typeForm = "application/x-www-form-urlencoded"
)

// body reads the whole body, which has to be of one of the types. kind is "" for no body at all, where none is needed.
func (c *call) body(optional bool, types ...string) (b []byte, kind string, err error) {
	header := c.r.Header.Get("Content-Type")
	if header != "" || !optional {
		kind, _, err = mime.ParseMediaType(header)
		if err != nil || !slices.Contains(types, kind) {
			return nil, "", failf(codeMediaType, "Content-Type is %.100q: send %s, with that header", header, strings.Join(types, " or "))
		}
	}
	b, err = io.ReadAll(c.r.Body)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, "", failf(codeBodyTooLarge, "body is larger than %d KiB, the most that is taken here", large.Limit>>10)
	case err != nil:
		return nil, "", failf(codeBadBody, "body did not come whole: %v", err)
	case len(b) == 0 && optional:
		return nil, "", nil
	case kind == "":
		return nil, "", failf(codeMediaType, "there is a body without Content-Type: send %s, with that header", strings.Join(types, " or "))
	}
	return b, kind, nil
}

// decode reads a JSON body into v, strictly.
func (c *call) decode(v any) error {
	b, _, err := c.body(false, typeJSON)
	if err != nil {
		return err
	}
	return decodeStrict(b, v)
}

// recorder notes the status that was answered, and may hold the answer back.
type recorder struct {
	http.ResponseWriter
	code  int
	wrote bool
	hold  bool // until release
	held  []byte
}

func (r *recorder) WriteHeader(code int) {
	if !r.wrote {
		r.code, r.wrote = code, true
	}
	if !r.hold {
		r.ResponseWriter.WriteHeader(code)
	}
}

func (r *recorder) Write(b []byte) (int, error) {
	r.wrote = true
	if r.hold {
		r.held = append(r.held, b...)
		return len(b), nil
	}
	return r.ResponseWriter.Write(b)
}

// drop forgets an answer that is held back: there will be another one.
func (r *recorder) drop() { r.held, r.wrote, r.code = nil, false, http.StatusOK }

// release lets out what was held back, and holds nothing any more.
func (r *recorder) release() {
	if !r.hold {
		return
	}
	r.hold = false
	if r.wrote {
		r.ResponseWriter.WriteHeader(r.code)
		_, _ = r.ResponseWriter.Write(r.held)
	}
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// newID names a failure in the answer and in the log.
func newID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
