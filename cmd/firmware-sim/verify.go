package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	firmwaresim "holdfast/firmware-sim"
)

const (
	defaultVerifyWait = 30 * time.Second
	subscribeWithin   = 20 * time.Second
	forgetWithin      = 3 * time.Second
)

// verifyOptions say where to look for what was published.
type verifyOptions struct {
	mqttup.Options
	filters []string
	wait    time.Duration
}

func (o *verifyOptions) check() error {
	if o.URL == "" {
		if len(o.filters) > 0 || o.Username != "" || o.PasswordFile != "" || o.TLS.CA != "" {
			return errors.New("--verify-filter, --verify-username, --verify-password-file and --verify-ca need --verify URL")
		}
		return nil
	}
	o.ClientID = fmt.Sprintf("firmware-sim-verify-%d-%d", os.Getpid(), time.Now().UnixNano())
	if len(o.filters) == 0 {
		o.filters = []string{wire.Filter(""), "dt/#"}
	}
	if o.wait <= 0 {
		return fmt.Errorf("--verify-wait %v: a positive time", o.wait)
	}
	if _, err := mqttup.New(o.Options); err != nil {
		return fmt.Errorf("--verify: %w", err)
	}
	return nil
}

// verifier notes what arrives upstream of the messages of a fleet.
type verifier struct {
	o        verifyOptions
	arrivals *firmwaresim.Arrivals
	receiver *cloud.Receiver
	ids      map[string]bool
	since    int64 // Unix ms: what was sampled before is of another run
	log      *slog.Logger
	cancel   context.CancelFunc
	ended    chan struct{}

	mu       sync.Mutex
	last     time.Time // under mu: of the last arrival
	foreign  uint64    // under mu: messages of others
	gaps     uint64    // under mu: announced as lost by rule
	unread   uint64    // under mu: publishes that could not be decoded
	failure  error     // under mu: why the subscription ended
	decoding error     // under mu: of the first unread
}

// arrivedStats is what came in besides the fleet's messages.
type arrivedStats struct {
	Removed    uint64 `json:"duplicates_removed"` // sent again by the gateway, recognised by id
	Foreign    uint64 `json:"foreign"`            // messages of other devices or runs
	Gaps       uint64 `json:"gaps_announced"`     // messages
	Unreadable uint64 `json:"unreadable"`         // publishes
	Bytes      uint64 `json:"publish_bytes"`      // of topics and payloads
}

// startVerifier subscribes and returns when the subscription stands.
func startVerifier(ctx context.Context, o verifyOptions, ids []string, log *slog.Logger) (*verifier, error) {
	v := &verifier{
		o: o, arrivals: firmwaresim.NewArrivals(), receiver: cloud.New(cloud.Config{}), ids: make(map[string]bool),
		since: time.Now().UnixMilli(), log: log, ended: make(chan struct{}), last: time.Now(),
	}
	for _, id := range ids {
		v.ids[id] = true
	}
	up := make(chan struct{}, 1)
	o.Log = log
	o.OnUp = func() {
		select {
		case up <- struct{}{}:
		default:
		}
	}
	// What is in a queue upstream when the connection breaks must not count as lost.
	o.Persistent = true
	// The subscriber outlives a signal, which only ends sampling.
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	v.cancel = cancel
	go func() {
		defer close(v.ended)
		err := mqttup.Subscribe(life, o.Options, o.filters, v.receive)
		v.mu.Lock()
		defer v.mu.Unlock()
		v.failure = err
	}()
	timeout := time.NewTimer(subscribeWithin)
	defer timeout.Stop()
	select {
	case <-up:
		return v, nil
	case <-v.ended:
		return nil, fmt.Errorf("--verify %s: %w", o.URL, v.failure)
	case <-timeout.C:
	case <-ctx.Done():
	}
	v.stop()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, fmt.Errorf("--verify %s: no subscription within %v; is a broker there?", o.URL, subscribeWithin)
}

// stop ends the subscription and has the broker forget its session.
func (v *verifier) stop() {
	v.cancel()
	<-v.ended
	ctx, cancel := context.WithTimeout(context.Background(), forgetWithin)
	defer cancel()
	o := v.o.Options
	o.Persistent, o.OnUp = false, cancel // a session that is not persistent takes the place of the other
	if err := mqttup.Subscribe(ctx, o, v.o.filters, func(string, []byte) {}); err != nil {
		v.log.Warn("the broker may keep the session of --verify", "client", o.ClientID, "err", err)
	}
}

// receive is called for one publish after the other.
func (v *verifier) receive(topic string, payload []byte) {
	deliveries, err := v.receiver.Receive(topic, payload)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		if v.unread++; v.unread == 1 {
			v.decoding = err
			v.log.Warn("publish cannot be read; more are only counted", "topic", topic, "size_bytes", len(payload), "err", err)
		}
		return
	}
	for i := range deliveries {
		d := &deliveries[i]
		switch d.Kind {
		case cloud.Message:
			p, err := firmwaresim.ParsePayload(d.Message.Payload)
			if err != nil || !v.ids[p.Device] || p.TS < v.since {
				v.foreign++
				continue
			}
			v.arrivals.Add(p.Device, p.Stream, p.N)
			v.last = time.Now()
		case cloud.Gap:
			v.gaps += d.Missing.Count()
			v.log.Warn("the gateway announces a gap", "lane", d.Lane, "missing", d.Missing.Count(), "reason", d.Gap.Reason)
		default: // repeats and holes count in the receiver, state and events are not asked for
		}
	}
}

// settle waits until all that was acknowledged is there, or nothing has come for too long.
func (v *verifier) settle(ledger *firmwaresim.Ledger) firmwaresim.Verdict {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	v.mu.Lock()
	v.last = time.Now() // from now on it counts
	v.mu.Unlock()
	for {
		verdict := ledger.Verify(v.arrivals)
		v.mu.Lock()
		idle := time.Since(v.last)
		v.mu.Unlock()
		if verdict.Lost == 0 || idle > v.o.wait {
			return verdict
		}
		select {
		case <-tick.C:
		case <-v.ended:
			return ledger.Verify(v.arrivals)
		}
	}
}

func (v *verifier) stats() arrivedStats {
	s := v.receiver.Stats()
	v.mu.Lock()
	defer v.mu.Unlock()
	return arrivedStats{Removed: s.Duplicates, Foreign: v.foreign, Gaps: v.gaps, Unreadable: v.unread, Bytes: s.PublishBytes}
}

// String is the part of the report above the verdict.
func (s arrivedStats) String() string {
	text := fmt.Sprintf("%-18s %s bytes of topics and payloads", "upstream", grouped(s.Bytes))
	for _, x := range []struct {
		n    uint64
		what string
	}{
		{s.Removed, "repeats of the gateway removed by id"},
		{s.Foreign, "messages of others"},
		{s.Gaps, "messages announced as lost by rule"},
		{s.Unreadable, "publishes unreadable"},
	} {
		if x.n > 0 {
			text += fmt.Sprintf(", %d %s", x.n, x.what)
		}
	}
	return text + "\n"
}

func verdictText(v firmwaresim.Verdict) string {
	text := fmt.Sprintf("%-18s %d messages, %d more than once because their device sent them again\n", "arrived", v.Arrived, v.Duplicates)
	text += fmt.Sprintf("%-18s %d lost, %d out of order, %d never sent\n", "verdict", v.Lost, v.OutOfOrder, v.Unknown)
	for _, e := range v.Examples {
		text += "  " + e + "\n"
	}
	return text
}
