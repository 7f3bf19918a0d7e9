package devices

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"holdfast/internal/clock"
	"holdfast/internal/kv"
)

// queueDecision decides about one device's commands. It looks at how they are now, so it may be tried again later.
type queueDecision func(tx *queueTx)

// queueTx is one decision about one device: the steps of its commands, which are committed together.
// It holds the device's order lock from begin to end.
type queueTx struct {
	q   *Queue
	d   *queueDevice
	now clock.Moment

	changes []queueChange
	ops     []kv.Op
	events  []Event
	sends   []queueSend
	then    func(error) // called when all is durable
	force   bool        // commit even if nothing changes: somebody waits for its turn
	rearm   bool        // due times of commands that did not change may have
	cut     Link        // to end
	cutWhy  string
}

// queueChange is what happens to one command in a decision, and how it was before.
type queueChange struct {
	p             *queuedCommand
	before, after *commandState // before nil: it is new
	token         uint64        // of the delivery that after is about, 0: of none

	// As they were.
	oldToken    uint64
	oldProgress *Progress
	oldTold     int64
	oldLinkGen  uint32
	oldRestart  bool
}

// queueSend is a delivery that goes out when its SENT is durable.
type queueSend struct {
	p        *queuedCommand
	link     Link
	delivery Delivery
}

// begin takes a device in hand.
func (q *Queue) begin(device string) *queueTx {
	q.mu.Lock()
	d := q.devices[device]
	if d == nil {
		d = &queueDevice{name: device}
		q.devices[device] = d
	}
	d.users++
	q.mu.Unlock()
	d.order.Lock()
	return &queueTx{q: q, d: d, now: q.clock.Read()}
}

// end lets go of the device.
func (tx *queueTx) end() {
	q, d := tx.q, tx.d
	q.mu.Lock()
	d.users--
	if d.users == 0 && len(d.cmds) == 0 && d.link == nil {
		delete(q.devices, d.name)
	}
	q.mu.Unlock()
	d.order.Unlock()
}

// decide has fn decided and committed, now or, if the store takes nothing, later.
func (q *Queue) decide(device string, fn queueDecision) {
	if err := q.try(device, fn); err != nil {
		q.log.Debug("decision put off: the store takes nothing", "device", device, "err", err)
		q.poke(device, fn)
	}
}

func (q *Queue) try(device string, fn queueDecision) error {
	tx := q.begin(device)
	defer tx.end()
	fn(tx)
	return tx.commit()
}

// poke has Run decide fn. Unlike decide it may be called from where nothing may be committed.
func (q *Queue) poke(device string, fn queueDecision) {
	q.mu.Lock()
	q.pokes[device] = append(q.pokes[device], fn)
	q.mu.Unlock()
	q.wakeUp()
}

func (q *Queue) wakeUp() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// change returns a copy of p's state that becomes its new one.
func (tx *queueTx) change(p *queuedCommand) *commandState {
	i := slices.IndexFunc(tx.changes, func(c queueChange) bool { return c.p == p })
	if i < 0 {
		i = len(tx.changes)
		tx.changes = append(tx.changes, queueChange{
			p: p, before: p.work,
			oldToken: p.token, oldProgress: p.progress, oldTold: p.progressT, oldLinkGen: p.linkGen, oldRestart: p.restarted,
		})
	}
	s := new(commandState)
	if p.work != nil {
		*s = *p.work
	}
	if p.progress != nil {
		s.progress, p.progress, p.progressT = p.progress, nil, tx.now.T
	}
	s.packetID = uint16(p.packetID.Load())
	p.work, tx.changes[i].after, tx.changes[i].token = s, s, 0
	return s
}

// move brings p into a state.
func (tx *queueTx) move(p *queuedCommand, to State, reason string) {
	s := tx.change(p)
	tx.enter(p, s, to, reason)
}

// enter completes a change of state.
func (tx *queueTx) enter(p *queuedCommand, s *commandState, to State, reason string) {
	from := s.state
	s.state, s.reason = to, reason
	s.updated, s.updatedT = tx.now.Wall, tx.now.T
	keep := s.steps
	if len(keep) >= queueMaxSteps { // the first half tells how it began, the rest how it went on
		keep = slices.Delete(slices.Clone(keep), queueMaxSteps/2, queueMaxSteps/2+1)
	}
	s.steps = append(slices.Clip(keep), commandStep{State: to, At: tx.now.Wall, Reason: reason})
	tx.tell(p, s, from)
}

