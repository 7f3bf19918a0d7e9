package mqttup

import (
	"context"
	"errors"
	"sync"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"holdfast/bridge"
	"holdfast/bridge/wire"
)

// maxUnacked is how many messages a handler of TakeCommands may hold without having acknowledged them. Then nothing is read
// until it has. Brokers have bounds of their own, often lower.
const maxUnacked = 1024

// CommandsFromConfig makes the options with which a gateway takes commands from a configured upstream: as the bridge
// has them, under a client id of their own.
func CommandsFromConfig(c bridge.Config, gateway string) Options {
	return Options{
		URLs: c.Addresses(), ClientID: CommandsClientID(gateway, c.Name), Username: c.Username, PasswordFile: c.PasswordFile, TLS: c.TLS, Persistent: true,
	}
}

// CommandsClientID is the id under which the broker keeps a gateway's commands: ClientID with -cmd at the end. It must
// stay the same.
func CommandsClientID(gateway, upstream string) string {
	id := ClientID(gateway, upstream) + "-cmd"
	if len(id) > maxClientID {
		return ClientID(gateway, upstream+"-cmd") // cut, and told apart by its hash
	}
	return id
}

// Incoming is a message that TakeCommands hands over.
type Incoming struct {
	Topic   string
	Payload []byte // the handler's; longer than Options.MaxPayload if it was cut
	// Retained: the broker keeps it and sends it again at each subscription, so that it must be recognised by its id.
	Retained bool
	Dup      bool // the broker says that it sent it before

	window *window
	n      uint64
}

// Ack tells the broker that the message is safe here. It may be called from any goroutine, does not block, and does
// nothing the second time, or when the connection has ended: then the broker sends the message again. The broker is
// told in the order in which the messages came, as MQTT wants it (MQTT 3.1.1 §4.6): what came before and is not
// acknowledged holds up what came after.
func (m Incoming) Ack() {
	if m.window != nil {
		m.window.ack(m.n)
	}
}

// TakeCommands calls handler for each message on filter until ctx ends, and then returns nil. The session at the broker
// is persistent: what is published while nobody is connected comes with the next connection; a broker that has
// forgotten the session is told of in o.Log. It never gives up:
// connections that fail and subscriptions that are refused are tried again after 500 ms to 30 s, with full jitter.
// o.OnState is told of each change, o.Log of those that say something new. An error means that o is wrong.
//
// Calls of handler come one after the other, in the order of arrival, and none after TakeCommands has returned. handler
// is to return quickly and to call Ack once what it was given is stored, so that many share one commit; with 1,024
// unacknowledged ones no more are read. Messages that were not acknowledged before a connection ended come again on the
// next, usually with Dup.
//
// Empty retained messages, which are how a retained message is removed, are not handed over. A payload above
// o.MaxPayload (here by default wire.MaxSubmit) is cut to one byte more than that, so that it can be refused; otherwise
// the broker would send it for ever.
func TakeCommands(ctx context.Context, o Options, filter string, handler func(m Incoming)) error {
	if filter == "" {
		return errors.New("no filter to subscribe to")
	}
	o.Persistent = true
	if o.MaxPayload == 0 {
		o.MaxPayload = wire.MaxSubmit
	}
	s, err := newSubscriber(o, []string{filter})
	if err != nil {
		return err
	}
	s.shortest, s.longest = 500*time.Millisecond, 30*time.Second
	s.manual, s.cut = true, true
	s.take = func(c *conn) func(paho.Message) {
		w := &window{conn: c, room: make(chan struct{}, 1)}
		return func(m paho.Message) {
			in := Incoming{Topic: m.Topic(), Payload: m.Payload(), Retained: m.Retained(), Dup: m.Duplicate()}
			if m.Qos() > 0 { // others are not acknowledged
				if in.n, in.window = w.take(m.MessageID()), w; in.n == 0 {
					return // the connection has ended: it comes again
				}
			}
			if in.Retained && len(in.Payload) == 0 {
				in.Ack()
				return
			}
			handler(in)
		}
	}
	// Only run's goroutine touches these.
	var told string
	had := map[string]bool{} // by address: a session with the subscription
	s.up = func(*conn) {
		told = ""
		if had[s.o.URL] && s.anew {
			s.log.Warn("broker has forgotten the session: what was published since the last connection and waited there is lost; give the broker persistence", "filter", filter)
		}
		had[s.o.URL] = true
		s.log.Info("commands are taken", "filter", filter, "session_present", !s.anew)
	}
	s.failed = func(err error, up, _ bool) error {
		if text := err.Error(); up || text != told {
			told = text
			s.log.Warn("commands are not taken, trying again", "filter", filter, "err", err, "was_up", up)
		}
		return nil
	}
	return s.run(ctx)
}

// window is what of one connection's messages is not acknowledged.
type window struct {
	conn *conn
	room chan struct{} // rings when something was acknowledged

	mu      sync.Mutex
	flights [maxUnacked]struct { // the message number n is at n modulo maxUnacked
		id    uint16
		acked bool
	}
	head, tail uint64 // of the oldest unacknowledged one, and of the last that came; from 1
	out        []byte // kept
}

// take notes a message and returns its number, once there is room. 0: the connection has ended.
func (w *window) take(id uint16) (n uint64) {
	for {
		w.mu.Lock()
		if w.head == 0 {
			w.head = 1
		}
		if w.tail+1-w.head < maxUnacked {
			w.tail++
			n = w.tail
			f := &w.flights[n%maxUnacked]
			f.id, f.acked = id, false
			w.mu.Unlock()
			return n
		}
		w.mu.Unlock()
		select {
		case <-w.room:
		case <-w.conn.over:
			return 0
		}
	}
}

func (w *window) ack(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < w.head || w.flights[n%maxUnacked].acked {
		return
	}
	w.flights[n%maxUnacked].acked = true
	w.out = w.out[:0]
	for ; w.head <= w.tail && w.flights[w.head%maxUnacked].acked; w.head++ {
		id := w.flights[w.head%maxUnacked].id
		w.out = append(w.out, 0x40, 2, byte(id>>8), byte(id)) // PUBACK (MQTT 3.1.1 §3.4)
	}
	if len(w.out) == 0 {
		return
	}
	_, _ = w.conn.Write(w.out) // under mu, for the order; it does not block
	select {
	case w.room <- struct{}{}:
	default:
	}
}
