package firmwaresim

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"holdfast/internal/mqtt"
)

// device is one simulated device. The fleet's scheduler, the goroutine of its client and a
// dialling goroutine work on it in turn, each under mu. None blocks under it.
type device struct {
	fleet   *Fleet
	id      string
	number  int
	profile *profile
	topics  [][]byte // by stream
	qos     []byte   // by stream

	due   time.Duration // under fleet.mu: when the scheduler looks at it
	place int           // under fleet.mu: in the agenda; -1: the scheduler has it in hand

	mu sync.Mutex
	random
	client  *mqtt.Client // nil: offline
	link    *link        // below client, nil if there are no faults
	dialing bool
	clean   bool // RAM is empty: the next connection begins a new session
	stopped bool // the fleet has ended: nothing is taken any more
	attempt int  // connections that failed or did not last, in a row
	since   time.Duration
	proved  bool // this connection has brought an acknowledgement

	// When what is due, as time since the fleet's start; never: not at all.
	connectAt, sampleAt, breakAt, crashAt time.Duration

	asleep         bool // off-line by plan, or because Fleet.Sleep said so
	wakeAt, restAt time.Duration

	turn    int // in profile.turns
	made    uint64
	flash   flash
	slots   []slot   // packet identifier - 1
	free    []uint16 // of slots
	order   uint64
	again   []uint16 // slots to be sent again on this connection, in order
	wire    int      // slots that count against limit
	limit   int      // of wire, on this connection
	maxQoS  byte     // of this connection
	now     time.Duration
	source  source
	payload []byte
	packet  mqtt.Publish

	accounts []account // by stream
	counts   counts
	commands *commander // nil: it takes none
}

// slot is a message with a packet identifier.
type slot struct {
	sample
	order    uint64
	at       time.Duration // last sent
	state    slotState
	onWire   bool // sent on this connection, not yet done
	released bool // PUBREC is here
}

type slotState byte

const (
	slotFree slotState = iota
	slotUsed
)

// counts of one device; Fleet.Snapshot adds them up.
type counts struct {
	published, qos0, acked, refused, dropped, abandoned, resent uint64
	connects, refusals, crashes, breaks                         uint64
	bytes                                                       uint64
}

// sustained is how long a connection without an acknowledgement must last for the next
// backoff to begin anew: a link that comes up and is kicked again backs off like one that
// never came up.
const sustained = 5 * time.Second

// burst is the shortest time between two looks at a device that samples all the time.
const burst = 2 * time.Millisecond

// run does all that is due and says when to look again.
func (d *device) run(ctx context.Context, now time.Duration) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = now
	defer func() { d.now = 0 }()
	if d.client != nil && !d.fleet.draining.Load() {
		if d.crashAt <= now {
			d.crash()
		} else if d.breakAt <= now {
			d.breakLink()
		}
	}
	d.sampleDue()
	d.work()
	d.sleepDue()
	if d.connectAt <= now && d.client == nil && !d.dialing {
		d.connectAt = never
		d.dialing = true
		d.fleet.dialling.Go(func() { d.dial(ctx) })
	}
	if d.client != nil {
		d.pump()
		d.client.Flush()
	}
	next := min(d.connectAt, d.sampleAt, d.wakeAt, d.restAt)
	if d.client != nil {
		next = min(next, d.crashAt, d.breakAt)
	}
	if m := d.commands; m != nil {
		next = min(next, m.at)
		if m.answers.n > 0 && m.hold > now {
			next = min(next, m.hold)
		}
	}
	return max(next, now+burst)
}

// sampleDue takes the samples whose time has come. Under mu.
func (d *device) sampleDue() {
	if d.fleet.draining.Load() {
		d.sampleAt = never
	}
	if d.sampleAt > d.now {
		return
	}
	period := d.fleet.period
	for late := int64((d.now - d.sampleAt) / period); late >= 0 && d.sampleAt != never; late-- {
		d.take(d.sampleAt)
		d.sampleAt += period
		if d.doneSampling() {
			d.sampleAt = never
		}
	}
}

