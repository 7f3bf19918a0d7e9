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
	Format       string   `yaml:"format"`
	TopicPrefix  string   `yaml:"topic_prefix"`
	Username     string   `yaml:"username"`
	PasswordFile string   `yaml:"password_file"`
	TLS          TLS      `yaml:"tls"`
	Lanes        []string `yaml:"lanes"`
	Window       int      `yaml:"window"`
	Commands     bool     `yaml:"commands"`

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
	// Kicks is how many connections one message may cost, all ended by the upstream with nothing acked, before it
	// is parked: 10.
	Kicks int
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
	return c
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
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
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		bad("url", "is missing, for example mqtts://broker.example.com:8883")
	case err != nil:
		bad("url", "is not a URL") // no echo: it may hold a password
	case u.Scheme != "mqtt" && u.Scheme != "mqtts":
		bad("url", "scheme %q is not known: mqtt or mqtts", u.Scheme)
	case u.Hostname() == "":
		bad("url", "has no host")
	case u.User != nil:
		bad("url", "holds a user: write username and password_file instead")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		bad("url", "has more than scheme, host and port")
	}
	if err == nil && u.Scheme == "mqtt" && c.TLS != (TLS{}) {
		bad("tls", "is set, but the url begins with mqtt: write mqtts")
	}
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
	seen := map[string]bool{}
	for _, l := range c.Lanes {
		if seen[l] {
			bad("lanes", "%q stands there twice", l)
		}
		seen[l] = true
	}
	return errors.Join(errs...)
}
