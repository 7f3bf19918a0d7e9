package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/gateway/broker"
	"holdfast/internal/kv"
)

// demoCloud is the demo's upstream: a broker, and a client that subscribes to it.
type demoCloud struct {
	store   *kv.Store
	broker  *broker.Broker
	address string
	sender  *mqttup.Client           // set before run calls up
	step    func(*wire.CommandEvent) // told of each step of a command, as each of run; nil: nobody is
}

// newDemoCloud makes an upstream broker out of the gateway's own. It keeps nothing but sessions, in dir, or in memory if that
// is "": what is sent to a gateway that is away waits in its session.
func newDemoCloud(dir string, log *slog.Logger) (_ *demoCloud, err error) {
	c := new(demoCloud)
	o := kv.Options{Durability: kv.Interval, SyncInterval: time.Second, Log: log, Fatal: func(err error) {
		log.Error("upstream's store failed", "err", err)
	}}
	if dir == "" {
		dir, o.FS = "upstream", kv.InMemory()
	}
	c.store, err = kv.Open(dir, o)
	if err != nil {
		return nil, err
	}
	c.broker, err = broker.New(broker.Config{
		Listeners: []broker.Listener{{Name: "upstream", Protocol: "mqtt", Address: "127.0.0.1:0"}},
		MaxPacket: 1 << 20, MaxSessionQueue: 1 << 20, MaxSessionQueueBytes: 256 << 20,
	}, c.store, openIntake{c.store}, openDoor{}, nil, log, nil)
	if err == nil {
		err = c.broker.Listen()
	}
	if err != nil {
		return nil, errors.Join(err, c.store.Close())
	}
	c.address = c.broker.Addrs()[0].String()
	return c, nil
}

// run serves until ctx ends, and hands each publish of the gateway that is not about a command to take, whose errors it
// returns in the end. up is called once it has subscribed.
func (c *demoCloud) run(ctx context.Context, up func(), take func(topic string, payload []byte) error) error {
	brokerCtx, stopBroker := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBroker()
	served := make(chan error, 1)
	go func() { served <- c.broker.Run(brokerCtx) }()
	var broken error
	o := mqttup.Options{URL: "mqtt://" + c.address, ClientID: "demo-cloud"}
	client, err := mqttup.Connect(ctx, o, []string{"gw/#"}, func(topic string, payload []byte) {
		switch wire.ParseTopic(topic).Kind {
		case wire.KindCommand: // ours
			return
		case wire.KindCommandEvent:
			e, err := wire.DecodeCommandEvent(payload)
			if err != nil {
				broken = errors.Join(broken, fmt.Errorf("%s: %w", topic, err))
				return
			}
			if c.step != nil {
				c.step(&e)
			}
			return
		default:
		}
		if err := take(topic, payload); err != nil {
			broken = errors.Join(broken, err)
		}
	})
	if err == nil {
		c.sender = client
		up()
		err = client.Wait()
	}
	stopBroker()
	return errors.Join(err, broken, <-served, c.store.Close())
}

// submit sends a command to a gateway and returns when the broker has taken it over.
func (c *demoCloud) submit(ctx context.Context, gateway, device string, s *wire.Submit) error {
	b, err := wire.EncodeSubmit(s)
	if err != nil {
		return err
	}
	return c.sender.Publish(ctx, wire.CommandTopic(gateway, device, wire.ActionSubmit), b)
}

// openIntake takes every message and stores none: local subscribers get it, and that is all.
type openIntake struct{ store *kv.Store }

// Publish implements broker.Intake.
func (i openIntake) Publish(_ *broker.Message, ops []kv.Op, done kv.Done, token uint64) error {
	return i.store.Apply(ops, done, token)
}

// openDoor lets everybody on this machine in.
type openDoor struct{}

// Connect implements broker.Authorizer.
func (d openDoor) Connect(context.Context, *broker.ConnectInfo) (broker.Rights, error) {
	return d, nil
}

// Rights implements broker.Authorizer.
func (d openDoor) Rights(string) broker.Rights { return d }

// MayPublish implements broker.Rights.
func (openDoor) MayPublish([]byte) bool { return true }

// MaySubscribe implements broker.Rights.
func (openDoor) MaySubscribe(string) bool { return true }

// Limits implements broker.Rights.
func (openDoor) Limits() broker.Limits { return broker.Limits{} }

// uplink is the line between gateway and upstream: a TCP proxy that can be cut.
type uplink struct {
	ln     net.Listener
	target string
	bytes  atomic.Int64 // passed on, both ways
	wg     sync.WaitGroup

	mu    sync.Mutex // guards what follows
	state lineState
	conns map[net.Conn]bool // both ends of each connection
}