// tell adds the event that p is in the state s.
func (tx *queueTx) tell(p *queuedCommand, s *commandState, from State) {
	c := tx.q.command(p, s)
	tx.events = append(tx.events, Event{Command: &c, Previous: from, Upstream: c.Feedback.tells(s.state, p.oneWay)})
}

// create adds a new command.
func (tx *queueTx) create(p *queuedCommand, payload []byte) {
	p.payload = append(make([]byte, 0, len(payload)), payload...) // not nil: it is not on disk yet
	s := tx.change(p)
	tx.enter(p, s, Queued, "")
	tx.d.cmds = append(tx.d.cmds, p)
	body := encodeRow(&commandBody{Payload: payload})
	tx.ops = append(tx.ops,
		kv.Op{Key: commandKey(commandKindBody, p.seq), Value: body},
		kv.Op{Key: commandIDKey(p.id), Value: commandKey(0, p.seq)[2:]},
		kv.Op{Key: commandDeviceKey(p.dev.name, p.seq)},
	)
}

// deliver notes that the device has p.
func (tx *queueTx) deliver(p *queuedCommand, reason string) {
	s := tx.change(p)
	s.deliveredT = tx.now.T
	tx.enter(p, s, Delivered, reason)
}

// requeue puts back what was sent and not acknowledged.
func (tx *queueTx) requeue(p *queuedCommand, why string) {
	if n := p.work.attempts; n >= p.opts.Value().maxAttempts {
		times := "once"
		if n > 1 {
			times = fmt.Sprintf("%d times", n)
		}
		tx.move(p, DeadLettered, fmt.Sprintf("sent %s and never acknowledged; the last time: %s", times, why))
		return
	}
	tx.move(p, Queued, why)
}

// delivery returns the command whose delivery has the token; nil: there is none any more.
func (tx *queueTx) delivery(token uint64) *queuedCommand {
	if token == 0 {
		return nil
	}
	for _, p := range tx.d.cmds {
		if p.token == token {
			return p
		}
	}
	return nil
}

// unlink notes that the device's connection has ended.
func (tx *queueTx) unlink() { tx.d.dead, tx.d.link = tx.d.link, nil }

// heard is when something is over that a device would have ended by a word: at due, but not before it could be heard after
// the gateway stood still.
func (q *Queue) heard(due int64) int64 { return max(due, q.heardAt.Load()) }

// sendFailed notes that a delivery could not be written.
func (tx *queueTx) sendFailed(token uint64, err error) {
	d := tx.d
	p := tx.delivery(token)
	switch {
	case p == nil:
	case errors.Is(err, ErrPacketTooLarge):
		tx.move(p, DeadLettered, clip(err.Error()))
	case d.link != nil && p.linkGen == d.linkGen:
		if !errors.Is(err, ErrGone) {
			tx.cut, tx.cutWhy = d.link, "a command could not be sent"
		}
		tx.unlink()
	}
	tx.settle()
}

// settle brings the device's commands in line with the time and with its connection, and sends what may go.
func (tx *queueTx) settle() {
	q, d, now := tx.q, tx.d, tx.now.T
	ack := milliseconds(q.cfg.AckTimeout)
	overdue := func(p *queuedCommand) bool {
		return p.work.state == Sent && now >= q.heard(p.work.sentT+ack)
	}
	expired := func(p *queuedCommand) bool { return now >= q.clock.Due(p.createdT, p.opts.Value().ttl) }
	if d.link != nil {
		for _, p := range d.cmds {
			if overdue(p) && p.linkGen == d.linkGen && !expired(p) {
				// On this connection it may not be sent again (MQTT 5.0 §4.4), so there has to be another.
				tx.cut, tx.cutWhy = d.link, "a command was not acknowledged in time"
				tx.unlink()
				break
			}
		}
	}
	for _, p := range d.cmds {
		switch s := p.work; {
		case s.ended(p.oneWay):
		case s.state == Queued || s.state == Sent:
			switch {
			case expired(p):
				ttl := time.Duration(p.opts.Value().ttl) * time.Millisecond
				tx.move(p, Expired, fmt.Sprintf("not delivered within its time to live of %v", ttl))
			case s.state == Queued || d.link != nil && p.linkGen == d.linkGen:
			case p.restarted:
				tx.requeue(p, "gateway restarted")
			case overdue(p):
				tx.requeue(p, fmt.Sprintf("no acknowledgement within %v", q.cfg.AckTimeout))
			default:
				tx.requeue(p, "connection lost before it was acknowledged")
			}
		default: // the device has it
			execution := p.opts.Value().execution
			if now >= q.heard(q.clock.Due(s.deliveredT, execution)) {
				tx.move(p, TimedOut, fmt.Sprintf("no outcome within %v", time.Duration(execution)*time.Millisecond))
			} else if p.progress != nil && now-p.progressT >= queueProgressGap {
				tx.tell(p, tx.change(p), InProgress)
			}
		}
	}
	for d.link != nil {
		p := tx.pick()
		if p == nil {
			return
		}
		tx.send(p)
	}
}

