package broker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"holdfast/gateway/broker"
	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

func TestMain(m *testing.M) {
	broker.LookEvery(20 * time.Millisecond)
	goleak.VerifyTestMain(m)
}

var versions = []mqtt.Version{mqtt.V311, mqtt.V5}

// eachVersion runs a test for MQTT 3.1.1 and 5, side by side.
func eachVersion(t *testing.T, f func(t *testing.T, v mqtt.Version)) {
	t.Helper()
	for _, v := range versions {
		t.Run("mqtt="+v.String(), func(t *testing.T) {
			t.Parallel()
			f(t, v)
		})
	}
}

// eachVersionInTurn is for tests that look at the whole process.
func eachVersionInTurn(t *testing.T, f func(t *testing.T, v mqtt.Version)) {
	t.Helper()
	for _, v := range versions {
		t.Run("mqtt="+v.String(), func(t *testing.T) { f(t, v) })
	}
}

// stored is a message that an intake took.
type stored struct {
	device, topic, payload string
	flags                  uint64
	props                  string
}

// intake is an Intake over a real store. What it took and committed is remembered in the order
// of the commits.
type intake struct {
	store *kv.Store
	// refuse decides whether to take a message; nil: all.
	refuse func(m *broker.Message) error
	// deliver calls done when the commit is over; nil: at once, on the store's goroutine.
	deliver func(done func(error))
	// loseAll makes each commit fail.
	loseAll atomic.Bool

	mu   sync.Mutex
	list []stored
}

type completion struct {
	in    *intake
	what  stored
	done  kv.Done
	token uint64
}

func (c *completion) Done(_, seq uint64, err error) {
	finish := func(err error) {
		if err == nil {
			c.in.mu.Lock()
			c.in.list = append(c.in.list, c.what)
			c.in.mu.Unlock()
		}
		c.done.Done(c.token, seq, err)
	}
	if err == nil && c.in.loseAll.Load() {
		err = errors.New("disk is on fire")
	}
	if c.in.deliver != nil {
		c.in.deliver(func(e error) { finish(errors.Join(err, e)) })
		return
	}
	finish(err)
}

func (in *intake) Publish(m *broker.Message, ops []kv.Op, done kv.Done, token uint64) error {
	if in.refuse != nil {
		if err := in.refuse(m); err != nil {
			return err
		}
	}
	what := stored{
		device: string(m.Record.Device), topic: string(m.Record.Topic), payload: string(m.Record.Payload),
		flags: uint64(m.Record.Flags),
	}
	if m.Record.Props != nil {
		what.props = fmt.Sprintf("%+v", *m.Record.Props)
	}
	return in.store.Apply(ops, &completion{in, what, done, token}, 0)
}

func (in *intake) messages() []stored {
	in.mu.Lock()
	defer in.mu.Unlock()
	return append([]stored{}, in.list...)
}

func (in *intake) payloads() []string {
	var p []string
	for _, m := range in.messages() {
		p = append(p, m.payload)
	}
	return p
}

// allow is an Authorizer that lets everybody do everything but what deny names.
type allow struct {
	connect   func(c *broker.ConnectInfo) error
	await     func(ctx context.Context, c *broker.ConnectInfo) error // after connect
	who       func(c *broker.ConnectInfo) string                     // the principal; nil: nobody in particular
	limits    func(device string) broker.Limits
	publish   func(device, topic string) bool
	subscribe func(device, filter string) bool
}

func (a *allow) Connect(ctx context.Context, c *broker.ConnectInfo) (broker.Rights, error) {
	if a.connect != nil {
		if err := a.connect(c); err != nil {
			return nil, err
		}
	}
	if a.await != nil {
		if err := a.await(ctx, c); err != nil {
			return nil, err
		}
	}
	r := &rights{allow: a, id: c.ClientID}
	if a.who != nil {
		r.principal = a.who(c)
	}
	return r, nil
}

