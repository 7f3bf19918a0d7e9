package broker

import (
	"errors"
	"net"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/mqtt"
)

// Why a delivery was dropped.
const (
	dropQueueFull = "queue_full"
	dropAllFull   = "all_queues_full"
	dropOffline   = "offline"
	dropExpired   = "expired"
	dropTooLarge  = "too_large"
	dropDenied    = "denied"
	dropRefused   = "refused"
	dropGone      = "session_gone"
)

// Why a connection ended.
const (
	endClient   = "client"   // it said goodbye, or closed
	endTimeout  = "timeout"  // of keep alive, CONNECT or a packet
	endProtocol = "protocol" // it broke the protocol
	endSlow     = "slow"     // it did not read
	endTakeover = "takeover" // by a newer connection
	endRefused  = "refused"  // a publish was not taken, or CONNECT
	endStop     = "stop"     // of the gateway
	endOrdered  = "ordered"  // an operator, or the queue of commands, wanted it
	endOther    = "other"
)

type metrics struct {
	connections     prometheus.GaugeFunc
	connects        prometheus.Counter
	refusedConnects prometheus.Counter
	turnedAway      *prometheus.CounterVec
	endedBy         *prometheus.CounterVec
	acceptErrors    prometheus.Counter
	panics          prometheus.Counter
	takeovers       prometheus.Counter
	expired         prometheus.Counter
	evicted         prometheus.Counter
	received        [3]prometheus.Counter
	receivedBytes   prometheus.Counter
	acked           prometheus.Counter
	ackSeconds      prometheus.Histogram
	repeats         prometheus.Counter
	refused         *prometheus.CounterVec
	notRetained     prometheus.Counter
	wills           prometheus.Counter
	sent            [3]prometheus.Counter
	commands        prometheus.Counter
	withdrawn       prometheus.Counter
	slowed          prometheus.Counter
	overslept       prometheus.Counter
	handshakeWait   prometheus.Counter
	handshakesLeft  prometheus.Counter
	certificates    *prometheus.GaugeVec
	sentBytes       prometheus.Counter
	queued          prometheus.Gauge
	drops           *prometheus.CounterVec
}

