package firmwaresim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
)

// Behaviour is what a device does with a command.
type Behaviour uint8

// The behaviours. Each but Do is what the command of its own name gets: a command "reboot" reboots.
const (
	// Do works on it for a while, tells progress, and ends as the probabilities of Execution say.
	Do Behaviour = iota
	Echo
	// Query is Do for what may be done twice: after a restart it is begun again, not given up.
	Query
	Update // works ten times as long and tells progress ten times
	Slow   // works ten times as long and tells nothing meanwhile
	Reboot // restarts, and says so when it is back
	Fail
	Reject // does not begin
	Ignore // takes it and never answers
)

var behaviours = [...]string{
	Do: "do", Echo: "echo", Query: "query", Update: "update", Slow: "slow", Reboot: "reboot", Fail: "fail", Reject: "reject", Ignore: "ignore",
}

// String gives its name.
func (b Behaviour) String() string { return behaviours[b] }

// ParseBehaviour reads a name.
func ParseBehaviour(name string) (Behaviour, error) {
	if i := slices.Index(behaviours[:], name); i >= 0 {
		return Behaviour(i), nil
	}
	return 0, fmt.Errorf("behaviour %q: there are %s", name, strings.Join(behaviours[:], ", "))
}

// Execution is how devices do what they are told. The zero value does all with success, in 200 ms.
type Execution struct {
	Duration time.Duration // of a command of ordinary length; 0: 200 ms, negative: none
	Progress int           // how often Do tells its progress; 0: 2, negative: never
	// Probabilities of other ends for Do and Query. Their sum is at most 1; the rest succeeds.
	Fail, Reject, Ignore float64
	// Names gives commands by these names a behaviour; others have that of their own name, or Do.
	Names map[string]Behaviour
}

// Remembered is how many commands fit into a device's flash, with their ends: the newest ones. As
// many may wait there to be begun.
const Remembered = 256

const (
	longer       = 10 // how much longer Update and Slow take
	refusedPause = time.Second
)

func (e *Execution) complete(wrong func(string, ...any)) {
	set(&e.Duration, 200*time.Millisecond)
	set(&e.Progress, 2)
	e.Duration, e.Progress = max(e.Duration, 0), max(e.Progress, 0)
	if e.Fail < 0 || e.Reject < 0 || e.Ignore < 0 || !(e.Fail+e.Reject+e.Ignore <= 1) {
		wrong("fail %v, reject %v, ignore %v: probabilities whose sum is at most 1", e.Fail, e.Reject, e.Ignore)
	}
	if e.Progress > 100 {
		wrong("progress %d: at most 100 reports", e.Progress)
	}
	names := make(map[string]Behaviour, len(behaviours))
	for b, name := range behaviours {
		names[name] = Behaviour(b)
	}
	for name, b := range e.Names {
		if int(b) >= len(behaviours) {
			wrong("behaviour %d of command %q: there is no such", b, name)
		}
	}
	maps.Copy(names, e.Names)
	e.Names = names
}

// Kinds of answers, as in the last level of their topic.
const (
	answerAccepted  = "accepted"
	answerProgress  = "progress"
	answerSucceeded = "succeeded"
	answerFailed    = "failed"
	answerRejected  = "rejected"
)

// answerStream stands in sample.stream for an answer; sample.n is then its number.
const answerStream = 0xFF

// commander is the part of a device that takes commands. Under device.mu. Flash, which a crash
// leaves alone, is orders, answers and texts; at, left and lost are what RAM held of the one that runs.
type commander struct {
	orders  []order // all, in the order of their first arrival; the device looks at the last Remembered only
	current int     // in orders: the one to work on, or len(orders)
	at      time.Duration
	left    int  // steps of the current one that are still to be done
	lost    bool // it was begun before the last restart

	answers flash // to be sent; their texts are in texts until they are acknowledged
	texts   map[uint64]answer
	made    uint64        // answers
	hold    time.Duration // no answers before that: the server has just refused one

	subscribed bool          // in the session that the server has
	ready      time.Duration // since when this connection could bring a command; never: it has
	counts     CommandCounts
}

