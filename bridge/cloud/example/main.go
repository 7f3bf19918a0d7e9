// Command example is a program on the cloud's side: it sends one command to a device and shows each of its states, and
// what else its gateway tells meanwhile.
//
//	go run ./bridge/cloud/example -url mqtt://127.0.0.1:1883 -gateway ward-3-east -device bed-07 -name reboot
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"holdfast/bridge/cloud"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, log, os.Stdout, os.Args[1:])
	stop()
	if err != nil {
		log.Error("command did not succeed", "err", err)
		os.Exit(1) //nolint:forbidigo // a program of its own
	}
}

func run(ctx context.Context, log *slog.Logger, stdout io.Writer, args []string) error {
	fs := flag.NewFlagSet("example", flag.ExitOnError)
	url := fs.String("url", "mqtt://127.0.0.1:1883", "the broker")
	gateway := fs.String("gateway", "", "the gateway's id")
	device := fs.String("device", "", "the device's id")
	name := fs.String("name", "reboot", "what it is to do")
	payload := fs.String("payload", "", "with what")
	if err := fs.Parse(args); err != nil {
		return err
	}

	var conn *mqttup.Client // what arrives on it goes to client, which sends with it
	receiver := cloud.New(cloud.Config{})
	client := cloud.NewClient(cloud.ClientConfig{
		Publisher: cloud.PublishFunc(func(ctx context.Context, topic string, payload []byte) error {
			return conn.Publish(ctx, topic, payload)
		}),
		Late:     time.Minute,
		OnDevice: func(e wire.DeviceEvent) { log.Info("device", "id", e.Device, "state", e.State) },
	})
	handle := func(topic string, payload []byte) {
		handled, err := client.Handle(topic, payload)
		if !handled {
			var deliveries []cloud.Delivery
			deliveries, err = receiver.Receive(topic, payload)
			for _, d := range deliveries {
				if d.Kind == cloud.Message {
					log.Info("message", "device", d.Message.Device, "topic", d.Message.Topic, "size_bytes", len(d.Message.Payload))
				}
			}
		}
		if err != nil {
			log.Warn("cannot be read", "topic", topic, "err", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	o := mqttup.Options{URL: *url, ClientID: fmt.Sprintf("example-%d", os.Getpid()), Log: log}
	var err error
	conn, err = mqttup.Connect(ctx, o, []string{wire.Filter(*gateway)}, handle)
	if err != nil {
		cancel()
		return err
	}
	defer func() {
		cancel()
		_ = conn.Wait()
	}()

	command, err := client.Submit(ctx, *gateway, *device, wire.Submit{Name: *name, Payload: []byte(*payload)})
	if err != nil {
		return err
	}
	defer command.Close()
	for e, err := range command.Events(ctx) {
		if err != nil {
			return err
		}
		log.Info("command", "id", e.ID, "state", e.State, "at", e.At.Time, "reason", e.Reason)
	}
	last := command.Last()
	result, err := last.ResultPayload()
	if err != nil {
		return err
	}
	if last.State != "SUCCEEDED" {
		return fmt.Errorf("it ended %s: %s", last.State, last.Reason)
	}
	_, err = fmt.Fprintf(stdout, "%s\n", result)
	return err
}