func newMetrics(b *Broker, reg prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "holdfast_broker_" + name, Help: help})
	}
	vec := func(name, help, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "holdfast_broker_" + name, Help: help}, []string{label})
		for _, x := range values {
			v.WithLabelValues(x)
		}
		return v
	}
	gauge := func(name, help string, f func() int) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "holdfast_broker_" + name, Help: help},
			func() float64 { return float64(f()) })
	}
	m := &metrics{
		connections:     gauge("connections_open", "Open connections, those without a CONNECT included.", b.connections),
		connects:        counter("connects_total", "Clients let in. Rising faster than devices restart: links flap."),
		refusedConnects: counter("connects_refused_total", "CONNECTs refused: wrong credentials, rights or limits."),
		turnedAway: vec("connections_turned_away_total", "Connections closed at once, by the limit that was reached.",
			"limit", limitTotal, limitListener, limitAddress),
		endedBy: vec("connections_ended_total", "Connections ended, by reason.",
			"reason", endClient, endTimeout, endProtocol, endSlow, endTakeover, endRefused, endStop, endOrdered, endOther),
		acceptErrors: counter("accept_errors_total", "Failed accepts. A rise means that the process is out of descriptors."),
		panics:       counter("panics_total", "Connections ended by a panic. Any is a bug to report."),
		takeovers:    counter("takeovers_total", "Sessions taken over by a newer connection. A rise means that two devices share an id, or links die silently."),
		expired:      counter("sessions_expired_total", "Sessions that ended because their client did not come back in time."),
		evicted:      counter("sessions_evicted_total", "Sessions of offline clients without credentials that were ended to make room: somebody connects under ever new ids."),
		receivedBytes: counter("publish_received_bytes_total",
			"Bytes of PUBLISH packets from clients."),
		acked: counter("answers_total", "Acknowledgements given in their order: PUBACK, PUBREC, PUBCOMP, CONNACK, SUBACK, UNSUBACK."),
		ackSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "holdfast_broker_ack_seconds", Help: "From reading a QoS 1 or 2 PUBLISH to its acknowledgement, of every 64th and of each that a connection sends while nothing of it is unanswered. Rises with the time of an fsync.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 2, 16),
		}),
		repeats: counter("publish_repeated_total", "QoS 2 messages that were sent again and not stored again."),
		refused: vec("publish_refused_total", "Messages not taken, by what an MQTT 5 client is told.",
			"reason", "not_authorized", "quota_exceeded", "topic_invalid", "rate", "error"),
		notRetained: counter("retained_refused_total",
			"Messages with RETAIN that were taken but not kept, because too many or too large ones are."),
		wills:     counter("wills_total", "Wills published: devices that vanished."),
		commands:  counter("commands_sent_total", "Commands written to devices, repeats included. They are part of the PUBLISH packets sent with QoS 1."),
		withdrawn: counter("subscriptions_withdrawn_total", "Subscriptions removed because the client has no right to them any more."),
		slowed:    counter("publish_slowed_seconds_total", "Time in which MQTT 3.1.1 clients were not read because they publish more than they may."),
		overslept: counter("deadlines_overslept_total",
			"Deadlines of clients that struck more than a second late and were put off. A rise means that the gateway was stopped, or gets no processor."),
		handshakeWait:  counter("handshake_wait_seconds_total", "Time that TLS handshakes waited for a processor, summed over all of them. Rises when many devices come at once."),
		handshakesLeft: counter("handshakes_abandoned_total", "Peers that hung up while their TLS handshake waited: more come at once than the processors can take."),
		certificates: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "holdfast_broker_certificate_expiry_seconds",
			Help: "When the first certificate or revocation list in a file of a TLS listener ends, Unix time. Less than now: it has.",
		}, []string{"listener", "file"}),
		sentBytes: counter("sent_bytes_total", "Bytes written to clients."),
		queued: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "holdfast_broker_deliveries_queued",
			Help: "Deliveries that wait for local subscribers.",
		}),
		drops: vec("deliveries_dropped_total", "Deliveries to local subscribers dropped, by reason. queue_full: a subscriber is slower than what it subscribed to; all_queues_full: many are.",
			"reason", dropQueueFull, dropAllFull, dropOffline, dropExpired, dropTooLarge, dropDenied, dropRefused, dropGone),
	}
	received := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "holdfast_broker_publish_received_total",
		Help: "PUBLISH packets from clients.",
	}, []string{"qos"})
	sent := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "holdfast_broker_publish_sent_total",
		Help: "PUBLISH packets to clients.",
	}, []string{"qos"})
	for qos, label := range []string{"0", "1", "2"} {
		m.received[qos] = received.WithLabelValues(label)
		m.sent[qos] = sent.WithLabelValues(label)
	}
	if reg != nil {
		reg.MustRegister(m.connections, m.connects, m.refusedConnects, m.turnedAway, m.endedBy, m.acceptErrors, m.panics,
			m.takeovers, m.expired, m.evicted, received, m.receivedBytes, m.acked, m.ackSeconds, m.repeats, m.refused, m.notRetained, m.wills,
			sent, m.sentBytes, m.commands, m.withdrawn, m.slowed, m.overslept, m.handshakeWait, m.handshakesLeft, m.certificates, m.queued, m.drops,
			gauge("deliveries_queued_bytes", "Bytes of deliveries that wait for local subscribers or for their acknowledgement, counted for each.",
				func() int { return int(b.queuedBytes.Load()) }),
			gauge("write_buffered_bytes", "Bytes that are being written to clients.", func() int { return int(b.writing.Load()) }),
			gauge("read_buffered_bytes", "Bytes of the buffers into which clients are read.", func() int { return int(b.reading.Load()) }),
			gauge("handshakes_waiting", "TLS handshakes that wait for a processor.", b.places.waiting),
			gauge("sessions", "Sessions, of connected and of offline clients.", b.sessionCount),
			gauge("subscriptions", "Subscriptions of all sessions.", func() int { return int(b.subs.count.Load()) }),
			gauge("retained_messages", "Retained messages.", func() int { n, _ := b.retained.stats(); return n }),
			gauge("retained_bytes", "Their payload bytes.", func() int { _, n := b.retained.stats(); return n }),
		)
	}
	return m
}

func (m *metrics) dropped(reason string) { m.drops.WithLabelValues(reason).Inc() }

func (m *metrics) refusedFor(reason mqtt.Reason) {
	m.refused.WithLabelValues(refusedLabel(reason)).Inc()
}

func refusedLabel(reason mqtt.Reason) string {
	switch reason { //nolint:exhaustive // the others are errors
	case mqtt.NotAuthorized:
		return "not_authorized"
	case mqtt.QuotaExceeded:
		return "quota_exceeded"
	case mqtt.TopicNameInvalid:
		return "topic_invalid"
	}
	return "error"
}

func (m *metrics) ended(err error) {
	var (
		broken  *mqtt.Error
		refused *refusal
		wanted  *ordered
	)
	label := endOther
	switch {
	case errors.As(err, &wanted):
		label = endOrdered
	case errors.Is(err, errGoodbye), errors.Is(err, errHungUp), isEOF(err), isReset(err), errors.Is(err, net.ErrClosed):
		label = endClient
	case errors.Is(err, errSlow):
		label = endSlow
	case errors.Is(err, errTakenOver):
		label = endTakeover
	case errors.Is(err, errStopping):
		label = endStop
	case errors.Is(err, errNoWords), errors.Is(err, errCommit):
		label = endRefused
	case errors.Is(err, errTimeout), isSilent(err):
		label = endTimeout
	case errors.As(err, &broken):
		label = endProtocol
	case errors.As(err, &refused):
		label = endProtocol
		if refused.reason == mqtt.KeepAliveTimeout {
			label = endTimeout
		}
	}
	m.endedBy.WithLabelValues(label).Inc()
}
