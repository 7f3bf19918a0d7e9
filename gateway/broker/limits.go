package broker

import (
	"time"

	"holdfast/internal/mqtt"
)

// meter holds one client to its Limits with two buckets that fill with time. A second's worth is
// in each at most, and at least ten messages. One large packet may take more bytes than are there:
// what comes after it waits the longer. Only serve touches it.
type meter struct {
	limits   Limits
	messages bucket
	bytes    bucket

	since        time.Time // when counting of what was refused began
	refused      int       // since then
	refusedBytes int64
	told         bool // that the client is over its limits was logged
}

// bucket has room for so much, in units of what is limited.
type bucket struct {
	rate  float64 // a second; 0: no limit
	most  float64
	level float64
	at    time.Time
}

const burstMessages = 10

// newMeter gives nil where nothing is limited.
func newMeter(l Limits, now time.Time) *meter {
	if l.MessagesPerSecond <= 0 && l.BytesPerSecond <= 0 {
		return nil
	}
	m := &meter{limits: l, since: now}
	if n := float64(l.MessagesPerSecond); n > 0 {
		most := max(n, burstMessages)
		m.messages = bucket{rate: n, most: most, level: most, at: now}
	}
	if n := float64(l.BytesPerSecond); n > 0 {
		m.bytes = bucket{rate: n, most: n, level: n, at: now}
	}
	return m
}

func (b *bucket) fill(now time.Time) {
	if b.rate > 0 {
		b.level = min(b.most, b.level+b.rate*max(now.Sub(b.at), 0).Seconds())
		b.at = now
	}
}

// wait tells how long it takes until there is enough of least.
func (b *bucket) wait(least float64) time.Duration {
	if b.rate == 0 || b.level >= least {
		return 0
	}
	return time.Duration((least - b.level) / b.rate * float64(time.Second))
}

func (b *bucket) take(n float64) {
	if b.rate > 0 {
		b.level = max(b.level-n, -b.rate*mostDebt.Seconds())
	}
}

// mostDebt bounds what one packet may cost those that come after it.
const mostDebt = 10 * time.Second

// wait tells how long a message has to wait; 0: it may pass.
func (m *meter) wait(now time.Time) time.Duration {
	m.messages.fill(now)
	m.bytes.fill(now)
	return max(m.messages.wait(1), m.bytes.wait(1))
}

func (m *meter) take(size int) {
	m.messages.take(1)
	m.bytes.take(float64(size))
}

// refuse counts a message that was refused, and says whether that has gone on for too long: more than
// ten times what the limit allows in a second were refused within ten.
func (m *meter) refuse(now time.Time, size int) (enough bool) {
	const window = 10
	if now.Sub(m.since) > window*time.Second {
		m.since, m.refused, m.refusedBytes = now, 0, 0
	}
	m.refused++
	m.refusedBytes += int64(size)
	return m.limits.MessagesPerSecond > 0 && m.refused > window*max(m.limits.MessagesPerSecond, burstMessages) ||
		m.limits.BytesPerSecond > 0 && m.refusedBytes > window*m.limits.BytesPerSecond && m.refused > window*burstMessages
}

// setLimits has the limits hold that the rights name now.
func (c *conn) setLimits() {
	l := c.rights.Limits()
	if m := c.meter.Load(); m != nil && m.limits == l {
		return
	}
	c.meter.Store(newMeter(l, time.Now()))
}

// overLimit measures a message. A client of MQTT 3.1.1, which cannot be told, is slowed down
// instead: it is not read for a while.
func (c *conn) overLimit(m *meter, qos byte, id uint16, size int) (refuse bool, err error) {
	now := time.Now()
	wait := m.wait(now)
	if wait == 0 {
		m.take(size)
		return false, nil
	}
	if qos == 2 && c.sess.holds(id) {
		return false, nil // a repeat of what is stored: a refusal would be a lie
	}
	if !m.told {
		m.told = true
		c.b.log.Info("client publishes more than it may", "client", c.id, "messages_per_second", m.limits.MessagesPerSecond,
			"bytes_per_second", m.limits.BytesPerSecond)
	}
	if c.version != mqtt.V5 {
		if err := c.pause(wait); err != nil {
			return false, err
		}
		m.wait(time.Now())
		m.take(size)
		return false, nil
	}
	if m.refuse(now, size) {
		return false, errOverRate
	}
	return true, nil
}

// pause does nothing for a while, in which the client is not read. It is short against the keep
// alive: the client, whose PINGREQ waits too, must not think that the gateway is gone.
func (c *conn) pause(d time.Duration) error {
	d = min(d, mostDebt)
	if c.keepAlive > 0 {
		d = min(d, c.keepAlive/6)
	}
	c.b.m.slowed.Add(d.Seconds())
	until := time.Now().Add(d)
	wake := time.AfterFunc(d, func() {
		c.mu.Lock()
		c.cond.Broadcast()
		c.mu.Unlock()
	})
	defer wake.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirty = false
	c.startFlushLocked() // what was answered before
	for !c.ending && !c.halted.Load() && time.Now().Before(until) {
		c.cond.Wait()
	}
	switch {
	case c.ending:
		return errEnded
	case c.halted.Load():
		return errStopping
	}
	return nil
}

// holds says whether a QoS 2 message with this id is stored, or about to be, and not released.
func (s *session) holds(id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.rx[id]
	return e != nil && e.state != rxReleasing
}