func (a *allow) Rights(client string) broker.Rights { return &rights{allow: a, id: client} }

// rights of one client, as its allow says.
type rights struct {
	*allow
	id, principal string
}

func (r *rights) Principal() string { return r.principal }

func (r *rights) MayPublish(topic []byte) bool {
	return r.publish == nil || r.publish(r.id, string(topic))
}

func (r *rights) MaySubscribe(filter string) bool {
	return r.subscribe == nil || r.subscribe(r.id, filter)
}

func (r *rights) Limits() broker.Limits {
	if r.limits == nil {
		return broker.Limits{}
	}
	return r.allow.limits(r.id)
}

// rig is a running broker on a store in memory, which outlives it.
type rig struct {
	t      testing.TB
	fs     vfs.FS
	cfg    broker.Config
	in     *intake
	auth   *allow
	watch  broker.Watcher // nil: none
	log    *slog.Logger   // nil: the test's
	reg    *prometheus.Registry
	b      *broker.Broker
	store  *kv.Store
	cancel context.CancelFunc
	ended  chan error
	bound  func(b *broker.Broker) // called between Listen and Run; nil: nothing
	opened func(store *kv.Store)  // called before New; nil: nothing
}

// newRig starts a broker. change may be nil.
func newRig(t testing.TB, change func(r *rig)) *rig {
	t.Helper()
	r := &rig{t: t, fs: vfs.NewMem(), in: &intake{}, auth: &allow{}}
	r.cfg.Listeners = []broker.Listener{{Name: "lan", Protocol: "mqtt", Address: "127.0.0.1:0"}}
	if change != nil {
		change(r)
	}
	r.start()
	t.Cleanup(r.stop)
	return r
}

func (r *rig) start() {
	r.t.Helper()
	log := r.log
	if log == nil {
		log = testkit.Logger(r.t)
	}
	store, err := kv.Open("db", kv.Options{FS: r.fs, Log: log})
	if err != nil {
		r.t.Fatal(err)
	}
	r.store, r.in.store = store, store
	r.reg = prometheus.NewRegistry()
	if r.opened != nil {
		r.opened(store)
	}
	r.b, err = broker.New(r.cfg, store, r.in, r.auth, r.watch, log, r.reg)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.b.Listen(); err != nil {
		r.t.Fatal(err)
	}
	if r.bound != nil {
		r.bound(r.b)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel, r.ended = cancel, make(chan error, 1)
	go func() { r.ended <- r.b.Run(ctx) }()
}

// stop ends the broker in order, then the store; twice without harm.
func (r *rig) stop() {
	r.t.Helper()
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	select {
	case err := <-r.ended:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(15 * time.Second):
		r.t.Fatal("Run does not return")
	}
	if err := r.store.Close(); err != nil {
		r.t.Errorf("close store: %v", err)
	}
}

func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.start()
}

func (r *rig) addr() string { return r.b.Addrs()[0].String() }

// metric gives the sum of a metric over its labels, or of the one label value that is asked for.
func (r *rig) metric(name string, label ...string) float64 {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	sum, found := 0.0, false
	for _, f := range families {
		if f.GetName() != "holdfast_broker_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			if len(label) > 0 && (len(m.GetLabel()) == 0 || m.GetLabel()[0].GetValue() != label[0]) {
				continue
			}
			found = true
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	if !found {
		r.t.Fatalf("no metric %s %v", name, label)
	}
	return sum
}

// counted waits until a metric is n: what a client sees of an end may come before its count.
func (r *rig) counted(n float64, name string, label ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%s %v is %v", name, label, n), func() bool { return r.metric(name, label...) == n })
}

// peer is the other end of a connection: it sends frames and reads frames, and knows nothing.
type peer struct {
	t  testing.TB
	v  mqtt.Version
	nc net.Conn
	in []byte
}

const patience = 5 * time.Second

func (r *rig) dial(v mqtt.Version) *peer {
	r.t.Helper()
	return &peer{t: r.t, v: v, nc: testkit.Dial(r.t, r.addr())}
}