func (d *device) doneSampling() bool {
	return d.fleet.cfg.Messages > 0 && d.made >= d.fleet.cfg.Messages
}

// take makes the next sample: into flash, or at once to the server with QoS 0. It says
// whether it is not dropped. Under mu.
func (d *device) take(at time.Duration) bool {
	stream := d.profile.turns[d.turn]
	d.turn = (d.turn + 1) % len(d.profile.turns)
	d.made++
	a := &d.accounts[stream]
	a.made++
	s := sample{n: a.made, ts: d.fleet.unixMilli(at), stream: stream}
	if d.qos[stream] == 0 {
		if d.client == nil || !d.send(&s, 0, false) {
			d.drop(&s)
			return false
		}
		return true
	}
	if d.flash.n+len(d.slots)-len(d.free) >= d.fleet.cfg.Buffer {
		oldest := d.flash.popFront()
		d.drop(&oldest)
	}
	d.flash.pushBack(s)
	return true
}

// drop gives up a sample on the device. Under mu.
func (d *device) drop(s *sample) {
	if s.sent { // before a crash or the loss of a session
		d.counts.abandoned++
		return
	}
	d.counts.dropped++
	d.accounts[s.stream].unsent.add(s.n)
}

// send queues a PUBLISH. Under mu.
func (d *device) send(s *sample, id uint16, dup bool) bool {
	if s.stream == answerStream {
		return d.sendAnswer(s, id, dup)
	}
	d.payload = appendPayload(d.payload[:0], d.id, &d.source, d.profile, int(s.stream), s.n, s.ts, d.fleet.cfg.Size)
	d.packet = mqtt.Publish{Dup: dup, QoS: min(d.qos[s.stream], d.maxQoS), ID: id, Topic: d.topics[s.stream], Payload: d.payload}
	if d.packet.QoS == 0 {
		d.packet.ID = 0
	}
	if d.client.Queue(&d.packet) != nil {
		return false
	}
	d.counts.bytes += uint64(len(d.payload))
	if s.sent {
		d.counts.resent++
		d.accounts[s.stream].again.add(s.n)
	} else {
		s.sent = true
		d.counts.published++
		if d.packet.QoS == 0 {
			d.counts.qos0++
		}
		d.accounts[s.stream].sent++
	}
	return true
}

// maxBuffered is how much may wait for the network before sampling without a rate pauses.
const maxBuffered = 256 << 10

// pump sends what the window has room for: first what a former connection left, then answers to
// commands, then samples that are in flash, then, without a rate, new ones. Under mu, with a client.
func (d *device) pump() {
	for len(d.again) > 0 && d.wire < d.limit {
		i := d.again[0]
		d.again = d.again[1:]
		s := &d.slots[i]
		if s.state == slotFree || s.onWire {
			continue // acknowledged meanwhile, and perhaps in use again
		}
		s.at, s.onWire = d.now, true
		d.wire++
		if s.released {
			d.counts.resent++
			_ = d.client.QueueAck(mqtt.TypePubrel, i+1, mqtt.Success)
		} else if !d.send(&s.sample, i+1, true) {
			return
		}
	}
	endless := d.fleet.endless && !d.fleet.draining.Load()
	for d.wire < d.limit && len(d.free) > 0 {
		from := &d.flash
		if d.answersDue() {
			from = &d.commands.answers
		}
		if from.n == 0 {
			if !endless || d.doneSampling() {
				return
			}
			if d.fleet.someQoS0 && d.client.Buffered() > maxBuffered {
				return // goes on when that is written
			}
			if !d.take(d.now) {
				return // the connection has just ended
			}
			continue
		}
		i := d.free[len(d.free)-1]
		d.free = d.free[:len(d.free)-1]
		d.order++
		d.slots[i] = slot{sample: from.popFront(), order: d.order, at: d.now, state: slotUsed, onWire: true}
		if d.maxQoS > 0 {
			d.wire++
		}
		if !d.send(&d.slots[i].sample, i+1, false) {
			return // the connection has just ended; resume takes care of the slot
		}
		if d.maxQoS == 0 { // the server takes nothing better
			if s := d.slots[i].sample; s.stream == answerStream {
				d.answerDone(s, mqtt.Success)
			}
			d.release(i)
		}
	}
}