// pick chooses the command to send next; nil: none. Urgent ones go first and have one more place than the window. One
// that the device has not subscribed to, or whose time has not come, is passed over; one that pauses before a repeat is
// not, for the order's sake.
func (tx *queueTx) pick() *queuedCommand {
	q, d := tx.q, tx.d
	used, waiting := 0, false
	for _, p := range d.cmds {
		switch {
		case p.work.state == Queued:
			waiting = true
		case !p.work.ended(p.oneWay):
			used++
		}
	}
	if !waiting {
		return nil
	}
	for _, urgent := range [...]bool{true, false} {
		places := q.cfg.Window
		if urgent {
			places++
		}
		if used >= places {
			continue
		}
		for _, p := range d.cmds {
			switch s := p.work; {
			case s.state != Queued || p.urgent != urgent:
			case p.delay > 0 && tx.now.T < q.clock.Due(p.createdT, p.delay):
			case !d.link.Covers(commandTopic(d.name, p.id, p.opts.Value().name)):
			case s.attempts > 0 && tx.now.T < s.sentT+repeatPause(s.attempts):
				return nil
			default:
				return p
			}
		}
	}
	return nil
}

func commandTopic(device, id, name string) string { return "cmd/" + device + "/req/" + id + "/" + name }

// repeatPause is how long after the last attempt the next may come, ms. A device that comes back does not wait; one
// whose connection flaps a hundred times a second does, or its commands would be dead within a tenth of one.
func repeatPause(attempts int32) int64 {
	if attempts < 3 {
		return 0
	}
	return min(int64(250)<<min(attempts-3, 10), 10_000)
}

// send decides that p goes out.
func (tx *queueTx) send(p *queuedCommand) {
	q, d := tx.q, tx.d
	payload, err := q.payload(p)
	if err != nil {
		q.log.Error("command given up: its payload cannot be read", "device", d.name, "command", p.id, "err", err)
		tx.move(p, DeadLettered, clip("its payload cannot be read: "+err.Error()))
		return
	}
	s := tx.change(p)
	s.attempts++
	s.sentT = tx.now.T
	p.linkGen, p.restarted = d.linkGen, false
	tx.enter(p, s, Sent, "")
	token := q.tokens.Add(1)
	i := slices.IndexFunc(tx.changes, func(c queueChange) bool { return c.p == p })
	tx.changes[i].token = token
	o := p.opts.Value()
	tx.sends = append(tx.sends, queueSend{p, d.link, Delivery{
		Device: d.name, ID: p.id, Name: o.name, Payload: payload, ContentType: o.contentType,
		Dup: s.attempts > 1, PacketID: s.packetID, Token: token,
	}})
}

// payload of a command: from memory, or from disk.
func (q *Queue) payload(p *queuedCommand) ([]byte, error) {
	q.mu.Lock()
	b := p.payload
	q.mu.Unlock()
	if b != nil {
		return b, nil
	}
	v, found, err := q.store.Get(commandKey(commandKindBody, p.seq))
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("payload: %w: it is not there", errDamaged)
	}
	var body commandBody
	if err := decodeRow(v, &body); err != nil {
		return nil, err
	}
	return body.Payload, nil
}

// nextDue is when something is to happen to p by time alone. Under the device's order lock.
func (q *Queue) nextDue(p *queuedCommand, now int64) int64 {
	o := p.opts.Value()
	switch s := p.work; s.state {
	case Queued:
		due := q.clock.Due(p.createdT, o.ttl)
		if p.delay > 0 {
			if t := q.clock.Due(p.createdT, p.delay); t > now {
				due = min(due, t)
			}
		}
		if s.attempts > 0 {
			if t := s.sentT + repeatPause(s.attempts); t > now {
				due = min(due, t)
			}
		}
		return due
	case Sent:
		return min(q.clock.Due(p.createdT, o.ttl), q.heard(s.sentT+milliseconds(q.cfg.AckTimeout)))
	default:
		due := q.heard(q.clock.Due(s.deliveredT, o.execution))
		if p.progress != nil {
			due = min(due, p.progressT+queueProgressGap)
		}
		return due
	}
}