// connect dials and connects, and gives the CONNACK too.
func (r *rig) connect(v mqtt.Version, id string, change ...func(*mqtt.Connect)) (*peer, *mqtt.Connack) {
	r.t.Helper()
	p := r.dial(v)
	k := mqtt.Connect{Version: v, ClientID: id, CleanStart: true}
	for _, f := range change {
		f(&k)
	}
	p.send(mqtt.AppendConnect(nil, &k))
	return p, p.connack()
}

func (r *rig) client(v mqtt.Version, id string, change ...func(*mqtt.Connect)) *peer {
	r.t.Helper()
	p, a := r.connect(v, id, change...)
	if a.Reason != mqtt.Success {
		r.t.Fatalf("CONNACK %v", a.Reason)
	}
	return p
}

// keep asks for a session that outlives its connection.
func keep(k *mqtt.Connect) {
	k.CleanStart = false
	if k.Version == mqtt.V5 {
		k.SessionExpiry = 3600
	}
}

func (p *peer) send(b []byte) {
	p.t.Helper()
	_ = p.nc.SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// next reads one frame; io.EOF when the other end closed the connection.
func (p *peer) next(within time.Duration) ([]byte, error) {
	deadline := time.Now().Add(within)
	for {
		_, _, _, size, ok, err := mqtt.PeekHeader(p.in)
		if err != nil {
			return nil, err
		}
		if ok && len(p.in) >= size {
			frame := p.in[:size:size]
			p.in = p.in[size:]
			return frame, nil
		}
		_ = p.nc.SetReadDeadline(deadline)
		buf := make([]byte, 4096)
		n, err := p.nc.Read(buf)
		p.in = append(p.in, buf[:n]...)
		if n == 0 && err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				err = io.EOF // a reset after what was to be read is an end too
			}
			return nil, err
		}
	}
}

func (p *peer) frame(want mqtt.Type) []byte {
	p.t.Helper()
	f, err := p.next(patience)
	if err != nil {
		p.t.Fatalf("waiting for %v: %v", want, err)
	}
	if got := mqtt.Type(f[0] >> 4); got != want {
		p.t.Fatalf("got %v (% x), want %v", got, f[:min(len(f), 40)], want)
	}
	return f
}

func (p *peer) connack() *mqtt.Connack {
	p.t.Helper()
	a, err := mqtt.ParseConnack(p.frame(mqtt.TypeConnack), p.v)
	if err != nil {
		p.t.Fatal(err)
	}
	return a
}

func (p *peer) ack(want mqtt.Type, id uint16) mqtt.Reason {
	p.t.Helper()
	var a mqtt.Ack
	if err := mqtt.ParseAck(p.frame(want), p.v, &a); err != nil {
		p.t.Fatal(err)
	}
	if a.ID != id {
		p.t.Fatalf("%v of %d, want %d", want, a.ID, id)
	}
	return a.Reason
}

// success is ack and demands success.
func (p *peer) success(want mqtt.Type, id uint16) {
	p.t.Helper()
	if r := p.ack(want, id); r != mqtt.Success {
		p.t.Fatalf("%v of %d: %v", want, id, r)
	}
}

// message reads a PUBLISH.
func (p *peer) message() *mqtt.Publish {
	p.t.Helper()
	var m mqtt.Publish
	if err := mqtt.ParseDelivery(p.frame(mqtt.TypePublish), p.v, &m); err != nil {
		p.t.Fatal(err)
	}
	return &m
}

// closed demands that the other end closes; in MQTT 5 with a DISCONNECT of this reason first,
// unless reason is 0.
func (p *peer) closed(reason mqtt.Reason) {
	p.t.Helper()
	if p.v == mqtt.V5 && reason != 0 {
		d, err := mqtt.ParseDisconnect(p.frame(mqtt.TypeDisconnect), p.v, mqtt.FromServer)
		if err != nil {
			p.t.Fatal(err)
		}
		if d.Reason != reason {
			p.t.Fatalf("DISCONNECT %v, want %v", d.Reason, reason)
		}
	}
	f, err := p.next(patience)
	if !errors.Is(err, io.EOF) {
		p.t.Fatalf("want the end of the connection, got % x, %v", f[:min(len(f), 40)], err)
	}
}

