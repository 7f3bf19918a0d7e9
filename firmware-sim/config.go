package firmwaresim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"holdfast/internal/mqtt"
)

// Config says what the fleet is and what it does. Broker is needed; the zero value of
// everything else is a sensible choice.
type Config struct {
	// Broker is mqtt://host:port or mqtts://host:port; default ports are 1883 and 8883.
	Broker string
	TLS    *tls.Config // for mqtts; nil: the system's roots
	// Username and Password are those of every device; "": none. They may stand in Broker too.
	Username, Password string
	// Dialer replaces net.Dialer.DialContext.
	Dialer  func(ctx context.Context, network, address string) (net.Conn, error)
	Version mqtt.Version // 0: 5
	// PasswordOf gives each device a password of its own, and its id as the user name unless Username is set.
	PasswordOf func(device string) string
	// CertificateOf gives each device a client certificate, asked for at each connection.
	CertificateOf func(device string) (*tls.Certificate, error)

	Devices int    // 0: 1
	Prefix  string // device ids are {prefix}-00001 and so on; "": sim
	First   int    // number of the first device; 0: 1
	Profile string // see Profiles; "": mixed
	App     string // of the topic; "": the profile's

	// Rate is the messages a second of each device. 0: as fast as Window allows; nothing is
	// sampled while offline then.
	Rate float64
	// NoSamples is for devices that only take commands. Rate and Messages do not count then.
	NoSamples bool
	// Messages ends a device's sampling after so many; 0: no limit.
	Messages uint64
	// Duration ends sampling; 0: when Run's context ends or Messages are reached.
	Duration time.Duration
	// Drain is how long the fleet then goes on until all in flash is acknowledged; 0: 10 s,
	// negative: not at all.
	Drain time.Duration

	QoS    QoS // of all messages; 0: as the profile's streams say
	Size   int // exact bytes of each payload, at least MinSize; 0: as the values need
	Window int // messages in flight a device, at most 65000; 0: 16
	Buffer int // messages in flash a device; 0: 1000, more if Window is larger
	// CleanSession gives devices a session that ends with the connection.
	CleanSession bool
	KeepAlive    time.Duration // 0: 30 s, negative: none

	// Flaky is the probability, each second and connected device, that its link breaks: by
	// reset, by a plain close, in the middle of a packet, or so that the server does not
	// notice until the device comes back. Crash is the probability that it crashes.
	Flaky float64
	Crash float64
	// Seed decides values and faults; the same seed gives the same.
	Seed uint64

	// Commands makes devices take commands: they subscribe to cmd/{device}/req/#, do what comes there as
	// Execution says, and answer. See the package's documentation.
	Commands  bool
	Execution Execution

	// Awake lets devices sleep: each is on-line for so long in every Period, and then disconnects, with its
	// session kept. They begin spread over the first Period, and each period is up to 5 % longer or shorter.
	// Once sampling is over all are awake, to deliver what they have. 0: they do not sleep.
	Awake  time.Duration
	Period time.Duration // 0: a minute

	ConnectRate float64       // first connections a second, of the whole fleet; 0: 2000
	MinBackoff  time.Duration // 0: 250 ms
	MaxBackoff  time.Duration // 0: 30 s
}

// QoS is the quality of service of all messages of a fleet.
type QoS byte

// The choices. ByProfile leaves it to the profile's streams.
const (
	ByProfile QoS = iota
	QoS0
	QoS1
	QoS2
)

// MinSize is the smallest Config.Size: what device, stream, n and ts may need.
const MinSize = 128

const (
	maxWindow      = mqtt.SubscribeIDs - 1
	maxPrefix      = 24
	connectTimeout = 10 * time.Second
)

// target is a parsed Config.Broker.
type target struct {
	address  string
	tls      *tls.Config
	username string
	password string
}