// commit hands in what was decided. On an error nothing was, and everything is as it was before; only what is known of the
// connection stays.
func (tx *queueTx) commit() error {
	q, d := tx.q, tx.d
	if tx.cut != nil {
		defer tx.cut.End(tx.cutWhy)
	}
	if len(tx.changes) == 0 && len(tx.events) == 0 && len(tx.ops) == 0 && !tx.force {
		tx.arm(0)
		return nil
	}
	for i := range tx.changes {
		c := &tx.changes[i]
		kind := byte(commandKindOpen)
		if c.after.ended(c.p.oneWay) {
			kind = commandKindEnded
			if c.before != nil && !c.before.ended(c.p.oneWay) {
				tx.ops = append(tx.ops, kv.Op{Key: commandKey(commandKindOpen, c.p.seq), Delete: true})
			}
		}
		tx.ops = append(tx.ops, kv.Op{Key: commandKey(kind, c.p.seq), Value: encodeRow(c.p.row(c.after))})
	}
	d.cmds = slices.DeleteFunc(d.cmds, func(p *queuedCommand) bool { return p.work.ended(p.oneWay) })
	q.mu.Lock()
	for i := range tx.changes {
		c := &tx.changes[i]
		q.ids[c.p.id] = c.p
		c.p.inFlight++
		c.p.token = c.token
		q.pending += c.after.open(c.p) - c.before.open(c.p)
	}
	q.mu.Unlock()
	tx.arm(0)
	err := q.cfg.Journal.Commit(tx.ops, tx.events, tx.done)
	if err != nil {
		tx.undo()
		return fmt.Errorf("commands of device %s: %w", d.name, err)
	}
	return nil
}

// open is 1 for a state that is no end, else 0; nil is no state yet.
func (s *commandState) open(p *queuedCommand) int {
	if s == nil || s.ended(p.oneWay) {
		return 0
	}
	return 1
}

// arm sets the timers of the commands that changed, or of all; none before notBefore.
func (tx *queueTx) arm(notBefore int64) {
	q := tx.q
	type timer struct {
		p   *queuedCommand
		due int64
	}
	var few [8]timer
	timers := few[:0]
	if tx.rearm {
		for _, p := range tx.d.cmds {
			timers = append(timers, timer{p, max(q.nextDue(p, tx.now.T), notBefore)})
		}
	}
	for i := range tx.changes {
		switch p := tx.changes[i].p; {
		case p.work == nil || p.work.ended(p.oneWay):
			timers = append(timers, timer{p, -1})
		case !tx.rearm:
			timers = append(timers, timer{p, max(q.nextDue(p, tx.now.T), notBefore)})
		}
	}
	if len(timers) == 0 {
		return
	}
	q.mu.Lock()
	sooner := false
	for _, t := range timers {
		if t.due < 0 {
			q.timers.remove(t.p)
		} else {
			sooner = q.timers.set(t.p, t.due) || sooner
		}
	}
	q.mu.Unlock()
	if sooner {
		q.wakeUp()
	}
}

// undo takes back what was decided and not taken.
func (tx *queueTx) undo() {
	q, d := tx.q, tx.d
	q.mu.Lock()
	for i := range tx.changes {
		c := &tx.changes[i]
		c.p.inFlight--
		c.p.token = c.oldToken
		q.pending += c.before.open(c.p) - c.after.open(c.p)
		if c.before == nil || c.before.ended(c.p.oneWay) && c.p.inFlight == 0 {
			delete(q.ids, c.p.id)
		}
	}
	q.mu.Unlock()
	for i := range tx.changes {
		c := &tx.changes[i]
		p := c.p
		if c.before != nil && !c.before.ended(p.oneWay) && c.after.ended(p.oneWay) {
			d.cmds = append(d.cmds, p)
		}
		p.work, p.progress, p.progressT, p.linkGen, p.restarted = c.before, c.oldProgress, c.oldTold, c.oldLinkGen, c.oldRestart
	}
	d.cmds = slices.DeleteFunc(d.cmds, func(p *queuedCommand) bool { return p.work == nil })
	slices.SortFunc(d.cmds, func(a, b *queuedCommand) int { return cmp.Compare(a.seq, b.seq) })
	tx.rearm = true
	tx.arm(tx.now.T + queueRetry)
}

