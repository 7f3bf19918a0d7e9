package broker

import (
	"errors"
	"fmt"
	"net"
	"time"

	"holdfast/internal/clock"
)

// Config of a broker. Zero values mean the default named at each field.
type Config struct {
	Listeners []Listener
	// Clock is the gateway's, by which sessions and messages end over a restart and certificates at their date; nil: one of the store and the
	// system.
	Clock *clock.Clock

	// Slow says whether publishers that cannot be told so, those of MQTT 3.1.1, are to be slowed down now. It is asked for each
	// of their messages. nil: never.
	Slow func() bool

	// Traced says whether each packet of a client is to be logged, without its payload, at level debug. It is asked for each of them, and has to
	// be cheap. nil: none is.
	Traced func(client string) bool

	// Connections.
	MaxConnections           int           // open at once, those without a CONNECT included; 20,000
	MaxConnectionsPerAddress int           // open at once from one address; 0: 512, but loopback without a limit
	ConnectTimeout           time.Duration // from Accept to the end of CONNECT: TLS and websocket handshake included; 10 s
	PacketTimeout            time.Duration // from a packet's first byte to its last; 10 s
	WriteTimeout             time.Duration // for one write to a peer; 10 s
	SilenceTimeout           time.Duration // in which a peer's TCP has to answer to data or, when nothing is sent, to probes; 2 min, at least 4 s
	ShutdownTimeout          time.Duration // for what is handed in to commit and be acknowledged; 5 s
	MaxKeepAlive             time.Duration // MQTT 5 clients with a longer keep alive, or none, are given this one; 30 min

	// What one client may have under way.
	MaxPacket         int    // bytes of one packet; 256 KiB
	MaxConnectPacket  int    // bytes of a CONNECT, all that is read before authentication; 32 KiB
	MaxClientID       int    // bytes; 256
	ReceiveMaximum    uint16 // QoS 1 and 2 messages not yet acknowledged; 256
	MaxUnackedBytes   int    // bytes of messages not yet committed; 1 MiB
	TopicAliasMaximum uint16 // 32
	MaxTopicLevels    int    // of a topic or filter; 128
	MaxSubscriptions  int    // 100
	MaxOutboundBytes  int    // bytes written but not yet taken by the peer; 1 MiB

	// What all clients may have under way together; see also MaxQueuedBytes.
	MaxWriteBytes int // bytes written but not yet taken by the peers; 64 MiB: then who has taken nothing for a second is ended
	MaxReadBytes  int // of read buffers; 64 MiB: then they stay small, and with twice that packets are refused that need large ones

	// Sessions and deliveries.
	MaxSessions          int           // kept at once, of connected and of offline clients; 50,000
	SessionExpiryMax     time.Duration // longest time a session outlives its connection; 7 days
	MaxSessionQueue      int           // messages that wait for one client; 1,000
	MaxSessionQueueBytes int           // and their bytes; 1 MiB
	MaxQueuedBytes       int           // bytes of the messages that wait for all clients or are unacknowledged, counted for each; 64 MiB
	MaxInflight          int           // QoS 1 and 2 messages sent to one client and not yet acknowledged; 64
	MaxRetained          int           // retained messages; 10,000
	MaxRetainedBytes     int           // and their bytes; 64 MiB
	MaxFanoutBytes       int           // bytes of messages that wait for local fan-out; 16 MiB
}

func or[T int | uint16 | time.Duration](x *T, def T) {
	if *x == 0 {
		*x = def
	}
}