// complete fills in the defaults and reports all that is wrong.
func (c *Config) complete() (target, error) {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	set(&c.Version, mqtt.V5)
	set(&c.Devices, 1)
	set(&c.Prefix, "sim")
	set(&c.First, 1)
	set(&c.Profile, "mixed")
	set(&c.Drain, 10*time.Second)
	set(&c.Window, 16)
	set(&c.Buffer, max(1000, c.Window+1))
	set(&c.KeepAlive, 30*time.Second)
	set(&c.ConnectRate, 2000)
	set(&c.MinBackoff, 250*time.Millisecond)
	set(&c.MaxBackoff, 30*time.Second)
	to, err := parseBroker(c.Broker, c.TLS)
	if err != nil {
		errs = append(errs, err)
	}
	set(&to.username, c.Username)
	set(&to.password, c.Password)
	if c.Version == mqtt.V311 && to.username == "" && to.password != "" {
		wrong("password without a user name: MQTT 3.1.1 does not have that")
	}
	if c.Version != mqtt.V311 && c.Version != mqtt.V5 {
		wrong("version %d: there are 4 (MQTT 3.1.1) and 5", c.Version)
	}
	if c.Devices < 0 || c.First < 0 {
		wrong("devices %d from number %d: neither may be negative", c.Devices, c.First)
	}
	if len(c.Prefix) > maxPrefix || strings.ContainsAny(c.Prefix, "/+#\"\\\x00") || !mqtt.ValidTopic(c.Prefix) {
		wrong("prefix %q: at most %d bytes, none of / + # \" \\", c.Prefix, maxPrefix)
	}
	if c.App != "" && (strings.Contains(c.App, "/") || !mqtt.ValidTopic(c.App)) {
		wrong("app %q: one topic level, without / + #", c.App)
	}
	if _, err := profileOf(c.Profile, 0); err != nil {
		errs = append(errs, err)
	}
	if c.Rate < 0 || c.Rate > 1e6 {
		wrong("rate %v: 0 to 1000000 messages a second and device", c.Rate)
	}
	if c.QoS > QoS2 {
		wrong("QoS %d: there are 0, 1 and 2", c.QoS-QoS0)
	}
	if c.Size != 0 && (c.Size < MinSize || c.Size > 1<<20) {
		wrong("size %d: at least %d bytes, at most %d", c.Size, MinSize, 1<<20)
	}
	if c.Window < 1 || c.Window > maxWindow {
		wrong("window %d: 1 to %d messages", c.Window, maxWindow)
	}
	if c.Buffer <= c.Window {
		wrong("buffer %d: more than the window of %d messages, since what is in flight stays in flash", c.Buffer, c.Window)
	}
	if c.KeepAlive > 0 && (c.KeepAlive < time.Second || c.KeepAlive > 65535*time.Second) {
		wrong("keep alive %v: 1 s to 65535 s", c.KeepAlive)
	}
	if c.Flaky < 0 || c.Flaky >= 1 || c.Crash < 0 || c.Crash >= 1 {
		wrong("flaky %v, crash %v: probabilities from 0 to below 1, each second and device", c.Flaky, c.Crash)
	}
	set(&c.Period, time.Minute)
	if c.Awake < 0 || c.Period <= c.Awake {
		wrong("awake %v in each %v: some of it, not all", c.Awake, c.Period)
	}
	c.Execution.complete(wrong)
	if c.ConnectRate < 0 || c.MinBackoff < 0 || c.MaxBackoff < c.MinBackoff {
		wrong("connect rate %v, backoff %v to %v: none may be negative, nor the second less than the first", c.ConnectRate, c.MinBackoff, c.MaxBackoff)
	}
	return to, errors.Join(errs...)
}

func set[T comparable](x *T, value T) {
	var zero T
	if *x == zero {
		*x = value
	}
}

func parseBroker(raw string, config *tls.Config) (to target, err error) {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" || !slices.Contains([]string{"mqtt", "mqtts"}, u.Scheme) {
		// The error of url.Parse would repeat a password.
		return to, errors.New("broker: not a URL of the form mqtt://host:port or mqtts://host:port")
	}
	port := u.Port()
	switch u.Scheme {
	case "mqtts":
		set(&port, "8883")
		to.tls = config.Clone()
		if to.tls == nil {
			to.tls = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		set(&to.tls.ServerName, u.Hostname())
	default:
		set(&port, "1883")
	}
	to.address = net.JoinHostPort(u.Hostname(), port)
	if u.User != nil {
		to.username = u.User.Username()
		to.password, _ = u.User.Password()
	}
	return to, nil
}