// done is called on the goroutine that completes commits, when all is durable or the store has failed.
func (tx *queueTx) done(err error) {
	q := tx.q
	sends := tx.sends[:0]
	q.mu.Lock()
	for i := range tx.changes {
		c := &tx.changes[i]
		p := c.p
		p.inFlight--
		if err != nil {
			continue // the process is about to end
		}
		if n := p.shown.open(p); n > 0 {
			q.states[p.shown.state] -= n
		}
		q.states[c.after.state] += c.after.open(p)
		p.shown = c.after
		if len(p.payload) > queueKeepPayload {
			p.payload = nil
		}
		if c.before == nil {
			q.total.Submitted++
			q.m.submitted.Inc()
		}
		if c.after.ended(p.oneWay) {
			q.endedLocked(c)
		}
	}
	if err == nil {
		for _, s := range tx.sends {
			if s.p.token == s.delivery.Token { // else it was called off, or its connection has ended
				sends = append(sends, s)
			}
		}
	}
	q.mu.Unlock()
	for i := range sends {
		q.deliver(&sends[i])
	}
	if tx.then != nil {
		tx.then(err)
	}
}

// endedLocked counts an end that has become durable.
func (q *Queue) endedLocked(c *queueChange) {
	p := c.p
	if c.before == nil || !c.before.ended(p.oneWay) {
		q.history++
	}
	if p.inFlight == 0 {
		delete(q.ids, p.id) // from now on it is read from disk
	}
	q.m.ended[c.after.state].Inc()
	if c.after.state == Succeeded || c.after.state == Delivered {
		q.total.Succeeded++
	} else {
		q.total.Failed++
	}
}

// deliver writes a command to its device.
func (q *Queue) deliver(s *queueSend) {
	t := q.clock.Read().T
	s.delivery.Expiry = time.Duration(max(q.clock.Due(s.p.createdT, s.p.opts.Value().ttl)-t, 0)) * time.Millisecond
	token := s.delivery.Token
	id, err := s.link.Send(&s.delivery)
	if err != nil {
		q.m.unsent.Inc()
		q.poke(s.delivery.Device, func(tx *queueTx) { tx.sendFailed(token, err) })
		return
	}
	q.m.sends.Inc()
	s.p.packetID.Store(uint32(id))
}

// last is p as this decision leaves it.
func (tx *queueTx) last(p *queuedCommand) *Command {
	i := slices.IndexFunc(tx.changes, func(c queueChange) bool { return c.p == p })
	c := tx.q.command(p, tx.changes[i].after)
	return &c
}

// command shows p in the state s, without payload, and result only if it is an outcome's.
func (q *Queue) command(p *queuedCommand, s *commandState) Command {
	o := p.opts.Value()
	ms := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	c := Command{
		ID: p.id, Device: p.dev.name, Name: o.name, State: s.state, Late: s.late, Attempts: int(s.attempts), Reason: s.reason,
		Progress: s.progress, Created: time.UnixMilli(p.created), Updated: time.UnixMilli(s.updated),
		Expires: time.UnixMilli(s.updated + q.clock.Due(p.createdT, o.ttl) - s.updatedT),
		TTL:     ms(o.ttl), ExecutionTimeout: ms(o.execution), MaxAttempts: int(o.maxAttempts), OneWay: o.oneWay, Urgent: o.urgent,
		SupersedeKey: o.supersedeKey, Feedback: feedbackLevels[o.feedback], Source: o.source, Upstream: o.upstream, ContentType: o.contentType,
	}
	if p.delay > 0 {
		c.NotBefore = time.UnixMilli(p.created + p.delay)
	}
	if s.result != nil {
		c.Result, c.ResultType = s.result.payload, s.result.contentType
	}
	return c
}

