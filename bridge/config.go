package bridge

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// The formats (docs/formats.md).
const (
	// FormatBatch sends a lane's records together and compressed, to gw/{gateway}/data/{lane}.
	FormatBatch = "batch"
	// FormatPassthrough sends each message as the device did: its topic behind TopicPrefix, its
	// payload and its RETAIN flag, with QoS 1 whatever the device used. So does a mosquitto bridge with
	// "topic # out 1" and a remote prefix.
	FormatPassthrough = "passthrough"
	// FormatCloudEvents sends each message as a CloudEvents 1.0 JSON event to gw/{gateway}/msg/{device}.
	FormatCloudEvents = "cloudevents"
)

// Config is one upstream of the configuration file.
type Config struct {
	Name         string   `yaml:"name"`
	URL          string   `yaml:"url"`
	URLs         []string `yaml:"urls"` // instead of URL: tried in turn, the first is home
	Format       string   `yaml:"format"`
	TopicPrefix  string   `yaml:"topic_prefix"`
	Username     string   `yaml:"username"`
	PasswordFile string   `yaml:"password_file"`
	TLS          TLS      `yaml:"tls"`
	Lanes        []string `yaml:"lanes"`
	Window       int      `yaml:"window"`
	Commands     bool     `yaml:"commands"`
	Budget       Budget   `yaml:"budget"`

	Tuning Tuning `yaml:"-"`
}

// TLS are files in PEM form. CA: who signed the upstream's certificate (none: the system's roots).
// Cert and Key: what the gateway shows.
type TLS struct {
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// DefaultWindow is how many sends may be in flight if the configuration does not say.
const DefaultWindow = 256

// maxWindow keeps well below the 65,535 packet ids of MQTT.
const maxWindow = 16384

// Tuning are the settings that no operator should have to touch. Zero means the default.
type Tuning struct {
	// AckTimeout is how long nothing may move while sends wait for acks: 30 s. It bounds the time
	// without progress, not the time of a send.
	AckTimeout time.Duration
	// DrainTimeout is how long a stop waits for open acks: 5 s.
	DrainTimeout time.Duration
	// ConnectTimeout bounds one attempt to connect: 20 s.
	ConnectTimeout time.Duration
	// BackoffMin and BackoffMax bound the pause between attempts: 500 ms and 30 s.
	BackoffMin, BackoffMax time.Duration
	// BatchBytes and BatchRecords bound a batch before compression: 128 KiB and 4,096.
	BatchBytes, BatchRecords int
	// BatchLinger is how long the lowest lane collects for a batch while it is busy: 30 ms. Lanes above
	// it collect less, by their rank. An idle lane sends at once.
	BatchLinger time.Duration
	// InFlightBytes bounds what is in flight, as it is sent: 4 MiB.
	InFlightBytes int
	// ReturnAfter is how long a link is at another than the first of several addresses before the first is probed: 1 min.
	ReturnAfter time.Duration
	// Kicks is how many connections one message may cost, all ended by the upstream with nothing acked, before it
	// is parked: 10.
	Kicks int
	// Now is the wall clock, by which messages and days go: the spool's, time.Now without one. Synced tells whether it is set right; nil: it always is.
	Now    func() time.Time
	Synced func() bool
}

func (c Config) withDefaults() Config {
	def(&c.Format, FormatBatch)
	def(&c.Window, DefaultWindow)
	t := &c.Tuning
	def(&t.AckTimeout, 30*time.Second)
	def(&t.DrainTimeout, 5*time.Second)
	def(&t.ConnectTimeout, 20*time.Second)
	def(&t.BackoffMin, 500*time.Millisecond)
	def(&t.BackoffMax, 30*time.Second)
	def(&t.BatchBytes, 128<<10)
	def(&t.BatchRecords, 4096)
	def(&t.BatchLinger, 30*time.Millisecond)
	def(&t.InFlightBytes, paceHigh)
	def(&t.Kicks, 10)
	def(&t.ReturnAfter, returnSoonest)
	if t.Now == nil {
		t.Now = time.Now
	}
	if t.Synced == nil {
		t.Synced = func() bool { return true }
	}
	return c
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Addresses are the upstream's, in the order in which they are tried.
func (c *Config) Addresses() []string {
	if len(c.URLs) > 0 {
		return c.URLs
	}
	return []string{c.URL}
}

// Validate tells everything that is wrong with c, one error a line, each beginning with the key.
// Whether the lanes exist is for the spool to say.
func (c Config) Validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf(key+": "+format, args...))
	}
	if c.Name == "" {
		bad("name", "is missing: cursors are kept under it, so choose one that stays")
	} else if strings.ContainsFunc(c.Name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		bad("name", "%q holds spaces or control characters", c.Name)
	}
	c.checkURLs(bad)
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		bad("tls", "needs both cert and key, or neither")
	}
	switch c.Format {
	case "", FormatBatch, FormatPassthrough, FormatCloudEvents:
	default:
		bad("format", "%q is not known: batch, passthrough or cloudevents", c.Format)
	}
	if c.TopicPrefix != "" {
		if c.Format != FormatPassthrough {
			bad("topic_prefix", "only works with format passthrough")
		}
		if strings.ContainsAny(c.TopicPrefix, "+#\x00") {
			bad("topic_prefix", "%q holds a wildcard", c.TopicPrefix)
		}
	}
	if c.PasswordFile != "" && c.Username == "" {
		bad("password_file", "needs a username: MQTT 3.1.1 has no password without one")
	}
	if c.Window < 0 || c.Window > maxWindow {
		bad("window", "%d is not within 1 to %d", c.Window, maxWindow)
	}
	if err := c.Budget.Validate(); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			errs = append(errs, errors.New("budget."+line))
		}
	}
	seen := map[string]bool{}
	for _, l := range c.Lanes {
		if seen[l] {
			bad("lanes", "%q stands there twice", l)
		}
		seen[l] = true
	}
	return errors.Join(errs...)
}

func (c *Config) checkURLs(bad func(key, format string, args ...any)) {
	switch {
	case c.URL != "" && c.URLs != nil:
		bad("urls", "stands beside url: write one of the two")
		return
	case c.URLs != nil && len(c.URLs) == 0:
		bad("urls", "has no entry: write addresses, or url with one")
		return
	case c.URL == "" && c.URLs == nil:
		bad("url", "is missing, for example mqtts://broker.example.com:8883")
		return
	}
	schemes := map[string]bool{}
	seen := map[string]bool{}
	for i, raw := range c.Addresses() {
		key := "url"
		if c.URLs != nil {
			key = fmt.Sprintf("urls[%d]", i)
		}
		u, err := url.Parse(raw)
		switch {
		case err != nil:
			bad(key, "is not a URL") // no echo: it may hold a password
		case u.Scheme != "mqtt" && u.Scheme != "mqtts":
			bad(key, "scheme %q is not known: mqtt or mqtts", u.Scheme)
		case u.Hostname() == "":
			bad(key, "has no host")
		case u.User != nil:
			bad(key, "holds a user: write username and password_file instead")
		case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
			bad(key, "has more than scheme, host and port")
		case seen[raw]:
			bad(key, "stands there twice")
		}
		if err == nil {
			schemes[u.Scheme] = true
		}
		seen[raw] = true
	}
	switch {
	case schemes["mqtt"] && schemes["mqtts"]:
		bad("urls", "mixes mqtt and mqtts: whoever blocks the encrypted ones would have the link in clear; write one of the two")
	case schemes["mqtt"] && c.TLS != (TLS{}):
		bad("tls", "is set, but the url begins with mqtt: write mqtts")
	}
}
