// Package tracing tells an OpenTelemetry collector what way some messages take: from the packet that a device sent to the commit that it
// was acknowledged for, and from each send upstream to the upstream's acknowledgement.
//
// A message's trace has the message's id for its own: trace id and id of the first span are the first 16 and the next 8 bytes of the
// SHA-256 of {gateway}/{epoch}/{lane}/{sequence}. So what is told in one process, or before a crash, and what is told days later in
// another finds together, nothing has to be stored for it, and whoever receives the message upstream can go on with its trace.
package tracing

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Config of a Tracer.
type Config struct {
	Endpoint string // URL of the collector's OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces
	Every    uint64 // each sequence that this divides is told; 1: all
	Gateway  string
	Version  string
	Log      *slog.Logger
}

// Tracer tells of messages. Many goroutines may use it. They hand in what is to be told, and a goroutine of its own makes spans of it: what it,
// or the collector, does not take in time is dropped. It holds up nobody.
type Tracer struct {
	every    uint64
	provider *sdk.TracerProvider
	tracer   trace.Tracer
	stop     func() // waits until all that was handed in is made

	mu     sync.Mutex // guards closing against handing in
	closed bool
	told   chan func() // spans to be made
}

// Bounds.
const (
	handedIn    = 256  // messages whose spans are to be made
	queued      = 2048 // spans that wait for the collector
	exportEvery = 2 * time.Second
	exportLimit = 5 * time.Second
)

// New makes a tracer. The collector need not be there yet.
func New(c Config) (*Tracer, error) {
	if c.Every == 0 {
		return nil, errors.New("tracing: every is 0")
	}
	// No retries: the spans of the next seconds tell as much, and a collector that is away for days must not cost anything.
	exporter, err := otlptracehttp.New(context.Background(), otlptracehttp.WithEndpointURL(c.Endpoint), otlptracehttp.WithTimeout(exportLimit),
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{}))
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(error) {})) // patient has logged it; the default writes to stderr
	p := sdk.NewTracerProvider(
		sdk.WithBatcher(&patient{SpanExporter: exporter, log: c.Log, endpoint: c.Endpoint},
			sdk.WithMaxQueueSize(queued), sdk.WithBatchTimeout(exportEvery), sdk.WithExportTimeout(exportLimit)),
		sdk.WithIDGenerator(generator{}),
		sdk.WithSampler(sdk.AlwaysSample()), // by sequence, before it gets here
		sdk.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "holdfast"), attribute.String("service.version", c.Version), attribute.String("service.instance.id", c.Gateway),
		)),
	)
	t := &Tracer{every: c.Every, provider: p, tracer: p.Tracer("holdfast"), told: make(chan func(), handedIn)}
	var done sync.WaitGroup
	done.Go(func() {
		for tell := range t.told {
			tell()
		}
	})
	t.stop = done.Wait
	return t, nil
}

// Close tells what is left, for as long as ctx lasts. Twice is no harm.
func (t *Tracer) Close(ctx context.Context) error {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		close(t.told)
	}
	t.mu.Unlock()
	t.stop()
	return t.provider.Shutdown(ctx)
}

// hand has tell called soon, or never.
func (t *Tracer) hand(tell func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	select {
	case t.told <- tell:
	default:
	}
}

// First gives the first sequence from seq on that is told.
func (t *Tracer) First(seq uint64) uint64 { return (seq + t.every - 1) / t.every * t.every }

// Every is the distance to the next.
func (t *Tracer) Every() uint64 { return t.every }

// Message names a message.
type Message struct {
	ID    string // {gateway}/{epoch}/{lane}/{sequence}
	Lane  string
	Seq   uint64
	Topic string // "": not known
}

func (m *Message) attributes(more ...attribute.KeyValue) []attribute.KeyValue {
	all := append(more, attribute.String("messaging.system", "mqtt"), attribute.String("messaging.message.id", m.ID),
		attribute.String("holdfast.lane", m.Lane), attribute.Int64("holdfast.sequence", int64(m.Seq)))
	if m.Topic != "" {
		all = append(all, attribute.String("messaging.destination.name", m.Topic))
	}
	return all
}

// ids of a message's trace and of its first span.
func ids(message string) (id trace.TraceID, first trace.SpanID) {
	sum := sha256.Sum256([]byte(message))
	copy(id[:], sum[:16])
	copy(first[:], sum[16:24])
	return id, first
}

// Arrival is a message's way onto the disk.
type Arrival struct {
	Message
	Device string
	Size   int // of the payload, bytes
	// Received: its packet had been read. Stored: it was on disk. Answered: the device's acknowledgement was on its way.
	Received, Stored, Answered time.Time
	// Parent is the W3C traceparent that the device sent as a user property; "": none. It becomes a link.
	Parent string
}

// Arrived tells of a, which it keeps. It is the trace's first span, with the commit, which waits for room and for the fsync, and the ack as
// its children.
func (t *Tracer) Arrived(a *Arrival) { t.hand(func() { t.arrived(a) }) }

func (t *Tracer) arrived(a *Arrival) {
	traceID, first := ids(a.ID)
	options := []trace.SpanStartOption{
		trace.WithTimestamp(a.Received), trace.WithSpanKind(trace.SpanKindConsumer), trace.WithNewRoot(),
		trace.WithAttributes(a.attributes(attribute.String("messaging.client.id", a.Device), attribute.Int("messaging.message.body.size", a.Size))...),
	}
	if a.Parent != "" {
		far := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": a.Parent}))
		if far.IsValid() {
			options = append(options, trace.WithLinks(trace.Link{SpanContext: far}))
		}
	}
	ctx, root := t.tracer.Start(context.WithValue(context.Background(), rootKey{}, rootIDs{traceID, first}), "receive "+a.Lane, options...)
	_, commit := t.tracer.Start(ctx, "commit", trace.WithTimestamp(a.Received))
	commit.End(trace.WithTimestamp(a.Stored))
	_, ack := t.tracer.Start(ctx, "ack", trace.WithTimestamp(a.Stored))
	ack.End(trace.WithTimestamp(a.Answered))
	root.End(trace.WithTimestamp(a.Answered))
}

// Delivery is one send of a message, and how it ended.
type Delivery struct {
	Message
	Upstream    string
	Records     int // messages in the send
	Sent, Ended time.Time
	Err         error // nil: it was acknowledged
}

// Delivered tells of d, which it keeps, in the message's trace.
func (t *Tracer) Delivered(d *Delivery) { t.hand(func() { t.delivered(d) }) }

func (t *Tracer) delivered(d *Delivery) {
	traceID, first := ids(d.ID)
	far := trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: first, TraceFlags: trace.FlagsSampled, Remote: true})
	_, span := t.tracer.Start(trace.ContextWithSpanContext(context.Background(), far), "send "+d.Upstream,
		trace.WithTimestamp(d.Sent), trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(d.attributes(attribute.String("holdfast.upstream", d.Upstream), attribute.Int("messaging.batch.message_count", d.Records))...))
	if d.Err != nil {
		span.SetStatus(codes.Error, d.Err.Error())
	}
	span.End(trace.WithTimestamp(d.Ended))
}