// order is a command that a device has received.
type order struct {
	id, name  string
	n         uint64 // from its payload, 0: none
	body      []byte // payload of an Echo, then what goes with the outcome; nil when it is forgotten
	mediaType string // of an Echo
	received  uint32
	executed  uint32
	resumed   uint32
	behaviour Behaviour
	state     orderState
	outcome   string // an answer's kind; "": none, or never answered
	answering bool   // the outcome waits for its acknowledgement
	told      bool   // the outcome was acknowledged
}

type orderState uint8

const (
	orderWaits orderState = iota
	orderRuns
	orderEnded
)

// answer is what is said of a command.
type answer struct {
	order int // in commander.orders
	kind  string
	body  []byte
	media string
}

// CommandCounts are about commands since the start.
type CommandCounts struct {
	Received uint64 `json:"received"` // each once
	Repeats  uint64 `json:"repeats"`  // further arrivals
	Executed uint64 `json:"executed"` // begun
	Open     uint64 `json:"open"`     // waiting or running
	Answered uint64 `json:"answered"` // outcomes that were acknowledged
	Refused  uint64 `json:"answers_refused"`
	Strange  uint64 `json:"strange"` // messages that are no command of this device
}

func (c *CommandCounts) add(o *CommandCounts) {
	c.Received += o.Received
	c.Repeats += o.Repeats
	c.Executed += o.Executed
	c.Open += o.Open
	c.Answered += o.Answered
	c.Refused += o.Refused
	c.Strange += o.Strange
}

// onMessage takes a command. It is in flash when its PUBACK is queued.
func (d *device) onMessage(c *mqtt.Client, p *mqtt.Publish) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// On a connection that has ended nothing is acknowledged any more, so it all comes again. One that is not
	// the device's yet is: dial has not heard of it, but the server has.
	if c.Err() != nil || d.stopped {
		return
	}
	if p.QoS > 1 {
		d.fleet.fault("command with QoS 2", d.id, fmt.Errorf("%s", p.Topic))
		c.Abort()
		return
	}
	reason := d.receive(p)
	if p.QoS == 0 || reason.Failed() && c.Version() != mqtt.V5 {
		return
	}
	_ = c.QueueAck(mqtt.TypePuback, p.ID, reason) // lost with the connection
}

// receive notes a command and says how to acknowledge it. Under mu.
func (d *device) receive(p *mqtt.Publish) mqtt.Reason {
	m := d.commands
	device, id, name, ok := wire.ParseRequestTopic(string(p.Topic))
	if !ok || device != d.id {
		m.counts.Strange++
		return mqtt.Success
	}
	now := d.fleet.elapsed()
	if m.ready != never {
		d.fleet.first.add(now - m.ready)
		m.ready = never
	}
	if i := m.find(id); i >= 0 {
		o := &m.orders[i]
		o.received++
		m.counts.Repeats++
		if o.state == orderEnded && o.outcome != "" && !o.answering {
			d.answer(i, o.outcome, o.body, o.mediaType)
		}
		return mqtt.Success
	}
	if len(m.orders)-m.current >= Remembered {
		return mqtt.QuotaExceeded
	}
	o := order{id: id, name: name, received: 1, n: sequence(p.Payload)}
	if b, ok := d.fleet.cfg.Execution.Names[name]; ok {
		o.behaviour = b
		o.name = d.fleet.names[name] // one string for all
	}
	if o.behaviour == Echo {
		o.body, o.mediaType = bytes.Clone(p.Payload), string(p.ContentType)
	}
	m.orders = append(m.orders, o)
	m.counts.Received++
	if old := len(m.orders) - Remembered - 1; old >= 0 {
		m.orders[old].body = nil
	}
	if m.at == never {
		m.at = now
		if d.client == nil { // else onBatch follows
			d.fleet.wake(d, now)
		}
	}
	return mqtt.Success
}

// find looks for a command in flash.
func (m *commander) find(id string) int {
	for i := len(m.orders) - 1; i >= 0 && i >= len(m.orders)-Remembered; i-- {
		if m.orders[i].id == id {
			return i
		}
	}
	return -1
}

