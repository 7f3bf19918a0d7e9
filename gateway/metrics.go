package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"holdfast/gateway/httpapi"
)

// newMetrics registers what is about the gateway as a whole; the parts bring their own.
func newMetrics(reg prometheus.Registerer, g *Gateway) {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "holdfast_gateway_info",
		Help:        "Always 1; the labels say which gateway and which version of Holdfast this is.",
		ConstLabels: prometheus.Labels{"gateway": g.cfg.Gateway.ID, "version": g.version},
	})
	info.Set(1)
	reg.MustRegister(
		info,
		alarmMetrics{&g.alarms},
		g.audit.failures,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_ready",
			Help: "1 while every listener accepts. 0 for long: see the log.",
		}, func() float64 {
			if g.Ready() != nil {
				return 0
			}
			return 1
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_ledger_unbalanced",
			Help: "Accounts in which accepted is not the sum of delivered, expired, evicted, parked and pending. Anything but 0 is a defect.",
		}, func() float64 {
			n := 0
			for _, a := range g.spool.Accounts() {
				if !a.Balanced() {
					n++
				}
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_clock_synced",
			Help: "1 if the kernel says that something keeps its clock right. 0: receive times may be wrong, and messages carry a flag that says so.",
		}, func() float64 {
			if g.clock.Read().Unsynced {
				return 0
			}
			return 1
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_store_bytes",
			Help: "What the store takes on disk. Rising: messages wait for their upstream.",
		}, func() float64 { return float64(g.store.DiskBytes()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_disk_free_bytes",
			Help: "What is free on the file system of data_dir; 0: not known.",
		}, func() float64 { return float64(g.store.Disk().Free) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_disk_reserve_bytes",
			Help: "The reserve in effect: with less than this free, messages are refused or the oldest dropped.",
		}, func() float64 { return float64(g.store.Disk().Reserve) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_gateway_disk_level",
			Help: "0: ok; 1: high, QoS 0 is shed and MQTT 3.1.1 publishers are slowed; 2: full, lanes do what when_full says.",
		}, func() float64 { return float64(g.store.Level()) }),
	)
}

// alarmMetrics counts alarms when metrics are asked for.
type alarmMetrics struct{ a *alarms }

var descAlarms = prometheus.NewDesc("holdfast_gateway_alarms",
	"What a person should look at now, by alarm; GET /api/v1/alarms and the log say what it is.", []string{"alarm"}, nil)

// Describe implements prometheus.Collector.
func (m alarmMetrics) Describe(ch chan<- *prometheus.Desc) { ch <- descAlarms }

// Collect implements prometheus.Collector.
func (m alarmMetrics) Collect(ch chan<- prometheus.Metric) {
	n := m.a.count()
	for _, name := range httpapi.AlarmNames {
		ch <- prometheus.MustNewConstMetric(descAlarms, prometheus.GaugeValue, float64(n[name]), name)
	}
}