// Answer takes what a device says of a command, together with ops: rows that are committed in the same batch. done is
// called as kv.Done says, with token; nil: nobody waits. An error that wraps ErrAnswer: the answer is not believed and
// ops were not taken; any other means that the store takes nothing. It keeps nothing of payload and ops.
//
// The first outcome stands; the same kind of outcome again is a repeat, in which nothing changes. It is believed of
// every command that was sent once, whatever has become of it: what has ended otherwise becomes what the device says,
// marked late. So of a one-way command, too, whose end is its delivery. accepted and progress are believed until a
// command has ended. An answer to a command whose PUBACK is missing says that it was delivered.
//
// Progress is stored and told once a second at most; of more than that the last counts. It does not extend the
// execution time-out.
func (q *Queue) Answer(device, id string, kind AnswerKind, payload []byte, contentType string, ops []kv.Op, done kv.Done, token uint64) error {
	var progress *Progress
	to := State(0)
	switch kind {
	case AnswerAccepted:
	case AnswerProgress:
		var err error
		if progress, err = parseProgress(payload, contentType); err != nil {
			return q.disbelieve(answerMalformed, device, id, err.Error())
		}
	case AnswerSucceeded:
		to = Succeeded
	case AnswerFailed:
		to = Failed
	case AnswerRejected:
		to = Rejected
	default:
		return q.disbelieve(answerMalformed, device, id, fmt.Sprintf("there is no answer %q", clip(string(kind))))
	}
	if !validCommandID(id) {
		return q.disbelieve(answerUnknown, device, clip(id), "no such command")
	}
	tx := q.begin(device)
	defer tx.end()
	p, err := q.lookup(id)
	switch {
	case errors.Is(err, ErrVersion) || errors.Is(err, errDamaged):
		return q.disbelieve(answerUnknown, device, id, err.Error())
	case err != nil:
		return fmt.Errorf("answer to command %s: %w", id, err)
	case p == nil:
		return q.disbelieve(answerUnknown, device, id, "no such command")
	case p.dev.name != device:
		return q.disbelieve(answerOtherDevice, device, id, "it is another device's command")
	case to != 0 && p.work.state.Outcome():
		if p.work.state != to {
			return q.disbelieve(answerContradiction, device, id, fmt.Sprintf("it has answered %s before", p.work.state))
		}
	case to == 0 && p.work.ended(p.oneWay):
		return q.disbelieve(answerEnded, device, id, fmt.Sprintf("the command has ended: it is %s", p.work.state))
	case p.work.attempts == 0:
		return q.disbelieve(answerNeverSent, device, id, "it was never sent to the device")
	default:
		if s := p.work.state; s == Queued || s == Sent {
			tx.deliver(p, "the device has answered")
		}
		switch {
		case to != 0:
			tx.outcome(p, to, payload, contentType)
		case p.work.ended(p.oneWay): // one-way: that was all
		case p.work.state == Delivered:
			s := tx.change(p)
			if progress != nil {
				s.progress, p.progressT = progress, tx.now.T
			}
			tx.enter(p, s, InProgress, "")
		case progress != nil:
			p.progress = progress // settle stores it, if not now then later
			tx.rearm = true
		}
	}
	tx.settle()
	tx.ops = append(slices.Clip(ops), tx.ops...)
	tx.force = true
	if done != nil {
		tx.then = func(err error) { done.Done(token, 0, err) }
	}
	return tx.commit()
}

// outcome notes what the device says has become of p.
func (tx *queueTx) outcome(p *queuedCommand, to State, payload []byte, contentType string) {
	reason := ""
	s := tx.change(p)
	if s.ended(p.oneWay) {
		s.late = true
		reason = fmt.Sprintf("it was %s before", s.state)
	}
	if len(payload) <= MaxResult {
		if len(payload) > 0 {
			s.result = &commandResult{payload: bytes.Clone(payload), contentType: resultType(payload, contentType)}
		}
	} else {
		if reason != "" {
			reason += "; "
		}
		reason += fmt.Sprintf("its result of %d bytes was not kept: at most %d are", len(payload), MaxResult)
	}
	tx.enter(p, s, to, reason)
}

// disbelieve counts an answer that is not believed, and logs it: a device that goes on and on must not fill the log.
func (q *Queue) disbelieve(why, device, id, text string) error {
	level := slog.LevelDebug
	q.mu.Lock()
	q.total.Disbelieved++
	q.untold++
	others := 0
	if now := q.clock.Read().T; now >= q.tellAt {
		level, others = slog.LevelWarn, q.untold-1
		q.untold, q.tellAt = 0, now+queueTellGap
	}
	q.mu.Unlock()
	q.m.disbelieved.WithLabelValues(why).Inc()
	q.log.Log(context.Background(), level, "answer not believed", "device", device, "command", id, "reason", text, "others_before", others)
	return fmt.Errorf("%w: %s", ErrAnswer, text)
}