// release frees a slot. Under mu.
func (d *device) release(i uint16) {
	if d.slots[i].onWire && d.maxQoS > 0 {
		d.wire--
	}
	d.slots[i] = slot{}
	d.free = append(d.free, i)
}

// onAck handles PUBACK, PUBREC and PUBCOMP.
func (d *device) onAck(c *mqtt.Client, a *mqtt.Ack) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != c || int(a.ID) > len(d.slots) || d.slots[a.ID-1].state == slotFree {
		return
	}
	i := a.ID - 1
	s := &d.slots[i]
	if d.now == 0 { // the first of a batch
		d.now = d.fleet.elapsed()
	}
	d.proved = true
	if a.Type == mqtt.TypePubcomp {
		if s.released {
			d.release(i)
		}
		return
	}
	switch {
	case s.released: // PUBREC again
	case s.stream == answerStream:
		d.answerDone(s.sample, a.Reason)
	case a.Reason.Failed():
		d.counts.refused++
		d.accounts[s.stream].refused++
	default:
		d.counts.acked++
		d.accounts[s.stream].acked.add(s.n)
		d.fleet.latency[d.number%len(d.fleet.latency)].add(d.now - s.at)
	}
	if a.Type == mqtt.TypePuback || a.Reason.Failed() {
		d.release(i)
		return
	}
	s.released = true
}

// onBatch refills the window after all acknowledgements of one read.
func (d *device) onBatch(c *mqtt.Client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client == c {
		d.now = d.fleet.elapsed()
		if m := d.commands; m != nil && m.at <= d.now {
			d.work()
			d.fleet.wake(d, m.at)
		}
		if d.client == c { // no command has ended it
			d.pump()
		}
	}
	d.now = 0
}

// onDrained goes on sampling after a pause for the network.
func (d *device) onDrained(c *mqtt.Client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client == c {
		d.now = d.fleet.elapsed()
		d.pump()
		d.now = 0
	}
}

// onClose handles the end of a connection that the device did not end itself.
func (d *device) onClose(c *mqtt.Client, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != c {
		return
	}
	if d.link == nil || !d.link.failing() {
		d.fleet.fault("connection lost: "+kind(err), d.id, err)
	}
	d.offline(0)
}

// offline ends the connection for the device and plans the next. Under mu.
func (d *device) offline(pause time.Duration) {
	now := d.fleet.elapsed()
	if d.proved || now-d.since > sustained {
		d.attempt = 0
	}
	d.client, d.link = nil, nil
	d.again = nil
	d.retry(now + pause)
}

// retry plans the next connection with full jitter: anywhere between now and a bound that
// doubles with each failure. Under mu.
func (d *device) retry(from time.Duration) {
	if d.asleep {
		d.connectAt = never
		return
	}
	bound := d.fleet.cfg.MaxBackoff
	if d.attempt < 16 {
		bound = min(bound, d.fleet.cfg.MinBackoff<<d.attempt)
	}
	d.attempt++
	d.connectAt = from + time.Duration(d.float()*float64(bound))
	d.fleet.wake(d, d.connectAt)
}

// breakLink makes the link fail in one of its ways. Under mu, with a client.
func (d *device) breakLink() {
	d.planFaults()
	d.counts.breaks++
	how := fault(d.next() % uint64(faults))
	d.link.fail(how, &d.random)
	if how != midWrite { // that one shows with the next packet
		d.client.Abort()
		d.offline(0)
	}
}

// crash is a restart that nobody asked for. Under mu, with a client.
func (d *device) crash() {
	d.planFaults()
	d.counts.crashes++
	d.restart()
}

