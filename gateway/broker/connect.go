package broker

import (
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/mqtt"
)

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
	c.b.enterConnect(c)
	defer c.b.leaveConnect(c)
	rights, told, err := c.authorize(&info)
	switch {
	case !told:
		return err
	case err != nil:
		return refuse(connectReason(err), err)
	}
	c.rights = rights
	c.setLimits()
	if w := k.Will; w != nil {
		switch {
		case tooDeep(w.Topic, c.b.cfg.MaxTopicLevels):
			return refuse(mqtt.TopicNameInvalid, errors.New("topic of the will has too many levels"))
		case !c.rights.MayPublish([]byte(w.Topic)):
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
		w := newWill(k.Will, expiry, c.rights)
		c.mu.Lock()
		c.will = w
		c.mu.Unlock()
	}
	if c.b.watcher != nil {
		c.link = newLink(c, k)
	}
	err = c.b.attach(c, k, expiry, func(present bool) []byte {
		answer.SessionPresent = present
		if c.link != nil {
			c.link.info.SessionPresent = present
		}
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
		c.b.leaveConnect(c)
		c.tellConnected()
	case c.sess == nil && errors.As(err, &refused):
		return refuse(refused.reason, err)
	}
	return err
}

// tellConnected tells the watcher of the connection, and of subscriptions that its session brought along.
func (c *conn) tellConnected() {
	l := c.link
	if l == nil {
		return
	}
	l.connected = true
	c.b.watcher.Connected(l)
	s := c.sess
	s.mu.Lock()
	subscribed := s.conn == c && slices.ContainsFunc(s.subs, func(sub subscription) bool { return sub.requests() })
	s.mu.Unlock()
	if subscribed {
		c.b.watcher.Subscribed(l)
	}
}

// tellDisconnected tells it of the end.
func (c *conn) tellDisconnected() {
	if c.link == nil || !c.link.connected {
		return
	}
	c.mu.Lock()
	cause := c.cause
	c.mu.Unlock()
	c.b.watcher.Disconnected(c.link, causeText(cause))
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