func (c *Config) setDefaults() {
	or(&c.MaxConnections, 20_000)
	or(&c.ConnectTimeout, 10*time.Second)
	or(&c.PacketTimeout, 10*time.Second)
	or(&c.WriteTimeout, 10*time.Second)
	or(&c.SilenceTimeout, 2*time.Minute)
	or(&c.ShutdownTimeout, 5*time.Second)
	or(&c.MaxKeepAlive, 30*time.Minute)
	or(&c.MaxPacket, 256<<10)
	or(&c.MaxConnectPacket, 32<<10)
	or(&c.MaxClientID, 256)
	or(&c.ReceiveMaximum, 256)
	or(&c.MaxUnackedBytes, 1<<20)
	or(&c.TopicAliasMaximum, 32)
	or(&c.MaxTopicLevels, 128)
	or(&c.MaxSubscriptions, 100)
	or(&c.MaxOutboundBytes, 1<<20)
	or(&c.MaxWriteBytes, 64<<20)
	or(&c.MaxReadBytes, 64<<20)
	or(&c.MaxSessions, 50_000)
	or(&c.SessionExpiryMax, 7*24*time.Hour)
	or(&c.MaxSessionQueue, 1000)
	or(&c.MaxSessionQueueBytes, 1<<20)
	or(&c.MaxQueuedBytes, 64<<20)
	or(&c.MaxInflight, 64)
	or(&c.MaxRetained, 10_000)
	or(&c.MaxRetainedBytes, 64<<20)
	or(&c.MaxFanoutBytes, 16<<20)
}

func (c *Config) validate() (err error) {
	if c.MaxKeepAlive < time.Second || c.MaxKeepAlive > 65535*time.Second {
		err = errors.Join(err, fmt.Errorf("keep alive of %v: must be from 1s to 65535s", c.MaxKeepAlive))
	}
	if c.MaxPacket < 128 || c.MaxPacket > 256<<20 {
		err = errors.Join(err, fmt.Errorf("packet size of %d: must be from 128 to 268435456 bytes", c.MaxPacket))
	}
	names := map[string]bool{}
	for i := range c.Listeners {
		l := &c.Listeners[i]
		if names[l.Name] {
			err = errors.Join(err, fmt.Errorf("listener %q: the name is used twice", l.Name))
		}
		names[l.Name] = true
		err = errors.Join(err, l.Validate())
	}
	return err
}

// Listener is one address that devices connect to.
type Listener struct {
	Name     string `yaml:"name"`
	Protocol string `yaml:"protocol"` // mqtt, mqtts, ws or wss
	Address  string `yaml:"address"`  // host:port
	TLS      TLS    `yaml:"tls"`      // for mqtts and wss
	// MaxConnections are open on it at once; 0: no limit of its own, see Config.MaxConnections.
	MaxConnections int `yaml:"max_connections"`
}

// TLS names the files of a TLS listener.
type TLS struct {
	Cert              string `yaml:"cert"`      // PEM, the chain
	Key               string `yaml:"key"`       // PEM
	ClientCA          string `yaml:"client_ca"` // PEM; set: client certificates are checked against it
	RequireClientCert bool   `yaml:"require_client_cert"`
	CRL               string `yaml:"crl"` // PEM or DER, signed by ClientCA: certificates in it are refused
}

// Secure says whether the listener speaks TLS.
func (l *Listener) Secure() bool { return l.Protocol == "mqtts" || l.Protocol == "wss" }

func (l *Listener) websocket() bool { return l.Protocol == "ws" || l.Protocol == "wss" }

// Validate checks what can be checked without opening files or sockets.
func (l *Listener) Validate() (err error) {
	say := func(format string, args ...any) {
		err = errors.Join(err, fmt.Errorf("listener %q: %w", l.Name, fmt.Errorf(format, args...)))
	}
	if l.Name == "" {
		say("has no name")
	}
	switch l.Protocol {
	case "mqtt", "mqtts", "ws", "wss":
	default:
		say("protocol %q: must be mqtt, mqtts, ws or wss", l.Protocol)
	}
	if _, _, e := net.SplitHostPort(l.Address); e != nil {
		say("address %q: must be host:port", l.Address)
	}
	switch {
	case l.Secure() && (l.TLS.Cert == "" || l.TLS.Key == ""):
		say("protocol %s needs tls.cert and tls.key", l.Protocol)
	case !l.Secure() && l.TLS != TLS{}:
		say("tls is set, but protocol is %s; did you mean %ss?", l.Protocol, l.Protocol)
	case l.TLS.RequireClientCert && l.TLS.ClientCA == "":
		say("tls.require_client_cert needs tls.client_ca")
	case l.TLS.CRL != "" && l.TLS.ClientCA == "":
		say("tls.crl needs tls.client_ca, whose certificates sign it")
	}
	if l.MaxConnections < 0 {
		say("max_connections of %d: must be 0 (no limit) or more", l.MaxConnections)
	}
	return err
}
