package testkit

import (
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Span is one of a trace, as a collector was told of it.
type Span struct {
	Name, Trace, ID, Parent string   // the ids in hex; Parent "": it is the first
	Links                   []string // trace ids
	Attributes              map[string]string
	Start, End              time.Time
	Error                   string
}

// Collector takes traces in OTLP over HTTP and keeps them.
type Collector struct {
	URL  string
	Away atomic.Bool // it answers 503

	mu    sync.Mutex
	spans []Span
}

// StartCollector runs one until the test ends.
func StartCollector(t T) *Collector {
	c := &Collector{}
	s := httptest.NewServer(http.HandlerFunc(c.take))
	t.Cleanup(s.Close)
	c.URL = s.URL + "/v1/traces"
	return c
}

func (c *Collector) take(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	var req collector.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(b, &req)
	}
	switch {
	case r.URL.Path != "/v1/traces" || err != nil:
		w.WriteHeader(http.StatusBadRequest)
		return
	case c.Away.Load():
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				span := Span{
					Name: s.GetName(), Trace: hex.EncodeToString(s.GetTraceId()), ID: hex.EncodeToString(s.GetSpanId()), Parent: hex.EncodeToString(s.GetParentSpanId()),
					Attributes: map[string]string{}, Start: time.Unix(0, int64(s.GetStartTimeUnixNano())), End: time.Unix(0, int64(s.GetEndTimeUnixNano())),
					Error: s.GetStatus().GetMessage(),
				}
				for _, l := range s.GetLinks() {
					span.Links = append(span.Links, hex.EncodeToString(l.GetTraceId()))
				}
				for _, a := range slices.Concat(rs.GetResource().GetAttributes(), s.GetAttributes()) {
					span.Attributes[a.GetKey()] = a.GetValue().GetStringValue()
				}
				c.spans = append(c.spans, span)
			}
		}
	}
}

// Spans gives what has come.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.spans)
}

// Named gives the spans of a name.
func (c *Collector) Named(name string) (all []Span) {
	for _, s := range c.Spans() {
		if s.Name == name {
			all = append(all, s)
		}
	}
	return all
}