type lineState int

const (
	lineUp   lineState = iota
	lineMute           // what comes from the upstream is lost
	lineDown           // no connections
)

func newUplink(ctx context.Context, target string) (*uplink, error) {
	ln, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	u := &uplink{ln: ln, target: target, conns: map[net.Conn]bool{}}
	u.wg.Go(u.accept)
	return u, nil
}

func listen(ctx context.Context) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
}

func (u *uplink) accept() {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	for {
		near, err := u.ln.Accept()
		if err != nil {
			return // closed
		}
		far, err := dialer.DialContext(context.Background(), "tcp", u.target)
		if err != nil {
			near.Close()
			continue
		}
		if u.keep(near, far) {
			u.wg.Go(func() { u.pass(near, far, false) })
			u.wg.Go(func() { u.pass(far, near, true) })
		}
	}
}

// keep notes a connection, or ends it while the line is down.
func (u *uplink) keep(near, far net.Conn) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state == lineDown {
		near.Close()
		far.Close()
		return false
	}
	u.conns[near], u.conns[far] = true, true
	return true
}

// pass hands on one way of a connection until it ends, and then ends the other.
func (u *uplink) pass(from, to net.Conn, down bool) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && (!down || !u.is(lineMute)) {
			u.bytes.Add(int64(n))
			if _, writeErr := to.Write(buf[:n]); writeErr != nil {
				err = writeErr
			}
		}
		if err != nil {
			break
		}
	}
	from.Close()
	to.Close()
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.conns, from)
}

func (u *uplink) is(s lineState) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state == s
}

func (u *uplink) set(s lineState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state = s
	if s == lineDown {
		for c := range u.conns {
			c.Close()
		}
	}
}

// Close ends the line and joins.
func (u *uplink) Close() error {
	err := u.ln.Close()
	u.set(lineDown)
	u.wg.Wait()
	return err
}

// child is the gateway's process.
type child struct {
	cmd   *exec.Cmd
	log   *readyLog
	ended chan struct{} // closed when the process is gone
}

// startChild starts exe and waits until it says that it is ready.
func startChild(ctx context.Context, exe string, args []string, logFile string) (*child, error) {
	file, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	// It must outlive ctx: stop and kill end it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), exe, args...)
	c := &child{cmd: cmd, log: &readyLog{file: file, ready: make(chan struct{})}, ended: make(chan struct{})}
	c.cmd.Stdout, c.cmd.Stderr = c.log, c.log
	ownGroup(c.cmd)
	if err := c.cmd.Start(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	go func() {
		_ = c.cmd.Wait() // how it ended stands in ProcessState
		file.Close()
		close(c.ended)
	}()
	limit := time.NewTimer(20 * time.Second)
	defer limit.Stop()
	select {
	case <-c.log.ready:
		return c, nil
	case <-c.ended:
		return nil, fmt.Errorf("the gateway ended at once (%v); its log is %s", c.cmd.ProcessState, logFile)
	case <-limit.C:
		err = fmt.Errorf("the gateway was not ready after 20 s; its log is %s", logFile)
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.kill()
	return nil, err
}

// kill is kill -9.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // it may be gone already
	<-c.ended
}

// stop asks the process to end and waits for it. One that is gone already is no error.
func (c *child) stop() error {
	select {
	case <-c.ended:
		return nil
	default:
	}
	_ = c.cmd.Process.Signal(os.Interrupt) // it may end by itself right now
	limit := time.NewTimer(15 * time.Second)
	defer limit.Stop()
	select {
	case <-c.ended:
	case <-limit.C:
		c.kill()
		return errors.New("the gateway did not stop within 15 s")
	}
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("the gateway ended with %v", c.cmd.ProcessState)
	}
	return nil
}

// readyLog writes a log to its file and watches for the line that says ready. Only the process's one
// copying goroutine writes.
type readyLog struct {
	file  io.Writer
	line  []byte
	ready chan struct{}
	said  bool
}

func (l *readyLog) Write(b []byte) (int, error) {
	for part := range bytes.Lines(b) {
		l.line = append(l.line, part...)
		if l.line[len(l.line)-1] != '\n' {
			break
		}
		if !l.said && bytes.Contains(l.line, []byte(" msg=ready")) {
			l.said = true
			close(l.ready)
		}
		l.line = l.line[:0]
	}
	return l.file.Write(b)
}

// freePort is a loopback port that nobody listens on. The gateway gets it by configuration, because its devices
// find it there again after a restart.
func freePort(ctx context.Context) (string, error) {
	ln, err := listen(ctx)
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}