// sequence reads the member n of a JSON object.
func sequence(payload []byte) uint64 {
	if len(payload) == 0 || payload[0] != '{' || !bytes.Contains(payload, []byte(`"n"`)) {
		return 0
	}
	var x struct {
		N uint64 `json:"n"`
	}
	if json.Unmarshal(payload, &x) != nil {
		return 0
	}
	return x.N
}

// work does what is due of the commands, one after the other. Under mu, with now set.
func (d *device) work() {
	m := d.commands
	for m != nil && m.at <= d.now {
		if m.current == len(m.orders) {
			m.at = never
			return
		}
		switch o := &m.orders[m.current]; {
		case o.state == orderWaits:
			d.begin(o)
		case m.lost:
			d.recover(o)
		default:
			d.step(o)
		}
	}
}

// begin starts the current command. Under mu.
func (d *device) begin(o *order) {
	m, e := d.commands, &d.fleet.cfg.Execution
	what := o.behaviour
	if what == Do || what == Query {
		switch x := d.float(); {
		case x < e.Reject:
			what = Reject
		case x < e.Reject+e.Ignore:
			what = Ignore
		case x < e.Reject+e.Ignore+e.Fail:
			o.behaviour = Fail
		}
	}
	switch what {
	case Reject:
		d.end(answerRejected, textBody("this device does not do that"))
		return
	case Ignore:
		d.end("", nil)
		return
	default:
	}
	o.state = orderRuns
	o.executed++
	m.counts.Executed++
	d.answer(m.current, answerAccepted, nil, "")
	m.left = d.fleet.steps(o.behaviour)
	m.at = d.now + d.fleet.pace(o.behaviour)
}

// steps is how many there are to a command: the last one ends it, each other tells its progress.
func (f *Fleet) steps(b Behaviour) int {
	switch b {
	case Do, Query, Fail:
		return 1 + f.cfg.Execution.Progress
	case Update:
		return 1 + longer
	default:
		return 1
	}
}

// pace is how long one step takes.
func (f *Fleet) pace(b Behaviour) time.Duration {
	all := f.cfg.Execution.Duration
	switch b {
	case Echo:
		all = 0
	case Update, Slow:
		all *= longer
	default:
	}
	return all / time.Duration(f.steps(b))
}

// step goes on with the current command. Under mu.
func (d *device) step(o *order) {
	m := d.commands
	m.left--
	if m.left > 0 {
		m.at = d.now + d.fleet.pace(o.behaviour)
		if d.client != nil { // who is offline would tell it too late
			steps := d.fleet.steps(o.behaviour)
			done := steps - m.left
			d.answer(m.current, answerProgress, fmt.Appendf(nil, `{"percent":%d,"text":"step %d of %d"}`, 100*done/steps, done, steps), jsonType)
		}
		return
	}
	switch o.behaviour {
	case Reboot:
		if d.dialing { // that connection would be one of the time before
			m.left, m.at = 1, d.now+lookEvery
			return
		}
		d.counts.crashes++
		d.restart()
	case Fail:
		d.end(answerFailed, textBody("it did not work"))
	case Echo:
		d.endWith(answerSucceeded, o.body, o.mediaType)
	default:
		d.end(answerSucceeded, fmt.Appendf(nil, `{"device":%q,"done":%q}`, d.id, o.name))
	}
}

// recover ends or resumes what was running when the device restarted. Whether it had its effect cannot be
// known: what may be done twice is begun again, everything else has failed. Under mu.
func (d *device) recover(o *order) {
	m := d.commands
	m.lost = false
	switch o.behaviour {
	case Reboot:
		d.end(answerSucceeded, textBody("restarted"))
	case Query, Echo:
		o.resumed++
		m.left, m.at = d.fleet.steps(o.behaviour), d.now+d.fleet.pace(o.behaviour)
	default:
		d.end(answerFailed, textBody("interrupted by a restart"))
	}
}

const jsonType = "application/json"

