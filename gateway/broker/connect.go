package broker

import (
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"holdfast/internal/mqtt"
)

// ConnectInfo is what an Authorizer judges a CONNECT by.
type ConnectInfo struct {
	ClientID    string // never empty
	Username    string
	HasUsername bool
	Password    []byte               // valid during the call
	TLS         *tls.ConnectionState // nil: no TLS
	Remote      net.Addr
	Listener    string // name
}

// Authorizer says who may do what. The device is the client id that Connect let in. Its methods
// are called from many goroutines; those after Connect for each message, so they must be quick.
type Authorizer interface {
	// Connect lets a client in by returning nil. ErrBadCredentials and its like in the error
	// choose what the client is told.
	Connect(c *ConnectInfo) error
	// MayPublish is asked for every message, for wills too. topic is valid during the call.
	MayPublish(device string, topic []byte) bool
	// MaySubscribe is asked for each filter of a SUBSCRIBE (of a shared subscription: without
	// $share and name) and, with the topic as the filter, for each delivery.
	MaySubscribe(device string, filter string) bool
}

// connect handles CONNECT.
func (c *conn) connect(frame []byte) error {
	k, err := mqtt.ParseConnect(frame)
	if err != nil {
		var broken *mqtt.Error
		if errors.As(err, &broken) {
			c.refuseConnect(broken.AppendConnack(nil))
		}
		return err
	}
	c.version, c.id = k.Version, k.ClientID
	assigned := ""
	if c.id == "" {
		assigned = "hf-" + rand.Text()
		c.id = assigned
	}
	c.device = []byte(c.id)
	refuse := func(reason mqtt.Reason, err error) error {
		c.b.m.refusedConnects.Inc()
		c.refuseConnect(mqtt.AppendConnack(nil, c.version, &mqtt.Connack{Reason: reason}))
		return fmt.Errorf("CONNECT refused, %v: %w", reason, err)
	}
	switch {
	case k.HasAuth:
		return refuse(mqtt.BadAuthenticationMethod, errors.New("enhanced authentication is not supported"))
	case len(c.id) > c.b.cfg.MaxClientID:
		return refuse(mqtt.ClientIDNotValid, fmt.Errorf("client id of %d bytes", len(c.id)))
	}
	info := ConnectInfo{
		ClientID: c.id, Username: k.Username, HasUsername: k.HasUsername, Password: k.Password,
		Remote: c.sock.RemoteAddr(), Listener: c.listener.Name,
	}
	if t, ok := c.tls(); ok {
		state := t.ConnectionState()
		info.TLS = &state
	}
	if err := c.b.auth.Connect(&info); err != nil {
		return refuse(connectReason(err), err)
	}
	if w := k.Will; w != nil {
		switch {
		case tooDeep(w.Topic, c.b.cfg.MaxTopicLevels):
			return refuse(mqtt.TopicNameInvalid, errors.New("topic of the will has too many levels"))
		case !c.b.auth.MayPublish(c.id, []byte(w.Topic)):
			return refuse(mqtt.NotAuthorized, fmt.Errorf("will on %q", w.Topic))
		}
	}

	answer := mqtt.Connack{AssignedClientID: assigned}
	keepAlive := time.Duration(k.KeepAlive) * time.Second
	expiry := k.SessionExpiry
	c.window = int(c.b.cfg.ReceiveMaximum)
	c.sendMax = c.b.cfg.MaxInflight
	if c.version == mqtt.V5 {
		if keepAlive == 0 || keepAlive > c.b.cfg.MaxKeepAlive {
			keepAlive = c.b.cfg.MaxKeepAlive
			answer.HasKeepAlive, answer.KeepAlive = true, uint16(keepAlive/time.Second)
		}
		if most := c.b.expiryMax(); expiry > most {
			expiry = most
			answer.HasSessionExpiry, answer.SessionExpiry = true, most
		}
		answer.ReceiveMaximum = c.b.cfg.ReceiveMaximum
		answer.MaximumPacketSize = uint32(c.b.cfg.MaxPacket)
		answer.TopicAliasMaximum = c.b.cfg.TopicAliasMaximum
		c.sendMax = min(c.sendMax, int(k.ReceiveMaximum))
		c.maxPacket = k.MaximumPacketSize
	} else {
		expiry = 0
		if !k.CleanStart {
			expiry = c.b.expiryMax()
		}
	}
	c.keepAlive = keepAlive + keepAlive/2 // MQTT-3.1.2-22
	if k.Will != nil {
		w := newWill(k.Will, expiry)
		c.mu.Lock()
		c.will = w
		c.mu.Unlock()
	}
	err = c.b.attach(c, k, expiry, func(present bool) []byte {
		answer.SessionPresent = present
		return mqtt.AppendConnack(nil, c.version, &answer)
	})
	var refused *refusal
	switch {
	case err == nil:
		if err := c.awaitConnack(); err != nil {
			return err
		}
		c.b.m.connects.Inc()
		c.b.log.Debug("client connected", "client", c.id, "remote", c.remote, "listener", c.listener.Name,
			"mqtt", c.version.String(), "clean", k.CleanStart)
	case c.sess == nil && errors.As(err, &refused):
		return refuse(refused.reason, err)
	}
	return err
}

// awaitConnack waits until CONNACK is on its way: whatever the client has sent along is handled
// after that, since no answer may come before it (MQTT-3.2.0-1).
func (c *conn) awaitConnack() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.established && !c.ending {
		c.cond.Wait()
	}
	if c.ending {
		return errEnded
	}
	return nil
}

// refuseConnect sends a CONNACK that is the last packet.
func (c *conn) refuseConnect(connack []byte) {
	if len(connack) == 0 {
		return
	}
	c.mu.Lock()
	c.appendLocked(func(b []byte) []byte { return append(b, connack...) })
	c.mu.Unlock()
}
