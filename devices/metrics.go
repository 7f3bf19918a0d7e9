package devices

import (
	"fmt"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// How a login ended.
const (
	loginOK          = "ok"
	loginAnonymous   = "anonymous"
	loginCredentials = "credentials"
	loginDisabled    = "disabled"
	loginBadID       = "bad_id"
	loginTooOften    = "too_often"
	loginError       = "error"
)

type registryMetrics struct {
	logins     map[string]prometheus.Counter
	suppressed prometheus.Counter
	unreadable prometheus.Counter
	hashes     prometheus.Counter
}

func newRegistryMetrics(r *Registry, reg prometheus.Registerer) *registryMetrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "holdfast_devices_" + name, Help: help})
	}
	gauge := func(name, help string, f func() int) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "holdfast_devices_" + name, Help: help}, func() float64 { return float64(f()) })
	}
	logins := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "holdfast_devices_logins_total",
		Help: "Logins, by how they ended. credentials rising: somebody guesses, or devices were given wrong ones; too_often: a device flaps, or guessing is held off.",
	}, []string{"result"})
	m := &registryMetrics{
		logins: map[string]prometheus.Counter{},
		suppressed: counter("presence_events_suppressed_total",
			"Comings and goings of devices not told upstream one by one, because the device flaps. A rise means bad links, or two devices under one id."),
		unreadable: counter("rows_unreadable_total",
			"Device rows met that are damaged or of a newer version. They are kept; their devices cannot connect."),
		hashes: counter("password_hashes_total",
			"Passwords hashed with argon2id, 10 ms and 19 MiB each, two at a time. A rise means that devices log in with wrong passwords."),
	}
	for _, result := range []string{loginOK, loginAnonymous, loginCredentials, loginDisabled, loginBadID, loginTooOften, loginError} {
		m.logins[result] = logins.WithLabelValues(result)
	}
	if reg != nil {
		reg.MustRegister(logins, m.suppressed, m.unreadable, m.hashes,
			gauge("registered", "Registered devices.", func() int { return r.Counts().Registered }),
			gauge("connected", "Devices that are connected.", func() int { return r.Counts().Connected }),
			gauge("disabled", "Registered devices that are disabled.", func() int { return r.Counts().Disabled }),
		)
	}
	return m
}

// queueMetrics of one Queue.
type queueMetrics struct {
	submitted   prometheus.Counter
	ended       [len(stateNames)]prometheus.Counter // by State; nil where none is an end
	refused     *prometheus.CounterVec              // by code
	disbelieved *prometheus.CounterVec              // by reason
	sends       prometheus.Counter
	unsent      prometheus.Counter
	stale       prometheus.Counter
	acked       prometheus.Histogram
}

// The reasons of holdfast_devices_commands_answers_disbelieved_total.
const (
	answerMalformed     = "malformed"     // not an answer at all
	answerUnknown       = "unknown"       // there is no such command
	answerOtherDevice   = "other_device"  // it is another device's command
	answerNeverSent     = "never_sent"    // the device cannot have it
	answerEnded         = "ended"         // not an outcome, and too late
	answerContradiction = "contradiction" // another outcome was told before
)

var refusalCodes = []string{
	CodeUnknownDevice, CodeDisabled, CodeInvalid, CodeTooLarge, CodeQueueFull, CodeExpired, CodeConflict, CodeUnknown, CodeEnded, CodeUnavailable,
}

// refusalCode keeps the label's set closed.
func refusalCode(code string) string {
	if slices.Contains(refusalCodes, code) {
		return code
	}
	return "other"
}

func newQueueMetrics(r prometheus.Registerer, q *Queue) (*queueMetrics, error) {
	const prefix = "holdfast_devices_commands_"
	m := &queueMetrics{}
	var all []prometheus.Collector
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + name, Help: help})
		all = append(all, c)
		return c
	}
	counters := func(name, help, label string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, []string{label})
		all = append(all, c)
		return c
	}
	for s := Queued; s <= InProgress; s++ {
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: prefix + "pending", ConstLabels: prometheus.Labels{"state": s.String()},
			Help: "Commands that have no end yet. A rise of QUEUED means that devices are not there; of SENT, that they do not acknowledge.",
		}, func() float64 {
			q.mu.Lock()
			defer q.mu.Unlock()
			return float64(q.states[s])
		}))
	}
	m.submitted = counter("submitted_total", "Commands taken, without refused ones and repeats.")
	ended := counters("ended_total", "Commands that came to an end; a late outcome counts again. A rise of EXPIRED, TIMED_OUT or DEAD_LETTERED means devices that do not do what they are told.", "state")
	for s := Delivered; s <= DeadLettered; s++ {
		if s != InProgress {
			m.ended[s] = ended.WithLabelValues(s.String()) // DELIVERED: one-way
		}
	}
	m.refused = counters("refused_total", "Commands and cancellations not taken, by reason.", "code")
	for _, code := range refusalCodes {
		m.refused.WithLabelValues(code)
	}
	m.disbelieved = counters("answers_disbelieved_total", "Answers of devices that changed nothing because they cannot be true. A rise means faulty firmware, or somebody who tries.", "reason")
	for _, reason := range []string{answerMalformed, answerUnknown, answerOtherDevice, answerNeverSent, answerEnded, answerContradiction} {
		m.disbelieved.WithLabelValues(reason)
	}
	m.sends = counter("sends_total", "Commands written to a device, repeats included.")
	m.unsent = counter("sends_failed_total", "Commands that could not be written: the connection had ended, or the device takes no packet that large.")
	m.stale = counter("stale_acks_total", "Acknowledgements of deliveries that no longer count: the command had ended or was put back.")
	m.acked = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: prefix + "ack_seconds", Help: "Time from SENT to the device's acknowledgement. A rise means slow devices or a slow network.",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
	})
	all = append(all, m.acked)
	if r == nil {
		return m, nil
	}
	for i, c := range all {
		if err := r.Register(c); err != nil {
			for _, c := range all[:i] {
				r.Unregister(c)
			}
			return nil, fmt.Errorf("metrics of commands: %w", err)
		}
	}
	return m, nil
}
