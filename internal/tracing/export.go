package tracing

import (
	"context"
	crand "crypto/rand"
	"log/slog"
	"sync/atomic"

	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// patient logs when the collector stops taking spans, and when it takes them again. Spans that it does not take are gone.
type patient struct {
	sdk.SpanExporter
	log      *slog.Logger
	endpoint string
	away     atomic.Bool
}

// ExportSpans implements sdk.SpanExporter.
func (p *patient) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	err := p.SpanExporter.ExportSpans(ctx, spans)
	switch {
	case err != nil && !p.away.Swap(true):
		p.log.Warn("traces are not taken", "endpoint", p.endpoint, "err", err)
	case err == nil && p.away.Swap(false):
		p.log.Info("traces are taken again", "endpoint", p.endpoint)
	}
	return err
}

// rootKey finds in a context the ids that a first span is to have.
type rootKey struct{}

type rootIDs struct {
	trace trace.TraceID
	span  trace.SpanID
}

// generator gives a trace's first span the ids that follow from its message, and any other span one by chance.
type generator struct{}

// NewIDs implements sdk.IDGenerator.
func (generator) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	if r, ok := ctx.Value(rootKey{}).(rootIDs); ok {
		return r.trace, r.span
	}
	var id trace.TraceID
	_, _ = crand.Read(id[:]) // never fails
	return id, generator{}.NewSpanID(ctx, id)
}

// NewSpanID implements sdk.IDGenerator.
func (generator) NewSpanID(context.Context, trace.TraceID) (id trace.SpanID) {
	_, _ = crand.Read(id[:]) // never fails
	return id
}
