package e2e_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// TestPresenceIsToldUpstream has devices come and go, and the gateway end in both ways: upstream is told of each, also of what happened
// while the link was down.
func TestPresenceIsToldUpstream(t *testing.T) {
	t.Parallel()
	up := testkit.StartMosquitto(t)
	link := testkit.StartProxy(t, up.Addr)
	told := watchPresence(t, up.Addr)
	s := startGated(t, testkit.GatewayConfig{YAML: fmt.Sprintf("upstreams:\n  - { name: cloud, url: %q }\n", "mqtt://"+link.Addr())})
	protocols := map[string]mqtt.Version{"three": mqtt.V311, "five": mqtt.V5, "away": mqtt.V5, "last": mqtt.V311}
	logins := map[string]mqtt.Connect{}
	for id, v := range protocols {
		logins[id] = login(v, id, s.register(id, nil).Secret)
	}
	is := func(device, state, reason string) {
		t.Helper()
		e := told.next(device)
		protocol := map[mqtt.Version]string{mqtt.V311: "MQTT 3.1.1", mqtt.V5: "MQTT 5"}[protocols[device]]
		if e.State != state || !strings.Contains(e.Reason, reason) || e.Protocol != protocol || !strings.HasPrefix(e.Address, "127.") || e.At.IsZero() || e.ClockState == "" {
			t.Errorf("%s: told %+v; want %s, %q", device, e, state, reason)
		}
	}
	shown := func(device string, connected bool, reason string) {
		t.Helper()
		var view struct {
			Presence struct {
				Connected bool   `json:"connected"`
				Reason    string `json:"reason"`
			} `json:"presence"`
		}
		testkit.EventuallyNil(t, 10*time.Second, device+" is shown as it is", func() error {
			if err := s.Get("/api/v1/devices/"+device, &view); err != nil {
				return err
			}
			if view.Presence.Connected != connected || !strings.Contains(view.Presence.Reason, reason) {
				return fmt.Errorf("%+v", view)
			}
			return nil
		})
	}

	for _, id := range []string{"three", "five"} {
		d := s.in(logins[id])
		is(id, "online", "")
		shown(id, true, "")
		if err := d.client.Disconnect(mqtt.Success); err != nil {
			t.Fatal(err)
		}
		is(id, "offline", "client disconnected")
		d = s.in(logins[id])
		is(id, "online", "")
		d.close()
		is(id, "offline", "connection was lost")
		shown(id, false, "connection was lost")
	}
	d := s.in(logins["three"])
	is("three", "online", "")
	s.must(nil, "device", "disable", "three")
	gone(t, d, "it was disabled")
	is("three", "offline", "disabled")
	s.must(nil, "device", "enable", "three")
	s.in(logins["three"])
	is("three", "online", "")
	five := s.in(logins["five"])
	is("five", "online", "")

	// While the link is down it waits in the spool.
	link.Set(testkit.Faults{Refuse: true})
	link.Reset()
	s.in(logins["away"]).close()
	shown("away", false, "connection was lost")
	link.Set(testkit.Faults{})
	is("away", "online", "")
	is("away", "offline", "connection was lost")

	// Killed while two are connected.
	stays(t, five, "all of that")
	s.Kill()
	s.Restart()
	is("three", "offline", "gateway restarted")
	is("five", "offline", "gateway restarted")
	shown("five", false, "gateway restarted")
	s.in(logins["five"])
	is("five", "online", "")
	shown("five", true, "")
	shown("away", false, "connection was lost") // it was not connected: nothing has changed

	// Stopped in order.
	s.in(logins["last"])
	is("last", "online", "")
	if code := s.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	s.Restart()
	is("last", "offline", "gateway")
	shown("last", false, "gateway")
}
