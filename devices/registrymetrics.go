package devices

import "github.com/prometheus/client_golang/prometheus"

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
