package bridge

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/spool"
)

// metrics of one bridge. Each has the label upstream, so that several bridges share a registry.
type metrics struct {
	registerer prometheus.Registerer
	all        []prometheus.Collector

	sent, sentBytes, acked *prometheus.CounterVec // by lane
	sends                  *prometheus.CounterVec
	ended                  *prometheus.CounterVec // by lane and outcome
	stray                  prometheus.Counter
	attempts               prometheus.Counter
	losses                 *prometheus.CounterVec // by reason
	up                     prometheus.Gauge
	inFlight, window       prometheus.Gauge
	dayBytes               prometheus.Gauge
	held                   *prometheus.GaugeVec // by reason
	latency                prometheus.Histogram
}

// laneCounters are one lane's, looked up once.
type laneCounters struct {
	sends, sent, sentBytes, acked, expired, skipped, parked prometheus.Counter
}

// The reasons of holdfast_bridge_link_losses_total.
const (
	reasonDial    = "dial"    // no connection came about
	reasonRefused = "refused" // the upstream said no
	reasonClosed  = "closed"  // the upstream ended the connection
	reasonStalled = "stalled" // nothing moved any more
	reasonOther   = "other"
)

func lossReason(err error, dialled bool) string {
	switch {
	case errors.Is(err, ErrRefused):
		return reasonRefused
	case !dialled:
		return reasonDial
	case errors.Is(err, ErrPeerClosed):
		return reasonClosed
	case errors.Is(err, ErrStalled):
		return reasonStalled
	}
	return reasonOther
}

func newMetrics(r prometheus.Registerer, upstream string, meter *Meter) (*metrics, error) {
	const prefix = "holdfast_bridge_"
	m := &metrics{}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
		m.all = append(m.all, v)
		return v
	}
	counter := func(name, help string) prometheus.Counter {
		v := prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + name, Help: help})
		m.all = append(m.all, v)
		return v
	}
	gauge := func(name, help string) prometheus.Gauge {
		v := prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + name, Help: help})
		m.all = append(m.all, v)
		return v
	}
	m.sends = counters("sends_total", "Messages or batches handed to the upstream, repeats included.", "lane")
	m.sent = counters("sent_messages_total", "Device messages handed to the upstream. More than acked_messages_total by what a lost link made to be sent again.", "lane")
	m.sentBytes = counters("sent_bytes_total", "Bytes of topics and payloads handed to the upstream, compressed where the format compresses.", "lane")
	m.acked = counters("acked_messages_total", "Device messages that the upstream has taken.", "lane")
	m.ended = counters("ended_messages_total", "Device messages that ended without being sent. A rise of parked means that the upstream refuses messages for good: see holdfast spool.", "lane", "reason")
	m.stray = counter("stray_acks_total", "Acks for nothing that is in flight. A rise means an upstream that acks twice.")
	m.attempts = counter("attempts_total", "Attempts to connect.")
	m.losses = counters("link_losses_total", "Links lost and attempts failed, by reason.", "reason")
	m.up = gauge("link_up", "1 while the upstream is connected.")
	m.inFlight = gauge("in_flight_sends", "Sends that wait for their outcome.")
	m.window = gauge("in_flight_limit_bytes", "Bytes that may be in flight now. A fall means a slow link.")
	m.all = append(m.all, prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: prefix + "wire_bytes_total", Help: "Bytes that the network was given on all connections to the upstream: MQTT, TLS, keep-alives and repeats included. It is what a metered link costs.",
	}, func() float64 { return float64(meter.Total()) }))
	m.dayBytes = gauge("budget_day_bytes", "Bytes sent since midnight UTC, where the upstream has a budget. At bytes_per_day only urgent lanes flow.")
	m.held = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: prefix + "budget_held", Help: "1 while what is not urgent waits, by reason: bytes_per_day is used up, or no window is open.",
	}, []string{"reason"})
	m.all = append(m.all, m.held)
	m.heldBy("")
	m.latency = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    prefix + "ack_seconds",
		Help:    "Time from a send to its ack. A rise means a slow link or a slow upstream.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 18),
	})
	m.all = append(m.all, m.latency)
	if r == nil {
		return m, nil
	}
	m.registerer = prometheus.WrapRegistererWith(prometheus.Labels{"upstream": upstream}, r)
	for i, c := range m.all {
		if err := m.registerer.Register(c); err != nil {
			m.all = m.all[:i]
			m.unregister()
			return nil, fmt.Errorf("metrics of upstream %q: %w", upstream, err)
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	if m.registerer == nil {
		return
	}
	for _, c := range m.all {
		m.registerer.Unregister(c)
	}
}

func (m *metrics) lane(name string) laneCounters {
	return laneCounters{
		sends:     m.sends.WithLabelValues(name),
		sent:      m.sent.WithLabelValues(name),
		sentBytes: m.sentBytes.WithLabelValues(name),
		acked:     m.acked.WithLabelValues(name),
		expired:   m.ended.WithLabelValues(name, "expired"),
		skipped:   m.ended.WithLabelValues(name, "not_for_this_upstream"),
		parked:    m.ended.WithLabelValues(name, "parked"),
	}
}

func (c *laneCounters) passed(o spool.Outcome, n int) {
	switch o {
	case spool.Expired:
		c.expired.Add(float64(n))
	case spool.Parked:
		c.parked.Add(float64(n))
	case spool.Delivered, spool.Evicted, spool.Elsewhere:
		c.skipped.Add(float64(n))
	}
}

// heldBy shows why messages wait although the link is up; "": they do not.
func (m *metrics) heldBy(reason string) {
	for _, r := range [...]string{HeldByDay, HeldByWindow} {
		v := 0.0
		if r == reason {
			v = 1
		}
		m.held.WithLabelValues(r).Set(v)
	}
}
