// Package mqttup is the upstream that is an MQTT broker. It is the only importer of paho.
//
// paho connects, with the will, keeps alive, publishes birth and death, and subscribes. It reconnects by
// itself in a way that reports messages as acknowledged which were not, so each session here is a
// client of its own: clean session, no reconnect, no store. The spool is the store and the bridge the
// one that retries.
//
// A bridge's messages go past paho, through the connection that it keeps (conn.go): its Publish costs a
// message 6 µs, 38 allocations and five goroutines, twice what a mosquitto bridge needs. The packets are
// written here, under packet ids that paho does not use, and their PUBACKs taken before paho sees them.
//
// Commands come down on a client of their own (TakeCommands), with a persistent session and acknowledgements that wait
// until the gateway has stored what came. Client is for programs on the cloud's side.
package mqttup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	paho "github.com/eclipse/paho.mqtt.golang"

	"holdfast/bridge"
	"holdfast/bridge/wire"
)

// Options of an upstream or a subscriber.
type Options struct {
	URL  string   // mqtt://host[:1883] or mqtts://host[:8883]
	URLs []string // instead of URL: several, the first is home
	// Prefer names the one of several to be at, "" if it does not matter. For TakeCommands only; nil: it never matters.
	Prefer func() string
	// ClientID must be one that nobody else uses at that broker.
	ClientID     string
	Username     string
	PasswordFile string // read at each connection
	TLS          TLS
	// Now is what time it is for certificates; nil: time.Now.
	Now func() time.Time

	// Gateway, Epoch and Version make the birth and death messages. No Gateway: none are sent.
	Gateway, Epoch, Version string

	// For subscribers only. Persistent makes the broker keep messages while the subscriber is away. OnUp
	// is called each time the subscription has been made, OnState then with true, and with false and the reason after each
	// attempt that failed and each connection that was lost. Neither may block. Log is told of lost connections; nil: nobody is.
	Persistent bool
	OnUp       func()
	OnState    func(up bool, err error)
	Log        *slog.Logger

	// ConnectTimeout bounds a subscriber's attempt to connect: 20 s. A bridge has its own.
	ConnectTimeout time.Duration
	// KeepAlive is the interval of pings on an idle link: 30 s.
	KeepAlive time.Duration
	// Stall is how long the transport may stand still before the link counts as dead: 30 s.
	Stall time.Duration
	// MaxPayload is the largest payload sent or taken: 16 MiB.
	MaxPayload int
	// Pace is how many bytes a second a packet is written with that has more than half of that. 0: as fast as it goes.
	Pace int
	// Meter counts what goes out. nil: nobody does.
	Meter *bridge.Meter
	// Dialer opens connections. nil: one of the operating system's. Its time-outs are those of the context.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolver looks names up where Dialer is nil. nil: the default one.
	Resolver *net.Resolver
}

// TLS are files in PEM form; see bridge.TLS.
type TLS = bridge.TLS

const (
	defaultConnectTimeout = 20 * time.Second
	defaultKeepAlive      = 30 * time.Second
	defaultStall          = 30 * time.Second
	defaultMaxPayload     = 16 << 20

	maxTopic    = 65535
	maxClientID = 64
	// handOver bounds paho's Publish, which waits that long for its own goroutine if the connection
	// is lost at the wrong moment. The network does not count: writes only fill a buffer.
	handOver = 2 * time.Second
)

// Upstream dials an MQTT broker.
type Upstream struct{ o Options }

var (
	_ bridge.Upstream  = (*Upstream)(nil)
	_ bridge.Addressed = (*Upstream)(nil)
	_ bridge.Metered   = (*Upstream)(nil)
)

// Use implements bridge.Addressed.
func (u *Upstream) Use(i int) { u.o.URL = u.o.URLs[i] }

// Meter implements bridge.Metered.
func (u *Upstream) Meter(m *bridge.Meter) { u.o.Meter = m }

// Probe implements bridge.Addressed: it connects, by TLS if the address says so, and says nothing of MQTT, because the client id
// is in use and a broker behind both addresses would end the link.
func (u *Upstream) Probe(ctx context.Context, i int) error {
	address, err := url.Parse(u.o.URLs[i])
	if err != nil {
		return err
	}
	o := u.o // the fields that Use and Meter set are not looked at
	c, _, err := openTransport(ctx, address, o)
	if err != nil {
		return dialError(err)
	}
	return c.Close()
}

// New makes an upstream. It reads no file and connects to nothing yet.
func New(o Options) (*Upstream, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	return &Upstream{o}, nil
}

// FromConfig makes the upstream of a configured bridge. epoch is the spool's, version the program's.
//
// Certificates are held against now; nil: time.Now.
func FromConfig(c bridge.Config, gateway, epoch, version string, now func() time.Time) (*Upstream, error) {
	return New(Options{
		Now:  now,
		URLs: c.Addresses(), ClientID: ClientID(gateway, c.Name), Username: c.Username, PasswordFile: c.PasswordFile, TLS: c.TLS,
		Gateway: gateway, Epoch: epoch, Version: version, Pace: int(c.Budget.BytesPerSecond),
	})
}

// ClientID is the one that a gateway uses at an upstream: holdfast-{gateway}-{upstream}, kept to what every
// broker takes. Names that this would change or cut, or that another pair of names could lead to, get
// a hash at the end.
func ClientID(gateway, upstream string) string {
	plain := "holdfast-" + gateway + "-" + upstream
	id := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
			return r
		}
		return '_'
	}, plain)
	if id == plain && len(id) <= maxClientID && !strings.Contains(upstream, "-") {
		return id
	}
	sum := sha256.Sum256([]byte(gateway + "\x00" + upstream))
	return id[:min(len(id), maxClientID-9)] + "." + hex.EncodeToString(sum[:4])
}