// restart loses RAM: what was in flight is in flash again, as if never sent, but for what the
// server has already taken over with a PUBREC; a command that runs is interrupted. Under mu, with
// now set, and while no connection is being made.
func (d *device) restart() {
	if d.client != nil {
		if d.link != nil {
			d.link.fail(reset, &d.random)
		}
		d.client.Abort()
	}
	d.forget()
	d.clean = true
	boot := time.Second/2 + time.Duration(d.float()*float64(2*time.Second))
	if d.sampleAt != never { // it samples nothing while it is down
		d.sampleAt = max(d.sampleAt, d.now+boot)
	}
	if m := d.commands; m != nil && m.at != never {
		m.at = d.now + boot
		m.lost = m.current < len(m.orders) && m.orders[m.current].state == orderRuns
	}
	d.offline(boot)
}

// forget drops the packet identifiers and puts what is not acknowledged back into flash, in
// order. Under mu.
func (d *device) forget() {
	for _, i := range slices.Backward(d.used()) {
		switch s := &d.slots[i]; {
		case s.released:
		case s.stream == answerStream:
			d.commands.answers.pushFront(s.sample)
		default:
			d.flash.pushFront(s.sample)
		}
		d.slots[i] = slot{}
		d.free = append(d.free, i)
	}
	d.wire = 0
}

// used gives the slots in use, in the order in which they were first sent. Under mu.
func (d *device) used() []uint16 {
	var list []uint16
	for i := range d.slots {
		if d.slots[i].state != slotFree {
			list = append(list, uint16(i))
		}
	}
	slices.SortFunc(list, func(a, b uint16) int { return cmp.Compare(d.slots[a].order, d.slots[b].order) })
	return list
}

func (d *device) planFaults() {
	now := d.fleet.elapsed()
	d.breakAt = later(now, untilFault(d.fleet.cfg.Flaky, &d.random))
	d.crashAt = later(now, untilFault(d.fleet.cfg.Crash, &d.random))
}

// later adds without overflow.
func later(t, d time.Duration) time.Duration {
	if d > never-t {
		return never
	}
	return t + d
}

// never is a time that does not come.
const never = time.Duration(math.MaxInt64)

// dial makes one attempt to connect. It runs in a goroutine of its own.
func (d *device) dial(ctx context.Context) {
	c, l, err := d.connect(ctx)
	switch d.connected(ctx, c, l, err) {
	case toSubscribe:
		d.subscribe(ctx, c)
	case toDisconnect:
		_ = c.Disconnect(mqtt.Success) // it breaks or it ends
	default:
	}
}

// next is what is to be done with a new connection.
type next int

const (
	toNothing next = iota
	toSubscribe
	toDisconnect // the device has gone to sleep meanwhile
)

// connected takes the outcome of connect.
func (d *device) connected(ctx context.Context, c *mqtt.Client, l *link, err error) next {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dialing = false
	if err == nil && c.Err() != nil {
		err = c.Err() // ended already; its onClose has found the device offline
	}
	if err != nil {
		if ctx.Err() == nil {
			d.counts.refusals++
			d.fleet.fault("connect: "+kind(err), d.id, err)
			d.retry(d.fleet.elapsed())
		}
		return toNothing
	}
	d.counts.connects++
	d.clean = false
	if d.commands != nil && !c.Connack().SessionPresent {
		d.commands.subscribed = false
	}
	if d.asleep {
		if !c.Connack().SessionPresent { // what was in flight there is not any more
			d.forget()
		}
		return toDisconnect
	}
	d.client, d.link = c, l
	d.since, d.proved = d.fleet.elapsed(), false
	d.limit = min(d.fleet.cfg.Window, int(c.Connack().ReceiveMaximum))
	d.maxQoS = 2
	if c.Connack().HasMaximumQoS {
		d.maxQoS = c.Connack().MaximumQoS
	}
	d.planFaults()
	d.resume(c.Connack().SessionPresent)
	d.now = d.since
	d.pump()
	d.now = 0
	c.Flush()
	d.fleet.wake(d, d.since+burst)
	if d.commands == nil {
		return toNothing
	}
	d.commands.ready = d.since
	if d.commands.subscribed {
		return toNothing
	}
	return toSubscribe
}

// resume sorts out what a former connection left in flight. Under mu.
func (d *device) resume(session bool) {
	if !session || d.maxQoS < 2 {
		d.forget()
		return
	}
	d.wire = 0
	d.again = d.used()
	for _, i := range d.again {
		d.slots[i].onWire = false
	}
}