// silent demands that nothing comes for a moment: the answer to a PINGREQ is next.
func (p *peer) silent() {
	p.t.Helper()
	p.send(mqtt.AppendPingreq(nil))
	p.frame(mqtt.TypePingresp)
}

func (p *peer) publish(qos byte, id uint16, topic, payload string, change ...func(*mqtt.Publish)) {
	p.t.Helper()
	m := mqtt.Publish{QoS: qos, ID: id, Topic: []byte(topic), Payload: []byte(payload)}
	for _, f := range change {
		f(&m)
	}
	p.send(mqtt.AppendPublish(nil, p.v, &m))
}

func (p *peer) pub(t mqtt.Type, id uint16) {
	p.t.Helper()
	p.send(mqtt.AppendAck(nil, t, id, p.v, mqtt.Success))
}

// publishDone publishes and goes through the whole exchange.
func (p *peer) publishDone(qos byte, id uint16, topic, payload string, change ...func(*mqtt.Publish)) {
	p.t.Helper()
	p.publish(qos, id, topic, payload, change...)
	switch qos {
	case 1:
		p.success(mqtt.TypePuback, id)
	case 2:
		p.success(mqtt.TypePubrec, id)
		p.pub(mqtt.TypePubrel, id)
		p.success(mqtt.TypePubcomp, id)
	}
}

func (p *peer) subscribe(id uint16, subs ...mqtt.Subscription) []mqtt.Reason {
	p.t.Helper()
	return p.subscribeAs(id, 0, subs...)
}

func (p *peer) subscribeAs(id uint16, identifier uint32, subs ...mqtt.Subscription) []mqtt.Reason {
	p.t.Helper()
	p.send(mqtt.AppendSubscribe(nil, p.v, &mqtt.Subscribe{ID: id, SubscriptionID: identifier, Filters: subs}))
	a, err := mqtt.ParseSuback(p.frame(mqtt.TypeSuback), p.v)
	if err != nil {
		p.t.Fatal(err)
	}
	if a.ID != id || len(a.Reasons) != len(subs) {
		p.t.Fatalf("SUBACK %+v", a)
	}
	return a.Reasons
}

func retain(m *mqtt.Publish) { m.Retain = true }
func dup(m *mqtt.Publish)    { m.Dup = true }

// randomly calls done after a random time, from another goroutine.
func randomly(seed uint64) func(func(error)) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 0))
	return func(done func(error)) {
		mu.Lock()
		d := time.Duration(rng.IntN(3000)) * time.Microsecond
		mu.Unlock()
		time.AfterFunc(d, func() { done(nil) })
	}
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	testkit.Eventually(t, patience, what, f)
}

func numbers(n int) []string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprint(i))
	}
	return s
}

func join(s []string) string { return strings.Join(s, " ") }

var quiet = slog.New(slog.DiscardHandler)

// held keeps commits back until they are let go.
type held struct {
	mu    sync.Mutex
	dones []func(error)
	open  bool
}

func (h *held) deliver(done func(error)) {
	h.mu.Lock()
	if !h.open {
		h.dones = append(h.dones, done)
		h.mu.Unlock()
		return
	}
	h.mu.Unlock()
	done(nil)
}

func (h *held) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.dones)
}

// release ends the commits that wait with err; with open also all later ones.
func (h *held) release(err error, open bool) {
	h.mu.Lock()
	dones := h.dones
	h.dones, h.open = nil, open
	h.mu.Unlock()
	for _, d := range dones {
		d(err)
	}
}

var testDialer = net.Dialer{Timeout: patience}