func (o Options) withDefaults() Options {
	if len(o.URLs) > 0 {
		o.URL = o.URLs[0]
	} else {
		o.URLs = []string{o.URL}
	}
	if o.ConnectTimeout == 0 {
		o.ConnectTimeout = defaultConnectTimeout
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = defaultKeepAlive
	}
	if o.Stall == 0 {
		o.Stall = defaultStall
	}
	if o.MaxPayload == 0 {
		o.MaxPayload = defaultMaxPayload
	}
	return o
}

func (o Options) validate() error {
	for _, address := range o.URLs {
		u, err := url.Parse(address)
		if err != nil || u.Scheme != "mqtt" && u.Scheme != "mqtts" || u.Hostname() == "" || u.User != nil {
			return errors.New("url must be mqtt://host:port or mqtts://host:port, without a user")
		}
	}
	if o.ClientID == "" {
		return errors.New("no client id")
	}
	if o.Gateway != "" && o.Epoch == "" {
		return errors.New("no epoch")
	}
	return nil
}

// client connects a paho client over a conn of ours. lost is closed when the connection has ended
// after that and paho has let go of it. acks takes what the broker acknowledges of conn.publish.
func client(ctx context.Context, o Options, g guard, acks bridge.Acks, configure func(*paho.ClientOptions, *conn)) (paho.Client, *conn, <-chan struct{}, error) {
	u, err := url.Parse(o.URL)
	if err != nil {
		return nil, nil, nil, err
	}
	secret, err := password(o.PasswordFile)
	if err != nil {
		return nil, nil, nil, err
	}
	transport, tcp, err := openTransport(ctx, u, o)
	if err != nil {
		return nil, nil, nil, dialError(err)
	}
	c := newConn(transport, tcp, g, acks, o)
	// Whatever paho does, the attempt ends with ctx.
	stop := context.AfterFunc(ctx, func() { _ = c.fail(context.Cause(ctx)) })
	defer stop()

	lost := make(chan struct{})
	po := paho.NewClientOptions().
		SetClientID(o.ClientID).
		SetProtocolVersion(4).
		SetCleanSession(!o.Persistent).
		SetAutoReconnect(false).
		SetConnectRetry(false).
		SetStore(noStore{}).
		SetKeepAlive(o.KeepAlive).
		SetPingTimeout(24 * time.Hour). // conn watches the pings: it knows when a link is merely slow
		SetWriteTimeout(handOver).
		SetConnectTimeout(time.Hour). // ctx rules
		SetCustomOpenConnectionFn(func(*url.URL, paho.ClientOptions) (net.Conn, error) { return c, nil }).
		SetConnectionLostHandler(func(paho.Client, error) { close(lost) })
	po.AddBroker("tcp://" + u.Host)
	if o.Username != "" {
		po.SetUsername(o.Username).SetPassword(secret)
	}
	configure(po, c)
	pc := paho.NewClient(po)
	t := pc.Connect()
	<-t.Done()
	if err := t.Error(); err != nil {
		return nil, nil, nil, connectError(err, c)
	}
	if ct, ok := t.(*paho.ConnectToken); ok {
		c.resumed = ct.SessionPresent()
	}
	return pc, c, lost, nil
}

// dialError drops what changes from attempt to attempt.
func dialError(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Addr != nil {
		return fmt.Errorf("connect to %s: %w", op.Addr, op.Err)
	}
	return err
}

// connectError makes the reason of a failed CONNECT plain, and waits for the connection's goroutine.
func connectError(err error, c *conn) error {
	reason := c.reason()
	_ = c.fail(errClosed)
	<-c.flushed
	if ct, ok := refusals[err.Error()]; ok {
		return fmt.Errorf("%w: %s", bridge.ErrRefused, ct)
	}
	if reason != nil && !errors.Is(reason, errClosed) {
		return fmt.Errorf("connect: %w", reason)
	}
	return fmt.Errorf("connect: %w", err)
}

// refusals are paho's words for the CONNACK codes (MQTT 3.1.1 §3.2.2.3), with ours.
var refusals = map[string]string{
	"unacceptable protocol version": "it does not speak MQTT 3.1.1",
	"identifier rejected":           "it rejects the client id",
	"server Unavailable":            "its MQTT service is unavailable",
	"bad user name or password":     "bad user name or password",
	"not Authorized":                "not authorized",
}

// noStore keeps nothing: what is unacked is still in the spool.
type noStore struct{}

func (noStore) Open()                    {}
func (noStore) Put(string, packetOfPaho) {}
func (noStore) Get(string) packetOfPaho  { return nil }
func (noStore) All() []string            { return nil }
func (noStore) Del(string)               {}
func (noStore) Close()                   {}
func (noStore) Reset()                   {}

// checkTopic says why a topic name may not be sent (MQTT 3.1.1 §1.5.3, §3.3.2, §4.7).
func checkTopic(t string) error {
	switch {
	case t == "":
		return errors.New("topic is empty")
	case len(t) > maxTopic:
		return fmt.Errorf("topic has %d bytes, the protocol allows %d", len(t), maxTopic)
	case strings.ContainsAny(t, "+#\x00"):
		return fmt.Errorf("topic %.100q holds a wildcard or U+0000", t)
	case !utf8.ValidString(t):
		return fmt.Errorf("topic %.100q is not UTF-8", t)
	}
	return nil
}

// state is the payload of the birth or death message.
func (o Options) state(s string) []byte {
	b, err := json.Marshal(wire.State{State: s, Epoch: o.Epoch, Version: o.Version, TS: time.Now().UnixMilli()})
	if err != nil {
		panic(err) // strings and a number
	}
	return b
}