func textBody(text string) []byte { return fmt.Appendf(nil, `{"text":%q}`, text) }

func (d *device) end(outcome string, body []byte) { d.endWith(outcome, body, jsonType) }

// endWith ends the current command. An outcome of "" is never told. Under mu.
func (d *device) endWith(outcome string, body []byte, media string) {
	m := d.commands
	o := &m.orders[m.current]
	o.state, o.outcome, o.body, o.mediaType = orderEnded, outcome, body, media
	if outcome != "" {
		d.answer(m.current, outcome, body, media)
	}
	if m.current < len(m.orders)-Remembered {
		o.body = nil
	}
	m.current++
	m.at = d.now
}

// answer puts an answer into flash. Under mu.
func (d *device) answer(i int, kind string, body []byte, media string) {
	m := d.commands
	if m.texts == nil {
		m.texts = make(map[uint64]answer)
	}
	m.made++
	m.texts[m.made] = answer{order: i, kind: kind, body: body, media: media}
	if kind != answerAccepted && kind != answerProgress {
		m.orders[i].answering = true
	}
	m.answers.pushBack(sample{n: m.made, stream: answerStream})
}

// sendAnswer queues an answer. Under mu.
func (d *device) sendAnswer(s *sample, id uint16, dup bool) bool {
	m := d.commands
	a := m.texts[s.n]
	d.packet = mqtt.Publish{
		Dup: dup, QoS: min(1, d.maxQoS), ID: id, Payload: a.body,
		Topic: []byte(wire.AnswerTopic(d.id, m.orders[a.order].id, a.kind)),
	}
	if d.packet.QoS == 0 {
		d.packet.ID = 0
	}
	if a.media != "" && d.client.Version() == mqtt.V5 {
		d.packet.ContentType = []byte(a.media)
	}
	if d.client.Queue(&d.packet) != nil {
		return false
	}
	if s.sent {
		d.counts.resent++
	}
	s.sent = true
	return true
}

// answerDone handles the end of an answer's way. What the server refuses for now is sent again later; what
// it refuses for good is given up. Under mu.
func (d *device) answerDone(s sample, reason mqtt.Reason) {
	m := d.commands
	if reason == mqtt.QuotaExceeded || reason == mqtt.UnspecifiedError || reason == mqtt.ImplementationSpecificError {
		m.hold = d.fleet.elapsed() + refusedPause
		m.answers.pushFront(s)
		d.fleet.wake(d, m.hold)
		return
	}
	a := m.texts[s.n]
	if delete(m.texts, s.n); len(m.texts) == 0 {
		m.texts, m.answers = nil, flash{} // neither shrinks by itself
	}
	if reason.Failed() {
		m.counts.Refused++
	}
	if a.kind == answerAccepted || a.kind == answerProgress {
		return
	}
	o := &m.orders[a.order]
	o.answering = false
	if !reason.Failed() && !o.told {
		o.told = true
		m.counts.Answered++
	}
}

// answersDue says whether an answer can be sent now. Under mu, with now set.
func (d *device) answersDue() bool {
	m := d.commands
	return m != nil && m.answers.n > 0 && m.hold <= d.now
}

// subscribe asks for commands. It runs in the goroutine of the dialling.
func (d *device) subscribe(ctx context.Context, c *mqtt.Client) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	ack, err := c.Subscribe(ctx, &mqtt.Subscribe{Filters: []mqtt.Subscription{{Filter: wire.RequestFilter(d.id), QoS: 1}}})
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.client != c {
		return // it has ended
	}
	switch {
	case err != nil && ctx.Err() != nil:
		d.fleet.fault("subscribe: no answer", d.id, err)
		c.Abort()
		d.offline(0)
	case err != nil: // onClose comes
	case len(ack.Reasons) != 1 || ack.Reasons[0].Failed():
		d.fleet.fault("subscribe: refused", d.id, fmt.Errorf("%v", ack.Reasons))
	default:
		d.commands.subscribed = true
	}
}

// open counts the commands that have no end yet. Under mu.
func (m *commander) open() uint64 { return uint64(len(m.orders) - m.current) }
