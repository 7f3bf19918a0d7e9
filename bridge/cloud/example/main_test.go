package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"holdfast/bridge"
	"holdfast/bridge/mqttup"
	"holdfast/bridge/wire"
	"holdfast/internal/testkit"
)

// TestExample runs the example against a gateway that knows one device, which can reboot and nothing else.
func TestExample(t *testing.T) {
	broker := testkit.StartMosquitto(t)
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := mqttup.Connect(ctx, mqttup.Options{URL: broker.URL(), ClientID: "gateway"}, nil, nil)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	up := make(chan struct{}, 10)
	o := mqttup.CommandsFromConfig(bridge.Config{Name: "cloud", URL: broker.URL()}, "ward-3")
	o.OnUp = func() { up <- struct{}{} }
	done := make(chan error, 1)
	go func() {
		done <- mqttup.TakeCommands(ctx, o, wire.CommandFilter("ward-3"), func(m mqttup.Incoming) {
			defer m.Ack()
			gateway, device, _, _ := wire.ParseCommandTopic(m.Topic)
			s, err := wire.DecodeSubmit(m.Payload)
			if err != nil {
				t.Error(err)
				return
			}
			end := "SUCCEEDED"
			if s.Name != "reboot" {
				end = "REJECTED"
			}
			for _, state := range []string{"QUEUED", "SENT", "DELIVERED", end} {
				e := wire.CommandEvent{Gateway: gateway, Device: device, ID: s.ID, State: state}
				if state == end {
					e.SetResult([]byte("up for 1 s"), "")
				}
				if err := conn.Publish(ctx, wire.CommandEventTopic(gateway, device, s.ID, state), e.Encode()); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = conn.Wait()
	}()
	<-up
	args := []string{"-url", broker.URL(), "-gateway", "ward-3", "-device", "bed-07", "-name"}
	var out bytes.Buffer
	if err := run(t.Context(), testkit.Logger(t), &out, append(args, "reboot")); err != nil || out.String() != "up for 1 s\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	if err := run(t.Context(), testkit.Logger(t), &out, append(args, "dance")); err == nil || !strings.Contains(err.Error(), "REJECTED") {
		t.Errorf("rejected: %v", err)
	}
}
