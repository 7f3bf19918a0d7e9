package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/bridge/wire"
	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// TestBadCommandsAreRefusedWithAReason sends what is no command: each is answered upstream with its code and a reason,
// and none of them holds up the good one that follows.
func TestBadCommandsAreRefusedWithAReason(t *testing.T) {
	t.Parallel()
	path := bin(t)
	up := testkit.StartMosquitto(t)
	o := openOffice(t, up.Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	startWorker(t, g.Addr, "worker", mqtt.V5, "succeeded")
	known(t, g, "worker")
	g.AwaitCommands(t)
	long := strings.Repeat("x", 129)
	for _, c := range []struct {
		topic, payload, code string
	}{
		{"worker/submit", `{"name":`, "invalid_command"},
		{"worker/submit", "\xa1\x64name", "invalid_command"},
		{"worker/submit", `{"id":"b1","name":"x","nmae":"y"}`, "invalid_command"},
		{"worker/submit", `{"id":"b2"}`, "invalid_command"},
		{"worker/submit", `{"id":"b3","name":"a/b"}`, "invalid_command"},
		{"worker/submit", `{"id":"b4","name":"$SYS"}`, "invalid_command"},
		{"worker/submit", `{"id":"b+5","name":"x"}`, "invalid_command"},
		{"worker/submit", fmt.Sprintf(`{"id":%q,"name":"x"}`, long), "invalid_command"},
		{"worker/submit", `{"id":"b6","name":"x","ttl":"-1s"}`, "expired"},
		{"worker/submit", `{"id":"b7","name":"x","ttl":0}`, "expired"},
		{"worker/submit", `{"id":"b8","name":"x","ttl":"721h"}`, "invalid_command"},
		{"worker/submit", fmt.Sprintf(`{"id":"b9","name":"x","payload":%q}`, strings.Repeat("p", 64<<10+1)), "payload_too_large"},
		{"nobody/submit", `{"id":"b10","name":"x"}`, "unknown_device"},
		{"worker/cancel", `{"id":"never-was"}`, "unknown_command"},
		{"worker/explode", `{}`, "invalid_command"},
	} {
		before := o.allRefusals()
		o.publish("gw/"+gatewayID+"/cmd/"+c.topic, []byte(c.payload))
		testkit.EventuallyNil(t, 10*time.Second, fmt.Sprintf("an answer to %.40q on %s", c.payload, c.topic), func() error {
			all := o.allRefusals()
			if len(all) == len(before) {
				return fmt.Errorf("%d refusals", len(all))
			}
			for _, r := range all {
				if !slices.ContainsFunc(before, func(b wire.CommandEvent) bool { return reflect.DeepEqual(b, r) }) && (r.Code != c.code || r.Reason == "") {
					t.Fatalf("%.60q on %s: code %q, reason %q; want %s", c.payload, c.topic, r.Code, r.Reason, c.code)
				}
			}
			return nil
		})
	}
	o.submit("worker", "good", nil)
	if !o.await("good", "SUCCEEDED", 10*time.Second, nil) {
		t.Errorf("the good one: %v", o.states("good"))
	}
	// The same id again: the same command is told again, another one is a conflict.
	o.submit("worker", "good", map[string]any{"payload": "other"})
	testkit.Eventually(t, 10*time.Second, "the conflict is told", func() bool {
		return slices.ContainsFunc(o.allRefusals(), func(e wire.CommandEvent) bool { return e.ID == "good" && e.Code == "conflict" })
	})
}

// allRefusals are those told so far, of whatever command.
func (o *office) allRefusals() (all []wire.CommandEvent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, events := range o.events {
		for _, e := range events {
			if e.State == wire.StateRefused {
				all = append(all, e)
			}
		}
	}
	return all
}

// TestAnswersThatCannotBeTrue has devices say of commands what cannot be: it is counted and changes nothing.
func TestAnswersThatCannotBeTrue(t *testing.T) {
	t.Parallel()
	path := bin(t)
	g := testkit.StartGateway(t, path, gatewayID, logYAML)
	d := newDevice(t, g.Addr, "liar", mqtt.V5)
	newDevice(t, g.Addr, "other", mqtt.V311)
	known(t, g, "liar")
	known(t, g, "other")
	for device, id := range map[string]string{"liar": "c-liar", "other": "c-other"} {
		if _, err := g.Call(http.MethodPost, "/api/v1/devices/"+device+"/commands", map[string]any{"id": id, "name": "work"}, http.StatusCreated); err != nil {
			t.Fatal(err)
		}
	}
	for _, topic := range []string{
		"cmd/liar/res/c-liar/succeeded",   // it was never sent
		"cmd/liar/res/c-other/succeeded",  // it is another's
		"cmd/liar/res/nothing/failed",     // there is none
		"cmd/liar/res/c-liar/progress",    // not before it was delivered
		"cmd/liar/res/c-liar/transmogrif", // no such word
	} {
		if err := d.publish(t.Context(), topic, []byte("1"), 1); err != nil {
			t.Errorf("%s: %v", topic, err)
		}
	}
	if err := d.publish(t.Context(), "cmd/other/res/c-other/succeeded", nil, 1); err == nil {
		t.Error("a device may publish on another's answer topic")
	}
	for _, id := range []string{"c-liar", "c-other"} {
		if v, err := command(t, g, id); err != nil || v.State != "QUEUED" {
			t.Errorf("%s: %+v, %v", id, v, err)
		}
	}
	if n, err := g.Metric("holdfast_devices_commands_answers_disbelieved_total"); err != nil || n != 5 {
		t.Errorf("%v disbelieved, %v; want 5", n, err)
	}
}

// TestADeviceThatMayNoLongerIsGone registers a device, and takes its right away while it is connected.
func TestADeviceThatMayNoLongerIsGone(t *testing.T) {
	t.Parallel()
	path := bin(t)
	for name, v := range map[string]mqtt.Version{"MQTT 3.1.1": mqtt.V311, "MQTT 5": mqtt.V5} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := testkit.StartGateway(t, path, gatewayID, logYAML)
			b, err := g.Call(http.MethodPost, "/api/v1/devices", map[string]any{"id": "pump"}, http.StatusCreated)
			if err != nil {
				t.Fatal(err)
			}
			var made struct {
				Secret string `json:"secret"`
				Device struct {
					Credentials []struct {
						ID string `json:"id"`
					} `json:"credentials"`
				} `json:"device"`
			}
			if err := json.Unmarshal(b, &made); err != nil {
				t.Fatal(err)
			}
			dial := func(secret string) (*mqtt.Client, error) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				return mqtt.Dial(ctx, mqtt.ClientOptions{Address: g.Addr, Connect: mqtt.Connect{
					Version: v, ClientID: "pump", CleanStart: true, KeepAlive: 60,
					HasUsername: true, Username: "pump", HasPassword: true, Password: []byte(secret),
				}})
			}
			if _, err := dial("wrong"); err == nil {
				t.Fatal("a wrong secret is let in")
			}
			goneWithin(t, dial, made.Secret, "it was disabled", func() error {
				_, err := g.Call(http.MethodPatch, "/api/v1/devices/pump", map[string]any{"enabled": false}, http.StatusOK)
				return err
			})
			if _, err := g.Call(http.MethodPatch, "/api/v1/devices/pump", map[string]any{"enabled": true}, http.StatusOK); err != nil {
				t.Fatal(err)
			}
			goneWithin(t, dial, made.Secret, "its credential was revoked", func() error {
				_, err := g.Call(http.MethodDelete, "/api/v1/devices/pump/credentials/"+made.Device.Credentials[0].ID, nil, http.StatusNoContent)
				return err
			})
		})
	}
}

// goneWithin connects a device, takes something away from it, and wants it to be disconnected within a second and kept out.
func goneWithin(t *testing.T, dial func(secret string) (*mqtt.Client, error), secret, what string, takeAway func() error) {
	t.Helper()
	c, err := dial(secret)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	if err := takeAway(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-time.After(time.Second):
		t.Errorf("%s, and still connected after a second", what)
	}
	if again, err := dial(secret); err == nil {
		again.Abort()
		t.Errorf("%s, and let in again", what)
	}
}
