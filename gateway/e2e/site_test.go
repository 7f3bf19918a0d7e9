package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// gated is a gateway where nobody comes in without credentials, and whoever runs it.
type gated struct {
	*testkit.Gateway
	t   *testing.T
	bin string
	tls string // address of the TLS listener, if there is one
}

func startGated(t *testing.T, c testkit.GatewayConfig) *gated {
	t.Helper()
	path := bin(t)
	c.YAML = logYAML + c.YAML
	return &gated{Gateway: testkit.StartGatewayWith(t, path, gatewayID, c), t: t, bin: path}
}

// holdfast runs the command line to its end.
func holdfast(t *testing.T, bin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatalf("holdfast %v: %v", args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs a command of its command line that has to succeed, and reads its JSON into a value; nil: it prints none.
func (s *gated) must(into any, args ...string) {
	s.t.Helper()
	args = append(args, "--config", s.File)
	if into != nil {
		args = append(args, "--json")
	}
	out, errs, code := holdfast(s.t, s.bin, args...)
	if code != 0 {
		s.t.Fatalf("holdfast %v: exit code %d: %s%s", args, code, out, errs)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		s.t.Fatalf("holdfast %v: %v in %s", args, err, out)
	}
}

// made is what the API and the command line answer to who registers a device.
type made struct {
	Secret string `json:"secret"`
	Device struct {
		Credentials []struct {
			ID string `json:"id"`
		} `json:"credentials"`
	} `json:"device"`
}

// register registers a device over the API. more: what else is in the body.
func (s *gated) register(id string, more map[string]any) (m made) {
	s.t.Helper()
	body := map[string]any{"id": id}
	for k, v := range more {
		body[k] = v
	}
	b, err := s.Call(http.MethodPost, "/api/v1/devices", body, http.StatusCreated)
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// hosts counts loopback addresses that are given out: wrong tries of one address delay the answers to the next.
var hosts atomic.Uint32

func newHost() string {
	n := hosts.Add(1)
	return fmt.Sprintf("127.7.%d.%d", n/250, n%250+1)
}

// login is a CONNECT as most devices send it.
func login(v mqtt.Version, id, secret string) mqtt.Connect {
	c := mqtt.Connect{Version: v, ClientID: id, CleanStart: true, KeepAlive: 60}
	if secret != "" {
		c.HasUsername, c.Username, c.HasPassword, c.Password = true, id, true, []byte(secret)
	}
	return c
}

// try connects a device, from an address that is its own unless with says another.
func (s *gated) try(c mqtt.Connect, with ...func(*device)) (*device, error) {
	s.t.Helper()
	d := &device{waiting: map[uint16]chan *mqtt.Ack{}, from: newHost()}
	for _, f := range with {
		f(d)
	}
	addr := s.Addr
	if d.tls != nil {
		addr = s.tls
	}
	if err := d.connect(s.t.Context(), addr, c); err != nil {
		return nil, err
	}
	s.t.Cleanup(d.close)
	return d, nil
}

// in connects a device that has to be let in.
func (s *gated) in(c mqtt.Connect, with ...func(*device)) *device {
	s.t.Helper()
	d, err := s.try(c, with...)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// out tries to connect a device that has to be refused with the reason.
func (s *gated) out(reason mqtt.Reason, why string, c mqtt.Connect, with ...func(*device)) {
	s.t.Helper()
	d, err := s.try(c, with...)
	var refused *mqtt.Refused
	switch {
	case err == nil:
		d.client.Abort()
		s.t.Errorf("%s %s, MQTT %v: let in", c.ClientID, why, c.Version)
	case !errors.As(err, &refused) || refused.Packet != mqtt.TypeConnack || refused.Reason != reason:
		s.t.Errorf("%s %s, MQTT %v: %v; want CONNACK %v", c.ClientID, why, c.Version, err, reason)
	}
}

// hears has a device keep what it is sent.
func hears(m *mailbox) func(*device) { return func(d *device) { d.heard = m.put } }

// mailbox keeps what a device is sent.
type mailbox struct{ all chan letter }

type letter struct {
	topic, payload string
	retain         bool
}

func newMailbox() *mailbox { return &mailbox{make(chan letter, 100_000)} }

func (m *mailbox) put(p *mqtt.Publish) {
	m.all <- letter{string(p.Topic), string(p.Payload), p.Retain}
}

// next is the next letter.
func (m *mailbox) next(t *testing.T) letter {
	t.Helper()
	select {
	case l := <-m.all:
		return l
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came within 10 s")
		return letter{}
	}
}

// until returns the letters up to the one on topic.
func (m *mailbox) until(t *testing.T, topic string) (before []letter) {
	t.Helper()
	for {
		l := m.next(t)
		if l.topic == topic {
			return before
		}
		before = append(before, l)
	}
}

// subscribe returns the reason of each filter.
func (d *device) subscribe(t *testing.T, filters ...string) []mqtt.Reason {
	t.Helper()
	s := &mqtt.Subscribe{}
	for _, f := range filters {
		s.Filters = append(s.Filters, mqtt.Subscription{Filter: f, QoS: 1})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ack, err := d.client.Subscribe(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	return ack.Reasons
}

// gone waits until the gateway ends a connection, at most a second, and returns what an MQTT 5 client is told.
func gone(t *testing.T, d *device, why string) mqtt.Reason {
	t.Helper()
	begin := time.Now()
	select {
	case <-d.client.Done():
	case <-time.After(10 * time.Second):
		t.Fatalf("%s, and still connected after 10 s", why)
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("%s, and connected for another %v", why, took)
	}
	var told *mqtt.Refused
	if errors.As(d.client.Err(), &told) {
		return told.Reason
	}
	return mqtt.Success
}

// stays asks a device for a sign of life.
func stays(t *testing.T, d *device, why string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := d.client.Ping(ctx); err != nil {
		t.Errorf("%s: %v", why, err)
	}
}

// presence collects what upstream is told of devices that come and go.
type presence struct {
	t *testing.T

	mu  sync.Mutex
	all map[string]chan wire.DeviceEvent // by device
}

func watchPresence(t *testing.T, addr string) *presence {
	t.Helper()
	p := &presence{t: t, all: map[string]chan wire.DeviceEvent{}}
	watch := &device{waiting: map[uint16]chan *mqtt.Ack{}, heard: func(m *mqtt.Publish) {
		e, err := wire.DecodeDeviceEvent(m.Payload)
		_, device, online, ok := wire.ParseDeviceEventTopic(string(m.Topic))
		if err != nil || !ok || device != e.Device || online != (e.State == wire.StateOnline) || e.Gateway != gatewayID {
			t.Errorf("event of a device on %s: %v: %s", m.Topic, err, m.Payload)
		}
		p.of(e.Device) <- e
	}}
	if err := watch.connect(t.Context(), addr, mqtt.Connect{Version: mqtt.V311, ClientID: "presence", CleanStart: true, KeepAlive: 60}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(watch.close)
	watch.subscribe(t, wire.DeviceEventFilter(gatewayID, ""))
	return p
}

// of is where the events of a device are.
func (p *presence) of(device string) chan wire.DeviceEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all[device] == nil {
		p.all[device] = make(chan wire.DeviceEvent, 1000)
	}
	return p.all[device]
}

// next is the next event of a device.
func (p *presence) next(device string) wire.DeviceEvent {
	p.t.Helper()
	select {
	case e := <-p.of(device):
		return e
	case <-time.After(20 * time.Second):
		p.t.Fatalf("nothing is told of %s within 20 s", device)
		return wire.DeviceEvent{}
	}
}
