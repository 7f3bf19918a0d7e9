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

// TestBadCommandsAreRefusedWithAReason sends what is no command: each is answered upstream with its code and a reason
// that tells the way out, and none of them holds up the good one that follows.
func TestBadCommandsAreRefusedWithAReason(t *testing.T) {
	t.Parallel()
	path := bin(t)
	up := testkit.StartMosquitto(t)
	o := openOffice(t, up.Addr)
	g := testkit.StartGateway(t, path, gatewayID, logYAML+fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", up.URL()))
	startWorker(t, g.Addr, "worker", mqtt.V5, "succeeded")
	known(t, g, "worker")
	g.AwaitCommands(t)
	for id, enabled := range map[string]bool{"disabled": false, "absent": true} {
		if _, err := g.Call(http.MethodPost, "/api/v1/devices", map[string]any{"id": id, "enabled": enabled}, http.StatusCreated); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 256 { // all that may wait for a device
		order(t, g, "absent", fmt.Sprintf("waits-%d", n), nil)
	}
	long := strings.Repeat("x", 129)
	deep := strings.Repeat("[", 100_000)
	text := func(s string) string { return string(rune(0x60+len(s))) + s } // of a CBOR map, up to 23 bytes
	n := 0
	for _, c := range []struct {
		topic, payload string
		id             string // that is told; "": none
		code, way      string // way: what the reason says of the way out
	}{
		// No JSON, no CBOR.
		{"worker/submit", ``, "", "invalid_command", "empty"},
		{"worker/submit", `reboot`, "", "invalid_command", "JSON"},
		{"worker/submit", `{"name":`, "", "invalid_command", "JSON"},
		{"worker/submit", `[]`, "", "invalid_command", "object"},
		{"worker/submit", `{"id":"j1","name":"x"} {}`, "", "invalid_command", ""},
		{"worker/submit", `{"id":"j2","name":"x","payload":` + deep, "", "invalid_command", ""},
		{"worker/submit", "\xa1\x64name", "", "invalid_command", "CBOR"},
		{"worker/submit", "\xa1\x64name\x61x\x00", "", "invalid_command", ""},
		{"worker/submit", "\xbf\x64name", "", "invalid_command", "CBOR"},
		{"worker/submit", "\xbb\xff\xff\xff\xff\xff\xff\xff\xff", "", "invalid_command", "CBOR"},
		{"worker/submit", "\xa1" + text("name") + "\x7b\xff\xff\xff\xff\xff\xff\xff\xffx", "", "invalid_command", "CBOR"},
		{"worker/submit", "\xa2" + text("id") + text("c1") + text("nmae") + text("x"), "c1", "invalid_command", "nmae"},
		{"worker/submit", "\x00\x01\x02", "", "invalid_command", ""},
		// Keys and values.
		{"worker/submit", `{"id":"b1","name":"x","nmae":"y"}`, "b1", "invalid_command", "nmae"},
		{"worker/submit", `{"id":"b2"}`, "b2", "invalid_command", "name"},
		{"worker/submit", `{"id":"b3","id":"b4","name":"x"}`, "b3", "invalid_command", "id"},
		{"worker/submit", `{"id":"b5","name":7}`, "b5", "invalid_command", "name"},
		{"worker/submit", `{"id":"b6","name":"x","payload":"a","payload_base64":"YQ=="}`, "b6", "invalid_command", "one of them"},
		{"worker/submit", `{"id":"b7","name":"x","feedback":"loud"}`, "b7", "invalid_command", "none, negative, positive"},
		{"worker/submit", `{"id":"b8","name":"x","not_before":"tomorrow"}`, "b8", "invalid_command", "RFC 3339"},
		{"worker/submit", `{"id":"b9","name":"x","ttl":"1h","not_before":"2199-01-01T00:00:00Z"}`, "b9", "invalid_command", "raise ttl"},
		// Names and ids that would be more than one level of a topic, or another one.
		{"worker/submit", `{"id":"n1","name":""}`, "n1", "invalid_command", "name"},
		{"worker/submit", `{"id":"n2","name":"a/b"}`, "n2", "invalid_command", "one level"},
		{"worker/submit", `{"id":"n3","name":"$SYS"}`, "n3", "invalid_command", "'$'"},
		{"worker/submit", `{"id":"n4","name":"+"}`, "n4", "invalid_command", "'+'"},
		{"worker/submit", `{"id":"n5","name":"a#"}`, "n5", "invalid_command", "'#'"},
		{"worker/submit", fmt.Sprintf(`{"id":"n6","name":%q}`, long), "n6", "invalid_command", "at most 128"},
		{"worker/submit", `{"id":"n7","name":"a\u0000b"}`, "n7", "invalid_command", ""},
		{"worker/submit", `{"id":"b+5","name":"x"}`, "b+5", "invalid_command", "letters, digits"},
		{"worker/submit", `{"id":"a/b","name":"x"}`, "a/b", "invalid_command", "letters, digits"},
		{"worker/submit", `{"id":"#","name":"x"}`, "#", "invalid_command", "letters, digits"},
		{"worker/submit", `{"id":"$SYS","name":"x"}`, "$SYS", "invalid_command", "letters, digits"},
		{"worker/submit", `{"id":"é","name":"x"}`, "é", "invalid_command", "letters, digits"},
		{"worker/submit", fmt.Sprintf(`{"id":%q,"name":"x"}`, long), long, "invalid_command", "1 to 128"},
		{"worker/submit", fmt.Sprintf(`{"id":%q,"name":"x"}`, strings.Repeat("y", 60_000)), strings.Repeat("y", 256) + "…", "invalid_command", "1 to 128"},
		// Times and sizes.
		{"worker/submit", `{"id":"t1","name":"x","ttl":"-1s"}`, "t1", "expired", "ttl"},
		{"worker/submit", `{"id":"t2","name":"x","ttl":0}`, "t2", "expired", "ttl"},
		{"worker/submit", `{"id":"t3","name":"x","ttl":"721h"}`, "t3", "invalid_command", "720h"},
		{"worker/submit", `{"id":"t4","name":"x","ttl":"soon"}`, "t4", "invalid_command", "1h30m"},
		{"worker/submit", fmt.Sprintf(`{"id":"s1","name":"x","payload":%q}`, strings.Repeat("p", 64<<10+1)), "s1", "payload_too_large", "reference"},
		{"worker/submit", fmt.Sprintf(`{"id":"s2","name":"x","payload":%q}`, strings.Repeat("p", 1<<20)), "", "payload_too_large", ""},
		// Devices.
		{"nobody/submit", `{"id":"d1","name":"x"}`, "d1", "unknown_device", "holdfast device"},
		{"$SYS/submit", `{"id":"d2","name":"x"}`, "d2", "invalid_command", "'$'"},
		{"a%2Fb/submit", `{"id":"d3","name":"x"}`, "d3", "invalid_command", "device id"},
		{"%2B/submit", `{"id":"d4","name":"x"}`, "d4", "invalid_command", "device id"},
		{"%23/submit", `{"id":"d5","name":"x"}`, "d5", "invalid_command", "device id"},
		{strings.Repeat("z", 300) + "/submit", `{"id":"d6","name":"x"}`, "d6", "invalid_command", "device id"},
		{"/submit", `{"id":"d7","name":"x"}`, "", "invalid_command", "submit"},
		{"%zz/submit", `{"id":"d8","name":"x"}`, "", "invalid_command", "submit"},
		{"disabled/submit", `{"id":"d9","name":"x"}`, "d9", "device_disabled", "holdfast device enable"},
		{"absent/submit", `{"id":"d10","name":"x"}`, "d10", "queue_full", "cancel some"},
		// What is no submit.
		{"worker/cancel", `{"id":"never-was"}`, "never-was", "unknown_command", "holdfast command list"},
		{"worker/cancel", `{"id":"waits-0"}`, "waits-0", "unknown_command", ""}, // it is another device's
		{"worker/cancel", `{}`, "", "invalid_command", "id"},
		{"worker/cancel", `{"id":""}`, "", "invalid_command", "id"},
		{"worker/cancel", `{`, "", "invalid_command", ""},
		{"worker/explode", `{}`, "", "invalid_command", "submit"},
		{"worker/", `{}`, "", "invalid_command", "submit"},
	} {
		before := o.allRefusals()
		o.publish("gw/"+gatewayID+"/cmd/"+c.topic, []byte(c.payload))
		what := fmt.Sprintf("%.60q on %.60s", c.payload, c.topic)
		testkit.EventuallyNil(t, 10*time.Second, "an answer to "+what, func() error {
			all := o.allRefusals()
			if len(all) == len(before) {
				return fmt.Errorf("%d refusals", len(all))
			}
			for _, r := range all {
				if slices.ContainsFunc(before, func(b wire.CommandEvent) bool { return reflect.DeepEqual(b, r) }) {
					continue
				}
				if r.Code != c.code || r.ID != c.id || len(r.Reason) < 10 || len(r.Reason) > 600 || !strings.Contains(r.Reason, c.way) {
					t.Errorf("%s: id %.300q, code %q, reason %q; want id %.300q, %s, and %q as the way out", what, r.ID, r.Code, r.Reason, c.id, c.code, c.way)
				}
			}
			return nil
		})
		// Now and then a good one, which nothing of that holds up.
		if n++; n%10 == 0 {
			id := fmt.Sprintf("good-%d", n)
			o.submit("worker", id, nil)
			if !o.await(id, "SUCCEEDED", 10*time.Second, nil) {
				t.Fatalf("the good one after %s: %v", what, o.states(id))
			}
		}
	}
	o.submit("worker", "good", nil)
	if !o.await("good", "SUCCEEDED", 10*time.Second, nil) {
		t.Errorf("the good one: %v", o.states("good"))
	}
	// A good one in CBOR, and one whose payload is as large as it may be.
	o.publish("gw/"+gatewayID+"/cmd/worker/submit", []byte("\xa2"+text("id")+text("cbor")+text("name")+text("x")))
	o.submit("worker", "large", map[string]any{"payload": strings.Repeat("p", 64<<10)})
	for _, id := range []string{"cbor", "large"} {
		if !o.await(id, "SUCCEEDED", 10*time.Second, nil) {
			t.Errorf("%s: %v", id, o.states(id))
		}
	}
	// The same id again: the same command is told again, another one is a conflict; and what has ended cannot be called off.
	told := func(id, code, way string) {
		t.Helper()
		testkit.Eventually(t, 10*time.Second, code+" is told", func() bool {
			return slices.ContainsFunc(o.allRefusals(), func(e wire.CommandEvent) bool { return e.ID == id && e.Code == code && strings.Contains(e.Reason, way) })
		})
	}
	o.submit("worker", "good", nil)
	testkit.Eventually(t, 10*time.Second, "the repeat is answered", func() bool {
		return slices.ContainsFunc(o.all("good"), func(e wire.CommandEvent) bool { return e.Repeat && e.State == "SUCCEEDED" })
	})
	o.submit("worker", "good", map[string]any{"payload": "other"})
	told("good", "conflict", "new id")
	o.submit("absent", "good", nil)
	o.cancel("worker", "good")
	told("good", "already_ended", "SUCCEEDED")
	// A place is free when one has been called off.
	o.cancel("absent", "waits-7")
	if !o.await("waits-7", "CANCELED", 10*time.Second, nil) {
		t.Errorf("waits-7: %v", o.states("waits-7"))
	}
	o.submit("absent", "fits", nil)
	if !o.await("fits", "QUEUED", 10*time.Second, nil) {
		t.Errorf("a free place is not given: %v, refused %v", o.states("fits"), o.refusals("fits"))
	}
	st, err := g.Status()
	if refused, err2 := g.Metric("holdfast_devices_commands_refused_total"); err != nil || err2 != nil || int(st.Commands.Refused) != n+3 || int(refused) != n+3 {
		t.Errorf("status counts %d refusals, %v, the metric %v, %v; want %d", st.Commands.Refused, err, refused, err2, n+3)
	}
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

// TestAnswersThatCannotBeTrue has devices say of commands what cannot be: it is counted and changes nothing, whether the gateway
// knows who they are or lets everybody in.
func TestAnswersThatCannotBeTrue(t *testing.T) {
	t.Parallel()
	for _, anonymous := range []bool{false, true} {
		t.Run(fmt.Sprintf("anonymous=%v", anonymous), func(t *testing.T) {
			t.Parallel()
			// The role lets a device publish under another's answers: that does not make it that device.
			s := startGated(t, testkit.GatewayConfig{Devices: fmt.Sprintf(`{ anonymous: %v, roles: [ { name: loose, publish: ["#"], subscribe: ["#"] } ] }`, anonymous)})
			g := s.Gateway
			connect := func(id string, v mqtt.Version, role string, with ...func(*device)) *device {
				if anonymous {
					d := s.in(login(v, id, ""), with...)
					known(t, g, id)
					return d
				}
				return s.in(login(v, id, s.register(id, map[string]any{"role": role}).Secret), with...)
			}
			got := newMailbox()
			liar, other := connect("liar", mqtt.V5, "device", hears(got)), connect("other", mqtt.V311, "loose")
			counted := map[string]float64{}
			says := func(d *device, topic, reason string) {
				t.Helper()
				if err := d.publish(t.Context(), topic, []byte("1"), 1); err != nil {
					t.Errorf("%s: %v", topic, err)
				}
				if reason != "" {
					counted[reason]++
				}
				for _, r := range []string{"malformed", "unknown", "other_device", "never_sent", "ended", "contradiction"} {
					if n, err := g.Metric("holdfast_devices_commands_answers_disbelieved_total", fmt.Sprintf("reason=%q", r)); err != nil || n != counted[r] {
						t.Errorf("after %s: %v counted as %s, %v; want %v", topic, n, r, err, counted[r])
					}
				}
			}
			order(t, g, "liar", "c1", nil)
			order(t, g, "other", "c-other", nil)
			says(liar, "cmd/liar/res/c1/succeeded", "never_sent")
			says(liar, "cmd/liar/res/c1/accepted", "never_sent")
			says(liar, "cmd/liar/res/c-other/succeeded", "other_device")
			says(liar, "cmd/liar/res/nothing/failed", "unknown")
			says(liar, "cmd/liar/res/$SYS/failed", "unknown")
			says(liar, "cmd/liar/res/"+strings.Repeat("x", 1000)+"/failed", "unknown")
			says(liar, "cmd/liar/res/c1/transmogrified", "malformed")
			if anonymous {
				if err := other.publish(t.Context(), "cmd/liar/res/c1/succeeded", nil, 1); err == nil {
					t.Error("a device that is let in without credentials may publish on another's answer topic")
				}
			} else {
				says(other, "cmd/liar/res/c1/succeeded", "unknown") // in its role, and nobody's answer
			}
			for _, id := range []string{"c1", "c-other"} {
				if v, err := command(t, g, id); err != nil || v.State != "QUEUED" {
					t.Errorf("%s: %+v, %v", id, v, err)
				}
			}

			// It gets the command and answers twice: the first outcome stands.
			liar.subscribe(t, wire.RequestFilter("liar"))
			got.until(t, wire.RequestTopic("liar", "c1", "work"))
			becomes(t, g, "c1", "DELIVERED")
			says(liar, "cmd/liar/res/c1/failed", "")
			says(liar, "cmd/liar/res/c1/failed", "") // a repeat, which is no lie
			says(liar, "cmd/liar/res/c1/succeeded", "contradiction")
			says(liar, "cmd/liar/res/c1/rejected", "contradiction")
			says(liar, "cmd/liar/res/c1/progress", "ended")
			if !anonymous {
				says(other, "cmd/liar/res/c1/succeeded", "unknown")
			}
			if v, err := command(t, g, "c1"); err != nil || v.State != "FAILED" || v.Late || v.steps() != "QUEUED SENT DELIVERED FAILED" {
				t.Errorf("c1: %+v, %v", v, err)
			}
			sum := 0.0
			for _, n := range counted {
				sum += n
			}
			if st, err := g.Status(); err != nil || st.Commands.Disbelieved != uint64(sum) {
				t.Errorf("status counts %d, %v; want %v", st.Commands.Disbelieved, err, sum)
			}
			// And the next good one comes through.
			order(t, g, "liar", "c2", nil)
			got.until(t, wire.RequestTopic("liar", "c2", "work"))
			says(liar, "cmd/liar/res/c2/succeeded", "")
			becomes(t, g, "c2", "SUCCEEDED")
		})
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
