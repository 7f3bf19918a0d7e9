package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"holdfast/internal/kv"
)

// serveBaseline is `bench serve`: the embedded broker as it comes out of the box, as a process of its own. It
// stores nothing; with -wait it stores each message in a hook that waits for the commit, which is how such a
// broker is usually made durable.
func serveBaseline(ctx context.Context, args []string, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	addr := flags.String("addr", "", "listen address")
	wait := flags.String("wait", "", "store messages below this folder and wait for each commit")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, os.Interrupt)
	defer stop()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	hook := &baselineHook{}
	if *wait != "" {
		store, err := kv.Open(*wait, kv.Options{Log: log, Fatal: func(err error) { panic(err) }})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, store.Close()) }()
		hook.store = store
	}
	srv := mqtt.New(&mqtt.Options{Logger: log})
	if err := srv.AddHook(hook, nil); err != nil {
		return err
	}
	if err := srv.AddListener(listeners.NewTCP(listeners.Config{ID: "tcp", Address: *addr})); err != nil {
		return err
	}
	if err := srv.Serve(); err != nil {
		return err
	}
	fmt.Fprintln(stderr, "msg=ready")
	<-ctx.Done()
	return srv.Close()
}

// baselineHook lets everybody do everything, and stores before the acknowledgement if it has a store.
type baselineHook struct {
	mqtt.HookBase
	store *kv.Store
	seq   atomic.Uint64
}

func (*baselineHook) ID() string { return "baseline" }

func (h *baselineHook) Provides(b byte) bool {
	return b == mqtt.OnConnectAuthenticate || b == mqtt.OnACLCheck || b == mqtt.OnPublish && h.store != nil
}

func (*baselineHook) OnConnectAuthenticate(*mqtt.Client, packets.Packet) bool { return true }

func (*baselineHook) OnACLCheck(*mqtt.Client, string, bool) bool { return true }

// OnPublish runs on the connection's read loop: nothing else of the connection moves meanwhile.
func (h *baselineHook) OnPublish(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	key := binary.BigEndian.AppendUint64([]byte{kv.PrefixData}, h.seq.Add(1))
	done := make(signalDone, 1)
	if err := h.store.Apply([]kv.Op{{Key: key, Value: pk.Payload}}, done, 0); err != nil {
		return pk, packets.ErrRejectPacket
	}
	if err := <-done; err != nil {
		return pk, packets.ErrRejectPacket
	}
	return pk, nil
}

// signalDone hands the end of a write to whoever waits for it.
type signalDone chan error

func (d signalDone) Done(_, _ uint64, err error) { d <- err }
