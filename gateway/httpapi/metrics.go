package httpapi

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	requests    *prometheus.CounterVec
	seconds     *prometheus.HistogramVec
	wrongTokens prometheus.Counter
	streams     prometheus.Gauge
	streamsCut  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_httpapi_requests_total",
			Help: "Requests answered, by route and status code. 401 or 403 rising: somebody asks without being allowed to.",
		}, []string{"route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "holdfast_httpapi_request_seconds",
			Help:    "How long requests took, by route, without event streams; waiting that was asked for counts. Rising: the disk or the machine is behind.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"route"}),
		wrongTokens: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_httpapi_wrong_tokens_total",
			Help: "Tokens shown that are not known or have expired. Rising: a program has an old token, or somebody tries; the log names the address.",
		}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "holdfast_httpapi_event_streams",
			Help: "Streams of events that are open. At the limit, others are turned away.",
		}),
		streamsCut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_httpapi_event_streams_cut_total",
			Help: "Streams of events that were ended because their reader did not keep up. Rising: a reader or its link is too slow.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.seconds, m.wrongTokens, m.streams, m.streamsCut)
	}
	return m
}
