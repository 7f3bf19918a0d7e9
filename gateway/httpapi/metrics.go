package httpapi

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	requests *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "holdfast_httpapi_requests_total",
		Help: "Requests answered, by route and status code. 403 rising: somebody asks from another machine, or without being allowed to.",
	}, []string{"route", "code"})}
	if reg != nil {
		reg.MustRegister(m.requests)
	}
	return m
}