// connect dials with or without a session to go on with.
func (d *device) connect(ctx context.Context) (*mqtt.Client, *link, error) {
	f := d.fleet
	select {
	case f.dials <- struct{}{}:
		defer func() { <-f.dials }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	d.mu.Lock()
	clean := d.clean || f.cfg.CleanSession
	d.mu.Unlock()
	if clean && !f.cfg.CleanSession && f.cfg.Version == mqtt.V311 {
		// MQTT 3.1.1 cannot begin anew and keep the session: clear it first.
		c, _, err := d.open(ctx, true)
		if err != nil {
			return nil, nil, err
		}
		if err := c.Disconnect(mqtt.Success); err != nil {
			return nil, nil, err
		}
		clean = false
	}
	return d.open(ctx, clean)
}

func (d *device) open(ctx context.Context, clean bool) (*mqtt.Client, *link, error) {
	f := d.fleet
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var l *link
	o := mqtt.ClientOptions{
		Address: f.to.address,
		TLS:     d.tls(),
		Dialer:  f.cfg.Dialer,
		Connect: mqtt.Connect{
			Version:     f.cfg.Version,
			ClientID:    d.id,
			CleanStart:  clean,
			KeepAlive:   uint16(max(f.cfg.KeepAlive, 0) / time.Second),
			HasUsername: f.to.username != "", Username: f.to.username,
			HasPassword: f.to.password != "", Password: []byte(f.to.password),
		},
		OnAck:   d.onAck,
		OnBatch: d.onBatch,
		OnClose: func(c *mqtt.Client, err error) {
			d.onClose(c, err)
			f.connected.Done()
		},
	}
	if f.cfg.PasswordOf != nil {
		o.Connect.HasPassword, o.Connect.Password = true, []byte(f.cfg.PasswordOf(d.id))
		if f.to.username == "" {
			o.Connect.HasUsername, o.Connect.Username = true, d.id
		}
	}
	if d.commands != nil {
		o.ManualAck, o.OnMessage = true, d.onMessage
	}
	if f.someQoS0 && f.endless {
		o.OnDrained = d.onDrained
	}
	if f.cfg.Version == mqtt.V5 && !f.cfg.CleanSession {
		o.Connect.SessionExpiry = 24 * 60 * 60
	}
	if f.cfg.Flaky > 0 || f.cfg.Crash > 0 {
		dial := o.Dialer
		if dial == nil {
			dial = new(net.Dialer).DialContext
		}
		o.Dialer = f.linked(dial, &l)
	}
	f.connected.Add(1) // until OnClose
	c, err := mqtt.Dial(ctx, o)
	if err != nil {
		f.connected.Done()
	}
	return c, l, err
}

// tls is what the device shows and trusts, nil without TLS. Its certificate is loaded for each connection: ten
// thousand need no memory, and a rotated one is used.
func (d *device) tls() *tls.Config {
	f := d.fleet
	if f.to.tls == nil || f.cfg.CertificateOf == nil {
		return f.to.tls
	}
	config := f.to.tls.Clone()
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return f.cfg.CertificateOf(d.id)
	}
	return config
}

// idle says that nothing waits to be done, sent or acknowledged. Under mu.
func (d *device) idle() bool {
	if m := d.commands; m != nil && (m.answers.n > 0 || m.open() > 0) {
		return false
	}
	return d.flash.n == 0 && len(d.free) == len(d.slots)
}

// kind gives the sort of an error, of which there are few, for counting.
func kind(err error) string {
	var refused *mqtt.Refused
	var errno syscall.Errno
	var network net.Error
	switch {
	case errors.As(err, &refused):
		return refused.Error()
	case errors.As(err, &errno):
		return errno.Error()
	case errors.Is(err, io.EOF):
		return "closed by the server"
	case errors.Is(err, mqtt.ErrKeepAlive):
		return mqtt.ErrKeepAlive.Error()
	case errors.As(err, &network) && network.Timeout():
		return "timed out"
	}
	for next := err; next != nil; next = errors.Unwrap(next) {
		err = next
	}
	return err.Error()
}
