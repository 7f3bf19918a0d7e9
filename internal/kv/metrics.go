package kv

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	groups, excises, stalls, backgroundErrors, corruptions, damaged prometheus.Counter
	commit                                                          prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "holdfast_kv_" + name + "_total", Help: help})
	}
	m := &metrics{
		groups:           counter("group_commits", "Group commits. Messages per commit fall when the load is low."),
		excises:          counter("excises", "Ranges of delivered or dropped chunks given back to the file system."),
		stalls:           counter("write_stalls", "Times the store made writers wait. A rise means that the disk cannot keep up with flushes."),
		backgroundErrors: counter("background_errors", "Flushes or compactions that failed. A rise means a full or failing disk."),
		corruptions:      counter("corruptions", "Damaged blocks found while reading. Any rise means a failing disk."),
		damaged:          counter("damaged_files", "Files of the store that were damaged when it was opened, and set aside. Any rise means a failing disk."),
		commit: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "holdfast_kv_commit_seconds",
			Help:    "Time from the start of a group commit to its fsync. A rise means a slower disk.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
		}),
	}
	if r != nil {
		r.MustRegister(m.groups, m.excises, m.stalls, m.backgroundErrors, m.corruptions, m.damaged, m.commit)
	}
	return m
}
